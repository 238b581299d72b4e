"""`qopt analyze`: the facts of every layer and of its candidate formats, and what predicts the harm that they do."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from qopt.cache import Cache, digest_arrays
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.graph.load import load_model
from qopt.job.analysis_facts import Found, layer_facts
from qopt.job.analysis_formats import analysed_formats
from qopt.job.analysis_ranking import correlations, verdict
from qopt.job.optimize import Task, start
from qopt.job.probes import MOMENT_IMAGES, input_moments, probe_images
from qopt.job.run import Progress, Run
from qopt.job.space import capable
from qopt.measure.amplification import layer_activity
from qopt.measure.loss_changes import FloatLoss, LossChange, loss_changes
from qopt.report.analysis_report import AnalysisReport
from qopt.spec import WeightSpec
from qopt.threat import Norm, check_declared

NORMS_NOTE: Final = (
    "only operator l2 and linf bound what a layer does to its input; reshaped, ||Wq|| and ||dW|| are of the weight as "
    "a matrix, which thresholds use"
)
LOSS_NOTE: Final = (
    "the robust loss is that of each image as hard as the float network withstands it, adversarial or else clean; "
    "images that fool it were made for it alone, and lose less on any network that has moved"
)

Pairs = dict[tuple[str, WeightSpec], LossChange]


@final
@dataclass(frozen=True, eq=False)
class AnalyzeTask:
    """What is analysed, and how.

    Attributes:
        model: the file of a float network.
        data: train images, or None for norms alone: ``images`` of them to observe, as many others to measure losses.
        norm: of the threat model.
        eps: its radius, pixels in [0, 1]; None for 8/255, or 0.1 for images of one channel.
        target: whose candidate formats are looked at.
        formats: names of formats instead of those, rounded to nearest.
        images: clean images, at most; as many adversarial ones are made from them.
        seed: of the attack.
        mean: per-channel mean, where normalisation lies outside the network; ``std`` likewise.
        factory: of a state dict.
        trust: load formats that can run code.
        input_shape: shape of one image, where the file does not tell.

    Raises:
        UsageError: an option out of its range, or an unknown name.
    """

    model: Path
    data: Data | None = None
    norm: Norm = "linf"
    eps: float | None = None
    target: str = "int4"
    formats: tuple[str, ...] = ()
    images: int = 128
    seed: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    factory: str | None = None
    trust: bool = False
    input_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_declared(self.norm, self.eps)
        if self.images < 1:
            raise UsageError("must be at least 1", where="--images", got=str(self.images))
        _ = self.candidates

    @property
    def candidates(self) -> tuple[WeightSpec, ...]:
        """The formats that are looked at, each once."""
        return analysed_formats(self.target, self.formats)

    @property
    def options(self) -> Options:
        """As the main job has them; adversarial images serve to observe and measure, nothing is calibrated."""
        return Options(
            target=self.target, robust=self.data is not None, norm=self.norm, eps=self.eps, mean=self.mean,
            std=self.std, calibration="auto" if self.data is None else "clean", calibration_images=self.images,
            probe_images=self.images, seed=self.seed,
        )  # fmt: skip


def analyze_model(task: AnalyzeTask, cache: Cache, progress: Progress) -> AnalysisReport:
    """Look at every layer and format of ``task``; ``cache`` keeps norms, adversarial images and losses by content.

    Raises:
        DataError: images for a network that takes none, or that do not fit it.
        ModelError: a file that cannot be loaded or prepared, or without a layer that can be quantized.
        UnsupportedModelError: images for a network without a twin.
    """
    progress("load the model")
    model = load_model(task.model, factory=task.factory, trust=task.trust, input_shape=task.input_shape)
    run = start(Task(model, task.model.stem, task.data, task.options), cache, progress)
    candidates = capable(run, task.candidates)
    found, floats, images = _measured(run, candidates) if run.data is not None else (Found(), None, 0)
    progress("norms of every layer and format")
    layers = layer_facts(run, candidates, found)
    ranked = correlations(layers)
    notes = [NORMS_NOTE]
    if run.data is not None:
        notes += [LOSS_NOTE, _parts_note(run), *run.data.notes]
    threat = run.threat if run.data is not None else None
    return AnalysisReport(
        verdict=verdict(run.name, layers, ranked), model=run.name, digest=_digest(task.model),
        formats=[str(spec) for spec in task.candidates], threat=None if threat is None else str(threat),
        norm=None if threat is None else threat.norm, eps=None if threat is None else threat.eps, seed=task.seed,
        images=images, clean_loss=None if floats is None else floats.clean,
        adversarial_loss=None if floats is None else floats.adversarial,
        robust_loss=None if floats is None else floats.robust, layers=layers, correlations=ranked, notes=notes,
    )  # fmt: skip


def _measured(run: Run, candidates: dict[str, tuple[WeightSpec, ...]]) -> tuple[Found, FloatLoss, int]:
    """What images tell: ranges, amplification and moments of the calibrate images, losses of the select ones."""
    assert run.data is not None
    run.progress("adversarial images, ranges and amplification")
    clean, adversarial = probe_images(run, "calibrate")
    assert adversarial is not None
    activity = layer_activity(run.float_twin, clean, adversarial)
    run.progress("second moments of layer inputs")
    moments = input_moments(run, centred=False)
    run.progress("loss with one layer quantized at a time")
    labels = torch.from_numpy(run.data.select.first(run.probe_images).labels)
    floats, changes = _losses(run, candidates, labels)
    return Found(activity, moments, changes), floats, len(labels)


def _losses(run: Run, candidates: dict[str, tuple[WeightSpec, ...]], labels: Tensor) -> tuple[FloatLoss, Pairs]:
    clean, adversarial = probe_images(run, "select")
    assert adversarial is not None
    pairs = [(name, spec) for name, specs in candidates.items() for spec in specs]
    key = {
        "model": run.prepared.digest, "images": digest_arrays(clean.numpy(), adversarial.numpy(), labels.numpy()),
        "pairs": [[name, str(spec)] for name, spec in pairs], "normalisation": [run.options.mean, run.options.std],
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        floats, found = loss_changes(run.quantizer, run.float_twin, clean, adversarial, labels, candidates)
        return {"float": np.array(astuple(floats)), "changes": np.array([astuple(found[pair]) for pair in pairs])}

    stored = run.cache.arrays("analysis", key, compute)
    changes = {pair: LossChange(*row) for pair, row in zip(pairs, stored["changes"].tolist(), strict=True)}
    return FloatLoss(*stored["float"].tolist()), changes


def _parts_note(run: Run) -> str:
    assert run.data is not None
    few = min(run.probe_images, len(run.data.calibrate))
    return (
        f"ranges and amplification are of {few} calibration images and the adversarial ones made from them, second "
        f"moments of {min(few, MOMENT_IMAGES)} of them; losses are of the images that plans are selected on"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
