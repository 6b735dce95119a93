"""Muon as an optax GradientTransformation: momentum, then the nearest semi-orthogonal matrix.

Every leaf is [..., in, out], the layout of a Flax kernel: the last two axes are one matrix, the
axes before them a batch of matrices (layers, heads), each orthogonalised by itself. Dimension
numbers tell of other layouts. The caller decides which parameters come here; a leaf without a
matrix is refused.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Safety factor on the Frobenius norm, and (a, b, c) of each step. The Polar Express rows belong
# together: each maps the interval that the row before it leaves, so a part of them is not a valid
# method. Float32 numbers and not Python's, which JAX rounds to bfloat16 before it multiplies
# bfloat16 arrays: with coefficients .4% off, singular values end as low as .80 instead of .85.
_NEWTON_SCHULZ = {
    "quintic": (1.0, np.array([(3.4445, -4.7750, 2.0315)] * 5, np.float32)),
    "polar_express": (
        1.01,
        np.array(
            [
                (8.156554524902461, -22.48329292557795, 15.878769915207462),
                (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
            ],
            np.float32,
        ),
    ),
}
COEFFICIENTS = tuple(_NEWTON_SCHULZ)
_OfMatrices = Callable[[jax.Array], jax.Array]
SCALES = ("spectral", "rms", "mup")


class DimensionNumbers(NamedTuple):
    """Which axes of a leaf are a stack of matrices, their inputs and their outputs.

    Flax's `DenseGeneral` kernel [D, H, K] of queries, for instance, is one matrix from D to H K:
    `DimensionNumbers(batch=(), fan_in=(0,), fan_out=(1, 2))`.
    """

    batch: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]


class ScaleByMuonState(NamedTuple):
    """Average of the gradients, one leaf per parameter in the parameter's shape and dtype."""

    momentum: optax.Updates


