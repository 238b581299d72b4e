"""The figures of the main job on the public resnet20: time, memory, size, kernels, latency, accuracy, determinism.

Run: ``QOPT_ASSETS=folder python benchmarks/main_job.py [--write]``; with ``--write`` the table goes to
``benchmarks/results/main_job.md``. Latencies are ratios measured in one run, one thread, interleaved, minimum of 50.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qopt.runtime.latency import measure_latency

RESULTS = Path(__file__).resolve().parent / "results" / "main_job.md"
NETWORK, DATA, EPS = "onnx/resnet20_cifar10_std.onnx", "data/cifar10_small.npz", "2/255"


def compile_once(assets: Path, out: Path) -> float:
    """Run the command as a user would; returns wall seconds."""
    command = [sys.executable, "-m", "qopt", "optimize", str(assets / NETWORK), "--data", str(assets / DATA)]
    command += ["--target", "int4", "--robust", "--eps", EPS, "--no-cache", "--quiet", "-o", str(out)]
    began = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    seconds = time.perf_counter() - began
    if code not in (0, 1):
        raise SystemExit(f"qopt optimize ended with {code}")
    return seconds


def static_w8a8(assets: Path, folder: Path) -> Path:
    """ONNX Runtime's own static quantization, per channel, QDQ, min-max, on 256 train images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    images = np.load(assets / DATA)["x_train"][:256].astype(np.float32) / 255

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": images[i : i + 64]} for i in range(0, 256, 64)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    path = folder / "w8a8.onnx"
    quantize_static(
        str(assets / NETWORK), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def equal(a: Path, b: Path) -> bool:
    return all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in ("plan.json", "model.onnx", "report.json")
    )


def figures(assets: Path) -> list[tuple[str, str, str]]:
    """Rows of (what, bar, measured)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = compile_once(assets, folder / "a")
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        compile_once(assets, folder / "b")
        report = json.loads((folder / "a" / "report.json").read_text())
        files = {"float": assets / NETWORK, "w8a8": static_w8a8(assets, folder), "qopt": folder / "a" / "model.onnx"}
        latency = {batch: measure_latency(files, (3, 32, 32), batch=batch, repeats=50) for batch in (1, 64)}
        same = equal(folder / "a", folder / "b")
    ours = next(row for row in report["rows"] if row["name"] == "qopt")
    size, drop = report["size"], ours["clean_drop"]["value"]
    rows = [
        ("wall time", "under 300 s", f"{seconds:.0f} s"),
        ("peak memory", "under 2 GB", f"{memory:.2f} GB"),
        ("file against float", "at most 0.22", f"{size['ratio']:.3f}"),
        ("code bits, stored bits", "at most 4.0 code bits", f"{size['code_bits']:.2f}, {size['stored_bits']:.2f}"),
        ("layers on float kernels", "0", str(report["kernels"]["floating"])),
        ("clean accuracy, drop", "within 2.0 points", f"{ours['clean']['value']:.2f} %, {drop:.2f}"),
        ("file agrees with quantized graph", "at least 99 %", f"{100 * report['kernels']['agreement']:.2f} %"),
        ("two runs, byte-identical", "yes", "yes" if same else "no"),
    ]  # fmt: skip
    for batch, times in latency.items():
        ratio, against = times["qopt"] / times["w8a8"], times["qopt"] / times["float"]
        rows.append((f"latency against W8A8, batch {batch}", "at most 1.05", f"{ratio:.2f} ({against:.2f} of float)"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/main_job.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    lines = ["| figure | bar | measured |", "|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in figures(Path(assets))]
    table = "\n".join(lines)
    print(table)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        head = f"# Main job on resnet20 (CIFAR-10)\n\n{platform.machine()}, {os.cpu_count()} cores\n\n"
        RESULTS.write_text(f"{head}{table}\n")


if __name__ == "__main__":
    main()
