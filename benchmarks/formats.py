"""Size and latency of every kind of emitted file on the shape of ResNet-18 with 1000 classes, random weights.

Run: ``python benchmarks/formats.py [--repeats 40] [--write]`` (``pip install qopt[architectures]``). All files run
interleaved in one process, one thread, batch 1; the minimum of the repeats counts. ONNX Runtime's own static
quantization, QDQ per channel, with 8-bit and with 4-bit weights, is what the integer formats are compared with.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from architectures import Logits

import qopt
from qopt.data import Data, Split
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import module_to_onnx
from qopt.plan import Defaults, Plan
from qopt.runtime.latency import measure_latency
from qopt.runtime.session import to_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "formats.md"
SHAPE = (3, 224, 224)
BARS = {
    "w4": "size 1/7.3 of float, latency 1.03 of float", "w2, edges w4": "size 1/13 of float",
    "w4a8": "latency 1.05 of W8A8", "log4a8": "latency 1.05 of W8A8", "mixed rows a8": "latency 1.05 of W8A8",
}  # fmt: skip


def resnet18() -> torch.nn.Module:
    """The shape of ResNet-18, 1000 classes, its batch norms with statistics of their own."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        layer_type="basic", embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000
    )
    network = Logits(ResNetForImageClassification(config)).train()
    with torch.no_grad():
        for _ in range(8):
            network(torch.rand(4, *SHAPE))
    return network.eval()


def images() -> Data:
    """Random images; what they show does not matter for time and size."""
    generator = np.random.default_rng(0)
    parts = [Split(generator.random((n, *SHAPE), dtype=np.float32), generator.integers(0, 1000, n)) for n in (8, 8, 8)]
    return Data(*parts)


def plans(prepared: Prepared) -> dict[str, Plan]:
    """One for every row of the table."""
    first, last = prepared.layers[0].name, prepared.layers[-1].name
    edges = {first: "int4", last: "int4"}
    cycle = ["int8", "int4", "log4", "ternary"]
    rows = {
        layer.name: f"rows({','.join(cycle[i * 4 // layer.channels] for i in range(layer.channels))})"
        for layer in prepared.layers
    }
    integer = {"activations": "int8"}
    return {
        "w8": Plan(defaults=Defaults(weights="int8")),
        "w4": Plan(defaults=Defaults(weights="int4")),
        "w4, blocks of 64": Plan(defaults=Defaults(weights="int4:block64"), weights={first: "int4"}),
        "w2, edges w4": Plan(defaults=Defaults(weights="int2"), weights=edges),
        "ternary, edges w4": Plan(defaults=Defaults(weights="ternary"), weights=edges),
        "w8a8": Plan(defaults=Defaults(weights="int8", **integer)),
        "w4a8": Plan(defaults=Defaults(weights="int4", **integer)),
        "log4a8": Plan(defaults=Defaults(weights="log4", **integer)),
        "mixed rows a8": Plan(defaults=Defaults(weights="int4", **integer), weights=rows),
    }


def static(float_file: Path, folder: Path, bits: int, data: Data) -> Path:
    """ONNX Runtime's own static quantization with weights of ``bits``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = onnx.load(float_file).graph.input[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{name: data.calibrate.images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    path = folder / f"static_w{bits}a8.onnx"
    weights = QuantType.QInt8 if bits == 8 else QuantType.QInt4
    quantize_static(
        str(float_file), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=bits == 8,
        activation_type=QuantType.QUInt8, weight_type=weights,
    )  # fmt: skip
    return path


def measured(repeats: int) -> list[list[str]]:
    """The rows of the table."""
    data, graph = images(), module_to_onnx(resnet18(), SHAPE)
    prepared = prepare(graph)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_file = folder / "float.onnx"
        float_file.write_bytes(to_bytes(prepared.model))
        files = {"float": float_file}
        kernels = {}
        for label, plan in plans(prepared).items():
            bundle = qopt.optimize(float_file, data=data, plan=plan, baselines=(), attack_images=1)
            files[label] = folder / f"{label}.onnx"
            files[label].write_bytes(bundle.model)
            kernels[label] = f"{bundle.report.kernels.integer} / {bundle.report.kernels.floating}"
        files["ONNX Runtime W8A8"] = static(float_file, folder, 8, data)
        files["ONNX Runtime W4A8"] = static(float_file, folder, 4, data)
        sizes = {label: path.stat().st_size for label, path in files.items()}
        seconds = measure_latency(files, SHAPE, repeats=repeats)
    return [
        [
            label, f"{size / 1e6:.2f}", f"1/{sizes['float'] / size:.2f}", kernels.get(label, ""),
            f"{1e3 * seconds[label]:.2f}", f"{seconds[label] / seconds['float']:.3f}",
            f"{seconds[label] / seconds['ONNX Runtime W8A8']:.3f}", BARS.get(label, ""),
        ]
        for label, size in sizes.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/formats.md")
    args = parser.parse_args()
    head = ["file", "MB", "of float", "integer / float kernels", "ms", "of float", "of W8A8", "bar"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in measured(args.repeats)]
    print("\n".join(lines))
    if args.write:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, batch 1, one thread"
        RESULTS.write_text(f"# Formats on the shape of ResNet-18\n\n{machine}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
