"""Weights become codes, and codes become constants: inserting changes what it must, folding nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.base import EXACT, Pipeline, relative_change
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.fold_weights import FoldWeights
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers, WeightQuantizer
from qopt.passes.nodes import constant_of, free_name, is_layer, weight_source
from qopt.passes.unshare import Unshare
from qopt.quant import QuantizedWeight, quantize_whole
from qopt.spec import WeightSpec

Images = Callable[..., torch.Tensor]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]
SPECS = ["int1", "int2", "int4:tensor:max", "int8", "log1", "log4", "log6"]


def _codes(prepared: Prepared, spec: str) -> dict[str, QuantizedWeight]:
    return {
        layer.name: quantize_whole(
            torch.from_numpy(prepared.initializer(layer.initializer).copy()), WeightSpec.parse(spec), layer.channel_axis
        )
        for layer in prepared.layers
    }


def _canonical(prepared: Prepared, sample: torch.Tensor) -> GraphModule:
    return Pipeline((Unshare(), CanonicaliseLinear()), sample)(build_twin(prepared))


def _by_hand(prepared: Prepared, codes: dict[str, QuantizedWeight]) -> GraphModule:
    """The raw twin with dequantized weights written into its buffers."""
    twin = build_twin(prepared)
    for node in twin.graph.nodes:
        if is_layer(node):
            constant_of(twin, weight_source(node)).copy_(codes[node.meta["layer"]].dequantize())
    return twin


def _quantizers(twin: GraphModule) -> list[str]:
    return [name for name, module in twin.named_modules() if isinstance(module, WeightQuantizer)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_network_computes_with_dequantized_weights(
    spec: str, name: str, networks: dict[str, Prepared], images: Images
) -> None:
    prepared = networks[name]
    sample, codes = images(prepared, 2), _codes(prepared, spec)
    twin = Pipeline((InsertWeightQuantizers(codes),), sample)(_canonical(prepared, sample))
    expected = _by_hand(prepared, codes)(sample)
    assert relative_change(expected, twin(sample)) <= 1e-6
    assert len(_quantizers(twin)) == len(prepared.layers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["int2", "log4"])
def test_folding_changes_nothing_and_leaves_no_quantizer(
    spec: str, name: str, networks: dict[str, Prepared], images: Images
) -> None:
    prepared = networks[name]
    sample, codes = images(prepared, 2), _codes(prepared, spec)
    twin = InsertWeightQuantizers(codes)(_canonical(prepared, sample)).graph
    before = twin(sample)
    pipeline = Pipeline((FoldWeights(), FoldWeights()), sample)
    pipeline(twin)
    assert relative_change(before, twin(sample)) <= EXACT
    assert len(pipeline.notes) == 1, "the second time there is nothing to fold"
    assert _quantizers(twin) == []
    assert not any(node.op == "call_module" for node in twin.graph.nodes)
    assert not any(node.target is torch.t for node in twin.graph.nodes)
    for node in twin.graph.nodes:
        if is_layer(node):
            folded = constant_of(twin, weight_source(node))
            codes_of = codes[node.meta["layer"]].dequantize()
            assert torch.equal(folded, codes_of) or torch.equal(folded, codes_of.t())
            assert folded.is_contiguous()
            assert not folded.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_no_float_weight_stays_behind(name: str, networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks[name]
    sample = images(prepared, 2)
    twin = InsertWeightQuantizers(_codes(prepared, "int2"))(_canonical(prepared, sample)).graph
    FoldWeights()(twin)
    read = {node.target for node in twin.graph.nodes if node.op == "get_attr"}
    assert {buffer for buffer, _ in twin.named_buffers()} == read
    assert not {layer.initializer for layer in prepared.layers} & read


def test_a_shared_weight_is_quantized_and_folded_once(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["shared"]
    twin = _canonical(prepared, images(prepared, 2))
    InsertWeightQuantizers(_codes(prepared, "int4"))(twin)
    calls = [node for node in twin.graph.nodes if node.op == "call_module"]
    assert len(calls) == 3
    assert len({node.target for node in calls}) == len(_quantizers(twin)) == 2
    notes = FoldWeights()(twin).notes
    assert notes == ("2 constants folded",)


def test_layers_without_codes_stay_float(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    sample = images(prepared, 2)
    twin = _canonical(prepared, sample)
    codes = _codes(prepared, "int2")
    result = InsertWeightQuantizers({"w2": codes["w2"]})(twin)
    assert (result.modified, result.notes) == (True, ("1 weights quantized",))
    sources = {node.meta["layer"]: weight_source(node).op for node in twin.graph.nodes if is_layer(node)}
    assert sources == {"w1": "get_attr", "w2": "call_module", "w3": "get_attr"}


def test_nothing_to_do_is_no_change(networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["plain"], 2)
    pipeline = Pipeline((InsertWeightQuantizers({}), FoldWeights()), sample)
    pipeline(_canonical(networks["plain"], sample))
    assert pipeline.notes == []


def test_an_unknown_layer_is_an_error(networks: dict[str, Prepared], images: Images) -> None:
    codes = _codes(networks["plain"], "int2")
    twin = _canonical(networks["plain"], images(networks["plain"], 2))
    with pytest.raises(VerificationError, match=r"^ghost, w4: no call in the graph"):
        InsertWeightQuantizers({**codes, "w4": codes["w1"], "ghost": codes["w1"]})(twin)


def test_a_float_product_folds_too(networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["mlp"], 2)
    twin = _canonical(networks["mlp"], sample)
    transposes = [node for node in twin.graph.nodes if node.target is torch.t]
    pipeline = Pipeline((FoldWeights(),), sample)
    pipeline(twin)
    assert pipeline.notes == [f"{len(transposes)} constants folded"] == ["3 constants folded"]
    shapes = [tuple(constant_of(twin, weight_source(n)).shape) for n in twin.graph.nodes if is_layer(n)]
    assert shapes == [(12, 32), (8, 12), (4, 8)]


def test_gradients_reach_the_image(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["residual"]
    twin = InsertWeightQuantizers(_codes(prepared, "int4"))(_canonical(prepared, images(prepared, 2))).graph
    FoldWeights()(twin)
    sample = images(prepared, 2).requires_grad_()
    twin(sample).sum().backward()
    assert sample.grad is not None
    assert sample.grad.abs().sum() > 0


def test_the_graph_that_was_copied_is_untouched(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    sample = images(prepared, 2)
    twin = _canonical(prepared, sample)
    before = twin(sample)
    changed = InsertWeightQuantizers(_codes(prepared, "int1"))(copy.deepcopy(twin)).graph
    FoldWeights()(changed)
    assert torch.equal(twin(sample), before)
    assert not torch.allclose(changed(sample), before)


@pytest.mark.parametrize("taken", ["w1_quantizer", "w1_quantizer_folded", "w2_quantizer"])
def test_a_network_with_names_like_ours(taken: str, network: Callable[[str], Prepared], images: Images) -> None:
    prepared = network(
        f"""(float[n,2,4,4] x, float[2,1,1] {taken}, float[2,2,1,1] w1, float[2,2,1,1] w2) => (float[n,32] y) {{
            a = Mul (x, {taken})
            c = Conv (a, w1)
            d = Conv (c, w2)
            y = Flatten (d)
        }}"""
    )
    sample, codes = images(prepared, 2), _codes(prepared, "int2")
    twin = _canonical(prepared, sample)
    Pipeline((InsertWeightQuantizers(codes), FoldWeights()), sample)(twin)
    assert relative_change(_by_hand(prepared, codes)(sample), twin(sample)) <= 1e-6


def test_free_names(networks: dict[str, Prepared]) -> None:
    twin = build_twin(networks["plain"])
    assert [free_name(twin, name) for name in ("w1", "training", "free")] == ["w1_2", "training_2", "free"]


def test_the_origin_of_a_weight(networks: dict[str, Prepared], images: Images) -> None:
    twin = _canonical(networks["mlp"], images(networks["mlp"], 2))
    found: list[Node] = [weight_source(node) for node in twin.graph.nodes if is_layer(node)]
    assert [(node.op, node.meta["value"]) for node in found] == [("get_attr", f"w{i}") for i in (1, 2, 3)]
