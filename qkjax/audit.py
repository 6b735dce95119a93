"""What an optimiser's weight decay does to each parameter over a run, and what public recipes do.

Decay is found by doing it: a transformation is given gradients of zero, and what still moves the
parameters is its decay, in any form, with any masks and schedule. With p <- p - k_t (p - target) at
step t, tau = sum of k_t, for AdamW the sum of learning rate x decay. A parameter that no gradient
holds keeps e^-tau of its distance from the target.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qkjax import model, optimizer
from qkjax.config import Config

# Where a parameter is put to see how far it is pulled from there: three points, so that a pull
# that is not proportional to the distance shows.
_PLACES = (-1.0, 1.0, 2.0)
_STRAIGHT = 1e-3  # relative difference of the two slopes that still counts as proportional
_MOST_ELEMENTS = 2**20  # of parameters, of all updates that are made side by side


class Decay(NamedTuple):
    """What zero gradients do to one parameter over some steps."""

    name: str  # '/'-joined path
    shape: tuple[int, ...]
    tau: float  # sum over steps of the share of the distance that a step removes; 0: no decay
    first: float  # that share at the first step
    last: float  # and at the last
    target: float | None  # what it is pulled to; None: nothing pulls
    proportional: bool  # False: the pull is no share of the distance (L2 put through Adam): tau NaN

    @property
    def left(self) -> float:
        """e^-tau: what is left of the distance from the target where no gradient holds it."""
        return math.exp(-self.tau)


def decay_table(
    transformation: optax.GradientTransformation, params: Any, *, steps: int = 1
) -> list[Decay]:
    """The decay of every parameter, found by updates with gradients of zero.

    Args:
        transformation: any optax transformation, schedules and masks included.
        params: the parameter tree, as arrays or jax.ShapeDtypeStruct; values are not read.
        steps: updates that tau is summed over, from the first; the length of the run. Each of them
            is done, on three copies of the tree. Sizes do not matter to decay, so small ones do.
    Returns:
        One row per parameter, in the order of the tree's leaves.

    >>> params = {"gamma": jnp.ones(64), "kernel": jnp.ones((64, 64))}
    >>> only_matrices = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    >>> adamw = optax.adamw(6e-3, weight_decay=0.2, mask=only_matrices)
    >>> for row in decay_table(adamw, params, steps=6103):
    ...     print(f"{row.name}: tau {row.tau:.2f}, target {row.target}")
    gamma: tau 0.00, target None
    kernel: tau 7.32, target 0.0
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    places = [jax.tree.map(lambda leaf, at=at: jnp.full_like(leaf, at), zeros) for at in _PLACES]

    def step(states: list[Any]) -> tuple[list[Any], list[jax.Array]]:
        """The states after one update, and of each leaf its mean movement at each place."""
        done = [
            transformation.update(zeros, state, place)
            for place, state in zip(places, states, strict=True)
        ]
        moves = [[_mean(update) for update in jax.tree.leaves(updates)] for updates, _ in done]
        of_leaves = [jnp.stack(of_places) for of_places in zip(*moves, strict=True)]
        return [state for _, state in done], of_leaves

    def start() -> list[Any]:
        return jax.tree.map(jnp.asarray, [transformation.init(place) for place in places])

    size = sum(math.prod(leaf.shape) for _, leaf in leaves)
    chunk = max(1, _MOST_ELEMENTS // max(1, size))
    moves, is_counted = jax.jit(lambda: _by_count(step, start(), steps, chunk))()
    if not is_counted:
        moves = jax.jit(lambda: jax.lax.scan(lambda s, _: step(s), start(), length=steps)[1])()
    moves = jax.device_get(moves)  # a leaf: [steps, places]
    return [_decay(path, leaf, move) for (path, leaf), move in zip(leaves, moves, strict=True)]


def _mean(update: jax.Array) -> jax.Array:
    return jnp.mean(update.astype(jnp.float32))


def _by_count(
    step: Callable[[Any], tuple[Any, list[jax.Array]]], start: Any, steps: int, chunk: int
) -> tuple[list[jax.Array], jax.Array]:
    """All updates side by side, as if their states differed in counters alone.

    Without gradients most states do: moments stay 0, and what is not a counter is then computed
    once. Every update has to lead to the state from which the next one was made, so that the
    states are, by induction, those of the updates one after the other.

    Args:
        chunk: updates at a time.
    Returns:
        The moves of every update, and whether the states were the right ones.
    """
    after, _ = step(start)

    def state_of(t: jax.Array) -> Any:
        def leaf(first: jax.Array, second: jax.Array) -> jax.Array:
            if not jnp.issubdtype(first.dtype, jnp.integer):
                return first
            return first + t.astype(first.dtype) * (second - first)

        return jax.tree.map(leaf, start, after)

    def one(t: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        found, moves = step(state_of(t))
        same = jax.tree.map(lambda x, y: jnp.all(x == y), found, state_of(t + 1))
        return moves, jnp.all(jnp.stack([jnp.array(True), *jax.tree.leaves(same)]))

    moves, right = jax.lax.map(one, jnp.arange(steps), batch_size=min(chunk, steps))
    return moves, jnp.all(right)


def _decay(path: Any, leaf: Any, moves: Any) -> Decay:
    low, middle, high = _PLACES
    moves = moves.astype(float)
    pulls = (moves[:, 0] - moves[:, 2]) / (high - low)  # k_t
    bend = (
        moves[:, 2] - moves[:, 1] - (moves[:, 1] - moves[:, 0]) * (high - middle) / (middle - low)
    )
    largest = abs(moves).max()
    proportional = bool(abs(bend).max() <= _STRAIGHT * largest)
    target = None
    if proportional and largest > 0:
        step = abs(pulls).argmax()
        target = round(float(middle + moves[step, 1] / pulls[step]), 3) + 0.0
    return Decay(
        name=jax.tree_util.keystr(path, simple=True, separator="/"),
        shape=tuple(leaf.shape),
        tau=float(pulls.sum()) if proportional else math.nan,
        first=float(pulls[0]),
        last=float(pulls[-1]),
        target=target,
        proportional=proportional,
    )


def of_config(config: Config) -> list[Decay]:
    """`decay_table` of the optimiser of a config over its whole schedule.

    Rates, decays and schedule do not depend on shapes, so the table is made on a model of one
    layer and two dimensions; the shapes in it are that model's.
    """
    config = config.for_platform("cpu")
    small = dataclasses.replace(
        config.model,
        num_layers=1,
        d_model=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        d_ff=4,
        vocab_size=4,
    )
    config = dataclasses.replace(config, model=small)
    shapes = model.parameter_shapes(small)
    transformation = optimizer.make_optimizer(config, shapes)
    return decay_table(transformation, shapes, steps=config.schedule.num_steps)


# --------------------------------------------------------------------------------------------
# Public recipes.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a public recipe does to the gammas of QK-Norm."""

    title: str
    rate: float  # peak learning rate of the gammas
    decay: float  # decoupled, multiplied by the rate
    steps: int
    factor: Callable[[int], float]  # of the rate, by update from 0
    source: str  # and when it was read
    note: str = ""
    has_gamma: bool = True
    target: float = 0.0

    @property
    def tau(self) -> float:
        """Sum over the steps of learning rate x decay."""
        if not self.has_gamma:
            return 0.0
        return self.rate * self.decay * math.fsum(map(self.factor, range(self.steps)))


def _constant(_: int) -> float:
    return 1.0


def _cosine(steps: int, warmup: int, final: float) -> Callable[[int], float]:
    """Linear warm-up from 0, then half a cosine to `final` of the peak at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        turned = math.cos(math.pi * (step - warmup) / (steps - warmup))
        return final + (1 - final) * (1 + turned) / 2

    return factor


def _warmup_then_linear(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear warm-up to the peak, then a line to 0 at `steps`."""
    return lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))


