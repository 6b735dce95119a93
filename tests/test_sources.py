"""Documents by name: their order and positions, and what is said about broken input."""

import gzip
import itertools
import json
import lzma
import os
import pathlib
import subprocess
import sys
import sysconfig

import optax
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from qkjax import errors
from qkjax.data import docstrings, sources

TEXTS = ["first text", "", "dritter Text: ä€😀", "a\x00b\u2028c\ttab"]
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".zst": zstandard.open}


def _write_lines(path, lines):
    with OPENERS["" if path.suffix == ".jsonl" else path.suffix](path, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
    return path


def _json_lines(texts, field="text"):
    return [json.dumps({"id": i, field: text}).encode() for i, text in enumerate(texts)]


def _texts(spec, **options):
    return [document.text for document in sources.open_source(spec, **options).documents()]


def _refusal(spec, **options):
    """The one-line message with which reading the source stops."""
    with pytest.raises(errors.UsageError) as caught:
        _texts(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", OPENERS)
def test_jsonl_plain_or_compressed_gives_the_same_documents(tmp_path, suffix):
    path = _write_lines(tmp_path / f"a.jsonl{suffix}", _json_lines(TEXTS))
    source = sources.open_source(f"jsonl:{path}")
    documents = list(source.documents())
    assert [document.text for document in documents] == TEXTS
    assert documents[2].position == f"{path}:3"
    assert list(source.documents()) == documents  # a second pass gives them again
    assert source.describe() == {"files": 1, "bytes": path.stat().st_size}


def test_files_of_a_glob_are_read_in_sorted_order(tmp_path):
    for name in ("b", "c", "a"):
        _write_lines(tmp_path / f"{name}.jsonl", _json_lines([name]))
    (tmp_path / "d.jsonl").mkdir()
    assert _texts(f"jsonl:{tmp_path}/*.jsonl") == ["a", "b", "c"]


def test_the_field_follows_the_last_colon_without_a_slash_after_it(tmp_path):
    folder = tmp_path / "odd:name"
    folder.mkdir()
    _write_lines(folder / "a.jsonl", _json_lines(["x"], field="body"))
    assert _texts(f"jsonl:{folder}/*.jsonl:body") == ["x"]
    (folder / "plain").write_bytes(b'{"text": "y"}')
    assert _texts(f"jsonl:{folder}/plain") == ["y"]
    refused = _refusal(f"jsonl:{folder}/*.jsonl")
    assert "no field 'text', found body, id (the field is named after the files: jsonl:" in refused


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n  \r\n{"text": "y"}')
    assert _texts(f"jsonl:{path}") == ["x", "y"]
    path.write_bytes(b"\xef\xbb\xbfx\r\n")
    assert _texts(f"text:{path}") == ["x\r\n"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["x"]', "expected a JSON object, found list"),
        (b'{"txt": "x"}', "no field 'text', found txt"),
        (b'{"text": null}', "field 'text': expected text, found NoneType"),
        (b'{"text": 3}', "field 'text': expected text, found int"),
        (b'{"text": "\xff"}', r"not valid UTF-8 (byte 11 of the line)"),
        (b"\x89PNG\r\x00\x1a", "not valid UTF-8"),
        (b'{"text": "a\x00"}', "not valid JSON"),
        (b'{"text": "\\ud800"}', "holds a lone surrogate"),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, line, problem):
    lines = _json_lines(["x", "y"])
    path = _write_lines(tmp_path / "a.jsonl", [lines[0], line, lines[1], line])
    message = _refusal(f"jsonl:{path}")
    assert message.startswith(f"{path}:2: ") and problem in message
    assert "--max_bad_lines" in message
    assert _refusal(f"jsonl:{path}", max_bad_lines=1).startswith(f"{path}:4: ")
    source = sources.open_source(f"jsonl:{path}", max_bad_lines=2)
    for _ in range(2):  # each pass counts for itself
        assert [document.text for document in source.documents()] == ["x", "y"]
        assert source.bad_lines == 2


def test_an_empty_jsonl_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.touch()
    assert _refusal(f"jsonl:{path}").startswith(f"{path}: empty")


def test_zstd_frames_lines_across_blocks_and_a_missing_library(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    lines = [json.dumps({"text": f"{i} " * 3000}).encode() + b"\n" for i in range(40)]
    frames = [b"".join(lines[:25]), b"".join(lines[25:]).rstrip(b"\n")]
    path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, frames)))
    assert _texts(f"jsonl:{path}") == [f"{i} " * 3000 for i in range(40)]
    monkeypatch.setitem(sys.modules, "zstandard", None)
    message = _refusal(f"jsonl:{path}")
    assert "needs the library zstandard" in message and "pip install -e '.[data]'" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_damaged_archive_is_named_with_the_last_good_line(tmp_path, suffix):
    lines = [json.dumps({"text": f"{i} " * 400}).encode() for i in range(2000)]
    path = _write_lines(tmp_path / f"a.jsonl{suffix}", lines)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    message = _refusal(f"jsonl:{path}")
    number = int(message.split(": truncated after line ")[1].split()[0])
    assert message.startswith(f"{path}: ") and 0 < number < 2000
    path.write_bytes(b"no archive at all")
    assert f"{path}: cannot be unpacked as {suffix} after line 0" in _refusal(f"jsonl:{path}")


