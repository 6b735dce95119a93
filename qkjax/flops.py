"""Floating-point work per token, and the peaks of devices: the two halves of MFU."""

from qkjax import chips
from qkjax.config import ModelConfig


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s; None where it is not known (CPUs)."""
    chip = chips.of_kind(device_kind)
    return None if chip is None else chip.bfloat16


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters, the tied embedding counted once.

    docs/science.md section 2: no biases, two gammas per layer and one at the end, with QK-Norm one
    gamma_q and one gamma_k of head_dim per layer.
    """
    d, heads, kv_heads = config.d_model, config.num_heads, config.num_kv_heads
    attention = 2 * d * config.head_dim * (heads + kv_heads)
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.d_ff
    gammas = 2 * d + (2 * config.head_dim if config.qk_norm != "none" else 0)
    return config.vocab_size * d + config.num_layers * (attention + mlp + gammas) + d


def training_flops_per_token(
    config: ModelConfig, num_parameters: int, *, causal: bool = False
) -> float:
    """Forward and backward FLOP per trained token: 6 N + 12 N_layers H K T.

    The convention of PaLM (Chowdhery et al. 2022, appendix B): all parameters (here the tied
    embedding once, as the output head), and attention over the full T x T square, though causal.

    Args:
        causal: count half of the square, what a causal kernel computes.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    length = config.sequence_length / 2 if causal else config.sequence_length
    return 6.0 * num_parameters + attention * length
