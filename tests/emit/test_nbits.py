"""4-bit products that stay packed at run time: the same numbers, read back, and the memory that they take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from qopt.emit import check_shipped, check_weight_only, dequantized, emit, lower_opset, packed_layers
from qopt.emit.nbits import BLOCKS, best_block, pack_blocks, pack_zeros
from qopt.errors import UnsupportedModelError, VerificationError
from qopt.graph.load import load_model
from qopt.graph.model import Prepared
from qopt.graph.operators.packed_product import matmul_nbits, unpacked
from qopt.graph.operators.registry import Op
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.graph.twin import build_twin
from qopt.quant import AffineRange, quantize_weight
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes
from qopt.spec import WeightSpec

TAKEN = ["int4", "int4:full", "int3", "int2:full", "int2:mid", "int3:mid", "ternary", "int1", "int4:asym", "int2:asym",
         "int4:tensor:full", "int4:block16:full", "int4:asym:block16", "rows(int4:full*4,ternary*6)"]  # fmt: skip
LEFT = ["int8", "int5", "log4", "int4:mid", "int4:block8:full", "int8:asym", "log8"]
PRODUCTS = ["Gemm", "Gemm_t", "MatMul", "MatMul_3d", "MatMul_left"]


def wide(columns: int = 300, channels: int = 24, seed: int = 0) -> Prepared:
    """Two products, a width that fills no block, an activation between them."""
    random = np.random.default_rng(seed)
    shapes = {"a.weight": (columns, 48), "a.bias": (48,), "b.weight": (channels, 48), "b.bias": (channels,)}
    constants = [
        numpy_helper.from_array((random.standard_normal(s) / np.sqrt(s[0])).astype(np.float32), n)
        for n, s in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["p"], name="a"),
        helper.make_node("Add", ["p", "a.bias"], ["s"], name="add"),
        helper.make_node("Relu", ["s"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "b.weight", "b.bias"], ["logits"], name="b", transB=1),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", channels])
    graph = helper.make_graph(nodes, "g", [image], [logits], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return prepare(ir.serde.deserialize_model(proto))


def as_the_twin_would(node: ir.Node, values: dict[str, Any]) -> torch.Tensor:
    """The operator's own call on ``values`` by name, as the importer makes it."""
    graph = fx.Graph()
    held: dict[fx.Node, torch.Tensor] = {}

    def lookup(value: ir.Value) -> fx.Node:
        found = graph.placeholder("value")
        held[found] = torch.as_tensor(values[str(value.name)])
        return found

    call = matmul_nbits(Op(node, 21, lookup))
    result: torch.Tensor = call.function(*(held[a] if isinstance(a, fx.Node) else a for a in call.args))
    return result


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("spec", TAKEN)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers_as_the_weights_in_float(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any, op: str, spec: str, bias: bool
) -> None:
    prepared = one_layer(op, bias=bias)
    quantized = Quantized(codes_of(prepared, spec.replace("int4", "int4", 1)))
    if not packed_layers(prepared, quantized):
        assert quantized.weights["l.weight"].spec == WeightSpec.parse("int4")  # whose best grid may be mid-rise
        return
    model = emit(prepared, quantized, memory=True)
    node = next(n for n in model.graph if n.name == "l")
    assert (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    assert node.attributes["accuracy_level"].as_int() == 1
    assert node.metadata_props["qopt.layer"] == "l.weight"
    data = to_bytes(model)
    check_weight_only(prepared, quantized, model, data)
    check_shipped(prepared, quantized, data)
    feed = {"x": images(prepared)}
    expected = evaluate(emit(prepared, quantized), feed, "logits")
    for how in ("plain", "all"):
        np.testing.assert_allclose(evaluate(model, feed, "logits", how), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", LEFT)
def test_what_the_kernel_does_not_take_is_left_to_the_other_form(
    one_layer: Callable[..., Prepared], codes_of: Any, spec: str
) -> None:
    prepared = one_layer("Gemm")
    quantized = Quantized(codes_of(prepared, spec))
    assert not packed_layers(prepared, quantized)
    model = emit(prepared, quantized, memory=True)
    assert "MatMulNBits" not in kinds(model)
    assert to_bytes(model) == to_bytes(emit(prepared, quantized))


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "depthwise"])
def test_convolutions_are_left_alone(one_layer: Callable[..., Prepared], codes_of: Any, op: str) -> None:
    prepared = one_layer(op)
    assert not packed_layers(prepared, Quantized(codes_of(prepared, "int4:full")))


