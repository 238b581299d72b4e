"""The table of networks: float, baselines, the emitted file and what a naive evaluation would have said of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from qopt.attacks import PGD, Finding, accuracy_vector, verdict
from qopt.config import parse_baseline
from qopt.job.artefact import Artefact, build_artefact
from qopt.job.errors_along import errors_along
from qopt.job.run import Run
from qopt.job.transfers import ATTACK, Attacked, attacked, transfers
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH, Scores, Setting, attack_artefact, attack_float, masking_findings, white_box
from qopt.passes.insert_activation_quantizers import set_gradient
from qopt.plan import uniform
from qopt.quantize import Applied
from qopt.report.model import Drop, ErrorAmplification, MaskingRow, Row, Share, SweepLine, Transfers
from qopt.size import code_bits
from qopt.statistics import accuracy_interval, paired_difference


@final
@dataclass(frozen=True, eq=False)
class Reference:
    """The float network's scores, which every row is held against, and its examples, which transfer."""

    clean: Tensor
    scores: Scores | None
    adversarial: dict[str, Tensor]


@final
@dataclass
class Table:
    """Builds rows on the report images; with ``robust`` the networks are attacked.

    Attributes:
        run: the run.
        rows: finished rows.
        sweep: accuracy against the radius, where that was asked for (`qopt.job.sweep`).
        masking: finished findings.
        attacked: the networks that were attacked, by the names of their rows, each with its examples and gradients.
        amplification: errors along the network, once `compare` was called.
        transfers: the attacked networks against each other, likewise.
    """

    run: Run
    rows: list[Row] = field(default_factory=list)
    sweep: list[SweepLine] = field(default_factory=list)
    masking: list[MaskingRow] = field(default_factory=list)
    attacked: dict[str, Attacked] = field(default_factory=dict)
    amplification: ErrorAmplification | None = None
    transfers: Transfers | None = None

    def __post_init__(self) -> None:
        assert self.run.data is not None
        report = self.run.data.report
        self.images, self.labels = torch.from_numpy(report.images), torch.from_numpy(report.labels)
        few = self.run.options.attack_images
        seed = self.run.seed("report")
        self.setting = Setting(self.images[:few], self.labels[:few], self.run.threat, seed)

    def add_float(self, artefact: Artefact) -> None:
        """The first row, which the others refer to."""
        self.run.progress("attacking the float network" if self.run.options.robust else "accuracy of float")
        clean = accuracy_vector(artefact.classifier, self.images, self.labels)
        scores: Scores | None = None
        adversarial: dict[str, Tensor] = {}
        if self.run.options.robust:
            scores, adversarial = attack_float(artefact.twin, artefact.classifier, self.setting)
            self.attacked["float"] = Attacked.of(artefact, adversarial[ATTACK.name], self.setting)
        self.reference = Reference(clean, scores, adversarial)
        self.rows.append(self._row("float", 32.0, clean, scores))

    def add(self, name: str, artefact: Artefact, applied: Applied, *, naive: bool) -> tuple[Tensor, Scores | None]:
        """A quantized network, with ``naive`` beside the row that PGD through plain rounding would have given it."""
        self.run.progress(f"measuring {name}")
        bits = code_bits(applied.quantized.stored(self.run.prepared))
        clean = accuracy_vector(artefact.classifier, self.images, self.labels)
        if not self.run.options.robust:
            self.rows.append(self._row(name, bits, clean, None))
            return clean, None
        scores, made = attack_artefact(artefact.twin, artefact.classifier, self.setting, self.reference.adversarial)
        self.attacked[name] = attacked(artefact, made, self.setting)
        findings = masking_findings(artefact.twin, scores, self.setting)
        self.rows.append(self._row(name, bits, clean, scores, findings))
        self._record(name, findings)
        if naive and applied.quantized.activations:
            self._add_naive(name, bits, artefact, clean)
        return clean, scores

    def add_baseline(self, text: str) -> None:
        """A uniform plan rounded to nearest, ``WEIGHTS`` or ``WEIGHTS@ACTIVATIONS``."""
        weights, activations = parse_baseline(text)
        applied = self.run.quantizer.apply(uniform(weights, activations))
        artefact = build_artefact(self.run, applied, {})
        few = activations.bits < 8
        self.add(f"uniform {weights}" + (f", activations {activations}" if few else ""), artefact, applied, naive=few)

    def compare(self, plain: Artefact, chosen: Artefact) -> None:
        """Hold the chosen network against ``plain``, float, layer by layer, and all that were attacked against each."""
        self.run.progress("errors along the network, and transfers")
        adversarial = self.reference.adversarial.get(ATTACK.name)
        self.amplification = errors_along(plain.twin, chosen.twin, self.setting.images, adversarial)
        self.transfers = transfers(self.attacked, self.setting)

    def _add_naive(self, name: str, bits: float, artefact: Artefact, clean: Tensor) -> None:
        plain = TwinClassifier(
            copy.deepcopy(artefact.twin.graph), artefact.twin.normalisation, artefact.twin.batch
        )  # fmt: skip
        set_gradient(plain.graph, "plain")
        attack = PGD(batch_size=BATCH)
        correct = white_box(attack, plain, artefact.classifier, self.setting)
        scores = Scores(clean[: len(self.setting.images)], {attack.name: correct})
        full = Scores(scores.clean, {**scores.attacked, "transfer": self._transferred(artefact)})
        findings = masking_findings(plain, full, self.setting)
        label = f"{name}, naive evaluation"
        row = self._row(label, bits, clean, scores, findings)
        note = "PGD through plain rounding, whose gradient is zero: not a measurement of robustness"
        self.rows.append(row.model_copy(update={"note": note}))
        self._record(label, findings)

    def _transferred(self, artefact: Artefact) -> Tensor:
        transferred = self.reference.adversarial[PGD().name]
        return accuracy_vector(artefact.classifier, transferred, self.setting.labels)

    def _record(self, name: str, findings: list[Finding]) -> None:
        self.masking += [MaskingRow(network=name, rule=f.rule, triggered=f.triggered, text=f.text) for f in findings]

    def _row(
        self, name: str, bits: float, clean: Tensor, scores: Scores | None, findings: list[Finding] | None = None
    ) -> Row:
        is_float = name == "float"
        reference = None if is_float else self.reference
        robust_drop = None
        if scores is not None and reference is not None and reference.scores is not None:
            robust_drop = drop(reference.scores.robust, scores.robust)
        return Row(
            name=name,
            code_bits=bits,
            clean=share(clean),
            attacked={} if scores is None else {attack: share(v) for attack, v in scores.attacked.items()},
            robust=None if scores is None else share(scores.robust),
            clean_drop=None if reference is None else drop(reference.clean, clean),
            robust_drop=robust_drop,
            masking="not checked" if findings is None else verdict(findings),
        )


def share(correct: Tensor) -> Share:
    """Accuracy in percent with its interval."""
    interval = accuracy_interval(correct.numpy())
    return Share(value=100 * interval.value, low=100 * interval.low, high=100 * interval.high, n=interval.n)


def drop(reference: Tensor, correct: Tensor) -> Drop:
    """Reference minus network in points, paired."""
    d = paired_difference(reference.numpy(), correct.numpy())
    return Drop(value=d.difference, standard_error=d.standard_error, low=d.low, high=d.high, n=d.n)
