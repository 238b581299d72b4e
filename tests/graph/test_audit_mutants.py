"""Damaged torch.export archives: whatever a mutation does, it ends in an error of qopt's or in a model."""

from __future__ import annotations

import functools
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from qopt.errors import QoptError
from qopt.graph.load import load_model

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


class Small(nn.Module):
    """A linear layer and a reshape that keeps shape expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x.reshape(2 * x.shape[0], 8))
        return logits[: x.shape[0]] * 2.0


@functools.cache
def honest() -> bytes:
    torch.manual_seed(0)
    program = torch.export.export(Small().eval(), (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@functools.cache
def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(honest())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_member(name: str, content: bytes) -> bytes:
    """The honest archive with one member replaced, its checksum right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in members().items():
            archive.writestr(member, content if member.endswith(name) else data)
    return buffer.getvalue()


def document(name: str) -> Any:
    return json.loads(next(data for member, data in members().items() if member.endswith(name)))


def with_value(name: str, place: tuple[str | int, ...], value: Any) -> bytes:
    tree = document(name)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return with_member(name, json.dumps(tree).encode())


def mutant(blob: bytes, chance: random.Random) -> bytes:
    data = bytearray(blob)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(data))
        kind = chance.randrange(4)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice([0, 0xFF, 0x7F, 0x80, 0x2E])
        elif kind == 2:
            del data[place : place + chance.randrange(1, 40)]
        else:
            data[place:place] = data[chance.randrange(len(data)) :][: chance.randrange(1, 40)]
    return bytes(data)


def outcome(path: Path, blob: bytes) -> str:
    path.write_bytes(blob)
    try:
        load_model(path)
    except QoptError as error:
        return type(error).__name__ if "\n" not in str(error) else "more than one line"
    return "loaded"


def test_byte_mutants_end_in_an_error_of_ours_or_load(tmp_path: Path) -> None:
    chance = random.Random(20261120)
    results = [outcome(tmp_path / "m.pt", mutant(honest(), chance)) for _ in range(200)]
    assert results.count("CorruptModelError") > 100
    assert set(results) <= {"CorruptModelError", "UnsafeModelError", "UnsupportedModelError", "loaded"}


def leaves(tree: Any, place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = [leaf for key, item in items for leaf in leaves(item, (*place, key))]
    return below or [place]


WILD = [
    None, True, False, 0, -1, 1, 2**31, 2**62, -(2**63), 1.5, "", "x", "fc.weight", [], {}, "conv2d",
    "torch.ops.aten.relu.default", {"as_int": 7}, {"as_none": True}, [0], "NaN", "Add(Integer(1), Integer(2))",
    "_operator.mul",
]  # fmt: skip


@pytest.mark.parametrize(("member", "rounds"), [(MODEL, 24), (WEIGHTS, 12)])
def test_leaf_mutants_end_in_an_error_of_ours_or_load(member: str, rounds: int, tmp_path: Path) -> None:
    chance = random.Random(7)
    places = leaves(document(member))
    count: dict[str, int] = {}
    for _ in range(rounds):
        result = outcome(tmp_path / "m.pt", with_value(member, chance.choice(places), chance.choice(WILD)))
        count[result] = count.get(result, 0) + 1
    assert count.keys() <= {"CorruptModelError", "UnsafeModelError", "UnsupportedModelError", "loaded"}
    assert count["CorruptModelError"] > rounds // 10


def test_text_mutants_of_the_program_end_in_an_error_of_ours_or_load(tmp_path: Path) -> None:
    chance = random.Random(11)
    text = json.dumps(document(MODEL)).encode()
    results = {outcome(tmp_path / "m.pt", with_member(MODEL, mutant(text, chance))) for _ in range(40)}
    assert results <= {"CorruptModelError", "UnsafeModelError", "UnsupportedModelError", "loaded"}
