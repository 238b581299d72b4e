"""What cost models are told of a network: sizes by hand, and memory as the C emitter lays it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit.c import emit_c
from qopt.emit.c.program import CProgram
from qopt.graph.model import Prepared
from qopt.hardware.cost_model import LayerDescription, Live, Step, container, peak
from qopt.hardware.describe import NetworkDescription, describe
from qopt.plan import uniform
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

MakeGraph = Callable[..., Prepared]
PAD = {"pads": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def fashion(fashion_prepared: Prepared) -> NetworkDescription:
    return describe(fashion_prepared, 8)


def emitted(prepared: Prepared) -> CProgram:
    """The network in int8 as C, calibrated on random images."""
    images = torch.rand(8, *prepared.input_shape, generator=torch.Generator().manual_seed(0))
    plan = uniform(WeightSpec.parse("int8"), ActivationSpec.parse("int8"))
    return emit_c(prepared, Quantizer(prepared, images).apply(plan).quantized, name="net")


def beside_ends(network: NetworkDescription, prepared: Prepared) -> int:
    """The most bytes at once without the network's input and output, which the C program leaves to its caller."""
    ends = {prepared.input, prepared.output}
    return max(sum(one.bytes for one in step.live if one.name not in ends) for step in network.steps)


def without_scratch(program: CProgram) -> int:
    """The same of the C program: what tensors take at one step, without its scratch memory."""
    tensors = [buffer for buffer in program.memory.buffers if not buffer.name.startswith("scratch")]
    steps = range(len(program.network.steps))
    return max(sum(b.bytes for b in tensors if b.first <= i <= b.last) for i in steps)


def test_the_example_by_hand(fashion: NetworkDescription) -> None:
    stem = fashion.layer("stem.weight")
    assert stem == LayerDescription(
        "stem.weight", "Conv", (16, 1, 3, 3), 16, 144, 14 * 14 * 144, (3, 3), (2, 2), 1, 784, 16 * 14 * 14, 8, 8, 1
    )
    assert (stem.taps, stem.positions, stem.activation_bytes) == (9, 196, 784 + 3136)
    classifier = fashion.layer("fc.weight")
    assert (classifier.op, classifier.inputs, classifier.outputs, classifier.positions) == ("Gemm", 64, 10, 1)
    assert [step.op for step in fashion.steps].count("Add") == 3
    assert {step.layer for step in fashion.steps if step.layer} == {layer.name for layer in fashion.layers}
    with pytest.raises(KeyError):
        fashion.layer("nobody")


def test_values_of_fewer_bits_by_hand(fashion_prepared: Prepared, fashion: NetworkDescription) -> None:
    """What a layer reads and writes, through the ReLU that runs with it; an addition counts as its widest operand."""
    tensors = Quantizer(fashion_prepared).tensors
    used = {layer.name: layer.uses[0].input for layer in fashion_prepared.layers}
    first = used["block1.conv1.weight"]  # the ReLU of the stem, which the first addition reads, too
    found = describe(fashion_prepared, 8, dict.fromkeys(tensors[first], 4))
    bits = {layer.name: (layer.input_bits, layer.output_bits) for layer in found.layers}
    assert bits["stem.weight"] == (8, 4)
    assert bits["block1.conv1.weight"] == (4, 8)
    assert {pair for name, pair in bits.items() if name not in ("stem.weight", "block1.conv1.weight")} == {(8, 8)}
    sums = [step for step in found.steps if step.op == "Add"]
    assert all(step.bits == 8 for step in sums)
    live = {tensor.bits for step in found.steps for tensor in step.live}
    assert live == {4, 8}
    assert [step.bytes for step in found.steps] == [step.bytes for step in fashion.steps]  # a code takes a byte


def test_every_value_of_fewer_bits(fashion_prepared: Prepared) -> None:
    tensors = Quantizer(fashion_prepared).tensors
    every = describe(fashion_prepared, 8, {value: 3 for values in tensors.values() for value in values})
    assert {layer.input_bits for layer in every.layers} == {3}
    assert {layer.output_bits for layer in every.layers if layer.name != "fc.weight"} == {3}
    assert every.layer("fc.weight").output_bits == 8  # logits have no codes
    assert {step.bits for step in every.steps if step.op == "Add"} == {3}


def test_float_activations_take_four_times_the_memory(fashion_prepared: Prepared, fashion: NetworkDescription) -> None:
    floats = describe(fashion_prepared, 32)
    widest, codes = peak(floats.steps), peak(fashion.steps)
    assert widest is not None
    assert codes is not None
    assert (widest.name, widest.bytes) == (codes.name, 4 * codes.bytes)
    assert floats.layer("stem.weight").activation_bytes == 4 * fashion.layer("stem.weight").activation_bytes


def test_peak_memory_is_that_of_the_c_program(fashion_prepared: Prepared, fashion: NetworkDescription) -> None:
    """The oracle is another liveness analysis: that of the emitter, over its own steps."""
    assert beside_ends(fashion, fashion_prepared) == without_scratch(emitted(fashion_prepared)) == 9408


