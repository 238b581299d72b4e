"""QUANOS of Panda (2020): the more an attack moves what a layer makes, the more bits the layer gets."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, final

from qopt.errors import UsageError
from qopt.search.feasible import feasible, infeasible
from qopt.search.items import build_items
from qopt.search.space import Outcome, Space
from qopt.spec import WeightSpec

LEAST_BITS: Final = 2
"""No layer gets fewer, where it has a format of more."""


@final
@dataclass(frozen=True)
class QuanosSearch:
    """Layer l gets ``round(s * ANS_l / max ANS)`` bits, at least 2, in the target's linear formats.

    The adversarial noise sensitivity is ``ANS_l = ||A_adv - A||_2 / ||A||_2`` of the layer's output A. The paper gives
    widths in proportion to it and leaves open how they meet a budget: here ``s`` is the largest at which every limit
    holds, up to the one that gives all layers their widest format; without limits it is the widest format's bits, so
    that the most sensitive layer gets those. A layer without the width gets the next narrower one that it has, tied
    layers the largest ANS among them, and of several formats of one width the target's first is taken. Activations
    keep the target's format, where the paper gives them the layer's width. More bits must never cost less: limits are
    tried by bisection.

    ``noise`` is the ANS of every layer, which the job measures.
    """

    noise: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "quanos"
    uses_sensitivity: ClassVar[bool] = False

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """The target's linear formats."""
        return tuple(spec for spec in target if spec.kind == "int")

    def __call__(self, space: Space) -> Outcome:
        """Choose the widths.

        Raises:
            InfeasibleError: no scale keeps the limits.
            UsageError: a layer without an ANS, or one without a linear format.
        """
        groups = _groups(space, self.noise)
        plans = _plans(groups, limited=bool(space.limits))
        kept = bisect_left(plans, True, key=lambda plan: not feasible(_narrowed(space, plan)))
        if not kept:
            raise infeasible(_narrowed(space, plans[0]))
        names, chosen = [layer.layer for layer in space.layers], plans[kept - 1]
        shares = {name: group.share for group in groups for name in group.layers}
        reasons = {name: f"ANS {self.noise[name]:.3g}, {shares[name]:.0%} of the largest" for name in names}
        return Outcome({name: chosen[name] for name in names}, reasons)


@final
@dataclass(frozen=True)
class _Group:
    """Layers that share a format, their formats by bits and their ANS as a share of the network's largest."""

    layers: tuple[str, ...]
    widths: Mapping[int, WeightSpec]
    share: float

    def spec(self, scale: float) -> WeightSpec:
        """The format at a scale: the widest of at most its bits, else the narrowest."""
        bits = max(_round(min(scale * self.share, max(self.widths))), LEAST_BITS)
        return self.widths[max((b for b in self.widths if b <= bits), default=min(self.widths))]


def _round(value: float) -> int:
    """To the nearest whole number, halves up; what is a half but for rounding is one."""
    return math.floor(value + 0.5 + 1e-9)


def _groups(space: Space, noise: Mapping[str, float]) -> list[_Group]:
    found = []
    for item in build_items(space):
        missing = [name for name in item.layers if not math.isfinite(noise.get(name, math.nan))]
        if missing:
            raise UsageError(
                "QUANOS needs every layer's adversarial noise sensitivity", where=missing[0], fix="give --data"
            )
        widths: dict[int, WeightSpec] = {}
        for spec in item.specs:
            if spec.kind == "int":
                widths.setdefault(spec.bits, spec)
        if not widths:
            raise UsageError("QUANOS chooses among linear formats", where=item.layers[0], got="none on this target")
        found.append((item.layers, widths, max(noise[name] for name in item.layers)))
    most = max(ans for _, _, ans in found)
    return [_Group(layers, widths, ans / most if most > 0 else 1.0) for layers, widths, ans in found]


def _plans(groups: Sequence[_Group], *, limited: bool) -> list[dict[str, WeightSpec]]:
    """The different plans by growing scale; without limits the one at the scale of the widest format."""
    widest = max(max(group.widths) for group in groups)
    scales = [float(widest)]
    if limited:
        steps = {(b - 0.5) / g.share for g in groups if g.share > 0 for b in g.widths if b > LEAST_BITS}
        scales = [0.0, *sorted(steps)]
    plans: list[dict[str, WeightSpec]] = []
    for scale in scales:
        plan = {name: group.spec(scale) for group in groups for name in group.layers}
        if not plans or plan != plans[-1]:
            plans.append(plan)
    return plans


def _narrowed(space: Space, plan: Mapping[str, WeightSpec]) -> Space:
    """The space in which ``plan`` is all there is."""
    layers = (replace(x, candidates=(x.candidate(plan[x.layer]),)) for x in space.layers)
    return replace(space, layers=tuple(layers))
