"""Next-token loss in chunks: no [B, T, V] buffer, neither forward nor backward.

The logits of 65,536 tokens at a vocabulary of 49,152 are 12.9 GB in float32. The tokens are cut
along T, so that the batch axis stays sharded over the data mesh in every chunk. The loss is a
plain sum: its gradients are complete once a chunk's logits are known, so they are computed in the
forward pass and the backward pass only scales them; logits are never computed twice.

Matmuls take hidden's dtype and accumulate in float32 (`precision=None`: on GPUs float32 inputs
run as TF32, which is the training speed asked for; on CPU float32 is exact float32).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def next_token_loss(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> jax.Array:
    """Sum over all positions of -log softmax(hidden @ table^T)[target], in nats.

    Args:
        hidden_BTD: [B, T, D] output of the final norm, float32 or bfloat16.
        table_VD: [V, D] output embedding; cast to hidden's dtype for the matmuls.
        targets_BT: [B, T] integer ids in [0, V); the host has checked them.
        chunk_tokens: about how many tokens of the whole batch one chunk holds, at least 1.
    Returns:
        [] float32 sum. Its gradients have the dtypes of hidden and table; the table's is
        accumulated in float32 over the chunks.
    Raises:
        ValueError: shapes that do not fit together, or chunk_tokens below 1.
    """
    chunk_length = _chunk_length(hidden_BTD, table_VD, targets_BT, chunk_tokens)
    return _summed_loss(chunk_length, hidden_BTD, table_VD, targets_BT)


def token_losses(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, chunk_tokens: int
) -> jax.Array:
    """Sums of -log softmax(hidden @ table^T)[target] per sequence, for evaluation.

    Args and errors: as `next_token_loss`, whose value is the sum of these.
    Returns:
        [B] float32 sums over T, in nats. Differentiable, but only `next_token_loss` saves memory.
    """
    chunk_length = _chunk_length(hidden_BTD, table_VD, targets_BT, chunk_tokens)
    return _sequence_losses(chunk_length, hidden_BTD, table_VD, targets_BT)


def _chunk_length(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk_tokens: int
) -> int:
    """Positions along T in one chunk: few chunks, as equal as can be, so that padding is small."""
    if hidden_BTD.shape[:2] != targets_BT.shape or hidden_BTD.shape[-1] != table_VD.shape[-1]:
        raise ValueError(
            "hidden, table and targets must be [B, T, D], [V, D] and [B, T], found "
            f"{hidden_BTD.shape}, {table_VD.shape} and {targets_BT.shape}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, found {chunk_tokens}")
    batch_size, length = targets_BT.shape
    longest = max(1, chunk_tokens // max(1, batch_size))
    num_chunks = max(1, -(-length // longest))
    return max(1, -(-length // num_chunks))


def _chunks(
    chunk_length: int, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts T into equal chunks, chunk axis first; `valid` is False where T was padded."""
    batch_size, length = targets_BT.shape
    num_chunks = -(-length // chunk_length)
    padding = num_chunks * chunk_length - length
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    hidden = hidden.reshape(batch_size, num_chunks, chunk_length, hidden_BTD.shape[-1])
    targets = targets.reshape(batch_size, num_chunks, chunk_length)
    valid = (jnp.arange(num_chunks * chunk_length) < length).reshape(num_chunks, 1, chunk_length)
    return jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0), valid


