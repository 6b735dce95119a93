"""`hf:` documents and tokenizers: directories in the hub's layout, its cache, and no network."""

import json
import re
import shutil
import sys

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from qkjax import errors
from qkjax.data import hub, sources
from qkjax.data import tokenizer as tokenizer_lib

pytest.importorskip("datasets", reason="the extra [data] is not installed")
TEXTS = [f"text {i} ä" for i in range(700)]


@pytest.fixture
def dataset(tmp_path):
    """A data set as the hub lays it out: two configurations in parquet, one of them in parts."""
    folder = tmp_path / "own:er" / "dataset"
    for config, texts in (("main", TEXTS), ("other", ["x", None, "z"])):
        (folder / config).mkdir(parents=True)
        half = len(texts) // 2
        for i, part in enumerate((texts[:half], texts[half:])):
            table = pa.table({"text": pa.array(part, pa.string()), "id": list(range(len(part)))})
            path = folder / config / f"train-{i:05d}-of-00002.parquet"
            pa.parquet.write_table(table, path, row_group_size=100, compression="none")
    entries = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.parquet\n"
        for name in ("main", "other")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return folder


def _refusal(spec):
    with pytest.raises(errors.UsageError) as caught:
        list(sources.open_source(spec).documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_of_a_directory_in_order_from_any_row_on(dataset):
    source = sources.open_source(f"hf:{dataset}:main")
    documents = list(source.documents())
    assert [document.text for document in documents] == TEXTS
    assert documents[400].position == f"{dataset} row 401"
    for start in (1, 349, 350, 699):
        assert list(source.documents(start)) == documents[start:]
    other = sources.open_source(f"hf:{dataset}:other:train:text")
    assert [document.text for document in other.documents()] == ["x", "", "z"]
    assert source.describe()["files"] == 5 and source.describe()["bytes"] > 1000


def test_a_directory_is_known_by_the_content_of_its_files(dataset):
    source = sources.open_source(f"hf:{dataset}:main")
    next(source.documents(10))
    content = source.content(source.files_read)
    assert content["files_read"] == 2 and not sources.open_source(source.name).changed(content)
    path = dataset / "main" / "train-00001-of-00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text 400", b"TEXT 400"))
    assert path.stat().st_size == len(data) and path.read_bytes() != data
    with pytest.raises(errors.UsageError, match=f"^{path}: was changed while text was read"):
        list(source.documents())
    assert source.changed(content) == [str(path)]


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "cannot be opened"),
        (":nothing", "BuilderConfig 'nothing' not found"),
        (":main:test", "Bad split: test"),
        (":main:train:body", "no column 'body', found text, id"),
        (":main::id", "column 'id': expected text, found int"),
        (":a:b:c:d", "expected hf:DATASET[:CONFIG][:SPLIT][:COLUMN]"),
    ],
)
def test_a_wrong_part_of_the_name_is_said(dataset, rest, problem):
    assert problem in _refusal(f"hf:{dataset}{rest}")


def test_a_truncated_file_is_said(dataset):
    path = dataset / "main" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    assert re.search(r"stopped after row \d+ .*download them again", _refusal(f"hf:{dataset}:main"))


def test_jsonl_of_different_columns_is_sent_to_the_reader_of_lines(tmp_path):
    for name, other in (("a", '"n": 1'), ("b", '"m": {"k": 2}')):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}", {other}}}\n')
    message = _refusal(f"hf:{tmp_path}")
    assert "column names don't match" in message and "damaged" not in message
    source = message.split("--source='")[1].split("'")[0]
    assert [d.text for d in sources.open_source(source).documents()] == ["a", "b"]


def test_objects_of_other_keys_are_not_called_another_column(tmp_path):
    for name, other in (("a", '{"q": 1}'), ("b", '{"r": [1]}')):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}", "x": {other}}}\n')
    message = _refusal(f"hf:{tmp_path}")
    assert "--source='jsonl:" in message and "Name another column" not in message
    assert "\n" not in message


