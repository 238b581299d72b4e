"""The bytes that ship are checked in a process of their own, and a planted bug stops the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.errors import VerificationError
from qopt.graph.load import load_model
from qopt.job.artefact import EmittedFile, build_artefact, build_file, float_file
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.verify import CODES_AGREE, image_difference, verify
from qopt.plan import Defaults, Plan
from qopt.quantize import AppliedWeights

Checked = tuple[Run, AppliedWeights, EmittedFile]


def nothing(_step: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def run(example_onnx: Path, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = Options(calibration_images=64, robust=False)
    task = Task(load_model(example_onnx), "fashion", fashion, options)
    return start(task, Cache(tmp_path_factory.mktemp("cache")), nothing)


@pytest.fixture(scope="module")
def checked(run: Run) -> Callable[[str, str], Checked]:
    made: dict[tuple[str, str], Checked] = {}

    def get(weights: str, activations: str) -> Checked:
        key = (weights, activations)
        if key not in made:
            applied = run.quantizer.apply(Plan(defaults=Defaults(weights=weights, activations=activations)))
            made[key] = (run, applied, build_artefact(run, applied, {}))
        return made[key]

    return get


def planted(file: EmittedFile, change: Callable[[onnx.ModelProto], None]) -> EmittedFile:
    """The file with a bug that its own graph does not show."""
    proto = onnx.load_model_from_string(file.data)
    change(proto)
    return replace(file, data=proto.SerializeToString())


def scale(factor: float, ending: str = "/scale") -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name.endswith(f"weight{ending}"))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return change


@pytest.mark.parametrize(
    ("weights", "activations", "most"), [("int4", "int8", 1e-2), ("int2", "int4", 1e-5), ("log3", "float", 1e-5)]
)
def test_a_good_file_passes(
    checked: Callable[[str, str], Checked], weights: str, activations: str, most: float
) -> None:
    run, applied, file = checked(weights, activations)
    began = time.perf_counter()
    found = verify(run, applied, file, float_file(run))
    assert time.perf_counter() - began < 30  # three seconds on an idle machine
    assert found.file.data == file.data
    assert found.file.kernels.difference is not None
    assert found.file.kernels.difference <= most
    same = {"integer", "floating", "counts", "agreement"}
    assert found.file.kernels.model_dump(include=same) == file.kernels.model_dump(include=same)
    assert set(found.latency) == {"1"}
    assert set(found.latency["1"]) == {"float", "qopt"}
    assert all(0 < seconds < 5 for seconds in found.latency["1"].values())


@pytest.mark.parametrize(
    ("weights", "activations", "factor"),
    [("int4", "int8", 1.3), ("int4", "int8", -1.0), ("log3", "float", 1.001), ("int2", "int4", 0.5)],
)
def test_a_planted_bug_in_the_numbers_is_found(
    checked: Callable[[str, str], Checked], weights: str, activations: str, factor: float
) -> None:
    run, applied, file = checked(weights, activations)
    with pytest.raises(VerificationError, match="computes something else than the quantized network"):
        verify(run, applied, planted(file, scale(factor)), float_file(run))


def keep_first_layer_float(proto: onnx.ModelProto) -> None:
    """Replace the first convolution's packed weight by its float values."""
    conv = next(node for node in proto.graph.node if node.op_type == "Conv")
    shape = (16, 1, 3, 3)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "left"))
    conv.input[1] = "left"


def rename_first_layer(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "Conv").name = "other"


@pytest.mark.parametrize("change", [keep_first_layer_float, rename_first_layer])
def test_a_layer_left_in_float_is_named(
    checked: Callable[[str, str], Checked], change: Callable[[onnx.ModelProto], None]
) -> None:
    run, applied, file = checked("int4", "int8")
    with pytest.raises(VerificationError, match="not quantized in the file that ships") as caught:
        verify(run, applied, planted(file, change), float_file(run))
    assert caught.value.where == run.prepared.layers[0].name


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[-1].domain = "nobody"
    proto.opset_import.append(helper.make_opsetid("nobody", 1))


def test_a_file_that_does_not_load_is_an_error(checked: Callable[[str, str], Checked]) -> None:
    run, applied, file = checked("int4", "int8")
    with pytest.raises(VerificationError, match="does not run in a fresh process"):
        verify(run, applied, planted(file, unknown_operator), float_file(run))


def test_without_images_the_example_is_run(example_onnx: Path, tmp_path: Path) -> None:
    run = start(Task(load_model(example_onnx), "fashion", None, Options()), Cache(tmp_path), nothing)
    applied = run.weights.apply(Plan(defaults=Defaults(weights="int3")))
    file = build_file(run, applied, {})
    assert verify(run, applied, file, float_file(run)).file.kernels.difference == 1e-6
    with pytest.raises(VerificationError, match="computes something else"):
        verify(run, applied, planted(file, scale(1.01)), float_file(run))


def text_network() -> ir.Model:
    """Token numbers in, two outputs: no classifier of images."""
    random = np.random.default_rng(0)
    arrays = {"table": (40, 16), "w.weight": (16, 24)}
    constants = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in arrays.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="gather"),
        helper.make_node("MatMul", ["e", "w.weight"], ["y"], name="product"),
        helper.make_node("ReduceMax", ["y"], ["top"], name="top", keepdims=0),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 7])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "top")]
    graph = helper.make_graph(nodes, "text", [ids], outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.serde.deserialize_model(proto)


def test_a_network_of_any_inputs_is_checked_on_its_example(tmp_path: Path) -> None:
    run = start(Task(text_network(), "text", None, Options()), Cache(tmp_path), nothing)
    applied = run.weights.apply(Plan(defaults=Defaults(weights="int4")))
    file = build_file(run, applied, {})
    found = verify(run, applied, file, float_file(run))
    (count,) = found.latency
    assert int(count) == len(run.prepared.example["ids"])
    with pytest.raises(VerificationError, match="computes something else"):
        verify(run, applied, planted(file, scale(1.01)), float_file(run))


Rows = st.integers(2, 6)


@given(Rows, Rows, st.floats(0.0, 0.5), st.integers(0, 5))
def test_the_difference_of_the_median_image(count: int, width: int, share: float, seed: int) -> None:
    expected = np.random.default_rng(seed).standard_normal((count, width)) + 5
    assert image_difference(expected * (1 + share), expected) == pytest.approx(share)
    wild = expected.copy()
    wild[: (count - 1) // 2] *= 100  # fewer than half the images
    assert image_difference(wild, expected) < 1e-12
    assert image_difference(expected[:1], expected) == float("inf")
    expected[:] = np.nan
    assert not image_difference(wild, expected) <= CODES_AGREE


def test_what_the_report_says_of_it(run: Run, checked: Callable[[str, str], Checked]) -> None:
    _, applied, file = checked("int4", "int8")
    facts: Any = verify(run, applied, file, float_file(run)).file.kernels
    assert facts.integer == len(run.prepared.layers)
    assert facts.floating == 0
