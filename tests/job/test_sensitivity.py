"""The forms of sensitivities, each against its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import qopt
from qopt.cache import Cache
from qopt.cli import app
from qopt.config import Options, Sensitivity
from qopt.data import Data
from qopt.errors import UsageError
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.job.sensitivity import DESCRIBED, adversarial_noise, described, divergences, form_of
from qopt.job.space import build_space, capable
from qopt.search.space import LayerSpace
from qopt.spec import WeightSpec

FORMATS = tuple(map(WeightSpec.parse, ("int2", "int4")))
FEW = Options(robust=True, probe_images=32, calibration_images=64, baselines=())


@pytest.fixture(scope="module")
def begin(example_model: ir.Model, fashion: Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    cache = tmp_path_factory.mktemp("cache")

    def begin(*, data: Data | None = fashion, **changes: Any) -> Run:
        task = Task(example_model, "example", data, replace(FEW, **changes))
        return start(task, Cache(cache), lambda step: None)

    return begin


def layers(run: Run, *, measured: bool = True) -> tuple[LayerSpace, ...]:
    return build_space(run, capable(run, FORMATS), measured=measured).layers


def found(run: Run) -> dict[tuple[str, str], float]:
    return {(layer.layer, str(c.spec)): c.sensitivity for layer in layers(run) for c in layer.candidates}


def test_every_form_has_words() -> None:
    assert {"auto", *DESCRIBED} == set(get_args(Sensitivity))


def test_auto_is_measured_with_images_and_of_the_weights_without(begin: Callable[..., Run]) -> None:
    assert form_of(begin()) == "divergence"
    assert form_of(begin(data=None)) == "error"
    assert described(begin()) == "KL divergence on adversarial images, one layer quantized at a time"
    assert described(begin(robust=False)) == "KL divergence on clean images, one layer quantized at a time"
    assert described(begin(data=None)) == "squared relative error of the weights, no data"


def test_error(begin: Callable[..., Run]) -> None:
    for layer in layers(begin(sensitivity="error")):
        for one in layer.candidates:
            assert one.sensitivity == pytest.approx((one.error.value / layer.norm.value) ** 2)
    assert layers(begin(sensitivity="error")) == layers(begin(sensitivity="error"), measured=False) or all(
        a.candidates[0].sensitivity == b.candidates[0].sensitivity
        for a, b in zip(layers(begin(sensitivity="error")), layers(begin(), measured=False), strict=True)
    )


def test_weighted(begin: Callable[..., Run]) -> None:
    for layer in layers(begin(sensitivity="weighted")):
        for one in layer.candidates:
            assert one.weighted is not None
            assert one.sensitivity == one.weighted.value**2 > 0


def test_noise(begin: Callable[..., Run]) -> None:
    run = begin(sensitivity="noise")
    noise, plain = adversarial_noise(run), found(begin(sensitivity="error"))
    assert found(run) == {key: pytest.approx(value * noise[key[0]]) for key, value in plain.items()}
    assert len(set(noise.values())) > 1


def test_divergences_are_of_hard_images_in_a_robust_run_and_of_clean_ones_where_asked(
    begin: Callable[..., Run],
) -> None:
    robust, clean, plain = (found(run) for run in (begin(), begin(sensitivity="clean-divergence"), begin(robust=False)))
    assert clean == plain != robust
    table = divergences(begin(), capable(begin(), FORMATS))
    assert robust == {(layer, str(spec)): value for (layer, spec), value in table.items()}


@pytest.mark.parametrize("form", ["error", "weighted", "noise"])
def test_only_divergences_are_measured_one_layer_at_a_time(begin: Callable[..., Run], form: str) -> None:
    run = begin(sensitivity=form)
    assert divergences(run, capable(run, FORMATS)) == {}


@pytest.mark.parametrize("form", ["weighted", "noise", "divergence", "clean-divergence"])
def test_what_is_measured_needs_images(begin: Callable[..., Run], form: str) -> None:
    with pytest.raises(UsageError, match="--sensitivity: the sensitivities are measured on images; give --data"):
        begin(data=None, robust=False, sensitivity=form)


def test_the_plan_follows_the_form(begin: Callable[..., Run], example_onnx: Path) -> None:
    bundle = qopt.optimize(example_onnx, sensitivity="error", limits=("bits<=3",))
    assert bundle.report.search.sensitivity == "squared relative error of the weights, no data"
    assert "--sensitivity error" in bundle.report.command


def test_an_unknown_form_is_refused_at_once(example_onnx: Path) -> None:
    found = CliRunner().invoke(app, ["optimize", str(example_onnx), "--sensitivity", "hessian"])
    assert found.exit_code != 0
    assert "--sensitivity" in str(found.exception)
    assert "clean-divergence" in str(found.exception)
