"""Process CPU time of all norms of W_q and dW of a network: lazy decisions, a sound table, and the usual shortcuts.

Run: ``OMP_NUM_THREADS=1 python benchmarks/norms.py [--write]``. The layers have the shapes of ResNet-18 and ResNet-50
and random weights, the spectrum either that of independent entries (He) or decaying like 1/sqrt(k) as those of trained
layers do. Every layer is quantized to 1 to 8 bits, linear and log, per tensor, and Algorithm 1 asks
``||W_q|| <= 1.1 ||W||`` and ``||dW|| <= 0.3`` (1.5 where ``||W|| >= 3``). All routes run in one process on the same
matrices, a layer at a time, quantizing timed apart. Bars: lazy 12 times and the table 2.5 times faster than numpy's
SVD, the decisions of the lazy route those of the table, ResNet-50 in under 20 seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qopt.lipschitz import NormBound, as_matrix, reshaped_l2
from qopt.lipschitz.decide import CandidateNorms, choose, decide
from qopt.quant.weights import quantize_whole
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec

RESULTS = Path(__file__).resolve().parent / "results" / "norms.md"
BITS = range(1, 9)
KINDS = ("int", "log")
SPECS = [WeightSpec(kind, bits, "tensor", "max") for kind in KINDS for bits in BITS]


def resnet18() -> list[tuple[int, ...]]:
    """Weights of the 20 convolutions and the classifier for 1000 classes."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            shapes += [(channels, width, 3, 3), (channels, channels, 3, 3)]
            shapes += [(channels, width, 1, 1)] if stage and not block else []
            width = channels
    return [*shapes, (1000, 512)]


def resnet50() -> list[tuple[int, ...]]:
    """Weights of the 53 convolutions and the classifier."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(channels, width, 1, 1), (channels, channels, 3, 3), (4 * channels, channels, 1, 1)]
            shapes += [(4 * channels, width, 1, 1)] if not block else []
            width = 4 * channels
    return [*shapes, (1000, 2048)]


def weight(shape: tuple[int, ...], spectrum: str, generator: torch.Generator) -> Tensor:
    """Independent entries of He's variance, or the same with singular values that decay like 1/sqrt(k)."""
    rows, columns = shape[0], math.prod(shape[1:])
    values = torch.randn(rows, columns, generator=generator) * math.sqrt(2 / columns)
    if spectrum == "decaying":
        values = values * (1 + torch.randn(rows, 1, generator=generator).abs())
        u, s, v = torch.linalg.svd(values, full_matrices=False)
        decay = torch.arange(1, len(s) + 1).rsqrt()
        values = (u * (decay * s[0])) @ v
    return values.reshape(shape)


def power(matrix: Tensor, tolerance: float) -> float:
    """The usual estimate from below, until it changes by less than ``tolerance``."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    norm = previous = 0.0
    for _ in range(1000):
        image = matrix @ (vector / vector.norm())
        norm = float(image.norm())
        if abs(norm - previous) <= tolerance * norm:
            break
        previous, vector = norm, matrix.mT @ image
    return norm


ROUTES: dict[str, Callable[[Tensor], float]] = {
    "numpy SVD": lambda a: float(np.linalg.svd(a.numpy(), compute_uv=False)[0]),
    "torch matrix_norm": lambda a: float(torch.linalg.matrix_norm(a, 2)),
    "power, 1e-3": lambda a: power(a, 1e-3),
    "power, 1e-6": lambda a: power(a, 1e-6),
}


@dataclass
class Measured:
    """One network: CPU seconds by route, the largest errors of the estimates, decisions that differ."""

    seconds: Counter[str] = field(default_factory=Counter)
    error: dict[str, float] = field(default_factory=dict)
    norms: int = 0
    computed: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    met: int = 0
    chosen: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def timed(self, route: str) -> Iterator[None]:
        """Add the CPU seconds of the block to a route."""
        began = time.process_time()
        yield
        self.seconds[route] += time.process_time() - began

    def ratio(self, route: str) -> float:
        """How many times faster than numpy's SVD a route is."""
        return self.seconds["numpy SVD"] / self.seconds[route]


def by_table(met: list[bool], errors: list[float]) -> int:
    """Index into `SPECS` that Algorithm 1 takes, with the fall-through of `qopt.search.lipschitz`."""
    picks = []
    for first in (0, len(BITS)):
        own = range(first, first + len(BITS))
        picks.append(next((i for i in own if met[i]), min(own, key=lambda i: errors[i])))
    return picks[0] if errors[picks[0]] < errors[picks[1]] else picks[1]


def lazily(weight: Tensor, quantized: list[Tensor]) -> tuple[list[bool], int, int]:
    """Which formats meet both thresholds, Algorithm 1's choice, and how many norms the lazy route computed."""
    whole = reshaped_l2(weight)
    candidates = [CandidateNorms.of(weight, q, whole) for q in quantized]
    thresholds = paper_thresholds(whole.upper)
    met = decide(candidates, *thresholds)
    chosen, _ = choose(candidates[: len(BITS)], candidates[len(BITS) :], *thresholds)
    return met, candidates.index(chosen), 1 + sum(c.norm.computed + c.error.computed for c in candidates)


