"""Algorithm 1's format of every layer by the lazy route: few norms are computed, the answer is that of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qopt.cache import digest_arrays
from qopt.graph.model import Layer
from qopt.job.run import Run
from qopt.lipschitz.decide import CandidateNorms, choose
from qopt.measure.norms import layer_norms
from qopt.search.lipschitz import METHODS
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec


def narrowed(run: Run, candidates: Mapping[str, Sequence[WeightSpec]]) -> dict[str, tuple[WeightSpec, ...]]:
    """Layer to the one of its ``candidates`` that `LipschitzSearch` takes of them; kept by content.

    All candidates stay where one method has none, and in networks whose weights stay in their file: the lazy route
    holds every candidate of a layer at once.
    """
    run.progress("thresholds of Algorithm 1")
    return {layer.name: _narrowed(run, layer, tuple(candidates[layer.name])) for layer in run.prepared.layers}


def _narrowed(run: Run, layer: Layer, formats: tuple[WeightSpec, ...]) -> tuple[WeightSpec, ...]:
    sides = [sorted((s for s in formats if s.kind == kind), key=lambda s: s.bits) for kind in METHODS]
    if run.streamed or not all(sides):
        return formats
    weight = run.weights.weight(layer)
    key = {
        "weight": digest_arrays(weight.numpy()), "axis": layer.channel_axis, "groups": layer.groups,
        "formats": [[str(spec) for spec in side] for side in sides],
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        whole, _ = layer_norms(run.weights, layer, run.cache)

        def norms(spec: WeightSpec) -> CandidateNorms:
            quantized = run.weights.quantized_weight(layer, spec).dequantize()
            return CandidateNorms.of(weight, quantized, whole, layer.channel_axis, layer.groups, where=layer.name)

        linear, log = ([norms(spec) for spec in side] for side in sides)
        chosen, _ = choose(linear, log, *paper_thresholds(whole.value))
        return {"place": np.array(next(i for i, one in enumerate([*linear, *log]) if one is chosen))}

    place = int(run.cache.arrays("algorithm-1", key, compute)["place"])
    return ([*sides[0], *sides[1]][place],)
