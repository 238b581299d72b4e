"""Formats per row: limits are kept by what the file stores, and no allocation is far below the one found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError
from qopt.limits import Limit, parse_limit
from qopt.search.rows import RowChoices, allocate_rows, row_capable
from qopt.search.space import Outcome, Space
from qopt.size import Stored, code_bits, stored_bytes
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
COLUMNS = 20
TEXTS = ("ternary", "int2", "int4", "int8")
SPECS = tuple(map(WeightSpec.parse, TEXTS))


def choices(divergences: np.ndarray, specs: tuple[WeightSpec, ...] = SPECS, columns: int = COLUMNS) -> RowChoices:
    rows = [Stored(columns, 1, spec) for spec in specs]
    costs = {
        "code_bits": np.array([float(row.code_bits) for row in rows]),
        "bytes": np.array([float(row.bytes) for row in rows]),
    }
    return RowChoices(specs, costs, divergences)


def space_of(make: MakeSpace, channels: dict[str, int], limits: tuple[Limit, ...], **ties: object) -> Space:
    formats = {text: 4.0**-spec.bits for text, spec in zip(TEXTS, SPECS, strict=True)}
    layers = [(name, count * COLUMNS, count, formats) for name, count in channels.items()]
    made: Space = make(layers, limits, **ties)
    return made


def stored(space: Space, outcome: Outcome, channels: dict[str, int]) -> list[Stored]:
    return [Stored(layer.weights, channels[layer.layer], outcome.specs[layer.layer]) for layer in space.layers]


def falling(generator: np.random.Generator, channels: int) -> np.ndarray:
    """Errors of rows that matter by very different amounts, falling fourfold with each bit."""
    importance = np.exp(generator.normal(0, 3, channels))
    bits = np.array([spec.container_bits for spec in SPECS])
    return np.asarray(4.0 ** -bits[:, None] * importance * generator.uniform(0.5, 2, (len(SPECS), channels)))


@given(seed=st.integers(0, 10**6), first=st.integers(1, 40), second=st.integers(1, 40), bound=st.floats(1.7, 8.5))
@settings(max_examples=60)
def test_bits_are_kept_and_nearly_used(make_space: MakeSpace, seed: int, first: int, second: int, bound: float) -> None:
    generator = np.random.default_rng(seed)
    channels = {"a": first, "b": second}
    space = space_of(make_space, channels, (parse_limit(f"bits<={bound}"),))
    rows = {name: choices(falling(generator, count)) for name, count in channels.items()}
    outcome = allocate_rows(space, rows)
    used = code_bits(stored(space, outcome, channels))
    assert used <= bound * (1 + 1e-9)
    widest = all(spec == SPECS[-1] for spec in outcome.specs.values())
    assert widest or used > bound - 8 / (first + second) - 1e-9
    assert outcome.gap is not None
    assert outcome.gap >= 0


@given(seed=st.integers(0, 10**6), channels=st.integers(1, 6), bound=st.floats(1.7, 6))
@settings(max_examples=40)
def test_brute_force_finds_nothing_below_the_gap(make_space: MakeSpace, seed: int, channels: int, bound: float) -> None:
    divergences = falling(np.random.default_rng(seed), channels)
    space = space_of(make_space, {"a": channels}, (parse_limit(f"bits<={bound}"),))
    outcome = allocate_rows(space, {"a": choices(divergences)})
    found = WeightSpec.of_rows([outcome.specs["a"]]) if not outcome.specs["a"].rows else outcome.specs["a"]
    chosen = [spec for spec, count in found.rows for _ in range(count)] or [found] * channels
    value = sum(divergences[SPECS.index(spec), row] for row, spec in enumerate(chosen))
    best = min(
        sum(divergences[pick, row] for row, pick in enumerate(picks))
        for picks in product(range(len(SPECS)), repeat=channels)
        if sum(SPECS[pick].container_bits for pick in picks) <= bound * channels * (1 + 1e-12)
    )
    assert best <= value * (1 + 1e-12)
    assert outcome.gap is not None
    assert value * (1 - outcome.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8])
@pytest.mark.parametrize("channels", [3, 17, 300])
def test_bytes_are_kept_by_the_file(share: float, channels: int, make_space: MakeSpace) -> None:
    """Order of the rows, padding of the last bytes and tables are within the limit."""
    free = space_of(make_space, {"a": channels, "b": 5}, ())
    counts = {"a": channels, "b": 5}
    reserve = free.table_bytes + 100
    bound = int(share * stored_bytes(Stored(layer.weights, counts[layer.layer], SPECS[-1]) for layer in free.layers))
    space = space_of(make_space, counts, (parse_limit(f"size<={bound + reserve}B"),))
    generator = np.random.default_rng(channels)
    rows = {name: choices(falling(generator, count)) for name, count in counts.items()}
    outcome = allocate_rows(space, rows)
    assert stored_bytes(stored(space, outcome, counts)) <= bound + reserve


def test_rows_that_matter_get_the_bits(make_space: MakeSpace) -> None:
    importance = np.array([1e-9, 1.0, 1e-9, 1.0, 1e-9, 1e-9])
    bits = np.array([spec.container_bits for spec in SPECS])
    space = space_of(make_space, {"a": 6}, (parse_limit("bits<=3.74"),))
    outcome = allocate_rows(space, {"a": choices(4.0 ** -bits[:, None] * importance)})
    assert str(outcome.specs["a"]) == "rows(ternary,int8,ternary,int8,ternary*2)"
    assert outcome.reasons["a"] == "rows by divergence: 2 in int8, 4 in ternary"
    assert "no formats of rows" in outcome.notes[0]


def test_other_layers_and_ties_get_one_format(make_space: MakeSpace) -> None:
    channels = {"a": 4, "b": 4, "c": 4, "d": 4}
    space = space_of(make_space, channels, (parse_limit("bits<=4"),), ties=[("b", "c")])
    generator = np.random.default_rng(0)
    rows = {name: choices(falling(generator, 4)) for name in ("a", "b", "c")}
    outcome = allocate_rows(space, rows)
    assert list(outcome.specs) == ["a", "b", "c", "d"]
    assert not any(outcome.specs[name].rows for name in ("b", "c", "d"))
    assert outcome.specs["b"] == outcome.specs["c"]


def test_without_limits_every_row_gets_its_best(make_space: MakeSpace) -> None:
    divergences = np.array([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0], [0.5, 3.0]])
    outcome = allocate_rows(space_of(make_space, {"a": 2}, ()), {"a": choices(divergences)})
    assert str(outcome.specs["a"]) == "rows(int8,ternary)"


def test_too_tight_a_limit_is_infeasible(make_space: MakeSpace) -> None:
    space = space_of(make_space, {"a": 4}, (parse_limit("bits<=1.5"),))
    with pytest.raises(InfeasibleError, match="no combination of formats of rows keeps the limits"):
        allocate_rows(space, {"a": choices(np.ones((4, 4)))})


@pytest.mark.parametrize(
    ("text", "capable"),
    [
        ("int1", True), ("ternary", True), ("int8", True), ("log4:max", True), ("int4:tensor", False),
        ("log5", False), ("float", False), ("rows(int4,int8)", False),
    ],
)  # fmt: skip
def test_formats_that_a_row_can_have(text: str, capable: bool) -> None:
    assert row_capable(WeightSpec.parse(text)) == capable
