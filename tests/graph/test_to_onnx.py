"""PyTorch modules and programs as ONNX: the same numbers, the same names, nothing printed, failures that help."""

from __future__ import annotations

import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from qopt.errors import UnsupportedModelError, UsageError
from qopt.graph.load import load_model
from qopt.graph.model import NOTES
from qopt.graph.to_onnx import NAME_SCOPES, module_to_onnx, program_to_onnx, quiet


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.conv2(y) + x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.bn = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(Block())
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(image))))
        logits: torch.Tensor = self.fc(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))
        return logits


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x.reshape(x.shape[0], -1, 12))
        tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1)
        logits: torch.Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 48)
        self.b = nn.Linear(48, 48)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(torch.relu(self.a(x.flatten(1))))
        return y


class Strided(nn.Module):
    """Parameters that are views: transposed, sliced, empty and scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 12).t())
        self.v = nn.Parameter(torch.randn(10, 12)[4:, ::3])
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1)[:, :12] @ self.w) * self.scale @ self.v + self.none.sum()


class Several(nn.Module):
    """Two outputs, in the container that ``wrap`` makes of them."""

    def __init__(self, wrap: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        y = self.fc(x.flatten(1))
        return self.wrap(y, y.sum(1))


def logits(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        named = isinstance(output, dict)
        output = output.get("logits", next(iter(output.values()))) if named else output[0]
    return output


def check(model: ir.Model, reference: Callable[..., Any], shape: tuple[int, ...], batches: tuple[int, ...]) -> None:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in batches:
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            want = logits(reference(x)).numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, float(np.abs(want).max()))
        assert float(np.abs(want).max()) > 1e-3


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "transformer": Transformer,
    "tied": Tied,
    "strided": Strided,
    "tuple": lambda: Several(lambda y, s: (y, s)),
    "nested list": lambda: Several(lambda y, s: [[y], {"sum": s}]),
    "dict with logits last": lambda: Several(lambda y, s: {"sum": s, "logits": y}),
    "dict of one": lambda: Several(lambda y, s: {"scores": y}),
}


@functools.cache
def converted(name: str) -> ir.Model:
    """The ONNX form of a network, for tests that only look at it."""
    return module_to_onnx(network(name), (3, 4, 4))


OUTPUT = {"dict of one": "scores"}


def network(name: str) -> nn.Module:
    torch.manual_seed(3)
    net = NETWORKS[name]()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return net.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_match_eager(name: str) -> None:
    model = converted(name)
    check(model, network(name), (3, 4, 4), (1, 3))
    assert [value.name for value in model.graph.outputs] == [OUTPUT.get(name, "logits")]
    beside = name in ("tuple", "nested list", "dict with logits last")
    assert model.meta[NOTES] == (["of 2 outputs, 'logits' is taken as the logits"] if beside else [])


@pytest.mark.parametrize("name", ["residual", "transformer", "tied", "strided"])
def test_audited_archives_match_eager(name: str, tmp_path: Path) -> None:
    net = network(name)
    program = torch.export.export(net, (torch.zeros(2, 3, 4, 4),), dynamic_shapes=({0: Dim("batch")},))
    path = tmp_path / "model.pt2"
    buffer = io.BytesIO()
    with quiet():  # torch warns about parameters that are slices
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    check(load_model(path), net, (3, 4, 4), (1, 3))


def test_names_batch_norm_and_opset_are_kept() -> None:
    net, model = network("residual"), converted("residual")
    names = set(model.graph.initializers)
    assert {key for key, _ in net.named_parameters()} <= names
    assert {"bn.running_mean", "blocks.0.bn1.running_var"} <= names
    assert [node.op_type for node in model.graph].count("BatchNormalization") == 2
    assert model.graph.inputs[0].name == "image"
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert isinstance(shape[0], ir.SymbolicDim)
    assert list(shape)[1:] == [3, 4, 4]
    assert model.opset_imports == {"": 21}


def test_only_module_paths_are_left_of_the_metadata() -> None:
    model = converted("transformer")
    scopes = [node.metadata_props.get(NAME_SCOPES, "") for node in model.graph]
    assert all(set(node.metadata_props) <= {NAME_SCOPES} for node in model.graph)
    assert any("encoder.layers.0.linear1" in scope for scope in scopes)
    text = ir.to_proto(model).SerializeToString()
    assert Path(__file__).name.encode() not in text
    assert b"graph_signature" not in text


def test_tied_weights_stay_one_initializer_used_twice() -> None:
    model = converted("tied")
    tied = [value for value in model.graph.initializers.values() if value.shape == ir.Shape([48, 48])]
    assert len(tied) == 1
    assert tied[0].name in ("a.weight", "b.weight")


def test_the_graph_is_a_copy_of_the_weights() -> None:
    net = network("residual")
    model = module_to_onnx(net, (3, 4, 4))
    value = model.graph.initializers["fc.weight"].const_value
    assert value is not None
    before = value.numpy().copy()
    with torch.no_grad():
        net.get_parameter("fc.weight").zero_()
    np.testing.assert_array_equal(value.numpy(), before)


def test_training_mode_is_left_for_the_export_and_restored() -> None:
    net = network("residual").train()
    net.get_submodule("bn").eval()
    model = module_to_onnx(net, (3, 4, 4))
    assert net.training
    assert not net.get_submodule("bn").training
    assert net.get_submodule("blocks.0").training
    check(model, net.eval(), (3, 4, 4), (2,))


@pytest.mark.parametrize("stage", ["batch norm", "dropout"])
def test_programs_exported_in_training_mode_are_refused(stage: str) -> None:
    body: nn.Module = nn.BatchNorm2d(3) if stage == "batch norm" else nn.Dropout(0.3)
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(48, 2)).train()
    program = torch.export.export(net, (torch.zeros(2, 3, 4, 4),))
    with pytest.raises(UnsupportedModelError, match="behaves as in training"):
        program_to_onnx(program)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x.reshape(1, 48))
        return y


def test_a_module_of_fixed_batch_falls_back_and_says_so() -> None:
    net = FixedBatch()
    model = module_to_onnx(net, (3, 4, 4))
    assert model.meta[NOTES] == ["the batch axis is fixed at 1: torch could not export it as dynamic"]
    check(model, net, (3, 4, 4), (1,))


def test_example_inputs_of_batch_one_still_give_a_dynamic_batch() -> None:
    net = network("residual")
    model = module_to_onnx(net, example=(torch.zeros(1, 3, 4, 4),))
    assert model.meta[NOTES] == []
    check(model, net, (3, 4, 4), (1, 3))


class DataDependent(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line to blame
            return x.flatten(1)
        return -x.flatten(1)


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.no_such_method()  # type: ignore[attr-defined, no-any-return]


class WrongShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x.flatten(1))
        return y


class NoTensor(nn.Module):
    def forward(self, x: torch.Tensor) -> int:
        return 3


class NumberBeside(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x.flatten(1), 3


class Untranslatable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.eigvals(x)
        return values.abs().flatten(1)


FAILURES: list[tuple[nn.Module, list[str]]] = [
    (DataDependent(), ["test_to_onnx.py:", "`if x.sum() > 0:", "torch.export cannot trace", "ONNX file"]),
    (Raises(), ["test_to_onnx.py:", "no_such_method", "torch.export.save"]),
    (WrongShape(), ["test_to_onnx.py:", "`y: torch.Tensor = self.fc", "cannot trace"]),
    (NoTensor(), ["returns no tensor"]),
    (NumberBeside(), ["plain numbers", "3"]),
    (Untranslatable(), ["cannot translate", "linalg_eig"]),
    (nn.Linear(4, 2).double(), ["weight: parameters must be float32", "got float64", "model.float()"]),
    (nn.Linear(4, 2, device="meta"), ["weight: the model is not on the CPU", "got meta"]),
]


@pytest.mark.parametrize(("module", "words"), FAILURES, ids=[type(m).__name__ + w[0][:6] for m, w in FAILURES])
def test_failures_are_one_line_with_the_users_source(module: nn.Module, words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        module_to_onnx(module, (3, 4, 4))
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert len(text) < 700


WRONG_SHAPES: list[tuple[dict[str, Any], str]] = [
    ({}, "--input-shape"),
    ({"input_shape": ()}, "got nothing"),
    ({"input_shape": (3, 0, 4)}, "got 3,0,4"),
    ({"input_shape": (3, -1)}, "got 3,-1"),
    ({"input_shape": (3, 4.0)}, "got 3,4.0"),
    ({"input_shape": (True, 4)}, "got True,4"),
    ({"example": (torch.tensor(1.0),)}, "batch axis"),
    ({"example": (3,)}, "got ['int']"),
    ({"example": (torch.zeros(2, 3, 4, 4),), "input_shape": (3, 8, 8)}, "expected (3, 4, 4), got (3, 8, 8)"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG_SHAPES)
def test_wrong_shapes_are_usage_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        module_to_onnx(network("residual"), **arguments)
    assert words in str(caught.value)


class Talkative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("forward")
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("torch.onnx").warning("a log line")
        return x.flatten(1)


def test_nothing_is_printed_logged_or_warned(capfd: pytest.CaptureFixture[str]) -> None:
    module_to_onnx(Talkative(), (3, 4, 4))
    with pytest.raises(UnsupportedModelError):
        module_to_onnx(DataDependent(), (3, 4, 4))
    assert capfd.readouterr() == ("", "")


def test_quiet_restores_what_it_silenced() -> None:
    before = logging.root.manager.disable, sys.stdout, sys.stderr, list(warnings.filters)
    with pytest.raises(ValueError, match="inside"), quiet():
        raise ValueError("inside")
    assert before == (logging.root.manager.disable, sys.stdout, sys.stderr, list(warnings.filters))
