"""What is proved of one model file, beside what attacks found, as data and for terminals."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from qopt.columns import columns
from qopt.documents import Document, read
from qopt.errors import UsageError
from qopt.report.model import SCHEMA, Share
from qopt.report.numbers import share
from qopt.report.tables import Table
from qopt.threat import Norm


@final
class MethodRow(Document):
    """How far one way of bounding gets, alone: from the cheapest to the tightest that was asked for."""

    method: str
    certified: Share


@final
class CertifyReport(Document):
    """Certificates of one file's images.

    Attributes:
        schema_: the format version (key ``schema``).
        certified_accuracy: images, in percent, of which no image in the ball has another class: a lower bound of the
            accuracy under any attack of the threat model.
        certified: the same with its 95 % interval.
        verdict: one sentence.
        threat: the threat model, in words.
        norm: of it; ``eps``: its radius, pixels in [0, 1].
        seed: of the attack.
        model: the file's name; ``digest``: SHA-256 of the file.
        images: how many were looked at.
        clean: accuracy of the file on them.
        attacked: what PGD left of it, judged by the file: an upper bound.
        methods: the certified accuracy by method.
        radius: the median certified radius over the images that are right, up to eps; None where not asked for.
        spared: images that attacks need not be run on, as a share of those that are right, in percent.
        notes: what the certificates say and do not say.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    certified_accuracy: float
    certified: Share
    verdict: str
    threat: str
    norm: Norm
    eps: float
    seed: int
    model: str
    digest: str
    images: int
    clean: Share
    attacked: Share
    methods: list[MethodRow]
    radius: float | None
    spared: float
    notes: list[str]

    @staticmethod
    def from_json(text: str, where: str = "report") -> CertifyReport:
        """Parse a report; raises UsageError naming ``where`` and the first thing wrong."""
        return read(CertifyReport, text, where, UsageError)

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline; equal runs give equal bytes."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def show_certificates(report: CertifyReport) -> str:
    """The report for terminals, ending in a newline and, before it, in the verdict."""
    facts = [
        ("threat model", f"{report.threat}, seed {report.seed}"),
        ("model", f"{report.model}, sha256 {report.digest[:12]}"),
        ("images", str(report.images)),
        ("clean", share(report.clean)),
        ("attacked", share(report.attacked)),
        ("certified", share(report.certified)),
        ("attacks spared", f"{report.spared:.1f} % of the images that are right"),
    ]
    if report.radius is not None:
        facts.append(("median radius", f"{report.radius:.4g}"))
    methods = Table(("method", "certified"), tuple((row.method, share(row.certified)) for row in report.methods))
    notes = columns([("note", text) for text in report.notes])
    return "\n\n".join([columns(facts), methods.text(), notes, report.verdict]) + "\n"
