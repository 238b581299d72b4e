"""Codes in the twin: bit for bit as ONNX Runtime, gradients as qopt's own activation quantizers, and whole quantized
files, ONNX Runtime's and qopt's, which can so be attacked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from qopt.emit import emit
from qopt.graph.compare import TOLERANCE, difference, matches_onnxruntime, random_images
from qopt.graph.fold_constants import fold_constants
from qopt.graph.model import Prepared
from qopt.graph.operators.quantization import codes_of, dequantized, quantized, quantized_by_own_range
from qopt.graph.operators.quantized_layers import conv_codes, product_codes
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.graph.shapes import infer_shapes
from qopt.graph.twin import build_twin
from qopt.quant import ActivationQuantizer, AffineRange, quantize_weight
from qopt.spec import WeightSpec

FEW = settings(max_examples=40)
Array = NDArray[Any]


# --- the two operators -------------------------------------------------------------------------------------------


@FEW
@given(
    scale=st.floats(2**-10, 10.0, width=32), zero=st.integers(0, 255), bits=st.sampled_from([2, 4, 8]),
    numbers=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
)  # fmt: skip
def test_the_pair_is_an_activation_quantizer(scale: float, zero: int, bits: int, numbers: list[float]) -> None:
    """Values and gradients, in the range, at its ends and outside."""
    affine = AffineRange(float(np.float32(scale)), zero % (1 << bits), bits)
    ours, theirs = (torch.tensor(numbers, dtype=torch.float32, requires_grad=True) for _ in range(2))
    step, shift = torch.tensor(affine.scale), torch.tensor(affine.zero_point, dtype=torch.uint8)
    codes = quantized(ours, step, shift, 0, affine.largest_code, 1, 0)
    back = dequantized(codes, step, shift, 1, 0, None)
    expected = ActivationQuantizer(affine)(theirs)
    assert torch.equal(back, expected)
    assert torch.equal(codes.detach().to(torch.uint8), affine.quantize(ours.detach()))
    weights = torch.arange(1.0, len(numbers) + 1)
    got = torch.autograd.grad((back * weights).sum(), ours)[0]
    assert torch.allclose(got, torch.autograd.grad((expected * weights).sum(), theirs)[0], rtol=1e-6)


@FEW
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), block=st.integers(1, 4), data=st.data())
def test_scales_per_axis_and_per_block(sizes: list[int], block: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(sizes), len(sizes) - 1))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = generator.integers(-8, 8, sizes).astype(np.int8)
    blocked = list(sizes)
    blocked[axis] = -(-sizes[axis] // block)
    scale = generator.uniform(0.1, 2.0, blocked).astype(np.float32)
    spread = np.take(np.repeat(scale, block, axis), range(sizes[axis]), axis)
    got = dequantized(torch.from_numpy(codes), torch.from_numpy(scale), None, axis, block, None).numpy()
    assert np.array_equal(got, codes.astype(np.float32) * spread)
    vector = generator.uniform(0.1, 2.0, sizes[axis]).astype(np.float32)
    shape = [1] * len(sizes)
    shape[axis] = -1
    got = dequantized(torch.from_numpy(codes), torch.from_numpy(vector), None, axis, 0, None).numpy()
    assert np.array_equal(got, codes.astype(np.float32) * vector.reshape(shape))


def test_a_planted_gradient_bug_would_show() -> None:
    """A rounding without the straight-through trick has no gradient at all."""
    x = torch.tensor([0.3, 0.7], requires_grad=True)
    assert torch.autograd.grad(torch.round(x / 0.1).sum(), x)[0].eq(0).all()
    codes = codes_of(x, torch.tensor(0.1), None, 0, 255)
    assert torch.allclose(torch.autograd.grad(codes.sum(), x)[0], torch.tensor(10.0))


def test_codes_differentiate_under_vmap() -> None:
    """Per-example gradients, as the Fisher information takes them."""
    images = torch.tensor([[0.1, 5.0], [0.2, 0.3]])
    per_image = torch.func.vmap(torch.func.grad(lambda x: codes_of(x, torch.tensor(0.5), None, 0, 3).sum()))(images)
    assert per_image.tolist() == [[2.0, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("axis", [None, 1, -1])
def test_codes_of_activations_equal_onnxruntime(dtype: type, axis: int | None, graph: Any) -> None:
    g = graph()
    count = 1 if axis is None else (3 if axis == 1 else 8)
    limits = np.iinfo(dtype)
    steps = np.linspace(0.4, 0.9, count) / (limits.max - limits.min)
    zeros: Array = np.linspace(limits.min // 2, limits.max // 2, count).astype(dtype)
    scale = g.constant(steps if axis is not None else steps[0])
    zero = g.constant(zeros if axis is not None else zeros[0], dtype=dtype)
    where = {} if axis is None else {"axis": axis}
    codes = g.op("QuantizeLinear", g.op("Sub", "x", g.constant(0.5)), scale, zero, **where)
    prepared = prepare(g.model(g.op("Flatten", g.op("DequantizeLinear", codes, scale, zero, **where))))
    assert [node.op_type for node in prepared.model.graph][1:3] == ["QuantizeLinear", "DequantizeLinear"]
    assert matches_onnxruntime(prepared, build_twin(prepared)) == 0.0


def test_a_range_of_its_own(graph: Any) -> None:
    """Scale and zero point as the specification computes them; the gradient is the identity."""
    x = torch.tensor([[-1.0, 0.25, 3.0]], requires_grad=True)
    codes, scale, zero = quantized_by_own_range(x)
    assert scale.item() == pytest.approx(4 / 255)
    assert zero.item() == 64
    assert codes.tolist() == [[0, 80, 255]]
    assert torch.allclose(torch.autograd.grad(((codes - zero) * scale).sum(), x)[0], torch.ones_like(x))
    assert quantized_by_own_range(torch.zeros(2))[1].item() == 1.0


def test_products_of_codes_are_products_of_what_they_stand_for() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 256, (3, 5)), generator.integers(-128, 128, (5, 4))
    steps = (np.float32(0.02), generator.uniform(0.01, 0.02, 4).astype(np.float32), np.float32(0.3))
    exact = ((a - 7) * steps[0]) @ (b * steps[1])
    codes = np.clip(np.round(exact / steps[2]) + 100, 0, 255)
    tensors = [torch.tensor(part) for part in (a, steps[0], 7, b, steps[1], 0, steps[2], 100)]
    assert np.array_equal(product_codes(*tensors, 0, 255).numpy(), codes)  # type: ignore[call-arg,arg-type]


def test_convolutions_of_codes_pad_with_the_zero_point() -> None:
    x, weight = torch.full((1, 1, 3, 3), 9, dtype=torch.uint8), torch.ones(1, 1, 3, 3, dtype=torch.int8)
    one = torch.tensor(1.0)
    got = conv_codes(
        x, one, torch.tensor(4), weight, one, torch.tensor(0), one, torch.tensor(10), torch.tensor([2]),
        (1, 1), (1, 1), (1, 1), (1, 1), 1, 0, 255,
    )  # fmt: skip
    assert got[0, 0].tolist() == [[32, 42, 32], [42, 57, 42], [32, 42, 32]]  # 5 for every pixel, 2, and 10


# --- files -------------------------------------------------------------------------------------------------------


def _centred(g: Any, logits: str, run: Any) -> onnx.ModelProto:
    """The graph with logits of mean zero over images, so that these fall into many classes."""
    means = run(g.model(logits), random_images((3, 8, 8), 64, seed=9)).mean(0)
    proto: onnx.ModelProto = g.proto(g.op("Sub", logits, g.constant(means)))
    return proto


@pytest.fixture(scope="session")
def network(graph: Any, run: Any) -> Callable[[int], onnx.ModelProto]:
    """A residual network on images of 3x8x8, in any opset."""

    def build(opset: int) -> onnx.ModelProto:
        g = graph(opset=opset)
        first = g.op("Relu", g.op("Conv", "x", g.random(8, 3, 3, 3, name="a"), g.random(8), pads=[1] * 4))
        second = g.op("Conv", first, g.random(8, 8, 3, 3, name="b"), g.random(8), pads=[1] * 4)
        joined = g.op("MaxPool", g.op("Relu", g.op("Add", second, first)), kernel_shape=[2, 2], strides=[2, 2])
        logits = g.op("Gemm", g.op("Flatten", joined), g.random(10, 128, name="c"), g.random(10), transB=1)
        return _centred(g, logits, run)

    return build


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._left = [{"x": random_images((3, 8, 8), 16, seed=seed)} for seed in range(2)]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


def _check(model: ir.Model, run: Any, tolerance: float, *, unpacked: bool = True) -> Prepared:
    """The twin of a quantized file gives what ONNX Runtime computes, and the image a gradient."""
    images = random_images((3, 8, 8), 64, seed=7)
    prepared = prepare(model)
    twin = build_twin(prepared)
    images = images[: prepared.batch]
    x = torch.tensor(images, requires_grad=True)
    logits = twin(x)
    got, expected = logits.detach().numpy(), run(model, images)
    assert difference(got, expected) <= tolerance
    assert prepared.batch is not None or len(set(expected.argmax(1))) >= 3, "agreement on one class says nothing"
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.95
    logits.max(1).values.sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1) != 0).float().mean() > 0.5
    assert unpacked == all(buffer.is_floating_point() for buffer in twin.buffers() if buffer.numel() > 100)
    return prepared


KINDS = [
    (13, QuantType.QUInt8, QuantType.QInt8, False), (17, QuantType.QInt8, QuantType.QInt8, True),
    (20, QuantType.QUInt8, QuantType.QUInt8, False), (21, QuantType.QUInt8, QuantType.QInt8, True),
    (21, QuantType.QUInt16, QuantType.QInt8, False), (21, QuantType.QInt16, QuantType.QInt8, False),
    (21, QuantType.QUInt8, QuantType.QInt4, True), (21, QuantType.QUInt8, QuantType.QUInt4, False),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("opset", "activations", "weights", "per_channel"), KINDS)
def test_files_that_onnxruntime_quantized(
    opset: int, activations: QuantType, weights: QuantType, per_channel: bool, network: Any, run: Any, tmp_path: Path
) -> None:
    """Different sums of the same products flip codes now and then: a step of an activation is what is allowed."""
    onnx.save(network(opset), tmp_path / "float.onnx")
    quantize_static(
        str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"), _Images(), quant_format=QuantFormat.QDQ,
        per_channel=per_channel, activation_type=activations, weight_type=weights,
    )  # fmt: skip
    prepared = _check(ir.load(tmp_path / "q.onnx"), run, 0.02)
    kinds = [node.op_type for node in prepared.model.graph]
    assert kinds.count("QuantizeLinear") >= 4
    assert prepared.layers == ()


@pytest.mark.filterwarnings("ignore")
def test_a_file_with_ranges_found_at_run_time(network: Any, run: Any, tmp_path: Path) -> None:
    """DynamicQuantizeLinear, ConvInteger and MatMulInteger."""
    onnx.save(network(21), tmp_path / "float.onnx")
    quantize_dynamic(str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"))
    prepared = _check(ir.load(tmp_path / "q.onnx"), run, 0.02, unpacked=False)
    kinds = {node.op_type for node in prepared.model.graph}
    assert {"DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"} <= kinds


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_layers_on_codes(graph: Any, run: Any, tmp_path: Path) -> None:
    """QLinearConv and its neighbours of the standard domain."""
    g = graph()
    conv = g.op("Relu", g.op("Conv", "x", g.random(8, 3, 3, 3), g.random(8), pads=[1] * 4))
    pooled = g.op("MaxPool", conv, kernel_shape=[2, 2], strides=[2, 2])
    logits = g.op("Flatten", g.op("Conv", pooled, g.random(2, 8, 3, 3)))
    onnx.save(_centred(g, logits, run), tmp_path / "float.onnx")
    quantize_static(
        str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"), _Images(), quant_format=QuantFormat.QOperator,
        per_channel=True, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared = _check(ir.load(tmp_path / "q.onnx"), run, 0.02, unpacked=False)
    assert sum(node.op_type == "QLinearConv" for node in prepared.model.graph) == 2


SPECS = ["int8", "int4", "int3", "int2", "int1", "ternary", "log4", "log3", "int4:mid", "int4:asym", "int3:asym"]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_files_that_qopt_packed(spec: str, bits: int | None, network: Any, run: Any) -> None:
    source = prepare(ir.serde.deserialize_model(network(21)))
    weights = {
        layer.name: quantize_weight(
            torch.from_numpy(source.initializer(layer.initializer).copy()), WeightSpec.parse(spec), layer.channel_axis
        )
        for layer in source.layers
    }
    relus = [node.outputs[0].name for node in source.model.graph if node.op_type == "Relu"]
    ranges = {"x": (0.0, 1.0)} | dict.fromkeys(map(str, relus), (0.0, 4.0))
    activations = {name: AffineRange.from_bounds(*ends, bits) for name, ends in ranges.items()} if bits else {}
    model = emit(source, Quantized(weights, {}, activations))
    prepared = _check(model, run, TOLERANCE if bits is None else 0.02)
    operators = {node.op_type for node in prepared.model.graph}
    assert not operators & {"Mod", "Gather", "Div"}, "digits are taken apart once, not for every image"
    assert ("QuantizeLinear" in operators) == (bits is not None)


def test_large_packed_weights_are_unpacked_once(graph: Any) -> None:
    """More codes than any other folded constant may have: groups may outgrow themselves, nothing else may."""
    g = graph()
    groups = g.constant(np.arange(40_000)[:, None] % 256, dtype=np.int32)
    digits = g.op(
        "Mod", g.op("Div", groups, g.constant(2 ** np.arange(8), dtype=np.int32)), g.constant(2, dtype=np.int32)
    )
    spread = g.op("Expand", groups, g.ints(1, 8))
    total = g.op("Cast", g.op("Add", g.op("ReduceSum", digits), g.op("ReduceMax", spread)), to=1)
    model = g.model(g.op("Flatten", g.op("Mul", "x", total)))
    infer_shapes(model)
    fold_constants(model)
    left = [node.op_type for node in model.graph]
    assert "Div" not in left
    assert "Mod" not in left
    assert "Expand" in left
