"""Plans that a person wrote or edited: applied as they are, refused with the place where they do not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

import qopt
from qopt.config import Options
from qopt.data import Data
from qopt.errors import PlanError, UsageError
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.job.command import reproduce
from qopt.limits import Gate, Limit
from qopt.plan import Plan, uniform
from qopt.runtime.session import to_bytes
from qopt.spec import WeightSpec


def outputs(model: bytes, images: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def test_an_all_float_plan_reproduces_the_model(examples: Path) -> None:
    """The first test of every path: bit-close to the archive's own program."""
    path = examples / "fashion_resnet.pt"
    bundle = qopt.optimize(path, plan=Plan())
    images = np.random.default_rng(0).random((16, 1, 28, 28), dtype=np.float32)
    program = torch.export.load(io.BytesIO(path.read_bytes()))
    expected = program.module()(torch.from_numpy(images)).detach().numpy()
    found = outputs(bundle.model, images)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))
    assert np.array_equal(found, outputs(to_bytes(prepare(load_model(path)).model), images))
    assert {layer.format for layer in bundle.report.layers} == {"float"}


@pytest.mark.long
def test_the_emitted_plan_gives_the_same_file_again(
    bundle: qopt.Bundle, example_onnx: Path, fashion: Data, tmp_path: Path
) -> None:
    """Rounding by GPTQ and bias correction need the images again; ranges are in the plan."""
    path = tmp_path / "plan.json"
    path.write_text(bundle.plan.to_json())
    images: dict[str, Any] = {"calibration": "mixed", "calibration_images": 128, "probe_images": 64}
    again = qopt.optimize(example_onnx, plan=path, data=fashion, **images)
    assert again.model == bundle.model
    assert again.plan == bundle.plan
    assert again.report.search.strategy == "none, the plan was given"
    assert [layer.format for layer in again.report.layers] == [layer.format for layer in bundle.report.layers]
    nearest = bundle.plan.with_changes(rounding="nearest", bias_correction=False)
    without_images = qopt.optimize(example_onnx, plan=nearest)
    assert without_images.plan.ranges == bundle.plan.ranges
    assert without_images.report.kernels.integer == bundle.report.kernels.integer


def test_an_edit_reaches_the_file(example_onnx: Path) -> None:
    plan = Plan(weights={"*": "int4", "stem.weight": "int8:tensor:max", "fc.weight": "float"})
    report = qopt.optimize(example_onnx, plan=plan).report
    formats = {layer.name: layer.format for layer in report.layers}
    assert formats["stem.weight"] == "int8:tensor:max"
    assert formats["fc.weight"] == "float"
    assert formats["block1.conv1.weight"] == "int4"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["int", "log"])
def test_every_format_compiles(example_onnx: Path, kind: Any, bits: int) -> None:
    bundle = qopt.optimize(example_onnx, plan=uniform(WeightSpec(kind, bits)))
    container = bits if bits <= 4 else 8
    assert bundle.report.size.code_bits == container
    assert bundle.report.size.stored_bits >= container


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"weights": {"steam.weight": "int4"}}, "did you mean 'stem.weight'"),
        ({"weights": {"layer*": "int4"}}, "layer*: the plan names a layer that the model does not have"),
        ({"weights": {"stem.weight": "int44"}}, "not a weight format"),
        ({"activations": {"relu_99": "int8"}}, "did you mean 'relu_"),
        ({"defaults": {"activations": "int8"}}, "give --data, or ranges in the plan"),
        ({"wieghts": {}}, "weights"),
        ({"schema": 2}, "schema"),
        ({"model": "0" * 64}, "the plan was made for another model"),
        ({"bias_correction": True, "defaults": {"weights": "int4"}}, "bias correction needs images"),
        ({"rounding": "gptq", "defaults": {"weights": "int4"}}, "rounding by GPTQ needs images"),
        ({"rounding": "upwards"}, "rounding"),
    ],
)
def test_a_plan_that_does_not_fit(example_onnx: Path, tmp_path: Path, plan: dict[str, Any], words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1, **plan}))
    with pytest.raises(PlanError) as caught:
        qopt.optimize(example_onnx, plan=path)
    assert words in str(caught.value)


def test_a_plan_that_is_not_there(example_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the plan"):
        qopt.optimize(example_onnx, plan=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), "qopt optimize m.onnx"),
        (Options(robust=True, seed=3), "qopt optimize m.onnx --robust --seed 3"),
        (
            Options(limits=(Limit("bits", 3.5),), gates=(Gate("masking"),), eps=0.1),
            "qopt optimize m.onnx --limit 'bits<=3.5' --gate masking=none --eps 0.10000000000000001",
        ),
        (Options(mean=(0.5, 0.25), std=(1.0, 2.0)), "qopt optimize m.onnx --mean 0.5,0.25 --std 1,2"),
        (Options(calibration="mixed"), "qopt optimize m.onnx --calibration mixed"),
        (Options(baselines=("int2",)), "qopt optimize m.onnx --baseline int2"),
    ],
)
def test_the_command_that_reproduces_a_run(options: Options, expected: str) -> None:
    assert reproduce("m.onnx", None, options) == expected


def test_the_reported_command_is_understood(bundle: qopt.Bundle) -> None:
    words = bundle.report.command.split()
    assert words[:2] == ["qopt", "optimize"]
    assert "--robust" in words
    assert "-o" not in words
