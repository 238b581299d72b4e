"""The format of one tensor: what `int4`, `log4:channel:mse` or `float` mean, and what each costs in storage.

A weight spec is ``kind bits [":" granularity] [":" scale]``:

- kind: ``int`` (linear, symmetric) or ``log`` (power of two), 1 to 8 bits; ``float`` leaves the weight as it is;
- granularity: ``channel`` (a scale per output channel, the default) or ``tensor``;
- scale: ``mse`` (mean-square-optimal, the default) or ``max`` (max-abs).

An activation spec is ``int`` with 2 to 8 bits and a calibrator, ``minmax`` (the default) or ``pXX`` (percentile XX of
the observed values): ``int8``, ``int4:p99.9``, or ``float``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, final

from qopt.errors import PlanError

Kind = Literal["float", "int", "log"]
Granularity = Literal["channel", "tensor"]
Scale = Literal["mse", "max"]

_WEIGHT = re.compile(r"(int|log)([1-8])((?::[a-z]+)*)")
_ACTIVATION = re.compile(r"int([2-8])(?::(minmax|p[0-9]{1,2}(?:\.[0-9]+)?|p100))?")


@final
@dataclass(frozen=True, order=True)
class WeightSpec:
    """The format of one weight tensor. ``bits`` counts the information; `container_bits` what is stored."""

    kind: Kind = "float"
    bits: int = 32
    granularity: Granularity = "channel"
    scale: Scale = "mse"

    @staticmethod
    def parse(text: str) -> WeightSpec:
        """Read ``text``; raises PlanError where it is no weight spec."""
        word = text.strip()
        if word == "float":
            return FLOAT
        match = _WEIGHT.fullmatch(word)
        if match is None:
            raise PlanError(
                "not a weight format", expected="float, int1..int8 or log1..log8, then :tensor|channel, :max|mse",
                got=repr(text),
            )  # fmt: skip
        options = [o for o in match[3].split(":") if o]
        granularity = [o for o in options if o in ("channel", "tensor")]
        scale = [o for o in options if o in ("mse", "max")]
        if len(granularity) + len(scale) != len(options) or len(granularity) > 1 or len(scale) > 1:
            raise PlanError(
                "unknown or repeated option in a weight format", expected=":tensor|channel and :max|mse, each once",
                got=repr(text),
            )  # fmt: skip
        return WeightSpec(
            kind="int" if match[1] == "int" else "log",
            bits=int(match[2]),
            granularity="tensor" if granularity == ["tensor"] else "channel",
            scale="max" if scale == ["max"] else "mse",
        )

    def __str__(self) -> str:
        if self.kind == "float":
            return "float"
        options = (":tensor" if self.granularity == "tensor" else "") + (":max" if self.scale == "max" else "")
        return f"{self.kind}{self.bits}{options}"

    @property
    def short(self) -> str:
        """The spec without its options: ``int4``, ``log4``, ``float``."""
        return "float" if self.kind == "float" else f"{self.kind}{self.bits}"

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float32."""
        return self.kind == "float"

    @property
    def container_bits(self) -> int:
        """Bits that one code occupies in the file: 2, 4 or 8 for 1-2, 3-4 and 5-8 bits; 32 for float."""
        return 32 if self.is_float else 2 if self.bits <= 2 else 4 if self.bits <= 4 else 8


FLOAT = WeightSpec()


@final
@dataclass(frozen=True, order=True)
class ActivationSpec:
    """The format of one activation tensor: unsigned or signed affine codes in an 8-bit container, or float.

    ``percentile`` in (0, 100]: the calibrated range is the central part of the observed values that holds this
    percentage on either side; 100 is min-max.
    """

    bits: int = 32
    percentile: float = 100.0

    @staticmethod
    def parse(text: str) -> ActivationSpec:
        """Read ``text``; raises PlanError where it is no activation spec."""
        word = text.strip()
        if word == "float":
            return FLOAT_ACTIVATION
        match = _ACTIVATION.fullmatch(word)
        percentile = float(match[2][1:]) if match and match[2] and match[2] != "minmax" else 100.0
        if match is None or not percentile > 50.0:
            raise PlanError(
                "not an activation format", expected="float or int2..int8, then :minmax or :pXX with XX above 50",
                got=repr(text),
            )  # fmt: skip
        return ActivationSpec(int(match[1]), percentile)

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        percentile = f"{self.percentile!r}".removesuffix(".0")  # the shortest text that reads back as this number
        return f"int{self.bits}" + (f":p{percentile}" if self.percentile < 100 else "")

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float32."""
        return self.bits == 32


FLOAT_ACTIVATION = ActivationSpec()
