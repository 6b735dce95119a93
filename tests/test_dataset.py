"""The dataset of a config: what is said where there is none, and how often it is passed over."""

import copy
import functools
import json
import random
import shutil

import pytest
import small_run

from qkjax import config as config_lib
from qkjax import errors
from qkjax.cli import places
from qkjax.data import check, prepare
from qkjax.data import dataset as dataset_lib


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_run.make_dataset(tmp_path_factory.mktemp("dataset") / "data")  # 160 records


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("full", "--preset=study"),
        ("pilot", "--preset=pilot"),
        ("pilot,original", "--preset=pilot --end_of_text=false"),
        ("1b5", "--preset=study"),
    ],
)
def test_a_scale_without_data_names_the_command_that_makes_it(words, options):
    config = config_lib.resolve(config_lib.base("muon", "none", words))
    with pytest.raises(errors.UsageError) as caught:
        dataset_lib.require_directory(config)
    assert f"`qkjax prepare {options} --out=DIR`" in str(caught.value)


def test_the_named_command_follows_the_sequence_length():
    values = config_lib.base("muon", "none", "pilot")
    values.model.sequence_length = 1024
    with pytest.raises(errors.UsageError, match="--preset=pilot --sequence_length=1024 --out"):
        dataset_lib.require_directory(config_lib.resolve(values))


@pytest.mark.parametrize(("sequences", "passes"), [(160, None), (200, "1.25"), (640, "4.00")])
def test_more_than_one_pass_is_warned_of_with_its_number(made, caplog, sequences, passes):
    config = small_run.make_config(
        made, train__tokens=sequences * small_run.LENGTH, eval__at_tokens=()
    )
    with caplog.at_level("WARNING"):
        assert dataset_lib.open_dataset(config).directory == made
    said = [record.getMessage() for record in caplog.records]
    if passes is None:
        assert not said
    else:
        assert any(f"this run passes {passes} times over its training split" in s for s in said)


def test_a_shard_that_is_not_in_the_manifest_is_named(made, tmp_path, caplog):
    folder = shutil.copytree(made, tmp_path / "data")
    shard = next(folder.glob("train-*.array_record"))
    shutil.copy(shard, folder / "foreign.array_record")
    with caplog.at_level("WARNING"):
        dataset_lib.open_dataset(small_run.make_config(folder))
    (record,) = caplog.records
    assert (
        record.getMessage() == f"{folder}: not in dataset.json, so not read: foreign.array_record"
    )


@pytest.mark.parametrize("pattern", ["train-*", "validation-*", "tokenizer.json"])
def test_other_bytes_of_the_same_size_are_refused_before_training(made, tmp_path, pattern):
    folder = shutil.copytree(made, tmp_path / "data")
    (path,) = folder.glob(pattern)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(errors.UsageError, match=rf"^{path}: expected sha256 \w+, found \w+\. Reb"):
        dataset_lib.open_dataset(small_run.make_config(folder))
    path.write_bytes(data)
    (folder / "documents-train.npz").unlink()  # only check_data reads it
    dataset_lib.open_dataset(small_run.make_config(folder))


def test_more_than_four_passes_need_max_epochs(made):
    fields = {"train__tokens": 644 * small_run.LENGTH, "eval__at_tokens": ()}
    with pytest.raises(errors.UsageError, match=r"train\.tokens: .* are 4\.03 passes over the"):
        dataset_lib.open_dataset(small_run.make_config(made, **fields))
    dataset_lib.open_dataset(small_run.make_config(made, data__max_epochs=5, **fields))


