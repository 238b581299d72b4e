"""Honest torch.export archives pass the audit and compute, bit for bit, what the original computes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from qopt.graph.audit import audit_archive
from qopt.graph.to_onnx import quiet


class Lambda(nn.Module):
    """A module around a function of itself and its input, with two linear layers and odd buffers."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.lstm, self.gru = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.register_buffer("codes", torch.arange(8, dtype=torch.int8))
        self.register_buffer("quarter", torch.full((8,), 0.25, dtype=torch.bfloat16))
        self.register_buffer("row", torch.arange(4.0).expand(3, 4))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.sliced = nn.Parameter(torch.randn(12, 16)[4:, ::2])
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def recurrent(net: Any, x: torch.Tensor) -> torch.Tensor:
    y, _ = net.lstm(x.flatten(2))
    y, _ = net.gru(y)
    last: torch.Tensor = y[:, -1]
    return last


def branches(net: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.cond(x.sum() > 0, lambda y: net.a(y), lambda y: net.b(-y), (x,))
    return result


def ungraded(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = net.quarter.float().sum() + net.codes.sum()
    with torch.autocast("cpu", enabled=False):
        y: torch.Tensor = net.a(x) * scale
    return y


def attention(net: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = net.a(x), net.b(x)
    mask = torch.full((4, 4), float("-inf")).triu(1)
    y: torch.Tensor = F.scaled_dot_product_attention(q, k, q, attn_mask=mask)
    return y


def resized(net: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = F.pad(F.interpolate(x, scale_factor=2, mode="bilinear"), (1, 1, 1, 1), mode="reflect")
    return y.reshape(x.shape[0], 3, (2 * x.shape[2] + 2) // 2, -1)


def nested(net: Any, x: torch.Tensor) -> dict[str, Any]:
    y = net.a(x)
    return {"logits": y, "aux": (y.sum(1), [net.codes * 2])}


def strided(net: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x @ net.sliced + net.empty.sum() + net.row.sum()
    return torch.einsum("bij,jk->bik", y, torch.eye(8)) + torch.tensor([1.0] * 8)


BATCH = {0: Dim("batch")}
AUTO = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
CASES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], tuple[int, ...], Any]] = {
    "recurrent": (recurrent, (2, 5, 8), BATCH),
    "branches": (branches, (2, 8), None),
    "no_grad and autocast": (ungraded, (2, 8), BATCH),
    "attention": (attention, (2, 3, 4, 8), BATCH),
    "guards on automatic sizes": (resized, (2, 3, 6, 8), AUTO),
    "nested outputs": (nested, (2, 8), BATCH),
    "strided, empty and repeated tensors": (strided, (2, 3, 8), BATCH),
}


def flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items for tensor in flat(item)]


def load(blob: bytes) -> ExportedProgram:
    with quiet():
        return torch.export.load(io.BytesIO(blob))


@pytest.mark.parametrize("name", CASES)
def test_honest_programs_come_through_bit_identical(name: str) -> None:
    function, shape, axes = CASES[name]
    torch.manual_seed(1)
    net = Lambda(function).eval()
    with quiet():
        program = torch.export.export(net, (torch.zeros(shape),), dynamic_shapes=None if axes is None else (axes,))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    loaded = load(audit_archive(buffer.getvalue(), "x")).module()
    x = torch.randn(shape)
    with torch.no_grad():
        want, got = flat(net(x)), flat(loaded(x))
    assert len(want) == len(got) > 0
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))
    assert any(float(tensor.float().abs().max()) > 1e-3 for tensor in got)


def test_an_audited_archive_passes_the_audit_again_unchanged_in_content() -> None:
    with quiet():
        program = torch.export.export(Lambda(nested).eval(), (torch.zeros(2, 8),))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    once = audit_archive(buffer.getvalue(), "x")
    twice = audit_archive(once, "x")
    assert len(once) == len(twice)
    assert str(load(once).graph) == str(load(twice).graph) == str(load(buffer.getvalue()).graph)
