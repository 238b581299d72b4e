"""What one query of the Square attack changes (Andriushchenko et al. 2020, algorithms 2 and 3), and where it starts.

Chance comes in as numbers uniform in [0, 1), one row per image; images are planes (n, c, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

TILES = 5
"""Tiles along each side of the first l2 perturbation."""


@final
@dataclass(frozen=True)
class Moves:
    """The moves of one norm.

    Attributes:
        first_chance: how many numbers the first perturbation takes, of (c, h, w).
        first: clean planes, numbers (n, first_chance) and eps to the first candidates.
        chance: how many numbers a change takes, of c.
        change: clean and best planes, numbers (n, chance), side and eps to candidates like the planes, within eps of
            the clean ones and in the box.
    """

    first_chance: Callable[[int, int, int], int]
    first: Callable[[Tensor, Tensor, float], Tensor]
    chance: Callable[[int], int]
    change: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def stripes(clean: Tensor, chance: Tensor, eps: float) -> Tensor:
    """Vertical stripes, one column wide, of +eps or -eps in every channel: ``chance`` (n, c * w)."""
    signs = _signs(chance).reshape(len(clean), clean.shape[1], 1, clean.shape[3])
    return (clean + eps * signs).clamp_(0, 1)


def change_linf(clean: Tensor, best: Tensor, chance: Tensor, side: int, eps: float) -> Tensor:
    """Every channel of one square goes to +eps or -eps: ``chance`` (n, 2 + c) is place and signs.

    A square that would change nothing takes the opposite signs.
    """
    square = (min(side, clean.shape[2]), min(side, clean.shape[3]))
    index = window(chance[:, :2], clean.shape, square)
    candidate = best.flatten(1).clone()
    old, centre = candidate.gather(1, index), clean.flatten(1).gather(1, index)
    up = (chance[:, 2:] < 0.5).repeat_interleave(square[0] * square[1], dim=1)
    low, high = (centre - eps).clamp_(min=0), (centre + eps).clamp_(max=1)
    same = (torch.where(up, high, low) == old).all(1, keepdim=True)
    return candidate.scatter_(1, index, torch.where(up ^ same, high, low)).view_as(best)


def tiles(clean: Tensor, chance: Tensor, eps: float) -> Tensor:
    """A grid of two-sided bumps of random direction, and random sign in every channel, of length eps.

    ``chance`` is (n, `tiles_chance`).
    """
    count, channels, height, width = clean.shape
    tile, rows, columns = _grid(height, width)
    values = chance.reshape(count, rows * columns, 1 + channels)
    shapes = bumps(*tile).to(clean)[(values[..., 0] < 0.5).long()]
    signed = _signs(values[..., 1:])[..., None, None] * shapes[:, :, None]
    laid = signed.reshape(count, rows, columns, channels, *tile).permute(0, 3, 1, 4, 2, 5)
    top, left = (height - rows * tile[0]) // 2, (width - columns * tile[1]) // 2
    move = torch.zeros_like(clean)
    move[:, :, top : top + rows * tile[0], left : left + columns * tile[1]] = laid.reshape(
        count, channels, rows * tile[0], columns * tile[1]
    )
    return _at_length(clean, move.flatten(1), eps)


def tiles_chance(channels: int, height: int, width: int) -> int:
    """How many numbers `tiles` takes for planes of this shape."""
    _, rows, columns = _grid(height, width)
    return rows * columns * (1 + channels)


def change_l2(clean: Tensor, best: Tensor, chance: Tensor, side: int, eps: float) -> Tensor:
    """One window gives its share of the perturbation to another, which a bump is added to.

    ``chance`` (n, 5 + c): the places of the taking and the giving window, the bump's direction, and its signs.
    """
    count, channels, height, width = clean.shape
    side = max(side, 3) | 1
    square = (min(side, height), min(side, width))
    taking, giving = (window(chance[:, part], clean.shape, square) for part in (slice(0, 2), slice(2, 4)))
    move = (best - clean).flatten(1)
    unspent = (eps**2 - move.square().sum(1)).clamp_min(0)
    old = move.gather(1, taking).view(count, channels, -1)
    move.scatter_(1, taking, 0.0)
    given = move.gather(1, giving).view(count, channels, -1).square().sum(2)
    move.scatter_(1, giving, 0.0)
    share = old.square().sum(2)
    shape = bumps(*square).to(clean)[(chance[:, 4] < 0.5).long()].flatten(1)
    new = _signs(chance[:, 5:])[..., None] * shape[:, None] + old / (share.sqrt()[..., None] + 1e-12)
    length = (unspent[:, None] / channels + share + given).sqrt()
    new *= (length / (new.norm(dim=2) + 1e-12))[..., None]
    return _at_length(clean, move.scatter_(1, taking, new.flatten(1)), eps)


MOVES = {
    "linf": Moves(lambda c, h, w: c * w, stripes, lambda c: 2 + c, change_linf),
    "l2": Moves(tiles_chance, tiles, lambda c: 5 + c, change_l2),
}


def window(place: Tensor, planes: torch.Size, square: tuple[int, int]) -> Tensor:
    """Positions (n, c * rows * columns) in flattened ``planes`` of a window at ``place``, (n, 2) in [0, 1)."""
    _, channels, height, width = planes
    rows, columns = square
    space = place.new_tensor([height - rows + 1, width - columns + 1])
    corner = (place * space).long().minimum(space.long() - 1)
    first = corner[:, 0] * width + corner[:, 1]
    return first[:, None] + _offsets(channels, height, width, rows, columns).to(first.device)


@lru_cache(maxsize=64)
def _offsets(channels: int, height: int, width: int, rows: int, columns: int) -> Tensor:
    """Positions of a window at the corner of flattened planes."""
    positions = torch.arange(channels * height * width).view(channels, height, width)
    corner: Tensor = positions[:, :rows, :columns]
    return corner.flatten()


@lru_cache(maxsize=64)
def bumps(height: int, width: int) -> Tensor:
    """Two patterns (2, height, width) of length 1: positive above and negative below, or left and right."""
    upright = torch.cat([_bump(height // 2, width), -_bump(height - height // 2, width)])
    sideways = torch.cat([_bump(height, width // 2), -_bump(height, width - width // 2)], 1)
    return torch.stack([pattern / pattern.norm() for pattern in (upright, sideways)])


def _bump(height: int, width: int) -> Tensor:
    """The sum over k of 1/k^2 on the rectangle that reaches k - 1 pixels around the middle; of length 1."""
    if not height * width:
        return torch.zeros(height, width)
    rows, columns = (torch.arange(size) - size // 2 for size in (height, width))
    reach = torch.maximum(rows.abs()[:, None], columns.abs()[None])
    weights = torch.arange(1.0, max(height, width) // 2 + 2).pow(-2)
    bump = weights.flip(0).cumsum(0).flip(0)[reach]
    length: Tensor = bump.norm()
    return bump / length


def _grid(height: int, width: int) -> tuple[tuple[int, int], int, int]:
    """The shape of a tile, and how many there are down and across."""
    tile = max(height // TILES, 1), max(width // TILES, 1)
    return tile, height // tile[0], width // tile[1]


def _signs(chance: Tensor) -> Tensor:
    return torch.where(chance < 0.5, 1.0, -1.0)


def _at_length(clean: Tensor, move: Tensor, eps: float) -> Tensor:
    """``clean`` moved along ``move`` (n, c * h * w) by eps, and clipped to the box, which shortens the way."""
    scale: Tensor = eps / (move.norm(dim=1, keepdim=True) + 1e-12)
    return (clean.flatten(1) + move * scale).clamp_(0, 1).view_as(clean)
