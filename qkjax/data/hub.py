"""The Hugging Face hub: `hf:DATASET[:CONFIG][:SPLIT][:COLUMN]` documents and `hf:NAME` tokenizers.

DATASET and NAME are names on the hub, or local directories in the hub's layout. A hub that cannot
be reached is reported at once, with the way to get the files from another machine.
"""

import itertools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

from qkjax import errors, files
from qkjax.data import documents

_TIMEOUT_SECONDS = 10.0
_BATCH_ROWS = 256
_INSTALL = "Run: pip install -e '.[data]'"


class HubDataset(documents.Source):
    """Rows of one split of a dataset, streamed: nothing is stored on the disk."""

    def __init__(self, name: str, rest: str) -> None:
        """Looks the dataset up; `name` is the whole spec, `rest` what follows `hf:`.

        Raises:
            UsageError: a missing library, hub, dataset, configuration or split.
        """
        super().__init__(name)
        self._dataset, self._config, self._split, self._column = _parts(name, rest)
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise errors.UsageError(
                f"--source={name}: needs the library {error.name}, which is not installed. "
                f"{_INSTALL}"
            ) from None
        datasets.disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises
        self.field = self._column
        self._folder = pathlib.Path(self._dataset) if pathlib.Path(self._dataset).is_dir() else None
        self._revision = None if self._folder else _revision(name, self._dataset)
        try:
            self._rows = datasets.load_dataset(
                self._dataset,
                self._config or None,
                split=self._split,
                streaming=True,
                revision=self._revision,
            )
        except Exception as error:  # the library raises what its parts raise
            raise errors.UsageError(
                f"--source={name}: cannot be opened ({errors.one_line(error)}). Check the names of "
                "dataset, configuration and split."
            ) from None
        self._check_column(list(self._rows.features or []))
        if self._folder:
            self.files = self._local_files(datasets)

    def documents(self, start: int = 0) -> Iterator[documents.Document]:
        self._note_files()
        row = start
        rows = self._rows.skip(start) if start else self._rows
        try:
            for table in rows.with_format("arrow").iter(_BATCH_ROWS):
                self._check_column(table.column_names)
                for value in table.column(self._column).to_pylist():
                    row += 1
                    yield documents.Document(self._text(value, row), f"{self._dataset} row {row}")
        except errors.QkjaxError:
            raise
        except Exception as error:
            raise self._broken(error, row) from None
        self._note_files()

    def _text(self, value: Any, row: int) -> str:
        try:
            return documents.text_of_row(value, self._column)
        except TypeError as error:
            raise errors.UsageError(
                f"{self._dataset} row {row}: {error}. Name another column."
            ) from None

    def describe(self) -> dict[str, Any]:
        if self._folder is None:
            return {"dataset": self._dataset, "revision": self._revision}
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        return {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}

    def _local_files(self, datasets: Any) -> list[pathlib.Path]:
        """The files of the split; which of them a row stands in, the library does not say."""
        builder = datasets.load_dataset_builder(self._dataset, self._config or None)
        return [pathlib.Path(name) for name in builder.config.data_files[self._split]]

    def _note_files(self) -> None:
        for _ in self._files_in_turn():
            pass

    def _check_column(self, columns: list[str]) -> None:
        if columns and self._column not in columns:
            raise errors.UsageError(
                f"--source={self.name}: no column {self._column!r}, found {', '.join(columns)}. "
                "Name it: hf:DATASET:CONFIG:SPLIT:COLUMN."
            )

    def _broken(self, error: Exception, row: int) -> errors.QkjaxError:
        text = f"{self._dataset}: stopped after row {row} ({errors.one_line(error)})"
        if self._folder is None:
            return errors.StorageError(
                f"{text}. When the network is back, the same command resumes."
            )
        packed = self.files[0].name.partition(".")[2]
        if packed.startswith("json"):  # each line of `jsonl:` stands for itself
            pattern = self.files[0].parent / f"*.{packed}"
            return errors.UsageError(
                f"{text}. If columns of its files differ, read them with "
                f"--source='jsonl:{pattern}:{self._column}'; otherwise check them."
            )
        return errors.UsageError(f"{text}. Check its files, or download them again.")


