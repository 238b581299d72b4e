"""A comparison of networks as Markdown, as an HTML page with heat maps, and for terminals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from qopt.files import write_folder
from qopt.report.comparison import ActivationShiftRow, Comparison, ExamplesRow
from qopt.report.heatmap import HeatMap, number
from qopt.report.numbers import share
from qopt.report.tables import Section, Table, matrix_table, page

TITLE: Final = "Networks compared under attack"


def write(found: Comparison, folder: Path) -> None:
    """Write ``compare.json``, ``compare.md`` and ``compare.html`` into ``folder``, made if needed.

    Raises:
        UsageError: the folder cannot be written to.
    """
    made = {"compare.json": found.to_json(), "compare.md": markdown(found), "compare.html": html(found)}
    write_folder(folder, {name: content.encode() for name, content in made.items()})


def markdown(found: Comparison) -> str:
    """Every section, with the setting above and the command below; tables in GitHub's flavour, no HTML."""
    parts = [f"# {TITLE}", *_setting(found), *(section.markdown() for section in sections(found))]
    parts += ["## Reproduce\n\n    " + found.command] if found.command else []
    return "\n\n".join(parts) + "\n"


def html(found: Comparison) -> str:
    """Every section on one page, matrices as heat maps; it needs no other file and runs no script."""
    setting = Section("Setting", (*_setting(found), found.command))
    return page(TITLE, [setting, *sections(found)])


def text(found: Comparison) -> str:
    """The sections that are no details, for a terminal, ending in a newline."""
    parts = [*_setting(found), *(section.text() for section in sections(found) if not section.detail)]
    return "\n\n".join(parts) + "\n"


def _setting(found: Comparison) -> list[str]:
    return [f"{found.images} test images, {found.threat}, seed {found.seed}. Numbers are percent unless they say else."]


def sections(found: Comparison) -> list[Section]:
    """The parts of the report, in order; those that would be empty are left out."""
    parts = [
        _models(found), _transfers(found), _examples(found), _cosines(found), _agreement(found), _weight_shift(found),
        _activation_shift(found), _shifted_values(found), _ensemble(found),
        Section("Notes", tables=(("", Table(("note",), tuple((note,) for note in found.notes))),)),
    ]  # fmt: skip
    return [part for part in parts if any(table.rows for _, table in part.tables)]


def _models(found: Comparison) -> Section:
    rows = tuple(
        (
            m.key, m.name, share(m.clean), "quantized" if m.quantized_activations else "float",
            "-" if m.twin_agreement is None else number(m.twin_agreement, 1), m.digest[:12],
        )
        for m in found.models
    )  # fmt: skip
    header = ("", "network", "clean accuracy", "activations", "twin predicts the same", "SHA-256")
    return Section("Networks", tables=(("", Table(header, rows, left=(1, 3, 5))),))


def _transfers(found: Comparison) -> Section:
    clean = [m.clean.value for m in found.models]
    tables, maps = [], []
    for attack in found.attacks:
        caption = f"{attack.name}, {attack.bound}"
        names = ("clean images", *_names(found))
        values = (tuple(clean), *map(tuple, attack.accuracy))
        tables.append((caption, matrix_table(names, _keys(found), values, 1)))
        maps.append(HeatMap(caption, names, _keys(found), values))
    notes = (
        "Accuracy of the file of the column on examples that were made on the network of the row. "
        "Images that the source gets wrong from the start are left as they are.",
    )
    return Section("Transfers", notes, tuple(tables), tuple(maps), mapped=len(tables))


def _examples(found: Comparison) -> Section:
    header = ("attack", "made on", "fooled", "mean l2", "mean linf", "chosen")
    rows = tuple((attack.name, *_example(row)) for attack in found.attacks for row in attack.examples)
    notes = ("Distances of the examples that fool the file they were made for, pixels in [0, 1].",)
    return Section("Examples", notes, (("", Table(header, rows, left=(1, 5))),), detail=True)


def _example(row: ExamplesRow) -> tuple[str, ...]:
    distances = (f"{row.l2:.3f}", f"{row.linf:.4f}") if row.fooled else ("-", "-")
    return (row.source, str(row.fooled), *distances, row.choice or "-")


