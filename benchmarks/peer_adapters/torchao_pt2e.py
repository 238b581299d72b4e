"""torchao's PT2E flow with its x86 quantizer, 8-bit weights and activations, written by torch's ONNX exporter."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from peer_adapters.job import Job, run


def quantize(job: Job) -> dict[str, Any]:
    images = [torch.from_numpy(batch) for batch in job.batches(64)]
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(job.module(), (images[0],), dynamic_shapes=shapes)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in images:
        prepared(batch)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    exported = torch.export.export(converted, (images[0],), dynamic_shapes=shapes)
    written = torch.onnx.export(exported, dynamo=True, input_names=["x"], opset_version=21, optimize=True)
    written.save(str(job.file))
    return {}


if __name__ == "__main__":
    run("torchao", quantize)
