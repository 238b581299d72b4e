"""The facts of every layer of a network and of its candidate formats, as data and for terminals."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from qopt.columns import columns
from qopt.documents import Document, read
from qopt.errors import UsageError
from qopt.report.model import SCHEMA
from qopt.report.tables import Section, Table
from qopt.threat import Norm

Form = Literal["paper", "relative", "weighted"]
Quantity = Literal["robust_loss", "adversarial_loss", "clean_loss", "divergence"]


@final
class Bound(Document):
    """A number that lies in [lower, upper], rounding included; ``method`` is how that is known."""

    lower: float
    upper: float
    method: str


@final
class Range(Document):
    """The smallest and the largest value."""

    low: float
    high: float


@final
class Activity(Document):
    """One side of a layer: its values over clean and adversarial images, and how far the attack moves them.

    ``amplification`` is ``||A - A_adv|| / ||A||`` (Lin, Gan, Han 2019, eq. 4), the mean over images; None where every
    A is zero.
    """

    range: Range
    amplification: float | None


@final
class Measured(Document):
    """What one layer in one format changes, the others in float, against the float network, in nats.

    Attributes:
        robust_loss: mean cross-entropy on images as hard as the float network withstands them: adversarial where it
            gets them right, else clean.
        robust_error: its standard error over images.
        adversarial_loss: mean cross-entropy on all adversarial images, which were made for the float network: falls
            where they fooled it and the network moves.
        clean_loss: mean cross-entropy on clean images.
        divergence: mean ``KL(float || quantized)`` on the images of ``robust_loss``, which is what searches minimise.
    """

    robust_loss: float
    robust_error: float
    adversarial_loss: float
    clean_loss: float
    divergence: float


@final
class CandidateFacts(Document):
    """One format of one layer, rounded to nearest. Norms are of the reshaped weight.

    Attributes:
        format: its name.
        bytes: of codes and scales.
        norm_wq: ``||W_q||_2``; ``norm_dw``: ``||W - W_q||_2``.
        paper: by how much the larger of ``||W_q||`` and ``||dW||`` is over its threshold of Song, Ranjan, Li 2021; it
            passes at 1 or less.
        relative: ``||dW|| / ||W||``, from above.
        weighted: ``||dW C^(1/2)|| / ||W C^(1/2)||``, C the second moment of the layer's inputs; None without images,
            and for transposed convolutions and very long rows.
        measured: None without images.
    """

    format: str
    bytes: int
    norm_wq: Bound
    norm_dw: Bound
    paper: float
    relative: float
    weighted: Bound | None
    measured: Measured | None


@final
class LayerFacts(Document):
    """One layer.

    Attributes:
        macs: multiplications for one image or item.
        reshaped: the spectral norm of the weight as a matrix, which thresholds use; of a convolution it only bounds
            ``operator_l2`` from below.
        operator_l2: the Lipschitz constant of the layer as a map, in l2; ``operator_linf``: in linf. None where the
            padding is not known before images run.
        threshold_wq: what ``||W_q||`` may be by Song, Ranjan, Li 2021; ``threshold_dw``: what ``||dW||`` may be.
        weight_range: of the float weights.
        input: None without images, like ``output``.
    """

    name: str
    op: str
    shape: list[int]
    weights: int
    macs: int
    groups: int
    reshaped: Bound
    operator_l2: Bound | None
    operator_linf: Bound | None
    threshold_wq: float
    threshold_dw: float
    weight_range: Range
    input: Activity | None
    output: Activity | None
    candidates: list[CandidateFacts]


@final
class Correlation(Document):
    """Spearman's rank correlation of each threshold quantity with what was measured, over pairs of layer and format.

    Attributes:
        quantity: what was measured.
        format: the one format whose layers are ranked; empty for all pairs together, where the width of the formats
            alone makes most of the order.
        pairs: how many; of ``weighted`` fewer where it is not known for all.
        paper: of ``||dW||``; ``relative``: of ``||dW|| / ||W||``; ``weighted``: of the weighted error. None where there
            is no order to compare.
    """

    quantity: Quantity
    format: str
    pairs: int
    paper: float | None
    relative: float | None
    weighted: float | None


@final
class AnalysisReport(Document):
    """What is known of a network before it is quantized.

    Attributes:
        schema_: the format version (key ``schema``).
        verdict: one sentence.
        model: the file's name; ``digest``: SHA-256 of the file.
        formats: the candidate formats that were looked at.
        threat: the threat model in words; None without images, like ``norm`` and ``eps`` of it.
        seed: of the attack that made the adversarial images.
        images: how many clean images, and as many adversarial ones, losses were measured on; 0 without.
        clean_loss: mean cross-entropy of the float network on clean images, in nats; ``adversarial_loss``: on
            adversarial ones; ``robust_loss``: on images as hard as it withstands them.
        layers: in graph order.
        correlations: within each format and over all; empty without images.
        notes: how to read it.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    verdict: str
    model: str
    digest: str
    formats: list[str]
    threat: str | None
    norm: Norm | None
    eps: float | None
    seed: int
    images: int
    clean_loss: float | None
    adversarial_loss: float | None
    robust_loss: float | None
    layers: list[LayerFacts]
    correlations: list[Correlation]
    notes: list[str]

    @staticmethod
    def from_json(text: str, where: str = "report") -> AnalysisReport:
        """Parse a report; raises UsageError naming ``where`` and the first thing wrong."""
        return read(AnalysisReport, text, where, UsageError)

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline; equal runs give equal bytes."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def show_analysis(report: AnalysisReport, *, candidates: bool = False) -> str:
    """The report for terminals, ending in a newline and, before it, in the verdict.

    Without ``candidates`` each layer's formats are one row of a table with one number each.
    """
    facts = [("model", f"{report.model}, sha256 {report.digest[:12]}")]
    if report.threat is not None:
        facts.append(("threat model", f"{report.threat}, seed {report.seed}"))
        facts.append(("images", f"{report.images} clean, and the adversarial images made from them"))
        losses = (
            (report.clean_loss, "clean"),
            (report.adversarial_loss, "adversarial"),
            (report.robust_loss, "robust"),
        )
        facts.append(("float loss", ", ".join(f"{loss:.3f} {kind}" for loss, kind in losses) + ", in nats"))
    parts = [_layers(report), _values(report), _candidates(report) if candidates else _overview(report)]
    if report.correlations:
        parts.append(_correlations(report))
    notes = columns([("note", text) for text in report.notes])
    return "\n\n".join([columns(facts), *(part.text() for part in parts), notes, report.verdict]) + "\n"


