"""Every option of a run, with its type and default, and the one place that checks them.

A config file calls `base()`, which returns an `ml_collections.ConfigDict`; command-line overrides
change that; `resolve()` checks all of it in one pass and returns frozen dataclasses. Nothing else
reads a ConfigDict. Budgets are in tokens and become whole steps here.
"""

import dataclasses
import math
from typing import Any

import ml_collections

from qkjax import errors, presets


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    dir: str  # dataset directory; "" = the embedded corpus (tiny only)
    end_of_text: bool  # the recipe's documents end with an end-of-text token
    max_epochs: int  # more passes over the training split than this are refused


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder (docs/science.md section 2)."""

    qk_norm: str  # "none" | "learned" | "frozen" (gamma stays 1)
    mlp: str  # "swiglu" | "relu2"
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    sequence_length: int
    norm_eps: float
    rope_base: float
    dtype: str  # "auto" | "float32" | "bfloat16": compute; parameters are always float32
    unroll: int  # layers per iteration of the layer loop
    attention: str  # "auto" (by platform) | "cudnn" | "blocked" | "xla"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Rates and decays by group of parameters; betas and eps of AdamW."""

    name: str  # "adamw" | "muon"
    learning_rate: float  # peak, of the matrices inside the blocks (all parameters with AdamW)
    adam_learning_rate: float | None  # peak, of the auxiliary AdamW in Muon arms
    weight_decay: float  # matrices inside the blocks
    auxiliary_weight_decay: float  # embedding and every gamma but gamma_q, gamma_k
    gamma_weight_decay: float  # gamma_q, gamma_k; resolve() derives it from tau where tau > 0
    gamma_decay_tau: float  # sum over steps of lr x decay of gamma_q, gamma_k; 0 = unused
    clip_norm: float  # global gradient norm; 0 = no clipping
    beta1: float
    beta2: float
    eps: float
    warmup_fraction: float  # of all steps, linear from 0
    decay_fraction: float  # of all steps, linear to 0 at the end

    @property
    def auxiliary_learning_rate(self) -> float:
        """Peak rate of the AdamW that updates the embedding and every gamma."""
        return self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Muon's own options; unused in AdamW arms."""

    momentum: float
    nesterov: bool
    coefficients: str  # "polar_express" | "quintic"
    granularity: str  # "separate" | "merged" | "per_head"
    scale: str  # "spectral" | "rms"
    dtype: str  # "auto" | "float32" | "bfloat16": arithmetic of the Newton-Schulz steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up, constant, linear decay: the factor that every peak rate is multiplied by."""

    num_steps: int
    warmup_steps: int
    decay_steps: int

    def factor(self, step: int) -> float:
        """Factor of update `step`, counted from 0; in (0, 1], for the first never 0."""
        warmup = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        decay = (self.num_steps - step) / self.decay_steps if self.decay_steps else 1.0
        return min(1.0, warmup, decay)

    def total(self) -> float:
        """Sum of the factors over all updates: learning rate x this = summed learning rate."""
        return math.fsum(self.factor(step) for step in range(self.num_steps))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The budget of the run and how a step is cut."""

    tokens: int  # as asked; num_steps * tokens_per_step are trained
    tokens_per_step: int
    num_steps: int
    sequences_per_step: int
    microbatch_sequences: int  # most sequences a device takes in one pass; 0 = its whole share
    loss_chunk_tokens: int  # positions whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """When and on what the frozen validation split is measured."""

    steps: tuple[int, ...]  # after so many updates; always 0 and the last
    tokens: int  # the first N of the split at every evaluation; 0 = all
    final_tokens: int  # of one more pass after the last step; 0 = all, -1 = no such pass
    batch_sequences: int  # sequences a device takes at one time


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    steps: tuple[int, ...]  # after so many updates; always 0 and the last
    keep_all: bool  # instead of step 0 and the latest two


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which updates are traced for TensorBoard and Perfetto."""

    steps: tuple[int, ...]  # () or (first, last)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What the terminal shows."""

    every_seconds: float  # between progress lines


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, checked and complete."""

    arm: str
    scale: str
    recipe: str
    seed: int
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    muon: MuonConfig
    schedule: Schedule
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    profile: ProfileConfig
    log: LogConfig

    def for_platform(self, platform: str) -> "Config":
        """Replaces every dtype "auto": float32 on "cpu", bfloat16 on accelerators."""
        auto = "float32" if platform == "cpu" else "bfloat16"
        model, muon = self.model, self.muon
        if model.dtype == "auto":
            model = dataclasses.replace(model, dtype=auto)
        if muon.dtype == "auto":
            muon = dataclasses.replace(muon, dtype=auto)
        return dataclasses.replace(self, model=model, muon=muon)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as config.json holds them."""
        return dataclasses.asdict(self)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `Config.to_dict`, for config.json of a run directory."""
    values = presets.with_present_recipe(values)
    sections = {}
    for field in dataclasses.fields(Config):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            value = field.type(**{k: _tuple(v) for k, v in value.items()})  # type: ignore[operator]
        sections[field.name] = value
    return Config(**sections)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def base(optimizer: str, qk_norm: str, words: str = "") -> ml_collections.ConfigDict:
    """The config of one arm: optimizer "adamw" or "muon", qk_norm "none" or "learned".

    Args:
        words: what stands after the config's colon, separated by commas in any order: at most one
            of `presets.SCALES`, one of `presets.RECIPES`, and any of `presets.CONTROLS`.
    Raises:
        UsageError: an unknown word, two words that exclude each other, or one without effect.
    """
    scale, recipe, controls = presets.parse_words(words, optimizer, qk_norm)
    shape, budget, rules = (
        presets.SHAPES[scale],
        presets.BUDGETS[scale],
        presets.RECIPE_RULES[recipe],
    )
    mlp, d_ff = presets.MLP[scale, recipe]
    adamw_rate, muon_rate, auxiliary_rate = presets.RATES[scale, recipe]
    is_muon = optimizer == "muon"
    if "frozen" in controls:
        qk_norm = "frozen"
    decays_gamma = qk_norm == "learned" and not controls & {"decayed", "undecayed"}

    config = ml_collections.ConfigDict()
    config.scale = scale
    config.recipe = recipe
    config.seed = 42
    config.data = ml_collections.ConfigDict(
        {"dir": "", "end_of_text": rules["end_of_text"], "max_epochs": 4}
    )
    config.model = ml_collections.ConfigDict(
        {
            **shape,
            "qk_norm": qk_norm,
            "mlp": mlp,
            "d_ff": d_ff,
            "norm_eps": rules["norm_eps"],
            "rope_base": 10_000.0,
            "dtype": "auto",
            "unroll": 1,
            "attention": "auto",
        }
    )
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": optimizer,
            "learning_rate": muon_rate if is_muon else adamw_rate,
            "adam_learning_rate": (
                auxiliary_rate if is_muon else ml_collections.config_dict.placeholder(float)
            ),
            "weight_decay": rules["muon_decay"] if is_muon else rules["adamw_decay"],
            "auxiliary_weight_decay": rules["auxiliary_decay"],
            "gamma_weight_decay": rules["gamma_decay"] if decays_gamma else 0.0,
            "gamma_decay_tau": presets.PILOT_TAU if "decayed" in controls else 0.0,
            "clip_norm": rules["clip_norm"],
            "beta1": 0.9,
            "beta2": rules["beta2"],
            "eps": 1e-8,
            "warmup_fraction": rules["warmup_fraction"],
            "decay_fraction": rules["decay_fraction"],
        }
    )
    config.muon = ml_collections.ConfigDict(
        {
            "momentum": 0.95,
            "nesterov": True,
            "coefficients": "polar_express",
            "granularity": "merged" if "merged" in controls else rules["granularity"],
            "scale": "spectral",
            "dtype": rules["newton_schulz_dtype"],
        }
    )
    config.train = ml_collections.ConfigDict(
        {
            "tokens": budget["tokens"],
            "tokens_per_step": presets.TOKENS_PER_STEP[scale, recipe],
            "microbatch_sequences": 8,
            "loss_chunk_tokens": 2_048,
        }
    )
    config.eval = ml_collections.ConfigDict(
        {
            "at_tokens": budget["at_tokens"],
            "every_tokens": budget["every_tokens"],
            "tokens": budget["eval_tokens"],
            "final_tokens": budget["final_tokens"],
            "batch_sequences": 8,
        }
    )
    config.checkpoint = ml_collections.ConfigDict(
        {"every_tokens": budget["checkpoint_tokens"], "keep_all": False}
    )
    config.profile = ml_collections.ConfigDict({"steps": ()})
    config.log = ml_collections.ConfigDict({"every_seconds": 10.0})
    return config


# --------------------------------------------------------------------------------------------
# Checks: every field in one pass, every mistake in one message.


def resolve(config: ml_collections.ConfigDict) -> Config:
    """Checks every field and derives steps, decay and the arm's name.

    Raises:
        UsageError: lists every field that is wrong, with its value and what it may be.
    """
    found = _mistakes(config)
    if found:
        raise errors.UsageError("config: " + "; ".join(found))
    train, tokens_per_step = config.train, config.train.tokens_per_step
    num_steps = max(1, train.tokens // tokens_per_step)
    optimizer = OptimizerConfig(**config.optimizer.to_dict())
    schedule = Schedule(
        num_steps=num_steps,
        warmup_steps=math.ceil(optimizer.warmup_fraction * num_steps),
        decay_steps=math.ceil(optimizer.decay_fraction * num_steps),
    )
    return Config(
        arm=_arm_name(config),
        scale=config.scale,
        recipe=config.recipe,
        seed=config.seed,
        data=DataConfig(**config.data.to_dict()),
        model=ModelConfig(**config.model.to_dict()),
        optimizer=_with_gamma_decay(optimizer, schedule),
        muon=MuonConfig(**config.muon.to_dict()),
        schedule=schedule,
        train=TrainConfig(
            tokens=train.tokens,
            tokens_per_step=tokens_per_step,
            num_steps=num_steps,
            sequences_per_step=tokens_per_step // config.model.sequence_length,
            microbatch_sequences=train.microbatch_sequences,
            loss_chunk_tokens=train.loss_chunk_tokens,
        ),
        eval=EvalConfig(
            steps=_steps(
                num_steps, tokens_per_step, tuple(config.eval.at_tokens), config.eval.every_tokens
            ),
            tokens=config.eval.tokens,
            final_tokens=config.eval.final_tokens,
            batch_sequences=config.eval.batch_sequences,
        ),
        checkpoint=CheckpointConfig(
            steps=_steps(num_steps, tokens_per_step, (), config.checkpoint.every_tokens),
            keep_all=config.checkpoint.keep_all,
        ),
        profile=ProfileConfig(steps=tuple(config.profile.steps)),
        log=LogConfig(**config.log.to_dict()),
    )


def _steps(
    num_steps: int, tokens_per_step: int, at: tuple[int, ...], every: int
) -> tuple[int, ...]:
    """Whole steps nearest below each token count, with 0 and the last, ascending."""
    repeated = range(every, num_steps * tokens_per_step + 1, every) if every else ()
    wanted = {max(1, tokens // tokens_per_step) for tokens in (*at, *repeated)}
    return tuple(sorted({0, num_steps} | {step for step in wanted if step < num_steps}))


def _with_gamma_decay(optimizer: OptimizerConfig, schedule: Schedule) -> OptimizerConfig:
    rate = optimizer.auxiliary_learning_rate
    if optimizer.gamma_decay_tau:
        decay = optimizer.gamma_decay_tau / (rate * schedule.total())
        optimizer = dataclasses.replace(optimizer, gamma_weight_decay=decay)
    if rate * optimizer.gamma_weight_decay >= 1:
        raise errors.UsageError(
            "config: optimizer.gamma_weight_decay: learning rate x decay is "
            f"{rate * optimizer.gamma_weight_decay:.3g} at its peak, and from 1 on a step would "
            f"turn gamma's sign (decay {optimizer.gamma_weight_decay:.4g} over "
            f"{schedule.num_steps} steps). Train longer or lower optimizer.gamma_decay_tau."
        )
    return optimizer


def _arm_name(config: ml_collections.ConfigDict) -> str:
    """The config file's name with its controls, read off what is really trained."""
    model, optimizer = config.model, config.optimizer
    name = f"{optimizer.name}_{'noqk' if model.qk_norm == 'none' else 'qk'}"
    if model.qk_norm == "frozen":
        name += "_frozen"
    elif optimizer.gamma_decay_tau:
        name += "_decayed"
    elif (
        model.qk_norm == "learned"
        and config.recipe == "original"
        and not optimizer.gamma_weight_decay
    ):
        name += "_undecayed"
    if (
        optimizer.name == "muon"
        and config.muon.granularity != presets.RECIPE_RULES[config.recipe]["granularity"]
    ):
        name += f"_{config.muon.granularity}"
    return name


