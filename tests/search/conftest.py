"""Search spaces for the tests: made by hand, at random, and from the embedded example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from qopt.api import load
from qopt.cache import Cache
from qopt.graph.prepare import prepare
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.measure.norms import candidate_norms, layer_norms
from qopt.quantize import Quantizer
from qopt.search.lipschitz import LipschitzSearch
from qopt.search.space import Candidate, LayerSpace, Space
from qopt.size import Stored
from qopt.spec import WeightSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_resnet.pt"

MakeSpace = Callable[..., Space]


@pytest.fixture(scope="session")
def make_space() -> MakeSpace:
    """A space from (name, weights, channels, {format: sensitivity}) per layer; norms are all 1."""

    def make(
        layers: Sequence[tuple[str, int, int, dict[str, float]]],
        limits: Sequence[Limit] = (),
        ties: Sequence[Sequence[str]] = (),
    ) -> Space:
        one = NormBound(1.0, 1.0, "given")
        spaces = []
        for name, weights, channels, formats in layers:
            candidates = []
            for text, sensitivity in formats.items():
                spec = WeightSpec.parse(text)
                stored = Stored(weights, channels, spec)
                bits = weights * spec.container_bits
                candidates.append(Candidate(spec, bits, stored.bytes, one, one, one, None, sensitivity))
            spaces.append(LayerSpace(name, weights, one, one, tuple(candidates)))
        return Space(tuple(spaces), tuple(limits), tuple(map(tuple, ties)))

    return make


@pytest.fixture(scope="session")
def random_space(make_space: MakeSpace) -> MakeSpace:
    """Six layers at random, one of which may hold most of the weights, under one limit or two."""

    def make(seed: int, *, dominated: bool, budgets: int) -> Space:
        rng = np.random.default_rng(seed)
        weights = rng.integers(10, 400, 6) * 10
        if dominated:
            weights[rng.integers(6)] = int(weights.sum() * rng.uniform(1, 6))
        layers = []
        for i, count in enumerate(weights):
            scale = 10 ** rng.uniform(-3, 1)
            formats = {
                text: float(scale * rng.uniform(0.3, 1) * 4.0 ** -WeightSpec.parse(text).bits)
                for text in ("int2", "log2", "int4", "log4", "int8")
            }
            layers.append((f"l{i}", int(count), int(rng.integers(1, 40)), formats))
        limits = [Limit("bits", float(rng.uniform(2.2, 7)))]
        space = make_space(layers, limits)
        if budgets == 2:
            least = sum(min(c.bytes for c in layer.candidates) for layer in space.layers) + space.table_bytes
            limits.append(Limit("size", float(int(least * rng.uniform(1.02, 2)))))
        return make_space(layers, limits)

    return make


@pytest.fixture(scope="session")
def example() -> Quantizer:
    """The embedded example, ready to be quantized."""
    return Quantizer(prepare(load(EXAMPLE)))


@pytest.fixture(scope="session")
def example_space(example: Quantizer) -> Space:
    """All formats of Algorithm 1 for every layer of the embedded example, with their norms."""
    cache, layers = Cache(None), []
    for layer in example.prepared.layers:
        norm, row_norm = layer_norms(example, layer, cache)
        candidates = []
        for spec in LipschitzSearch().candidates(()):
            norm_q, error, rows = candidate_norms(example, layer, spec, cache)
            stored = Stored(layer.weights, layer.channels, spec)
            bits = layer.weights * spec.container_bits
            candidates.append(Candidate(spec, bits, stored.bytes, norm_q, error, rows))
        layers.append(LayerSpace(layer.name, layer.weights, norm, row_norm, tuple(candidates)))
    return Space(tuple(layers))
