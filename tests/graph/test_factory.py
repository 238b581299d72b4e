"""Factories of the user: found, called, filled; every mistake is one line that says what to change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qopt.errors import CorruptModelError, UsageError
from qopt.graph.factory import Built, build, fill, unwrap

SOURCE = """
import torch
from torch import nn

number = 3

def small():
    print("building")
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)
    def forward(self, x):
        return self.fc(x.flatten(1))

def with_example():
    return Net(), torch.zeros(1, 3, 2, 2)

def with_examples():
    return Net(), (torch.zeros(2, 3, 2, 2), torch.zeros(2))

def needs_argument(width):
    return nn.Linear(width, 2)

def breaks():
    raise KeyError("no such layer\\nsecond line")

def exits():
    raise SystemExit(3)

def nothing():
    return None

def odd_example():
    return Net(), [1, 2]

def empty_example():
    return Net(), ()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with modules of names that no other test uses."""
    (tmp_path / "factory_nets.py").write_text(SOURCE)
    (tmp_path / "factory_broken.py").write_text("def f(:\n")
    (tmp_path / "factory_lacks.py").write_text("import no_such_dependency\n")
    (tmp_path / "factory_raises.py").write_text("x = 1\nraise ValueError('at import')\n")
    (tmp_path / "factory_exits.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "factory_package").mkdir()
    (tmp_path / "factory_package" / "__init__.py").write_text("")
    (tmp_path / "factory_package" / "inner.py").write_text("from factory_nets import small\n")
    monkeypatch.chdir(tmp_path)
    for name in [key for key in sys.modules if key.startswith("factory_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize(
    ("factory", "kind", "example"),
    [
        ("factory_nets:small", "Sequential", None),
        ("factory_package.inner:small", "Sequential", None),
        ("factory_nets:Net", "Net", None),
        ("factory_nets:with_example", "Net", 1),
        ("factory_nets:with_examples", "Net", 2),
    ],
)
def test_factories_beside_the_current_directory_are_called(
    folder: Path, factory: str, kind: str, example: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list(sys.path)
    built = build(factory)
    assert type(built.module).__name__ == kind
    assert (None if built.example is None else len(built.example)) == example
    assert sys.path == path
    assert capsys.readouterr().out == ""


WRONG: list[tuple[str, list[str]]] = [
    ("factory_nets", ["not a factory", "expected package.module:name", "'factory_nets'"]),
    ("", ["not a factory"]),
    ("factory_nets:", ["not a factory"]),
    (":small", ["not a factory"]),
    ("a/b.py:small", ["not a factory"]),
    ("factory_nets:small()", ["not a factory"]),
    ("factory_net:small", ["no module 'factory_net'", "did you mean 'factory_nets'"]),
    ("factory_package.outer:small", ["no module 'factory_package.outer'"]),
    ("no_such_package.inner:small", ["no module 'no_such_package'"]),
    ("factory_nets:smal", ["has no 'smal'", "did you mean 'small'"]),
    ("factory_nets:number", ["not callable", "got int"]),
    ("factory_nets:needs_argument", ["the factory raised", "TypeError", "width"]),
    ("factory_nets:breaks", ["the factory raised", "KeyError", "no such layer", "factory_nets.py:28"]),
    ("factory_nets:exits", ["the factory raised", "SystemExit"]),
    ("factory_nets:nothing", ["returned no model", "got NoneType"]),
    ("factory_nets:odd_example", ["example inputs are no tensors"]),
    ("factory_nets:empty_example", ["example inputs are no tensors"]),
    ("factory_broken:f", ["cannot be imported", "SyntaxError"]),
    ("factory_lacks:f", ["cannot be imported", "no_such_dependency", "factory_lacks.py:1"]),
    ("factory_raises:f", ["cannot be imported", "ValueError: at import", "factory_raises.py:2"]),
    ("factory_exits:f", ["cannot be imported", "SystemExit: bye"]),
]


@pytest.mark.parametrize(("factory", "words"), WRONG)
def test_wrong_factories_are_usage_errors(folder: Path, factory: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build(factory)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert type(caught.value) is UsageError


def linear(fill_with: float = 1.0) -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(fill_with)
        layer.bias.fill_(fill_with / 2)
    return layer


def test_a_state_dict_fills_the_module() -> None:
    module = linear(0.0)
    assert fill(Built(module, None), linear(5.0).state_dict(), "w.pt") == []
    assert module.weight.eq(5.0).all()
    assert module.bias.eq(2.5).all()


MISFITS: list[tuple[dict[str, torch.Tensor], list[str]]] = [
    ({"weight": torch.zeros(2, 3)}, ["w.pt: the weights do not fit", "missing bias"]),
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, ["unexpected more"]),
    (
        {"weights": torch.zeros(2, 3), "bias": torch.zeros(2)},
        ["missing weight, unexpected weights", "did you mean 'weight'"],
    ),
    ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, ["w.pt: weight", "expected (2, 3), got (3, 2)"]),
    ({f"k{i}": torch.zeros(1) for i in range(9)}, ["k0, k1, k2 and 6 more"]),
]  # fmt: skip


@pytest.mark.parametrize(("state", "words"), MISFITS)
def test_misfits_name_the_keys(state: dict[str, torch.Tensor], words: list[str]) -> None:
    module = linear()
    before = module.weight.clone()
    with pytest.raises(UsageError) as caught:
        fill(Built(module, None), state, "w.pt")
    assert [word for word in words if word not in str(caught.value)] == []
    assert torch.equal(module.weight, before)


def test_a_factory_that_loaded_the_weights_itself_is_left_alone() -> None:
    inner = linear(5.0)
    wrapped = nn.Sequential(nn.Flatten(), inner)
    assert fill(Built(wrapped, None), inner.state_dict(), "w.pt") == ["the factory had loaded the weights itself"]
    with pytest.raises(UsageError, match="do not fit"):
        fill(Built(wrapped, None), linear(6.0).state_dict(), "w.pt")


class Stubborn(nn.Linear):
    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("not today")


def test_a_module_that_refuses_its_weights_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not today"):
        fill(Built(Stubborn(3, 2), None), linear().state_dict(), "w.pt")


STATE = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "checkpoint",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"lr": 0.1}},
        {"model_state_dict": STATE},
        {"net": STATE, "acc": 91.5},
        {f"module.{key}": value for key, value in STATE.items()},
        {"state_dict": {f"_orig_mod.module.{key}": value for key, value in STATE.items()}},
    ],
)
def test_checkpoints_are_unwrapped(checkpoint: object) -> None:
    state = unwrap(checkpoint, "w.pt")
    assert list(state) == list(STATE)
    assert torch.equal(state["fc.weight"], STATE["fc.weight"])


def test_a_prefix_that_not_all_names_have_stays() -> None:
    state = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert unwrap(state, "w.pt") == state


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (torch.ones(3), "got a Tensor"),
        ({}, "got a dict"),
        ({"epoch": 3, "lr": 0.1}, "with the keys epoch, lr"),
        ({"state_dict": 3}, "with the keys state_dict"),
        ([STATE], "got a list"),
        ({1: torch.ones(1)}, "with the keys 1"),
    ],
)
def test_what_is_no_state_dict_is_corrupt(checkpoint: object, words: str) -> None:
    with pytest.raises(CorruptModelError) as caught:
        unwrap(checkpoint, "w.pt")
    assert words in str(caught.value)
    assert "state_dict" in str(caught.value)
