"""The images that layers and plans are compared on, and the moments of what layers see of them."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.data import Split
from qopt.job.run import Run
from qopt.passes.base import Pipeline
from qopt.passes.observe_moments import ObserveMoments
from qopt.quantize import whole_batches

MOMENT_IMAGES = 64
"""Clean and as many adversarial images on which input moments are observed."""

BATCH = 32
"""Images per run where the batch axis is dynamic: activations, and gradients where needed, are in memory at once."""


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


def input_moments(run: Run, *, centred: bool) -> dict[str, Tensor]:
    """Second moments, or covariances, of every layer's inputs over clean and adversarial images alike."""
    clean, adversarial = probe_images(run, "calibrate")
    parts = [clean[:MOMENT_IMAGES]] + ([] if adversarial is None else [adversarial[:MOMENT_IMAGES]])
    images = whole_batches(run.normalisation(torch.cat(parts)), run.prepared.batch)
    observe = ObserveMoments(images, run.prepared.batch or BATCH, centred)
    Pipeline((observe,), run.quantizer.sample)(run.quantizer.float_graph)
    return observe.moments
