"""The shortest way within the box to a hyperplane: the step of FAB (Croce & Hein 2020b, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.threat import Norm


def shortest_move(points: Tensor, normal: Tensor, amount: Tensor, norm: Norm) -> Tensor:
    """The moves (n, d), shortest in ``norm``, with ``normal * move`` summing to ``amount`` and points + move in [0, 1].

    Where the box ends before that, the move that comes closest. ``points`` and ``normal`` (n, d), ``amount`` (n,), all
    finite and of one floating-point type.

    A move of length l takes coordinate i to ``min(l * s_i, room_i)``, with s_i = 1 in linf and ``|normal_i|`` in l2, so
    what it gains, ``sum_i |normal_i| min(l * s_i, room_i)``, is concave and linear in pieces: Newton's method from the
    left climbs to the answer without ever passing it, and ends there exactly, after a few steps and no sorting.
    """
    tiny, huge = torch.finfo(points.dtype).tiny, torch.finfo(points.dtype).max
    # Scaled by the largest entry: squares of float32 gradients below 1e-23 would all be zero.
    largest = normal.abs().amax(1).clamp_min(tiny)
    toward = normal * (amount.sign() / largest)[:, None]
    size, gap = toward.abs(), (amount.abs() / largest).clamp_max(huge)
    room = torch.where(toward > 0, 1 - points, points)
    speed = torch.ones_like(size) if norm == "linf" else size
    length = _newton(size * speed, size * room, gap, huge)
    return toward.sign().mul_(torch.minimum(speed.mul_(length[:, None]), room))


def _newton(slopes: Tensor, limits: Tensor, gap: Tensor, huge: float) -> Tensor:
    """The least length l (n,) with ``sum_i min(l * slopes_i, limits_i) = gap``; ``huge`` where no length will do."""
    length = (gap / slopes.sum(1).clamp_min(torch.finfo(gap.dtype).tiny)).clamp_max(huge)
    left = torch.arange(len(gap), device=gap.device)
    while len(left):
        free = slopes * length[left, None] < limits
        rise = torch.where(free, slopes, 0.0).sum(1)
        missing = gap[left] - torch.where(free, 0.0, limits).sum(1)
        longer = torch.where(rise > 0, missing / rise, huge).clamp_max(huge)
        grows = longer > length[left]
        length[left[grows]] = longer[grows]
        if not grows.all():
            left, slopes, limits = left[grows], slopes[grows], limits[grows]
    return length
