"""The divergence is the Kullback-Leibler divergence, and a layer's sensitivity what quantizing it really does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qopt.data import Data
from qopt.errors import ModelError, PlanError, VerificationError
from qopt.measure.divergence import LIMIT, Probe, layer_sensitivities, log_probabilities, tensor_sensitivities
from qopt.measure.network import ArtefactClassifier, TwinClassifier
from qopt.plan import Plan, uniform
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Images = Callable[..., torch.Tensor]
TwinOf = Callable[[Quantizer], TwinClassifier]
SPECS = [WeightSpec.parse(text) for text in ("int1", "int2", "int4", "log4", "int8")]


def _numpy_kl(reference: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Mean over rows of ``sum p log(p / q)`` for logits."""

    def probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))

    p, q = probabilities(reference), probabilities(found)
    return float((p * np.log(p / q)).sum(1).mean())


@torch.no_grad()
def _logits(model: Callable[[torch.Tensor], torch.Tensor], sample: torch.Tensor) -> NDArray[np.float64]:
    return model(sample).double().numpy()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["conv", "shared", "static"])
def test_it_equals_numpys(
    spec: WeightSpec, name: str, networks: dict[str, Quantizer], images: Images, twin_of: TwinOf
) -> None:
    quantizer = networks[name]
    sample = images(quantizer.prepared, 20)
    model = twin_of(quantizer)
    quantized = TwinClassifier(quantizer.apply(uniform(spec)).graph, batch=quantizer.prepared.batch)
    found = Probe.of(model, sample).divergence(quantized)
    assert found == pytest.approx(_numpy_kl(_logits(model, sample), _logits(quantized, sample)), rel=1e-9, abs=1e-15)
    assert 0 < found < LIMIT


