"""Every option of a run, written once: its type, its default, what it may be, since when.

A section is a frozen dataclass whose fields are options. `base()` makes the
`ml_collections.ConfigDict` of an arm from them, command-line overrides change that, and
`resolve()` checks all of it against them in one pass and returns a `Config`. Nothing else reads a
ConfigDict. Budgets are in tokens and become whole steps here.
"""

import dataclasses
import heapq
import math
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ml_collections

from qkjax import errors, presets

# Raised with every change after which the same config gives other bits of parameters or losses.
NUMERICS_VERSION = 1
# Deeper models keep their layer loop where model.unroll is 0.
_MOST_UNROLLED = 24
# Attention that one platform alone can run: cuDNN's, and the Pallas kernels of TPUs.
FUSED_ATTENTION = {"gpu": "cudnn", "tpu": "splash"}
# More steps than these are kept as the rule that makes them, not one by one.
_MOST_LISTED = 10_000
_INT32 = 2**31  # XLA indexes, and optimisers count steps, below it

# --------------------------------------------------------------------------------------------
# What a field says of itself.


class Bound(typing.NamedTuple):
    """What a value of the right type must fulfil."""

    wanted: str  # for people: "above 0"
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A bound: one of these names."""

    names: Collection[str]

    @property
    def wanted(self) -> str:
        """For people."""
        return "one of " + ", ".join(self.names)

    def holds(self, value: Any) -> bool:
        """Whether the value is one of the names."""
        return value in self.names


_FLOAT32 = 3.4028234663852886e38
ABOVE_0 = Bound("above 0", lambda value: value > 0)
SIZE = Bound("above 0 and below 2**31", lambda value: 0 < value < _INT32)
FROM_0 = Bound("0 or more", lambda value: value >= 0)
BELOW_1 = Bound("from 0 to below 1", lambda value: 0 <= value < 1)

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple[int, ...]: "a tuple of integers",
    float | None: "a number or nothing",
}


class Option(typing.NamedTuple):
    """What is set by the presets, a config file or an override."""

    kind: Any  # one of _KINDS
    default: Callable[[presets.Choice], Any]
    bound: Bound | OneOf | None

    def mistake(self, value: Any) -> str:
        """What the value must be instead; "" if it is right."""
        if not _is_kind(value, self.kind):
            return _KINDS[self.kind] + (f", {self.bound.wanted}" if self.bound else "")
        if isinstance(value, int | float) and abs(value) > _FLOAT32 and self.kind is not int:
            return f"at most {_FLOAT32:.3g}, the largest float32"
        if value is None or self.bound is None or self.bound.holds(value):
            return ""
        return self.bound.wanted


class Stored(typing.NamedTuple):
    """What config.json holds of a run."""

    kind: Any
    free: bool  # cannot change a result: a resumed run may have another
    fixed: bool  # no checkpoint resumes with another: its batches or arrays would differ
    since: str  # the date from which config.json has it; "" from the beginning
    absent: Any  # what runs from before that date were made with


def _is_kind(value: Any, kind: Any) -> bool:
    if kind == float | None:
        return value is None or _is_kind(value, float)
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and type(value) is not bool
    if kind == tuple[int, ...]:
        return isinstance(value, tuple | list) and all(_is_kind(item, int) for item in value)
    return isinstance(value, kind)


def option(
    default: Any,
    bound: Bound | OneOf | None = None,
    *,
    kind: Any = None,
    free: bool = False,
    fixed: bool = False,
    since: str = "",
    absent: Any = None,
) -> Any:
    """A field that can be set.

    Args:
        default: a value, or a function that makes it of what the words choose.
        kind: None takes the field's annotation.
        free, fixed, since, absent: as in `Stored`.
    """
    make = default if callable(default) else lambda chosen: default
    return dataclasses.field(
        metadata={
            "option": Option(kind, make, bound),
            "stored": Stored(kind, free, fixed, since, absent),
        }
    )


def derived(*, fixed: bool = False, since: str = "", absent: Any = None, **inputs: Any) -> Any:
    """A field that `resolve` makes.

    Args:
        fixed, since, absent: as in `Stored`.
        inputs: the options that it is made of, by name, where no resolved config keeps them.
    """
    return dataclasses.field(
        metadata={
            "made_of": {name: field.metadata["option"] for name, field in inputs.items()},
            "stored": Stored(None, False, fixed, since, absent),
        }
    )


def _shape(name: str) -> Callable[[presets.Choice], Any]:
    return lambda chosen: presets.SHAPES[chosen.scale][name]


def _budget(name: str) -> Callable[[presets.Choice], Any]:
    return lambda chosen: presets.BUDGETS[chosen.scale][name]


def _rule(name: str) -> Callable[[presets.Choice], Any]:
    return lambda chosen: chosen.rules[name]


@dataclasses.dataclass(frozen=True)
class RepeatedSteps:
    """Whole steps nearest below multiples of `every_tokens` and below `at_tokens`; 0 and the last.

    It serves as the ascending tuple of these steps, and holds none of them.
    """

    num_steps: int
    tokens_per_step: int
    at_tokens: tuple[int, ...]
    every_tokens: int  # 0 = at_tokens alone

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and (step in self._others() or self._is_repeated(step))

    def __iter__(self) -> Iterator[int]:
        last = -1
        for step in heapq.merge(sorted(self._others()), self._repeated()):
            if step != last:
                yield step
            last = step

    def __len__(self) -> int:
        others = sum(not self._is_repeated(step) for step in self._others())
        if not self.every_tokens:
            return others
        if self.every_tokens <= self.tokens_per_step:
            return others + self.num_steps - 1
        return others + (self.num_steps * self.tokens_per_step - 1) // self.every_tokens

    def _others(self) -> set[int]:
        at = {max(1, tokens // self.tokens_per_step) for tokens in self.at_tokens}
        return {0, self.num_steps} | {step for step in at if step < self.num_steps}

    def _repeated(self) -> Iterator[int]:
        if 0 < self.every_tokens <= self.tokens_per_step:  # every step holds a multiple
            yield from range(1, self.num_steps)
        elif self.every_tokens:
            end = self.num_steps * self.tokens_per_step
            for tokens in range(self.every_tokens, end, self.every_tokens):
                yield tokens // self.tokens_per_step

    def _is_repeated(self, step: int) -> bool:
        if not self.every_tokens or not 1 <= step < self.num_steps:
            return False
        end = (step + 1) * self.tokens_per_step
        last_multiple = (end - 1) // self.every_tokens * self.every_tokens
        return last_multiple >= max(self.every_tokens, step * self.tokens_per_step)


# --------------------------------------------------------------------------------------------
# The sections.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    # Dataset directory; "" = the embedded corpus (tiny and small only).
    dir: str = option("", free=True)
    # The recipe's documents end with an end-of-text token.
    end_of_text: bool = option(_rule("end_of_text"))
    # More passes over the training split than this are refused.
    max_epochs: int = option(4, ABOVE_0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder (docs/science.md section 2)."""

    num_layers: int = option(_shape("num_layers"), SIZE, fixed=True)
    d_model: int = option(_shape("d_model"), SIZE, fixed=True)
    num_heads: int = option(_shape("num_heads"), SIZE, fixed=True)
    num_kv_heads: int = option(_shape("num_kv_heads"), SIZE, fixed=True)
    head_dim: int = option(_shape("head_dim"), SIZE, fixed=True)
    vocab_size: int = option(_shape("vocab_size"), SIZE, fixed=True)
    sequence_length: int = option(_shape("sequence_length"), SIZE, fixed=True)
    # Gamma of "frozen" stays 1.
    qk_norm: str = option(
        lambda chosen: "frozen" if "frozen" in chosen.controls else chosen.qk_norm,
        OneOf(("none", "learned", "frozen")),
    )
    mlp: str = option(
        lambda chosen: presets.MLP[chosen.scale, chosen.recipe][0],
        OneOf(("swiglu", "relu2")),
        fixed=True,
    )
    d_ff: int = option(lambda chosen: presets.MLP[chosen.scale, chosen.recipe][1], SIZE, fixed=True)
    norm_eps: float = option(_rule("norm_eps"), ABOVE_0)
    rope_base: float = option(10_000.0, ABOVE_0)
    # Of the computation; parameters are always float32. "auto" is settled by the platform.
    dtype: str = option("auto", OneOf(("auto", "float32", "bfloat16")))
    # Layers per iteration of the layer loop; 0 is settled by the platform.
    unroll: int = option(0, FROM_0)
    # What the backward pass computes again: what is cheaper to compute than to store and read, or
    # the whole block, of which it keeps the input alone.
    remat: str = option("none", OneOf(("none", "block")), since="2026-11-29", absent="none")
    attention: str = option("auto", OneOf(("auto", "cudnn", "splash", "blocked", "xla")))

    def attention_on(self, platform: str) -> str:
        """What attention "auto" stands for on a platform of jax's devices; other names stay."""
        if self.attention != "auto":
            return self.attention
        if platform == "cpu":
            return "blocked"
        return FUSED_ATTENTION.get(platform, "xla") if self.dtype == "bfloat16" else "xla"

    def on(self, platform: str) -> "ModelConfig":
        """What the model computes with on this platform: attention and unroll are settled.

        Args:
            platform: of the devices: "cpu", "gpu" or "tpu"; "any": what runs on all of them.
                Dtypes are settled before, by `Config.for_platform`.
        """
        return dataclasses.replace(
            self, attention=self.attention_on(platform), unroll=self._unroll_on(platform)
        )

    def _unroll_on(self, platform: str) -> int:
        if self.unroll:
            return min(self.unroll, self.num_layers)
        # A GPU stacks and unstacks what a loop's layers keep for the backward pass: 16% of a step
        # of 22 layers (docs/performance.md). Deeper models would take minutes to compile.
        is_worth_it = platform == "gpu" and self.num_layers <= _MOST_UNROLLED
        return self.num_layers if is_worth_it else 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Rates and decays by group of parameters; betas and eps of AdamW; clips."""

    name: str = option(lambda chosen: chosen.optimizer, OneOf(presets.OPTIMIZERS), fixed=True)
    # Peak, of the matrices inside the blocks (of all parameters with AdamW).
    learning_rate: float = option(lambda chosen: chosen.rate, ABOVE_0)
    # Peak, of the auxiliary AdamW that updates the embedding and the gammas of a Muon arm.
    adam_learning_rate: float | None = option(lambda chosen: chosen.auxiliary_rate, ABOVE_0)
    # Of matrices inside the blocks.
    weight_decay: float = option(lambda chosen: chosen.decay, FROM_0)
    # Of the embedding and of every gamma but gamma_q and gamma_k.
    auxiliary_weight_decay: float = option(_rule("auxiliary_decay"), FROM_0)
    # Of gamma_q and gamma_k, towards gamma_decay_target.
    gamma_weight_decay: float = option(lambda chosen: chosen.gamma_force, FROM_0)
    # Sum over steps of rate x decay of gamma_q and gamma_k, from which resolve() derives their
    # rate; 0 = unused.
    gamma_decay_tau: float = option(lambda chosen: chosen.gamma_tau, FROM_0)
    gamma_decay_target: float = option(
        lambda chosen: 1.0 if "to_one" in chosen.controls else 0.0,
        Bound("0 or 1", lambda value: value in (0, 1)),
        since="2026-11-28",
        absent=0.0,
    )
    # Peak, of gamma_q and gamma_k; 0 = that of the AdamW that updates them.
    gamma_learning_rate: float = option(0.0, FROM_0, since="2026-11-28", absent=0.0)
    # Global gradient norm; 0 = no clipping.
    clip_norm: float = option(_rule("clip_norm"), FROM_0)
    # Largest logit of a head that QK-Clip leaves alone; 0 = no QK-Clip.
    qk_clip: float = option(
        lambda chosen: presets.CLIP_LOGIT[chosen.scale] if "clip" in chosen.controls else 0.0,
        FROM_0,
        since="2026-11-28",
        absent=0.0,
    )
    # The first sequences of a step's batch, in which QK-Clip looks for the largest logits.
    qk_clip_sequences: int = option(4, ABOVE_0, since="2026-11-28", absent=4)
    beta1: float = option(0.9, BELOW_1)
    beta2: float = option(_rule("beta2"), BELOW_1)
    eps: float = option(1e-8, ABOVE_0)
    # Of all steps, linear from 0.
    warmup_fraction: float = option(_rule("warmup_fraction"), BELOW_1)
    # Of all steps, linear to 0 at the end.
    decay_fraction: float = option(_rule("decay_fraction"), BELOW_1)

    @property
    def auxiliary_learning_rate(self) -> float:
        """Peak rate of the AdamW that updates the embedding and every other gamma."""
        return self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate

    @property
    def rate_of_gamma(self) -> float:
        """Peak rate of gamma_q and gamma_k."""
        return self.gamma_learning_rate or self.auxiliary_learning_rate


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon's own options; unused in other arms."""

    momentum: float = option(0.95, BELOW_1)
    nesterov: bool = option(True)
    coefficients: str = option("polar_express", OneOf(("polar_express", "quintic")))
    # Which matrices it makes of the attention kernels: one for each, one of all four, one per head
    # of query, key and value, or one of every group_heads neighbouring heads of these.
    granularity: str = option(
        lambda chosen: chosen.granularity, OneOf(("separate", "merged", "per_head", "groups_of"))
    )
    group_heads: int = option(1, ABOVE_0, since="2026-11-28", absent=1)
    scale: str = option("spectral", OneOf(("spectral", "rms", "mup")))
    # Arithmetic of the Newton-Schulz steps.
    dtype: str = option(_rule("newton_schulz_dtype"), OneOf(("auto", "float32", "bfloat16")))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, constant, linear decay: the factor that every peak rate is multiplied by.

    Warm-up and decay share no step in which both are below 1 (`resolve` ensures that).
    """

    num_steps: int = derived()
    warmup_steps: int = derived()
    decay_steps: int = derived()

    def factor(
        self, step: Any, minimum: Callable[..., Any] = min, maximum: Callable[..., Any] = max
    ) -> Any:
        """Factor of update `step`, counted from 0: in (0, 1], and 0 after the last.

        Args:
            step: an int, or a traced array with `jnp.minimum` and `jnp.maximum`.
        """
        factor = 1.0
        if self.warmup_steps:
            factor = minimum(factor, (step + 1) / self.warmup_steps)
        if self.decay_steps:
            factor = minimum(factor, maximum(self.num_steps - step, 0) / self.decay_steps)
        return factor

    def total(self) -> float:
        """Sum of the factors over all updates: learning rate x this = summed learning rate."""
        lost = (max(0, self.warmup_steps - 1) + max(0, self.decay_steps - 1)) / 2
        return self.num_steps - lost


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The budget of the run and how a step is cut."""

    # As asked; num_steps * tokens_per_step are trained.
    tokens: int = option(lambda chosen: presets.TOKENS[chosen.scale, chosen.recipe][0], ABOVE_0)
    tokens_per_step: int = option(
        lambda chosen: presets.TOKENS[chosen.scale, chosen.recipe][1], SIZE, fixed=True
    )
    num_steps: int = derived()
    sequences_per_step: int = derived(fixed=True)
    # Most sequences that a device takes in one pass; 0 = its whole share.
    microbatch_sequences: int = option(8, FROM_0)
    # Positions whose logits exist at one time.
    loss_chunk_tokens: int = option(2_048, SIZE)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on what the frozen validation split is measured."""

    # After this many updates; always 0 and the last.
    steps: Collection[int] = derived(
        at_tokens=option(
            _budget("at_tokens"),
            Bound("token counts above 0", lambda value: all(t > 0 for t in value)),
            kind=tuple[int, ...],
        ),
        every_tokens=option(_budget("every_tokens"), FROM_0, kind=int),
    )
    # The first N of the split at every evaluation; 0 = all.
    tokens: int = option(_budget("eval_tokens"), FROM_0)
    # Of one more pass after the last step.
    final_tokens: int = option(
        _budget("final_tokens"), Bound("-1 (no pass), 0 (all) or more", lambda value: value >= -1)
    )
    # Sequences that a device takes at one time.
    batch_sequences: int = option(8, SIZE)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    # After this many updates; always 0 and the last.
    steps: Collection[int] = derived(
        every_tokens=option(_budget("checkpoint_tokens"), ABOVE_0, kind=int)
    )
    # Instead of step 0 and the latest two.
    keep_all: bool = option(False, free=True)


@dataclasses.dataclass(frozen=True)
class DeterminismConfig:
    """Promises of equal bits that cost time."""

    # On GPUs: operations with one order of sums only. Without effect on other platforms.
    gpu: bool = option(True, fixed=True, since="2026-11-28", absent=True)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which updates are traced for TensorBoard and Perfetto."""

    steps: tuple[int, ...] = option(
        (),
        Bound(
            "() or (first, last), counted from 1",
            lambda value: not value or (len(value) == 2 and 1 <= value[0] <= value[1]),
        ),
        free=True,
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What the terminal shows."""

    # Between progress lines.
    every_seconds: float = option(10.0, FROM_0, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run, checked and complete."""

    arm: str = derived()
    scale: str = option(lambda chosen: chosen.scale, OneOf(presets.SCALES))
    recipe: str = option(lambda chosen: chosen.recipe, OneOf(presets.RECIPES))
    # What the devices divide: data alone; state and Newton-Schulz too, gathered once a step (zero1)
    # or layer by layer (fsdp).
    mesh: str = option("data", OneOf(("data", "zero1", "fsdp")), since="2026-11-29", absent="data")
    seed: int = option(
        42, Bound("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32), fixed=True
    )
    numerics_version: int = derived(since="2026-11-28", absent=1)
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    muon: MuonConfig
    schedule: Schedule
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    determinism: DeterminismConfig
    profile: ProfileConfig
    log: LogConfig

    def for_platform(self, platform: str) -> "Config":
        """Replaces every dtype "auto" and unroll 0, which run directories record.

        Dtypes become float32 on "cpu", bfloat16 on accelerators. Attention "auto" stays: a run may
        be opened on another machine.
        """
        auto = "float32" if platform == "cpu" else "bfloat16"
        model, muon = self.model, self.muon
        model = dataclasses.replace(model, unroll=model.on(platform).unroll)
        if model.dtype == "auto":
            model = dataclasses.replace(model, dtype=auto)
        if muon.dtype == "auto":
            muon = dataclasses.replace(muon, dtype=auto)
        return dataclasses.replace(self, model=model, muon=muon)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as config.json holds them."""
        return dataclasses.asdict(self)

    def fingerprinted(self) -> dict[str, Any]:
        """What a study's fingerprints hash, by dotted name: everything that can change a result.

        The form is that of the first version: a field that has the value of the runs from before
        it existed is left out, and a recipe has its first name.
        """
        values = _flat(self.to_dict())
        kept = {
            name: values[name]
            for name, field in FIELDS.items()
            if not field.free and not (field.since and values[name] == field.absent)
        }
        unroll = self.model.unroll or 1  # what stood for the platform's own before 0 did
        former = {"recipe": presets.former_recipe(self.recipe), "model.unroll": unroll}
        return {**kept, **former}


@dataclasses.dataclass(frozen=True)
class GammaExposure:
    """How a run treats gamma_q and gamma_k, and what its decay can do to them."""

    learning_rate: float  # peak
    weight_decay: float  # the force W
    target: float  # that the decay pulls to
    summed_rate: float  # over the run
    tau: float  # summed rate x decay: where no gradient holds gamma, the distance shrinks by e^-tau
    largest: float  # 1/W: Adam's normalised update holds gamma no further from its target
    largest_logit: float  # sqrt(head_dim)/W^2: of two gammas of that size
    noise: float  # sqrt(rate / 2W): the standard deviation that updates of random sign give gamma


def gamma_exposure(config: Config) -> GammaExposure | None:
    """The exposure of learned gammas; None without them. Without decay its limits are infinite."""
    if config.model.qk_norm != "learned":
        return None
    optimizer = config.optimizer
    rate, force = optimizer.rate_of_gamma, optimizer.gamma_weight_decay
    summed = rate * config.schedule.total()
    return GammaExposure(
        learning_rate=rate,
        weight_decay=force,
        target=optimizer.gamma_decay_target,
        summed_rate=summed,
        tau=summed * force,
        largest=1 / force if force else math.inf,
        largest_logit=math.sqrt(config.model.head_dim) / force**2 if force else math.inf,
        noise=math.sqrt(rate / (2 * force)) if force else math.inf,
    )


# --------------------------------------------------------------------------------------------
# The fields of all sections, by dotted name.


def _fields(section: type, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Name, type and metadata of every field of a section and of the sections inside it."""
    kinds = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind, field.metadata


def _options() -> Iterator[tuple[str, Option]]:
    for name, kind, metadata in _fields(Config):
        if "option" in metadata:
            yield name, metadata["option"]._replace(kind=kind)
        section = name.rpartition(".")[0]
        for inner, made_of in metadata.get("made_of", {}).items():
            yield f"{section}.{inner}", made_of


# Everything that can be set, and everything that config.json holds.
OPTIONS: dict[str, Option] = dict(_options())
FIELDS: dict[str, Stored] = {
    name: metadata["stored"]._replace(kind=kind) for name, kind, metadata in _fields(Config)
}
# A resumed run may have others of these, and never others of those.
FREE_FIELDS = tuple(name for name, field in FIELDS.items() if field.free)
FIXED_FIELDS = tuple(name for name, field in FIELDS.items() if field.fixed)
_SECTIONS = frozenset(name.partition(".")[0] for name in OPTIONS if "." in name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; a value where a section should be stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not prefix and name in (*_SECTIONS, "schedule"):
            flat |= _flat(value, f"{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _build(section: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    """A section of the values by dotted name, which are all there and right."""
    kinds = typing.get_type_hints(section)
    values = {}
    for field in dataclasses.fields(section):
        name, kind = f"{prefix}{field.name}", kinds[field.name]
        if dataclasses.is_dataclass(kind):
            values[field.name] = _build(typing.cast(type, kind), flat, f"{name}.")
        else:
            values[field.name] = _as_kind(flat[name], kind)
    return section(**values)


def _as_kind(value: Any, kind: Any) -> Any:
    if value is not None and kind in (float, float | None):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def is_left_to_platform(name: str, value: Any) -> bool:
    """Whether a field's value is one that `Config.for_platform` replaces, or the model's `on`."""
    return value == "auto" or (name == "model.unroll" and value == 0)


# --------------------------------------------------------------------------------------------
# Stored configs.


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config as the present version writes it; nothing is checked.

    Fields that it is too old to have get the value that such runs were made with, its recipe and
    its arm get their present names.
    """
    values = presets.with_present_recipe(values)
    for name, field in FIELDS.items():
        *section, leaf = name.split(".")
        inside = values.get(section[0], {}) if section else values
        if field.since and isinstance(inside, dict) and leaf not in inside:
            filled = {**inside, leaf: field.absent}
            values = {**values, section[0]: filled} if section else filled
    return _with_present_arm(values)


def _with_present_arm(values: dict[str, Any]) -> dict[str, Any]:
    """Names the control `decayed` of before `_decayed_1`: its decay was stronger, not its rate."""
    arm, optimizer = values.get("arm"), values.get("optimizer")
    if not isinstance(arm, str) or not isinstance(optimizer, Mapping):
        return values
    if optimizer.get("gamma_decay_tau") and not optimizer.get("gamma_learning_rate"):
        values = {**values, "arm": re.sub(r"_decayed(?!_1)", "_decayed_1", arm)}
    return values


def from_dict(values: Mapping[str, Any], where: str = "config") -> Config:
    """The inverse of `Config.to_dict`, for config.json of a run directory.

    Args:
        where: the file, for the message.
    Raises:
        UsageError: lists every field that is missing, unknown or wrong.
    """
    flat = _flat(upgraded(values))
    found = []
    for name, field in FIELDS.items():
        if name not in flat:
            found.append(f"{name} is missing")
        elif wanted := _mistake_of_stored(name, flat[name], field.kind):
            found.append(f"{name} is {flat[name]!r}, it must be {wanted}")
    found += [f"{name}: no such field" for name in flat if name not in FIELDS]
    if found:
        raise errors.UsageError(
            f"{where}: {'; '.join(found)}. Restore the file from a copy, or use the version of "
            "qkjax that wrote it."
        )
    for name in ("eval.steps", "checkpoint.steps"):
        if isinstance(flat[name], Mapping):
            rule = flat[name]
            flat[name] = RepeatedSteps(**{**rule, "at_tokens": tuple(rule["at_tokens"])})
    return typing.cast(Config, _build(Config, flat))


def _mistake_of_stored(name: str, value: Any, kind: Any) -> str:
    if name in OPTIONS:
        return OPTIONS[name].mistake(value)
    if kind in _KINDS:
        return "" if _is_kind(value, kind) else _KINDS[kind]
    if isinstance(value, Mapping):
        rule = typing.get_type_hints(RepeatedSteps)
        if rule.keys() == value.keys() and all(_is_kind(value[n], rule[n]) for n in rule):
            return ""
    elif _is_kind(value, tuple[int, ...]) and list(value) == sorted(set(value)):
        return ""
    return "ascending steps"


# --------------------------------------------------------------------------------------------
# From an arm's words to a checked config.


def base(optimizer: str, qk_norm: str, words: str = "") -> ml_collections.ConfigDict:
    """The config of one arm: optimizer of `presets.OPTIMIZERS`, qk_norm "none" or "learned".

    Args:
        words: what stands after the config's colon, separated by commas in any order: at most one
            of `presets.SCALES`, one of `presets.RECIPES`, and any of `presets.CONTROLS`.
    Raises:
        UsageError: an unknown word, two words that exclude each other, or one without effect.
    """
    chosen = presets.parse_words(words, optimizer, qk_norm)
    config = ml_collections.ConfigDict()
    for name, given in OPTIONS.items():
        section, _, leaf = name.rpartition(".")
        if section and section not in config:
            config[section] = ml_collections.ConfigDict()
        value = given.default(chosen)
        if value is None:
            value = ml_collections.config_dict.placeholder(float)
        (config[section] if section else config)[leaf] = value
    return config


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Checks every field and derives steps, the rate of gamma and the arm's name.

    Raises:
        UsageError: lists every field that is wrong, with its value and what it may be.
    """
    values = _flat(config.to_dict())
    if found := _mistakes(values) + _contradictions(values):
        raise errors.UsageError("config: " + "; ".join(found))
    tokens_per_step = values["train.tokens_per_step"]
    num_steps = max(1, values["train.tokens"] // tokens_per_step)
    schedule = Schedule(
        num_steps=num_steps,
        warmup_steps=math.ceil(values["optimizer.warmup_fraction"] * num_steps),
        decay_steps=math.ceil(values["optimizer.decay_fraction"] * num_steps),
    )
    values |= {
        "optimizer.gamma_learning_rate": _rate_of_gamma(values, schedule),
        "arm": _arm_name(values),
        "numerics_version": NUMERICS_VERSION,
        **{f"schedule.{name}": value for name, value in dataclasses.asdict(schedule).items()},
        "train.num_steps": num_steps,
        "train.sequences_per_step": tokens_per_step // values["model.sequence_length"],
        "eval.steps": _steps(
            num_steps, tokens_per_step, values["eval.at_tokens"], values["eval.every_tokens"]
        ),
        "checkpoint.steps": _steps(
            num_steps, tokens_per_step, (), values["checkpoint.every_tokens"]
        ),
    }
    resolved: Config = _build(Config, values)
    exposure = gamma_exposure(resolved)
    if exposure is not None and exposure.learning_rate * exposure.weight_decay >= 1:
        step = exposure.learning_rate * exposure.weight_decay
        raise errors.UsageError(
            f"config: optimizer.gamma_weight_decay: learning rate x decay is {step:.3g} at its "
            "peak, and at 1 or more a step would move gamma past the target of its decay (decay "
            f"{exposure.weight_decay:.4g}, rate {exposure.learning_rate:.4g}, {num_steps} steps). "
            "Train longer, or lower optimizer.gamma_decay_tau."
        )
    return resolved


def _steps(
    num_steps: int, tokens_per_step: int, at: Collection[int], every: int
) -> Collection[int]:
    rule = RepeatedSteps(num_steps, tokens_per_step, tuple(at), every)
    return tuple(rule) if len(rule) <= _MOST_LISTED else rule


def _rate_of_gamma(values: Mapping[str, Any], schedule: Schedule) -> float:
    """Gamma's own rate: as asked, or so that its sum x the force is tau; 0 where it has none."""
    tau = values["optimizer.gamma_decay_tau"]
    if not tau:
        return float(values["optimizer.gamma_learning_rate"])
    # The control `undecayed` has the rate of the decayed one, and no force of its own.
    force = values["optimizer.gamma_weight_decay"] or presets.PILOT_FORCE
    return tau / (force * schedule.total())


def _arm_name(values: Mapping[str, Any]) -> str:
    """The config file's name with its controls, derived from what is trained."""
    optimizer, qk_norm = values["optimizer.name"], values["model.qk_norm"]
    name = f"{optimizer}_{'noqk' if qk_norm == 'none' else 'qk'}"
    rules = presets.RECIPE_RULES[values["recipe"]]
    decay = values["optimizer.gamma_weight_decay"]
    if qk_norm == "frozen":
        name += "_frozen"
    elif values["optimizer.gamma_decay_target"] == 1:
        name += "_to_one"
    elif values["optimizer.gamma_decay_tau"]:
        name += "_decayed" if decay else "_undecayed"
    elif qk_norm == "learned" and rules["gamma_decay"] and not decay:
        name += "_undecayed"
    if values["optimizer.qk_clip"]:
        name += "_clip"
    granularity = values["muon.granularity"]
    if optimizer == "muon" and granularity != rules["granularity"]:
        name += f"_{granularity}"
        if granularity == "groups_of":
            name += f"_{values['muon.group_heads']}"
    # "rms" is not in the name: runs from before "mup" have it under the arm's plain name.
    if optimizer == "muon" and values["muon.scale"] == "mup":
        name += "_mup"
    return name


# --------------------------------------------------------------------------------------------
# Checks.


def _mistakes(values: Mapping[str, Any]) -> list[str]:
    """Fields that are missing, unknown, or wrong by themselves."""
    found = []
    for name, given in OPTIONS.items():
        section = name.partition(".")[0]
        if section in values and section in _SECTIONS:
            continue  # something else is in the section's place, which is reported below
        if name not in values:
            found.append(f"{name} is missing, it must be {given.mistake(Ellipsis)}")
        elif wanted := given.mistake(values[name]):
            found.append(f"{name} is {values[name]!r}, it must be {wanted}")
    for name in values:
        if name in _SECTIONS:
            found.append(f"{name} is {values[name]!r}, it must be a section of fields")
        elif name not in OPTIONS:
            found.append(f"{name}: no such field.{presets.suggest(name, tuple(OPTIONS))}")
    return found


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Fields that are right by themselves and do not fit together.

    A rule that needs a field which is missing or wrong says nothing, nor do those of its function
    that follow.
    """
    right = {n: values[n] for n in OPTIONS if n in values and not OPTIONS[n].mistake(values[n])}
    found = []
    for rules in (_shape_rules, _step_rules, _rate_rules, _clip_rules, _muon_rules, _gamma_rules):
        try:
            for holds, field, wanted in rules(right):
                if not holds:
                    found.append(f"{field} is {right[field]!r}, it must be {wanted}")
        except KeyError as error:
            if error.args[0] not in OPTIONS:
                raise
    return found


_Rule = tuple[bool, str, str]  # whether it holds; the field; what it must be


def _shape_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    yield values["model.head_dim"] % 2 == 0, "model.head_dim", "even, for RoPE"
    kv_heads = values["model.num_kv_heads"]
    yield (
        values["model.num_heads"] % kv_heads == 0,
        "model.num_heads",
        f"a multiple of model.num_kv_heads = {kv_heads}",
    )


def _step_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    yield (
        values["train.tokens"] // values["train.tokens_per_step"] < _INT32,
        "train.tokens",
        f"less than 2**31 steps of train.tokens_per_step = {values['train.tokens_per_step']}",
    )
    decay = values["optimizer.decay_fraction"]
    yield (
        values["optimizer.warmup_fraction"] + decay <= 1,
        "optimizer.warmup_fraction",
        f"at most 1 - optimizer.decay_fraction = {1 - decay:g}",
    )
    length = values["model.sequence_length"]
    yield (
        values["train.tokens_per_step"] % length == 0,
        "train.tokens_per_step",
        f"a multiple of model.sequence_length = {length}",
    )


def _rate_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    name, rate = values["optimizer.name"], values["optimizer.adam_learning_rate"]
    if presets.OPTIMIZERS[name].auxiliary_rate is None:
        yield (
            rate is None,
            "optimizer.adam_learning_rate",
            f"left at its default: an arm of {name} has one rate, optimizer.learning_rate",
        )
    else:
        yield (
            rate is not None,
            "optimizer.adam_learning_rate",
            f"above 0: it updates the embedding and the gammas of an arm of {name}",
        )


def _clip_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    yield (
        not values["optimizer.qk_clip"] or values["model.qk_norm"] == "none",
        "optimizer.qk_clip",
        f"0 with model.qk_norm={values['model.qk_norm']}, which undoes its effect on queries",
    )


def _muon_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    if values["optimizer.name"] != "muon":
        return
    heads, kv_heads = values["model.num_heads"], values["model.num_kv_heads"]
    granularity, group = values["muon.granularity"], values["muon.group_heads"]
    yield (
        granularity != "merged" or heads * values["model.head_dim"] == values["model.d_model"],
        "muon.granularity",
        "separate or per_head unless num_heads * head_dim == d_model (the output kernel has as "
        "many rows as the others)",
    )
    yield (
        granularity not in ("per_head", "groups_of") or heads > group,
        "muon.granularity",
        f"separate, which is the same if all {heads} heads are one group",
    )
    if granularity == "groups_of":
        yield kv_heads % group == 0, "muon.group_heads", f"a divisor of num_kv_heads = {kv_heads}"
        yield group > 1, "muon.group_heads", "2 or more: groups of one head are per_head"
    else:
        yield group == 1, "muon.group_heads", "1 unless muon.granularity=groups_of"


def _gamma_rules(values: Mapping[str, Any]) -> Iterator[_Rule]:
    fields = ("gamma_weight_decay", "gamma_decay_tau", "gamma_learning_rate", "gamma_decay_target")
    if values["model.qk_norm"] != "learned":
        for field in fields:
            yield (
                values[f"optimizer.{field}"] == 0,
                f"optimizer.{field}",
                f"0 with model.qk_norm={values['model.qk_norm']}: no learned gamma to update",
            )
        return
    tau = values["optimizer.gamma_decay_tau"]
    yield (
        not tau or values["optimizer.gamma_learning_rate"] == 0,
        "optimizer.gamma_learning_rate",
        f"0 with optimizer.gamma_decay_tau = {tau:g}, which sets it",
    )
    yield (
        values["optimizer.gamma_decay_target"] == 0 or values["optimizer.gamma_weight_decay"] > 0,
        "optimizer.gamma_decay_target",
        "0 without optimizer.gamma_weight_decay, which pulls gamma to this target",
    )
