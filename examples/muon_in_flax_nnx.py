"""Muon on the matrices of a Flax NNX model, AdamW on the rest: `qkjax.muon` in your own loop.

python examples/muon_in_flax_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qkjax.muon import muon


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(16, 64, rngs=rngs)  # its kernel is [in, out], as muon expects
        self.down = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.up(x)))


def rule(leaf: jax.Array) -> str:
    """Matrices to Muon; biases, and the kernel of one column, to AdamW."""
    return "muon" if leaf.ndim == 2 and min(leaf.shape) > 1 else "adamw"


net = Net(nnx.Rngs(0))
rates = {"muon": muon(0.02), "adamw": optax.adamw(3e-3)}
routed = optax.partition(rates, lambda params: jax.tree.map(rule, params))
optimizer = nnx.Optimizer(net, routed, wrt=nnx.Param)
x = jax.random.normal(jax.random.key(1), (256, 16))
y = jnp.sin(x.sum(-1, keepdims=True))


@nnx.jit
def step(net: Net, optimizer: nnx.Optimizer) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda net: ((net(x) - y) ** 2).mean())(net)
    optimizer.update(net, gradients)
    return loss


losses = [float(step(net, optimizer)) for _ in range(200)]
print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} after {len(losses)} steps")
