"""Where the heads of an attention module of transformers lie in its weights.

A projection of its own for queries, keys and values, or one for all three: what matters is which
rows of which weight belong to which head. The names are those of the classes of transformers; no
guess is used unchecked: `capture` compares what follows from it with what the attention gets.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qkjax import errors

SIDES = ("query", "key", "value")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
_OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")
_NORMS = {
    "query": ("q_norm", "query_norm", "q_layernorm", "query_layernorm"),
    "key": ("k_norm", "key_norm", "k_layernorm", "key_layernorm"),
}


class Shape(NamedTuple):
    """The numbers of heads of one layer's attention."""

    heads: int
    kv_heads: int
    head_dim: int

    def of(self, side: str) -> int:
        """How many heads queries, keys or values have."""
        return self.heads if side == "query" else self.kv_heads


class Projection(NamedTuple):
    """A linear module, and the outputs of it that belong to each head."""

    module: Any
    outputs: np.ndarray  # [heads, K] indices


def projection_modules(attention: Any) -> list[Any]:
    """The modules that `projections` may name."""
    return [getattr(attention, name) for name in _PROJECTIONS if hasattr(attention, name)]


def projections(attention: Any, shape: Shape) -> dict[str, Projection]:
    """The projections by side; {} where the module has none of the known forms.

    Separate `q_proj`, `k_proj`, `v_proj` (Llama and most others); `qkv_proj`, one after another
    (Phi-3); `c_attn`, likewise (GPT-2); `query_key_value`, head by head (GPT-NeoX).
    """
    H, G, K = shape
    sizes = {side: shape.of(side) * K for side in SIDES}
    if hasattr(attention, "q_proj"):
        modules = (attention.q_proj, attention.k_proj, attention.v_proj)
        return {
            side: Projection(module, np.arange(sizes[side]).reshape(-1, K))
            for side, module in zip(SIDES, modules, strict=True)
        }
    for name in ("qkv_proj", "c_attn"):
        if hasattr(attention, name):
            ends = np.cumsum(list(sizes.values()))
            found = np.split(np.arange(ends[-1]), ends[:-1])
            module = getattr(attention, name)
            return {
                side: Projection(module, rows.reshape(-1, K))
                for side, rows in zip(SIDES, found, strict=True)
            }
    if hasattr(attention, "query_key_value") and H == G:
        rows_H3K = np.arange(3 * H * K).reshape(H, 3, K)
        module = attention.query_key_value
        return {side: Projection(module, rows_H3K[:, i]) for i, side in enumerate(SIDES)}
    return {}


def norm(attention: Any, side: str) -> Any | None:
    """The module that normalises queries or keys; None where there is none."""
    found = (getattr(attention, name, None) for name in _NORMS.get(side, ()))
    return next((module for module in found if module is not None), None)


def takes_vectors(norm: Any) -> bool:
    """Whether a norm is one module with one gamma, or none; StableLM has one per head."""
    weight = getattr(norm, "weight", None)
    return not list(norm.parameters()) if weight is None else weight.ndim == 1


def normalises_all_heads(norm: Any, head_dim: int) -> bool:
    """Whether a norm divides by the length of all heads together, as in OLMo 2, not of each."""
    weight = getattr(norm, "weight", None)
    return weight is not None and weight.numel() > head_dim


def epsilon(norm: Any) -> float | None:
    """The epsilon of an RMSNorm, by transformers' names for it; None where it has neither."""
    found = (getattr(norm, name, None) for name in ("variance_epsilon", "eps"))
    return next((float(value) for value in found if value is not None), None)


def kernels(attention: Any, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """(side, [heads, D, K] float64) of queries, keys, values and output, where they are known."""
    for side, projection in projections(attention, shape).items():
        yield side, _matrix(projection.module)[projection.outputs].swapaxes(1, 2)
    for name in _OUTPUTS:
        if hasattr(attention, name):
            weight_DE = _matrix(getattr(attention, name))
            if weight_DE.shape[1] == shape.heads * shape.head_dim:
                slices = weight_DE.reshape(-1, shape.heads, shape.head_dim)
                yield "output", slices.swapaxes(0, 1)
            return


def _matrix(module: Any) -> np.ndarray:
    """[out, in] float64 of a Linear, or of GPT-2's Conv1D, which stores its transpose.

    Raises:
        UsageError: the weight is quantised.
    """
    weight = module.weight.detach()
    if weight.ndim != 2 or not weight.is_floating_point():
        raise errors.UsageError(
            f"--model: a weight of {type(module).__name__} is {weight.dtype}, expected floats. "
            "Give the model as it was before it was quantised, or a GGUF file."
        )
    matrix = weight.double().cpu().numpy()
    return matrix.T if type(module).__name__ == "Conv1D" else matrix
