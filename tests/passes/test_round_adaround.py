"""Trained rounding: what a network is cut into, that no block ends worse, and that the logits come closer to float."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qopt.errors import DataError, UsageError, VerificationError
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.passes.base import Pipeline
from qopt.passes.blocks import blocks
from qopt.passes.correct_biases import CorrectBiases
from qopt.passes.insert_activation_quantizers import InsertActivationQuantizers
from qopt.passes.insert_weight_quantizers import InsertWeightQuantizers, WeightQuantizer
from qopt.passes.nodes import is_layer, op_of, weight_source
from qopt.passes.round_adaround import RoundAdaRound
from qopt.passes.round_gptq import RoundGPTQ
from qopt.plan import uniform
from qopt.quant import parts_of, QuantizedRows, QuantizedWeight, quantize_weight
from qopt.quantize import Quantizer
from qopt.spec import ActivationSpec, WeightSpec

Network = Callable[..., Prepared]
Images = Callable[..., Tensor]
Record = Callable[[GraphModule, Tensor], dict[Node, Any]]
NAMES = ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]
FAST = {"steps": 30, "batch_size": 16}


@dataclass(frozen=True)
class Case:
    """A network under codes that round to nearest, and the float network beside it."""

    prepared: Prepared
    sample: Tensor
    quantizer: Quantizer
    twin: GraphModule

    @staticmethod
    def of(prepared: Prepared, sample: Tensor, spec: str = "int3", activations: str = "float") -> Case:
        quantizer = Quantizer(prepared, sample)
        applied = quantizer.apply(uniform(WeightSpec.parse(spec), ActivationSpec.parse(activations)))
        twin = copy.deepcopy(quantizer.float_graph)
        InsertWeightQuantizers(applied.quantized.weights)(twin)
        InsertActivationQuantizers(applied.quantized.activations)(twin)
        return Case(prepared, sample, quantizer, twin)

    def step(self, **options: Any) -> RoundAdaRound:
        chosen = {**FAST, **options}
        chosen["batch_size"] = self.prepared.batch or chosen["batch_size"]
        return RoundAdaRound(self.sample, self.quantizer.float_graph, **chosen)

    def rounded(self, **options: Any) -> RoundAdaRound:
        """The pass, after it has run on the twin in a pipeline that verifies it."""
        step = self.step(**options)
        Pipeline((step,), self.quantizer.sample)(self.twin)
        return step

    def logit_error(self) -> float:
        with torch.no_grad():
            parts = torch.split(self.sample, self.prepared.batch or len(self.sample))
            return float(sum((self.twin(p) - self.quantizer.float_graph(p)).square().sum() for p in parts))

    def quantizers(self) -> dict[str, WeightQuantizer]:
        found = {}
        for node in filter(is_layer, self.twin.graph.nodes):
            module = self.twin.get_submodule(str(weight_source(node).target))
            assert isinstance(module, WeightQuantizer)
            found[node.meta["layer"]] = module
        return found


def values_of(weights: dict[str, Any]) -> Tensor:
    return torch.cat([weight.dequantize().reshape(-1) for weight in weights.values()])


BLOCKS = {
    ("plain", "layer", 3): ["c1 r1", "c2 r2", "y"],
    ("plain", "block", 3): ["c1 r1 c2 r2 f y"],
    ("plain", "block", 2): ["c1 r1 c2 r2", "y"],
    ("residual", "layer", 3): ["c1 r1", "c2", "s", "y"],
    ("residual", "block", 3): ["c1 r1 c2 s a r2", "y"],
    ("concat", "layer", 3): ["c1", "c2 r2", "c3 r3", "y"],
    ("concat", "block", 3): ["c1 c2 r2 j", "c3 r3 f y"],
    ("depthwise", "layer", 1): ["c1 r1", "c2", "y"],
    ("pool", "layer", 1): ["c1", "c2 r2", "y"],
    ("pool", "block", 2): ["c1 p1 r1 c2 r2", "y"],
    ("mlp", "block", 2): ["a1 r1 m2 r2", "y"],
    ("shared", "block", 3): ["c1 r1 c2 f y"],
}


class TestBlocks:
    """What is trained together."""

    @pytest.mark.parametrize("key", BLOCKS, ids=str)
    def test_by_hand(self, key: tuple[str, Any, int], networks: dict[str, Prepared]) -> None:
        name, granularity, most = key
        graph = Quantizer(networks[name]).float_graph
        found = [" ".join(n.meta.get("value", "?") for n in b.nodes) for b in blocks(graph, granularity, most)]
        assert found == BLOCKS[key]

    @pytest.mark.parametrize("granularity", ["layer", "block"])
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("activations", ["float", "int8"])
    def test_every_layer_is_in_one(
        self, name: str, granularity: Any, activations: str, networks: dict[str, Prepared], images: Images
    ) -> None:
        case = Case.of(networks[name], images(networks[name], 4), activations=activations)
        found = blocks(case.twin, granularity, 2)
        layers = [node for block in found for node in block.layers]
        assert layers == [node for node in case.twin.graph.nodes if is_layer(node)]
        for block in found:
            inside = set(block.nodes)
            assert block.nodes[0] is block.layers[0]
            assert block.outputs
            assert all(set(node.users) - inside for node in block.outputs)
            assert not inside & set(block.inputs)

    def test_activation_quantizers_inside_belong_and_at_the_end_do_not(
        self, networks: dict[str, Prepared], images: Images
    ) -> None:
        case = Case.of(networks["residual"], images(networks["residual"], 4), activations="int8")
        first = blocks(case.twin, "block", 3)[0]
        assert [n.op for n in first.nodes].count("call_module") == 3, "behind r1, c2 and s"
        assert op_of(first.nodes[-1]) == "Relu"

    def test_many_layers_between_two_ends_are_cut(self, network: Network) -> None:
        """Ten layers in a branch: not one block of ten."""
        lines = [f"c{i} = Conv ({'x' if i == 0 else f'c{i - 1}'}, w{i})" for i in range(10)]
        weights = ", ".join(f"float[2,2,1,1] w{i}" for i in range(10))
        body = "\n".join([*lines, "a = Add (c9, x)", "f = Flatten (a)"])
        prepared = network(f"(float[n,2,2,2] x, {weights}) => (float[n,k] f) {{ {body} }}")
        found = blocks(Quantizer(prepared).float_graph, "block", 3)
        assert [len(block.layers) for block in found] == [3, 3, 3, 1]


@pytest.mark.parametrize("activations", ["float", "int4"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_means_are_the_float_networks(
    name: str, granularity: Any, activations: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    case = Case.of(networks[name], images(networks[name], 16), "int2", activations)
    step = case.rounded(granularity=granularity, steps=5)
    layers = [(n.meta["layer"], n.meta["use"]) for n in case.twin.graph.nodes if is_layer(n)]
    assert set(step.biases) == set(layers)
    means: list[dict[Any, Tensor]] = []
    for graph in (case.quantizer.float_graph, case.twin):
        sums: dict[Any, Tensor] = {}
        for chunk in torch.split(case.sample, case.prepared.batch or 16):
            for node, value in record(graph, chunk).items():
                if is_layer(node):
                    part = value.double().movedim(1 if "Conv" in op_of(node) else -1, 0).flatten(1).mean(1)
                    key = (node.meta["layer"], node.meta["use"])
                    sums[key] = sums.get(key, 0) + part * len(chunk) / 16
        means.append(sums)
    for key in layers:
        torch.testing.assert_close(means[1][key], means[0][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "mlp", "tokens", "shared"])
def test_no_block_ends_worse(
    name: str, granularity: Any, start: str, networks: dict[str, Prepared], images: Images, record: Record
) -> None:
    """With the codes that a block was given in place of its new ones, its outputs are no closer to float.

    A few wild steps, so that training alone would end worse in many blocks; all images in one batch, so that the means
    that training sees are those of the biases.
    """
    prepared = networks[name]
    case = Case.of(prepared, images(prepared, 48), "int2", "int8")
    if start == "gptq":
        RoundGPTQ(case.sample, case.quantizer.float_graph)(case.twin)
    given = {layer: module.weight for layer, module in case.quantizers().items()}
    case.rounded(granularity=granularity, steps=8, learning_rate=1.0, batch_size=48)
    wanted = {n.name: v for n, v in record(case.quantizer.float_graph, case.sample).items()}

    def error(graph: GraphModule, outputs: list[str]) -> float:
        found = {n.name: v for n, v in record(graph, case.sample).items()}
        return float(sum((found[o] - wanted[o]).double().square().sum() for o in outputs))

    changed = 0
    for block in blocks(case.twin, granularity, 3):
        variant = Case(prepared, case.sample, case.quantizer, copy.deepcopy(case.twin))
        for layer in {node.meta["layer"] for node in block.layers}:
            variant.quantizers()[layer].weight = given[layer]
        CorrectBiases(case.sample, case.quantizer.float_graph, 48)(variant.twin)
        outputs = [node.name for node in block.outputs]
        before, after = error(variant.twin, outputs), error(case.twin, outputs)
        assert after <= before * (1 + 1e-4) + 1e-9
        changed += after < before * 0.999
    assert changed or start == "gptq", "something was trained"


@pytest.mark.parametrize("spec", ["int2", "int3", "log3", "ternary", "int3:tensor", "int2:mid"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_it_brings_the_logits_closer_to_float(
    spec: str, granularity: Any, networks: dict[str, Prepared], images: Images
) -> None:
    case = Case.of(networks["plain"], images(networks["plain"], 64), spec)
    nearest = case.logit_error()
    case.rounded(granularity=granularity, steps=100)
    assert case.logit_error() < 0.6 * nearest
    for module in case.quantizers().values():
        weight = module.weight
        assert isinstance(weight, QuantizedWeight)
        assert set(weight.codes.reshape(-1).tolist()) <= set(weight.levels()[1].tolist())


@pytest.mark.parametrize(("name", "spec"), [("plain", "int2"), ("residual", "int2"), ("mlp", "int3")])
def test_at_least_as_good_as_gptq_when_it_starts_there(
    name: str, spec: str, networks: dict[str, Prepared], images: Images
) -> None:
    case = Case.of(networks[name], images(networks[name], 256), spec)
    RoundGPTQ(case.sample, case.quantizer.float_graph)(case.twin)
    before = case.logit_error()
    case.rounded(steps=200)
    assert case.logit_error() < 1.02 * before


class TestShared:
    """A weight with two uses."""

    def test_in_one_block_it_is_trained(self, networks: dict[str, Prepared], images: Images, record: Record) -> None:
        case = Case.of(networks["shared"], images(networks["shared"], 32))
        before = case.logit_error()
        step = case.rounded(granularity="block", steps=100)
        assert case.logit_error() < before
        nearest = case.quantizer.quantized_weight(case.prepared.layer("w"), WeightSpec.parse("int3"))
        assert not torch.equal(step.weights["w"].dequantize(), nearest.dequantize())
        with torch.no_grad():
            for node, value in record(case.twin, case.sample).items():
                if node.op == "call_module":
                    layer = "w" if value.ndim == 4 else "w2"
                    assert torch.equal(value, step.weights[layer].dequantize())

    def test_in_two_it_keeps_its_codes(self, networks: dict[str, Prepared], images: Images) -> None:
        case = Case.of(networks["shared"], images(networks["shared"], 16))
        nearest = case.quantizer.quantized_weight(case.prepared.layer("w"), WeightSpec.parse("int3"))
        step = case.step()
        assert step(case.twin).notes == (
            "1 weights rounded by AdaRound, layer by layer", "codes kept, no one block trains them: w",
        )  # fmt: skip
        assert torch.equal(step.weights["w"].dequantize(), nearest.dequantize())
        assert set(step.biases) == {("w", 0), ("w", 1), ("w2", 0)}, "biases are corrected all the same"


class TestRows:
    """Output channels of several formats are trained as those of one are."""

    @pytest.mark.parametrize("granularity", ["layer", "block"])
    def test_they_are_trained_and_end_no_worse(
        self, granularity: Any, networks: dict[str, Prepared], images: Images
    ) -> None:
        case = Case.of(networks["plain"], images(networks["plain"], 64), "int2")
        layer = case.prepared.layer("w2")
        spec = WeightSpec.parse(f"rows({','.join(['int4', 'int2', 'ternary'] * 2)})")
        start = quantize_weight(case.quantizer.weight(layer), spec, layer.channel_axis)
        case.quantizers()["w2"].weight = start
        before = case.logit_error()
        step = case.rounded(granularity=granularity, steps=100)
        found = step.weights["w2"]
        assert isinstance(found, QuantizedRows)
        assert found.spec == start.spec
        assert torch.equal(found.scale, start.scale)
        assert not torch.equal(found.dequantize(), start.dequantize())
        assert case.logit_error() < before

    def test_each_channel_moves_by_one_level_of_its_own_format(
        self, networks: dict[str, Prepared], images: Images
    ) -> None:
        case = Case.of(networks["plain"], images(networks["plain"], 64), "int2")
        layer = case.prepared.layer("w2")
        spec = WeightSpec.parse(f"rows({','.join(['int4', 'int2', 'ternary'] * 2)})")
        start = quantize_weight(case.quantizer.weight(layer), spec, layer.channel_axis)
        case.quantizers()["w2"].weight = start
        found = case.rounded(steps=100).weights["w2"]
        for (old, _), (new, _) in zip(parts_of(start), parts_of(found), strict=True):
            levels = new.levels()[0]
            moved = (new.dequantize() - old.dequantize()).abs() / new.scale.abs().view(-1, 1, 1, 1)
            assert float(moved.max()) <= float(levels.diff().max()) * (1 + 1e-6)


class TestWhatStays:
    """Layers without codes, graphs without any, and weights that are exact."""

    def test_layers_without_codes_stay_float(self, networks: dict[str, Prepared], images: Images) -> None:
        prepared = networks["plain"]
        quantizer = Quantizer(prepared, images(prepared, 10))
        twin = copy.deepcopy(quantizer.float_graph)
        spec = WeightSpec.parse("int2")
        InsertWeightQuantizers({"w2": quantizer.quantized_weight(prepared.layer("w2"), spec)})(twin)
        for granularity in ("layer", "block"):
            step = RoundAdaRound(images(prepared, 10), quantizer.float_graph, steps=5, granularity=granularity)
            assert step(twin).notes == (f"1 weights rounded by AdaRound, {granularity} by {granularity}",)
            assert set(step.weights) == {"w2"}
            assert set(step.biases) == {("w2", 0)}

    def test_a_graph_without_codes_is_not_changed(self, networks: dict[str, Prepared], images: Images) -> None:
        quantizer = Quantizer(networks["plain"])
        twin = copy.deepcopy(quantizer.float_graph)
        code = twin.code
        result = RoundAdaRound(images(networks["plain"], 4), quantizer.float_graph)(twin)
        assert (result.modified, result.notes, twin.code) == (False, (), code)

    def test_the_float_network_is_not_touched(self, networks: dict[str, Prepared], images: Images) -> None:
        case = Case.of(networks["residual"], images(networks["residual"], 10))
        with torch.no_grad():
            before = case.quantizer.float_graph(case.sample)
            case.rounded(granularity="block", steps=5)
            assert torch.equal(case.quantizer.float_graph(case.sample), before)

    @pytest.mark.parametrize("granularity", ["layer", "block"])
    def test_exact_weights_stay(self, granularity: Any, networks: dict[str, Prepared], images: Images) -> None:
        prepared = networks["plain"]
        quantizer = Quantizer(prepared)
        spec = WeightSpec.parse("int3")
        exact = {name: quantize_weight(quantizer.weight(prepared.layer(name)), spec) for name in ("w1", "w2", "w3")}
        twin = copy.deepcopy(quantizer.float_graph)
        for node in twin.graph.nodes:
            if is_layer(node):
                twin.get_buffer(str(node.args[1].target)).copy_(exact[node.meta["layer"]].dequantize())
        reference = copy.deepcopy(twin)
        InsertWeightQuantizers(exact)(twin)
        step = RoundAdaRound(images(prepared, 20), reference, steps=10, granularity=granularity, target="own")
        step(twin)
        for name, codes in exact.items():
            assert torch.equal(step.weights[name].dequantize(), codes.dequantize())

    def test_transposed_convolutions_are_trained_too(self, network: Network, images: Images) -> None:
        prepared = network(
            """(float[n,2,4,4] x, float[2,3,2,2] w, float[3] b, float[4,192] w2) => (float[n,4] y) {
                c = ConvTranspose <strides = [2, 2]> (x, w, b)
                f = Flatten (c)
                y = Gemm <transB = 1> (f, w2)
            }"""
        )
        case = Case.of(prepared, images(prepared, 32), "int2")
        nearest = case.logit_error()
        step = case.rounded(steps=100)
        assert set(step.weights) == {"w", "w2"}
        assert case.logit_error() < nearest


class TestRepeatable:
    """The seed decides, and nothing else."""

    def found(self, case: Case, **options: Any) -> Tensor:
        return values_of(dict(case.rounded(**options).weights))

    def test_the_same_seed_gives_the_same_codes(self, networks: dict[str, Prepared], images: Images) -> None:
        sample = images(networks["residual"], 48)
        results: list[Tensor] = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(results))  # the global state does not count
            state = torch.get_rng_state()
            case = Case.of(networks["residual"], sample, "int2")
            results.append(self.found(case, seed=seed, granularity="block"))
            assert torch.equal(torch.get_rng_state(), state), "nor is it used"
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    def test_options_reach_the_training(self, networks: dict[str, Prepared], images: Images) -> None:
        sample = images(networks["residual"], 32)
        options: list[dict[str, Any]] = [
            {}, {"steps": 40}, {"learning_rate": 0.02}, {"regulariser": 1.0}, {"warm_up": 0.6}, {"target": "own"},
            {"granularity": "block"}, {"centred": False}, {"batch_size": 8},
        ]  # fmt: skip
        results = [self.found(Case.of(networks["residual"], sample, "int2"), **chosen) for chosen in options]
        for chosen, result in zip(options[1:], results[1:], strict=True):
            assert not torch.equal(results[0], result), f"{chosen} changed nothing"

    def test_a_pass_may_run_again(self, networks: dict[str, Prepared], images: Images) -> None:
        case, again = (Case.of(networks["plain"], images(networks["plain"], 20)) for _ in range(2))
        step = case.step()
        assert step(case.twin).notes == step(again.twin).notes
        with torch.no_grad():
            assert torch.equal(case.twin(case.sample), again.twin(case.sample))


class TestErrors:
    """One line each."""

    @pytest.mark.parametrize(
        "options",
        [{"steps": 0}, {"warm_up": 1.0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"block": 0}, {"regulariser": -1}],
    )
    def test_options_out_of_range(self, options: Any, networks: dict[str, Prepared]) -> None:
        with pytest.raises(UsageError):
            RoundAdaRound(torch.rand(2, 3, 8, 8), Quantizer(networks["plain"]).float_graph, **options)

    def test_another_float_network(self, networks: dict[str, Prepared], images: Images) -> None:
        case = Case.of(networks["plain"], images(networks["plain"], 4))
        other = copy.deepcopy(case.quantizer.float_graph)
        for node in other.graph.nodes:
            if is_layer(node):
                node.meta["layer"] += "'"
        with pytest.raises(VerificationError, match=r"^w1: the float graph does not have this layer here") as caught:
            RoundAdaRound(case.sample, other)(case.twin)
        assert "\n" not in str(caught.value)

    def test_outputs_that_are_not_finite(self, network: Network, images: Images) -> None:
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
        with pytest.raises(DataError, match=r"^w: outputs that are not finite") as caught:
            RoundAdaRound(sample, case.quantizer.float_graph)(case.twin)
        assert "\n" not in str(caught.value)


@pytest.mark.assets
@pytest.mark.slow
def test_resnet20_is_no_worse_than_gptq() -> None:
    """Two bits everywhere, activations to 8 bits: closer to float than GPTQ with bias correction on other images."""
    if not os.environ.get("QOPT_ASSETS"):
        pytest.skip("QOPT_ASSETS is not set")
    root = Path(os.environ["QOPT_ASSETS"])
    prepared = prepare(ir.load(root / "onnx" / "resnet20_cifar10_std.onnx"))
    data = np.load(root / "data" / "cifar10_small.npz")
    train = torch.from_numpy(data["x_train"].astype(np.float32) / 255)
    case = Case.of(prepared, train[:512], "int2", "int8")
    other = train[1000:1500]
    with torch.no_grad():
        wanted = case.quantizer.float_graph(other).log_softmax(1)

        def divergence() -> float:
            return float((wanted.exp() * (wanted - case.twin(other).log_softmax(1))).sum(1).mean())

        RoundGPTQ(case.sample, case.quantizer.float_graph)(case.twin)
        gptq = divergence()
        RoundAdaRound(case.sample, case.quantizer.float_graph)(case.twin)
        assert divergence() < gptq
