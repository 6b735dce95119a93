"""Text to token ids and back: a byte-level BPE that is trained here, or a tokenizer.json.

Text never becomes a special token: a literal "<|endoftext|>" in a document is encoded as the
characters that it is.
"""

import hashlib
import json
import pathlib
import re
import string
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from qkjax import errors
from qkjax.data import holdout, hub
from qkjax.data import manifest as manifest_lib

FILE_NAME = "tokenizer.json"
KINDS = ("train:SIZE", "FILE (a tokenizer.json)", "hf:NAME (a model of the hub, or a directory)")
_HUB = "hf:"
_MOST_TRAINED = 1 << 24
EOS_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
_BYTES = 256
# What every tokenizer must restore exactly.
_ORDINARY = f"Two Lines.\n\n\tIndented,  with  spaces \n{string.printable}"
# What it must give back up to the normalisation under which documents are compared. Documents that
# hold more than this are tried one by one when they are encoded.
_AWKWARD = (
    f"{string.printable}  Ünïcödé e\u0301 中文 \U0001f469\u200d\U0001f467 ﷽ "
    "\x00\x7f\r\n\n [UNK] <unk> don't \ufeff  end "
)
# Training takes time with the square of a word's length: longer runs are cut for it.
_LONGEST_RUN = 512
_LONG_RUN = re.compile(rf"\S{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}")
# Post-processors that put tokens of their own around a text.
_ADDS_TOKENS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


class Tokenizer:
    """A Hugging Face tokenizer with its end-of-text token.

    Attributes:
        content, sha256: the bytes of its tokenizer.json, and their digest.
        vocab_size: every id is below it.
        eos_token, eos_id: the end-of-text token, which no text encodes to.
    """

    def __init__(self, content: bytes, *, eos_token: str = "", name: str = FILE_NAME) -> None:
        """Reads a tokenizer.json.

        Args:
            content: its bytes.
            eos_token: the end-of-text token; "" looks for one of EOS_TOKENS.
            name: what error messages call it.
        Raises:
            UsageError: it is not one, has no such token, or loses text.
        """
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise errors.UsageError(
                f"{name}: not a tokenizer.json ({errors.one_line(error)}). "
                "Pass the file that tokenizers' Tokenizer.save writes."
            ) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # the ids may have holes
        added = self._backend.get_added_tokens_decoder().values()
        special = {str(token.content) for token in added if token.special}
        self.eos_token = _find_eos(vocabulary, special, eos_token, name)
        self.eos_id = vocabulary[self.eos_token]
        self._treat_special_text_as_text()
        self._check(name)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of every text, uint32 [length], without special tokens; uses all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_exactly(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """As `encode_batch`; None for a text that its tokens do not give back as it was.

        One space more at the very beginning, as some tokenizers put there, is no difference.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        decoded = self._backend.decode_batch(ids, skip_special_tokens=False)
        return [
            np.array(some, dtype=np.uint32) if _is_given_back(text, back) else None
            for some, text, back in zip(ids, texts, decoded, strict=True)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of [length] ids; special tokens are shown."""
        return self._backend.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[np.ndarray]) -> list[str]:
        """The text of every [length] array of ids; uses all cores."""
        return self._backend.decode_batch(
            [ids.tolist() for ids in batch], skip_special_tokens=False
        )

    def _treat_special_text_as_text(self) -> None:
        # Tokens that the file adds without the mark "special" are matched in text even so. The
        # end-of-text token must not be: mark it.
        added = self._backend.get_added_tokens_decoder().get(self.eos_id)
        if added is not None and not added.special:
            added.special = True
            self._backend.add_special_tokens([added])
        self._backend.encode_special_tokens = True

    def _check(self, name: str) -> None:
        added = self._backend.get_added_tokens_decoder()
        special = {i: str(token.content) for i, token in added.items() if token.special}
        special[self.eos_id] = self.eos_token
        for token_id, literal in special.items():
            if token_id in self.encode_batch([f"a {literal} b {literal}"])[0]:
                raise errors.UsageError(
                    f"{name}: the text {literal!r} becomes the special token {token_id}, expected "
                    "ordinary tokens. Use a byte-level BPE tokenizer."
                )
        awkward = _AWKWARD + self.eos_token
        ordinary, decoded = self.decode_batch(self.encode_batch([_ORDINARY, awkward]))
        if not _is_given_back(_ORDINARY, ordinary):
            raise _loses_text(name, _ORDINARY, ordinary)
        if holdout.normalise(decoded) != holdout.normalise(awkward):
            raise _loses_text(name, awkward, decoded)


def load(path: str | pathlib.Path, *, eos_token: str = "") -> Tokenizer:
    """The tokenizer of a tokenizer.json file or of `hf:NAME`.

    Args:
        eos_token: the end-of-text token; "" takes the one that `hf:NAME` names, else looks for
            one of EOS_TOKENS.
    Raises:
        UsageError: it cannot be used.
    """
    if str(path).startswith(_HUB):
        content, named = hub.fetch_tokenizer(str(path), str(path).removeprefix(_HUB))
        return Tokenizer(content, eos_token=eos_token or named, name=str(path))
    try:
        content = pathlib.Path(path).read_bytes()
    except IsADirectoryError:
        raise errors.UsageError(
            f"{path}: a directory, expected a tokenizer.json. Name the file in it, or write "
            f"{_HUB}{path}."
        ) from None
    except FileNotFoundError:
        raise errors.UsageError(
            f"{path}: no such tokenizer file. Tokenizers are: {' or '.join(KINDS)}."
        ) from None
    return Tokenizer(content, eos_token=eos_token, name=str(path))


