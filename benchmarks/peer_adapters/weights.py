"""What an ONNX file really stores of the weights of its layers, whoever wrote it, and how many bits its codes use."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qopt.runtime.session import open_session

WEIGHT_INPUTS = {
    "Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "ConvInteger": 1, "MatMulInteger": 1, "QLinearConv": 3,
    "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
"""Operators of layers, and which input is the weight."""

SHAPED = ("Transpose", "Reshape", "Flatten", "Identity", "Cast")
"""Operators that pass numbers on as they are."""

FLOAT_BITS = 32


@dataclass(frozen=True)
class Weights:
    """Sizes of all weights of a file.

    Attributes:
        count: numbers in weights of layers.
        stored_bits: bits that the file holds for each of them: codes, scales, zero points and tables, or floats.
        code_bits: bits that the codes of each need, by the range they span; 32 for what has no codes.
    """

    count: int
    stored_bits: float
    code_bits: float


def weights_in(model: onnx.ModelProto) -> Weights:
    """Count a file; weights that several layers share count once, int64 constants are shapes and do not count."""
    file = _File(model)
    values = dict.fromkeys(name for name in file.weights() if file.is_constant(name))
    reached = {source for name in values for source in file.sources(name)}
    stored = sum(_bytes(file.constants[name]) for name in reached)
    sizes = {name: file.computed(name).size for name in values}
    spent = sum(size * file.code_bits(name) for name, size in sizes.items())
    count = sum(sizes.values())
    return Weights(count, 8 * stored / count, spent / count)


class _File:
    """A graph whose constants, nodes or initializers, are looked up by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.made = {name: node for node in model.graph.node for name in node.output}
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and tensor is not None:
                self.constants[node.output[0]] = tensor

    def weights(self) -> list[str]:
        """The names of the weights that layers take, in the order of the graph."""
        nodes = [node for node in self.model.graph.node if node.op_type in WEIGHT_INPUTS]
        return [node.input[WEIGHT_INPUTS[node.op_type]] for node in nodes]

    def steps(self, name: str) -> list[onnx.NodeProto] | None:
        """The nodes that a value follows from, in graph order; None where it depends on an input."""
        left, seen = [name], set[str]()
        while left:
            value = left.pop()
            if not value or value in self.constants or value in seen:
                continue
            if value not in self.made:
                return None
            seen.add(value)
            left += self.made[value].input
        return [node for node in self.model.graph.node if seen & set(node.output)]

    def is_constant(self, name: str) -> bool:
        return self.steps(name) is not None

    def sources(self, name: str) -> set[str]:
        """The stored constants that a value follows from, without those of int64."""
        steps = self.steps(name) or []
        names = {name, *(value for node in steps for value in node.input)} & set(self.constants)
        return {one for one in names if self.constants[one].data_type != TensorProto.INT64}

    def computed(self, name: str) -> NDArray[Any]:
        """A constant value as ONNX Runtime computes it, codes as int32."""
        if name in self.constants:
            return np.asarray(numpy_helper.to_array(self.constants[name]))
        steps = self.steps(name) or []
        used = {value for node in steps for value in node.input}
        held = [_named(self.constants[one], one) for one in sorted(used & set(self.constants))]
        integer = self.made[name].op_type == "QuantizeLinear" or self._clips_codes(name)
        wanted = "qopt.result"
        kind = TensorProto.INT32 if integer else TensorProto.FLOAT
        steps = [*steps, helper.make_node("Cast", [name], [wanted], to=kind)]
        graph = helper.make_graph(steps, "part", [], [helper.make_tensor_value_info(wanted, kind, None)], held)
        part = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        return np.asarray(open_session(part.SerializeToString()).run(None, {})[0])

    def _clips_codes(self, name: str) -> bool:
        node = self.made[name]
        if node.op_type != "Clip":
            return False
        source = node.input[0]
        stored = self.constants.get(source)
        return self.made[source].op_type == "QuantizeLinear" if stored is None else _is_integer(stored)

    def code_bits(self, name: str) -> int:
        """Bits of the smallest format that holds the codes of a weight, by the distance of the largest to the least."""
        while name in self.made and self.made[name].op_type in SHAPED:
            name = self.made[name].input[0]
        if name in self.made and self.made[name].op_type == "DequantizeLinear":
            name = self.made[name].input[0]
        elif name not in self.constants or not _is_integer(self.constants[name]):
            return FLOAT_BITS
        codes = self.computed(name).astype(np.int64)
        return max(1, ceil(log2(int(codes.max()) - int(codes.min()) + 1)))


def _is_integer(tensor: TensorProto) -> bool:
    return tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _bytes(tensor: TensorProto) -> int:
    """Bytes of a stored tensor, two of 4 bits and four of 2 bits in one."""
    count = int(np.prod(tuple(tensor.dims), dtype=np.int64))
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}.get(tensor.data_type)
    if bits is None:
        bits = 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return ceil(count * bits / 8)
