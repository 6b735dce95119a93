"""Singular values as grey images, for TensorBoard: drawn by numpy alone, in milliseconds."""

from collections.abc import Mapping

import numpy as np

_ARRAYS = {
    f"spectra/{side}/{stage}/{kind}": f"{side}_{stage}_{kind}"
    for side in ("key", "query")
    for stage, kind in (("pre_rope", "centred"), ("post_rope", "raw"))
}
_DECADES = 3.0  # from white to black
_HIGH, _WIDE, _LINE = 8, 4, 2  # pixels of a cell; between layers


def of_evaluation(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Images [H, W, 1] uint8 by their tags, of the arrays of spectra/step_*.npz.

    A row of cells is a head, a column a direction, the strongest first; a white line divides the
    layers. White is the head's largest singular value, black is 1,000 times smaller or less, or
    undefined; the grey between goes with the logarithm.
    """
    return {tag: _draw(arrays[name]) for tag, name in _ARRAYS.items()}


def _draw(sigma: np.ndarray) -> np.ndarray:
    """[H, W, 1] of [layers, heads, head_dim]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(sigma / sigma[..., :1])
    bright = np.nan_to_num(1 + decades / _DECADES, nan=0.0, neginf=0.0).clip(0, 1)
    pixels = np.round(255 * bright).astype(np.uint8).repeat(_HIGH, axis=1).repeat(_WIDE, axis=2)
    lined = np.pad(pixels, ((0, 0), (0, _LINE), (0, 0)), constant_values=255)
    return lined.reshape(-1, lined.shape[-1], 1)[:-_LINE]
