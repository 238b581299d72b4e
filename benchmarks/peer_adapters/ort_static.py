"""ONNX Runtime's static quantization: QDQ, weights per channel, min-max, after its own pre-processing."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from peer_adapters.job import Job, run

WEIGHTS = {"W8A8": QuantType.QInt8, "W4A8": QuantType.QInt4}


class Reader(CalibrationDataReader):
    """Batches of 64 under the name of the input."""

    def __init__(self, job: Job) -> None:
        self.batches = iter({job.input: batch} for batch in job.batches(64))

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quantize(job: Job) -> dict[str, Any]:
    prepared = job.out / "prepared.onnx"
    quant_pre_process(str(job.onnx), str(prepared), skip_symbolic_shape=True)
    # 4-bit numbers are part of ONNX from opset 21 on
    onnx.save(version_converter.convert_version(onnx.load(prepared), 21), prepared)
    quantize_static(
        str(prepared), str(job.file), Reader(job), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=WEIGHTS[job.setting],
    )  # fmt: skip
    return {}


if __name__ == "__main__":
    run("onnxruntime", quantize)
