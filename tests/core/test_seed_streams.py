"""Derived seeds: a fixed function of seed and names, one stream for each use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.seeds import derive

NAMES = st.lists(st.text(alphabet="ab/\\1", max_size=3), max_size=3).map(tuple)


def test_the_numbers_are_fixed_forever() -> None:
    assert derive(0) == 3456079177858693020
    assert derive(0, "report") == 2337219621816930733
    assert derive(7, "probe", 3) == 5893226118088432854


def test_another_process_derives_the_same() -> None:
    code = "from qopt.seeds import derive; print(derive(3, 'attack', 5))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == derive(3, "attack", 5)


@settings(max_examples=200)
@given(seed=st.integers(-(2**70), 2**70), names=NAMES)
def test_every_seed_is_one_that_torch_takes(seed: int, names: tuple[str, ...]) -> None:
    value = derive(seed, *names)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)


@settings(max_examples=200)
@given(one=NAMES, other=NAMES)
def test_different_names_give_different_streams(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (derive(1, *one) == derive(1, *other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a/b", "c"), ("a", "b/c")), (("a/b",), ("a", "b")), (("a\\", "b"), ("a\\/b",)), (("12",), ("1", "2"))],
)
def test_a_slash_inside_a_name_is_no_border(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert derive(0, *one) != derive(0, *other)


def test_neighbouring_seeds_are_unrelated() -> None:
    values = [derive(seed, "x") for seed in range(1000)]
    assert len(set(values)) == 1000
    ones = sum(value.bit_count() for value in values) / (1000 * 63)
    assert 0.48 < ones < 0.52
