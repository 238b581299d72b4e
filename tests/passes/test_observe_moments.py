"""Input moments are those of an explicit im2col in numpy, for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes import layer_inputs
from qopt.passes.base import Pipeline
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.layer_inputs import MAX_COLUMNS, InputMoment
from qopt.passes.observe_moments import ObserveMoments

Array = NDArray[np.float64]
Network = Callable[..., Prepared]
Images = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Window:
    """The attributes of a convolution over one or two axes; ``pads`` in ONNX order, all starts, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1

    def __str__(self) -> str:
        values = {"strides": self.strides, "dilations": self.dilations, "pads": self.pads}
        return ", ".join([*(f"{k} = {list(v)}" for k, v in values.items()), f"group = {self.groups}"])


def im2col(x: Array, window: Window) -> Array:
    """(groups, positions, columns) of images (n, c, *size), one patch at a time."""
    axes = len(window.kernel)
    pads = [(0, 0), (0, 0), *zip(window.pads[:axes], window.pads[axes:], strict=True)]
    padded = np.pad(x, pads)
    reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    counts = [(s - r) // t + 1 for s, r, t in zip(padded.shape[2:], reach, window.strides, strict=True)]
    width = x.shape[1] // window.groups
    rows: list[list[Array]] = [[] for _ in range(window.groups)]
    for image in padded:
        for place in np.ndindex(*counts):
            starts = [p * t for p, t in zip(place, window.strides, strict=True)]
            area = tuple(
                slice(a, a + r, d) for a, r, d in zip(starts, reach, window.dilations, strict=True)
            )  # fmt: skip
            for group in range(window.groups):
                rows[group].append(image[(slice(group * width, (group + 1) * width), *area)].ravel())
    return np.array(rows)


def second_moment(rows: Array) -> Array:
    moment: Array = np.einsum("gpi,gpj->gij", rows, rows) / rows.shape[1]
    return moment


def _observe(prepared: Prepared, sample: torch.Tensor, batch_size: int = 3) -> dict[str, Array]:
    twin = build_twin(prepared)
    observe = ObserveMoments(sample, batch_size)
    Pipeline((CanonicaliseLinear(), observe), sample[: prepared.batch or 2])(twin)
    return {layer: moment.numpy() for layer, moment in observe.moments.items()}


@st.composite
def _windows(draw: st.DrawFn) -> tuple[Window, tuple[int, ...]]:
    axes = draw(st.sampled_from([1, 2]))
    kernel, strides, dilations = (tuple(draw(st.integers(1, top)) for _ in range(axes)) for top in (3, 3, 2))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * axes))
    size = tuple(draw(st.integers(5, 7)) for _ in range(axes))
    return Window(kernel, strides, dilations, pads, draw(st.sampled_from([1, 2, 4]))), size


