"""The project's own programs as work to be measured, and other JAX code in their place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import arrays
from qkjax import attention, evaluation, losses, model, optimizer, sharding, train_step
from qkjax import config as config_lib
from qkjax.cli import startup
from qkjax.config import Config
from qkjax.runs import checkpoint, resources

startup.keep_freed_memory()  # as every command of the project does; the peers run as torch comes


class JaxWork:
    """What all have in common."""

    def device(self) -> str | None:
        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind

    def peak_bytes(self) -> int | None:
        statistics = jax.devices()[0].memory_stats()
        return None if statistics is None else statistics["peak_bytes_in_use"]


class Step(JaxWork):
    """`train_step` as a run compiles it: forward, backward, clipping, optimiser, checks."""

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = self.settle(config_lib.from_dict(spec["config"]))
        mesh = sharding.make_mesh()
        params, tokens = self.load(settings, spec)
        transformation = self.transformation(settings, params)
        state = train_step.TrainState(
            jnp.int32(0), params, transformation.init(params), jnp.ones((), bool)
        )
        self._state = jax.device_put(state, sharding.replicated(mesh))
        self._tokens = sharding.put_batch(mesh, tokens)
        step = train_step.make_train_step(settings, transformation, mesh)
        self._step = resources.compile_step(step, settings, self._state, mesh)

    def settle(self, settings: Config) -> Config:
        """The config that is really measured."""
        return settings

    def load(self, settings: Config, spec: dict[str, Any]) -> tuple[model.Params, np.ndarray]:
        """Parameters, and one batch of tokens [B, T+1]."""
        inputs = np.load(spec["inputs"])
        return _params(settings, inputs), inputs["tokens"]

    def transformation(self, settings: Config, params: Any) -> optax.GradientTransformation:
        return optimizer.make_optimizer(settings, params)

    def first(self) -> dict[str, float]:
        self._state, metrics = self._step(self._state, self._tokens)
        return {"loss": float(metrics.loss), "grad_norm": float(metrics.grad_norm)}

    def repeat(self, times: int) -> None:
        for _ in range(times):
            self._state, metrics = self._step(self._state, self._tokens)
        jax.block_until_ready(metrics)


class AdamWStep(Step):
    """The step of a Muon arm with AdamW in Muon's place."""

    def settle(self, settings: Config) -> Config:
        return dataclasses.replace(
            settings, optimizer=dataclasses.replace(settings.optimizer, name="adamw")
        )


class OptaxMuonStep(Step):
    """The step of a Muon arm with `optax.contrib.muon`, which is told which axes are matrices."""

    def transformation(self, settings: Config, params: Any) -> optax.GradientTransformation:
        o = settings.optimizer
        # Layers are stacked in front: what is neither reduced nor put out is a batch.
        axes = jax.tree.map(
            lambda leaf: optax.contrib.MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None,
            params,
        )
        muon = optax.contrib.muon(
            o.learning_rate,
            beta=settings.muon.momentum,
            weight_decay=o.weight_decay,
            nesterov=settings.muon.nesterov,
            adam_b1=o.beta1,
            adam_b2=o.beta2,
            adam_learning_rate=o.auxiliary_learning_rate,
            muon_weight_dimension_numbers=axes,
        )
        return optax.chain(optax.clip_by_global_norm(o.clip_norm), muon) if o.clip_norm else muon


class _Gradient(JaxWork):
    """A function of arrays and its gradients; subclasses set `_inputs` and `_gradient`."""

    _inputs: tuple[Any, ...]
    _gradient: Callable[..., tuple[jax.Array, Any]]

    def _differentiate(self, function: Callable[..., jax.Array], by: tuple[int, ...]) -> None:
        self._gradient = jax.jit(jax.value_and_grad(function, argnums=by))

    def first(self) -> dict[str, float]:
        value, gradients = self._gradient(*self._inputs)
        return {"value": float(value), "grad_norm": float(optax.global_norm(gradients))}

    def repeat(self, times: int) -> None:
        for _ in range(times):
            out = self._gradient(*self._inputs)
        jax.block_until_ready(out)


class _Attention(_Gradient):
    """Attention forward and backward at the shapes of one layer."""

    implementation: str

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = config_lib.from_dict(spec["config"])
        dtype = jnp.dtype(settings.model.dtype)
        *vectors, weight = arrays.attention_inputs(settings)
        self._inputs = (*(jnp.asarray(x, dtype) for x in vectors), jnp.asarray(weight))

        def value(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array) -> jax.Array:
            out = attention.causal_attention(q, k, v, implementation=self.implementation)
            return jnp.square(out.astype(jnp.float32) - weight).sum()

        self._differentiate(value, (0, 1, 2))


class XlaAttention(_Attention):
    implementation = "xla"


class BlockedAttention(_Attention):
    implementation = "blocked"


class CudnnAttention(_Attention):
    implementation = "cudnn"


class ChunkedLoss(_Gradient):
    """The loss and its gradients by hidden states and table."""

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = config_lib.from_dict(spec["config"])
        hidden, table, targets = arrays.loss_inputs(settings)
        dtype = jnp.dtype(settings.model.dtype)
        self._inputs = (jnp.asarray(hidden, dtype), jnp.asarray(table), jnp.asarray(targets))
        self._chunk_tokens = settings.train.loss_chunk_tokens
        self._differentiate(self.value, (0, 1))

    def value(self, hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        total = losses.next_token_loss(hidden, table, targets, chunk_tokens=self._chunk_tokens)
        return total / targets.size


class PlainLoss(ChunkedLoss):
    """With the logits of all positions at one time."""

    def value(self, hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class LossEvaluation(JaxWork):
    """The validation loss of one batch, without any other measure."""

    def __init__(self, spec: dict[str, Any]) -> None:
        settings = config_lib.from_dict(spec["config"])
        inputs = np.load(spec["inputs"])
        self._mesh = sharding.make_mesh()
        self._params = jax.device_put(_params(settings, inputs), sharding.replicated(self._mesh))
        self._tokens = sharding.put_batch(self._mesh, inputs["tokens"])
        self._valid = sharding.put_batch(self._mesh, np.ones(len(inputs["tokens"]), bool))
        self.compile(settings)

    def compile(self, settings: Config) -> None:
        self._step: Any = evaluation.make_loss_step(settings, self._mesh)

    def evaluate(self) -> jax.Array:
        """Losses of the sequences."""
        return self._step(self._params, self._tokens, self._valid)

    def first(self) -> dict[str, float]:
        return {"loss": float(self.evaluate().sum() / self._tokens[:, 1:].size)}

    def repeat(self, times: int) -> None:
        for _ in range(times):
            out = self.evaluate()
        jax.block_until_ready(out)


class FullEvaluation(LossEvaluation):
    """The same with every measure of keys, queries and values; the decomposition not included."""

    def compile(self, settings: Config) -> None:
        self._step = evaluation.make_eval_step(settings, self._mesh)
        self._statistics = evaluation.empty_statistics(settings, self._mesh)

    def evaluate(self) -> jax.Array:
        self._statistics, losses = self._step(
            self._params, self._statistics, self._tokens, self._valid
        )
        return losses


def _params(settings: Config, inputs: Any) -> model.Params:
    shapes = model.parameter_shapes(settings.model)
    leaves = [inputs[f"params/{name}"] for name in checkpoint.leaf_names(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
