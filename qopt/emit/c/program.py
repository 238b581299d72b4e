"""The C program: header, source and self-test of one network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from qopt.emit.c.calls import Calls
from qopt.emit.c.functions import functions
from qopt.emit.c.memory import Memory, lay_out
from qopt.emit.c.network import read_network
from qopt.emit.c.simulate import simulate
from qopt.emit.c.steps import LayerStep, Network
from qopt.emit.c.text import check_name, comment, numbers, real
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.seeds import derive

_OPERATIONS = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}

TESTS = 3
"""Images in the self-test."""


@final
@dataclass(frozen=True, eq=False)
class CProgram:
    """A network in C99, to be written as NAME.h, NAME.c and NAME_test.c.

    Attributes:
        name: what the files and all public names begin with.
        header: text of NAME.h; ``source``: of NAME.c; ``self_test``: of NAME_test.c, a main function that returns 0
            where the program computes on its machine what it must.
        arena_bytes: size of the static array, all the memory that is written beside the caller's buffers and the stack.
        flash_bytes: all constant arrays; code and the descriptions of layers (some 100 bytes each) come on top.
        macs: multiply-accumulates for one image.
        network: the steps; ``memory``: where their tensors lie.
    """

    name: str
    header: str
    source: str
    self_test: str
    arena_bytes: int
    flash_bytes: int
    macs: int
    network: Network = field(repr=False)
    memory: Memory = field(repr=False)

    def quantize(self, images: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The input codes uint8 of float images (n, ...), as NAME_quantize gives them."""
        code, numbers = self.network.input.code, images.astype(np.float32)
        for step in self.network.normalisation:
            by_channel = np.array(step.numbers, np.float32).reshape(-1, *[1] * (images.ndim - 2))
            numbers = _OPERATIONS[step.sign](numbers, by_channel)
        codes = np.rint(numbers / np.float32(code.scale)) + code.zero_point
        return np.asarray(np.clip(codes, 0, code.high), np.uint8)

    def run(self, codes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The output codes int64 (outputs,) that the program gives for one image in codes, uint8 of any shape."""
        return simulate(self.network, codes)


def emit_c(prepared: Prepared, quantized: Quantized, *, name: str) -> CProgram:
    """The quantized network as portable C99 on integers; see the comment at the top of the source.

    Args:
        prepared: the float graph.
        quantized: formats of all weights and codes of all activations.
        name: a C identifier in lower case.

    Raises:
        UnsupportedModelError: a tensor that is not quantized, an operator that has no C code, sums that 32 bits do not
            hold; naming it.
        UsageError: ``name`` is no identifier.
    """
    check_name(name)
    network = read_network(prepared, quantized)
    memory = lay_out(network)
    calls = Calls(network, memory)
    macs = sum(step.macs for step in network.steps if isinstance(step, LayerStep))
    flash = calls.constants.size + 4 * sum(len(step.numbers) for step in network.normalisation)
    facts = f"{macs} multiply-accumulates, {flash} bytes of constants, {memory.arena_bytes} bytes of memory"
    return CProgram(
        name, _header(name, network, memory, facts), _source(name, network, memory, calls), _self_test(name, network),
        memory.arena_bytes, flash, macs, network, memory,
    )  # fmt: skip


def _header(name: str, network: Network, memory: Memory, facts: str) -> str:
    upper, image, output = name.upper(), network.input, network.output
    kind = "int32_t" if output.code.wide else "uint8_t"
    shape = " x ".join(map(str, image.shape))
    normalised = ", normalised first" if network.normalisation else ""
    return f"""/* {name}: a network in integers, written by qopt. {facts}.

   Input: {comment(image.name)}, {shape}{normalised}.
   uint8 codes 0 to {image.code.high}, number = (code - zero point) * scale.
   Output: {comment(output.name)}, {output.size} codes; their order is that of the numbers. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_INPUT_SIZE {image.size}
#define {upper}_INPUT_SCALE {real(image.code.scale)} /* {image.code.scale:.9g} */
#define {upper}_INPUT_ZERO_POINT {image.code.zero_point}
#define {upper}_INPUT_LARGEST_CODE {image.code.high}

#define {upper}_OUTPUT_SIZE {output.size}
#define {upper}_OUTPUT_SCALE {real(output.code.scale)} /* {output.code.scale:.9g} */
#define {upper}_OUTPUT_ZERO_POINT {output.code.zero_point}
typedef {kind} {name}_output;

#define {upper}_ARENA_BYTES {memory.arena_bytes} /* static memory of the program; input and output are the caller's */

/* Runs the network. Not reentrant: all calls share the static memory. The two arrays do not overlap. */
void {name}_run(const uint8_t input[{upper}_INPUT_SIZE], {name}_output output[{upper}_OUTPUT_SIZE]);

/* Codes of a float image{normalised}: divided by the scale, rounded to nearest with halves to even, clipped. */
void {name}_quantize(const float numbers[{upper}_INPUT_SIZE], uint8_t codes[{upper}_INPUT_SIZE]);

/* The numbers that output codes stand for. */
void {name}_dequantize(const {name}_output codes[{upper}_OUTPUT_SIZE], float numbers[{upper}_OUTPUT_SIZE]);

#ifdef __cplusplus
}}
#endif

