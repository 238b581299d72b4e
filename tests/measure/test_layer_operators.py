"""Norms of layers as the graph uses them, against the matrix of the map that ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from qopt.cache import Cache
from qopt.graph.model import Layer, Prepared
from qopt.graph.prepare import prepare
from qopt.lipschitz import NormBound, Operator
from qopt.measure.layer_operators import LayerOperators, all_norms
from qopt.quantize import WeightOnly

Text = Callable[..., onnx.ModelProto]

CASES = {
    "plain": ("Conv", "pads = [1,1,1,1]", (3, 2, 3, 3), (2, 5, 6)),
    "strided": ("Conv", "pads = [1,0,2,1], strides = [2,3]", (3, 2, 3, 3), (2, 7, 8)),
    "dilated": ("Conv", "dilations = [2,1]", (3, 2, 2, 3), (2, 6, 5)),
    "groups": ("Conv", "group = 2, pads = [1,1,1,1]", (4, 1, 3, 3), (2, 5, 5)),
    "one axis": ("Conv", "pads = [2,1], strides = [2]", (3, 2, 4), (2, 9)),
    "same upper": ("Conv", 'auto_pad = "SAME_UPPER", strides = [2,2]', (3, 2, 2, 3), (2, 5, 7)),
    "valid": ("Conv", 'auto_pad = "VALID"', (3, 2, 3, 3), (2, 5, 6)),
    "transposed": (
        "ConvTranspose", "pads = [1,0,0,1], strides = [2,2], output_padding = [1,0]", (2, 3, 3, 3), (2, 3, 4)
    ),
}  # fmt: skip


def conv_text(op: str, attributes: str, image: tuple[int, ...], kernel: tuple[int, ...], batch: str = "n") -> str:
    size, shape = ",".join(map(str, (batch, *image))), ",".join(map(str, kernel))
    return f"net (float[{size}] x, float[{shape}] w) => (float[{batch},a,b{',c' * (len(image) == 3)}] y) {{ y = {op} <{attributes}> (x, w) }}"  # noqa: E501


def parsed(text: str, **arrays: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    for value in list(proto.graph.input):
        if value.name in arrays:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(arrays[value.name], value.name))
            proto.graph.input.remove(value)
    return proto


def matrix(proto: onnx.ModelProto, image: tuple[int, ...]) -> np.ndarray:
    """The map from one image to the first output, column by column."""
    size = int(np.prod(image))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rows = [session.run(None, {"x": unit.reshape(1, *image)})[0].ravel() for unit in np.eye(size, dtype=np.float32)]
    return np.stack(rows, 1).astype(np.float64)


def headed(text: str) -> str:
    """The convolution made a classifier: its outputs are summed over pixels."""
    head, body = text.rsplit("{ y = ", 1)
    head = head[: head.index("=>")] + "=> (float[n,3] y) "
    return head + "{ c = " + body.rstrip(" }") + "\n f = GlobalAveragePool (c)\n y = Flatten (f) }"


def random_kernel(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def norms_of(prepared: Prepared, name: str = "w") -> tuple[NormBound, NormBound | None, NormBound | None]:
    layer = prepared.layer(name)
    return all_norms(WeightOnly(prepared), layer, LayerOperators(prepared).of(layer), Cache(None))


def holds(bound: NormBound | None, norm: float | np.floating[Any], slack: float = 1e-5) -> bool:
    """ONNX Runtime's own matrix is float32."""
    return bound is not None and bool(bound.lower <= norm * (1 + slack)) and bool(norm <= bound.upper * (1 + slack))


@pytest.mark.parametrize("name", CASES)
def test_the_map_that_the_file_computes(name: str) -> None:
    op, attributes, kernel, image = CASES[name]
    text, weight = conv_text(op, attributes, image, kernel), random_kernel(kernel)
    found = matrix(parsed(text, w=weight), image)
    prepared = prepare(ir.serde.deserialize_model(parsed(headed(text), w=weight)))
    reshaped, l2, linf = norms_of(prepared)
    assert l2 is not None
    assert holds(l2, np.linalg.norm(found, 2))
    assert l2.upper <= 1.2 * np.linalg.norm(found, 2)
    assert holds(linf, np.abs(found).sum(1).max())
    assert l2.upper >= reshaped.lower
    groups = prepared.layer("w").groups
    rows = weight.swapaxes(0, 1) if op == "ConvTranspose" else weight
    blocks = np.split(rows.reshape(rows.shape[0], -1), groups)
    assert holds(reshaped, max(np.linalg.norm(block, 2) for block in blocks))


