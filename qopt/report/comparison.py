"""What a comparison of several networks found out, as data; `qopt.report.comparison_views` draws it."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from qopt.documents import Document, read
from qopt.errors import UsageError
from qopt.report.model import Share

Matrix = list[list[float | None]]
"""Numbers by row and column, both in the order of the models; a row is None where a model is no source."""


@final
class ComparedModel(Document):
    """One network.

    Attributes:
        key: the letter that stands for it in tables.
        name: its file's name, with as much of the path as tells it from the others.
        digest: SHA-256 of the file.
        clean: accuracy of the file.
        twin_agreement: share of the images, in percent, of which file and twin predict the same class.
        no_gradients: why it has no twin, so that examples are made on it by queries only; empty where it has one.
        quantized_activations: whether it has any.
    """

    key: str
    name: str
    digest: str
    clean: Share
    twin_agreement: float | None
    no_gradients: str
    quantized_activations: bool


@final
class ExamplesRow(Document):
    """The examples of one attack that were made on one network.

    Attributes:
        source: the network's key.
        choice: what was chosen because it transfers best, such as ``kappa 15``; empty where there was no choice.
        fooled: how many of the images that the source's file gets right it gets wrong now.
        l2: mean l2 distance of those from their images; 0 where there are none, like ``linf``.
        linf: mean largest change of a pixel, in [0, 1].
    """

    source: str
    choice: str
    fooled: int
    l2: float
    linf: float


@final
class AttackFigures(Document):
    """One attack, its examples made on every network that can be a source and judged by the files of all.

    Attributes:
        name: the attack with its steps.
        bound: how far the examples may be from their images.
        accuracy: of the network of the column, in percent, on the examples made on that of the row.
        weight_shift: of the pairs of logits whose order the attack reversed in the network of the row, those that the
            network of the column has in their first order, in percent; None where no pair was reversed.
        examples: what the examples are like, by source.
    """

    name: str
    bound: str
    accuracy: Matrix
    weight_shift: Matrix
    examples: list[ExamplesRow]


@final
class OnExamples(Document):
    """Agreement on the examples of one attack, in percent, of those that do and that do not fool the source."""

    fooled: float | None
    not_fooled: float | None


@final
class AgreementRow(Document):
    """On how many images all other networks fare like the source, in percent; None where there is no such image."""

    source: str
    clean_right: float | None
    clean_wrong: float | None
    attacks: dict[str, OnExamples]


@final
class ValueShift(Document):
    """The activation shift of one value; ``images`` is the share of images, in percent, with at least one such pair."""

    value: str
    rate: float
    images: float


@final
class ActivationShiftRow(Document):
    """Pairs of activations that differ in one network and are equal in the other, whose activations are quantized.

    Attributes:
        attack: whose examples, made on the source, both networks look at.
        source: the key of the network with float activations.
        target: the key of the one with quantized activations.
        rate: such pairs of all that differ in the source, of all values, in percent.
        quantized: values that the target quantizes.
        values: those of them that the source has too, under the same name and of the same shape.
    """

    attack: str
    source: str
    target: str
    rate: float
    quantized: int
    values: list[ValueShift]


@final
class VoteRow(Document):
    """The ensemble of all networks that answers where ``threshold`` of them or more agree; shares in percent.

    Attributes:
        attack: whose examples; empty for the clean images.
        source: on which network they were made; empty for the clean images.
        threshold: networks that must agree.
        prediction_rate: share of the images that it answers.
        accuracy: share of right answers among its answers; None where it never answers.
        defence_accuracy: share of the images that it does not answer wrongly.
    """

    attack: str
    source: str
    threshold: int
    prediction_rate: float
    accuracy: float | None
    defence_accuracy: float


@final
class Comparison(Document):
    """Everything that `compare` found out, in the order that it is shown in.

    Attributes:
        schema_: the format version (key ``schema``).
        command: how to run it again.
        threat: the threat model of the bounded attacks.
        images: how many images everything was measured on.
        shifted: the first so many of them were looked at for activation shifts.
        data: digest of those images and their labels.
        cosines: mean cosine between the gradients of two networks, in [-1, 1]; None where one has none.
        notes: what the reader must know.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    command: str
    threat: str
    seed: int
    images: int
    shifted: int
    data: str
    models: list[ComparedModel]
    attacks: list[AttackFigures]
    cosines: Matrix
    agreement: list[AgreementRow]
    activation_shift: list[ActivationShiftRow]
    votes: list[VoteRow]
    notes: list[str]

    @staticmethod
    def from_json(text: str, where: str = "comparison") -> Comparison:
        """Parse a comparison; raises UsageError naming ``where`` and the first thing wrong."""
        return read(Comparison, text, where, UsageError)

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline; equal runs give equal bytes."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