def every(weight: Tensor, quantized: list[Tensor]) -> tuple[list[bool], int]:
    """All 32 decisions of a layer one by one by the lazy route, and how many norms it computed."""
    whole = reshaped_l2(weight)
    most_norm, most_error = paper_thresholds(whole.upper)
    candidates = [CandidateNorms.of(weight, q, whole) for q in quantized]
    answers = [bool(answer) for c in candidates for answer in (c.error_at_most(most_error), c.norm_at_most(most_norm))]
    return answers, 1 + sum(c.norm.computed + c.error.computed for c in candidates)


def measure_layer(found: Measured, weight: Tensor, estimates: bool) -> None:
    """Every route on one layer."""
    with found.timed("quantizing"):
        quantized = [quantize_whole(weight, spec).dequantize() for spec in SPECS]
    with found.timed("lazy"):
        met, chosen, computed = lazily(weight, quantized)
    with found.timed("lazy, all"):
        answers, _ = every(weight, quantized)
    with found.timed("table"):
        whole = reshaped_l2(weight)
        table = [(reshaped_l2(q), reshaped_l2(weight.double() - q)) for q in quantized]
    most_norm, most_error = paper_thresholds(whole.upper)
    expected = [(e.accepts(most_error), n.accepts(most_norm)) for n, e in table]
    both = [all(pair) for pair in expected]
    errors = [e.value for _, e in table]
    found.norms += 2 * len(table)
    found.computed += computed
    found.met += sum(both)
    found.chosen[str(SPECS[chosen])] += 1
    found.wrong["lazy"] += sum(a != b for a, b in zip(met, both, strict=True)) + (chosen != by_table(both, errors))
    found.wrong["lazy, all"] += sum(a != b for a, b in zip(answers, [x for p in expected for x in p], strict=True))
    if estimates:
        measure_estimates(found, weight, quantized, table, (most_norm, most_error))


def measure_estimates(
    found: Measured,
    weight: Tensor,
    quantized: list[Tensor],
    table: list[tuple[NormBound, NormBound]],
    thresholds: tuple[float, float],
) -> None:
    """The routes that are no bounds: time, largest relative error, and the decisions they get wrong."""
    matrices = [(as_matrix(q)[0], as_matrix(weight - q)[0]) for q in quantized]
    for name, route in ROUTES.items():
        with found.timed(name):
            values = [(route(a), route(b)) for a, b in matrices]
        for pair, bounds in zip(values, table, strict=True):
            for value, bound, most in zip(pair, bounds, thresholds, strict=True):
                off = value / bound.upper - 1 if bound.upper else 0.0
                found.error[name] = off if abs(off) > abs(found.error.get(name, 0.0)) else found.error[name]
                found.wrong[name] += (value <= most) != bound.accepts(most)


def measure(shapes: list[tuple[int, ...]], spectrum: str, estimates: bool) -> Measured:
    """Every route on every layer."""
    found, generator = Measured(), torch.Generator().manual_seed(0)
    for shape in shapes:
        measure_layer(found, weight(shape, spectrum, generator), estimates)
    return found


def report(name: str, spectrum: str, found: Measured) -> list[str]:
    """The table of one network."""
    lines = [
        f"## {name}, {spectrum} spectrum: {found.norms} norms",
        "",
        "| route | CPU s | faster than numpy SVD | largest error | wrong decisions |",
        "|---|---|---|---|---|",
    ]
    labels = {
        "lazy": "lazy: which formats meet both",
        "lazy, all": "lazy: every norm's threshold",
        "table": "sound table",
    }
    for route in ("lazy", "lazy, all", "table", *ROUTES):
        if route in found.seconds:
            ratio = f"{found.ratio(route):.1f}" if "numpy SVD" in found.seconds else ""
            error = f"{found.error[route]:+.1e}" if route in found.error else "bounds"
            label, seconds, wrong = labels.get(route, route), found.seconds[route], found.wrong[route]
            lines.append(f"| {label} | {seconds:.2f} | {ratio} | {error} | {wrong} |")
    picks = ", ".join(f"{spec} x {count}" for spec, count in found.chosen.most_common())
    return [
        *lines, "",
        f"Quantizing: {found.seconds['quantizing']:.2f} s. The lazy route computed {found.computed} norms; "
        f"{found.met} of {found.norms // 2} formats meet both thresholds; Algorithm 1 takes {picks}.", "",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Norms of every format of a network",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, one thread.",
        "",
    ]
    missed = []
    for name, shapes in (("ResNet-18", resnet18()), ("ResNet-50", resnet50())):
        for spectrum in ("He", "decaying"):
            found = measure(shapes, spectrum, estimates=name == "ResNet-18")
            lines += report(name, spectrum, found)
            print("\n".join(report(name, spectrum, found)), flush=True)
            missed += [f"{name}, {spectrum}: {bar}" for bar, met in bars(found).items() if not met]
    lines.append("Bars: " + ("missed: " + "; ".join(missed) if missed else "all met") + ".")
    print(lines[-1])
    if args.write:
        RESULTS.write_text("\n".join(lines) + "\n")


def bars(found: Measured) -> dict[str, bool]:
    """What must hold of a network."""
    lazy = found.wrong["lazy"] + found.wrong["lazy, all"] == 0
    if "numpy SVD" not in found.seconds:
        return {"identical decisions": lazy, "lazy under 20 s": found.seconds["lazy"] < 20}
    return {
        "identical decisions": lazy,
        "lazy 12 times faster": found.ratio("lazy") >= 12,
        "table 2.5 times faster": found.ratio("table") >= 2.5,
    }


if __name__ == "__main__":
    main()
