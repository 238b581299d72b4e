"""What every step of a run shares: the prepared network, the images, the threat model, the target and the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.attacks import PGD, predict
from qopt.cache import Cache, digest_arrays
from qopt.config import Options
from qopt.data import Data, Split
from qopt.graph.model import Prepared
from qopt.graph.stored import stays_in_file
from qopt.hardware.checked import CheckedModel, load_model
from qopt.hardware.describe import NetworkDescription, describe
from qopt.hardware.targets import Target
from qopt.measure.network import Normalisation, TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.plan import Plan
from qopt.quantize import Quantizer, WeightOnly
from qopt.seeds import derive
from qopt.spec import FLOAT_ACTIVATION, ActivationSpec
from qopt.threat import ThreatModel

Progress = Callable[[str], None]
"""Told the name of each step as it begins."""

PROBE_STEPS = 10

PROBE_MACS = 5 * 10**11
"""Multiplications of one pass over the images that plans are compared on; fewer images of a large network."""

LEAST_PROBE_IMAGES = 64
"""As many at least, however large the network."""

CHEAP_MACS = 10**9
"""Multiplications of one image up to which another plan to measure costs seconds."""


@final
@dataclass(frozen=True, eq=False)
class Run:
    """One run of the main job.

    Attributes:
        name: the model's name, for the report.
        prepared: the float network.
        weights: applies plans to it; a `Quantizer` where the network has a twin.
        data: images shaped as the network takes them, or None.
        options: what was asked.
        target: what ``options.target`` stands for, with the limits of ``options`` joined to its own.
        threat: the declared threat model.
        cache: expensive evaluations by content.
        progress: told the name of each step.
        plan: a plan to apply instead of searching, or None.
        unattacked: why only weights are quantized and nothing is attacked, whatever is given; empty for networks with
            a twin.
        narrow: tensors of activations whose format is another than the target's, with their formats.
        left_out: steps that could not be done, and why; filled on the way.
        warnings: what the user must know; filled on the way.
    """

    name: str
    prepared: Prepared
    weights: WeightOnly
    data: Data | None
    options: Options
    target: Target
    threat: ThreatModel
    cache: Cache
    progress: Progress
    plan: Plan | None = None
    unattacked: str = ""
    narrow: Mapping[str, ActivationSpec] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _adversarial: dict[str, Tensor] = field(default_factory=dict)
    _withstood: dict[str, Tensor] = field(default_factory=dict)

    @property
    def quantizer(self) -> Quantizer:
        """What applies plans with the twin, which every network has that images are given for."""
        assert isinstance(self.weights, Quantizer)
        return self.weights

    @property
    def streamed(self) -> bool:
        """Whether weights stay in their file: without images they are never held as a whole, nor is the result."""
        return self.data is None and stays_in_file(self.prepared.model)

    @property
    def probe_images(self) -> int:
        """On how many images plans are compared, at most: what the options say, or what a large network affords."""
        affordable = max(PROBE_MACS // max(self.prepared.macs, 1), LEAST_PROBE_IMAGES)
        return min(self.options.probe_images, affordable)

    @property
    def is_cheap(self) -> bool:
        """Whether normal effort affords further plans."""
        return self.prepared.macs <= CHEAP_MACS

    @property
    def normalisation(self) -> Normalisation:
        """The normalisation that lies outside the network."""
        return Normalisation(self.options.mean, self.options.std)

    @property
    def float_twin(self) -> TwinClassifier:
        """The float network with gradients."""
        return TwinClassifier(self.quantizer.float_graph, self.normalisation, self.prepared.batch)

    @cached_property
    def cost_models(self) -> tuple[CheckedModel, ...]:
        """The target's cost models, loaded and calibrated once and held to their contract."""
        return tuple(load_model(name).calibrated(self.cache, self.progress) for name in self.target.cost_models)

    @cached_property
    def network(self) -> NetworkDescription:
        """What cost models are told of the network: activations as wide as the run has them, float without data.

        A streamed network is not run for the shapes of tensors between its layers.
        """
        return self._network(self.narrow)

    def network_of(self, plan: Plan) -> NetworkDescription:
        """The same with activations as wide as ``plan`` has them."""
        if self.data is None:
            return self.network
        asked = plan.activation_specs(self.quantizer.tensors)
        narrow = {name: spec for name, spec in asked.items() if spec.bits != self.target.activations.bits}
        same = {name: spec.bits for name, spec in narrow.items()} == {n: s.bits for n, s in self.narrow.items()}
        return self.network if same else self._network(narrow)

    def _network(self, narrow: Mapping[str, ActivationSpec]) -> NetworkDescription:
        bits = FLOAT_ACTIVATION.bits if self.data is None else self.target.activations.bits
        values = self.quantizer.tensors if narrow else {}
        differ = {value: spec.bits for name, spec in narrow.items() for value in values[name]}
        return describe(self.prepared, bits, differ, observe=not self.streamed)

    def seed(self, *names: str | int) -> int:
        """The seed for one use of chance."""
        return derive(self.options.seed, *names)

    def adversarial(self, part: str, split: Split) -> Tensor:
        """Examples that PGD makes on the float network from the first images of a part, all steps taken; cached."""
        if part not in self._adversarial:
            self._adversarial[part] = self.attacked(split.first(self.probe_images), self.seed("probe", part))
        return self._adversarial[part]

    def withstood(self, part: str, split: Split) -> Tensor:
        """Which of the first images of a part the float network gets right in their `adversarial` form: bool (n,)."""
        if part not in self._withstood:
            labels = torch.from_numpy(split.first(self.probe_images).labels)
            self._withstood[part] = predict(self.float_twin, self.adversarial(part, split)).argmax(1) == labels
        return self._withstood[part]

    def attacked(self, few: Split, seed: int) -> Tensor:
        """Examples that PGD makes on the float network from all images of ``few``, all steps taken; cached on disk."""
        key = {
            "model": self.prepared.digest, "images": digest_arrays(few.images, few.labels), "seed": seed,
            "threat": [self.threat.norm, self.threat.eps], "steps": PROBE_STEPS,
            "normalisation": [self.options.mean, self.options.std],
        }  # fmt: skip

        def compute() -> dict[str, np.ndarray]:
            attack = PGD(steps=PROBE_STEPS, compact=False, batch_size=BATCH)
            images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
            result = attack(self.float_twin, images, labels, self.threat, seed=seed)
            return {"images": result.adversarial.numpy()}

        return torch.from_numpy(self.cache.arrays("adversarial", key, compute)["images"])