def test_matrix_products_either_way_round(text_model: Text) -> None:
    first, second = random_kernel((6, 5)), random_kernel((4, 6)).T.copy()
    graph = "net (float[n,5] x) => (float[n,4] y) { h = Gemm <transB = 1> (x, w1)\n r = Relu (h)\n y = MatMul (r, w2) }"
    prepared = prepare(ir.serde.deserialize_model(text_model(graph, w1=first, w2=second)))
    for name, weight in (("w1", first), ("w2", second.T)):
        reshaped, l2, linf = norms_of(prepared, name)
        assert l2 == reshaped
        assert holds(l2, np.linalg.norm(weight.astype(np.float64), 2), 1e-12)
        assert holds(linf, np.abs(weight.astype(np.float64)).sum(1).max(), 1e-12)


def test_the_largest_of_several_uses(text_model: Text) -> None:
    weight = random_kernel((2, 2, 3, 3))
    graph = """net (float[n,2,8,8] x) => (float[n,2] y) {
        a = Conv <pads = [1,1,1,1]> (x, w)
        b = Conv <strides = [3,3]> (a, w)
        g = GlobalAveragePool (b)
        y = Flatten (g)
    }"""
    prepared = prepare(ir.serde.deserialize_model(text_model(graph, w=weight)))
    operators = LayerOperators(prepared).of(prepared.layer("w"))
    assert operators is not None
    assert [operator.stride for operator in operators] == [(1, 1), (3, 3)]
    sizes = {"1": ("pads = [1,1,1,1]", (2, 8, 8)), "3": ("strides = [3,3]", (2, 8, 8))}
    norms = [
        np.linalg.norm(matrix(parsed(conv_text("Conv", text, image, (2, 2, 3, 3)), w=weight), image), 2)
        for text, image in sizes.values()
    ]
    assert norms[0] > norms[1]
    assert holds(norms_of(prepared)[1], norms[0])


def test_a_transposed_convolution_of_unknown_padding(text_model: Text) -> None:
    graph = """net (float[n,2,4,4] x) => (float[n,3] y) {
        a = ConvTranspose <output_shape = [8,8], strides = [2,2]> (x, w)
        g = GlobalAveragePool (a)
        y = Flatten (g)
    }"""
    prepared = prepare(ir.serde.deserialize_model(text_model(graph, w=random_kernel((2, 3, 3, 3)))))
    assert LayerOperators(prepared).of(prepared.layer("w")) is None
    reshaped, l2, linf = norms_of(prepared)
    assert reshaped.upper > 0
    assert l2 is None
    assert linf is None


def embedding(*, tied: bool) -> tuple[Prepared, torch.Tensor]:
    table = random_kernel((50, 16))
    product = "t = Transpose <perm = [1,0]> (table)\n y = MatMul (e, t)" if tied else "y = MatMul (e, w)"
    graph = f"net (int64[n,4] ids) => (float[n,4,m] y) {{ e = Gather (table, ids)\n {product} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{graph}')
    arrays = {"table": table} if tied else {"table": table, "w": random_kernel((16, 9))}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return prepare(ir.serde.deserialize_model(proto)), torch.from_numpy(table)


def test_an_embedding_is_bounded_by_its_words() -> None:
    prepared, table = embedding(tied=False)
    assert prepared.layer("table").op == "Gather"
    _, l2, linf = norms_of(prepared, "table")
    assert l2 is not None
    assert l2.method == "longest row"
    assert holds(l2, float(table.double().norm(dim=1).max()), 1e-12)
    assert holds(linf, float(table.abs().max()), 0)


def test_a_tied_table_is_bounded_as_the_product_that_it_is() -> None:
    prepared, table = embedding(tied=True)
    assert LayerOperators(prepared).of(prepared.layers[0]) == (Operator("linear", axis=0),)
    reshaped, l2, linf = norms_of(prepared, prepared.layers[0].name)
    assert l2 == reshaped
    assert holds(l2, float(torch.linalg.matrix_norm(table.double(), 2)), 1e-12)
    assert holds(linf, float(table.double().abs().sum(1).max()), 1e-12)


def test_kept_by_content(tmp_path: Path) -> None:
    op, attributes, kernel, image = CASES["plain"]
    text = headed(conv_text(op, attributes, image, kernel))
    prepared = prepare(ir.serde.deserialize_model(parsed(text, w=random_kernel(kernel))))
    layer: Layer = prepared.layer("w")
    operators = LayerOperators(prepared).of(layer)
    first, second = Cache(tmp_path), Cache(tmp_path)
    found = all_norms(WeightOnly(prepared), layer, operators, first)
    assert all_norms(WeightOnly(prepared), layer, operators, second) == found
    assert "operator-norms" in second.hits
    assert "operator-norms" not in first.hits
    assert operators is not None
    strided = (Operator("convolution", stride=(2, 2), padding=((1, 1), (1, 1)), size=image[1:]),)
    assert all_norms(WeightOnly(prepared), layer, strided, second) != found
