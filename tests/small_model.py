"""A model of 2 layers on made-up tokens: its compiled update and evaluation, without a run."""

import functools
import importlib.metadata
import zlib

import jax
import numpy as np

from qkjax import after_update, evaluation, model, optimizer, sharding, train_step
from qkjax import config as config_lib
from qkjax.data import pipeline
from qkjax.runs import checkpoint

# XLA options for programs that are compiled often and run once.
QUICK: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the option
    QUICK["xla_cpu_use_fusion_emitters"] = False

SMALL = {  # N 2, D 32, H 4, G 2, K 8, F 48, V 64, T 16
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 48,
    "model.vocab_size": 64,
    "model.sequence_length": 16,
}
STEP = {  # 16 sequences a step
    "train.tokens_per_step": 256,
    "train.tokens": 256 * 40,
    "train.microbatch_sequences": 0,
    "train.loss_chunk_tokens": 100,
}


def small(optimizer_name, qk_norm, words="tiny", **fields):
    """A small config; `fields` are dotted names with '__' for the dot."""
    given = config_lib.base(optimizer_name, qk_norm, words)
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    given.update_from_flattened_dict(SMALL | STEP | changes)
    return config_lib.resolve(given).for_platform("cpu")


def by_name(tree):
    return dict(zip(checkpoint.leaf_names(tree), jax.tree.leaves(tree), strict=True))


def initial_params(c, scale=0.05, gamma_spread=0.0):
    """Numbers that depend on a tensor's name alone; gammas around 1."""

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal
        numbers = normal(leaf.shape, np.float32)
        return 1 + gamma_spread * numbers if name.endswith("gamma") else scale * numbers

    return jax.tree_util.tree_map_with_path(value, model.parameter_shapes(c.model))


def batch(c, seed=0):
    shape = (c.train.sequences_per_step, c.model.sequence_length + 1)
    return np.random.default_rng(seed).integers(0, c.model.vocab_size, shape, np.int32)


class Trainer:
    """A compiled step, and states for it to donate."""

    def __init__(self, c, transformation=None):
        shapes = model.parameter_shapes(c.model)
        self.config, self.mesh = c, sharding.make_mesh()
        self.transformation = transformation or optimizer.make_optimizer(c, shapes)
        step = train_step.make_train_step(c, self.transformation, self.mesh)
        self.hooks = after_update.make_programs(c, self.mesh)
        tokens = jax.ShapeDtypeStruct(batch(c).shape, np.int32)
        state_shapes = train_step.state_shapes(c, self.transformation)
        self.compiled = step.lower(state_shapes, tokens).compile(compiler_options=QUICK)
        self._opt_state_shapes = state_shapes.opt_state

    def state(self, params):
        """The state before the first update; every optimiser here starts at 0."""
        opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._opt_state_shapes)
        state = train_step.TrainState(np.int32(0), params, opt_state, np.bool_(True))
        placed = train_step.state_shardings(self.config, self.transformation, self.mesh)
        return jax.device_put(state, placed)

    def step(self, state, tokens):
        tokens = sharding.put_batch(self.mesh, tokens)
        measured = self.hooks.measure(state.params, tokens)
        state, metrics = self.compiled(state, tokens)
        params, self.rows = self.hooks.apply(state.params, measured, state.finite)
        return state._replace(params=params), metrics

    def run(self, params, steps, repeated=False):
        """The state after `steps` updates, and the metrics of each."""
        state, seen = self.state(params), []
        for i in range(steps):
            state, metrics = self.step(state, batch(self.config, 0 if repeated else i))
            seen.append(jax.device_get(metrics))
        return jax.device_get(state), seen


def skewed_sequences(count):
    """[count, T+1] tokens of which few are frequent, so that the mean key is far from 0."""
    length = SMALL["model.sequence_length"] + 1
    numbers = np.random.default_rng(3).geometric(0.2, (count, length))
    return np.minimum(numbers, SMALL["model.vocab_size"] - 1).astype(np.int32)


def validation_batches(sequences, size):
    """Rows [count, T+1] in batches of `size`, the last one padded."""
    for start in range(0, len(sequences), size):
        rows = sequences[start : start + size]
        tokens = np.zeros((size, sequences.shape[1]), np.int32)
        tokens[: len(rows)] = rows
        yield pipeline.ValidationBatch(tokens, np.arange(size) < len(rows))


def compile_quickly(jitted, arguments):
    return jitted.lower(*arguments).compile(compiler_options=QUICK)


class Measurer:
    """An Evaluator whose step is compiled quickly."""

    def __init__(self, c):
        self.mesh = sharding.make_mesh()
        self.evaluator = evaluation.Evaluator(c, self.mesh)
        self.size = self.evaluator.sequences_per_batch(10**6)
        self.evaluator._compile = compile_quickly

    def __call__(self, params, sequences, interrupted=lambda: False):
        params = jax.device_put(params, sharding.replicated(self.mesh))
        batches = validation_batches(sequences, self.size)
        return self.evaluator(params, batches, interrupted)


def measured_config(qk_norm, batch_sequences):
    fields = {"eval__batch_sequences": batch_sequences, "train__loss_chunk_tokens": 50}
    return small("adamw", qk_norm, **fields)


def measured_params(c):
    """Larger matrices, and gammas away from 1: every mistake shows."""
    return initial_params(c, scale=0.2, gamma_spread=0.3)


@functools.cache
def learned():
    """QK-Norm; 3 sequences a batch and device."""
    c = measured_config("learned", 3)
    return c, Measurer(c), measured_params(c)
