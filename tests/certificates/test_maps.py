"""Affine maps against the matrix they stand for."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.certificates.maps import Average, Convolution, Map, Pick, Product, Scaling, image, picked
from qopt.certificates.operator_norms import largest_sums, operator_norm, schur, weight_change


def matrix(map_: Map, source: tuple[int, ...]) -> Tensor:
    """W, column by column."""
    eye = torch.eye(prod(source), dtype=torch.float64).reshape(-1, *source)
    return map_.product(eye).flatten(1).T


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS: dict[str, tuple[Map, tuple[int, ...]]] = {
    "conv": (Convolution(random(4, 2, 3, 3), random(4, 1, 1), (2, 5, 6), (2, 1), (1, 2), (1, 1), 1), (2, 5, 6)),
    "grouped": (Convolution(random(4, 1, 3, 2), None, (2, 6, 5), (1, 2), (0, 1), (2, 1), 2), (2, 6, 5)),
    "conv1d": (Convolution(random(3, 2, 3), random(3, 1), (2, 7), (2,), (1,), (1,), 1), (2, 7)),
    "product": (Product(random(3, 5), random(3)), (5,)),
    "tokens": (Product(random(3, 5), None), (4, 5)),
    "scaling": (Scaling(random(3, 1, 1), random(3, 1, 1)), (3, 2, 2)),
    "shift": (Scaling(None, random(3, 1, 1)), (3, 2, 2)),
    "average": (Average(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), (2, 5, 5), 9), (2, 5, 5)),
    "mean": (Average(lambda x: x.mean((2, 3)), (2, 3, 4), 12), (2, 3, 4)),
    "pad": (picked(lambda x: F.pad(x, (1, 2), value=0.5), (2, 3)), (2, 3)),
    "reshape": (picked(lambda x: x.reshape(1, 6), (2, 3)), (2, 3)),
    "expand": (picked(lambda x: x.expand(1, 4, 3), (1, 3)), (1, 3)),
    "reverse": (picked(lambda x: x.flip(2), (2, 3)), (2, 3)),
}


@pytest.mark.parametrize("name", MAPS)
class TestMaps:
    def test_the_adjoint_is_the_transpose(self, name: str) -> None:
        map_, source = MAPS[name]
        whole = matrix(map_, source)
        rows = random(7, *map_.product(torch.zeros(1, *source, dtype=torch.float64)).shape[1:], seed=1)
        assert torch.allclose(map_.adjoint(rows).flatten(1), rows.flatten(1) @ whole, atol=1e-12)
        assert map_.adjoint(rows.float()).dtype == torch.float32

    def test_the_magnitude_has_the_sizes_of_the_entries(self, name: str) -> None:
        map_, source = MAPS[name]
        assert torch.allclose(matrix(map_.magnitude(), source), matrix(map_, source).abs(), atol=1e-12)

    def test_the_offset_is_what_zero_maps_to(self, name: str) -> None:
        map_, source = MAPS[name]
        x = random(2, *source)
        expected = (x.flatten(1) @ matrix(map_, source).T).reshape(image(map_, x).shape)
        if map_.offset is not None:
            expected = expected + map_.offset
        assert torch.allclose(image(map_, x), expected, atol=1e-12)

    def test_terms_count_the_entries(self, name: str) -> None:
        map_, source = MAPS[name]
        used = matrix(map_, source) != 0
        if not isinstance(map_, Pick):
            assert map_.terms >= int(used.sum(1).max()) - (getattr(map_, "factor", 0) is None)
            assert map_.back_terms >= int(used.sum(0).max())
        else:
            assert map_.back_terms == max(int(used.sum(0).max()) - 1, 0)

    def test_norms_are_not_too_small(self, name: str) -> None:
        map_, source = MAPS[name]
        whole = matrix(map_, source)
        spectral, rows = float(torch.linalg.matrix_norm(whole, 2)), float(whole.abs().sum(1).max())
        assert spectral <= operator_norm(map_, source, "l2") <= 2.0 * spectral + 1e-9
        assert rows <= operator_norm(map_, source, "linf") * (1 + 1e-12)
        assert schur(map_, source) >= float(torch.linalg.matrix_norm(whole.abs(), 2)) * (1 - 1e-12)
        assert largest_sums(map_, source)[1] >= float(whole.abs().sum(0).max()) * (1 - 1e-12)


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(5, 7)),
    st.integers(0, 99),
)
def test_random_convolutions(kernel: tuple[int, int, int, int], rest: tuple[int, int, int, int], seed: int) -> None:
    height, width, stride, pad = kernel
    dilation, groups, channels, size = rest
    weight = random(2 * groups, channels, height, width, seed=seed)
    source = (groups * channels, size, size + 1)
    map_ = Convolution(weight, None, source, (stride, 1), (pad, 0), (dilation, 1), groups)
    whole = matrix(map_, source)
    rows = random(3, *map_.product(torch.zeros(1, *source, dtype=torch.float64)).shape[1:], seed=seed + 1)
    assert torch.allclose(map_.adjoint(rows).flatten(1), rows.flatten(1) @ whole, atol=1e-12)
    assert float(torch.linalg.matrix_norm(whole, 2)) <= operator_norm(map_, source, "l2")


def test_what_moves_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch axis"):
        picked(lambda x: x.permute(1, 0, 2), (2, 3))


class TestWeightChange:
    def test_the_difference(self) -> None:
        first, second = MAPS["product"][0], Product(random(3, 5, seed=4), None)
        change = weight_change(first, second)
        assert change is not None
        assert torch.allclose(matrix(change, (5,)), matrix(first, (5,)) - matrix(second, (5,)))

    @pytest.mark.parametrize("name", MAPS)
    def test_equal_maps_do_not_differ(self, name: str) -> None:
        assert weight_change(MAPS[name][0], MAPS[name][0]) is None

    def test_different_shapes_and_kinds(self) -> None:
        with pytest.raises(ValueError, match="shapes"):
            weight_change(Product(random(3, 5), None), Product(random(3, 4), None))
        with pytest.raises(ValueError, match="kinds"):
            weight_change(Product(random(3, 5), None), Scaling(None, None))
