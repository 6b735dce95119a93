"""Text to dataset: the stream on disk, the hold-out, mixes, refusals, kills."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import lzma
import os
import pathlib
import random
import signal
import stat
import string
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from array_record.python import array_record_module

from qkjax import errors, files
from qkjax.data import check, docstrings, prepare, reading, shards
from qkjax.data import manifest as manifest_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
T = 16
REQUEST = prepare.Request(
    sources=("unset",), tokenizer="train:300", sequence_length=T, validation_tokens=300
)


def _documents(count, seed):
    """Texts that differ from each other, some with capitals and non-ASCII letters."""
    chooser = random.Random(seed)
    words = ["alpha", "Beta", "gamma", "délta", "epsilon", "ζήτα", "eta", "theta", "iota", "kappa"]
    return [
        f"Document {seed}.{i} " + " ".join(chooser.choices(words, k=chooser.randint(5, 60)))
        for i in range(count)
    ]


def _write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path):
    return _write_jsonl(tmp_path / "corpus.jsonl", _documents(300, 1))


def _quiet(line):
    pass


def _prepare(out, *paths, **changes):
    request = dataclasses.replace(
        REQUEST, **{"sources": tuple(f"jsonl:{path}" for path in paths), "weights": (), **changes}
    )
    return prepare.prepare(request, out, progress=_quiet)


def _pool(text):
    """The rule of the hold-out, written a second time."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big") < 2**64 // 20


def _stream(out, split):
    """The tokens of a split as its shards hold them."""
    read = manifest_lib.load(out)
    records = []
    for shard in read.splits[split].shards:
        reader = array_record_module.ArrayRecordReader(str(out / shard.file))
        assert reader.num_records() == shard.num_records
        records += [
            np.frombuffer(r, "<u2" if read.dtype == "uint16" else "<u4") for r in reader.read_all()
        ]
    tokens = np.array(records)
    np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])
    return np.concatenate([tokens[:, :-1].reshape(-1), tokens[-1, -1:]])


def _files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")}


