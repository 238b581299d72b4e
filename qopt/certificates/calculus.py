"""Network calculus: how far a whole network can move, and be moved by quantization, from the norms of its layers.

Every step carries five numbers in one norm (l2 or linf), over all images in [0, 1]::

    ||h(x) - h(x')|| <= lipschitz ||x - x'|| + slack        ||h(x)|| <= range        ||h_q(x) - h(x)|| <= deviation

An activation quantizer is a staircase: it has no Lipschitz constant, only ``slack``, one step per element. So has
float32, whose rounding is inside ``slack`` and ``deviation`` (as in `interval`). The formulas: products of
norms along a path, sums over additions, roots of sums of squares (l2) or maxima (linf) over concatenations, the root of
the number of windows that hold an element for maxima, and for two activations multiplied
``||X Y - X' Y'|| <= ||X|| ||Y - Y'|| + ||Y'|| ||X - X'||``, which is how attention gets a bound at all: on a bounded
set of images only (it has no global one, Kim et al. 2021).

On a standard deep network the result is vacuous, by many orders: `Claim` says so beside the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.certificates.ball import Ball
from qopt.certificates.curves import UNIT, Clamp, Staircase
from qopt.certificates.interval import Box, gamma, interval
from qopt.certificates.local import Locals, Triple, local_bound
from qopt.certificates.network import Affine, Bend, Concat, Entry, Maximum, Network, Opaque, Step, Sum
from qopt.certificates.operator_norms import OUTWARD, length, operator_norm, schur, weight_change
from qopt.certificates.read import read
from qopt.errors import UsageError
from qopt.threat import Norm


@final
@dataclass(frozen=True)
class Claim:
    """An upper bound with the word that goes with it.

    Attributes:
        value: the bound; infinite where there is none.
        vacuous: whether it says no more than what is known without it.
    """

    value: float
    vacuous: bool

    def __str__(self) -> str:
        """``0.123``, ``3.6e+08 (vacuous)`` or ``unbounded``."""
        if math.isinf(self.value):
            return "unbounded"
        return f"{self.value:.3g}" + (" (vacuous)" if self.vacuous else "")


@final
@dataclass(frozen=True)
class StepFacts:
    """The numbers of one step, as the module says, with the node's name and ONNX operator."""

    name: str
    op: str
    lipschitz: float
    slack: float
    range: float
    deviation: float


@final
@dataclass(frozen=True)
class NetworkBounds:
    """What norms say of a network over all images in [0, 1].

    Attributes:
        norm: of images, activations and logits.
        steps: every step's numbers, the logits' last.
        unbounded: nodes without a bound, ``name (operator)``: all that follows them is infinite.
        other_range: the range of the float network's logits; None where only one network was given.
    """

    norm: Norm
    steps: tuple[StepFacts, ...]
    unbounded: tuple[str, ...]
    other_range: float | None

    @property
    def last(self) -> StepFacts:
        """The logits."""
        return self.steps[-1]

    def change(self, eps: float, margin: float | None = None) -> Claim:
        """How far the logits move while the image moves by ``eps`` in this norm.

        Vacuous from twice the range of the logits on, and from ``margin`` on where one is given: a typical distance of
        the logits from a change of the prediction.
        """
        value = (self.last.lipschitz * eps if eps else 0.0) + self.last.slack
        return _claim(value * OUTWARD, 2 * self.last.range, margin)

    def quantization(self, margin: float | None = None) -> Claim:
        """How far quantization moves the logits, whatever the image.

        Vacuous from the sum of both ranges on, and from ``margin`` on. Raises UsageError for one network alone.
        """
        if self.other_range is None:
            raise UsageError("a deviation needs two networks", where="certificates", fix="give the float twin too")
        return _claim(self.last.deviation, self.last.range + self.other_range, margin)

    def radii(self, margins: Tensor) -> Tensor:
        """The radius in which images with these clean margins ``z_label - z_other`` keep their prediction: (n,).

        ``z_label - z_other`` moves by at most sqrt(2) (l2) or 2 (linf) times what the logits move. 0 where the slack
        alone may use the margin up.
        """
        factor = (2.0 if self.norm == "linf" else math.sqrt(2)) * OUTWARD
        left = margins.double() / factor - self.last.slack
        speed = self.last.lipschitz if self.last.lipschitz > 0 else math.inf
        found = torch.full_like(left, math.inf) if self.last.lipschitz == 0 else left / speed
        return torch.where(left > 0, found, torch.zeros_like(left))


