from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper

import qopt.graph.prepare as module
from qopt.errors import QoptError, VerificationError
from qopt.graph.compare import TOLERANCE, Runner, difference, random_images
from qopt.graph.fold_batchnorm import fold_batchnorm
from qopt.graph.opset import convert_opset
from qopt.graph.prepare import prepare

Run = Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]
Build = Callable[..., ir.Model]


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _same(run: Run, model: ir.Model, prepared_model: ir.Model, count: int = 2) -> bool:
    images = random_images((3, 8, 8), count, seed=3)
    return difference(run(prepared_model, images), run(model, images)) <= TOLERANCE


@pytest.mark.parametrize("opset", [9, 11, 13, 15, 18, 20, 21, 22])
def test_a_small_cnn_at_any_opset(opset: int, small_cnn: Build, run: Run) -> None:
    model = small_cnn(opset=opset)
    prepared = prepare(model)
    assert prepared.model.opset_imports[""] == max(opset, 21)
    assert (f"opset {opset} converted to 21" in prepared.notes) == (opset < 21)
    assert "batch norm folded into 1 layer" in prepared.notes
    assert _ops(prepared.model) == ["Conv", "Relu", "Flatten", "Gemm"]
    assert (prepared.input, prepared.input_shape, prepared.classes, prepared.batch) == ("x", (3, 8, 8), 10, None)
    assert _same(run, model, prepared.model)


def test_names_and_metadata_survive(small_cnn: Build) -> None:
    model = small_cnn(opset=13)
    model.metadata_props["author"] = "me"
    model.doc_string = "a network"
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'conv']"
    prepared = prepare(model)
    assert prepared.model.metadata_props["author"] == "me"
    assert prepared.model.doc_string == "a network"
    assert prepared.model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'conv']"
    assert set(prepared.model.graph.initializers) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert prepared.output == model.graph.outputs[0].name


@pytest.mark.parametrize(
    ("batch", "note"), [("n", None), (1, "batch axis made dynamic"), (4, "batch axis made dynamic")]
)
def test_the_batch_axis_is_freed(batch: int | str, note: str | None, small_cnn: Build) -> None:
    prepared = prepare(small_cnn(batch=batch))
    assert prepared.batch is None
    assert ("batch axis made dynamic" in prepared.notes) == (note is not None)
    shape = prepared.model.graph.inputs[0].shape
    assert shape is not None
    assert str(shape[0]) == ("n" if batch == "n" else "batch")
    assert Runner(prepared.model)(random_images((3, 8, 8), 5)).shape == (5, 10)


@pytest.mark.parametrize("target", [[1, 192], [1, -1], [-1, 192], [0, -1]])
def test_reshape_targets_are_repaired(target: list[int], graph: Any, run: Run) -> None:
    g = graph(batch=1)
    model = g.model(g.op("Gemm", g.op("Reshape", "x", g.ints(*target)), g.random(192, 4), g.random(4)))
    prepared = prepare(model)
    assert prepared.batch is None
    images = random_images((3, 8, 8), 3)
    single = np.concatenate([run(model, image[None]) for image in images])
    assert difference(run(prepared.model, images), single) <= TOLERANCE


def test_a_shared_reshape_target_is_repaired_only_where_it_holds_the_batch(graph: Any) -> None:
    g = graph(batch=1)
    target = g.ints(1, 192)
    weight = g.op("Reshape", g.random(192), target)  # a row of weights, of any batch size
    model = g.model(g.op("Mul", g.op("Reshape", "x", target), weight))
    assert prepare(model).batch is None


def _mixes_batch(g: Any) -> str:
    mean = g.op("ReduceMean", "x", g.ints(0), keepdims=1)
    return str(g.op("Flatten", g.op("Sub", "x", mean)))


def _class_token(g: Any) -> str:
    tokens = g.op("Reshape", "x", g.ints(0, 3, 64))
    return str(g.op("Flatten", g.op("Concat", g.random(2, 1, 64), tokens, axis=1)))


@pytest.mark.parametrize("build", [_mixes_batch, _class_token])
def test_a_batch_axis_that_cannot_be_freed_stays(build: Callable[[Any], str], graph: Any, run: Run) -> None:
    g = graph(batch=2)
    model = g.model(build(g))
    prepared = prepare(model)
    assert prepared.batch == 2
    assert any(note.startswith("batch axis fixed to 2") for note in prepared.notes)
    assert _same(run, model, prepared.model)


def test_a_graph_that_lies_about_its_batch_axis_is_bound_to_what_works(graph: Any) -> None:
    g = graph(batch="n")
    prepared = prepare(g.model(g.op("Gemm", g.op("Reshape", "x", g.ints(1, 192)), g.random(192, 4))))
    assert prepared.batch == 1


def test_constants_identities_and_dropout_go(graph: Any, run: Run) -> None:
    g = graph()
    scale = g.op("Add", g.constant(1.0), g.op("Constant", value_float=0.5))
    data = g.op("Dropout", g.op("Identity", g.op("Mul", "x", scale)), g.constant(0.3))
    g.op("Exp", data)  # dead
    weight = g.op("Transpose", g.random(4, 192, name="head.weight"), perm=[1, 0])
    model = g.model(g.op("Identity", g.op("MatMul", g.op("Flatten", data), weight)))
    prepared = prepare(model)
    assert _ops(prepared.model) == ["Mul", "Flatten", "MatMul"]
    assert prepared.output == model.graph.outputs[0].name
    assert [layer.name for layer in prepared.layers] == ["head.weight"]
    assert _same(run, model, prepared.model)


