"""AIMET-ONNX: batch norms folded, 4-bit weights per channel rounded by AdaRound, 8-bit activations, exported as QDQ."""

from __future__ import annotations

from typing import Any

import onnx
from aimet_onnx import QuantizationSimModel, apply_adaround, int4, int8
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight

from peer_adapters.job import Job, run

STEPS = 8000
"""Of AdaRound in all, spread over the layers. AIMET recommends 15000 for each, which takes hours for resnet20."""


def quantize(job: Job) -> dict[str, Any]:
    model = onnx.load(job.onnx)
    fold_all_batch_norms_to_weight(model)
    sim = QuantizationSimModel(model, param_type=int4, activation_type=int8)
    layers = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in model.graph.node)
    inputs = [{job.input: batch} for batch in job.batches(32)]
    apply_adaround(sim, inputs, num_iterations=STEPS // layers)
    sim.compute_encodings(inputs)
    onnx.save(sim.to_onnx_qdq(prequantize_constants=True), job.file)
    return {"note": f"{STEPS // layers} iterations a layer"}


if __name__ == "__main__":
    run("aimet-onnx", quantize)
