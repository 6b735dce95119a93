"""Floating-point work per token, and what the chips can do: the two halves of MFU."""

from qkjax.config import ModelConfig

# Dense bfloat16 peaks from the makers' datasheets, FLOP/s, by jax's `device_kind`.
_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of one device in FLOP/s; None where it is not known (CPUs)."""
    return _PEAKS.get(device_kind)


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters, the tied embedding counted once.

    docs/science.md section 2: no biases, two gammas a layer and one at the end, with QK-Norm one
    gamma_q and one gamma_k of head_dim a layer.
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
