"""NVIDIA ModelOpt's auto_quantize: 4 or 8 bits for every layer by its gradient score, 8-bit activations, 4.8 bits.

Its exporter writes 8-bit weights as QDQ and refuses 4-bit ones of convolutions, so these are folded into the float
weights by its own ``fold_weight`` before: the function is the same, the file has no codes for them.
"""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import QuantModule
from torch.fx.experimental.optimization import fuse

from peer_adapters.job import Job, run

BITS = 4.8
"""The default of auto_quantize."""


def recipe(bits: int) -> dict[str, Any]:
    """Weights per channel, activations per tensor in 8 bits, by largest values."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
            {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        ],
        "algorithm": "max",
    }


def quantize(job: Job) -> dict[str, Any]:
    torch.manual_seed(0)
    size = 16
    batches = [
        (torch.from_numpy(job.images[i : i + size]), torch.from_numpy(job.labels[i : i + size]))
        for i in range(0, len(job.images), size)
    ]
    model = fuse(job.module())
    model, _ = mtq.auto_quantize(
        model, constraints={"effective_bits": BITS},
        module_search_spaces=[
            {"module_name_patterns": "*", "quantization_formats": [recipe(4), recipe(8)], "allow_no_quant": False}
        ],
        data_loader=batches, forward_step=lambda net, batch: net(batch[0]),
        loss_func=lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch[1]),
        num_calib_steps=len(batches), num_score_steps=len(batches),
    )  # fmt: skip
    layers = [module for module in model.modules() if isinstance(module, QuantModule)]
    bits = [layer.weight_quantizer.num_bits for layer in layers]
    sizes = [layer.weight.numel() for layer in layers]
    before = copy.deepcopy(model)
    for layer, width in zip(layers, bits, strict=True):
        if width == 4:
            layer.fold_weight()
    with torch.no_grad():
        assert torch.equal(before(batches[0][0]), model(batches[0][0]))
        torch.onnx.export(
            torch.nn.Sequential(model), (batches[0][0],), str(job.file), dynamo=False, input_names=["x"],
            opset_version=17, dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    spent = sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)
    return {"code_bits": spent, "note": f"{bits.count(4)} layers of 4 bits, {bits.count(8)} of 8"}


if __name__ == "__main__":
    run("nvidia-modelopt", quantize)
