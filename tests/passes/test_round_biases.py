"""The twin adds the biases that integer kernels add: multiples of the accumulator's unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx import GraphModule, Node

from qopt.emit import emit
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.base import Pipeline
from qopt.passes.nodes import bias_source, constant_of, is_layer
from qopt.passes.round_biases import RoundBiases
from qopt.passes.unshare import Unshare
from qopt.plan import Plan, uniform
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Images = Callable[..., torch.Tensor]
INT4, A3 = WeightSpec.parse("int4"), ActivationSpec.parse("int3")


def _biases(twin: GraphModule) -> dict[tuple[str, int], torch.Tensor]:
    found = {}
    for node in twin.graph.nodes:
        source = bias_source(node) if is_layer(node) else None
        if source is not None:
            found[node.meta["layer"], node.meta["use"]] = constant_of(twin, source)
    return found


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("name", ["plain", "residual", "concat", "depthwise", "pool", "shared", "static"])
def test_they_are_multiples_of_weight_scale_times_activation_scale(
    name: str, bias_correction: bool, networks: dict[str, Prepared], images: Images
) -> None:
    prepared = networks[name]
    quantizer = Quantizer(prepared, images(prepared, 16))
    applied = quantizer.apply(uniform(INT4, A3, bias_correction=bias_correction))
    exact = _biases(quantizer.float_graph) | dict(applied.quantized.biases)
    rounded = _biases(applied.graph)
    assert rounded
    for (layer, index), bias in rounded.items():
        source = prepared.layer(layer).uses[index].input
        unit = applied.quantized.weights[layer].scale * applied.quantized.activations[source].scale
        codes = bias / unit
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert ((bias - exact[layer, index]).abs() <= 0.501 * unit.abs()).all()


@pytest.mark.parametrize("activations", ["int4", "int3"])
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise"])
def test_without_them_the_twin_would_disagree_with_the_file(
    name: str, activations: str, networks: dict[str, Prepared], images: Images, onnx_values: Callable[..., Any]
) -> None:
    prepared = networks[name]
    sample = images(prepared, 64)
    quantizer = Quantizer(prepared, sample)
    applied = quantizer.apply(uniform(INT4, ActivationSpec.parse(activations)))
    found = onnx_values(emit(prepared, applied.quantized), [prepared.output], sample, optimize=True)[prepared.output]

    def gap() -> float:
        with torch.no_grad():
            return float(np.median(np.abs(applied.graph(sample).numpy() - found)))

    before = gap()
    assert before <= 1e-5
    for key, bias in _biases(quantizer.float_graph).items():
        _biases(applied.graph)[key].copy_(bias)
    assert gap() > 10 * before + 1e-5, "planted: the biases as they were"


@pytest.mark.parametrize(
    "plan", [uniform(INT4), Plan(activations={"r1": "int4"}), Plan(weights={"w1": "log6"}, activations={"x": "int4"})]
)
def test_layers_that_run_in_float_keep_theirs(plan: Plan, networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    quantizer = Quantizer(prepared, images(prepared, 8))
    found = _biases(quantizer.apply(plan).graph)
    for key, bias in _biases(quantizer.float_graph).items():
        assert torch.equal(found[key], bias)


def test_a_shared_bias_is_rounded_for_each_use(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["shared"]
    twin = build_twin(prepared)
    Unshare()(twin)
    new = {("w", 0): torch.zeros(3), ("w", 1): torch.ones(3)}
    result = Pipeline((RoundBiases(new), RoundBiases({})), images(prepared, 2))
    result(twin)
    assert result.notes == ["2 biases rounded to the accumulator's unit"]
    found = _biases(twin)
    assert torch.equal(found["w", 0], torch.zeros(3))
    assert torch.equal(found["w", 1], torch.ones(3))


def test_a_layer_without_a_bias_gets_one(networks: dict[str, Prepared]) -> None:
    twin = build_twin(networks["pool"])
    calls: list[Node] = [node for node in twin.graph.nodes if is_layer(node)]
    assert bias_source(calls[-1]) is None
    RoundBiases({("w3", 0): torch.ones(3)})(twin)
    assert torch.equal(_biases(twin)["w3", 0], torch.ones(3))


@pytest.mark.parametrize("key", [("w1", 1), ("ghost", 0)])
def test_a_bias_for_nothing_is_an_error(key: tuple[str, int], networks: dict[str, Prepared]) -> None:
    with pytest.raises(VerificationError, match=f"^{key[0]} use {key[1]}: no call in the graph"):
        RoundBiases({key: torch.zeros(4)})(build_twin(networks["plain"]))
