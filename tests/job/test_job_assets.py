"""The main job on public networks; these need the files that QOPT_ASSETS names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import qopt
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.quant import quantize_weight
from qopt.spec import WeightSpec

pytestmark = pytest.mark.assets

ONNX = [
    "cnn_cifar10_mix4",
    "cnn_fashion_kw",
    "cnn_mnist_madrytiny",
    "cnn_mnist_std",
    "mnistfc_256x2",
    "resnet20_cifar10_std",
    "vit_pgd_2_3_16",
    "vresnet2b_cifar10_adv2",
]
DATA = {"cifar10": "cifar10_small.npz", "mnist": "mnist_small.npz", "fashion": "fashion_small.npz"}
NORMALISED: dict[str, dict[str, Any]] = {
    "vit_pgd_2_3_16": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
}


def data_of(assets: Path, name: str) -> Path:
    key = next((key for key in DATA if key in name), "cifar10")
    return assets / "data" / DATA[key]


@pytest.mark.parametrize("name", ONNX)
def test_every_public_file_compiles_with_data(assets: Path, name: str) -> None:
    options: dict[str, Any] = {"attack_images": 50, "probe_images": 32, "calibration_images": 64, "baselines": ()}
    bundle = qopt.optimize(
        assets / "onnx" / f"{name}.onnx", data=data_of(assets, name), robust=True, eps="1/255",
        **options, **NORMALISED.get(name, {}),
    )  # fmt: skip
    clean = {row.name: row.clean.value for row in bundle.report.rows}
    assert clean["qopt"] > clean["float"] - 10
    assert bundle.report.kernels.floating <= (4 if name.startswith("vit") else 0)
    assert bundle.report.kernels.agreement is not None
    assert bundle.report.kernels.agreement >= 0.97


@pytest.mark.parametrize("name", ONNX)
def test_every_public_file_compiles_without_data(assets: Path, name: str) -> None:
    bundle = qopt.optimize(assets / "onnx" / f"{name}.onnx")
    session = ort.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    shape = [3, *bundle.report.model.input_shape]
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros(shape, np.float32)})
    assert np.isfinite(np.asarray(logits)).all()
    assert bundle.report.size.code_bits <= 4


def test_algorithm_1_on_vresnet2b_recomputed_by_svd(assets: Path) -> None:
    path = assets / "onnx" / "vresnet2b_cifar10_adv2.onnx"
    report = qopt.optimize(path, search="lipschitz").report
    prepared = prepare(load_model(path))
    assert [layer.name for layer in report.layers] == [layer.name for layer in prepared.layers]
    for index in (1, 4, 6):
        layer = prepared.layers[index]
        assert report.layers[index].format == str(algorithm_1(prepared.initializer(layer.initializer)))


def algorithm_1(weight: np.ndarray) -> WeightSpec:
    """METHODS section 2, word for word, with numpy's SVD on the matrix of output channels."""
    import torch

    def norm(w: np.ndarray) -> float:
        return float(np.linalg.svd(w.reshape(len(w), -1).astype(np.float64), compute_uv=False)[0])

    size = norm(weight)
    t_q, t_d = 1.10 * size, 0.3 if size < 3.0 else 1.5
    best = {}
    for kind in ("int", "log"):
        tried = []
        for bits in range(1, 9):
            spec = WeightSpec(kind, bits, "tensor", "max")
            quantized = quantize_weight(torch.from_numpy(weight.copy()), spec).dequantize().numpy()
            error = norm(weight.astype(np.float64) - quantized)
            tried.append((error, spec))
            if norm(quantized) <= t_q and error <= t_d:
                break
        else:
            tried = [min(tried, key=lambda pair: pair[0])]
        best[kind] = tried[-1]
    return best["int"][1] if best["int"][0] < best["log"][0] else best["log"][1]
