"""AdamW with QK-Norm: the usual setting in practice, and the study's baseline.

    python -m qkjax.main --config=configs/adamw_qk.py:tiny --workdir=runs/adamw_qk
    python -m qkjax.main --config=configs/adamw_qk.py --config.data.dir=DATASET --workdir=DIR
    python -m qkjax.main --config=configs/adamw_qk.py:tiny,frozen --workdir=runs/adamw_qk_frozen

The first line trains 400k tokens of the embedded corpus on a CPU, the second 300M tokens. Words
after the colon: qkjax/presets.py.
"""

import ml_collections

from qkjax import config as config_lib


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The arm at the scale, recipe and controls that `words` name."""
    return config_lib.base(optimizer="adamw", qk_norm="learned", words=words)