def _cosines(found: Comparison) -> Section:
    if all(value is None for row in found.cosines for value in row):
        return Section("Gradients")
    drawn = HeatMap(
        "cosine between gradients", _names(found), _keys(found), tuple(map(tuple, found.cosines)), largest=1.0,
        digits=2, unit="",
    )  # fmt: skip
    notes = (
        "Mean cosine, -1 to 1, between the gradients of the loss on clean images. "
        "The diagonal is the share of images whose gradient is neither zero nor infinite.",
    )
    return Section(
        "Gradients", notes, (("", matrix_table(_names(found), _keys(found), found.cosines, 2)),), (drawn,), mapped=1
    )


def _agreement(found: Comparison) -> Section:
    header = ("source", "clean", *(attack.name for attack in found.attacks))
    rows = []
    for row in found.agreement:
        cells = [_pair(row.clean_right, row.clean_wrong)]
        for attack in found.attacks:
            made = row.attacks.get(attack.name)
            cells.append("-" if made is None else _pair(made.not_fooled, made.fooled))
        rows.append((_name(found, row.source), *cells))
    notes = (
        "Share of images on which all other networks fare like the source: where it is right / where it is wrong; "
        "of examples, where it is not fooled / where it is.",
    )
    return Section("Agreement", notes, (("", Table(header, tuple(rows))),))


def _pair(first: float | None, second: float | None) -> str:
    return " / ".join(_shown(value, 1) for value in (first, second))


def _weight_shift(found: Comparison) -> Section:
    tables = tuple(
        (attack.name, matrix_table(_names(found), _keys(found), attack.weight_shift, 1)) for attack in found.attacks
    )
    maps = tuple(
        HeatMap(attack.name, _names(found), _keys(found), tuple(map(tuple, attack.weight_shift)))
        for attack in found.attacks
    )
    notes = (
        "Of the pairs of logits whose order the attack reversed in the network of the row, those that the network of "
        "the column has in their first order. Where its activations are quantized, they have their part in it.",
    )
    return Section("Shift of logits by the weights", notes, tables, maps, mapped=len(tables))


def _activation_shift(found: Comparison) -> Section:
    header = ("examples", "float", "quantized", "made equal", "values found of those quantized")
    rows = tuple(
        (s.attack, _name(found, s.source), _name(found, s.target), _rate(s.rate), f"{len(s.values)} of {s.quantized}")
        for s in found.activation_shift
    )
    notes = (
        "Of the pairs of activations of one value that differ in the float network, those that are equal in the "
        f"quantized one, on the examples of the first {found.shifted} images made on the former.",
    )
    return Section("Shift of activations by their quantization", notes, (("", Table(header, rows, left=(1, 2))),))


def _shifted_values(found: Comparison) -> Section:
    tables = []
    for name in dict.fromkeys(row.attack for row in found.activation_shift):
        rows = [row for row in found.activation_shift if row.attack == name]
        header = ("value", *(f"{row.source} to {row.target}" for row in rows))
        tables.append((name, Table(header, tuple(_value_rows(rows)))))
    return Section("Shift of activations, value by value", tables=tuple(tables), detail=True)


def _value_rows(rows: list[ActivationShiftRow]) -> Iterator[tuple[str, ...]]:
    rates = [{value.value: value.rate for value in row.values} for row in rows]
    for name in dict.fromkeys(value.value for row in rows for value in row.values):
        yield name, *("-" if name not in found else _rate(found[name]) for found in rates)


def _ensemble(found: Comparison) -> Section:
    thresholds = sorted({vote.threshold for vote in found.votes})
    header = ("examples", "made on", *(f"{m} of {len(found.models)} agree" for m in thresholds))
    places = dict.fromkeys((vote.attack, vote.source) for vote in found.votes)
    rows = []
    for attack, source in places:
        votes = [vote for vote in found.votes if (vote.attack, vote.source) == (attack, source)]
        cells = (
            f"{number(v.prediction_rate, 1)} / {_shown(v.accuracy, 1)} / {number(v.defence_accuracy, 1)}" for v in votes
        )
        rows.append((attack or "clean images", source or "-", *cells))
    notes = (
        "All networks together, answering only where enough of them agree: share of images answered (PR) / right "
        "answers among them / images not answered wrongly (d_acc).",
    )
    return Section("Ensemble", notes, (("", Table(header, tuple(rows), left=(1,))),))


def _names(found: Comparison) -> tuple[str, ...]:
    return tuple(f"{model.key} {model.name}" for model in found.models)


def _name(found: Comparison, key: str) -> str:
    return next(name for name, model in zip(_names(found), found.models, strict=True) if model.key == key)


def _keys(found: Comparison) -> tuple[str, ...]:
    return tuple(model.key for model in found.models)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else number(value, digits)


def _rate(value: float) -> str:
    """Shifts are often a small part of a percent."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
