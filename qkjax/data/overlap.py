"""13-grams that training documents share with the validation documents and with benchmarks.

Definition, one for all: the text is normalised as for the hold-out, ASCII punctuation is deleted,
words are what white space and control characters separate, and an n-gram is 13 words in a row of
one text, as contamination is usually counted (Brown et al. 2020, appendix C). Texts of fewer
words have none. N-grams are compared by 64-bit hashes: two different ones agree with a chance of
n / 2^64, about 1e-4 over a whole study. The hashes of what must not be met stay in memory-mapped
files that all worker processes share; training documents stream past.
"""

import itertools
import json
import pathlib
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkjax import errors, files
from qkjax.data import holdout

LENGTH = 13
BENCHMARKS = ("hellaswag", "lambada")
NAMES = ("validation", *BENCHMARKS)
_PUNCTUATION = string.punctuation.encode()
_SPACE = 32  # bytes up to it separate words
_NEW_TEXT = b"\n"  # no normalised text holds one
_BYTE_FACTOR, _WORD_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd: invertible mod 2^64
_SLOTS_PER_HASH = 16  # of the filter; 6% of what is not there passes it
_ITEMS_AT_ONCE = 1000  # of a benchmark
_KEPT_POWERS = 1 << 19  # as many as an ordinary chunk of documents has bytes
_POWERS: dict[int, np.ndarray] = {}
FILES = {"hashes": "ngrams.npy", "labels": "ngram-labels.npy", "filter": "ngram-filter.npy"}


class Ngrams(NamedTuple):
    """Hashes uint64 [ngrams] in the order of the texts, and the text of each, int64 [ngrams]."""

    hashes: np.ndarray
    texts: np.ndarray


def ngrams(normalised: Sequence[str]) -> Ngrams:
    """All n-grams of texts in the form of `holdout.normalise`."""
    text = "\n".join(normalised).encode().translate(None, _PUNCTUATION)
    data = np.frombuffer(text + _NEW_TEXT, np.uint8)
    inside = data > _SPACE
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if inside[0]:
        edges = np.concatenate([[0], edges])
    starts, ends = edges[0::2], edges[1::2]
    if len(starts) < LENGTH:
        return Ngrams(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    # Of all prefixes the sum of byte * factor^position; a word is the difference of two of them,
    # moved to position 0. All modulo 2^64, which is how numpy's uint64 counts.
    prefix = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum(data * _powers(_BYTE_FACTOR, len(data)))]
    )
    back = _powers(pow(_BYTE_FACTOR, -1, 1 << 64), len(data))
    words = _mixed((prefix[ends] - prefix[starts]) * back[starts])
    count = len(words) - LENGTH + 1
    hashes = np.zeros(count, np.uint64)
    for i, power in enumerate(_powers(_WORD_FACTOR, LENGTH)):
        hashes += words[i : i + count] * power
    ends_before = np.cumsum(data == ord(_NEW_TEXT))[starts]
    whole = ends_before[:count] == ends_before[LENGTH - 1 :]
    return Ngrams(_mixed(hashes[whole]), ends_before[:count][whole].astype(np.int64))


class Index:
    """The n-grams of the validation documents and benchmarks, to look others up in."""

    def __init__(self, hashes: np.ndarray, labels: np.ndarray, filter_bits: np.ndarray) -> None:
        """Args:
        hashes: uint64 [n], ascending.
        labels: uint8 [n], bit i set where NAMES[i] has the n-gram.
        filter_bits: uint8 [slots / 8], a bit a leading part of a hash.
        """
        self._hashes = hashes
        self._labels = labels
        self._filter = filter_bits
        self._shift = np.uint64(64 - (len(filter_bits) * 8).bit_length() + 1)

    def num_ngrams(self) -> dict[str, int]:
        """How many different n-grams each of NAMES has."""
        return {
            name: int(np.count_nonzero(self._labels & (1 << i))) for i, name in enumerate(NAMES)
        }

    def count(self, normalised: Sequence[str]) -> np.ndarray:
        """int64 [texts, len(NAMES)]: how many n-grams of each text occur in each of NAMES."""
        found = ngrams(normalised)
        slots = found.hashes >> self._shift
        bits = self._filter[slots >> np.uint64(3)] >> (slots & np.uint64(7)).astype(np.uint8)
        maybe = np.flatnonzero(bits & 1)
        counts = np.zeros((len(normalised), len(NAMES)), np.int64)
        if not maybe.size:
            return counts
        hashes = found.hashes[maybe]
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        hit = self._hashes[places] == hashes
        labels, texts = self._labels[places[hit]], found.texts[maybe[hit]]
        for i in range(len(NAMES)):
            counts[:, i] = np.bincount(texts[labels & (1 << i) != 0], minlength=len(normalised))
        return counts