def _mistakes(config: ml_collections.ConfigDict) -> list[str]:
    found: list[str] = []

    def need(holds: bool, field: str, wanted: str) -> None:
        if not holds:
            found.append(f"{field} is {_read(config, field)!r}, it must be {wanted}")

    for field, choices in _CHOICES.items():
        need(_read(config, field) in choices, field, "one of " + ", ".join(choices))
    for field in _POSITIVE:
        need(_read(config, field) > 0 and math.isfinite(_read(config, field)), field, "above 0")
    for field in _NOT_NEGATIVE:
        value = _read(config, field)
        need(value >= 0 and math.isfinite(value), field, "0 or more")
    for field in _BELOW_ONE:
        need(0 <= _read(config, field) < 1, field, "from 0 to below 1")
    need(0 <= config.seed < 2**32, "seed", "from 0 to 2**32 - 1")
    need(config.eval.final_tokens >= -1, "eval.final_tokens", "-1 (no pass), 0 (all) or more")
    need(
        all(isinstance(t, int) and t > 0 for t in config.eval.at_tokens),
        "eval.at_tokens",
        "a tuple of token counts above 0",
    )
    traced = tuple(config.profile.steps)
    need(
        traced == () or (len(traced) == 2 and 1 <= traced[0] <= traced[1]),
        "profile.steps",
        "() or (first, last), counted from 1",
    )
    if found:  # what follows divides by fields that have just been checked
        return found

    model, optimizer, length = config.model, config.optimizer, config.model.sequence_length
    need(model.head_dim % 2 == 0, "model.head_dim", "even, for RoPE")
    need(
        model.num_heads % model.num_kv_heads == 0,
        "model.num_heads",
        f"a multiple of model.num_kv_heads = {model.num_kv_heads}",
    )
    need(
        config.train.tokens_per_step % length == 0,
        "train.tokens_per_step",
        f"a multiple of model.sequence_length = {length}",
    )
    need(
        optimizer.warmup_fraction + optimizer.decay_fraction <= 1,
        "optimizer.warmup_fraction",
        f"at most 1 - optimizer.decay_fraction = {1 - optimizer.decay_fraction:g}",
    )
    if optimizer.name == "adamw":
        need(
            optimizer.adam_learning_rate is None,
            "optimizer.adam_learning_rate",
            "left alone: an AdamW arm has one rate, optimizer.learning_rate",
        )
    else:
        need(
            optimizer.adam_learning_rate is not None and optimizer.adam_learning_rate > 0,
            "optimizer.adam_learning_rate",
            "above 0: it updates the embedding and the gammas of a Muon arm",
        )
        need(
            config.muon.granularity != "merged"
            or model.num_heads * model.head_dim == model.d_model,
            "muon.granularity",
            "separate or per_head unless num_heads * head_dim == d_model (the output kernel has "
            "as many rows as the others)",
        )
    if model.qk_norm != "learned":
        for field in ("optimizer.gamma_weight_decay", "optimizer.gamma_decay_tau"):
            need(
                _read(config, field) == 0,
                field,
                f"0 with model.qk_norm={model.qk_norm}: no learned gamma to decay",
            )
    elif optimizer.gamma_decay_tau:
        need(
            optimizer.gamma_weight_decay == 0,
            "optimizer.gamma_weight_decay",
            f"0 with optimizer.gamma_decay_tau = {optimizer.gamma_decay_tau:g}, which sets it",
        )
    return found


