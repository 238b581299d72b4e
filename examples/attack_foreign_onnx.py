"""Attack somebody else's quantized ONNX file.

    python examples/attack_foreign_onnx.py [MODEL DATA FLOAT]

Without arguments the file is made here, by the static quantization of ONNX Runtime's own tools: 8-bit weights and
activations as QuantizeLinear and DequantizeLinear. qopt had no part in it, and finds out what it withstands: with
gradients through the quantizers, with queries to the file, with what fools the float network, and, for comparison, as a
naive evaluation would.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import onnxscript.optimizer
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import qopt

HERE = Path(__file__).resolve().parent
IMAGES = 12
"""A real evaluation takes 1000; the interval says what so few are worth."""


class Images(CalibrationDataReader):
    """The first train images, one at a time, as ONNX Runtime's tools read them."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.items: Iterator[dict[str, np.ndarray]] = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None after the last one."""
        return next(self.items, None)


def quantized_by_others(folder: Path) -> tuple[Path, Path]:
    """The embedded example as a float ONNX file, and what ONNX Runtime makes of it."""
    model = qopt.load(HERE / "fashion_resnet.pt")
    float_file, prepared, file = (folder / f"{name}.onnx" for name in ("float", "prepared", "quantized"))
    onnx_ir.save(onnxscript.optimizer.optimize(model), float_file)
    quant_pre_process(float_file, prepared, skip_symbolic_shape=True)
    calibration = qopt.load_data(str(HERE / "fashion.npz")).calibrate.images[:64]
    quantize_static(
        prepared, file, Images(model.graph.inputs[0].name, calibration), quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, per_channel=True,
    )  # fmt: skip
    return file, float_file


def evaluate(file: Path, data: Path, float_file: Path) -> None:
    """Print what the file withstands, honestly and naively."""
    honest = qopt.attack(file, data=data, images=IMAGES, sources=(float_file,))
    naive = qopt.attack(file, data=data, images=IMAGES, gradients="plain")
    print(f"threat model {honest.threat}, {honest.images} images")
    for row in honest.rows:
        print(f"  {row.attack + (f' on {row.source}' if row.source else ''):<24} leaves {row.accuracy.value:5.1f} %")
    for name, report in (("honest", honest), ("naive", naive)):
        found = report.interval
        print(
            f"{name}: {found.value:.1f} % robust ({found.low:.1f}-{found.high:.1f}), masked gradients: {report.masking}"
        )


def main() -> None:
    """Attack the file that is named, or the one that is made here."""
    if len(sys.argv) == 4:
        evaluate(*(Path(word) for word in sys.argv[1:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        file, float_file = quantized_by_others(Path(folder))
        print(f"float {float_file.stat().st_size:,} bytes, quantized by ONNX Runtime {file.stat().st_size:,} bytes")
        evaluate(file, HERE / "fashion.npz", float_file)


if __name__ == "__main__":
    main()
