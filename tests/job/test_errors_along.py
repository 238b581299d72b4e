"""Errors along the network: the one computation of amplification, put together for the report."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.job.errors_along import errors_along
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.measure.amplification import layer_activity
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.plan import uniform
from qopt.spec import WeightSpec


@pytest.fixture(scope="module")
def run(example_model: ir.Model, fashion: Data) -> Run:
    options = Options(robust=True, attack_images=40, calibration_images=64, baselines=())
    return start(Task(example_model, "example", fashion, options), Cache(None), lambda step: None)


def twin(run: Run, spec: str, batch: int | None = None) -> TwinClassifier:
    return TwinClassifier(
        run.quantizer.apply(uniform(WeightSpec.parse(spec), run.target.activations)).graph, batch=batch
    )


def images(run: Run, count: int) -> tuple[Tensor, Tensor]:
    assert run.data is not None
    clean = torch.from_numpy(run.data.report.first(count).images)
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)) * 0.2 - 0.1
    return clean, (clean + noise).clamp(0, 1)


def test_every_layer_in_order_with_all_four_errors(run: Run) -> None:
    clean, adversarial = images(run, 24)
    plain, chosen = run.float_twin, twin(run, "int3")
    found = errors_along(plain, chosen, clean, adversarial)
    assert found.images == 24
    assert [row.layer for row in found.layers] == [layer.name for layer in run.prepared.layers]
    pairs = {
        "attack_float": layer_activity(plain, clean, adversarial),
        "attack": layer_activity(chosen, clean, adversarial),
        "clean": layer_activity(plain, clean, clean, chosen),
        "attacked": layer_activity(plain, adversarial, adversarial, chosen),
    }
    for row in found.layers:
        for name, activity in pairs.items():
            assert getattr(row, name) == pytest.approx(activity[row.layer].output.amplification, abs=1e-6)
            assert getattr(row, name) > 0


def test_float_against_itself_has_no_error_and_one_attack(run: Run) -> None:
    clean, adversarial = images(run, 8)
    for row in errors_along(run.float_twin, run.float_twin, clean, adversarial).layers:
        assert (row.clean, row.attacked) == (0.0, 0.0)
        assert row.attack == row.attack_float


def test_fewer_bits_err_more_in_every_layer(run: Run) -> None:
    clean, _ = images(run, 24)
    few, many = (errors_along(run.float_twin, twin(run, spec), clean, None) for spec in ("int2", "int8"))
    assert all((a.clean or 0) > (b.clean or 0) for a, b in zip(few.layers, many.layers, strict=True))
    assert {(row.attack_float, row.attack, row.attacked) for row in few.layers} == {(None, None, None)}


@pytest.mark.parametrize(
    ("given", "batch", "counted"),
    [(150, None, BATCH), (30, None, 30), (150, 16, 96), (150, 120, 120), (30, 16, 16), (5, 16, 5)],
)
def test_how_many_images_are_looked_at(run: Run, given: int, batch: int | None, counted: int) -> None:
    """One batch, in whole batches of a graph that takes one size only; too few are repeated until they fill it."""
    clean, adversarial = images(run, given)
    plain = TwinClassifier(run.quantizer.float_graph, batch=batch)
    found = errors_along(plain, plain, clean, adversarial)
    assert found.images == counted
    expected = layer_activity(run.float_twin, clean[:counted], adversarial[:counted])
    if given >= (batch or 1):
        for row in found.layers:
            assert row.attack == pytest.approx(expected[row.layer].output.amplification, abs=1e-5)
