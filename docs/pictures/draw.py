"""Draw the pictures of `docs/idea.md`: `python docs/pictures/draw.py` writes the SVG files beside this one.

All but the staircase are sketches and say so; no picture shows a measured figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
INK, SOFT, BLUE, RED, GREEN, PAPER = "#1f2933", "#9aa5b1", "#2563a8", "#c2412d", "#2f7d4f", "#fbfbf8"

Point = tuple[float, float]


def page(width: int, height: int, parts: Iterable[str], title: str) -> str:
    """An SVG document of so many pixels on a light ground, which dark pages need."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="{INK}">\n<title>{title}</title>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, color: str = INK, anchor: str = "start", size: int = 13) -> str:
    """Words whose baseline begins (or has its middle or end) at a point."""
    return f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def line(points: Sequence[Point], color: str = INK, width: float = 2, dash: str = "") -> str:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashed}/>'


def dot(x: float, y: float, color: str) -> str:
    """An image as a point."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{color}"/>'


def box(x: float, y: float, width: float, words: Sequence[str], color: str = INK) -> str:
    """A box of one or more lines of words, the first of them larger."""
    middle = x + width / 2
    lines = [text(middle, y + 21, words[0], color, "middle", 14)]
    lines += [text(middle, y + 40 + 15 * n, word, INK, "middle", 11) for n, word in enumerate(words[1:])]
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="76" rx="6" fill="white" stroke="{color}"/>'
    return "\n".join([frame, *lines])


def arrow(x: float, y: float, to: float) -> str:
    """A level arrow."""
    return line([(x, y), (to, y)], SOFT) + f'<path d="M{to:g} {y:g}l-7 -4v8z" fill="{SOFT}"/>'


def balls() -> str:
    """Two panels: the same images are right before and after, but the quantized boundary cuts their balls."""
    images = [(70.0, 95.0), (105.0, 150.0), (85.0, 205.0), (205.0, 95.0), (235.0, 150.0), (215.0, 205.0)]
    parts = []
    for left, name, bend in ((0, "float", 0.0), (330, "rounded to few bits", 1.0)):
        boundary = [(left + 157 + bend * 30 * math.sin((y - 60) / 14.2), y)
                    for y in (60 + 2 * n for n in range(90))]  # fmt: skip
        parts.append(text(left + 155, 36, name, INK, "middle", 15))
        for n, (x, y) in enumerate(images):
            cut = min(math.hypot(left + x - bx, y - by) for bx, by in boundary) < 34
            color = BLUE if n < 3 else GREEN
            ring = RED if cut else SOFT
            parts.append(
                f'<circle cx="{left + x:g}" cy="{y:g}" r="34" fill="{ring}" fill-opacity="0.12" stroke="{ring}"/>'
            )
            parts.append(dot(left + x, y, color))
        parts.append(line(boundary, INK, 2))
    parts.append(text(20, 272, "Every dot stays on its side in both panels, so clean accuracy is the same. A red ball"))
    parts.append(
        text(20, 290, "crosses the line: somewhere in it is an image that looks alike and gets another class.")
    )
    return page(640, 306, parts, "Decision boundaries and balls around images (sketch)")


def growth() -> str:
    """How far two inputs are apart after each layer, for layers that stretch by 1.5 and by 0.9."""
    parts = [line([(60, 30), (60, 230), (600, 230)], SOFT, 1), text(330, 262, "layer", INK, "middle")]
    parts.append(text(66, 26, "distance between clean and attacked (sketch)"))
    for norm, color, label in ((1.5, RED, "every layer stretches by 1.5"), (0.9, BLUE, "every layer stretches by 0.9")):
        points = [(60 + 80 * n, 230 - 16 * norm**n) for n in range(7)]
        parts.append(line(points, color))
        parts += [dot(x, y, color) for x, y in points]
        parts.append(text(points[-1][0] - 12, points[-1][1] + (-10 if norm < 1 else 2), label, color, "end"))
    parts += [text(60 + 80 * n, 246, str(n), SOFT, "middle", 11) for n in range(7)]
    return page(640, 274, parts, "Products of norms grow from layer to layer (sketch)")


def staircase() -> str:
    """Rounding to 8 levels, its slope, and the slope that straight-through estimation puts in its place."""
    parts = [line([(60, 30), (60, 230), (340, 230)], SOFT, 1)]
    steps = [(n, math.floor(n / 35 + 0.5) * 25) for n in range(246)]
    parts.append(line([(60 + n, 230 - height) for n, height in steps], INK))
    parts.append(line([(60, 230), (305, 55)], RED, 2, "6 5"))
    parts.append(text(200, 250, "activation before rounding", INK, "middle", 12))
    parts.append(text(66, 26, "and after"))
    parts.append(text(370, 90, "The stairs are flat almost everywhere: their", INK))
    parts.append(text(370, 108, "gradient is zero, and an attack that follows", INK))
    parts.append(text(370, 126, "it goes nowhere.", INK))
    parts.append(text(370, 158, "The dashed line is what straight-through", RED))
    parts.append(text(370, 176, "estimation follows instead.", RED))
    return page(640, 266, parts, "Rounding is a staircase")


def way() -> str:
    """The main job, from the float network to the verdict."""
    steps = [
        (BLUE, ["measure", "norms, and harm", "of every format"]),
        (INK, ["search", "a format per layer", "within the limits"]),
        (INK, ["emit", "model.onnx,", "packed bits"]),
        (RED, ["attack", "that file,", "in ONNX Runtime"]),
        (GREEN, ["gates", "exit code", "0 or 1"]),
    ]
    parts = []
    for n, (color, words) in enumerate(steps):
        left = 12 + n * 126
        parts.append(box(left, 30, 110, words, color))
        if n:
            parts.append(arrow(left - 16, 68, left - 1))
    return page(640, 136, parts, "What qopt optimize does")


def main() -> None:
    """Write all pictures."""
    for name, draw in {"balls": balls, "growth": growth, "staircase": staircase, "way": way}.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