#endif
"""


_INTRODUCTION = """
   A tensor holds unsigned codes of at most 8 bits, number = (code - zero point) * scale, channels before rows before
   columns. A layer sums weight level times code in 32 bits on top of a bias that holds the zero point of its input;

       output = zero point + (sum * mantissa) / 2^shift   rounded to nearest, halves away from zero, then clipped,

   where mantissa / 2^shift is the weight's scale times the input's scale by the output's. Clipping is Relu and Clip
   as well. No sum overflows: that was proved for every output channel and all codes when this was written. A network
   output that is not quantized has codes of 32 bits and one scale for all classes, so that they can be compared.
"""


def _source(name: str, network: Network, memory: Memory, calls: Calls) -> str:
    arena = f"static uint8_t arena[{name.upper()}_ARENA_BYTES];\n" if memory.arena_bytes else ""
    body = "\n".join(calls.calls)
    return f"""/* {name}: written by qopt; do not edit, emit it again instead.
{_INTRODUCTION}*/
#include "{name}.h"

#include <string.h>

{functions(network.steps)}{chr(10).join(calls.definitions)}

{arena}
void {name}_run(const uint8_t input[{name.upper()}_INPUT_SIZE], {name}_output output[{name.upper()}_OUTPUT_SIZE])
{{
{body}
}}

{_float_functions(name, network)}"""


def _float_functions(name: str, network: Network) -> str:
    upper, code = name.upper(), network.input.code
    plane = network.input.size // network.input.shape[0]
    arrays = "".join(
        f"static const float normalise_{i}[{len(step.numbers)}] = {{{', '.join(map(real, step.numbers))}}};\n"
        for i, step in enumerate(network.normalisation)
    )
    normalised = "".join(
        f"        number = number {step.sign} normalise_{i}[i / {plane}];\n"
        for i, step in enumerate(network.normalisation)
    )
    return f"""{arrays}void {name}_quantize(const float numbers[{upper}_INPUT_SIZE], uint8_t codes[{upper}_INPUT_SIZE])
{{
    const float low = {real(-code.zero_point)}, high = {real(code.high - code.zero_point)};
    for (int32_t i = 0; i < {upper}_INPUT_SIZE; i++) {{
        float number = numbers[i];
{normalised}        float steps = number / {upper}_INPUT_SCALE;
        steps = steps > low ? steps < high ? steps : high : low; /* also where it is no number */
        int32_t whole = (int32_t)steps;
        float rest = steps - (float)whole;
        if (rest > 0.5f || (rest == 0.5f && whole % 2 != 0)) {{
            whole++;
        }} else if (rest < -0.5f || (rest == -0.5f && whole % 2 != 0)) {{
            whole--;
        }}
        codes[i] = (uint8_t)(whole + {upper}_INPUT_ZERO_POINT);
    }}
}}

void {name}_dequantize(const {name}_output codes[{upper}_OUTPUT_SIZE], float numbers[{upper}_OUTPUT_SIZE])
{{
    for (int32_t i = 0; i < {upper}_OUTPUT_SIZE; i++) {{
        numbers[i] = (float)(codes[i] - {upper}_OUTPUT_ZERO_POINT) * {upper}_OUTPUT_SCALE;
    }}
}}
"""


def _self_test(name: str, network: Network) -> str:
    upper, size, largest = name.upper(), network.input.size, network.input.code.high
    generator = np.random.default_rng(derive(0, "emit", "c", "self-test"))
    images = generator.integers(0, largest + 1, (TESTS, size)).astype(np.uint8)
    images[1] = np.where(np.arange(size) // 3 % 2, largest, 0)
    expected = np.stack([simulate(network, image) for image in images])
    inputs, outputs = (
        ",\n".join(f"    {{\n{numbers(row, ' ' * 8)}\n    }}" for row in rows) for rows in (images, expected)
    )
    return f"""/* Self-test of {name}: returns 0 where the program computes what it must. */
#include "{name}.h"

#include <stdio.h>

static const uint8_t inputs[{TESTS}][{upper}_INPUT_SIZE] = {{
{inputs}
}};

static const {name}_output expected[{TESTS}][{upper}_OUTPUT_SIZE] = {{
{outputs}
}};

int main(void)
{{
    int wrong = 0;
    for (int test = 0; test < {TESTS}; test++) {{
        {name}_output output[{upper}_OUTPUT_SIZE];
        {name}_run(inputs[test], output);
        for (int i = 0; i < {upper}_OUTPUT_SIZE; i++) {{
            wrong += output[i] != expected[test][i];
        }}
    }}
    printf("{name}: %d of %d codes wrong\\n", wrong, {TESTS} * {upper}_OUTPUT_SIZE);
    return wrong != 0;
}}
"""
