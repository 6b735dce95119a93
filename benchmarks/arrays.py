"""Inputs of the parts of a step, the same numbers in every process and library."""

import numpy as np

from qkjax.config import Config


def attention_inputs(config: Config) -> list[np.ndarray]:
    """q [B, T, H, K], k and v [B, T, G, K], and what the output is compared with, float32."""
    c = config.model
    normal = np.random.default_rng(0).standard_normal
    leading = (config.train.sequences_per_step, c.sequence_length)
    heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads, c.num_heads)
    return [normal((*leading, number, c.head_dim), np.float32) for number in heads]


def loss_inputs(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [B, T, D] and table [V, D], float32, and targets [B, T] int32."""
    c = config.model
    generator = np.random.default_rng(0)
    leading = (config.train.sequences_per_step, c.sequence_length)
    hidden = generator.standard_normal((*leading, c.d_model), np.float32)
    table = 0.02 * generator.standard_normal((c.vocab_size, c.d_model), np.float32)
    return hidden, table, generator.integers(0, c.vocab_size, leading, np.int32)
