"""The C functions of a program: those under ``kernels/`` that its steps need, without the branches they do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

from qopt.emit.c.steps import AddStep, AverageStep, LayerStep, MaxStep, MoveStep, Part, Step

_ORDER = (
    "types", "round_shift", "finish", "store", "unpack_bits", "unpack_ternary", "dot_int8", "dot_shifts", "dot_signs",
    "dot_xnor", "layer_type", "gather", "pack_columns", "run_layer", "run_rescale", "run_add", "run_max", "run_average",
    "run_move",
)  # fmt: skip

DOTS = {"int8": "int8", "digits": "int8", "ternary": "int8", "log": "shifts", "log8": "shifts", "signs": "signs"}
"""What multiplies rows, by how they are stored; ``xnor`` has its own name."""


def dot(part: Part) -> str:
    """The function that multiplies a row with a column."""
    return f"dot_{DOTS.get(part.rows, part.rows)}"


def unpack(part: Part) -> str | None:
    """The function that unpacks a row, or None."""
    if part.table is None:
        return None
    return "unpack_ternary" if part.rows == "ternary" else "unpack_bits"


def functions(steps: Sequence[Step]) -> str:
    """Their text, in an order that needs no declarations."""
    needed: set[str] = {"types"}
    features: set[str] = set()
    for step in steps:
        needed |= _functions(step)
        if isinstance(step, LayerStep):
            features |= {"window"} if step.window else set()
            features |= {"xnor"} if step.bit_bytes else set()
            features |= {"unpack"} if step.row_bytes else set()
    needed |= {"gather"} if "window" in features else set()
    needed |= {"pack_columns"} if "xnor" in features else set()
    return "\n".join(_chosen(_read(name), features) for name in _ORDER if name in needed)


def _functions(step: Step) -> set[str]:
    if isinstance(step, (MaxStep, MoveStep)):
        return {"run_max" if isinstance(step, MaxStep) else "run_move"}
    shared = {"round_shift", "finish", "store"}
    if isinstance(step, LayerStep):
        rows = {name for part in step.parts for name in (dot(part), unpack(part)) if name}
        return shared | rows | {"layer_type", "run_layer"}
    if isinstance(step, AddStep):
        return shared | {"run_add"}
    return shared | {"run_average" if isinstance(step, AverageStep) else "run_rescale"}


def _read(name: str) -> str:
    return resources.files("qopt.emit.c").joinpath("kernels", f"{name}.c").read_text(encoding="ascii")


def _chosen(text: str, features: set[str]) -> str:
    """``text`` with the blocks between IF and END of the features that are needed, and without the marks."""

    def keep(match: re.Match[str]) -> str:
        return match[2] if match[1] in features else ""

    return re.sub(r" */\*IF (\w+)\*/\n(.*?) */\*END\*/\n", keep, text, flags=re.DOTALL)