def _layers(report: AnalysisReport) -> Section:
    header = ("layer", "op", "shape", "weights", "MACs", "reshaped", "operator l2", "operator linf")
    rows = [
        (
            row.name, row.op, "x".join(map(str, row.shape)), f"{row.weights:,}", f"{row.macs:,}",
            *(_interval(bound) for bound in (row.reshaped, row.operator_l2, row.operator_linf)),
        )
        for row in report.layers
    ]  # fmt: skip
    return Section("Norms of W, or [from, to] where they are not known more closely",
                   tables=(("", Table(header, tuple(rows), left=(1, 2))),))  # fmt: skip


def _values(report: AnalysisReport) -> Section:
    header: tuple[str, ...] = ("layer", "weights")
    rows = [(row.name, _range(row.weight_range)) for row in report.layers]
    if any(row.input for row in report.layers):
        header = (*header, "inputs", "outputs", "amplified in", "amplified out")
        return Section(
            "Values, and ||A - A_adv|| / ||A|| of inputs and outputs",
            tables=(("", Table(header, tuple((*r, *_sides(x)) for r, x in zip(rows, report.layers, strict=True)))),),
        )
    return Section("Values", tables=(("", Table(header, tuple(rows))),))


def _sides(row: LayerFacts) -> tuple[str, ...]:
    sides = (row.input, row.output)
    ranges = ("-" if side is None else _range(side.range) for side in sides)
    return (*ranges, *("-" if side is None else _number(side.amplification) for side in sides))


def _overview(report: AnalysisReport) -> Section:
    """One number for each layer and format."""
    measured = report.images > 0
    title = "Change of the robust loss in nats, one layer quantized at a time" if measured else "||dW|| / ||W||"
    rows = []
    for row in report.layers:
        found = {c.format: c for c in row.candidates}
        cells = (_cell(found[name]) if name in found else "-" for name in report.formats)
        rows.append((row.name, *cells))
    table = Table(("layer", *report.formats), tuple(rows))
    return Section(title, tables=(("", table),))


def _cell(candidate: CandidateFacts) -> str:
    found = candidate.measured
    return f"{candidate.relative:.3f}" if found is None else f"{found.robust_loss:+.3f}"


def _candidates(report: AnalysisReport) -> Section:
    header: tuple[str, ...] = ("layer", "format", "bytes", "||Wq||", "/ T", "||dW||", "/ T", "relative", "weighted")
    header += ("robust loss", "+-", "adversarial", "clean", "KL") if report.images else ()
    rows = tuple(
        (layer.name, c.format, f"{c.bytes:,}", *_over(c.norm_wq, layer.threshold_wq),
         *_over(c.norm_dw, layer.threshold_dw), f"{c.relative:.3f}",
         "-" if c.weighted is None else f"{c.weighted.upper:.3f}", *_changes(c.measured))
        for layer in report.layers for c in layer.candidates
    )  # fmt: skip
    passing = sum(candidate.paper <= 1 for layer in report.layers for candidate in layer.candidates)
    note = f"T are the thresholds of Song, Ranjan, Li 2021: {passing} of {len(rows)} candidates meet both."
    return Section("Candidates, rounded to nearest", (note,), (("", Table(header, rows, left=(1,))),))


def _over(norm: Bound, threshold: float) -> tuple[str, str]:
    """The norm, and by how much it exceeds its threshold; of a layer of zeros nothing does."""
    return _number(norm.upper), f"{norm.upper / threshold:.2f}" if threshold > 0 else "-"


def _changes(found: Measured | None) -> tuple[str, ...]:
    if found is None:
        return ()
    losses = (f"{found.adversarial_loss:+.3f}", f"{found.clean_loss:+.3f}")
    return (f"{found.robust_loss:+.3f}", f"{found.robust_error:.3f}", *losses, _number(found.divergence))


def _correlations(report: AnalysisReport) -> Section:
    by_quantity = {(c.quantity, c.format): c for c in report.correlations}
    rows = tuple(
        (c.format or "all together", str(c.pairs), *_forms(c), *_forms(by_quantity["divergence", c.format]))
        for c in report.correlations
        if c.quantity == "robust_loss"
    )
    title = "Rank correlation (Spearman) with the change of the robust loss, and with the divergence (KL)"
    forms = ("paper ||dW||", "relative", "weighted")
    header = ("over layers of", "pairs", *forms, *("KL " + form for form in ("paper", "relative", "weighted")))
    return Section(title, tables=(("", Table(header, rows)),))


def _forms(row: Correlation) -> tuple[str, ...]:
    return _signed(row.paper), _signed(row.relative), _signed(row.weighted)


def _interval(bound: Bound | None) -> str:
    if bound is None:
        return "-"
    low, high = f"{bound.lower:.4g}", f"{bound.upper:.4g}"
    return high if low == high else f"[{low}, {high}]"


def _range(values: Range) -> str:
    return f"{values.low:.3g} to {values.high:.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
