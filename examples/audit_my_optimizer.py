"""Which parameters does my optimiser decay? `qkjax.audit.decay_table` in your own loop.

python examples/audit_my_optimizer.py

The first half is plain optax over a dict of arrays, the second a Flax NNX model: the table takes
any tree of parameters and any transformation, and reads neither data nor gradients.
"""

import qkjax

qkjax.prepare_process()

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from qkjax import audit  # noqa: E402

STEPS = 5_000
schedule = optax.warmup_cosine_decay_schedule(0.0, 8e-4, 200, STEPS)


def show(title: str, rows: list[audit.Decay]) -> None:
    print(title)
    for row in rows:
        print(f"  {row.name:<16} tau {row.tau:5.3f}, left of it {row.left:.3f}")


# Plain optax. Without a mask AdamW decays everything: the gammas of QK-Norm too.
params = {
    "query/kernel": jnp.zeros((64, 64)),
    "key_norm/gamma": jnp.ones(64),
    "query_norm/gamma": jnp.ones(64),
}
show("adamw", audit.decay_table(optax.adamw(schedule, weight_decay=0.1), params, steps=STEPS))

matrices_alone = {name: leaf.ndim > 1 for name, leaf in params.items()}
masked = optax.adamw(schedule, weight_decay=0.1, mask=matrices_alone)
show("adamw with a mask", audit.decay_table(masked, params, steps=STEPS))


# Flax NNX.
class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.key = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.norm = nnx.RMSNorm(64, rngs=rngs)


state = nnx.state(Head(nnx.Rngs(0)), nnx.Param)
show("nnx, adamw", audit.decay_table(optax.adamw(schedule, weight_decay=0.1), state, steps=STEPS))
