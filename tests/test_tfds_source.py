"""`tfds:`: a data set that is built here, by name and by directory, without TensorFlow."""

import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from qkjax import errors
from qkjax.data import sources

COUNT = 700  # more than two batches of reading


def text_of(number):
    chooser = random.Random(number)
    return f"Text {number} ä: " + " ".join(chooser.choices("abc def ghi jkl mno".split(), k=30))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(data_dir, directory) of the data set qkjax_small in array_record, and in TFRecord."""
    import tensorflow_datasets as tfds

    class QkjaxSmall(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "body": tfds.features.Text(),
                "number": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(COUNT), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": text_of(i), "body": f"body {i}", "number": i}

    folder = tmp_path_factory.mktemp("tfds")
    builder = QkjaxSmall(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder, str(builder.data_dir)


def _texts(spec):
    return [document.text for document in sources.open_source(spec).documents()]


def test_a_data_set_is_read_in_the_order_of_its_files(built):
    directory = built[1]
    source = sources.open_source(f"tfds:{directory}")
    documents = list(source.documents())
    assert sorted(d.text for d in documents) == sorted(map(text_of, range(COUNT)))
    assert list(source.documents()) == documents
    assert list(source.documents(300)) == documents[300:]
    assert documents[5].position == "qkjax_small/1.2.0 train record 5"
    assert source.describe()["examples"] == COUNT
    assert sorted(_texts(f"tfds:{directory}:test:body")) == ["body 0", "body 1", "body 2"]
    assert len(_texts(f"tfds:{directory}:train[:10]")) == 10
    assert "tensorflow" not in sys.modules


def test_a_data_set_is_known_by_the_content_of_its_files(built, tmp_path):
    copy = tmp_path / "qkjax_small" / "1.2.0"
    shutil.copytree(built[1], copy)
    source = sources.open_source(f"tfds:{copy}:train[:10]")
    next(source.documents())
    content = source.content(source.files_read)
    (path,) = copy.glob("*train.array_record*")
    assert content["files_read"] == 1 and source.changed(content) == []
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert source.changed(content) == [str(path)]


@pytest.mark.process
@pytest.mark.parametrize("spec", ["tfds:qkjax_small", "tfds:qkjax_small:1.2.0:train:text"])
def test_a_name_is_looked_for_in_tfds_data_dir(built, spec):
    """In a process of its own: TFDS reads the variable once."""
    code = (
        "from qkjax.data import sources\n"
        f"print(sum(1 for _ in sources.open_source({spec!r}).documents()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TFDS_DATA_DIR": str(built[0])},
    )
    assert done.stdout.strip() == str(COUNT), done.stderr


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("tfds:{directory}:dev", "Unknown split 'dev'"),
        ("tfds:{directory}:train:number", "no text feature 'number', found body, text"),
        ("tfds:{directory}:train:nothing", "no text feature 'nothing', found body, text"),
        ("tfds:no_such_data_set", "no TFDS dataset 'no_such_data_set' in "),
        ("tfds:{folder}", "no TFDS dataset"),
        ("tfds:{directory}:a:b:c", "expected tfds:NAME[:SPLIT][:FEATURE]"),
        ("tfds:", "unknown source"),
    ],
)
def test_what_cannot_be_read_is_one_line(built, spec, problem):
    folder, directory = built
    with pytest.raises(errors.UsageError, match=re.escape(problem)) as caught:
        _texts(spec.format(folder=folder, directory=directory))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(built, tmp_path):
    copy = tmp_path / "qkjax_small" / "1.2.0"
    shutil.copytree(built[1], copy)
    (path,) = copy.glob("*train.array_record*")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.UsageError) as caught:
        _texts(f"tfds:{copy}")
    assert "\n" not in str(caught.value) and "qkjax_small" in str(caught.value)