def of_dataset(manifest: manifest_lib.Manifest, directory: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a dataset.

    Raises:
        UsageError: it is not the one that made the dataset's tokens.
    """
    record = manifest.tokenizer
    path = pathlib.Path(directory) / record.file
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise errors.UsageError(
            f"{path}: missing. Rebuild the dataset with `qkjax prepare`."
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != record.sha256:
        raise errors.UsageError(
            f"{path}: expected sha256 {record.sha256}, found {found}, so this is not the tokenizer "
            "that made the dataset. Restore it."
        )
    eos_token = tokenizers.Tokenizer.from_str(content.decode()).id_to_token(record.eos_id)
    tokenizer = Tokenizer(content, eos_token=eos_token or "", name=str(path))
    if (tokenizer.vocab_size, tokenizer.eos_id) != (record.vocab_size, record.eos_id):
        raise errors.UsageError(
            f"{path}: has {tokenizer.vocab_size} tokens with end-of-text {tokenizer.eos_id}, "
            f"dataset.json says {record.vocab_size} with {record.eos_id}. "
            "Rebuild the dataset with `qkjax prepare`."
        )
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, *, eos_token: str = "") -> Tokenizer:
    """Trains a byte-level BPE of exactly vocab_size tokens; the end-of-text token is id 0.

    The same texts give the same bytes. Pre-tokenisation as in GPT-2, digits one by one.
    Raises:
        UsageError: vocab_size is too small for the bytes, or too large for the texts.
    Source: Sennrich et al. 2016; byte-level form of Radford et al. 2019.
    """
    smallest = _BYTES + 1
    if vocab_size < smallest:
        raise errors.UsageError(
            f"--tokenizer=train:{vocab_size}: expected at least {smallest} "
            f"(256 bytes and end-of-text). Ask for more tokens."
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token or EOS_TOKENS[0]],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_in_bounded_runs(texts), trainer)
    found = backend.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise errors.UsageError(
            f"--tokenizer=train:{vocab_size}: the training documents give only {found} tokens, "
            f"expected {vocab_size}. Ask for at most {found}, or add more text."
        )
    return Tokenizer(backend.to_str(pretty=True).encode(), eos_token=eos_token)


def without_additions(content: bytes) -> bytes:
    """A tokenizer.json that makes the tokens of training and no more, for other programs.

    A post-processor that starts or ends every text with a token is taken out, as are truncation
    and padding; a file without them is returned as it is.
    """
    parsed = json.loads(content)
    kept = {
        **parsed,
        "post_processor": _adding_nothing(parsed.get("post_processor")),
        "truncation": None,
        "padding": None,
    }
    if all(parsed.get(key) == value for key, value in kept.items()):
        return content
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _adding_nothing(post_processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if post_processor is None or post_processor["type"] in _ADDS_TOKENS:
        return None
    if post_processor["type"] != "Sequence":
        return post_processor
    parts = [part for part in map(_adding_nothing, post_processor["processors"]) if part]
    return {**post_processor, "processors": parts} if parts else None


def _in_bounded_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut where more than _LONGEST_RUN letters or spaces stand in a row."""
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


def _is_given_back(text: str, decoded: str) -> bool:
    return decoded == text or decoded == f" {text}"


def _loses_text(name: str, text: str, decoded: str) -> errors.UsageError:
    """Shows where the decoded text first differs."""
    decoded = decoded if text.startswith(" ") else decoded.removeprefix(" ")
    pairs = enumerate(zip(text, decoded, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
    start = max(0, at - 8)
    return errors.UsageError(
        f"{name}: loses text, {text[start : at + 16]!r} comes back as "
        f"{decoded[start : at + 16]!r}. Use a byte-level BPE tokenizer."
    )


def trained_size(spec: str) -> int | None:
    """SIZE of `train:SIZE`, None where `load` reads `spec`.

    Raises:
        UsageError: another kind.
    """
    kind, colon, rest = spec.partition(":")
    if kind == "train" and colon:
        if not rest.isascii() or not rest.isdigit():
            raise errors.UsageError(
                f"--tokenizer={spec}: SIZE: expected a whole number, found {rest!r}. "
                "Write for example --tokenizer=train:4096."
            )
        # tokenizers allocates memory for all of them, or crashes
        if len(rest) > 10 or int(rest) > _MOST_TRAINED:
            raise errors.UsageError(
                f"--tokenizer={spec}: SIZE: expected at most {_MOST_TRAINED}. Ask for fewer tokens."
            )
        return int(rest)
    if kind == "hf" and rest:
        return None
    if not spec or (colon and "/" not in kind and not pathlib.Path(spec).exists()):
        raise errors.UsageError(
            f"--tokenizer={spec}: unknown tokenizer. Known are: {', '.join(KINDS)}."
        )
    return None


def _find_eos(
    vocabulary: Mapping[str, int], special: Collection[str], eos_token: str, name: str
) -> str:
    """The end-of-text token: the one that is named, else the usual one, declared special first."""
    if eos_token:
        if eos_token in vocabulary:
            return eos_token
        raise _no_eos(name, repr(eos_token))
    usual = [token for token in EOS_TOKENS if token in vocabulary]
    found = [token for token in usual if token in special] or usual
    if not found:
        raise _no_eos(name, f"any of {', '.join(EOS_TOKENS)}")
    if len(found) > 1:
        raise errors.UsageError(
            f"{name}: {' and '.join(found)} may each be its end-of-text token, expected one. "
            "Name it with --eos_token=TOKEN."
        )
    return found[0]


def _no_eos(name: str, wanted: str) -> errors.UsageError:
    return errors.UsageError(
        f"{name}: its vocabulary has no end-of-text token, expected {wanted}. "
        "Name one of its tokens with --eos_token=TOKEN."
    )
