"""Several model files attacked side by side: `qopt compare`, the study of Bernhard et al. 2019 on the user's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from qopt.attacks import Shift, gradient_cosines, predict, probability_warning
from qopt.attacks.score import check_labels
from qopt.cache import Cache
from qopt.data import Data, load_data
from qopt.errors import UnsupportedModelError, UsageError, nearest
from qopt.job.compare_activations import activation_shifts
from qopt.job.compare_examples import Bench, Method
from qopt.job.compare_figures import (
    Made,
    Sources,
    accuracies,
    agreement_rows,
    best_transfer,
    example_rows,
    percent,
    share,
    vote_rows,
    weight_shifts,
)
from qopt.job.compare_options import CompareOptions, command_line
from qopt.job.compare_subjects import KEYS, clean_logits, open_all, tell_apart
from qopt.measure.network import Normalisation, predictions
from qopt.measure.subject import Subject
from qopt.report.comparison import ActivationShiftRow, AttackFigures, ComparedModel, Comparison, Matrix, ValueShift
from qopt.report.comparison_views import write
from qopt.threat import ThreatModel, default_threat, parse_eps

SHIFTED: Final = 50
"""Images on which activation shifts are looked at, at most: every layer of every image is sorted."""


@final
@dataclass(frozen=True, eq=False)
class CompareTask:
    """What is compared.

    Attributes:
        models: files, two or more.
        data: of which the report part is used.
        options: what was asked.
        threads: of each file's session in ONNX Runtime.
        command: how to run it again.
    """

    models: tuple[Path, ...]
    data: Data
    options: CompareOptions
    threads: int = 1
    command: str = ""


def compare(
    models: Sequence[str | Path],
    *,
    data: str | Path | Data,
    eps: float | str | None = None,
    threads: int = 1,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Comparison:
    """Attack each of several networks, and see what its examples do to all the others.

    Examples are made on every network, by gradients on its twin and by queries on its file, and judged by the files
    of all. From that come transfers, the agreement of gradients and of errors, how often quantization undoes what an
    attack did, and what an ensemble of the networks would answer (Bernhard et al. 2019).

    Args:
        models: two or more files that carry their graph (ONNX or `torch.export`), quantized by anyone, for the same
            images and classes. Activations are compared with the first one that has float activations.
        data: ``.npz``, folder of class folders, ``package.module:factory``, or `Data`; the test images are used.
        eps: radius of the threat model, pixels in [0, 1], as a number or like ``"8/255"``.
        threads: of each file's session in ONNX Runtime.
        out: folder for ``compare.json``, ``compare.md`` and ``compare.html``; None writes nothing.
        cache: folder that keeps examples by content; None keeps nothing.
        progress: told the name of each step as it begins.
        **options: the other fields of `CompareOptions`.

    Returns:
        The comparison; the same for the same files, images, options and seed.

    Raises:
        UsageError: a wrong option or path, fewer than two networks, or networks that do not fit each other or the data
            (exit code 2).
        ModelError: a network that is corrupt or no classifier of images, or none that any attack can start from (exit
            code 3).
    """
    known = [field.name for field in fields(CompareOptions)]
    for name in options:
        if name not in known:
            raise UsageError("unknown option", got=repr(name), fix=nearest(name, known))
    resolved = CompareOptions(eps=parse_eps(eps) if isinstance(eps, str) else eps, **options)
    loaded = data if isinstance(data, Data) else load_data(str(data))
    command = command_line(models, None if isinstance(data, Data) else str(data), resolved)
    task = CompareTask(tuple(map(Path, models)), loaded, resolved, threads, command)
    found = compare_models(task, Cache(None if cache is None else Path(cache)), progress or (lambda step: None))
    if out is not None:
        write(found, Path(out))
    return found


def compare_models(task: CompareTask, cache: Cache, progress: Callable[[str], None]) -> Comparison:
    """As `compare`, with everything resolved; nothing is written."""
    options = task.options
    normalisation = Normalisation(options.mean, options.std)
    names = tell_apart(task.models)
    subjects = open_all(task.models, names, normalisation, task.threads, progress)
    few = task.data.shaped(subjects[0].input_shape).report.first(options.images)
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    threat = default_threat(images.shape[1])
    threat = ThreatModel(options.norm, threat.eps if options.eps is None else options.eps)
    bench = Bench(images, labels, threat, normalisation, options.seed, cache)
    clean = clean_logits(subjects, names, images)
    check_labels(labels, len(labels), clean.shape[2])
    keys = KEYS[: len(subjects)]
    notes = [f"{k}: {text}" for k, logits in zip(keys, clean, strict=True) if (text := probability_warning(logits))]
    notes += [f"{k}: no gradients, so no source of attacks that need them: {s.no_twin}"
              for k, s in zip(keys, subjects, strict=True) if s.twin is None]  # fmt: skip
    methods = {m.name: (m, _made(m, bench, subjects, clean, progress)) for m in options.methods(threat)}
    made = {name: sources for name, (_, sources) in methods.items() if sources}
    if not made:
        raise UnsupportedModelError(
            "no network has gradients, which all of these attacks need", where=", ".join(options.attacks),
            got=subjects[0].no_twin, fix="--attack spsa needs none",
        )  # fmt: skip
    notes += [f"{name}: no network has the gradients that it needs" for name in methods if name not in made]
    progress("gradients, activations and votes")
    return Comparison(
        command=task.command, threat=str(threat), seed=options.seed, images=len(images),
        shifted=min(SHIFTED, len(images)), data=bench.digest,
        models=[_model(*row, images, labels) for row in zip(keys, names, subjects, clean, strict=True)],
        attacks=[
            AttackFigures(
                name=name, bound=methods[name][0].bound, accuracy=accuracies(sources, labels, len(subjects)),
                weight_shift=weight_shifts(sources, clean),
                examples=example_rows(sources, clean, images, labels, keys),
            )
            for name, sources in made.items()
        ],
        cosines=_cosines(bench, subjects, clean),
        agreement=agreement_rows(made, clean, labels, keys),
        activation_shift=list(_activation_shifts(subjects, made, keys)),
        votes=vote_rows(made, clean, labels, keys),
        notes=[*task.data.notes, *notes],
    )  # fmt: skip


def _made(
    method: Method, bench: Bench, subjects: Sequence[Subject], clean: Tensor, progress: Callable[[str], None]
) -> Sources:
    """Examples of a method on every network that it can be made on, with what all files say of them."""
    sources = {}
    for number, subject in enumerate(subjects):
        if subject.twin is None and not method.queries:
            continue
        candidates = []
        for choice, attack in method.attacks.items():
            progress(f"{method.name} {choice}".strip() + f" on {KEYS[number]}")
            examples = bench.examples(subject, attack, clean[number], method.queries)
            logits = torch.stack([predict(target.artefact, examples) for target in subjects])
            candidates.append(Made(choice if len(method.attacks) > 1 else "", examples, logits))
        sources[number] = best_transfer(candidates, bench.labels, number)
    return sources


def _model(
    key: str, name: str, subject: Subject, logits: Tensor, images: Tensor, labels: Tensor
) -> ComparedModel:  # fmt: skip
    predicted = logits.argmax(1)
    same = None if subject.twin is None else predictions(subject.twin, images) == predicted
    return ComparedModel(
        key=key, name=name, digest=subject.digest, clean=share(predicted == labels),
        twin_agreement=None if same is None else percent(float(same.double().mean())),
        no_gradients=subject.no_twin, quantized_activations=subject.staircase,
    )  # fmt: skip


def _cosines(bench: Bench, subjects: Sequence[Subject], clean: Tensor) -> Matrix:
    rows: Matrix = [[None] * len(subjects) for _ in subjects]
    able = [number for number, subject in enumerate(subjects) if subject.twin is not None]
    if able:
        gradients = torch.stack([bench.gradients(subjects[number], clean[number]) for number in able])
        cosines = gradient_cosines(gradients).tolist()
        for row, values in zip(able, cosines, strict=True):
            for column, value in zip(able, values, strict=True):
                rows[row][column] = round(value, 6)
    return rows


def _activation_shifts(
    subjects: Sequence[Subject], methods: dict[str, Sources], keys: Sequence[str]
) -> Iterator[ActivationShiftRow]:
    """From the first network with float activations to every one with quantized ones, on the examples of the first."""
    source = next((i for i, s in enumerate(subjects) if s.twin is not None and not s.staircase), None)
    plain = None if source is None else subjects[source].twin
    if source is None or plain is None:
        return
    for name, made in methods.items():
        for number, subject in enumerate(subjects):
            if subject.twin is None or not subject.staircase:
                continue
            found = activation_shifts(plain, subject.twin, made[source].examples[:SHIFTED])
            yield ActivationShiftRow(
                attack=name, source=keys[source], target=keys[number], rate=percent(found.rate),
                quantized=found.quantized, values=[_value_shift(*item) for item in found.values.items()],
            )  # fmt: skip


def _value_shift(name: str, shift: Shift) -> ValueShift:
    return ValueShift(value=name, rate=percent(shift.rate), images=percent(shift.images))
