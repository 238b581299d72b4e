"""Running graphs in ONNX Runtime and comparing outputs: the check behind every rewrite of the user's graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, cast, final

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from qopt.errors import UnsupportedModelError
from qopt.graph.model import Feeds, Prepared
from qopt.graph.names import values
from qopt.graph.stored import is_outside, outside
from qopt.seeds import derive

Array = NDArray[np.float32]

TOLERANCE: Final = 1e-5
"""Largest relative difference between two graphs that compute the same."""

_LARGEST_FILE: Final = 2**31 - 2**20
"""Bytes that a protobuf message can hold, with room for the graph."""


@final
class Runner:
    """One graph in ONNX Runtime on one CPU thread, unoptimised, so that it computes what the file says.

    Raises:
        UnsupportedModelError: where ONNX Runtime refuses the graph.
    """

    def __init__(self, model: ir.Model) -> None:
        inside = (v.const_value for v in model.graph.initializers.values() if not is_outside(v.const_value))
        size = sum(tensor.nbytes for tensor in inside if tensor is not None)
        if size > _LARGEST_FILE:
            raise UnsupportedModelError("the weights are too large", expected="less than 2 GB", got=f"{size} bytes")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        content, folder = outside(model)
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        try:
            self._session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types, and TypeErrors for bad UTF-8
            raise UnsupportedModelError("ONNX Runtime refuses the graph", got=_first_line(error)) from error
        self._inputs: list[str] = [value.name for value in self._session.get_inputs()]

    def all(self, feeds: Feeds) -> list[NDArray[Any]]:
        """Every output for ``feeds``, of which those that the graph reads are used.

        Raises:
            UnsupportedModelError: where the run fails.
        """
        try:
            return cast("list[NDArray[Any]]", self._session.run(None, {name: feeds[name] for name in self._inputs}))
        except Exception as error:
            raise UnsupportedModelError("ONNX Runtime cannot run the graph", got=_first_line(error)) from error

    def __call__(self, images: Array) -> NDArray[Any]:
        """The first output for ``images`` of shape (batch, ...), of a graph with one input."""
        return self.all({self._inputs[0]: images})[0]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def random_images(shape: Iterable[int], count: int, seed: int = 0) -> Array:
    """``count`` images of ``shape``, uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(derive(seed, "graph", "images"))
    return torch.rand(count, *shape, generator=generator).numpy()


def difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """``max|got - expected| / max(1, max|expected|)``; NaN agrees with NaN, and different shapes are infinitely far.

    So is everything that is no number and not the same.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if expected.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(got, expected) else float("inf")
    if not np.array_equal(np.isfinite(got), np.isfinite(expected)):
        return float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    a, b = got[finite].astype(np.float64), expected[finite].astype(np.float64)
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) if b.size else 0.0


def largest_difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest `difference` of any output; those that are sequences are compared part by part."""
    if len(got) != len(expected):
        return float("inf")
    return max(map(_any_difference, got, expected), default=0.0)


def _any_difference(got: Any, expected: Any) -> float:
    if isinstance(expected, list):
        return largest_difference(got, expected) if isinstance(got, list) else float("inf")
    return difference(np.asarray(got), np.asarray(expected))


def matches_onnxruntime(prepared: Prepared, twin: torch.fx.GraphModule, seed: int = 0) -> float:
    """The `difference` between the twin and the prepared graph on three random images, or one batch of the fixed size.

    Returns:
        A number that is at most `TOLERANCE` for a twin that computes what the graph says.
    """
    images = random_images(prepared.input_shape, prepared.batch or 3, seed)
    with torch.no_grad():
        got = twin(torch.from_numpy(images)).numpy()
    return difference(got, Runner(prepared.model)(images))


def observed_shapes(model: ir.Model, names: Iterable[str], feeds: Feeds) -> dict[str, tuple[int, ...]]:
    """The shapes that the named values take for ``feeds``, by running the graph."""
    probe = model.clone()
    by_name = {value.name: value for value in values(probe.graph)}
    wanted = list(dict.fromkeys(names))
    probe.graph.outputs[:] = [by_name[name] for name in wanted]
    outputs = Runner(probe).all(feeds)
    return {name: output.shape for name, output in zip(wanted, outputs, strict=True)}
