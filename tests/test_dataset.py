"""The dataset of a config: what is said where there is none, and how often it is passed over."""

import shutil

import pytest
import small_run

from qkjax import config as config_lib
from qkjax import errors
from qkjax.cli import places
from qkjax.data import dataset as dataset_lib
from qkjax.data import prepare


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
    assert f"`python tools/prepare_data.py {options} --out=DIR`" in str(caught.value)


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


def test_a_bucket_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = prepare.Request(sources=("docstrings",), tokenizer="train:300")
    with pytest.raises(errors.UsageError, match=r"--out: gs://bucket/x is a remote path"):
        prepare.prepare(request, "gs://bucket/x")
    with pytest.raises(errors.UsageError, match=r"data\.dir: s3://bucket/x is a remote path"):
        dataset_lib.open_dataset(small_run.make_config("s3://bucket/x"))
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
