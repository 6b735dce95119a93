"""PyTorch doing the same work, from plain to the best of it that we can write."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import arrays, torch_model
from benchmarks.torch_muon import Muon
from qkjax import config as config_lib


def prepare(platform: str) -> torch.device:
    """One thread where CPU time is counted; TF32 on GPU, as JAX computes there."""
    if platform == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


class _Work:
    torch_device: torch.device

    def device(self) -> str | None:
        return torch.cuda.get_device_name() if self.torch_device.type == "cuda" else None

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.torch_device.type == "cuda" else None

    def wait(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize()


class Step(_Work):
    """Eager mode: forward, backward, clipping, fused AdamW (with Muon's groups in a Muon arm)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.torch_device = prepare(spec["platform"])
        self.config = config_lib.from_dict(spec["config"])
        inputs = np.load(spec["inputs"])
        self.model = torch_model.Decoder(self.config.model)
        prefix = "params/"
        self.model.load(
            {name.removeprefix(prefix): inputs[name] for name in inputs if name.startswith(prefix)}
        )
        self.model.to(self.torch_device)
        self._tokens = torch.from_numpy(inputs["tokens"]).long().to(self.torch_device)
        self._optimizers = self._make_optimizers(inputs)
        self.loss = self.make_loss()

    def make_loss(self) -> Callable[[Tensor], Tensor]:
        """Mean loss of tokens [B, T+1]."""
        return self.plain_loss

    def plain_loss(self, tokens: Tensor) -> Tensor:
        hidden = self.model(tokens[:, :-1])
        logits = F.linear(hidden, self.model.embedding.to(hidden.dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def first(self) -> dict[str, float]:
        loss = self.loss(self._tokens)
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # In float64: float32 sums of this many squares are short by 4e-4 in torch on CPU.
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        self._update()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def repeat(self, times: int) -> None:
        for _ in range(times):
            self.loss(self._tokens).backward()
            self._update()
        self.wait()

    def _update(self) -> None:
        if self.config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _make_optimizers(self, inputs: Any) -> list[torch.optim.Optimizer]:
        c = self.config.optimizer
        named = dict(self.model.named_parameters())
        matrices = [p for name, p in named.items() if name.endswith("weight")]
        qk_gammas = [p for name, p in named.items() if "query_norm" in name or "key_norm" in name]
        chosen = {id(p) for p in (*matrices, *qk_gammas)}
        groups = [
            {
                "params": [p for p in named.values() if id(p) not in chosen],
                "weight_decay": c.auxiliary_weight_decay,
            },
            {"params": qk_gammas, "weight_decay": c.gamma_weight_decay},
        ]
        optimizers: list[torch.optim.Optimizer] = []
        if c.name == "adamw":
            groups.append({"params": matrices, "weight_decay": c.weight_decay})
        else:
            optimizers.append(Muon(matrices, self.config, inputs))
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=c.auxiliary_learning_rate,
            betas=(c.beta1, c.beta2),
            eps=c.eps,
            fused=True,
        )
        return [*optimizers, adamw]


class CompiledStep(Step):
    """torch.compile with its defaults, scaled_dot_product_attention as torch chooses it."""

    def make_loss(self) -> Callable[[Tensor], Tensor]:
        return torch.compile(self.plain_loss)


class BestStep(Step):
    """torch.compile, attention by cuDNN, and a loss that never holds all logits."""

    def make_loss(self) -> Callable[[Tensor], Tensor]:
        compiled = torch.compile(self.chunked_loss)

        def loss(tokens: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return compiled(tokens)

        return loss

    def chunked_loss(self, tokens: Tensor) -> Tensor:
        hidden = self.model(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        chunk = self.config.train.loss_chunk_tokens
        return chunked_cross_entropy(hidden, self.model.embedding, targets, chunk) / len(targets)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss whose gradients are made in the forward pass, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, chunk: int) -> Tensor:
        weight = table.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        by_hidden, by_table = torch.empty_like(hidden), torch.zeros_like(table)
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            logits = (rows @ weight.T).float()
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, wanted)).sum()
            gradient = (logits - log_sum).exp()
            gradient.scatter_add_(1, wanted, torch.full_like(log_sum, -1.0))
            gradient = gradient.to(hidden.dtype)
            by_hidden[start : start + chunk] = gradient @ weight
            by_table += gradient.T @ rows
        ctx.save_for_backward(by_hidden, by_table)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_table = ctx.saved_tensors
        return (by_hidden * scale).to(by_hidden.dtype), by_table * scale, None, None


def chunked_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return _ChunkedCrossEntropy.apply(hidden, table, targets, chunk)


class _Gradient(_Work):
    """A value of `leaves` and its gradients."""

    leaves: list[Tensor]

    def value(self) -> Tensor:
        raise NotImplementedError

    def first(self) -> dict[str, float]:
        value = self._differentiate()
        squares = [x.grad.double().square().sum() for x in self.leaves if x.grad is not None]
        return {"value": value.item(), "grad_norm": torch.stack(squares).sum().sqrt().item()}

    def repeat(self, times: int) -> None:
        for _ in range(times):
            self._differentiate()
        self.wait()

    def _differentiate(self) -> Tensor:
        for x in self.leaves:
            x.grad = None
        value = self.value()
        value.backward()
        return value.detach()


class Attention(_Gradient):
    """scaled_dot_product_attention forward and backward at the shapes of one layer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.torch_device = prepare(spec["platform"])
        settings = config_lib.from_dict(spec["config"])
        dtype = getattr(torch, settings.model.dtype)
        *vectors, weight = (torch.from_numpy(x) for x in arrays.attention_inputs(settings))
        self.leaves = [x.to(self.torch_device, dtype).requires_grad_() for x in vectors]
        self._weight = weight.to(self.torch_device)

    def value(self) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.leaves)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return (out.transpose(1, 2).float() - self._weight).square().sum()


class CudnnAttention(Attention):
    """The same by cuDNN."""

    def value(self) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().value()


class Loss(_Gradient):
    """Cross-entropy over all logits, and its gradients by hidden states and table."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.torch_device = prepare(spec["platform"])
        settings = config_lib.from_dict(spec["config"])
        hidden, table, targets = (torch.from_numpy(x) for x in arrays.loss_inputs(settings))
        dtype = getattr(torch, settings.model.dtype)
        self.leaves = [
            hidden.flatten(0, 1).to(self.torch_device, dtype).requires_grad_(),
            table.to(self.torch_device).requires_grad_(),
        ]
        self._targets = targets.long().flatten().to(self.torch_device)

    def value(self) -> Tensor:
        hidden, table = self.leaves
        logits = F.linear(hidden, table.to(hidden.dtype)).float()
        return F.cross_entropy(logits, self._targets)
