"""Muon as an optax GradientTransformation: momentum, then the nearest semi-orthogonal matrix.

Every leaf is [..., in, out], the layout of a Flax kernel: the last two axes are one matrix, the
axes before them a batch of matrices (layers, heads), each orthogonalised by itself. The caller
decides which parameters come here; a leaf without a matrix is refused.
"""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Safety factor on the Frobenius norm, and (a, b, c) of each step. The Polar Express rows belong
# together: each maps the interval that the row before it leaves, so fewer of them are no method.
# Float32 numbers and not Python's, which JAX rounds to bfloat16 before it multiplies bfloat16
# arrays: with coefficients .4% off, singular values end as low as .80 instead of .85.
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
SCALES = ("spectral", "rms")


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
        coefficients: "polar_express" (s = 1.01, one row (a, b, c) a step) or "quintic" (s = 1,
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
    Returns:
        A GradientTransformation over leaves [..., in, out].
    Raises:
        ValueError: unknown coefficients; from `init`, a leaf with fewer than two axes, by its path
            and shape.
    Source: Keller Jordan, Muon (2024).
    """
    newton_schulz(coefficients)

    def init(params: optax.Params) -> ScaleByMuonState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.ndim < 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"{name}: Muon needs a matrix [..., in, out], found shape {leaf.shape}. "
                    "Give this parameter to another optimiser."
                )
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params))

    def average(m: jax.Array, g: jax.Array) -> jax.Array:
        return momentum * m.astype(jnp.float32) + (1 - momentum) * g.astype(jnp.float32)

    def update(
        updates: optax.Updates, state: ScaleByMuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        m_new = jax.tree.map(lambda m, g: average(m, g).astype(m.dtype), state.momentum, updates)
        u = jax.tree.map(average, m_new, updates) if nesterov else m_new
        matrices, structure = jax.tree.flatten(u)
        results = _orthogonalize_all(matrices, coefficients=coefficients, dtype=dtype, eps=eps)
        u = jax.tree.unflatten(structure, results)
        return jax.tree.map(lambda x, g: x.astype(g.dtype), u, updates), ScaleByMuonState(m_new)

    return optax.GradientTransformation(init, update)


def scale_by_matrix_shape(scale: str = "spectral") -> optax.GradientTransformation:
    """Multiplies each orthogonalised update by a factor of its matrix's shape.

    "spectral": sqrt(max(1, fan_out / fan_in)); "rms": 0.2 sqrt(max(fan_out, fan_in)), at which
    the update's entries are as large as AdamW's. A leaf is [..., in, out], so fan_in is
    shape[-2] and fan_out shape[-1].

    Raises:
        ValueError: unknown scale.
    Source: "spectral" Keller Jordan, Muon (2024); "rms" Liu et al., Moonlight (2025).
    """
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r} is unknown. Choose one of {', '.join(SCALES)}.")

    def factor(fan_in: int, fan_out: int) -> float:
        if scale == "rms":
            return 0.2 * math.sqrt(max(fan_out, fan_in))
        return math.sqrt(max(1.0, fan_out / fan_in))

    return optax.stateless_with_tree_map(lambda update, _: update * factor(*update.shape[-2:]))


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
) -> optax.GradientTransformation:
    """Muon for matrices: momentum orthogonalised by Newton-Schulz, with decoupled decay.

    p <- (1 - lr weight_decay) p - lr scale orthogonalize(u), with u as in `scale_by_muon`.

    Args:
        learning_rate: a number or an optax schedule.
        momentum, nesterov: as in `scale_by_muon`.
        weight_decay: decoupled, multiplied by the learning rate; 0 is none.
        coefficients, dtype, eps: as in `orthogonalize`.
        scale: "spectral" or "rms", as in `scale_by_matrix_shape`.
    Returns:
        A GradientTransformation over leaves [..., in, out]; `update` needs the parameters.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> params = {"kernel": jnp.zeros([2, 3])}
    >>> optimizer = muon(0.1)
    >>> state = optimizer.init(params)
    >>> gradients = {"kernel": jnp.array([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])}
    >>> updates, state = optimizer.update(gradients, state, params)
    >>> print(jnp.round(jnp.diag(optax.apply_updates(params, updates)["kernel"]), 2))
    [-0.11 -0.14]

    References: Keller Jordan et al., Muon: an optimizer for hidden layers (2024); Amsel et al.,
    The Polar Express (2025), the default coefficients; Liu et al., Muon is scalable for LLM
    training (Moonlight, 2025), weight decay and the scale "rms".
    """
    return optax.chain(
        scale_by_muon(
            momentum=momentum, nesterov=nesterov, coefficients=coefficients, dtype=dtype, eps=eps
        ),
        scale_by_matrix_shape(scale),
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


def _short_side_first(u: jax.Array) -> jax.Array:
    return u.mT if u.shape[-2] > u.shape[-1] else u


def _orthogonalize_all(
    matrices: list[jax.Array], *, coefficients: str, dtype: jax.typing.DTypeLike, eps: float
) -> list[jax.Array]:
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
        batch = orthogonalize(batch, coefficients=coefficients, dtype=dtype, eps=eps)
        for j, i in enumerate(indices):
            is_tall = wide[i] is not matrices[i]
            results[i] = batch[..., j, :, :].mT if is_tall else batch[..., j, :, :]
    return results
