"""Built-in cost models: the contract, their figures by hand, and what no model may promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit.c import emit_c
from qopt.graph.model import Prepared
from qopt.hardware.checked import CheckedModel, load_model
from qopt.hardware.cost_model import CostModel, LayerDescription
from qopt.hardware.describe import NetworkDescription, describe
from qopt.hardware.energy_45nm import ELEMENT, INT8_MULTIPLY, INT8_SHIFT, INT32_ADD
from qopt.hardware.kernels import by_shifts, fits, integer_levels, on_integers, parts
from qopt.hardware.measured import FEATURES, MeasuredHost
from qopt.limits import Limit
from qopt.plan import uniform
from qopt.plugins import BUILT_IN
from qopt.quantize import Quantizer
from qopt.runtime.patterns import has_integer_levels
from qopt.spec import ActivationSpec, WeightSpec
from qopt.testing import FORMATS, LAYERS, cost_model_contract

NAMES = sorted(BUILT_IN["qopt.cost_models"])
RUNTIMES = ("x86-avx512-vnni", "x86-avx2", "arm-dotprod", "measured:host")
"""Models of ONNX Runtime, which has no kernels below 8 bits."""

SECONDS = {
    "run": 4e-6, "layer": 1e-6, "step": 1e-6, "multiply": 1e-11, "multiply depthwise": 2e-11,
    "multiply few channels": 1e-11, "multiply matrix": 2e-11, "output": 5e-11, "position": 1e-11,
    "position few channels": 1e-9, "window": 1e-10, "gathered": 1e-11, "weight": 1e-11, "element added": 1e-10,
    "element pooled": 2e-10,
}  # fmt: skip


def spec(text: str) -> WeightSpec:
    return WeightSpec.parse(text)


def model_of(name: str) -> CheckedModel:
    """The model; that of this machine as if it had been calibrated."""
    if name != "measured:host":
        return load_model(name)
    floats = tuple(SECONDS[feature] for feature in FEATURES)
    return CheckedModel(MeasuredHost(floats, tuple(second / 3 for second in floats)))


def latency(model: CostModel, layer: LayerDescription, text: str) -> float:
    return model.layer_cost(layer, spec(text))["latency"]


@pytest.fixture(scope="module")
def fashion(fashion_prepared: Prepared) -> NetworkDescription:
    return describe(fashion_prepared, 8)


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name: str) -> None:
    cost_model_contract(model_of(name).model)


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_says_where_it_comes_from(name: str) -> None:
    model = model_of(name)
    assert name == "bops" or model.constants
    for constant in model.constants.values():
        assert len(constant.source) > 10
        assert constant.value >= 0


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.macs], ids=lambda layer: layer.name)
def test_four_bits_are_no_faster_than_the_runtime_runs_them(name: str, layer: LayerDescription) -> None:
    """DESIGN 3.10: folding unpacks them to int8 before the first image."""
    model = model_of(name)
    wide = latency(model, layer, "int7")
    assert {latency(model, layer, text) for text in ("int4", "int2", "ternary", "log4", "int1")} == {wide}
    assert latency(model, layer, "int4:asym") == latency(model, layer, "float")


@pytest.mark.parametrize("name", RUNTIMES)
def test_codes_are_faster_than_float_where_the_work_is_large(conv: Callable[..., LayerDescription], name: str) -> None:
    model, large = model_of(name), conv(256, 28)
    assert latency(model, large, "int4") < latency(model, large, "float")
    assert latency(model, replace(large, input_bits=32, output_bits=32), "int4") == latency(
        model, replace(large, input_bits=32, output_bits=32), "float"
    )


@pytest.mark.parametrize("name", ["stm32f4", "cortex-m7"])
def test_microcontrollers_pay_for_unpacking(conv: Callable[..., LayerDescription], name: str) -> None:
    model, layer = model_of(name), conv()
    int8, int4 = (model.layer_cost(layer, spec(text)) for text in ("int8", "int4"))
    assert int4["latency"] > int8["latency"]
    assert int4["flash"] < int8["flash"]
    assert latency(model, layer, "log8") == int8["latency"]  # a shift takes the cycle of a multiplication
    refused = [text for text in ("float", "int4:asym", "int4:block16") if not model.capabilities(layer, [spec(text)])]
    assert refused == ["float", "int4:asym", "int4:block16"]
    assert model.capabilities(replace(layer, op="ConvTranspose"), [spec("int8")]) == ()


def test_microcontrollers_by_hand(conv: Callable[..., LayerDescription]) -> None:
    layer = conv(16, 8)
    m4 = model_of("stm32f4").layer_cost(layer, spec("int8"))
    assert m4 == {"latency": pytest.approx(2304 * 64 * 5.0 / 180e6), "flash": 2304.0 + 16 * 9 + 100}
    ternary = model_of("cortex-m7").layer_cost(layer, spec("ternary"))
    assert ternary["flash"] == 16 * math.ceil(144 * 1.6 / 8) + 16 * 9 + 100
    assert ternary["latency"] == pytest.approx((2304 * 64 * 1.73 + 2304 * 4 * 2) / 480e6)
    rows = model_of("stm32f4").layer_cost(layer, spec("rows(int8*8,int4*8)"))
    assert rows["flash"] == 8 * 144 + 8 * 72 + 16 * 9 + 100


@pytest.mark.parametrize("text", ["int8", "int4", "log4", "int3", "ternary", "int1"])
def test_flash_is_that_of_the_emitted_program(
    fashion_prepared: Prepared, fashion: NetworkDescription, text: str
) -> None:
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    plan = uniform(spec(text), ActivationSpec.parse("int8"))
    program = emit_c(fashion_prepared, Quantizer(fashion_prepared, images).apply(plan).quantized, name="net")
    model = model_of("stm32f4")
    priced = sum(model.layer_cost(layer, spec(text))["flash"] - 100 for layer in fashion.layers)
    tables = program.flash_bytes - priced
    assert 0 <= tables <= 32 * len(fashion.layers)  # one table of codes for each layer, aligned


def test_memory_of_a_microcontroller_is_its_peak(fashion: NetworkDescription) -> None:
    specs = {layer.name: spec("int4") for layer in fashion.layers}
    found = model_of("stm32f4").network_cost(fashion.layers, specs, fashion.steps)
    assert found["sram"] == 3 * 16 * 14 * 14
    assert model_of("stm32f4").limits() == (Limit("flash", 2097152.0), Limit("sram", 393216.0))


def test_bit_operations_by_hand(conv: Callable[..., LayerDescription]) -> None:
    layer, model = conv(16, 8), model_of("bops")
    macs = 2304 * 64
    for text, bits in {"int4": 4, "log4": 4, "ternary": 2, "float": 32, "rows(int8*4,int4*12)": 5}.items():
        assert model.layer_cost(layer, spec(text)) == {"bops": float(macs * bits * 8)}
    narrow = replace(layer, input_bits=4)
    assert model.layer_cost(narrow, spec("int4")) == {"bops": float(macs * 16)}


def test_energy_by_hand(conv: Callable[..., LayerDescription]) -> None:
    layer, model = conv(16, 8), model_of("energy-45nm")
    macs, moved = 2304 * 64, 2 * 1024 * 8 * 20e-12 / 64
    stored = {"int8": 2304 + 64, "log4": 1152 + 64, "float": 4 * 2304, "int4": 1152 + 64}
    weights = {text: 8 * size * 1.3e-9 / 64 for text, size in stored.items()}
    expected = {"int8": 0.2e-12 + 0.1e-12, "log4": 0.024e-12 + 0.1e-12, "float": 3.7e-12 + 0.9e-12}
    for text, each in expected.items():
        found = model.layer_cost(layer, spec(text))["energy"]
        assert found == pytest.approx(macs * each + moved + weights[text], rel=1e-12)
    both = replace(layer, input_bits=4, output_bits=4)
    four = model.layer_cost(both, spec("int4"))["energy"]
    assert four == pytest.approx(macs * (0.2e-12 * 67.9 / 171.8 + 0.1e-12) + moved / 2 + weights["int4"], rel=1e-12)


def test_eight_to_four_bits_save_less_energy_than_bit_operations_say() -> None:
    """DESIGN 3.10: about 2.5 times for the multiplier; a shift-add is 2.4 times cheaper than a multiply-add."""
    assert ELEMENT[8].value / ELEMENT[4].value == pytest.approx(2.53, abs=0.01)
    multiply, shift = INT8_MULTIPLY.value + INT32_ADD.value, INT8_SHIFT.value + INT32_ADD.value
    assert multiply / shift == pytest.approx(2.42, abs=0.01)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 20))
def test_energy_never_falls_with_bits(bits: int, inputs: int, blocks: int, side: int) -> None:
    channels = 8 * blocks  # codes of 3 bits fill groups of 8
    weights = channels * channels * 9
    layer = LayerDescription(
        "l", "Conv", (channels, channels, 3, 3), channels, weights, weights * side * side, input_bits=inputs
    )
    model = model_of("energy-45nm")
    costs = [model.layer_cost(layer, WeightSpec("int", width))["energy"] for width in range(max(bits, 2), 9)]
    assert costs == sorted(costs)
    if bits < 8:
        wider = model.layer_cost(replace(layer, input_bits=min(inputs + 1, 8)), WeightSpec("int", bits + 1))["energy"]
        assert wider >= model.layer_cost(layer, WeightSpec("int", bits + 1))["energy"]


def test_avx2_keeps_pair_sums_from_saturating(conv: Callable[..., LayerDescription]) -> None:
    model, layer = model_of("x86-avx2"), conv()
    taken = model.capabilities(layer, FORMATS)
    assert spec("int8") not in taken
    assert spec("int8:tensor:max") not in taken
    assert {spec("int7"), spec("int4"), spec("log4"), spec("ternary"), spec("float")} <= set(taken)
    assert spec("rows(int8*8,int4*8)") not in model.capabilities(layer, [spec("rows(int8*8,int4*8)")])
    floats = replace(layer, input_bits=32, output_bits=32)
    assert spec("int8") in model.capabilities(floats, FORMATS)  # float kernels have nothing to saturate
    assert 255 * 2 * 64 < 32767 < 255 * 2 * 127
    vnni = model_of("x86-avx512-vnni")
    assert latency(model, conv(256, 28), "int7") > latency(vnni, conv(256, 28), "int7")


@pytest.mark.parametrize(("name", "gain"), [("nvidia-turing", 1.6), ("nvidia-ampere", 1.6)])
def test_tensor_cores_need_four_bits_on_both_sides(
    conv: Callable[..., LayerDescription], name: str, gain: float
) -> None:
    model, large = model_of(name), conv(512, 56)
    call = 5e-6
    int8, float16 = latency(model, large, "int8") - call, latency(model, large, "float") - call
    assert float16 / int8 == pytest.approx(2.0)
    assert latency(model, large, "int4") - call == pytest.approx(int8)
    narrow = replace(large, input_bits=4, output_bits=4)
    assert int8 / (latency(model, narrow, "int4") - call) == pytest.approx(gain)
    assert latency(model, narrow, "rows(int4*256,int8*256)") - call == pytest.approx(int8)
    assert latency(model, large, "int8") == pytest.approx(
        call + 512 * 512 * 9 * 56 * 56 * 2 / (model.constants["int8"].value * 0.3)
    )


def test_slices_by_hand(conv: Callable[..., LayerDescription]) -> None:
    model, layer = model_of("fpga-dsp48e2"), conv(64, 56)
    macs, call = 64 * 64 * 9 * 56 * 56, 1e-6
    assert latency(model, layer, "int8") == pytest.approx(call + macs / (1248 * 2 * 300e6))
    narrow = replace(layer, input_bits=4, output_bits=4)
    assert latency(model, narrow, "int4") == pytest.approx(call + macs / (1248 * 4 * 300e6))
    assert latency(model, layer, "int4") == latency(model, layer, "int8")
    assert latency(model, layer, "log4") == pytest.approx(call + macs / (117120 / 2 / 40 * 300e6))
    halves = latency(model, layer, "rows(int8*32,log4*32)") - call
    assert halves == pytest.approx((latency(model, layer, "int8") + latency(model, layer, "log4")) / 2 - call)


def test_large_matrices_are_bound_by_memory() -> None:
    product = LayerDescription(
        "p", "Gemm", (4096, 4096), 4096, 4096**2, 4096**2, inputs=4096, outputs=4096, input_bits=8, output_bits=8
    )
    found = latency(model_of("arm-dotprod"), product, "int4")
    assert found == pytest.approx(5e-6 + (4096**2 + 8192) / 8e9)


@pytest.mark.parametrize("text", [str(one) for one in FORMATS])
def test_integer_levels_are_those_of_the_emitter(text: str, fashion_prepared: Prepared) -> None:
    """The oracle is what the emitter asks of the weight itself."""
    layer = fashion_prepared.layer("block2.conv2.weight")
    described = describe(fashion_prepared, 8).layer(layer.name)
    if text == "float" or not fits(described, spec(text)):
        return
    weight = Quantizer(fashion_prepared).quantized_weight(layer, spec(text))
    assert integer_levels(spec(text)) == has_integer_levels(weight)
    assert on_integers(described, spec(text)) == has_integer_levels(weight)


def test_words_on_formats() -> None:
    assert [text for text in map(str, FORMATS) if by_shifts(spec(text))] == ["int1", "ternary", "log3", "log4", "log8"]
    assert parts(spec("rows(int8*3,ternary*1,int8*4)")) == {spec("int8"): 7 / 8, spec("ternary"): 1 / 8}
    assert parts(spec("int4")) == {spec("int4"): 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_network_costs_its_layers_and_what_is_beside_them(name: str, fashion: NetworkDescription) -> None:
    model = model_of(name)
    specs = {layer.name: spec("int4") for layer in fashion.layers}
    total: dict[str, Any] = model.network_cost(fashion.layers, specs, fashion.steps)
    for quantity in set(model.prices) & set(total):
        layers = sum(model.layer_cost(layer, spec("int4"))[quantity] for layer in fashion.layers)
        assert layers <= total[quantity] * (1 + 1e-9)
        assert total[quantity] <= 2 * layers + 1e-4 + (16384 if quantity == "flash" else 0)
