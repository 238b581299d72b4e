"""How the graph is read: codes behind Relu and Clip, windows, boxes, what is taken in and what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.emit.c.codes import WIDE, clipped, wide
from qopt.emit.c.network import read_network
from qopt.emit.c.simulate import simulate
from qopt.emit.c.steps import AverageStep, Code, LayerStep, MoveStep, Network, RescaleStep, Tensor, Window
from qopt.emit.c.values import box, constant, keeps_order, window
from qopt.errors import UnsupportedModelError
from qopt.quant import AffineRange


def node(kind: str, *constants: Any, shape: tuple[int, ...] = (), out: tuple[int, ...] = (), **attributes: Any) -> Any:
    """A node of one image and constants; None leaves an input out."""
    image = ir.val("x", ir.DataType.FLOAT, ir.Shape([None, *shape]))
    inputs: list[ir.Value | None] = [image]
    for i, array in enumerate(constants):
        inputs.append(None if array is None else ir.val(f"c{i}", const_value=ir.tensor(np.asarray(array))))
    made = ir.node(kind, inputs, attributes=attributes, name="n")
    made.outputs[0].shape = ir.Shape([None, *out])
    return made


CODE = Code(0.5, 10, 0, 255)


@pytest.mark.parametrize(("made", "low", "high"), [
    (node("Relu"), 10, 255),
    (node("Clip", np.float32(-1), np.float32(6)), 8, 22),
    (node("Clip", None, np.float32(6)), 0, 22),
    (node("Clip", np.float32(1)), 12, 255),
    (node("Clip"), 0, 255),
    (node("Clip", np.float32(-np.inf), np.float32(np.inf)), 0, 255),
    (node("Clip", np.float32(-1e30), np.float32(1e30)), 0, 255),
    (node("Clip", np.float32(6), np.float32(1)), 12, 12),
    (node("Clip", np.float32(500), np.float32(600)), 255, 255),
    (node("Clip", np.float32(-60), np.float32(-50)), 0, 0),
])  # fmt: skip
def test_bounds_become_codes(made: Any, low: int, high: int) -> None:
    code = clipped(CODE, made)
    assert (code.low, code.high, code.scale, code.zero_point) == (low, high, 0.5, 10)
    assert clipped(code, made) == code
    assert code.within(CODE)
    assert CODE.within(code) == ((low, high) == (0, 255))


def test_bounds_that_are_computed() -> None:
    made = node("Clip", np.float32(0))
    made.resize_inputs(3)
    made.replace_input_with(2, ir.val("computed"))
    with pytest.raises(UnsupportedModelError, match="node 'n': Clip with computed bounds"):
        clipped(CODE, made)


@given(largest=st.floats(0, 1e30))
def test_wide_codes_hold_the_largest_number(largest: float) -> None:
    code = wide(largest)
    assert code.zero_point == 0
    assert largest / code.scale <= WIDE * (1 + 1e-6) < code.high == -code.low
    assert code.high <= 2**24  # what a float32 holds exactly
    assert float(np.float32(code.scale)) == code.scale > 0


@pytest.mark.parametrize(("code", "bits", "largest"), [
    (Code(1.0, 0, 0, 1), 1, 1.0), (Code(1.0, 1, 0, 1), 1, 1.0), (Code(0.5, 0, 0, 15), 4, 7.5),
    (Code(0.5, 128, 0, 255), 8, 64.0), (Code(1.0, 0, 0, 0), 1, 0.0), (Code(1.0, 3, 0, 1), 2, 3.0),
])  # fmt: skip
def test_bits_and_reach_of_codes(code: Code, bits: int, largest: float) -> None:
    """The code of zero counts, which padding holds even where a Clip leaves it out."""
    assert (code.bits, code.largest) == (bits, largest)


SOURCE = Tensor("x", (3, 9, 8), CODE, "x")


@pytest.mark.parametrize(("attributes", "out", "pads"), [
    ({"pads": [1, 2, 3, 4]}, (10, 11), (1, 2, 3, 4)),
    ({}, (7, 6), (0, 0, 0, 0)),
    ({"auto_pad": "VALID"}, (7, 6), (0, 0, 0, 0)),
    ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (5, 4), (1, 0, 1, 1)),
    ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (5, 4), (1, 1, 1, 0)),
    ({"auto_pad": "SAME_UPPER", "dilations": [2, 3]}, (9, 8), (2, 3, 2, 3)),
])  # fmt: skip
def test_windows(attributes: dict[str, Any], out: tuple[int, int], pads: tuple[int, ...]) -> None:
    view, ends = window(node("Conv", out=(5, *out), **attributes), SOURCE, (3, 3))
    assert (view.pad_top, view.pad_left, *ends) == pads
    assert (view.channels, view.height, view.width, view.out_height, view.out_width) == (3, 9, 8, *out)
    assert view.pixels == out[0] * out[1]


def test_one_axis_is_a_row() -> None:
    view, ends = window(node("Conv", out=(5, 9), pads=[2, 1], strides=[2]), replace(SOURCE, shape=(4, 18)), (3,), 2)
    assert view == Window(2, 1, 18, 1, 9, 1, 3, 1, 2, 1, 1, 0, 2)
    assert ends == (0, 1)


def test_windows_that_have_no_code() -> None:
    with pytest.raises(UnsupportedModelError, match="anything but one or two axes"):
        window(node("Conv", out=(1, 1, 1, 1)), replace(SOURCE, shape=(1, 2, 3, 4)), (1, 1, 1))
    with pytest.raises(UnsupportedModelError, match="negative padding"):
        window(node("Conv", out=(3, 7, 6), pads=[-1, 0, 0, 0]), SOURCE, (3, 3))
    made = node("Conv", out=(3, 7, 6))
    made.outputs[0].name, made.outputs[0].shape = "n_out", ir.Shape([None, 3, None, 6])
    with pytest.raises(UnsupportedModelError, match=r"value 'n_out'.*every size but the batch"):
        window(made, SOURCE, (3, 3))


@given(data=st.data())
def test_boxes_are_pythons_slices(data: st.DataObject) -> None:
    """Starts from either end, beyond it too, and any step: the simulated codes are those of numpy."""
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    axes = data.draw(st.lists(st.sampled_from([1, 2, 3, -1]), min_size=1, max_size=2, unique_by=lambda a: a % 4))
    starts = [data.draw(st.integers(-7, 3)) for _ in axes]
    steps = [data.draw(st.integers(1, 3)) for _ in axes]
    codes = np.arange(np.prod(shape)).reshape(shape)
    cuts = [slice(None)] * 3
    for axis, start, step in zip(axes, starts, steps, strict=True):
        cuts[axis % 4 - 1] = slice(start, None, step)
    expected = codes[tuple(cuts)]
    if not expected.size:
        return
    made = node("Slice", starts, [2**40] * len(axes), axes, steps)
    check_move(made, codes, expected)


@given(data=st.data())
def test_boxes_are_numpys_padding(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * data.draw(st.integers(1, 3))))
    pads = [(0, 0), *[data.draw(st.tuples(st.integers(0, 3), st.integers(0, 2))) for _ in shape]]
    codes = np.arange(np.prod(shape)).reshape(shape)
    expected = np.pad(codes, pads[1:], constant_values=CODE.zero_point)
    check_move(node("Pad", [low for low, _ in pads] + [high for _, high in pads]), codes, expected)


def check_move(made: Any, codes: Any, expected: Any) -> None:
    source, target = Tensor("x", codes.shape, CODE, "x"), Tensor("y", expected.shape, CODE, "y")
    step = MoveStep(source, target, *box(made, codes.shape, expected.shape))
    assert np.array_equal(simulate(Network(source, target, (step,)), codes), expected.reshape(-1))


@pytest.mark.parametrize("made", [
    node("Slice", [0], [1], [0]), node("Slice", [-1], [-9], [1], [-1]), node("Pad", [1, 0, 0, 0, 0, 0, 0, 0]),
    node("Pad", [0, 1, 0, 0, 0, 0, 0, 0], np.float32(2)), node("Pad", [0, 1, 1, 1, 0, 0, 0, 0], mode="reflect"),
])  # fmt: skip
def test_boxes_that_have_no_code(made: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"node 'n': {made.op_type}"):
        box(made, (2, 3, 4), (2, 3, 4))


@pytest.mark.parametrize(("source", "order", "same"), [
    ((4, 1, 1), [0, 2, 3, 1], True), ((1, 5, 6), [0, 2, 1, 3], True), ((4, 5), [0, 2, 1], False),
    ((4, 1), [0, 2, 1], True), ((1, 1), [1, 0, 2], False), ((2, 3, 4), [0, 1, 2, 3], True), ((4,), None, False),
])  # fmt: skip
def test_transposes_that_move_nothing(source: tuple[int, ...], order: list[int] | None, same: bool) -> None:
    attributes: dict[str, Any] = {} if order is None else {"perm": order}
    target = tuple(source[axis - 1] for axis in (order or [])[1:])
    assert keeps_order(node("Transpose", **attributes), source, target) == same
    image = np.arange(np.prod(source)).reshape(1, *source)
    if order and order[0] == 0:
        assert np.array_equal(image.transpose(order).reshape(-1), image.reshape(-1)) == same


def test_inputs_that_are_constant() -> None:
    made = node("Clip", np.float32(2), None)
    assert constant(made, 1) == (2.0,)
    assert constant(made, 2) == constant(made, 3) == ()
    assert constant(made, 0) is None


def test_what_a_step_takes_in(graph: Any, quantized: Any) -> None:
    """A Relu, a Clip behind it and a layer's bias make no steps; codes of its own before it do."""
    g = graph(4, 8, 8)
    g.op("Relu", [g.conv("x", "a", 4, 4, 3, 3)], "ar")
    g.clip("ar", "ac", 0.0, 0.5)
    prepared = g.head(g.conv("ac", "b", 4, 4, 3, 3)).prepared()
    codes = quantized(prepared, "int8")
    named = {"x": codes.activations["x"], "ac": AffineRange(2.0**-7, 0, 8), "b": codes.activations["b"]}
    network = read_network(prepared, replace(codes, activations=named))
    assert [type(step) for step in network.steps] == [LayerStep] * 3
    assert (network.steps[0].target.name, network.steps[0].target.code.high) == ("ac", 64)
    assert network.output.code.wide
    apart = read_network(prepared, replace(codes, activations={**named, "a": codes.activations["b"]}))
    assert [type(step) for step in apart.steps] == [LayerStep, RescaleStep, LayerStep, LayerStep]
    assert apart.steps[1].target.code == network.steps[0].target.code


def test_what_nothing_reads_is_not_there(graph: Any, quantized: Any) -> None:
    """Sizes that are computed beside the image do not count, and need no code."""
    g = graph(4, 8, 8)
    g.op("GlobalAveragePool", [g.conv("x", "a", 6, 4, 3, 3)], "m")
    prepared = g.head("m").prepared()
    network = read_network(prepared, quantized(prepared, "int8"))
    assert [type(step) for step in network.steps] == [LayerStep, AverageStep, LayerStep]
    assert network.normalisation == ()
    assert network.steps[1].target.root == "m"
    last = network.steps[2]
    assert isinstance(last, LayerStep)
    assert (last.source.root, last.source.name, last.window) == ("m", "flat", None)
