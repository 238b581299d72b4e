"""Which kernels ONNX Runtime really runs: the count of integer and float operators after its graph optimisation."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import final

import onnx
import onnxruntime as ort

from qopt.runtime.session import open_session

INTEGER = frozenset(
    {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
    | {"DynamicQuantizeMatMul"}
)
FLOAT = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"}
)


@final
@dataclass(frozen=True)
class Kernels:
    """Operator counts of an optimised graph.

    Attributes:
        counts: operator type to number of nodes.
    """

    counts: dict[str, int]

    @property
    def integer(self) -> int:
        """Convolutions and matrix products on integer kernels."""
        return sum(n for op, n in self.counts.items() if op in INTEGER)

    @property
    def float_(self) -> int:
        """Convolutions and matrix products on float kernels."""
        return sum(n for op, n in self.counts.items() if op in FLOAT)


def count_kernels(model: bytes | Path) -> Kernels:
    """Load ``model`` as ONNX Runtime does on this machine and count the operators it will run.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the graph.
    """
    return session_and_kernels(model)[1]


def session_and_kernels(model: bytes | Path) -> tuple[ort.InferenceSession, Kernels]:
    """A session of ``model`` and the operators that it will run; raises as `count_kernels`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        return open_session(model, optimized=path), kernels_in(path)


def kernels_in(model: bytes | Path) -> Kernels:
    """The operators of a file as it is; data beside it are not read."""
    if isinstance(model, Path):
        return _counted(onnx.load(model, load_external_data=False))
    return _counted(onnx.load_model_from_string(model))


def _counted(model: onnx.ModelProto) -> Kernels:
    graph = model.graph
    return Kernels(dict(sorted(Counter(node.op_type for node in graph.node).items())))
