"""Limits that a plan must keep and gates that the emitted file must pass, as users write them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, final, get_args

from qopt.errors import UsageError, nearest

Quantity = Literal["bits", "size", "flash", "latency", "energy", "bops", "sram", "lipschitz"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
GATES = ("clean_drop", "robust_drop", "masking")

_MILLI, _MICRO, _NANO = Fraction(1, 10**3), Fraction(1, 10**6), Fraction(1, 10**9)
_UNITS: dict[str, dict[str, int | Fraction]] = {
    "bits": {"": 1},
    "size": {"": 1, "B": 1, "KB": 1024, "MB": 1024**2},
    "flash": {"": 1, "B": 1, "KB": 1024, "MB": 1024**2},
    "sram": {"": 1, "B": 1, "KB": 1024, "MB": 1024**2},
    "latency": {"s": 1, "ms": _MILLI, "us": _MICRO},
    "energy": {"J": 1, "mJ": _MILLI, "uJ": _MICRO, "nJ": _NANO},
    "bops": {"": 1, "M": 10**6, "G": 10**9, "T": 10**12},
    "lipschitz": {"": 1},
}
_LIMIT = re.compile(r"\s*([a-z_]+)\s*<=\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*")
_GATE = re.compile(r"\s*([a-z_]+)\s*(<=|=)\s*([a-z0-9.eE+-]+)\s*")


@final
@dataclass(frozen=True, order=True)
class Limit:
    """An upper bound on a cost: bits in code bits per weight, sizes in bytes, time in seconds, energy in joules,
    bit operations in ones."""

    quantity: Quantity
    bound: float

    def __str__(self) -> str:
        unit = next(unit for unit, factor in _UNITS[self.quantity].items() if factor == 1)
        return f"{self.quantity}<={_shortest(self.bound)}{unit}"


@final
@dataclass(frozen=True, order=True)
class Gate:
    """A condition on the emitted file, in points against float; ``bound`` is None for ``masking=none``."""

    name: str
    bound: float | None = None

    def __str__(self) -> str:
        return f"{self.name}=none" if self.bound is None else f"{self.name}<={_shortest(self.bound)}"


ROBUST_GATES = (Gate("clean_drop", 2.0), Gate("robust_drop", 2.0), Gate("masking"))
"""The gates of ``--robust``, where none is named."""


def readable(quantity: str, value: float, digits: int = 4) -> str:
    """A cost for people: ``12.3 ms``, ``384 KB``; of units the largest that leaves a number of 1 or more.

    A quantity that has no limits gets no unit.
    """
    units = sorted(_UNITS.get(quantity, {"": 1}).items(), key=lambda unit: (-unit[1], unit[0] == ""))
    unit, factor = next(((unit, factor) for unit, factor in units if value >= factor), units[-1])
    return f"{value / float(factor):.{digits}g} {unit}".rstrip()


def parse_limit(text: str) -> Limit:
    """Read ``bits<=3.5``, ``flash<=512KB`` or ``latency<=5ms``; raises UsageError."""
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise UsageError("not a limit", where="--limit", expected='like "bits<=3.5"', got=repr(text))
    if match[1] not in QUANTITIES:
        raise UsageError("unknown quantity", where="--limit", got=repr(match[1]), fix=nearest(match[1], QUANTITIES))
    units = _UNITS[match[1]]
    if match[3] not in units:
        expected = " or ".join(unit or "no unit" for unit in units)
        raise UsageError(f"wrong unit for {match[1]}", where="--limit", expected=expected, got=repr(match[3]))
    return Limit(match[1], _number(match[2], text, "--limit", units[match[3]]))  # type: ignore[arg-type]


def parse_gate(text: str) -> Gate:
    """Read ``clean_drop<=2``, ``robust_drop<=2`` or ``masking=none``; raises UsageError."""
    match = _GATE.fullmatch(text)
    if match is None:
        raise UsageError("not a gate", where="--gate", expected='like "clean_drop<=2"', got=repr(text))
    if match[1] not in GATES:
        raise UsageError("unknown gate", where="--gate", got=repr(match[1]), fix=nearest(match[1], GATES))
    if match[1] == "masking":
        if (match[2], match[3]) != ("=", "none"):
            raise UsageError("the masking gate has one form", where="--gate", expected="masking=none", got=repr(text))
        return Gate("masking")
    if match[2] != "<=":
        raise UsageError("a drop is bounded from above", where="--gate", expected=f"{match[1]}<=...", got=repr(text))
    return Gate(match[1], _number(match[3], text, "--gate"))


def _number(digits: str, text: str, where: str, unit: int | Fraction = 1) -> float:
    try:
        value = float(digits) * unit.numerator / unit.denominator
    except ValueError as error:
        raise UsageError("not a number", where=where, got=repr(text)) from error
    if not math.isfinite(value) or value < 0:
        raise UsageError("a bound is finite and not negative", where=where, got=repr(text))
    return value


def _shortest(number: float) -> str:
    """The shortest text that reads back as ``number``, so that a limit can be copied from a report."""
    return repr(float(number)).removesuffix(".0")
