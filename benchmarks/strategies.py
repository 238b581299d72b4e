"""Search strategies at equal bits: clean and robust accuracy of the plans they choose, and what finding them took.

Run: ``QOPT_ASSETS=folder python benchmarks/strategies.py [--networks a,b] [--bits 3,2] [--strategies a,b]
[--images 1000] [--autoattack 500] [--cache folder] [--write]``; ``--images 100 --probe 64 --evaluations 8
--networks cnn_mnist_madrytiny --bits 3 --autoattack 0`` is a small version.

Every strategy has the same candidates, images, thresholds and rounding (GPTQ and bias correction), formats of whole
layers, and the measured selection of `qopt optimize` after it; ``lipschitz`` knows no limit on bits, what it finds
above is no rival. ``default`` may give the rows of a layer different formats, too. Accuracy is of the
twin, clean and under PGD-50 on the margin, on the same test images, with the paired difference to the best robust
accuracy of the table beside it; the two best are attacked by AutoAttack, too. Evaluations are the different plans that
a strategy measured itself; seconds are CPU seconds of the search alone, with sensitivities that all share. Scores are
kept by content: a second run computes nothing again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qopt.api import load
from qopt.attacks import PGD, accuracy_vector, standard
from qopt.cache import Cache, digest_arrays
from qopt.config import resolve_options
from qopt.data import Data, Split
from qopt.job.choose import choose
from qopt.job.journal import Journal
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.measure.network import TwinClassifier
from qopt.plan import Plan
from qopt.size import code_bits
from qopt.statistics import paired_difference

RESULTS = Path(__file__).resolve().parent / "results" / "strategies.md"
STRATEGIES = ("uniform", "lipschitz", "quanos", "greedy", "exact", "optuna", "refit", "default")
"""``default`` is `qopt optimize` as it is when nothing is asked: its strategy, and formats of rows beside it."""
ATTACK = PGD(steps=50, loss="margin")


@dataclass(frozen=True)
class Network:
    """A public network with its images and threat model."""

    name: str
    data: str
    eps: str


NETWORKS = {
    network.name: network
    for network in (
        Network("vresnet2b_cifar10_adv2", "cifar10_small", "2/255"),
        Network("cnn_cifar10_mix4", "cifar10_small", "2/255"),
        Network("cnn_mnist_madrytiny", "mnist_small", "0.3"),
    )
}


@dataclass(frozen=True)
class Row:
    """One strategy on one network: its plan, and which test images that gets right."""

    strategy: str
    bits: float
    evaluations: int
    seconds: float
    clean: Tensor
    robust: Tensor
    plan: Plan


def images(path: Path) -> Data:
    """The train images halved into calibrate and select, and the test images."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}

    def part(name: str, rows: slice) -> Split:
        pixels = arrays[f"x_{name}"][rows].astype(np.float32) / np.float32(255)
        return Split(pixels, arrays[f"y_{name}"][rows].astype(np.int64))

    half = len(arrays["x_train"]) // 2
    return Data(part("train", slice(half)), part("train", slice(half, None)), part("test", slice(None)))


def begin(args: argparse.Namespace, network: Network, bits: float, strategy: str, data: Data) -> Run:
    """A run of the main job with this strategy."""
    own = {} if strategy == "default" else {"search": strategy, "rows": "off"}
    options = resolve_options(
        target="int4", limits=(f"bits<={bits:g}",), robust=True, eps=network.eps, baselines=(), rounding="gptq",
        bias_correction="on", effort=args.effort, evaluations=args.evaluations, probe_images=args.probe,
        seed=args.seed, thresholds=args.thresholds, **own,
    )  # fmt: skip
    model = load(args.assets / "onnx" / f"{network.name}.onnx")
    return start(Task(model, network.name, data, options), Cache(args.cache), lambda step: None)


def correct(
    run: Run, plan: Plan | None, kind: str, count: int, right: Callable[[TwinClassifier, Tensor], Tensor]
) -> Tensor:
    """Which of the first test images a plan gets right, bool (n,), float's own for None; cached by the plan."""
    assert run.data is not None
    few = run.data.report.first(count)
    key = {
        "model": run.prepared.digest, "plan": "" if plan is None else plan.digest, "kind": kind,
        "images": digest_arrays(few.images, few.labels), "threat": [run.threat.norm, run.threat.eps],
        "calibration": digest_arrays(run.quantizer.calibration.numpy()), "seed": run.options.seed,
    }  # fmt: skip

    def compute() -> dict[str, np.ndarray]:
        graph = run.quantizer.float_graph if plan is None else run.quantizer.apply(plan).graph
        twin = TwinClassifier(graph, run.normalisation, run.prepared.batch)
        return {"right": right(twin, torch.from_numpy(few.images)).numpy()}

    return torch.from_numpy(run.cache.arrays("strategies", key, compute)["right"])