def _no_network(*arguments, **options):
    raise ConnectionError("[Errno -2] Name or service not known")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A hub that cannot be reached, and an empty cache; the download must not be tried for long."""
    download = huggingface_hub.hf_hub_download

    def from_cache(name, file, **options):
        assert options["local_files_only"], "the network was asked again"
        return download(name, file, cache_dir=tmp_path / "cache", **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", _no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_cache)
    return tmp_path / "cache"


def test_without_network_the_way_to_get_the_files_is_named(offline):
    message = _refusal("hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup")
    assert (
        "the hub cannot be reached (ConnectionError: [Errno -2] Name or service not known)"
        in message
    )
    assert (
        "hf download HuggingFaceTB/smollm-corpus --repo-type=dataset --include "
        '"fineweb-edu-dedup/*.parquet" --local-dir DIR'
    ) in message
    assert "--source='parquet:DIR/fineweb-edu-dedup/*.parquet:text'" in message
    with pytest.raises(errors.UsageError) as caught:
        tokenizer_lib.load("hf:HuggingFaceTB/SmolLM2-135M")
    assert "hf download HuggingFaceTB/SmolLM2-135M tokenizer.json --local-dir DIR" in str(
        caught.value
    )
    assert "--tokenizer=DIR/tokenizer.json" in str(caught.value)


def test_a_network_that_goes_away_on_the_way_is_no_fault_of_the_user(dataset, monkeypatch):
    class Info:
        sha = "0123abcd"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: Info())
    asked = {}

    class Rows:
        features = None

        def with_format(self, kind):
            return self

        def iter(self, size):
            yield pa.table({"text": ["one", "two"]})
            raise ConnectionError("reset by peer")

    def load(name, config, **options):
        asked.update(options, name=name, config=config)
        return Rows()

    monkeypatch.setattr("datasets.load_dataset", load)
    source = sources.open_source("hf:owner/name:part")
    assert asked == {
        "name": "owner/name",
        "config": "part",
        "split": "train",
        "streaming": True,
        "revision": "0123abcd",
    }
    assert source.describe() == {"dataset": "owner/name", "revision": "0123abcd"}
    with pytest.raises(
        errors.StorageError,
        match=r"stopped after row 2 \(ConnectionError: reset by peer\).*resumes",
    ):
        list(source.documents())


def test_without_the_library_the_extra_is_named(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the library datasets, which is not installed" in _refusal(f"hf:{dataset}:main")
    assert "pip install -e '.[data]'" in _refusal(f"hf:{dataset}:main")


@pytest.fixture(scope="module")
def trained():
    return tokenizer_lib.train([f"some words {i}" for i in range(99)], 260, eos_token="<stop>")


def _write_tokenizer(folder, trained, eos):
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(trained.content)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "special": True}])
def test_a_tokenizer_of_a_directory_brings_its_end_of_text(tmp_path, trained, eos):
    folder = _write_tokenizer(tmp_path / "model", trained, eos)
    loaded = tokenizer_lib.load(f"hf:{folder}")
    assert (loaded.content, loaded.eos_token) == (trained.content, "<stop>")
    with pytest.raises(errors.UsageError, match="expected '<halt>'"):
        tokenizer_lib.load(f"hf:{folder}", eos_token="<halt>")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(errors.UsageError, match=r"no end-of-text token.*--eos_token"):
        tokenizer_lib.load(f"hf:{folder}")
    assert tokenizer_lib.load(f"hf:{folder}", eos_token="<stop>").eos_id == trained.eos_id
    (folder / "tokenizer.json").unlink()
    with pytest.raises(errors.UsageError, match=r"tokenizer\.json: missing"):
        tokenizer_lib.load(f"hf:{folder}")


def test_a_tokenizer_that_was_downloaded_once_needs_no_network(offline, trained):
    commit = "f" * 40
    repository = offline / "models--owner--name"
    _write_tokenizer(repository / "snapshots" / commit, trained, "<stop>")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert tokenizer_lib.load("hf:owner/name").content == trained.content
    shutil.rmtree(repository)
    with pytest.raises(errors.UsageError, match="cannot be downloaded"):
        tokenizer_lib.load("hf:owner/name")


def test_a_name_that_can_be_none_is_said(monkeypatch):
    for spec in ("hf:a/b/c", "hf:a b"):
        with pytest.raises(errors.UsageError, match="no such model on the hub"):
            tokenizer_lib.load(spec)
    assert hub._parts("x", "d/e:c::t") == ("d/e", "c", "train", "t")
