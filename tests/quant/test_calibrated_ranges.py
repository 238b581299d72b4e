"""Calibrated ranges against brute force, against the raw data, and against the published entropy procedure."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant import AffineRange, RangeObserver, calibrated_bounds
from qopt.quant.observer import HALF
from qopt.quant.ranges import ENTROPY_BINS, SquaredError, entropy_bounds, mean_square_bounds
from qopt.spec import ActivationSpec

Floats = NDArray[np.float64]
N = 6000


def observe(data: Tensor) -> RangeObserver:
    observer = RangeObserver("relu1")
    for batch in torch.split(data, 1000):
        observer.update(batch)
    return observer


def calibrate(data: Tensor, text: str) -> tuple[float, float]:
    return calibrated_bounds(observe(data), ActivationSpec.parse(text))


def root_mean_square_error(data: Tensor, bounds: tuple[float, float], bits: int) -> float:
    """What quantizing the values themselves costs."""
    affine = AffineRange.from_bounds(*bounds, bits)
    return float((affine.dequantize(affine.quantize(data)).double() - data.double()).square().mean().sqrt())


def sample(kind: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    gauss = torch.randn(N, generator=g)
    return {
        "gauss": gauss,
        "relu": gauss.clamp(min=0),
        "uniform": torch.rand(N, generator=g),
        "heavy": gauss**5,
        "heavy relu": (gauss**5).clamp(min=0),
        "skewed": gauss.exp() - 1,
        "outlier": torch.cat([gauss, torch.tensor([300.0])]),
        "relu6": (3 * gauss).clamp(0, 6),
        "negative": -gauss.abs(),
        "far": -torch.rand(N, generator=g) - 5,
        "tiny": gauss * 1e-30,
        "pixels": torch.randint(0, 256, (N,), generator=g) / 255,
    }[kind]


KINDS = [
    "gauss", "relu", "uniform", "heavy", "heavy relu", "skewed", "outlier", "relu6", "negative", "far", "tiny",
    "pixels",
]  # fmt: skip
values32 = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60)


# ---- least squared error


def brute_force(observer: RangeObserver, bits: int) -> float:
    """Least root of the mean squared error over 60 times 60 candidates, bin by bin, with the codes themselves."""
    counts = observer.counts.numpy()
    bins = np.flatnonzero(counts)
    middles = np.clip((bins - HALF + 0.5) * observer.bin_width, observer.low, observer.high)
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    best = math.inf
    for a in np.geomspace(1, 2**-11, 60 if low else 1):
        for b in np.geomspace(1, 2**-11, 60 if high else 1):
            affine = AffineRange.from_bounds(low * a, high * b, bits)
            codes = np.clip(np.rint(middles / affine.scale) + affine.zero_point, 0, affine.largest_code)
            errors = ((codes - affine.zero_point) * affine.scale - middles) ** 2
            best = min(best, float((errors * counts[bins]).sum() / counts.sum()))
    return math.sqrt(best)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_square_bounds_against_brute_force(kind: str, bits: int) -> None:
    """Over the histogram, and over the values themselves: as good as the grid, up to a bin."""
    data = sample(kind)
    observer = observe(data)
    best = brute_force(observer, bits)
    bounds = mean_square_bounds(observer, bits)
    found = math.sqrt(float(SquaredError(observer)(np.array([bounds[0]]), np.array([bounds[1]]), bits)[0]))
    assert found <= 1.02 * best + observer.bin_width
    assert root_mean_square_error(data, bounds, bits) <= 1.02 * best + 1.5 * observer.bin_width


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_candidate_is_that_of_its_codes(kind: str, bits: int) -> None:
    """Prefix sums against quantizing the middle of every bin, and within half a bin of the values' own error."""
    data = sample(kind)
    observer = observe(data)
    counts = observer.counts.numpy()
    bins = np.flatnonzero(counts)
    middles = np.clip((bins - HALF + 0.5) * observer.bin_width, observer.low, observer.high)
    low, high = min(observer.low, 0.0), max(observer.high, 0.0)
    shrink = np.array([[1.0, 1.0], [0.5, 1.0], [1.0, 0.5], [0.3, 0.07], [1e-3, 1e-3]])
    found = SquaredError(observer)(low * shrink[:, 0], high * shrink[:, 1], bits)
    for (a, b), error in zip(shrink, found, strict=True):
        affine = AffineRange.from_bounds(low * a, high * b, bits)
        codes = np.clip(np.rint(middles / affine.scale) + affine.zero_point, 0, affine.largest_code)
        expected = float((((codes - affine.zero_point) * affine.scale - middles) ** 2 * counts[bins]).sum() / len(data))
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-8 * observer.bin_width**2)
        own = root_mean_square_error(data, (low * a, high * b), bits)
        assert abs(math.sqrt(error) - own) <= 0.5001 * observer.bin_width + 1e-6 * own


