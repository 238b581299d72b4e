"""Norms of W, W_q and dW bound what numpy computes, and equal weights share one entry of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qopt.cache import Cache
from qopt.graph.model import Layer
from qopt.lipschitz import NormBound
from qopt.measure.norms import candidate_norms, layer_norms, weighted_errors
from qopt.passes.observe_moments import ObserveMoments
from qopt.quantize import Quantizer
from qopt.spec import WeightSpec

SPECS = [WeightSpec.parse(text) for text in ("int1", "int2:tensor:max", "int4", "log4", "int8")]
NOTHING = Cache(None)
LAYERS = [("conv", "w1"), ("conv", "w2"), ("conv", "w3"), ("shared", "w"), ("shared", "w2"), ("static", "w")]
"""Convolutions with one and two groups, a matrix stored by inputs, one stored by outputs."""


def _blocks(layer: Layer, weight: torch.Tensor) -> NDArray[np.float64]:
    """(groups, rows, columns): all weights of one output channel in a row."""
    moved = np.moveaxis(weight.numpy().astype(np.float64), layer.channel_axis, 0)
    return moved.reshape(layer.groups, layer.channels // layer.groups, -1)


def _holds(bound: NormBound, value: float) -> None:
    assert bound.lower <= value * (1 + 1e-12)
    assert bound.upper >= value * (1 - 1e-12)
    assert bound.upper - bound.lower <= 1e-4 * value + 1e-12


def _largest(blocks: NDArray[np.float64], order: float) -> float:
    return max(float(np.linalg.norm(block, order)) for block in blocks)


@pytest.mark.parametrize(("network", "name"), LAYERS)
def test_the_float_weight(network: str, name: str, networks: dict[str, Quantizer]) -> None:
    quantizer = networks[network]
    layer = quantizer.prepared.layer(name)
    blocks = _blocks(layer, quantizer.weight(layer))
    l2, rows = layer_norms(quantizer, layer, NOTHING)
    _holds(l2, _largest(blocks, 2))
    _holds(rows, _largest(blocks, np.inf))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("network", "name"), LAYERS)
def test_the_quantized_weight_and_its_error(
    network: str, name: str, spec: WeightSpec, networks: dict[str, Quantizer]
) -> None:
    quantizer = networks[network]
    layer = quantizer.prepared.layer(name)
    quantized = _blocks(layer, quantizer.quantized_weight(layer, spec).dequantize())
    error = _blocks(layer, quantizer.weight(layer)) - quantized
    norm, error_l2, error_rows = candidate_norms(quantizer, layer, spec, NOTHING)
    _holds(norm, _largest(quantized, 2))
    _holds(error_l2, _largest(error, 2))
    _holds(error_rows, _largest(error, np.inf))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("network", "name"), LAYERS)
def test_the_weighted_error(
    network: str, name: str, spec: WeightSpec, networks: dict[str, Quantizer], images: Callable[..., torch.Tensor]
) -> None:
    """``||dW R||_2`` is the root of the largest eigenvalue of ``dW C dW^T``."""
    quantizer = networks[network]
    layer = quantizer.prepared.layer(name)
    batch = quantizer.prepared.batch
    observe = ObserveMoments(images(quantizer.prepared, 12), batch or 5)
    observe(quantizer.float_graph)
    moments = {key: moment.numpy() for key, moment in observe.moments.items()}

    def norm(blocks: NDArray[np.float64]) -> float:
        gram = np.einsum("gri,gij,gsj->grs", blocks, moments[name], blocks)
        return float(np.sqrt(np.linalg.eigvalsh(gram).max()))

    weight = _blocks(layer, quantizer.weight(layer))
    error = weight - _blocks(layer, quantizer.quantized_weight(layer, spec).dequantize())
    (found,) = weighted_errors(quantizer, layer, [spec], observe.moments[name])
    # the root of a moment of few images is exact to the square root of rounding
    assert found.value == pytest.approx(norm(error) / norm(weight), rel=1e-5)
    assert found.upper - found.lower <= 1e-4


def test_the_cache_gives_back_what_was_computed(networks: dict[str, Quantizer], tmp_path: Path) -> None:
    quantizer, cache = networks["conv"], Cache(tmp_path)
    for layer in quantizer.prepared.layers:
        fresh = (*layer_norms(quantizer, layer, cache), *candidate_norms(quantizer, layer, SPECS[2], cache))
        assert cache.hits == []
        again = Cache(tmp_path)
        assert (*layer_norms(quantizer, layer, again), *candidate_norms(quantizer, layer, SPECS[2], again)) == fresh
        assert again.hits == ["norms", "norms"]
        assert fresh == (
            *layer_norms(quantizer, layer, NOTHING),
            *candidate_norms(quantizer, layer, SPECS[2], NOTHING),
        )


def test_formats_and_weights_do_not_share_entries(networks: dict[str, Quantizer], tmp_path: Path) -> None:
    quantizer, cache = networks["conv"], Cache(tmp_path)
    found = {
        (layer.name, spec): candidate_norms(quantizer, layer, spec, cache)
        for layer in quantizer.prepared.layers
        for spec in SPECS
    }
    assert cache.hits == []
    assert len({bounds[1].value for bounds in found.values()}) == len(found)