def _command(tool, *arguments, **options):
    return subprocess.run(
        [sys.executable, f"tools/{tool}.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def _flags(path, out, **changes):
    flags = {
        "source": f"jsonl:{path}",
        "tokenizer": "train:300",
        "sequence_length": T,
        "validation_tokens": 300,
        "out": out,
        **changes,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.parametrize("end_of_text", [True, False])
def test_the_stream_on_disk_is_the_documents_in_order(tmp_path, corpus, monkeypatch, end_of_text):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    out = tmp_path / "out"
    made = _prepare(out, corpus, end_of_text=end_of_text)
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = _documents(300, 1)
    for split in ("train", "validation"):
        expected, first, length = [], [], []
        for text in texts:
            if _pool(text) == (split == "validation"):
                ids = backend.encode(text).ids
                first.append(len(expected))
                length.append(len(ids))
                expected += ids + [0] * end_of_text
        limit = len(expected) if split == "train" else 300
        records = (limit - 1) // T if split == "train" else -(-300 // T)
        assert made.splits[split].num_sequences == records
        assert made.splits[split].num_tokens == records * T
        np.testing.assert_array_equal(_stream(out, split), expected[: records * T + 1])
        with np.load(out / f"documents-{split}.npz") as table:
            inside = [f for f in first if f <= records * T]
            assert table["first_token"].tolist() == inside
            assert table["length"].tolist() == length[: len(inside)]
        if split == "train":
            assert made.sources[0]["documents"] == len(inside)
            assert made.sources[0]["tokens"] == records * T + 1
    sizes = [shard.num_records for shard in made.splits["train"].shards]
    assert len(sizes) > 3 and set(sizes[:-1]) == {64}
    assert made.splits["train"].shards[1].file == f"train-00001-of-{len(sizes):05d}.array_record"
    assert made == manifest_lib.load(out) and made.dtype == "uint16"
    manifest_lib.verify_digests(made, out)
    check.check(out, progress=_quiet)


def test_the_tokenizer_learns_from_training_documents_only(tmp_path):
    texts = _documents(200, 2)
    rare = "\u16a0\u16a1\u16a2"
    held_out = [i for i, text in enumerate(texts) if _pool(text + rare * 50)]
    for i in held_out:
        texts[i] += rare * 50
    assert held_out
    made = tmp_path / "made"
    _prepare(made, _write_jsonl(tmp_path / "a.jsonl", texts), validation_tokens=100)
    vocabulary = json.loads((made / "tokenizer.json").read_text())["model"]["vocab"]
    # A run of 150 runes would be merged at once if it were seen.
    bytes_of_rune = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
        rare
    )[0][0]
    assert not any(bytes_of_rune[:3] in token for token in vocabulary)


@pytest.mark.process
def test_the_same_command_gives_the_same_bytes(tmp_path, corpus):
    outs = [tmp_path / name / "data" for name in "ab"]
    for out, threads in zip(outs, "12", strict=True):
        done = _command(
            "prepare_data", *_flags(corpus, out), env={**os.environ, "RAYON_NUM_THREADS": threads}
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert _files(outs[0]) == _files(outs[1])
    assert manifest_lib.load(outs[0]).fingerprint == manifest_lib.load(outs[1]).fingerprint


def test_a_finished_dataset_is_recognised_and_left_alone(tmp_path, corpus):
    out = tmp_path / "out"
    lines = []
    made = _prepare(out, corpus)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    request = dataclasses.replace(REQUEST, sources=(f"jsonl:{corpus}",))
    assert prepare.prepare(request, out, progress=lines.append) == made
    assert lines == [f"{out}: already complete, nothing to do"]
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with corpus.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(errors.UsageError, match="was made from another jsonl"):
        _prepare(out, corpus)
    with pytest.raises(errors.UsageError, match="sequence_length: expected 32, found 16"):
        _prepare(out, corpus, sequence_length=32)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def _variants(text):
    """Copies that the normalisation sees through."""
    return {
        "identical": text,
        "white space": "\n " + text.replace(" ", " \t\u00a0 ") + "\r\n",
        "case": text.swapcase(),
        "unicode form": unicodedata.normalize("NFD", text).replace("D", "\uff24"),
    }


def test_copies_of_a_validation_document_never_reach_training(tmp_path):
    texts = _documents(300, 3)
    original = next(text for text in texts if _pool(text))
    copies = _variants(original)
    assert len(set(copies.values())) == 4
    half = len(texts) // 2
    texts = [copies["case"], *texts[:half], copies["white space"], *texts[half:]]
    texts += [copies["identical"], copies["unicode form"]]
    other = _write_jsonl(tmp_path / "b.jsonl", [*_documents(300, 4), *copies.values()])
    out = tmp_path / "out"
    made = _prepare(out, _write_jsonl(tmp_path / "a.jsonl", texts), other, weights=(1.0, 1.0))
    assert made.dropped["duplicates_of_validation"] >= 4
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    decoded = backend.decode(_stream(out, "train").tolist(), skip_special_tokens=False)
    number = original.split()[1]  # "3.17": no other document has it
    assert number not in decoded.split()
    assert any(text.split()[1] in decoded.split() for text in texts)
    assert check.check(out, progress=_quiet).extra_files == []


def test_copies_count_once_in_the_validation_split_too(tmp_path):
    held_out = [text for text in _documents(300, 3) if _pool(text)]
    texts = [copy for text in held_out[:5] for copy in _variants(text).values()]
    path = _write_jsonl(tmp_path / "a.jsonl", [*texts, *_documents(300, 3)])
    other = _write_jsonl(tmp_path / "b.jsonl", [*texts, *_documents(300, 4)])
    made = _prepare(tmp_path / "out", path, other, weights=(1.0, 1.0))
    with np.load(tmp_path / "out" / "documents-validation.npz") as table:
        assert len(set(table["hash64"].tolist())) == len(table["hash64"]) > 5
    assert made.dropped["duplicates_of_validation"] >= 3 * 5
    check.check(tmp_path / "out", progress=_quiet)


def test_a_mix_holds_its_shares_all_along(tmp_path):
    paths = [_write_jsonl(tmp_path / f"{s}.jsonl", _documents(500, s)) for s in (5, 6)]
    out = tmp_path / "out"
    counts = {"train_tokens": 20_000, "validation_tokens": 2_000}
    made = _prepare(out, *paths, weights=(7.0, 3.0), **counts)
    assert made.splits["train"].num_tokens == 20_000
    assert [source["weight"] for source in made.sources] == [0.7, 0.3]
    first, second = (source["tokens"] for source in made.sources)
    with np.load(out / "documents-train.npz") as table:
        longest = int(table["length"].max()) + 1
    assert first + second == 20_001
    assert abs(first - 0.7 * 20_001) <= longest
    backend = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    for split, length in (("train", 20_001), ("validation", 2_001)):
        stream = _stream(out, split)
        assert len(stream) == length
        seen = {"5": 0, "6": 0}
        for piece in np.split(stream, np.flatnonzero(stream == 0) + 1)[:-1]:
            seen[backend.decode(piece.tolist()).split()[1][0]] += len(piece)
            assert abs(seen["5"] - 0.7 * sum(seen.values())) <= longest, split


def test_a_mix_ends_when_the_first_source_is_used_up(tmp_path):
    small = _write_jsonl(tmp_path / "small.jsonl", _documents(100, 7))
    large = _write_jsonl(tmp_path / "large.jsonl", _documents(900, 8))
    out = tmp_path / "out"
    made = _prepare(out, small, large, weights=(0.5, 0.5), validation_tokens=100)
    assert made.sources[0]["documents"] == sum(not _pool(text) for text in _documents(100, 7))
    shares = [source["tokens"] for source in made.sources]
    assert abs(shares[0] - shares[1]) < 200
    with pytest.raises(errors.UsageError, match=r"--train_tokens: 40000 .* holds \d+ at these"):
        _prepare(tmp_path / "more", small, large, weights=(0.5, 0.5), train_tokens=40_000)


def test_two_sources_that_read_one_file_are_refused(tmp_path):
    path = _write_jsonl(tmp_path / "a.jsonl", _documents(300, 7))
    os.link(path, tmp_path / "b.jsonl")
    with pytest.raises(errors.UsageError, match=rf"reads {tmp_path}/b\.jsonl, as .*a\.jsonl does"):
        _prepare(tmp_path / "out", path, tmp_path / "b.jsonl", weights=(0.5, 0.5))
    assert not (tmp_path / "out").exists()
    path.write_text(
        "".join(json.dumps({"text": t, "b": t[::-1]}) + "\n" for t in _documents(300, 7))
    )
    _prepare(tmp_path / "out", path, f"{path}:b", weights=(0.5, 0.5))  # other text of the file


def test_validation_of_a_mix_is_found_behind_the_training_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK_CHARACTERS", 500)
    texts = _documents(400, 9)
    path = _write_jsonl(tmp_path / "a.jsonl", texts)
    made = _prepare(tmp_path / "out", path, train_tokens=1_000)
    assert made.splits["train"].num_tokens == 1_008  # whole records
    assert made.splits["validation"].num_tokens == 304
    check.check(tmp_path / "out", progress=_quiet)


def test_the_batch_size_does_not_show(tmp_path, corpus, monkeypatch):
    _prepare(tmp_path / "a" / "data", corpus)
    monkeypatch.setattr(reading, "_CHUNK_CHARACTERS", 1)
    _prepare(tmp_path / "b" / "data", corpus)
    assert _files(tmp_path / "a" / "data") == _files(tmp_path / "b" / "data")


def test_a_huge_document_and_one_with_nul_are_text_like_any_other(tmp_path):
    huge = " ".join(f"Word {i} of one endless document." for i in range(16_000))
    assert len(huge) > 2 * reading._CHUNK_CHARACTERS and not _pool(huge)
    texts = [huge, "a \x00 NUL between words, which JSON may hold", *_documents(300, 15)]
    out = tmp_path / "out"
    made = _prepare(out, _write_jsonl(tmp_path / "a.jsonl", texts), sequence_length=1024)
    assert made.dropped["lost_by_tokenizer"] == 0
    with np.load(out / "documents-train.npz") as table:
        assert table["length"][0] > 100_000 and len(table["length"]) > 250
    check.check(out, progress=_quiet)


def test_a_file_system_without_locks_is_one_line_and_without_directory_sync_no_matter(
    tmp_path, corpus, monkeypatch
):
    def refuse(code):
        def call(descriptor, *arguments):
            if code == errno.ENOLCK or stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
        with pytest.raises(errors.StorageError, match=rf"^{tmp_path}/out/.* has no locks .*local"):
            _prepare(tmp_path / "out", corpus)
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    _prepare(tmp_path / "out", corpus)
    check.check(tmp_path / "out", progress=_quiet)


def test_empty_documents_and_bad_lines_are_counted(tmp_path):
    path = _write_jsonl(tmp_path / "a.jsonl", ["", " \n\u3000", *_documents(300, 10), "\t"])
    with path.open("a") as file:
        file.write("{\n")
    made = _prepare(tmp_path / "out", path, max_bad_lines=1)
    assert (made.dropped["empty"], made.dropped["bad_lines"]) == (3, 1)
    assert made.dropped["validation_pool_unused"] > 0


_KINDS = {  # how many of the awkward documents below a tokenizer cannot give back
    "eospost": 0,
    "gap": 0,
    "gemma": 1,
    "llama2": 1,
    "llama3": 0,
    "metaspace": 2,
    "nfc": 1,
    "nfkc": 2,
    "prefix": 0,
    "rstrip": 2,
    "lower": None,
    "t5": None,
}


@pytest.mark.parametrize("kind", _KINDS)
def test_what_a_tokenizer_does_not_give_back_is_left_out_or_refused(tmp_path, shared, caplog, kind):
    """Prepared means proven: check_data finds nothing to complain of afterwards."""
    awkward = [
        " a space before the first word of a text",
        "marked \u2581 by a block of SentencePiece",
        "e\u0301 beside \u00e9 in a document",
        "one \ufb01 ligature in a document",
        "an added token, <|user|> and some words behind it",
        "lines\n\n\tand  spaces, <s> </s> <|end_of_text|>",
    ]
    assert not [text for text in awkward if _pool(text)]
    path = _write_jsonl(tmp_path / "a.jsonl", [*awkward, *_documents(300, 14)])
    tokenizer = shared / "data" / "tokenizers" / f"{kind}.json"
    out, lost = tmp_path / "out", _KINDS[kind]
    if lost is None:
        with pytest.raises(errors.UsageError, match=rf"{kind}\.json: loses text"):
            _prepare(out, path, tokenizer=str(tokenizer))
        assert not out.exists()
        return
    lines = []
    request = dataclasses.replace(REQUEST, sources=(f"jsonl:{path}",), tokenizer=str(tokenizer))
    made = prepare.prepare(request, out, progress=lines.append)
    assert made.dropped["lost_by_tokenizer"] == lost
    assert lost == 0 or f"{lost} documents left out" in lines[-1]
    first = [
        r.getMessage() for r in caplog.records if "the tokenizer does not restore" in r.getMessage()
    ]
    assert len(first) == min(lost, 1)
    assert lost == 0 or first[0].startswith(tuple(f"{path}:{n}: " for n in range(1, 7)))
    check.check(out, progress=_quiet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_tokens": 50_000}, r"--validation_tokens: .* 50001, .* holds \d+\."),
        ({"train_tokens": 10**6}, r"--train_tokens: 1000000 .* need 1000001 .* holds \d+\."),
        ({"sequence_length": 10**6, "validation_tokens": 1}, r"to give 1000001, .* holds \d+\."),
        ({"tokenizer": "train:9999"}, r"give only \d+ tokens, expected 9999"),
        ({"tokenizer": "train:9"}, "expected at least 257"),
        ({"tokenizer": "train:9999999999"}, r"SIZE: expected at most 16777216\. Ask for fewer"),
        ({"tokenizer": f"train:{'9' * 5000}"}, r"SIZE: expected at most 16777216\. Ask for fewer"),
        ({"tokenizer": "/"}, r"/: a directory, expected a tokenizer\.json\..* write hf:/\."),
        ({"tokenizer": "hub:x"}, "unknown tokenizer"),
        ({"tokenizer": "nowhere.json"}, r"nowhere\.json: no such tokenizer file"),
        ({"tokenizer": ""}, "--tokenizer: missing"),
        ({"weights": (1.0, 2.0)}, r"--weight: expected one per source \(1\), found 2"),
        ({"weights": (0.0,)}, r"--weight: expected a number above 0, found 0\.0"),
        ({"weights": (float("nan"),)}, "--weight: expected a number above 0, found nan"),
        ({"sequence_length": 0}, "--sequence_length: expected at least 1, found 0"),
        ({"train_tokens": 0}, "--train_tokens: expected at least 1, found 0"),
        ({"validation_tokens": -1}, "--validation_tokens: expected at least 1, found -1"),
        ({"sources": ()}, "--source: missing"),
        ({"sources": ("docstrings", "docstrings"), "weights": (1, 1)}, "named twice"),
        ({"sources": ("docstrings", "text:x")}, r"expected one per source \(2\), found 0"),
        ({"sources": ("text:nowhere/*",)}, "no file matches"),
    ],
)
def test_a_refused_request_leaves_nothing(tmp_path, corpus, changes, message):
    out = tmp_path / "deep" / "out"
    with pytest.raises(errors.UsageError, match=message):
        _prepare(out, corpus, **changes)
    assert not out.exists()


def test_too_little_training_text_is_refused(tmp_path):
    texts = [text for text in _documents(900, 11) if _pool(text)]
    out = tmp_path / "out"
    with pytest.raises(errors.UsageError, match=r"one record needs 17 training tokens, found 0\."):
        _prepare(out, _write_jsonl(tmp_path / "a.jsonl", texts), tokenizer="train:257")
    assert not out.exists()


def _broken(kind, folder, corpus):
    """A source that cannot be read, and what is said of it."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    table = pa.table({"text": [json.loads(line)["text"] for line in lines]})
    path = folder / f"broken.{kind}"
    match kind:
        case "jsonl":
            path.write_bytes(b"".join([*lines[:200], b'{"text": \n', *lines[200:]]))
            return f"jsonl:{path}", f"{path}:201: not valid JSON"
        case "jsonl.gz":
            path.write_bytes(b"".join(lines))
            return f"jsonl:{path}", f"{path}: cannot be unpacked as .gz after line 0"
        case "parquet":
            pa.parquet.write_table(table, path)
            path.write_bytes(path.read_bytes()[:-100])
            return f"parquet:{path}", f"{path}: not readable as parquet, stopped after row 0"
        case "column.parquet":
            pa.parquet.write_table(table, path)
            return f"parquet:{path}:body", f"{path}: no column 'body', found text"
        case "binary.txt":
            path.write_bytes(b"\x7fELF\x00\x01" * 99)
            return f"text:{path}", f"{path}:1: a NUL byte"
        case "empty.jsonl":
            path.touch()
            return f"jsonl:{path}", f"{path}: empty, expected JSON lines"
        case "hf":
            path.mkdir()
            pa.parquet.write_table(table, path / "train.parquet")
            return f"hf:{path}:default:dev", f"--source=hf:{path}:default:dev: cannot be opened"
        case "truncated.hf":
            path.mkdir()
            pa.parquet.write_table(table.slice(0, 100), path / "train-00000-of-00002.parquet")
            pa.parquet.write_table(table.slice(100), path / "train-00001-of-00002.parquet")
            data = (path / "train-00001-of-00002.parquet").read_bytes()
            (path / "train-00001-of-00002.parquet").write_bytes(data[:-100])
            return f"hf:{path}", f"{path}: stopped after row "
    raise AssertionError(kind)


@pytest.mark.process
@pytest.mark.parametrize(
    "kind",
    [
        "jsonl",
        "jsonl.gz",
        "parquet",
        "column.parquet",
        "binary.txt",
        "empty.jsonl",
        "hf",
        "truncated.hf",
    ],
)
def test_broken_input_is_one_line_exit_2_and_no_dataset(tmp_path, corpus, kind):
    out = tmp_path / "out"
    source, problem = _broken(kind, tmp_path, corpus)
    done = _command("prepare_data", *_flags("", out, source=source))
    assert done.returncode == 2
    assert done.stderr.startswith(f"ERROR: {problem}") and done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_directory_with_other_content_is_refused_and_kept(tmp_path, corpus):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("my only copy")
    (out / "train-00000-of-00001.array_record").write_bytes(b"mine too")
    with pytest.raises(errors.UsageError, match=r"holds other files .*thesis\.txt.*nothing was re"):
        _prepare(out, corpus)
    assert _files(out) == {
        "thesis.txt": b"my only copy",
        "train-00000-of-00001.array_record": b"mine too",
    }
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(errors.StorageError, match="expected a directory"):
            _prepare(place, corpus)


def test_an_id_outside_the_vocabulary_is_refused_and_wide_ids_are_not_wrapped(tmp_path):
    assert [shards.token_dtype(size) for size in (65_536, 65_537)] == ["uint16", "uint32"]
    writer = shards.SplitWriter(
        tmp_path, "train", sequence_length=2, vocab_size=70_000, num_sources=1, max_sequences=None
    )
    writer.add(np.array([1, 69_999, 65_536]), num_text=3, document_hash=1, source=0)
    with pytest.raises(errors.UsageError, match="made the id 70000, expected below 70000"):
        writer.add(np.array([70_000]), num_text=1, document_hash=2, source=0)
    shard = writer.close().split.shards[0]
    reader = array_record_module.ArrayRecordReader(str(tmp_path / shard.file))
    assert np.frombuffer(reader.read([0])[0], "<u4").tolist() == [1, 69_999, 65_536]


def test_documents_of_the_dropped_tail_are_not_counted(tmp_path):
    writer = shards.SplitWriter(
        tmp_path, "train", sequence_length=4, vocab_size=9, num_sources=2, max_sequences=None
    )
    for source, size in enumerate((5, 2)):
        writer.add(np.arange(size), num_text=size, document_hash=source, source=source)
    written = writer.close()
    assert (written.documents_by_source, written.tokens_by_source) == ([1, 0], [5, 0])
    assert (written.split.num_sequences, written.split.num_tokens) == (1, 4)


@pytest.mark.parametrize("place", ["/dev/full", "{tmp}/missing/shard"])
def test_a_shard_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch, place):
    path = pathlib.Path(place.format(tmp=tmp_path))
    monkeypatch.setattr(shards.SplitWriter, "_staged_path", lambda writer, index: path)
    writer = shards.SplitWriter(
        tmp_path,
        "train",
        sequence_length=9_999,
        vocab_size=1 << 16,
        num_sources=1,
        max_sequences=None,
    )
    ids = np.random.default_rng(0).integers(0, 1 << 16, 10_000)  # does not compress
    with pytest.raises(errors.StorageError, match=f"{tmp_path}: cannot write a shard") as caught:
        for _ in range(50):
            writer.add(ids, num_text=9, document_hash=0, source=0)
        writer.close()
    assert "\n" not in str(caught.value)


def test_a_shard_that_reads_back_short_is_a_storage_error(tmp_path, monkeypatch):
    class Short(array_record_module.ArrayRecordReader):
        def num_records(self):
            return super().num_records() - 1

    monkeypatch.setattr(shards.array_record_module, "ArrayRecordReader", Short)
    writer = shards.SplitWriter(
        tmp_path, "train", sequence_length=2, vocab_size=9, num_sources=1, max_sequences=None
    )
    writer.add(np.arange(7), num_text=7, document_hash=0, source=0)
    with pytest.raises(errors.StorageError, match="3 records were written, 2 read back"):
        writer.close()


SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
import sys, time
from qkjax.data import mixing, shards
import runpy
shards.RECORDS_PER_SHARD = 64
add = mixing._add
def slow(*arguments):
    time.sleep(0.002)
    return add(*arguments)
mixing._add = slow
sys.argv = ["tools/prepare_data.py", *sys.argv[1:]]
runpy.run_path("tools/prepare_data.py", run_name="__main__")
"""


def _start_slowly(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def _wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "finished before it could be stopped"
        time.sleep(0.005)


@pytest.mark.process
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_looks_unfinished_and_the_next_gives_the_same_dataset(
    tmp_path, corpus, monkeypatch, kill
):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    out = tmp_path / "killed" / "data"
    process = _start_slowly(*_flags(corpus, out))
    finished = out / ".unfinished" / "train-00001.unfinished"
    _wait_for(finished.exists, process)
    process.send_signal(kill)
    assert process.wait() == (130 if kill == signal.SIGINT else -kill)
    assert {p.name for p in out.iterdir()} == {".prepare.lock", ".unfinished"}
    with pytest.raises(errors.UsageError, match=r"dataset\.json: missing"):
        manifest_lib.load(out)
    _prepare(out, corpus)
    assert not (out / ".unfinished").exists()
    unbroken = tmp_path / "unbroken" / "data"
    _prepare(unbroken, corpus)
    assert _files(out) == _files(unbroken)


KILLED_AT_END = """
import os, runpy, sys
from qkjax.data import manifest
manifest.write = lambda *arguments: os._exit(9)
sys.argv = ["tools/prepare_data.py", *sys.argv[1:]]
runpy.run_path("tools/prepare_data.py", run_name="__main__")
"""


@pytest.mark.process
def test_a_run_killed_while_it_moves_its_files_out_starts_again(tmp_path, corpus):
    out = tmp_path / "out"

    done = subprocess.run([sys.executable, "-c", KILLED_AT_END, *_flags(corpus, out)], cwd=ROOT)
    assert done.returncode == 9
    assert list(out.glob("*.array_record")) and not (out / "dataset.json").exists()
    (out / "thesis.txt").write_text("my only copy")
    with pytest.raises(errors.UsageError, match=r"holds other files \(thesis\.txt\)"):
        _prepare(out, corpus)
    (out / "thesis.txt").unlink()
    _prepare(out, corpus)
    check.check(out, progress=_quiet)


@pytest.mark.process
def test_two_commands_on_one_directory(tmp_path, corpus):
    out = tmp_path / "out"
    process = _start_slowly(*_flags(corpus, out))
    _wait_for(lambda: list(out.glob(".unfinished/*")), process)
    with pytest.raises(errors.UsageError, match=rf"{out}/.* \(pid {process.pid} on .*--out"):
        _prepare(out, corpus)
    assert process.wait() == 0
    check.check(out, progress=_quiet)


def test_a_lock_file_without_a_holder_blocks_nobody(tmp_path, corpus):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".prepare.lock").write_text("process 1 on nowhere (since ever)\n")
    assert _prepare(out, corpus) == manifest_lib.load(out)
    with open(out / ".prepare.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.process
def test_a_full_disk_is_exit_4_and_the_next_run_goes_on(tmp_path, corpus):
    out = tmp_path / "out"
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2);"
        "runpy.run_path('tools/prepare_data.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *_flags(corpus, out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert done.stderr.startswith(f"ERROR: {out}") and done.stderr.count("\n") == 1
    assert {p.name for p in out.iterdir()} == {".prepare.lock", ".unfinished"}
    _prepare(out, corpus)
    check.check(out, progress=_quiet)


def test_a_disk_that_is_full_at_the_very_end_does_not_block_the_directory(
    tmp_path, corpus, monkeypatch
):
    out, replace = tmp_path / "out", files.replace

    def full(path, data):
        if path.name == "dataset.json":
            raise files.storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        replace(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace", full)
        with pytest.raises(errors.StorageError, match=r"No space left.*Make room"):
            _prepare(out, corpus)
    assert {p.name for p in out.iterdir()} == {".prepare.lock", ".unfinished"}
    _prepare(out, corpus)
    check.check(out, progress=_quiet)


@pytest.fixture
def few_libraries(monkeypatch):
    """The embedded corpus in small: three libraries and the topics, and of each text a twin."""
    few = (("absl-py", "absl"), ("optax", "optax"), ("ml-collections", "ml_collections"))
    monkeypatch.setattr(docstrings, "_DISTRIBUTIONS", few)
    monkeypatch.setattr(docstrings, "_standard_library", lambda: [])
    documents = docstrings.documents

    def with_twins():
        for name, text in documents():
            yield name, text
            yield f"{name} twin", f"Another library says of {name}: {text[:1000]}"

    monkeypatch.setattr(docstrings, "documents", with_twins)


def _ngrams(out, split):
    """The 13-grams of a split's decoded documents, by a definition of their own."""
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    stream = _stream(out, split)
    found = set()
    for piece in np.split(stream, np.flatnonzero(stream == 0)):
        text = unicodedata.normalize("NFKC", tokenizer.decode(piece[piece != 0].tolist()))
        words = text.casefold().translate(str.maketrans("", "", string.punctuation)).split()
        found |= {tuple(words[i : i + 13]) for i in range(len(words) - 12)}
    return found


def test_the_embedded_corpus_is_made_once_and_reused(tmp_path, few_libraries, monkeypatch):
    options = {"vocab_size": 1024, "sequence_length": 64, "validation_tokens": 3_000}
    out = prepare.prepare_embedded(tmp_path / "data", progress=_quiet, **options)
    made = manifest_lib.load(out)
    assert made.tokenizer.vocab_size == 1024 and made.splits["validation"].num_tokens == 3_008
    assert made.splits["train"].num_tokens > 150_000
    assert set(made.sources[0]["read_from"]["versions"]) == {
        "python",
        "absl-py",
        "optax",
        "ml-collections",
    }
    check.check(out, progress=_quiet)
    assert made.dropped["overlapping"] > 0 and made.overlap["documents_dropped"]
    training, held_out = _ngrams(out, "train"), _ngrams(out, "validation")
    assert len(held_out) > 500 and not training & held_out
    # Other versions of the libraries do not take the dataset away; other options are refused.
    monkeypatch.setattr(docstrings, "versions", lambda: {"python": "4.0"})
    before = _files(out)
    assert prepare.prepare_embedded(out, progress=_quiet, **options) == out
    assert _files(out) == before
    with pytest.raises(errors.UsageError, match="end_of_text: expected False, found True"):
        prepare.prepare_embedded(out, end_of_text=False, progress=_quiet, **options)


EMBEDDED = """
import sys
from qkjax.data import docstrings, prepare
docstrings._DISTRIBUTIONS = (("absl-py", "absl"), ("optax", "optax"))
docstrings._standard_library = lambda: []
lines = []
prepare.prepare_embedded(
    sys.argv[1], progress=lines.append, vocab_size=300, sequence_length=64, validation_tokens=1_000
)
sys.exit(10 if any("training a tokenizer" in line for line in lines) else 20)
"""


@pytest.mark.process
def test_processes_that_need_the_embedded_corpus_at_once_share_it(tmp_path):
    out = tmp_path / "data"
    children = [subprocess.Popen([sys.executable, "-c", EMBEDDED, str(out)]) for _ in range(3)]
    codes = sorted(child.wait() for child in children)
    assert codes == [10, 20, 20]  # one made it, the others waited
    check.check(out, progress=_quiet)


@pytest.mark.process
def test_openstax_with_the_smollm2_tokenizer(tmp_path, shared):
    with lzma.open(shared / "data" / "edu_openstax.train.jsonl.xz", "rt") as file:
        lines = [next(file) for _ in range(250)]
    (tmp_path / "slice.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    tokenizer = shared / "data" / "tokenizer_smollm2" / "tokenizer.json"
    flags = _flags(
        tmp_path / "slice.jsonl",
        out,
        tokenizer=tokenizer,
        sequence_length=2048,
        validation_tokens=10_000,
    )
    done = _command("prepare_data", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    done = _command("check_data", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "validation documents occur in training" in done.stdout
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    documents = {}
    for split in ("train", "validation"):
        stream = _stream(out, split)
        pieces = np.split(stream, np.flatnonzero(stream == 0) + 1)[:-1]
        texts = backend.decode_batch([piece[:-1].tolist() for piece in pieces])
        documents[split] = {" ".join(text.casefold().split()) for text in texts}
    assert len(documents["train"]) > 200 and documents["validation"]
    assert not documents["train"] & documents["validation"]
    texts = [json.loads(line)["text"] for line in lines]
    known = {" ".join(text.casefold().split()) for text in texts}
    assert documents["train"] | documents["validation"] <= known
