"""NNCF's post-training quantization of an ONNX model, as it is when nothing is asked: int8, fast bias correction."""

from __future__ import annotations

from typing import Any

import nncf
import onnx

from peer_adapters.job import Job, run


def quantize(job: Job) -> dict[str, Any]:
    name = job.input
    images = nncf.Dataset(job.batches(1), lambda image: {name: image})
    onnx.save(nncf.quantize(onnx.load(job.onnx), images, subset_size=len(job.images)), job.file)
    return {}


if __name__ == "__main__":
    run("nncf", quantize)
