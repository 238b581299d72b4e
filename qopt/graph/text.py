"""The prepared graph in words."""

from __future__ import annotations

from qopt.graph.model import Layer, Prepared


def show(prepared: Prepared) -> str:
    """One line per layer in graph order: name, operator, weight shape, multiply-accumulates per image, data flow.

    ``net.conv1.weight  Conv  16x3x3x3  macs 442,368  x -> relu``; further uses of a shared weight follow a comma.
    """
    rows = [_columns(layer) for layer in prepared.layers]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = []
    for *columns, flow in rows:
        padded = [text.ljust(width) for text, width in zip(columns, widths, strict=True)]
        lines.append("  ".join([*padded, flow]) + "\n")
    return "".join(lines)


def _columns(layer: Layer) -> tuple[str, str, str, str, str]:
    shape = "x".join(map(str, layer.shape))
    flow = ", ".join(f"{use.input} -> {use.output}" for use in layer.uses)
    return layer.name, layer.op, shape, f"macs {layer.macs:,}", flow