def fetch_tokenizer(spec: str, name: str) -> tuple[bytes, str]:
    """tokenizer.json of `name`, a model on the hub or a directory, and its end-of-text token.

    Returns: the bytes, and the end-of-text token of its tokenizer_config.json ("" where that
    names none).
    Raises:
        UsageError: it cannot be downloaded; `spec` is what the user wrote.
    """
    folder = pathlib.Path(name)
    if not folder.is_dir():
        folder = _download_tokenizer(spec, name)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise errors.UsageError(f"{path}: missing. Name a directory that holds a tokenizer.json.")
    config = folder / "tokenizer_config.json"
    token = (files.read_object(config, "Download it again.") or {}).get("eos_token")
    if isinstance(token, dict):  # older files describe the token
        token = token.get("content")
    return path.read_bytes(), token if isinstance(token, str) else ""


def _download_tokenizer(spec: str, name: str) -> pathlib.Path:
    import huggingface_hub as hub
    from huggingface_hub import errors as hub_errors

    def get(file: str, local: bool) -> pathlib.Path:
        return pathlib.Path(hub.hf_hub_download(name, file, local_files_only=local)).parent

    offline = None
    try:  # the download itself would try for half a minute before it says that there is no network
        hub.HfApi().model_info(name, timeout=_TIMEOUT_SECONDS)
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise errors.UsageError(
            f"--tokenizer={spec}: no such model on the hub, or no permission to read it "
            f"({errors.one_line(error)}). Check the name; `hf auth login` for a private one."
        ) from None
    except Exception as error:
        offline = error
    try:
        folder = get("tokenizer.json", local=offline is not None)
        try:
            get("tokenizer_config.json", local=offline is not None)
        except hub_errors.EntryNotFoundError:
            pass  # it only names the end-of-text token
        return folder
    except Exception as error:
        reason = errors.one_line(offline or error)
        raise errors.UsageError(
            f"--tokenizer={spec}: cannot be downloaded from the hub ({reason}). Offline: run "
            "`hf download "
            f"{name} tokenizer.json --local-dir DIR` on a machine with network, copy DIR here, "
            "and pass --tokenizer=DIR/tokenizer.json here."
        ) from None


def _parts(name: str, rest: str) -> tuple[str, str, str, str]:
    """Dataset, configuration, split and column; ':' separates where no '/' follows."""
    if pathlib.Path(rest).is_dir():
        return rest, "", "train", "text"
    pieces = rest.split(":")
    last = max((i for i, piece in enumerate(pieces) if "/" in piece), default=0)
    dataset = ":".join(pieces[: last + 1])
    options = pieces[last + 1 :]
    if not dataset or len(options) > 3:
        raise errors.UsageError(
            f"--source={name}: expected hf:DATASET[:CONFIG][:SPLIT][:COLUMN]. "
            "For example hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2."
        )
    config, split, column = itertools.islice(itertools.chain(options, ("", "", "")), 3)
    return dataset, config, split or "train", column or "text"


def _revision(name: str, dataset: str) -> str:
    """The commit of a dataset on the hub, so that one dataset is one state of it."""
    import huggingface_hub as hub
    from huggingface_hub import errors as hub_errors

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return str(hub.HfApi().dataset_info(dataset, timeout=_TIMEOUT_SECONDS).sha)
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise errors.UsageError(
            f"--source={name}: no such dataset on the hub, or no permission to read it "
            f"({errors.one_line(error)}). Check the name; `hf auth login` for a private one."
        ) from None
    except Exception as error:
        config = name.split(":")[2] if name.count(":") > 1 else ""
        pattern = f"{config}/*.parquet" if config else "*.parquet"
        raise errors.UsageError(
            f"--source={name}: the hub cannot be reached ({errors.one_line(error)}). Offline: run "
            f'`hf download {dataset} --repo-type=dataset --include "{pattern}" --local-dir DIR` on '
            "a machine with network, copy DIR here, and pass "
            f"--source='parquet:DIR/{pattern}:text' here."
        ) from None
