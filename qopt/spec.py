"""The format of one tensor: what `int4`, `log4:channel:mse` or `float` mean, and what each costs in storage.

A weight spec is ``format [":" granularity] [":" scale] [":" grid]``, options in any order:

- format: ``int`` (linear) or ``log`` (power of two) and 1 to 8 bits; ``ternary``; ``float``, which leaves the weight as
  it is; or ``name@bits``, a quantizer that a plugin brings;
- granularity: ``channel`` (a scale per output channel, the default), ``tensor``, or ``block8`` to ``block1024``: one
  for each so many weights of an output channel, in the order in which they are stored;
- scale: ``mse`` (mean-square-optimal, the default) or ``max`` (max-abs);
- grid of ``int`` with 2 bits and more under ``mse``: ``narrow`` (symmetric), ``full`` (two's complement, its longer
  side turned to either sign), ``mid`` (2**bits levels at odd multiples of half a step, none at zero; up to 4 bits) or
  ``auto`` (the one of lowest squared error, the default). Under ``max`` the grid is narrow. With either scale ``asym``:
  2**bits levels from the smallest to the largest weight, zero one of them; only asked for, never chosen by ``auto``.

No integer kernel takes ``block`` or ``asym``: such a layer computes in float32.

``rows(int8*3,ternary*12,int4)`` gives each output channel its own format: a list of runs in the order of the channels,
``*1`` left out. Its formats have a scale per channel and levels that an integer kernel takes: ``int1`` to ``int8``,
``ternary``, ``log1`` to ``log4``, and plugins up to 4 bits.

An activation spec is ``int`` with 1 to 8 bits and a calibrator: ``minmax`` (the default), ``pXX`` (percentile XX of
the observed values), ``mse`` (least squared error), ``entropy`` (Kullback-Leibler), ``clip1`` or ``clip6`` (ReLU1,
ReLU6): ``int8``, ``int4:p99.9``, ``int4:mse``, or ``float``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, NamedTuple, cast, final, get_args

from qopt.errors import PlanError, UsageError

Granularity = Literal["channel", "tensor", "block"]
Scale = Literal["mse", "max"]
Grid = Literal["auto", "narrow", "full", "mid", "asym"]
Calibrator = Literal["percentile", "mse", "entropy", "clip1", "clip6"]

SMALLEST_BLOCK = 8
LARGEST_BLOCK = 1024
"""Weights that may share a scale under the granularity ``block``."""

_BLOCK = "block([89]|[1-9][0-9]{1,2}|10[01][0-9]|102[0-4])"
_GRIDS = "auto|narrow|full|mid"
_ONE = "[^,*)]*"  # never past the end of one format, nor of one run of rows
_GROUPS = ("tensor|channel|block", "max|mse", f"{_GRIDS}|asym")
_NOT_TWICE = "".join(f"(?!{_ONE}:({group}){_ONE}:({group}))" for group in _GROUPS)
_ALLOWED = rf"{_NOT_TWICE}(?!{_ONE}:max{_ONE}:({_GRIDS}))(?!{_ONE}:({_GRIDS}){_ONE}:max)"
_PLUGIN = r"(?!(float|int|log|ternary|linear|binary|rows)@)[a-z][a-z0-9_]*@"


def _formats(most: int, either: str, linear: str = "") -> str:
    """Formats with codes: ``most`` bits of those that have a table, ``either`` the options that all of them take.

    ``linear`` are options of linear formats beside their grids.
    """
    return (
        rf"(int1|log[1-{most}]|ternary|{_PLUGIN}[1-{most}])(:({either}))*"
        rf"|int[2-4](:({either}|{_GRIDS}{linear}))*|int[5-8](:({either}|auto|narrow|full{linear}))*"
    )


MOST_ROWS = 10**7
"""More output channels than any layer has: what a count of rows stays below."""

_ROW = rf"{_ALLOWED}({_formats(4, 'channel|max|mse')})"
_RUN = rf"{_ROW}(\*[1-9][0-9]{{0,6}})?"
_WHOLE = _formats(8, f"tensor|channel|{_BLOCK}|max|mse", "|asym")
WEIGHT_PATTERN = rf"^({_ALLOWED}(float|{_WHOLE})|rows\({_RUN}(,{_RUN})*\))$"
"""The grammar of weight specs as a regular expression, for `parse` and for the JSON schema of plans."""

_ACTIVATION = re.compile(r"int([1-8])(?::(minmax|mse|entropy|clip1|clip6|p[0-9]{1,2}(?:\.[0-9]+)?|p100))?")


@final
class Packing(NamedTuple):
    """How codes share bytes: every ``codes`` digits of base ``base`` fill ``bytes`` bytes, the first digit lowest."""

    base: int
    codes: int
    bytes: int


_FLOAT32 = Packing(2**32, 1, 4)
_TERNARY = Packing(3, 5, 1)
_BITS = {1: Packing(2, 8, 1), 2: Packing(4, 4, 1), 3: Packing(8, 8, 3), 4: Packing(16, 2, 1)}
_WIDE = Packing(256, 1, 1)


@final
@dataclass(frozen=True, order=True)
class WeightSpec:
    """The format of one weight tensor.

    Attributes:
        kind: ``float``, ``int``, ``log``, ``ternary``, ``rows``, or the name of a plugin in `qopt.quantizers`.
        bits: bits of a code that is stored by itself: 2 for ternary, the most that any row has for ``rows``;
            `container_bits` is what a code occupies.
        granularity: what shares a scale.
        scale: how the scale is found.
        grid: which levels a linear format has; ``auto`` for all that have no choice.
        rows: of ``rows``: formats and how many output channels in turn have each, neighbours different; empty for all
            other kinds.
        block: how many weights share a scale under the granularity ``block``; 0 under all others.

    Raises:
        PlanError: for rows or a block that break these rules.
    """

    kind: str = "float"
    bits: int = 32
    granularity: Granularity = "channel"
    scale: Scale = "mse"
    grid: Grid = "auto"
    rows: tuple[tuple[WeightSpec, int], ...] = ()
    block: int = 0

    def __post_init__(self) -> None:
        if self.rows or self.kind == "rows":
            _check_rows(self)
        if not (SMALLEST_BLOCK <= self.block <= LARGEST_BLOCK if self.granularity == "block" else self.block == 0):
            raise PlanError(
                "not a number of weights that share a scale", got=f"{self.granularity} of {self.block}",
                expected=f"{SMALLEST_BLOCK}..{LARGEST_BLOCK} under the granularity block, 0 under all others",
            )  # fmt: skip

    @staticmethod
    def of_rows(specs: Sequence[WeightSpec]) -> WeightSpec:
        """The format of a weight whose output channels have ``specs``; the format itself where all have the same one.

        Raises:
            PlanError: no formats, or one that a row cannot have.
        """
        if len(set(specs)) == 1:
            return specs[0]
        return _rows([(spec, len(list(run))) for spec, run in groupby(specs)])

    @staticmethod
    def parse(text: str) -> WeightSpec:
        """Read ``text``; raises PlanError where it is no weight spec."""
        word = text.strip()
        if word.startswith("rows("):
            return _parse_rows(word)
        if re.fullmatch(WEIGHT_PATTERN, word) is None:
            known = re.fullmatch(WEIGHT_PATTERN, word.split(":")[0])
            raise PlanError(
                "unknown or repeated option in a weight format" if known else "not a weight format", got=repr(text),
                expected="float, int1..int8, log1..log8, ternary or name@1..name@8, then :tensor|channel|blockN with N "
                f"in {SMALLEST_BLOCK}..{LARGEST_BLOCK} and :max|mse, each once, and behind int2..int8 :asym or, where "
                "there is no :max, one of :narrow|full|auto, up to int4 also :mid; or rows(...)",
            )  # fmt: skip
        if word == "float":
            return FLOAT
        format_, *options = word.split(":")
        grid = next((option for option in options if option in get_args(Grid)), "auto")
        block = next((int(option[5:]) for option in options if option.startswith("block")), 0)
        return WeightSpec(
            kind="ternary" if format_ == "ternary" else format_[:-1].removesuffix("@"),
            bits=2 if format_ == "ternary" else int(format_[-1]),
            granularity="block" if block else "tensor" if "tensor" in options else "channel",
            scale="max" if "max" in options else "mse",
            grid=cast(Grid, grid),
            block=block,
        )

    def __str__(self) -> str:
        if self.kind == "float":
            return "float"
        if self.rows:
            return f"rows({','.join(str(spec) + (f'*{count}' if count > 1 else '') for spec, count in self.rows)})"
        shared = {"channel": "", "tensor": ":tensor", "block": f":block{self.block}"}[self.granularity]
        options = shared + (":max" if self.scale == "max" else "")
        return f"{self.short}{options}" + (f":{self.grid}" if self.grid != "auto" else "")

    @property
    def short(self) -> str:
        """The spec without its options: ``int4``, ``log4``, ``ternary``, ``float``, ``rows``."""
        if self.kind in ("float", "ternary", "rows"):
            return self.kind
        return f"{self.kind}{self.bits}" if self.kind in ("int", "log") else f"{self.kind}@{self.bits}"

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float32."""
        return self.kind == "float"

    @property
    def quantizer(self) -> str:
        """Name of its quantizer in the group `qopt.quantizers`; one bit is binary for linear and log formats."""
        if self.bits == 1 and self.kind in ("int", "log"):
            return "binary"
        return {"int": "linear"}.get(self.kind, self.kind)

    @property
    def asymmetric(self) -> bool:
        """Whether codes count from a zero point of their own."""
        return self.quantizer == "linear" and self.grid == "asym"

    @property
    def full_range(self) -> bool:
        """Whether linear codes reach down to -2**(bits-1), one below the narrow grid."""
        return self.quantizer == "linear" and self.scale == "mse" and self.grid in ("auto", "full")

    @property
    def packing(self) -> Packing:
        """How its codes share bytes in the file; a float weight is one code of 4 bytes.

        Raises:
            UsageError: for ``rows``, whose formats have one each.
        """
        if self.rows:
            raise UsageError("rows of several formats share no packing", got=str(self), fix="ask each of `row_counts`")
        if self.is_float:
            return _FLOAT32
        return _TERNARY if self.kind == "ternary" else _BITS.get(self.bits, _WIDE)

    @property
    def container_bits(self) -> float:
        """Bits that one code occupies in the file: 1, 1.6 (ternary), 2, 3, 4, 8 for 5 to 8 bits, and 32 for float.

        Of ``rows`` the average over the rows.
        """
        if self.rows:
            bits, codes = sum(spec.container_bits * count for spec, count in self.rows), self.channels
        else:
            bits, codes = 8 * self.packing.bytes, self.packing.codes
        return bits / codes if bits % codes else bits // codes

    @property
    def channels(self) -> int:
        """Of ``rows``: how many output channels it describes; 0 for all other kinds."""
        return sum(count for _, count in self.rows)

    @property
    def row_counts(self) -> dict[WeightSpec, int]:
        """Of ``rows``: each format, in order of first appearance, to how many channels have it."""
        counts: dict[WeightSpec, int] = {}
        for spec, count in self.rows:
            counts[spec] = counts.get(spec, 0) + count
        return counts

    @property
    def row_members(self) -> dict[WeightSpec, list[int]]:
        """Of ``rows``: each format of `row_counts` to the channels that have it, ascending."""
        members: dict[WeightSpec, list[int]] = {}
        first = 0
        for spec, count in self.rows:
            members.setdefault(spec, []).extend(range(first, first + count))
            first += count
        return members


