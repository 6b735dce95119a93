"""qkjax: does QK-Norm collapse attention keys? The study, reimplemented in JAX and Flax."""

from qkjax import xla_flags

xla_flags.set_cpu_flags()  # before anything imports jax