@given(values32, st.integers(1, 8))
@settings(max_examples=150)
def test_never_a_larger_error_than_min_max_on_any_values(values: list[float], bits: int) -> None:
    data = torch.tensor(values)
    observer = observe(data)
    bounds = calibrated_bounds(observer, ActivationSpec(bits, calibrator="mse"))
    error = root_mean_square_error(data, bounds, bits)
    assert error <= root_mean_square_error(data, observer.bounds(), bits) * (1 + 1e-6) + 1e-30
    assert observer.low <= bounds[0] <= bounds[1] <= observer.high or bounds[0] <= 0 <= bounds[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_never_a_larger_error_than_min_max_on_distributions(kind: str, bits: int) -> None:
    data = sample(kind, seed=bits)
    error = root_mean_square_error(data, calibrate(data, f"int{bits}:mse"), bits)
    assert error <= root_mean_square_error(data, calibrate(data, f"int{bits}"), bits)


@pytest.mark.parametrize(("kind", "bits"), [("relu", 4), ("heavy relu", 4), ("heavy", 8), ("gauss", 3), ("outlier", 8)])
def test_mean_square_beats_the_other_calibrators(kind: str, bits: int) -> None:
    data = sample(kind)
    error = root_mean_square_error(data, calibrate(data, f"int{bits}:mse"), bits)
    for other in ("minmax", "p99.99", "p99.9", "p99", "entropy"):
        assert error <= 1.01 * root_mean_square_error(data, calibrate(data, f"int{bits}:{other}"), bits), other


def test_the_best_clip_of_a_rectified_normal() -> None:
    """Known from numerical integration: 16 levels on a half-normal are best clipped near 2.9 standard deviations."""
    data = torch.randn(400_000, generator=torch.Generator().manual_seed(3)).clamp(min=0)
    low, high = calibrate(data, "int4:mse")
    assert low == 0
    assert 2.7 < high < 3.1


# ---- entropy


def published_entropy(bins: Floats, levels: int, *, both: bool) -> int:
    """NVIDIA pytorch-quantization's `_compute_amax_entropy`, line by line: the number of bins that are kept on a side.

    ``bins`` are those of |x|; with ``both``, ONNX Runtime's reading: slices around the middle, outliers at either end.
    Slices with fewer filled bins than levels are left out.
    """
    bins = bins.copy()
    middle = len(bins) // 2 if both else 0
    bins[middle] = bins[middle + 1]
    filled = [i for i in range(len(bins)) if bins[i] > 0]
    stop = max(filled[-1] + 1 - middle, middle - filled[0])
    divergences: list[float] = []
    arguments: list[int] = []
    for i in range(64 if both else 128, stop + 1):
        first, last = (middle - i, middle + i) if both else (0, i)
        inside = bins[first:last]
        if (inside > 0).sum() < levels:
            continue
        space = np.linspace(0, len(inside), num=levels + 1)
        digitized = np.digitize(range(len(inside)), space) - 1
        digitized[inside == 0] = -1
        new_counts = np.zeros(levels)
        for index, level in enumerate(digitized):
            if level != -1:
                new_counts[level] += inside[index]
        for filling, number in Counter(digitized.tolist()).items():
            if filling != -1:
                new_counts[filling] /= number
        new_density = np.array([new_counts[level] if level != -1 else 0.0 for level in digitized])
        reference = inside.copy()
        reference[0] += bins[:first].sum()
        reference[-1] += bins[last:].sum()
        divergences.append(kullback_leibler(reference / reference.sum(), new_density / new_density.sum()))
        arguments.append(i)
    best: int = arguments[int(np.argmin(divergences))]
    return best


def kullback_leibler(p: Floats, q: Floats) -> float:
    """scipy.stats.entropy(p, q), written out."""
    if ((p > 0) & (q == 0)).any():
        return math.inf
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("relu", 8), ("relu", 4), ("heavy relu", 4), ("heavy relu", 6), ("gauss", 4), ("heavy", 6), ("skewed", 4),
     ("negative", 4), ("outlier", 3), ("relu6", 4)],
)  # fmt: skip
def test_entropy_is_the_published_procedure(kind: str, bits: int) -> None:
    data = sample(kind)
    observer = observe(data)
    merged = HALF // ENTROPY_BINS
    bins = observer.counts.double().view(-1, merged).sum(1).numpy()
    low, high = observer.bounds()
    both = low < 0 < high
    side = bins if both else bins[ENTROPY_BINS:] if low >= 0 else bins[:ENTROPY_BINS][::-1]
    bound = published_entropy(side, 2**bits, both=both) * observer.bin_width * merged
    expected = max(low, -bound) if low < 0 else low, min(high, bound) if high > 0 else high
    assert entropy_bounds(observer, bits) == expected