def test_a_huge_constant_is_not_computed(graph: Any) -> None:
    g = graph()
    huge = g.op("Expand", g.constant(0.0), g.ints(2**20, 2**20))
    model = g.model(g.op("Flatten", g.op("Add", "x", g.op("ReduceMax", huge, keepdims=0))))
    with pytest.raises(QoptError, match="too large"):
        prepare(model)


def test_weights_left_behind_arithmetic_become_layers(graph: Any) -> None:
    g = graph()
    weight = g.op("Mul", g.random(2000, 192), g.positive(2000, 1))  # larger than any other constant may become
    prepared = prepare(g.model(g.op("Gemm", g.op("Flatten", "x"), weight, transB=1)))
    assert [layer.shape for layer in prepared.layers] == [(2000, 192)]


@pytest.mark.parametrize("names", [["same", "same", "same"], ["", "", ""], ["a", "", "a"]])
def test_node_names_become_unique(names: list[str], graph: Any) -> None:
    g = graph()
    data = "x"
    for name in names:
        data = g.op("Relu", data, name=name)
    prepared = prepare(g.model(g.op("Flatten", data, name="a_2")))
    found = [node.name for node in prepared.model.graph]
    assert all(found)
    assert len(set(found)) == 4
    assert "a_2" in found


def test_further_outputs_are_dropped_with_a_note(graph: Any) -> None:
    g = graph()
    hidden = g.op("Relu", "x")
    logits = g.op("Flatten", hidden)
    prepared = prepare(g.model(logits, hidden))
    assert [value.name for value in prepared.model.graph.outputs] == [logits]
    assert f"{logits!r} taken as the logits, outputs {hidden!r} dropped" in prepared.notes


def test_a_final_softmax_is_pointed_out(graph: Any) -> None:
    g = graph()
    prepared = prepare(g.model(g.op("Softmax", g.op("Flatten", "x"))))
    assert any("attacks see probabilities" in note for note in prepared.notes)


def test_functions_are_inlined(graph: Any) -> None:
    g = graph()
    g.nodes.append(helper.make_node("double", ["x"], ["twice"], domain="mine"))
    proto = g.proto(g.op("Flatten", "twice"))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    proto.functions.append(helper.make_function("mine", "double", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    assert _ops(prepare(ir.serde.deserialize_model(proto)).model) == ["Add", "Flatten"]


def test_initializers_that_are_listed_as_inputs(graph: Any, run: Run) -> None:
    g = graph(opset=9)
    proto = g.proto(g.op("Gemm", g.op("Flatten", "x"), g.random(4, 192, name="w"), g.random(4), transB=1))
    proto.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 192]))
    prepared = prepare(ir.serde.deserialize_model(proto))
    assert [value.name for value in prepared.model.graph.inputs] == ["x"]
    assert [layer.name for layer in prepared.layers] == ["w"]


def test_digest_ignores_what_does_not_count(small_cnn: Build) -> None:
    reference = prepare(small_cnn()).digest
    other = small_cnn()
    other.doc_string = "other"
    other.graph.name = "other"
    for node in other.graph:
        node.name = f"{node.name}_renamed"
    other.graph.outputs[0].name = "logits"
    names = list(other.graph.initializers)
    for name in names:  # the same initializers in another order
        other.graph.initializers[name] = other.graph.initializers.pop(name)
    assert prepare(other).digest == reference
    assert prepare(small_cnn(opset=13)).digest == reference
    assert prepare(small_cnn(batch=1)).digest == reference


def _nudge_weight(model: ir.Model) -> None:
    value = model.graph.initializers["fc.weight"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0] += 0.1
    value.const_value = ir.tensor(array, name="fc.weight")


def _rename_weight(model: ir.Model) -> None:
    value = model.graph.initializers.pop("fc.weight")
    value.name = "head.weight"
    model.graph.register_initializer(value)


def _change_attribute(model: ir.Model) -> None:
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.op_type = "Sigmoid"


@pytest.mark.parametrize("change", [_nudge_weight, _rename_weight, _change_attribute])
def test_digest_sees_every_change(change: Callable[[ir.Model], None], small_cnn: Build) -> None:
    other = small_cnn()
    change(other)
    assert prepare(other).digest != prepare(small_cnn()).digest


def test_a_wrong_batch_norm_fold_is_caught_and_undone(
    small_cnn: Build, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    honest = fold_batchnorm

    def wrong(model: ir.Model) -> int:
        folded = honest(model)
        _nudge_weight(model)
        return folded

    monkeypatch.setattr(module, "fold_batchnorm", wrong)
    model = small_cnn()
    prepared = prepare(model)
    assert "1 batch norm left in place" in prepared.notes
    assert "BatchNormalization" in _ops(prepared.model)
    assert _same(run, model, prepared.model)


def test_a_wrong_cleaning_is_never_returned(small_cnn: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fold_constants", _nudge_weight)
    with pytest.raises(VerificationError, match="computes something else"):
        prepare(small_cnn())


def test_a_wrong_conversion_is_refused(small_cnn: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = convert_opset

    def wrong(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
        converted, note = honest(model)
        _nudge_weight(converted)
        return converted, note

    monkeypatch.setattr(module, "convert_opset", wrong)
    with pytest.raises(QoptError, match="after the conversion to opset 21"):
        prepare(small_cnn(opset=13))
