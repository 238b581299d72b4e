"""Convolution and pooling with random windows against ONNX Runtime: whatever is not refused must agree."""

from __future__ import annotations

from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import TOLERANCE, matches_onnxruntime
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin


def _window(draw: st.DrawFn, axes: int, *, dilated: bool) -> dict[str, Any]:
    """Attributes of a window that fits an image of 9 pixels along each axis."""
    each = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel = draw(each)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": draw(each)}
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if mode != "NOTSET":
        attributes["auto_pad"] = mode
    else:
        attributes["pads"] = [draw(st.integers(0, size - 1)) for size in kernel + kernel]
    if dilated and mode == "NOTSET":
        attributes["dilations"] = draw(each)
    return attributes


@st.composite
def windows(draw: st.DrawFn, *, dilated: bool = True) -> tuple[int, dict[str, Any]]:
    axes = draw(st.sampled_from([1, 2, 2, 3]))
    return axes, _window(draw, axes, dilated=dilated)


def _agrees(g: Any, result: str) -> None:
    try:
        prepared = prepare(g.model(g.op("Flatten", result)))  # ONNX Runtime refuses some windows itself
        twin = build_twin(prepared)
    except UnsupportedModelError:
        assume(False)
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


@settings(max_examples=80)
@given(window=windows(), groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_convolution(window: tuple[int, dict[str, Any]], groups: int, bias: bool, graph: Any) -> None:
    axes, attributes = window
    g = graph((2, *(9,) * axes))
    inputs = ["x", g.random(4, 2 // groups, *attributes["kernel_shape"]), *([g.random(4)] if bias else [])]
    _agrees(g, g.op("Conv", *inputs, group=groups, **attributes))


@settings(max_examples=60)
@given(window=windows(), groups=st.sampled_from([1, 2]), extra=st.integers(0, 2))
def test_transposed_convolution(window: tuple[int, dict[str, Any]], groups: int, extra: int, graph: Any) -> None:
    axes, attributes = window
    attributes = {key: value for key, value in attributes.items() if key != "auto_pad"}
    g = graph((2, *(9,) * axes))
    room = [max(s, d) - 1 for s, d in zip(attributes["strides"], attributes.get("dilations", [1] * axes), strict=True)]
    attributes["output_padding"] = [min(extra, size) for size in room]
    result = g.op("ConvTranspose", "x", g.random(2, 3, *attributes["kernel_shape"]), group=groups, **attributes)
    _agrees(g, result)


@settings(max_examples=80)
@given(window=windows(), ceil=st.sampled_from([0, 1]))
def test_max_pool(window: tuple[int, dict[str, Any]], ceil: int, graph: Any) -> None:
    axes, attributes = window
    g = graph((2, *(9,) * axes))
    _agrees(g, g.op("MaxPool", g.op("Sub", "x", g.constant(2.0)), ceil_mode=ceil, **attributes))


@settings(max_examples=80)
@given(window=windows(), ceil=st.sampled_from([0, 1]), counted=st.sampled_from([0, 1]))
def test_average_pool(window: tuple[int, dict[str, Any]], ceil: int, counted: int, graph: Any) -> None:
    axes, attributes = window
    g = graph((2, *(9,) * axes))
    data = g.op("Add", "x", g.constant(1.0))
    _agrees(g, g.op("AveragePool", data, ceil_mode=ceil, count_include_pad=counted, **attributes))


@settings(max_examples=60)
@given(window=windows(), ceil=st.sampled_from([0, 1]), p=st.sampled_from([1, 2, 3]))
def test_norm_pool(window: tuple[int, dict[str, Any]], ceil: int, p: int, graph: Any) -> None:
    axes, attributes = window
    g = graph((2, *(9,) * axes))
    _agrees(g, g.op("LpPool", g.op("Sub", "x", g.constant(0.5)), ceil_mode=ceil, p=p, **attributes))


@settings(max_examples=60)
@given(window=windows(dilated=False), longer=st.integers(-1, 2), asked=st.booleans())
def test_transposed_convolution_to_a_size(
    window: tuple[int, dict[str, Any]], longer: int, asked: bool, graph: Any
) -> None:
    """By ``auto_pad``, or to the size of its own choice and a little more or less."""
    axes, attributes = window
    attributes.pop("pads", None)
    if asked:
        attributes["output_shape"] = [max(9 * stride + longer, 1) for stride in attributes["strides"]]
    g = graph((2, *(9,) * axes))
    _agrees(g, g.op("ConvTranspose", "x", g.random(2, 3, *attributes["kernel_shape"]), **attributes))
