"""Lipschitz thresholds: which candidates a layer may take at all, and by how much the thresholds had to be relaxed.

| form | a candidate passes when | source |
|---|---|---|
| paper | ``||W_q|| <= 1.1 ||W||`` and ``||dW|| <= 0.3`` (1.5 where ``||W|| >= 3``) | Song, Ranjan, Li 2021, section 5 |
| relative | ``||dW|| <= t ||W||`` | scale-free form of it |
| weighted | ``||dW C^(1/2)|| <= t ||W C^(1/2)||``, C the second moment of the layer's inputs | scale- and data-aware |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, final

from qopt.errors import InfeasibleError
from qopt.search.space import Candidate, LayerSpace, Space, costs

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
    """The space after the thresholds: ``factor`` above 1 says by how much all were relaxed, and for which layers."""

    space: Space
    factor: float
    relaxed: tuple[str, ...]


def apply_thresholds(space: Space, thresholds: Thresholds) -> Filtered:
    """Drop candidates above the thresholds, relaxing all by the smallest common factor that leaves a plan.

    Raises:
        InfeasibleError: even without thresholds no plan keeps the limits.
    """
    excess = {(layer.layer, c.spec): thresholds.excess(layer, c) for layer in space.layers for c in layer.candidates}
    for factor in sorted({1.0, *(e for e in excess.values() if e > 1.0)}):
        kept = _keep(space, {key for key, value in excess.items() if value <= factor})
        if kept is not None and _feasible(kept):
            relaxed = [
                layer.layer for layer in kept.layers
                if not any(excess[layer.layer, c.spec] <= 1.0 for c in layer.candidates)
            ]  # fmt: skip
            return Filtered(kept, factor, tuple(relaxed) if factor > 1.0 else ())
    raise _infeasible(space)


def _keep(space: Space, admitted: set[tuple[str, object]]) -> Space | None:
    layers = [
        replace(layer, candidates=tuple(c for c in layer.candidates if (layer.layer, c.spec) in admitted))
        for layer in space.layers
    ]
    return replace(space, layers=tuple(layers)) if all(layer.candidates for layer in layers) else None


def _feasible(space: Space) -> bool:
    return all(_least(space.layers, column) <= budget * (1 + 1e-12) for column, budget in space.budgets())


def _least(layers: Iterable[LayerSpace], column: str) -> float:
    return sum(min(costs(c)[column] for c in layer.candidates) for layer in layers)


def _infeasible(space: Space) -> InfeasibleError:
    for limit, (column, budget) in zip(space.limits, space.budgets(), strict=True):
        least = _least(space.layers, column)
        if least > budget:
            reach = least / space.weights if limit.quantity == "bits" else least
            unit = "bits" if limit.quantity == "bits" else "bytes"
            return InfeasibleError(
                "no plan keeps the limit", where=str(limit), got=f"at least {reach:.4g} {unit} with these candidates",
                fix="raise the limit or choose a target with lower-bit candidates",
            )  # fmt: skip
    return InfeasibleError("no plan keeps all limits at once", got=", ".join(map(str, space.limits)))


def _ratio(value: float, bound: float) -> float:
    return value / bound if bound > 0 else (0.0 if value == 0 else float("inf"))
