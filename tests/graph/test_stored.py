"""Weights that stay in their file: the same graph and numbers as a copy has, without the copy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from qopt.errors import CorruptModelError, UsageError
from qopt.graph import load, stored
from qopt.graph.factory import Built, fill
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.stored import StoredTensor, TensorFile, outside, release, turn_stored_matrices
from qopt.quantize import WeightOnly
from qopt.spec import WeightSpec

NETS = """
import torch
from torch import nn

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(300, 64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.head = nn.Linear(64, 300, bias=False)
        self.head.weight = self.words.weight
    def forward(self, ids):
        x = self.words(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))

def text():
    return Text(), torch.zeros(2, 4, dtype=torch.int64)

def images():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 40))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stored_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stored_nets", raising=False)
    return tmp_path


def saved(module: nn.Module, path: Path, **more: Tensor) -> Path:
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in more}
    safetensors.torch.save_file({**{k: v.clone() for k, v in state.items()}, **more}, path)
    return path


def file_of(name: str, folder: Path) -> Path:
    import stored_nets  # type: ignore[import-not-found]

    made = getattr(stored_nets, name)()
    return saved(made[0] if isinstance(made, tuple) else made, folder / "model.safetensors")


SHAPES: dict[str, tuple[int, ...] | None] = {"text": None, "images": (1, 8, 8)}


