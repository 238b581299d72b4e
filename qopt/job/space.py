"""Build the search space: candidates per layer with their norms and what each does to the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from qopt.errors import UsageError
from qopt.graph.model import Layer
from qopt.hardware.cost_model import LayerDescription
from qopt.job.lipschitz_limit import lipschitz_graph, lipschitz_limit, with_operator_norms
from qopt.job.prices import check_memory, fixed_costs
from qopt.job.probes import input_moments
from qopt.job.run import Run
from qopt.job.sensitivity import divergences, with_sensitivities
from qopt.measure.norms import candidate_norms, layer_norms, weighted_errors
from qopt.search.space import Candidate, LayerSpace, Moment, Space, column_of
from qopt.spec import WeightSpec


def build_space(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]], *, measured: bool) -> Space:
    """All layers with their ``candidates`` (`capable`).

    Their sensitivities are those that the options ask for where the strategy uses them (``measured``), else squared
    relative errors of the weights, which need no images.

    Raises:
        InfeasibleError: the activations alone take more memory than a limit allows.
    """
    check_memory(run)
    moments = _moments(run) if measured and run.data is not None else {}
    table = divergences(run, candidates) if measured else {}
    run.progress("norms of every candidate")
    layers = tuple(
        layer_space(run, layer, candidates[layer.name], moments.pop(layer.name, None)) for layer in run.prepared.layers
    )
    layers = with_sensitivities(run, layers, table) if measured else layers
    fixed, steps = fixed_costs(run, candidates), moments_of(run)
    if lipschitz_limit(run) is None or not any(candidates.values()):
        return Space(layers, run.target.limits, fixed=fixed, moments=steps)
    run.progress("operator norms of every candidate")
    graph = lipschitz_graph(run)
    layers = with_operator_norms(run, graph, layers)
    return Space(layers, run.target.limits, potentials=graph.potentials, fixed=fixed, moments=steps)


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
    return takes(run, run.network.layer(layer.name), mixed)


def takes(run: Run, described: LayerDescription, spec: WeightSpec) -> bool:
    """Whether every cost model of the target takes the format for a layer."""
    return all(model.capabilities(described, (spec,)) for model in run.cost_models)


def price(run: Run, described: LayerDescription, spec: WeightSpec) -> dict[str, float]:
    """All that the cost models of the target ask for a layer in a format, by column; memory while it runs, too."""
    found = dict[str, float]()
    for model in run.cost_models:
        costs = model.layer_cost(described, spec)
        found |= {column_of(quantity, model.name): cost for quantity, cost in costs.items()}
        if model.knows_memory:
            found[column_of("sram", model.name)] = model.weight_memory(described, spec)
    return found


def costs_of(priced: Mapping[str, float]) -> dict[str, float]:
    """Of a `price` what `Candidate.costs` holds: all but storage."""
    return {column: cost for column, cost in priced.items() if column not in ("code_bits", "bytes")}


def moments_of(run: Run) -> tuple[Moment, ...]:
    """The steps at which weights and activations share a memory that a limit bounds."""
    return tuple(
        Moment(step.place, column_of("sram", model.name), step.base, step.layers)
        for model in run.cost_models
        for step in model.step_memory(run.network.layers, run.network.steps)
    )


def layer_space(run: Run, layer: Layer, formats: tuple[WeightSpec, ...], moment: Tensor | None) -> LayerSpace:
    """A layer with the facts of each format; the sensitivity is the square of its relative error.

    ``moment`` is that of its inputs, for the weighted errors, or None.
    """
    norm, row_norm = layer_norms(run.weights, layer, run.cache)
    candidates = []
    weighted = [None] * len(formats) if moment is None else weighted_errors(run.weights, layer, formats, moment)
    for spec, weighted_error in zip(formats, weighted, strict=True):
        norm_q, error, row_error = candidate_norms(run.weights, layer, spec, run.cache)
        cost = price(run, run.network.layer(layer.name), spec)
        relative = error.value / norm.value if norm.value > 0 else 0.0
        candidates.append(
            Candidate(
                spec=spec,
                code_bits=cost["code_bits"],
                bytes=int(cost["bytes"]),
                norm=norm_q,
                error=error,
                row_error=row_error,
                weighted=weighted_error,
                sensitivity=relative**2,
                costs=costs_of(cost),
            )
        )
    return LayerSpace(layer.name, layer.weights, norm, row_norm, tuple(candidates))


def _moments(run: Run) -> dict[str, Tensor]:
    run.progress("second moments of layer inputs")
    return input_moments(run, centred=False)
