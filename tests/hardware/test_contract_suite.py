"""The contract suite finds what it is for: every planted fault, with where it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from qopt.errors import PluginError
from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, StepMemory, summed
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.spec import WeightSpec
from qopt.testing import FORMATS, LAYERS, cost_model_contract


@dataclass(frozen=True)
class Right:
    """A model without a fault."""

    name: ClassVar[str] = "right"
    prices: ClassVar[Mapping[str, str]] = units("latency")
    totals: ClassVar[Mapping[str, str]] = units("latency", "sram")
    constants: ClassVar[Mapping[str, Constant]] = {"clock": Constant(1e9, "Hz", "assumed", "a round number")}

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        return tuple(spec for spec in formats if not spec.block)

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": layer.macs * spec.container_bits / 1e9}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        rest = sum(step.moved_bytes for step in steps if not step.layer) / 1e9
        return {"latency": summed(self, layers, specs)["latency"] + rest, "sram": 5.0}

    def limits(self) -> tuple[Limit, ...]:
        return (Limit("sram", 100.0),)


calls = itertools.count()


class Loud(Right):
    name = "Loud"


class Two(Right):
    name = "a,b"


class Silent(Right):
    prices: ClassVar[Mapping[str, str]] = {}
    totals: ClassVar[Mapping[str, str]] = {}

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {}


class Sourceless(Right):
    constants: ClassVar[Mapping[str, Constant]] = {"clock": Constant(1e9, "Hz", "assumed", " ")}


class Unitless(Right):
    constants: ClassVar[Mapping[str, Constant]] = {"clock": Constant(1e9, "", "assumed", "a round number")}


class Baseless(Right):
    constants: ClassVar[Mapping[str, Constant]] = {"clock": Constant(1e9, "Hz", "guessed", "x")}  # type: ignore[arg-type]


class ByIdentity(Right):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Unpicklable(Right):
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


class Reordering(Right):
    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        return tuple(reversed(formats))


class Greedy(Right):
    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        return FORMATS


class Moody(Right):
    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        return tuple(formats)[: 1 + next(calls) % 2]


class Contextual(Right):
    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        return tuple(formats) if len(formats) > 1 else ()


class Random(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": float(next(calls))}


class ByName(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": float(len(layer.name))}


class Shrinking(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": 1 / (1 + layer.macs)}


class Backwards(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": 1 / (1 + layer.outputs)}


class Upside(Right):
    activation_bits: ClassVar[tuple[int, ...]] = (8, 4)

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": layer.macs / layer.input_bits}


class Forgetful(Right):
    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        return {"latency": 0.0, "sram": 5.0}


class Discounting(Right):
    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        return {"latency": (0.5 if steps else 1.0) * summed(self, layers, specs)["latency"], "sram": 5.0}


class Entangled(Right):
    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        return {"latency": 2 * summed(self, layers, specs)["latency"], "sram": 5.0}


class Unlimited(Right):
    def limits(self) -> tuple[Limit, ...]:
        return (Limit("energy", 1.0),)


class Slow(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": layer.macs * spec.container_bits * sum(1e-9 for _ in range(40_000))}


class Nan(Right):
    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        return {"latency": float("nan")}


class Scratchpad(Right):
    """Without a fault: weights beside the activations while their layer runs."""

    def weight_memory(self, layer: LayerDescription, spec: WeightSpec) -> float:
        return layer.weights * spec.container_bits / 8

    def step_memory(self, layers: Sequence[LayerDescription], steps: Sequence[Step]) -> tuple[StepMemory, ...]:
        known = {layer.name for layer in layers}
        return tuple(StepMemory(s.name, float(s.bytes), tuple({s.layer} & known)) for s in steps)

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        taken = {layer.name: self.weight_memory(layer, specs[layer.name]) for layer in layers}
        rows = self.step_memory(layers, steps)
        peak = max((row.base + sum(taken[name] for name in row.layers) for row in rows), default=0.0)
        return {**super().network_cost(layers, specs, steps), "sram": peak}


class Overfull(Scratchpad):
    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        return {**super().network_cost(layers, specs, steps), "sram": 5.0}


class Drifting(Scratchpad):
    def step_memory(self, layers: Sequence[LayerDescription], steps: Sequence[Step]) -> tuple[StepMemory, ...]:
        return (StepMemory("n", float(next(calls))),)


FAULTS: dict[type[Right], str] = {
    Loud: "lower case",
    Two: "one word",
    Silent: "prices nothing",
    Sourceless: "constant 'clock' has no source",
    Unitless: "constant 'clock' has no unit",
    Baseless: "constant 'clock' is 'guessed'",
    ByIdentity: "a copy of the model is another one",
    Reordering: "conv: formats in another order",
    Moody: "other formats when asked again|depends on the other formats",
    Contextual: "depends on the other formats",
    Random: "costs differ from one call to the next",
    ByName: "depend on the layer's name",
    Shrinking: "twice as many inputs: latency falls",
    Backwards: "twice as many positions: latency falls",
    Upside: "8 bits of activations in place of 4: latency falls",
    Forgetful: "latency of a network is less than that of its layers",
    Discounting: "steps without weights lower latency",
    Entangled: "what latency is beside the layers depends on their formats",
    Unlimited: "a limit on energy, which network_cost does not give",
    Slow: "pricing one layer takes",
    Overfull: "sram is 5.0, the fullest step takes",
    Drifting: "differs? from one call to the next",
}


def test_a_model_without_fault_passes() -> None:
    cost_model_contract(Right())
    cost_model_contract(Scratchpad())


@pytest.mark.parametrize(("model", "said"), FAULTS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_every_fault_is_found(model: type[Right], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        cost_model_contract(model())


def test_what_no_run_would_take_is_an_error_of_the_plugin() -> None:
    with pytest.raises(PluginError, match="capabilities are not among"):
        cost_model_contract(Greedy())
    with pytest.raises(TypeError, match="cannot be pickled"):
        cost_model_contract(Unpicklable())
    with pytest.raises(PluginError, match=r"cost model right, conv in float: latency is no cost"):
        cost_model_contract(Nan())


def test_layers_and_formats_are_of_every_kind() -> None:
    assert {layer.op for layer in LAYERS} == {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"}
    assert {layer.input_bits for layer in LAYERS} == {4, 8, 32}
    assert {layer.channels for layer in LAYERS} == {32}
    for layer in LAYERS:
        size = 1
        for axis in layer.weight_shape:
            size *= axis
        assert size == layer.weights
    kinds = {(spec.kind, spec.granularity, spec.asymmetric) for spec in FORMATS}
    assert {kind for kind, _, _ in kinds} == {"float", "int", "ternary", "log", "rows"}
    assert {"block", "channel", "tensor"} == {granularity for _, granularity, _ in kinds}


def test_the_suite_does_not_change_what_it_is_given(conv: Callable[..., LayerDescription]) -> None:
    model = Right()
    before = replace(model)
    cost_model_contract(model)
    assert model == before
