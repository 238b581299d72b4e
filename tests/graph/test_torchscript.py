"""TorchScript with trust: converted where torch can, and refused with three ways out where it cannot."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from qopt.errors import CorruptModelError, UnsafeModelError, UnsupportedModelError, UsageError
from qopt.graph import load
from qopt.graph.load import load_model
from qopt.graph.model import NOTES
from qopt.graph.prepare import prepare
from qopt.graph.to_onnx import quiet

SHAPE = (1, 4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


class Looped(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x * 1.5
        logits: Tensor = self.fc(self.features(x))
        return logits


class Branched(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if bool(x.sum() > 0):
            features = features * 2
        logits: Tensor = self.fc(features)
        return logits


Save = Callable[[nn.Module], Any]


def traced(module: nn.Module) -> Any:
    return torch.jit.trace(module.eval(), torch.rand(1, *SHAPE))  # type: ignore[no-untyped-call]


def scripted(module: nn.Module) -> Any:
    return torch.jit.script(module.eval())


def saved(module: nn.Module, way: Save, folder: Path) -> Path:
    buffer, path = io.BytesIO(), folder / "model.pt"
    with quiet():
        torch.jit.save(way(module), buffer)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(("module", "way"), [(Net(), traced), (Net(), scripted), (Looped(), traced)])
def test_what_torch_converts_computes_the_same(module: nn.Module, way: Save, tmp_path: Path) -> None:
    model = load_model(saved(module, way, tmp_path), trust=True, input_shape=SHAPE)
    assert model.meta[NOTES] == ["the batch axis is fixed at 1: the file is TorchScript"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, module.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
    prepared = prepare(model)
    assert prepared.image
    assert [layer.weights for layer in prepared.layers] == [36, 48]


@pytest.mark.parametrize("module", [Looped(), Branched()])
def test_what_torch_does_not_convert_is_refused_with_three_ways_out(module: nn.Module, tmp_path: Path) -> None:
    path = saved(module, scripted, tmp_path)
    with pytest.raises(UnsupportedModelError, match="torch cannot convert this TorchScript archive") as caught:
        load_model(path, trust=True, input_shape=SHAPE)
    text = str(caught.value)
    for way in ("torch.export.save", "--model package.module:factory", "export it to ONNX"):
        assert way in text
    assert "--trust" not in text
    assert "\n" not in text


def test_an_image_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="torch cannot convert"):
        load_model(saved(Net(), scripted, tmp_path), trust=True, input_shape=(3, 9, 9))


def test_a_conversion_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter is torch's experiment: its result is compared, here with a comparison that finds a difference."""
    path = saved(Net(), traced, tmp_path)
    monkeypatch.setattr(load, "_same", lambda got, expected: torch.equal(got, expected + 1))
    with pytest.raises(UnsupportedModelError, match="a program that computes something else"):
        load_model(path, trust=True, input_shape=SHAPE)


TENSORS = [
    (torch.ones(2), torch.ones(2), True),
    (torch.ones(2), torch.ones(2) * 1.00005, True),
    (torch.ones(2), torch.ones(2) * 1.01, False),
    ({"a": torch.ones(2)}, (torch.ones(2),), True),
    ((torch.ones(2), torch.zeros(3)), (torch.ones(2), torch.ones(3)), False),
]


@pytest.mark.parametrize(("got", "expected", "same"), TENSORS)
def test_outputs_are_compared_tensor_by_tensor(got: object, expected: object, same: bool) -> None:
    assert load._same(got, expected) is same


def test_it_needs_trust_a_shape_and_whole_bytes(tmp_path: Path) -> None:
    path = saved(Net(), traced, tmp_path)
    with pytest.raises(UnsafeModelError, match="a TorchScript archive: loading it runs code"):
        load_model(path, input_shape=SHAPE)
    with pytest.raises(UsageError, match="--input-shape"):
        load_model(path, trust=True)
    with pytest.raises(UsageError, match="a factory is only for state dicts"):
        load_model(path, trust=True, input_shape=SHAPE, factory="a:b")


def test_damaged_code_is_corrupt(tmp_path: Path) -> None:
    path = saved(Net(), traced, tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"klass :" if name.endswith(".py") else content)
    with pytest.raises(CorruptModelError, match="torch cannot read the TorchScript archive"):
        load_model(path, trust=True, input_shape=SHAPE)
