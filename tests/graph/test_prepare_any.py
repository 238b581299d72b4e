"""Networks that are no classifiers of images: token ids, masks, several inputs and outputs, any sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import qopt.graph.prepare as module
from qopt.errors import UnsupportedModelError, UsageError, VerificationError
from qopt.graph.compare import TOLERANCE, Runner, largest_difference
from qopt.graph.fold_constants import fold_constants
from qopt.graph.model import GraphInput
from qopt.graph.prepare import prepare

Text = Callable[..., onnx.ModelProto]
GENERATOR = np.random.default_rng(0)


def _random(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


CASES: dict[str, tuple[str, dict[str, Any], str, list[tuple[str, str, int]]]] = {
    "token ids": (
        "g (int64[b, s] ids) => (float[b, s, 4] y) { x = Gather(table, ids) y = MatMul(x, w) }",
        {"table": _random(20, 8), "w": _random(8, 4)}, "its input 'ids' is INT64",
        [("table", "Gather", 0), ("w", "MatMul", 1)],
    ),
    "two inputs": (
        "g (float[b, 6] x, float[b, 6] z) => (float[b, 3] y) { s = Add(x, z) y = Gemm<transB = 1>(s, w) }",
        {"w": _random(3, 6)}, "it takes 2 inputs: 'x', 'z'", [("w", "Gemm", 0)],
    ),
    "a feature map of any size": (
        "g (float[b, 3, h, w] x) => (float[b, 4, h, w] y) { y = Conv<pads = [1, 1, 1, 1]>(x, c) }",
        {"c": _random(4, 3, 3, 3)}, "its input 'x' is no image of one size but (?, 3, ?, ?)", [("c", "Conv", 0)],
    ),
    "a feature map": (
        "g (float[b, 3, 8, 8] x) => (float[b, 4, 8, 8] y) { y = Conv<pads = [1, 1, 1, 1]>(x, c) }",
        {"c": _random(4, 3, 3, 3)}, "its first output 'y' is no row of logits per image but float32 (2, 4, 8, 8)",
        [("c", "Conv", 0)],
    ),
    "one number": (
        "g (float[b, 6] x) => (float[b, 1] y) { y = MatMul(x, w) }", {"w": _random(6, 1)},
        "its first output 'y' is no row of logits per image but float32 (2, 1)", [("w", "MatMul", 1)],
    ),
    "integers out": (
        "g (float[b, 6] x) => (int64[b, 3] y) { f = MatMul(x, w) y = Cast<to = 7>(f) }", {"w": _random(6, 3)},
        "its first output 'y' is no row of logits per image but int64 (2, 3)", [("w", "MatMul", 1)],
    ),
    "rows that are no images": (
        "g (float[b, 6] x) => (float[c, 3] y) { f = MatMul(x, w) y = Reshape(f, shape) }",
        {"w": _random(6, 6), "shape": np.array([-1, 3])},
        "its first output 'y' is not one row of logits per image but 4 for 2 images", [("w", "MatMul", 1)],
    ),
    "a vector": (
        "g (float[n] x) => (float[4] y) { y = MatMul(x, w) }", {"w": _random(16, 4)},
        "its input 'x' is no image of one size but (?)", [("w", "MatMul", 1)],
    ),
    "sound": (
        "g (float[b, 2, t] x) => (float[b, 5, u] y) { y = Conv<strides = [2]>(x, c, e) }",
        {"c": _random(5, 2, 3), "e": _random(5)}, "its input 'x' is no image of one size but (?, 2, ?)",
        [("c", "Conv", 0)],
    ),
    "depthwise": (
        "g (float[b, 4, t] x) => (float[b, 4, u] y) { y = Conv<group = 4>(x, c) }", {"c": _random(4, 1, 3)},
        "its input 'x' is no image of one size but (?, 4, ?)", [("c", "Conv", 0)],
    ),
    "transposed": (
        "g (float[b, 4, t] x) => (float[b, 3, u] y) { y = ConvTranspose<strides = [2]>(x, c) }",
        {"c": _random(4, 3, 2)}, "its input 'x' is no image of one size but (?, 4, ?)", [("c", "ConvTranspose", 1)],
    ),
    "a sequence out": (
        "g (float[b, 6] x, int64[n] k) => (seq(float[b, 3]) y) { f = MatMul(x, w) y = SequenceConstruct(f, f) }",
        {"w": _random(6, 3)}, "it takes 2 inputs: 'x', 'k'", [("w", "MatMul", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_networks_that_are_no_classifiers_of_images(case: str, text_model: Text) -> None:
    text, arrays, other, layers = CASES[case]
    model = ir.from_proto(text_model(text, **arrays))
    prepared = prepare(model)
    assert (prepared.other, prepared.image) == (other, False)
    assert (prepared.input_shape, prepared.classes, prepared.batch) == ((), 0, None)
    assert [(layer.name, layer.op, layer.channel_axis) for layer in prepared.layers] == layers
    assert [value.name for value in prepared.model.graph.outputs] == [value.name for value in model.graph.outputs]
    assert list(prepared.example) == [value.name for value in prepared.inputs]
    found, expected = (Runner(m).all(prepared.example) for m in (prepared.model, model))
    assert largest_difference(found, expected) <= TOLERANCE


def test_what_prepared_says_of_a_classifier_of_images(small_cnn: Callable[..., ir.Model]) -> None:
    prepared = prepare(small_cnn())
    assert prepared.image
    assert prepared.other == ""
    assert prepared.inputs == (GraphInput("x", "FLOAT", (None, 3, 8, 8)),)
    assert prepared.example["x"].shape == (1, 3, 8, 8)


TWO_OUTPUTS = """
g (float[b, 3, h, w] x) => (float[b, 2, h2, w2] boxes, int64[b, h2, w2] kinds) {
    c = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, conv)
    n = BatchNormalization(c, scale, shift, mean, variance)
    r = Relu(n)
    boxes = Conv(r, box)
    scores = Conv(r, score)
    kinds = ArgMax<axis = 1, keepdims = 0>(scores)
}
"""


def _detector(text_model: Text, opset: int = 21) -> onnx.ModelProto:
    arrays = {
        "conv": _random(8, 3, 3, 3), "scale": _random(8), "shift": _random(8), "mean": _random(8),
        "variance": np.abs(_random(8)) + 1, "box": _random(2, 8, 1, 1), "score": _random(5, 8, 1, 1),
    }  # fmt: skip
    return text_model(TWO_OUTPUTS, opset, **arrays)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_a_detector_with_two_outputs_is_cleaned_and_keeps_both(text_model: Text, opset: int) -> None:
    model = ir.from_proto(_detector(text_model, opset))
    prepared = prepare(model)
    assert [node.op_type for node in prepared.model.graph] == ["Conv", "Relu", "Conv", "Conv", "ArgMax"]
    assert "batch norm folded into 1 layer" in prepared.notes
    assert (f"opset {opset} converted to 21" in prepared.notes) == (opset < 21)
    assert prepared.inputs == (GraphInput("x", "FLOAT", (None, 3, None, None)),)
    feeds = {
        "x": np.random.default_rng(1).random((1, 3, 20, 34), np.float32)
    }  # neither square nor a size that was tried
    boxes, kinds = Runner(prepared.model).all(feeds)
    assert largest_difference([boxes, kinds], Runner(model).all(feeds)) <= TOLERANCE
    assert (boxes.shape, kinds.dtype.name) == ((1, 2, 10, 17), "int64")


def test_macs_are_those_of_one_item(text_model: Text) -> None:
    text, arrays, *_ = CASES["sound"]
    (layer,) = prepare(ir.from_proto(text_model(text, **arrays)), {"t": 21}).layers
    assert layer.macs == 10 * 5 * 2 * 3


def test_an_axis_of_size_minus_one_is_dynamic(text_model: Text) -> None:
    proto = _detector(text_model)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -1
    assert prepare(ir.from_proto(proto)).inputs[0].shape == (None, 3, None, None)


def test_the_left_side_of_a_product_stays_in_float_with_a_note(text_model: Text) -> None:
    text = "g (float[b, 6, 4] x) => (float[b, 3, 4] y) { y = MatMul(w, x) }"
    prepared = prepare(ir.from_proto(text_model(text, w=_random(3, 6))))
    assert prepared.layers == ()
    assert prepared.notes == ("w stays in float: it is the left side of the product",)


def test_a_causal_mask_of_minus_infinity_is_no_broken_weight(text_model: Text) -> None:
    text = "g (float[b, s, s] x) => (float[b, s, s] y) { z = Add(x, never) y = Where(no, z, x) }"
    never, no = np.float32(-np.inf), np.array(False)
    assert not prepare(ir.from_proto(text_model(text, never=never, no=no))).image


def test_sizes_of_axes_reach_the_example(text_model: Text) -> None:
    text, arrays, *_ = CASES["token ids"]
    model = ir.from_proto(text_model(text, **arrays))
    assert prepare(model, {"s": 5}).example["ids"].shape == (2, 5)
    assert prepare(model, {"s": 5}).digest == prepare(model).digest
    with pytest.raises(UsageError, match="no such dynamic axis"):
        prepare(model, {"t": 5})


def test_sizes_of_axes_are_not_for_images(small_cnn: Callable[..., ir.Model]) -> None:
    with pytest.raises(UsageError, match="--axis n: images have one size"):
        prepare(small_cnn(), {"n": 5})


def test_nothing_runs(text_model: Text) -> None:
    text = "g (float[b, h] x) => (float[b, 3] y) { y = MatMul(x, w) }"
    with pytest.raises(UnsupportedModelError, match="runs on none of the inputs that were drawn"):
        prepare(ir.from_proto(text_model(text, w=_random(77, 3))))


def test_the_digest_knows_inputs_apart(text_model: Text) -> None:
    """Two inputs of one type and shape that change places are another network."""
    text = "g (float[b, 6] x, float[b, 6] z) => (float[b, 6] y) { n = Neg(%s) y = Add(n, %s) }"
    one, two, renamed = (ir.from_proto(text_model(text % pair)) for pair in (("x", "z"), ("z", "x"), ("x", "z")))
    renamed.graph.inputs[0].name = "first"
    assert prepare(one).digest != prepare(two).digest
    assert prepare(one).digest == prepare(renamed).digest


def test_a_graph_that_is_bound_to_one_size_by_mistake_is_caught(
    text_model: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug: the folder takes the size of the first example for a constant."""

    def wrong(model: ir.Model) -> None:
        fold_constants(model)
        product = next(node for node in model.graph if node.op_type == "MatMul")
        target = ir.Value(name="t", const_value=ir.tensor(np.array([2, 16, 8])), type=ir.TensorType(ir.DataType.INT64))
        model.graph.register_initializer(target)
        reshape = ir.node("Reshape", [product.inputs[0], target], name="planted")
        model.graph.insert_before(product, reshape)
        product.replace_input_with(0, reshape.outputs[0])

    text, arrays, *_ = CASES["token ids"]
    monkeypatch.setattr(module, "fold_constants", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        prepare(ir.from_proto(text_model(text, **arrays)))


def test_a_second_output_that_changes_is_caught(text_model: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ir.Model) -> None:
        fold_constants(model)
        value = model.graph.initializers["score"]
        assert value.const_value is not None
        value.const_value = ir.tensor(-value.const_value.numpy(), name="score")

    monkeypatch.setattr(module, "fold_constants", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        prepare(ir.from_proto(_detector(text_model)))


@pytest.mark.parametrize("dtype", [TensorProto.STRING, TensorProto.BFLOAT16])
def test_inputs_that_cannot_be_drawn(dtype: int) -> None:
    ends = [helper.make_tensor_value_info(name, dtype, ["b", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(UnsupportedModelError, match="input"):
        prepare(ir.from_proto(proto))
