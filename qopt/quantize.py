"""Apply a plan: codes for the weights, ranges for the activations, corrected biases, and the quantized twin."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.errors import PlanError
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.graph.twin import build_twin
from qopt.passes.annotate import Annotate, quantizable
from qopt.passes.base import Pass, Pipeline
from qopt.passes.calibrate import Calibrate
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.correct_biases import CorrectBiases
from qopt.passes.fold_weights import FoldWeights
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers
from qopt.passes.unshare import Unshare
from qopt.plan import Plan
from qopt.quant import AffineRange, QuantizedWeight, RangeObserver, quantize_weight
from qopt.spec import WeightSpec

BIAS_IMAGES = 256
"""Calibration images that bias correction runs through the network at once."""


@final
@dataclass(frozen=True, eq=False)
class Applied:
    """A plan made real.

    Attributes:
        plan: the plan with the ranges it was applied with.
        quantized: codes, biases and ranges by name, for the emitter.
        graph: the quantized twin, weights folded, gradients straight through.
        seconds: pass name to the time it took.
        notes: what the passes said.
    """

    plan: Plan
    quantized: Quantized
    graph: GraphModule
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


@final
@dataclass
class Quantizer:
    """Turns plans for one network into quantized networks; what plans have in common is computed once.

    Attributes:
        prepared: the float network.
        calibration: images (n, ...) as the network takes them, or None where there is no data.
        float_graph: the float twin in canonical form, its activations marked; shared, never changed.
    """

    prepared: Prepared
    calibration: Tensor | None = None
    float_graph: GraphModule = field(init=False)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _weights: dict[tuple[str, WeightSpec], QuantizedWeight] = field(default_factory=dict)
    _observers: dict[str, RangeObserver] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pipeline = Pipeline((Unshare(), CanonicaliseLinear(), Annotate()), self.sample)
        self.float_graph = pipeline(build_twin(self.prepared))
        self.notes += pipeline.notes
        self.seconds.update(pipeline.seconds)

    @property
    def sample(self) -> Tensor:
        """Images on which passes are verified: two where the batch axis allows it."""
        count = self.prepared.batch or 2
        generator = torch.Generator().manual_seed(0)
        return torch.rand(count, *self.prepared.input_shape, generator=generator)

    @property
    def tensors(self) -> dict[str, list[str]]:
        """Quantizable activation tensors, each with the values that carry its codes."""
        return quantizable(self.float_graph)

    def weight(self, layer: Layer) -> Tensor:
        """The float weight of a layer, in its stored orientation."""
        return torch.from_numpy(self.prepared.initializer(layer.initializer).copy())

    def quantized_weight(self, layer: Layer, spec: WeightSpec) -> QuantizedWeight:
        """The codes of a layer in a format, computed once."""
        key = (layer.name, spec)
        if key not in self._weights:
            self._weights[key] = quantize_weight(self.weight(layer), spec, layer.channel_axis, where=layer.name)
        return self._weights[key]

    def apply(self, plan: Plan) -> Applied:
        """Make ``plan`` real.

        Raises:
            PlanError: it names what the network does not have, or quantizes activations without ranges or data.
        """
        specs = plan.weight_specs([layer.name for layer in self.prepared.layers])
        plan = plan.with_changes(ranges=self._ranges(plan))
        weights = {
            layer.name: self.quantized_weight(layer, specs[layer.name])
            for layer in self.prepared.layers
            if not specs[layer.name].is_float
        }
        activations = self._activations(plan)
        corrector = self._corrector() if plan.bias_correction else None
        steps: list[Pass] = [InsertWeightQuantizers(weights), InsertActivationQuantizers(activations)]
        steps += [corrector] if corrector else []
        pipeline = Pipeline((*steps, FoldWeights()), self.sample)
        graph = pipeline(copy.deepcopy(self.float_graph))
        quantized = Quantized(weights, dict(corrector.biases) if corrector else {}, activations)
        return Applied(plan, quantized, graph, pipeline.seconds, tuple(pipeline.notes))

    def _ranges(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """The plan's own ranges where it has them, observed ones for every other tensor it quantizes."""
        specs = {n: s for n, s in plan.activation_specs(self.tensors).items() if not s.is_float}
        missing = {name: spec.percentile for name, spec in specs.items() if name not in plan.ranges}
        ranges = {name: plan.ranges[name] for name in specs if name in plan.ranges}
        if missing:
            ranges |= self._observed(missing)
        return {name: ranges[name] for name in specs}

    def _observed(self, percentiles: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        if self.calibration is None:
            raise PlanError(
                "the plan quantizes activations and there is nothing to calibrate them on",
                where=next(iter(percentiles)), fix="give --data, or ranges in the plan",
            )  # fmt: skip
        calibrate = Calibrate(self.calibration, self.prepared.batch or 64, self._observers)
        if not self._observers:
            Pipeline((calibrate,), self.sample)(self.float_graph)
        return calibrate.bounds(percentiles)

    def _activations(self, plan: Plan) -> dict[str, AffineRange]:
        specs = plan.activation_specs(self.tensors)
        return {
            value: AffineRange.from_bounds(*plan.ranges[name], specs[name].bits)
            for name, values in self.tensors.items()
            if not specs[name].is_float
            for value in values
        }

    def _corrector(self) -> CorrectBiases:
        if self.calibration is None:
            raise PlanError("bias correction needs images", where="bias_correction", fix="give --data")
        count = BIAS_IMAGES if self.prepared.batch is None else self.prepared.batch
        return CorrectBiases(self.calibration[:count], self.float_graph)