_OLMO_2_STEPS = int(6.5e12) // (2048 * 4096)
_OLMO_3_STEPS = int(5e12) // (8192 * 512)
_MAXTEXT_STEPS = 150_001
RECIPES: dict[str, Recipe] = {
    "olmo2-32b": Recipe(
        "OLMo 2 32B",
        6e-4,
        0.1,
        _OLMO_2_STEPS,
        _cosine(_OLMO_2_STEPS, 2000, 0.1),
        "allenai/OLMo-core, src/scripts/official/OLMo2/OLMo-2-0325-32B-train.py at 138b1fc, "
        "read 2026-11-28: decay on all but the embedding",
        "the schedule of 6.5T tokens; by its README stage 1 ended at step 721,901: tau 25.2",
    ),
    "olmo3-7b": Recipe(
        "OLMo 3 7B",
        3e-4,
        0.1,
        _OLMO_3_STEPS,
        _cosine(_OLMO_3_STEPS, 2000, 0.1),
        "allenai/OLMo-core, src/scripts/official/OLMo3/OLMo-3-1025-7B-pretrain-1.py at 18b8fb6, "
        "read 2026-11-28: decay on all but the embedding",
        "the schedule of 5T tokens; part 2 of the script extends its second half to 5.93T",
    ),
    "torchtitan": Recipe(
        "torchtitan's default",
        8e-4,
        0.1,
        10_000,
        _warmup_then_linear(10_000, 200),
        "pytorch/torchtitan, torchtitan/config/job_config.py at 000204a and "
        "torchtitan/components/optimizer.py at 018740b, read 2026-11-28: one group for all",
        "for a model that has QK-Norm; steps, rate and warm-up are the defaults of its config",
    ),
    "maxtext": Recipe(
        "MaxText's default",
        3e-5,
        0.1,
        _MAXTEXT_STEPS,
        _cosine(_MAXTEXT_STEPS, _MAXTEXT_STEPS // 10, 0.1),
        "AI-Hypercomputer/maxtext, src/MaxText/configs/base.yml at 003b416 and optimizers.py at "
        "056fb1a, read 2026-11-28: optax.adamw without a mask",
        "for a model that has QK-Norm; steps, rate and warm-up are the defaults of its config",
    ),
    "original-pilot": Recipe(
        "the original's 25M pilot",
        6e-3,
        0.2,
        25_000_000 // 4096,
        _constant,
        "the original PyTorch study, as reported in docs/science.md sections 4 and 6",
    ),
    "original-300m": Recipe(
        "the original's 300M plan, AdamW arms",
        6e-4,
        0.2,
        300_000_000 // 4096,
        _constant,
        "the original PyTorch study, as reported in docs/science.md section 4",
    ),
    "original-300m-muon": Recipe(
        "the original's 300M plan, gammas of Muon arms",
        6e-3,
        0.2,
        300_000_000 // 4096,
        _constant,
        "the original PyTorch study, as reported in docs/science.md section 4",
    ),
    "nanochat": Recipe(
        "nanochat",
        0.0,
        0.0,
        0,
        _constant,
        "karpathy/nanochat, nanochat/gpt.py at 025c432, read 2026-11-28: RMSNorm has no parameters",
        has_gamma=False,
    ),
    "qkjax": Recipe(
        "this project's recipe fixed at full scale",
        1.2e-3,
        0.0,
        4577,
        _constant,
        "qkjax/presets.py: gammas do not decay",
    ),
}


_STRENGTH = (
    "These studies have one seed each, and their tau grows with the number of steps: this is a "
    "hypothesis, which the controls frozen, decayed and undecayed are made to test."
)
# Up to which tau -> what the original's studies show at their ends (docs/science.md section 6).
_KNOWN = (
    (0.45, "In the original's studies with tau up to 0.45, key PR ends higher with QK-Norm."),
    (2.4, "In the original's studies key PR ends higher at tau 0.45, and 3.3 of 64 lower at 2.4."),
    (
        7.4,
        "In the original's studies key PR ends 3.3 of 64 lower at tau 2.4, and 17 to 21 lower at "
        "7.3.",
    ),
    (
        math.inf,
        "Above all measured values: at the original's tau 7.3, key PR ends 17 to 21 of 64 lower.",
    ),
)


def what_is_known(tau: float, target: float | None = 0.0) -> str:
    """What has been measured about gammas at a tau, in words, with its strength."""
    if math.isnan(tau):
        return "The pull is not proportional to gamma, so it has no tau and cannot be compared."
    if tau == 0:
        return "Nothing pulls gamma: only gradients move it."
    if target != 0:
        return (
            f"A pull towards {target:g} does not shrink a gamma of that size; its effect has not "
            "been measured."
        )
    words = next(words for end, words in _KNOWN if tau <= end)
    return f"{words} {_STRENGTH}"
