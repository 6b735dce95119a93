"""Decoders and tokenizers of transformers: from a directory, the hub, or a GGUF file."""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

from qkjax import errors
from qkjax.export import verify

_STEP = re.compile(r"step[-_]?(\d+)", re.IGNORECASE)
_TOKENS = re.compile(r"tokens?[-_]?(\d+(?:\.\d+)?)([MBT])", re.IGNORECASE)
_SIZES = {"M": 10**6, "B": 10**9, "T": 10**12}
DTYPES = ("float32", "own")


@dataclasses.dataclass(frozen=True)
class Source:
    """The place of a model."""

    name: str  # as the user wrote it: a directory, FILE.gguf or a name on the hub
    tokenizer: str = ""  # another place for the tokenizer; "" is the model's

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one file of llama.cpp."""
        return self.name.endswith(".gguf")

    def arguments(self, revision: str) -> tuple[str, dict[str, Any]]:
        """What `from_pretrained` takes.

        Raises:
            UsageError: the file or folder is missing, or a file has no revisions.
        """
        path = pathlib.Path(self.name)
        if self.is_gguf:
            if revision:
                raise errors.UsageError(
                    f"--revision: {revision}, and {path.name} is one model. Leave it out."
                )
            if not path.is_file():
                raise errors.UsageError(f"--model: {path} is no file. Give a GGUF file.")
            return str(path.parent.absolute()), {"gguf_file": path.name}
        if not path.is_dir():
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name):
                raise errors.UsageError(
                    f"--model: {self.name} is no directory, no GGUF file and no name of the hub. "
                    "Give one of these."
                )
            return self.name, {"revision": revision} if revision else {}
        folder = path / revision
        if not (folder / "config.json").is_file():
            raise errors.UsageError(
                f"{folder}: no config.json in it, expected a model of transformers. Give its "
                "directory; --revision names folders inside it."
            )
        return str(folder), {"local_files_only": True}


def require_packages(source: Source | None = None) -> None:
    """Checks that torch and transformers are installed, and gguf for a GGUF file.

    Raises:
        UsageError: one is not; names the command that installs it.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        if source is not None and source.is_gguf:
            import gguf  # noqa: F401
    except ImportError as error:
        extra = "gguf" if error.name == "gguf" else "export"
        raise errors.UsageError(
            f"--model: {error.name} is not installed. Run pip install -e '.[{extra}]'."
        ) from None


def load_model(source: Source, revision: str, dtype: str) -> Any:
    """A decoder, in evaluation mode, on the first GPU where torch has one.

    Args:
        revision: of the hub, or a folder inside the directory; "" is the model itself.
        dtype: of DTYPES; "own" is what its file says.
    Raises:
        UsageError: a package is missing, or it does not load as a causal language model.
    """
    require_packages(source)
    import torch
    import transformers

    path, options = source.arguments(revision)
    with verify.quiet(transformers):
        if not source.is_gguf:
            _refuse_other_kinds(path, options)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32 if dtype == "float32" else "auto", **options
            )
        except Exception as error:  # any error means that it does not load
            raise errors.UsageError(
                f"{source.name}: does not load as a causal language model "
                f"({errors.one_line(error)}). Give a decoder of transformers."
            ) from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _refuse_other_kinds(path: str, options: dict[str, Any]) -> None:
    """Encoders load as causal models too, with a head of random numbers."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # any error means that it does not load
        raise errors.UsageError(
            f"{path}: its config does not load ({errors.one_line(error)}). "
            "Check the name, the network and the transformers version."
        ) from error
    found = (config.architectures or ["a config without architectures"])[0]
    is_encoder = re.search(r"ForMaskedLM|ForPreTraining|Encoder|BertModel|RobertaModel", found)
    if is_encoder or config.is_encoder_decoder:
        raise errors.UsageError(
            f"{path}: {found} has an encoder, expected a decoder alone. "
            "Give a causal language model."
        )


def load_tokenizer(source: Source, revision: str) -> Any:
    """The model's tokenizer, or the one that was named instead.

    Raises:
        UsageError: there is none, or it does not load.
    """
    import transformers

    place, options = source.tokenizer, dict[str, Any]()
    if not place:
        place, options = source.arguments(revision)
        parent = pathlib.Path(source.name)
        if parent.is_dir() and not any(pathlib.Path(place).glob("*token*")):
            place = str(parent)  # one for all revisions
    is_local = pathlib.Path(place).is_dir()
    if is_local and "gguf_file" not in options and not any(pathlib.Path(place).glob("*token*")):
        raise errors.UsageError(
            f"{place}: no tokenizer in it, expected a tokenizer.json. Give --tokenizer=DIR."
        )
    with verify.quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:  # any error means that it does not load
            raise errors.UsageError(
                f"{place}: its tokenizer does not load ({errors.one_line(error)}). "
                "Give --tokenizer=DIR."
            ) from error


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text; None where it puts none."""
    first = tokenizer("a")["input_ids"][0]
    return int(first) if first == tokenizer.bos_token_id else None


def step_of(revision: str) -> int | None:
    """The number of updates that a revision's name tells, as in "stage1-step1000-tokens5B"."""
    match = _STEP.search(revision)
    return int(match[1]) if match else None


def tokens_of(revision: str) -> int | None:
    """The training tokens that a revision's name tells."""
    match = _TOKENS.search(revision)
    return round(float(match[1]) * _SIZES[match[2].upper()]) if match else None


def params_sha256(model: Any) -> str:
    """sha256 over the parameters: name, dtype, shape and little-endian bytes, sorted by name."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        dtype, shape = str(parameter.dtype).removeprefix("torch."), list(parameter.shape)
        digest.update(json.dumps([name, dtype, shape]).encode())
        flat = parameter.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
