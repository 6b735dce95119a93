"""The frozen validation split: loss and key spectra, accumulated and decomposed under jit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qkjax import losses, model, sharding, spectral
from qkjax.config import Config

Factors = dict[str, spectral.Factor]  # stage -> factor with leading axes [N, heads]
STAGES = ("key_pre_rope", "key_post_rope")
CENTRING = {"raw": False, "centred": True}


class Spectra(NamedTuple):
    """What the factors of a whole evaluation decompose into."""

    metrics: dict[str, jax.Array]  # DESIGN.md section 4's metric name -> [] float32
    arrays: dict[str, jax.Array]  # its array name -> float32


EvalStep = Callable[[model.Params, Factors, jax.Array, jax.Array], tuple[Factors, jax.Array]]


def empty_factors(config: Config) -> Factors:
    """The start of an evaluation: no vectors seen."""
    c = config.model
    return {
        stage: spectral.empty_factor((c.num_layers, c.num_kv_heads), c.head_dim) for stage in STAGES
    }


def make_eval_step(config: Config, mesh: Mesh) -> EvalStep:
    """Compiles `step(params, factors, tokens [B, T+1], valid [B]) -> (factors, loss_sum [B])`.

    tokens and valid are sharded over `data`. Rows that are not valid count nowhere; loss_sum is
    the float32 sum over the T predicted positions of each row, in nats.
    """

    def step(
        params: model.Params, factors: Factors, tokens: jax.Array, valid: jax.Array
    ) -> tuple[Factors, jax.Array]:
        hidden, seen = model.apply_with_probe(params, tokens[:, :-1], config.model, _probe)
        loss_sum = losses.token_losses(
            hidden,
            params["embedding"],
            tokens[:, 1:],
            chunk_tokens=config.train.loss_chunk_tokens * mesh.size,
        )
        merged = {
            stage: spectral.merge(factors[stage], _over_sequences(seen[stage], valid))
            for stage in STAGES
        }
        return merged, jnp.where(valid, loss_sum, 0.0)

    replicated, over_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(replicated, replicated, over_rows, over_rows),
        out_shardings=(replicated, replicated),
        donate_argnums=1,
    )


@jax.jit
def decompose(factors: Factors) -> Spectra:
    """Singular values of every layer and head, and their participation ratios' means.

    A metric is the mean over heads, then over layers.
    """
    metrics, arrays = {}, {}
    for stage in STAGES:
        vectors, _, rope = stage.partition("_")
        for centring, centred in CENTRING.items():
            sigma = spectral.singular_values(factors[stage], centred)
            arrays[f"{stage}_{centring}"] = sigma
            ratio = spectral.participation_ratio(sigma)
            metrics[f"pr/{vectors}/{rope}/{centring}"] = ratio.mean(axis=1).mean(axis=0)
        arrays[f"{stage}_mean"] = factors[stage].mean
    arrays["num_tokens"] = factors[STAGES[0]].count[0, 0].astype(jnp.float32)
    return Spectra(metrics, arrays)


def _probe(vectors: model.HeadVectors) -> Factors:
    """One factor per sequence and head, [B, heads]: a sharded batch needs no exchange for it."""
    return {
        "key_pre_rope": spectral.factor(vectors.key_pre_BTGK.swapaxes(1, 2)),
        "key_post_rope": spectral.factor(vectors.key_post_BTGK.swapaxes(1, 2)),
    }


def _over_sequences(seen: spectral.Factor, valid: jax.Array) -> spectral.Factor:
    """Merges [N, B, heads] over the valid sequences to [N, heads]."""
    counted = seen._replace(count=jnp.where(valid[None, :, None], seen.count, 0))
    return spectral.merge_leading_axis(jax.tree.map(lambda x: x.swapaxes(0, 1), counted))