def _read(config: ml_collections.ConfigDict, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = value[name]
    return value


_CHOICES: dict[str, tuple[str, ...]] = {
    "scale": presets.SCALES,
    "recipe": presets.RECIPES,
    "model.qk_norm": ("none", "learned", "frozen"),
    "model.mlp": ("swiglu", "relu2"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("auto", "cudnn", "blocked", "xla"),
    "optimizer.name": ("adamw", "muon"),
    "muon.coefficients": ("polar_express", "quintic"),
    "muon.granularity": ("separate", "merged", "per_head"),
    "muon.scale": ("spectral", "rms"),
    "muon.dtype": ("auto", "float32", "bfloat16"),
}
_POSITIVE = (
    "data.max_epochs",
    "model.num_layers",
    "model.d_model",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.d_ff",
    "model.vocab_size",
    "model.sequence_length",
    "model.norm_eps",
    "model.rope_base",
    "model.unroll",
    "optimizer.learning_rate",
    "optimizer.eps",
    "train.tokens",
    "train.tokens_per_step",
    "train.loss_chunk_tokens",
    "eval.batch_sequences",
    "checkpoint.every_tokens",
)
_NOT_NEGATIVE = (
    "optimizer.weight_decay",
    "optimizer.auxiliary_weight_decay",
    "optimizer.gamma_weight_decay",
    "optimizer.gamma_decay_tau",
    "optimizer.clip_norm",
    "train.microbatch_sequences",
    "eval.every_tokens",
    "eval.tokens",
    "log.every_seconds",
)
_BELOW_ONE = (
    "muon.momentum",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.warmup_fraction",
    "optimizer.decay_fraction",
)
