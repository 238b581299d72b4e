"""What the plugin's own tests need: the contract, and the figures of the data sheet by hand."""

from __future__ import annotations

from qopt_tiny_npu import TinyNpu

from qopt.hardware.cost_model import LayerDescription, Live, Step
from qopt.spec import WeightSpec
from qopt.testing import cost_model_contract

LAYER = LayerDescription("l", "Conv", (8, 4, 3, 3), 8, 288, 64 * 1000, input_bits=8, output_bits=8)


def test_contract() -> None:
    cost_model_contract(TinyNpu())


def test_by_hand() -> None:
    cost = TinyNpu().layer_cost(LAYER, WeightSpec.parse("int8"))
    assert cost == {"latency": 1200 / 100e6, "energy": 1200 / 100e6 * 0.05, "flash": 288.0 + 8 * 4}
    assert TinyNpu().layer_cost(LAYER, WeightSpec.parse("int4"))["latency"] == 700 / 100e6


def test_float_activations_are_not_taken() -> None:
    layer = LayerDescription("l", "Conv", (8, 4, 3, 3), 8, 288, 64 * 1000)
    assert TinyNpu().capabilities(layer, [WeightSpec.parse("int8")]) == ()


def test_memory_at_every_step() -> None:
    steps = [
        Step("n", "Conv", "l", 0, 0, 8, (Live("x", 100, 8), Live("y", 50, 8))),
        Step("add", "Add", "", 0, 0, 8, ()),
    ]
    rows = TinyNpu().step_memory([LAYER], steps)
    assert [(row.place, row.base, row.layers) for row in rows] == [("n", 150.0, ("l",)), ("add", 0.0, ())]
    assert TinyNpu().network_cost([LAYER], {"l": WeightSpec.parse("int4")}, steps)["sram"] == 150 + 144 + 8 * 4
