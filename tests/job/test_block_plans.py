"""Plans with scales per block and asymmetric weights: applied, rounded, written, and run in float32 kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qopt
from qopt.data import Data
from qopt.errors import PlanError
from qopt.graph.prepare import prepare
from qopt.plan import Plan

pytestmark = pytest.mark.long

FITTING = (72, 36, 24, 16, 12, 9, 8)
FORMATS = ("int4:block{}", "int4:asym", "int3:block{}:asym", "ternary:block{}", "log4:block{}:max")


@pytest.fixture(scope="module")
def block_plan(example_model: Any) -> Plan:
    """Every layer whose channels some block fills, the others asymmetric."""
    chosen = {}
    for number, layer in enumerate(prepare(example_model).layers):
        columns = layer.weights // layer.channels
        block = next((n for n in FITTING if columns % n == 0), None)
        chosen[layer.name] = "int4:asym" if block is None else FORMATS[number % len(FORMATS)].format(block)
    assert len({text.split(":")[0] for text in chosen.values()}) >= 4
    return Plan(weights=chosen)


def folded_weights(model: bytes, path: Path) -> list[np.ndarray[Any, Any]]:
    """The weights of what ONNX Runtime keeps after loading."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path).graph
    assert not {n.op_type for n in graph.node} & {"Cast", "Sub", "Transpose", "Mod", "Gather"}
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    readers = [n for n in graph.node if n.op_type in ("Conv", "FusedConv", "Gemm", "MatMul")]
    return [constants[n.input[1]] for n in readers]


def test_weights_alone(example_onnx: Path, block_plan: Plan, tmp_path: Path) -> None:
    bundle = qopt.optimize(example_onnx, plan=block_plan)
    assert {layer.name: layer.format for layer in bundle.report.layers} == block_plan.weights
    assert bundle.plan.weights == block_plan.weights
    assert 1.6 < bundle.report.size.code_bits <= 4
    assert bundle.report.size.stored_bits > bundle.report.size.code_bits + 8 * 4 / 72
    assert bundle.report.kernels.integer == 0
    weights = folded_weights(bundle.model, tmp_path / "folded.onnx")
    assert len(weights) == len(bundle.report.layers)
    assert all(weight.dtype == np.float32 for weight in weights)
    again = qopt.optimize(example_onnx, plan=Plan.from_json(bundle.plan.to_json()))
    assert again.model == bundle.model


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "adaround"])
def test_with_activations_of_8_bits(
    rounding: Any, example_onnx: Path, block_plan: Plan, fashion: Data, tmp_path: Path
) -> None:
    """Float kernels between quantized activations: the file agrees with the graph that was measured."""
    plan = Plan(
        defaults={"weights": "int4", "activations": "int8"},  # type: ignore[arg-type]
        weights=block_plan.weights,
        rounding=rounding,
        bias_correction=rounding != "nearest",
    )
    bundle = qopt.optimize(example_onnx, plan=plan, data=fashion, calibration_images=64)
    assert {layer.name: layer.format for layer in bundle.report.layers} == block_plan.weights
    assert not any(layer.integer for layer in bundle.report.layers)
    assert bundle.report.kernels.integer == 0
    assert bundle.report.kernels.agreement is not None
    assert bundle.report.kernels.agreement > 0.99
    assert len(folded_weights(bundle.model, tmp_path / "folded.onnx")) == len(bundle.report.layers)


def test_a_layer_without_blocks_among_others_keeps_its_integer_kernel(
    example_onnx: Path, block_plan: Plan, fashion: Data
) -> None:
    codes: dict[str, Any] = {"defaults": {"weights": "int4", "activations": "int8"}}
    whole = qopt.optimize(example_onnx, plan=Plan(**codes), data=fashion, calibration_images=64)
    integer = [layer.name for layer in whole.report.layers if layer.integer]
    one = {integer[1]: block_plan.weights[integer[1]]}
    mixed = qopt.optimize(example_onnx, plan=Plan(**codes, weights=one), data=fashion, calibration_images=64)
    assert mixed.report.kernels.integer == whole.report.kernels.integer - 1
    assert [layer.name for layer in mixed.report.layers if layer.integer] == [n for n in integer if n != integer[1]]


def test_blocks_that_do_not_fill_a_layer(example_onnx: Path) -> None:
    with pytest.raises(PlanError, match=r"stem\.weight: blocks that do not fill a channel .*give the layer") as caught:
        qopt.optimize(example_onnx, plan=Plan(weights={"stem.weight": "int4:block512"}))
    assert "int4:block512 for" in str(caught.value)
