"""Networks and layers that cost models are asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from qopt.api import load
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.hardware.cost_model import LayerDescription
from qopt.runtime.session import to_bytes

MakeGraph = Callable[..., Prepared]


@pytest.fixture(scope="session")
def fashion_prepared(examples: Path) -> Prepared:
    """The embedded example."""
    return prepare(load(examples / "fashion_resnet.pt"))


@pytest.fixture(scope="session")
def make_graph() -> MakeGraph:
    """A prepared network from rows (operator, inputs, output, attributes); names with a dot are random constants."""

    def make(
        shape: tuple[int, ...], rows: list[tuple[str, str, str, dict[str, Any]]], constants: Mapping[str, Any]
    ) -> Prepared:
        generator = np.random.default_rng(0)
        arrays = {
            name: generator.standard_normal(size).astype(np.float32) if isinstance(size, tuple) else np.array(size)
            for name, size in constants.items()
        }
        nodes = [helper.make_node(op, ins.split(), [out], name=f"node_{out}", **more) for op, ins, out, more in rows]
        image = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *shape])
        output = helper.make_tensor_value_info(rows[-1][2], onnx.TensorProto.FLOAT, None)
        tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        graph = helper.make_graph(nodes, "g", [image], [output], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return prepare(ir.serde.deserialize_model(model))

    return make


@pytest.fixture(scope="session")
def conv() -> Callable[..., LayerDescription]:
    """A 3 x 3 convolution of ``channels`` to ``channels`` over a square of ``side``, on codes of ``bits`` bits."""

    def make(channels: int = 16, side: int = 8, bits: int = 8, **more: Any) -> LayerDescription:
        weights, elements = channels * channels * 9, channels * side * side
        fields = {
            "name": "conv", "op": "Conv", "weight_shape": (channels, channels, 3, 3), "channels": channels,
            "weights": weights, "macs": weights * side * side, "kernel": (3, 3), "stride": (1, 1), "inputs": elements,
            "outputs": elements, "input_bits": bits, "output_bits": bits,
        }  # fmt: skip
        return LayerDescription(**{**fields, **more})

    return make


@pytest.fixture(scope="session")
def example_model_file(fashion_prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded example as an ONNX file, which loads in a fraction of the archive's time."""
    path = tmp_path_factory.mktemp("model") / "fashion.onnx"
    path.write_bytes(to_bytes(fashion_prepared.model))
    return path
