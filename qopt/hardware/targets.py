"""Targets: names for candidates, cost model and limits. `--target a,b` intersects candidates and joins limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qopt.errors import UsageError, nearest
from qopt.limits import Limit
from qopt.spec import ActivationSpec, WeightSpec


@final
@dataclass(frozen=True)
class Target:
    """What a `--target` stands for.

    Attributes:
        name: the word on the command line.
        weights: candidate formats of a weight.
        activations: format of activations where data is given to calibrate them.
        limits: limits that the target itself sets.
        cost_models: names in the group `qopt.cost_models`.
    """

    name: str
    weights: tuple[WeightSpec, ...]
    activations: ActivationSpec
    limits: tuple[Limit, ...]
    cost_models: tuple[str, ...] = ("bits",)

    @property
    def expansion(self) -> str:
        """One line that spells the target out, the first of output and report."""
        limits = ", ".join(map(str, self.limits)) or "no limits"
        formats = ", ".join(map(str, self.weights))
        return f"{self.name}: weights {formats}; activations {self.activations}; {limits}"


def _formats(*texts: str) -> tuple[WeightSpec, ...]:
    return tuple(WeightSpec.parse(text) for text in texts)


_INT8 = ActivationSpec(8)
_MIXED = _formats("ternary", "int2", "int3", "int4", "int4:max", "log4", "log4:max", "int8")
TARGETS = {
    target.name: target
    for target in (
        Target("int8", _formats("int8"), _INT8, (Limit("bits", 8.0),)),
        Target("int4", _MIXED, _INT8, (Limit("bits", 4.0),)),
        Target("int4-uniform", _formats("int4"), _INT8, (Limit("bits", 4.0),)),
        Target("int2", _MIXED, _INT8, (Limit("bits", 2.0),)),
    )
}


def parse_target(text: str) -> Target:
    """Read ``int4`` or ``int4,other``; raises UsageError for a name that is none, or where no candidate is left."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise UsageError("unknown target", where="--target", got=repr(name), fix=nearest(name, TARGETS))
    parts = [TARGETS[name] for name in names]
    weights = tuple(spec for spec in parts[0].weights if all(spec in part.weights for part in parts))
    if not weights:
        raise UsageError("the targets have no weight format in common", where="--target", got=text)
    return Target(
        ",".join(names),
        weights,
        min((part.activations for part in parts), key=lambda spec: spec.bits),
        tuple(dict.fromkeys(limit for part in parts for limit in part.limits)),
        tuple(dict.fromkeys(model for part in parts for model in part.cost_models)),
    )
