"""qopt: ``optimize --robust`` with its defaults; half of the images calibrate, half select."""

from __future__ import annotations

from typing import Any

import qopt
from peer_adapters.job import Job, run
from qopt.data import Data, Split

SETTINGS: dict[str, dict[str, Any]] = {
    "int4": {"target": "int4"},
    "3 bits": {"target": "int4", "limits": ("bits<=3",)},
    "int8": {"target": "int8"},
}


def quantize(job: Job) -> dict[str, Any]:
    half = len(job.images) // 2
    first, second = (Split(job.images[s], job.labels[s]) for s in (slice(half), slice(half, None)))
    # the report's images must be others; test images are not shown to a quantizer, so it reports on those that select
    bundle = qopt.optimize(
        job.onnx, data=Data(first, second, second), robust=True, eps=job.eps, baselines=(), gates=(),
        **SETTINGS[job.setting],
    )  # fmt: skip
    job.file.write_bytes(bundle.model)
    size = bundle.report.size
    return {"code_bits": size.code_bits, "stored_bits": size.stored_bits}


if __name__ == "__main__":
    run("qopt", quantize)
