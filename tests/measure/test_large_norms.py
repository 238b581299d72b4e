"""Large layers: norms in parts, ``||W_q||`` by the triangle inequality, and codes that are kept only while they fit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt import quantize
from qopt.cache import Cache
from qopt.graph.model import Layer, Prepared
from qopt.graph.prepare import prepare
from qopt.lipschitz import NormBound, max_row_sum, reshaped_l2
from qopt.measure import norms
from qopt.measure.norms import candidate_norms, code_norms, layer_norms
from qopt.quantize import WeightOnly
from qopt.search.space import Candidate, LayerSpace
from qopt.search.thresholds import Thresholds
from qopt.spec import WeightSpec

NOTHING = Cache(None)
SPECS = [WeightSpec.parse(text) for text in ("int2", "int4", "log4:max")]


@pytest.fixture(scope="module")
def network(text_model: Callable[..., onnx.ModelProto]) -> Prepared:
    generator = np.random.default_rng(0)
    table, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((300, 64), (64, 48)))
    text = "g (int64[b, s] ids) => (float[b, s, 48] y) { x = Gather(table, ids) y = MatMul(x, w) }"
    return prepare(ir.from_proto(text_model(text, table=table, w=w)))


@pytest.fixture(params=["table", "w"])
def layer(network: Prepared, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layer:
    """A layer of each orientation, counted as large."""
    monkeypatch.setattr(norms, "LARGE", 100)
    return network.layer(request.param)


def close(a: NormBound, b: NormBound) -> None:
    assert (a.lower, a.upper) == pytest.approx((b.lower, b.upper), rel=1e-11)


def test_the_float_norms_are_those_of_the_whole(layer: Layer, network: Prepared) -> None:
    weights = WeightOnly(network)
    spectral, rows = layer_norms(weights, layer, NOTHING)
    close(spectral, reshaped_l2(weights.weight(layer), layer.channel_axis))
    close(rows, max_row_sum(weights.weight(layer), layer.channel_axis))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_candidates_are_enclosed(spec: WeightSpec, layer: Layer, network: Prepared) -> None:
    weights = WeightOnly(network)
    quantized = weights.quantized_weight(layer, spec).dequantize()
    difference = weights.weight(layer).double() - quantized.double()
    norm, error, rows = candidate_norms(weights, layer, spec, NOTHING)
    close(error, reshaped_l2(difference, layer.channel_axis))
    close(rows, max_row_sum(difference, layer.channel_axis))
    exact = reshaped_l2(quantized, layer.channel_axis)
    assert norm.lower <= exact.upper
    assert exact.lower <= norm.upper
    assert norm.upper - norm.lower <= 2 * error.upper * (1 + 1e-9) + 1e-9
    close(code_norms(layer, weights.weight(layer), quantized)[0], exact)


@pytest.mark.parametrize("scale", [0.02, 0.2, 2.0])
def test_the_thresholds_of_the_paper_find_the_norm_itself_where_they_need_it(
    text_model: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Whatever a candidate exceeds its thresholds by, it is what the whole table of norms says."""
    w = scale * np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32)
    network = prepare(ir.from_proto(text_model("g (float[b, 96] x) => (float[b, 64] y) { y = MatMul(x, w) }", w=w)))
    layer, paper, methods = network.layer("w"), Thresholds("paper"), set()
    for text in ("int2", "int3", "int4", "int8", "int4:tensor:max", "log4:max"):
        spec = WeightSpec.parse(text)
        found = []
        for large in (1, 1 << 40):
            monkeypatch.setattr(norms, "LARGE", large)
            facts = candidate_norms(WeightOnly(network), layer, spec, NOTHING)
            space = LayerSpace("w", layer.weights, *layer_norms(WeightOnly(network), layer, NOTHING), ())
            found.append(paper.excess(space, Candidate(spec, 1.0, 1, *facts)))
            methods.add(facts[0].method)
        assert (max(found[0], 1.0)) == pytest.approx(max(found[1], 1.0), rel=1e-9)
    assert "gram+eigvalsh" in methods
    assert any("triangle" in method for method in methods)


def test_an_error_larger_than_the_weight_is_enclosed_too() -> None:
    bound = norms._between(NormBound(1.0, 1.1, "a"), NormBound(3.0, 3.1, "b"))
    assert bound.lower == pytest.approx(1.9)
    assert bound.upper == pytest.approx(4.2)
    zero = norms._between(NormBound(1.0, 1.1, "a"), NormBound(1.0, 1.1, "b"))
    assert zero.lower == 0


def test_codes_that_do_not_fit_are_made_again(network: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "CODES_KEPT", 0)
    spec, table, w = SPECS[1], network.layer("table"), network.layer("w")
    weights = WeightOnly(network)
    weights._kept = w.weights
    kept = weights.quantized_weight(w, spec)
    first, again = (weights.quantized_weight(table, spec) for _ in range(2))
    assert weights.quantized_weight(w, spec) is kept
    assert first is not again
    assert torch.equal(first.dequantize(), again.dequantize())
    assert weights._kept == 0


def test_no_room_is_taken_twice(network: Prepared) -> None:
    weights, layer = WeightOnly(network), network.layer("table")
    before = weights._kept
    for _ in range(3):
        weights.quantized_weight(layer, SPECS[0])
    assert weights._kept == before - layer.weights
