"""The main job: prepare, choose, emit, measure, judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import onnx_ir as ir
import torch
from torch import Tensor

from qopt import __version__
from qopt.cache import Cache, code_digest
from qopt.config import Options, parse_activations
from qopt.data import Data, Split
from qopt.errors import DataError, UnsupportedModelError, UsageError, VerificationError
from qopt.graph.compare import TOLERANCE, matches_onnxruntime
from qopt.graph.equalise import equalise
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.stored import give_back, release
from qopt.hardware.targets import Target, parse_target
from qopt.job.artefact import Artefact, EmittedFile, build_artefact, build_file, float_artefact, float_file, float_size
from qopt.job.bundle import Bundle, environment
from qopt.job.choose import Choice, choose
from qopt.job.equalised import contest_equalisation, tries_equalisation
from qopt.job.gates import judge, threshold_gates
from qopt.job.journal import Journal
from qopt.job.report import build_report, layer_metadata
from qopt.job.rows import Table
from qopt.job.run import Progress, Run
from qopt.job.sharing import Sharing
from qopt.job.sources import c_sources, check_forms
from qopt.job.sweep import sweep
from qopt.job.verify import verify
from qopt.measure.network import Normalisation
from qopt.plan import Plan
from qopt.quantize import ROUNDINGS, Applied, Quantizer, WeightOnly, whole_batches
from qopt.threat import ThreatModel, declared_threat


@final
@dataclass(frozen=True, eq=False)
class Task:
    """What the job works on.

    Attributes:
        model: as loaded.
        name: for the report.
        data: images, or None.
        options: what was asked.
        plan: a plan to apply instead of searching, or None.
        source: facts about the user's file for the manifest: ``file``, ``sha256``, ``bytes``; empty for a module.
        command: how to run it again.
        axes: sizes of dynamic axes, as `prepare` takes them.
        emit: what to write beside the ONNX file, of `sources.FORMS`.
    """

    model: ir.Model
    name: str
    data: Data | None
    options: Options
    plan: Plan | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    axes: Mapping[str, int] = field(default_factory=dict)
    emit: tuple[str, ...] = ()


def optimize_model(
    task: Task,
    cache: Cache,
    progress: Progress,
    journal: Journal | None = None,
    sharing: Sharing | None = None,
) -> Bundle:
    """Run the main job; ``cache`` keeps expensive evaluations by content, ``progress`` is told each step.

    ``journal`` gets every plan that is measured, and is asked first; ``sharing`` lets other machines take part.

    Raises:
        QoptError: as its steps do; nothing but the journal is written here.
        UsageError: the journal is of another run.
    """
    check_forms(task.emit, task.data is not None)
    clock, journal = Clock(progress), journal or Journal()
    run = start(task, cache, clock)
    journal.open(_identity(run))
    choice = choose(run, journal, sharing)
    if tries_equalisation(task.options, task.plan is not None):
        clock("the same on the equalised network")
        on = replace(task, options=replace(task.options, equalisation="on"))
        run, choice = contest_equalisation(run, choice, lambda: start(on, cache, clock))
    _let_go(run)
    clock("emit and check the file")
    sources, c_facts = c_sources(run, choice.applied) if "c" in task.emit else ({}, {})
    artefact, reference = _files(run, choice)
    _let_go(run)
    clock("verify the file in a fresh process")
    verified = verify(run, choice.applied, artefact, reference)
    table = _measured(run, choice, verified.file, reference)
    row = next((r for r in table.rows if r.name == OURS), None) if table else None
    gates = threshold_gates(run, choice.facts)
    gates += [] if row is None else judge(task.options.active_gates, row)
    float_bytes = task.source.get("bytes") or (reference.size if reference else float_size(run.prepared.model))
    report = build_report(run, choice, verified.file, table, gates, float_bytes, task.command)
    clock("")
    manifest = {
        **environment(), "source": dict(task.source), "seed": task.options.seed, "options": task.options.as_dict(),
        "seconds": clock.seconds, "passes": choice.applied.seconds, "latency_seconds": verified.latency,
        "cache_hits": sorted(set(cache.hits)), "threads": torch.get_num_threads(),
        **({"c": c_facts} if c_facts else {}),
    }  # fmt: skip
    plan = choice.applied.plan
    return Bundle(artefact.data, plan, report, manifest, journal.text, sources, artefact.external)


def _identity(run: Run) -> dict[str, Any]:
    """What the measurements of a search depend on, by words for messages."""
    options = {f"--{name.replace('_', '-')}": value for name, value in run.options.as_dict().items()}
    return {
        "version": f"{__version__} {code_digest()[:12]}", "model": run.prepared.digest,
        "data": "" if run.data is None else run.data.digest, **options,
    }  # fmt: skip


OURS = "qopt"
"""The emitted file's row."""


