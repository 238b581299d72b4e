"""Charts as SVG, narrow enough for a phone: the same bytes for the same numbers, in light and in dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from qopt.report.heatmap import plain

WIDTH: Final = 344
"""Pixels: what a phone of 390 pixels shows beside its margins, without shrinking the letters."""

LINE: Final = 20
"""Pixels from one line of text to the next."""

NAME: Final = 118
"""Pixels for the name of a row."""

NUMBER: Final = 62
"""Pixels for the number at the end of a row."""

DOTTED: Final = 40
"""Points of a curve up to which each is marked."""

Tone = Literal["first", "second", "third", "quiet"]
"""What a mark stands for; the page's colours say how it looks."""

STYLE: Final = """.chart { background: var(--page); font-family: system-ui, sans-serif; font-size: 12px; }
.chart text { fill: var(--ink); } .chart .title { font-weight: 600; font-size: 13px; }
.chart .faint { fill: var(--faint); font-size: 11px; } .chart .number { font-variant-numeric: tabular-nums; }
.chart .axis { stroke: var(--line); } .chart .range { stroke: var(--ink); stroke-width: 1.5; }
.chart .path { fill: none; stroke: var(--first); stroke-width: 1.5; stroke-dasharray: 4 3; }
.chart .curve { fill: none; }
.chart .first { fill: var(--first); } .chart .second { fill: var(--second); } .chart .third { fill: var(--third); }
.chart .quiet { fill: var(--faint); } .chart .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.chart .stroke-first { stroke: var(--first); } .chart .stroke-second { stroke: var(--second); }
.chart .stroke-third { stroke: var(--third); } .chart .stroke-quiet { stroke: var(--faint); }
"""
"""The rules that charts need beside those of heat maps; the page sets ``--first``, ``--second`` and ``--third``."""


@final
@dataclass(frozen=True)
class Bar:
    """One bar, ``value`` of the chart's ``largest`` long, with the number beside it and its interval drawn upon it."""

    value: float
    shown: str
    tone: Tone = "first"
    interval: tuple[float, float] | None = None


@final
@dataclass(frozen=True)
class BarChart:
    """Rows of bars, each row with a name.

    Attributes:
        title: what is shown, with the unit.
        rows: name and bars; a row of several bars has its name above them.
        largest: what fills the width.
        legend: tone and what it stands for, where there are several.
    """

    title: str
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    largest: float
    legend: tuple[tuple[Tone, str], ...] = ()

    def svg(self) -> str:
        """The picture, `WIDTH` pixels wide."""
        canvas = _Canvas(self.title, self._said())
        canvas.legend(self.legend)
        for name, bars in self.rows:
            stacked = len(bars) > 1
            if stacked:
                canvas.text(name, 4, 14, longest=48)
                canvas.down(LINE - 2)
            for bar in bars:
                left = 4 if stacked else NAME
                if not stacked:
                    canvas.text(name, 4, 14, longest=17)
                self._bar(canvas, bar, left)
                canvas.down(LINE - 2)
            canvas.down(6 if stacked else 0)
        return canvas.svg()

    def _bar(self, canvas: _Canvas, bar: Bar, left: int) -> None:
        room = WIDTH - left - NUMBER

        def place(value: float) -> float:
            return left + room * min(max(value / self.largest, 0.0), 1.0) if self.largest > 0 else left

        canvas.add(
            f'<rect class="{bar.tone}" x="{left}" y="{canvas.y + 4}" width="{place(bar.value) - left:.1f}" '
            'height="11" rx="2"/>'
        )
        if bar.interval is not None:
            low, high = map(place, bar.interval)
            canvas.add(
                f'<path class="range" d="M{low:.1f} {canvas.y + 9.5}H{high:.1f}M{low:.1f} {canvas.y + 6}v7'
                f'M{high:.1f} {canvas.y + 6}v7"/>'
            )
        canvas.text(bar.shown, WIDTH - NUMBER + 6, 14, kind="number")

    def _said(self) -> str:
        return "; ".join(f"{name}: {', '.join(bar.shown for bar in bars)}" for name, bars in self.rows)


@final
@dataclass(frozen=True)
class Point:
    """One point of a scatter chart; ``ringed`` ones stand out, ``path`` ones are joined by a line."""

    x: float
    y: float
    said: str
    tone: Tone = "quiet"
    ringed: bool = False
    path: bool = False


@final
@dataclass(frozen=True)
class Scatter:
    """Points over two axes, which begin and end where the points do; ``y`` may be on a logarithmic scale."""

    title: str
    x_name: str
    y_name: str
    points: tuple[Point, ...]
    legend: tuple[tuple[Tone, str], ...] = ()
    logarithmic: bool = False

    def svg(self) -> str:
        """The picture, `WIDTH` pixels wide."""
        canvas = _Canvas(self.title, "; ".join(point.said for point in self.points))
        canvas.legend(self.legend)
        frame = _Frame(canvas, self._ticks("x"), self._ticks("y"), logarithmic=self.logarithmic)
        frame.draw(self.x_name, self.y_name)
        joined = sorted((p for p in self.points if p.path), key=lambda p: (p.x, p.y))
        if len(joined) > 1:
            canvas.add(f'<path class="path" d="{frame.path([(p.x, p.y) for p in joined])}"/>')
        for point in sorted(self.points, key=lambda p: p.ringed):
            x, y = frame.place(point.x, point.y)
            ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7"/>' if point.ringed else ""
            canvas.add(
                f'<g><title>{plain(point.said)}</title><circle class="{point.tone}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
                f"{ring}</g>"
            )
        return frame.svg()

    def _ticks(self, axis: Literal["x", "y"]) -> list[float]:
        values = [point.x if axis == "x" else point.y for point in self.points]
        return log_ticks(values) if axis == "y" and self.logarithmic else ticks(values)


