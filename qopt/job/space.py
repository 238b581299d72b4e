"""Build the search space: candidates per layer with their norms and what each does to the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qopt.cache import digest_arrays
from qopt.data import Split
from qopt.errors import UsageError
from qopt.graph.model import Layer, Prepared
from qopt.job.lipschitz_limit import lipschitz_graph, lipschitz_limit, with_operator_norms
from qopt.job.prices import check_memory, fixed_costs
from qopt.job.run import Run
from qopt.measure.divergence import Probe, layer_sensitivities
from qopt.measure.norms import candidate_norms, layer_norms, weighted_errors
from qopt.passes.base import Pipeline
from qopt.passes.observe_moments import ObserveMoments
from qopt.quantize import whole_batches
from qopt.search.space import Candidate, LayerSpace, Space, column_of
from qopt.spec import WeightSpec

MOMENT_IMAGES = 64
"""Clean and as many adversarial images on which input moments are observed."""

BATCH = 32
"""Images per run where the batch axis is dynamic: activations, and gradients where needed, are in memory at once."""

SENSITIVITY_IMAGES = 128
"""Images on which layers are quantized one at a time: sensitivities differ by orders of magnitude."""

SENSITIVITY_MACS = 5 * 10**12
"""Multiplications for all of it, minutes on two cores; fewer images, but `LEAST_SENSITIVITY_IMAGES`, where more."""

LEAST_SENSITIVITY_IMAGES = 8
"""One image of 1000 classes tells more than one of ten."""

Sensitivities = Mapping[tuple[str, WeightSpec], float]


def build_space(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]], *, measured: bool) -> Space:
    """All layers with their ``candidates`` (`capable`).

    With ``measured`` and data, sensitivities are KL divergences of one layer quantized at a time; without data they
    are squared relative errors of the weights.

    Raises:
        InfeasibleError: the activations alone take more memory than a limit allows.
    """
    check_memory(run)
    moments = _moments(run) if measured and run.data is not None else {}
    sensitivities = _sensitivities(run, candidates) if measured and run.data is not None else {}
    run.progress("norms of every candidate")
    layers = tuple(
        _layer_space(run, layer, candidates[layer.name], moments.pop(layer.name, None), sensitivities)
        for layer in run.prepared.layers
    )  # fmt: skip
    fixed = fixed_costs(run, candidates)
    if lipschitz_limit(run) is None or not any(candidates.values()):
        return Space(layers, run.target.limits, fixed=fixed)
    run.progress("operator norms of every candidate")
    graph = lipschitz_graph(run)
    layers = with_operator_norms(run, graph, layers)
    return Space(layers, run.target.limits, potentials=graph.potentials, fixed=fixed)


def capable(run: Run, formats: tuple[WeightSpec, ...]) -> dict[str, tuple[WeightSpec, ...]]:
    """Layer to those of ``formats`` that every cost model of the target takes there.

    Raises:
        UsageError: a cost model takes none of them.
    """
    found = {}
    for layer in run.network.layers:
        kept = formats
        for model in run.cost_models:
            left = model.capabilities(layer, kept)
            if kept and not left:
                raise UsageError(
                    f"{model.name} takes none of the formats for a layer", where=f"layer {layer.name}",
                    got=", ".join(map(str, kept)), fix="leave out a target, or quantize activations: give --data",
                )  # fmt: skip
            kept = left
        found[layer.name] = kept
    return found


def takes_rows(run: Run, layer: Layer, formats: Sequence[WeightSpec]) -> bool:
    """Whether every cost model of the target takes a weight whose output channels differ in format."""
    mixed = WeightSpec.of_rows([formats[i % len(formats)] for i in range(layer.channels)])
    return all(model.capabilities(run.network.layer(layer.name), (mixed,)) for model in run.cost_models)


def price(run: Run, layer: Layer, spec: WeightSpec) -> dict[str, float]:
    """All that the cost models of the target ask for a layer in a format, by column."""
    described = run.network.layer(layer.name)
    return {
        column_of(quantity, model.name): cost
        for model in run.cost_models
        for quantity, cost in model.layer_cost(described, spec).items()
    }


def _layer_space(
    run: Run,
    layer: Layer,
    formats: tuple[WeightSpec, ...],
    moment: Tensor | None,
    sensitivities: Sensitivities,
) -> LayerSpace:
    norm, row_norm = layer_norms(run.weights, layer, run.cache)
    candidates = []
    weighted = [None] * len(formats) if moment is None else weighted_errors(run.weights, layer, formats, moment)
    for spec, weighted_error in zip(formats, weighted, strict=True):
        norm_q, error, row_error = candidate_norms(run.weights, layer, spec, run.cache)
        cost = price(run, layer, spec)
        relative = error.value / norm.value if norm.value > 0 else 0.0
        candidates.append(
            Candidate(
                spec=spec,
                code_bits=cost.pop("code_bits"),
                bytes=int(cost.pop("bytes")),
                norm=norm_q,
                error=error,
                row_error=row_error,
                weighted=weighted_error,
                sensitivity=sensitivities.get((layer.name, spec), relative**2),
                costs=cost,
            )
        )
    return LayerSpace(layer.name, layer.weights, norm, row_norm, tuple(candidates))


def probe_images(run: Run, part: str) -> tuple[Tensor, Tensor | None]:
    """The first images of a part, clean, and with ``robust`` the adversarial ones made from them."""
    split = _split(run, part)
    clean = torch.from_numpy(split.first(run.probe_images).images)
    return clean, run.adversarial(part, split) if run.options.robust else None


def withstood(run: Run, part: str) -> Tensor:
    """Which of the adversarial `probe_images` the float network gets right, bool (n,): no plan can keep the others."""
    return run.withstood(part, _split(run, part))


def _split(run: Run, part: str) -> Split:
    assert run.data is not None
    return run.data.calibrate if part == "calibrate" else run.data.select


def _sensitivities(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]]) -> Sensitivities:
    run.progress("sensitivity of every layer and format")
    clean, adversarial = probe_images(run, "calibrate")
    images = clean if adversarial is None else _hardest(clean, adversarial, withstood(run, "calibrate"))
    images = images[: _affordable(run.prepared, candidates)]
    pairs = [(name, spec) for name, specs in candidates.items() for spec in specs]
    key = {
        "model": run.prepared.digest, "images": digest_arrays(images.numpy()), "pairs": [[n, str(s)] for n, s in pairs],
        "normalisation": [run.options.mean, run.options.std],
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        twin = run.float_twin
        found = layer_sensitivities(run.quantizer, twin, Probe.of(twin, images), candidates)
        return {"values": np.array([found[pair] for pair in pairs])}

    values = run.cache.arrays("sensitivities", key, compute)["values"]
    return {pair: float(value) for pair, value in zip(pairs, values, strict=True)}


def _affordable(prepared: Prepared, candidates: Mapping[str, tuple[WeightSpec, ...]]) -> int:
    """On how many images sensitivities are measured: each version of a layer runs all layers after it, too."""
    after, macs = 0, 0
    for layer in reversed(prepared.layers):
        after += layer.macs
        macs += after * len(candidates[layer.name])
    return int(min(max(SENSITIVITY_MACS // max(macs, 1), LEAST_SENSITIVITY_IMAGES), SENSITIVITY_IMAGES))


def _hardest(clean: Tensor, adversarial: Tensor, held: Tensor) -> Tensor:
    """Every image as hard as the float network withstands it: what a plan can keep, and only that, is to be kept."""
    return torch.where(held.view(-1, *[1] * (clean.ndim - 1)), adversarial, clean)


def input_moments(run: Run, *, centred: bool) -> dict[str, Tensor]:
    """Second moments, or covariances, of every layer's inputs over clean and adversarial images alike."""
    clean, adversarial = probe_images(run, "calibrate")
    parts = [clean[:MOMENT_IMAGES]] + ([] if adversarial is None else [adversarial[:MOMENT_IMAGES]])
    images = whole_batches(run.normalisation(torch.cat(parts)), run.prepared.batch)
    observe = ObserveMoments(images, run.prepared.batch or BATCH, centred)
    Pipeline((observe,), run.quantizer.sample)(run.quantizer.float_graph)
    return observe.moments


def _moments(run: Run) -> dict[str, Tensor]:
    run.progress("second moments of layer inputs")
    return input_moments(run, centred=False)
