"""Cross-layer equalisation on request: the plan says so, and applying the plan again does the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import qopt
from qopt.data import Data
from qopt.plan import Plan


@pytest.fixture(scope="module")
def equalised(example_onnx: Path, fashion: Data) -> qopt.Bundle:
    """A run whose layers are equalised first."""
    return qopt.optimize(
        example_onnx, data=fashion, equalisation=True, effort="fast", calibration_images=64, probe_images=32,
        baselines=(),
    )  # fmt: skip


def test_the_plan_says_so(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    assert equalised.plan.equalisation
    assert equalised.manifest["options"]["equalisation"]
    plain = qopt.optimize(
        example_onnx, data=fashion, effort="fast", calibration_images=64, probe_images=32, baselines=()
    )  # fmt: skip
    assert not plain.plan.equalisation
    assert plain.plan.model != equalised.plan.model
    assert plain.model != equalised.model


def test_float_stays_the_same_network(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    plan = Plan(equalisation=True)
    moved = qopt.optimize(example_onnx, data=fashion, plan=plan, baselines=())
    plain = qopt.optimize(example_onnx, data=fashion, plan=Plan(), baselines=())
    assert moved.model != plain.model
    assert moved.report.rows[-1].clean == plain.report.rows[-1].clean


def test_the_plan_applied_again_gives_the_same_file(equalised: qopt.Bundle, example_onnx: Path, fashion: Data) -> None:
    again = qopt.optimize(
        example_onnx, data=fashion, plan=Plan.from_json(equalised.plan.to_json()), calibration_images=64, baselines=()
    )
    assert again.plan.weights == equalised.plan.weights
    assert again.model == equalised.model


def test_the_command_line(equalised: qopt.Bundle) -> None:
    assert "--equalisation" in equalised.report.command
