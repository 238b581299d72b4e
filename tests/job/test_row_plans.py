"""`qopt optimize --plan` with a format for each output channel: applied, reported, written and read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import qopt
from qopt.data import Data
from qopt.errors import PlanError
from qopt.graph.prepare import prepare
from qopt.plan import Plan

pytestmark = pytest.mark.long

MIXTURE = ("int8", "int4", "int2", "ternary", "int3", "log4", "int4")


def rows(channels: int) -> str:
    return "rows(" + ",".join(MIXTURE[channel % len(MIXTURE)] for channel in range(channels)) + ")"


@pytest.fixture(scope="module")
def row_plan(example_model: Any) -> Plan:
    """Every layer of the embedded network."""
    return Plan(weights={layer.name: rows(layer.channels) for layer in prepare(example_model).layers})


def test_a_plan_of_rows_is_applied(example_onnx: Path, row_plan: Plan) -> None:
    bundle = qopt.optimize(example_onnx, plan=row_plan)
    assert bundle.plan.weights == row_plan.weights
    assert {layer.name: layer.format for layer in bundle.report.layers} == row_plan.weights
    average = (8 + 4 + 2 + 1.6 + 3 + 4 + 4) / len(MIXTURE)
    assert bundle.report.size.code_bits == pytest.approx(average, abs=0.3)
    assert bundle.report.size.code_bits < bundle.report.size.stored_bits < 1.5 * average
    formats = {p.key: p.value for n in onnx.load_from_string(bundle.model).graph.node for p in n.metadata_props}
    assert formats["qopt.format"].startswith("rows(int8,int4,int2,ternary,")
    again = qopt.optimize(example_onnx, plan=Plan.from_json(bundle.plan.to_json()))
    assert again.model == bundle.model


def test_integer_kernels_take_rows(example_onnx: Path, row_plan: Plan, fashion: Data) -> None:
    """As many fused kernels as the same network has at 8 bits, and images classified alike."""
    codes: dict[str, Any] = {"defaults": {"weights": "int8", "activations": "int8"}}
    plans = [Plan(**codes), Plan(**codes, weights=row_plan.weights, rounding="gptq", bias_correction=True)]
    int8, mixed = (qopt.optimize(example_onnx, plan=plan, data=fashion, calibration_images=128) for plan in plans)
    assert mixed.report.kernels.integer == int8.report.kernels.integer > 0
    assert mixed.report.size.stored_bits < 0.6 * int8.report.size.stored_bits
    clean = {name: bundle.report.rows[-1].clean.value for name, bundle in (("int8", int8), ("rows", mixed))}
    assert clean["rows"] > clean["int8"] - 6


def test_the_command_line(example_onnx: Path, row_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(row_plan.to_json())
    command = [sys.executable, "-m", "qopt", "optimize", str(example_onnx), "--plan", "plan.json", "--out", "out"]
    environment = {**os.environ, "QOPT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["weights"] == row_plan.weights
    assert (tmp_path / "out" / "model.onnx").stat().st_size < example_onnx.stat().st_size / 3


def test_rows_for_another_layer(example_onnx: Path, row_plan: Plan) -> None:
    wrong = row_plan.with_changes(weights={**row_plan.weights, "stem.weight": "rows(int4*3,int8)"})
    with pytest.raises(PlanError, match=r"^stem\.weight: a format with another number of rows"):
        qopt.optimize(example_onnx, plan=wrong)
