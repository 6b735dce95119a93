"""Muon without QK-Norm: can orthogonalised updates replace QK-Norm?

    python -m qkjax.main --config=configs/muon_noqk.py:tiny --workdir=runs/muon_noqk
    python -m qkjax.main --config=configs/muon_noqk.py --config.data.dir=DATASET --workdir=DIR
    python -m qkjax.main --config=configs/muon_noqk.py:tiny,merged --workdir=runs/muon_noqk_merged

The first line trains 400k tokens of the embedded corpus on a CPU, the second 300M tokens. Words
after the colon: qkjax/presets.py.
"""

import ml_collections

from qkjax import config as config_lib


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The arm at the scale, recipe and controls that `words` name."""
    return config_lib.base(optimizer="muon", qk_norm="none", words=words)
