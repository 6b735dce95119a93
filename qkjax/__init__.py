"""qkjax: does QK-Norm collapse attention keys? The study, reimplemented in JAX and Flax.

Importing it changes nothing. Commands compute under settings of the process that must be set before
jax is imported; a notebook or script that should give the same bits starts with

    import qkjax

    qkjax.prepare_process()
"""

from qkjax.cli.startup import prepare_process

__all__ = ["__version__", "prepare_process"]
__version__ = "0.1.0"
