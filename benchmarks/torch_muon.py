"""Muon for PyTorch with the Newton-Schulz steps of equally large matrices as one batch."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from qkjax.config import Config


class Muon(torch.optim.Optimizer):
    """`qkjax.muon.muon` on a list of [out, in] matrices, at a constant rate.

    Args:
        inputs: holds newton_schulz_safety and newton_schulz_steps, the project's coefficients.
    """

    def __init__(self, params: list[torch.nn.Parameter], config: Config, inputs: Any) -> None:
        super().__init__(params, {})
        self.config = config
        self.safety = float(inputs["newton_schulz_safety"])
        self.steps = [tuple(map(float, row)) for row in inputs["newton_schulz_steps"]]
        self.alike: dict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
        for p in params:
            self.alike[tuple(sorted(p.shape))].append(p)
        self.momenta = {p: torch.zeros_like(p) for p in params}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        c, mu = self.config.optimizer, self.config.muon.momentum
        for params in self.alike.values():
            gradients = [p.grad for p in params if p.grad is not None]
            momenta = [self.momenta[p] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            u = (
                torch._foreach_lerp(gradients, momenta, mu)
                if self.config.muon.nesterov
                else momenta
            )
            wide = torch.stack([x.T if x.shape[0] > x.shape[1] else x for x in u])
            updates = self._orthogonalize(wide)
            for p, update in zip(params, updates, strict=True):
                out, fan_in = p.shape
                p.mul_(1 - c.learning_rate * c.weight_decay)
                scale = math.sqrt(max(1.0, out / fan_in))
                p.add_(update.T if out > fan_in else update, alpha=-c.learning_rate * scale)

    def _orthogonalize(self, u: Tensor) -> Tensor:
        x = u / (self.safety * u.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        x = x.to(getattr(torch, self.config.muon.dtype))
        for a, b, c in self.steps:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        return x.float()
