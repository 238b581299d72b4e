"""Lipschitz thresholds: which candidates a layer may take at all, and by how much the thresholds had to be relaxed.

| form | a candidate passes when | source |
|---|---|---|
| paper | ``||W_q|| <= 1.1 ||W||`` and ``||dW|| <= 0.3`` (1.5 where ``||W|| >= 3``) | Song, Ranjan, Li 2021, section 5 |
| relative | ``||dW|| <= t ||W||`` | scale-free form of it |
| weighted | ``||dW C^(1/2)|| <= t ||W C^(1/2)||``, C the second moment of the layer's inputs | scale- and data-aware |
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Literal, final

from qopt.errors import UsageError
from qopt.search.feasible import feasible, infeasible, least_spent
from qopt.search.space import Candidate, LayerSpace, Space

Form = Literal["paper", "relative", "weighted", "none"]


@final
@dataclass(frozen=True)
class Thresholds:
    """One form with its bound ``value`` (ignored by ``paper`` and ``none``)."""

    form: Form = "paper"
    value: float = 0.25

    def excess(self, layer: LayerSpace, candidate: Candidate) -> float:
        """The factor by which thresholds must grow to admit the candidate; at most 1 where it passes as it is."""
        if self.form == "paper":
            bound_q, bound_d = paper_thresholds(layer.norm.upper)
            return max(_ratio(candidate.norm.upper, bound_q), _ratio(candidate.error.upper, bound_d))
        if self.form == "relative":
            return _ratio(candidate.error.upper, self.value * layer.norm.lower)
        if self.form == "weighted" and candidate.weighted is not None:
            return _ratio(candidate.weighted.upper, self.value)
        return 0.0


def paper_thresholds(norm: float) -> tuple[float, float]:
    """``(T_q, T_d)`` of Algorithm 1 for a layer with ``||W||_2 = norm``: ``1.10 norm`` and 0.3 or 1.5."""
    return 1.10 * norm, 0.3 if norm < 3.0 else 1.5


@final
@dataclass(frozen=True)
class Filtered:
    """The space after the thresholds.

    Attributes:
        space: the candidates that are left.
        factor: by how much all thresholds were relaxed; 1 where they were not.
        relaxed: the layers that needed it: those without a candidate within the thresholds, or whose candidates within
            them cost too much for the limits.
    """

    space: Space
    factor: float
    relaxed: tuple[str, ...]


def apply_thresholds(space: Space, thresholds: Thresholds) -> Filtered:
    """Drop candidates above the thresholds, relaxing all by the smallest common factor that leaves a plan.

    Raises:
        InfeasibleError: even without thresholds no plan keeps the limits.
        UsageError: weighted thresholds and no candidate with a weighted error.
    """
    candidates = [(layer, c) for layer in space.layers for c in layer.candidates]
    if thresholds.form == "weighted" and all(c.weighted is None for _, c in candidates):
        raise UsageError("weighted thresholds weigh errors by images", where="--thresholds", fix="give --data")
    excess = {(layer.layer, str(c.spec)): thresholds.excess(layer, c) for layer, c in candidates}
    # below the largest of the layers' smallest excesses some layer has no candidate
    least = max(
        min((excess[layer.layer, str(c.spec)] for c in layer.candidates), default=0.0) for layer in space.layers
    )
    factors = sorted({1.0, *excess.values()})
    usable = (f for f in factors[bisect_left(factors, max(least, 1.0)) :] if feasible(_keep(space, excess, f)))
    factor = next(usable, None)
    if factor is None:
        raise infeasible(space)
    kept = _keep(space, excess, factor)
    return Filtered(kept, factor, _relaxed(kept, _keep(space, excess, 1.0)) if factor > 1 else ())


def _keep(space: Space, excess: dict[tuple[str, str], float], factor: float) -> Space:
    layers = [
        replace(layer, candidates=tuple(c for c in layer.candidates if excess[layer.layer, str(c.spec)] <= factor))
        for layer in space.layers
    ]
    return replace(space, layers=tuple(layers))


def _relaxed(kept: Space, strict: Space) -> tuple[str, ...]:
    """Layers whose cheapest candidate was admitted only by relaxing, or all that gained one where there is none."""
    pairs = list(zip(kept.layers, strict.layers, strict=True))
    columns = [column for column, _ in kept.budgets()]
    needy = [
        new.layer for new, old in pairs
        if not old.candidates or any(least_spent([new], column) < least_spent([old], column) for column in columns)
    ]  # fmt: skip
    return tuple(needy or [new.layer for new, old in pairs if len(new.candidates) > len(old.candidates)])


def _ratio(value: float, bound: float) -> float:
    return value / bound if bound > 0 else (0.0 if value == 0 else float("inf"))
