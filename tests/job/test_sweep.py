"""Accuracy against the radius: never growing, equal to the attack itself, absent where nothing is attacked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qopt.attacks import PGD, predict
from qopt.job.artefact import Artefact, build_artefact, float_artefact
from qopt.job.run import Run
from qopt.job.sweep import FACTORS, IMAGES, sweep
from qopt.plan import uniform
from qopt.spec import WeightSpec
from qopt.threat import ThreatModel


@pytest.fixture(scope="module")
def networks(run: Run) -> dict[str, Artefact]:
    applied = run.quantizer.apply(uniform(WeightSpec.parse("int3"), run.target.activations))
    return {"float": float_artefact(run), "int3": build_artefact(run, applied, {})}


def test_accuracy_falls_with_the_radius(run: Run, networks: dict[str, Artefact]) -> None:
    lines = sweep(run, networks)
    assert [line.network for line in lines] == ["float", "int3"]
    for line in lines:
        assert [point.eps for point in line.points] == pytest.approx([0.0, *(f * run.threat.eps for f in FACTORS)])
        values = [point.accuracy.value for point in line.points]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]
        assert all(point.accuracy.n == min(IMAGES, 40) for point in line.points)
        assert all(p.accuracy.low <= p.accuracy.value <= p.accuracy.high for p in line.points)
    assert lines == sweep(run, networks)


def test_it_starts_from_clean_accuracy_and_no_point_is_above_its_attack(
    run: Run, networks: dict[str, Artefact]
) -> None:
    """An image that a plain PGD fools must not be counted as right at its radius, nor at larger ones."""
    assert run.data is not None
    few = run.data.report.first(40)
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    line = sweep(run, {"float": networks["float"]})[0]
    clean = predict(networks["float"].classifier, images).argmax(1) == labels
    assert line.points[0].accuracy.value == pytest.approx(100 * float(clean.double().mean()))
    threat = ThreatModel("linf", 2 * run.threat.eps)
    held = ~PGD()(networks["float"].twin, images, labels, threat, seed=run.seed("sweep", "2.0")).fooled & clean
    assert line.points[-1].accuracy.value <= 100 * float(held.double().mean()) + 1e-9


def test_without_attacks_there_is_none(run: Run, networks: dict[str, Artefact]) -> None:
    assert sweep(replace(run, options=replace(run.options, robust=False)), networks) == []
