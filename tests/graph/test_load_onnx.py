"""ONNX files on the way in: external data stay in the model's folder, and what breaks the standard is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qopt.errors import CorruptModelError, QoptError, UnsafeModelError
from qopt.graph.load import load_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def onnx_proto() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(48, dtype=np.float32).reshape(16, 3), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "g", [image], [out], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def external(folder: Path, **entry: str) -> Path:
    """An ONNX file whose weight lies in another file, 192 bytes unless ``entry`` says otherwise."""
    proto = onnx_proto()
    tensor = proto.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": "0", "length": "192", **entry}.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("entry", [{}, {"length": ""}, {"offset": "", "length": ""}])
def test_external_data_beside_the_model_load(folder: Path, entry: dict[str, str]) -> None:
    model = load_model(external(folder, **entry).relative_to(folder))
    value = model.graph.initializers["w"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy().ravel(), np.arange(48, dtype=np.float32))


EXTERNAL: list[tuple[dict[str, str], type[QoptError], str]] = [
    ({"location": "../secret.bin"}, UnsafeModelError, "must lie in the model's folder"),
    ({"location": "/etc/passwd"}, UnsafeModelError, "must lie in the model's folder"),
    ({"location": "link.bin"}, UnsafeModelError, "must lie in the model's folder"),
    ({"location": "hard.bin"}, UnsafeModelError, "hard link"),
    ({"location": "sub/../../secret.bin"}, UnsafeModelError, "must lie in the model's folder"),
    ({"location": "gone.bin"}, CorruptModelError, "is missing"),
    ({"location": "sub"}, CorruptModelError, "is missing"),
    ({"length": "191"}, CorruptModelError, "do not fit"),
    ({"length": "400"}, CorruptModelError, "do not fit"),
    ({"offset": "1"}, CorruptModelError, "do not fit"),
    ({"offset": "-4"}, CorruptModelError, "not a valid ONNX model"),
    ({"offset": "9" * 30}, CorruptModelError, "do not fit"),
    ({"offset": "zero"}, CorruptModelError, "not a valid ONNX model"),
]


@pytest.mark.parametrize(("entry", "kind", "words"), EXTERNAL)
def test_external_data_elsewhere_or_short_are_refused(
    folder: Path, entry: dict[str, str], kind: type[QoptError], words: str
) -> None:
    inside = folder / "inside"
    (inside / "sub").mkdir(parents=True)
    (folder / "secret.bin").write_bytes(bytes(192))
    (inside / "link.bin").symlink_to(folder / "secret.bin")
    (inside / "hard.bin").hardlink_to(folder / "secret.bin")
    with pytest.raises(QoptError) as caught:
        load_model(external(inside, **entry))
    assert type(caught.value) is kind, str(caught.value)
    assert words in str(caught.value)


def spoiled(change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    proto = onnx_proto()
    change(proto)
    return proto


def constant_from(location: str) -> Callable[[onnx.ModelProto], Any]:
    """Append a Constant node whose tensor is external."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[48], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))

    return change


SPOILED: dict[str, tuple[Callable[[onnx.ModelProto], Any], type[QoptError], str]] = {
    "raw too short": (lambda p: setattr(p.graph.initializer[0], "raw_data", b"12"), CorruptModelError, "w"),
    "raw too long": (lambda p: setattr(p.graph.initializer[0], "raw_data", bytes(200)), CorruptModelError, "got 200"),
    "negative shape": (lambda p: p.graph.initializer[0].dims.__setitem__(0, -1), CorruptModelError, "model"),
    "unknown dtype": (lambda p: setattr(p.graph.initializer[0], "data_type", 99), CorruptModelError, "not a valid"),
    "unknown operator": (lambda p: setattr(p.graph.node[0], "op_type", "Flaten"), CorruptModelError, "Flaten"),
    "dangling input": (lambda p: p.graph.node[1].input.__setitem__(0, "ghost"), CorruptModelError, "ghost"),
    "no opset": (lambda p: p.ClearField("opset_import"), CorruptModelError, "not a valid"),
    "external constant": (constant_from("../../etc/passwd"), UnsafeModelError, "must lie in the model's folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_invalid_onnx_is_refused(name: str, folder: Path) -> None:
    change, kind, words = SPOILED[name]
    path = folder / "model.onnx"
    path.write_bytes(spoiled(change).SerializeToString())
    with pytest.raises(QoptError) as caught:
        load_model(path)
    assert type(caught.value) is kind, str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_onnx_enters_as_it_is(folder: Path) -> None:
    path = folder / "model.bin"
    proto = onnx_proto()
    proto.metadata_props.add(key="author", value="somebody")
    path.write_bytes(proto.SerializeToString())
    assert ir.to_proto(load_model(path)).SerializeToString(deterministic=True) == ir.to_proto(
        ir.from_proto(proto)
    ).SerializeToString(deterministic=True)
