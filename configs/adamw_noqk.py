"""AdamW without QK-Norm: does it train without QK-Norm?

    python -m qkjax.main --config=configs/adamw_noqk.py:tiny --workdir=runs/adamw_noqk
    python -m qkjax.main --config=configs/adamw_noqk.py --config.data.dir=DATASET --workdir=DIR

The first line trains 400k tokens of the embedded corpus on a CPU, the second 300M tokens. Words
after the colon: qkjax/presets.py.
"""

import ml_collections

from qkjax import config as config_lib


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The arm at the scale, recipe and controls that `words` name."""
    return config_lib.base(optimizer="adamw", qk_norm="none", words=words)
