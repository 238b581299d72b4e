"""The measured selection: what the options leave open is tried, and what stays closest to float is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qopt
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.job.select import Variant, variants

NEAREST = [Variant("nearest", False), Variant("nearest", True)]
CENTRED, PLAIN = Variant("gptq", True), Variant("gptq", False)
TRAINED = Variant("adaround", True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(effort="fast"), NEAREST),
        (Options(), [*NEAREST, CENTRED]),
        (Options(effort="max"), [*NEAREST, CENTRED, PLAIN, TRAINED]),
        (Options(rounding="nearest"), NEAREST),
        (Options(rounding="gptq"), [PLAIN, CENTRED]),
        (Options(rounding="gptq", effort="fast", bias_correction="on"), [CENTRED]),
        (Options(rounding="adaround", bias_correction="on"), [TRAINED]),
        (Options(bias_correction="off"), NEAREST[:1]),
        (Options(bias_correction="on"), [NEAREST[1], CENTRED]),
    ],
)
def test_variants_are_what_the_options_leave_open(options: Options, expected: list[Variant]) -> None:
    assert variants(options) == expected


FEW: dict[str, Any] = {"calibration_images": 128, "probe_images": 64, "baselines": (), "limits": ("bits<=2.5",)}


@pytest.fixture(scope="module")
def evaluated(example_onnx: Path, fashion: Data) -> dict[str, qopt.Bundle]:
    """A low-bit run at little and at normal effort."""
    return {effort: qopt.optimize(example_onnx, data=fashion, effort=effort, **FEW) for effort in ("fast", "normal")}


def test_the_chosen_plan_is_the_closest_of_those_measured(evaluated: dict[str, qopt.Bundle]) -> None:
    for bundle in evaluated.values():
        rows = bundle.report.search.evaluated
        assert [row.digest for row in rows if row.chosen] == [bundle.plan.digest]
        assert min(rows, key=lambda row: row.clean_divergence).chosen
        assert all(row.code_bits <= 2.5 for row in rows)
        assert len(bundle.journal.splitlines()) == len(rows)


def best(bundle: qopt.Bundle) -> float:
    return min(row.clean_divergence for row in bundle.report.search.evaluated)


def test_more_effort_tries_more_and_is_never_further_from_float(evaluated: dict[str, qopt.Bundle]) -> None:
    fast, normal = (evaluated[effort] for effort in ("fast", "normal"))
    assert len(fast.report.search.evaluated) < len(normal.report.search.evaluated)
    assert best(normal) < best(fast)


@pytest.mark.slow
def test_most_effort_tries_most(evaluated: dict[str, qopt.Bundle], example_onnx: Path, fashion: Data) -> None:
    most = qopt.optimize(example_onnx, data=fashion, effort="max", **FEW)
    names = [row.name for row in most.report.search.evaluated]
    assert len(names) > len(evaluated["normal"].report.search.evaluated)
    assert any("adaround" in name for name in names)
    assert best(most) <= best(evaluated["normal"])


def test_reported_norms_are_those_of_the_rounded_codes(
    evaluated: dict[str, qopt.Bundle], example_onnx: Path, fashion: Data
) -> None:
    """GPTQ raises ||dW||: the norms of nearest-rounded candidates would flatter the file."""
    chosen = evaluated["normal"]
    assert chosen.plan.rounding == "gptq"
    plan = chosen.plan.with_changes(rounding="nearest", bias_correction=False)
    nearest = qopt.optimize(example_onnx, data=fashion, plan=plan, baselines=())
    pairs = list(zip(chosen.report.layers, nearest.report.layers, strict=True))
    assert all(ours.format == theirs.format and ours.norm_w == theirs.norm_w for ours, theirs in pairs)
    assert sum(ours.norm_dw > theirs.norm_dw for ours, theirs in pairs) > len(pairs) / 2


def test_gptq_needs_images(example_onnx: Path) -> None:
    with pytest.raises(UsageError, match="--rounding: GPTQ needs images; give --data"):
        qopt.optimize(example_onnx, rounding="gptq")
