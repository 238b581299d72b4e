"""Geometry of the threat model, image by image: where an attack starts, which way it steps, where it must stay."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.seeds import derive
from qopt.threat import Norm, ThreatModel

TINY = 1e-30
"""Keeps the l2 ball of radius 0 from dividing by zero."""


def project(images: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    """``images`` (n, ...) moved into the ball around ``clean`` and then into the box [0, 1].

    For l2 this is a point of the intersection, not its nearest one: shrinking to the ball first and clipping to the
    box afterwards never leaves the ball, because the centre is in the box.
    """
    if threat.norm == "linf":
        return torch.clamp(images, clean - threat.eps, clean + threat.eps).clamp_(0, 1)
    move = images - clean
    length = _columns(move.flatten(1).norm(dim=1), move)
    return (clean + move * (threat.eps / length.clamp_min(max(threat.eps, TINY)))).clamp_(0, 1)


def direction(gradient: Tensor, images: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 in ``norm`` that raises a loss with ``gradient`` (n, ...) fastest at ``images`` (n, ...).

    linf: the sign. l2: the gradient over its norm, without the pixels that it would push out of the box. An image
    whose gradient is zero gets a zero step.
    """
    if norm == "linf":
        return gradient.sign()
    blocked = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
    free = gradient.masked_fill(blocked, 0.0)
    # Divided by its largest entry first: squares of float32 gradients below 1e-23 would all be zero.
    largest = _columns(free.flatten(1).abs().amax(1), free)
    free = torch.where(largest > 0, free / largest, 0.0)
    length = _columns(free.flatten(1).norm(dim=1), free)
    return free / length.clamp_min(1.0)


def random_start(clean: Tensor, threat: ThreatModel, *, seed: int, indices: Tensor, restart: int) -> Tensor:
    """Points drawn uniformly from the ball around ``clean`` (n, ...), clipped to the box.

    The draw for an image depends only on ``seed``, its entry of ``indices`` (n,) and ``restart``, never on the batch.
    """
    noise = torch.empty(clean.shape, dtype=clean.dtype)
    generator = torch.Generator()
    for row, index in zip(noise, indices.tolist(), strict=True):
        generator.manual_seed(derive(seed, "start", index, restart))
        if threat.norm == "linf":
            row.uniform_(-threat.eps, threat.eps, generator=generator)
        else:
            row.normal_(generator=generator)
            # A share r**d of a d-dimensional ball lies within the share r of its radius.
            radius = threat.eps * float(torch.rand((), generator=generator)) ** (1 / row.numel())
            row.mul_(radius / row.norm())
    return project(clean + noise.to(clean.device), clean, threat)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (n,) shaped to multiply ``like`` (n, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
