"""Certificates per image: no image in the ball changes the prediction; no quantization changes it by more than this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.certificates.backward import WORK, Backward
from qopt.certificates.ball import Ball
from qopt.certificates.interval import intervals
from qopt.certificates.network import Network, difference
from qopt.certificates.read import read
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel

Method = Literal["interval", "backward-interval", "backward"]
"""``interval``; backward bounds with interval bounds in between (CROWN-IBP); backward bounds throughout (CROWN)."""

METHODS: Final[tuple[Method, ...]] = ("interval", "backward-interval", "backward")
"""From the cheapest to the tightest."""

IMAGES: Final = 16
"""Images that are bounded at a time."""


@final
@dataclass(frozen=True, eq=False)
class Certificate:
    """What is proved of n images, of the network as float32 computes it, whatever the order of its sums.

    Attributes:
        margins: float64 (n,), a lower bound over the ball of ``z_label - z_other`` for the worst other class.
        certified: bool (n,), whether that is above 0: the prediction is the label on the whole ball.
        method: the tightest method asked for.
    """

    margins: Tensor
    certified: Tensor
    method: Method

    @property
    def accuracy(self) -> float:
        """The certified accuracy: no attack of this threat model leaves less."""
        return float(self.certified.double().mean()) if len(self.certified) else 0.0


@final
@dataclass(frozen=True, eq=False)
class Agreement:
    """How far two networks are apart on the balls around n images.

    Attributes:
        low, high: float64 (n, classes), bounds of ``first - second`` for every logit.
        method: how they were found.
    """

    low: Tensor
    high: Tensor
    method: Method

    @property
    def linf(self) -> Tensor:
        """An upper bound of the largest change of a logit: (n,)."""
        return torch.maximum(self.low.abs(), self.high.abs()).amax(1)

    @property
    def l2(self) -> Tensor:
        """An upper bound of the change of the logits in l2: (n,)."""
        length: Tensor = torch.linalg.vector_norm(torch.maximum(self.low.abs(), self.high.abs()), dim=1)
        return length * (1 + 1e-12)


def certify(
    twin: GraphModule, images: Tensor, labels: Tensor, threat: ThreatModel, *, method: Method = "backward",
    work: float = WORK,
) -> Certificate:  # fmt: skip
    """Bound the margin of every image (n, ...), float32 in [0, 1], labels (n,), over its ball.

    Methods cheaper than ``method`` are tried first and left for what they cannot certify. ``work`` is `WORK`.

    Raises:
        UnsupportedModelError: an operator that bounds do not pass, naming it and its node.
        CorruptModelError: a constant that is not finite.
        DataError: images or labels that do not fit.
        UsageError: an unknown method.
    """
    margins = margins_by_method(twin, images, labels, threat, method=method, work=work)[method]
    return Certificate(margins, margins > 0, method)


def margins_by_method(
    twin: GraphModule, images: Tensor, labels: Tensor, threat: ThreatModel, *, method: Method = "backward",
    work: float = WORK,
) -> dict[Method, Tensor]:  # fmt: skip
    """The margins, float64 (n,), that each of `tried` and those before it prove: the last are `certify`'s.

    Arguments and errors of `certify`.
    """
    _check_method(method)
    network = read(twin, tuple(images.shape[1:]))
    _check_labels(labels, images, network.classes)
    parts = zip(torch.split(images, IMAGES), torch.split(labels, IMAGES), strict=True)
    found = [_margins(network, part, truth, threat, method, work) for part, truth in parts]
    return {one: torch.cat([margins[one] for margins in found]) for one in tried(method)}


def tried(method: Method) -> tuple[Method, ...]:
    """The methods up to ``method``, from the cheapest on."""
    return METHODS[: METHODS.index(method) + 1]


def radii(
    twin: GraphModule, images: Tensor, labels: Tensor, threat: ThreatModel, *, steps: int = 8,
    method: Method = "backward", work: float = WORK,
) -> Tensor:  # fmt: skip
    """The largest eps up to ``threat.eps`` found to be certified, by bisection: float64 (n,).

    An image whose clean prediction cannot be certified at all has -1. Raises what `certify` raises.
    """
    _check_method(method)
    low, high = torch.zeros(len(images), dtype=torch.float64), torch.zeros(len(images), dtype=torch.float64)
    right = certify(twin, images, labels, ThreatModel(threat.norm, 0.0), method=method, work=work).certified
    whole = certify(twin, images, labels, threat, method=method, work=work).certified
    low[whole & right], high[:] = threat.eps, threat.eps
    for _ in range(steps):
        for eps in torch.unique((low + high) / 2).tolist():
            rows = torch.nonzero(right & (low < high) & ((low + high) / 2 == eps)).flatten()
            if len(rows):
                tried = ThreatModel(threat.norm, eps)
                found = certify(twin, images[rows], labels[rows], tried, method=method, work=work).certified
                low[rows[found]], high[rows[~found]] = eps, eps
    return torch.where(right, low, -1.0)


def agreement(
    first: GraphModule, second: GraphModule, images: Tensor, threat: ThreatModel, *, method: Method = "backward",
    work: float = WORK,
) -> Agreement:  # fmt: skip
    """Bound ``first(x) - second(x)`` over the ball of every image: what quantization can change, and no backdoor more.

    The two are walked as one network that reads the image twice and subtracts. Raises what `certify` raises.
    """
    _check_method(method)
    shape = tuple(images.shape[1:])
    network = difference(read(first, shape), read(second, shape))
    eye = torch.eye(network.classes)
    ends = []
    for part in torch.split(images, IMAGES):
        ball, rows = Ball.around(part, threat), torch.cat([eye, -eye]).expand(len(part), -1, -1)
        ends.append(torch.stack([_lower(network, ball, rows, one, work) for one in tried(method)]).amax(0))
    found = torch.cat(ends)
    return Agreement(found[:, : network.classes], -found[:, network.classes :], method)


def _margins(
    network: Network, images: Tensor, labels: Tensor, threat: ThreatModel, method: Method, work: float
) -> dict[Method, Tensor]:
    best, found = torch.full((len(images),), -torch.inf, dtype=torch.float64), {}
    for one in tried(method):
        rows = torch.nonzero(best <= 0).flatten()
        if len(rows):
            ball = Ball.around(images[rows], threat)
            lower = _lower(network, ball, specification(labels[rows], network.classes), one, work)
            best[rows] = torch.maximum(best[rows], lower.amin(1))
        found[one] = best.clone()
    return found


def _lower(network: Network, ball: Ball, rows: Tensor, method: Method, work: float) -> Tensor:
    """Lower bounds (n, k) of rows (n, k, classes) of the output."""
    if method != "interval":
        return Backward(network, ball, work if method == "backward" else 0.0).lower(rows)
    box, wide = intervals(network, ball)[-1], rows.double()
    terms = wide.clamp(min=0) * box.low[:, None] + wide.clamp(max=0) * box.high[:, None]
    return terms.sum(2) - 2.0**-40 * terms.abs().sum(2)


def specification(labels: Tensor, classes: int) -> Tensor:
    """The rows ``z_label - z_other`` for every other class: float32 (n, classes - 1, classes)."""
    others = torch.arange(classes).expand(len(labels), -1)
    others = others[others != labels[:, None]].reshape(len(labels), classes - 1)
    eye = torch.eye(classes)
    return eye[labels][:, None] - eye[others]


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise UsageError("unknown method of certification", expected=", ".join(METHODS), got=repr(method))


def _check_labels(labels: Tensor, images: Tensor, classes: int) -> None:
    fits = labels.shape == (len(images),) and not labels.is_floating_point() and classes >= 2
    if not fits or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise DataError(
            "labels that do not fit", where="certificates", expected=f"({len(images)},) in 0..{classes - 1}",
            got=f"{tuple(labels.shape)}",
        )  # fmt: skip
