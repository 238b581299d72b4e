"""Every kind of file through the one entry point: told apart by content, loaded or refused by name."""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import random
import shutil
import stat
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.export import Dim

from qopt.errors import CorruptModelError, QoptError, UnsafeModelError, UsageError
from qopt.graph.formats import Format, identify, unsafe_globals
from qopt.graph.load import load_model
from qopt.graph.model import NOTES
from qopt.graph.to_onnx import quiet

REPOSITORY = Path(__file__).resolve().parents[2]
NET_SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.fc = nn.Linear(8, 3)
    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))
"""


def network() -> nn.Module:
    """``load_nets.Net`` of the current directory, with fixed weights."""
    torch.manual_seed(5)
    net: nn.Module = importlib.import_module("load_nets").Net()
    return net.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "load_nets.py").write_text(NET_SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "load_nets", raising=False)
    return tmp_path


def saved(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def exported() -> bytes:
    program = torch.export.export(network(), (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 1, 4, 4)), buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def onnx_proto() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(48, dtype=np.float32).reshape(16, 3), "w")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "g", [image], [out], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def weights() -> dict[str, torch.Tensor]:
    return dict(network().state_dict())


MAKE: dict[str, tuple[Callable[[], bytes], Format]] = {
    "onnx": (lambda: onnx_proto().SerializeToString(), Format.ONNX),
    "export archive": (exported, Format.EXPORT_ARCHIVE),
    "torchscript": (scripted, Format.TORCHSCRIPT),
    "state dict": (lambda: saved(weights()), Format.STATE_DICT),
    "checkpoint": (lambda: saved({"state_dict": weights(), "epoch": 1}), Format.STATE_DICT),
    "pickled module": (lambda: saved(network()), Format.PICKLED_MODULE),
    "legacy state dict": (lambda: saved(weights(), legacy=True), Format.LEGACY_PICKLE),
    "legacy module": (lambda: saved(network(), legacy=True), Format.LEGACY_PICKLE),
    "plain pickle": (lambda: pickle.dumps({"a": 1}), Format.LEGACY_PICKLE),
    "safetensors": (lambda: safetensors.torch.save(weights()), Format.SAFETENSORS),
}


@pytest.mark.parametrize("name", MAKE)
def test_formats_are_told_by_content_whatever_the_suffix(name: str, folder: Path) -> None:
    make, kind = MAKE[name]
    for suffix in ("model.pt", "model.onnx", "model"):
        (folder / suffix).write_bytes(make())
        assert identify(folder / suffix) is kind


@pytest.mark.parametrize("name", ["export archive", "state dict", "legacy state dict", "safetensors"])
def test_safe_files_load_and_match_eager(name: str, folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(MAKE[name][0]())
    factory = None if name == "export archive" else "load_nets:Net"
    agree(load_model(path, factory=factory, input_shape=(1, 4, 4)), network(), (1, 4, 4), (1, 3))


def agree(model: ir.Model, reference: Callable[[Any], Any], shape: tuple[int, ...], batches: tuple[int, ...]) -> None:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in batches:
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            want = reference(x).numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("name", ["pickled module", "legacy module", "torchscript", "plain pickle"])
def test_code_bearing_files_need_trust(name: str, folder: Path) -> None:
    path = folder / "model.pt"
    path.write_bytes(MAKE[name][0]())
    with pytest.raises(UnsafeModelError) as caught:
        load_model(path, input_shape=(1, 4, 4))
    text = str(caught.value)
    for word in (str(path), "torch.export.save", "--model package.module:factory", "ONNX", "--trust"):
        assert word in text
    if name == "pickled module":
        assert unsafe_globals(path)[0] in text
        assert "load_nets.Net" in text


@pytest.mark.parametrize("name", ["pickled module", "legacy module", "torchscript"])
def test_trusted_files_load_and_match_eager(name: str, folder: Path) -> None:
    path = folder / "model.pt"
    path.write_bytes(MAKE[name][0]())
    model = load_model(path, trust=True, input_shape=(1, 4, 4))
    agree(model, network(), (1, 4, 4), (1,) if name == "torchscript" else (1, 3))
    assert bool(model.meta[NOTES]) is (name == "torchscript")


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("factory", [None, "load_nets:Net"])
def test_hostile_pickles_run_only_with_trust(legacy: bool, factory: str | None, folder: Path) -> None:
    marker, path = folder / "marker", folder / "model.pt"
    path.write_bytes(saved({"state_dict": {"fc.weight": Touch(marker)}}, legacy=legacy))
    with pytest.raises(UnsafeModelError):
        load_model(path, factory=factory, input_shape=(1, 4, 4))
    assert not marker.exists()
    with pytest.raises(QoptError):
        load_model(path, factory=factory, trust=True)
    assert marker.exists()


def pickled_elsewhere() -> bytes:
    return saved(network()).replace(b"load_nets", b"gone_nets")


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


WRONG_FILES: dict[str, tuple[Callable[[], bytes], dict[str, Any], type[QoptError], list[str]]] = {
    "empty": (lambda: b"", {}, CorruptModelError, ["is empty"]),
    "one byte": (lambda: b"\x08", {}, CorruptModelError, ["not a model file"]),
    "text": (lambda: b"hello world, this is text", {}, CorruptModelError, ["not a model file", "b'hello wo'"]),
    "html": (lambda: b"<!DOCTYPE html><html>", {}, CorruptModelError, ["an HTML page"]),
    "lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", {}, CorruptModelError, ["Git LFS"]),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), {}, CorruptModelError, ["Keras"]),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(99), {}, CorruptModelError, ["TensorFlow Lite"]),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(99), {}, CorruptModelError, ["gzip"]),
    "npz": (npz, {}, CorruptModelError, ["holds no model", "a.npy"]),
    "cut zip": (lambda: truncated(saved(weights())), {}, CorruptModelError, ["damaged or cut short"]),
    "cut archive": (lambda: truncated(exported()), {}, CorruptModelError, ["damaged or cut short"]),
    "cut onnx": (lambda: truncated(onnx_proto().SerializeToString()), {}, CorruptModelError, ["ONNX file is damaged"]),
    "cut safetensors": (
        lambda: truncated(safetensors.torch.save(weights())), {"factory": "load_nets:Net"}, CorruptModelError,
        ["safetensors file is damaged"],
    ),
    "safetensors header": (
        lambda: struct.pack("<Q", 3) + b"{x}", {"factory": "load_nets:Net"}, CorruptModelError, ["safetensors"],
    ),
    "zeros": (lambda: bytes(100), {}, CorruptModelError, ["not a model file"]),
    "no factory": (lambda: saved(weights()), {}, UsageError, ["no network", "--model package.module:factory"]),
    "no factory, safetensors": (lambda: safetensors.torch.save(weights()), {}, UsageError, ["--model"]),
    "no shape": (lambda: saved(weights()), {"factory": "load_nets:Net"}, UsageError, ["--input-shape C,H,W"]),
    "no shape, script": (scripted, {"trust": True}, UsageError, ["--input-shape C,H,W"]),
    "bad shape": (exported, {"input_shape": (0,)}, UsageError, ["positive integers", "got 0"]),
    "factory for onnx": (
        lambda: onnx_proto().SerializeToString(), {"factory": "load_nets:Net"}, UsageError, ["only for state dicts"],
    ),
    "factory for an archive": (exported, {"factory": "load_nets:Net"}, UsageError, ["leave --model out"]),
    "factory for a module": (
        lambda: saved(network()), {"factory": "load_nets:Net", "trust": True}, UsageError, ["whole module"],
    ),
    "wrong weights": (
        lambda: saved({"fc.weigth": torch.zeros(3, 8)}), {"factory": "load_nets:Net"}, UsageError,
        ["unexpected fc.weigth", "did you mean 'fc.weight'"],
    ),
    "a tensor": (lambda: saved(torch.zeros(3)), {"factory": "load_nets:Net"}, CorruptModelError, ["no state dict"]),
    "class gone": (pickled_elsewhere, {"trust": True}, UsageError, ["gone_nets", "cannot be imported"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named_in_one_line(name: str, folder: Path) -> None:
    make, options, kind, words = WRONG_FILES[name]
    path = folder / "model.bin"
    path.write_bytes(make())
    with pytest.raises(QoptError) as caught:
        load_model(path, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert len(text) < 900


def test_wrong_paths_are_usage_errors(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(onnx_proto().SerializeToString())
    os.mkfifo(folder / "pipe")
    table = {
        folder / "modle.onnx": "did you mean 'model.onnx'",
        folder / "no" / "model.onnx": "no such model file",
        folder: "is a folder",
        folder / "pipe": "not a regular file",
        folder / ("x" * 300): "cannot read",
        Path("nul\0byte"): "cannot read",
    }
    for path, words in table.items():
        with pytest.raises(UsageError) as caught:
            load_model(path)
        assert words in str(caught.value)
        assert caught.value.exit_code == 2


def test_an_unreadable_file_is_a_usage_error(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(b"\x08\x0a")
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.chmod(stat.S_IRUSR)
        return  # root reads everything
    with pytest.raises(UsageError, match="Permission denied"):
        load_model(path)


@functools.cache
def sample(name: str) -> bytes:
    return MAKE[name][0]()


@pytest.mark.parametrize("name", ["onnx", "state dict", "safetensors"])
def test_byte_mutants_end_in_an_error_of_ours_or_load(name: str, folder: Path) -> None:
    chance = random.Random(len(name))
    data, path, endings = sample(name), folder / "model.bin", set()
    for _ in range(50):
        mutant = bytearray(data)
        for _ in range(chance.choice([1, 3])):
            mutant[chance.randrange(min(len(mutant), 2000))] = chance.randrange(256)
        path.write_bytes(mutant)
        try:
            load_model(path, factory=None)
            endings.add("loaded")
        except QoptError as error:
            endings.add(type(error).__name__)
    assert "CorruptModelError" in endings
    assert endings <= {"loaded", "CorruptModelError", "UsageError", "UnsafeModelError"}


def test_the_embedded_example_matches_its_own_program(tmp_path: Path) -> None:
    source = REPOSITORY / "examples" / "fashion_resnet.pt"
    path = tmp_path / "anything.dat"
    shutil.copy(source, path)
    with quiet():
        program = torch.export.load(io.BytesIO(source.read_bytes())).module()
    images = np.load(REPOSITORY / "examples" / "fashion.npz")["x_test"][:64].astype(np.float32) / 255
    images = images.reshape(64, 1, 28, 28)
    model = load_model(path)
    agree(model, program, (1, 28, 28), (1, 3))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = program(torch.from_numpy(images)).numpy()
    (got,) = session.run(None, {"x": images})
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert len(set(got.argmax(1).tolist())) >= 8
    assert [value.name for value in model.graph.outputs] == ["logits"]


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "model.pt").write_bytes(exported())
    (folder / "weights.pt").write_bytes(saved(weights()))
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder / "model.pt")
        load_model(folder / "weights.pt", factory="load_nets:Net", input_shape=(1, 4, 4))
    assert capfd.readouterr() == ("", "")


@pytest.mark.assets
def test_public_networks_load_by_their_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("QOPT_ASSETS"):
        pytest.skip("QOPT_ASSETS is not set")
    assets = Path(os.environ["QOPT_ASSETS"])
    monkeypatch.chdir(assets)
    monkeypatch.syspath_prepend(assets)
    shapes = {"cifar10": (3, 32, 32), "mnist": (1, 28, 28), "fashion": (1, 28, 28)}
    networks = importlib.import_module("networks")
    for name in networks.NAMES:
        shape = next(shape for data, shape in shapes.items() if data in name)
        path = assets / "models" / f"{name}.pt"
        model = load_model(path, factory=f"networks:{name}", input_shape=shape)
        agree(model, networks.load(name), shape, (1, 3))
    for path in sorted((assets / "onnx").glob("*.onnx")):
        assert load_model(path).graph.outputs