def scores(run: Run, plan: Plan | None, count: int) -> tuple[Tensor, Tensor]:
    """Clean and robust: which images are right, and which stay so under PGD-50 on the margin."""
    assert run.data is not None
    labels = torch.from_numpy(run.data.report.labels[:count])

    def attacked(twin: TwinClassifier, pictures: Tensor) -> Tensor:
        return ~ATTACK(twin, pictures, labels, run.threat, seed=run.seed("strategies")).fooled

    clean = correct(run, plan, "clean", count, lambda twin, pictures: accuracy_vector(twin, pictures, labels))
    return clean, correct(run, plan, ATTACK.name, count, attacked)


def autoattack(run: Run, plan: Plan, count: int) -> float:
    """Accuracy under AutoAttack in percent, on the first images."""
    assert run.data is not None
    labels = torch.from_numpy(run.data.report.labels[:count])

    def attacked(twin: TwinClassifier, pictures: Tensor) -> Tensor:
        left = accuracy_vector(twin, pictures, labels)
        for attack in standard(run.threat):
            rows = torch.nonzero(left).flatten()
            if len(rows):
                found = attack(
                    twin, pictures[rows], labels[rows], run.threat, seed=run.seed("autoattack"), indices=rows
                )
                left[rows] = ~found.fooled
        return left

    return 100 * float(correct(run, plan, "AutoAttack", count, attacked).double().mean())


def measure(args: argparse.Namespace, network: Network, bits: float, strategy: str, data: Data) -> Row:
    """Search with one strategy and score the plan it chose."""
    run, journal = begin(args, network, bits, strategy, data), Journal()
    began = time.process_time()
    choice = choose(run, journal)
    seconds = time.process_time() - began
    plan = choice.applied.plan
    clean, robust = scores(run, plan, args.images)
    spent = code_bits(choice.applied.quantized.stored(run.prepared))
    return Row(strategy, spent, len(journal.text.splitlines()), seconds, clean, robust, plan)


def table(args: argparse.Namespace, network: Network, bits: float) -> list[str]:
    """One network at one average of bits, as lines of Markdown."""
    data = images(args.assets / "data" / f"{network.data}.npz")
    rows = [measure(args, network, bits, strategy, data) for strategy in args.strategies]
    run = begin(args, network, bits, args.strategies[0], data)
    floats = scores(run, None, args.images)
    rivals = [row for row in rows if row.bits <= bits + 1e-9] or rows
    ranked = sorted(rivals, key=lambda row: -float(row.robust.double().mean()))
    stronger = {row.strategy: autoattack(run, row.plan, args.autoattack) for row in ranked[:2] if args.autoattack}
    lines = [
        f"\n## {network.name}, {network.eps}, at most {bits:g} code bits\n",
        f"Float: clean {percent(floats[0])}, {ATTACK.name} {percent(floats[1])}; {args.images} test images.\n",
        "| strategy | code bits | clean | robust | robust - best | AutoAttack | plans measured | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        apart = paired_difference(row.robust.numpy(), ranked[0].robust.numpy())
        over = "" if row in rivals else ", above the limit"
        strong = f"{stronger[row.strategy]:.1f}" if row.strategy in stronger else ""
        lines.append(
            f"| {row.strategy}{over} | {row.bits:.2f} | {percent(row.clean)} | {percent(row.robust)} "
            f"| {apart.difference:+.1f} +- {apart.standard_error:.1f} | {strong} | {row.evaluations} "
            f"| {row.seconds:.0f} |"
        )
    return lines


def percent(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.1f}"


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", type=words, default=tuple(NETWORKS))
    parser.add_argument("--bits", type=lambda text: tuple(map(float, words(text))), default=(3.0, 2.0))
    parser.add_argument("--strategies", type=words, default=STRATEGIES)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--autoattack", type=int, default=500)
    parser.add_argument("--probe", type=int, default=256)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--thresholds", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.assets = Path(os.environ["QOPT_ASSETS"])
    write_tables(args, "Search strategies at equal bits", RESULTS, args.bits, table)


def write_tables(
    args: argparse.Namespace, title: str, results: Path, values: Sequence[float],
    table: Callable[[argparse.Namespace, Network, float], list[str]],
) -> None:  # fmt: skip
    """A table for every network and value, shown as it is done, and with ``--write`` written."""
    settings = {k: v for k, v in vars(args).items() if k not in ("assets", "cache", "write", "networks", "strategies")}
    lines = [f"# {title}\n", f"`{json.dumps(settings)}`; made by `benchmarks/{results.stem}.py`."]
    for name in args.networks:
        for value in values:
            found = table(args, NETWORKS[name], value)
            print("\n".join(found), flush=True)
            lines += found
            if args.write:
                results.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
