"""Targets: names for candidates, cost models and limits. `--target a,b` intersects candidates and joins limits.

A name is a precision (``int8``, ``int4``, ...) or a cost model: a device brings every format that it takes, its own
limits and its prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from qopt.errors import UsageError, nearest
from qopt.hardware.checked import GROUP, load_model
from qopt.hardware.cost_model import LayerDescription
from qopt.limits import Limit
from qopt.plugins import plugins
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
        narrower: further formats of activations that a tensor may have where a limit prices them.
    """

    name: str
    weights: tuple[WeightSpec, ...]
    activations: ActivationSpec
    limits: tuple[Limit, ...]
    cost_models: tuple[str, ...] = ("bits",)
    narrower: tuple[ActivationSpec, ...] = ()

    @property
    def expansion(self) -> str:
        """One line that spells the target out, the first of output and report."""
        limits = ", ".join(map(str, self.limits)) or "no limits"
        formats = ", ".join(map(str, self.weights))
        priced = ", ".join(name for name in self.cost_models if name != "bits")
        fewer = sorted({spec.bits for spec in self.narrower}, reverse=True)
        activations = f"{self.activations}" + (f" or fewer bits ({', '.join(map(str, fewer))})" if fewer else "")
        text = f"{self.name}: weights {formats}; activations {activations}; {limits}"
        return f"{text}; priced by {priced}" if priced else text


def _formats(*texts: str) -> tuple[WeightSpec, ...]:
    return tuple(WeightSpec.parse(text) for text in texts)


_INT8 = ActivationSpec(8)
_MIXED = _formats("ternary", "int2", "int3", "int4", "int4:max", "log4", "log4:max", "int8")
_SEVEN, _EIGHT = _formats("int7", "int8")
TARGETS = {
    target.name: target
    for target in (
        Target("int8", _formats("int8"), _INT8, (Limit("bits", 8.0),)),
        Target("int4", _MIXED, _INT8, (Limit("bits", 4.0),)),
        Target("int4-uniform", _formats("int4"), _INT8, (Limit("bits", 4.0),)),
        Target("int2", _MIXED, _INT8, (Limit("bits", 2.0),)),
    )
}

PROBE: Final = LayerDescription(
    "probe", "Conv", (64, 64, 3, 3), 64, 64 * 64 * 9, 64 * 64 * 9 * 256, (3, 3), (1, 1), 1, 64 * 256, 64 * 256, 8, 8
)
"""A convolution on codes that every device meets: what a device is asked about before any network is known."""


def parse_target(text: str) -> Target:
    """Read ``int4`` or ``stm32f4,int4``.

    Raises:
        UsageError: a name that is no target, or no candidate is left.
        PluginError: a cost model that does not load or breaks its contract.
    """
    names = [name.strip() for name in text.split(",")]
    parts = [_target(name) for name in names]
    weights = parts[0].weights
    for part in parts[1:]:
        weights = _common(weights, part.weights)
    if not weights:
        raise UsageError("the targets have no weight format in common", where="--target", got=text)
    return Target(
        ",".join(names),
        weights,
        min((part.activations for part in parts), key=lambda spec: spec.bits),
        tuple(dict.fromkeys(limit for part in parts for limit in part.limits)),
        tuple(dict.fromkeys(model for part in parts for model in part.cost_models)),
        _common_widths(parts),
    )


def device(name: str) -> Target:
    """The target that a cost model is: what it takes of the mixed formats, with 7 bits where 8 are too many."""
    model = load_model(name)
    kept = model.capabilities(PROBE, (*_MIXED, _SEVEN))
    formats = tuple(spec for spec in kept if spec != _SEVEN or _EIGHT not in kept)
    narrower = tuple(
        spec for bits in model.activation_bits if bits < _INT8.bits
        for spec in (ActivationSpec(bits), ActivationSpec(bits, calibrator="mse"))
    )  # fmt: skip
    return Target(name, formats, _INT8, model.limits(), tuple(dict.fromkeys(("bits", name))), narrower)


def _common_widths(parts: Sequence[Target]) -> tuple[ActivationSpec, ...]:
    """Those that all machines compute with; precisions and storage alone say nothing of them."""
    machines = [part.narrower for part in parts if part.cost_models != ("bits",)]
    return tuple(spec for spec in machines[0] if all(spec in other for other in machines)) if machines else ()


def _target(name: str) -> Target:
    if name in TARGETS:
        return TARGETS[name]
    models = plugins(GROUP)
    if name not in models:
        fix = nearest(name, {*TARGETS, *models})
        raise UsageError("unknown target", where="--target", got=repr(name), fix=f"{fix}; `qopt targets` lists all")
    return device(name)


def _common(ours: Sequence[WeightSpec], theirs: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
    """Formats of both, in our order; of int7 and int8, which take a byte each, the narrower one is common."""
    found = []
    for spec in ours:
        if spec in theirs:
            found.append(spec)
        elif (spec == _EIGHT and _SEVEN in theirs) or (spec == _SEVEN and _EIGHT in theirs):
            found.append(_SEVEN)
    return tuple(dict.fromkeys(found))
