"""Algorithm 1 of Song, Ranjan and Li (2021): the fewest bits per layer and method whose norms meet the thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from qopt.errors import UsageError
from qopt.search.space import Candidate, LayerSpace, Outcome, Space
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec

MAX_BITS = 8
METHODS: tuple[Literal["int"], Literal["log"]] = ("int", "log")


@final
@dataclass(frozen=True)
class LipschitzSearch:
    """Per layer and method m in {linear, log}: the first q from 1 with ``||W_q|| <= T_q`` and ``||dW|| <= T_d``.

    Then linear where its ``||dW||`` is strictly lower, else log, so that ties (which 1 bit always is) go to log. q
    ends at 8; where no q passes, the method's candidate of lowest ``||dW||`` is taken, the fewest bits among equals,
    and said not to meet the threshold. Formats that the target's cost models rule out are passed over.
    Weights are per tensor with max-abs scales, as in the paper; limits of the target play no part.
    """

    name: ClassVar[str] = "lipschitz"
    uses_sensitivity: ClassVar[bool] = False

    def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
        """Linear and log at 1 to 8 bits, whatever the target's own candidates are."""
        del target
        return tuple(_spec(kind, bits) for kind in METHODS for bits in range(1, MAX_BITS + 1))

    def __call__(self, space: Space) -> Outcome:
        """Apply the algorithm to every layer on its own."""
        specs, reasons, missed = {}, {}, []
        for layer in space.layers:
            chosen, met = choose(layer)
            specs[layer.layer] = chosen.spec
            reasons[layer.layer] = _reason(layer, chosen, met)
            if not met:
                missed.append(layer.layer)
        notes = (f"no width up to {MAX_BITS} bits meets the thresholds of: {', '.join(missed)}",) if missed else ()
        return Outcome(specs, reasons, notes)


def choose(layer: LayerSpace) -> tuple[Candidate, bool]:
    """The format of one layer, and whether it meets the thresholds.

    Raises:
        UsageError: the cost models of the target admit none of the algorithm's formats.
    """
    linear, log = (_fewest_bits(layer, kind) for kind in METHODS)
    if linear is None or log is None:
        found = linear or log
        if found is None:
            raise UsageError("the target takes no linear or log format per tensor for a layer", where=layer.layer)
        return found
    return linear if linear[0].error.value < log[0].error.value else log


def _fewest_bits(layer: LayerSpace, kind: Literal["int", "log"]) -> tuple[Candidate, bool] | None:
    bound_q, bound_d = paper_thresholds(layer.norm.value)
    specs = [_spec(kind, bits) for bits in range(1, MAX_BITS + 1)]
    widths = sorted((c for c in layer.candidates if c.spec in specs), key=lambda c: c.spec.bits)
    for candidate in widths:
        if candidate.norm.accepts(bound_q) and candidate.error.accepts(bound_d):
            return candidate, True
    return (min(widths, key=lambda c: c.error.value), False) if widths else None


def _spec(kind: Literal["int", "log"], bits: int) -> WeightSpec:
    return WeightSpec(kind, bits, "tensor", "max")


def _reason(layer: LayerSpace, chosen: Candidate, met: bool) -> str:
    bound_q, bound_d = paper_thresholds(layer.norm.value)
    facts = f"||Wq|| {chosen.norm.value:.3g} (T {bound_q:.3g}), ||dW|| {chosen.error.value:.3g} (T {bound_d:g})"
    return f"Algorithm 1: {facts}" if met else f"Algorithm 1: threshold not met, lowest ||dW||: {facts}"
