"""One format for every layer: the baseline every search has to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from qopt.errors import InfeasibleError
from qopt.search.feasible import feasible
from qopt.search.space import Outcome, Space
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
        """Choose the widest, the target's first among equals; raises InfeasibleError where none keeps the limits."""
        names = [layer.layer for layer in space.layers]
        for spec in sorted((c.spec for c in space.layers[0].candidates), key=lambda s: -s.bits):
            if feasible(_only(space, spec)):
                return Outcome(dict.fromkeys(names, spec), dict.fromkeys(names, f"uniform {spec}"))
        raise InfeasibleError(
            "no linear format that all layers can take keeps the limits", got=", ".join(map(str, space.limits)) or None
        )


def _only(space: Space, spec: WeightSpec) -> Space:
    layers = (replace(x, candidates=tuple(c for c in x.candidates if c.spec == spec)) for x in space.layers)
    return replace(space, layers=tuple(layers))
