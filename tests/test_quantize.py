"""Plans become quantized networks, on dynamic and on static batches; what a plan gets wrong is named."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from qopt.emit import emit
from qopt.errors import DataError, PlanError, VerificationError
from qopt.graph.compare import Runner
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.passes.base import EXACT, relative_change
from qopt.plan import Defaults, Plan, uniform
from qopt.quant import AffineRange
from qopt.quantize import Quantizer, whole_batches
from qopt.size import code_bits
from qopt.spec import ActivationSpec, WeightSpec

INT4, INT8 = WeightSpec.parse("int4"), WeightSpec.parse("int8")
A8, A4 = ActivationSpec.parse("int8"), ActivationSpec.parse("int4")

BODY = """(float[BATCH,2,6,6] x, float[4,2,3,3] stem, float[4] stem_b, float[4,4,3,3] block, float[4] block_b,
        float[4,2,1,1] shortcut, float[64,8] hidden, float[8] hidden_b, float[3,8] head, float[3] head_b EXTRA)
        => (float[BATCH,3] y) {
    input = FIRST
    c1 = Conv <pads = [1,1,1,1]> (input, stem, stem_b)
    r1 = Relu (c1)
    c2 = Conv <pads = [1,1,1,1]> (r1, block, block_b)
    s = Conv (input, shortcut)
    a = Add (c2, s)
    r2 = Relu (a)
    p = MaxPool <kernel_shape = [3,3]> (r2)
    f = Flatten (p)
    m = MatMul (f, hidden)
    h = Add (m, hidden_b)
    r3 = Relu (h)
    y = Gemm <transB = 1> (r3, head, head_b)
}"""
DYNAMIC = BODY.replace("BATCH", "n").replace(" EXTRA", "").replace("FIRST", "Identity (x)")
STATIC = BODY.replace("BATCH", "2").replace(" EXTRA", ", float[2,2,1,1] zeros").replace("FIRST", "Add (x, zeros)")
TENSORS = {"x": ["x"], "r1": ["r1"], "c2": ["c2"], "s": ["s"], "r2": ["r2", "p", "f"], "r3": ["r3"]}
STATIC_TENSORS = {"input": ["input"]} | {name: values for name, values in TENSORS.items() if name != "x"}


def build(text: str) -> Prepared:
    """The network of ``text``; all its inputs after the image are random weights, ``zeros`` excepted."""
    proto = parser.parse_model('<ir_version: 10, opset_import: ["": 21]>\nnet ' + text)
    generator = np.random.default_rng(1)
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        scale = 0.0 if value.name == "zeros" else float(np.prod(shape[1:])) ** -0.5
        array = (scale * generator.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return prepare(ir.serde.deserialize_model(proto))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dynamic() -> Prepared:
    return build(DYNAMIC)


@pytest.fixture(scope="module")
def static() -> Prepared:
    """The same network bound to two images at a time; each row of its logits depends on its image only."""
    return build(STATIC)


@pytest.fixture(scope="module")
def quantizer(dynamic: Prepared) -> Quantizer:
    """Calibrated on 50 images; tests only apply plans."""
    return Quantizer(dynamic, images(50))


@torch.no_grad()
def logits(graph: torch.fx.GraphModule, sample: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = graph(sample)
    return result


def file_logits(prepared: Prepared, quantized: Any, sample: torch.Tensor) -> NDArray[np.float32]:
    run = Runner(emit(prepared, quantized))
    return np.concatenate([run(chunk.numpy()) for chunk in torch.split(sample, prepared.batch or len(sample))])


def test_the_twin_and_its_tables(quantizer: Quantizer, dynamic: Prepared, static: Prepared) -> None:
    assert (dynamic.batch, static.batch) == (None, 2)
    assert quantizer.tensors == TENSORS
    assert Quantizer(static).tensors == STATIC_TENSORS
    assert quantizer.sample.shape == (2, 2, 6, 6)
    assert torch.equal(quantizer.sample, quantizer.sample)
    assert quantizer.notes == ["1 matrix products written as linear", "6 activation tensors can be quantized"]
    assert set(quantizer.seconds) == {"unshare", "canonicalise-linear", "annotate"}
    reference = Runner(dynamic.model)(quantizer.sample.numpy())
    np.testing.assert_allclose(logits(quantizer.float_graph, quantizer.sample).numpy(), reference, atol=1e-5)


class TestRows:
    """Plans with a format for each output channel."""

    WEIGHTS: ClassVar = {
        "stem": "rows(int8,int4:narrow*2,int8)",
        "block": "rows(int2,int3,ternary,int2)",
        "hidden": "rows(log4*3,int4*5)",
        "head": "rows(int1,int8,int1)",
    }

    @pytest.mark.parametrize("activations", ["float", "int8", "int4"])
    @pytest.mark.parametrize("fields", [{}, {"rounding": "gptq"}, {"rounding": "gptq", "bias_correction": True}])
    def test_the_file_computes_what_the_twin_does(
        self, activations: str, fields: dict[str, Any], quantizer: Quantizer, dynamic: Prepared
    ) -> None:
        plan = Plan(defaults=Defaults(activations=activations), weights=self.WEIGHTS, **fields)
        applied = quantizer.apply(plan)
        assert {name: str(w.spec) for name, w in applied.quantized.weights.items()} == self.WEIGHTS
        found = file_logits(dynamic, applied.quantized, quantizer.sample)
        np.testing.assert_allclose(found, logits(applied.graph, quantizer.sample).numpy(), atol=1e-4)

    def test_the_size_is_that_of_the_parts(self, quantizer: Quantizer, dynamic: Prepared) -> None:
        stored = list(quantizer.apply(Plan(weights=self.WEIGHTS)).quantized.stored(dynamic))
        bits = 36 * 8 + 36 * 4 + 72 * 2 + 36 * 3 + 36 * 1.6 + 8 * 32 + 64 * 8 * 4 + 8 * (1 + 8 + 1)
        assert code_bits(stored) == pytest.approx(bits / (72 + 144 + 8 + 512 + 24))

    @pytest.mark.parametrize(("rows", "count"), [("rows(int4*2,int8)", 3), ("rows(int4*2,int8*72)", 74)])
    def test_a_wrong_number_of_rows_names_the_layer(self, rows: str, count: int, quantizer: Quantizer) -> None:
        with pytest.raises(PlanError, match=rf"^block: .*\(expected 4, got {count} in "):
            quantizer.apply(Plan(weights={"block": rows}))

    def test_rows_are_quantized_once(self, quantizer: Quantizer) -> None:
        one, two = (quantizer.apply(Plan(weights=self.WEIGHTS)).quantized.weights for _ in range(2))
        assert all(one[name] is two[name] for name in self.WEIGHTS)


class TestFloat:
    """Plans that quantize nothing."""

    @pytest.mark.parametrize("name", ["dynamic", "static"])
    def test_an_all_float_plan_is_the_float_twin(self, name: str, request: pytest.FixtureRequest) -> None:
        prepared = request.getfixturevalue(name)
        quantizer = Quantizer(prepared)
        applied = quantizer.apply(uniform())
        sample = images(2)
        assert relative_change(logits(quantizer.float_graph, sample), logits(applied.graph, sample)) <= 1e-6
        assert applied.quantized.weights == {}
        assert applied.quantized.biases == {}
        assert applied.quantized.activations == {}
        assert applied.plan == uniform()
        np.testing.assert_array_equal(
            file_logits(prepared, applied.quantized, sample), Runner(prepared.model)(sample.numpy())
        )

    def test_without_matrix_products_it_is_equal_to_the_last_bit(self) -> None:
        prepared = build(
            """(float[n,2,6,6] x, float[4,2,3,3] w1, float[4] b1, float[3,64] w2, float[3] b2) => (float[n,3] y) {
                c = Conv (x, w1, b1)
                r = Relu (c)
                f = Flatten (r)
                y = Gemm <transB = 1> (f, w2, b2)
            }"""
        )
        quantizer = Quantizer(prepared)
        sample = images(7)
        assert torch.equal(logits(quantizer.apply(uniform()).graph, sample), logits(quantizer.float_graph, sample))

    def test_float_layers_and_tensors_in_a_mixed_plan_stay_exact(self, quantizer: Quantizer) -> None:
        plan = Plan(weights={"head": "int2"}, activations={"r3": "int8"})
        applied = quantizer.apply(plan)
        assert set(applied.quantized.weights) == {"head"}
        assert set(applied.quantized.activations) == {"r3"}
        assert set(applied.plan.ranges) == {"r3"}


class TestShared:
    """What plans have in common."""

    def test_a_weight_is_quantized_once(self, quantizer: Quantizer, dynamic: Prepared) -> None:
        first = quantizer.apply(uniform(INT4)).quantized.weights
        second = quantizer.apply(uniform(INT4, A8)).quantized.weights
        third = quantizer.apply(uniform(INT8)).quantized.weights
        assert set(first) == {layer.name for layer in dynamic.layers}
        for name, weight in first.items():
            assert second[name] is weight
            assert third[name] is not weight
            assert quantizer.quantized_weight(dynamic.layer(name), INT4) is weight

    def test_the_float_graph_survives_every_plan(self, dynamic: Prepared) -> None:
        quantizer = Quantizer(dynamic, images(20))
        before = logits(quantizer.float_graph, quantizer.sample)
        kept = copy.deepcopy(quantizer.float_graph).code
        for plan in (uniform(INT4), uniform(INT4, A4), uniform(INT4, A4, bias_correction=True)):
            quantizer.apply(plan)
        assert quantizer.float_graph.code == kept
        assert torch.equal(logits(quantizer.float_graph, quantizer.sample), before)
        assert quantizer.tensors == TENSORS

    def test_applying_twice_gives_the_same(self, quantizer: Quantizer) -> None:
        plan = uniform(INT4, A4, bias_correction=True)
        one, two = quantizer.apply(plan), quantizer.apply(plan)
        assert one.plan == two.plan
        assert torch.equal(logits(one.graph, quantizer.sample), logits(two.graph, quantizer.sample))
        assert one.quantized.biases.keys() == two.quantized.biases.keys()

    def test_the_weight_is_a_private_copy(self, quantizer: Quantizer, dynamic: Prepared) -> None:
        quantizer.weight(dynamic.layers[0]).zero_()
        assert quantizer.weight(dynamic.layers[0]).any()


class TestRanges:
    """Where the ranges of activations come from."""

    def test_they_are_those_of_the_calibration_images(self, quantizer: Quantizer) -> None:
        applied = quantizer.apply(uniform(activations=A8))
        assert list(applied.plan.ranges) == list(TENSORS)
        sample = images(50).numpy()
        assert applied.plan.ranges["x"] == (float(sample.min()), float(sample.max()))
        assert applied.plan.ranges["r1"][0] == 0.0

    def test_views_share_the_range_of_their_source(self, quantizer: Quantizer) -> None:
        found = quantizer.apply(uniform(activations=A4)).quantized.activations
        assert set(found) == {value for values in TENSORS.values() for value in values}
        assert found["r2"] == found["p"] == found["f"]

    def test_the_plans_own_range_wins_over_data(self, quantizer: Quantizer) -> None:
        applied = quantizer.apply(uniform(activations=A8, ranges={"r1": (0.0, 12.75)}))
        assert applied.quantized.activations["r1"] == AffineRange.from_bounds(0.0, 12.75, 8)
        assert applied.plan.ranges["r1"] == (0.0, 12.75)
        other = quantizer.apply(uniform(activations=A8))
        assert applied.plan.ranges["r2"] == other.plan.ranges["r2"]

    def test_a_plan_with_all_ranges_needs_no_data(self, quantizer: Quantizer, dynamic: Prepared) -> None:
        calibrated = quantizer.apply(uniform(INT4, A4))
        again = Quantizer(dynamic).apply(calibrated.plan)
        assert again.plan == calibrated.plan
        assert torch.equal(logits(again.graph, quantizer.sample), logits(calibrated.graph, quantizer.sample))

    def test_percentiles_narrow_the_range(self, quantizer: Quantizer) -> None:
        full = quantizer.apply(uniform(activations=A8)).plan.ranges
        some = quantizer.apply(uniform(activations=ActivationSpec.parse("int8:p90"))).plan.ranges
        assert all(full[name][0] <= some[name][0] <= some[name][1] < full[name][1] for name in TENSORS)

    def test_calibrators_are_kept_apart(self, quantizer: Quantizer) -> None:
        """Bounds are computed once per tensor and spec; a quantizer that has seen other specs gives the same."""
        texts = ["int8", "int4:mse", "int2:mse", "int4:entropy", "int4:clip1", "int8:p90", "int4:mse"]
        seen = [quantizer.apply(uniform(activations=ActivationSpec.parse(text))).plan.ranges for text in texts]
        for text, ranges in zip(texts, seen, strict=True):
            alone = Quantizer(quantizer.prepared, quantizer.calibration)
            assert alone.apply(uniform(activations=ActivationSpec.parse(text))).plan.ranges == ranges
        assert seen[1] == seen[-1]
        assert len({str(ranges) for ranges in seen[:-1]}) == len(texts) - 1

    @pytest.mark.parametrize("text", ["int1", "int1:mse", "int1:clip1", "int2:mse", "int4:mse", "int8:entropy"])
    def test_the_file_computes_what_the_twin_does(self, text: str, quantizer: Quantizer, dynamic: Prepared) -> None:
        applied = quantizer.apply(uniform(INT4, ActivationSpec.parse(text)))
        found = file_logits(dynamic, applied.quantized, quantizer.sample)
        np.testing.assert_allclose(found, logits(applied.graph, quantizer.sample).numpy(), atol=1e-4)

    def test_ranges_of_tensors_that_stay_float_are_dropped(self, quantizer: Quantizer) -> None:
        applied = quantizer.apply(Plan(activations={"r1": "int8"}, ranges={"r2": (0.0, 1.0), "r1": (0.0, 2.0)}))
        assert applied.plan.ranges == {"r1": (0.0, 2.0)}

    def test_a_range_beyond_float32_is_named(self, quantizer: Quantizer) -> None:
        with pytest.raises(DataError, match=r"ranges\.r1"):
            quantizer.apply(uniform(activations=A8, ranges={"r1": (0.0, 1e300)}))

    def test_calibration_that_fails_leaves_nothing_behind(self) -> None:
        """A range from the images before the broken one must not serve the next plan."""
        prepared = build(
            """(float[n,2,6,6] x, float[3,72] w) => (float[n,3] y) {
                l = Log (x)
                f = Flatten (l)
                y = Gemm <transB = 1> (f, w)
            }"""
        )
        sample = images(100) + 0.01
        sample[90] = 0.0
        quantizer = Quantizer(prepared, sample)
        for _ in range(2):
            with pytest.raises(DataError, match="NaN or infinite"):
                quantizer.apply(uniform(activations=A8))


class TestErrors:
    """Plans that do not fit are refused with the nearest name."""

    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            (Plan(weights={"sten": "int4"}), r"^sten: .*layer that the model does not have; did you mean 'stem'"),
            (Plan(weights={"conv*": "int4"}), r"conv\*"),
            (Plan(activations={"r9": "int8"}), r"^r9: .*tensor that the model does not have; did you mean 'r[123]'"),
            (Plan(activations={"y": "int8"}), r"^y: .*tensor that the model does not have"),
            (Plan(activations={"p": "int8"}), r"^p: .*tensor that the model does not have"),
            (Plan(ranges={"r22": (0.0, 1.0)}), r"^r22: .*did you mean 'r2'"),
            (Plan(ties=[["stem", "blok"]]), r"^blok: .*did you mean 'block'"),
            (Plan(weights={"stem": "int4"}, ties=[["stem", "block"]]), "one format"),
            (Plan(model="f" * 64), r"^model: the plan was made for another model"),
        ],
    )
    def test_names_that_match_nothing(self, plan: Plan, message: str, quantizer: Quantizer) -> None:
        with pytest.raises(PlanError, match=message) as caught:
            quantizer.apply(plan)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("plan", "message"),
        [
            (uniform(activations=A8), r"^x: .*nothing to calibrate them on.*--data"),
            (Plan(activations={"r2": "int4"}), r"^r2: .*nothing to calibrate"),
            (uniform(activations=A8, ranges={"x": (0.0, 1.0)}), r"^r1: .*nothing to calibrate"),
            (uniform(INT4, bias_correction=True), r"^bias_correction: bias correction needs images.*--data"),
            (uniform(INT4, rounding="gptq"), r"^rounding: rounding by GPTQ needs images.*--data"),
        ],
    )
    def test_what_needs_data(self, plan: Plan, message: str, dynamic: Prepared) -> None:
        with pytest.raises(PlanError, match=message):
            Quantizer(dynamic).apply(plan)

    def test_a_plan_for_this_model_is_taken(self, quantizer: Quantizer, dynamic: Prepared) -> None:
        assert quantizer.apply(uniform(INT4, model=dynamic.digest)).plan.model == dynamic.digest

    @pytest.mark.parametrize(
        "bad", [torch.rand(0, 2, 6, 6), torch.rand(4, 2, 6), torch.rand(4, 3, 6, 6), torch.rand(4, 2, 6, 6).double()]
    )
    def test_calibration_images_that_do_not_fit(self, bad: torch.Tensor, dynamic: Prepared) -> None:
        with pytest.raises(DataError, match=r"expected float32 \(n, 2, 6, 6\)"):
            Quantizer(dynamic, bad)

    def test_weights_that_break_the_graph_are_an_internal_error(self, dynamic: Prepared) -> None:
        """A planted mistake: marks that do not belong to the graph."""
        quantizer = Quantizer(dynamic, images(4))
        for node in quantizer.float_graph.graph.nodes:
            if node.meta.get("layer") == "block":
                del node.meta["layer"]
        with pytest.raises(VerificationError, match="block: no call in the graph"):
            quantizer.apply(uniform(INT4))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("activations", ["float", "int8", "int4:p99.9"])
@pytest.mark.parametrize("weights", ["int2", "int4", "log4", "int8:tensor:max"])
def test_twin_and_file_agree(
    weights: str, activations: str, bias_correction: bool, rounding: str, quantizer: Quantizer
) -> None:
    plan = uniform(
        WeightSpec.parse(weights), ActivationSpec.parse(activations), bias_correction=bias_correction, rounding=rounding
    )
    applied = quantizer.apply(plan)
    sample = images(40, 3)
    found = file_logits(quantizer.prepared, applied.quantized, sample)
    expected = logits(applied.graph, sample).numpy()
    differs = np.abs(found - expected).max(1) / np.abs(expected).max()
    assert (differs > 1e-5).mean() <= 0.05, "a code may fall to the other side of a tie, on few images"
    assert differs.max() < (1e-5 if activations == "float" else 0.1)
    assert set(applied.seconds) >= {"insert-weight-quantizers", "fold-weights"}
    assert any("weights quantized" in note for note in applied.notes)


class TestStaticBatch:
    """A graph that takes two images at a time, and calibration images that do not divide by two."""

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 257])
    @pytest.mark.parametrize(
        "plan",
        [
            uniform(INT4),
            uniform(INT4, A8),
            uniform(INT4, A8, bias_correction=True),
            uniform(INT4, A8, bias_correction=True, rounding="gptq"),
        ],
        ids=["weights", "activations", "biases", "gptq"],
    )
    def test_any_number_of_images(self, count: int, plan: Plan, static: Prepared) -> None:
        sample = images(count)
        applied = Quantizer(static, sample).apply(plan)
        found = file_logits(static, applied.quantized, images(2, 9))
        np.testing.assert_allclose(logits(applied.graph, images(2, 9)).numpy(), found, atol=0.05)

    @pytest.mark.parametrize("count", [2, 6, 7])
    def test_it_quantizes_like_the_dynamic_graph(self, count: int, static: Prepared, dynamic: Prepared) -> None:
        """On the images of whole batches: the same ranges and biases, whatever the batch size."""
        plan = uniform(INT4, A8, bias_correction=True)
        one = Quantizer(static, images(count)).apply(plan)
        two = Quantizer(dynamic, images(count)[: count // 2 * 2]).apply(plan)
        for name, bounds in two.plan.ranges.items():
            assert one.plan.ranges["input" if name == "x" else name] == pytest.approx(bounds, abs=1e-5)
        for key, bias in two.quantized.biases.items():
            torch.testing.assert_close(one.quantized.biases[key], bias, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("count", "batch", "expected"),
        [
            (5, None, [0, 1, 2, 3, 4]),
            (5, 1, [0, 1, 2, 3, 4]),
            (5, 2, [0, 1, 2, 3]),
            (6, 2, [0, 1, 2, 3, 4, 5]),
            (5, 5, [0, 1, 2, 3, 4]),
            (3, 8, [0, 1, 2, 0, 1, 2, 0, 1]),
            (1, 3, [0, 0, 0]),
        ],
    )
    def test_whole_batches(self, count: int, batch: int | None, expected: list[int]) -> None:
        assert whole_batches(torch.arange(count), batch).tolist() == expected


class TestRounding:
    """Plans that round by GPTQ."""

    def test_it_brings_the_logits_closer_to_float(self, quantizer: Quantizer) -> None:
        sample = images(50)
        reference = logits(quantizer.float_graph, sample)
        plan = uniform(WeightSpec.parse("int3"), A8)
        plans = [plan.with_changes(rounding=r, bias_correction=b) for r in ("nearest", "gptq") for b in (False, True)]
        nearest, corrected, rounded, both = (
            float((logits(quantizer.apply(p).graph, sample) - reference).square().mean()) for p in plans
        )
        assert rounded < 0.5 * nearest
        assert both < 0.5 * corrected

    def test_bias_correction_lets_the_biases_absorb_the_mean(self, quantizer: Quantizer) -> None:
        sample = images(50)
        reference = logits(quantizer.float_graph, sample).mean(0)
        plan = uniform(WeightSpec.parse("int2"), rounding="gptq")
        applied = [quantizer.apply(plan.with_changes(bias_correction=correct)) for correct in (False, True)]
        assert applied[0].quantized.biases == {}
        assert {layer for layer, _ in applied[1].quantized.biases} == {x.name for x in quantizer.prepared.layers}
        gaps = [float((logits(a.graph, sample).mean(0) - reference).abs().max()) for a in applied]
        assert gaps[1] < EXACT < gaps[0]

    def test_the_codes_that_are_emitted_are_new_and_those_of_nearest_stay_cached(self, quantizer: Quantizer) -> None:
        before = quantizer.apply(uniform(INT4)).quantized.weights
        kept = {name: weight.dequantize() for name, weight in before.items()}
        applied = quantizer.apply(uniform(INT4, rounding="gptq"))
        assert list(applied.quantized.weights) == list(before)
        assert any(not torch.equal(w.dequantize(), kept[name]) for name, w in applied.quantized.weights.items())
        for name, weight in quantizer.apply(uniform(INT4)).quantized.weights.items():
            assert weight is before[name]
            assert torch.equal(weight.dequantize(), kept[name])
        assert "5 weights rounded by GPTQ" in applied.notes
        assert "round-gptq" in applied.seconds

    def test_layers_that_the_plan_leaves_float_stay(self, quantizer: Quantizer) -> None:
        plan = Plan(weights={"block": "int3"}, rounding="gptq", bias_correction=True)
        quantized = quantizer.apply(plan).quantized
        assert set(quantized.weights) == {"block"}
        assert set(quantized.biases) == {("block", 0)}

    def test_a_float_plan_needs_no_images(self, dynamic: Prepared) -> None:
        assert Quantizer(dynamic).apply(uniform(rounding="gptq")).quantized.weights == {}

    def test_applying_twice_gives_the_same(self, quantizer: Quantizer) -> None:
        plan = uniform(INT4, A4, bias_correction=True, rounding="gptq")
        one, two = quantizer.apply(plan), quantizer.apply(plan)
        for name, weight in one.quantized.weights.items():
            assert torch.equal(weight.dequantize(), two.quantized.weights[name].dequantize())
            assert torch.equal(weight.scale, two.quantized.weights[name].scale)

    @pytest.mark.parametrize(("kept", "count"), [(100, 50), (3, 3), (3.9, 3), (0.1, 1)])
    def test_images_are_as_many_as_memory_takes(
        self, kept: float, count: int, dynamic: Prepared, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most alive for an image, in each of two networks: c2 and s while they are added, and their sum, 4x6x6."""
        sample = images(50)
        sample[count:] = 7.0
        plan = uniform(INT4, rounding="gptq", bias_correction=True)
        alone = Quantizer(dynamic, sample[:count].clone()).apply(plan)
        monkeypatch.setattr("qopt.quantize.ACTIVATION_BYTES", int(kept * 2 * 4 * 36 * (4 + 4 + 4)))
        limited = Quantizer(dynamic, sample).apply(plan)
        for key, bias in alone.quantized.biases.items():
            assert torch.equal(limited.quantized.biases[key], bias)


def test_bias_correction_moves_the_logits_towards_float(quantizer: Quantizer) -> None:
    sample = images(50)
    reference = logits(quantizer.float_graph, sample).mean(0)
    plan = uniform(WeightSpec.parse("int2"))
    plain = logits(quantizer.apply(plan).graph, sample).mean(0)
    corrected = logits(quantizer.apply(plan.with_changes(bias_correction=True)).graph, sample).mean(0)
    assert (plain - reference).abs().max() > 1e-2
    assert (corrected - reference).abs().max() < EXACT