def _claim(value: float, known: float, margin: float | None) -> Claim:
    return Claim(value, not value < known or (margin is not None and value >= margin))


def network_bounds(
    twin: GraphModule, image_shape: tuple[int, ...], norm: Norm = "l2", float_twin: GraphModule | None = None
) -> NetworkBounds:
    """The calculus on one twin, or on a quantized one beside the float one that it was made from.

    Both must have the same structure: the float twin in canonical form (`qopt.quantize.Quantizer.float_graph`), the
    quantized one with activation quantizers more. Steps are paired by the names of their nodes.

    Raises:
        UnsupportedModelError: what `qopt.certificates.read.read` raises.
        UsageError: the two networks differ in more than weights, biases and quantizers.
    """
    network = read(twin, image_shape)
    walk = _Walk(network, norm)
    walk.run()
    if float_twin is None:
        return NetworkBounds(norm, tuple(walk.facts), tuple(walk.unbounded), None)
    reference = _Walk(read(float_twin, image_shape), norm)
    reference.run()
    deviations = _Deviations(walk, reference)
    deviations.run()
    facts = [
        StepFacts(f.name, f.op, f.lipschitz, f.slack, f.range, d)
        for f, d in zip(walk.facts, deviations.found, strict=True)
    ]
    unbounded = dict.fromkeys((*walk.unbounded, *reference.unbounded))
    return NetworkBounds(norm, tuple(facts), tuple(unbounded), reference.facts[-1].range)


@final
@dataclass(eq=False)
class _Walk:
    """One network in step order; `facts` with a deviation of 0, `boxes` where intervals pass."""

    network: Network
    norm: Norm
    facts: list[StepFacts] = field(default_factory=list)
    boxes: list[Box | None] = field(default_factory=list)
    norms: dict[int, float] = field(default_factory=dict)
    locals: dict[int, Locals] = field(default_factory=dict)
    unbounded: list[str] = field(default_factory=list)

    def run(self) -> None:
        shape = self.network.image_shape
        images = torch.full((1, *shape), 0.5, dtype=torch.float64)
        ball = Ball(images, torch.zeros_like(images), torch.ones_like(images), None)
        for place, step in enumerate(self.network.steps):
            self.boxes.append(self._box(step, ball))
            found = self._bound(place, step)
            range_ = min(found.range, self._box_range(place))
            if math.isinf(found.lipschitz) and isinstance(step, Opaque):
                self.unbounded.append(f"{step.name} ({step.op})")
            self.facts.append(StepFacts(step.name, step.op, found.lipschitz, found.slack, range_, 0.0))

    def _box(self, step: Step, ball: Ball) -> Box | None:
        inputs = [self.boxes[i] for i in step.inputs]
        known = [box for box in inputs if box is not None]
        if isinstance(step, Opaque) or len(known) < len(inputs):
            return None
        return interval(step, known, ball)

    def _box_range(self, place: int) -> float:
        box = self.boxes[place]
        return math.inf if box is None else length(box.size, self.norm)

    def _bound(self, place: int, step: Step) -> Triple:
        sources = [self.facts[i] for i in step.inputs]
        if isinstance(step, Entry):
            return Triple(1.0, 0.0, math.inf)
        if isinstance(step, Affine):
            return self._affine(place, step, sources[0])
        if isinstance(step, (Sum, Concat)):
            join = joined(step, self.norm)
            rounding = gamma(2 * len(sources) + 4) * sum(s.range for s in sources) if isinstance(step, Sum) else 0.0
            slack = join([s.slack for s in sources]) + 2 * rounding
            return Triple(join([s.lipschitz for s in sources]), slack, join([s.range for s in sources]) + rounding)
        if isinstance(step, Bend):
            return self._bend(place, step, sources[0])
        if isinstance(step, Maximum):
            factor = self.norms[place] = multiplicity(step, self.norm)
            return Triple(*(factor * v * OUTWARD for v in (sources[0].lipschitz, sources[0].slack, sources[0].range)))
        assert isinstance(step, Opaque)
        ranges = [Triple(s.lipschitz, s.slack, s.range) for s in sources]
        shapes = [self.network.steps[i].shape for i in step.inputs]
        local = self.locals[place] = local_bound(step, ranges, shapes, self.norm)
        return local.bound

    def _affine(self, place: int, step: Affine, source: StepFacts) -> Triple:
        shape = self.network.steps[step.inputs[0]].shape
        factor = self.norms[place] = operator_norm(step.map, shape, self.norm)
        offset = offset_length(step.map.offset, step.shape, self.norm)
        rounding = 0.0
        if step.map.terms:
            reach = schur(step.map, shape) if self.norm == "l2" else factor
            rounding = gamma(2 * step.map.terms + 8) * (reach * source.range + offset)
        return Triple(
            factor * source.lipschitz * OUTWARD,
            (factor * source.slack + 2 * rounding) * OUTWARD,
            (factor * source.range + offset + rounding) * OUTWARD,
        )

    def _bend(self, place: int, step: Bend, source: StepFacts) -> Triple:
        factor = self.norms[place] = step.curve.slope
        slack = factor * source.slack + step.curve.jump * width(step.shape, self.norm)
        exact = isinstance(step.curve, (Clamp, Staircase))
        slack += 0.0 if exact else 64 * UNIT * self._box_range(place)
        return Triple(factor * source.lipschitz * OUTWARD, slack * OUTWARD, math.inf)


