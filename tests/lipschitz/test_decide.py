"""Lazy decisions are those of the full table of norms, cheap intervals hold, and shortcuts that do neither."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.lipschitz import NormBound, as_matrix, cheap, lazy, reshaped_l2, spectral_norms
from qopt.lipschitz.cheap import Coarse
from qopt.lipschitz.decide import CandidateNorms, choose, decide
from qopt.lipschitz.lazy import LazyNorm
from qopt.quant.weights import quantize_whole
from qopt.search import lipschitz as search
from qopt.search.space import Candidate, LayerSpace
from qopt.search.thresholds import paper_thresholds
from qopt.spec import WeightSpec

SPECS = [WeightSpec(kind, bits, "tensor", "max") for kind in ("int", "log") for bits in range(1, 9)]
KINDS = ["gauss", "heavy", "rank1", "sparse", "decaying", "rows", "ones", "zero"]
MAGNITUDES = [1.0, 1.0, 0.1, 1e-20, 1e20, 1e-37, 1e35]


def matrices(kind: str, shape: tuple[int, int, int], seed: int, magnitude: float = 1.0) -> Tensor:
    """Float32 batches (groups, rows, columns) whose spectra differ."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "heavy":
        values = values**3
    elif kind == "rank1":
        values = values[:, :, :1] @ values[:, :1]
    elif kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.1)
    elif kind == "decaying":
        u, s, v = torch.linalg.svd(values, full_matrices=False)
        values = (u * s[:, :1, None].mT * torch.arange(1, s.shape[1] + 1).rsqrt()) @ v
    elif kind == "rows":
        values = values * torch.logspace(-12, 0, shape[1])[:, None]
    elif kind == "ones":
        values = torch.ones(shape)
    elif kind == "zero":
        values = torch.zeros(shape)
    return values * magnitude


def truth(batch: Tensor) -> float:
    """The largest norm, by numpy's SVD in float64."""
    scale = float(batch.abs().max()) or 1.0
    return max(float(np.linalg.norm(m, 2)) for m in (batch.double() / scale).numpy()) * scale


def full(batch: Tensor) -> NormBound:
    return NormBound.largest(spectral_norms(batch))


shapes = st.tuples(st.sampled_from([1, 1, 1, 2, 3]), st.integers(1, 40), st.integers(1, 40))
batches = st.builds(
    matrices, st.sampled_from(KINDS), shapes, st.integers(0, 10**6), st.sampled_from(MAGNITUDES)
)  # fmt: skip


@given(batches)
@settings(max_examples=150)
def test_every_cheap_interval_holds(batch: Tensor) -> None:
    norm, rounding = truth(batch), 1 + 1e-12
    coarse = Coarse.of(batch, None, "w")
    for upper in (coarse.frobenius(), coarse.schur(), coarse.blocks(), coarse.gram()[1]):
        assert upper * rounding >= norm
    for lower in (coarse.stretch(math.inf), coarse.stretch(norm / 2), coarse.gram()[0]):
        assert lower <= norm * rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 150, 700), (1, 700, 150), (2, 130, 200), (1, 200, 1100)])
def test_on_larger_matrices_too_and_not_far_off(shape: tuple[int, int, int], kind: str) -> None:
    batch = matrices(kind, shape, 7, 1e-3)
    norm, coarse = truth(batch), Coarse.of(batch, None, "w")
    low, high = coarse.gram()
    assert low <= norm * (1 + 1e-12)
    assert norm * (1 - 1e-12) <= high <= low * 1.02
    assert norm * (1 - 1e-12) <= coarse.blocks() <= coarse.frobenius()
    assert 0.4 * norm <= coarse.stretch(math.inf) <= norm * (1 + 1e-12)


@given(batches, st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 3.0, 20.0]), st.integers(0, 3))
@settings(max_examples=200)
def test_an_answer_is_that_of_the_norm(batch: Tensor, factor: float, ulps: int) -> None:
    """At the norm's own upper end, an ulp below it, and anywhere else."""
    expected = full(batch).upper
    threshold = expected * factor
    for _ in range(ulps):
        threshold = math.nextafter(threshold, 0.0)
    norm = LazyNorm(batch)
    early = norm.at_most(threshold, compute=False)
    assert early in (None, expected <= threshold)
    assert norm.at_most(threshold) is (expected <= threshold)
    assert norm.lower <= truth(batch) * (1 + 1e-12)
    assert norm.upper >= truth(batch) * (1 - 1e-12)
    assert norm.bound.upper == expected
    assert norm.at_most(threshold, compute=False) is (expected <= threshold)


