"""The corrected bias restores the means that it was given."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import DataError, UsageError
from qopt.quant import corrected_bias, quantize_whole
from qopt.spec import WeightSpec


@given(st.integers(0, 10**6), st.booleans(), st.sampled_from(["int2", "int3", "log3", "int1"]))
@settings(max_examples=30)
def test_means_agree_after_correction(seed: int, with_bias: bool, text: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 20, generator=generator)
    bias = torch.randn(6, generator=generator) if with_bias else None
    images = torch.rand(50, 20, generator=generator)
    rounded = quantize_whole(weight, WeightSpec.parse(text)).dequantize()
    float_mean = torch.nn.functional.linear(images, weight, bias).mean(dim=0)
    quantized_mean = torch.nn.functional.linear(images, rounded, bias).mean(dim=0)
    corrected = corrected_bias(bias, float_mean, quantized_mean)
    assert corrected.dtype == torch.float32
    after = torch.nn.functional.linear(images, rounded, corrected).mean(dim=0)
    assert torch.allclose(after, float_mean, atol=1e-5)
    sign_mistake = corrected_bias(bias, quantized_mean, float_mean)
    wrong = torch.nn.functional.linear(images, rounded, sign_mistake).mean(dim=0)
    assert not torch.allclose(wrong, float_mean, atol=1e-5)


def test_equal_means_leave_the_bias() -> None:
    bias = torch.tensor([0.1, -0.2, 3.0])
    mean = torch.tensor([5.0, 6.0, 7.0])
    assert torch.equal(corrected_bias(bias, mean, mean), bias)
    assert torch.equal(corrected_bias(None, mean, mean), torch.zeros(3))


@pytest.mark.parametrize(
    ("bias", "float_shape", "quantized_shape"),
    [(torch.zeros(3), (2,), (2,)), (None, (2,), (3,)), (None, (2, 2), (2, 2)), (torch.zeros(()), (), ())],
)
def test_shapes_must_agree(
    bias: torch.Tensor | None, float_shape: tuple[int, ...], quantized_shape: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match="one value per channel"):
        corrected_bias(bias, torch.zeros(float_shape), torch.zeros(quantized_shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_means_must_be_finite(bad: float) -> None:
    with pytest.raises(DataError):
        corrected_bias(None, torch.tensor([1.0, bad]), torch.zeros(2))