def _logits(hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """[V, N] float32 of all N = B T positions.

    V comes first for the sake of CPUs: maxima and sums over V are then sums of rows, which XLA
    vectorises, and the table's gradient needs no transposed operand (docs/performance.md).
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return jnp.einsum("VD,ND->VN", table_VD, hidden_ND, preferred_element_type=jnp.float32)


def _position_losses(
    logits_VN: jax.Array, targets_BT: jax.Array, valid_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss [B, T] of every position, 0 where it is padding; log of the denominators [N]."""
    log_sum_N = _log_sum_exp(logits_VN)
    target_N = jnp.take_along_axis(logits_VN, targets_BT.reshape(1, -1), axis=0)[0]
    losses_BT = (log_sum_N - target_N).reshape(targets_BT.shape)
    return jnp.where(valid_BT, losses_BT, 0.0), log_sum_N


@jax.custom_jvp
def _log_sum_exp(logits_VN: jax.Array) -> jax.Array:
    """log of the sum of exp over V, [N] float32."""
    return jax.lax.platform_dependent(
        logits_VN, cuda=_in_one_pass, default=functools.partial(jax.nn.logsumexp, axis=0)
    )


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    log_sum_N = _log_sum_exp(*primals)
    return log_sum_N, (jnp.exp(primals[0] - log_sum_N) * tangents[0]).sum(axis=0)


def _in_one_pass(logits_VN: jax.Array) -> jax.Array:
    """The same with the maximum and the sum in one reading of the logits.

    Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax".
    """

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
        (largest_a, sum_a), (largest_b, sum_b) = a, b
        largest = jnp.maximum(largest_a, largest_b)
        return largest, sum_a * jnp.exp(largest_a - largest) + sum_b * jnp.exp(largest_b - largest)

    # Not -inf: of two empty parts exp(-inf - -inf) would be NaN.
    nothing = (jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0))
    largest_N, sum_N = jax.lax.reduce((logits_VN, jnp.ones_like(logits_VN)), nothing, join, (0,))
    return largest_N + jnp.log(sum_N)


def _sequence_losses(
    chunk_length: int, hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    table = table_VD.astype(hidden_BTD.dtype)

    def add_chunk(
        total_B: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        hidden, targets, valid = chunk
        losses, _ = _position_losses(_logits(hidden, table), targets, valid)
        return total_B + losses.sum(axis=1), None

    start = jnp.zeros(hidden_BTD.shape[0], jnp.float32)
    total_B, _ = jax.lax.scan(add_chunk, start, _chunks(chunk_length, hidden_BTD, targets_BT))
    return total_B


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(
    chunk_length: int, hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    return _sequence_losses(chunk_length, hidden_BTD, table_VD, targets_BT).sum()


def _summed_loss_forward(
    chunk_length: int, hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    dtype = hidden_BTD.dtype
    table = table_VD.astype(dtype)
    ids_V = jnp.arange(table.shape[0])

    def add_chunk(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total_B, table_gradient = carry
        hidden, targets, valid = chunk
        logits = _logits(hidden, table)
        losses, log_sum = _position_losses(logits, targets, valid)
        # A comparison instead of a scatter: it fuses with the softmax, in one pass over V.
        is_target = ids_V[:, None] == targets.reshape(-1)
        # Padded positions need no mask here: their hidden is 0 and their own gradient is cut off.
        gradient = (jnp.exp(logits - log_sum) - is_target).astype(dtype)
        hidden_gradient = jnp.einsum(
            "VD,VN->DN", table, gradient, preferred_element_type=jnp.float32
        )
        table_gradient += jnp.einsum(
            "VN,ND->VD",
            gradient,
            hidden.reshape(-1, hidden.shape[-1]),
            preferred_element_type=jnp.float32,
        )
        # The barrier keeps the transposition out of the product, which it would make slow.
        hidden_gradient = jax.lax.optimization_barrier(hidden_gradient.astype(dtype)).T
        hidden_gradient = hidden_gradient.reshape(hidden.shape)
        return (total_B + losses.sum(axis=1), table_gradient), hidden_gradient

    start = (jnp.zeros(hidden_BTD.shape[0], jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total_B, table_gradient), hidden_gradient = jax.lax.scan(
        add_chunk, start, _chunks(chunk_length, hidden_BTD, targets_BT)
    )
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1)
    hidden_gradient = hidden_gradient.reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[-1])
    hidden_gradient = hidden_gradient[:, : hidden_BTD.shape[1]]
    # The empty array only carries the table's dtype: residuals must be arrays.
    return total_B.sum(), (hidden_gradient, table_gradient, jnp.zeros(0, table_VD.dtype))


def _summed_loss_backward(
    chunk_length: int, gradients: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    hidden_gradient, table_gradient, table_like = gradients
    return (
        (scale * hidden_gradient).astype(hidden_gradient.dtype),
        (scale * table_gradient).astype(table_like.dtype),
        None,
    )


_summed_loss.defvjp(_summed_loss_forward, _summed_loss_backward)