@given(st.sampled_from(KINDS), st.sampled_from([0.0, 1e-9, 1e-3, 0.3, 1.0]), shapes, st.integers(0, 10**6))
@settings(max_examples=120)
def test_comparisons_and_neighbours(kind: str, noise: float, shape: tuple[int, int, int], seed: int) -> None:
    a = matrices(kind, shape, seed)
    b = a + noise * matrices("gauss", shape, seed + 1)
    whole = matrices("gauss", shape, seed + 2)
    first, second = LazyNorm(whole, a), LazyNorm(whole, b)
    expected = full(whole.double() - a).upper < full(whole.double() - b).upper
    assert first.less_than(second, compute=False) in (None, expected)
    assert first.less_than(second) is expected
    third = LazyNorm(whole, b)
    third.near(first)
    norm = truth(whole.double() - b)
    assert third.lower <= norm * (1 + 1e-12)
    assert third.upper >= norm * (1 - 1e-12)
    if noise == 0:
        assert third.upper <= first.bound.upper * (1 + 1e-12)


def layer_candidates(weight: Tensor, groups: int = 1) -> tuple[list[Tensor], NormBound, list[CandidateNorms]]:
    quantized = [quantize_whole(weight, spec).dequantize() for spec in SPECS]
    whole = reshaped_l2(weight, 0, groups)
    return quantized, whole, [CandidateNorms.of(weight, q, whole, 0, groups) for q in quantized]


weights = st.builds(
    lambda kind, rows, columns, seed, size: matrices(kind, (1, rows, columns), seed, size)[0],
    st.sampled_from(KINDS[:-1]), st.integers(1, 24), st.integers(1, 24), st.integers(0, 10**6),
    st.sampled_from([1e-3, 0.05, 0.3, 1.0, 10.0]),
)  # fmt: skip
PAIRS = [(1.1, None), (1.0, 0.3), (1.02, 0.05), (0.9, 1.0), (2.0, 0.0)]


@given(weights, st.sampled_from(PAIRS), st.booleans())
@settings(max_examples=80)
def test_decisions_are_those_of_the_full_table(weight: Tensor, pair: tuple[float, float | None], split: bool) -> None:
    groups = 2 if split and len(weight) % 2 == 0 else 1
    quantized, whole, candidates = layer_candidates(weight, groups)
    most_norm, most_error = paper_thresholds(whole.upper)
    if pair[1] is not None:
        most_norm, most_error = pair[0] * whole.upper, pair[1] * whole.upper
    norms = [reshaped_l2(q, 0, groups) for q in quantized]
    errors = [reshaped_l2(weight.double() - q, 0, groups) for q in quantized]
    expected = [n.accepts(most_norm) and e.accepts(most_error) for n, e in zip(norms, errors, strict=True)]
    assert decide(candidates, most_norm, most_error) == expected
    _, _, others = layer_candidates(weight, groups)
    assert [c.norm_at_most(most_norm) for c in others] == [n.accepts(most_norm) for n in norms]
    assert [c.error_at_most(most_error) for c in others] == [e.accepts(most_error) for e in errors]


@given(weights)
@settings(max_examples=80)
def test_the_choice_is_that_of_the_search(weight: Tensor) -> None:
    """`qopt.search.lipschitz.choose` on the full table of norms."""
    quantized, whole, candidates = layer_candidates(weight)
    table = [
        Candidate(spec, 1.0, 1, reshaped_l2(q), reshaped_l2(weight.double() - q), whole)
        for spec, q in zip(SPECS, quantized, strict=True)
    ]
    expected, met = search.choose(LayerSpace("w", weight.numel(), whole, whole, tuple(table)))
    chosen, lazily_met = choose(candidates[:8], candidates[8:], *paper_thresholds(whole.upper))
    assert SPECS[candidates.index(chosen)] == expected.spec
    assert lazily_met is met


@pytest.mark.parametrize("scale", [0.02, 0.2])
def test_few_norms_are_computed(scale: float) -> None:
    weight = matrices("gauss", (1, 128, 1152), 0, scale)[0]
    _, whole, candidates = layer_candidates(weight)
    decide(candidates, *paper_thresholds(whole.upper))
    assert sum(c.norm.computed + c.error.computed for c in candidates) <= 8


