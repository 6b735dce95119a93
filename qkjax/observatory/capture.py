"""Queries, keys, values and logits of a decoder of transformers, where every model passes.

The registered attention function sees queries and keys as they enter the attention, and the
values. Keys before RoPE are obtained by the exact inverse of the rotation, from the model's own cos
and sin; before the norm they are outputs of the projections. Both ways must agree: in the first
batch, what the projections and the norm give must be what the inverse gives, for every layer, or
the model is refused. So a form of RoPE, of norm or of fused weights that is not known here cannot
be misread.
Nor can an attention that is: with transformers' own, its logits must be the same.
"""

import inspect
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from qkjax import errors
from qkjax.observatory import heads as heads_lib
from qkjax.observatory.heads import Shape

ATTENTION = "qkjax"  # our name in the registry of transformers
_QUERY_BLOCK = 256  # queries whose logits exist at one time
_HEAD_BLOCK = 512  # positions whose next-token logits exist at one time
_KEPT = 4  # last positions whose logits the model gives itself, to compare
# Of the largest value, within which the projections' way and the attention's must agree: roundings
# of the rotation. bfloat16 and float16 round the rotated vectors themselves.
_AGREE = {"float64": 1e-6, "float32": 1e-4}
_AGREE_HALF = 0.05
_COMPARED = 1_024  # first tokens whose logits transformers' own attention must give too
_EAGER = "eager"  # its name: written out, with all that a class has of its own
# What changes the logits beside the mask, and is not measured here.
_UNKNOWN = ("s_aux", "position_bias", "head_mask", "alibi")
# Layers without keys, by the words of transformers' configs.
_KEYLESS = ("linear_attention", "conv", "moe")


class LayerFacts(NamedTuple):
    """What the attention of one layer is."""

    window: int | None  # how many tokens a query sees at most; None: all before it
    rotary_dim: int  # dimensions of a head that RoPE turns; 0: none
    scaling: float  # of the logits
    softcap: float | None  # logits l become c tanh(l / c)


class LayerVectors(NamedTuple):
    """One layer and batch; what the model does not have is absent."""

    stages: Mapping[str, np.ndarray]  # "key_pre_rope" ... -> [heads, n, K]
    max_logit: np.ndarray  # [H] largest of the batch, after scaling and softcap
    entropy: np.ndarray  # [H] summed over sequences, of the mean over queries, nats
    sink: np.ndarray  # [H] summed over sequences, of the mean probability of position 0


class Look(Protocol):
    """Takes what one layer shows of a batch."""

    def __call__(self, layer: int, seen: LayerVectors) -> None: ...


class Change(NamedTuple):
    """Keys k become k @ matrix + shift."""

    stage: str  # "pre_rope" or "post_rope"
    matrix: np.ndarray  # [N, G, K, K] float32
    shift: np.ndarray  # [N, G, K] float32


