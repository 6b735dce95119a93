"""An exported directory as lm-eval's own Hugging Face model: the path that anyone can repeat."""

import logging
import pathlib
from typing import Any

from qkjax import errors, files
from qkjax.export import hf

_GPU_BATCH = 16  # requests; their logits take 200 kB a token and 49,152 ids


class StockModel:
    """lm-eval's model of a directory, in float32, and what went through it.

    Attributes:
        lm: the `lm_eval.models.huggingface.HFLM`.
        record: qkjax.json of the directory; {} for one that is not of this project.
        tokens_computed: positions that the decoder computed so far, with padding.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Loads it, on the first GPU where torch has one.

        Raises:
            UsageError: a package or file is missing, the tokenizer is not the model's, or a
                parameter is not finite.
        """
        self.record = _read_record(directory)
        huggingface, torch = require_packages()
        has_gpu = torch.cuda.is_available()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # truncations are counted, not listed
        try:
            self.lm: Any = huggingface.HFLM(
                pretrained=str(directory),
                device="cuda" if has_gpu else "cpu",
                dtype="float32",
                batch_size=_GPU_BATCH if has_gpu else 1,
                add_bos_token=self.record.get("end_of_text"),
            )
        except Exception as error:  # any error means that the directory does not load
            raise errors.UsageError(
                f"{directory}: does not load ({errors.one_line(error)}). "
                "Give a directory of `qkjax export`."
            ) from error
        self._check(directory)
        self.tokens_computed = 0
        self.lm.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.tokens_computed += ids.numel()

    @property
    def adds_bos(self) -> bool:
        """Whether texts start with the token that starts documents."""
        return self.lm.tok_encode("a")[0] == self.lm.tokenizer.bos_token_id

    def _check(self, directory: pathlib.Path) -> None:
        # The ids may have holes, so the largest one counts, and not how many there are.
        found = max(self.lm.tokenizer.get_vocab().values()) + 1
        expected = self.lm.config.vocab_size
        if found > expected or (self.record and found != expected):  # others pad their vocabulary
            raise errors.UsageError(
                f"{directory}: its tokenizer has {found} tokens, and its model {expected}. "
                "Export the run again."
            )
        if self.record and self.adds_bos != self.record["end_of_text"]:
            raise errors.UsageError(
                f"{directory}: the tokenizer of this transformers does not start texts as the "
                "model's documents start. Run pip install -e '.[eval]' for transformers 5."
            )
        for name, parameter in self.lm.model.named_parameters():
            if not parameter.isfinite().all():
                raise errors.UsageError(
                    f"{directory}: {name} has values that are not finite. "
                    "Export an earlier --step of the run."
                )


def _read_record(directory: pathlib.Path) -> dict[str, Any]:
    """The record of an export of ours; {} of a model from elsewhere."""
    if not (directory / hf.CONFIG_FILE).is_file():
        raise errors.UsageError(
            f"{directory}: not a model directory, expected {hf.CONFIG_FILE} in it. "
            "Give a directory of `qkjax export` as --model."
        )
    path = directory / hf.RECORD_FILE
    fix = "Export the run again."
    record = files.read_object(path, fix)
    if record is not None:
        files.need(path, "", record, {"end_of_text": bool}, fix)
    return record or {}


def require_packages() -> tuple[Any, Any]:
    """lm_eval.models.huggingface and torch.

    Raises:
        UsageError: one is not installed; names the command that installs it.
    """
    try:
        import torch
        from lm_eval.models import huggingface

        return huggingface, torch
    except ImportError as error:
        raise errors.UsageError(
            f"--backend=hf: {error.name} is not installed. Run pip install -e '.[eval]', or give "
            "--workdir with --backend=jax, which needs no torch."
        ) from None
