"""`split` as torch exports it: a sequence of parts becomes a Split, whatever else is done with sequences stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from torch import nn

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import Runner
from qopt.graph.prepare import prepare
from qopt.graph.split_sequences import split_sequences
from qopt.graph.to_onnx import module_to_onnx
from qopt.graph.twin import build_twin


def model(body: str, constants: str = "int64[2] sizes = {3, 5}, int64 zero = {0}, int64 one = {1}") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["": 17]> net (float[n,8] x) => (float[n,k] y) <{constants}> {{ {body} }}'
    return ir.serde.deserialize_model(parser.parse_model(text))


GOOD = """s = SplitToSequence <axis = 1> (x, sizes)
    a = SequenceAt (s, zero)
    b = SequenceAt (s, one)
    c = SequenceAt (s, one)
    y = Concat <axis = 1> (b, a, c)"""


@pytest.mark.parametrize(("chunk", "parts"), [(3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (9, [8])])
def test_one_number_is_the_size_of_every_part(chunk: int, parts: list[int]) -> None:
    body = "s = SplitToSequence <axis = 1> (x, chunk)\n y = SequenceAt (s, zero)"
    graph = model(body, f"int64 chunk = {{{chunk}}}, int64 zero = {{0}}")
    assert split_sequences(graph) == 1
    x = np.random.default_rng(2).random((2, 8), dtype=np.float32)
    np.testing.assert_array_equal(Runner(graph)(x), x[:, : parts[0]])
    assert len(graph.graph[0].outputs) == len(parts)


def test_parts_become_outputs_of_one_split() -> None:
    graph = model(GOOD)
    assert split_sequences(graph) == 1
    assert [node.op_type for node in graph.graph] == ["Split", "Concat"]
    x = np.random.default_rng(0).random((4, 8), dtype=np.float32)
    expected = np.concatenate([x[:, 3:], x[:, :3], x[:, 3:]], 1)
    np.testing.assert_array_equal(Runner(graph)(x), expected)
    prepared = prepare(model(GOOD))
    np.testing.assert_array_equal(Runner(prepared.model)(x), expected)
    assert torch.equal(build_twin(prepared)(torch.from_numpy(x)), torch.from_numpy(expected))


@pytest.mark.parametrize("last", ["y = SequenceAt (s, one)", "y0 = SequenceAt (s, zero)\n y = Relu (y0)"])
def test_a_part_may_be_the_output_or_alone(last: str) -> None:
    graph = model(f"s = SplitToSequence <axis = 1> (x, sizes)\n {last}")
    x = np.random.default_rng(1).random((2, 8), dtype=np.float32)
    assert split_sequences(graph) == 1
    np.testing.assert_array_equal(Runner(graph)(x), x[:, 3:] if "one" in last else x[:, :3])


@pytest.mark.parametrize(
    "body",
    [
        "s = SplitToSequence <axis = 1> (x, sizes)\n y = ConcatFromSequence <axis = 1> (s)",
        "s = SplitToSequence <axis = 1, keepdims = 0> (x)\n y = SequenceAt (s, zero)",
        "n = Size (x)\n s = SplitToSequence <axis = 1> (x, sizes)\n y = SequenceAt (s, n)",
    ],
)
def test_what_else_sequences_do_is_left_alone(body: str) -> None:
    graph = model(body)
    before = [node.op_type for node in graph.graph]
    assert split_sequences(graph) == 0
    assert [node.op_type for node in graph.graph] == before


class Attention(nn.Module):
    """Queries, keys and values from one product, as GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.joint, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.joint(x).split(8, dim=2)
        mixed: torch.Tensor = torch.softmax(q @ k.transpose(1, 2), 2) @ v
        logits: torch.Tensor = self.head(mixed.mean(1))
        return logits


def test_what_torch_exports_is_taken() -> None:
    torch.manual_seed(0)
    module = Attention()
    prepared = prepare(module_to_onnx(module, (5, 8)))
    assert [layer.name for layer in prepared.layers] == ["joint.weight", "head.weight"]
    x = torch.rand(3, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(build_twin(prepared)(x), module(x), rtol=1e-5, atol=1e-6)


def test_a_sequence_that_stays_is_refused_by_name() -> None:
    body = "s = SplitToSequence <axis = 1, keepdims = 0> (x)\n a = SequenceAt (s, zero)\n y = Unsqueeze (a, one1)"
    with pytest.raises(UnsupportedModelError):
        build_twin(prepare(model(body, "int64 zero = {0}, int64[1] one1 = {1}")))
