"""The adversarial noise sensitivity of layers, against FGSM and norms by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt.attacks import FGSM
from qopt.data import Data
from qopt.errors import DataError
from qopt.graph.prepare import prepare
from qopt.measure.network import TwinClassifier
from qopt.measure.noise_sensitivity import noise_sensitivity
from qopt.quantize import Quantizer
from qopt.threat import ThreatModel

THREAT = ThreatModel("linf", 0.1)
GRAPH = """network (float[n,1,2,2] x) => (float[n,3] y) {
    f = Flatten (x)
    h = Gemm <transB = 1> (f, w1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2)
}"""


@pytest.fixture(scope="module")
def network(text_model: Callable[..., onnx.ModelProto]) -> TwinClassifier:
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(4, 4)).astype(np.float32), "w2": rng.normal(size=(3, 4)).astype(np.float32)}
    model = ir.serde.deserialize_model(text_model(GRAPH, **weights))
    return TwinClassifier(Quantizer(prepare(model)).float_graph)


def by_hand(model: TwinClassifier, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """One signed step on the right ones, both layers in numpy."""
    right = model(images).argmax(1) == labels
    moved = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(moved), labels), moved)
    stepped = (images + THREAT.eps * slope.sign()).clamp(0, 1)
    adversarial = torch.where(right.view(-1, 1, 1, 1), stepped, images)
    found = {}
    names = {node.meta["layer"]: node for node in model.graph.graph.nodes if "layer" in node.meta}
    outputs = {}
    for name in names:
        outputs[name] = [activation(model, name, x) for x in (images, adversarial)]
    for name, (clean, attacked) in outputs.items():
        found[name] = float(np.mean(np.linalg.norm(attacked - clean, axis=1) / np.linalg.norm(clean, axis=1)))
    return found


def activation(model: TwinClassifier, layer: str, images: torch.Tensor) -> np.ndarray:
    found: list[np.ndarray] = []

    class Look(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            value = super().run_node(node)
            if node.meta.get("layer") == layer:
                found.append(value.detach().double().numpy().reshape(len(images), -1))
            return value

    Look(model.graph).run(images)
    return found[0]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_it_is_the_mean_ratio_under_one_signed_step(network: TwinClassifier, batch_size: int) -> None:
    images = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = network(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3  # wrong already: left as they are
    found = noise_sensitivity(network, images, labels, THREAT, batch_size=batch_size)
    expected = by_hand(network, images, labels)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_attack_no_noise_and_more_of_it_more(network: TwinClassifier) -> None:
    images = torch.rand(16, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    labels = network(images).argmax(1)
    none, some, more = (
        noise_sensitivity(network, images, labels, ThreatModel("linf", eps), batch_size=8) for eps in (0.0, 0.02, 0.1)
    )
    assert set(none.values()) == {0.0}
    assert all(0 < some[name] < more[name] for name in some)


def test_every_layer_of_the_example_has_one(
    example: Quantizer, data: Data, twin_of: Callable[[Quantizer], TwinClassifier]
) -> None:
    few = data.calibrate.first(24)
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    twin = twin_of(example)
    before = twin(images[:2])
    found = noise_sensitivity(twin, images, labels, THREAT, batch_size=16)
    assert sorted(found) == sorted(layer.name for layer in example.prepared.layers)
    assert all(0 < value < 10 for value in found.values())
    assert torch.equal(before, twin(images[:2])), "the network was changed"
    adversarial = FGSM()(twin, images, labels, THREAT, seed=0).adversarial
    assert float((adversarial - images).abs().max()) <= THREAT.eps + 1e-6


def test_labels_that_do_not_pair_up(network: TwinClassifier) -> None:
    with pytest.raises(DataError):
        noise_sensitivity(network, torch.rand(4, 1, 2, 2), torch.zeros(3, dtype=torch.int64), THREAT, batch_size=4)
