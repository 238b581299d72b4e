"""Dialect, packed memory and two files through the job's own steps, each checked in the fresh process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qopt
from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError, VerificationError
from qopt.graph.load import load_model
from qopt.job.artefact import EmittedFile, build_artefact, build_file, float_file
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.verify import verify
from qopt.plan import Defaults, Plan


def nothing(_step: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def run(example_onnx: Path, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    task = Task(load_model(example_onnx), "fashion", fashion, Options(calibration_images=64))
    return start(task, Cache(tmp_path_factory.mktemp("cache")), nothing)


def asking(run: Run, **options: Any) -> Run:
    return replace(run, options=replace(run.options, **options))


def applied(run: Run, weights: str, activations: str) -> Any:
    return run.quantizer.apply(Plan(defaults=Defaults(weights=weights, activations=activations)))


# the example's ReduceMean takes its axes as an input, which it does from opset 18 on
@pytest.mark.parametrize(
    ("weights", "activations", "opset", "integer"),
    [("int8", "int8", 18, True), ("int4:full", "int8", 21, False), ("int8", "float", 18, False),
     ("int4:asym", "float", 21, False)],
)  # fmt: skip
def test_plain_qdq(run: Run, weights: str, activations: str, opset: int, integer: bool) -> None:
    plain = asking(run, dialect="qdq")
    plan = applied(plain, weights, activations)
    file = build_artefact(plain, plan, {})
    assert file.kernels.agreement is not None
    assert file.kernels.agreement >= 0.99
    found = verify(plain, plan, file, float_file(plain)).file
    assert (found.kernels.floating == 0) == integer
    model = onnx.load_model_from_string(file.data)
    assert [domain.version for domain in model.opset_import] == [opset]
    assert {p.key: p.value for p in model.metadata_props}["qopt.kind"] == ("integer" if integer else "simulated")


def test_eight_bits_in_the_folding_dialect_need_no_new_runtime(run: Run) -> None:
    for weights, opset in (("int8", 18), ("int4", 21)):
        model = onnx.load_model_from_string(build_artefact(run, applied(run, weights, "int8"), {}).data)
        assert [domain.version for domain in model.opset_import] == [opset]


def test_packed_at_run_time(example_onnx: Path, tmp_path: Path) -> None:
    run = start(Task(load_model(example_onnx), "f", None, Options(memory=True)), Cache(tmp_path), nothing)
    plan = run.weights.apply(Plan(defaults=Defaults(weights="int4:full")))
    file = build_file(run, plan, {})
    products = [layer for layer in run.prepared.layers if layer.op in ("Gemm", "MatMul")]
    assert products
    found = verify(run, plan, file, float_file(run)).file
    assert found.kernels.counts["MatMulNBits"] == len(products)
    assert found.kernels.difference is not None
    assert found.kernels.difference <= 1e-4


def test_the_report_names_what_is_unpacked_all_the_same(example_onnx: Path) -> None:
    plan = Plan(defaults=Defaults(weights="int4:full"))
    bundle = qopt.optimize(example_onnx, plan=plan, memory=True)
    (warning,) = [text for text in bundle.report.warnings if "--memory" in text]
    for layer in bundle.report.layers:
        assert (layer.name in warning) == (layer.op == "Conv")
    assert not [text for text in qopt.optimize(example_onnx, plan=plan).report.warnings if "--memory" in text]


def test_packed_weights_are_no_plain_qdq() -> None:
    with pytest.raises(UsageError, match="no plain QDQ"):
        Options(memory=True, dialect="qdq")
    with pytest.raises(UsageError, match="unknown word"):
        Options(dialect="qoperator")  # type: ignore[arg-type]


def test_two_files(run: Run, tmp_path: Path) -> None:
    plan = applied(run, "int4", "float")
    whole = build_file(run, plan, {})
    split = build_file(run, plan, {}, largest=1000)
    reference = float_file(run, largest=1000)
    assert list(split.parts) == list(reference.parts) == ["model.onnx", "model.onnx.data"]
    assert split.kernels == whole.kernels
    assert split.size == len(split.data) + len(split.external)
    assert abs(split.size - whole.size) < 3000
    found = verify(run, plan, split, reference)
    assert found.file.external == split.external
    broken = bytearray(split.external)
    broken[len(broken) // 2 :] = bytes(len(broken) - len(broken) // 2)
    with pytest.raises(VerificationError, match="computes something else"):
        verify(run, plan, replace(split, external=bytes(broken)), reference)
    with pytest.raises(VerificationError, match="does not run"):
        verify(run, plan, EmittedFile(split.data, split.kernels), reference)


def test_the_bundle_writes_both_and_their_hashes(example_onnx: Path, run: Run, tmp_path: Path) -> None:
    bundle = qopt.optimize(example_onnx, plan=Plan(defaults=Defaults(weights="int4")))
    assert "model.onnx.data" not in bundle.files()
    split = build_file(run, applied(run, "int4", "float"), {}, largest=1000)
    folder = replace(bundle, model=split.data, external=split.external).write(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.onnx", "model.onnx.data"):
        assert manifest["files"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert not np.array_equal(split.data, bundle.model)
    assert len(load_model(folder / "model.onnx").graph.initializers) > 0
