"""`qopt attack`: the suite on one model file, quantized by anyone, and what it withstands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from qopt.attacks import predict, probability_warning
from qopt.attacks.score import check_labels
from qopt.cache import Cache
from qopt.data import Data
from qopt.errors import UsageError
from qopt.graph.formats import Format, identify
from qopt.job.attack_examples import check_place, write_examples
from qopt.job.attack_masking import masking_findings
from qopt.job.attack_report import Judged, build_attack_report
from qopt.job.attack_rows import Battery, Field, Gradients
from qopt.job.run import Progress
from qopt.measure.network import Normalisation, predictions
from qopt.measure.presets import Preset, merged, preset
from qopt.measure.subject import Subject, open_subject
from qopt.report.attack_report import Access, AttackReport
from qopt.seeds import derive
from qopt.threat import Norm, check_declared, declared_threat, parse_eps

NEEDS_FACTORY = (Format.STATE_DICT, Format.SAFETENSORS, Format.LEGACY_PICKLE)


@final
@dataclass(frozen=True)
class Source:
    """A model whose examples are tried on the attacked one.

    Attributes:
        path: its file, of any kind that can be attacked by gradients.
        eps: how far its examples may go; None for the eps of each attack.
    """

    path: Path
    eps: float | None = None

    @staticmethod
    def parse(text: str) -> Source:
        """Read ``FILE`` or ``FILE@EPS``, such as ``other.onnx@8/255``; raises UsageError where EPS is no number."""
        path, at, eps = text.rpartition("@")
        if not at or Path(text).exists():
            return Source(Path(text))
        try:
            return Source(Path(path), parse_eps(eps))
        except UsageError as error:
            raise UsageError(
                error.what, where=f"--source {text}", expected="FILE or FILE@EPS", got=repr(eps)
            ) from error


@final
@dataclass(frozen=True, eq=False)
class AttackTask:
    """What is attacked, and with what.

    Attributes:
        model: the file.
        data: images; the first ``images`` of those for the report are attacked.
        norm: of the threat model.
        eps: its radius, pixels in [0, 1]; None for 8/255, or 0.1 for images of one channel.
        preset: the name of a preset, or a suite of one's own.
        images: how many are attacked, at most.
        sources: models whose examples are tried too.
        batch: images, or evaluations, per forward pass of every attack; None for what each takes.
        seed: every chance derives from it.
        normalisation: where it lies outside the network; of the sources too.
        gradients: ``honest``, by STE and BPDA, or ``plain``, through the rounding as it is, which shows what a naive
            evaluation would have said.
        factory: of a state dict, for the sources that need one too.
        trust: load formats that can run code.
        input_shape: shape of one image, where neither file nor data tell.
        threads: of ONNX Runtime.
        save: a file for the adversarial images, or None.
    """

    model: Path
    data: Data
    norm: Norm = "linf"
    eps: float | None = None
    preset: str | Preset = "quick"
    images: int = 1000
    sources: tuple[Source, ...] = ()
    batch: int | None = None
    seed: int = 0
    normalisation: Normalisation = field(default_factory=Normalisation)
    gradients: Gradients = "honest"
    factory: str | None = None
    trust: bool = False
    input_shape: tuple[int, ...] | None = None
    threads: int = 1
    save: Path | None = None

    def __post_init__(self) -> None:
        for option, value in (("--images", self.images), ("--batch", self.batch), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise UsageError("must be at least 1", where=option, got=str(value))
        if self.gradients not in ("honest", "plain"):
            raise UsageError(
                "unknown word", where="--gradients", expected="honest or plain", got=repr(self.gradients)
            )  # fmt: skip
        threat = check_declared(self.norm, self.eps)
        if isinstance(self.preset, str):
            preset(self.preset, threat)
        if self.save is not None:
            check_place(self.save)


def attack_model(task: AttackTask, cache: Cache, progress: Progress) -> AttackReport:
    """Attack the file with the whole suite; every example is judged by the file itself in ONNX Runtime.

    The same task gives the same report, whatever the cache holds. ``cache`` keeps every attack on every hundred images,
    so that an interrupted run goes on where it stopped. Writes ``task.save`` at the end.

    Raises:
        DataError: images or labels that do not fit, or pixels outside [0, 1].
        UsageError: a wrong preset, threat model or path.
        ModelError: a file that cannot be loaded, that classifies no images or gives logits that are not finite; a
            source without gradients or of another interface.
    """
    progress("load the model")
    subject = _open(task, task.model)
    judged = _judge(task, subject)
    sources = [(source, *_open_source(task, source, judged, progress)) for source in task.sources]
    arena = Field(
        subject, task.gradients, judged.images, judged.labels, judged.clean, judged.threat,
        derive(task.seed, "attack"), cache, progress, task.save is not None,
    )  # fmt: skip
    battery = Battery(arena)
    for entry in judged.preset.against(gradients=subject.twin is not None):
        battery.run(entry, in_turn=judged.preset.in_turn)
    for source, other, access in sources:
        entries = judged.preset.transfers
        for entry in entries if source.eps is None else merged(e.within(source.eps) for e in entries):
            battery.transfer(entry, other, access)
    if not battery.outcomes:
        raise UsageError(
            "no attack of the preset can be made on a model without gradients", where=f"--preset {judged.preset.name}",
            got=subject.no_twin, fix="take one with queries, or give a --source",
        )  # fmt: skip
    findings = []
    if subject.twin is not None and judged.threat.eps > 0:
        progress("masking rules")
        findings = masking_findings(battery, judged.preset.budget)
    if task.save is not None:
        write_examples(task.save, battery.examples.numpy(), judged.labels.numpy(), battery.fooled_by)
    return build_attack_report(task.seed, judged, battery, findings)


def _open(task: AttackTask, path: Path) -> Subject:
    kind, shape = identify(path), task.input_shape
    factory = task.factory if path == task.model or kind in NEEDS_FACTORY else None
    if shape is None and kind in (*NEEDS_FACTORY, Format.PICKLED_MODULE):
        shape = tuple(task.data.report.images.shape[1:])
    return open_subject(
        path, task.normalisation, factory=factory, trust=task.trust, input_shape=shape, threads=task.threads
    )


def _judge(task: AttackTask, subject: Subject) -> Judged:
    """The file before any attack: its accuracy, and whether it is what attacks take it for."""
    part = task.data.shaped(subject.input_shape).report.first(task.images)
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    logits = predict(subject.artefact, images)
    labels = check_labels(labels, *logits.shape)
    clean = logits.argmax(1) == labels
    channels = subject.input_shape[0] if len(subject.input_shape) == 3 else 1
    threat = declared_threat(task.norm, task.eps, subject.input_shape)
    suite = preset(task.preset, threat, channels) if isinstance(task.preset, str) else task.preset
    warnings = [text for text in (probability_warning(logits), _chance(clean, logits.shape[1])) if text]
    agreement = None
    if subject.twin is not None:
        same = predictions(subject.twin, images) == logits.argmax(1)
        agreement = 100 * float(same.double().mean())
    return Judged(
        subject, images, labels, clean, logits.shape[1], threat, suite.batched(task.batch), agreement, warnings
    )


def _chance(clean: Tensor, classes: int) -> str | None:
    share = float(clean.double().mean())
    if share > 1.5 / classes:
        return None
    return (
        f"clean accuracy is {100 * share:.1f} %, hardly more than chance among {classes} classes: are the labels those "
        "of the model, and does normalisation lie outside it (--mean, --std)?"
    )


def _open_source(task: AttackTask, source: Source, judged: Judged, progress: Progress) -> tuple[Subject, Access]:
    """The model of a source, checked against the attacked one before any attack takes its time."""
    progress(f"load {source.path.name}")
    subject = _open(task, source.path)
    if subject.input_shape != judged.subject.input_shape:
        raise UsageError(
            "the source takes other images", where=f"--source {source.path}",
            expected=str(judged.subject.input_shape), got=str(subject.input_shape),
        )  # fmt: skip
    if subject.twin is None:
        raise UsageError(
            "examples cannot be made on a source without gradients", where=f"--source {source.path}",
            got=subject.no_twin,
        )  # fmt: skip
    classes = predict(subject.artefact, judged.images[:1]).shape[1]
    if classes != judged.classes:
        raise UsageError(
            "the source has other classes", where=f"--source {source.path}", expected=str(judged.classes),
            got=str(classes),
        )  # fmt: skip
    same = subject.outline == judged.subject.outline and judged.subject.twin is not None
    return subject, "gray" if same else "black"
