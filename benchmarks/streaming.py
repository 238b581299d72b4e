"""Memory and time of compiling a safetensors file weight-only: the steps before emission, and the whole compile.

    python benchmarks/streaming.py [--parameters 5e6,1.5e7,5e7] [--whole] [--target int4-uniform] [--write]

Every size runs in a process of its own. Memory is the peak resident size above that of program and libraries, over the
size of the float file; pages of the mapped file count. CPU time is that of this process. Without ``--whole`` the
network is loaded, prepared, the candidates of ``int4`` are weighed and one plan is turned into codes; with it,
`qopt.optimize` runs to the end. The fresh process that runs the file at last holds the file and little else, and is not
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "streaming.md"
SIZE = "QOPT_STREAMING_PARAMETERS"
WORDS, WIDTH = 8192, 512
LIMIT = 1.5


class Network(nn.Module):
    """A table of words and residual blocks of two linear layers: all weights are in 2 million or fewer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        """The states (batch, length, width) of token ids (batch, length)."""
        states: Tensor = self.words(ids)
        for up, down in zip(self.up, self.down, strict=True):
            states = states + down(torch.relu(up(states)))
        return states


def network() -> tuple[nn.Module, Tensor]:
    """The factory: a network of about as many parameters as the environment says, and an example."""
    blocks = round((float(os.environ[SIZE]) - WORDS * WIDTH) / (8 * WIDTH * WIDTH))
    return Network(max(1, blocks)), torch.zeros(2, 4, dtype=torch.int64)


def write_file(path: Path) -> int:
    """Random weights into a safetensors file; returns the number of parameters."""
    import safetensors.torch

    torch.manual_seed(0)
    state = network()[0].state_dict()
    safetensors.torch.save_file(state, path)
    return sum(tensor.numel() for tensor in state.values())


def status(key: str) -> int:
    """A size in bytes from ``/proc/self/status``: ``VmRSS`` now, ``VmHWM`` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Let ``VmHWM`` start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(path: Path, whole: bool, target: str) -> dict[str, Any]:
    """In this process: step to its seconds and its peak above the memory of program and libraries in bytes."""
    import onnxscript  # noqa: F401 - program and libraries are loaded before anything counts

    import qopt.api
    from qopt.cache import Cache
    from qopt.config import Options
    from qopt.graph.load import load_model
    from qopt.graph.prepare import prepare
    from qopt.hardware.targets import parse_target
    from qopt.measure.norms import candidate_norms, layer_norms
    from qopt.plan import uniform
    from qopt.quantize import WeightOnly

    with_torch_onnx()
    base, found = status("VmRSS"), dict[str, dict[str, float]]()

    def step(name: str, call: Any) -> Any:
        forget_peak()
        began, cpu = time.perf_counter(), time.process_time()
        result = call()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found[name] = {"seconds": seconds, "cpu": cpu, "peak": status("VmHWM") - base}
        return result

    factory = "streaming:network"
    if whole:
        step("optimize", lambda: qopt.optimize(path, factory=factory, target=target))
        return found
    model = step("load", lambda: load_model(path, factory=factory))
    prepared = step("prepare", lambda: prepare(model))
    weights, formats = WeightOnly(prepared), parse_target(Options().target).weights

    def weigh() -> None:
        for layer in prepared.layers:
            layer_norms(weights, layer, Cache(None))
            for spec in formats:
                candidate_norms(weights, layer, spec, Cache(None))

    step("candidates", weigh)
    step("codes", lambda: weights.apply(uniform(formats[3])))
    return found


def with_torch_onnx() -> None:
    """Export and run something small: libraries that are loaded on first use count as libraries."""
    from qopt.graph.prepare import prepare
    from qopt.graph.to_onnx import module_to_onnx

    prepare(module_to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), (1, 4, 4)))


def run(parameters: float, whole: bool, target: str) -> dict[str, Any]:
    """One size in a process of its own: steps, and the bytes of the file."""
    environment = {
        **os.environ, SIZE: str(parameters), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        arguments = [sys.executable, __file__, "--inside", str(path), "--target", target]
        arguments += ["--whole"] if whole else []
        subprocess.run([*arguments, "--make"], env=environment, check=True)
        done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True)
        size = path.stat().st_size
    return {"bytes": size, "steps": json.loads(done.stdout.splitlines()[-1])}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for every size and step."""
    lines = [
        "| parameters | float MB | step | peak over float | seconds | CPU s | CPU us per parameter |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for result in results:
        size = result["bytes"]
        for name, step in result["steps"].items():
            lines.append(
                f"| {size / 4:.3g} | {size / 1e6:.0f} | {name} | {step['peak'] / size:.2f} | {step['seconds']:.1f} "
                f"| {step['cpu']:.1f} | {4e6 * step['cpu'] / size:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every size, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", default="5e6,1.5e7,5e7")
    parser.add_argument("--whole", action="store_true", help="run qopt.optimize instead of the steps")
    parser.add_argument("--write", action="store_true", help=f"also write results/{RESULTS.name}")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--target", default="int4-uniform", help="of the whole compile [int4-uniform]")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    options = parser.parse_args()
    if options.make:
        write_file(options.inside)
    elif options.inside:
        sys.stdout.write(json.dumps(measure(options.inside, options.whole, options.target)) + "\n")
    else:
        results = [run(float(text), options.whole, options.target) for text in options.parameters.split(",")]
        text = table(results)
        sys.stdout.write(json.dumps(results) + "\n" if options.json else text)
        if options.write:
            title = "# Compiling a safetensors file weight-only"
            RESULTS.write_text(f"{title}\n\nPeak resident memory above that of program and libraries.\n\n{text}")


if __name__ == "__main__":
    main()
