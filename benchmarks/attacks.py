"""Attacks by gradients against those of torchattacks and foolbox: CPU seconds and robust accuracy, in one run.

Run: ``QOPT_ASSETS=folder python benchmarks/attacks.py [--images 200] [--repeats 3] [--write]``.

All attack the same twin (batch norm and normalisation folded, no gradients of weights) on one thread, all images in one
batch; of the repeats, interleaved, the fastest counts (five times as many of PGD on the small robust network; one of
CW). Robust accuracy is scored on the images they return, and an image that was wrong before counts as wrong; random
starts differ, and move it by an image or two. The time of ours holds the scoring; that of the libraries does not.

foolbox's CW is run with its own constants (9 of them from 1e-3) and with ours (5 from 1), 100 steps each; mean l2 is
over images that were right before and that both fool. torchattacks has no search for the constant, and MIM is wrong in
foolbox, so these are left out. Bars: PGD-20 takes at most 1/1.2 of torchattacks' time and 1/1.5 of foolbox's on the
robust network, 1/6 on the standard one; CW 1/2.5 of foolbox's at 1.02 times its mean l2 or less.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import foolbox
import numpy as np
import torch
import torchattacks
from torch import Tensor, nn

from qopt.api import load
from qopt.attacks import PGD, accuracy_vector
from qopt.attacks.cw import CW
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.threat import ThreatModel

RESULTS = Path(__file__).resolve().parent / "results" / "attacks.md"
ROBUST, STANDARD = "vresnet2b_cifar10_adv2", "resnet20_cifar10_std"
BARS = {
    (ROBUST, "PGD-20", "torchattacks"): 1.2,
    (ROBUST, "PGD-20", "foolbox"): 1.5,
    (STANDARD, "PGD-20", "torchattacks"): 6.0,
    (STANDARD, "PGD-20", "foolbox"): 6.0,
    (ROBUST, "CW-L2", "foolbox 9x100"): 2.5,
    (ROBUST, "CW-L2", "foolbox 5x100"): 2.5,
}

Make = Callable[[], Tensor]
"""Runs an attack once; returns its images."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, images (n, ...) in [0, 1] and labels (n,)."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Outcome:
    """CPU seconds of the fastest run, which images are still right, and how far all have moved in l2."""

    seconds: float
    correct: Tensor
    lengths: Tensor


def open_problem(assets: Path, name: str, count: int) -> Problem:
    twin = build_twin(prepare(load(assets / "onnx" / f"{name}.onnx")))
    twin.register_parameter("unused", nn.Parameter(torch.zeros(1)))  # by which torchattacks finds the device
    with np.load(assets / "data" / "cifar10_small.npz") as file:
        images = torch.from_numpy(file["x_test"][:count].astype(np.float32) / np.float32(255))
        labels = torch.from_numpy(file["y_test"][:count].astype(np.int64))
    return Problem(name, twin.eval(), images, labels)


def pgd_makers(problem: Problem, eps: float) -> dict[str, Make]:
    model, images, labels = problem.model, problem.images, problem.labels
    threat, step = ThreatModel("linf", eps), eps / 4
    ours = PGD(steps=20, step=step, batch_size=len(images))
    theirs = torchattacks.PGD(model, eps=eps, alpha=step, steps=20, random_start=True)
    other = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=20, random_start=True)
    return {
        "qopt": lambda: ours(model, images, labels, threat, seed=0).adversarial,
        "torchattacks": lambda: theirs(images, labels),
        "foolbox": lambda: other.run(*foolbox_arguments(problem), epsilon=eps),
    }


def cw_makers(problem: Problem) -> dict[str, Make]:
    ours = CW(batch_size=len(problem.images))

    def foolbox_with(searches: int, constant: float) -> Make:
        attack = foolbox.attacks.L2CarliniWagnerAttack(
            binary_search_steps=searches, steps=100, stepsize=0.01, initial_const=constant
        )
        return lambda: attack.run(*foolbox_arguments(problem))

    return {
        "qopt": lambda: ours(problem.model, problem.images, problem.labels, seed=0).adversarial,
        "foolbox 9x100": foolbox_with(9, 1e-3),
        "foolbox 5x100": foolbox_with(5, 1.0),
    }


def foolbox_arguments(problem: Problem) -> tuple[object, Tensor, object]:
    model = foolbox.PyTorchModel(problem.model, bounds=(0, 1), device="cpu")
    return model, problem.images, foolbox.criteria.Misclassification(problem.labels)


def race(problem: Problem, makers: dict[str, Make], repeats: int) -> dict[str, Outcome]:
    """Every attack ``repeats`` times, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    images = {}
    for _ in range(repeats):
        for name, make in makers.items():
            torch.manual_seed(0)
            began = time.process_time()
            images[name] = make().detach()
            seconds[name].append(time.process_time() - began)
    right = accuracy_vector(problem.model, problem.images, problem.labels)
    return {
        name: Outcome(
            min(seconds[name]),
            right & accuracy_vector(problem.model, made, problem.labels),
            (made - problem.images).flatten(1).norm(dim=1),
        )
        for name, made in images.items()
    }


def rows(problem: Problem, attack: str, setting: str, outcomes: dict[str, Outcome]) -> list[str]:
    """One line of the table per library."""
    right = accuracy_vector(problem.model, problem.images, problem.labels)
    ours = outcomes["qopt"]
    lines = []
    for name, found in outcomes.items():
        ratio = found.seconds / ours.seconds
        bar = BARS.get((problem.name, attack, name))
        verdict = "" if bar is None else f"{bar:g} {'met' if ratio >= bar else 'MISSED'}"
        both = right & ~found.correct & ~ours.correct
        length = f"{found.lengths[both].mean():.4f} / {ours.lengths[both].mean():.4f}" if attack == "CW-L2" else ""
        lines.append(
            f"| {problem.name} | {attack} | {setting} | {name} | {found.seconds:.2f} | {ratio:.2f} | {verdict} "
            f"| {100 * float(found.correct.double().mean()):.1f} | {length} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/attacks.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    torch.set_num_threads(1)
    columns = ["network", "attack", "eps", "library", "CPU s", "of qopt's", "bar", "robust %", "mean l2 / qopt's"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    print("\n".join(lines), flush=True)

    def add(found: list[str]) -> None:
        lines.extend(found)
        print("\n".join(found), flush=True)

    for name in (ROBUST, STANDARD):
        problem = open_problem(Path(assets), name, args.images)
        for pixels in (2, 8):
            repeats = args.repeats * (5 if name == ROBUST else 1)
            outcomes = race(problem, pgd_makers(problem, pixels / 255), repeats)
            add(rows(problem, "PGD-20", f"{pixels}/255", outcomes))
        if name == ROBUST:
            add(rows(problem, "CW-L2", "-", race(problem, cw_makers(problem), 1)))
    if args.write:
        versions = f"torch {torch.__version__}, torchattacks {torchattacks.__version__}, foolbox {foolbox.__version__}"
        head = f"{args.images} images, one thread, {platform.machine()}, {versions}."
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(f"# Attacks by gradients\n\n{head}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
