"""The text: portable, readable, the same every time; floats in and out; a self-test that finds what is wrong."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qopt.emit.c import CProgram, emit_c
from qopt.emit.c.functions import functions
from qopt.emit.c.text import Constants, comment, identifier, numbers, real, structure

FLOATS = """#include "net.h"
#include <stdio.h>
int main(void)
{
    static float numbers[NET_INPUT_SIZE], logits[NET_OUTPUT_SIZE];
    static uint8_t codes[NET_INPUT_SIZE];
    static net_output output[NET_OUTPUT_SIZE];
    fread(numbers, sizeof numbers, 1, stdin) == 1 ? net_quantize(numbers, codes) : (void)0;
    net_run(codes, output);
    net_dequantize(output, logits);
    fwrite(codes, sizeof codes, 1, stdout);
    fwrite(logits, sizeof logits, 1, stdout);
    return 0;
}
"""


@pytest.fixture(scope="module")
def small(graph: Any, quantized: Any) -> tuple[Any, Any]:
    g = graph(2, 6, 6)
    g.op("Relu", [g.conv("x", "block/conv*/1?", 4, 2, 3, 3)], "ar")
    prepared = g.head("ar").prepared()
    return prepared, quantized(prepared, "int4")


@pytest.fixture(scope="module")
def program(small: Any) -> CProgram:
    return emit_c(*small, name="net")


def test_only_what_a_controller_has(program: CProgram) -> None:
    includes = re.findall(r"#include (\S+)", program.header + program.source)
    assert sorted(includes) == ['"net.h"', "<stdint.h>", "<string.h>"]
    body = re.sub(r"/\*.*?\*/", "", program.source, flags=re.DOTALL)
    for word in ("malloc", "free(", "printf", "double", "long", "%f"):
        assert word not in body
    hot, convenience = body.split("void net_quantize(")
    assert "float" not in hot
    assert "float" in convenience
    writable = [line for line in hot.splitlines() if re.match(r"static (?!const)", line) and "(" not in line]
    assert writable == ["static uint8_t arena[NET_ARENA_BYTES];"]
    assert not re.search(r"^(?!static|struct|void net_|#|[ {}/])\w", hot, re.MULTILINE)  # all names are private


def test_layers_and_formats_are_named(program: CProgram) -> None:
    assert "Conv block_conv_" not in program.source
    assert re.search(
        r"/\* 1\. Conv block/conv\*_1\?\.weight: 4 rows of int4 \(digits\), 18 weights each", program.source
    )
    assert re.search(r"reads  x \(2 x 6 x 6\): 8 bits, scale 0\.00\d+, zero point 12\d", program.source)
    assert "writes logits (5): int32" in program.source
    assert f"{program.macs} multiply-accumulates, {program.flash_bytes} bytes of constants" in program.header
    assert max(map(len, program.source.splitlines())) < 160
    for text in (program.header, program.source, program.self_test):
        assert text.isascii()
        assert text.endswith("\n")


def test_constants_are_counted(program: CProgram) -> None:
    sizes = {"int8_t": 1, "uint8_t": 1, "int32_t": 4}
    found = re.findall(r"static const (\w+) \w+\[(\d+)\] = \{\n([^}]*)\}", program.source)
    arrays = [(kind, int(count), body) for kind, count, body in found if kind in sizes]
    assert sum(sizes[kind] * count for kind, count, _ in arrays) == program.flash_bytes
    assert all(len(re.findall(r"-?\d+", body)) == count for _, count, body in arrays)
    assert len([1 for kind, _, _ in arrays if kind == "int8_t"]) == 1  # both layers read one table of levels


def test_the_same_every_time(small: Any, program: CProgram) -> None:
    again = emit_c(*small, name="net")
    assert (again.header, again.source, again.self_test) == (program.header, program.source, program.self_test)
    other = emit_c(*small, name="other")
    assert "net" not in re.sub(r"network|magnet", "", other.source + other.header)


def test_flash_shrinks_with_bits(small: Any, quantized: Any) -> None:
    prepared, _ = small
    sizes = [
        emit_c(prepared, quantized(prepared, spec), name="n").flash_bytes
        for spec in ("int8", "int4:narrow", "int3:narrow", "int2:narrow", "ternary", "int1")
    ]
    assert sizes == sorted(sizes, reverse=True)
    fixed = (4 + 5) * 9
    assert sizes[0] == 4 * 18 + 5 * 64 + fixed
    assert sizes[1] == 4 * 9 + 5 * 32 + 16 + fixed
    assert sizes[-1] == 4 * 3 + 5 * 8 + fixed


def test_floats_in_and_out(small: Any, compiled: Any) -> None:
    """Codes as QuantizeLinear gives them, ties to even included; what is no number becomes the smallest."""
    prepared, codes = small
    affine = codes.activations["x"]
    built = compiled(emit_c(prepared, codes, name="net"))
    (built.folder / "floats.c").write_text(FLOATS)
    steps = np.concatenate([np.arange(-140, 140, 0.5), [1e30, -1e30, np.inf, -np.inf, 0.0, -0.0]])
    values = (steps * affine.scale).astype(np.float32)
    values = np.resize(np.concatenate([values, np.random.default_rng(0).normal(0, 0.5, 82).astype(np.float32)]), 648)
    main = built.link("floats.c")
    for image in values.reshape(-1, 72):
        result = subprocess.run([main], input=image.tobytes(), capture_output=True, check=True).stdout
        found = np.frombuffer(result[:72], np.uint8)
        assert np.array_equal(found, affine.quantize(torch.from_numpy(image)).numpy())
        wide = built(found[None])[0]
        scale = np.float32(built.program.network.output.code.scale)
        assert np.array_equal(np.frombuffer(result[72:], np.float32), wide.astype(np.float32) * scale)
    missing = np.full(72, np.nan, np.float32).tobytes()
    result = subprocess.run([main], input=missing, capture_output=True, check=True).stdout
    assert set(result[:72]) == {0}


def test_normalisation_in_front(graph: Any, quantized: Any, compiled: Any) -> None:
    """It happens in float, operator by operator as in the graph, while numbers become codes."""
    g = graph(2, 6, 6)
    mean, std = np.array([0.4, 0.5], np.float32).reshape(2, 1, 1), np.array([[[[0.2]]]], np.float32)
    g.op("Sub", ["x", g.constant("mean", mean)], "centred")
    g.op("Div", ["centred", g.constant("std", std)], "y")
    g.op("Add", [g.constant("shift", np.float32(0.1)), "y"], "z")
    prepared = g.head(g.conv("z", "a", 3, 2, 3, 3)).prepared()
    codes = quantized(prepared, "int8", low=0.0)
    assert "x" not in codes.activations
    program = emit_c(prepared, codes, name="net")
    assert "net_quantize" in program.header
    assert "2 x 6 x 6, normalised first" in program.header
    built = compiled(program)
    (built.folder / "floats.c").write_text(FLOATS)
    image = np.random.default_rng(0).random((2, 6, 6), np.float32)
    result = subprocess.run([built.link("floats.c")], input=image.tobytes(), capture_output=True, check=True).stdout
    expected = codes.activations["z"].quantize(torch.from_numpy((image - mean) / std[0] + np.float32(0.1)))
    assert np.array_equal(np.frombuffer(result[:72], np.uint8), expected.numpy().reshape(-1))


def test_the_self_test_passes(small: Any, compiled: Any) -> None:
    built = compiled(emit_c(*small, name="net"), "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
    result = built.self_test()
    assert (result.returncode, result.stdout) == (0, "net: 0 of 15 codes wrong\n")


BUGS = {
    "a weight": (r"(weight_codes\[\d+\] = \{\n    )(\d+)", lambda m: f"{m[1]}{int(m[2]) ^ 64}"),
    "a bias": (r"(weight_bias\[\d+\] = \{\n    )(-?\d+)", lambda m: f"{m[1]}{int(m[2]) + 9999}"),
    "a shift": (r"(weight_shift\[\d+\] = \{\n    )(\d+)", lambda m: f"{m[1]}{int(m[2]) - 1}"),
    "the order of digits": (r"buffer >>= rows->bits;", lambda m: "buffer <<= 1;"),
    "zeros over the border": (r"\? plane\[y \* w->width \+ x\] : zero_point", lambda m: "? plane[x] : zero_point"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_self_test_finds_planted_bugs(bug: str, small: Any, compiled: Any) -> None:
    program = emit_c(*small, name="net")
    pattern, change = BUGS[bug]
    source, count = re.subn(pattern, change, program.source, count=1)
    assert count == 1
    result = compiled(replace(program, source=source)).self_test()
    assert result.returncode == 1
    assert not result.stdout.startswith("net: 0 ")


def test_networks_carry_only_the_functions_they_call(program: CProgram) -> None:
    assert {"run_layer", "gather", "unpack_bits", "dot_int8"} <= set(re.findall(r"\w+", program.source))
    for name in ("run_add", "run_max", "dot_xnor", "pack_columns", "unpack_ternary", "IF", "END"):
        assert not re.search(rf"\b{name}\b", program.source)
    assert "run" not in functions([])


@given(text=st.text())
def test_comments_stay_comments(text: str) -> None:
    inside = comment(text)
    assert inside.isascii()
    assert not any(word in inside for word in ("*/", "/*", "\\", "??"))
    assert re.fullmatch("[ -~\n]*", inside)
    assert re.fullmatch(r"[a-z0-9_]+", identifier(text))


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_reals_are_exact(value: float) -> None:
    assert float.fromhex(real(value)[:-1]) == value


def test_arrays_are_written_once() -> None:
    constants, lines = Constants(), []  # type: tuple[Constants, list[str]]
    first = constants.array(lines, "a", np.array([1, -2], np.int8))
    assert constants.array(lines, "b", np.array([1, -2], np.int8)) == first == "a"
    assert constants.array(lines, "c", np.array([1, 254], np.uint8)) == "c"
    assert constants.array(lines, "c", np.array([1, 255], np.uint8)) == "c_2"
    assert constants.size == 6
    assert lines[0] == "static const int8_t a[2] = {\n    1, -2,\n};"
    assert max(map(len, numbers(np.arange(1000)).splitlines())) <= 110
    assert structure({"count": 3, "bits": 4}) == "    .count = 3, .bits = 4,"
