from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import Runner, difference, observed_shapes, random_images

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("got", "expected", "answer"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.5], [0.25], 0.25),  # small numbers: absolute
        ([110.0, 0.0], [100.0, 0.0], 0.1),  # large numbers: relative to the largest
        ([1.0], [1.0, 1.0], INF),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([NAN], [1.0], INF),
        ([INF], [INF], 0.0),
        ([INF], [-INF], INF),
        ([INF], [NAN], INF),
        ([], [], 0.0),
    ],
)
def test_difference(got: list[float], expected: list[float], answer: float) -> None:
    assert difference(np.array(got, np.float32), np.array(expected, np.float32)) == pytest.approx(answer)


def test_images_are_reproducible_and_in_range() -> None:
    images = random_images((3, 4), 5, seed=1)
    assert images.shape == (5, 3, 4)
    assert images.dtype == np.float32
    assert np.array_equal(images, random_images((3, 4), 5, seed=1))
    assert not np.array_equal(images, random_images((3, 4), 5, seed=2))
    assert (images >= 0).all()
    assert (images < 1).all()


def test_observed_shapes(small_cnn: Callable[..., ir.Model]) -> None:
    model = small_cnn()
    names = [str(value.name) for node in model.graph for value in node.outputs]
    shapes = observed_shapes(model, [names[0], names[-1], names[0]], {"x": random_images((3, 8, 8), 1)})
    assert shapes == {names[0]: (1, 4, 8, 8), names[-1]: (1, 10)}
    assert [value.name for value in model.graph.outputs] == [names[-1]]


def test_a_graph_that_onnxruntime_refuses(graph: Any) -> None:
    g = graph()
    model = g.model(g.op("Gemm", g.op("Flatten", "x"), g.random(7, 4)))
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime") as caught:
        Runner(model)(random_images((3, 8, 8), 1))
    assert "\n" not in str(caught.value)


def test_a_run_that_fails(small_cnn: Callable[..., ir.Model]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot run the graph"):
        Runner(small_cnn())(random_images((3, 9, 9), 1))
