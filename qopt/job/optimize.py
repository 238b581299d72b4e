"""The main job: prepare, choose, emit, measure, judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir
import torch

from qopt.cache import Cache
from qopt.config import Options
from qopt.data import Data
from qopt.errors import UsageError
from qopt.graph.prepare import prepare
from qopt.hardware.targets import Target, parse_target
from qopt.job.artefact import Artefact, build_artefact, float_artefact
from qopt.job.bundle import Bundle, environment
from qopt.job.choose import Choice, choose
from qopt.job.gates import judge
from qopt.job.report import build_report, layer_metadata
from qopt.job.rows import Table
from qopt.job.run import Progress, Run
from qopt.measure.network import Normalisation
from qopt.quantize import Quantizer
from qopt.runtime.latency import measure_latency
from qopt.runtime.session import to_bytes
from qopt.spec import ActivationSpec
from qopt.threat import ThreatModel, default_threat


def optimize_model(
    model: ir.Model, name: str, data: Data | None, options: Options, cache: Cache, progress: Progress, float_bytes: int
) -> Bundle:
    """Run the main job on a loaded model.

    Args:
        model: as loaded.
        name: for the report.
        data: images, or None.
        options: what was asked.
        cache: expensive evaluations by content.
        progress: told each step.
        float_bytes: size of the user's file; 0 takes the prepared graph's.

    Raises:
        QoptError: as its steps do; nothing is written here.
    """
    clock = Clock(progress)
    run = start(model, name, data, options, cache, clock)
    choice = choose(run)
    clock("emit and check the file")
    artefact = build_artefact(run, choice.applied, layer_metadata(choice))
    reference = float_artefact(run)
    table = _measure(run, choice, artefact, reference)
    row = next((r for r in table.rows if r.name == OURS), None) if table else None
    gates = [] if row is None else judge(options.active_gates, row)
    report = build_report(run, choice, artefact, table, gates, float_bytes or len(reference.data))
    clock("latency")
    latency = {
        str(batch): _latency(run, reference, artefact, batch) for batch in ((1,) if run.prepared.batch is None else ())
    }
    clock("")
    manifest = {
        **environment(), "seed": options.seed, "options": options.as_dict(), "seconds": clock.seconds,
        "latency_seconds": latency, "cache_hits": sorted(set(cache.hits)), "threads": torch.get_num_threads(),
    }  # fmt: skip
    journal = "".join(json.dumps(plan.model_dump()) + "\n" for plan in choice.facts.evaluated)
    return Bundle(artefact.data, choice.applied.plan, report, manifest, journal)


OURS = "qopt"
"""The emitted file's row."""


class Clock:
    """Times the steps between its calls and passes their names on."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._step, self._began = "prepare the model", time.perf_counter()

    def __call__(self, step: str) -> None:
        """``step`` begins, the one before it ends."""
        now = time.perf_counter()
        self.seconds[self._step] = round(self.seconds.get(self._step, 0.0) + now - self._began, 3)
        self._step, self._began = step, now
        if step:
            self.progress(step)


def start(model: ir.Model, name: str, data: Data | None, options: Options, cache: Cache, progress: Progress) -> Run:
    """Check the options against model and data, prepare the graph and its twin."""
    target = _target(options)
    progress("prepare the model")
    prepared = prepare(model)
    if not prepared.layers:
        raise UsageError("the model has no layer that can be quantized", where=name)
    threat = _threat(options, prepared.input_shape[0])
    if data is None and options.gates:
        raise UsageError("gates need images to be measured on", where="--gate", fix="give --data")
    shaped = None if data is None else data.shaped(prepared.input_shape)
    normalisation = Normalisation(options.mean, options.std)
    calibration = None
    if shaped is not None:
        _check_labels(shaped, prepared.classes)
        images = torch.from_numpy(shaped.calibrate.first(options.calibration_images).images)
        calibration = _whole_batches(normalisation(images), prepared.batch)
    run = Run(
        name, prepared, Quantizer(prepared, calibration), shaped, options, target, threat, cache, progress
    )  # fmt: skip
    if data is None and options.robust:
        run.left_out.append("adversarial sensitivities, attacks and gates: they need --data")
    return run


def _target(options: Options) -> Target:
    target = parse_target(options.target)
    limits = tuple(dict.fromkeys((*target.limits, *options.limits)))
    activations = ActivationSpec.parse(options.activations) if options.activations else target.activations
    return replace(target, limits=limits, activations=activations)


def _threat(options: Options, channels: int) -> ThreatModel:
    if options.eps is None:
        return ThreatModel(options.norm, default_threat(channels).eps)
    return ThreatModel(options.norm, options.eps)


def _check_labels(data: Data, classes: int) -> None:
    from qopt.errors import DataError

    for part in (data.calibrate, data.select, data.report):
        if part.labels.min() < 0 or part.labels.max() >= classes:
            got = f"{part.labels.min()} to {part.labels.max()}"
            raise DataError("labels out of range", where="--data", expected=f"0 to {classes - 1}", got=got)


def _whole_batches(images: torch.Tensor, batch: int | None) -> torch.Tensor:
    return images if batch is None else images[: max(len(images) // batch, 1) * batch]


def _measure(run: Run, choice: Choice, artefact: Artefact, reference: Artefact) -> Table | None:
    if run.data is None:
        return None
    table = Table(run)
    table.add_float(reference)
    for baseline in run.options.baselines:
        table.add_baseline(baseline)
    table.add(OURS, artefact, choice.applied, naive=True)
    return table


def _latency(run: Run, reference: Artefact, artefact: Artefact, batch: int) -> dict[str, float]:
    models = {"float": to_bytes(run.prepared.model), OURS: artefact.data}
    return {k: round(v, 9) for k, v in measure_latency(models, run.prepared.input_shape, batch=batch).items()}
