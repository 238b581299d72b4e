"""The mean-square scale against brute force, and the mistakes that these checks catch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qopt.quant import quantize_whole
from qopt.quant.codebook import Codebook, codebook
from qopt.quant.scales import max_abs_scale, mean_square_scale, storable
from qopt.spec import Grid, WeightSpec

SPECS = [WeightSpec(kind, bits) for kind in ("int", "log") for bits in (2, 3, 4, 6, 8)]


def error_at(row: Tensor, scale: Tensor, codes: Codebook) -> Tensor:
    """The squared error of the nearest level, by trying every level; scale (k,) gives (k,)."""
    lowest = torch.tensor([-codes.top - 1] if codes.lowest else [], dtype=torch.float64)
    zero = torch.tensor([0.0] if codes.nearest[0] > 0 else [], dtype=torch.float64)
    levels = torch.cat([lowest, -codes.levels.flip(0), zero, codes.levels])
    distance = (row[None, :, None] - scale[:, None, None] * levels).abs().amin(dim=2)
    return distance.square().sum(dim=1)


def brute_force(row: Tensor, codes: Codebook) -> float:
    """The lowest error of 600 scales up to where the largest magnitude just still takes the top level.

    Of either sign, where the levels are not symmetric.
    """
    if codes.lowest:
        plain = replace(codes, lowest=False)
        return min(_brute_force(sign * row, codes, plain) for sign in (1, -1))
    return _brute_force(row, codes, codes)


def _brute_force(row: Tensor, codes: Codebook, plain: Codebook) -> float:
    scales = float(row.abs().max() / plain.nearest[-1]) * torch.logspace(-6, -1e-6, 600, base=2, dtype=torch.float64)
    return min(float(error_at(row, part, codes).min()) for part in torch.split(scales, 50))


def sample(kind: str, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(count, generator=generator, dtype=torch.float64)
    if kind == "heavy":
        row = row**3
    elif kind == "outlier":
        row[0] = 20.0
    return row.float().double()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.short)
@pytest.mark.parametrize("kind", ["gauss", "heavy", "outlier"])
@pytest.mark.parametrize("count", [9, 200])
def test_close_to_the_best_of_600_scales(spec: WeightSpec, kind: str, count: int) -> None:
    codes = codebook(spec)
    rows = torch.stack([sample(kind, count, seed) for seed in range(6)])
    scale = mean_square_scale(rows, codes).double()
    found = sum(float(error_at(row, one[None], codes)) for row, one in zip(rows, scale, strict=True))
    best = sum(brute_force(row, codes) for row in rows)
    assert found <= best * (1.02 if count == 200 or spec.bits <= 4 else 1.1)


@pytest.mark.parametrize(("bits", "grid"), [(b, "full") for b in (2, 3, 4, 6, 8)] + [(b, "mid") for b in (2, 3, 4)])
@pytest.mark.parametrize("kind", ["gauss", "heavy", "outlier"])
@pytest.mark.parametrize("count", [9, 200])
def test_other_grids_are_close_to_the_best_of_all_scales(bits: int, grid: Grid, kind: str, count: int) -> None:
    codes = codebook(WeightSpec("int", bits), grid)
    rows = torch.stack([sample(kind, count, seed) for seed in range(6)])
    scale = mean_square_scale(rows, codes).double()
    found = sum(float(error_at(row, one[None], codes)) for row, one in zip(rows, scale, strict=True))
    assert found <= sum(brute_force(row, codes) for row in rows) * (1.02 if count == 200 or bits <= 4 else 1.1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.short)
def test_max_abs_alone_would_be_caught(spec: WeightSpec) -> None:
    """A planted mistake: the search returns its starting point."""
    codes = codebook(spec)
    rows = torch.stack([sample("heavy", 200, seed) for seed in range(6)])
    lazy = sum(float(error_at(row, max_abs_scale(row[None], codes).double(), codes)) for row in rows)
    assert lazy > 1.005 * sum(brute_force(row, codes) for row in rows)


def test_ternary_scale_is_the_mean_of_the_kept_magnitudes() -> None:
    """Closed form (Li and Liu 2016): the best scale for a support is the mean magnitude on it."""
    row = sample("gauss", 500, 5)
    magnitudes = row.abs().sort(descending=True).values
    gains = magnitudes.cumsum(0).square() / torch.arange(1, 501)
    kept = int(gains.argmax()) + 1
    quantized = quantize_whole(row, WeightSpec.parse("ternary:tensor"))
    assert float(quantized.scale) == pytest.approx(float(magnitudes[:kept].mean()), rel=1e-6)
    assert int(quantized.codes.abs().sum()) == kept


def test_binary_scale_minimises_the_error() -> None:
    row = sample("heavy", 100, 6)
    quantized = quantize_whole(row, WeightSpec.parse("int1:tensor"))
    around = float(quantized.scale) * torch.linspace(0.8, 1.2, 41, dtype=torch.float64)
    errors = (row[None] - around[:, None] * row.sign()).square().sum(dim=1)
    assert int(errors.argmin()) == 20


def test_log_search_uses_nearest_levels_and_max_rounds_exponents() -> None:
    """0.73 of a level: the exponent rounds up (0.73 > 0.7071), the nearest level is the lower one (0.73 < 0.75)."""
    row = torch.tensor([1.0] * 50 + [0.73, 0.5, 0.25])
    by_exponent = quantize_whole(row, WeightSpec.parse("log3:tensor:max")).dequantize()
    by_level = quantize_whole(row, WeightSpec.parse("log3:tensor")).dequantize()
    assert float(by_exponent[50]) == 1.0
    assert float(by_level[50]) == pytest.approx(0.5, rel=0.01)


def test_storable_scales_are_normal_finite_and_stable() -> None:
    for spec in SPECS:
        codes = codebook(spec)
        scales = storable(torch.tensor([0.0, 1e-60, 1e-39, 0.1, 1 / 3, 3.4e38], dtype=torch.float64), codes)
        assert scales.dtype == torch.float32
        assert float(scales[0]) == 1.0
        assert bool((scales >= torch.finfo(torch.float32).tiny).all())
        assert bool(torch.isfinite(scales * codes.top).all())
        assert torch.equal(max_abs_scale((scales * codes.top).double()[:, None], codes), scales)


def test_chunked_search_equals_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.stack([sample("gauss", 64, seed) for seed in range(5)])
    codes = codebook(WeightSpec("int", 4))
    whole = mean_square_scale(rows, codes)
    monkeypatch.setattr("qopt.quant.scales.LOOKUPS", 1)
    assert torch.allclose(mean_square_scale(rows, codes), whole, rtol=1e-6)
