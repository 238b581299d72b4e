"""Models in two files, as those over 2 GB must be: here from a few hundred bytes on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qopt.errors import UnsafeModelError
from qopt.files import write_folder
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.runtime.external import ALIGNED, DATA, LARGEST_FILE, MODEL, SMALLEST_TENSOR, loadable, to_files
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import Runner, open_session, to_bytes

X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)


def network(widths: tuple[int, ...] = (64, 40, 10), four_bits: bool = False) -> ir.Model:
    random = np.random.default_rng(0)
    nodes: list[Any] = []
    constants: list[Any] = []
    for i, (rows, columns) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        constants.append(numpy_helper.from_array(random.standard_normal((rows, columns)).astype(np.float32), f"w{i}"))
        constants.append(numpy_helper.from_array(random.standard_normal(columns).astype(np.float32), f"b{i}"))
        name = "logits" if last else f"h{i}"
        nodes.append(helper.make_node("Gemm", ["x" if not i else f"r{i - 1}", f"w{i}", f"b{i}"], [name], name=f"n{i}"))
        if not last:
            nodes.append(helper.make_node("Relu", [name], [f"r{i}"], name=f"relu{i}"))
    if four_bits:
        codes = ir.tensor(random.integers(-8, 8, (64, 40)).astype(ml_dtypes.int4), name="w0")
        constants[0] = ir.serde.serialize_tensor(codes)
        nodes.insert(0, helper.make_node("Cast", ["w0"], ["floats"], to=TensorProto.FLOAT, name="cast"))
        nodes[1].input[1] = "floats"
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", widths[0]])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", widths[-1]])
    graph = helper.make_graph(nodes, "g", [image], [logits], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.serde.deserialize_model(proto)


def logits(source: bytes | Path) -> np.ndarray:
    return Runner(source)(X)


def test_a_small_model_is_one_file() -> None:
    model = network()
    files = to_files(model)
    assert files == {MODEL: to_bytes(model)}
    with loadable(files) as source:
        assert source == files[MODEL]
    assert LARGEST_FILE < 2**31


@pytest.mark.parametrize("four_bits", [False, True])
def test_two_files_compute_the_same(four_bits: bool, tmp_path: Path) -> None:
    model = network(four_bits=four_bits)
    before = to_bytes(model)
    files = to_files(model, largest=500)
    assert list(files) == [MODEL, DATA]
    assert files == to_files(model, largest=500)
    assert to_bytes(model) == before
    with loadable(files) as source:
        assert isinstance(source, Path)
        onnx.checker.check_model(source, full_check=True)
        session = open_session(source)
        assert count_kernels(source) == count_kernels(before)
    assert not source.exists()
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], logits(before))
    write_folder(tmp_path / "out", files)
    np.testing.assert_array_equal(logits(tmp_path / "out" / MODEL), logits(before))


def test_only_large_tensors_lie_outside_each_on_its_line() -> None:
    proto = onnx.load_model_from_string(to_files(network(), largest=0)[MODEL])
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}
    inside = [t for t in proto.graph.initializer if not t.external_data]
    assert set(outside) == {"w0", "w1"}
    assert all(len(t.raw_data) < SMALLEST_TENSOR for t in inside)
    assert all(int(entry["offset"]) % ALIGNED == 0 for entry in outside.values())
    assert {entry["location"] for entry in outside.values()} == {DATA}
    assert [int(entry["length"]) for entry in outside.values()] == [64 * 40 * 4, 40 * 10 * 4]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 20000))
def test_every_tensor_comes_back(hidden: list[int], largest: int) -> None:
    model = network((64, *hidden, 10))
    files = to_files(model, largest)
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    assert (DATA in files) == (stored > largest)
    with loadable(files) as source:
        loaded = onnx.load(source) if isinstance(source, Path) else onnx.load_model_from_string(source)
    for tensor in loaded.graph.initializer:
        value = model.graph.initializers[tensor.name].const_value
        assert value is not None
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), value.numpy())


def test_what_was_written_is_loaded_prepared_and_written_again(tmp_path: Path) -> None:
    model = network()
    write_folder(tmp_path, to_files(model, largest=500))
    loaded = load_model(tmp_path / MODEL)
    prepared = prepare(loaded)
    assert len(prepared.layers) == 2
    np.testing.assert_allclose(logits(to_bytes(prepared.model)), logits(to_bytes(model)), rtol=1e-5, atol=1e-5)
    again = to_files(prepared.model, largest=500)
    with loadable(again) as source:
        np.testing.assert_allclose(logits(source), logits(to_bytes(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_constant_node_may_lie_outside_too(tmp_path: Path, four_bits: bool) -> None:
    proto = onnx.load_model_from_string(to_bytes(network(four_bits=four_bits)))
    weight = proto.graph.initializer.pop(0)
    proto.graph.node.insert(0, helper.make_node("Constant", [], [weight.name], name="constant", value=weight))
    expected = logits(proto.SerializeToString())
    tensor = proto.graph.node[0].attribute[0].t
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / MODEL).write_bytes(proto.SerializeToString())
    np.testing.assert_array_equal(logits(to_bytes(load_model(tmp_path / MODEL))), expected)


@pytest.mark.parametrize("location", ["../model.onnx.data", "sub/../../model.onnx.data", "/etc/hostname"])
def test_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    files = to_files(network(), largest=500)
    proto = onnx.load_model_from_string(files[MODEL])
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    (tmp_path / DATA).write_bytes(files[DATA])
    (inner / MODEL).write_bytes(proto.SerializeToString())
    with pytest.raises(UnsafeModelError, match="must lie in the model's folder"):
        load_model(inner / MODEL)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    files = to_files(network(), largest=500)
    (tmp_path / "secret").write_bytes(files[DATA])
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / DATA).symlink_to(tmp_path / "secret")
    (inner / MODEL).write_bytes(files[MODEL])
    with pytest.raises(UnsafeModelError, match="must lie in the model's folder"):
        load_model(inner / MODEL)