def build(hashes_by_name: Mapping[str, np.ndarray], folder: pathlib.Path) -> None:
    """Writes an index of hashes, uint64 [n] for some of NAMES, for `load` to open."""
    every = np.concatenate([*hashes_by_name.values(), np.zeros(0, np.uint64)])
    hashes = _distinct(every)
    labels = np.zeros(len(hashes), np.uint8)
    for name, some in hashes_by_name.items():
        labels[np.searchsorted(hashes, np.sort(some))] |= 1 << NAMES.index(name)
    bits = max(3, int(_SLOTS_PER_HASH * max(len(hashes), 1) - 1).bit_length())
    slots = np.zeros(1 << bits, bool)
    slots[hashes >> np.uint64(64 - bits)] = True
    arrays = {"hashes": hashes, "labels": labels, "filter": np.packbits(slots, bitorder="little")}
    for name, array in arrays.items():
        files.write_array(folder / FILES[name], array)


def load(folder: str | pathlib.Path) -> Index:
    """Opens the index that `build` wrote; its memory is shared with other processes.

    Raises:
        UsageError: a file of it is damaged or missing.
        StorageError: the disk failed.
    """
    fix = f"Remove {folder} and run the command again."
    hashes, labels, bits = (
        files.read_array(pathlib.Path(folder) / file, fix, mapped=True) for file in FILES.values()
    )
    return Index(hashes, labels, bits)


def benchmark_files(folder: str | pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files NAME*.jsonl of each benchmark, in `folder` or below; [] where there is none.

    Raises:
        UsageError: there is none of any benchmark.
    """
    found = {name: sorted(pathlib.Path(folder).rglob(f"{name}*.jsonl")) for name in BENCHMARKS}
    if not any(found.values()):
        raise errors.UsageError(
            f"--benchmark_dir={folder}: no {' or '.join(f'{n}*.jsonl' for n in BENCHMARKS)} in it. "
            "Name the directory that holds the benchmarks' files."
        )
    return found


def changed_files(folder: str | pathlib.Path, counted: Mapping[str, Any]) -> list[pathlib.Path]:
    """The benchmark files of `folder` that are not those of `counted`, the manifest's `overlap`.

    A file that was counted without its digest, as earlier versions did, counts as the same.
    Raises:
        UsageError: there is none of any benchmark.
    """
    changed = []
    for name, paths in benchmark_files(folder).items():
        record = counted[name] or {"files": [], "sha256": []}
        if "sha256" not in record:
            continue
        recorded = dict(zip(record["files"], record["sha256"], strict=True))
        for path in paths:
            if files.sha256(path) != recorded.pop(path.name, ""):
                changed.append(path)
        changed += [pathlib.Path(folder, name) for name in recorded]
    return changed


def benchmark_ngrams(paths: Sequence[pathlib.Path]) -> np.ndarray:
    """uint64 [n]: the n-grams of a benchmark's items; a context is joined with each ending."""
    parts = [np.zeros(0, np.uint64)]
    items = itertools.chain.from_iterable(map(_items, paths))
    while some := list(itertools.islice(items, _ITEMS_AT_ONCE)):
        parts.append(ngrams([holdout.normalise(text) for text in some]).hashes)
    return _distinct(np.concatenate(parts))


def _items(path: pathlib.Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield from _texts(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise errors.UsageError(
                    f"{path}:{number}: expected a JSON object with text, or with ctx and endings "
                    f"({type(error).__name__}: {error}). Download the file again."
                ) from None


def _texts(item: Any) -> list[str]:
    if "endings" not in item:
        texts = [item["text"]]
    elif isinstance(item["endings"], list):
        texts = [item["ctx"], *item["endings"]]
    else:
        raise TypeError(f"endings is {item['endings']!r:.60}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{text!r:.60} is not a text")
    context, *endings = texts
    return [f"{context} {ending}" for ending in endings] if "endings" in item else texts


def _powers(factor: int, count: int) -> np.ndarray:
    """uint64 [count]: factor^0, factor^1, ... modulo 2^64."""
    if count > _KEPT_POWERS:  # an unusually long document: not kept
        return _new_powers(factor, count)
    if factor not in _POWERS:
        _POWERS[factor] = _new_powers(factor, _KEPT_POWERS)
    return _POWERS[factor][:count]


def _new_powers(factor: int, count: int) -> np.ndarray:
    factors = np.full(count, factor, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Ascending, each once; np.unique takes 20 times as long."""
    ascending = np.sort(hashes)
    return ascending[np.concatenate([[True], ascending[1:] != ascending[:-1]])[: len(hashes)]]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the value changes all of the result (splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
