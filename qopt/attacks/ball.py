"""Geometry of the threat model, image by image: where an attack starts, which way it steps, where it must stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from qopt.seeds import derive
from qopt.threat import Norm, ThreatModel

Start = Literal["clean", "ball", "halfway"]

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


@final
@dataclass(frozen=True, eq=False)
class Ball:
    """The balls around n clean images, within the box: `project`, prepared for images that stay in for many steps.

    Attributes:
        threat: the threat model.
        bounds: in linf the smallest and the largest value that each pixel may have, in l2 the centres; (n, ...) each.
    """

    threat: ThreatModel
    bounds: tuple[Tensor, ...]

    @staticmethod
    def around(clean: Tensor, threat: ThreatModel) -> Ball:
        """The balls around ``clean`` (n, ...)."""
        if threat.norm == "l2":
            return Ball(threat, (clean,))
        return Ball(threat, ((clean - threat.eps).clamp_(min=0), (clean + threat.eps).clamp_(max=1)))

    def at(self, rows: Tensor) -> Ball:
        """The balls of some of the images, ``rows`` (m,)."""
        return Ball(self.threat, tuple(bound.index_select(0, rows) for bound in self.bounds))

    def project(self, images: Tensor) -> Tensor:
        """What `project` makes of ``images`` (n, ...), in one pass where there is one."""
        if self.threat.norm == "l2":
            return project(images, self.bounds[0], self.threat)
        low, high = self.bounds
        return torch.clamp(images, low, high)


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


def mean_length_one(gradient: Tensor) -> Tensor:
    """``gradient`` (n, ...) of each image over the mean of its absolute values, zeros left as they are."""
    mean = gradient.flatten(1).abs().mean(1)
    return gradient / _columns(torch.where(mean > 0, mean, 1.0), gradient)


def start(kind: Start, clean: Tensor, threat: ThreatModel, *, seed: int, indices: Tensor, restart: int) -> Tensor:
    """Where a run on ``clean`` (n, ...) starts: there, anywhere in the ball, or halfway out in a random direction."""
    if kind == "clean":
        return clean
    draw = random_start if kind == "ball" else random_halfway
    return draw(clean, threat, seed=seed, indices=indices, restart=restart)


def random_start(clean: Tensor, threat: ThreatModel, *, seed: int, indices: Tensor, restart: int) -> Tensor:
    """Points drawn uniformly from the ball around ``clean`` (n, ...), clipped to the box.

    The draw for an image depends only on ``seed``, its entry of ``indices`` (n,) and ``restart``, never on the batch.
    """
    noise = torch.empty(clean.shape, dtype=clean.dtype)
    for row, generator in draws(noise, seed, "start", indices, restart):
        if threat.norm == "linf":
            row.uniform_(-threat.eps, threat.eps, generator=generator)
        else:
            row.normal_(generator=generator)
            # A share r**d of a d-dimensional ball lies within the share r of its radius.
            radius = threat.eps * float(torch.rand((), generator=generator)) ** (1 / row.numel())
            row.mul_(radius / row.norm())
    return project(clean + noise.to(clean.device), clean, threat)


def random_halfway(clean: Tensor, threat: ThreatModel, *, seed: int, indices: Tensor, restart: int) -> Tensor:
    """Points at eps / 2 from ``clean`` (n, ...), clipped to the box: ``eps / 2 * sign(N(0, I))`` in linf (Tramer et al.
    2018), ``N(0, I)`` scaled to that length in l2. The draw for an image depends on what that of `random_start` does.
    """
    noise = torch.empty(clean.shape, dtype=clean.dtype)
    for row, generator in draws(noise, seed, "halfway", indices, restart):
        row.normal_(generator=generator)
        row.sign_() if threat.norm == "linf" else row.div_(row.norm())
    return project(clean + threat.eps / 2 * noise.to(clean.device), clean, threat)


def draws(
    noise: Tensor, seed: int, use: str, indices: Tensor, restart: int = 0
) -> Iterator[tuple[Tensor, torch.Generator]]:
    """Each row of ``noise`` (n, ...) with a generator that depends on ``seed``, ``use``, its entry of ``indices`` (n,)
    and ``restart`` only.
    """
    generator = torch.Generator()
    for row, index in zip(noise, indices.tolist(), strict=True):
        yield row, generator.manual_seed(derive(seed, use, index, restart))


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (n,) shaped to multiply ``like`` (n, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