def test_integer_kernels_keep_their_layers(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Gemm")
    code = AffineRange.from_bounds(-1.0, 1.0, 8)
    quantized = Quantized(codes_of(prepared, "int4:full"), {}, {"x": code, "y": code})
    assert to_bytes(emit(prepared, quantized, memory=True)) == to_bytes(emit(prepared, quantized))


def test_changed_biases_are_added(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    for op, bias in (("Gemm", True), ("Gemm", False), ("MatMul", True), ("MatMul", False)):
        prepared = one_layer(op, bias=bias)
        quantized = Quantized(codes_of(prepared, "int4:full"), {("l.weight", 0): torch.linspace(-1, 1, 10)})
        feed = {"x": images(prepared)}
        got, expected = (evaluate(emit(prepared, quantized, memory=memory), feed, "logits") for memory in (True, False))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["int4:full", "int4:asym", "int3:block100", "int4:asym:block48"])
def test_a_width_that_fills_no_block_and_what_is_read_back(
    codes_of: Any, evaluate: Any, images: Any, tmp_path: Path, spec: str
) -> None:
    prepared = wide()
    layers = ["b.weight"] if "48" in spec else ["a.weight"] if "100" in spec else ["a.weight", "b.weight"]
    quantized = Quantized(codes_of(prepared, spec, *layers))
    model = emit(prepared, quantized, memory=True)
    assert kinds(model).count("MatMulNBits") == (0 if "block" in spec else 2)
    path = tmp_path / "model.onnx"
    path.write_bytes(to_bytes(lower_opset(model, prepared.example)))
    again = prepare(load_model(path))
    feed = {"x": images(prepared)}
    expected = evaluate(model, feed, "logits")
    np.testing.assert_allclose(evaluate(again.model, feed, "logits"), expected, rtol=1e-4, atol=1e-5)
    for node in again.model.graph:
        if node.op_type == "MatMulNBits":
            constants = {n: torch.tensor(again.initializer(n)).numpy() for n in again.model.graph.initializers}
            image = torch.from_numpy(np.ones((2, node.attributes["K"].as_int()), np.float32)).requires_grad_()
            got = as_the_twin_would(node, {**constants, str(node.inputs[0].name): image})  # type: ignore[union-attr]
            got.sum().backward()  # type: ignore[no-untyped-call]
            assert image.grad is not None
            assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("spec", ["int4:full", "int4:asym", "int2:full"])
def test_the_file_comes_back_into_the_twin(codes_of: Any, evaluate: Any, images: Any, spec: str) -> None:
    prepared = wide()
    model = emit(prepared, Quantized(codes_of(prepared, spec)), memory=True)
    assert kinds(model).count("MatMulNBits") == 2
    x = images(prepared)
    with torch.no_grad():
        got = build_twin(prepare(ir.serde.deserialize_model(ir.serde.serialize_model(model))))(torch.from_numpy(x))
    np.testing.assert_allclose(got.numpy(), evaluate(model, {"x": x}, "logits"), rtol=1e-4, atol=1e-5)


def test_the_opset_comes_down_with_it(codes_of: Any) -> None:
    prepared = wide()
    model = emit(prepared, Quantized(codes_of(prepared, "int4:full")), memory=True)
    assert lower_opset(model, prepared.example).opset_imports == {"": 13, "com.microsoft": 1}


@pytest.mark.parametrize(
    ("change", "match"),
    [({"accuracy_level": 4}, "accuracy_level"), ({"bits": 5}, "5 bits"), ({"accuracy_level": None}, "accuracy_level")],
)
def test_what_the_twin_refuses(codes_of: Any, change: dict[str, int | None], match: str) -> None:
    prepared = wide()
    model = emit(prepared, Quantized(codes_of(prepared, "int4:full")), memory=True)
    for node in model.graph:
        for name, value in change.items():
            if node.op_type == "MatMulNBits":
                node.attributes.pop(name)
                node.attributes.update({} if value is None else {name: ir.AttrInt64(name, value)})
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    with pytest.raises(UnsupportedModelError, match=match):
        matmul_nbits(Op(node, 21, fx.Graph().placeholder))  # type: ignore[arg-type]
    if "accuracy_level" in change:
        with pytest.raises(VerificationError, match="accuracy_level"):
            check_weight_only(prepared, Quantized(codes_of(prepared, "int4:full")), model, to_bytes(model))


@given(st.integers(1, 600))
def test_the_best_block_has_the_fewest_bytes(columns: int) -> None:
    cost = {block: -(-columns // block) * (block // 2 + 4) for block in BLOCKS}
    assert cost[best_block(columns)] == min(cost.values())


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(BLOCKS), st.booleans(), st.integers(0, 9))
def test_packing_is_undone(channels: int, columns: int, block: int, asymmetric: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = -(-columns // block)
    nibbles = random.integers(0, 16, (channels, columns)).astype(np.uint8)
    zeros = random.integers(0, 16, (channels, blocks)).astype(np.uint8)
    scales = random.random((channels, blocks)).astype(np.float32)
    found = unpacked(
        torch.from_numpy(pack_blocks(nibbles, block)), torch.from_numpy(scales),
        torch.from_numpy(pack_zeros(zeros)) if asymmetric else None, channels, columns, 4, block,
    ).numpy()  # fmt: skip
    middle = np.repeat(zeros, block, 1)[:, :columns].astype(np.float32) if asymmetric else np.float32(8)
    np.testing.assert_array_equal(found, (nibbles - middle) * np.repeat(scales, block, 1)[:, :columns])


@pytest.mark.parametrize(
    ("bits", "zeros"), [(bits, zeros) for bits in (2, 4, 8) for zeros in ("none", "packed", "float")][:-1]
)
def test_the_operator_against_onnx_runtime(bits: int, zeros: str) -> None:
    random = np.random.default_rng(bits)
    n, k, block = 6, 80, 32
    blocks = -(-k // block)
    codes = random.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    scales = random.random((n, blocks)).astype(np.float32)
    inputs: dict[str, np.ndarray] = {"codes": codes, "scales": scales}
    if zeros == "packed":
        inputs["zeros"] = random.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    elif zeros == "float":
        inputs["zeros"] = random.random((n, blocks)).astype(np.float32) * 3
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block,
        accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", n])],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    x = random.standard_normal((3, k)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    imported = ir.serde.deserialize_model(model)
    got = as_the_twin_would(next(iter(imported.graph)), {"x": x, **inputs})
    np.testing.assert_allclose(got.numpy(), expected, 1e-4, 1e-4)


MEASURE = """
import sys
import numpy as np
import onnxruntime as ort
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
options = ort.SessionOptions()
options.intra_op_num_threads = 1
x = np.random.default_rng(1).random((1, 2048), dtype=np.float32)
before = resident()
session = ort.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
(y,) = session.run(None, {"x": x})
print(resident() - before)
y.tofile(sys.argv[1] + ".out")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.long
def test_resident_memory_of_a_network_of_30_million_weights(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    size, depth = 2048, 7
    nodes: list[Any] = []
    constants: list[Any] = []
    for i in range(depth):
        weight = random.standard_normal((size, size), dtype=np.float32) / np.float32(np.sqrt(size))
        constants.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"r{i - 1}" if i else "x", f"w{i}"], [f"h{i}"], name=f"n{i}"))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"r{i}"], name=f"relu{i}"))
    graph = helper.make_graph(
        nodes, "mlp", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", size])],
        [helper.make_tensor_value_info(f"r{depth - 1}", TensorProto.FLOAT, ["n", size])], constants,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    prepared = prepare(ir.serde.deserialize_model(proto))
    spec = WeightSpec.parse("int4:max:block128")
    codes = {
        layer.name: quantize_weight(torch.from_numpy(prepared.initializer(layer.initializer).copy()), spec, 1)
        for layer in prepared.layers
    }
    quantized = Quantized(codes)
    model = emit(prepared, quantized, memory=True)
    assert count_kernels(to_bytes(model)).counts["MatMulNBits"] == depth
    files = {"float": to_bytes(dequantized(prepared, quantized)), "packed": to_bytes(model)}
    resident, outputs = {}, {}
    for name, data in files.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
        resident[name] = int(done.stdout)
        outputs[name] = np.fromfile(f"{path}.out", np.float32)
    differs = np.abs(outputs["packed"] - outputs["float"]).max() / np.abs(outputs["float"]).max()
    assert differs < 1e-4
    assert resident["packed"] < 0.4 * resident["float"]
