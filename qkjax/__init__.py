"""qkjax: does QK-Norm collapse attention keys? The study, reimplemented in JAX and Flax."""

from qkjax.cli import startup

startup.prepare_process()  # before anything imports numpy or jax
