"""Text as records of token ids for somebody else's tokenizer."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qkjax import errors
from qkjax.data import holdout, sources

EMBEDDED = "docstrings"
_CHARACTERS = 5  # of text for a token, at first
_MARGIN = 10_000  # characters; tokens at the very end depend on what comes after


class Records(NamedTuple):
    """What a model is measured on."""

    ids: np.ndarray  # int64 [S, T + 1]
    facts: dict[str, Any]  # for model.json
    fingerprint: str  # sha256 of the ids: equal for equal records under any name


def read(spec: str, tokenizer: Any, *, tokens: int, length: int, bos: int | None) -> Records:
    """The first tokens of a source, documents joined by a newline.

    Args:
        spec: of `sources.KINDS`; "" is the held-out part of the embedded corpus.
        tokenizer: of transformers.
        tokens: how many are predicted, at least `length`; whole sequences of them.
        length: T, of a sequence.
        bos: a token that every sequence starts with, instead of one of the text; or None.
    Raises:
        UsageError: the source is damaged, unknown or too short.
    """
    number = tokens // length
    if number < 1:
        raise errors.UsageError(
            f"--tokens: {tokens}, expected at least --sequence_length {length}. Give more."
        )
    needed = number * length + (bos is None)
    ids = np.zeros(0, np.int64)
    documents, exhausted, wanted = _documents(spec), False, _CHARACTERS * needed + _MARGIN
    joined: list[str] = []
    characters = 0
    while len(ids) < needed:
        if exhausted:
            raise errors.UsageError(
                f"--text: {spec or EMBEDDED} has {len(ids):,} tokens for this tokenizer, expected "
                f"{needed:,}. Give a longer text, or fewer --tokens."
            )
        while characters < wanted:
            document = next(documents, None)
            if document is None:
                exhausted = True
                break
            joined.append(document)
            characters += len(document) + 1
        text = "\n".join(joined)
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = np.asarray(found["input_ids"], np.int64)
        if not exhausted:
            ids = ids[: int(len(ids) * (1 - _MARGIN / (2 * characters)))]
        wanted *= 2
    if bos is None:
        records = np.stack([ids[i * length : i * length + length + 1] for i in range(number)])
    else:
        rows = ids[: number * length].reshape(number, length)
        records = np.concatenate([np.full((number, 1), bos), rows], axis=1)
    digest = hashlib.sha256(json.dumps(records.shape).encode())
    digest.update(np.ascontiguousarray(records, "<i8").tobytes())
    facts = {
        "source": _named(spec),
        "tokens": number * length,
        "sequences": number,
        "sequence_length": length,
        "bos": bos,
        "documents": "joined by a newline",
    }
    return Records(records, facts, digest.hexdigest())


def _named(spec: str) -> str:
    """The source without its folders: they say where a copy lies on one machine."""
    kind, _, rest = spec.partition(":")
    return f"{kind}:{rest.rpartition('/')[2]}" if rest else kind or f"{EMBEDDED} (held-out part)"


def _documents(spec: str) -> Iterator[str]:
    if spec:
        yield from (document.text for document in sources.open_source(spec).documents())
        return
    for document in sources.open_source(EMBEDDED).documents():
        if holdout.in_pool(holdout.hash64(holdout.normalise(document.text))):
            yield document.text
