"""The threat model: the norm and the radius of the ball an attacker may move an image in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from qopt.errors import UsageError

Norm = Literal["linf", "l2"]


@final
@dataclass(frozen=True)
class ThreatModel:
    """All images within ``eps`` of the clean one in ``norm``, pixels in [0, 1]."""

    norm: Norm = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise UsageError("unknown norm", where="--norm", expected="linf or l2", got=repr(self.norm))
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError("eps must be a finite number, zero or larger", where="--eps", got=repr(self.eps))

    def __str__(self) -> str:
        pixels = self.eps * 255
        whole = self.norm == "linf" and 0 < pixels < 32 and abs(pixels - round(pixels)) < 1e-9
        return f"{self.norm} {round(pixels)}/255" if whole else f"{self.norm} {self.eps:g}"


def parse_eps(text: str) -> float:
    """Read ``0.1`` or ``8/255``; raises UsageError where it is neither, negative or not finite."""
    parts = text.split("/")
    try:
        value = float(parts[0]) / float(parts[1]) if len(parts) == 2 else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UsageError("eps is not a number", where="--eps", expected="0.1 or 8/255", got=repr(text)) from error
    return ThreatModel(eps=value).eps


def check_declared(norm: Norm, eps: float | None) -> ThreatModel:
    """What was declared, of radius 0 where ``eps`` is None; refuses a linf radius in grey values.

    Raises:
        UsageError: this, and as `ThreatModel` does.
    """
    threat = ThreatModel(norm, 0.0 if eps is None else eps)
    if norm == "linf" and eps is not None and eps > 1:
        raise UsageError(
            "a linf radius above 1 allows any image, pixels are in [0, 1]", where="--eps", got=f"{eps:g}",
            fix=f"give {eps:g}/255 if that is in grey values",
        )  # fmt: skip
    return threat


def declared_threat(norm: Norm, eps: float | None, shape: tuple[int, ...]) -> ThreatModel:
    """What was declared on images of ``shape``; the radius is that of `default_threat` where ``eps`` is None.

    Images that are no stack of channels count as grey. Raises UsageError as `ThreatModel` does.
    """
    return ThreatModel(norm, default_threat(shape[0] if len(shape) == 3 else 1).eps if eps is None else eps)


def default_threat(channels: int) -> ThreatModel:
    """linf 8/255 for images of three channels, 0.1 for one; printed wherever it was not declared."""
    return ThreatModel("linf", 0.1 if channels == 1 else 8 / 255)
