"""What can be measured: subjects, their variants, and the shapes of the model.

A variant is named as `module:class` of this package; the worker process that measures it imports
that module alone, so that no variant pays for another's libraries.
"""

import dataclasses
from typing import Any

from qkjax import config as config_lib
from qkjax import errors
from qkjax.config import Config


@dataclasses.dataclass(frozen=True)
class Subject:
    """Variants that do the same work, and the one that the others are compared with."""

    unit: str  # what one repetition is
    variants: dict[str, str]  # name -> class
    defaults: dict[str, tuple[str, ...]]  # platform -> variants measured unless others are named
    reference: str  # the denominator of the ratios
    net: tuple[str, str] | None = None  # a variant, and the one that is its start alone
    warm_up: bool = True  # a repetition before the first that counts; else blocks of one


PLATFORMS = ("cpu", "gpu")
SUBJECTS = {
    "step": Subject(
        "step",
        {
            "jax": "jax_work:Step",
            "torch": "torch_work:Step",
            "torch_compile": "torch_work:CompiledStep",
            "torch_best": "torch_work:BestStep",
        },
        {"cpu": ("jax", "torch"), "gpu": ("jax", "torch", "torch_compile", "torch_best")},
        "torch",
    ),
    # Whole steps of a Muon arm: the ratio to AdamW's less 1 is what Muon costs.
    "optimizer": Subject(
        "step",
        {
            "adamw": "jax_work:AdamWStep",
            "muon": "jax_work:Step",
            "optax_muon": "jax_work:OptaxMuonStep",
        },
        dict.fromkeys(PLATFORMS, ("adamw", "muon", "optax_muon")),
        "adamw",
    ),
    "attention": Subject(
        "layer, forward and backward",
        {
            "xla": "jax_work:XlaAttention",
            "blocked": "jax_work:BlockedAttention",
            "cudnn": "jax_work:CudnnAttention",
            "torch": "torch_work:Attention",
            "torch_cudnn": "torch_work:CudnnAttention",
        },
        {
            "cpu": ("blocked", "xla", "torch"),
            "gpu": ("cudnn", "xla", "torch", "torch_cudnn"),
        },
        "torch",
    ),
    "loss": Subject(
        "batch, forward and backward",
        {
            "chunked": "jax_work:ChunkedLoss",
            "plain": "jax_work:PlainLoss",
            "torch": "torch_work:Loss",
        },
        dict.fromkeys(PLATFORMS, ("chunked", "plain", "torch")),
        "torch",
    ),
    "eval": Subject(
        "batch",
        {"loss": "jax_work:LossEvaluation", "all": "jax_work:FullEvaluation"},
        dict.fromkeys(PLATFORMS, ("loss", "all")),
        "loss",
    ),
    # What a run adds to its steps: reading, evaluations with all measures, checkpoints, writing.
    "run": Subject(
        "evaluation interval",
        {"steps": "run_work:Steps", "start": "run_work:Start", "run": "run_work:Run"},
        dict.fromkeys(PLATFORMS, ("steps", "start", "run")),
        "steps",
        net=("run", "start"),
        warm_up=False,
    ),
}
SHAPES = ("tiny", "small", "full")
ARMS = tuple(f"{optimizer}_{qk}" for optimizer in ("adamw", "muon") for qk in ("qk", "noqk"))
# Between tiny and full, for CPUs: heads and T of a real size, a step of two seconds.
_SMALL = {
    "num_layers": 6,
    "d_model": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "d_ff": 704,
    "sequence_length": 512,
}
# Sequences of a step unless given: the study's 65,536 tokens take too long on a CPU.
_SEQUENCES = {"tiny": 8, "small": 8, "full": 1}
_GPU_SEQUENCES = {"tiny": 8, "small": 8, "full": 32}


def subject(name: str) -> Subject:
    if name not in SUBJECTS:
        raise errors.UsageError(
            f"{name}: unknown benchmark. Known are: {', '.join(SUBJECTS)}. See --help."
        )
    return SUBJECTS[name]


def choose_variants(name: str, platform: str, named: list[str]) -> list[str]:
    """The variants to measure, the named ones or the platform's usual ones.

    Raises:
        UsageError: a variant that the subject does not have.
    """
    known = subject(name)
    for variant in named:
        if variant not in known.variants:
            raise errors.UsageError(
                f"--variants: {variant!r} is no variant of {name}. "
                f"Known: {', '.join(known.variants)}."
            )
    return list(dict.fromkeys(named)) or list(known.defaults[platform])


def make_config(
    shape: str, arm: str, platform: str, sequences: int | None, data_dir: str = ""
) -> Config:
    """The arm's config at a shape, at a constant learning rate, so that peers need no schedule.

    Args:
        data_dir: a prepared dataset, of which `run` alone reads; "" is the embedded one at tiny.
    """
    optimizer, _, qk = arm.partition("_")
    words = "full" if shape == "full" else "tiny"
    values = config_lib.base(optimizer, "learned" if qk == "qk" else "none", words)
    if shape == "small":
        values.model.update(_SMALL)
    default = (_GPU_SEQUENCES if platform == "gpu" else _SEQUENCES)[shape]
    values.train.tokens_per_step = (sequences or default) * values.model.sequence_length
    values.train.microbatch_sequences = 0
    values.data.dir = data_dir
    values.optimizer.warmup_fraction = values.optimizer.decay_fraction = 0.0
    return config_lib.resolve(values).for_platform(platform)


def work_class(name: str, variant: str) -> tuple[str, str]:
    """Module and class of a variant's work."""
    module, _, cls = subject(name).variants[variant].partition(":")
    return f"{__package__}.{module}", cls


def describe(config: Config) -> dict[str, Any]:
    """What a table says of the model it was measured on."""
    m = config.model
    return {
        "arm": config.arm,
        "layers": m.num_layers,
        "d_model": m.d_model,
        "heads": m.num_heads,
        "kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "d_ff": m.d_ff,
        "vocab_size": m.vocab_size,
        "sequence_length": m.sequence_length,
        "sequences": config.train.sequences_per_step,
        "dtype": m.dtype,
    }
