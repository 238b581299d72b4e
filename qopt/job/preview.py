"""What a run would do, without doing it: layers, candidates, what formats cost, about how long, what is written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, final

import torch

from qopt.cache import Cache
from qopt.documents import Document
from qopt.hardware.cost_model import LayerDescription
from qopt.job.optimize import Task, start
from qopt.job.run import PROBE_STEPS, Progress, Run
from qopt.job.select import variants
from qopt.job.sensitivity import affordable_images, described
from qopt.job.space import capable
from qopt.limits import readable
from qopt.plugins import load
from qopt.report.tables import Table
from qopt.search.evaluation import MeasuredStrategy
from qopt.spec import FLOAT, WeightSpec

UNIFORM: Final = (FLOAT, WeightSpec("int", 8), WeightSpec("int", 4))
"""Formats that the whole network is priced in."""

GRADIENT: Final = 3
"""Multiplications of a forward and a backward pass, by those of a forward pass."""

PGD_STEPS: Final = 20
"""Steps of the report's attack; images that are fooled leave it, on average halfway."""

TIMED: Final = 16
"""Images of the run that the speed of this machine is taken from."""

FILES: Final = ("model.onnx", "plan.json", "report.html", "report.md", "report.json", "manifest.json", "journal.jsonl")


@final
class LayerPreview(Document):
    """A layer with the names of the formats that the target offers it."""

    name: str
    op: str
    shape: list[int]
    macs: int
    candidates: list[str]


@final
class CostPreview(Document):
    """The whole network in one format: bytes of its weights, and by machine what that takes, with units."""

    format: str
    bytes: int
    machines: dict[str, str]


@final
class Preview(Document):
    """What ``--dry-run`` tells. ``seconds`` is a rough estimate from one timed pass; None without images."""

    name: str
    target: str
    strategy: str
    sensitivity: str
    weights: int
    macs: int
    plans: str
    layers: list[LayerPreview]
    costs: list[CostPreview]
    limits: list[str]
    seconds: float | None
    folder: str
    files: list[str]

    def text(self) -> str:
        """For a terminal."""
        rows = tuple(
            (x.name, x.op, "x".join(map(str, x.shape)), f"{x.macs:,}", " ".join(x.candidates)) for x in self.layers
        )
        machines = list(self.costs[0].machines)
        costs = tuple((c.format, f"{c.bytes:,}", *(c.machines[name] for name in machines)) for c in self.costs)
        wanted = "" if self.seconds is None else f"about {_duration(self.seconds)} on this machine\n"
        parts = [
            f"target {self.target}",
            Table(("layer", "op", "shape", "MACs", "formats"), rows, (1, 2, 4)).text(),
            f"{self.plans} plans; {self.strategy} on {self.sensitivity}",
            Table(("uniform", "bytes", *machines), costs).text(),
            *(["\n".join(self.limits)] if self.limits else []),
            f"{wanted}would write {', '.join(self.files)} into {self.folder}; nothing was written",
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"


def preview(task: Task, cache: Cache, progress: Progress, folder: str) -> Preview:
    """Prepare the network and say what `optimize_model` would do with it; raises what it raises before its search."""
    run = start(task, cache, progress)
    strategy = load("qopt.searches", run.options.search, "--search")()
    candidates = capable(run, strategy.candidates(run.target.weights))
    count = sum(math.log10(max(len(formats), 1)) for formats in candidates.values())
    return Preview(
        name=run.name, target=run.target.expansion, strategy=strategy.name, sensitivity=described(run),
        weights=sum(layer.weights for layer in run.prepared.layers), macs=run.prepared.macs,
        plans=f"{10**count:.0f}" if count < 6 else f"10^{count:.0f}",
        layers=[
            LayerPreview(
                name=x.name, op=x.op, shape=list(x.shape), macs=x.macs, candidates=[str(s) for s in candidates[x.name]]
            )
            for x in run.prepared.layers
        ],
        costs=[_cost(run, spec) for spec in UNIFORM],
        limits=_limits(run, candidates),
        seconds=_seconds(run, candidates, measures=isinstance(strategy, MeasuredStrategy)),
        folder=folder, files=[*FILES, *(["model.c and what it includes"] if "c" in task.emit else [])],
    )  # fmt: skip


def _cost(run: Run, spec: WeightSpec) -> CostPreview:
    specs = {layer.name: spec for layer in run.network.layers}
    machines = {}
    for model in run.cost_models:
        if model.name == "bits":
            continue
        taken = all(model.capabilities(layer, (spec,)) for layer in run.network.layers)
        total = model.network_cost(run.network.layers, specs, run.network.steps) if taken else {}
        machines[model.name] = (
            ", ".join(f"{name} {readable(name, cost)}" for name, cost in total.items()) or "not taken"
        )
    size = sum(layer.weights * spec.container_bits for layer in run.network.layers) / 8
    return CostPreview(format=str(spec), bytes=int(size), machines=machines)


def _limits(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]]) -> list[str]:
    """For every limit that adds up over layers the least that these candidates can take."""
    found = []
    for model in run.cost_models:
        for limit in run.target.limits:
            if limit.quantity not in model.prices or model.name == "bits" or not all(candidates.values()):
                continue
            least = sum(
                min(
                    model.layer_cost(at, spec)[limit.quantity]
                    for at in _at_any_width(run, layer) for spec in candidates[layer.name]
                )
                for layer in run.network.layers
            )  # fmt: skip
            verdict = "cannot be kept" if least > limit.bound else "can be kept by the layers"
            found.append(f"limit {limit} on {model.name}: at least {readable(limit.quantity, least)}, {verdict}")
    return found


def _at_any_width(run: Run, layer: LayerDescription) -> list[LayerDescription]:
    """The layer on activations of every width that the target offers."""
    narrower = run.target.narrower if run.data is not None else ()
    return [layer, *(replace(layer, input_bits=bits) for bits in sorted({spec.bits for spec in narrower}))]


def _seconds(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]], *, measures: bool) -> float | None:
    """Multiplications of every step by the speed of one timed pass."""
    if run.data is None:
        return None
    images = torch.from_numpy(run.data.calibrate.first(run.prepared.batch or TIMED).images)
    twin = run.float_twin
    with torch.no_grad():
        twin(images)
        began = time.perf_counter()
        twin(images)
        pace = (time.perf_counter() - began) / (len(images) * max(run.prepared.macs, 1))
    return pace * _work(run, candidates, measures=measures)


def _work(run: Run, candidates: Mapping[str, tuple[WeightSpec, ...]], *, measures: bool) -> float:
    """Multiplications: sensitivities, plans to compare, and the attacks of the report."""
    macs, after, alone = run.prepared.macs, 0, 0
    for layer in reversed(run.prepared.layers):
        after += layer.macs
        alone += after * len(candidates[layer.name])
    robust = run.options.robust
    probed = run.probe_images * (2 + (GRADIENT * PROBE_STEPS if robust else 0))
    calibrated = 4 * run.options.calibration_images
    plans = len(variants(run.options)) + 2 + (run.options.evaluations if measures else 0)
    attacked = min(run.options.attack_images, len(run.data.report)) if robust and run.data else 0
    networks = 3 + len(run.options.baselines)
    reported = networks * (len(run.data.report) if run.data else 0)
    return float(
        alone * affordable_images(run.prepared, candidates)
        + macs * (plans * (probed + calibrated) + reported + networks * attacked * GRADIENT * PGD_STEPS / 2)
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
