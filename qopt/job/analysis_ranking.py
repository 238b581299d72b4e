"""Which threshold quantity predicts the harm that was measured: rank correlations, and the sentence on them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final, get_args

from qopt.measure.ranks import spearman
from qopt.report.analysis_report import CandidateFacts, Correlation, Form, LayerFacts, Quantity

LABELS: Final[dict[Form, str]] = {"paper": "||dW||", "relative": "||dW|| / ||W||", "weighted": "the weighted error"}
ENOUGH: Final = 3
"""Layers of a network without which no order among them is worth a word."""


def correlations(layers: Sequence[LayerFacts]) -> list[Correlation]:
    """Within each format, in the order that they come in, and over all pairs; nothing where nothing was measured."""
    rows = [candidate for layer in layers for candidate in layer.candidates if candidate.measured is not None]
    formats = dict.fromkeys(row.format for row in rows)
    groups = {name: [row for row in rows if row.format == name] for name in formats}
    return [
        _correlation(quantity, name, group)
        for quantity in get_args(Quantity)
        for name, group in ([*groups.items(), ("", rows)] if rows else [])
    ]


def _correlation(quantity: Quantity, name: str, rows: Sequence[CandidateFacts]) -> Correlation:
    found = {}
    for form in get_args(Form):
        pairs = [(value, _measured(row, quantity)) for row in rows if (value := quantity_of(row, form)) is not None]
        found[form] = spearman([a for a, _ in pairs], [b for _, b in pairs])
    return Correlation(quantity=quantity, format=name, pairs=len(rows), **found)


def quantity_of(row: CandidateFacts, form: Form) -> float | None:
    """What a threshold of ``form`` is held against: ``||dW||``, ``||dW|| / ||W||`` or the weighted error."""
    if form == "paper":
        return row.norm_dw.upper
    if form == "relative":
        return row.relative
    return None if row.weighted is None else row.weighted.upper


def _measured(row: CandidateFacts, quantity: Quantity) -> float:
    assert row.measured is not None
    value: float = getattr(row.measured, quantity)
    return value


def verdict(name: str, layers: Sequence[LayerFacts], ranked: Sequence[Correlation]) -> str:
    """One sentence: which candidate does most harm and which quantity ranks layers best, or what passes unmeasured."""
    pairs = [(layer.name, row) for layer in layers for row in layer.candidates]
    measured = [(layer, row, row.measured.robust_loss) for layer, row in pairs if row.measured is not None]
    if not measured:
        passing = sum(row.paper <= 1 for _, row in pairs)
        return (
            f"{name}: {passing} of {len(pairs)} candidates pass the thresholds of the paper; what they do to the loss "
            "is measured with --data."
        )
    layer, worst, harm = max(measured, key=lambda item: item[2])
    sentence = f"{name}: {layer} in {worst.format} alone changes the robust loss most, by {harm:+.3g} nats"
    means = _mean_within(ranked)
    if len(layers) < ENOUGH or not means:
        return sentence + "."
    order = sorted(means, key=lambda form: -means[form])
    told = ", ".join(f"{LABELS[form]} {means[form]:+.2f}" for form in order)
    return f"{sentence}; mean rank correlation with it over the layers of one format: {told}."


def _mean_within(ranked: Sequence[Correlation]) -> dict[Form, float]:
    found: dict[Form, float] = {}
    for form in get_args(Form):
        values = [getattr(row, form) for row in ranked if row.quantity == "robust_loss" and row.format]
        known = [value for value in values if value is not None]
        if known:
            found[form] = fmean(known)
    return found