def offset_length(offset: Tensor | None, shape: tuple[int, ...], norm: Norm) -> float:
    """The norm of a bias over all positions."""
    return 0.0 if offset is None else length(offset.expand(shape), norm)


def width(shape: tuple[int, ...], norm: Norm) -> float:
    """The norm of a vector of ones."""
    return 1.0 if norm == "linf" else math.sqrt(math.prod(shape)) * OUTWARD


def joined(step: Step, norm: Norm) -> Callable[[list[float]], float]:
    """How the numbers of several inputs become one."""
    if isinstance(step, Sum):
        return lambda values: math.fsum(values) * OUTWARD
    return max if norm == "linf" else lambda values: math.hypot(*values) * OUTWARD


def multiplicity(step: Maximum, norm: Norm) -> float:
    """The Lipschitz constant of a maximum over windows: the root of how many hold one element."""
    if norm == "linf":
        return 1.0
    places = step.windows.flatten()
    return math.sqrt(int(torch.bincount(places[places >= 0]).max())) * OUTWARD


@final
@dataclass(eq=False)
class _Deviations:
    """``||h_q - h||`` for every step of ``mine``, the quantized network, beside ``other``, the float one."""

    mine: _Walk
    other: _Walk
    found: list[float] = field(default_factory=list)
    _partner: list[int] = field(default_factory=list)

    def run(self) -> None:
        partners = _keys(self.other.network)
        for place, key in enumerate(_keys(self.mine.network)):
            step = self.mine.network.steps[place]
            inserted = key not in partners and isinstance(step, Bend) and isinstance(step.curve, Staircase)
            partner = self._partner[step.inputs[0]] if inserted else _place(partners, key)
            self._partner.append(partner)
            self._check(step, partner, inserted)
            recursive = self._inserted(step) if inserted else self._deviation(place, step, partner)
            known = self.mine.facts[place].range + self.other.facts[partner].range
            self.found.append(recursive if recursive < known else known)

    def _check(self, step: Step, partner: int, inserted: bool) -> None:
        other = self.other.network.steps[partner]
        sources = tuple(self._partner[i] for i in step.inputs)
        if not inserted and (type(other) is not type(step) or other.inputs != sources or other.shape != step.shape):
            raise UsageError("two networks of different structure", where=f"node {step.name!r}")

    def _inserted(self, step: Step) -> float:
        """``|Q(h) - h|`` at the ends of what h can be, and half a step between them."""
        assert isinstance(step, Bend)
        assert isinstance(step.curve, Staircase)
        source, box = self.found[step.inputs[0]], self.mine.boxes[step.inputs[0]]
        if box is None or step.curve.codes:
            return math.inf
        low, high = step.curve.range(box.low, box.high)
        ends = torch.maximum((low - box.low).abs(), (high - box.high).abs())
        away = torch.maximum(ends, step.curve.step.double() / 2)
        return (source + length(away + 16 * UNIT * box.size, self.mine.norm)) * OUTWARD

    def _deviation(self, place: int, step: Step, partner: int) -> float:
        values = [self.found[i] for i in step.inputs]
        facts, norm = self.other.facts[partner], self.mine.norm
        if isinstance(step, Entry):
            return 0.0
        if isinstance(step, Affine):
            return self._affine(place, step, partner)
        if isinstance(step, (Sum, Concat)):
            rounding = gamma(2 * len(values) + 4) * sum(self.mine.facts[i].range for i in step.inputs)
            rounding += gamma(2 * len(values) + 4) * sum(self.other.facts[self._partner[i]].range for i in step.inputs)
            return joined(step, norm)(values) + rounding
        if isinstance(step, Opaque):
            ranges = [self.mine.facts[i].range for i in step.inputs]
            others = [self.other.facts[self._partner[i]].range for i in step.inputs]
            return self.mine.locals[place].deviation(values, ranges, others)
        jump = step.curve.jump * width(step.shape, norm) if isinstance(step, Bend) else 0.0
        exact = not isinstance(step, Bend) or isinstance(step.curve, (Clamp, Staircase))
        rounding = 0.0 if exact else 64 * UNIT * (facts.range + self.mine.facts[place].range)
        return (self.mine.norms[place] * values[0] + jump + rounding) * OUTWARD

    def _affine(self, place: int, step: Affine, partner: int) -> float:
        """``||W_q (h_q - h)|| + ||(W_q - W) h + b_q - b||``, and what float32 does to both."""
        other = self.other.network.steps[partner]
        assert isinstance(other, Affine)
        try:
            change = weight_change(step.map, other.map)
        except ValueError as error:
            raise UsageError(f"two networks of different structure: {error}", where=f"node {step.name!r}") from error
        norm, shape = self.mine.norm, other.shape
        source = other.inputs[0]
        offsets = [
            torch.zeros((), dtype=torch.float64) if m.offset is None else m.offset for m in (step.map, other.map)
        ]
        bias = length((offsets[0] - offsets[1]).expand(shape), norm)
        moved = 0.0
        if change is not None:
            inputs = self.other.network.steps[source].shape
            moved = operator_norm(change, inputs, norm) * self.other.facts[source].range
            box = self.other.boxes[source]
            if box is not None:
                reach = change.magnitude().product(box.size)
                moved = min(moved, length(reach, norm) * OUTWARD)
        rounding = self._rounding(self.mine, step, self.mine.facts[step.inputs[0]].range)
        rounding += self._rounding(self.other, other, self.other.facts[source].range)
        return (self.mine.norms[place] * self.found[step.inputs[0]] + moved + bias + rounding) * OUTWARD

    @staticmethod
    def _rounding(walk: _Walk, step: Affine, range_: float) -> float:
        if not step.map.terms:
            return 0.0
        reach = schur(step.map, walk.network.steps[step.inputs[0]].shape)
        if walk.norm == "linf":
            reach = operator_norm(step.map, walk.network.steps[step.inputs[0]].shape, "linf")
        offset = offset_length(step.map.offset, step.shape, walk.norm)
        return gamma(2 * step.map.terms + 8) * (reach * range_ + offset)


def _keys(network: Network) -> dict[tuple[str, int], int]:
    """The place of each step, by its node's name and its number among that node's steps; the image first."""
    found: dict[tuple[str, int], int] = {}
    for place, step in enumerate(network.steps):
        name = step.name if place else ""
        number = 0
        while (name, number) in found:
            number += 1
        found[name, number] = place
    return found


def _place(places: Mapping[tuple[str, int], int], key: tuple[str, int]) -> int:
    if key not in places:
        raise UsageError("two networks of different structure", where=f"node {key[0]!r}", expected="it in both")
    return places[key]
