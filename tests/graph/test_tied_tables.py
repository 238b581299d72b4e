"""A table of embeddings that the output layer reads too is one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qopt.graph.compare import TOLERANCE, Runner, largest_difference
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare

Text = Callable[..., onnx.ModelProto]
TABLE = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
HEAD = "g (int64[b, s] ids) => (float[b, s, 30] y) { x = Gather(table, ids)"
TIED = {
    "a transpose": (HEAD + " turned = Transpose<perm = [1, 0]>(table) y = MatMul(x, turned) }", {}),
    "a copy": (HEAD + " y = MatMul(x, turned) }", {"turned": np.ascontiguousarray(TABLE.T)}),
    "a transpose and a bias": (
        HEAD + " turned = Transpose(table) z = MatMul(x, turned) y = Add(z, bias) }", {"bias": TABLE[:, 0].copy()},
    ),
}  # fmt: skip


def _prepare(text_model: Text, text: str, **arrays: Any) -> tuple[ir.Model, Prepared]:
    model = ir.from_proto(text_model(text, table=TABLE, **arrays))
    return model, prepare(model)


@pytest.mark.parametrize("case", TIED)
def test_a_tied_table_is_one_layer(case: str, text_model: Text) -> None:
    text, arrays = TIED[case]
    model, prepared = _prepare(text_model, text, **arrays)
    (layer,) = prepared.layers
    assert (layer.name, layer.op, layer.shape, layer.channel_axis) == ("table", "Gather", (30, 8), 0)
    first, last = layer.uses
    assert (first.macs, last.macs) == (0, 16 * 30 * 8)
    assert (first.bias, last.bias) == (None, "bias" if "bias" in arrays else None)
    assert (first.input, last.output) == ("ids", "y")
    assert "turned" not in prepared.model.graph.initializers
    feeds = {"ids": np.arange(30).reshape(2, 15)}
    assert largest_difference(Runner(prepared.model).all(feeds), Runner(model).all(feeds)) <= TOLERANCE


def test_a_gemm_over_rows_ties_without_a_transpose(text_model: Text) -> None:
    text = "g (int64[b] ids) => (float[b, 30] y) { x = Gather(table, ids) y = Gemm<transB = 1>(x, table) }"
    (layer,) = _prepare(text_model, text)[1].layers
    assert (layer.op, layer.channels, layer.macs) == ("Gather", 30, 16 * 240)


NOT_TIED = {
    "another orientation": (
        "g (int64[b] ids, float[b, 30] p) => (float[b, 8] y) { x = Gather(table, ids) q = MatMul(p, table) "
        "y = Add(x, q) }", {}, ["table stays in float: another kind of operator uses the weight too"], [],
    ),
    "arithmetic": (
        "g (int64[b] ids, float[30, 8] p) => (float[b, 8] y, float[30, 8] z) { y = Gather(table, ids) "
        "z = Add(p, table) }", {}, ["table stays in float: another kind of operator uses the weight too"], [],
    ),
    "two alike": (
        HEAD + " y = MatMul(x, other) }", {"other": np.ascontiguousarray(-TABLE.T)}, [], ["table", "other"],
    ),
    "a short row": (
        "g (int64[b] ids) => (float[b, 7] y) { y = Gather(narrow, ids) }", {"narrow": TABLE[:, :7].copy()},
        ["narrow stays in float: its rows have fewer than 8 numbers"], [],
    ),
    "columns": (
        "g (int64[b] ids) => (float[30, b] y) { y = Gather<axis = 1>(table, ids) }", {},
        ["table stays in float: Gather along another axis than its rows"], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_TIED)
def test_what_is_not_tied(case: str, text_model: Text) -> None:
    text, arrays, notes, layers = NOT_TIED[case]
    prepared = _prepare(text_model, text, **arrays)[1]
    assert [note for note in prepared.notes if "stays" in note] == notes
    assert [layer.initializer for layer in prepared.layers] == layers


def test_a_classifier_of_images_keeps_its_tables_in_float(graph: Any) -> None:
    g = graph((3, 8, 8))
    index = g.op("Cast", g.op("ReduceMax", "x", g.ints(1, 2, 3), keepdims=0), to=7)
    prepared = prepare(g.model(g.op("Gather", g.random(30, 8, name="table"), index)))
    assert prepared.image
    assert prepared.layers == ()
