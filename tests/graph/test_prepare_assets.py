"""The public networks: prepared, imported and compared with the files as they came."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qopt.graph.compare import TOLERANCE, difference, matches_onnxruntime, random_images
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin

Run = Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]

LAYERS = {
    "cnn_cifar10_mix4": 4,
    "cnn_fashion_kw": 4,
    "cnn_mnist_madrytiny": 4,
    "cnn_mnist_std": 4,
    "mnistfc_256x2": 3,
    "resnet20_cifar10_std": 20,
    "vit_pgd_2_3_16": 14,
    "vresnet2b_cifar10_adv2": 8,
}


def _file(name: str) -> Path:
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        pytest.skip("QOPT_ASSETS is not set")
    return Path(assets) / "onnx" / f"{name}.onnx"


@pytest.mark.assets
@pytest.mark.parametrize("name", LAYERS)
def test_public_network(name: str, run: Run) -> None:
    original = ir.load(_file(name))
    prepared = prepare(original)
    assert prepared.batch is None
    assert prepared.classes == 10
    assert len(prepared.layers) == LAYERS[name]
    assert all(layer.name.endswith(".weight") and layer.macs > 0 for layer in prepared.layers)
    assert matches_onnxruntime(prepared, build_twin(prepared)) <= TOLERANCE
    images = random_images(prepared.input_shape, 3, seed=5)
    single = np.concatenate([run(original, image[None]) for image in images])
    assert difference(run(prepared.model, images), single) <= TOLERANCE
    assert prepare(ir.load(_file(name))).digest == prepared.digest


@pytest.mark.assets
def test_transformer_weights_get_their_module_names() -> None:
    prepared = prepare(ir.load(_file("vit_pgd_2_3_16")))
    names = [layer.name for layer in prepared.layers]
    assert names[:3] == ["0.projection.weight", "1.0.0.fn.1.query.weight", "1.0.0.fn.1.key.weight"]
    query = prepared.layers[1]
    assert query.initializer == "onnx::MatMul_209"
    assert query.uses[0].bias == "1.0.0.fn.1.query.bias"
    assert query.macs == 5 * 48 * 48


@pytest.mark.assets
def test_every_public_network_is_named_here() -> None:
    assert {file.stem for file in _file("x").parent.glob("*.onnx")} == set(LAYERS)
