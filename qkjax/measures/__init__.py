"""What is measured of queries, keys, values, logits and weights.

For your own vectors, in two lines and without jax:

>>> import numpy as np
>>> from qkjax import measures
>>> keys = np.random.default_rng(0).standard_normal((1000, 64)) + 3  # [tokens, head_dim]
>>> raw, centred = measures.participation_ratio_of(keys)
>>> print(f"{raw:.1f} of 64 as they are, {centred:.1f} around their mean")
11.7 of 64 as they are, 62.9 around their mean
"""

from qkjax.measures.ranks import ParticipationRatios, participation_ratio_of

__all__ = ["ParticipationRatios", "participation_ratio_of"]