@pytest.mark.parametrize("suffix", [".GZ", ".lzma", ".zstd", ".XZ", ".Zst"])
def test_suffixes_of_archives_by_their_other_names(tmp_path, suffix):
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    pack = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    }
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack.get(suffix.lower(), zstandard.ZstdCompressor().compress)(data))
    assert _texts(f"jsonl:{path}") == TEXTS


def test_zstd_that_reaches_far_back_is_read(tmp_path):
    """As `zstd --long=31` makes it; the library refuses more than 128 MB unless it is told."""
    path = tmp_path / "a.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=31)
    with path.open("wb") as file:
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        file.write(packer.compress(b'{"text": "far"}\n') + packer.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert _texts(f"jsonl:{path}") == ["far"]


@pytest.mark.parametrize("name", ["a[1]", "b:c", "d*e", "f?", "g: [2] {h}"])
def test_a_name_that_looks_like_a_pattern_is_itself_first(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    path = _write_lines(folder / f"{name}.jsonl", [b'{"text": "x", "body": "y"}'])
    assert _texts(f"jsonl:{path}") == ["x"]
    assert _texts(f"jsonl:{path}:body") == ["y"]
    assert _texts(f"jsonl:{folder}/*.jsonl") == ["x"]
    assert _texts(f"jsonl:{tmp_path}/**/*.jsonl:body") == ["y"]
    (folder / f"{name}.txt").write_text("z")
    assert _texts(f"text:{folder / name}.txt") == ["z"]


def test_a_file_of_several_names_is_read_once(tmp_path):
    first = tmp_path / "v1"
    first.mkdir()
    _write_lines(first / "a.jsonl", [b'{"text": "x"}'])
    (tmp_path / "latest").symlink_to(first)
    os.link(first / "a.jsonl", first / "b.jsonl")
    assert _texts(f"jsonl:{tmp_path}/**/*.jsonl") == ["x"]


def test_a_file_whose_name_is_no_utf8_is_refused_before_it_is_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "x"}\n')
    message = _refusal(f"jsonl:{tmp_path}/*.jsonl")
    assert message.startswith(f"{tmp_path}/caf\\xe9.jsonl: the name is not valid UTF-8")
    message.encode()


def _write_parquet(path, **columns):
    pa.parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_parquet_rows_in_order_with_null_as_empty(tmp_path):
    path = _write_parquet(tmp_path / "a.parquet", text=[*TEXTS, None], n=[1, 2, 3, 4, 5])
    documents = list(sources.open_source(f"parquet:{path}").documents())
    assert [document.text for document in documents] == [*TEXTS, ""]
    assert documents[3].position == f"{path} row 4"
    body = _write_parquet(tmp_path / "b.parquet", body=pa.array(["x"]).dictionary_encode())
    assert _texts(f"parquet:{body}:body") == ["x"]
    views = _write_parquet(tmp_path / "c.parquet", text=pa.array(["x", None], pa.string_view()))
    assert _texts(f"parquet:{views}") == ["x", ""]
    nulls = _write_parquet(tmp_path / "d.parquet", text=pa.nulls(3))
    assert _texts(f"parquet:{nulls}") == ["", "", ""]


def test_a_parquet_column_is_the_one_of_that_very_name(tmp_path):
    path = tmp_path / "a.parquet"
    struct = pa.array([{"b": "child"}])
    table = pa.Table.from_arrays([struct, pa.array(["column"])], names=["a", "a.b"])
    pa.parquet.write_table(table, path)
    assert _texts(f"parquet:{path}:a.b") == ["column"]
    assert "column 'a' holds struct<b: string>, expected text" in _refusal(f"parquet:{path}:a")
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pa.parquet.write_table(twice, path)
    message = _refusal(f"parquet:{path}")
    assert message.startswith(f"{path}: 2 columns are called 'text', expected one.")


def test_parquet_column_is_checked(tmp_path):
    path = _write_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    assert _refusal(f"parquet:{path}").startswith(f"{path}: no column 'text', found body, n.")
    assert f"{path}: column 'n' holds int64, expected text" in _refusal(f"parquet:{path}:n")


@pytest.mark.parametrize("damage", ["half", "empty", "text", "inside"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    texts = [f"{i} " * 50 for i in range(1000)]
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(
        pa.table({"text": texts}),
        path,
        row_group_size=300,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = path.read_bytes()
    broken = bytearray(data)
    broken[len(data) // 2 : len(data) // 2 + 4000] = b"\xff" * 4000
    path.write_bytes(
        {"half": data[: len(data) // 2], "empty": b"", "text": b"x" * 500, "inside": broken}[damage]
    )
    message = _refusal(f"parquet:{path}")
    assert message.startswith(f"{path}: not readable as parquet, stopped after row ")


def test_every_text_file_is_a_document(tmp_path):
    for name, text in (("b.txt", "zwei\nLinien"), ("a.txt", "ä"), ("c.txt", "")):
        (tmp_path / name).write_bytes(text.encode())
    assert _texts(f"text:{tmp_path}/*.txt") == ["ä", "zwei\nLinien", ""]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"one\ntwo \xe4 three", ":2: not valid UTF-8 (byte 0xe4)"),
        ("one\ntwo".encode("utf-16-le"), ":1: a NUL byte"),
    ],
)
def test_a_text_file_that_is_no_utf8_is_named(tmp_path, content, problem):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert _refusal(f"text:{path}").startswith(f"{path}{problem}")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("csv:x", "unknown source. Known are: docstrings, hf:DATASET"),
        ("jsonl", "unknown source"),
        ("jsonl:", "unknown source"),
        ("docstrings:numpy", "docstrings takes no argument"),
        ("text:{tmp}/nothing*", "no file matches"),
        ("jsonl:{tmp}/a.jsonl.bz2", "a.jsonl.bz2: .bz2 is not read, only plain, .gz, .xz,"),
    ],
)
def test_an_unknown_source_is_refused(tmp_path, spec, problem):
    (tmp_path / "a.jsonl.bz2").touch()
    assert problem in _refusal(spec.format(tmp=tmp_path))


def test_the_corpus_reads_the_listed_libraries_and_no_tests():
    standard = pathlib.Path(sysconfig.get_paths()["stdlib"])
    modules = docstrings.modules()
    folders = {folder for _, folder in docstrings._DISTRIBUTIONS}
    found = set()
    for name, path in modules:
        top = name.split(".")[0]
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            assert top in folders, f"{name} leaks in from {path}"
            found.add(top)
        else:
            assert path.is_relative_to(standard) and top in sys.stdlib_module_names
        assert not {"test", "tests", "idle_test", "_bundled"} & set(path.parts[-5:-1]), path
        assert not path.name.startswith("test_") and not path.name.endswith("_test.py"), path
    assert found == folders
    assert len(modules) > 3000 and len(set(modules)) == len(modules)


SMALL = (("absl-py", "absl"), ("optax", "optax"))
COUNT_IMPORTS = f"""
import sys
from qkjax.data import docstrings
docstrings._DISTRIBUTIONS = {SMALL!r}
docstrings._standard_library = lambda: []
assert list(docstrings.documents())
print(sorted({{"optax", "jax", "numpy"}} & set(sys.modules)))
"""


@pytest.mark.process
def test_the_corpus_is_read_without_importing_it():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_IMPORTS], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_docstrings_are_whole_named_and_mixed(monkeypatch):
    monkeypatch.setattr(docstrings, "_DISTRIBUTIONS", SMALL)
    monkeypatch.setattr(docstrings, "_standard_library", lambda: [])
    source = sources.open_source("docstrings")
    documents = list(source.documents())
    assert [d.text for d in documents] == [text for _, text in docstrings.documents()]
    assert set(source.describe()["versions"]) == {"python", "absl-py", "optax"}
    together = "\n".join(d.text for d in documents)
    for docstring in (optax.adamw.__doc__, optax.ScaleByAdamState.__doc__):
        lines = docstring.strip().splitlines()
        assert lines[0] in together and lines[-1].strip() in together
    assert together.count("optax._src.alias.adamw\n\n") == 1
    # The order mixes the libraries and the topics instead of one after the other.
    kinds = [d.position.split(".")[0].split(" ")[0] for d in documents]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert changes > len(set(kinds)) * 5


def test_copied_docstrings_count_once_and_long_modules_are_cut(tmp_path, monkeypatch):
    for name in ("a", "b"):
        functions = "\n".join(
            f'def {name}{i}():\n    """Number {i} of {name}: {"word " * 100}"""' for i in range(50)
        )
        (tmp_path / f"{name}.py").write_text(
            f'"""Common   text\n    of both modules."""\n{functions}\ndef short(): "Too short"\n'
        )
    files = [("a", tmp_path / "a.py"), ("b", tmp_path / "b.py")]
    monkeypatch.setattr(docstrings, "modules", lambda: files)
    monkeypatch.setattr(docstrings, "_topic_documents", lambda: iter(()))
    documents = dict(docstrings.documents())
    assert set(documents) == {f"{name}#{i}" for name in "ab" for i in range(4)}
    assert documents["a#0"].startswith("a\n\nCommon   text\nof both modules.\n\na.a0\n\nNumber 0")
    together = "".join(documents.values())
    assert together.count("of both modules") == 1 and "Too short" not in together
    assert all(together.count(f"Number {i} of {n}:") == 1 for i in range(50) for n in "ab")
    assert all(len(text) < 9_000 for text in documents.values())


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(docstrings, "_DISTRIBUTIONS", (("no-such-library", "x"), *SMALL))
    assert "the corpus needs no-such-library" in _refusal("docstrings")


def test_docstrings_of_source_files(tmp_path):
    source = '''"""The module's own text, long enough."""
if True:
    class A:
        """Of the class, and long enough too."""
        def f(self):
            r"""Escapes \\d stay,

            and the indentation goes.
            """
            def inner(): "Of the inner function itself."
try:
    async def g(): """Short."""
except OSError:
    def h(): "Lone \\ud800 surrogate cannot be written."
x = "not a docstring at all"
'''
    path = tmp_path / "m.py"
    path.write_text(source)
    assert list(docstrings._docstrings("p.m", path)) == [
        ("p.m", "The module's own text, long enough."),
        ("p.m.A", "Of the class, and long enough too."),
        ("p.m.A.f", "Escapes \\d stay,\n\nand the indentation goes."),
        ("p.m.A.f.inner", "Of the inner function itself."),
        ("p.m.g", "Short."),
    ]
    path.write_text("print 'Python 2'")
    assert list(docstrings._docstrings("p.m", path)) == []
