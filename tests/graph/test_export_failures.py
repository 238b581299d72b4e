"""What people's modules do that torch cannot export: the line of theirs, what is wrong, three ways out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qopt.errors import UnsupportedModelError
from qopt.graph.to_onnx import module_to_onnx


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = int(x.max().item())
        return torch.zeros(count, 3)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))


class Operator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvals(x)
        return values.real


class TakesDict(nn.Module):
    def forward(self, batch: Any) -> Tensor:
        images: Tensor = batch["image"]
        return images.flatten(1)


class OtherShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class Nested(nn.Module):
    """The line of the part that fails is shown, and not the line that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Branch()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.part(x) + 1
        return result


TRACED = "torch.export cannot trace the model with an input of shape (1, 3, 4, 4)"
CASES: dict[str, tuple[nn.Module, str, str, str]] = {
    "a branch on the input": (
        Branch(), "`if x.sum() > 0:`", TRACED, "got a branch or a size that depends on the values of the input",
    ),
    "item()": (
        Item(), "`count = int(x.max().item())`", TRACED, "got a size or a number that depends on the values",
    ),
    "numpy": (
        Numpy(), "`return torch.from_numpy(np.tanh(x.detach().numpy()))`", TRACED,
        "got a tensor that leaves torch for numpy",
    ),
    "an operator that ONNX lacks": (
        Operator(), "`values: Tensor = torch.linalg.eigvals(x)`", "torch.onnx cannot translate the program",
        "aten.linalg_eig",
    ),
    "a dict": (TakesDict(), '`images: Tensor = batch["image"]`', TRACED, "IndexError: too many indices"),
    "another shape": (OtherShape(), "`logits: Tensor = self.fc(x.flatten(1))`", TRACED, "[1, 48] X [10, 3]"),
    "a part of the module": (Nested(), "`if x.sum() > 0:`", TRACED, "got a branch"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_users_line_the_fact_and_three_ways_out(name: str) -> None:
    module, line, what, got = CASES[name]
    with pytest.raises(UnsupportedModelError) as caught:
        module_to_onnx(module, (3, 4, 4))
    error = caught.value
    text = str(error)
    assert error.where is not None
    assert error.where.startswith("test_export_failures.py:")
    assert error.where.endswith(line)
    assert error.what == what
    assert got in text
    for way in ("rewrite that part of forward()", "torch.export.save", "give an ONNX file"):
        assert way in text
    assert "\n" not in text
    assert len(text) < 600
    assert error.__cause__ is not None


def test_the_line_is_that_of_the_source() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        module_to_onnx(Branch(), (3, 4, 4))
    number = int(str(caught.value.where).split(":")[1].split()[0])
    with open(__file__, encoding="utf-8") as file:
        assert file.readlines()[number - 1].strip() == "if x.sum() > 0:"


def test_no_words_of_torch_alone_where_there_are_plain_ones() -> None:
    for module in (Branch(), Item(), Numpy()):
        with pytest.raises(UnsupportedModelError) as caught:
            module_to_onnx(module, (3, 4, 4))
        for word in ("Guard", "Sym", "u0", "subclass"):
            assert word not in str(caught.value)


def test_several_inputs_are_told_by_their_shapes() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    with pytest.raises(UnsupportedModelError, match=r"inputs of shape \(2, 3\), \(2, 4\)") as caught:
        module_to_onnx(Two(), example=(torch.zeros(2, 3), torch.zeros(2, 4)))
    assert "`return a @ b`" in str(caught.value)
