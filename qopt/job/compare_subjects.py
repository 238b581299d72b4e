"""The networks that are compared: opened, named so that they can be told apart, and proven to fit each other."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qopt.attacks import predict
from qopt.errors import ModelError, QoptError, UsageError
from qopt.measure.network import Normalisation
from qopt.measure.subject import Subject, open_subject

KEYS: Final = string.ascii_uppercase
"""The letters that stand for the networks in tables; there are no more networks than letters."""


def open_all(
    models: Sequence[Path],
    names: Sequence[str],
    normalisation: Normalisation,
    threads: int,
    progress: Callable[[str], None],
) -> list[Subject]:
    """Every file as a subject.

    Raises:
        UsageError: they take images of different shapes.
        QoptError: as `open_subject`, naming the file.
    """
    subjects: list[Subject] = []
    for path, name in zip(models, names, strict=True):
        progress(f"open {name}")
        try:
            subjects.append(open_subject(path, normalisation, threads=threads))
        except QoptError as error:
            raise error if error.where and path.name in error.where else error.at(str(path)) from error
        first, last = subjects[0].input_shape, subjects[-1].input_shape
        if first != last:
            raise UsageError(
                "the networks take images of different shapes", where=str(path), expected=f"{first}, as {names[0]}",
                got=str(last),
            )  # fmt: skip
    return subjects


def tell_apart(models: Sequence[Path]) -> list[str]:
    """The files' names without their endings, with as many folders before them as tell them apart.

    Raises:
        UsageError: too few or too many of them, or one twice.
    """
    if not 2 <= len(models) <= len(KEYS):
        raise UsageError("networks are compared with each other", expected=f"2 to {len(KEYS)}", got=str(len(models)))
    whole = [path.resolve() for path in models]
    for path, there in zip(models, whole, strict=True):
        if whole.count(there) > 1:
            raise UsageError("the same file twice", where=str(path), fix="give each network once")
    named = [path.absolute() for path in models]  # a link is called what the user calls it
    stems = [(*path.parts[:-1], path.stem) for path in named]
    if len(set(stems)) < len(stems):
        stems = [path.parts for path in named]
    return ["/".join(parts[-_depth(parts, stems) :]) for parts in stems]


def _depth(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> int:
    return next(k for k in range(1, len(parts) + 1) if sum(other[-k:] == parts[-k:] for other in others) == 1)


def clean_logits(subjects: Sequence[Subject], names: Sequence[str], images: Tensor) -> Tensor:
    """Logits of all m files on the n images, (m, n, classes).

    Raises:
        UsageError: they know different numbers of classes.
        ModelError: as `predict`, naming the network.
    """
    rows: list[Tensor] = []
    for subject, name in zip(subjects, names, strict=True):
        try:
            rows.append(predict(subject.artefact, images))
        except ModelError as error:
            raise error.at(name) from error
        if rows[0].shape != rows[-1].shape:
            raise UsageError(
                "the networks know different numbers of classes", where=name,
                expected=f"{rows[0].shape[1]}, as {names[0]}", got=str(rows[-1].shape[1]),
            )  # fmt: skip
    return torch.stack(rows)
