"""The rows of an analysis: each layer's facts with those of its candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from qopt.graph.model import Layer
from qopt.job.run import Run
from qopt.job.space import layer_space
from qopt.lipschitz import NormBound
from qopt.measure import amplification
from qopt.measure.amplification import LayerActivity
from qopt.measure.layer_operators import LayerOperators, all_norms
from qopt.measure.loss_changes import LossChange
from qopt.report.analysis_report import Activity, Bound, CandidateFacts, LayerFacts, Measured, Range
from qopt.search.thresholds import Thresholds, paper_thresholds
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True, eq=False)
class Found:
    """What images told; all empty without.

    Attributes:
        activity: layer to what passes through it.
        moments: layer to the second moment of its inputs; emptied layer by layer, as it is large.
        changes: layer and format to what the loss does.
    """

    activity: Mapping[str, LayerActivity] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    changes: Mapping[tuple[str, WeightSpec], LossChange] = field(default_factory=dict)


def layer_facts(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]], found: Found) -> list[LayerFacts]:
    """All layers in graph order."""
    operators = LayerOperators(run.prepared)
    return [_layer(run, layer, candidates[layer.name], operators, found) for layer in run.prepared.layers]


def _layer(run: Run, layer: Layer, specs: Sequence[WeightSpec], operators: LayerOperators, found: Found) -> LayerFacts:
    reshaped, l2, linf = all_norms(run.weights, layer, operators.of(layer), run.cache)
    weight, activity = run.weights.weight(layer), found.activity.get(layer.name)
    threshold_wq, threshold_dw = paper_thresholds(reshaped.upper)
    rows = _candidates(run, layer, specs, found.moments.pop(layer.name, None))
    return LayerFacts(
        name=layer.name, op=layer.op, shape=list(layer.shape), weights=layer.weights, macs=layer.macs,
        groups=layer.groups, reshaped=_bound(reshaped), operator_l2=None if l2 is None else _bound(l2),
        operator_linf=None if linf is None else _bound(linf), threshold_wq=threshold_wq, threshold_dw=threshold_dw,
        weight_range=Range(low=float(weight.min()), high=float(weight.max())),
        input=None if activity is None else _side(activity.input),
        output=None if activity is None else _side(activity.output),
        candidates=[
            row.model_copy(update={"measured": _measured(found.changes.get((layer.name, spec)))})
            for row, spec in zip(rows, specs, strict=True)
        ],
    )  # fmt: skip


def _candidates(run: Run, layer: Layer, specs: Sequence[WeightSpec], moment: Tensor | None) -> list[CandidateFacts]:
    space = layer_space(run, layer, tuple(specs), moment)
    return [
        CandidateFacts(
            format=str(one.spec), bytes=one.bytes, norm_wq=_bound(one.norm), norm_dw=_bound(one.error),
            paper=Thresholds("paper").excess(space, one), relative=Thresholds("relative", 1.0).excess(space, one),
            weighted=None if one.weighted is None else _bound(one.weighted), measured=None,
        )
        for one in space.candidates
    ]  # fmt: skip


def _bound(bound: NormBound) -> Bound:
    return Bound(lower=bound.lower, upper=bound.upper, method=bound.method)


def _side(side: amplification.Activity) -> Activity:
    return Activity(range=Range(low=side.low, high=side.high), amplification=side.amplification)


def _measured(change: LossChange | None) -> Measured | None:
    if change is None:
        return None
    return Measured(
        robust_loss=change.robust, robust_error=change.robust_error, adversarial_loss=change.adversarial,
        clean_loss=change.clean, divergence=change.divergence,
    )  # fmt: skip
