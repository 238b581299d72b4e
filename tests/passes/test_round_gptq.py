"""Sequential GPTQ: what each layer is rounded against, and that the float network's means come out."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.errors import DataError, VerificationError
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.passes import layer_inputs
from qopt.passes.base import Pipeline
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers, WeightQuantizer
from qopt.passes.layer_inputs import InputMoment, input_rows
from qopt.passes.nodes import activation_nodes, is_layer, op_of
from qopt.passes.round_gptq import RoundGPTQ
from qopt.plan import uniform
from qopt.quant import AnyWeight, QuantizedWeight, quantize_whole
from qopt.quant.gptq import as_rows, gptq
from qopt.quant.retarget import retargeted
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Network = Callable[..., Prepared]
Images = Callable[..., Tensor]
Record = Callable[[GraphModule, Tensor], dict[Node, Any]]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]
INT2, INT3 = WeightSpec.parse("int2"), WeightSpec.parse("int3")


@dataclass(frozen=True)
class Case:
    """A network under codes that round to nearest, and the float network beside it."""

    prepared: Prepared
    sample: Tensor
    quantizer: Quantizer
    twin: GraphModule

    @staticmethod
    def of(prepared: Prepared, sample: Tensor, spec: WeightSpec = INT3, activations: str = "float") -> Case:
        quantizer = Quantizer(prepared, sample)
        applied = quantizer.apply(uniform(spec, ActivationSpec.parse(activations)))
        twin = copy.deepcopy(quantizer.float_graph)
        InsertWeightQuantizers(applied.quantized.weights)(twin)
        InsertActivationQuantizers(applied.quantized.activations)(twin)
        return Case(prepared, sample, quantizer, twin)

    def rounded(self, **options: Any) -> RoundGPTQ:
        """The pass, after it has run on the twin in a pipeline that verifies it."""
        step = RoundGPTQ(self.sample, self.quantizer.float_graph, self.prepared.batch or 64, **options)
        Pipeline((step,), self.quantizer.sample)(self.twin)
        return step

    def nearest(self, layer: str, spec: WeightSpec = INT3) -> QuantizedWeight:
        return whole(self.quantizer.quantized_weight(self.prepared.layer(layer), spec))


def whole(weight: AnyWeight) -> QuantizedWeight:
    assert isinstance(weight, QuantizedWeight)
    return weight


def seen(
    graph: GraphModule, prepared: Prepared, sample: Tensor, record: Record
) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    """(layer, use) to the inputs (groups, positions, columns) and the outputs (channels, positions), float64."""
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for chunk in torch.split(sample, prepared.batch or len(sample)):
        values = record(graph, chunk)
        for node in filter(is_layer, graph.graph.nodes):
            args = [values[a] if isinstance(a, Node) else a for a in node.args]
            rows = torch.cat(list(input_rows(node, args)), 1).double()
            outputs = values[node].double().movedim(1 if "Conv" in op_of(node) else -1, 0).flatten(1)
            found.setdefault((node.meta["layer"], node.meta["use"]), []).append((rows, outputs))
    return {
        key: (torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)) for key, parts in found.items()
    }


def covariance(left: Tensor, right: Tensor) -> Tensor:
    left, right = left - left.mean(1, keepdim=True), right - right.mean(1, keepdim=True)
    return left.mT @ right / left.shape[1]


def damping(step: RoundGPTQ, *rows: Tensor) -> float:
    """What the pass adds to the diagonal, in parts of its mean: more where positions are few."""
    return 0.01 + step.shrinkage * rows[0].shape[2] / sum(r.shape[1] for r in rows)


def error(weight: Tensor, codes: QuantizedWeight, moment: Tensor) -> Tensor:
    difference = as_rows(weight.double() - codes.dequantize().double(), codes.axis, len(moment))
    return torch.einsum("gri,gij,grj->gr", difference, moment, difference).reshape(-1)


@pytest.mark.parametrize("activations", ["float", "int4"])
@pytest.mark.parametrize("target", ["own", "float"])
@pytest.mark.parametrize("name", NAMES)
def test_means_are_the_float_networks(
    name: str, target: Any, activations: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    case = Case.of(networks[name], images(networks[name], 24), INT2, activations)
    step = case.rounded(target=target)
    expected = seen(case.quantizer.float_graph, case.prepared, case.sample, record)
    found = seen(case.twin, case.prepared, case.sample, record)
    assert set(step.biases) == set(expected) == set(found)
    for key, (_, outputs) in expected.items():
        torch.testing.assert_close(found[key][1].mean(1), outputs.mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activations", ["float", "int4"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "mlp", "tokens"])
def test_every_layer_is_rounded_against_the_inputs_it_will_get(
    name: str, centred: bool, activations: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    """The inputs that the finished network gives a layer are those that its codes were made for."""
    case = Case.of(networks[name], images(networks[name], 40), INT3, activations)
    step = case.rounded(centred=centred, target="own", shrinkage=0.0)
    inputs = seen(case.twin, case.prepared, case.sample, record)
    floats = seen(case.quantizer.float_graph, case.prepared, case.sample, record)
    mistaken = 0
    for layer in case.prepared.layers:
        weight, like, codes = case.quantizer.weight(layer), case.nearest(layer.name), whole(step.weights[layer.name])
        rows, wrong = inputs[layer.name, 0][0], floats[layer.name, 0][0]
        moment, other = (covariance(r, r) if centred else r.mT @ r / r.shape[1] for r in (rows, wrong))
        expected, mistake = (gptq(weight, like, m, damping=damping(step, rows)) for m in (moment, other))
        assert (codes.codes != expected.codes).double().mean() <= 0.03, "float32 sums may tip a tie"
        mistaken += int((codes.codes != mistake.codes).sum())
        worst = error(weight, like, moment)
        assert bool((error(weight, codes, moment) <= worst * (1 + 1e-4) + 1e-9).all()), "never worse than nearest"
    if name in ("plain", "residual"):
        assert mistaken > 8, "the planted mistake of using the float network's inputs shows"
    assert bool(step.biases) == centred


@pytest.mark.parametrize("name", ["plain", "residual", "mlp"])
def test_the_float_target_is_the_least_squares_one(
    name: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    case = Case.of(networks[name], images(networks[name], 60))
    step = case.rounded(target="float")
    inputs = seen(case.twin, case.prepared, case.sample, record)
    floats = seen(case.quantizer.float_graph, case.prepared, case.sample, record)
    for layer in case.prepared.layers:
        u, v = inputs[layer.name, 0][0], floats[layer.name, 0][0]
        moment, cross = covariance(u, u), covariance(v, u)
        like = case.nearest(layer.name)
        target = retargeted(case.quantizer.weight(layer), like.axis, moment, cross, ridge=step.ridge)
        expected = gptq(target, like, moment, damping=damping(step, u))
        assert (whole(step.weights[layer.name]).codes != expected.codes).double().mean() <= 0.03


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "mlp", "pool", "shared"])
def test_each_step_brings_the_logits_closer_to_float(name: str, networks: dict[str, Prepared], images: Images) -> None:
    prepared = networks[name]
    sample = images(prepared, 256)
    with torch.no_grad():
        found = []
        for options in (None, {"centred": False, "target": "own"}, {"target": "own"}, {"target": "float"}):
            case = Case.of(prepared, sample)
            if options is not None:
                case.rounded(**options)
            found.append(float((case.twin(sample) - case.quantizer.float_graph(sample)).square().mean()))
    nearest, plain, centred, crossed = found
    assert plain < 0.8 * nearest
    assert centred < 1.2 * plain
    assert crossed < 1.1 * centred


def im2col(x: Any, kernel: Any, strides: Any, dilations: Any, pads: Any, groups: int) -> Tensor:
    """(groups, positions, columns) of images (n, c, height, width), by numpy's windows."""
    padded = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    patches = sliding_window_view(padded, reach, (2, 3))
    patches = patches[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    n, c, *places = patches.shape
    blocks = patches.reshape(n, groups, c // groups, *places).transpose(1, 0, 3, 4, 2, 5, 6)
    return torch.from_numpy(blocks.reshape(groups, n * places[0] * places[1], -1).astype(np.float64))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60)
@given(
    kernel=pairs, strides=pairs, dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(*[st.integers(0, 2)] * 4), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_all_kinds(
    kernel: Any, strides: Any, dilations: Any, pads: Any, groups: int, seed: int, network: Network, images: Images
) -> None:
    """Pixels are eighths, so that float32 sums are exact."""
    text = ", ".join(f"{k} = {list(v)}" for k, v in (("strides", strides), ("dilations", dilations), ("pads", pads)))
    prepared = network(
        f"""(float[n,4,6,7] x, float[8,{4 // groups},{kernel[0]},{kernel[1]}] w) => (float[n,k] y) {{
            c = Conv <{text}, group = {groups}> (x, w)
            y = Flatten (c)
        }}"""
    )
    sample = (images(prepared, 6, seed) * 8).round() / 8
    case = Case.of(prepared, sample)
    step = case.rounded(target="own", order="stored")  # columns of equal activity may come in either order
    rows = im2col(sample.numpy(), kernel, strides, dilations, pads, groups)
    moment, weight = covariance(rows, rows), case.quantizer.weight(prepared.layers[0])
    expected = gptq(weight, case.nearest("w"), moment, order="stored", damping=damping(step, rows))
    assert (whole(step.weights["w"]).codes != expected.codes).double().mean() <= 0.02
    torch.testing.assert_close(
        error(weight, whole(step.weights["w"]), moment), error(weight, expected, moment), rtol=1e-3, atol=1e-9
    )


class TestShared:
    """A weight with two uses."""

    def test_it_has_one_set_of_codes_from_the_inputs_of_both(
        self, networks: dict[str, Prepared], images: Images, record: Record
    ) -> None:
        case = Case.of(networks["shared"], images(networks["shared"], 30))
        step = case.rounded(target="own")
        assert set(step.weights) == {"w", "w2"}
        assert set(step.biases) == {("w", 0), ("w", 1), ("w2", 0)}
        quantizers = {n.target for n in case.twin.graph.nodes if n.op == "call_module"}
        assert len(quantizers) == 2
        first = seen(case.twin, case.prepared, case.sample, record)["w", 0][0]
        second = seen(case.quantizer.float_graph, case.prepared, case.sample, record)["w", 1][0]
        moment = (covariance(first, first) + covariance(second, second)) / 2
        weight = case.quantizer.weight(case.prepared.layer("w"))
        damped = damping(step, first, second)
        expected = gptq(weight, case.nearest("w"), moment, damping=damped)
        assert (whole(step.weights["w"]).codes != expected.codes).double().mean() <= 0.03
        alone = gptq(weight, case.nearest("w"), covariance(first, first), damping=damped)
        assert not torch.equal(whole(step.weights["w"]).codes, alone.codes)

    def test_both_uses_run_with_the_new_codes(
        self, networks: dict[str, Prepared], images: Images, record: Record
    ) -> None:
        case = Case.of(networks["shared"], images(networks["shared"], 30))
        step = case.rounded()
        with torch.no_grad():
            for node, value in record(case.twin, case.sample).items():
                if node.op == "call_module":
                    layer = "w" if value.ndim == 4 else "w2"
                    assert torch.equal(value, step.weights[layer].dequantize())


class TestWhatStays:
    """Layers that cannot be rounded so, and graphs with nothing to round."""

    def test_transposed_convolutions_keep_their_codes(self, network: Network, images: Images, record: Record) -> None:
        prepared = network(
            """(float[n,2,4,4] x, float[2,3,2,2] w, float[3] b, float[4,192] w2) => (float[n,4] y) {
                c = ConvTranspose <strides = [2, 2]> (x, w, b)
                f = Flatten (c)
                y = Gemm <transB = 1> (f, w2)
            }"""
        )
        case = Case.of(prepared, images(prepared, 20))
        step = RoundGPTQ(case.sample, case.quantizer.float_graph)
        result = step(case.twin)
        assert result.notes == (
            "1 weights rounded by GPTQ", "rounded to nearest, their inputs have no moment: w",
        )  # fmt: skip
        assert torch.equal(whole(step.weights["w"]).codes, case.nearest("w").codes)
        assert not torch.equal(whole(step.weights["w2"]).codes, case.nearest("w2").codes)
        assert set(step.biases) == {("w", 0), ("w2", 0)}, "biases are corrected all the same"
        outputs = [
            {
                n.meta["layer"]: v.mean((0, 2, 3))
                for n, v in record(g, case.sample).items()
                if op_of(n) == "ConvTranspose"
            }
            for g in (case.quantizer.float_graph, case.twin)
        ]
        torch.testing.assert_close(outputs[1]["w"], outputs[0]["w"], rtol=0, atol=1e-5)

    def test_long_rows_keep_their_codes(
        self, networks: dict[str, Prepared], images: Images, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layer_inputs, "MAX_COLUMNS", 30)
        case = Case.of(networks["plain"], images(networks["plain"], 10))
        result = RoundGPTQ(case.sample, case.quantizer.float_graph)(case.twin)
        assert result.notes[1] == "rounded to nearest, their inputs have no moment: w2, w3"

    def test_layers_without_codes_stay_float(self, networks: dict[str, Prepared], images: Images) -> None:
        prepared = networks["plain"]
        quantizer = Quantizer(prepared, images(prepared, 10))
        twin = copy.deepcopy(quantizer.float_graph)
        InsertWeightQuantizers({"w2": quantizer.quantized_weight(prepared.layer("w2"), INT2)})(twin)
        step = RoundGPTQ(images(prepared, 10), quantizer.float_graph)
        assert step(twin).notes == ("1 weights rounded by GPTQ",)
        assert set(step.weights) == {"w2"}
        assert set(step.biases) == {("w2", 0)}
        assert len([m for m in twin.modules() if isinstance(m, WeightQuantizer)]) == 1

    def test_a_graph_without_codes_is_not_changed(self, networks: dict[str, Prepared], images: Images) -> None:
        quantizer = Quantizer(networks["plain"])
        twin = copy.deepcopy(quantizer.float_graph)
        code = twin.code
        result = RoundGPTQ(images(networks["plain"], 4), quantizer.float_graph)(twin)
        assert (result.modified, result.notes, twin.code) == (False, (), code)

    def test_the_float_network_is_not_touched(self, networks: dict[str, Prepared], images: Images) -> None:
        case = Case.of(networks["residual"], images(networks["residual"], 10))
        with torch.no_grad():
            before = case.quantizer.float_graph(case.sample)
            case.rounded()
            assert torch.equal(case.quantizer.float_graph(case.sample), before)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_does_not_matter(batch_size: int, networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["residual"], 30)
    found = []
    for size in (30, batch_size):
        case = Case.of(networks["residual"], sample)
        step = RoundGPTQ(sample, case.quantizer.float_graph, size)
        step(case.twin)
        found.append(step)
    for layer, codes in found[0].weights.items():
        assert (whole(found[1].weights[layer]).codes != whole(codes).codes).double().mean() <= 0.03


def test_options_reach_the_numerics(networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["plain"], 30)
    results = []
    options: list[dict[str, Any]] = [
        {}, {"damping": 1.0}, {"shrinkage": 9.0}, {"order": "stored"}, {"scale_search": False}, {"centred": False},
        {"target": "own"}, {"ridge": 100.0},
    ]  # fmt: skip
    for chosen in options:
        step = Case.of(networks["plain"], sample).rounded(**chosen)
        results.append(torch.cat([w.dequantize().reshape(-1) for w in step.weights.values()]))
    for i, chosen in enumerate(options[1:], 1):
        assert not torch.equal(results[0], results[i]), f"{chosen} changed nothing"


def test_a_pass_may_run_again(networks: dict[str, Prepared], images: Images) -> None:
    case, again = (Case.of(networks["shared"], images(networks["shared"], 20)) for _ in range(2))
    step = RoundGPTQ(case.sample, case.quantizer.float_graph)
    assert step(case.twin).notes == step(again.twin).notes
    with torch.no_grad():
        assert torch.equal(case.twin(case.sample), again.twin(case.sample))


def test_another_float_network_is_an_error(networks: dict[str, Prepared], images: Images) -> None:
    case = Case.of(networks["plain"], images(networks["plain"], 4))
    other = Quantizer(networks["residual"]).float_graph
    for node in other.graph.nodes:
        if is_layer(node):
            node.meta["layer"] += "'"
    sample = torch.rand(4, 2, 6, 6)
    with pytest.raises(VerificationError, match=r"^w1: the float graph does not have this layer here") as caught:
        RoundGPTQ(sample, other)(case.twin)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_finite_are_named(network: Network, images: Images) -> None:
    prepared = network(
        """(float[n,2,3,3] x, float[3,18] w) => (float[n,3] y) {
            l = Log (x)
            f = Flatten (l)
            y = Gemm <transB = 1> (f, w)
        }"""
    )
    case = Case.of(prepared, images(prepared, 8) + 0.1)
    sample = case.sample.clone()
    sample[3] = 0
    with pytest.raises(DataError, match=r"^w: inputs that are not finite") as caught:
        RoundGPTQ(sample, case.quantizer.float_graph)(case.twin)
    assert "\n" not in str(caught.value)


class TestMoments:
    """What the moments of pairs are."""

    def test_pairs(self) -> None:
        u, v = torch.rand(2, 30, 4), torch.rand(2, 30, 4)
        moment = InputMoment()
        for part in (slice(0, 7), slice(7, 30)):
            moment.add(u[:, part], v[:, part])
        u, v = u.double(), v.double()
        assert moment.count == 30
        torch.testing.assert_close(moment.moment, v.mT @ u / 30, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moment.covariance, covariance(v, u), rtol=1e-5, atol=1e-6)

    def test_of_itself(self) -> None:
        u = torch.rand(1, 30, 4)
        moment = InputMoment()
        moment.add(u)
        torch.testing.assert_close(moment.covariance, covariance(u.double(), u.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.assets
@pytest.mark.parametrize(("spec", "least"), [("int4", 91.1), ("int3", 90.9), ("int2", 89.0)])
def test_resnet20_keeps_its_accuracy(spec: str, least: float) -> None:
    """Everything quantized, activations to 8 bits; float has 91.65 on these images."""
    if not os.environ.get("QOPT_ASSETS"):
        pytest.skip("QOPT_ASSETS is not set")
    root = Path(os.environ["QOPT_ASSETS"])
    prepared = prepare(ir.load(root / "onnx" / "resnet20_cifar10_std.onnx"))
    data = np.load(root / "data" / "cifar10_small.npz")
    train, test = (torch.from_numpy(data[k].astype(np.float32) / 255) for k in ("x_train", "x_test"))
    plan = uniform(
        WeightSpec.parse(spec), ActivationSpec.parse("int8"), rounding="gptq", bias_correction=True
    )  # fmt: skip
    began = time.process_time()
    applied = Quantizer(prepared, train[:512]).apply(plan)
    assert time.process_time() - began < 60
    with torch.no_grad():
        predicted = torch.cat([applied.graph(chunk) for chunk in torch.split(test, 250)]).argmax(1)
    assert 100 * (predicted.numpy() == data["y_test"]).mean() >= least


def test_a_weight_that_is_exact_already_stays(networks: dict[str, Prepared], images: Images) -> None:
    """With levels for weights, the quantized network is the float one, and nothing moves."""
    prepared = networks["plain"]
    quantizer = Quantizer(prepared)
    exact = {name: quantize_whole(quantizer.weight(prepared.layer(name)), INT3) for name in ("w1", "w2", "w3")}
    twin = copy.deepcopy(quantizer.float_graph)
    for node in twin.graph.nodes:
        if is_layer(node):
            twin.get_buffer(str(node.args[1].target)).copy_(exact[node.meta["layer"]].dequantize())
    reference = copy.deepcopy(twin)
    InsertWeightQuantizers(exact)(twin)
    step = RoundGPTQ(images(prepared, 20), reference, target="own")
    step(twin)
    for name, codes in exact.items():
        assert torch.equal(whole(step.weights[name]).codes, codes.codes)
        assert torch.equal(step.weights[name].scale, codes.scale)