def orthogonalize(
    u: jax.Array,
    *,
    coefficients: str = "polar_express",
    dtype: jax.typing.DTypeLike = jnp.float32,
    eps: float = 1e-7,
) -> jax.Array:
    """Moves every singular value of each matrix towards 1 by five Newton-Schulz steps.

    X0 = u / (s ||u||_F + eps), rows <= columns by transposition;
    A = X X^T, X <- a X + (b A + c A^2) X, five times.
    A singular value x of X0 becomes f5(..f1(x)), f(x) = a x + b x^3 + c x^5: within [.68, 1.21]
    ("quintic") or [.85, 1.15] ("polar_express") for x >= .003; zero stays zero.

    Args:
        u: [..., M, N], any floating dtype.
        coefficients: "polar_express" (s = 1.01, one row (a, b, c) per step) or "quintic" (s = 1,
            the same row at every step).
        dtype: of the iteration, float32 or bfloat16. The norm is always taken in float32.
        eps: keeps a zero matrix finite; it also damps matrices of norm below about 1e-4. (A norm
            beyond float32, from entries near 1e18, gives zero.)
    Returns:
        [..., M, N] in the dtype of `u`.
    Raises:
        ValueError: unknown coefficients.
    Source: "quintic" Keller Jordan, Muon (2024); "polar_express" Amsel et al. (2025).
    """
    safety, steps = newton_schulz(coefficients)
    is_tall = u.shape[-2] > u.shape[-1]
    x = _short_side_first(u).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = (x / (safety * norm + eps)).astype(dtype)
    # On GPU and TPU float32 products default to fewer bits, which this iteration amplifies.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(jnp.matmul, precision=precision)
    for a, b, c in steps:
        gram = product(x, x.mT)
        polynomial = (b * gram + c * product(gram, gram)).astype(dtype)
        x = (a * x + product(polynomial, x)).astype(dtype)
    return (x.mT if is_tall else x).astype(u.dtype)


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: str = "polar_express",
    dtype: jax.typing.DTypeLike = jnp.float32,
    eps: float = 1e-7,
    dimension_numbers: Any = None,
    shared: Callable[[_OfMatrices], _OfMatrices] = lambda function: function,
) -> optax.GradientTransformation:
    """Replaces gradients by their orthogonalised momentum.

    m_t = mu m_{t-1} + (1 - mu) g_t; u = (1 - mu) g_t + mu m_t with Nesterov, else m_t.
    There is no bias correction. The heavy-ball form m_t = mu m_{t-1} + g_t, u = g_t + mu m_t
    is the same direction: it differs by the constant factor 1 / (1 - mu), which
    orthogonalisation removes.

    Args:
        momentum: mu. The average is stored in the parameter's dtype, computed in float32.
        nesterov: look one step ahead.
        coefficients, dtype, eps: as in `orthogonalize`.
        dimension_numbers: as in `muon`.
        shared: makes of a function of matrices [..., M, N], each by itself, the one that is called;
            several devices can share them so.
    Returns:
        A GradientTransformation over leaves [..., in, out], or as their dimension numbers say.
    Raises:
        ValueError: unknown coefficients; from `init`, a leaf with fewer than two axes, or with
            other axes than its dimension numbers, by its path and shape.
    Source: Keller Jordan, Muon (2024).
    """
    newton_schulz(coefficients)

    def init(params: optax.Params) -> ScaleByMuonState:
        def zeros(path: Any, leaf: jax.Array, numbers: DimensionNumbers | None) -> jax.Array:
            _check_axes(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, numbers)
            return jnp.zeros_like(leaf)

        numbers = _numbers_of(params, dimension_numbers)
        return ScaleByMuonState(jax.tree.map_with_path(zeros, params, numbers))

    def average(m: jax.Array, g: jax.Array) -> jax.Array:
        return momentum * m.astype(jnp.float32) + (1 - momentum) * g.astype(jnp.float32)

    def update(
        updates: optax.Updates, state: ScaleByMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        m_new = jax.tree.map(lambda m, g: average(m, g).astype(m.dtype), state.momentum, updates)
        u = jax.tree.map(average, m_new, updates) if nesterov else m_new
        numbers = _numbers_of(u, dimension_numbers)
        matrices, structure = jax.tree.flatten(jax.tree.map(_as_matrices, u, numbers))
        one = functools.partial(orthogonalize, coefficients=coefficients, dtype=dtype, eps=eps)
        results = _orthogonalize_all(matrices, shared(one))
        u = jax.tree.map(_as_leaf, jax.tree.unflatten(structure, results), u, numbers)
        return jax.tree.map(lambda x, g: x.astype(g.dtype), u, updates), ScaleByMuonState(m_new)

    return optax.GradientTransformation(init, update)


def scale_by_matrix_shape(
    scale: str = "spectral", *, dimension_numbers: Any = None
) -> optax.GradientTransformation:
    """Multiplies each orthogonalised update by a factor of its matrix's shape.

    "spectral": sqrt(max(1, fan_out / fan_in)); "rms": 0.2 sqrt(max(fan_out, fan_in)), at which
    the update's entries are as large as AdamW's; "mup": sqrt(fan_out / fan_in), which also makes
    the updates of matrices with fewer outputs than inputs smaller.

    Args:
        dimension_numbers: as in `muon`; of [..., in, out], fan_in is shape[-2], fan_out shape[-1].
    Raises:
        ValueError: unknown scale.
    Sources: "spectral" Keller Jordan, Muon (2024); "rms" Liu et al., Moonlight (2025); "mup" the
    spectral condition of Yang, Simon & Bernstein (2023), as J. Su argues for Muon.
    """
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r} is unknown. Choose one of {', '.join(SCALES)}.")

    def factor(fan_in: int, fan_out: int) -> float:
        if scale == "rms":
            return 0.2 * math.sqrt(max(fan_out, fan_in))
        if scale == "mup":
            return math.sqrt(fan_out / fan_in)
        return math.sqrt(max(1.0, fan_out / fan_in))

    def scaled(update: jax.Array, numbers: DimensionNumbers | None) -> jax.Array:
        return update * factor(*_fans(update.shape, numbers))

    def update_fn(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(scaled, updates, _numbers_of(updates, dimension_numbers))

    return optax.stateless(update_fn)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    coefficients: str = "polar_express",
    scale: str = "spectral",
    dtype: jax.typing.DTypeLike = jnp.float32,
    eps: float = 1e-7,
    dimension_numbers: Any = None,
) -> optax.GradientTransformation:
    """Muon for matrices: momentum orthogonalised by Newton-Schulz, with decoupled decay.

    p <- (1 - lr weight_decay) p - lr scale orthogonalize(u), with u as in `scale_by_muon`.

    Args:
        learning_rate: a number or an optax schedule.
        momentum, nesterov: as in `scale_by_muon`.
        weight_decay: decoupled, multiplied by the learning rate; 0 is none.
        coefficients, dtype, eps: as in `orthogonalize`.
        scale: "spectral", "rms" or "mup", as in `scale_by_matrix_shape`.
        dimension_numbers: a tree like the parameters', of `DimensionNumbers`, or of None where a
            leaf is a stack of matrices [..., in, out]; None where all are. Three axes
            [64, 4, 16] may be 64 matrices or one: without numbers they are 64.
    Returns:
        A GradientTransformation; `update` needs the parameters.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> params = {"kernel": jnp.zeros([2, 3])}
    >>> optimizer = muon(0.1)
    >>> state = optimizer.init(params)
    >>> gradients = {"kernel": jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])}
    >>> updates, state = optimizer.update(gradients, state, params)
    >>> print(jnp.round(jnp.diag(optax.apply_updates(params, updates)["kernel"]), 2))
    [-0.11 -0.14]

    A Flax `DenseGeneral` kernel of queries, from 8 inputs to 2 heads of 4, is one matrix:

    >>> params = {"query": jnp.zeros([8, 2, 4])}
    >>> numbers = {"query": DimensionNumbers(batch=(), fan_in=(0,), fan_out=(1, 2))}
    >>> optimizer = muon(0.1, dimension_numbers=numbers)
    >>> gradients = {"query": jnp.eye(8).reshape(8, 2, 4)}
    >>> updates, state = optimizer.update(gradients, optimizer.init(params), params)
    >>> print(updates["query"].shape, f"{jnp.linalg.norm(updates['query']):.1f}")
    (8, 2, 4) 0.3

    References: Keller Jordan et al., Muon: an optimizer for hidden layers (2024); Amsel et al.,
    The Polar Express (2025), the default coefficients; Liu et al., Muon is scalable for LLM
    training (Moonlight, 2025), weight decay and the scale "rms".
    """
    return optax.chain(
        scale_by_muon(
            momentum=momentum,
            nesterov=nesterov,
            coefficients=coefficients,
            dtype=dtype,
            eps=eps,
            dimension_numbers=dimension_numbers,
        ),
        scale_by_matrix_shape(scale, dimension_numbers=dimension_numbers),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def newton_schulz(coefficients: str) -> tuple[float, np.ndarray]:
    """Safety factor on the norm, and (a, b, c) of every step, [5, 3] float32.

    Raises:
        ValueError: unknown coefficients.
    """
    if coefficients not in _NEWTON_SCHULZ:
        known = ", ".join(COEFFICIENTS)
        raise ValueError(f"coefficients: {coefficients!r} is unknown. Choose one of {known}.")
    return _NEWTON_SCHULZ[coefficients]


def _numbers_of(tree: Any, dimension_numbers: Any) -> Any:
    """The dimension numbers of every leaf, in the structure of the tree."""
    return jax.tree.map(lambda _: None, tree) if dimension_numbers is None else dimension_numbers


def _check_axes(name: str, leaf: jax.Array, numbers: DimensionNumbers | None) -> None:
    if leaf.ndim < 2:
        raise ValueError(
            f"{name}: Muon needs a matrix [..., in, out], found shape {leaf.shape}. "
            "Give this parameter to another optimiser."
        )
    if numbers is None:
        return
    batch, fan_in, fan_out = numbers
    named = sorted((*batch, *fan_in, *fan_out))
    if named != list(range(leaf.ndim)) or not fan_in or not fan_out:
        raise ValueError(
            f"{name}: dimension numbers batch {batch}, in {fan_in}, out {fan_out} do not name each "
            f"axis of shape {leaf.shape} once, with at least one in and one out. Correct them."
        )


def _fans(shape: tuple[int, ...], numbers: DimensionNumbers | None) -> tuple[int, int]:
    if numbers is None:
        return shape[-2], shape[-1]
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in numbers[1:])
    return fan_in, fan_out


