"""Weights whose channels have formats of their own: every format sees its channels only, and they stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.errors import CorruptModelError, PlanError, UsageError, VerificationError
from qopt.quant import QuantizedRows, parts_of, quantize_weight, quantize_whole, with_parts
from qopt.quant.linear import DEAD
from qopt.spec import WeightSpec

FORMATS = ["int8", "int5", "int4", "int4:mid", "int4:max", "int3", "int2", "int2:narrow", "int1", "ternary", "log4"]
FORMATS += ["log2:max", "int8:full", "log1"]
ALL = "rows(" + ",".join(FORMATS) + ")"


def rows_of(weight: Tensor, spec: WeightSpec | str, axis: int = 0) -> QuantizedRows:
    found = quantize_weight(weight, WeightSpec.parse(spec) if isinstance(spec, str) else spec, axis, where="conv1")
    assert isinstance(found, QuantizedRows)
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(weight: Tensor, formats: Sequence[str], axis: int) -> Tensor:
    """Every format quantizes the channels it has, picked and put back one by one."""
    result = torch.full_like(weight, torch.nan)
    for text in set(formats):
        members = [channel for channel, other in enumerate(formats) if other == text]
        part = quantize_whole(
            torch.stack([weight.select(axis, m) for m in members], axis), WeightSpec.parse(text), axis
        )
        for position, member in enumerate(members):
            result.select(axis, member).copy_(part.dequantize().select(axis, position))
    return result


formats = st.lists(st.sampled_from(FORMATS), min_size=1, max_size=9)


@settings(max_examples=100)
@given(formats, st.integers(1, 7), st.integers(0, 2), st.integers(0, 99))
def test_every_format_sees_its_own_channels(texts: list[str], fan_in: int, axis: int, seed: int) -> None:
    weight = random(len(texts), fan_in, 2, seed=seed).movedim(0, axis)
    spec = WeightSpec.parse(f"rows({','.join(texts)})")
    found = rows_of(weight, spec, axis - 3)
    assert torch.equal(found.dequantize(), by_hand(weight, texts, axis))
    assert found.dequantize().is_contiguous()
    assert (found.spec, found.axis, found.shape) == (spec, axis, weight.shape)
    assert found.scale.shape == (len(texts),)
    assert found.scale.dtype == torch.float32
    for part, members in parts_of(found):
        assert torch.equal(found.scale[members], part.scale)
        assert torch.equal(part.dequantize(), found.dequantize().index_select(axis, members))
        assert [texts[member] for member in members] == [str(part.spec)] * len(members)
    behind = torch.cat(found.members)
    assert torch.equal(behind[found.order], torch.arange(len(texts)))


@settings(max_examples=60)
@given(formats, st.integers(2, 30), st.integers(0, 99))
def test_quantizing_twice_changes_nothing(texts: list[str], fan_in: int, seed: int) -> None:
    spec = WeightSpec.parse(f"rows({','.join(texts)})")
    once = rows_of(random(len(texts), fan_in, seed=seed), spec).dequantize()
    assert torch.equal(rows_of(once, spec).dequantize(), once)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_channel_of_zeros_stays_zero_in_every_format(axis: int) -> None:
    for zero in range(len(FORMATS)):
        weight = random(len(FORMATS), 9)
        weight[zero] = 0
        found = rows_of(weight.movedim(0, axis), ALL, axis).dequantize().movedim(axis, 0)
        assert not found[zero].any()
        assert all(found[i].any() for i in range(len(FORMATS)) if i != zero)


def test_one_format_alone_is_the_format() -> None:
    weight = random(6, 4, 3, 3)
    found, plain = rows_of(weight, "rows(int4*6)"), quantize_whole(weight, WeightSpec.parse("int4"))
    assert torch.equal(found.dequantize(), plain.dequantize())
    assert torch.equal(found.parts[0].codes, plain.codes)
    assert len(found.parts) == 1


def test_auto_grids_are_chosen_for_each_part() -> None:
    """Signs of one size suit the mid-rise grid, values with zeros the full range."""
    signs, sparse = random(3, 200).sign() * torch.tensor([1.0, 3.0]).repeat(100), random(3, 200).round()
    weight = torch.cat([signs[:1], sparse, signs[1:]])
    found = rows_of(weight, "rows(int2:auto,int3*3,int2*2)")
    assert found.grids == ("mid", "full")


def test_dead_channels_are_dead_beside_the_whole_weight() -> None:
    """A part that holds dead channels only has a zero level all the same: an integer kernel needs it for their bias."""
    weight = random(6, 50)
    weight[2:4] = DEAD / 8 * weight[2:4].sign() * torch.tensor([1.0, 3.0]).repeat(25)
    alone = quantize_whole(weight[2:4], WeightSpec.parse("int2"))
    assert alone.grid == "mid", "or the case shows nothing"
    found = rows_of(weight, "rows(int4*2,int2*2,int4*2)")
    assert found.grids[1] == "full"
    assert found.parts[1].spec == WeightSpec.parse("int2")
    best = quantize_whole(weight[2:4], WeightSpec.parse("int2:full"))
    assert torch.equal(found.dequantize()[2:4], best.dequantize())
    assert rows_of(weight, "rows(int4*2,int2:mid*2,int4*2)").grids[1] == "mid", "asked for"


@pytest.mark.parametrize(("rows", "channels"), [("rows(int4*5,int2)", 5), ("rows(int4*3)", 4), ("rows(int4,int2)", 1)])
def test_rows_for_another_layer_are_refused(rows: str, channels: int) -> None:
    spec = WeightSpec.parse(rows)
    with pytest.raises(PlanError) as caught:
        rows_of(random(channels, 3), spec)
    message = str(caught.value)
    assert message.startswith("conv1: a format with another number of rows than the layer has output channels")
    assert f"expected {channels}, got {spec.channels} in {rows}" in message


def test_the_axis_says_how_many_rows_there_are() -> None:
    spec = WeightSpec.parse("rows(int4*5,int2)")
    assert rows_of(random(4, 6), spec, 1).shape == (4, 6)
    with pytest.raises(PlanError, match="expected 4, got 6"):
        rows_of(random(4, 6), spec, 0)


def test_what_any_weight_must_be() -> None:
    spec = WeightSpec.parse("rows(int4,int2)")
    with pytest.raises(CorruptModelError):
        rows_of(random(2, 3) * torch.nan, spec)
    with pytest.raises(CorruptModelError):
        rows_of(random(2, 0), spec)
    with pytest.raises(UsageError, match="one format"):
        quantize_whole(random(2, 3), spec, where="conv1")
    with pytest.raises(UsageError, match="no such channel axis"):
        rows_of(random(2, 3), spec, 2)


@pytest.mark.parametrize("change", ["members", "order of parts", "format", "axis", "count", "shape", "no rows"])
def test_parts_that_do_not_belong_together(change: str) -> None:
    found = rows_of(random(4, 6), "rows(int4,int2*2,int4)")
    one, two = found.parts
    other = rows_of(random(4, 5), found.spec)
    changes: dict[str, dict[str, Any]] = {
        "members": {"members": found.members[::-1]},
        "order of parts": {"parts": (two, one), "members": found.members[::-1]},
        "format": {"parts": (one, rows_of(random(4, 6), "rows(int4,int3*2,int4)").parts[1])},
        "axis": {"axis": 1},
        "count": {"parts": (one, quantize_whole(random(3, 6), two.spec))},
        "shape": {"parts": (one, other.parts[1])},
        "no rows": {"spec": WeightSpec.parse("int4"), "parts": (), "members": ()},
    }
    with pytest.raises(VerificationError):
        replace(found, **changes[change])


def test_other_codes_for_the_same_rows() -> None:
    weight = random(4, 6)
    for spec in ("rows(int4,int2*2,int4)", "int4"):
        found = quantize_weight(weight, WeightSpec.parse(spec))
        parts = [replace(part, scale=part.scale * 2) for part, _ in parts_of(found)]
        doubled = with_parts(found, parts)
        assert doubled.spec == found.spec
        assert torch.equal(doubled.dequantize(), 2 * found.dequantize())


def test_a_planted_mistake_shows() -> None:
    """Channels put back in the order of the parts are not the weight."""
    weight = random(4, 6)
    found = rows_of(weight, "rows(int8,int2*2,int8)")
    assert not torch.equal(torch.cat([part.dequantize() for part in found.parts]), found.dequantize())
    assert (found.dequantize() - weight)[[0, 3]].abs().max() < 0.05 < (found.dequantize() - weight)[[1, 2]].abs().max()
