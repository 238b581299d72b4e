"""Plans applied to the public networks: the twin is what ONNX Runtime computes from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qopt.emit import emit
from qopt.graph.compare import Runner
from qopt.graph.prepare import prepare
from qopt.plan import uniform
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

INT4 = WeightSpec.parse("int4")
A8, A4 = ActivationSpec.parse("int8"), ActivationSpec.parse("int4")

PUBLIC = [
    "cnn_cifar10_mix4",
    "cnn_fashion_kw",
    "cnn_mnist_madrytiny",
    "cnn_mnist_std",
    "mnistfc_256x2",
    "resnet20_cifar10_std",
    "vit_pgd_2_3_16",
    "vresnet2b_cifar10_adv2",
]


@pytest.mark.assets
@pytest.mark.parametrize("activations", [A8, A4], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_twin_and_file_of_public_networks_agree(name: str, activations: ActivationSpec, assets: Path) -> None:
    """Most logits to the last bits; a code that falls to the other side of a tie moves the others."""
    prepared = prepare(ir.load(assets / "onnx" / f"{name}.onnx"))
    part = next((part for part in ("mnist", "fashion") if part in name), "cifar10")
    with np.load(assets / "data" / f"{part}_small.npz") as file:
        images = file["x_test"][:100].astype(np.float32) / 255
    sample = torch.from_numpy(images).reshape(-1, *prepared.input_shape)
    applied = Quantizer(prepared, sample).apply(uniform(INT4, activations, bias_correction=True))
    found = Runner(emit(prepared, applied.quantized))(sample.numpy())
    with torch.no_grad():
        expected = applied.graph(sample).numpy()
    assert np.median(np.abs(found - expected)) <= 1e-3 * np.abs(expected).max()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.97
