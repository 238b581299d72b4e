from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """A small ONNX graph under construction, one image input called ``x``."""

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8), *, opset: int = 21, batch: int | str = "n") -> None:
        self.shape, self.opset, self.batch = shape, opset, batch
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(0)
        self._count = 0

    def constant(self, array: Any, name: str | None = None, dtype: type = np.float32) -> str:
        self._count += 1
        name = name or f"c{self._count}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(list(numbers), dtype=np.int64)

    def random(self, *shape: int, name: str | None = None, scale: float = 0.3) -> str:
        return self.constant(self.generator.standard_normal(shape) * scale, name)

    def positive(self, *shape: int, name: str | None = None) -> str:
        return self.constant(self.generator.uniform(0.5, 2.0, shape), name)

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        return self.ops(op_type, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, name: str | None = None, **attributes: Any) -> list[str]:
        self._count += 1
        made = [f"v{self._count}" + (f"_{i}" if i else "") for i in range(outputs)]
        node = f"n{self._count}" if name is None else name
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=node, **attributes))
        return made

    def norm(self, data: str, channels: int, **attributes: Any) -> str:
        parts = [self.positive(channels), self.random(channels), self.random(channels), self.positive(channels)]
        return self.op("BatchNormalization", data, *parts, **attributes)

    def proto(self, *outputs: str, dtypes: dict[str, int] | None = None) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [self.batch, *self.shape])
        results = [helper.make_tensor_value_info(o, (dtypes or {}).get(o, TensorProto.FLOAT), None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", [image], results, initializer=self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def model(self, *outputs: str, dtypes: dict[str, int] | None = None) -> ir.Model:
        return ir.serde.deserialize_model(self.proto(*outputs, dtypes=dtypes))


@pytest.fixture(scope="session")
def graph() -> type[Graph]:
    """The builder; session-wide, so that hypothesis tests may use it."""
    return Graph


def _small_cnn(batch: int | str = "n", opset: int = 21) -> ir.Model:
    g = Graph(opset=opset, batch=batch)
    conv = g.op("Conv", "x", g.random(4, 3, 3, 3, name="conv.weight"), g.random(4, name="conv.bias"), pads=[1] * 4)
    normed = g.norm(conv, 4)
    relu = g.op("Relu", normed)
    flat = g.op("Flatten", relu)
    logits = g.op("Gemm", flat, g.random(10, 256, name="fc.weight"), g.random(10, name="fc.bias"), transB=1)
    return g.model(logits)


@pytest.fixture(scope="session")
def small_cnn() -> Callable[..., ir.Model]:
    """Conv, batch norm, ReLU, flatten, Gemm on images of 3x8x8."""
    return _small_cnn


@pytest.fixture(scope="session")
def run() -> Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]:
    """An oracle that shares no code with qopt: ONNX Runtime with its default optimisations."""
    import onnxruntime

    def run_once(model: ir.Model, images: NDArray[np.float32]) -> NDArray[Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), options)
        result: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: images})[0]
        return result

    return run_once
