"""The finals: the closest plans against the gates, on more images and with fresh seeds."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

from qopt.attacks import FGSM, PGD, predict
from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.job.choose import choose
from qopt.job.finals import FINALISTS, Finals, Trial
from qopt.job.journal import Journal
from qopt.job.judge import Judge
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.select import _Contest
from qopt.limits import Gate, parse_gate
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan, uniform
from qopt.spec import WeightSpec

ROBUST = Options(robust=True, probe_images=48, calibration_images=64, baselines=())


@pytest.fixture(scope="module")
def run(example_model: ir.Model, fashion: Data) -> Run:
    return start(Task(example_model, "example", fashion, ROBUST), Cache(None), lambda step: None)


def plan(run: Run, text: str) -> Plan:
    return uniform(WeightSpec.parse(text), activations=run.target.activations, model=run.prepared.digest)


def twin(run: Run, text: str) -> TwinClassifier:
    return TwinClassifier(run.quantizer.apply(plan(run, text)).graph, run.normalisation, run.prepared.batch)


def with_gates(run: Run, *gates: str) -> Run:
    return replace(run, options=replace(run.options, gates=tuple(map(parse_gate, gates))))


@pytest.mark.parametrize(
    ("trial", "gates", "excess"),
    [
        (Trial(1.0, 3.0), ("clean_drop<=2", "robust_drop<=2", "masking=none"), 1.0),
        (Trial(1.0, 1.0), ("clean_drop<=2", "robust_drop<=2"), 0.0),
        (Trial(2.0, 2.0), ("clean_drop<=2", "robust_drop<=2"), 0.0),
        (Trial(3.0, 4.5), ("clean_drop<=2", "robust_drop<=2"), 3.5),
        (Trial(3.0, None), ("clean_drop<=2", "robust_drop<=2"), 1.0),
        (Trial(-9.0, 3.0), ("clean_drop<=2", "robust_drop<=2"), 1.0),
        (Trial(50.0, 50.0), ("masking=none",), 0.0),
        (Trial(50.0, 50.0), (), 0.0),
    ],
)
def test_excess(trial: Trial, gates: tuple[str, ...], excess: float) -> None:
    assert trial.excess(tuple(map(parse_gate, gates))) == excess


def test_float_loses_nothing_against_itself(run: Run) -> None:
    assert Finals(run).trial(run.float_twin) == Trial(0.0, 0.0)


def test_drops_are_those_of_both_attacks_on_the_same_images(run: Run) -> None:
    finals, coarse = Finals(run), twin(run, "int2")
    assert run.data is not None
    few = run.data.select.first(96)
    assert finals.images == 96, "twice as many as plans are compared on"
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)

    def right(model: TwinClassifier) -> tuple[float, float]:
        held = clean = predict(model, images).argmax(1) == labels
        for attack in (FGSM(), PGD()):
            found = attack(model, images, labels, run.threat, seed=run.seed("finals"))
            held = held & (predict(model, found.adversarial).argmax(1) == labels)
        return 100 * float(clean.double().mean()), 100 * float(held.double().mean())

    (clean, robust), (float_clean, float_robust) = right(coarse), right(run.float_twin)
    trial = finals.trial(coarse)
    assert trial.clean_drop == pytest.approx(float_clean - clean) != 0
    assert trial.robust_drop == pytest.approx(float_robust - robust, abs=100 / 96 + 1e-9)


def test_without_attacks_only_clean_images_count(run: Run) -> None:
    clean = replace(run, options=replace(run.options, robust=False, gates=(Gate("clean_drop", 1.0),)))
    assert Finals(clean).trial(twin(run, "int2")).robust_drop is None
    assert Finals(clean).places == FINALISTS["normal"]


@pytest.mark.parametrize("effort", ["fast", "normal", "max"])
def test_places(run: Run, effort: str) -> None:
    changed = replace(run, options=replace(run.options, effort=effort))  # type: ignore[arg-type]
    assert Finals(changed).places == FINALISTS[effort]
    assert Finals(with_gates(changed)).places == 1, "nothing to hold"
    assert Finals(with_gates(changed, "masking=none")).places == 1, "masking is a matter of the file"


def contest(run: Run, *names: str) -> _Contest:
    """Plans of one format each, in an order that is not that of their divergences."""
    found = _Contest(Judge.of(run), Finals(run), Journal())
    for name in names:
        found.add(run, name, run.quantizer.apply(plan(run, name)))
    return found


def test_the_first_that_holds_every_gate_is_kept(run: Run) -> None:
    held = with_gates(run, "clean_drop<=4", "robust_drop<=4")
    rivals = contest(held, "int2", "int8")
    best = rivals._final(list(rivals._contenders))
    assert best.applied.plan.weight_specs(["x"])["x"] == WeightSpec.parse("int8"), "the first misses the gates"
    lost = [row.clean_drop for row in rivals._rows]
    assert all(drop is not None for drop in lost)
    assert (lost[0] or 0) > 4 > (lost[1] or 0)


def test_of_plans_that_hold_the_gates_the_closest_is_kept(run: Run) -> None:
    held = with_gates(run, "clean_drop<=100", "robust_drop<=100")
    applied, rows = contest(held, "int4", "int8").settle()
    assert [row.chosen for row in rows] == [False, True]
    assert applied.plan.digest == rows[1].digest


def test_where_none_holds_them_the_one_that_misses_by_least(run: Run) -> None:
    strict = replace(run, options=replace(run.options, gates=(Gate("clean_drop", -100.0),)))
    rivals = contest(strict, "int2", "int4")
    best = rivals._final(list(rivals._contenders))
    drops = [row.clean_drop or 0.0 for row in rivals._rows]
    assert drops[best.place] == min(drops) < max(drops)


def test_as_many_plans_as_there_are_places_are_tried(example_model: ir.Model, fashion: Data) -> None:
    options = replace(ROBUST, rows="off", rounding="nearest")
    journal = Journal()
    choice = choose(start(Task(example_model, "example", fashion, options), Cache(None), lambda step: None), journal)
    rows = choice.facts.evaluated
    tried = [row for row in rows if row.clean_drop is not None]
    assert len(tried) == min(FINALISTS["normal"], len(rows)) > 1
    assert sum(row.chosen for row in tried) == 1
    assert all(row.robust_drop is not None for row in tried)
    assert len(choice.facts.measured) == len(journal.records) == len(rows)
    assert sum(point.chosen for point in choice.facts.measured) == 1
