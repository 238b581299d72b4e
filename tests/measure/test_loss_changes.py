"""What one quantized layer does to the loss, against the whole network run with the layer overwritten."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qopt.attacks import predict
from qopt.errors import DataError
from qopt.graph.prepare import prepare
from qopt.measure.divergence import Probe, layer_sensitivities
from qopt.measure.loss_changes import FloatLoss, LossChange, loss_changes
from qopt.measure.network import TwinClassifier
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.quantize import Quantizer
from qopt.spec import WeightSpec

Text = Callable[..., onnx.ModelProto]

FORMATS = tuple(WeightSpec.parse(text) for text in ("int2:tensor:max", "ternary", "int4", "int8"))
COUNT = 40


def twin(quantizer: Quantizer) -> TwinClassifier:
    return TwinClassifier(quantizer.float_graph, batch=quantizer.prepared.batch)


def setting(quantizer: Quantizer, count: int = COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """Images, such with noise as strong as the network half withstands, and labels that are right on most of them."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(count, *quantizer.prepared.input_shape, generator=generator)
    adversarial = torch.rand(clean.shape, generator=generator)
    labels = predict(twin(quantizer), clean).argmax(1)
    labels[:3] = (labels[:3] + 1) % quantizer.prepared.classes
    return clean, adversarial, labels


def overwritten(quantizer: Quantizer, layer: str, spec: WeightSpec) -> TwinClassifier:
    graph = copy.deepcopy(quantizer.float_graph)
    node = next(node for node in graph.graph.nodes if is_layer(node) and node.meta["layer"] == layer)
    weight = quantizer.quantized_weight(quantizer.prepared.layer(layer), spec).dequantize()
    constant_of(graph, weight_source(node)).copy_(weight)
    return TwinClassifier(graph, batch=quantizer.prepared.batch)


def losses(model: TwinClassifier, images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(predict(model, images).double(), labels, reduction="none")


@pytest.mark.parametrize("name", ["conv", "shared", "dynamic", "static"])
def test_against_whole_runs(networks: dict[str, Quantizer], name: str) -> None:
    quantizer = networks[name]
    model, (clean, adversarial, labels) = twin(quantizer), setting(quantizer)
    candidates = {layer.name: FORMATS for layer in quantizer.prepared.layers}
    floats, found = loss_changes(quantizer, model, clean, adversarial, labels, candidates)
    held = predict(model, adversarial).argmax(1) == labels
    assert 0 < int(held.sum()) < len(held)
    hardest = torch.where(held.view(-1, 1, 1, 1), adversarial, clean)
    before = [losses(model, images, labels) for images in (clean, adversarial, hardest)]
    assert [floats.clean, floats.adversarial, floats.robust] == pytest.approx([float(b.mean()) for b in before])
    assert set(found) == {(layer, spec) for layer, specs in candidates.items() for spec in specs}
    divergences = layer_sensitivities(quantizer, model, Probe.of(model, hardest), candidates)
    for (layer, spec), change in found.items():
        other = overwritten(quantizer, layer, spec)
        after = [
            losses(other, images, labels) - b for images, b in zip((clean, adversarial, hardest), before, strict=True)
        ]
        expected = [float(values.mean()) for values in after]
        assert [change.clean, change.adversarial, change.robust] == pytest.approx(expected, abs=1e-6)
        assert change.robust_error == pytest.approx(float(after[2].std() / COUNT**0.5), abs=1e-6)
        assert change.divergence == pytest.approx(divergences[layer, spec], abs=1e-6)


def test_a_planted_layer_hurts(text_model: Text) -> None:
    """One weight that no image reads makes 2 bits per tensor round all others of its layer to zero."""
    generator = np.random.default_rng(0)
    first, second = (generator.choice([-1.0, 1.0], size).astype(np.float32) for size in ((8, 16), (3, 8)))
    planted = np.concatenate([second, np.zeros((3, 1), np.float32)], 1)
    planted[0, 8] = 100
    graph = """net (float[n,1,4,4] x) => (float[n,3] y) {
        f = Flatten (x)
        h = Gemm <transB = 1> (f, w1)
        r = Relu (h)
        y = Gemm <transB = 1> (r, w2)
    }"""
    idle = np.concatenate([first, np.zeros((1, 16), np.float32)])
    quantizer = Quantizer(prepare(ir.serde.deserialize_model(text_model(graph, w1=idle, w2=planted))))
    clean = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = predict(twin(quantizer), clean).argmax(1)
    coarse = WeightSpec.parse("int2:tensor:max")
    floats, found = loss_changes(quantizer, twin(quantizer), clean, clean, labels, {"w1": (coarse,), "w2": (coarse,)})
    assert found["w1", coarse].robust == pytest.approx(0, abs=1e-6)
    assert found["w2", coarse].robust == pytest.approx(np.log(3) - floats.robust, rel=1e-5)
    assert found["w2", coarse].robust > 5 * found["w2", coarse].robust_error > 0


def test_one_image_has_no_error(networks: dict[str, Quantizer]) -> None:
    quantizer = networks["dynamic"]
    clean, adversarial, labels = setting(quantizer, 1)
    floats, found = loss_changes(quantizer, twin(quantizer), clean, adversarial, labels, {"w": FORMATS})
    assert isinstance(floats, FloatLoss)
    assert {change.robust_error for change in found.values()} == {0.0}
    assert all(isinstance(change, LossChange) for change in found.values())


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (COUNT - 1, torch.zeros(COUNT, dtype=torch.int64), "do not pair up"),
        (COUNT, torch.zeros(COUNT - 1, dtype=torch.int64), "labels do not fit"),
        (COUNT, torch.full((COUNT,), 99), "out of range"),
        (COUNT, torch.zeros(COUNT), "labels do not fit"),
    ],
)
def test_what_does_not_fit(networks: dict[str, Quantizer], images: int, labels: Tensor, match: str) -> None:
    quantizer = networks["dynamic"]
    clean, adversarial, _ = setting(quantizer)
    with pytest.raises(DataError, match=match):
        loss_changes(quantizer, twin(quantizer), clean, adversarial[:images], labels, {"w": FORMATS})
