"""Text of every kind of source becomes a dataset that a model trains on."""

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
import small_run
import zstandard

from qkjax import train
from qkjax.data import check, prepare


def _texts():
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(150)]
    return [" ".join(chance.choices(words, k=chance.randint(8, 14))) for _ in range(400)]


def _tfds(folder):
    import tensorflow_datasets as tfds

    class QkjaxTrains(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"text": text}) for i, text in enumerate(_texts()))

    builder = QkjaxTrains(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"


def _hub_directory(folder):
    pytest.importorskip("datasets", reason="the extra [data] is not installed")
    (folder / "data").mkdir()
    for i in range(2):
        table = pa.table({"text": _texts()[200 * i : 200 * i + 200]})
        pa.parquet.write_table(table, folder / "data" / f"train-{i:05d}-of-00002.parquet")
    return f"hf:{folder}"


def _zstd_lines(folder):
    path = folder / "texts.jsonl.zst"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in _texts())
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    return f"jsonl:{path}"


@pytest.mark.parametrize("make", [_tfds, _hub_directory, _zstd_lines])
def test_a_model_trains_on_it(tmp_path, make):
    source = tmp_path / "source"
    source.mkdir()
    request = prepare.Request(
        sources=(make(source),),
        tokenizer=f"train:{small_run.VOCABULARY}",
        sequence_length=small_run.LENGTH,
        validation_tokens=7 * small_run.LENGTH,
    )
    data = tmp_path / "data"
    made = prepare.prepare(request, data, progress=lambda line: None)
    # TFDS shuffles documents when it builds, and every document is used once in any order.
    documents = made.sources[0]["documents"] + made.documents["validation"].num_documents
    assert documents + made.dropped["validation_pool_unused"] in (399, 400)  # the tail may be cut
    check.check(data, progress=lambda line: None)
    config = small_run.make_config(
        data, train__tokens=4 * small_run.TOKENS_PER_STEP, eval__at_tokens=()
    )
    train.train_and_evaluate(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["step"] == 4 and not summary["diverged"] and summary["val/loss"] < 6
