"""The main job end to end, on the embedded example."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qopt
from qopt.data import Data
from qopt.plan import Plan
from qopt.report.model import Report, Row


def row(report: Report, name: str) -> Row:
    return next(r for r in report.rows if r.name == name)


def test_files_of_the_output_folder(bundle: qopt.Bundle, tmp_path: Path) -> None:
    folder = bundle.write(tmp_path / "new" / "out")
    names = {path.name for path in folder.iterdir()}
    texts = {"plan.json", "report.json", "report.md", "report.html", "manifest.json", "journal.jsonl"}
    assert names == {"model.onnx", *texts}
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert Plan.from_json((folder / "plan.json").read_text()).digest == bundle.plan.digest
    assert Report.model_validate_json((folder / "report.json").read_text()) == bundle.report
    assert all(json.loads(line)["digest"] for line in (folder / "journal.jsonl").read_text().splitlines())


def test_the_file_is_what_the_report_says(bundle: qopt.Bundle) -> None:
    model = onnx.load_from_string(bundle.model)
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["qopt.plan"] == bundle.plan.digest
    assert properties["qopt.kind"] == "integer"
    formats = {
        p["qopt.layer"]: p["qopt.format"]
        for p in ({q.key: q.value for q in node.metadata_props} for node in model.graph.node)
        if "qopt.layer" in p
    }
    assert formats == {layer.name: layer.format for layer in bundle.report.layers}
    assert len(bundle.model) == bundle.report.size.file_bytes
    assert bundle.report.size.code_bits <= 4.0
    assert bundle.report.size.ratio < 0.22
    assert all(layer.integer for layer in bundle.report.layers)


def test_every_layer_runs_on_an_integer_kernel(bundle: qopt.Bundle) -> None:
    assert bundle.report.kernels.floating == 0
    assert bundle.report.kernels.integer == len(bundle.report.layers) == 10


def test_reported_accuracy_is_what_onnx_runtime_gives(bundle: qopt.Bundle, fashion: Data) -> None:
    session = ort.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: fashion.report.images})
    right = 100 * float(np.mean(np.asarray(logits).argmax(1) == fashion.report.labels))
    assert row(bundle.report, "qopt").clean.value == pytest.approx(right)


def test_robust_is_the_per_example_worst(bundle: qopt.Bundle) -> None:
    for name in ("float", "qopt", "uniform int4:max"):
        found = row(bundle.report, name)
        assert found.robust is not None
        assert found.robust.value <= min(share.value for share in found.attacked.values())
    ours = row(bundle.report, "qopt")
    assert ours.robust is not None
    assert bundle.robust_accuracy == bundle.report.robust_accuracy == ours.robust.value
    assert "transfer" in ours.attacked


def test_the_naive_evaluation_is_called_masked_and_the_honest_one_is_not(bundle: qopt.Bundle) -> None:
    honest, naive = row(bundle.report, "qopt"), row(bundle.report, "qopt, naive evaluation")
    assert honest.robust is not None
    assert naive.robust is not None
    assert naive.robust.value > honest.robust.value
    assert naive.robust_drop is not None
    assert naive.robust_drop.value < 0, "it even claims to be more robust than float"
    assert (honest.masking, naive.masking) == ("none", "masked")
    triggered = {m.rule for m in bundle.report.masking if m.network == naive.name and m.triggered}
    assert "zero_gradients" in triggered


def test_file_and_quantized_graph_agree(bundle: qopt.Bundle) -> None:
    assert bundle.report.kernels.agreement is not None
    assert bundle.report.kernels.agreement >= 0.99


def test_every_layer_has_a_reason(bundle: qopt.Bundle) -> None:
    assert all(layer.reason for layer in bundle.report.layers)
    assert set(bundle.plan.reasons) == {layer.name for layer in bundle.report.layers}


def test_same_seed_same_bytes(
    bundle: qopt.Bundle, examples: Path, fashion: Data, run_options: dict[str, Any], tmp_path: Path
) -> None:
    """A second run, and a third from the cache that the second filled."""
    model = examples / "fashion_resnet.pt"
    second = qopt.optimize(model, data=fashion, cache=tmp_path, **run_options)
    third = qopt.optimize(model, data=fashion, cache=tmp_path, **run_options)
    for name in ("model.onnx", "plan.json", "report.json", "report.md", "journal.jsonl"):
        assert bundle.files()[name] == second.files()[name] == third.files()[name], name
    assert not second.manifest["cache_hits"]
    assert third.manifest["cache_hits"] == ["adversarial", "norms", "sensitivities"]


def test_another_seed_is_another_attack(examples: Path, fashion: Data, bundle: qopt.Bundle) -> None:
    assert bundle.report.seed == 0
    fields: dict[str, Any] = {"attack_images": 20, "probe_images": 16, "calibration_images": 32, "baselines": ()}
    other = qopt.optimize(examples / "fashion_resnet.pt", data=fashion, robust=True, seed=5, **fields)
    assert other.report.seed == 5
    assert other.report.command.endswith("--seed 5")
    assert [r.name for r in other.report.rows] == ["float", "qopt", "qopt, naive evaluation"]