def test_of_a_network_from_itself_it_is_zero(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    model = twin_of(networks["conv"])
    assert Probe.of(model, images(networks["conv"].prepared, 9)).divergence(model) == 0.0


def test_a_file_can_be_held_against_the_same_probe(
    networks: dict[str, Quantizer], images: Images, twin_of: TwinOf, artefact_of: Callable[..., ArtefactClassifier]
) -> None:
    quantizer = networks["conv"]
    probe = Probe.of(twin_of(quantizer), images(quantizer.prepared, 20))
    applied = quantizer.apply(uniform(WeightSpec.parse("int2"), ActivationSpec.parse("int8")))
    twin = probe.divergence(TwinClassifier(applied.graph))
    assert probe.divergence(artefact_of(quantizer.prepared, applied.quantized)) == pytest.approx(twin, rel=0.02)


def test_small_shifts_are_not_lost_in_rounding(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    """A shift of one logit by d costs ``p (1 - p) d**2 / 2`` nats: 1e-9 here, below what float32 resolves."""
    quantizer = networks["conv"]
    sample, model = images(quantizer.prepared, 20), twin_of(networks["conv"])
    shift = torch.zeros(5)
    shift[2] = 2.0**-13
    probe = Probe.of(model, sample)
    assert probe.reference.dtype == torch.float64
    moved = Probe(sample, torch.log_softmax(torch.from_numpy(_logits(model, sample)) + shift, 1))
    p = torch.softmax(torch.from_numpy(_logits(model, sample)), 1)[:, 2]
    expected = float((p * (1 - p) / 2).mean()) * 2.0**-26
    assert moved.divergence(model) == pytest.approx(expected, rel=1e-3)
    assert expected < 2e-9


def test_it_is_cut_off_at_the_limit(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    quantizer = networks["conv"]
    model, far = twin_of(quantizer), twin_of(quantizer)
    far.graph.get_buffer("w3").mul_(-1e7)
    assert Probe.of(model, images(quantizer.prepared, 4)).divergence(far) == LIMIT


def test_logits_that_are_not_finite_are_an_error(
    networks: dict[str, Quantizer], images: Images, twin_of: TwinOf
) -> None:
    model = twin_of(networks["conv"])
    probe = Probe.of(model, images(networks["conv"].prepared, 4))
    model.graph.get_buffer("b3").fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        probe.divergence(model)


def test_log_probabilities_add_up(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    found = log_probabilities(twin_of(networks["static"]), images(networks["static"].prepared, 7))
    assert found.shape == (7, 4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("name", ["conv", "shared", "static"])
def test_sensitivities_are_what_quantizing_the_layer_does(
    name: str, networks: dict[str, Quantizer], images: Images, twin_of: TwinOf
) -> None:
    quantizer = networks[name]
    model, sample = twin_of(quantizer), images(quantizer.prepared, 14)
    probe = Probe.of(model, sample)
    layers = [layer.name for layer in quantizer.prepared.layers]
    found = layer_sensitivities(quantizer, model, probe, dict.fromkeys(layers, SPECS))
    assert list(found) == [(layer, spec) for layer in layers for spec in SPECS]
    for (layer, spec), value in found.items():
        applied = quantizer.apply(Plan(weights={layer: str(spec)}))
        real = probe.divergence(TwinClassifier(applied.graph, batch=quantizer.prepared.batch))
        assert value == pytest.approx(real, rel=1e-3, abs=1e-12), (layer, str(spec))
        assert value > 0


@pytest.mark.parametrize("name", ["conv", "shared", "static"])
def test_sensitivities_of_activations_are_what_quantizing_the_tensor_does(
    name: str, networks: dict[str, Quantizer], images: Images, twin_of: TwinOf
) -> None:
    prepared = networks[name].prepared
    quantizer = Quantizer(prepared, images(prepared, 8))
    model, sample = twin_of(quantizer), images(prepared, 14)
    probe = Probe.of(model, sample)
    specs = [ActivationSpec.parse(text) for text in ("int8", "int3", "int3:mse", "int2:p90")]
    found = tensor_sensitivities(quantizer, model, probe, dict.fromkeys(quantizer.tensors, specs))
    assert set(found) == {(tensor, spec) for tensor in quantizer.tensors for spec in specs}
    for (tensor, spec), value in found.items():
        applied = quantizer.apply(Plan(activations={tensor: str(spec)}))
        real = probe.divergence(TwinClassifier(applied.graph, batch=prepared.batch))
        assert value == pytest.approx(real, rel=1e-3, abs=1e-12), (tensor, str(spec))
    assert all(found[tensor, specs[1]] > found[tensor, specs[0]] > 0 for tensor in quantizer.tensors)
    assert tensor_sensitivities(quantizer, model, probe, {}) == {}


def test_widths_need_images_to_calibrate_on(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    quantizer = Quantizer(networks["conv"].prepared)
    model = twin_of(quantizer)
    probe = Probe.of(model, images(quantizer.prepared, 4))
    tensor = next(iter(quantizer.tensors))
    with pytest.raises(PlanError, match="nothing to calibrate them on"):
        tensor_sensitivities(quantizer, model, probe, {tensor: [ActivationSpec(4)]})


def test_sensitivities_of_the_embedded_example(example: Quantizer, data: Data, twin_of: TwinOf) -> None:
    sample = torch.from_numpy(data.calibrate.images[:40])
    model = twin_of(example)
    probe = Probe.of(model, sample)
    specs = [WeightSpec.parse(text) for text in ("int2", "int4", "int8")]
    layers = [layer.name for layer in example.prepared.layers]
    found = layer_sensitivities(example, model, probe, dict.fromkeys(layers, specs))
    for layer in layers:
        assert found[layer, specs[0]] > found[layer, specs[1]] > found[layer, specs[2]] > 0
    applied = example.apply(Plan(weights={layers[3]: "int2"}))
    assert found[layers[3], specs[0]] == pytest.approx(probe.divergence(TwinClassifier(applied.graph)), rel=1e-3)


@pytest.mark.parametrize("name", ["conv", "shared", "static"])
def test_the_model_is_put_back(name: str, networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    quantizer = networks[name]
    model = twin_of(quantizer)
    before = {key: tensor.clone() for key, tensor in model.graph.named_buffers()}
    probe = Probe.of(model, images(quantizer.prepared, 6))
    specs = {layer.name: SPECS for layer in quantizer.prepared.layers}
    first = layer_sensitivities(quantizer, model, probe, specs)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.graph.named_buffers())
    assert layer_sensitivities(quantizer, model, probe, specs) == first


def test_the_model_is_put_back_after_an_error(networks: dict[str, Quantizer], images: Images, twin_of: TwinOf) -> None:
    quantizer = networks["conv"]
    model = twin_of(quantizer)
    before = {key: tensor.clone() for key, tensor in model.graph.named_buffers()}
    probe = replace(Probe.of(model, images(quantizer.prepared, 6)), images=torch.rand(6, 1, 2, 2))
    with pytest.raises((RuntimeError, VerificationError)):
        layer_sensitivities(quantizer, model, probe, {layer.name: SPECS for layer in quantizer.prepared.layers})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.graph.named_buffers())


def test_the_quantizers_own_graph_is_not_touched(
    networks: dict[str, Quantizer], images: Images, twin_of: TwinOf
) -> None:
    quantizer = networks["shared"]
    before = {key: tensor.clone() for key, tensor in quantizer.float_graph.named_buffers()}
    model = twin_of(quantizer)
    layer_sensitivities(
        quantizer, model, Probe.of(model, images(quantizer.prepared, 4)), {"w": SPECS, "w2": SPECS}
    )  # fmt: skip
    assert all(torch.equal(before[key], tensor) for key, tensor in quantizer.float_graph.named_buffers())
