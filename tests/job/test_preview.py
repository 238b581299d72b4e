"""``--dry-run``: what it says is what the run would find, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from qopt.cache import Cache
from qopt.cli import app
from qopt.config import resolve_options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.job.optimize import Task, start
from qopt.job.preview import Preview, _duration, _work, preview
from qopt.job.space import capable


def seen(model: ir.Model, data: Data | None = None, **options: Any) -> Preview:
    task = Task(model, "example", data, resolve_options(**options))
    return preview(task, Cache(None), lambda step: None, "out")


def test_layers_and_candidates(example_model: ir.Model) -> None:
    found = seen(example_model, target="int4")
    assert len(found.layers) == 10
    assert sum(layer.macs for layer in found.layers) == found.macs
    assert all({"int2", "int4", "int8"} <= set(layer.candidates) for layer in found.layers)
    count = 1.0
    for layer in found.layers:
        count *= len(layer.candidates)
    assert float(found.plans.replace("10^", "1e")) == pytest.approx(count, rel=3)


def test_costs_are_those_of_uniform_plans(example_model: ir.Model) -> None:
    found = seen(example_model, target="stm32f4,bops,int4")
    plain, eight, four = found.costs
    assert [cost.format for cost in found.costs] == ["float", "int8", "int4"]
    assert plain.bytes == 4 * eight.bytes == 8 * four.bytes == 4 * found.weights
    assert set(eight.machines) == {"stm32f4", "bops"}
    assert "flash" in eight.machines["stm32f4"]
    assert eight.machines["bops"].startswith("bops ")


def test_limits_say_what_can_be_reached(example_model: ir.Model) -> None:
    found = seen(example_model, target="stm32f4,int4", limits=("flash<=1KB", "flash<=1MB"))
    words = {line.split(" on ")[0].removeprefix("limit "): line for line in found.limits}
    assert "cannot be kept" in words["flash<=1024"]
    assert "can be kept" in words["flash<=1048576"]


def test_time_is_told_where_there_are_images(example_model: ir.Model, fashion: Data) -> None:
    assert seen(example_model).seconds is None
    found = seen(example_model, fashion, attack_images=100).seconds
    assert found is not None
    assert found > 0


def test_work_grows_with_what_is_asked(example_model: ir.Model, fashion: Data) -> None:
    """Multiplications, which no load of the machine changes; seconds are these by the speed of one pass."""

    def work(measures: bool = False, **options: Any) -> float:
        task = Task(example_model, "example", fashion, resolve_options(calibration="clean", **options))
        run = start(task, Cache(None), lambda step: None)
        return _work(run, capable(run, run.target.weights), measures=measures)

    plain, robust = work(attack_images=100), work(robust=True, attack_images=100)
    assert 0 < plain < robust < work(robust=True, attack_images=1000)
    assert robust < work(robust=True, attack_images=100, measures=True)
    assert work(target="int4-uniform") < plain


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (75, "75 s"), (600, "10 minutes"), (7200, "2.0 hours")])
def test_durations(seconds: float, words: str) -> None:
    assert _duration(seconds) == words


def test_the_command_writes_nothing(example_onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["optimize", str(example_onnx), "--target", "stm32f4,int4", "--dry-run", "-q", "-o", str(out)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "stem.weight" in done.stdout
    assert "nothing was written" in done.stdout
    assert not out.exists()
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert found["folder"] == str(out)
    assert found["files"][0] == "model.onnx"


def test_what_is_wrong_is_said_as_by_the_run(example_onnx: Path) -> None:
    error = CliRunner().invoke(app, ["optimize", str(example_onnx), "--dry-run", "--gate", "clean_drop<=1"]).exception
    assert isinstance(error, UsageError)
    assert "give --data" in str(error)
