"""Which values of a float and of a quantized network are compared, and what is counted on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.job.compare_activations import CHUNK, activation_shifts, pair_values
from qopt.measure.network import Normalisation, TwinClassifier

PLAIN = "c = Conv <pads = [1,1,1,1]> (x, k) r = Relu (c) f = Flatten (r) y = MatMul (f, w)"
CODES = "q = QuantizeLinear ({0}, s, z) d = DequantizeLinear (q, s, z)"
CONV, HEAD = "c = Conv <pads = [1,1,1,1]> (x, k)", "f = Flatten ({0}) y = MatMul (f, w)"

QUANTIZED: dict[str, tuple[str, dict[str, str], int]] = {
    "after the ReLU": (f"{CONV} r = Relu (c) {CODES.format('r')} {HEAD.format('d')}", {"r": "d"}, 1),
    "in place of the ReLU": (f"{CONV} {CODES.format('c')} {HEAD.format('d')}", {"r": "d"}, 1),
    "before the ReLU": (f"{CONV} {CODES.format('c')} r = Relu (d) {HEAD.format('r')}", {"c": "d"}, 1),
    "clipped codes": (
        f"{CONV} r = Relu (c) q = QuantizeLinear (r, s, z) l = Clip (q, , top) d = DequantizeLinear (l, s, z) "
        + HEAD.format("d"), {"r": "d"}, 1,
    ),
    "by its own range": (
        f"{CONV} r = Relu (c) q, s2, z2 = DynamicQuantizeLinear (r) d = DequantizeLinear (q, s2, z2) "
        + HEAD.format("d"), {"r": "d"}, 1,
    ),
    "codes that stay codes": (
        f"{CONV} r = Relu (c) q = QuantizeLinear (r, s, z) g = Flatten (q) d = DequantizeLinear (g, s, z) "
        "y = MatMul (d, w)", {"r": "q"}, 1,
    ),
    "the image too": (
        "i = QuantizeLinear (x, s, z) j = DequantizeLinear (i, s, z) c = Conv <pads = [1,1,1,1]> (j, k) r = Relu (c) "
        f"{CODES.format('r')} {HEAD.format('d')}", {"x": "j", "r": "d"}, 2,
    ),
    "another name": (f"{CONV} other = Relu (c) {CODES.format('other')} {HEAD.format('d')}", {}, 1),
    "nothing": (PLAIN, {}, 0),
}  # fmt: skip
"""Body of the graph; float value to what is read instead; values quantized."""

Make = Callable[..., TwinClassifier]


@pytest.fixture(scope="module")
def make(text_model: Callable[..., onnx.ModelProto]) -> Make:
    """A twin of a graph by its body; images (n, 1, 4, 4), codes of two bits where they are clipped, else of eight."""
    generator = np.random.default_rng(3)
    tensors: dict[str, Any] = {
        "k": generator.normal(size=(2, 1, 3, 3)).astype(np.float32), "z": np.array(0, np.uint8),
        "w": generator.normal(size=(32, 3)).astype(np.float32), "s": np.array(0.25, np.float32),
        "top": np.array(3, np.uint8),
    }  # fmt: skip

    def made(body: str, batch: str = "n", normalisation: Normalisation | None = None) -> TwinClassifier:
        graph = f"g (float[{batch},1,4,4] x) => (float[{batch},3] y) {{ {body} }}"
        used = {name: array for name, array in tensors.items() if f"{name})" in body or f" {name}," in body}
        prepared = prepare(ir.serde.deserialize_model(text_model(graph, opset=21, **used)))
        size = None if batch == "n" else int(batch)
        return TwinClassifier(build_twin(prepared), normalisation or Normalisation(), size)

    return made


def pictures(count: int) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_are_paired_by_name(make: Make, name: str) -> None:
    body, expected, quantized = QUANTIZED[name]
    pairs, count = pair_values(make(PLAIN).graph, make(body).graph)
    assert {pair.value: pair.rounded.meta["value"] for pair in pairs} == expected
    assert [pair.plain.meta["value"] for pair in pairs] == list(expected)
    assert count == quantized


def undone(before: NDArray[Any], after: NDArray[Any]) -> tuple[int, int]:
    """Pairs that differ before and are equal after, and pairs that differ before."""
    count = pairs = 0
    for i in range(len(before)):
        for j in range(i):
            different = before[i] != before[j]
            pairs, count = pairs + bool(different), count + bool(different and after[i] == after[j])
    return count, pairs


@pytest.mark.parametrize(
    ("name", "levels"), [("after the ReLU", 255), ("in place of the ReLU", 255), ("clipped codes", 3)]
)
def test_rates_are_those_of_a_loop(make: Make, name: str, levels: int) -> None:
    plain, rounded, images = make(PLAIN), make(QUANTIZED[name][0]), pictures(CHUNK + 3)
    found = activation_shifts(plain, rounded, images).values["r"]
    kernel = next(buffer for buffer in plain.graph.buffers() if buffer.shape == (2, 1, 3, 3))
    activations = torch.relu(torch.nn.functional.conv2d(images, kernel, padding=1)).flatten(1).numpy()
    codes = np.clip(np.round(activations / 0.25), 0, levels)
    counts = [undone(a, b) for a, b in zip(activations, codes, strict=True)]
    assert found.pairs == sum(pairs for _, pairs in counts)
    assert round(found.rate * found.pairs) == sum(count for count, _ in counts) > 0


def test_shares_of_images_do_not_depend_on_chunks(make: Make) -> None:
    """Five images of 11, all in the first chunk, have pixels that one code holds."""
    body = "f = Flatten (x) g = Concat <axis = 1> (f, f) y = MatMul (g, w)"
    coarse = (
        "i = QuantizeLinear (x, s, z) j = DequantizeLinear (i, s, z) f = Flatten (j) g = Concat <axis = 1> (f, f) "
        "y = MatMul (g, w)"
    )
    images = (torch.arange(16) % 5 / 4).reshape(1, 1, 4, 4).repeat(CHUNK + 3, 1, 1, 1)
    images[:5, 0, 0, 0] = 0.01
    found = activation_shifts(make(body), make(coarse), images).values["x"]
    assert found.images == pytest.approx(5 / (CHUNK + 3))
    assert round(found.rate * found.pairs) == 5 * 3, "with three other pixels of the same code in each"


@pytest.mark.parametrize("batch", ["4", "20"])
def test_batches_of_files_are_of_no_matter(make: Make, batch: str) -> None:
    images, body = pictures(CHUNK + 3), QUANTIZED["after the ReLU"][0]
    expected = activation_shifts(make(PLAIN), make(body), images)
    assert activation_shifts(make(PLAIN, batch), make(body), images) == expected
    assert activation_shifts(make(PLAIN), make(body, batch), images) == expected
    assert expected.values["r"].images > 0


def test_normalisation_comes_first(make: Make) -> None:
    half = Normalisation((0.0,), (0.5,))
    body = QUANTIZED["the image too"][0]
    found = activation_shifts(make(PLAIN, "n", half), make(body, "n", half), pictures(3))
    assert found == activation_shifts(make(PLAIN), make(body), (2 * pictures(3)))
    assert found != activation_shifts(make(PLAIN), make(body), pictures(3))


def test_values_of_other_shapes_are_left_out(make: Make) -> None:
    body = f"{CONV} t = Relu (c) r = Flatten (t) {CODES.format('r')} y = MatMul (d, w)"
    assert [pair.value for pair in pair_values(make(PLAIN).graph, make(body).graph)[0]] == ["r"]
    found = activation_shifts(make(PLAIN), make(body), pictures(3))
    assert (found.values, found.rate, found.quantized) == ({}, 0.0, 1)


def test_the_rate_of_all_values_counts_pairs(make: Make) -> None:
    found = activation_shifts(make(PLAIN), make(QUANTIZED["the image too"][0]), pictures(4))
    assert set(found.values) == {"x", "r"}
    total = sum(shift.pairs for shift in found.values.values())
    assert found.rate * total == pytest.approx(sum(shift.rate * shift.pairs for shift in found.values.values()))
    assert found.rate != pytest.approx(np.mean([shift.rate for shift in found.values.values()]))
