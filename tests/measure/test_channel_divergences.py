"""The second-order divergence of a channel is what a small change of its weights really does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from qopt.graph.model import Prepared
from qopt.measure.fisher import Change, channel_divergences
from qopt.measure.network import TwinClassifier
from qopt.passes.nodes import constant_of, is_layer, weight_source
from qopt.quantize import Quantizer

Images = Callable[..., torch.Tensor]

LINEAR = """(float[n,2,3,3] x, float[4,18] w, float[4] b) => (float[n,4] y) {
    f = Flatten (x)
    y = Gemm <transB = 1> (f, w, b)
}"""


def _found(
    quantizer: Quantizer, sample: torch.Tensor, errors: dict[str, torch.Tensor], **options: int
) -> dict[str, torch.Tensor]:
    layers = {layer.name: layer for layer in quantizer.prepared.layers}
    changes = {name: Change(layers[name].channel_axis, error) for name, error in errors.items()}
    asked = {"batch_size": quantizer.prepared.batch or 8, "seed": 0, **options}
    return channel_divergences(quantizer.float_graph, sample, changes, **asked)


def _errors(quantizer: Quantizer, size: float, count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = {layer.name: quantizer.weight(layer) for layer in quantizer.prepared.layers}
    return {
        name: size * weight.std() * torch.randn(count, *weight.shape, generator=generator)
        for name, weight in weights.items()
    }


def test_of_one_linear_layer_it_is_known(network: Callable[[str], Prepared], images: Images) -> None:
    """There ``KL = 1/2 E p_o (1 - p_o) (dw_o . (u - mean u))**2``; signs drawn often enough come close to it."""
    quantizer = Quantizer(network(LINEAR))
    sample = images(quantizer.prepared, 24)
    errors = _errors(quantizer, 1.0)
    found = _found(quantizer, sample, errors, draws=3000, batch_size=24)["w"]
    u = sample.flatten(1).double()
    p = torch.softmax(quantizer.float_graph(sample).double(), 1)
    moved = (u - u.mean(0)) @ errors["w"].double().mT
    expected = 0.5 * ((p * (1 - p))[None] * moved.square()).mean(1)
    assert (found.shape, found.dtype) == ((2, 4), torch.float64)
    torch.testing.assert_close(found, expected, rtol=0.08, atol=0.0)


@pytest.mark.parametrize("name", ["conv", "shared", "dynamic", "static"])
def test_it_predicts_the_measured_divergence(name: str, networks: dict[str, Quantizer], images: Images) -> None:
    """One channel changed at a time, a little, and its mean given back to the bias, as bias correction does."""
    quantizer = networks[name]
    sample = images(quantizer.prepared, 24)
    errors = _errors(quantizer, 0.03, count=1)
    found = _found(quantizer, sample, errors, draws=400)
    assert list(found) == [layer.name for layer in quantizer.prepared.layers]
    for layer in quantizer.prepared.layers:
        measured = [
            _measured(quantizer, layer.name, errors[layer.name][0], channel, layer.channel_axis, sample)
            for channel in range(layer.channels)
        ]
        predicted = found[layer.name][0].numpy()
        np.testing.assert_allclose(predicted.sum(), np.sum(measured), rtol=0.2)
        assert np.corrcoef(predicted, measured)[0, 1] > 0.95


def _measured(
    quantizer: Quantizer, layer: str, error: torch.Tensor, channel: int, axis: int, sample: torch.Tensor
) -> float:
    changed = torch.zeros_like(error)
    changed.select(axis, channel).copy_(error.select(axis, channel))
    graph = copy.deepcopy(quantizer.float_graph)
    nodes = [node for node in graph.graph.nodes if is_layer(node) and node.meta["layer"] == layer]
    weight = constant_of(graph, weight_source(nodes[0]))
    outputs: dict[str, list[torch.Tensor]] = {"before": [], "after": []}

    def run(which: str, shifts: list[torch.Tensor]) -> torch.Tensor:
        batch = quantizer.prepared.batch or len(sample)
        calls: list[list[torch.Tensor]] = [[] for _ in nodes]

        class Shift(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                result = super().run_node(n)
                if n in nodes:
                    calls[nodes.index(n)].append(result)
                    return result - shifts[nodes.index(n)] if shifts else result
                return result

        logits = torch.cat([Shift(graph).run(part) for part in torch.split(sample, batch)])
        outputs[which] = [torch.cat(parts) for parts in calls]
        return logits.double().log_softmax(1)

    with torch.no_grad():
        reference = run("before", [])
        weight.add_(changed)
        run("after", [])
        convolution = outputs["before"][0].ndim == 4
        over = (0, 2, 3) if convolution else (0,)
        shifts = [(b - a).mean(over, keepdim=True) for a, b in zip(outputs["before"], outputs["after"], strict=True)]
        after = run("after", shifts)
    return float((reference.exp() * (reference - after)).sum(1).mean())


def test_a_mean_shift_costs_nothing(network: Callable[[str], Prepared], images: Images) -> None:
    """An input that never changes: the bias absorbs all that its weights do."""
    quantizer = Quantizer(network(LINEAR))
    sample = images(quantizer.prepared, 16)
    sample[:, 0, 0, 0] = 0.7
    errors = {"w": torch.zeros(1, 4, 18)}
    errors["w"][0, :, 0] = 1.0
    assert float(_found(quantizer, sample, errors, batch_size=16)["w"].max()) < 1e-12
    sample[:8, 0, 0, 0] = 0.1
    assert float(_found(quantizer, sample, errors, batch_size=16)["w"].min()) > 1e-4


def test_no_change_costs_nothing_and_costs_grow_with_the_square(networks: dict[str, Quantizer], images: Images) -> None:
    quantizer = networks["conv"]
    sample = images(quantizer.prepared, 12)
    (error,) = _errors(quantizer, 0.1, count=1)["w1"]
    found = _found(quantizer, sample, {"w1": torch.stack([0 * error, error, 2 * error])})
    assert list(found) == ["w1"]
    assert float(found["w1"][0].max()) == 0.0
    torch.testing.assert_close(found["w1"][2], 4 * found["w1"][1], rtol=1e-5, atol=0.0)


def test_equal_seeds_draw_equal_signs(networks: dict[str, Quantizer], images: Images) -> None:
    quantizer = networks["conv"]
    sample, errors = images(quantizer.prepared, 12), _errors(quantizer, 0.1)
    first, again, other = (_found(quantizer, sample, errors, seed=seed, draws=1) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in errors)
    assert not any(torch.equal(first[name], other[name]) for name in errors)


def test_the_network_stays_as_it_is(networks: dict[str, Quantizer], images: Images) -> None:
    quantizer = networks["conv"]
    sample = images(quantizer.prepared, 6)
    before = TwinClassifier(quantizer.float_graph)(sample)
    _found(quantizer, sample, _errors(quantizer, 1.0))
    assert torch.equal(TwinClassifier(quantizer.float_graph)(sample), before)
    assert not any(parameter.requires_grad for parameter in quantizer.float_graph.parameters())


def test_layers_without_rows_are_left_out(network: Callable[[str], Prepared], images: Images) -> None:
    quantizer = Quantizer(
        network("""(float[n,2,4,4] x, float[2,3,2,2] w, float[4,192] v) => (float[n,4] y) {
            c = ConvTranspose <strides = [2,2]> (x, w)
            f = Flatten (c)
            y = Gemm <transB = 1> (f, v)
        }""")
    )
    found = _found(quantizer, images(quantizer.prepared, 5), _errors(quantizer, 0.1))
    kept = [layer.name for layer in quantizer.prepared.layers if layer.op == "Gemm"]
    assert list(found) == kept
    assert len(kept) == len(quantizer.prepared.layers) - 1
