"""The frozen validation split: loss and key spectra, accumulated and decomposed under jit.

All stages live in ONE factor, along its heads axis, so that no two QR or SVD calls of a program
are independent of each other. On CPU a batched LAPACK call waits for the thread pool that it runs
on: two at a time leave a pool of two threads waiting for itself, for ever (jaxlib 0.10.2).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qkjax import losses, model, sharding, spectral
from qkjax.config import Config

STAGES = ("key_pre_rope", "key_post_rope")


class Spectra(NamedTuple):
    """What the factors of a whole evaluation decompose into."""

    metrics: dict[str, jax.Array]  # DESIGN.md section 4's metric name -> [] float32
    arrays: dict[str, jax.Array]  # its array name -> float32


EvalStep = Callable[
    [model.Params, spectral.Factor, jax.Array, jax.Array], tuple[spectral.Factor, jax.Array]
]


def empty_factor(config: Config) -> spectral.Factor:
    """The start of an evaluation: no vectors seen; leading axes [N, stages * heads]."""
    c = config.model
    return spectral.empty_factor((c.num_layers, len(STAGES) * c.num_kv_heads), c.head_dim)


def make_eval_step(config: Config, mesh: Mesh) -> EvalStep:
    """Compiles `step(params, factor, tokens [B, T+1], valid [B]) -> (factor, loss_sum [B])`.

    tokens and valid are sharded over `data`. Rows that are not valid count nowhere; loss_sum is
    the float32 sum over the T predicted positions of each row, in nats.
    """

    def step(
        params: model.Params, factor: spectral.Factor, tokens: jax.Array, valid: jax.Array
    ) -> tuple[spectral.Factor, jax.Array]:
        hidden, seen = model.apply_with_probe(params, tokens[:, :-1], config.model, _probe)
        loss_sum = losses.token_losses(
            hidden,
            params["embedding"],
            tokens[:, 1:],
            chunk_tokens=config.train.loss_chunk_tokens * mesh.size,
        )
        merged = spectral.merge(factor, _over_sequences(seen, valid))
        return merged, jnp.where(valid, loss_sum, 0.0)

    replicated, over_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(replicated, replicated, over_rows, over_rows),
        out_shardings=(replicated, replicated),
        donate_argnums=1,
    )


@jax.jit
def decompose(factor: spectral.Factor) -> Spectra:
    """Singular values of every layer and head, and their participation ratios' means.

    A metric is the mean over heads, then over layers.
    """
    metrics, arrays = {}, {}
    heads = jnp.split(factor.mean, len(STAGES), axis=1)
    for stage, mean in zip(STAGES, heads, strict=True):
        arrays[f"{stage}_mean"] = mean
    spectra = spectral.singular_values_raw_and_centred(factor)
    for centring, sigmas in zip(("raw", "centred"), spectra, strict=True):
        for stage, sigma in zip(STAGES, jnp.split(sigmas, len(STAGES), axis=1), strict=True):
            arrays[f"{stage}_{centring}"] = sigma
            ratio = spectral.participation_ratio(sigma)
            vectors, _, rope = stage.partition("_")
            metrics[f"pr/{vectors}/{rope}/{centring}"] = ratio.mean(axis=1).mean(axis=0)
    arrays["num_tokens"] = factor.count[0, 0].astype(jnp.float32)
    return Spectra(metrics, arrays)


def _probe(vectors: model.HeadVectors) -> spectral.Factor:
    """One factor per sequence, [B, stages * heads]: a sharded batch needs no exchange for it."""
    stages = jnp.concatenate([vectors.key_pre_BTGK, vectors.key_post_BTGK], axis=2)
    return spectral.factor(stages.swapaxes(1, 2))


def _over_sequences(seen: spectral.Factor, valid: jax.Array) -> spectral.Factor:
    """Merges [N, B, heads] over the valid sequences to [N, heads]."""
    counted = seen._replace(count=jnp.where(valid[None, :, None], seen.count, 0))
    return spectral.merge_leading_axis(jax.tree.map(lambda x: x.swapaxes(0, 1), counted))
