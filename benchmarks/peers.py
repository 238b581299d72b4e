"""qopt beside what else quantizes networks: sizes, speed, clean and robust accuracy of the files, in one run.

Run: ``QOPT_ASSETS=folder OMP_NUM_THREADS=1 python benchmarks/peers.py [--networks a,b] [--peers a,b] [--images 500]
[--autoattack 50] [--calibration 512] [--limit 1200] [--repeats 40] [--cache folder] [--write]``, in an environment
with ``pip install -c constraints.txt -r requirements-peers.txt -e .``; ``--networks cnn_mnist_madrytiny --images 100
--autoattack 0`` is a small version.

Every tool gets the same train images and runs in a process of its own, with the settings that its adapter in
`peer_adapters` states. What it emits is measured: the ONNX file, in ONNX Runtime on one thread. A tool that is not
installed, crashes or takes longer than ``--limit`` seconds is a row that says so. Files and attacks are kept by
content: after an interruption a second run goes on where the first stopped. ``--write`` writes the log after every
network, and its tables into ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from peer_adapters.attacked import STEPS, Arena, Attacked
from peer_adapters.job import Job
from peer_adapters.quantized import Emitted, Peer, PeerFailed, quantized
from peer_adapters.table import Missing, Row, filled, lowered, table
from peer_adapters.weights import weights_in
from strategies import images, words

from qopt.cache import Cache, default_folder
from qopt.data import Data
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import open_session
from qopt.statistics import paired_difference
from qopt.threat import ThreatModel, parse_eps

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "peers.md", ROOT / "docs" / "benchmarks.md"
PEERS = (
    Peer("qopt, int8", "qopt", "qopt", "qopt_robust", "int8"),
    Peer("qopt, int4", "qopt", "qopt", "qopt_robust", "int4"),
    Peer("qopt, at most 3 bits", "qopt", "qopt", "qopt_robust", "3 bits"),
    Peer("ONNX Runtime static, W8A8", "onnxruntime", "onnxruntime", "ort_static", "W8A8"),
    Peer("ONNX Runtime static, W4A8", "onnxruntime", "onnxruntime", "ort_static", "W4A8"),
    Peer("NNCF, int8", "nncf", "nncf", "nncf_int8"),
    Peer("torchao PT2E, W8A8", "torchao", "torchao", "torchao_pt2e"),
    Peer("AIMET-ONNX AdaRound, W4A8", "aimet", "aimet-onnx", "aimet_adaround"),
    Peer("ModelOpt auto_quantize, 4.8 bits", "modelopt", "nvidia-modelopt", "modelopt_auto"),
    Peer("Brevitas GPTQ, W4A8", "brevitas", "brevitas", "brevitas_gptq"),
)
NETWORKS = {
    "resnet20_cifar10_std": ("cifar10_small", "2/255"),
    "vresnet2b_cifar10_adv2": ("cifar10_small", "2/255"),
    "cnn_mnist_madrytiny": ("mnist_small", "0.3"),
}
"""Name to images and radius in linf; the first was trained on clean images, the others on adversarial ones."""

BATCH_SECONDS = 0.02


def emit_all(peers: tuple[Peer, ...], job: Job, cache: Cache, limit: float) -> dict[Peer, Emitted | PeerFailed]:
    """What every tool makes of the job, or why it makes nothing."""
    found: dict[Peer, Emitted | PeerFailed] = {}
    for peer in peers:
        try:
            found[peer] = quantized(peer, job, cache, limit)
        except PeerFailed as error:
            found[peer] = error
        told = found[peer]
        print(f"{job.network}: {peer.name}: {told.facts if isinstance(told, Emitted) else told}", flush=True)
    return found


def latencies(files: dict[str, bytes], shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Median CPU seconds of one image, all files interleaved in batches of about 20 ms, one thread."""
    calls: dict[str, Callable[[], object]] = {}
    for name, file in files.items():
        session = open_session(file)
        image = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
        calls[name] = partial(session.run, None, {session.get_inputs()[0].name: image})
    runs = {name: max(1, round(BATCH_SECONDS / timed(call, 3))) for name, call in calls.items()}
    rounds = [{name: timed(call, runs[name]) for name, call in calls.items()} for _ in range(repeats)]
    return {name: float(np.median([one[name] for one in rounds])) for name in calls}


def timed(call: Callable[[], object], runs: int) -> float:
    """CPU seconds of one of several calls in a row."""
    began = time.process_time()
    for _ in range(runs):
        call()
    return (time.process_time() - began) / runs


def percent(right: np.ndarray) -> float:
    return 100 * float(right.mean())


