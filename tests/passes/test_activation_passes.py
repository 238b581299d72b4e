"""Fake quantizers on the twin compute what QuantizeLinear and DequantizeLinear compute in ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node

from qopt.emit import emit
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.graph.twin import build_twin
from qopt.passes.annotate import Annotate, quantizable
from qopt.passes.base import Pipeline
from qopt.passes.calibrate import Calibrate
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers, set_gradient
from qopt.plan import uniform
from qopt.quant import GRADIENTS, ActivationQuantizer, AffineRange, Gradient
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Images = Callable[..., torch.Tensor]
Values = Callable[..., dict[str, NDArray[np.float32]]]
Record = Callable[[GraphModule, torch.Tensor], dict[Node, Any]]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]


def _marked(prepared: Prepared) -> GraphModule:
    twin = build_twin(prepared)
    CanonicaliseLinear()(twin)
    Annotate()(twin)
    return twin


def _ranges(prepared: Prepared, twin: GraphModule, sample: torch.Tensor, bits: int) -> dict[str, AffineRange]:
    calibrate = Calibrate(sample, prepared.batch or 64)
    calibrate(twin)
    tensors = quantizable(twin)
    bounds = calibrate.bounds(dict.fromkeys(tensors, ActivationSpec(bits)))
    return {v: AffineRange.from_bounds(*bounds[t], bits) for t, values in tensors.items() for v in values}


def _quantizer_calls(twin: GraphModule) -> dict[str, Node]:
    """ONNX value to the call that quantizes it."""
    return {
        node.all_input_nodes[0].meta["value"]: node
        for node in twin.graph.nodes
        if node.op == "call_module" and isinstance(twin.get_submodule(str(node.target)), ActivationQuantizer)
    }


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("name", NAMES)
def test_every_quantized_tensor_equals_the_files(
    name: str,
    bits: int,
    networks: dict[str, Prepared],
    images: Images,
    onnx_values: Values,
    record: Record,
) -> None:
    prepared = networks[name]
    sample, twin = images(prepared, 2 if prepared.batch else 16), _marked(prepared)
    ranges = _ranges(prepared, twin, sample, bits)
    Pipeline((InsertActivationQuantizers(ranges),), sample)(twin)
    calls = _quantizer_calls(twin)
    assert set(calls) == set(ranges)
    seen = record(twin, sample)
    emitted = emit(prepared, Quantized(activations=ranges))
    found = onnx_values(emitted, [f"{value}/dequantized" for value in ranges] + [prepared.output], sample)
    for value, affine in ranges.items():
        steps = np.abs(found[f"{value}/dequantized"] - seen[calls[value]].numpy()) / affine.scale
        assert steps.max() <= 1.001, value
        assert (steps > 0.001).mean() < 0.01, value
    np.testing.assert_allclose(found[prepared.output], twin(sample).detach().numpy(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_integer_kernels_of_the_runtime_agree_within_a_step(
    name: str, networks: dict[str, Prepared], images: Images, onnx_values: Values, record: Record
) -> None:
    """Weights and activations in 8 bits, all optimisations on: what a user's session computes."""
    prepared = networks[name]
    sample = images(prepared, 2 if prepared.batch else 16)
    applied = Quantizer(prepared, sample).apply(uniform(WeightSpec.parse("int8"), ActivationSpec.parse("int8")))
    values = list(applied.quantized.activations)
    emitted = emit(prepared, applied.quantized)
    found = onnx_values(emitted, [f"{v}/dequantized" for v in values] + [prepared.output], sample, optimize=True)
    seen, calls = record(applied.graph, sample), _quantizer_calls(applied.graph)
    for value, affine in applied.quantized.activations.items():
        steps = np.abs(found[f"{value}/dequantized"] - seen[calls[value]].numpy()) / affine.scale
        assert steps.max() <= 1.001, value
        assert (steps > 0.001).mean() < 0.01, value
    with torch.no_grad():
        logits = applied.graph(sample).numpy()
    np.testing.assert_allclose(found[prepared.output], logits, atol=0.01 * float(np.abs(logits).max()))


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_pass_unchanged(name: str, networks: dict[str, Prepared], images: Images) -> None:
    """Views requantize what their source has quantized: with quantizers on views or without, the same logits."""
    prepared = networks[name]
    sample, twin = images(prepared, 2), _marked(prepared)
    ranges = _ranges(prepared, twin, sample, 4)
    roots = {value: affine for value, affine in ranges.items() if value in quantizable(twin)}
    bare = _marked(prepared)
    InsertActivationQuantizers(ranges)(twin)
    InsertActivationQuantizers(roots)(bare)
    assert torch.equal(twin(sample), bare(sample))


