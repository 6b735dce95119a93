"""Which documents are held out: decided by the text alone, so that all copies are treated the same.

Documents whose hash falls under 5% form the validation pool. No member of the pool is ever
trained on, so a training copy of a validation document cannot exist, in any file
and however its white space, case or Unicode form differ.
"""

import hashlib
import unicodedata

POOL_FRACTION = 0.05
RULE = {
    "rule": "sha256 of normalised text",
    "normalisation": "NFKC, casefold, white space collapsed",
    "pool_fraction": POOL_FRACTION,
}
_POOL_LIMIT = int(POOL_FRACTION * 2**64)


def normalise(text: str) -> str:
    """The form in which documents are compared: NFKC, casefold, white space collapsed."""
    if not text.isascii():  # NFKC leaves ASCII as it is
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def hash64(normalised: str) -> int:
    """The first 8 bytes, big-endian, of sha256 of the normalised text."""
    return int.from_bytes(hashlib.sha256(normalised.encode()).digest()[:8], "big")


def in_pool(document_hash: int) -> bool:
    """True where a document with this hash64 belongs to the validation pool."""
    return document_hash < _POOL_LIMIT
