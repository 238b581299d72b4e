"""What an attack on one model file found, as data, as Markdown and for terminals."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from qopt.columns import columns
from qopt.documents import Document, read
from qopt.errors import UsageError
from qopt.report.model import SCHEMA, Share
from qopt.report.numbers import share
from qopt.report.tables import Table
from qopt.threat import Norm, ThreatModel

Access = Literal["white", "queries", "gray", "black"]
"""What an attacker has: the gradients of the model, its outputs, a model of the same structure, or another model."""


@final
class SubjectFacts(Document):
    """The model that was attacked.

    Attributes:
        digest: SHA-256 of the file.
        gradients: how gradients passed quantized activations, of ``ste``, ``bpda`` and ``plain``; ``exact`` where
            there are none to pass; empty where there were no gradients at all.
        no_gradients: why there were none; empty where there were.
        agreement: share of the images, in percent, of which file and twin predict the same class; None without a twin.
    """

    name: str
    digest: str
    input_shape: list[int]
    classes: int
    gradients: list[str]
    no_gradients: str
    agreement: float | None


@final
class AttackRow(Document):
    """One attack.

    Attributes:
        attack: its name.
        access: what the attacker has.
        source: the model that the examples were made on; empty for the attacked one.
        origin: who set the parameters.
        norm: of the attack's own threat model; None where there is no bound.
        eps: its radius.
        counts: whether it is an attack of the declared threat model. Others count for the robust accuracy by those of
            their examples that lie in its ball.
        accuracy: images that are right under it; of attacks in turn, under it and those before it.
        fooled: images that were right before it and are wrong after it.
        within: those of them whose examples lie in the declared ball.
        mean_l2: mean l2 distance of the examples of ``fooled`` from their images, pixels in [0, 1]; None without any.
        mean_linf: mean of their largest changes of a pixel.
    """

    attack: str
    access: Access
    source: str
    origin: str
    norm: Norm | None
    eps: float | None
    counts: bool
    accuracy: Share
    fooled: int
    within: int
    mean_l2: float | None
    mean_linf: float | None


@final
class FindingRow(Document):
    """What one masking rule found; of a ``warning`` none makes a verdict.

    ``numbers`` are what it compared: shares in [0, 1], but for numbers of images, eps and mean l2 distances;
    ``tolerance`` is the share that it puts down to chance.
    """

    rule: str
    triggered: bool
    warning: bool
    numbers: dict[str, float]
    tolerance: float
    text: str


@final
class AttackReport(Document):
    """Everything that an attack on one file found.

    Attributes:
        schema_: the format version (key ``schema``).
        robust_accuracy: images, in percent, that are right on their own and under every example found in the ball of
            the declared threat model, transferred ones included. Where ``masking`` is ``masked`` it is no robustness.
        interval: the same with its 95 % interval.
        verdict: one sentence.
        threat: the declared threat model, in words.
        norm: of it; ``eps``: its radius, pixels in [0, 1].
        preset: the suite of attacks; ``in_turn``: whether each was run on what those before it left.
        seed: of the run.
        images: how many were attacked.
        clean: accuracy of the file on them.
        masking: verdict of the masking rules; ``not checked`` where there are no gradients to judge.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    robust_accuracy: float
    interval: Share
    verdict: str
    threat: str
    norm: Norm
    eps: float
    preset: str
    in_turn: bool
    seed: int
    images: int
    clean: Share
    model: SubjectFacts
    rows: list[AttackRow]
    masking: Literal["none", "masked", "not checked"]
    findings: list[FindingRow]
    left_out: list[str]
    warnings: list[str]

    @property
    def exit_code(self) -> int:
        """1 where gradients are masked, else 0."""
        return 1 if self.masking == "masked" else 0

    @staticmethod
    def from_json(text: str, where: str = "report") -> AttackReport:
        """Parse a report; raises UsageError naming ``where`` and the first thing wrong."""
        return read(AttackReport, text, where, UsageError)

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline; equal runs give equal bytes."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def to_markdown(self) -> str:
        """The whole report for people, see `attack_markdown`."""
        return attack_markdown(self)


def attack_markdown(report: AttackReport) -> str:
    """The whole report; tables in GitHub's flavour, no HTML."""
    parts = [
        f"# {report.model.name}: attacked\n\n{report.verdict}",
        "\n".join(f"- {name}: {text}" for name, text in _facts(report)),
        f"## Attacks\n\n{_attacks(report).markdown()}\n\n{_legend(report)}",
        f"## Can the attacks be believed?\n\n{_findings(report).markdown()}" if report.findings else "",
        _bullets("Left out", report.left_out),
        _bullets("Warnings", report.warnings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def show_attack(report: AttackReport) -> str:
    """The report for terminals, ending in a newline and, before it, in the verdict."""
    notes = [("left out", text) for text in report.left_out] + [("warning", text) for text in report.warnings]
    parts = [
        columns(_facts(report)),
        _attacks(report).text(),
        _legend(report),
        _findings(report).text() if report.findings else "",
        columns(notes) if notes else "",
        report.verdict,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(report: AttackReport) -> list[tuple[str, str]]:
    model = report.model
    gradients = ", ".join(model.gradients) or f"none: {model.no_gradients}"
    facts = [
        ("threat model", f"{report.threat}, preset {report.preset}, seed {report.seed}"),
        ("model", f"{model.name}, input {model.input_shape}, {model.classes} classes, sha256 {model.digest[:12]}"),
        ("gradients", gradients),
        ("images", f"{report.images}"),
        ("clean", share(report.clean)),
        ("robust", share(report.interval)),
        ("masking", report.masking),
    ]
    if model.agreement is not None:
        facts.insert(3, ("file and twin", f"same class on {model.agreement:.2f} % of the images"))
    return facts


def _attacks(report: AttackReport) -> Table:
    header = ("attack", "access", "within", "counts", "accuracy", "fooled", "mean l2", "mean linf", "parameters")
    rows = tuple(
        (
            row.attack, f"{row.access} ({row.source})" if row.source else row.access, _bound(row), _counts(row),
            share(row.accuracy), str(row.fooled), _mean(row.mean_l2), _mean(row.mean_linf), row.origin,
        )
        for row in report.rows
    )  # fmt: skip
    return Table(header, rows, left=(1, 2, 3, 8))


def _bound(row: AttackRow) -> str:
    return "no bound" if row.norm is None or row.eps is None else str(ThreatModel(row.norm, row.eps))


def _counts(row: AttackRow) -> str:
    return "all" if row.counts else f"{row.within} of {row.fooled}"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _legend(report: AttackReport) -> str:
    text = "counts: which examples lie in the ball of the threat model, and so count for the robust accuracy."
    return text + (" Attacks are in turn: accuracy is what each and those before it left." if report.in_turn else "")


def _findings(report: AttackReport) -> Table:
    rows = tuple((f.rule, _triggered(f), f.text) for f in report.findings)
    return Table(("rule", "triggered", "numbers"), rows, left=(1, 2))


def _triggered(finding: FindingRow) -> str:
    if not finding.triggered:
        return "no"
    return "warning" if finding.warning else "yes"


def _bullets(title: str, items: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {item}" for item in items) if items else ""
