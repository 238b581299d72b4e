"""`qopt certify`: what is proved of one model file, beside what an attack finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from qopt.attacks import PGD, predict
from qopt.attacks.score import check_labels
from qopt.cache import Cache, digest_arrays
from qopt.certificates.certificate import METHODS, Method, margins_by_method, radii, tried
from qopt.data import Data
from qopt.errors import UsageError, VerificationError, nearest
from qopt.job.rows import share
from qopt.job.run import Progress
from qopt.measure.network import Normalisation, TwinClassifier
from qopt.measure.robustness import Setting, reach
from qopt.measure.subject import Subject, open_subject
from qopt.report.certify_report import CertifyReport, MethodRow
from qopt.seeds import derive
from qopt.threat import Norm, ThreatModel, check_declared, declared_threat

CHECKED: Final = 3
"""Steps of the attack that certified images must withstand: whoever finds one has found a bug of qopt."""

NOTES: Final = (
    "bounds hold for the network as float32 computes it; integer kernels may round to the neighbouring code",
    "what is not certified may still withstand every attack: the bounds are not tight",
)


@final
@dataclass(frozen=True, eq=False)
class CertifyTask:
    """What is certified, and how.

    Attributes:
        model: the file, which takes images in [0, 1]: normalisation, if any, is inside.
        data: images; the first ``images`` of those for the report are looked at.
        norm: of the threat model.
        eps: its radius, pixels in [0, 1]; None for 8/255, or 0.1 for images of one channel.
        method: the tightest method to try.
        images: how many are looked at, at most.
        radius: also bisect each image's certified radius, which takes ten times as long.
        seed: of the attack.
        factory: of a state dict.
        trust: load formats that can run code.
        input_shape: shape of one image, where the file does not tell.
        threads: of ONNX Runtime.
    """

    model: Path
    data: Data
    norm: Norm = "linf"
    eps: float | None = None
    method: Method = "backward"
    images: int = 200
    radius: bool = False
    seed: int = 0
    factory: str | None = None
    trust: bool = False
    input_shape: tuple[int, ...] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        check_declared(self.norm, self.eps)
        if self.images < 1:
            raise UsageError("must be at least 1", where="--images", got=str(self.images))
        if self.method not in METHODS:
            raise UsageError(
                "unknown method", where="--method", expected=", ".join(METHODS), got=repr(self.method),
                fix=nearest(self.method, METHODS),
            )  # fmt: skip


def certify_model(task: CertifyTask, cache: Cache, progress: Progress) -> CertifyReport:
    """Certify the first images of the report part, and attack what is left.

    ``cache`` keeps the bounds by the file's content and the images.

    Raises:
        DataError: images or labels that do not fit.
        UnsupportedModelError: an operator that bounds do not pass, or a model without a twin.
        ModelError: a file that cannot be loaded or classifies no images.
        VerificationError: an attack broke what was certified; a bug of qopt.
    """
    progress("load the model")
    subject = open_subject(
        task.model, Normalisation(), factory=task.factory, trust=task.trust, input_shape=task.input_shape,
        threads=task.threads,
    )  # fmt: skip
    part = task.data.shaped(subject.input_shape).report.first(task.images)
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    logits = predict(subject.artefact, images)
    labels = check_labels(labels, *logits.shape)
    threat = declared_threat(task.norm, task.eps, subject.input_shape)
    clean = logits.argmax(1) == labels
    progress(f"bounds: {task.method}")
    margins = _margins(subject, images, labels, threat, task.method, cache)
    certified = clean & (margins[task.method] > 0)
    progress("attack what is not certified")
    attacked = _attacked(subject, images, labels, threat, certified, task.seed)
    radius = _median_radius(subject, images[clean], labels[clean], threat, task) if task.radius else None
    methods = [MethodRow(method=name, certified=share(clean & (m > 0))) for name, m in margins.items()]
    return _report(task, subject, threat, (clean, attacked, certified), methods, radius)


def _margins(
    subject: Subject, images: Tensor, labels: Tensor, threat: ThreatModel, method: Method, cache: Cache
) -> dict[str, Tensor]:
    key = {
        "file": subject.content, "images": digest_arrays(images.numpy(), labels.numpy()), "method": method,
        "threat": [threat.norm, threat.eps],
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        found = margins_by_method(_twin(subject).graph, images, labels, threat, method=method)
        return {name: margins.numpy() for name, margins in found.items()}

    stored = cache.arrays("certificates", key, compute)
    return {name: torch.from_numpy(stored[name]) for name in tried(method)}


def _attacked(
    subject: Subject, images: Tensor, labels: Tensor, threat: ThreatModel, certified: Tensor, seed: int
) -> Tensor:
    """Bool (n,), what PGD leaves, in the file; certified images are attacked by few steps only, to check the bounds."""
    chance, left = derive(seed, "certify"), certified.clone()
    rows = (~certified).nonzero().flatten()
    if len(rows):
        setting = Setting(images[rows], labels[rows], threat, chance)
        left[rows] = reach(PGD(loss="margin"), _twin(subject), subject.artefact, setting, rows).correct
    checked = PGD(steps=CHECKED, loss="margin")(_twin(subject), images, labels, threat, seed=chance).correct
    broken = (certified & ~checked).nonzero().flatten()
    if len(broken):
        raise VerificationError("an attack broke an image that was certified", where=f"image {int(broken[0])}")
    return left


def _median_radius(
    subject: Subject, images: Tensor, labels: Tensor, threat: ThreatModel, task: CertifyTask
) -> float | None:
    if not len(images):
        return None
    found = radii(_twin(subject).graph, images, labels, threat, method=task.method).clamp_min(0)
    return float(found.median())


def _report(
    task: CertifyTask, subject: Subject, threat: ThreatModel, vectors: tuple[Tensor, Tensor, Tensor],
    methods: list[MethodRow], radius: float | None,
) -> CertifyReport:  # fmt: skip
    clean, attacked, certified = (share(vector) for vector in vectors)
    right = int(vectors[0].sum())
    spared = 100 * int(vectors[2].sum()) / right if right else 0.0
    verdict = (
        f"{subject.name}: {certified.value:.1f} % of {len(vectors[0])} images are proved right under {threat}; attacks "
        f"leave {attacked.value:.1f} %, clean {clean.value:.1f} %."
    )
    return CertifyReport(
        certified_accuracy=certified.value, certified=certified, verdict=verdict, threat=str(threat), norm=threat.norm,
        eps=threat.eps, seed=task.seed, model=subject.name, digest=subject.digest, images=len(vectors[0]), clean=clean,
        attacked=attacked, methods=methods, radius=radius, spared=round(spared, 4), notes=list(NOTES),
    )  # fmt: skip


def _twin(subject: Subject) -> TwinClassifier:
    assert isinstance(subject.gradients, TwinClassifier)
    return subject.gradients
