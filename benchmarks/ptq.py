"""Post-training quality at equal bits: clean and robust accuracy against float on public networks.

Run: ``QOPT_ASSETS=folder python benchmarks/ptq.py [--networks a,b] [--bits 4,3,2.5,2] [--draws 3] [--apgd] [--write]``.

Every row is the mean over calibration draws (which train images calibrate, which select) of the paired difference to
float on the same test images, with its standard error over images. Bits are code bits and stored bits per weight as
qopt counts them. Accuracy is what the emitted file gives in ONNX Runtime, attacked through its twin: by qopt's preset
(FGSM, PGD-20, and float's examples transferred) on all test images; with ``--apgd`` also by APGD-CE on all of them and
by APGD-T on the first 1000. An image counts as robust where every attack up to
and including that column fails, so the columns fall from left to right.

``--against-clean`` tells instead what the robust selection is worth: robust accuracy of the network it selects minus
that of the one selected for clean accuracy, at equal bits and with the same draws.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qopt.api import load
from qopt.attacks import APGD, accuracy_vector
from qopt.cache import Cache
from qopt.config import resolve_options
from qopt.data import Data, Split
from qopt.job.artefact import Artefact, build_artefact, float_artefact
from qopt.job.choose import choose
from qopt.job.optimize import Task, start
from qopt.job.report import layer_metadata
from qopt.job.rows import Table
from qopt.job.run import Run
from qopt.size import code_bits, stored_bits
from qopt.statistics import paired_difference

RESULTS = Path(__file__).resolve().parent / "results"
TARGETED = 1000
"""Test images that APGD-T attacks."""

COLUMNS = ("clean", "PGD-20", "APGD-CE", "APGD-T")


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


@dataclass(frozen=True)
class Measured:
    """One compilation: sizes, CPU seconds to the file, and which test images it gets right, by column."""

    code_bits: float
    stored_bits: float
    seconds: float
    correct: dict[str, Tensor]


def apgd(artefact: Artefact, run: Run, correct: Tensor, attack: APGD) -> Tensor:
    """What is left of ``correct`` after one attack of AutoAttack on those images, judged in the file."""
    rows = torch.nonzero(correct).flatten()
    images, labels = (torch.from_numpy(a)[rows] for a in (run.data.report.images, run.data.report.labels))
    found = attack(artefact.twin, images, labels, run.threat, seed=run.seed("report"), indices=rows)
    left = torch.zeros_like(correct)
    left[rows] = accuracy_vector(artefact.classifier, found.adversarial, labels)
    return left


def columns(artefact: Artefact, run: Run, clean: Tensor, robust: Tensor | None, with_apgd: bool) -> dict[str, Tensor]:
    """Which images are right, by column; `TARGETED` of them under APGD-T."""
    found = {"clean": clean}
    if robust is not None:
        found["PGD-20"] = robust
        if with_apgd:
            found["APGD-CE"] = apgd(artefact, run, robust, APGD())
            few = found["APGD-CE"].clone()
            few[TARGETED:] = False
            found["APGD-T"] = apgd(artefact, run, few, APGD("dlr", targets=9))[:TARGETED]
    return found


def measure(
    assets: Path, network: Network, bits: float, seed: int, options: dict[str, str], floats: dict, with_apgd: bool,
    robust_selection: bool = True,
) -> Measured:  # fmt: skip
    """One compilation; what float does on the same images is computed once and kept in ``floats``."""
    began = time.process_time()
    resolved = resolve_options(
        target="int4", limits=(f"bits<={bits}",), robust=network.robust, eps=network.eps, baselines=(), gates=(),
        activations=network.activations, attack_images=2000, seed=seed, **options,
    )  # fmt: skip
    model = load(assets / "onnx" / f"{network.name}.onnx")
    task = Task(model, network.name, draw(assets / "data" / f"{network.data}.npz", seed), resolved)
    run = start(task, Cache(None), lambda step: None)
    if robust_selection:
        choice = choose(run)
    else:
        clean = replace(task, options=replace(resolved, robust=False))
        choice = choose(start(clean, Cache(None), lambda step: None))
    artefact = build_artefact(run, choice.applied, layer_metadata(choice))
    seconds = time.process_time() - began
    table = Table(run)
    table.add_float(float_artefact(run))
    if network.name not in floats:
        scores = table.reference.scores
        robust = None if scores is None else scores.robust
        floats[network.name] = columns(float_artefact(run), run, table.reference.clean, robust, with_apgd)
    clean, scores = table.add("qopt", artefact, choice.applied, naive=False)
    robust = None if scores is None else scores.robust
    stored = list(choice.applied.quantized.stored(run.prepared))
    return Measured(
        code_bits(stored), stored_bits(stored), seconds, columns(artefact, run, clean, robust, with_apgd)
    )  # fmt: skip


def difference(reference: dict[str, Tensor], found: list[Measured], column: str) -> str:
    """Mean over draws of float minus network in points, and the mean standard error over images."""
    if column not in reference:
        return "-"
    pairs = [paired_difference(reference[column].numpy(), one.correct[column].numpy()) for one in found]
    return f"{np.mean([p.difference for p in pairs]):+.2f} +- {np.mean([p.standard_error for p in pairs]):.2f}"


def worth(robust: list[Measured], clean: list[Measured], column: str) -> str:
    """Points that the robust selection keeps above the clean one, in the mean over draws; paired standard error."""
    if column not in robust[0].correct:
        return "-"
    pairs = [
        paired_difference(one.correct[column].numpy(), other.correct[column].numpy())
        for one, other in zip(robust, clean, strict=True)
    ]
    return f"{np.mean([p.difference for p in pairs]):+.2f} +- {np.mean([p.standard_error for p in pairs]):.2f}"


def table_row(network: Network, bits: float, reference: dict[str, Tensor], found: list[Measured]) -> list[str]:
    """Means over draws."""
    return [
        network.name, f"{bits:g}", f"{np.mean([one.code_bits for one in found]):.2f}",
        f"{np.mean([one.stored_bits for one in found]):.2f}",
        *(difference(reference, found, column) for column in COLUMNS),
        f"{np.mean([one.seconds for one in found]):.0f}",
    ]  # fmt: skip


def float_row(name: str, reference: dict[str, Tensor]) -> str:
    """Accuracy of float in percent, by column."""
    shares = (f"{100 * float(v.double().mean()):.2f}" for v in reference.values())
    return f"{name}: float " + ", ".join(f"{c} {s} %" for c, s in zip(reference, shares, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="4,3,2.5,2")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--apgd", action="store_true", help="also APGD-CE and APGD-T")
    parser.add_argument("--against-clean", action="store_true", help="compare the robust with a clean selection")
    parser.add_argument("--options", default="{}", help="further options of qopt.optimize, as JSON")
    parser.add_argument("--threads", type=int, help="CPU threads [all]")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    if args.threads:
        torch.set_num_threads(args.threads)
    shown = [
        f"{column}, robust minus clean selection" if args.against_clean else f"{column} drop" for column in COLUMNS
    ]
    header = ["network", "budget", "code bits", "stored bits", *shown, "CPU s"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    print("\n".join(lines), flush=True)
    floats: dict[str, dict[str, Tensor]] = {}
    for name in args.networks.split(","):
        for bits in map(float, args.bits.split(",")):
            common = (Path(assets), NETWORKS[name], bits)
            rest = (json.loads(args.options), floats, args.apgd)
            found = [measure(*common, seed, *rest) for seed in range(args.draws)]
            row = table_row(NETWORKS[name], bits, floats[name], found)
            if args.against_clean:
                other = [measure(*common, seed, *rest, robust_selection=False) for seed in range(args.draws)]
                row[4:8] = [worth(found, other, column) for column in COLUMNS]
            lines.append("| " + " | ".join(row) + " |")
            print(lines[-1], flush=True)
    memory = f"Peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB; {args.draws} draws."
    lines += ["", *(f"- {float_row(name, reference)}" for name, reference in floats.items()), "", memory]
    print("\n".join(lines[-len(floats) - 3 :]))
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        text = "\n".join(lines)
        (RESULTS / f"{args.write}.md").write_text(f"# Post-training quality\n\n{text}\n")


if __name__ == "__main__":
    main()
