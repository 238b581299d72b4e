"""`stored_bytes` is what the file holds: counted in the initializers that an emission adds for its weights."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit import emit
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.session import to_bytes
from qopt.size import Stored, code_bits, stored_bits, stored_bytes, table_bytes
from qopt.spec import FLOAT, WeightSpec

FORMATS = [f"{kind}{bits}{option}" for kind in ("int", "log") for bits in range(1, 9) for option in ("", ":tensor")]
FORMATS += ["ternary", "int2:full", "int3:mid", "int4:mid", "int4:narrow"]
FORMATS += [f"int{bits}{shared}:asym" for bits in (2, 3, 4, 8) for shared in ("", ":tensor")]


CODES = {name: AffineRange.from_bounds(-1, 1, 8) for name in ("x", "ar", "b", "flat")}


def held(prepared: Prepared, quantized: Quantized) -> tuple[int, int]:
    """Bytes of what the file holds for its weights, and of the shapes beside it."""
    proto = onnx.load_from_string(to_bytes(emit(prepared, quantized)))
    values = shapes = 0
    for tensor in proto.graph.initializer:
        if tensor.name.rsplit("/")[0] in quantized.activations:
            continue
        size = len(tensor.raw_data)
        assert size or 0 in tensor.dims  # qopt's tensors are stored raw: 4-bit codes take half a byte
        if tensor.data_type == onnx.TensorProto.INT64:
            shapes += size
        elif not tensor.name.endswith(("/bias/codes", "/bias/scale")):
            values += size
    return values, shapes


@pytest.mark.parametrize("spec", ["float", *FORMATS])
def test_one_format(spec: str, three_layers: Prepared, codes_of: Any) -> None:
    weights = {} if spec == "float" else codes_of(three_layers, spec)
    for activations in ({}, CODES):
        quantized = Quantized(weights, {}, activations)
        values, shapes = held(three_layers, quantized)
        assert values == stored_bytes(quantized.stored(three_layers))
        assert shapes <= 8 * (2 + 3 * 6)


@given(specs=st.tuples(*[st.sampled_from(["float", *FORMATS])] * 3), integer=st.booleans())
@settings(max_examples=60)
def test_any_mixture(specs: tuple[str, str, str], integer: bool, three_layers: Prepared, codes_of: Any) -> None:
    """Tables are counted once for all layers that share them, whatever the mixture."""
    weights: dict[str, Any] = {}
    for layer, spec in zip(three_layers.layers, specs, strict=True):
        weights |= {} if spec == "float" else codes_of(three_layers, spec, layer.name)
    quantized = Quantized(weights, {}, CODES if integer else {})
    stored = list(quantized.stored(three_layers))
    values, _ = held(three_layers, quantized)
    assert values == stored_bytes(stored)
    assert stored_bits(stored) == pytest.approx(8 * values / (135 + 15 + 336))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 13])
@pytest.mark.parametrize(
    ("spec", "codes", "container"),
    [
        ("int1", 8, 1),
        ("log1", 8, 1),
        ("ternary", 5, 1),
        ("int2", 4, 1),
        ("log2", 4, 1),
        ("int3", 8, 3),
        ("log3", 8, 3),
        ("int4", 2, 1),
        ("int5", 1, 1),
        ("float", 1, 4),
    ],
)
def test_codes_fill_whole_groups_of_bytes(spec: str, codes: int, container: int, size: int) -> None:
    stored = Stored(size, 1, WeightSpec.parse(spec))
    assert stored.code_bytes == -(-size // codes) * container
    assert stored.bytes == stored.code_bytes + (4 if spec != "float" else 0)


def test_tables_by_hand() -> None:
    """Powers of the base and the base, four bytes each, and a level per digit; ``auto`` counts both grids."""
    two, three, four, eight = 4 + 4 * 8, 4 + 4 * 5, 4 + 4 * 4, 4 + 4 * 8 + 4 * 3
    sizes = {"float": 0, "int1": two + 2, "log1": two + 2, "ternary": three + 3, "log2": four + 4, "log3": eight + 8}
    sizes |= {
        "int2:full": four + 4,
        "int2:mid": four + 4,
        "int2": four + 8,
        "int3:narrow": eight + 8,
        "int3": eight + 16,
    }
    sizes |= {"int2:max": four + 4, "int4:max": 0, "int4:full": 0, "int4:mid": 16, "int4": 16, "log4": 16, "int8": 0}
    sizes |= {"int2:asym": four, "int3:block8:asym": eight, "int4:asym": 0, "int8:asym": 0, "int4:block8": 16}
    sizes |= {"log5": 1024, "log8": 1024, "nf@4": 16, "nf@2": four + 4, "nf@6": 1024}
    assert {text: table_bytes(WeightSpec.parse(text)) for text in sizes} == sizes
    assert [table_bytes(WeightSpec.parse("int4"), grid) for grid in ("narrow", "full", "mid", "auto")] == [0, 0, 16, 16]


@pytest.mark.parametrize(
    ("text", "scales", "each"),
    [("int4", 16, 4), ("int4:tensor", 1, 4), ("int4:block32", 16 * 18, 4), ("ternary:block8", 16 * 72, 4),
     ("int4:asym", 16, 5), ("int2:tensor:max:asym", 1, 5), ("int8:block64:asym", 16 * 9, 5), ("log4:block576", 16, 4)],
)  # fmt: skip
def test_scales_and_zero_points_are_counted(text: str, scales: int, each: int) -> None:
    """Of 16 channels of 576 weights; the container of a code is that of the format without blocks."""
    stored = Stored(16 * 576, 16, WeightSpec.parse(text))
    assert stored.scales == scales
    assert stored.bytes == stored.code_bytes + scales * each
    assert stored.code_bits == 16 * 576 * WeightSpec.parse(text.split(":")[0]).container_bits
    assert stored_bytes([stored]) == stored.bytes + table_bytes(stored.spec)


@pytest.mark.parametrize(
    ("formats", "tables"),
    [
        (["int1", "log1"], 38), (["int2:full", "log2"], 28), (["log3", "log4"], 56 + 16), (["log5", "log6"], 2048),
        (["int4:max", "int8", "float"], 0), (["int2:full", "int2:narrow:tensor", "int2:max"], 24),
        (["int2:mid", "int2:full"], 28), (["int2", "int2:tensor"], 28), (["int2:full", "int2"], 28),
    ],
)  # fmt: skip
def test_tables_are_counted_once(formats: list[str], tables: int) -> None:
    items = [Stored(100, 10, WeightSpec.parse(text)) for text in formats]
    assert stored_bytes(items) == sum(item.bytes for item in items) + tables


def test_averages() -> None:
    items = [Stored(300, 10, WeightSpec.parse("int4:tensor:max")), Stored(100, 10, FLOAT)]
    assert code_bits(items) == (300 * 4 + 100 * 32) / 400
    assert stored_bytes(items) == 150 + 4 + 400
    assert stored_bits(items) == 8 * 554 / 400
    assert (code_bits([]), stored_bits([]), stored_bytes([])) == (0.0, 0.0, 0)
    assert code_bits(iter(items)) == code_bits(items)
    assert code_bits([Stored(7, 1, WeightSpec.parse("log3"))]) == 3.0
    mixed = [Stored(100, 1, WeightSpec.parse(text)) for text in ("int1", "ternary", "int8")]
    assert code_bits(mixed) == pytest.approx((1 + 1.6 + 8) / 3)