class Clock:
    """Times the steps between its calls and passes their names on; steps alike up to a colon are timed as one."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._step, self._began = "prepare the model", time.perf_counter()

    def __call__(self, step: str) -> None:
        """``step`` begins, the one before it ends."""
        now = time.perf_counter()
        self.seconds[self._step] = round(self.seconds.get(self._step, 0.0) + now - self._began, 3)
        self._step, self._began = step.partition(":")[0], now
        if step:
            self.progress(step)


def start(task: Task, cache: Cache, progress: Progress) -> Run:
    """Check the options against model and data, prepare the graph and, where it has one, its twin.

    Raises:
        DataError: images for a network that takes none.
        UnsupportedModelError: images for a network with an operator that the twin does not have.
        VerificationError: the twin computes something else than ONNX Runtime does.
    """
    data, options = task.data, task.options
    target = _target(options)
    progress("prepare the model")
    prepared, notes = prepare(task.model, task.axes), list[str]()
    if data is None:
        _check_needs_no_data(options, prepared)
    elif not prepared.image:
        raise _takes_no_data(prepared)
    if options.equalisation == "on" if task.plan is None else task.plan.equalisation:
        prepared, notes = _equalised(prepared)
    if not prepared.layers:
        raise _no_layers(prepared, task.name)
    shaped = None if data is None else data.shaped(prepared.input_shape)
    normalisation = Normalisation(options.mean, options.std)
    calibration = None
    if shaped is not None:
        _check_labels(shaped, prepared.classes)
        images = torch.from_numpy(shaped.calibrate.first(options.calibration_images).images)
        calibration = whole_batches(normalisation(images), prepared.batch)
    weights, unattacked = _quantizer(prepared, calibration, list(notes))
    run = Run(
        task.name, prepared, weights, shaped, options, target, _threat(options, prepared), cache, progress, task.plan,
        unattacked,
    )  # fmt: skip
    if shaped is not None and options.calibrated_on != "clean":
        progress(f"{options.calibrated_on} images to calibrate on")
        images = normalisation(_attacked_calibration(run, shaped.calibrate.first(options.calibration_images)))
        run = replace(run, weights=Quantizer(prepared, whole_batches(images, prepared.batch), notes=list(notes)))
    if unattacked:
        run.left_out.append(unattacked)
    elif data is None and options.robust:
        run.left_out.append("adversarial sensitivities, attacks and gates: they need --data")
    return run


def _quantizer(prepared: Prepared, calibration: Tensor | None, notes: list[str]) -> tuple[WeightOnly, str]:
    """What applies plans, with the twin where there is one, else with why nothing can be attacked.

    Where there are images to attack with, a twin that cannot be built is an error.
    """
    if not prepared.image:
        return WeightOnly(prepared, notes=notes), f"not attacked: {prepared.other}"
    try:
        quantizer = Quantizer(prepared, calibration, notes=notes)
    except UnsupportedModelError as error:
        if calibration is not None:
            raise
        return WeightOnly(prepared, notes=notes), f"not attacked: {error.what}, {error.where}"
    _check_twin(prepared, quantizer)
    return quantizer, ""


def _takes_no_data(prepared: Prepared) -> DataError:
    return DataError(
        "attacks and activation quantization need one float image in and logits out", where="--data",
        got=f"a network that does not: {prepared.other}", fix="leave out --data: weights are quantized without it",
    )  # fmt: skip


def _equalised(prepared: Prepared) -> tuple[Prepared, list[str]]:
    if not prepared.image:
        got = f"another network: {prepared.other}"
        raise UsageError("equalisation is for classifiers of images", where="--equalisation", got=got)
    return equalise(prepared)


def _attacked_calibration(run: Run, clean: Split) -> Tensor:
    """The calibration images with all, or for ``mixed`` every second one, replaced by adversarial ones; in [0, 1]."""
    chosen = slice(None) if run.options.calibrated_on == "adversarial" else slice(1, None, 2)
    images = torch.from_numpy(clean.images.copy())
    few = Split(clean.images[chosen], clean.labels[chosen])
    if len(few):
        images[chosen] = run.attacked(few, run.seed("calibration"))
    return images


def _no_layers(prepared: Prepared, name: str) -> UnsupportedModelError:
    if any(node.op_type in ("DequantizeLinear", "QuantizeLinear", "MatMulNBits") for node in prepared.model.graph):
        return UnsupportedModelError(
            "the model is quantized already", where=name, fix="give the float model that it was made from"
        )
    return UnsupportedModelError(
        "the model has no layer that can be quantized", where=name, expected="a convolution or a matrix product"
    )


def _check_needs_no_data(options: Options, prepared: Prepared) -> None:
    fix = (
        "give --data" if prepared.image else f"leave it out: no image can be run through the network, {prepared.other}"
    )
    needs = {
        "--gate": ("gates are measured on images", bool(options.gates)),
        "--thresholds": ("weighted thresholds weigh by the inputs of layers", options.thresholds == "weighted"),
        "--calibration": ("adversarial images are made of images", options.calibration not in ("auto", "clean")),
        "--bias-correction": ("bias correction needs images", options.bias_correction == "on"),
        "--sensitivity": ("the sensitivities are measured on images", options.sensitivity not in ("auto", "error")),
        "--rows": ("formats per output channel are weighed by the inputs of layers", options.rows == "on"),
        "--activations": ("ranges of activations are observed on images", options.activations not in (None, "float")),
        "--rounding": (f"{ROUNDINGS.get(options.rounding)} needs images", options.rounding in ROUNDINGS),
    }
    for option, (what, asked) in needs.items():
        if asked:
            raise UsageError(what, where=option, fix=fix)


def _check_twin(prepared: Prepared, quantizer: Quantizer) -> None:
    differs = matches_onnxruntime(prepared, quantizer.float_graph)
    if differs > TOLERANCE:
        raise VerificationError(
            "the twin computes something else than ONNX Runtime", expected=f"at most {TOLERANCE:g}",
            got=f"relative difference {differs:.2g}",
        )  # fmt: skip


def _target(options: Options) -> Target:
    target = parse_target(options.target)
    limits = tuple(dict.fromkeys((*target.limits, *options.limits)))
    if options.activations is None:
        return replace(target, limits=limits)
    activations, *narrower = parse_activations(options.activations)
    return replace(target, limits=limits, activations=activations, narrower=tuple(narrower))


def _threat(options: Options, prepared: Prepared) -> ThreatModel:
    return declared_threat(options.norm, options.eps, prepared.input_shape)


def _check_labels(data: Data, classes: int) -> None:
    for part in (data.calibrate, data.select, data.report):
        if part.labels.min() < 0 or part.labels.max() >= classes:
            got = f"{part.labels.min()} to {part.labels.max()}"
            raise DataError("labels out of range", where="--data", expected=f"0 to {classes - 1}", got=got)


def _let_go(run: Run) -> None:
    """Give back what a streamed network no longer needs."""
    if run.streamed:
        release(run.prepared.model)
        give_back()


def _files(run: Run, choice: Choice) -> tuple[EmittedFile, EmittedFile | None]:
    """The file and, but for a streamed network, the float one; with images both with their twins."""
    metadata = layer_metadata(choice)
    if run.streamed:
        run.left_out.append("latency and the kernels after fusion: weights stay in their file, and so do float ones")
        return build_file(run, choice.applied, metadata), None
    if run.data is None:
        return build_file(run, choice.applied, metadata), float_file(run)
    assert isinstance(choice.applied, Applied)
    return build_artefact(run, choice.applied, metadata), float_artefact(run)


def _measured(run: Run, choice: Choice, artefact: EmittedFile, reference: EmittedFile | None) -> Table | None:
    """What was measured on images; None without."""
    if run.data is None:
        return None
    assert isinstance(artefact, Artefact)
    assert isinstance(reference, Artefact)
    assert isinstance(choice.applied, Applied)
    table = Table(run)
    table.add_float(reference)
    for baseline in run.options.baselines:
        table.add_baseline(baseline)
    table.add(OURS, artefact, choice.applied, naive=True)
    table.compare(reference, artefact)
    if run.options.effort != "fast":
        table.sweep = sweep(run, {"float": reference, OURS: artefact})
    return table
