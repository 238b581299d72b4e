"""What a format does to the network, by layer: the summands that searches minimise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from qopt.cache import digest_arrays
from qopt.graph.model import Prepared
from qopt.job.probes import probe_images, withstood
from qopt.job.run import Run
from qopt.measure.divergence import Probe, layer_sensitivities
from qopt.measure.noise_sensitivity import noise_sensitivity
from qopt.measure.robustness import BATCH
from qopt.search.space import Candidate, LayerSpace
from qopt.spec import WeightSpec

SENSITIVITY_IMAGES = 128
"""Images on which layers are quantized one at a time: sensitivities differ by orders of magnitude."""

SENSITIVITY_MACS = 5 * 10**12
"""Multiplications for all of it, minutes on two cores; fewer images, but `LEAST_SENSITIVITY_IMAGES`, where more."""

LEAST_SENSITIVITY_IMAGES = 8
"""One image of 1000 classes tells more than one of ten."""

NOISE_IMAGES = 128
"""Images on which the adversarial noise sensitivity of layers is measured, at most."""

Sensitivities = Mapping[tuple[str, WeightSpec], float]

DESCRIBED: Final = {
    "error": "squared relative error of the weights",
    "weighted": "squared relative error of the weights on the layers' inputs",
    "noise": "squared relative error of the weights times the adversarial noise sensitivity of the layer",
    "divergence": "KL divergence on {images} images, one layer quantized at a time",
    "clean-divergence": "KL divergence on clean images, one layer quantized at a time",
}
"""By form, what a sensitivity is."""


def form_of(run: Run) -> str:
    """The form of sensitivities that ``auto`` stands for: divergences with data, else errors."""
    if run.options.sensitivity != "auto":
        return run.options.sensitivity
    return "error" if run.data is None else "divergence"


def described(run: Run) -> str:
    """Words for the report."""
    text = DESCRIBED[form_of(run)].format(images="adversarial" if run.options.robust else "clean")
    return f"{text}, no data" if run.data is None else text


def with_sensitivities(run: Run, layers: Sequence[LayerSpace], table: Sensitivities) -> tuple[LayerSpace, ...]:
    """The layers with sensitivities of the form that the options ask for; ``table`` holds the `divergences`."""
    form = form_of(run)
    noise = adversarial_noise(run) if form == "noise" else {}

    def one(layer: str, candidate: Candidate) -> float:
        if form == "weighted":
            assert candidate.weighted is not None
            return candidate.weighted.value**2
        own = candidate.sensitivity * noise.get(layer, 1.0)
        return table.get((layer, candidate.spec), own)

    return tuple(
        replace(layer, candidates=tuple(replace(c, sensitivity=one(layer.layer, c)) for c in layer.candidates))
        for layer in layers
    )


def divergences(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]]) -> Sensitivities:
    """What each format of each layer alone does to the network's predictions, in nats; cached.

    Empty where the options ask for another form. In a robust run every image is as hard as float withstands it.
    """
    form = form_of(run)
    if form not in ("divergence", "clean-divergence"):
        return {}
    run.progress("sensitivity of every layer and format")
    images = sensitivity_images(run, affordable_images(run.prepared, candidates))
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


def sensitivity_images(run: Run, most: int) -> Tensor:
    """The images on which divergences are measured, at most so many: in a robust run as hard as float withstands them,
    where the options do not ask for clean ones."""
    clean, adversarial = probe_images(run, "calibrate")
    if adversarial is None or form_of(run) != "divergence":
        return clean[:most]
    return _hardest(clean, adversarial, withstood(run, "calibrate"))[:most]


def affordable_images(prepared: Prepared, candidates: Mapping[str, Sequence[object]]) -> int:
    """On how many images sensitivities are measured: each version of a layer runs all layers after it, too."""
    after, macs = 0, 0
    for layer in reversed(prepared.layers):
        after += layer.macs
        macs += after * len(candidates[layer.name])
    return int(min(max(SENSITIVITY_MACS // max(macs, 1), LEAST_SENSITIVITY_IMAGES), SENSITIVITY_IMAGES))


def _hardest(clean: Tensor, adversarial: Tensor, held: Tensor) -> Tensor:
    """Every image as hard as the float network withstands it: what a plan can keep, and only that, is to be kept."""
    return torch.where(held.view(-1, *[1] * (clean.ndim - 1)), adversarial, clean)


def adversarial_noise(run: Run) -> dict[str, float]:
    """Layer to its adversarial noise sensitivity on calibration images; cached."""
    assert run.data is not None
    run.progress("adversarial noise sensitivity of every layer")
    few = run.data.calibrate.first(NOISE_IMAGES)
    names = [layer.name for layer in run.prepared.layers]
    key = {
        "model": run.prepared.digest, "images": digest_arrays(few.images, few.labels),
        "threat": [run.threat.norm, run.threat.eps], "normalisation": [run.options.mean, run.options.std],
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
        found = noise_sensitivity(run.float_twin, images, labels, run.threat, batch_size=BATCH)
        return {"values": np.array([found[name] for name in names])}

    values = run.cache.arrays("noise", key, compute)["values"]
    return {name: float(value) for name, value in zip(names, values, strict=True)}