def _rows(runs: list[tuple[WeightSpec, int]]) -> WeightSpec:
    return WeightSpec("rows", max((spec.bits for spec, _ in runs), default=0), rows=tuple(runs))


def _parse_rows(word: str) -> WeightSpec:
    runs: list[tuple[WeightSpec, int]] = []
    for text in word.removeprefix("rows(").removesuffix(")").split(","):
        if not word.endswith(")") or re.fullmatch(_RUN, text) is None:
            raise PlanError(
                "not a weight format with rows", expected="rows(FORMAT*COUNT,...), the formats int1..int8, log1..log4, "
                "ternary or name@1..name@4 with a scale per channel, *1 left out", got=f"{text!r} in {word!r}",
            )  # fmt: skip
        format_, _, count = text.partition("*")
        runs.append((WeightSpec.parse(format_), int(count or 1)))
    joined = [(spec, sum(count for _, count in same)) for spec, same in groupby(runs, key=lambda run: run[0])]
    return _rows(joined)


def _check_rows(spec: WeightSpec) -> None:
    formats = [row for row, _ in spec.rows]
    wrong = next((row for row in formats if row.rows or re.fullmatch(_ROW, str(row)) is None), None)
    if wrong is not None:
        raise PlanError(
            "a format that a row of its own cannot have", got=str(wrong),
            expected="int1..int8, log1..log4, ternary or name@1..name@4 with a scale per channel",
        )  # fmt: skip
    options = (spec.kind, spec.granularity, spec.scale, spec.grid)
    counted = all(count > 0 for _, count in spec.rows) and spec.channels < MOST_ROWS
    joined = all(one != other for one, other in pairwise(formats))
    if options != ("rows", "channel", "mse", "auto") or not formats or not counted or not joined:
        raise PlanError("rows that are no list of runs", got=repr(spec), fix="use WeightSpec.of_rows")
    if spec.bits != max(row.bits for row in formats):
        raise PlanError("bits that are not those of the widest row", got=repr(spec), fix="use WeightSpec.of_rows")