def loaded(name: str, path: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    monkeypatch.setattr(load, "SMALLEST_FILE", 0 if mapped else 1 << 40)
    return load_model(path, factory=f"stored_nets:{name}", input_shape=SHAPES[name])


def stored_names(model: ir.Model) -> set[str]:
    return {name for name, v in model.graph.initializers.items() if isinstance(v.const_value, StoredTensor)}


@pytest.mark.parametrize("name", SHAPES)
def test_mapped_and_copied_are_one_network(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(name, folder)
    mapped, copied = (loaded(name, path, way, monkeypatch) for way in (True, False))
    assert stored_names(mapped)
    assert not stored_names(copied)
    assert {k: v.const_value.numpy().tobytes() for k, v in mapped.graph.initializers.items() if v.const_value} == {
        k: v.const_value.numpy().tobytes() for k, v in copied.graph.initializers.items() if v.const_value
    }
    a, b = prepare(mapped), prepare(copied)
    assert (a.digest, a.notes, a.layers) == (b.digest, b.notes, b.layers)
    spec = WeightSpec.parse("int4")
    for layer in a.layers:
        ours, theirs = (WeightOnly(p).quantized_weight(layer, spec).dequantize() for p in (a, b))
        assert torch.equal(ours, theirs)


def test_prepared_matrices_are_still_views(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(loaded("text", file_of("text", folder), True, monkeypatch))
    held = {layer.initializer for layer in prepared.layers}
    assert held <= stored_names(prepared.model)
    turned = [prepared.model.graph.initializers[name].const_value for name in held]
    assert sum(isinstance(tensor, StoredTensor) and tensor.turned for tensor in turned) == 2


def test_the_file_is_never_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of("images", folder)
    before = path.read_bytes()
    model = loaded("images", path, True, monkeypatch)
    for name in stored_names(model):
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        tensor.numpy()[...] = 7
    assert path.read_bytes() == before


def test_views_hold_what_safetensors_reads(folder: Path) -> None:
    path, generator = folder / "t.safetensors", torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}
    others = {"half": torch.ones(4, dtype=torch.float16), "count": torch.arange(3), "none": torch.zeros(0, 2)}
    safetensors.torch.save_file({**tensors, **others}, path, metadata={"format": "pt"})
    file = TensorFile(path)
    for name, tensor in tensors.items():
        view = file.tensor(name)
        assert view is not None
        assert torch.equal(view, tensor)
        found = file.stored(view, "x")
        assert found is not None
        assert path.read_bytes()[found.offset : found.offset + found.nbytes] == tensor.numpy().tobytes()
        assert np.array_equal(found.transposed("y").numpy(), tensor.numpy().T) if tensor.ndim == 2 else True
        assert file.stored(view.clone(), "x") is None
    assert file.stored(file.tensor("a").T, "x") is None  # type: ignore[union-attr]
    assert [file.tensor(name) for name in others] == [None, None, None]


def test_pages_that_were_given_back_are_read_again(folder: Path) -> None:
    path = folder / "t.safetensors"
    safetensors.torch.save_file({"a": torch.arange(5000, dtype=torch.float32)}, path)
    file = TensorFile(path)
    view = file.tensor("a")
    assert view is not None
    assert float(view.sum()) == 4999 * 2500
    file.release()
    assert float(view.sum()) == 4999 * 2500


def test_matrices_are_turned_without_a_copy(folder: Path) -> None:
    path = folder / "t.safetensors"
    safetensors.torch.save_file({"w": torch.randn(6, 4)}, path)
    file = TensorFile(path)
    view = file.tensor("w")
    assert view is not None
    tensor = file.stored(view, "w")
    x, w = ir.val("x", ir.DataType.FLOAT, [2, 4]), ir.Value(name="w", const_value=tensor)
    turn = ir.node("Transpose", [w], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [x, turn.outputs[0]])
    turn.outputs[0].name, product.outputs[0].name = "w_t", "y"
    graph = ir.Graph([x], product.outputs, nodes=[turn, product], initializers=[w], opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    assert turn_stored_matrices(model) == 1
    assert [node.op_type for node in model.graph] == ["MatMul"]
    found = model.graph.initializers["w_t"].const_value
    assert isinstance(found, StoredTensor)
    assert np.shares_memory(found.numpy(), view.numpy())
    assert turn_stored_matrices(model) == 0


@pytest.mark.parametrize("name", SHAPES)
def test_a_runtime_reads_the_weights_from_the_file(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SMALLEST", 256)
    prepared = prepare(loaded(name, file_of(name, folder), True, monkeypatch))
    content, place = outside(prepared.model)
    whole = ir.serde.serialize_model(prepared.model).SerializeToString()
    assert place == folder.resolve()
    assert len(content) < len(whole) / 3
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(place))
    sessions = [ort.InferenceSession(c, options, providers=["CPUExecutionProvider"]) for c in (content, whole)]
    outputs = [session.run(None, dict(prepared.example)) for session in sessions]
    for got, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_file_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("images", file_of("images", folder), False, monkeypatch)
    content, place = outside(model)
    assert place is None
    assert content == ir.serde.serialize_model(model).SerializeToString()
    release(model)


@pytest.mark.parametrize("cut", [1, 40, 2000])
def test_a_file_cut_short_is_corrupt(cut: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of("images", folder)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CorruptModelError, match="the safetensors file is damaged"):
        loaded("images", path, True, monkeypatch)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(2))


def test_adopted_tensors_are_the_ones_given_and_ties_stay() -> None:
    net = Net()
    state = {name: torch.randn(tensor.shape) for name, tensor in net.state_dict().items()}
    state["second.weight"] = state["first.weight"]
    state["count"] = torch.ones(2, dtype=torch.float64)
    assert fill(Built(net, None), state, "file", adopt=True) == []
    assert net.first.weight is net.second.weight
    assert net.first.weight.data_ptr() == state["first.weight"].data_ptr()
    assert net.first.bias.data_ptr() == state["first.bias"].data_ptr()
    assert isinstance(net.count, Tensor)
    assert net.count.tolist() == [1, 1]
    assert net.count.dtype == torch.float32


def test_a_module_that_loads_in_its_own_way_is_left_to_it() -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *rest)

    net = nn.Sequential(Own(2, 2))
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.zeros(2)}
    fill(Built(net, None), state, "file", adopt=True)
    assert net.state_dict()["0.weight"].tolist() == [[2, 2], [2, 2]]
    assert state["0.weight"].tolist() == [[1, 1], [1, 1]]


def test_batch_norm_is_adopted_too() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    state = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    fill(Built(net, None), state, "file", adopt=True)
    assert net.state_dict()["0.running_mean"].data_ptr() == state["0.running_mean"].data_ptr()


def test_wrong_shapes_are_refused_before_anything_is_adopted() -> None:
    net = nn.Linear(2, 2)
    before = net.weight.data_ptr()
    with pytest.raises(UsageError, match="a tensor does not fit"):
        fill(Built(net, None), {"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "file", adopt=True)
    assert net.weight.data_ptr() == before
