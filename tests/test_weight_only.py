"""Plans for networks that nothing can be run through: codes and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt.errors import PlanError
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.plan import Plan, uniform
from qopt.quantize import Applied, Quantizer, WeightOnly
from qopt.spec import WeightSpec

INT4 = WeightSpec.parse("int4")


@pytest.fixture(scope="module")
def network(text_model: Callable[..., onnx.ModelProto]) -> Prepared:
    generator = np.random.default_rng(0)
    table, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((30, 8), (8, 12)))
    text = "g (int64[b, s] ids) => (float[b, s, 12] y) { x = Gather(table, ids) y = MatMul(x, w) }"
    return prepare(ir.from_proto(text_model(text, table=table, w=w)))


def test_each_row_of_a_table_has_its_scale(network: Prepared) -> None:
    codes = WeightOnly(network).quantized_weight(network.layer("table"), WeightSpec.parse("int4:max"))
    table = network.initializer("table")
    assert codes.scale.shape == (30,)
    step = np.abs(table).max(1) / 7
    assert (np.abs(codes.dequantize().numpy() - table).max(1) <= step / 2 + 1e-6).all()


def test_a_plan_becomes_codes_and_nothing_else(network: Prepared) -> None:
    quantizer = WeightOnly(network)
    plan = uniform(INT4, model=network.digest).with_changes(weights={"w": "float"})
    applied = quantizer.apply(plan)
    assert applied.plan == plan
    assert set(applied.quantized.weights) == {"table"}
    assert (applied.quantized.biases, applied.quantized.activations) == ({}, {})
    assert applied.quantized.weights["table"] is quantizer.quantized_weight(network.layer("table"), INT4)
    assert not isinstance(applied, Applied)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"defaults": {"weights": "int4", "activations": "int8"}}, "defaults.activations"),
        ({"activations": {"x": "int8"}}, "activations"),
        ({"ranges": {"x": (0.0, 1.0)}}, "ranges"),
        ({"bias_correction": True}, "bias_correction"),
        ({"rounding": "gptq"}, "rounding"),
        ({"rounding": "adaround"}, "rounding"),
    ],
)
def test_plans_that_ask_for_more(change: dict[str, Any], key: str, network: Prepared) -> None:
    with pytest.raises(
        PlanError, match=rf"key '{key}': the plan asks for more than weights .*its input 'ids' is INT64"
    ):
        WeightOnly(network).apply(uniform(INT4).with_changes(**change))


def test_activations_that_a_plan_keeps_in_float_are_no_demand(network: Prepared) -> None:
    plan = uniform(INT4).with_changes(activations={"x": "float"})
    assert WeightOnly(network).apply(plan).quantized.weights


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(model="0" * 64), "the plan was made for another model"),
        (Plan(weights={"tabel": "int4"}), "tabel: the plan names a layer .*'table'"),
        (Plan(ties=[["table", "w"]], weights={"w": "int4"}), "tied layers must share one format"),
    ],
)
def test_plans_that_do_not_fit(plan: Plan, words: str, network: Prepared) -> None:
    with pytest.raises(PlanError, match=words):
        WeightOnly(network).apply(plan)


def test_the_codes_are_those_of_the_quantizer_with_a_twin(text_model: Callable[..., onnx.ModelProto]) -> None:
    w = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    prepared = prepare(ir.from_proto(text_model("g (float[b, 12] x) => (float[b, 5] y) { y = MatMul(x, w) }", w=w)))
    assert prepared.image
    plan = uniform(INT4)
    alone, whole = WeightOnly(prepared).apply(plan), Quantizer(prepared).apply(plan)
    assert isinstance(whole, Applied)
    one, other = (applied.quantized.weights["w"].dequantize() for applied in (alone, whole))
    assert torch.equal(one, other)