def test_each_tensor_is_quantized_once_for_all_its_readers(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["residual"]
    twin = _marked(prepared)
    InsertActivationQuantizers(_ranges(prepared, twin, images(prepared, 4), 8))(twin)
    calls = _quantizer_calls(twin)
    assert {user.meta["value"] for user in calls["x"].users} == {"c1", "s"}
    assert [list(call.all_input_nodes[0].users) for call in calls.values()] == [[call] for call in calls.values()]


def test_only_named_tensors_are_quantized(networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks["plain"]
    twin = _marked(prepared)
    ranges = _ranges(prepared, twin, images(prepared, 4), 8)
    result = InsertActivationQuantizers({"r1": ranges["r1"]})(twin)
    assert result.notes == ("1 activations quantized",)
    assert set(_quantizer_calls(twin)) == {"r1"}


def test_no_range_is_no_change(networks: dict[str, Prepared], images: Images) -> None:
    pipeline = Pipeline((InsertActivationQuantizers({}),), images(networks["plain"], 2))
    pipeline(_marked(networks["plain"]))
    assert pipeline.notes == []


@pytest.mark.parametrize("missing", ["c1", "y", "w1", "nothing"])
def test_a_range_for_what_is_not_marked_is_an_error(missing: str, networks: dict[str, Prepared]) -> None:
    with pytest.raises(VerificationError, match=f"^{missing}: no marked node"):
        InsertActivationQuantizers({missing: AffineRange(1.0, 0, 8)})(_marked(networks["plain"]))


def test_a_network_with_names_like_ours(network: Callable[[str], Prepared], images: Images) -> None:
    prepared = network(
        """(float[n,2,4,4] x, float[2,1,1] a_quantizer, float[2,2,1,1] w) => (float[n,32] y) {
            a = Mul (x, a_quantizer)
            c = Conv (a, w)
            y = Flatten (c)
        }"""
    )
    twin, sample = _marked(prepared), images(prepared, 4)
    Pipeline((InsertActivationQuantizers(_ranges(prepared, twin, sample, 8)),), sample)(twin)
    assert set(_quantizer_calls(twin)) == {"a", "c"}


def _gradient(twin: GraphModule, sample: torch.Tensor) -> torch.Tensor:
    tracked = sample.clone().requires_grad_()
    twin(tracked).pow(2).sum().backward()
    assert tracked.grad is not None
    return tracked.grad


@pytest.fixture
def coarse(networks: dict[str, Prepared], images: Images) -> GraphModule:
    """3-bit activations whose ranges cut off the upper half of what ReLU lets through."""
    prepared = networks["plain"]
    twin, sample = _marked(prepared), images(prepared, 16)
    ranges = _ranges(prepared, twin, sample, 3)
    halved = {v: AffineRange.from_bounds(r.low / 2, r.high / 2, 3) for v, r in ranges.items()}
    InsertActivationQuantizers(halved)(twin)
    return twin


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_gradient_mode_is_an_option_and_can_be_switched(gradient: Gradient, networks: dict[str, Prepared]) -> None:
    twin = _marked(networks["plain"])
    InsertActivationQuantizers({"r1": AffineRange(1.0, 0, 8)}, gradient)(twin)
    InsertActivationQuantizers({"r2": AffineRange(1.0, 0, 8)})(twin)
    modules = [module for module in twin.modules() if isinstance(module, ActivationQuantizer)]
    assert [module.gradient for module in modules] == [gradient, "ste"]
    set_gradient(twin, "bpda")
    assert [module.gradient for module in modules] == ["bpda", "bpda"]


def test_the_gradient_modes(coarse: GraphModule, networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["plain"], 4)
    modes: tuple[Gradient, ...] = ("ste", "bpda", "plain")
    logits, gradients = {}, {}
    for mode in modes:
        set_gradient(coarse, mode)
        logits[mode], gradients[mode] = coarse(sample), _gradient(coarse, sample)
    for first, second in itertools.combinations(modes, 2):
        assert torch.equal(logits[first], logits[second]), "the mode is no part of what is computed"
        assert not torch.allclose(gradients[first], gradients[second]), (first, second)
    assert not gradients["plain"].any()
    image = coarse.get_submodule(str(_quantizer_calls(coarse)["x"].target))
    assert isinstance(image, ActivationQuantizer)
    clipped = sample > image.affine.high + image.affine.scale / 2
    assert not gradients["ste"][clipped].any()
    assert gradients["ste"][~clipped].any()
    assert gradients["bpda"][clipped].any()


def test_bpda_is_the_gradient_of_the_float_layers_at_the_quantized_point(
    coarse: GraphModule, networks: dict[str, Prepared], images: Images
) -> None:
    """By hand: the chain of layers with each rounding replaced by an added constant."""
    prepared = networks["plain"]
    names = ("w1", "b1", "w2", "b2", "w3", "b3")
    weights = {name: torch.from_numpy(prepared.initializer(name).copy()) for name in names}
    calls = _quantizer_calls(coarse)
    quantize = {value: coarse.get_submodule(str(call.target)) for value, call in calls.items()}
    sample = images(prepared, 4).requires_grad_()

    def rounded(value: str, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, (quantize[value](x) - x).detach())

    r1 = torch.relu(torch.conv2d(rounded("x", sample), weights["w1"], weights["b1"], padding=1))
    r2 = torch.relu(torch.conv2d(rounded("r1", r1), weights["w2"], weights["b2"], stride=2, padding=1))
    y = torch.nn.functional.linear(rounded("r2", r2).flatten(1), weights["w3"], weights["b3"])
    (expected,) = torch.autograd.grad(y.pow(2).sum(), sample)
    set_gradient(coarse, "bpda")
    torch.testing.assert_close(_gradient(coarse, sample.detach()), expected, rtol=1e-4, atol=1e-5)
