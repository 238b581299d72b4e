"""Algorithm 1 of Song, Ranjan and Li against a literal transcription on numpy's SVD; and the uniform baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.lipschitz import max_row_sum, reshaped_l2
from qopt.quant import quantize_weight
from qopt.quantize import Quantizer
from qopt.search.lipschitz import LipschitzSearch, choose
from qopt.search.space import Candidate, LayerSpace, Space
from qopt.search.uniform import UniformSearch
from qopt.size import Stored
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]


def norm(weight: Tensor) -> float:
    """The spectral norm of the matrix c_out x (c_in kh kw)."""
    return float(np.linalg.norm(weight.double().reshape(weight.shape[0], -1).numpy(), ord=2))


def algorithm_1(weight: Tensor) -> tuple[str, bool]:
    """METHODS section 2, word for word: the chosen method and bits, and whether both thresholds hold."""
    bound_q = 1.10 * norm(weight)
    bound_d = 0.3 if norm(weight) < 3.0 else 1.5
    found = {}
    for method in ("int", "log"):
        quantized = {
            q: quantize_weight(weight, WeightSpec.parse(f"{method}{q}:tensor:max")).dequantize() for q in range(1, 9)
        }
        q = 1
        while norm(quantized[q]) > bound_q or norm(weight.double() - quantized[q].double()) > bound_d:
            q += 1
            if q > 8:
                break
        met = q <= 8
        if not met:
            q = min(quantized, key=lambda q: norm(weight.double() - quantized[q].double()))
        found[method] = (norm(weight.double() - quantized[q].double()), f"{method}{q}:tensor:max", met)
    method = "int" if found["int"][0] < found["log"][0] else "log"
    return found[method][1:]


def layer_space(weight: Tensor, name: str = "w") -> LayerSpace:
    candidates = []
    for spec in LipschitzSearch().candidates(()):
        quantized = quantize_weight(weight, spec).dequantize().double()
        error = weight.double() - quantized
        stored = Stored(weight.numel(), weight.shape[0], spec)
        bits = weight.numel() * spec.container_bits
        candidates.append(
            Candidate(spec, bits, stored.bytes, reshaped_l2(quantized), reshaped_l2(error), max_row_sum(error))
        )
    return LayerSpace(name, weight.numel(), reshaped_l2(weight), max_row_sum(weight), tuple(candidates))


shapes = st.sampled_from([(4, 6), (1, 9), (8, 3, 3, 3), (16, 1, 3, 3), (5, 1)])


@settings(max_examples=120)
@given(seed=st.integers(0, 10**6), shape=shapes, scale=st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0, 30.0, 1000.0]))
def test_random_weights(seed: int, shape: tuple[int, ...], scale: float) -> None:
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    chosen, met = choose(layer_space(weight))
    assert (str(chosen.spec), met) == algorithm_1(weight)


def test_the_embedded_example(example: Quantizer, example_space: Space) -> None:
    outcome = LipschitzSearch()(example_space)
    for layer in example.prepared.layers:
        weight = example.weight(layer)
        assert layer.channel_axis == 0
        assert layer.groups == 1
        expected, met = algorithm_1(weight)
        assert str(outcome.specs[layer.name]) == expected
        assert ("threshold not met" in outcome.reasons[layer.name]) == (not met)
    assert list(outcome.specs) == [layer.name for layer in example.prepared.layers]
    assert len({spec.bits for spec in outcome.specs.values()}) > 1, "the example shows nothing"


def test_ties_go_to_log() -> None:
    """Weights so small that one bit passes: both methods are binary there and equal."""
    space = layer_space(0.01 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    one_bit = [c for c in space.candidates if c.spec.bits == 1]
    assert one_bit[0].error == one_bit[1].error
    chosen, met = choose(space)
    assert (str(chosen.spec), met) == ("log1:tensor:max", True)


def test_linear_wins_only_where_it_is_strictly_closer() -> None:
    levels = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, -3.0, -1.0, 2.0]])
    chosen, met = choose(layer_space(levels))
    assert (chosen.spec.kind, met) == ("int", True)
    powers = torch.tensor([[0.0, 1.0, 0.5, 0.25], [1.0, -1.0, -0.25, 0.5]])
    chosen, met = choose(layer_space(powers))
    assert (chosen.spec.kind, met) == ("log", True)


def test_where_no_width_passes_the_closest_is_taken_and_named() -> None:
    small = 0.01 * torch.ones(2, 2)
    large = 1e4 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    space = Space((layer_space(small, "small"), layer_space(large, "large")))
    outcome = LipschitzSearch()(space)
    candidates = space.layers[1].candidates
    closest = min(candidates, key=lambda c: c.error.value)
    assert outcome.specs["large"] == closest.spec == WeightSpec.parse("int8:tensor:max")
    assert outcome.notes == ("no width up to 8 bits meets the thresholds of: large",)
    assert outcome.reasons["large"].startswith("Algorithm 1: threshold not met, lowest ||dW||: ||Wq|| ")
    assert outcome.reasons["small"].startswith("Algorithm 1: ||Wq|| 0.02 (T 0.022), ||dW|| ")
    assert outcome.gap is None


def test_when_all_pass_nothing_is_noted() -> None:
    assert LipschitzSearch()(Space((layer_space(0.01 * torch.ones(2, 2)),))).notes == ()


@pytest.mark.parametrize("bits", [0.5, 2.0, 4.0])
def test_limits_of_the_target_play_no_part(bits: float) -> None:
    space = Space((layer_space(torch.randn(4, 6, generator=torch.Generator().manual_seed(2))),))
    limited = replace(space, limits=(Limit("bits", bits),))
    assert LipschitzSearch()(limited).specs == LipschitzSearch()(space).specs


def test_formats_that_the_target_rules_out_are_passed_over() -> None:
    layer = layer_space(torch.randn(4, 6, generator=torch.Generator().manual_seed(3)))
    only_int = replace(layer, candidates=tuple(c for c in layer.candidates if c.spec.kind == "int" and c.spec.bits > 2))
    chosen, _ = choose(only_int)
    assert (chosen.spec.kind, chosen.spec.bits > 2) == ("int", True)
    with pytest.raises(UsageError, match="w: the target takes no linear or log format per tensor"):
        choose(replace(layer, candidates=()))


def test_the_candidates_are_the_sixteen_of_the_paper() -> None:
    specs = list(map(str, LipschitzSearch().candidates((WeightSpec.parse("int4"),))))
    assert specs == [f"{kind}{bits}:tensor:max" for kind in ("int", "log") for bits in range(1, 9)]


FLAT = {"int2": 0.0, "int4": 0.0, "int4:max": 0.0, "int8": 0.0}
UNIFORM: list[tuple[list[dict[str, float]], list[Limit], str]] = [
    ([FLAT, FLAT], [], "int8"),
    ([FLAT, FLAT], [Limit("bits", 8.0)], "int8"),
    ([FLAT, FLAT], [Limit("bits", 7.99)], "int4"),
    ([FLAT, FLAT], [Limit("bits", 4.0)], "int4"),
    ([FLAT, FLAT], [Limit("bits", 3.0)], "int2"),
    ([FLAT, FLAT], [Limit("size", 1100.0), Limit("bits", 8.0)], "int4"),
    ([{"int4:max": 0.0, "int4": 0.0}, FLAT], [], "int4:max"),
    ([{"int4": 0.0, "int8": 0.0}, {"int4": 0.0, "int2": 0.0}], [], "int4"),
]


@pytest.mark.parametrize(("formats", "limits", "chosen"), UNIFORM)
def test_uniform_takes_the_widest_within_the_limits(
    make_space: MakeSpace, formats: list[dict[str, float]], limits: list[Limit], chosen: str
) -> None:
    space = make_space([(f"l{i}", 1000, 8, few) for i, few in enumerate(formats)], limits)
    outcome = UniformSearch()(space)
    assert {str(spec) for spec in outcome.specs.values()} == {chosen}
    assert list(outcome.specs) == ["l0", "l1"]
    assert set(outcome.reasons.values()) == {f"uniform {chosen}"}


UNIFORM_FAILS: list[tuple[list[dict[str, float]], list[Limit]]] = [
    ([FLAT, FLAT], [Limit("bits", 1.0)]),
    ([{"int4": 0.0}, {"int8": 0.0}], []),
    ([{}, FLAT], []),
]


@pytest.mark.parametrize(("formats", "limits"), UNIFORM_FAILS)
def test_uniform_says_where_nothing_fits(
    make_space: MakeSpace, formats: list[dict[str, float]], limits: list[Limit]
) -> None:
    space = make_space([(f"l{i}", 1000, 8, few) for i, few in enumerate(formats)], limits)
    with pytest.raises(InfeasibleError, match="no linear format that all layers can take keeps the limits"):
        UniformSearch()(space)


def test_uniform_wants_the_linear_formats_of_the_target() -> None:
    target = tuple(map(WeightSpec.parse, ["int2", "log2", "float", "int4:max"]))
    assert list(map(str, UniformSearch().candidates(target))) == ["int2", "int4:max"]