def _as_matrices(leaf: jax.Array, numbers: DimensionNumbers | None) -> jax.Array:
    if numbers is None:
        return leaf
    batch = [leaf.shape[axis] for axis in numbers.batch]
    ordered = leaf.transpose(*numbers.batch, *numbers.fan_in, *numbers.fan_out)
    return ordered.reshape(*batch, *_fans(leaf.shape, numbers))


def _as_leaf(matrices: jax.Array, like: jax.Array, numbers: DimensionNumbers | None) -> jax.Array:
    if numbers is None:
        return matrices
    order = (*numbers.batch, *numbers.fan_in, *numbers.fan_out)
    ordered = matrices.reshape([like.shape[axis] for axis in order])
    return ordered.transpose([order.index(axis) for axis in range(like.ndim)])


def _short_side_first(u: jax.Array) -> jax.Array:
    return u.mT if u.shape[-2] > u.shape[-1] else u


def _orthogonalize_all(matrices: list[jax.Array], orthogonalized: _OfMatrices) -> list[jax.Array]:
    """Orthogonalises leaves that differ by transposition at most as one batch: fewer kernels.

    The new batch axis is the innermost, so that a sharded layer axis stays where it is.
    """
    wide = [_short_side_first(u) for u in matrices]
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, u in enumerate(wide):
        alike[u.shape].append(i)
    results = list(matrices)
    for indices in alike.values():
        batch = jnp.stack([wide[i] for i in indices], axis=-3)
        batch = orthogonalized(batch)
        for j, i in enumerate(indices):
            is_tall = wide[i] is not matrices[i]
            results[i] = batch[..., j, :, :].mT if is_tall else batch[..., j, :, :]
    return results