def test_one_answer_of_no_leaves_the_other_norm_alone() -> None:
    weight = matrices("gauss", (1, 64, 64), 0)[0]
    whole = reshaped_l2(weight)
    far = CandidateNorms.of(weight, -weight, whole)
    assert far.meets(2 * whole.upper, 0.1 * whole.lower) is False
    assert math.isinf(far.norm.upper) or not far.norm.computed
    same = CandidateNorms.of(weight, weight.clone(), whole)
    assert same.meets(1.1 * whole.upper, 0.0) is True
    assert not same.norm.computed
    assert not same.error.computed


# --- shortcuts that are no bounds ---


def test_a_power_method_that_accepts_would_be_caught() -> None:
    caught = 0
    for seed in range(20):
        batch = matrices("gauss", (1, 64, 144), seed)
        caught += Coarse.of(batch, None, "w").stretch(math.inf) < full(batch).lower * (1 - 1e-3)
    assert caught >= 15


def test_neighbours_without_their_distance_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cheap.Coarse, "frobenius", lambda self: 0.0)
    whole, a, b = (matrices("gauss", (1, 20, 30), seed) for seed in range(3))
    first, second = LazyNorm(whole, a), LazyNorm(whole, b)
    first.narrow(first.bound.lower, first.bound.upper)
    second.near(first)
    norm = truth(whole.double() - b)
    assert not second.lower <= norm <= second.upper


def test_float32_without_its_rounding_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row the Frobenius norm is the spectral norm: without slack half of the upper bounds are too low."""
    monkeypatch.setattr(cheap, "UNIT", 0.0)
    caught = 0
    for seed in range(30):
        batch = matrices("gauss", (1, 1, 400), seed)
        caught += Coarse.of(batch, None, "w").frobenius() < truth(batch) * (1 - 1e-12)
    assert caught >= 5


def test_a_knife_s_edge_without_the_interval_s_width_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that is just below a threshold which the computed interval's upper end exceeds."""
    batch = matrices("gauss", (1, 8, 8), 0)
    bound = full(batch)
    middle = (bound.lower + bound.upper) / 2
    norm = LazyNorm(batch)
    norm.narrow(bound.lower, middle)
    assert norm.at_most(middle) is False
    monkeypatch.setattr(lazy, "EPS", 0.0)
    norm = LazyNorm(batch)
    norm.narrow(bound.lower, math.nextafter(middle, 0.0))
    assert norm.at_most(middle) is True  # the mistake: the table says no


# --- extremes and errors ---


def test_sums_too_long_for_float32_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "LONGEST", 10)
    batch = matrices("gauss", (1, 8, 8), 0)
    norm, other = LazyNorm(batch), LazyNorm(batch * 2)
    assert norm.at_most(1e9, compute=False) is None
    other.near(norm)
    assert math.isinf(other.upper)
    assert norm.at_most(1e9) is True
    assert norm.computed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8])
def test_other_dtypes(dtype: torch.dtype) -> None:
    batch = torch.tensor([[[3, 0], [0, -4]]]).to(dtype)
    norm = LazyNorm(batch, torch.zeros(1, 2, 2))
    assert norm.at_most(4.1) is True
    assert norm.at_most(3.9) is False


def test_float64_below_float32() -> None:
    tiny = torch.tensor([[[3e-320, 0.0], [0.0, 1e-322]]], dtype=torch.float64)
    assert Coarse.of(tiny, None, "w").frobenius() >= 3e-320
    assert LazyNorm(tiny).at_most(3.1e-320) is True


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_must_be_finite(bad: float) -> None:
    batch = torch.ones(1, 3, 3)
    batch[0, 2, 1] = bad
    for norm in (LazyNorm(batch, where="fc"), LazyNorm(torch.ones(1, 3, 3), batch, where="fc")):
        with pytest.raises(CorruptModelError, match=r"^fc: entries that are not finite"):
            norm.at_most(1.0)
        with pytest.raises(CorruptModelError, match=r"^fc: entries that are not finite"):
            _ = norm.bound


def test_what_does_not_fit_names_the_layer() -> None:
    weight = torch.ones(4, 3)
    with pytest.raises(UsageError, match=r"^fc: a quantized weight of another shape"):
        CandidateNorms.of(weight, torch.ones(3, 4), reshaped_l2(weight), where="fc")
    with pytest.raises(UsageError, match=r"^fc: groups that do not divide"):
        CandidateNorms.of(weight, weight, reshaped_l2(weight), 0, 3, where="fc")
    for first, second in ((torch.ones(2, 2), None), (torch.ones(1, 0, 2), None), (torch.ones(1, 2, 2), weight)):
        with pytest.raises(UsageError, match=r"^fc: no batches of matrices"):
            LazyNorm(first, second, where="fc")
    assert as_matrix(weight).shape == (1, 4, 3)
