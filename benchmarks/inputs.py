"""Weights and tokens that every variant of a training step starts from, in one file.

Prints the number of parameters.
"""

import json
import sys
from typing import Any

import qkjax
from qkjax import config as config_lib


def main(path: str, values: dict[str, Any]) -> None:
    qkjax.prepare_process()

    import jax
    import numpy as np

    from qkjax import model, muon
    from qkjax.runs import checkpoint

    settings = config_lib.from_dict(values)
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), settings.model)
    named = dict(zip(checkpoint.leaf_names(params), jax.tree.leaves(params), strict=True))
    shape = (settings.train.sequences_per_step, settings.model.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, settings.model.vocab_size, shape, np.int32)
    safety, steps = muon.newton_schulz(settings.muon.coefficients)
    arrays = {f"params/{name}": np.asarray(leaf) for name, leaf in named.items()}
    arrays |= {
        "tokens": tokens,
        "newton_schulz_safety": np.array(safety),
        "newton_schulz_steps": steps,
    }
    print(sum(leaf.size for leaf in named.values()))
    np.savez(path, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], json.load(sys.stdin))