@final
@dataclass(frozen=True)
class Curves:
    """Lines over one axis: name, tone and points (x, y) of each; the y axis ends at ``largest``.

    Lines that others may hide are wider. ``counted``: x counts things from 1 on. ``form`` is how y is said to those who
    cannot see it.
    """

    title: str
    x_name: str
    y_name: str
    lines: tuple[tuple[str, Tone, tuple[tuple[float, float], ...]], ...]
    largest: float
    counted: bool = False
    form: str = ".1f"

    def svg(self) -> str:
        """The picture, `WIDTH` pixels wide."""
        said = "; ".join(
            f"{name}: {', '.join(f'{y:{self.form}} at {x:.3g}' for x, y in points)}" for name, _, points in self.lines
        )
        canvas = _Canvas(self.title, said)
        canvas.legend(tuple((tone, name) for name, tone, _ in self.lines))
        xs = [x for _, _, points in self.lines for x, _ in points]
        frame = _Frame(canvas, ticks(xs, 1.0 if self.counted else 0.0), ticks([0.0, self.largest]))
        frame.draw(self.x_name, self.y_name)
        for under, (_, tone, points) in zip(range(len(self.lines) - 1, -1, -1), self.lines, strict=True):
            canvas.add(f'<path class="curve stroke-{tone}" stroke-width="{2 + 3 * under}" d="{frame.path(points)}"/>')
            for x, y in (frame.place(*point) for point in points if len(points) <= DOTTED):
                canvas.add(f'<circle class="{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{3.5 + 1.5 * under}"/>')
        return frame.svg()


def ticks(values: Sequence[float], least: float = 0.0) -> list[float]:
    """Two to seven round numbers that enclose ``values``, at least ``least`` apart, which is round itself."""
    low, high = min(values), max(values)
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten that enclose ``values``, which are positive; at most six of them."""
    first, last = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    every = max(1, math.ceil((last - first) / 5))
    return [10.0**i for i in range(first, last + every + (last == first), every)]


class _Canvas:
    """Text and marks from the top down; ``y`` is where the next line begins."""

    def __init__(self, title: str, said: str) -> None:
        self.y = 26
        self._label = plain(f"{title}. {said}")
        self._parts = [f'<text class="title" x="4" y="16">{plain(title)}</text>']

    def add(self, part: str) -> None:
        self._parts.append(part)

    def down(self, pixels: int) -> None:
        self.y += pixels

    def text(self, text: str, x: float, drop: float, *, kind: str = "", anchor: str = "", longest: int = 99) -> None:
        """One line of text, its baseline ``drop`` pixels below ``y``; the whole of a long one is its title."""
        short = text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
        words = f' class="{kind}"' if kind else ""
        words += f' text-anchor="{anchor}"' if anchor else ""
        whole = f"<title>{plain(text)}</title>" if short != text else ""
        self.add(f'<text{words} x="{x:.1f}" y="{self.y + drop:.1f}">{whole}{plain(short)}</text>')

    def legend(self, entries: Sequence[tuple[Tone, str]]) -> None:
        """Each on a line of its own where they do not fit on one."""
        x = 4.0
        for tone, name in entries:
            width = 26 + 6.6 * len(name)
            if x > 4 and x + width > WIDTH:
                self.down(LINE - 3)
                x = 4.0
            self.add(f'<rect class="{tone}" x="{x:.1f}" y="{self.y + 4}" width="11" height="11" rx="2"/>')
            self.text(name, x + 16, 14)
            x += width
        self.down(LINE + 2 if entries else 4)

    def svg(self) -> str:
        """One ``svg`` element."""
        height = self.y + 6
        head = (
            f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{self._label}">'
        )
        return "\n".join([head, *self._parts, "</svg>"])


class _Frame:
    """Two axes with round numbers, and where values lie between them."""

    LEFT, BOTTOM, HEIGHT = 54, 40, 190

    def __init__(self, canvas: _Canvas, x: list[float], y: list[float], *, logarithmic: bool = False) -> None:
        self._canvas, self._x, self._y, self._log = canvas, x, y, logarithmic
        self._top = canvas.y + 16

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        right = self.LEFT + (WIDTH - self.LEFT - 16) * self._share(x, self._x, log=False)
        return right, self._top + self.HEIGHT * (1 - self._share(y, self._y, log=self._log))

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The line through points."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.place(*point) for point in points))

    def draw(self, x_name: str, y_name: str) -> None:
        """Axes, their numbers and names."""
        canvas, bottom = self._canvas, self._top + self.HEIGHT
        canvas.text(y_name, 4, 8, kind="faint")
        for value in self._x:
            x, _ = self.place(value, self._y[0])
            canvas.add(f'<path class="axis" d="M{x:.1f} {self._top}V{bottom}"/>')
            canvas.text(f"{value:.4g}", x, bottom - canvas.y + 15, kind="faint", anchor="middle")
        for value in self._y:
            _, y = self.place(self._x[0], value)
            canvas.add(f'<path class="axis" d="M{self.LEFT} {y:.1f}H{WIDTH - 16}"/>')
            canvas.text(f"{value:.3g}", self.LEFT - 6, y - canvas.y + 4, kind="faint", anchor="end")
        canvas.text(x_name, (self.LEFT + WIDTH - 16) / 2, bottom - canvas.y + 32, kind="faint", anchor="middle")

    def svg(self) -> str:
        """The whole picture."""
        self._canvas.down(16 + self.HEIGHT + self.BOTTOM)
        return self._canvas.svg()

    @staticmethod
    def _share(value: float, ends: list[float], *, log: bool) -> float:
        low, high = ends[0], ends[-1]
        if log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return (value - low) / (high - low)