def row_of(
    name: str, file: bytes, reference: bytes, speed: float, found: Attacked, floats: Attacked, facts: dict | None
) -> Row:
    """The row of a file; ``facts`` are its adapter's, None for float."""
    weights, kernels, told = weights_in(onnx.load_model_from_string(file)), count_kernels(file), facts or {}
    return Row(
        name, told.get("code_bits", weights.code_bits), weights.stored_bits, len(file), len(file) / len(reference),
        speed, kernels.integer, kernels.float_, percent(found.clean), percent(found.steps),
        percent(found.autoattack) if len(found.autoattack) else None,
        None if facts is None else paired_difference(floats.steps, found.steps), told.get("seconds"),
        "" if found.gradients else "(no gradients)",
    )  # fmt: skip


def measure(args: argparse.Namespace, network: str) -> list[str]:
    """One network, as lines of Markdown."""
    archive, eps = NETWORKS[network]
    data, cache = images(args.assets / "data" / f"{archive}.npz"), Cache(args.cache)
    job = calibration(args, network, eps, data)
    emitted = emit_all(args.peers, job, cache, args.limit)
    reference = job.onnx.read_bytes()
    files = {"float": reference} | {p.name: e.file for p, e in emitted.items() if isinstance(e, Emitted)}
    speeds = latencies(files, data.report.images.shape[1:], args.repeats)
    threat = ThreatModel("linf", parse_eps(eps))
    silent: Callable[[str], None] = lambda step: None  # noqa: E731
    arena = Arena(job.onnx, data, threat, args.images, args.autoattack, cache, silent)
    floats = arena.attack(job.onnx)
    rows: list[Row | Missing] = [row_of("float", reference, reference, 1.0, floats, floats, None)]
    for peer, made in emitted.items():
        if isinstance(made, PeerFailed):
            rows.append(Missing(peer.name, str(made)))
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(made.file)
            found = arena.attack(path)
        speed = speeds[peer.name] / speeds["float"]
        rows.append(row_of(peer.name, made.file, reference, speed, found, floats, made.facts))
        print("| " + " | ".join(rows[-1].cells()) + " |", flush=True)
    kind = f"{network}, linf {eps}"
    return [f"\n## {kind}\n", *table(rows)]


def calibration(args: argparse.Namespace, network: str, eps: str, data: Data) -> Job:
    """The job that all tools get: the first train images."""
    parts = (data.calibrate, data.select)
    pixels = np.concatenate([part.images for part in parts])[: args.calibration]
    labels = np.concatenate([part.labels for part in parts])[: args.calibration]
    return Job(args.assets, network, eps, pixels, labels, Path(), "")


def head(args: argparse.Namespace) -> list[str]:
    """What was run, where, when and with which versions."""
    packages = {peer.package: peer.installed or "not installed" for peer in args.peers} | {"torch": version("torch")}
    asked = f"--images {args.images} --autoattack {args.autoattack} --calibration {args.calibration}"
    return [
        "# qopt and its peers\n",
        f"{date.today()}; {processor()}, {os.cpu_count()} cores, one thread, other work beside it; Python "
        f"{platform.python_version()}, " + ", ".join(f"{name} {found}" for name, found in packages.items()) + ".\n",
        f"Command: `OMP_NUM_THREADS=1 python benchmarks/peers.py {asked} --write`. {args.calibration} train images for "
        f"every tool; clean accuracy on 2000 test images, {STEPS.name} on the first {args.images} and AutoAttack on "
        f"the first {args.autoattack} of them.\n",
    ]


def processor() -> str:
    """The processor's name as Linux tells it, with the instructions that integer kernels use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    found = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f" {flag} " in text]
    return f"{name or platform.machine()} ({', '.join(found)})"


def asked_peers(text: str) -> tuple[Peer, ...]:
    names = words(text)
    unknown = set(names) - {peer.asked for peer in PEERS}
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return tuple(peer for peer in PEERS if peer.asked in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=words, default=tuple(NETWORKS))
    parser.add_argument(
        "--peers", type=asked_peers, default=PEERS, metavar=",".join(dict.fromkeys(p.asked for p in PEERS))
    )
    parser.add_argument("--images", type=int, default=500, help="test images under PGD-50")
    parser.add_argument("--autoattack", type=int, default=50, help="test images under AutoAttack; 0 leaves it out")
    parser.add_argument("--calibration", type=int, default=512, help="train images that every tool gets")
    parser.add_argument("--limit", type=float, default=1200, help="seconds that a tool may take")
    parser.add_argument("--repeats", type=int, default=40, help="rounds of the latencies")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="keeps files and attacks by content")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/peers.md and docs/benchmarks.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    args.assets = Path(assets).resolve()
    torch.set_num_threads(1)
    lines = head(args)
    for network in args.networks:
        found = measure(args, network)
        print("\n".join(found), flush=True)
        lines += found
        if args.write:
            text = "\n".join(lines) + "\n"
            RESULTS.write_text(text)
            PAGE.write_text(filled(PAGE.read_text(), lowered(text)))


if __name__ == "__main__":
    main()
