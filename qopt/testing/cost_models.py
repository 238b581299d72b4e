"""The contract of a cost model as assertions; every built-in model passes it, and a plugin's tests should call it.

from qopt.testing import cost_model_contract

def test_contract():
    cost_model_contract(MyModel())
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, get_args

from qopt.hardware.checked import CheckedModel
from qopt.hardware.cost_model import WIDEST, Basis, CostModel, LayerDescription, Live, Step
from qopt.spec import WeightSpec

SECONDS: Final = 1e-3
"""What pricing one layer in one format may take: a search asks thousands of times."""

CALLS: Final = 100

FORMATS: Final = tuple(
    WeightSpec.parse(text)
    for text in (
        "float", "int1", "ternary", "int2", "int3", "int4", "int4:max", "int4:block16", "int4:asym", "int7", "int8",
        "int8:tensor:max", "log3", "log4", "log8", "rows(int8*16,ternary*16)",
    )
)  # fmt: skip
"""Formats of every kind that a model is asked about."""


def _layer(name: str, op: str, shape: tuple[int, ...], positions: int, **more: int) -> LayerDescription:
    """A layer on 8-bit codes, or as ``more`` has it."""
    weights = 1
    for size in shape:
        weights *= size
    fields = {"input_bits": 8, "output_bits": 8, **more}
    kernel, groups = shape[2:], fields.get("groups", 1)
    fan_in = shape[1] * groups
    return LayerDescription(
        name, op, shape, shape[0], weights, weights * positions, kernel, (1,) * len(kernel), groups,
        fan_in * positions, shape[0] * positions, fields["input_bits"], fields["output_bits"],
    )  # fmt: skip


LAYERS: Final = (
    _layer("conv", "Conv", (32, 16, 3, 3), 196),
    _layer("pointwise", "Conv", (32, 64, 1, 1), 49),
    _layer("depthwise", "Conv", (32, 1, 3, 3), 196, groups=32),
    _layer("stem", "Conv", (32, 3, 7, 7), 1024),
    _layer("line", "Conv", (32, 16, 9), 100),
    _layer("transposed", "ConvTranspose", (32, 32, 2, 2), 49),
    _layer("classifier", "Gemm", (32, 512), 1),
    _layer("product", "MatMul", (32, 128), 64),
    _layer("embedding", "Gather", (32, 64), 0),
    _layer("float", "Conv", (32, 16, 3, 3), 196, input_bits=32, output_bits=32),
    _layer("narrow", "Conv", (32, 16, 3, 3), 196, input_bits=4, output_bits=4),
)
"""Layers of every kind that a model is asked about; 32 output channels each."""


def cost_model_contract(model: CostModel) -> None:
    """Assert all that `qopt.hardware.cost_model.CostModel` asks for.

    A model that is calibrated on the machine is to be given calibrated.

    Raises:
        AssertionError: what is broken, with the layer and the format.
        PluginError: an answer that no run would take.
    """
    checked = CheckedModel(model)
    _check_words(checked)
    _check_value(model)
    _check_speed(model)
    for layer in LAYERS:
        taken = checked.capabilities(layer, FORMATS)
        _check_capabilities(checked, layer, taken)
        for spec in taken:
            _check_layer(checked, layer, spec)
    _check_network(checked)
    if checked.knows_memory:
        _check_memory(checked)
    assert checked.limits() == checked.limits(), "limits differ from one call to the next"
    for limit in checked.limits():
        assert limit.quantity in checked.totals, f"a limit on {limit.quantity}, which network_cost does not give"


def _check_words(model: CheckedModel) -> None:
    assert model.name == model.name.strip().lower(), f"a name is in lower case: {model.name!r}"
    assert not {",", " "} & set(model.name), f"a name is one word of a list with commas: {model.name!r}"
    assert model.prices or model.totals, "it prices nothing"
    for name, constant in model.constants.items():
        assert constant.source.strip(), f"constant {name!r} has no source"
        assert constant.basis in get_args(Basis), f"constant {name!r} is {constant.basis!r}, not one of {Basis}"
        assert constant.unit.strip(), f"constant {name!r} has no unit"


def _check_value(model: CostModel) -> None:
    pickle.dumps(model)
    copied = copy.deepcopy(model)
    assert copied == model, "a copy of the model is another one: make it a frozen dataclass"
    assert hash(copied) == hash(model), "a copy of the model has another hash"


def _check_capabilities(model: CheckedModel, layer: LayerDescription, taken: Sequence[WeightSpec]) -> None:
    assert list(taken) == [spec for spec in FORMATS if spec in taken], f"{layer.name}: formats in another order"
    assert model.capabilities(layer, FORMATS) == tuple(taken), f"{layer.name}: other formats when asked again"
    for spec in FORMATS:
        alone = model.capabilities(layer, (spec,))
        assert bool(alone) == (spec in taken), f"{layer.name}: whether {spec} is taken depends on the other formats"
    assert model.capabilities(layer, ()) == (), f"{layer.name}: formats nobody asked about"


def _check_layer(model: CheckedModel, layer: LayerDescription, spec: WeightSpec) -> None:
    where = f"{layer.name} in {spec}"
    cost = model.layer_cost(layer, spec)
    assert model.layer_cost(layer, spec) == cost, f"{where}: costs differ from one call to the next"
    renamed = model.layer_cost(replace(layer, name="another"), spec)
    assert renamed == cost, f"{where}: costs depend on the layer's name"
    if not layer.macs:
        return
    larger = replace(
        layer, macs=2 * layer.macs, weights=2 * layer.weights, inputs=2 * layer.inputs,
        weight_shape=(layer.weight_shape[0], 2 * layer.weight_shape[1], *layer.weight_shape[2:]),
    )  # fmt: skip
    _not_less(model.layer_cost(larger, spec), cost, f"{where}, twice as many inputs")
    longer = replace(layer, macs=2 * layer.macs, inputs=2 * layer.inputs, outputs=2 * layer.outputs)
    _not_less(model.layer_cost(longer, spec), cost, f"{where}, twice as many positions")
    for bits in model.activation_bits if layer.input_bits == WIDEST else ():
        narrow = replace(layer, input_bits=bits)
        if model.capabilities(narrow, (spec,)):
            _not_less(cost, model.layer_cost(narrow, spec), f"{where}, {WIDEST} bits of activations in place of {bits}")


def _not_less(larger: Mapping[str, float], cost: Mapping[str, float], what: str) -> None:
    for quantity, value in cost.items():
        assert larger[quantity] >= value * (1 - 1e-9), f"{what}: {quantity} falls from {value} to {larger[quantity]}"


def _check_network(model: CheckedModel) -> None:
    layers = [layer for layer in LAYERS if model.capabilities(layer, FORMATS)]
    specs = {layer.name: model.capabilities(layer, FORMATS)[0] for layer in layers}
    steps = _steps(layers)
    total = model.network_cost(layers, specs, steps)
    assert model.network_cost(layers, specs, steps) == total, "network costs differ from one call to the next"
    alone = model.network_cost(layers, specs)
    for quantity in model.prices:
        if quantity in total:
            summed = sum(model.layer_cost(layer, specs[layer.name])[quantity] for layer in layers)
            assert alone[quantity] >= summed * (1 - 1e-9), f"{quantity} of a network is less than that of its layers"
            assert total[quantity] >= alone[quantity] * (1 - 1e-9), f"steps without weights lower {quantity}"
    _check_rest(model, layers, steps)


def _check_rest(model: CheckedModel, layers: Sequence[LayerDescription], steps: Sequence[Step]) -> None:
    """What is beside the layers must not depend on their formats: the solver has it as a constant."""
    found: dict[str, list[float]] = {}
    for last in (0, -1):
        specs = {layer.name: model.capabilities(layer, FORMATS)[last] for layer in layers}
        total = model.network_cost(layers, specs, steps)
        for quantity in [quantity for quantity in model.prices if quantity in total]:
            summed = sum(model.layer_cost(layer, specs[layer.name])[quantity] for layer in layers)
            found.setdefault(quantity, []).append(total[quantity] - summed)
            scale = max(total[quantity], 1e-300)
            same = abs(found[quantity][0] - found[quantity][-1]) <= 1e-9 * scale
            assert same, f"what {quantity} is beside the layers depends on their formats: {found[quantity]}"


def _check_memory(model: CheckedModel) -> None:
    """What weights take at every step: the same bytes again, and the peak that `network_cost` gives."""
    layers = [layer for layer in LAYERS if model.capabilities(layer, FORMATS)]
    steps = _steps(layers)
    rows = model.step_memory(layers, steps)
    assert model.step_memory(layers, steps) == rows, "memory differs from one call to the next"
    for choice in (0, -1):
        specs = {layer.name: model.capabilities(layer, FORMATS)[choice] for layer in layers}
        taken = {layer.name: model.weight_memory(layer, specs[layer.name]) for layer in layers}
        peak = max((row.base + sum(taken[name] for name in row.layers) for row in rows), default=0.0)
        sram = model.network_cost(layers, specs, steps)["sram"]
        assert abs(sram - peak) <= 1e-9 * max(peak, 1.0), f"sram is {sram}, the fullest step takes {peak}"


def _steps(layers: Sequence[LayerDescription]) -> list[Step]:
    tensors = [Live(layer.name, layer.outputs, layer.output_bits) for layer in layers]
    steps = [
        Step(layer.name, layer.op, layer.name, layer.inputs, layer.outputs, layer.output_bits, (tensor,))
        for layer, tensor in zip(layers, tensors, strict=True)
    ]
    return [*steps, Step("sum", "Add", "", 2 * tensors[0].elements, tensors[0].elements, 8, tuple(tensors[:2]))]


def _check_speed(model: CostModel) -> None:
    layer = LAYERS[0]
    taken = model.capabilities(layer, FORMATS)[:1]
    began, calls = time.process_time(), 0
    while taken and calls < CALLS and time.process_time() - began < CALLS * SECONDS:
        model.layer_cost(layer, taken[0])
        calls += 1
    seconds = (time.process_time() - began) / max(calls, 1)
    assert seconds < SECONDS, f"pricing one layer takes {1000 * seconds:.2f} ms, more than {1000 * SECONDS:g}"
