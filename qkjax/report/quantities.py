"""Numbers per layer and head, by name: measures of singular values, and saved arrays.

Measures are computed from the singular values that a run saves, so that each of them can be had of
any run that is on the disk.
"""

from typing import NamedTuple

import numpy as np

from qkjax import errors
from qkjax.measures import ranks
from qkjax.measures.ranks import MEASURES

# Of `ranks.MEASURES`, in words.
TITLES: dict[str, str] = {
    "pr": "participation ratio",
    "pr_cov": "covariance participation ratio",
    "erank": "effective rank",
    "srank": "stable rank",
    "r90": "directions for 90% of the energy",
}
# Saved per head as they are; name -> title and unit.
SAVED: dict[str, tuple[str, str]] = {
    "max_logit": ("maximum attention logit", "dimensionless, after 1/sqrt(head_dim)"),
    "entropy": ("attention entropy", "nats"),
    "aa": ("axis alignment of keys", "0 random, 1 axes"),
    "aa_ratio": ("axis alignment ratio r of keys", "dimensionless"),
    "overlap": ("overlap of key subspaces between heads", "0 to 1"),
    "sink_mass": ("attention on the first position", "share; see sink/uniform"),
    "key_norm_mean": ("mean length of keys", "dimensionless"),
    "query_norm_mean": ("mean length of queries", "dimensionless"),
}
MEAN_SHARE = "mean_share"  # of two arrays: raw and centred singular values
NAMES = (*MEASURES, MEAN_SHARE, *SAVED)
# Vectors that have no stage and no centring -> their array and words.
_PRODUCTS: dict[str, tuple[str, str]] = {
    "wqk": ("wqk_singular_values", "W_q^T W_k"),
    "weight_query": ("weight_query", "W_q"),
    "weight_key": ("weight_key", "W_k"),
    "weight_value": ("weight_value", "W_v"),
    "weight_output": ("weight_output", "W_o"),
}
VECTORS = ("key", "query", "value", "qk", *_PRODUCTS)
# The first two of models with QK-Norm alone.
STAGES = ("pre_norm", "post_norm", "pre_rope", "post_rope")
CENTRINGS = ("raw", "centred")
_IN_WORDS = {
    "pre_norm_": "before QK-Norm, ",
    "post_norm_": "normalised, before gamma, ",
    "pre_rope_": "pre-RoPE, ",
    "post_rope_": "post-RoPE, ",
}


class Quantity(NamedTuple):
    """One number per layer and head: a measure of the singular values in an array, or an array."""

    measure: str  # of NAMES
    array: str  # name in spectra/step_*.npz; of MEAN_SHARE that of the raw singular values

    @property
    def name(self) -> str:
        """Stem of file names: "pr_key_post_rope_raw"."""
        return self.measure if self.measure in SAVED else f"{self.measure}_{self.array}"

    @property
    def source(self) -> str:
        """What is measured, in words: "key, post-RoPE, raw"; empty for an array of SAVED."""
        if self.measure in SAVED:
            return ""
        for array, words in _PRODUCTS.values():
            if self.array == array:
                return words
        vectors, _, rest = self.array.partition("_")
        for place, words in _IN_WORDS.items():
            rest = rest.replace(place, words)
        return f"{'q.k' if vectors == 'qk' else vectors}, {rest}"

    @property
    def title(self) -> str:
        """The measure in words."""
        if self.measure == MEAN_SHARE:
            return "energy of the mean vector"
        return SAVED[self.measure][0] if self.measure in SAVED else TITLES[self.measure]

    @property
    def counts_directions(self) -> bool:
        """Whether values run from 1 to head_dim."""
        return self.measure in MEASURES

    def unit(self, head_dim: int) -> str:
        """Unit of the values; counts of directions name how many there are."""
        if self.measure == MEAN_SHARE:
            return "share of all energy"
        return f"directions of {head_dim}" if self.counts_directions else SAVED[self.measure][1]

    def values(self, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
        """[layers, heads] float64; None where the evaluation did not record the array."""
        if (array := arrays.get(self.array)) is None:
            return None
        if self.measure in SAVED:
            return np.asarray(array, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # of keys that are all zero
            if self.measure == MEAN_SHARE:
                if (centred := arrays.get(f"{self.array.removesuffix('raw')}centred")) is None:
                    return None
                return ranks.mean_share(np.asarray(array, float), np.asarray(centred, float))
            return MEASURES[self.measure](np.asarray(array, np.float64))


def quantity(
    measure: str, vectors: str | None = None, stage: str | None = None, centring: str | None = None
) -> Quantity:
    """The quantity that flags name; None: key, post_rope, raw, wherever the choice exists.

    Raises:
        UsageError: an unknown name, or a choice that the quantity does not have.
    """
    chosen = {"vectors": vectors, "stage": stage, "centring": centring}
    known = {"vectors": VECTORS, "stage": STAGES, "centring": CENTRINGS}
    for field, value in {**chosen, "measure": measure}.items():
        names = known.get(field, NAMES)
        if value is not None and value not in names:
            raise errors.UsageError(f"--{field}: {value!r} is unknown. Known: {', '.join(names)}.")
    vectors = vectors or "key"
    without: dict[str, str] = {}
    if measure in SAVED:
        without = dict.fromkeys(chosen, measure)
    elif vectors in _PRODUCTS:
        without = dict.fromkeys(("stage", "centring"), vectors)
    elif vectors == "value":
        without = {"stage": "value"}
    if measure == MEAN_SHARE:
        without["centring"] = measure
        if vectors in ("qk", *_PRODUCTS):
            without["vectors"] = measure
    for field, owner in without.items():
        if chosen[field] is not None:
            raise errors.UsageError(
                f"--{field}: {owner} has no {field}, expected none, found {chosen[field]}. "
                f"Leave --{field} out."
            )
    if measure in SAVED:
        return Quantity(measure, measure)
    if vectors in _PRODUCTS:
        return Quantity(measure, _PRODUCTS[vectors][0])
    if vectors == "qk" and stage not in (None, "pre_rope"):
        raise errors.UsageError(
            f"--stage: qk is measured at pre_rope alone, found {stage}. Leave --stage out."
        )
    usual = "pre_rope" if vectors == "qk" else "post_rope"
    stages = () if vectors == "value" else (stage or usual,)
    return Quantity(measure, "_".join((vectors, *stages, centring or "raw")))