FLOAT = WeightSpec()


@final
@dataclass(frozen=True, order=True)
class ActivationSpec:
    """The format of one activation tensor: unsigned affine codes in an 8-bit container, or float.

    ``calibrator`` chooses the range that the codes cover, from the values observed on calibration images:

    - ``percentile``: the central part that leaves out ``100 - percentile`` percent on either side; ``percentile`` in
      (50, 100], 100 is min-max;
    - ``mse``: the range of least squared error, clipping and rounding together;
    - ``entropy``: the range whose codes keep the distribution best, in Kullback-Leibler divergence;
    - ``clip1``, ``clip6``: [0, 1] or [0, 6] where nothing is below 0 (METHODS: DoReFa, ReLU1, ReLU6), else min-max.

    Raises PlanError for a percentile beside another calibrator.
    """

    bits: int = 32
    percentile: float = 100.0
    calibrator: Calibrator = "percentile"

    def __post_init__(self) -> None:
        if self.calibrator != "percentile" and self.percentile != 100:
            raise PlanError("only the calibrator percentile takes a percentile", got=f"{self.calibrator}, {self!r}")

    @staticmethod
    def parse(text: str) -> ActivationSpec:
        """Read ``text``; raises PlanError where it is no activation spec."""
        word = text.strip()
        if word == "float":
            return FLOAT_ACTIVATION
        match = _ACTIVATION.fullmatch(word)
        option = (match[2] or "minmax") if match else "minmax"
        percentile = float(option[1:]) if option.startswith("p") else 100.0
        if match is None or not percentile > 50.0:
            raise PlanError(
                "not an activation format",
                expected="float or int1..int8, then :minmax, :mse, :entropy, :clip1, :clip6 or :pXX with XX above 50",
                got=repr(text),
            )
        if option in ("mse", "entropy", "clip1", "clip6"):
            return ActivationSpec(int(match[1]), calibrator=cast(Calibrator, option))
        return ActivationSpec(int(match[1]), percentile)

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        if self.calibrator != "percentile":
            return f"int{self.bits}:{self.calibrator}"
        percentile = f"{self.percentile!r}".removesuffix(".0")  # the shortest text that reads back as this number
        return f"int{self.bits}" + (f":p{percentile}" if self.percentile < 100 else "")

    @property
    def is_float(self) -> bool:
        """Whether the tensor stays in float32."""
        return self.bits == 32


FLOAT_ACTIVATION = ActivationSpec()