def test_entropy_clips_a_long_tail_and_keeps_a_flat_distribution() -> None:
    assert calibrate(sample("heavy relu"), "int4:entropy")[1] < 0.5 * float(sample("heavy relu").max())
    assert calibrate(sample("uniform"), "int4:entropy")[1] > 0.95


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [-1.0, 2.0, 0.5], [5.0, 5.5, 6.0], [-3.0, -2.0]])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_entropy_of_fewer_values_than_levels_is_min_max(values: list[float], bits: int) -> None:
    assert calibrate(torch.tensor(values), f"int{bits}:entropy") == (min(values), max(values))


# ---- all calibrators

SPECS = ["minmax", "p99.9", "p90", "mse", "entropy"]


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("calibrator", SPECS)
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_lie_within_what_was_seen(kind: str, calibrator: str, bits: int) -> None:
    """And one-sided tensors keep zero at the first code, so that the ReLU before them fuses."""
    data = sample(kind)
    low, high = calibrate(data, f"int{bits}:{calibrator}")
    assert min(float(data.min()), 0.0) <= low <= high <= max(float(data.max()), 0.0)
    affine = AffineRange.from_bounds(low, high, bits)
    if float(data.min()) >= 0:
        assert affine.zero_point == 0
    if float(data.max()) <= 0:
        assert affine.zero_point == affine.largest_code


@pytest.mark.parametrize("calibrator", [*SPECS, "clip1", "clip6"])
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-30])
def test_constant_tensors(value: float, calibrator: str) -> None:
    """The one value keeps a code of its own, unless it is clipped on purpose."""
    data = torch.full((100,), value)
    low, high = calibrate(data, f"int4:{calibrator}")
    if not calibrator.startswith("clip"):
        assert low == pytest.approx(value, rel=1e-6)
        assert high == pytest.approx(value, rel=1e-6)
        assert root_mean_square_error(data, (low, high), 4) <= 1e-6 * abs(value)
    elif value >= 0:
        assert (low, high) == (0.0, float(calibrator.removeprefix("clip")))
    else:
        assert (low, high) == (value, value)


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [
        ([0.0, 3.0], "int4:clip1", (0.0, 1.0)),
        ([0.0, 3.0], "int4:clip6", (0.0, 6.0)),
        ([2.0, 30.0], "int4:clip6", (0.0, 6.0)),
        ([-0.5, 30.0], "int4:clip6", (-0.5, 30.0)),
        ([-0.5, 30.0], "int4:clip1", (-0.5, 30.0)),
    ],
)
def test_fixed_clips(values: list[float], text: str, expected: tuple[float, float]) -> None:
    assert calibrate(torch.tensor(values), text) == expected


def test_relu1_codes_are_those_of_dorefa() -> None:
    """METHODS section 1: Q(clip(a, 0, 1), n) = round((2**n - 1) clip(a)) / (2**n - 1)."""
    data = sample("relu")
    for bits in (1, 2, 4, 8):
        affine = AffineRange.from_bounds(*calibrate(data, f"int{bits}:clip1"), bits)
        found = affine.dequantize(affine.quantize(data))
        expected = (data.clamp(0, 1) * (2**bits - 1)).round() / (2**bits - 1)
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@given(values32, st.randoms(use_true_random=False), st.sampled_from(["mse", "entropy", "clip1"]))
@settings(max_examples=60)
def test_order_does_not_matter(values: list[float], shuffler: object, calibrator: str) -> None:
    shuffled = list(values)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    found = [calibrate(torch.tensor(v), f"int3:{calibrator}") for v in (values, shuffled)]
    assert found[0] == found[1]


@given(values32, st.integers(-40, 40), st.sampled_from(["mse", "entropy"]))
@settings(max_examples=60)
def test_a_power_of_two_scales_the_bounds(values: list[float], exponent: int, calibrator: str) -> None:
    data = torch.tensor([v for v in values if v == 0 or abs(v) > 1e-3] or [1.0])
    small, large = (calibrate(d, f"int4:{calibrator}") for d in (data, data * 2.0**exponent))
    assert large == (small[0] * 2.0**exponent, small[1] * 2.0**exponent)


@pytest.mark.parametrize("calibrator", [*SPECS, "clip1"])
def test_nothing_observed(calibrator: str) -> None:
    with pytest.raises(UsageError, match="relu1: no activations"):
        calibrated_bounds(RangeObserver("relu1"), ActivationSpec.parse(f"int4:{calibrator}"))
