"""Images on another grid: Resize, GridSample, and pixels moved between channels and space."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qopt.graph.operators.interpolation import Rules, taps
from qopt.graph.operators.registry import Call, Op, operator
from qopt.graph.operators.shape import Sizes, numbers

_GRID_MODES: Final = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest"} | {
    "cubic": "bicubic",
    "bicubic": "bicubic",
}


@operator("Resize")
def resize(op: Op) -> Call:
    """Any mode, along any axes, by factors or to sizes that may be computed."""
    mode = op.text("mode", "nearest")
    coordinates = op.text("coordinate_transformation_mode", "half_pixel")
    rules = Rules(
        mode, coordinates, op.text("nearest_mode", "round_prefer_floor"), op.number("cubic_coeff_a", -0.75),
        bool(op.integer("exclude_outside", 0)), bool(op.integer("antialias", 0)),
        op.number("extrapolation_value", 0.0),
    )  # fmt: skip
    roi = op.const(1) if coordinates == "tf_crop_and_resize" else None
    if coordinates == "tf_crop_and_resize" and roi is None:
        raise op.refuse("with a computed region")
    corners = None if roi is None else tuple(float(number) for number in roi.reshape(-1))
    policy = op.text("keep_aspect_ratio_policy", "stretch")
    return Call(resized, (op.arg(0), _factors(op), _targets(op), op.integers("axes"), policy, corners, tuple(rules)))


def _factors(op: Op) -> tuple[float, ...] | fx.Node | None:
    if not op.given(2):
        return None
    array = op.const(2)
    if array is None:
        return op.arg(2)
    return tuple(float(factor) for factor in array) or None


def _targets(op: Op) -> tuple[int, ...] | fx.Node | None:
    return (op.sizes(3) or None) if op.given(3) else None


def resized(
    x: Tensor, factors: Tensor | tuple[float, ...] | None, targets: Sizes | None, axes: tuple[int, ...] | None,
    policy: str, corners: tuple[float, ...] | None, rules: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """``x`` resampled along ``axes`` by ``factors`` or to ``targets``, one axis after the other.

    ``corners`` are the begins and the ends of the region that is kept, in parts of the image; ``rules`` a `Rules`.
    """
    places = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
    scales, sizes = _scales(x, places, factors, targets, policy)
    for place, axis in enumerate(places):
        size, scale = sizes[place], scales[place]
        region = (0.0, 1.0) if corners is None else (corners[place], corners[place + len(places)])
        if (size, scale, region) != (x.shape[axis], 1.0, (0.0, 1.0)):
            x = _resampled(x, axis, size, scale, region, Rules(*rules))
    return x


def _scales(
    x: Tensor, places: tuple[int, ...], factors: Tensor | tuple[float, ...] | None, targets: Sizes | None, policy: str
) -> tuple[list[float], list[int]]:
    """Factor and size of each axis, whichever of them was given."""
    old = [x.shape[axis] for axis in places]
    if targets is None:
        assert factors is not None
        scales = [float(f) for f in (factors.reshape(-1).tolist() if isinstance(factors, Tensor) else factors)]
        return scales, [int(size * scale) for size, scale in zip(old, scales, strict=True)]
    sizes = numbers(targets)
    scales = [new / size for new, size in zip(sizes, old, strict=True)]
    if policy == "stretch":
        return scales, sizes
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [scale] * len(old), [int(scale * size + 0.5) for size in old]


def _resampled(x: Tensor, axis: int, size: int, scale: float, region: tuple[float, float], rules: Rules) -> Tensor:
    """``x`` with ``size`` places along ``axis``, each a weighted sum of a few."""
    index, weights, outside = (t.to(x.device) for t in taps(x.shape[axis], size, scale, region, rules))
    shape = [1] * x.ndim
    shape[axis] = size
    result = x.index_select(axis, index[:, 0])
    if rules.mode != "nearest":
        result = result * weights[:, 0].reshape(shape).to(x.dtype)
        for tap in range(1, index.shape[1]):
            result = result + x.index_select(axis, index[:, tap]) * weights[:, tap].reshape(shape).to(x.dtype)
    if rules.coordinates == "tf_crop_and_resize":
        result = torch.where(outside.reshape(shape), torch.full_like(result, rules.beyond), result)
    return result


@operator("GridSample")
def grid_sample(op: Op) -> Call:
    """At coordinates that are computed."""
    mode, padding = op.text("mode", "linear"), op.text("padding_mode", "zeros")
    if mode not in _GRID_MODES:
        raise op.refuse(f"with mode={mode}")
    return Call(F.grid_sample, (op.arg(0), op.arg(1), _GRID_MODES[mode], padding, bool(op.integer("align_corners", 0))))


@operator("AffineGrid")
def affine_grid(op: Op) -> Call:
    """The coordinates that GridSample takes, for an affine map of each image."""
    return Call(affine_coordinates, (op.arg(0), op.sizes(1), bool(op.integer("align_corners", 0))))


def affine_coordinates(theta: Tensor, sizes: Sizes, align_corners: bool) -> Tensor:
    """Coordinates in [-1, 1] of images of ``sizes`` under ``theta``."""
    return F.affine_grid(theta, numbers(sizes), align_corners)


@operator("DepthToSpace")
def depth_to_space(op: Op) -> Call:
    """Blocks of channels become blocks of pixels."""
    return Call(channels_to_blocks, (op.arg(0), op.integer("blocksize", 1), op.text("mode", "DCR") == "DCR"))


def channels_to_blocks(x: Tensor, size: int, block_first: bool) -> Tensor:
    """(N, C, H, W) to (N, C / size^2, H size, W size); ``block_first`` where the block is the outer part of C."""
    if not block_first:
        return F.pixel_shuffle(x, size)
    count, channels, height, width = x.shape
    blocks = x.reshape(count, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(count, channels // size**2, height * size, width * size)


@operator("SpaceToDepth")
def space_to_depth(op: Op) -> Call:
    """Blocks of pixels become channels, the block the outer part of them unless ``mode`` is CRD."""
    return Call(blocks_to_channels, (op.arg(0), op.integer("blocksize", 1), op.text("mode", "DCR") == "DCR"))


def blocks_to_channels(x: Tensor, size: int, block_first: bool) -> Tensor:
    """(N, C, H, W) to (N, C size^2, H / size, W / size); ``block_first`` where the block is the outer part of C."""
    if not block_first:
        return F.pixel_unshuffle(x, size)
    count, channels, height, width = x.shape
    blocks = x.reshape(count, channels, height // size, size, width // size, size).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(count, channels * size**2, height // size, width // size)
