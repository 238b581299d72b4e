"""Rows of several formats in the twin: inserted, folded and rounded like a weight of one format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.graph.model import Prepared
from qopt.passes.base import EXACT, Pipeline, relative_change
from qopt.passes.fold_weights import FoldWeights
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers
from qopt.passes.layer_inputs import input_rows
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.passes.round_gptq import RoundGPTQ
from qopt.plan import Plan
from qopt.quant import QuantizedRows
from qopt.quant.gptq import as_rows, gptq
from qopt.quant.retarget import retargeted
from qopt.quantize import Quantizer

Images = Callable[..., Tensor]
Record = Callable[[GraphModule, Tensor], dict[Node, Any]]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "tokens", "shared", "static"]
MIXTURES = [["int4", "int2", "ternary"], ["int3", "log3", "int3"]]


def plan_for(prepared: Prepared, formats: list[str], **fields: Any) -> Plan:
    """Every layer in ``formats`` over and over, one for each output channel."""
    weights = {
        layer.name: f"rows({','.join(islice(cycle(formats), layer.channels))})" for layer in prepared.layers
    }  # fmt: skip
    return Plan(weights=weights, **fields)


def rows_of(prepared: Prepared, sample: Tensor, formats: list[str]) -> tuple[Quantizer, dict[str, QuantizedRows]]:
    quantizer = Quantizer(prepared, sample)
    found = quantizer.apply(plan_for(prepared, formats)).quantized.weights
    assert all(isinstance(weight, QuantizedRows) for weight in found.values())
    return quantizer, found  # type: ignore[return-value]


def error(weight: Tensor, codes: QuantizedRows, moment: Tensor) -> Tensor:
    difference = as_rows(weight.double() - codes.dequantize().double(), codes.axis, len(moment))
    return torch.einsum("gri,gij,grj->gr", difference, moment, difference).reshape(-1)


def seen(graph: GraphModule, prepared: Prepared, sample: Tensor, record: Record) -> dict[str, Tensor]:
    """Layer to the inputs of its first use, float64 (groups, positions, columns)."""
    found: dict[str, list[Tensor]] = {}
    for chunk in torch.split(sample, prepared.batch or len(sample)):
        values = record(graph, chunk)
        for node in filter(is_layer, graph.graph.nodes):
            if node.meta["use"] == 0:
                args = [values[a] if isinstance(a, Node) else a for a in node.args]
                found.setdefault(node.meta["layer"], []).extend(rows.double() for rows in input_rows(node, args))
    return {layer: torch.cat(parts, 1) for layer, parts in found.items()}


def covariance(left: Tensor, right: Tensor) -> Tensor:
    left, right = left - left.mean(1, keepdim=True), right - right.mean(1, keepdim=True)
    return left.mT @ right / left.shape[1]


@pytest.mark.parametrize("formats", MIXTURES)
@pytest.mark.parametrize("name", NAMES)
def test_inserted_and_folded(
    name: str, formats: list[str], networks: dict[str, Prepared], images: Images
) -> None:  # fmt: skip
    prepared = networks[name]
    sample = images(prepared, 2)
    quantizer, weights = rows_of(prepared, sample, formats)
    twin = copy.deepcopy(quantizer.float_graph)
    by_hand = copy.deepcopy(quantizer.float_graph)
    for node in filter(is_layer, by_hand.graph.nodes):
        constant_of(by_hand, weight_source(node)).copy_(weights[node.meta["layer"]].dequantize())
    Pipeline((InsertWeightQuantizers(weights),), sample)(twin)
    inserted = twin(sample)
    assert relative_change(by_hand(sample), inserted) <= 1e-6
    Pipeline((FoldWeights(),), sample)(twin)
    assert relative_change(inserted, twin(sample)) <= EXACT
    assert not any(node.op == "call_module" for node in twin.graph.nodes)


@pytest.mark.parametrize("target", ["own", "float"])
@pytest.mark.parametrize("formats", MIXTURES)
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "mlp", "tokens"])
def test_rounded_against_the_inputs_they_will_get(
    name: str, formats: list[str], target: Any, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    """The codes of the pass are those of `gptq` on the inputs that the finished network gives the layer."""
    prepared = networks[name]
    sample = images(prepared, 40)
    quantizer, nearest = rows_of(prepared, sample, formats)
    twin = copy.deepcopy(quantizer.float_graph)
    InsertWeightQuantizers(nearest)(twin)
    step = RoundGPTQ(sample, quantizer.float_graph, prepared.batch or 64, target=target)
    Pipeline((step,), quantizer.sample)(twin)
    inputs = seen(twin, prepared, sample, record)
    floats = seen(quantizer.float_graph, prepared, sample, record)
    for layer in prepared.layers:
        like, codes, weight = nearest[layer.name], step.weights[layer.name], quantizer.weight(layer)
        assert isinstance(codes, QuantizedRows)
        assert (codes.spec, codes.grids) == (like.spec, like.grids)
        u, v = inputs[layer.name], floats[layer.name]
        moment = covariance(u, u)
        wanted = weight if target == "own" else retargeted(weight, like.axis, moment, covariance(v, u))
        expected = gptq(wanted, like, moment, damping=0.01 + step.shrinkage * u.shape[2] / u.shape[1])
        assert bool((error(wanted, codes, moment) <= error(wanted, like, moment) * (1 + 1e-4) + 1e-9).all())
        differs = codes.dequantize() - expected.dequantize()
        assert (differs.abs() > 1e-3 * weight.abs().max()).double().mean() <= 0.05, "float32 sums may tip a tie"


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "mlp", "pool", "shared"])
def test_rounding_brings_the_logits_closer_to_float(name: str, networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks[name]
    sample = images(prepared, 128)
    quantizer = Quantizer(prepared, sample)
    gaps = []
    for rounding in ("nearest", "gptq"):
        applied = quantizer.apply(plan_for(prepared, ["int4", "int2", "int3"], rounding=rounding))
        with torch.no_grad():
            gaps.append(float((applied.graph(sample) - quantizer.float_graph(sample)).square().mean()))
    assert gaps[1] < 0.7 * gaps[0]


def test_the_codes_of_nearest_are_not_changed(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    quantizer, nearest = rows_of(prepared, images(prepared, 20), MIXTURES[0])
    before = {name: weight.dequantize() for name, weight in nearest.items()}
    rounded = quantizer.apply(plan_for(prepared, MIXTURES[0], rounding="gptq")).quantized.weights
    assert any(not torch.equal(weight.dequantize(), before[name]) for name, weight in rounded.items())
    assert all(torch.equal(weight.dequantize(), before[name]) for name, weight in nearest.items())
