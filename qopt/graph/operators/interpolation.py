"""Where each place of a resampled axis comes from, by the rules of ONNX's Resize."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Rules(NamedTuple):
    """The attributes of Resize.

    Attributes:
        mode: nearest, linear or cubic.
        coordinates: how a place in the result becomes a coordinate in the source.
        rounding: how nearest rounds a coordinate.
        cubic: the coefficient a of cubic interpolation, mostly -0.75 (Keys 1981 has -0.5).
        exclude_outside: whether taps outside the source get no weight, else the edge's value.
        antialias: whether taps spread where the result is smaller.
        beyond: the value outside the region of tf_crop_and_resize.
    """

    mode: str
    coordinates: str
    rounding: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    beyond: float


_ROUND: Final[dict[str, Callable[[Floats], Floats]]] = {
    "round_prefer_floor": lambda c: np.ceil(c - 0.5),
    "round_prefer_ceil": lambda c: np.floor(c + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@lru_cache(maxsize=256)
def taps(old: int, new: int, scale: float, region: tuple[float, float], rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """For an axis of ``old`` places resampled to ``new``: what to read, with what weight, and what is outside.

    Args:
        old: size of the source, at least 1.
        new: size of the result.
        scale: factor between them, about ``new / old``.
        region: begin and end of what is kept, in parts of the source.
        rules: how.

    Returns:
        Indices int64 (new, taps), weights float64 (new, taps) that sum to 1, and bool (new,).
    """
    where = _coordinates(old, new, scale, region, rules.coordinates)
    outside = torch.from_numpy((where < 0) | (where > old - 1))
    if rules.mode == "nearest":
        index = np.clip(_ROUND[rules.rounding](where), 0, old - 1).astype(np.int64)[:, None]
        return torch.from_numpy(index), torch.ones(new, 1, dtype=torch.float64), outside
    base = np.floor(where)
    shrink = min(scale, 1.0) if rules.antialias else 1.0
    reach = 1 if rules.mode == "linear" else 2
    first = int(np.floor(-reach / shrink)) + 1
    offsets = np.arange(first, 2 - first)
    weights = _kernel((offsets - (where - base)[:, None]) * shrink, rules)
    index = base[:, None] + offsets
    if rules.exclude_outside:
        weights = np.where((index < 0) | (index > old - 1), 0.0, weights)
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(np.clip(index, 0, old - 1).astype(np.int64)), torch.from_numpy(weights), outside


def _coordinates(old: int, new: int, scale: float, region: tuple[float, float], kind: str) -> Floats:
    """The coordinate in the source of each place in the result, in float32 as ONNX Runtime computes it."""
    place = np.arange(new, dtype=np.float32)
    factor, half = np.float32(scale), np.float32(0.5)
    if kind == "asymmetric":
        where = place / factor
    elif kind == "align_corners":
        where = place * np.float32(old - 1) / np.float32(max(new - 1, 1))
    elif kind == "tf_crop_and_resize":
        begin, end = (np.float32(part * (old - 1)) for part in region)
        where = begin + place * (end - begin) / np.float32(new - 1) if new > 1 else (begin + end) * half + place
    elif kind == "pytorch_half_pixel" and new == 1:
        where = place
    else:
        where = (place + half) / factor - half
        if kind == "half_pixel_symmetric":
            where = where + np.float32(old / 2 * (1 - new / (scale * old)))
    return where.astype(np.float64)


def _kernel(distance: Floats, rules: Rules) -> Floats:
    """The weight of a tap at ``distance`` from the coordinate (Keys 1981, equation 4 for cubic)."""
    x, a = np.abs(distance), rules.cubic
    if rules.mode == "linear":
        return np.asarray(np.clip(1 - x, 0, 1))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
