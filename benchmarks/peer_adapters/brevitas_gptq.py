"""Brevitas: its image classification recipe with GPTQ and bias correction, 4-bit weights, 8-bit activations, QCDQ.

The recipe keeps a convolution of colour images at 8 bits; so it is, when nothing is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gptq,
    calibrate,
    quantize_model,
)

from peer_adapters.job import Job, run


def quantize(job: Job) -> dict[str, Any]:
    torch.manual_seed(0)
    images = [torch.from_numpy(batch) for batch in job.batches(64)]
    loader = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images]
    model = preprocess_for_quantize(
        job.module(), equalize_iters=20, equalize_merge_bias=True, merge_bn=True, trace_model=True
    )
    model = quantize_model(
        model, backend="layerwise", weight_bit_width=4, act_bit_width=8, bias_bit_width=32,
        weight_quant_granularity="per_channel", act_quant_percentile=99.999, act_quant_type="sym",
        scale_factor_type="float_scale", quant_format="int",
    )  # fmt: skip
    with torch.no_grad():
        model.eval()(images[0])  # sets up the scales of the weights
    calibrate(loader, model)
    apply_gptq(loader, model, act_order=False, use_quant_activations=False, create_weight_orig=True)
    apply_bias_correction(loader, model)
    model.eval()
    with torch.no_grad():
        export_onnx_qcdq(
            torch.nn.Sequential(model), images[0][:1], str(job.file), dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    return {}


if __name__ == "__main__":
    run("brevitas", quantize)
