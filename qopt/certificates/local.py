"""Operators that have a bound only in the calculus: softmax, normalisation, products of activations, bumpy curves.

The largest slopes were found by maximising the derivative; each is rounded up in its last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from qopt.certificates.interval import gamma
from qopt.certificates.network import Opaque
from qopt.graph.operators import activation, normalisation
from qopt.threat import Norm


class Triple(NamedTuple):
    """``lipschitz``, ``slack`` and ``range`` of a step, as `qopt.certificates.calculus` defines them."""

    lipschitz: float
    slack: float
    range: float


Deviate = Callable[[list[float], list[float], list[float]], float]
"""Deviations of the inputs, their ranges in the quantized and in the float network, to the output's deviation."""


@final
@dataclass(frozen=True)
class Locals:
    """A bound, and how deviations pass."""

    bound: Triple
    deviation: Deviate


UNBOUNDED: Final = Locals(Triple(math.inf, math.inf, math.inf), lambda *_: math.inf)
"""No bound is known."""

ROUNDING: Final = 2.0**-17
"""Float32 evaluation of any function here is off by less than this part of its range (softmax over 2**6 terms, sums of
normalisation over 2**6; more terms scale it)."""

_SLOPES: Final[dict[Any, float]] = {F.hardswish: 1.5, F.mish: 1.0886, F.gelu: 1.1290, F.softsign: 1.0, torch.abs: 1.0}
"""The largest slope of functions with f(0) = 0."""


def local_bound(step: Opaque, inputs: list[Triple], shapes: list[tuple[int, ...]], norm: Norm) -> Locals:
    """The bound of one operator, `UNBOUNDED` where none is known."""
    target, args = step.node.target, step.node.args
    if len(inputs) == 2 and target is torch.matmul:
        if len(shapes[0]) < 2 or shapes[0][:-2] != shapes[1][:-2]:
            return UNBOUNDED  # one is repeated, which its norm does not know
        # the largest entry of a product is at most as many times the largest entries as there are terms
        return _product(inputs, float(shapes[0][-1]) if norm == "linf" else 1.0, shapes[0][-1])
    if len(inputs) == 2 and target is torch.mul and shapes[0] == shapes[1]:
        return _product(inputs, 1.0, 1)
    if len(inputs) != 1:
        return UNBOUNDED
    slope = _slope(target, args)
    if slope is not None:
        return _lipschitz(inputs[0], slope, slope * inputs[0].range, 1)
    count = math.prod(step.shape)
    if target is torch.softmax:
        axis = int(args[1])  # type: ignore[arg-type]
        terms = step.shape[axis - 1 if axis > 0 else axis]
        return _lipschitz(inputs[0], 0.5, 1.0 if norm == "linf" else math.sqrt(count / terms), terms)
    if target in (normalisation.normalized, normalisation.rms_normalized):
        return _normalised(step, inputs[0], norm)
    return UNBOUNDED


def _slope(target: Any, args: tuple[Any, ...]) -> float | None:
    """The Lipschitz constant of a function of one number that is 0 at 0."""
    if target in _SLOPES:
        return _SLOPES[target]
    if target is activation.swished and float(args[1]) == 1.0:
        return 1.0999
    if target is F.elu:
        return max(1.0, abs(float(args[1])))
    if target is F.celu:
        return 1.0
    if target is activation.scaled_elu:
        return abs(float(args[2])) * max(1.0, abs(float(args[1])))
    if target is F.leaky_relu:
        return max(1.0, abs(float(args[1])))
    return None


def _lipschitz(source: Triple, slope: float, range_: float, terms: int, lost: float = 0.0) -> Locals:
    """A function of one Lipschitz constant and range; ``lost`` is further rounding."""
    rounding = ROUNDING * max(1.0, terms / 64) * range_ + lost
    bound = Triple(slope * source.lipschitz, slope * source.slack + 2 * rounding, range_)
    return Locals(bound, lambda deviations, *_: slope * deviations[0] + 2 * rounding)


def _product(inputs: list[Triple], factor: float, terms: int) -> Locals:
    """``||X Y|| <= factor ||X|| ||Y||``: Frobenius norms, or largest entries."""
    first, second = inputs
    rounding = ROUNDING * max(1.0, terms / 64) * factor * first.range * second.range

    def crossed(a: float, b: float, mine: float, others: float) -> float:
        return factor * (_times(mine, b) + _times(others, a))

    def deviation(deviations: list[float], mine: list[float], others: list[float]) -> float:
        terms_ = ROUNDING * max(1.0, terms / 64) * factor
        room = terms_ * (_times(mine[0], mine[1]) + _times(others[0], others[1]))
        return crossed(deviations[0], deviations[1], mine[0], others[1]) + room

    bound = Triple(
        crossed(first.lipschitz, second.lipschitz, first.range, second.range),
        crossed(first.slack, second.slack, first.range, second.range) + 2 * rounding,
        factor * _times(first.range, second.range) + rounding,
    )
    return Locals(bound, deviation)


def _times(a: float, b: float) -> float:
    """The product, 0 where one is 0 even if the other is infinite."""
    return a * b if a and b else 0.0


def _normalised(step: Opaque, source: Triple, norm: Norm) -> Locals:
    """LayerNorm and RMSNorm: at most ``max |scale| / sqrt(epsilon)`` in l2, attained near a constant row.

    The derivative is ``(I - 1 1'/n - h h'/n) / deviation``, h the normalised row; in linf its rows sum to at most
    ``2 + sqrt(n)``. Only a lower bound of the deviation on the images at hand could make this useful.
    """
    args, values = step.node.args, step.node.graph.owning_module
    if values is None:
        return UNBOUNDED
    constants = [_tensor(values, a) for a in args[1:3]]
    scale, epsilon = constants[0], float(args[-1])  # type: ignore[arg-type]
    axis = int(args[-2])  # type: ignore[arg-type]
    shift = constants[1] if step.node.target is normalisation.normalized else None
    if scale is None or epsilon <= 0:
        return UNBOUNDED
    width = math.prod(step.shape[axis - 1 if axis > 0 else axis :])
    largest, added = float(scale.abs().max()), 0.0
    if shift is not None:
        wide = shift.double().expand(step.shape)
        added = float(wide.abs().max()) if norm == "linf" else float(torch.linalg.vector_norm(wide)) * (1 + 2.0**-36)
    reach = math.sqrt(width if norm == "linf" else math.prod(step.shape))
    slope = largest / math.sqrt(epsilon) * (1.0 if norm == "l2" else 2 + math.sqrt(width))
    # what float32 loses in ``h - mean`` may be divided by as little as the root of epsilon
    lost = slope * gamma(2 * width + 8) * source.range
    return _lipschitz(source, slope * (1 + 2.0**-36), largest * reach * (1 + 2.0**-36) + added, width, lost)


def _tensor(module: Any, argument: Any) -> Tensor | None:
    """A constant of the twin that an argument names."""
    if getattr(argument, "op", "") != "get_attr":
        return None
    value: Tensor = module.get_buffer(str(argument.target))
    return value
