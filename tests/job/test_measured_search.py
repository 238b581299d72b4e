"""Searches that measure, on the embedded example: what is measured, cached and kept, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from qopt.job.choose import _base, _strategy, choose
from qopt.job.evaluation import Evaluator, rounding_of
from qopt.job.journal import Journal
from qopt.job.judge import Judge
from qopt.job.optimize import Clock, Task, start
from qopt.job.run import Run
from qopt.job.select import Variant
from qopt.job.sensitivity import adversarial_noise
from qopt.limits import Limit
from qopt.measure.network import TwinClassifier
from qopt.search.evaluation import Evaluation, Measure, MeasuredStrategy
from qopt.search.quanos import QuanosSearch
from qopt.size import stored_bytes
from qopt.spec import WeightSpec

pytestmark = pytest.mark.long

FEW = Options(
    robust=True, probe_images=32, calibration_images=64, baselines=(), limits=(Limit("bits", 3.0),), effort="fast",
    rows="off", evaluations=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def begin(example_model: ir.Model, fashion: Data) -> Callable[..., Run]:
    def begin(cache: Path | None = None, **changes: Any) -> Run:
        task = Task(example_model, "example", fashion, replace(FEW, **changes))
        return start(task, Cache(cache), lambda step: None)

    return begin


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for what the searches below have in common: sensitivities, norms, examples."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(begin: Callable[..., Run]) -> Run:
    return begin()


def specs(run: Run, text: str, **others: str) -> dict[str, WeightSpec]:
    names = [layer.name for layer in run.prepared.layers]
    return {name: WeightSpec.parse(others.get(name, text)) for name in names}


def measured(run: Run, text: str, journal: Journal | None = None) -> Evaluation:
    """What is measured of the plan that gives every layer one format."""
    (found,) = Evaluator(run, _base(run), journal or Journal())([specs(run, text)])
    return found


def test_plans_are_measured_in_their_order(run: Run) -> None:
    evaluate = Evaluator(run, _base(run), Journal())
    assert evaluate([specs(run, "int8"), specs(run, "int2")]) == [measured(run, "int8"), measured(run, "int2")]


def test_a_plan_is_measured_as_the_selection_does(run: Run) -> None:
    journal = Journal()
    evaluation = measured(run, "int2", journal)
    plan = _base(run).with_changes(
        weights=dict.fromkeys(specs(run, "int2"), "int2"), rounding="nearest", bias_correction=True
    )
    applied, judge = run.quantizer.apply(plan), Judge.of(run)
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    assert evaluation.clean == judge.clean.divergence(twin) > 0
    assert evaluation.robust == judge.first(twin, judge.examples(twin))
    assert evaluation.code_bits == 2.0
    assert evaluation.bytes == stored_bytes(applied.quantized.stored(run.prepared))
    assert journal.measured(plan) == evaluation


def test_without_attacks_nothing_is_attacked(begin: Callable[..., Run]) -> None:
    clean = begin(robust=False)
    assert measured(clean, "int4").robust is None


def test_what_the_journal_or_the_cache_holds_is_not_computed_again(begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin(tmp_path)
    steps: list[str] = []
    first = measured(run, "int2")
    again = replace(begin(tmp_path), progress=steps.append)
    reordered = dict(reversed(specs(run, "int2").items()))
    assert Evaluator(again, _base(again), journal := Journal())([reordered]) == [first]
    assert "evaluations" in again.cache.hits
    hits = len(again.cache.hits)
    assert Evaluator(again, _base(again), journal)([reordered]) == [first]
    assert len(again.cache.hits) == hits
    assert [step for step in steps if step.startswith("measured")] == ["measured search: plan 1"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"eps": 0.05}, {"probe_images": 16}, {"robust": False}])
def test_other_conditions_are_other_measurements(
    begin: Callable[..., Run], tmp_path: Path, change: dict[str, Any]
) -> None:
    run, other = begin(tmp_path), begin(tmp_path, **change)
    first, second = (measured(one, "int2") for one in (run, other))
    assert "evaluations" not in other.cache.hits
    assert first != second


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Variant("nearest", True)),
        ({"effort": "normal"}, Variant("gptq", True)),
        ({"effort": "max"}, Variant("gptq", True)),
        ({"effort": "max", "bias_correction": "off"}, Variant("gptq", False)),
        ({"rounding": "nearest", "bias_correction": "off"}, Variant("nearest", False)),
        ({"rounding": "gptq"}, Variant("gptq", True)),
        ({"rounding": "adaround", "bias_correction": "on"}, Variant("gptq", True)),
        ({"rounding": "adaround", "bias_correction": "off"}, Variant("gptq", False)),
    ],
)
def test_how_plans_are_rounded_while_searched_for(run: Run, changes: dict[str, Any], expected: Variant) -> None:
    assert rounding_of(replace(run, options=replace(run.options, **changes))) == expected


def test_noise_is_measured_for_every_layer_and_cached(begin: Callable[..., Run], tmp_path: Path) -> None:
    run = begin(tmp_path)
    found = adversarial_noise(run)
    assert list(found) == [layer.name for layer in run.prepared.layers]
    assert all(value > 0 for value in found.values())
    again = begin(tmp_path)
    assert adversarial_noise(again) == found
    assert "noise" in again.cache.hits


def test_quanos_gives_the_noisiest_layer_the_most_bits(begin: Callable[..., Run], known: Path) -> None:
    run = begin(known, search="quanos")
    strategy = _strategy(run)
    assert isinstance(strategy, QuanosSearch)
    choice = choose(run)
    bits = {name: WeightSpec.parse(text).bits for name, text in choice.applied.plan.weights.items()}
    noisiest = max(strategy.noise, key=strategy.noise.__getitem__)
    assert bits[noisiest] == max(bits.values()) > min(bits.values())
    assert choice.facts.sensitivity != "not used"
    assert all("ANS" in reason for reason in choice.applied.plan.reasons.values())


@pytest.mark.parametrize("search", ["refit", "optuna"])
def test_measured_searches_choose_among_what_they_measured(begin: Callable[..., Run], known: Path, search: str) -> None:
    run, journal = begin(known, search=search), Journal()
    choice = choose(run, journal)
    every = [json.loads(line) for line in journal.text.splitlines()]
    rows = every[: int(choice.facts.notes[0].split()[0])]
    assert 2 <= len(rows) <= 5, "the others are those of the selection"
    assert all(row["code_bits"] <= 3 for row in rows)
    measured = [row["plan"]["weights"] for row in rows]
    assert choice.applied.plan.weights in measured
    best = min(rows, key=lambda row: row["clean"] + row["robust"])["plan"]["weights"]
    names = [row.name for row in choice.facts.evaluated]
    assert names[0].startswith(f"{search}, nearest")
    assert any(name.startswith(f"{search}, place 2") for name in names)
    assert f"{len(rows)} plans were measured" in choice.facts.notes[0]
    points = choice.facts.measured
    assert [point.clean for point in points] == [row["clean"] for row in every]
    assert [every[i]["plan"]["weights"] for i, point in enumerate(points) if point.chosen] == [
        choice.applied.plan.weights
    ]
    assert sum(point.knee for point in points) == 1
    assert all(point.front for point in points if point.knee)
    assert journal.best == choice.applied.plan
    assert best in measured


def test_an_interrupted_search_goes_on_where_it_ended(begin: Callable[..., Run], known: Path, tmp_path: Path) -> None:
    """Every prefix of the journal leads to the same plans in the same order."""
    run = begin(known, search="refit", evaluations=4)
    whole, steps = Journal(tmp_path / "whole"), list[str]()
    whole.open({})
    expected = choose(run, whole).applied.plan
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines), 2):
        path = tmp_path / f"{kept}"
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        journal = Journal(path, resume=True)
        journal.open({})
        steps.clear()
        assert choose(replace(run, progress=steps.append), journal).applied.plan == expected
        assert path.read_bytes() == b"".join(lines)
        computed = [step for step in steps if step.startswith("measured search")]
        assert len(computed) == max(5 - kept, 0), "the first line is the head, the next four are the search's"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": "refit"}, "--search refit: the search measures plans on images; give --data"),
        ({"search": "optuna"}, "--search optuna: the search measures plans on images; give --data"),
        ({"search": "quanos"}, "--search quanos: the search measures how far an attack moves every layer; give --data"),
    ],
)
def test_searches_that_measure_need_images(example_onnx: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        qopt.optimize(example_onnx, **options)


def test_resuming_needs_the_folder_of_the_interrupted_run(example_onnx: Path) -> None:
    with pytest.raises(UsageError, match="resume: nothing to resume from; give out"):
        qopt.optimize(example_onnx, resume=True)


def test_plans_are_timed_together() -> None:
    steps: list[str] = []
    clock = Clock(steps.append)
    for step in ("measured search: plan 1", "measured search: plan 2", "emit", ""):
        clock(step)
    assert steps == ["measured search: plan 1", "measured search: plan 2", "emit"]
    assert list(clock.seconds) == ["prepare the model", "measured search", "emit"]


def test_formats_of_rows_are_not_measured(begin: Callable[..., Run]) -> None:
    with pytest.raises(UsageError, match="--rows: the search measures formats of whole layers"):
        choose(begin(search="refit", rows="on", effort="normal"))


def test_a_strategy_of_ones_own(begin: Callable[..., Run], known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that keeps the contract can measure."""

    class Narrowest:
        name = "narrowest"
        uses_sensitivity = False

        def candidates(self, target: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
            return target[:2]

        def search(self, space: Any, measure: Measure) -> list[qopt.search.space.Outcome]:
            outcome = qopt.search.space.Outcome({x.layer: x.candidates[0].spec for x in space.layers})
            measure.evaluate([outcome.specs])
            return [outcome]

    assert isinstance(Narrowest(), MeasuredStrategy)
    monkeypatch.setitem(qopt.plugins.BUILT_IN["qopt.searches"], "narrowest", f"{__name__}:NARROWEST")
    monkeypatch.setitem(globals(), "NARROWEST", Narrowest)
    journal = Journal()
    choice = choose(begin(known, search="narrowest"), journal)
    assert set(choice.applied.plan.weights.values()) == {"ternary"}
    rows = [json.loads(line)["plan"] for line in journal.text.splitlines()]
    assert [row["weights"] for row in rows] == [choice.applied.plan.weights] * len(rows)
    assert {(row["rounding"], row["bias_correction"]) for row in rows} == {("nearest", False), ("nearest", True)}
