"""Margins by auto_LiRPA, where the user has installed it: a second opinion on certificates, never one of them.

auto_LiRPA (Xu et al. 2020, "Automatic perturbation analysis for scalable certified robustness and beyond") does not
count the rounding of float32, so that its bounds may exceed what is proved here by some 1e-6 of the logits even where
both relax the network in the same way.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.certificates.certificate import specification
from qopt.errors import DataError, QoptError, UnsupportedModelError
from qopt.threat import ThreatModel

LirpaMethod = Literal["IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"]

IMAGES: Final = 16
"""Images that are bounded at a time."""


def lirpa_margins(
    twin: GraphModule, images: Tensor, labels: Tensor, threat: ThreatModel, *, method: LirpaMethod = "CROWN"
) -> Tensor:
    """Lower bounds, float64 (n,), of ``z_label - z_other`` for the worst other class over each image's ball.

    Arguments are those of `certificate.certify`. Balls in linf end at the box [0, 1]; those in l2 do not,
    because auto_LiRPA knows no box around them.

    Raises:
        DataError: images or labels that do not fit.
        UnsupportedModelError: auto_LiRPA is not installed, or cannot bound the network; its own words are passed on.
    """
    if labels.shape != (len(images),):
        raise DataError(
            "labels that do not fit", where="auto_LiRPA", expected=f"({len(images)},)", got=str(tuple(labels.shape))
        )
    library = _library()
    if not len(images):
        return torch.zeros(0, dtype=torch.float64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it traces with what torch has deprecated
        try:
            bounded = library.BoundedModule(twin, images[:1], device=images.device)
            parts = zip(torch.split(images, IMAGES), torch.split(labels, IMAGES), strict=True)
            found = [_margins(library, bounded, part, truth, threat, method) for part, truth in parts]
        except QoptError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise UnsupportedModelError("auto_LiRPA cannot bound the network", where=method, got=got) from error
    return torch.cat(found).double()


def _margins(
    library: Any, bounded: Any, images: Tensor, labels: Tensor, threat: ThreatModel, method: LirpaMethod
) -> Tensor:
    if threat.norm == "linf":
        low, high = (images - threat.eps).clamp(0, 1), (images + threat.eps).clamp(0, 1)
        ball = library.PerturbationLpNorm(norm=math.inf, eps=threat.eps, x_L=low, x_U=high)
    else:
        ball = library.PerturbationLpNorm(norm=2, eps=threat.eps)
    classes = bounded(images).shape[1]
    rows = specification(labels, classes)
    lower, _ = bounded.compute_bounds(
        x=(library.BoundedTensor(images, ball),), C=rows, method=method, bound_upper=False
    )
    worst: Tensor = lower.amin(1)
    return worst


def _library() -> Any:
    try:
        import auto_LiRPA
    except ImportError as error:
        raise UnsupportedModelError(
            "auto_LiRPA cannot be imported", where="cross-check of certificates", got=str(error),
            fix="install it from its repository; qopt's own certificates need no other library",
        ) from error  # fmt: skip
    return auto_LiRPA
