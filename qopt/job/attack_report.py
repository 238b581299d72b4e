"""Draw the report of an attack together from what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.attacks import Finding, verdict
from qopt.job.attack_rows import Battery, Outcome, modes
from qopt.job.rows import share
from qopt.measure.presets import Preset
from qopt.measure.subject import Subject
from qopt.report.attack_report import AttackReport, AttackRow, FindingRow, SubjectFacts
from qopt.threat import ThreatModel

AGREEMENT = 99.0
"""File and twin must predict the same class on this share of the images, in percent."""


@final
@dataclass(frozen=True, eq=False)
class Judged:
    """The file before any attack.

    Attributes:
        subject: the file.
        images: float32 (n, ...) in [0, 1]; ``labels``: int64 (n,).
        clean: bool (n,), whether the file is right about them.
        classes: of the model.
        threat: the declared threat model.
        preset: the attacks.
        agreement: share of the images, in percent, of which file and twin say the same; None without a twin.
        warnings: what is wrong with it.
    """

    subject: Subject
    images: Tensor
    labels: Tensor
    clean: Tensor
    classes: int
    threat: ThreatModel
    preset: Preset
    agreement: float | None
    warnings: list[str]


def build_attack_report(seed: int, judged: Judged, battery: Battery, findings: list[Finding]) -> AttackReport:
    """Everything but times and paths."""
    subject = judged.subject
    robust = share(battery.robust)
    masking = verdict(findings) if findings else "not checked"
    return AttackReport(
        robust_accuracy=robust.value,
        interval=robust,
        verdict=_verdict(judged, battery, masking),
        threat=str(judged.threat),
        norm=judged.threat.norm,
        eps=judged.threat.eps,
        preset=judged.preset.name,
        in_turn=judged.preset.in_turn,
        seed=seed,
        images=len(judged.images),
        clean=share(judged.clean),
        model=SubjectFacts(
            name=subject.name, digest=subject.digest, input_shape=list(subject.input_shape), classes=judged.classes,
            gradients=list(modes(subject, battery.field.gradients)), no_gradients=subject.no_twin,
            agreement=judged.agreement,
        ),
        rows=[_row(outcome, judged) for outcome in battery.outcomes],
        masking=masking,
        findings=[
            FindingRow(
                rule=f.rule, triggered=f.triggered, warning=f.warning, numbers=dict(f.numbers), tolerance=f.tolerance,
                text=f.text,
            )
            for f in findings
        ],
        left_out=_left_out(judged),
        warnings=[*judged.warnings, *_warnings(judged, battery, findings)],
    )  # fmt: skip


def _verdict(judged: Judged, battery: Battery, masking: str) -> str:
    robust = share(battery.robust)
    found = f"{judged.subject.name}: {robust.value:.1f} % ({robust.low:.1f}-{robust.high:.1f}) of {robust.n} images"
    found += f" withstand {judged.preset.name} under {judged.threat}"
    if masking == "masked":
        return f"{found}, but its gradients are masked: this is no robustness."
    if masking == "none":
        return f"{found}; no sign of masked gradients."
    if judged.subject.twin is None:
        return f"{found}, attacked without its gradients: an attacker who has them may do better."
    return f"{found}; whether gradients are masked was not checked."


def _row(outcome: Outcome, judged: Judged) -> AttackRow:
    entry, fooled = outcome.entry, judged.clean & (outcome.l2 > 0) & ~outcome.correct
    norm, eps = (None, None) if entry.threat is None else (entry.threat.norm, entry.threat.eps)
    count = int(fooled.sum())
    return AttackRow(
        attack=entry.attack.name, access=outcome.access, source=outcome.source, origin=entry.origin,
        norm=norm, eps=eps, counts=entry.counts_for(judged.threat), accuracy=share(outcome.correct), fooled=count,
        within=int(outcome.within.sum()), mean_l2=float(outcome.l2[fooled].mean()) if count else None,
        mean_linf=float(outcome.linf[fooled].mean()) if count else None,
    )  # fmt: skip


def _left_out(judged: Judged) -> list[str]:
    subject, found = judged.subject, []
    if subject.twin is None:
        names = ", ".join(dict.fromkeys(e.attack.name for e in judged.preset.entries if not e.queries))
        found.append(f"attacks by gradients ({names}) and the masking rules: the model has none; {subject.no_twin}")
    elif not judged.threat.eps > 0:
        found.append("the masking rules: with eps 0 there is no attack to judge")
    return found


def _warnings(judged: Judged, battery: Battery, findings: list[Finding]) -> list[str]:
    found = []
    if judged.agreement is not None and judged.agreement < AGREEMENT:
        found.append(
            f"file and twin predict the same class on {judged.agreement:.1f} % of the images only: attacks by "
            "gradients are made on something else than the file"
        )
    if battery.field.gradients == "plain" and judged.subject.staircase:
        found.append("gradients passed the rounding as it is, where they are zero: a naive evaluation")
    found += [f"{finding.rule}: {finding.text}" for finding in findings if finding.warning and finding.triggered]
    return found
