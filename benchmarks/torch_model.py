"""The decoder in PyTorch, as plainly as it can be written, to compare speed with.

The same architecture as `qkjax.model`, parameters float32 and computed in the config's dtype. It is
a peer and no reference: `tests/test_benchmark.py` holds it to the same loss and gradients.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkjax.config import ModelConfig


class Linear(nn.Linear):
    """Without bias, in the dtype of its input."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """In float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.gamma.shape, self.gamma, self.eps)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.query = Linear(c.d_model, c.num_heads * c.head_dim)
        self.key = Linear(c.d_model, c.num_kv_heads * c.head_dim)
        self.value = Linear(c.d_model, c.num_kv_heads * c.head_dim)
        self.output = Linear(c.num_heads * c.head_dim, c.d_model)
        if c.qk_norm == "learned":
            self.query_norm: nn.Module = RMSNorm(c.head_dim, c.norm_eps)
            self.key_norm: nn.Module = RMSNorm(c.head_dim, c.norm_eps)
        else:
            self.query_norm, self.key_norm = nn.Identity(), nn.Identity()

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        K, dtype = self.config.head_dim, x_BTD.dtype
        q = rotate(self.query_norm(self.query(x_BTD).view(B, T, -1, K)), cos, sin).to(dtype)
        k = rotate(self.key_norm(self.key(x_BTD).view(B, T, -1, K)), cos, sin).to(dtype)
        v = self.value(x_BTD).view(B, T, -1, K)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self.output(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(c.d_model, c.d_ff) if c.mlp == "swiglu" else None
        self.up = Linear(c.d_model, c.d_ff)
        self.down = Linear(c.d_ff, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        hidden = F.relu(up).square() if self.gate is None else F.silu(self.gate(x)) * up
        return self.down(hidden)


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x).to(x.dtype), cos, sin)
        return x + self.mlp(self.mlp_norm(x).to(x.dtype))


class Decoder(nn.Module):
    """Final hidden states [B, T, D] of tokens [B, T]."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.dtype = getattr(torch, c.dtype)
        self.embedding = nn.Parameter(torch.empty(c.vocab_size, c.d_model))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_norm = RMSNorm(c.d_model, c.norm_eps)
        frequencies = c.rope_base ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.arange(c.sequence_length)[:, None] * frequencies
        self.register_buffer("cos", angles.cos()[:, None, :])
        self.register_buffer("sin", angles.sin()[:, None, :])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = (F.embedding(tokens_BT, self.embedding) * math.sqrt(self.embedding.shape[1])).to(
            self.dtype
        )
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.final_norm(x).to(self.dtype)

    @torch.no_grad()
    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Copies the project's parameters, by name: stacked layers, kernels [in, out]."""
        for name, leaf in params.items():
            for target, value in self._targets(name, torch.from_numpy(leaf)):
                target.copy_(value)

    def _targets(self, name: str, leaf: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        if not name.startswith("blocks/"):
            return [(self.get_parameter(name.replace("/", ".")), leaf)]
        inner = name.removeprefix("blocks/").replace("/kernel", "/weight").replace("/", ".")
        is_kernel = inner.endswith("weight")
        return [
            (block.get_parameter(inner), leaf[i].T if is_kernel else leaf[i])
            for i, block in enumerate(self.blocks)
        ]


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in float32, rotate-half."""
    first, second = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
