"""`tfds:NAME[:SPLIT][:FEATURE]`: texts of a TensorFlow Datasets data set, without TensorFlow.

Only the array_record file format is read (parquet of TFDS needs its own reader, TFRecord needs
TensorFlow). NAME is a registered name with or without its version, looked for in TFDS_DATA_DIR, or
the directory that holds dataset_info.json.
"""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from qkjax import errors
from qkjax.data import documents, shards

_BATCH_ROWS = 256
_VERSION = re.compile(r"\d+\.(\d+|\*)\.(\d+|\*)")
_SEPARATOR = re.compile(r":(?![^\[]*\])")  # not the colon of a slice, train[:10%]
_FIX = (
    "Make it with builder.download_and_prepare(file_format='array_record') under TFDS_DATA_DIR, "
    "or name the directory that holds its dataset_info.json"
)


class TfdsText(documents.Source):
    """One text feature of one split; the order is that of the files."""

    def __init__(self, name: str, rest: str) -> None:
        """Opens the data set; `name` is the whole spec, `rest` what follows `tfds:`.

        Raises:
            UsageError: an unknown data set, split or feature, or another file format.
        """
        super().__init__(name)
        dataset, split, self._feature = _parts(name, rest)
        builder = _builder(name, dataset)
        self._check_feature(builder.info.features)
        shards.check_threads()
        try:
            self._records = builder.as_data_source(split=split)
        except Exception as error:  # unknown split, missing files, another file format
            raise self._refusal(error) from None
        self.field = self._feature
        self.files = [
            pathlib.Path(part.filename) for part in builder.info.splits[split].file_instructions
        ]
        self._place = f"{builder.info.full_name} {split}"
        self._describe = {
            "dataset": builder.info.full_name,
            "split": split,
            "examples": len(self._records),
            "bytes": int(builder.info.splits[split].num_bytes)
            if split in builder.info.splits
            else 0,
        }

    def documents(self, start: int = 0) -> Iterator[documents.Document]:
        count = len(self._records)
        self._note_files()
        for first in range(start, count, _BATCH_ROWS):
            numbers = range(first, min(first + _BATCH_ROWS, count))
            try:
                rows = self._records.__getitems__(list(numbers))
            except Exception as error:
                raise errors.UsageError(
                    f"{self._place} record {first}: cannot be read ({errors.one_line(error)}). "
                    "Check its files, or make them again."
                ) from None
            for number, row in zip(numbers, rows, strict=True):
                self.fraction = number / count
                yield documents.Document(self._text(row, number), f"{self._place} record {number}")
        self._note_files()

    def describe(self) -> dict[str, Any]:
        return self._describe

    def _note_files(self) -> None:
        for _ in self._files_in_turn():
            pass

    def _text(self, row: dict[str, Any], number: int) -> str:
        value = row[self._feature]
        try:
            return value.decode() if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError:
            raise errors.UsageError(
                f"{self._place} record {number}: feature {self._feature!r} is not valid UTF-8. "
                "Name another feature."
            ) from None

    def _check_feature(self, features: Any) -> None:
        import tensorflow_datasets as tfds

        texts = sorted(k for k, kind in features.items() if isinstance(kind, tfds.features.Text))
        if self._feature not in texts:
            raise errors.UsageError(
                f"--source={self.name}: no text feature {self._feature!r}, "
                f"found {', '.join(texts) or 'none'}. Name it: tfds:NAME:SPLIT:FEATURE."
            )

    def _refusal(self, error: Exception) -> errors.UsageError:
        return errors.UsageError(
            f"--source={self.name}: cannot be read ({errors.one_line(error)}). {_FIX}."
        )


def _builder(name: str, dataset: str) -> Any:
    # Its import looks for TensorFlow and says so when there is none: not our user's concern.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    try:
        if pathlib.Path(dataset).is_dir():
            return tfds.builder_from_directory(dataset)
        return tfds.builder(dataset)
    except Exception as error:
        place = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        raise errors.UsageError(
            f"--source={name}: no TFDS dataset {dataset!r} in {place} ({errors.one_line(error)}). "
            f"{_FIX}."
        ) from None


def _parts(name: str, rest: str) -> tuple[str, str, str]:
    if pathlib.Path(rest).is_dir():
        return rest, "train", "text"
    pieces = _SEPARATOR.split(rest)
    last = max((i for i, piece in enumerate(pieces) if "/" in piece), default=0)
    if len(pieces) > last + 1 and _VERSION.fullmatch(pieces[last + 1]):
        last += 1  # a TFDS name has its version after a colon
    dataset, options = ":".join(pieces[: last + 1]), pieces[last + 1 :]
    if not dataset or len(options) > 2:
        raise errors.UsageError(
            f"--source={name}: expected tfds:NAME[:SPLIT][:FEATURE]. "
            "For example tfds:wiki40b/en:train:text."
        )
    split, feature = [*options, "", ""][:2]
    return dataset, split or "train", feature or "text"
