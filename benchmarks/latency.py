"""How well `measured:host` predicts whole networks on the machine that it was calibrated on, in float and in int8.

Run: ``QOPT_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/latency.py [--repeats 40] [--write]``
(``pip install qopt[architectures]``). The model is calibrated anew, in about a minute. The files are those that qopt
emits for the public resnet20 (CIFAR-10), the embedded example (Fashion-MNIST) and the shape of ResNet-18 with random
weights at 224 x 224: float32, and int8 weights with 8-bit activations. Each runs in ONNX Runtime on one thread, batch
1; time is CPU time of the process, as in the calibration, so that other work on the machine takes nothing from it but
cache and clock. All files run interleaved, in batches of about 20 ms. The model is fitted to least times, so the least
batch is what it predicts; the median is above it by what other work on the machine costs. Bar: within 15 %.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from formats import images, resnet18

import qopt
from qopt.api import load
from qopt.cache import Cache
from qopt.data import Data, load_data
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import module_to_onnx
from qopt.hardware.describe import describe
from qopt.hardware.measured import MeasuredHost
from qopt.plan import Defaults, Plan
from qopt.runtime.session import open_session, to_bytes
from qopt.spec import WeightSpec

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results" / "latency.md"
BAR = 0.15
BATCH_SECONDS = 0.02
W8A8 = Plan(defaults=Defaults(weights="int8", activations="int8"))


@dataclass(frozen=True)
class Case:
    """A network in one precision: what runs, and what the model says."""

    name: str
    precision: str
    file: bytes
    shape: tuple[int, ...]
    predicted: float


def networks(assets: Path) -> dict[str, tuple[Prepared, Data]]:
    """The three networks with images to calibrate activations on."""
    cifar, fashion = assets / "data/cifar10_small.npz", ROOT.parent / "examples/fashion.npz"
    return {
        "resnet20, 32 x 32": (prepare(load(assets / "onnx/resnet20_cifar10_std.onnx")), load_data(str(cifar))),
        "embedded example, 28 x 28": (
            prepare(load(ROOT.parent / "examples/fashion_resnet.pt")),
            load_data(str(fashion)),
        ),
        "ResNet-18's shape, 224 x 224": (prepare(module_to_onnx(resnet18(), (3, 224, 224))), images()),
    }


def cases(model: MeasuredHost, assets: Path) -> list[Case]:
    """Every network in float and as qopt emits it in int8, with what the model predicts."""
    found = []
    for name, (prepared, data) in networks(assets).items():
        file, shape = to_bytes(prepared.model), data.calibrate.images.shape[1:]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            path.write_bytes(file)
            emitted = qopt.optimize(path, data=data, plan=W8A8, baselines=(), attack_images=1).model
        for precision, ran, bits in (("float", file, 32), ("int8", emitted, 8)):
            network = describe(prepared, bits)
            specs = dict.fromkeys((layer.name for layer in network.layers), WeightSpec.parse(precision))
            predicted = model.network_cost(network.layers, specs, network.steps)["latency"]
            found.append(Case(name, precision, ran, shape, predicted))
    return found


def seconds(files: list[Case], repeats: int) -> np.ndarray:
    """CPU seconds of a run of every file, (files, repeats), interleaved."""
    calls: list[Callable[[], object]] = []
    for case in files:
        session = open_session(case.file)
        image = np.random.default_rng(0).random((1, *case.shape), dtype=np.float32)
        calls.append(partial(session.run, None, {session.get_inputs()[0].name: image}))
    runs = [max(1, round(BATCH_SECONDS / timed(call, 3))) for call in calls]
    return np.array([[timed(call, n) for call, n in zip(calls, runs, strict=True)] for _ in range(repeats)]).T


def timed(call: Callable[[], object], runs: int) -> float:
    """CPU seconds of one of several calls in a row."""
    began = time.process_time()
    for _ in range(runs):
        call()
    return (time.process_time() - began) / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/latency.md")
    args = parser.parse_args()
    began = time.process_time()
    model = MeasuredHost().calibrate(Cache(None))
    calibration = time.process_time() - began
    files = cases(model, Path(os.environ["QOPT_ASSETS"]))
    found = seconds(files, args.repeats)
    lines = ["| network | precision | predicted, ms | least, ms | error | median, ms | error |", "|" + "---|" * 7]
    missed: dict[str, list[str]] = {"least": [], "median": []}
    for case, row in zip(files, found, strict=True):
        cells = []
        for name, value in (("least", float(row.min())), ("median", float(np.median(row)))):
            error = case.predicted / value - 1
            missed[name] += [f"{case.name} in {case.precision}"] if abs(error) > BAR else []
            cells += [f"{1e3 * value:.3f}", f"{100 * error:+.1f} %"]
        lines.append(f"| {case.name} | {case.precision} | {1e3 * case.predicted:.3f} | {' | '.join(cells)} |")
    note = (
        f"{platform.machine()}, {os.cpu_count()} cores shared with other jobs (load {os.getloadavg()[0]:.1f} at the "
        f"end), one thread, CPU time, {args.repeats} interleaved batches. Calibration took {calibration:.0f} s of CPU "
        "time."
    )
    verdict = "\n".join(
        f"Bar: within {100 * BAR:.0f} % of the {name}; missed by: {', '.join(which) or 'none'}."
        for name, which in missed.items()
    )
    print(note, "", *lines, "", verdict, sep="\n")
    if args.write:
        RESULTS.write_text("\n".join(["# Predictions of `measured:host`", "", note, "", *lines, "", verdict, ""]))


if __name__ == "__main__":
    main()
