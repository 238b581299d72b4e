"""Post-training quality at equal bits: clean and robust accuracy against float on public networks.

Run: ``QOPT_ASSETS=folder python benchmarks/ptq.py [--networks a,b] [--bits 4,3,2.5,2] [--draws 3] [--write]``.

Every row is the mean over calibration draws (which train images calibrate, which select) of the paired difference to
float on the same test images, with its standard error over images. Bits are code bits and stored bits per weight as
qopt counts them; accuracy is what the emitted file gives in ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import qopt
from qopt.data import Data, Split
from qopt.report.model import Drop, Report, Row

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Network:
    """A public network with its images, threat model and activation format."""

    name: str
    data: str
    eps: str
    activations: str
    robust: bool


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet20_cifar10_std", "cifar10_small", "2/255", "int8", False),
        Network("vresnet2b_cifar10_adv2", "cifar10_small", "2/255", "float", True),
        Network("cnn_cifar10_mix4", "cifar10_small", "2/255", "float", True),
        Network("cnn_mnist_madrytiny", "mnist_small", "0.3", "float", True),
        Network("cnn_fashion_kw", "fashion_small", "0.1", "float", True),
    )
}


def draw(path: Path, seed: int) -> Data:
    """The images, their train part shuffled by ``seed`` and halved into calibrate and select."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    order = np.random.default_rng(seed).permutation(len(arrays["x_train"]))
    half = len(order) // 2

    def part(name: str, rows: np.ndarray) -> Split:
        images = arrays[f"x_{name}"][rows].astype(np.float32) / np.float32(255)
        return Split(images, arrays[f"y_{name}"][rows].astype(np.int64))

    test = np.arange(len(arrays["x_test"]))
    return Data(part("train", order[:half]), part("train", order[half:]), part("test", test))


def measure(assets: Path, network: Network, bits: float, seed: int, options: dict[str, str]) -> tuple[Report, float]:
    """One compilation and its report, with the seconds it took."""
    began = time.process_time()
    bundle = qopt.optimize(
        assets / "onnx" / f"{network.name}.onnx", data=draw(assets / "data" / f"{network.data}.npz", seed),
        target="int4", limits=(f"bits<={bits}",), robust=network.robust, eps=network.eps, baselines=(), gates=(),
        activations=network.activations, attack_images=2000, seed=seed, **options,
    )  # fmt: skip
    return bundle.report, time.process_time() - began


def ours(report: Report) -> Row:
    return next(row for row in report.rows if row.name == "qopt")


def differences(drops: list[Drop | None]) -> str:
    """Mean difference and mean standard error over draws."""
    found = [drop for drop in drops if drop is not None]
    if not found:
        return "-"
    return f"{np.mean([d.value for d in found]):+.2f} +- {np.mean([d.standard_error for d in found]):.2f}"


def table_row(network: Network, bits: float, reports: list[Report], seconds: float) -> list[str]:
    """Means over draws."""
    rows = [ours(report) for report in reports]
    return [
        network.name, f"{bits:g}", f"{np.mean([r.size.code_bits for r in reports]):.2f}",
        f"{np.mean([r.size.stored_bits for r in reports]):.2f}", f"{np.mean([row.clean.value for row in rows]):.2f}",
        differences([row.clean_drop for row in rows]), differences([row.robust_drop for row in rows]),
        f"{seconds / len(reports):.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="4,3,2.5,2")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--options", default="{}", help="further options of qopt.optimize, as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/ptq.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    options = json.loads(args.options)
    header = ["network", "budget", "code bits", "stored bits", "clean %", "clean drop", "robust drop", "CPU s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    for name in args.networks.split(","):
        for bits in map(float, args.bits.split(",")):
            found = [measure(Path(assets), NETWORKS[name], bits, seed, options) for seed in range(args.draws)]
            row = table_row(NETWORKS[name], bits, [report for report, _ in found], sum(s for _, s in found))
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {memory:.2f} GB")
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        text = "\n".join(lines)
        (RESULTS / "ptq.md").write_text(f"# Post-training quality\n\n{text}\n\nPeak memory {memory:.2f} GB.\n")


if __name__ == "__main__":
    main()
