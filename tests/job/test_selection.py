"""The measured selection: what the options leave open is tried, and what stays closest to float is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import qopt
from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.job import run as run_module
from qopt.job.choose import _affords_more
from qopt.job.judge import Judge
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.select import Variant, _Contest, variants
from qopt.passes.insert_activation_quantizers import set_gradient
from qopt.plan import uniform
from qopt.quantize import Applied
from qopt.spec import WeightSpec

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


@pytest.fixture(scope="module")
def run(example_model: ir.Model, fashion: Data) -> Run:
    options = Options(robust=True, probe_images=64, calibration_images=128, activations="int3", baselines=())
    return start(Task(example_model, "example", fashion, options), Cache(None), lambda step: None)


@pytest.fixture(scope="module")
def twins(run: Run) -> tuple[Applied, Applied]:
    """One plan twice: as it is, and with gradients through plain rounding; they compute the same."""
    plan = uniform(WeightSpec.parse("int4"), activations=run.target.activations, model=run.prepared.digest)
    honest, masked = (run.quantizer.apply(plan) for _ in range(2))
    set_gradient(masked.graph, "plain")
    return honest, masked


def test_a_masked_plan_alone_looks_more_robust(run: Run, twins: tuple[Applied, Applied]) -> None:
    """No gradient passes its quantizers, so that it is attacked in vain; it must gain nothing by that."""
    honest, masked = (
        _Contest(Judge.of(run)).add(run, name, twin).total for name, twin in zip("ab", twins, strict=True)
    )
    assert masked < 0.9 * honest


@pytest.mark.parametrize("masked_first", [False, True])
def test_beside_an_honest_plan_a_masked_one_does_not(
    run: Run, twins: tuple[Applied, Applied], masked_first: bool
) -> None:
    contest = _Contest(Judge.of(run))
    for twin in reversed(twins) if masked_first else twins:
        contest.add(run, "plan", twin)
    _, rows = contest.settle()
    assert rows[0].adversarial_divergence == pytest.approx(rows[1].adversarial_divergence, rel=1e-6)
    assert [row.chosen for row in rows] == [True, False]


def test_without_attacks_only_the_best_is_kept(run: Run, twins: tuple[Applied, Applied]) -> None:
    clean = replace(run, options=replace(run.options, robust=False))
    contest = _Contest(Judge.of(clean))
    coarse = clean.quantizer.apply(twins[0].plan.with_changes(weights=dict.fromkeys(names(clean), "int2:max")))
    for applied in (coarse, twins[0]):
        contest.add(clean, "plan", applied)
    best, rows = contest.settle()
    assert best is twins[0]
    assert len(contest._contenders) == 1
    assert [row.chosen for row in rows] == [False, True]
    assert all(row.adversarial_divergence is None for row in rows)


def names(run: Run) -> list[str]:
    return [layer.name for layer in run.prepared.layers]


@pytest.mark.parametrize(("passes", "images"), [(1000, 64), (10, 10), (1, 2), (0.1, 2)])
def test_a_large_network_affords_fewer_images(
    run: Run, monkeypatch: pytest.MonkeyPatch, passes: float, images: int
) -> None:
    """As many as ``passes`` passes of the network, but never below a least number."""
    macs = sum(layer.macs for layer in run.prepared.layers)
    monkeypatch.setattr(run_module, "PROBE_MACS", int(passes * macs))
    monkeypatch.setattr(run_module, "LEAST_PROBE_IMAGES", 2)
    assert run.probe_images == images
    fresh = replace(run, options=replace(run.options, robust=False))
    assert len(Judge.of(fresh).clean.images) == images


@pytest.mark.parametrize("cheap", [False, True])
def test_normal_effort_measures_more_plans_of_small_networks(
    run: Run, monkeypatch: pytest.MonkeyPatch, cheap: bool
) -> None:
    macs = sum(layer.macs for layer in run.prepared.layers)
    monkeypatch.setattr(run_module, "CHEAP_MACS", macs - (not cheap))
    tried = [replace(run, options=replace(run.options, effort=effort)) for effort in ("fast", "normal", "max")]
    assert [_affords_more(one) for one in tried] == [False, cheap, True]