class Capture:
    """A model with our attention in it, while entered; afterwards it is as it was.

    Attributes:
        shape: of the attention, equal in all layers; after the first batch.
        facts: by layer; after the first batch.
        gammas: of RMSNorms, by layer and side, [K] or of all heads [heads * K]; likewise.
        modules: of the attention, by layer; while entered.
    """

    def __init__(self, model: Any, name: str = "model") -> None:
        """Args: a decoder of transformers, in torch; `name` is what messages call it.

        Raises:
            UsageError: a model whose keys this cannot measure.
        """
        refuse_unknown(model, name)
        self.model, self.name = model, name
        self.text_config = model.config.get_text_config()
        self.num_layers: int = self.text_config.num_hidden_layers
        self.shape: Shape | None = None
        self.facts: dict[int, LayerFacts] = {}
        self.gammas: dict[tuple[int, str], np.ndarray] = {}
        self.modules: dict[int, Any] = {}
        self._look: Look | None = None
        self._skip_first = False
        self._change: Change | None = None
        self._attention_sequences = 0
        self._rotary: dict[int, tuple[Any, Any] | None] = {}
        self._outputs: dict[Any, Any] = {}  # of projections, by module
        self._hidden: Any = None
        self._layers_called: set[int] = set()
        self._compared = False
        self._handles: list[Any] = []
        self._before = ""

    # ----------------------------------------------------------------------------------------
    # Our attention in the model.

    def __enter__(self) -> "Capture":
        import transformers
        from transformers import masking_utils

        transformers.AttentionInterface.register(ATTENTION, self._attend)
        masking_utils.AttentionMaskInterface.register(ATTENTION, masking_utils.eager_mask)
        self._before = self.model.config._attn_implementation
        self._training = self.model.training
        self.model.eval()
        self.model.set_attn_implementation(ATTENTION)
        for module in self.model.modules():
            layer = getattr(module, "layer_idx", None)
            if type(module).__name__.endswith("Attention") and isinstance(layer, int):
                self.modules[layer] = module
                hook = self._take_rotary
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                for projection in heads_lib.projection_modules(module):
                    take = self._take_output
                    self._handles.append(projection.register_forward_hook(take))
        self._handles.append(self.model.base_model.register_forward_hook(self._take_hidden))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()
        self.model.set_attn_implementation(self._before)
        self.model.train(self._training)

    def _take_rotary(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        found = passed.get("position_embeddings", kwargs.get("position_embeddings"))
        # Cos and sin; another form stays out, so that the layer is refused.
        self._rotary[module.layer_idx] = found if isinstance(found, tuple) else None

    def _take_hidden(self, module: Any, args: Any, output: Any) -> None:
        self._hidden = output[0]

    def _take_output(self, module: Any, args: Any, output: Any) -> None:
        self._outputs[module] = output

    # ----------------------------------------------------------------------------------------
    # Passes.

    def losses(
        self,
        ids: np.ndarray,
        look: Look | None = None,
        *,
        skip_first: bool = False,
        attention_sequences: int = 0,
        change: Change | None = None,
    ) -> np.ndarray:
        """One pass over a batch.

        Args:
            ids: integers [B, T + 1].
            look: gets every layer's vectors, in the order of the layers.
            skip_first: leave the first position of every sequence out of the vectors.
            attention_sequences: the first of the batch whose attention is looked at.
            change: of the keys that enter the attention.
        Returns:
            [B] float64 summed losses of the T predicted positions, nats.
        Raises:
            UsageError: the model is one whose keys this cannot measure, or its logits are not
                what its head makes of its hidden states, or what its own attention gives.
        """
        import torch

        self._look, self._skip_first, self._change = look, skip_first, change
        self._attention_sequences = attention_sequences
        self._layers_called.clear()
        device = self.model.get_input_embeddings().weight.device
        tokens = torch.from_numpy(np.asarray(ids, np.int64)).to(device)
        with torch.inference_mode():
            found = self._last_logits(tokens[:, :-1])
            self._check_layers()
            hidden = self._hidden
            self._check_head(found, self._logits(hidden[:, -_KEPT:]))
            total = torch.zeros(len(tokens), dtype=torch.float64)
            for start in range(0, hidden.shape[1], _HEAD_BLOCK):
                logits = self._logits(hidden[:, start : start + _HEAD_BLOCK])
                targets = tokens[:, start + 1 : start + 1 + logits.shape[1]]
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="none"
                )
                total += losses.view(targets.shape).double().sum(dim=1).cpu()
            if not self._compared:
                self._check_attention(tokens[:1, :_COMPARED])
                self._compared = True
        return total.numpy()

    def _last_logits(self, tokens: Any) -> Any:
        """The model's own logits [B, _KEPT, V] of the last positions."""
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = _KEPT
        return self.model(input_ids=tokens, **options).logits[:, -_KEPT:]

    def _logits(self, hidden: Any) -> Any:
        """Next-token logits [B, t, V] float32 of the last hidden states."""
        stock = self.text_config
        logits = self.model.get_output_embeddings()(hidden).float()
        logits = logits * (getattr(stock, "logit_scale", None) or 1.0)
        logits = logits / (getattr(stock, "logits_scaling", None) or 1.0)
        cap = getattr(stock, "final_logit_softcapping", None)
        return (logits / cap).tanh() * cap if cap else logits

    def _check_head(self, found: Any, ours: Any) -> None:
        reach = float(found.float().abs().max())
        error = float((found.float() - ours).abs().max())
        if not error <= 10 * self._tolerance() * max(reach, 1.0):
            raise errors.UsageError(
                f"{self.name}: its logits are {error:.3g} away from what its output embedding "
                "makes of its last hidden states. This class cannot be measured."
            )

    def _check_attention(self, tokens: Any) -> None:
        """An attention with something of its own must not be measured as if it were plain."""
        self._look, self._change = None, None
        self._layers_called.clear()
        ours = self._last_logits(tokens).float()
        self.model.set_attn_implementation(_EAGER)
        expected = self._last_logits(tokens).float()
        self.model.set_attn_implementation(ATTENTION)
        error = float((ours - expected).abs().max())
        if not error <= 10 * self._tolerance() * max(float(expected.abs().max()), 1.0):
            raise errors.UsageError(
                f"{self.name}: its logits with plain attention are {error:.3g} away from those "
                "with its own, which does something that is not known here. This class cannot be "
                "measured."
            )

    def _check_layers(self) -> None:
        if len(self._layers_called) != self.num_layers:
            raise errors.UsageError(
                f"{self.name}: {len(self._layers_called)} of {self.num_layers} layers have gone "
                "through transformers' attention interface, expected all. This class cannot be "
                "measured (recurrent layers, or an attention of its own)."
            )

    def _tolerance(self) -> float:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return _AGREE.get(dtype, _AGREE_HALF)

    # ----------------------------------------------------------------------------------------
    # The attention.

    def _attend(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        """As the attention functions of transformers: [B, heads, T, K] -> [B, T, H, K]."""
        layer = module.layer_idx
        if layer in self._layers_called:
            raise errors.UsageError(
                f"{self.name}: layer {layer} has more than one attention, expected one. This class "
                "cannot be measured."
            )
        self._layers_called.add(layer)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        allowed = self._allowed(attention_mask, kwargs)
        if layer not in self.facts:
            self._learn(module, query, key, value, scaling, softcap, kwargs)
        if self._look is not None:
            stages = self._stages(module, query, key, value)
            some = slice(0, min(self._attention_sequences, len(query)))
            seen = allowed[some] if len(allowed) > 1 else allowed
            statistics = attention_statistics(query[some], key[some], seen, scaling, softcap)
            self._look(layer, LayerVectors(stages, *statistics))
        for projection in heads_lib.projection_modules(module):
            self._outputs.pop(projection, None)
        if self._change is not None:
            key = self._changed(layer, key, self._change)
        return attend(query, key, value, allowed, scaling, softcap).transpose(1, 2), None

    def _allowed(self, mask: Any, kwargs: Mapping[str, Any]) -> Any:
        """bool [1 or B, 1, T, T]: which keys each query sees."""
        unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
        if unknown:
            raise errors.UsageError(
                f"{self.name}: its attention takes {', '.join(unknown)}, which changes the logits "
                "in a way that is not known here. This class cannot be measured."
            )
        allowed = mask
        if mask is not None and mask.is_floating_point():
            import torch

            allowed = mask == 0
            if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
                raise errors.UsageError(
                    f"{self.name}: its mask adds numbers to the logits, expected one that keeps "
                    "tokens out. This class cannot be measured."
                )
        if allowed is None or bool(allowed.triu(1).any()):
            raise errors.UsageError(
                f"{self.name}: tokens see later ones, so this is an encoder, expected a decoder. "
                "Give a causal language model."
            )
        return allowed

    def _learn(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        scaling: float,
        softcap: float | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        """What the layer is, from the first batch; see the module's docstring."""
        layer = module.layer_idx
        shape = Shape(query.shape[1], key.shape[1], key.shape[-1])
        if value.shape[-1] != shape.head_dim or shape != (self.shape or shape):
            raise errors.UsageError(
                f"{self.name}: layer {layer} has {shape} and values of {value.shape[-1]}, expected "
                f"{self.shape or 'values as long as keys'}. Models whose heads differ cannot be "
                "measured."
            )
        self.shape = shape
        rotary = self._rotary.get(layer)
        for rotary_dim in (rotary[0].shape[-1], 0) if rotary else (0,):
            window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
            self.facts[layer] = LayerFacts(window, rotary_dim, scaling, softcap)
            if self._agrees(module, query, key):
                for side in ("query", "key"):
                    self._learn_gamma(module, side)
                return
        raise errors.UsageError(
            f"{self.name}: the keys of layer {layer} are not those of its projection, norm and "
            "rotate-half RoPE. This class cannot be measured."
        )

    def _agrees(self, module: Any, query: Any, key: Any) -> bool:
        """Whether the inverse of RoPE agrees with what the projections and norms give."""
        for side, vectors in (("query", query), ("key", key)):
            projected, norm = self._projected(module, side), heads_lib.norm(module, side)
            if projected is None or (norm is not None and not heads_lib.takes_vectors(norm)):
                return False
            expected = self._normalised(module, side, projected).float()
            found = self._unrotated(module.layer_idx, vectors)
            error = float((found - expected).abs().max())
            if not error <= self._tolerance() * float(expected.abs().max()):
                return False
        return True

    def _projected(self, module: Any, side: str) -> Any:
        """[B, heads, T, K] of the projection, before any norm; None where it is not known."""
        assert self.shape is not None
        projection = heads_lib.projections(module, self.shape).get(side)
        if projection is None or projection.module not in self._outputs:
            return None
        output_BTE = self._outputs[projection.module]
        return output_BTE[..., projection.outputs].transpose(1, 2)

    def _normalised(self, module: Any, side: str, projected: Any) -> Any:
        """[B, heads, T, K] after the norm of queries or keys, where there is one."""
        norm = heads_lib.norm(module, side)
        if norm is None:
            return projected
        across = heads_lib.normalises_all_heads(norm, projected.shape[-1])
        rows = projected.transpose(1, 2)  # [B, T, heads, K]
        return norm(rows.flatten(2) if across else rows).reshape(rows.shape).transpose(1, 2)

    def _learn_gamma(self, module: Any, side: str) -> None:
        """Keeps the gamma of an RMSNorm, as the norm itself shows it: some store gamma - 1."""
        norm = heads_lib.norm(module, side)
        eps = heads_lib.epsilon(norm)
        if norm is None or eps is None:
            return
        projected = self._projected(module, side)
        rows = projected.transpose(1, 2)
        across = heads_lib.normalises_all_heads(norm, projected.shape[-1])
        ones = rows.new_ones(rows[0, 0].numel() if across else rows.shape[-1])
        gamma = norm(ones).double() * (1 + eps) ** 0.5
        per_head = gamma.reshape(-1, projected.shape[-1])[:, None]  # [1 or heads, 1, K]
        expected = self._normalised(module, side, projected).double()
        error = float((self._divided(module, side, projected) * per_head - expected).abs().max())
        if error <= self._tolerance() * float(expected.abs().max()):  # else it is another norm
            self.gammas[module.layer_idx, side] = gamma.float().cpu().numpy()

    def _divided(self, module: Any, side: str, projected: Any) -> Any:
        """[B, heads, T, K] float64 divided by the root of the mean square, without gamma."""
        norm = heads_lib.norm(module, side)
        squares = projected.double().square()
        if heads_lib.normalises_all_heads(norm, projected.shape[-1]):
            mean = squares.mean(dim=(1, 3), keepdim=True)
        else:
            mean = squares.mean(dim=3, keepdim=True)
        return projected.double() * (mean + heads_lib.epsilon(norm)).rsqrt()

    def _unrotated(self, layer: int, vectors: Any) -> Any:
        """[B, heads, T, K] float64: before RoPE."""
        import torch

        size = self.facts[layer].rotary_dim
        x = vectors.double()
        if not size:
            return x
        cos, sin = (table.double()[:, None] for table in self._rotary[layer] or ())
        turned, kept = x[..., :size], x[..., size:]
        back = turned * cos - _rotate_half(turned) * sin
        # Some models scale cos and sin, as YaRN does.
        return torch.cat([back / (cos**2 + sin**2), kept], dim=-1)

    def _rotated(self, layer: int, vectors: Any) -> Any:
        """[B, heads, T, K] float64: after RoPE."""
        import torch

        size = self.facts[layer].rotary_dim
        if not size:
            return vectors
        cos, sin = (table.double()[:, None] for table in self._rotary[layer] or ())
        turned, kept = vectors[..., :size], vectors[..., size:]
        return torch.cat([turned * cos + _rotate_half(turned) * sin, kept], dim=-1)

    def _stages(self, module: Any, query: Any, key: Any, value: Any) -> dict[str, np.ndarray]:
        """Everything that the layer has of this batch, by stage."""
        layer = module.layer_idx
        stages = {}
        for side, vectors in (("query", query), ("key", key)):
            if heads_lib.norm(module, side) is not None:
                projected = self._projected(module, side)
                stages[f"{side}_pre_norm"] = projected
                if (layer, side) in self.gammas:
                    stages[f"{side}_post_norm"] = self._divided(module, side, projected)
            if self._rotary.get(layer) is not None:
                stages[f"{side}_pre_rope"] = self._unrotated(layer, vectors)
            stages[f"{side}_post_rope"] = vectors
        stages["value"] = value
        first = 1 if self._skip_first else 0
        return {name: _rows(x[:, :, first:]) for name, x in stages.items()}

    def _changed(self, layer: int, key: Any, change: Change) -> Any:
        """The keys of a layer after a change, in their own dtype."""
        import torch

        matrix, shift = (
            torch.from_numpy(x[layer]).to(key.device).double()
            for x in (change.matrix, change.shift)
        )
        before = change.stage == "pre_rope"
        x = self._unrotated(layer, key) if before else key.double()
        x = x @ matrix + shift[:, None]
        return (self._rotated(layer, x) if before else x).to(key.dtype)


def refuse_unknown(model: Any, name: str) -> None:
    """Refuses what shows at once that its keys cannot be measured.

    Raises:
        UsageError: an encoder and decoder, latent attention, layers without keys, or an attention
            that cannot be exchanged.
    """
    stock = model.config
    if getattr(stock, "is_encoder_decoder", False):
        raise errors.UsageError(
            f"{name}: {type(model).__name__} has an encoder, expected a decoder alone. "
            "Give a causal language model."
        )
    if getattr(stock.get_text_config(), "kv_lora_rank", None) is not None:
        raise errors.UsageError(
            f"{name}: {type(model).__name__} has multi-head latent attention, whose heads compute "
            "their keys from a shared latent, expected separate keys. It cannot be measured."
        )
    kinds = getattr(stock.get_text_config(), "layer_types", None) or ()
    keyless = [kind for kind in kinds if kind in _KEYLESS]
    if keyless:
        raise errors.UsageError(
            f"{name}: {len(keyless)} of its {len(kinds)} layers are {keyless[0]}, which has no "
            "keys, expected attention in every layer. It cannot be measured."
        )
    if not model._can_set_attn_implementation() or model.get_output_embeddings() is None:
        raise errors.UsageError(
            f"{name}: {type(model).__name__} has an attention of its own, which transformers "
            "cannot exchange, or no head. It cannot be measured."
        )


# --------------------------------------------------------------------------------------------
# Attention, in torch.


def attend(
    query: Any, key: Any, value: Any, allowed: Any, scaling: float, softcap: float | None
) -> Any:
    """Softmax attention [B, H, T, K] of queries [B, H, T, K] and G heads of keys and values.

    Args:
        allowed: bool [1 or B, 1, T, T].
    """
    import torch

    if softcap is None:
        # Half of the work, where no window cuts into it.
        is_causal = bool((allowed == torch.ones_like(allowed).tril()).all())
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if is_causal else allowed,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=True,
        )
    sharing = query.shape[1] // key.shape[1]
    value = value.repeat_interleave(sharing, dim=1)
    blocks = [
        logits.softmax(dim=-1).to(value.dtype) @ value
        for logits in _logit_blocks(query, key, allowed, scaling, softcap)
    ]
    return torch.cat(blocks, dim=2)


def attention_statistics(
    query: Any, key: Any, allowed: Any, scaling: float, softcap: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`max_logit`, `entropy` and `sink` of `LayerVectors`, each [H]."""
    import torch

    A, H, T, _ = query.shape
    if not A:
        return np.full(H, -np.inf), np.zeros(H), np.zeros(H)
    largest, entropy, sink = [], query.new_zeros(H).double(), query.new_zeros(H).double()
    start = 0
    for logits in _logit_blocks(query, key, allowed, scaling, softcap):
        largest.append(logits.amax(dim=(0, 2, 3)))
        weights = logits.softmax(dim=-1)
        entropy += torch.special.entr(weights).sum(dim=-1).double().sum(dim=(0, 2)) / T
        on_first = weights[:, :, 1 if start == 0 else 0 :, 0]  # the first query sees nothing else
        sink += on_first.double().sum(dim=(0, 2)) / max(T - 1, 1)
        start += logits.shape[2]
    found = torch.stack(largest).amax(dim=0).double(), entropy, sink
    return tuple(x.cpu().numpy() for x in found)  # type: ignore[return-value]


def _logit_blocks(
    query: Any, key: Any, allowed: Any, scaling: float, softcap: float | None
) -> Iterator[Any]:
    """[B, H, t, T] float32 logits of some queries after others; -inf where nothing is seen."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float().transpose(2, 3)
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        logits = (query[:, :, rows].float() @ key) * scaling
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        yield logits.masked_fill(~allowed[:, :, rows], -np.inf)


def _rotate_half(x: Any) -> Any:
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rows(x: Any) -> np.ndarray:
    """[B, heads, T, K] -> [heads, B * T, K], float32 or float64."""
    x = x.transpose(0, 1).flatten(1, 2)
    return (x if str(x.dtype) == "torch.float64" else x.float()).cpu().numpy()
