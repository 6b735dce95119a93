"""The Participation Ratio of the keys of a torch module, by a hook: `qkjax.measures` needs no jax.

python examples/participation_ratio_in_torch.py
"""

import torch

from qkjax import measures

torch.manual_seed(0)
HEADS, HEAD_DIM = 2, 32
key_projection = torch.nn.Linear(128, HEADS * HEAD_DIM, bias=False)  # the k_proj of your model
seen: list[torch.Tensor] = []
key_projection.register_forward_hook(lambda module, inputs, keys: seen.append(keys.detach()))

with torch.no_grad():
    for _ in range(4):  # your batches, [batch, tokens, d_model]
        key_projection(torch.randn(2, 64, 128) + 1.0)

keys = torch.cat(seen).reshape(-1, HEADS, HEAD_DIM)  # [tokens, heads, head_dim]
for head in range(HEADS):
    raw, centred = measures.participation_ratio_of(keys[:, head])
    print(f"head {head}: raw {raw:.1f}, centred {centred:.1f} of {HEAD_DIM}")