GRAPHS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "chain": (
        [
            ("Conv", "x a.w a.b", "a", PAD), ("Relu", "a", "b", {}),
            ("Conv", "b c.w c.b", "c", {**PAD, "strides": [2, 2]}), ("Relu", "c", "d", {}),
            ("Flatten", "d", "e", {}), ("Gemm", "e f.w f.b", "f", {"transB": 1}),
        ],
        {"a.w": (6, 2, 3, 3), "a.b": (6,), "c.w": (4, 6, 3, 3), "c.b": (4,), "f.w": (5, 64), "f.b": (5,)},
    ),
    "residual": (
        [
            ("Conv", "x a.w a.b", "a", PAD), ("Relu", "a", "b", {}), ("Conv", "b c.w c.b", "c", PAD),
            ("Add", "b c", "d", {}), ("Relu", "d", "e", {}),
            ("MaxPool", "e", "f", {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("Conv", "f g.w g.b", "g", PAD), ("Add", "g f", "h", {}), ("Relu", "h", "i", {}), ("Flatten", "i", "j", {}),
            ("Gemm", "j k.w k.b", "k", {"transB": 1}),
        ],
        {
            "a.w": (4, 2, 3, 3), "a.b": (4,), "c.w": (4, 4, 3, 3), "c.b": (4,), "g.w": (4, 4, 3, 3), "g.b": (4,),
            "k.w": (5, 64), "k.b": (5,),
        },
    ),
    "branches": (
        [
            ("Conv", "x a.w a.b", "a", PAD), ("Relu", "a", "b", {}), ("Conv", "b c.w c.b", "c", PAD),
            ("Relu", "c", "d", {}), ("Conv", "b e.w e.b", "e", PAD), ("Relu", "e", "f", {}),
            ("Concat", "d f b", "g", {"axis": 1}), ("Conv", "g h.w h.b", "h", {"strides": [4, 4]}),
            ("Relu", "h", "i", {}), ("Flatten", "i", "j", {}), ("Gemm", "j k.w k.b", "k", {"transB": 1}),
        ],
        {
            "a.w": (3, 2, 3, 3), "a.b": (3,), "c.w": (5, 3, 3, 3), "c.b": (5,), "e.w": (4, 3, 3, 3), "e.b": (4,),
            "h.w": (4, 12, 2, 2), "h.b": (4,), "k.w": (5, 16), "k.b": (5,),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_memory_of_other_networks_is_that_of_the_c_program(make_graph: MakeGraph, name: str) -> None:
    prepared = make_graph((2, 8, 8), *GRAPHS[name])
    assert beside_ends(describe(prepared, 8), prepared) == without_scratch(emitted(prepared))


def test_views_and_single_elements_are_no_steps(make_graph: MakeGraph) -> None:
    network = describe(make_graph((2, 8, 8), *GRAPHS["chain"]), 8)
    assert [(step.op, step.reads, step.writes) for step in network.steps] == [
        ("Conv", 128, 384), ("Conv", 384, 64), ("Gemm", 64, 5)
    ]  # fmt: skip
    assert [[one.elements for one in step.live] for step in network.steps] == [[128, 384], [384, 64], [64, 5]]


def test_a_shortcut_stays_in_memory_until_it_is_added(make_graph: MakeGraph) -> None:
    network = describe(make_graph((2, 8, 8), *GRAPHS["residual"]), 8)
    live = {step.name: sum(one.elements for one in step.live) for step in network.steps}
    assert live["node_a"] == 128 + 256
    assert live["node_c"] == live["node_d"] == 512  # the sum overwrites what it adds to
    assert live["node_f"] == 256  # pooling without padding works in place
    assert live["node_h"] == 64 + 256  # the buffer of the pool keeps its size
    assert [step.op for step in network.steps if not step.layer] == ["Add", "MaxPool", "Add"]


def test_a_shared_weight_counts_all_its_uses(make_graph: MakeGraph) -> None:
    rows: list[Any] = [
        ("Conv", "x a.w", "a", PAD), ("Relu", "a", "b", {}), ("Conv", "b a.w", "c", PAD), ("Relu", "c", "d", {}),
        ("Flatten", "d", "e", {}), ("Gemm", "e f.w", "f", {"transB": 1}),
    ]  # fmt: skip
    network = describe(make_graph((2, 8, 8), rows, {"a.w": (2, 2, 3, 3), "f.w": (5, 128)}), 8)
    shared = network.layer("a.w")
    assert (shared.uses, shared.inputs, shared.outputs) == (2, 256, 256)
    assert shared.macs == 2 * 64 * 36
    assert shared.positions == 128


def test_groups_and_strides(make_graph: MakeGraph) -> None:
    rows: list[Any] = [
        ("Conv", "x a.w", "a", {"group": 4, "strides": [2, 1], **PAD}), ("Relu", "a", "b", {}),
        ("Flatten", "b", "c", {}), ("Gemm", "c d.w", "d", {"transB": 1}),
    ]  # fmt: skip
    network = describe(make_graph((4, 8, 8), rows, {"a.w": (8, 1, 3, 3), "d.w": (5, 256)}), 8)
    first = network.layer("a.w")
    assert (first.groups, first.stride, first.kernel, first.taps) == (4, (2, 1), (3, 3), 9)
    assert first.macs == 8 * 4 * 8 * 9


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 32)), max_size=6))
def test_bytes_of_what_lives(drawn: list[tuple[int, int]]) -> None:
    live = tuple(Live(f"t{i}", elements, bits) for i, (elements, bits) in enumerate(drawn))
    step = Step("s", "Conv", "", 1, 1, 8, live)
    expected = sum(-(-elements * (8 if bits <= 8 else bits) // 8) for elements, bits in drawn)
    assert step.bytes == expected
    assert all(container(bits) == (8 if bits <= 8 else bits) for _, bits in drawn)


def test_the_widest_step_is_the_first_of_equals() -> None:
    steps = [
        Step(name, "Conv", "", 1, 1, 8, (Live("t", size, 8),)) for name, size in zip("abc", (3, 5, 5), strict=True)
    ]
    assert peak(steps) is steps[1]
    assert peak([]) is None
