"""Calibration on clean, adversarial and mixed images: which images are taken, and that the file is made for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

import qopt
from qopt.cache import Cache
from qopt.config import Options, resolve_options
from qopt.data import Data
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.measure.network import predictions

pytestmark = pytest.mark.long

COUNT = 48
FEW: dict[str, Any] = {"calibration_images": COUNT, "probe_images": 16, "eps": "0.1", "baselines": ()}


def begin(model: ir.Model, data: Data, cache: Path | None = None, **options: Any) -> Run:
    resolved = resolve_options(**{**FEW, **options})
    return start(Task(model.clone(), "example", data, resolved), Cache(cache), lambda step: None)


def calibration(run: Run) -> torch.Tensor:
    assert run.quantizer.calibration is not None
    return run.quantizer.calibration


@pytest.fixture(scope="module")
def clean(fashion: Data) -> torch.Tensor:
    return torch.from_numpy(fashion.calibrate.images[:COUNT])


@pytest.fixture(scope="module")
def runs(example_model: ir.Model, fashion: Data) -> dict[str, Run]:
    return {kind: begin(example_model, fashion, calibration=kind) for kind in ("clean", "adversarial", "mixed")}


def test_clean_images_are_the_first_of_the_calibrate_part(runs: dict[str, Run], clean: torch.Tensor) -> None:
    assert torch.equal(calibration(runs["clean"]), clean)


@pytest.mark.parametrize("kind", ["adversarial", "mixed"])
def test_adversarial_images_lie_in_the_ball_and_fool_the_float_network(
    kind: str, runs: dict[str, Run], clean: torch.Tensor, fashion: Data
) -> None:
    run = runs[kind]
    found, chosen = calibration(run), slice(1, None, 2) if kind == "mixed" else slice(None)
    distance = (found - clean).abs().flatten(1).amax(1)
    assert distance.max() <= 0.1 + 1e-6
    assert 0 <= found.min() <= found.max() <= 1
    labels = torch.from_numpy(fashion.calibrate.labels[:COUNT])
    right = predictions(run.float_twin, clean) == labels
    fooled = right & (predictions(run.float_twin, found) != labels)
    assert fooled.sum() > 0
    attacked = torch.zeros(COUNT, dtype=torch.bool)
    attacked[chosen] = True
    assert distance[right & attacked].min() >= 0.099, "every step is taken, also where the image is fooled already"
    assert distance[~(right & attacked)].max() == 0, "what is wrong already needs no attack"
    if kind == "mixed":
        assert torch.equal(found[::2], clean[::2])


def test_the_attack_is_on_the_network_with_its_normalisation(example_model: ir.Model, fashion: Data) -> None:
    """What the quantizer gets is normalised; what is attacked lies in [0, 1]."""
    run = begin(example_model, fashion, calibration="adversarial", mean=(0.3,), std=(0.5,))
    pixels = calibration(run) * 0.5 + 0.3
    original = torch.from_numpy(fashion.calibrate.images[:COUNT])
    assert (pixels - original).abs().max() <= 0.1 + 1e-5
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


def test_the_threat_model_and_the_seed_decide(example_model: ir.Model, fashion: Data, runs: dict[str, Run]) -> None:
    again = begin(example_model, fashion, calibration="adversarial")
    assert torch.equal(calibration(again), calibration(runs["adversarial"]))
    changes: list[dict[str, Any]] = [{"eps": "0.05"}, {"seed": 1}, {"norm": "l2", "eps": "0.5"}]
    for change in changes:
        other = begin(example_model, fashion, calibration="adversarial", **change)
        assert not torch.equal(calibration(other), calibration(runs["adversarial"])), change


def test_they_are_kept_in_the_cache(example_model: ir.Model, fashion: Data, tmp_path: Path) -> None:
    first = begin(example_model, fashion, tmp_path, calibration="mixed")
    assert first.cache.hits == []
    second = begin(example_model, fashion, tmp_path, calibration="mixed")
    assert second.cache.hits == ["adversarial"]
    assert torch.equal(calibration(first), calibration(second))
    third = begin(example_model, fashion, tmp_path, calibration="adversarial")
    assert third.cache.hits == [], "other images"


def test_ranges_are_those_of_the_images(example_onnx: Path, fashion: Data, runs: dict[str, Run]) -> None:
    options: dict[str, Any] = {**FEW, "bias_correction": "off"}
    found = {
        kind: qopt.optimize(example_onnx, data=fashion, calibration=kind, **options)
        for kind in ("clean", "adversarial")
    }
    for kind, bundle in found.items():
        assert runs[kind].quantizer.apply(bundle.plan.with_changes(ranges={})).plan.ranges == bundle.plan.ranges
    assert found["clean"].plan.ranges != found["adversarial"].plan.ranges
    assert found["clean"].report.data is not None
    assert found["adversarial"].report.data is not None
    notes = found["adversarial"].report.data.notes
    assert any("calibration images: all adversarial, by PGD-10" in note and "linf" in note for note in notes)
    assert not any("adversarial" in note for note in found["clean"].report.data.notes)
    assert found["adversarial"].report.command.endswith("--calibration adversarial " + COMMAND)


COMMAND = f"--calibration-images {COUNT} --probe-images 16"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_mixing_few_images(example_model: ir.Model, fashion: Data, count: int) -> None:
    run = begin(example_model, fashion, calibration="mixed", calibration_images=count)
    changed = (calibration(run) != torch.from_numpy(fashion.calibrate.images[:count])).flatten(1).any(1)
    assert changed.tolist() == [False, True, False][:count]


def test_the_default_is_mixed_in_a_robust_run_and_clean_elsewhere() -> None:
    assert (Options().calibrated_on, Options(robust=True).calibrated_on) == ("clean", "mixed")
    assert Options(robust=True, calibration="clean").calibrated_on == "clean"
    assert replace(Options(), calibration="mixed").as_dict()["calibration"] == "mixed"
