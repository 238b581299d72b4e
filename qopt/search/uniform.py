"""One format for every layer: the baseline every search has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from qopt.errors import InfeasibleError
from qopt.search.space import Outcome, Space, costs
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class UniformSearch:
    """The linear format of most bits that all layers can have within the limits."""

    name: ClassVar[str] = "uniform"
    uses_sensitivity: ClassVar[bool] = False

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """The target's linear formats."""
        return tuple(spec for spec in target if spec.kind == "int")

    def __call__(self, space: Space) -> Outcome:
        """Choose the widest; raises InfeasibleError where none keeps the limits."""
        specs = {c.spec for layer in space.layers for c in layer.candidates}
        for spec in sorted(specs, key=lambda s: -s.bits):
            chosen = [layer.candidate(spec) for layer in space.layers]
            spent = [sum(costs(c)[column] for c in chosen) for column, _ in space.budgets()]
            if all(s <= budget for s, (_, budget) in zip(spent, space.budgets(), strict=True)):
                reason = f"uniform {spec}"
                names = [layer.layer for layer in space.layers]
                return Outcome(dict.fromkeys(names, spec), dict.fromkeys(names, reason))
        raise InfeasibleError("no uniform format keeps the limits", got=", ".join(map(str, space.limits)))
