"""Apply a plan: codes for the weights, ranges for the activations, corrected biases, and the quantized twin."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.emit import integer_parts
from qopt.errors import DataError, PlanError
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.graph.stored import release
from qopt.graph.twin import build_twin
from qopt.passes.annotate import Annotate, quantizable
from qopt.passes.base import Pass, Pipeline
from qopt.passes.calibrate import Calibrate
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.correct_biases import CorrectBiases
from qopt.passes.fold_weights import FoldWeights
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers
from qopt.passes.round_adaround import RoundAdaRound
from qopt.passes.round_biases import RoundBiases
from qopt.passes.round_gptq import RoundGPTQ
from qopt.passes.unshare import Unshare
from qopt.passes.watcher import live_bytes
from qopt.plan import Plan
from qopt.quant import ActivationQuantizer, AffineRange, AnyWeight, RangeObserver
from qopt.quant.large import quantize_large
from qopt.seeds import derive
from qopt.spec import FLOAT_ACTIVATION, ActivationSpec, WeightSpec

BATCH = 64
"""Calibration images per run where the batch axis is dynamic."""

BIAS_IMAGES = 256
"""Calibration images on which biases are corrected, at most."""

ROUNDING_IMAGES = 1024
"""Calibration images that rounding methods see, at most."""

ROUNDINGS = {"gptq": "GPTQ", "adaround": "AdaRound"}
"""What messages call the rounding methods that need images."""

ADAROUND_BATCH = 32
"""Images per training step of AdaRound where the batch axis is dynamic."""

ACTIVATION_BYTES = 1 << 29
"""The activations that passes which run all their images side by side may hold at once; fewer images where more."""

CODES_KEPT = 1 << 25
"""Codes of one byte that are kept beside the network while formats are compared; what does not fit is made again."""

CODES_KEPT_WITH_TWIN = 1 << 28
"""The same where images are run through the network, which needs more memory than its codes and asks for them often."""


@dataclass(frozen=True, eq=False)
class AppliedWeights:
    """A plan made real.

    Attributes:
        plan: the plan with the ranges it was applied with.
        quantized: codes, biases and ranges by name, for the emitter.
        seconds: pass name to the time it took.
        notes: what the passes said.
    """

    plan: Plan
    quantized: Quantized
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


@final
@dataclass(frozen=True, eq=False)
class Applied(AppliedWeights):
    """A plan made real with its twin.

    Attributes:
        graph: the quantized twin, weights folded, gradients straight through.
    """

    graph: GraphModule


@dataclass
class WeightOnly:
    """Turns plans that leave activations in float into codes, for any network: nothing needs to be run.

    Attributes:
        prepared: the float network.
        notes: what was done to it.
    """

    prepared: Prepared
    notes: list[str] = field(default_factory=list, kw_only=True)
    _weights: dict[tuple[str, WeightSpec], AnyWeight] = field(default_factory=dict, kw_only=True)
    _kept: int = field(default=CODES_KEPT, init=False)

    def weight(self, layer: Layer) -> Tensor:
        """The float weight of a layer, in its stored orientation; perhaps the network's own, not to be changed.

        Of a file that weights stay in, the pages of other layers are given back.
        """
        release(self.prepared.model)
        stored = self.prepared.initializer(layer.initializer)
        return torch.from_numpy(stored if stored.flags.writeable and stored.dtype == np.float32 else stored.copy())

    def quantized_weight(self, layer: Layer, spec: WeightSpec) -> AnyWeight:
        """The codes of a layer in a format, computed once as long as there is room for all."""
        key = (layer.name, spec)
        if key in self._weights:
            return self._weights[key]
        found = quantize_large(self.weight(layer), spec, layer.channel_axis, where=layer.name)
        if layer.weights <= self._kept:
            self._kept -= layer.weights
            self._weights[key] = found
        return found

    def apply(self, plan: Plan) -> AppliedWeights:
        """Make ``plan`` real.

        Raises:
            PlanError: it was made for another network, names what this one does not have, or asks for what needs
                images: activation formats, bias correction, rounding by GPTQ or AdaRound.
        """
        asked = {
            "defaults.activations": plan.defaults.activations != str(FLOAT_ACTIVATION),
            "activations": any(spec != str(FLOAT_ACTIVATION) for spec in plan.activations.values()),
            "ranges": bool(plan.ranges),
            "bias_correction": plan.bias_correction,
            "rounding": plan.rounding != "nearest",
        }
        wrong = next((key for key, is_asked in asked.items() if is_asked), None)
        if wrong is not None:
            raise PlanError(
                "the plan asks for more than weights", where=f"key '{wrong}'",
                got=f"a network that images cannot be run through: {self.prepared.other or 'it has no twin'}",
                fix="leave activations float, rounding nearest and bias_correction false",
            )  # fmt: skip
        return AppliedWeights(plan, Quantized(self._codes(plan)), {}, ())

    def _codes(self, plan: Plan) -> dict[str, AnyWeight]:
        """Layer to its codes, all rounded to nearest; layers that stay float are absent."""
        if plan.model not in ("", self.prepared.digest):
            raise PlanError(
                "the plan was made for another model", where="model", expected=self.prepared.digest[:12],
                got=plan.model[:12], fix="leave the plan's model empty to apply it to any",
            )  # fmt: skip
        specs = plan.weight_specs([layer.name for layer in self.prepared.layers])
        return {
            layer.name: self.quantized_weight(layer, specs[layer.name])
            for layer in self.prepared.layers
            if not specs[layer.name].is_float
        }


@final
@dataclass
class Quantizer(WeightOnly):
    """Turns plans for a classifier of images into quantized networks; what plans have in common is computed once.

    Attributes:
        calibration: images float32 (n, ...) as the network takes them, or None where there is no data; kept in whole
            batches where the graph takes one batch size only.
        float_graph: the float twin in canonical form, its activations marked; shared, never changed.
        notes: what was done to the network, and what the passes that made ``float_graph`` said.
        seconds: name of each of them to the time it took.

    Raises:
        DataError: calibration images that the network does not take.
        UnsupportedModelError: an operator that the twin does not have.
    """

    calibration: Tensor | None = None
    float_graph: GraphModule = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    _observers: dict[str, RangeObserver] = field(default_factory=dict)
    _bounds: dict[tuple[str, ActivationSpec], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = CODES_KEPT_WITH_TWIN
        if self.calibration is not None:
            self.calibration = whole_batches(_checked(self.calibration, self.prepared), self.prepared.batch)
        pipeline = Pipeline((Unshare(), CanonicaliseLinear(), Annotate()), self.sample)
        self.float_graph = pipeline(build_twin(self.prepared))
        self.notes += pipeline.notes
        self.seconds.update(pipeline.seconds)

    @property
    def sample(self) -> Tensor:
        """Images on which passes are verified: two where the batch axis allows it."""
        count = self.prepared.batch or 2
        generator = torch.Generator().manual_seed(derive(0, "passes", "sample"))
        return torch.rand(count, *self.prepared.input_shape, generator=generator)

    @property
    def tensors(self) -> dict[str, list[str]]:
        """Quantizable activation tensors, each with the values that carry its codes."""
        return quantizable(self.float_graph)

    def activation(self, name: str, spec: ActivationSpec) -> ActivationQuantizer:
        """What rounds a tensor's values to a format that is not float, over the range observed on the images.

        Raises:
            PlanError: there are no images.
            DataError: a range that no codes cover.
        """
        return ActivationQuantizer(_affine(name, self._observed({name: spec})[name], spec.bits))

    def apply(self, plan: Plan) -> Applied:
        """Make ``plan`` real.

        Raises:
            PlanError: it was made for another network, names what this one does not have, or asks without data for
                what needs images: activations without ranges, bias correction, rounding by GPTQ.
        """
        weights = self._codes(plan)
        plan = plan.with_changes(ranges=self._ranges(plan))
        activations = self._activations(plan)
        rounders = self._rounders(plan) if weights else []
        steps: list[Pass] = [InsertWeightQuantizers(weights), InsertActivationQuantizers(activations), *rounders]
        first = Pipeline(steps, self.sample)
        graph = first(copy.deepcopy(self.float_graph))
        biases: dict[tuple[str, int], Tensor] = {}
        for rounder in rounders:
            weights |= rounder.weights if not isinstance(rounder, CorrectBiases) else {}
            biases |= rounder.biases
        quantized = Quantized(weights, biases, activations)
        second = Pipeline((RoundBiases(self._kernel_biases(quantized)), FoldWeights()), self.sample)
        graph = second(graph)
        return Applied(plan, quantized, first.seconds | second.seconds, (*first.notes, *second.notes), graph)

    def _kernel_biases(self, quantized: Quantized) -> dict[tuple[str, int], Tensor]:
        """What the integer kernels of the emitted file will add, for the layers that run on them."""
        return {
            (name, use): torch.from_numpy(bias.values)
            for name, part in integer_parts(self.prepared, quantized).items()
            for use, bias in part.biases.items()
        }

    def _quantized_tensors(self, plan: Plan) -> dict[str, ActivationSpec]:
        return {name: spec for name, spec in plan.activation_specs(self.tensors).items() if not spec.is_float}

    def _ranges(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """The plan's own ranges where it has them, observed ones for every other tensor it quantizes."""
        specs = self._quantized_tensors(plan)
        missing = {name: spec for name, spec in specs.items() if name not in plan.ranges}
        known = {**plan.ranges, **(self._observed(missing) if missing else {})}
        return {name: known[name] for name in specs}

    def _observed(self, specs: Mapping[str, ActivationSpec]) -> dict[str, tuple[float, float]]:
        if self.calibration is None:
            raise PlanError(
                "the plan quantizes activations and there is nothing to calibrate them on",
                where=next(iter(specs)), fix="give --data, or ranges in the plan",
            )  # fmt: skip
        calibrate = Calibrate(self.calibration, self.prepared.batch or BATCH, dict(self._observers))
        if not self._observers:
            Pipeline((calibrate,), self.sample)(self.float_graph)
            self._observers.update(calibrate.observers)  # only now: what an error cut short must not be used later
        found = calibrate.bounds({n: spec for n, spec in specs.items() if (n, spec) not in self._bounds})
        self._bounds.update({(name, specs[name]): bounds for name, bounds in found.items()})
        return {name: self._bounds[name, spec] for name, spec in specs.items()}

    def _activations(self, plan: Plan) -> dict[str, AffineRange]:
        ranges = {
            name: _affine(name, plan.ranges[name], spec.bits) for name, spec in self._quantized_tensors(plan).items()
        }
        return {value: ranges[name] for name, values in self.tensors.items() if name in ranges for value in values}

    def _rounders(self, plan: Plan) -> list[CorrectBiases | RoundGPTQ | RoundAdaRound]:
        """The passes that better the codes to nearest or the biases beside them, in order; AdaRound follows GPTQ."""
        batch, centred = self.prepared.batch or BATCH, plan.bias_correction
        if plan.rounding == "nearest":
            if not centred:
                return []
            images = self._images(BIAS_IMAGES, 1, "bias correction", "bias_correction")
            return [CorrectBiases(images, self.float_graph, batch)]
        images = self._images(ROUNDING_IMAGES, 2, f"rounding by {ROUNDINGS[plan.rounding]}", "rounding")
        found: list[CorrectBiases | RoundGPTQ | RoundAdaRound] = [
            RoundGPTQ(images, self.float_graph, batch, centred=centred)
        ]
        if plan.rounding == "adaround":
            small = self.prepared.batch or ADAROUND_BATCH
            found.append(
                RoundAdaRound(
                    images, self.float_graph, small, granularity="block", seed=derive(0, "adaround"), centred=centred
                )
            )
        return found

    def _images(self, most: int, networks: int, what: str, key: str) -> Tensor:
        """The first calibration images, as many as fit into memory where ``networks`` run all of them side by side."""
        if self.calibration is None:
            raise PlanError(f"{what} needs images", where=key, fix="give --data")
        batch = self.prepared.batch or 1
        held = networks * live_bytes(self.float_graph, self.calibration[:batch])
        return self.calibration[: max(min(most // batch, ACTIVATION_BYTES // held), 1) * batch]


def whole_batches(images: Tensor, batch: int | None) -> Tensor:
    """``images`` (n, ...) in a number that a graph bound to ``batch`` takes; all of them where ``batch`` is None.

    A remainder is left out; fewer images than one batch are repeated until they fill it.
    """
    if batch is None:
        return images
    if len(images) < batch:
        return images[torch.arange(batch) % len(images)]
    return images[: len(images) // batch * batch]


def _affine(name: str, bounds: tuple[float, float], bits: int) -> AffineRange:
    try:
        return AffineRange.from_bounds(*bounds, bits)
    except DataError as error:
        raise error.at(f"key 'ranges.{name}'") from error


def _checked(images: Tensor, prepared: Prepared) -> Tensor:
    if images.shape[1:] != prepared.input_shape or not len(images) or images.dtype != torch.float32:
        raise DataError(
            "calibration images that the network does not take",
            expected=f"float32 ({', '.join(['n', *map(str, prepared.input_shape)])})",
            got=f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}",
        )
    return images
