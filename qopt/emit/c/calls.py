"""Every step as C: its constants, and the line that runs it."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from qopt.emit.c.functions import dot, unpack
from qopt.emit.c.memory import Memory
from qopt.emit.c.steps import (
    AddStep,
    AverageStep,
    Code,
    ConcatStep,
    LayerStep,
    MaxStep,
    MoveStep,
    Network,
    Part,
    RescaleStep,
    Step,
    Tensor,
    Window,
    sources_of,
)
from qopt.emit.c.text import Constants, comment, identifier, structure


class Calls:
    """The text of the steps under way.

    Attributes:
        definitions: constants, in order; ``calls``: the body of the run function.
    """

    def __init__(self, network: Network, memory: Memory) -> None:
        self.network, self.memory, self.constants = network, memory, Constants()
        self.definitions: list[str] = []
        self.calls: list[str] = []
        for number, step in enumerate(network.steps):
            self._step(number, step)

    def _step(self, number: int, step: Step) -> None:
        title = f"{number + 1}. {_title(step)}"
        reads = "\n".join(f"   reads  {_described(tensor)}" for tensor in sources_of(step))
        self.definitions.append(comment_block(f"{title}\n{reads}\n   writes {_described(step.target)}"))
        name = f"s{number + 1}_{identifier(step.name if isinstance(step, LayerStep) else step.target.name)}"
        if isinstance(step, LayerStep):
            call = self._layer(number, name, step)
        elif isinstance(step, MaxStep):
            self._struct("window", f"{name}_window", _window(step.window))
            call = f"run_max(&{name}_window, {self._place(step.source)}, {self._place(step.target)})"
        elif isinstance(step, MoveStep):
            call = self._move(name, step)
        else:
            self._code(name, step.target.code)
            call = self._elementwise(name, step)
        self.calls.append(f"    /* {comment(title)} */\n    {call};")

    def _move(self, name: str, step: MoveStep) -> str:
        sizes, out = (f"{{{', '.join(map(str, box))}}}" for box in step.boxes)
        starts, steps = (f"{{{', '.join(map(str, three))}}}" for three in (step.starts, step.steps))
        self._struct("box", f"{name}_box", {"size": sizes, "out": out, "start": starts, "step": steps})
        zero = step.source.code.zero_point
        return f"run_move(&{name}_box, {self._place(step.source)}, {zero}, {self._place(step.target)})"

    def _elementwise(self, name: str, step: AddStep | AverageStep | RescaleStep | ConcatStep) -> str:
        ends = f"&{name}_code, {self._written(step.target)}"
        if isinstance(step, RescaleStep):
            zero = step.source.code.zero_point
            return (
                f"run_rescale({self._place(step.source)}, {step.source.size}, {zero}, {step.mantissa}, {step.shift}, "
                + f"{ends})"
            )
        if isinstance(step, AddStep):
            a, b = (
                f"{self._place(tensor)}, {tensor.code.zero_point}, {mantissa}"
                for tensor, mantissa in zip((step.a, step.b), step.mantissas, strict=True)
            )
            return f"run_add({a}, {b}, {step.shift}, {step.target.size}, {ends})"
        if isinstance(step, AverageStep):
            return self._average(name, step, ends)
        return self._concat(name, step)

    def _average(self, name: str, step: AverageStep, ends: str) -> str:
        self._struct("window", f"{name}_window", _window(step.window))
        pairs = np.array(step.multipliers)
        mantissa = self.constants.array(self.definitions, f"{name}_mantissa", pairs[:, 0].astype(np.int32))
        shift = self.constants.array(self.definitions, f"{name}_shift", pairs[:, 1].astype(np.uint8))
        return (
            f"run_average(&{name}_window, {self._place(step.source)}, {step.source.code.zero_point}, {mantissa}, "
            + f"{shift}, {int(len(pairs) > 1)}, {ends})"
        )

    def _concat(self, name: str, step: ConcatStep) -> str:
        """One call for each source, in a loop over blocks where there are several."""
        run = step.target.size // step.blocks
        calls, offset = [], 0
        for source, (mantissa, shift) in zip(step.sources, step.multipliers, strict=True):
            size = source.size // step.blocks
            written = self._written(step.target, f"block * {run} + {offset}" if step.blocks > 1 else str(offset))
            read = self._place(source) + (f" + block * {size}" if step.blocks > 1 else "")
            numbers = f"{size}, {source.code.zero_point}, {mantissa}, {shift}"
            calls.append(f"run_rescale({read}, {numbers}, &{name}_code, {written})")
            offset += size
        if step.blocks == 1:
            return ";\n    ".join(calls)
        body = ";\n        ".join(calls)
        return f"for (int32_t block = 0; block < {step.blocks}; block++) {{\n        {body};\n    }}"

    def _layer(self, number: int, name: str, step: LayerStep) -> str:
        if step.window:
            self._struct("window", f"{name}_window", _window(step.window))
        rows = [self._part(name if len(step.parts) == 1 else f"{name}_{i + 1}", p) for i, p in enumerate(step.parts)]
        listed = ", ".join(f"{{\n{row}\n}}" for row in rows)
        self.definitions.append(f"static const struct rows {name}_rows[{len(rows)}] = {{{listed}}};")
        code = step.target.code
        self._struct("layer", f"{name}_layer", {
            **({"window": f"&{name}_window"} if step.window else {}),
            "group_channels": step.channels // step.groups, "taps": step.taps, "pixels": step.pixels,
            "tile": step.tile, "channel_stride": step.channel_stride, "pixel_stride": step.pixel_stride,
            "input_zero_point": step.source.code.zero_point, "column_bytes": step.column_bytes,
            "bit_bytes": step.bit_bytes, "code": f"{{{code.zero_point}, {code.low}, {code.high}}}",
            "part_count": len(rows), "parts": f"{name}_rows",
        })  # fmt: skip
        scratch = f"arena + {self.memory.scratch[number]}" if number in self.memory.scratch else "NULL"
        written = self._written(step.target)
        return f"run_layer(&{name}_layer, {self._place(step.source)}, {written}, {scratch})"

    def _part(self, name: str, part: Part) -> str:
        lines, array = self.definitions, self.constants.array
        packed = array(lines, f"{name}_{'weights' if part.rows == 'int8' else 'codes'}", part.packed)
        fields: dict[str, object] = {"count": len(part.channels)}
        if not np.array_equal(part.channels, np.arange(len(part.channels))):
            fields["channels"] = array(lines, f"{name}_channels", part.channels.astype(np.int32))
        fields["packed"] = f"(const uint8_t *){packed}" if part.packed.dtype == np.int8 else packed
        fields["row_bytes"] = part.packed.shape[1]
        if part.table is not None:
            fields["unpack"] = unpack(part)
            fields["bits"] = part.bits
            fields["table"] = array(lines, f"levels_{identifier(part.format)}", part.table)
        fields["dot"] = dot(part)
        if part.rows == "xnor":
            fields["counts_bits"] = 1
        fields["bias"] = array(lines, f"{name}_bias", part.bias.astype(np.int32))
        fields["mantissa"] = array(lines, f"{name}_mantissa", part.mantissa.astype(np.int32))
        fields["shift"] = array(lines, f"{name}_shift", part.shift.astype(np.uint8))
        return structure(fields)

    def _struct(self, kind: str, name: str, fields: dict[str, object]) -> None:
        self.definitions.append(f"static const struct {kind} {name} = {{\n{structure(fields)}\n}};")

    def _code(self, name: str, code: Code) -> None:
        values = f"{code.zero_point}, {code.low}, {code.high}"
        self.definitions.append(f"static const struct code {name}_code = {{{values}}};")

    def _place(self, tensor: Tensor) -> str:
        if tensor.root == self.network.input.root:
            return "input"
        return "output" if tensor.root == self.network.output.root else f"arena + {self.memory.tensors[tensor.root]}"

    def _written(self, tensor: Tensor, offset: str = "0") -> str:
        """The two arguments that `store` takes: codes of 8 bits and wide ones, one of them null."""
        place = self._place(tensor) + (f" + {offset}" if offset != "0" else "")
        return f"NULL, {place}" if tensor.code.wide else f"{place}, NULL"


def comment_block(text: str) -> str:
    """A comment of several lines."""
    return f"\n/* {comment(text)} */"


def _window(window: Window) -> dict[str, object]:
    return dict(asdict(window))


def _described(tensor: Tensor) -> str:
    return f"{tensor.name} ({' x '.join(map(str, tensor.shape))}): {tensor.code}"


def _title(step: Step) -> str:
    if isinstance(step, LayerStep):
        parts = ", ".join(f"{len(part.channels)} rows of {part.format} ({part.rows})" for part in step.parts)
        return f"{step.op} {step.name}: {parts}, {step.taps} weights each"
    kinds = {
        AddStep: "Add", MaxStep: "Maximum", MoveStep: "Move", AverageStep: "Average", RescaleStep: "Rescale",
        ConcatStep: "Concat",
    }  # fmt: skip
    return f"{kinds[type(step)]} to {step.target.name}"
