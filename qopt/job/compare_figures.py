"""From the logits of all networks on clean images and on examples to the figures of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.attacks import agreement, distances, strongest_transfers, transfer_matrix, vote, weight_shift
from qopt.report.comparison import AgreementRow, ExamplesRow, Matrix, OnExamples, VoteRow
from qopt.report.model import Share
from qopt.statistics import accuracy_interval


@final
@dataclass(frozen=True, eq=False)
class Made:
    """The examples of one method on one source.

    Attributes:
        choice: which of the method's attacks they come from; empty where it has only one.
        examples: (n, ...), like the images.
        logits: of the files of all m networks on them, (m, n, classes).
    """

    choice: str
    examples: Tensor
    logits: Tensor

    @property
    def predicted(self) -> Tensor:
        """Classes, int64 (m, n)."""
        return self.logits.argmax(2)


Sources = Mapping[int, Made]
"""By the number of the source, in the order of the networks; those that are no source are missing."""


def best_transfer(candidates: Sequence[Made], labels: Tensor, source: int) -> Made:
    """The one of ``candidates``, made on the same source, that leaves the other networks the lowest mean accuracy."""
    accuracies = transfer_matrix(torch.stack([made.predicted for made in candidates]), labels)
    matrices = torch.zeros(len(candidates), accuracies.shape[1], accuracies.shape[1], dtype=accuracies.dtype)
    matrices[:, source] = accuracies
    return candidates[int(strongest_transfers(matrices)[source])]


def share(correct: Tensor) -> Share:
    """In percent, of bool (n,)."""
    interval = accuracy_interval(correct.numpy())
    return Share(
        value=percent(interval.value), low=percent(interval.low), high=percent(interval.high), n=interval.n
    )  # fmt: skip


def percent(value: float) -> float:
    """A share as JSON has it: in percent, to six places."""
    return round(100 * value, 6)


def _percent(value: float | None) -> float | None:
    return None if value is None else percent(value)


def accuracies(sources: Sources, labels: Tensor, networks: int) -> Matrix:
    """In percent: row source, column target."""
    rows: Matrix = [[None] * networks for _ in range(networks)]
    for source, made in sources.items():
        rows[source] = [percent(value) for value in transfer_matrix(made.predicted[None], labels)[0].tolist()]
    return rows


def weight_shifts(sources: Sources, clean: Tensor) -> Matrix:
    """In percent: row source, column target; ``clean`` (m, n, classes) are logits on the clean images."""
    rows: Matrix = [[None] * len(clean) for _ in clean]
    for source, made in sources.items():
        shifts = [weight_shift(clean[source], made.logits[source], target) for target in made.logits]
        rows[source] = [percent(shift.rate) if shift.pairs else None for shift in shifts]
    return rows


def example_rows(
    sources: Sources, clean: Tensor, images: Tensor, labels: Tensor, keys: Sequence[str]
) -> list[ExamplesRow]:
    """How far the examples are from their images, of those that fool their source's file."""
    rows = []
    for source, made in sources.items():
        fooled = (clean[source].argmax(1) == labels) & (made.predicted[source] != labels)
        l2, linf = (distances(made.examples, images, norm)[fooled] for norm in ("l2", "linf"))
        means = [round(float(d.mean()), 6) if len(d) else 0.0 for d in (l2, linf)]
        rows.append(ExamplesRow(source=keys[source], choice=made.choice, fooled=len(l2), l2=means[0], linf=means[1]))
    return rows


def agreement_rows(
    methods: Mapping[str, Sources], clean: Tensor, labels: Tensor, keys: Sequence[str]
) -> list[AgreementRow]:
    """Table 5 of Bernhard et al. with every network as the source."""
    right = clean.argmax(2) == labels
    rows = []
    for source, key in enumerate(keys):
        plain = agreement(right, right, source)
        on_examples = {}
        for name, sources in methods.items():
            if source in sources:
                found = agreement(right, sources[source].predicted == labels, source)
                on_examples[name] = OnExamples(fooled=_percent(found.fooled), not_fooled=_percent(found.not_fooled))
        rows.append(
            AgreementRow(
                source=key, clean_right=_percent(plain.clean_right), clean_wrong=_percent(plain.clean_wrong),
                attacks=on_examples,
            )
        )  # fmt: skip
    return rows


def vote_rows(
    methods: Mapping[str, Sources], clean: Tensor, labels: Tensor, keys: Sequence[str]
) -> list[VoteRow]:  # fmt: skip
    """The ensemble of all networks on the clean images and on the examples of every source, for every majority."""
    places = [("", "", clean.argmax(2))]
    places += [
        (name, keys[source], made.predicted) for name, sources in methods.items() for source, made in sources.items()
    ]
    return [
        _vote_row(name, source, predicted, labels, threshold)
        for name, source, predicted in places
        for threshold in range(len(keys) // 2 + 1, len(keys) + 1)
    ]


def _vote_row(attack: str, source: str, predicted: Tensor, labels: Tensor, threshold: int) -> VoteRow:
    found = vote(predicted, labels, threshold)
    return VoteRow(
        attack=attack, source=source, threshold=threshold, prediction_rate=percent(found.prediction_rate),
        accuracy=_percent(found.accuracy), defence_accuracy=percent(found.defence_accuracy),
    )  # fmt: skip
