"""AutoAttack, the standard version, of qopt against pyautoattack: process CPU seconds and robust accuracy in one run.

Run: ``QOPT_ASSETS=folder python benchmarks/autoattack.py [--images 200] [--write]``; needs
``pip install 'qopt[autoattack]'``. Both attack the same twin, parameters frozen, one thread. Accuracy is what is left
after a part and those before it. Bars: no slower on the robust network, 3 times faster on the standard one, at equal
or lower robust accuracy.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qopt.api import load
from qopt.attacks.autoattack import AutoAttack, standard
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.measure.network import TwinClassifier
from qopt.threat import ThreatModel, parse_eps

RESULTS = Path(__file__).resolve().parent / "results" / "autoattack.md"
CASES = (
    ("vresnet2b_cifar10_adv2", "2/255", 1.0),
    ("resnet20_cifar10_std", "2/255", 3.0),
    ("resnet20_cifar10_std", "8/255", 3.0),
)
"""Network, eps in linf, and how many times faster than pyautoattack it must be."""
PARTS = {"apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}


@dataclass
class Timed:
    """CPU seconds of every part that ran, and the images left after it."""

    seconds: dict[str, float] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    total: float = 0.0


def ours(model: TwinClassifier, images: Tensor, labels: Tensor, threat: ThreatModel, batch_size: int) -> Timed:
    """AutoAttack of qopt; every part is timed by a wrapper."""
    timed = Timed()

    @dataclass(frozen=True)
    class Stopwatch:
        part: object

        @property
        def name(self) -> str:
            return self.part.name

        def __call__(self, *arguments: object, **options: object) -> object:
            began = time.process_time()
            result = self.part(*arguments, **options)
            timed.seconds[self.name] = time.process_time() - began
            return result

    began = time.process_time()
    suite = AutoAttack(tuple(Stopwatch(part) for part in standard(threat, batch_size)))
    result = suite.run(model, images, labels, threat, seed=0)
    timed.total = time.process_time() - began
    timed.left = {name: int(correct.sum()) for name, correct in result.correct.items()}
    return timed


@contextmanager
def log_times(timed: Timed, images: int) -> Iterator[None]:
    """Read from pyautoattack's log when its parts begin and what they leave."""
    logger, current = logging.getLogger("auto-attack"), [("", 0.0)]

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text, now = record.getMessage(), time.process_time()
            if text.startswith("running "):
                current[0] = (PARTS[text.split()[1]], now)
            elif text.startswith("robust accuracy after "):
                name, began = current[0]
                timed.seconds[name] = now - began
                timed.left[name] = round(float(text.split(": ")[1].split("%")[0]) / 100 * images)

    reader, level = Reader(), logger.level
    logger.addHandler(reader)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)


def theirs(model: TwinClassifier, images: Tensor, labels: Tensor, threat: ThreatModel) -> Timed:
    """The standard version of pyautoattack."""
    from pyautoattack.autoattack import AutoAttack as Reference

    class Network(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return model(batch)

    timed = Timed()
    with log_times(timed, len(images)):
        began = time.process_time()
        suite = Reference(Network(), eps=threat.eps, norm="Linf", seed=0)
        suite.run_standard_evaluation(images, labels, batch_size=250)
        timed.total = time.process_time() - began
    return timed


def rows(name: str, threat: ThreatModel, own: Timed, other: Timed, images: int, bar: float) -> list[str]:
    """A line for each part that ran, and one for the whole."""
    lines = []

    def line(part: str, a: float, b: float, left: tuple[int | None, int | None], extra: str = "") -> None:
        percent = ("-" if n is None else f"{100 * n / images:.1f} %" for n in left)
        ratio = f"{b / a:.1f}{extra}" if a and b else "-"
        lines.append(f"| {name}, {threat} | {part} | {a:.2f} | {b:.2f} | {ratio} | " + " | ".join(percent) + " |")

    for part in PARTS.values():
        seconds = own.seconds.get(part, 0.0), other.seconds.get(part, 0.0)
        line(part, *seconds, (own.left.get(part), other.left.get(part)))
    last = min(own.left.values()), min(other.left.values())
    line("all", own.total, other.total, last, f" (bar {bar:g})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128, help="images per forward pass of qopt's; the other takes 250")
    parser.add_argument("--cases", default=",".join(str(number) for number in range(len(CASES))))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/autoattack.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    torch.set_num_threads(1)
    with np.load(Path(assets) / "data" / "cifar10_small.npz") as file:
        images = torch.from_numpy(file["x_test"][: args.images].astype(np.float32) / 255)
        labels = torch.from_numpy(file["y_test"][: args.images].astype(np.int64))
    header = ["network", "part", "CPU s", "CPU s, pyautoattack", "ratio", "left", "left, pyautoattack"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    for case in args.cases.split(","):
        name, eps, bar = CASES[int(case)]
        threat = ThreatModel("linf", parse_eps(eps))
        twin = build_twin(prepare(load(Path(assets) / "onnx" / f"{name}.onnx")))
        model = TwinClassifier(twin.requires_grad_(False))
        own = ours(model, images, labels, threat, args.batch)
        lines += rows(name, threat, own, theirs(model, images, labels, threat), len(images), bar)
        print("\n".join(lines[-1 - len(PARTS) :]), flush=True)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        text = "\n".join(lines)
        RESULTS.write_text(f"# AutoAttack, standard version, {args.images} images of CIFAR-10, one thread\n\n{text}\n")


if __name__ == "__main__":
    main()