def test_other_remote_paths_are_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = prepare.Request(sources=("docstrings",), tokenizer="train:300")
    with pytest.raises(errors.UsageError, match=r"--out: az://bucket/x is a remote path"):
        prepare.prepare(request, "az://bucket/x")
    with pytest.raises(errors.UsageError, match=r"data\.dir: http://x/y is a remote path"):
        dataset_lib.open_dataset(small_run.make_config("http://x/y"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocab_size", "end_of_text", "name"),
    [
        (4096, True, "embedded-v2"),
        (8192, True, "embedded-v2-8192"),
        (4096, False, "embedded-v2-without-end-of-text"),
        (8192, False, "embedded-v2-8192-without-end-of-text"),
    ],
)
def test_the_folder_of_the_embedded_corpus_says_what_it_holds(vocab_size, end_of_text, name):
    assert dataset_lib.embedded_directory(vocab_size, end_of_text).name == name


@pytest.mark.parametrize(
    ("words", "vocab_size", "name"),
    [
        ("tiny", 4096, "embedded-v2"),
        ("small", 8192, "embedded-v2-8192"),
        ("small,original", 8192, "embedded-v2-8192-without-end-of-text"),
    ],
)
def test_small_scales_take_the_embedded_corpus_of_their_vocabulary(
    monkeypatch, words, vocab_size, name
):
    asked = {}

    def prepare_embedded(directory, **options):
        asked.update(options, name=directory.name)
        raise errors.UsageError("far enough")

    monkeypatch.setattr(prepare, "prepare_embedded", prepare_embedded)
    config = config_lib.resolve(config_lib.base("muon", "none", words))
    with pytest.raises(errors.UsageError, match="far enough"):
        dataset_lib.open_dataset(config)
    assert asked == {
        "name": name,
        "vocab_size": vocab_size,
        "end_of_text": "original" not in words,
    }
    assert config.model.sequence_length == 256  # as the corpus is cut


def test_a_run_on_an_earlier_embedded_corpus_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "data", lambda: tmp_path)
    old = small_run.make_dataset(tmp_path / "embedded", seed=1)
    new = small_run.make_dataset(tmp_path / "embedded-v2", seed=2)
    monkeypatch.setattr(prepare, "prepare_embedded", lambda directory, **options: new)
    config = small_run.make_config("")
    assert dataset_lib.open_dataset(config).directory == new
    for folder in (old, new):
        trained_on = dataset_lib.manifest_lib.load(folder).fingerprint
        assert dataset_lib.open_dataset(config, trained_on).directory == folder
    assert dataset_lib.open_dataset(config, "f" * 64).directory == new  # refused by its reader


VALUES = (None, True, 0, -1, 3.5, 10**30, "", "x", "../y", "\ud800", [], [1], [None], {}, {"a": 1})


def _places(value, path=()):
    """Every place inside nested JSON values."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _places(inner, (*path, key))


def _mutated(value, chance):
    changed = copy.deepcopy(value)
    *above, key = chance.choice([path for path in _places(value) if path])
    holder = functools.reduce(lambda inner, step: inner[step], above, changed)
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    return changed


def test_a_manifest_with_anything_wrong_is_refused_in_one_line_or_harmless(made, tmp_path):
    """Never a traceback: not in training, in the same command again, in check_data."""
    folder, chance = shutil.copytree(made, tmp_path / "data"), random.Random(0)
    config, path = small_run.make_config(folder), folder / "dataset.json"
    good = json.loads(path.read_text())
    options = {key: good["request"][key] for key in ("tokenizer", "sequence_length")}
    tokens = {key: good["request"][key] for key in ("train_tokens", "validation_tokens")}
    request = prepare.Request(sources=tuple(good["request"]["sources"]), **options, **tokens)
    refused = 0
    for _ in range(600):
        path.write_text(json.dumps(_mutated(good, chance)))
        for use in (
            lambda: dataset_lib.open_dataset(config),
            lambda: prepare.prepare(request, folder, progress=lambda line: None),
            lambda: check.check_sources(folder),
        ):
            try:
                use()
            except errors.QkjaxError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 800
    path.write_text(json.dumps(good))
    prepare.prepare(request, folder, progress=lambda line: None)
