"""Inputs drawn for networks of which nobody says what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.errors import UnsupportedModelError, UsageError
from qopt.graph.example import draw, graph_inputs, index_limits, running_examples

Text = Callable[..., onnx.ModelProto]


def _rows(count: int, width: int = 8) -> Any:
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)


def _model(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    return ir.passes.common.ShapeInferencePass()(model).model


TWO_TABLES = """
g (int64[b, s] ids, int64[b, s] kinds, int64[b, s] attention_mask) => (float[b, s, 8] y) {
    wide = Unsqueeze(ids, axis)
    flat = Squeeze(wide, axis)
    words = Gather(table, flat)
    styles = Gather(styles_table, kinds)
    sum = Add(words, styles)
    mask = Cast<to = 1>(attention_mask)
    column = Unsqueeze(mask, axis)
    y = Mul(sum, column)
}
"""


def _two_tables(text_model: Text) -> ir.Model:
    return _model(text_model(TWO_TABLES, table=_rows(30), styles_table=_rows(2), axis=np.array([2])))


def test_integers_stay_below_the_smallest_table_that_they_index(text_model: Text) -> None:
    assert index_limits(_two_tables(text_model)) == {"ids": 30, "kinds": 2}


def test_what_only_the_shape_of_an_input_indexes_is_no_limit(text_model: Text) -> None:
    text = """
    g (int64[b, s] ids) => (float[b, 8] y) {
        shape = Shape(ids)
        place = Gather(table, shape)
        floats = Cast<to = 1>(ids)
        first = Slice(floats, zero, one, one)
        row = ReduceSum<keepdims = 0>(place, zero)
        y = Mul(first, row)
    }
    """
    one, zero = np.array([1]), np.array([0])
    assert index_limits(_model(text_model(text, table=_rows(30), one=one, zero=zero))) == {}


def test_masks_are_ones_floats_are_fractions_and_the_same_seed_gives_the_same(text_model: Text) -> None:
    text = """
    g (float[b, 3] x, bool[b, 3] keep, float[b, 3] pad_mask, int64[b] length, float16[1] half) => (float[b, 3] y) {
        y = Add(x, pad_mask)
    }
    """
    model = _model(text_model(text))
    feeds = draw(model, {"b": 4}, {})
    assert {name: (array.dtype.name, array.shape) for name, array in feeds.items()} == {
        "x": ("float32", (4, 3)), "keep": ("bool", (4, 3)), "pad_mask": ("float32", (4, 3)),
        "length": ("int64", (4,)), "half": ("float16", (1,)),
    }  # fmt: skip
    assert all((feeds[name] == 1).all() for name in ("keep", "pad_mask", "length"))
    assert 0 <= feeds["x"].min() < feeds["x"].max() < 1
    assert np.array_equal(feeds["x"], draw(model, {"b": 4}, {})["x"])
    assert not np.array_equal(feeds["x"], draw(model, {"b": 4}, {}, seed=1)["x"])


@given(limit=st.integers(1, 5000), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_drawn_integers_are_indices(text_model: Text, limit: int, size: int, seed: int) -> None:
    model = _two_tables(text_model)
    ids = draw(model, {"b": 2, "s": size}, {"ids": limit, "kinds": 1}, seed=seed)["ids"]
    assert ids.shape == (2, size)
    assert 0 <= ids.min() <= ids.max() < min(limit, 1000)


def test_examples_of_two_sizes_run(text_model: Text) -> None:
    first, second = running_examples(_two_tables(text_model), {})
    shapes = [feeds["ids"].shape for feeds, _ in (first, second)]
    assert shapes == [(2, 16), (2, 8)]
    feeds, (output,) = first
    expected = _rows(30)[feeds["ids"]] + _rows(2)[feeds["kinds"]]
    assert np.allclose(output, expected)


SIZES: dict[str, tuple[str, dict[str, Any], list[tuple[int, ...]]]] = {
    "nothing dynamic": ("g (float[2, 5] x) => (float[2, 5] y) { y = Neg(x) }", {}, [(2, 5)]),
    "a batch of one only": (
        "g (float[b, 3, 4] x) => (float[1, 12] y) { y = Reshape(x, shape) }", {"shape": np.array([1, 12])}, [(1, 3, 4)],
    ),
    "one size only": (
        "g (float[b, h, w] x) => (float[b, h, 3] y) { y = MatMul(x, w) }",
        {"w": np.ones((224, 3), np.float32)}, [(2, 224, 224), (1, 224, 224)],
    ),
    "no names": ("g (float[?, ?] x) => (float[?, ?] y) { y = Neg(x) }", {}, [(2, 16), (2, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_run_are_found(case: str, text_model: Text) -> None:
    text, arrays, expected = SIZES[case]
    examples = running_examples(_model(text_model(text, **arrays)), {})
    assert [feeds["x"].shape for feeds, _ in examples] == expected


PAST = """
g (int64[b, s] ids, float[b, p, 8] past, int64[b, total] mask) => (float[b, t, 8] y) {
    words = Gather(table, ids)
    all = Concat<axis = 1>(past, words)
    weights = Cast<to = 1>(mask)
    column = Unsqueeze(weights, axis)
    y = Mul(all, column)
}
"""


def _past(text_model: Text) -> ir.Model:
    model = _model(text_model(PAST, table=_rows(30), axis=np.array([2])))
    model.graph.inputs[2].shape = ir.Shape(["b", "p + s"])
    return model


def test_an_axis_may_be_the_sum_of_others(text_model: Text) -> None:
    feeds = running_examples(_past(text_model), {"p": 3})[0][0]
    assert {name: array.shape[1] for name, array in feeds.items()} == {"ids": 16, "past": 3, "mask": 19}


def test_sizes_that_the_user_gives(text_model: Text) -> None:
    for feeds, _ in running_examples(_two_tables(text_model), {"s": 5}):
        assert feeds["ids"].shape[1] == 5
    feeds = running_examples(_model(text_model(SIZES["no names"][0])), {"x.1": 7})[0][0]
    assert feeds["x"].shape == (2, 7)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"q": 5}, r"--axis q: the network has no such dynamic axis; one of b, s"),
        ({"s": 0}, r"--axis s: an axis must have a size \(expected at least 1, got 0\)"),
    ],
)
def test_wrong_sizes(axes: dict[str, int], words: str, text_model: Text) -> None:
    with pytest.raises(UsageError, match=words):
        running_examples(_two_tables(text_model), axes)


def test_nothing_that_is_drawn_runs(text_model: Text) -> None:
    model = _model(text_model("g (float[b, h] x) => (float[b, 8] y) { y = MatMul(x, w) }", w=_rows(77)))
    with pytest.raises(UnsupportedModelError, match=r"inputs x FLOAT \(\?, \?\): the network runs .*--axis b=128"):
        running_examples(model, {})
    assert running_examples(model, {"h": 77})[0][0]["x"].shape == (2, 77)


def test_integers_that_do_not_run_are_drawn_again_as_ones_and_zeros(text_model: Text) -> None:
    text = """
    g (int64[1] count, float[2, 4] x) => (float[n, 4] y) {
        rows = Gather(table, count)
        y = Gather(rows, count)
    }
    """
    feeds = running_examples(_model(text_model(text, table=_rows(9, 4))), {})[0][0]
    assert feeds["count"].tolist() == [0]  # one row was gathered, which only index 0 finds


def test_graph_inputs(text_model: Text) -> None:
    ids, kinds, _ = graph_inputs(_two_tables(text_model))
    assert str(ids) == "ids INT64 (?, ?)"
    assert (kinds.name, kinds.dtype, kinds.shape) == ("kinds", "INT64", (None, None))
