"""Limits in the report: what the plan takes on every machine, and exit code 1 where that is too much."""

from __future__ import annotations

from pathlib import Path

import pytest

import qopt
from qopt.job.prices import limit_row
from qopt.limits import parse_limit


@pytest.mark.parametrize(
    ("limit", "value", "found", "holds"),
    [
        ("bits<=3", 3.0, "3", True),
        ("bits<=3", 3.0 + 1e-10, "3", True),
        ("bits<=3", 3.1, "3.1", False),
        ("flash<=512KB", 512 * 1024, "512 KB", True),
        ("flash<=512KB", 512 * 1024 + 1, "512 KB", False),
        ("latency<=5ms", 0.004, "4 ms", True),
    ],
)
def test_rows(limit: str, value: float, found: str, holds: bool) -> None:
    row = limit_row(parse_limit(limit), "machine", value)
    assert (row.found, row.holds, row.machine) == (found, holds, "machine")
    assert row.value == value
    assert row.bound == parse_limit(limit).bound


def test_every_limit_is_held_against_the_plan_on_every_machine(example_onnx: Path) -> None:
    bundle = qopt.optimize(
        example_onnx, target="stm32f4,cortex-m7,int4", limits=("bits<=3.5", "size<=40KB", "flash<=1MB")
    )
    rows = {(row.limit, row.machine): row for row in bundle.report.limits}
    assert {machine for limit, machine in rows if limit.startswith("flash")} == {"stm32f4", "cortex-m7"}
    assert rows["bits<=3.5", "stored"].value == bundle.report.size.code_bits
    assert all(row.holds for row in rows.values())
    assert bundle.exit_code == 0
    assert "limits broken" not in bundle.report.verdict
    assert "## Limits" in qopt.report.markdown.to_markdown(bundle.report)


def test_a_given_plan_that_is_too_large_ends_with_1(example_onnx: Path) -> None:
    plan = qopt.optimize(example_onnx, target="int8").plan
    bundle = qopt.optimize(example_onnx, plan=plan, limits=("bits<=3",))
    (row,) = [row for row in bundle.report.limits if row.limit == "bits<=3"]
    assert (row.value, row.holds) == (8.0, False)
    assert bundle.exit_code == 1
    assert bundle.report.verdict.endswith("limits broken: bits<=3.")
    assert [row.limit for row in bundle.report.limits] == ["bits<=3"], "the target's own average is no demand on a plan"
    assert qopt.optimize(example_onnx, plan=plan).exit_code == 0
    assert any("does not keep the limit bits<=3: 8 (stored)" in warning for warning in bundle.report.warnings)
    assert "BROKEN" in qopt.report.markdown.to_markdown(bundle.report)
