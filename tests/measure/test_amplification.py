"""Ranges and error amplification of layers, against torch run by hand and networks whose amplification is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import DataError, ModelError
from qopt.graph.model import Prepared
from qopt.measure import amplification
from qopt.measure.amplification import layer_activity
from qopt.measure.network import Normalisation, TwinClassifier
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.plan import Plan
from qopt.quantize import Quantizer

Network = Callable[[str], Prepared]

LINEAR = """(float[n,1,2,2] x, float[4,4] w1, float[3,4] w2) => (float[n,3] y) {
    f = Flatten (x)
    h = Gemm <transB = 1> (f, w1)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w2)
}"""


def model_of(prepared: Prepared) -> TwinClassifier:
    return TwinClassifier(Quantizer(prepared).float_graph, batch=prepared.batch)


def overwrite(model: TwinClassifier, **weights: Tensor) -> TwinClassifier:
    """The same with other weights of layers."""
    graph = copy.deepcopy(model.graph)
    for node in graph.graph.nodes:
        if is_layer(node) and node.meta["layer"] in weights:
            constant_of(graph, weight_source(node)).copy_(weights[node.meta["layer"]])
    return TwinClassifier(graph, model.normalisation, model.batch)


def pictures(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def nearby(images: Tensor, eps: float = 0.1) -> Tensor:
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(9)) * 2 - 1
    return (images + eps * noise).clamp(0, 1)


def ratio(clean: Tensor, adversarial: Tensor) -> float:
    """Equation 4 in numpy: the mean over images."""
    a, b = (values.double().numpy().reshape(len(values), -1) for values in (clean, adversarial))
    return float(np.mean(np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1)))


def test_both_sides_of_every_layer(network: Network) -> None:
    model = model_of(network(LINEAR))
    clean = pictures(70, 1, 2, 2)
    adversarial = nearby(clean)
    found = layer_activity(model, clean, adversarial)
    weights = {
        node.meta["layer"]: constant_of(model.graph, weight_source(node))
        for node in model.graph.graph.nodes
        if is_layer(node)
    }
    sides: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in weights}
    for images in (clean, adversarial):
        value = images.flatten(1)
        for name, weight in weights.items():
            out = value @ weight.T
            sides[name][0].append(value)
            sides[name][1].append(out)
            value = out.relu()
    assert list(found) == list(weights) == ["w1", "w2"]
    for name, (inputs, outputs) in sides.items():
        for side, values in ((found[name].input, inputs), (found[name].output, outputs)):
            assert side.amplification == pytest.approx(ratio(*values), rel=1e-5)
            both = torch.cat(values)
            assert (side.low, side.high) == pytest.approx((float(both.min()), float(both.max())), rel=1e-5, abs=1e-7)


def test_a_layer_of_known_amplification(network: Network) -> None:
    """The first layer takes out the mean, which the attack leaves as it is: what is left grows by a known factor."""
    mean = torch.eye(4) - torch.full((4, 4), 0.25)
    model = overwrite(model_of(network(LINEAR)), w1=mean, w2=torch.ones(3, 4))
    wave = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 2, 2)
    clean = 0.5 + 0.1 * wave.repeat(5, 1, 1, 1)
    found = layer_activity(model, clean, clean + 0.05 * wave)
    size, moved, kept = float(clean[0].norm()), 0.05 * 2, 0.1 * 2
    assert found["w1"].input.amplification == pytest.approx(moved / size, rel=1e-5)
    assert found["w1"].output.amplification == pytest.approx(moved / kept, rel=1e-5)
    assert found["w2"].input.amplification == pytest.approx(0.5, rel=1e-5)  # ReLU keeps the upper half of the wave


def test_no_attack_amplifies_nothing(network: Network) -> None:
    clean = pictures(3, 1, 2, 2)
    found = layer_activity(model_of(network(LINEAR)), clean, clean)
    assert {side.amplification for activity in found.values() for side in (activity.input, activity.output)} == {0.0}


def test_black_images_count_where_they_are_not_zero(network: Network) -> None:
    clean = pictures(4, 1, 2, 2)
    adversarial = nearby(clean)
    alone = layer_activity(model_of(network(LINEAR)), clean, adversarial)
    more = layer_activity(
        model_of(network(LINEAR)),
        torch.cat([torch.zeros(1, 1, 2, 2), clean]),
        torch.cat([adversarial[:1], adversarial]),
    )
    assert more["w1"].input.amplification == pytest.approx(alone["w1"].input.amplification)
    black = layer_activity(model_of(network(LINEAR)), torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
    assert black["w1"].input.amplification is None
    assert (black["w1"].input.low, black["w1"].input.high) == (0.0, 1.0)


@settings(max_examples=15)
@given(count=st.integers(1, 40), batch=st.integers(1, 9))
def test_batches_do_not_show(networks: dict[str, Quantizer], count: int, batch: int) -> None:
    model, clean = TwinClassifier(networks["conv"].float_graph), pictures(count, 2, 6, 6)
    with pytest.MonkeyPatch.context() as patch:
        whole = layer_activity(model, clean, nearby(clean))
        patch.setattr(amplification, "BATCH", batch)
        split = layer_activity(model, clean, nearby(clean))
    for name, activity in whole.items():
        for one, other in ((activity.input, split[name].input), (activity.output, split[name].output)):
            assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=1e-5, abs=1e-6)
            assert other.amplification == pytest.approx(one.amplification, rel=1e-5)


def test_a_shared_layer_is_averaged_over_its_uses(networks: dict[str, Quantizer]) -> None:
    quantizer = networks["shared"]
    clean = pictures(6, *quantizer.prepared.input_shape)
    found = layer_activity(TwinClassifier(quantizer.float_graph), clean, nearby(clean))
    weight, bias = (torch.from_numpy(quantizer.prepared.initializer(name).copy()) for name in ("w", "b"))
    first = [torch.conv2d(images, weight, bias, padding=1) for images in (clean, nearby(clean))]
    second = [torch.conv2d(value.relu(), weight, bias, padding=1) for value in first]
    expected = (ratio(*first) + ratio(*second)) / 2
    assert found["w"].output.amplification == pytest.approx(expected, rel=1e-5)


def test_one_batch_size_leaves_a_remainder_out(networks: dict[str, Quantizer]) -> None:
    fixed, free = networks["static"], networks["dynamic"]
    clean = pictures(8, 2, 4, 4)
    found = layer_activity(TwinClassifier(fixed.float_graph, batch=3), clean, nearby(clean))
    plain = layer_activity(TwinClassifier(free.float_graph), clean[:6], nearby(clean)[:6])
    assert found["w"].output.amplification == pytest.approx(plain["w"].output.amplification, rel=1e-5)


def test_normalisation_comes_first(networks: dict[str, Quantizer]) -> None:
    graph, clean = networks["conv"].float_graph, pictures(5, 2, 6, 6)
    normalisation = Normalisation((0.5, 0.5), (0.25, 0.5))
    found = layer_activity(TwinClassifier(graph, normalisation), clean, nearby(clean))
    first = next(iter(found.values())).input
    assert first.amplification == pytest.approx(ratio(normalisation(clean), normalisation(nearby(clean))), rel=1e-5)
    assert first.low < 0


def test_a_quantized_twin(networks: dict[str, Quantizer]) -> None:
    quantizer, clean = networks["conv"], pictures(16, 2, 6, 6)
    plain = layer_activity(TwinClassifier(quantizer.float_graph), clean, nearby(clean))
    graph = quantizer.apply(Plan.from_json('{"defaults": {"weights": "int2:tensor:max"}}')).graph
    coarse = layer_activity(TwinClassifier(graph), clean, nearby(clean))
    names = list(plain)
    assert list(coarse) == names
    assert coarse[names[0]].input == plain[names[0]].input
    for name in names:
        assert coarse[name].output.amplification != plain[name].output.amplification


def test_one_network_against_another(network: Network) -> None:
    """The error of a network whose first layer is a tenth off grows as numpy says; itself against itself has none."""
    model, clean = model_of(network(LINEAR)), pictures(50, 1, 2, 2)
    nodes = [node for node in model.graph.graph.nodes if is_layer(node)]
    w1, w2 = (constant_of(model.graph, weight_source(node)).clone() for node in nodes)
    moved = w1 + 0.1 * torch.sign(w1)
    found = layer_activity(model, clean, clean, overwrite(model, w1=moved))
    hidden = [clean.flatten(1) @ weight.T for weight in (w1, moved)]
    assert found["w1"].input.amplification == 0.0
    assert found["w1"].output.amplification == pytest.approx(ratio(*hidden), rel=1e-5)
    assert found["w2"].input.amplification == pytest.approx(ratio(*(h.relu() for h in hidden)), rel=1e-5)
    assert found["w2"].output.amplification == pytest.approx(ratio(*(h.relu() @ w2.T for h in hidden)), rel=1e-5)
    same = layer_activity(model, clean, clean, model)
    assert {side.amplification for activity in same.values() for side in (activity.input, activity.output)} == {0.0}


@pytest.mark.parametrize("name", ["conv", "shared", "static"])
def test_a_network_against_itself_under_attack_is_the_same_as_alone(networks: dict[str, Quantizer], name: str) -> None:
    quantizer = networks[name]
    model = TwinClassifier(quantizer.float_graph, batch=quantizer.prepared.batch)
    clean = pictures(12, *quantizer.prepared.input_shape)
    alone = layer_activity(model, clean, nearby(clean))
    assert layer_activity(model, clean, nearby(clean), copy.deepcopy(model)) == alone


def test_a_network_against_its_quantized_twin(networks: dict[str, Quantizer]) -> None:
    """More bits are nearer, and the network's input is not touched by codes of weights."""
    quantizer, clean = networks["conv"], pictures(16, 2, 6, 6)
    plain = TwinClassifier(quantizer.float_graph)
    errors = {}
    for bits in (2, 4, 8):
        plan = Plan.from_json(f'{{"defaults": {{"weights": "int{bits}:tensor:max"}}}}')
        found = layer_activity(plain, clean, clean, TwinClassifier(quantizer.apply(plan).graph))
        errors[bits] = [activity.output.amplification or 0.0 for activity in found.values()]
        assert next(iter(found.values())).input.amplification == 0.0
    for coarse, middle, fine in zip(*errors.values(), strict=True):
        assert coarse > middle > fine > 0


@pytest.mark.parametrize(
    ("clean", "adversarial", "error", "match"),
    [
        (torch.rand(2, 1, 2, 2), torch.rand(3, 1, 2, 2), DataError, "not made of the clean ones"),
        (torch.rand(2, 1, 2, 2) + 2, torch.rand(2, 1, 2, 2), DataError, "outside the box"),
        (torch.rand(2, 1, 2, 2), torch.full((2, 1, 2, 2), float("nan")), DataError, "outside the box"),
        (torch.rand(0, 1, 2, 2), torch.rand(0, 1, 2, 2), DataError, "not a batch"),
    ],
)
def test_images_that_do_not_pair_up(
    network: Network, clean: Tensor, adversarial: Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        layer_activity(model_of(network(LINEAR)), clean, adversarial)


def test_overflow_names_the_layer(network: Network) -> None:
    model = overwrite(model_of(network(LINEAR)), w1=torch.full((4, 4), 3e38))
    with pytest.raises(ModelError, match="w1: an activation that is not finite"):
        layer_activity(model, torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