@settings(max_examples=40)
@given(case=_windows(), outputs=st.sampled_from([4, 8]))
def test_convolutions(case: tuple[Window, tuple[int, ...]], outputs: int, network: Network, images: Images) -> None:
    window, size = case
    sizes, kernel = ",".join(map(str, size)), ",".join(map(str, window.kernel))
    prepared = network(
        f"""(float[n,4,{sizes}] x, float[{outputs},{4 // window.groups},{kernel}] w) => (float[n,k] y) {{
            c = Conv <{window}> (x, w)
            y = Flatten (c)
        }}"""
    )
    sample = images(prepared, 4)
    expected = second_moment(im2col(sample.numpy().astype(np.float64), window))
    found = _observe(prepared, sample)["w"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pads", ["0,0,0,0", "1,1,1,1", "0,1,2,0"])
def test_the_moment_predicts_the_layers_mean_square_output(
    groups: int, pads: str, network: Network, images: Images, onnx_values: Callable[..., dict[str, Any]]
) -> None:
    """``diag(W C W^T)`` is the mean of the squared outputs that ONNX Runtime computes."""
    prepared = network(
        f"""(float[n,4,6,6] x, float[6,{4 // groups},3,3] w) => (float[n,k] y) {{
            c = Conv <pads = [{pads}], group = {groups}> (x, w)
            y = Flatten (c)
        }}"""
    )
    sample = images(prepared, 5)
    rows = prepared.initializer("w").reshape(groups, 6 // groups, -1).astype(np.float64)
    moment = _observe(prepared, sample)["w"]
    predicted = np.einsum("gri,gij,grj->gr", rows, moment, rows).ravel()
    outputs = onnx_values(prepared.model, ["c"], sample)["c"].astype(np.float64)
    np.testing.assert_allclose(predicted, (outputs**2).mean((0, 2, 3)), rtol=1e-4)


DENSE = {
    "MatMul": "(float[n,3,5] x, float[5,4] w) => (float[n,k] y) { m = MatMul (x, w) y = Flatten (m) }",
    "MatMul with bias": """(float[n,3,5] x, float[5,4] w, float[4] b) => (float[n,k] y) {
        m = MatMul (x, w)
        a = Add (m, b)
        y = Flatten (a)
    }""",
    "Gemm": "(float[n,5] x, float[4,5] w, float[4] b) => (float[n,4] y) { y = Gemm <transB = 1> (x, w, b) }",
    "Gemm with the weight as stored by others": "(float[n,5] x, float[5,4] w) => (float[n,4] y) { y = Gemm (x, w) }",
}


@pytest.mark.parametrize("case", DENSE)
def test_matrix_products(case: str, network: Network, images: Images) -> None:
    prepared = network(DENSE[case])
    sample = images(prepared, 7)
    rows = sample.numpy().astype(np.float64).reshape(1, -1, 5)
    np.testing.assert_allclose(_observe(prepared, sample)["w"], second_moment(rows), rtol=1e-5)


def test_two_uses_are_averaged_over_all_positions(
    networks: dict[str, Prepared], images: Images, onnx_values: Callable[..., dict[str, Any]]
) -> None:
    prepared = networks["shared"]
    sample = images(prepared, 4)
    values = onnx_values(prepared.model, ["x", "r1", "f"], sample)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    rows = np.concatenate([im2col(values[v].astype(np.float64), window) for v in ("x", "r1")], axis=1)
    found = _observe(prepared, sample)
    np.testing.assert_allclose(found["w"], second_moment(rows), rtol=1e-4, atol=1e-6)
    flat = values["f"].astype(np.float64)[None]
    np.testing.assert_allclose(found["w2"], second_moment(flat), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["plain", "residual", "concat", "depthwise", "mlp", "pool", "tokens", "shared", "static"]
)
def test_every_layer_has_a_moment_that_fits_its_weight(
    name: str, networks: dict[str, Prepared], images: Images
) -> None:
    prepared = networks[name]
    found = _observe(prepared, images(prepared, 6), prepared.batch or 4)
    assert set(found) == {layer.name for layer in prepared.layers}
    for layer in prepared.layers:
        groups, columns, again = found[layer.name].shape
        assert groups == layer.groups
        assert columns == again == layer.weights // layer.channels
        assert np.linalg.eigvalsh(found[layer.name]).min() >= -1e-5


@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_the_batch_size_does_not_matter(batch_size: int, networks: dict[str, Prepared], images: Images) -> None:
    sample = images(networks["residual"], 7)
    expected, found = _observe(networks["residual"], sample), _observe(networks["residual"], sample, batch_size)
    for layer, moment in expected.items():
        np.testing.assert_allclose(found[layer], moment, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 95, 96, 97, 250, 1000])
def test_moments_of_pairs_and_of_inputs_with_themselves_add_up(columns: int) -> None:
    """Symmetric products are computed by blocks, of which the last may be narrower."""
    generator = np.random.default_rng(columns)
    own, left, right = (generator.standard_normal((2, 11, columns)).astype(np.float32) for _ in range(3))
    moment = InputMoment()
    moment.add(torch.from_numpy(own))
    alone = moment.moment
    np.testing.assert_allclose(alone, np.einsum("gpi,gpj->gij", own, own, dtype=np.float64) / 11, atol=1e-5)
    assert torch.equal(alone, alone.mT)
    moment.add(torch.from_numpy(right), torch.from_numpy(left))
    first, second = np.concatenate([own, left], 1).astype(np.float64), np.concatenate([own, right], 1)
    expected = np.einsum("gpi,gpj->gij", first, second) / 22
    np.testing.assert_allclose(moment.moment, expected, atol=1e-5)
    means = first.mean(1)[:, :, None] * second.mean(1, dtype=np.float64)[:, None, :]
    np.testing.assert_allclose(moment.covariance, expected - means, atol=1e-5)


def test_transposed_convolutions_are_left_out(network: Network, images: Images) -> None:
    prepared = network(
        """(float[n,2,4,4] x, float[2,3,2,2] w, float[4,192] w2) => (float[n,4] y) {
            c = ConvTranspose <strides = [2, 2]> (x, w)
            f = Flatten (c)
            y = Gemm <transB = 1> (f, w2)
        }"""
    )
    assert set(_observe(prepared, images(prepared, 3))) == {"w2"}


@pytest.mark.parametrize(("limit", "kept"), [(107, {"w"}), (108, {"w", "w2"}), (26, set()), (27, {"w"})])
def test_long_rows_are_left_out(
    limit: int, kept: set[str], networks: dict[str, Prepared], images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_COLUMNS == 512 * 9
    monkeypatch.setattr(layer_inputs, "MAX_COLUMNS", limit)
    assert set(_observe(networks["shared"], images(networks["shared"], 2))) == kept


def test_a_note_says_how_many(networks: dict[str, Prepared], images: Images) -> None:
    result = ObserveMoments(images(networks["plain"], 2))(build_twin(networks["plain"]))
    assert (result.modified, result.notes) == (False, ("input moments of 3 layers observed",))
