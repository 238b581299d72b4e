"""The cost model of storage is the two measures of size and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.hardware.bits import BitsModel
from qopt.hardware.cost_model import CostModel, LayerDescription
from qopt.plugins import load
from qopt.size import Stored, code_bits, stored_bits, stored_bytes, table_bytes
from qopt.spec import FLOAT, WeightSpec

SPECS = [FLOAT] + [
    WeightSpec.parse(f"{kind}{bits}:{granularity}:{scale}")
    for kind in ("int", "log")
    for bits in range(1, 9)
    for granularity in ("channel", "tensor")
    for scale in ("max", "mse")
]


def described(name: str, channels: int, fan_in: int) -> LayerDescription:
    return LayerDescription(name, "Conv", (channels, fan_in), channels, channels * fan_in, 7)


layers = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from(SPECS)), min_size=1, max_size=6)


@settings(max_examples=100)
@given(layers)
def test_a_network_costs_what_its_file_stores(drawn: list[tuple[int, int, WeightSpec]]) -> None:
    model = BitsModel()
    described_layers = [described(f"l{i}", channels, fan_in) for i, (channels, fan_in, _) in enumerate(drawn)]
    specs = {f"l{i}": spec for i, (_, _, spec) in enumerate(drawn)}
    stored = [Stored(channels * fan_in, channels, spec) for channels, fan_in, spec in drawn]
    cost = model.network_cost(described_layers, specs)
    assert cost == {
        "bits": code_bits(stored), "stored_bits": stored_bits(stored), "size": stored_bytes(stored)
    }  # fmt: skip
    each = [model.layer_cost(layer, specs[layer.name]) for layer in described_layers]
    weights = sum(layer.weights for layer in described_layers)
    assert sum(c["code_bits"] for c in each) / weights == cost["bits"]
    tables = cost["size"] - sum(c["bytes"] for c in each)
    assert max(map(table_bytes, specs.values())) <= tables <= sum(map(table_bytes, set(specs.values())))


def test_by_hand() -> None:
    layer = described("a", 8, 9)
    model = BitsModel()
    assert model.layer_cost(layer, WeightSpec.parse("int4")) == {"code_bits": 288.0, "bytes": 36.0 + 32.0}
    assert model.layer_cost(layer, WeightSpec.parse("int3:tensor")) == {"code_bits": 216.0, "bytes": 27.0 + 4.0}
    ternary = model.layer_cost(layer, WeightSpec.parse("ternary"))
    assert ternary == {"code_bits": pytest.approx(72 * 1.6), "bytes": 15.0 + 32.0}
    assert model.layer_cost(layer, WeightSpec.parse("log2")) == {"code_bits": 144.0, "bytes": 18.0 + 32.0}
    assert model.layer_cost(layer, FLOAT) == {"code_bits": 2304.0, "bytes": 288.0}


def test_rows_by_hand() -> None:
    """8 channels of 9 weights: codes of each format by themselves, scales, and the order where it is needed."""
    layer, model = described("a", 8, 9), BitsModel()
    sorted_rows, mixed = WeightSpec.parse("rows(int8*3,ternary*5)"), WeightSpec.parse("rows(int8*2,ternary*5,int8)")
    code_bits, size = pytest.approx(27 * 8 + 45 * 1.6), 27.0 + 9.0 + 32.0
    assert model.layer_cost(layer, sorted_rows) == {"code_bits": code_bits, "bytes": size}
    assert model.layer_cost(layer, mixed) == {"code_bits": code_bits, "bytes": size + 8}
    network = model.network_cost([layer], {"a": mixed})
    assert network["size"] == size + 8 + table_bytes(WeightSpec.parse("ternary"))
    assert network["bits"] == pytest.approx((27 * 8 + 45 * 1.6) / 72)


def test_rows_are_for_layers_with_as_many_channels() -> None:
    rows, other = WeightSpec.parse("rows(int4*2,int8)"), WeightSpec.parse("rows(int4*2,int8*2)")
    assert BitsModel().capabilities(described("a", 3, 5), [*SPECS, rows, other]) == (*SPECS, rows)


def test_blocks_are_for_layers_whose_channels_they_fill() -> None:
    fits, other = WeightSpec.parse("int4:block32"), WeightSpec.parse("int4:block128")
    assert BitsModel().capabilities(described("a", 3, 64), [fits, other]) == (fits,)
    assert BitsModel().layer_cost(described("a", 3, 64), fits) == {"code_bits": 768.0, "bytes": 96.0 + 3 * 2 * 4}


def test_it_takes_every_format_and_sets_no_limit() -> None:
    model: CostModel = load("qopt.cost_models", "bits", "--target")()
    assert model.capabilities(described("a", 2, 2), SPECS) == tuple(SPECS)
    assert model.limits() == ()
    assert model.name == "bits"
