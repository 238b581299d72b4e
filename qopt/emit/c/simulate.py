"""The steps of the C program in numpy, code for code: what the self-test expects.

Columns times rows are multiplied in float64, which is exact: the sums stay below 2**31.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qopt.emit.c.fixed_point import rescale
from qopt.emit.c.steps import (
    AddStep,
    AverageStep,
    Code,
    ConcatStep,
    LayerStep,
    MaxStep,
    MoveStep,
    Network,
    RescaleStep,
    Step,
    Tensor,
    Window,
    sources_of,
)

Codes = NDArray[np.int64]


def simulate(network: Network, codes: NDArray[np.uint8]) -> Codes:
    """Output codes int64 (size of the output,) of one image, whose codes are uint8 of any shape."""
    known = {network.input.root: codes.reshape(-1).astype(np.int64)}
    for step in network.steps:
        known[step.target.root] = _run(step, [known[tensor.root] for tensor in sources_of(step)])
    return known[network.output.root]


def _run(step: Step, inputs: list[Codes]) -> Codes:
    code = step.target.code
    if isinstance(step, LayerStep):
        return _layer(step, inputs[0])
    if isinstance(step, AddStep):
        terms = [_centred(t, x) * m for t, x, m in zip((step.a, step.b), inputs, step.mantissas, strict=True)]
        return _finish(rescale(sum(terms, np.zeros_like(terms[0])), step.shift), code)
    if isinstance(step, MaxStep):
        taps = _taps(step.window, inputs[0].reshape(step.source.shape), -1)
        return np.asarray(np.stack(list(taps)).max(axis=0).reshape(-1), np.int64)
    if isinstance(step, AverageStep):
        return _average(step, inputs[0])
    if isinstance(step, MoveStep):
        return _move(step, inputs[0])
    if isinstance(step, RescaleStep):
        return _finish(rescale(_centred(step.source, inputs[0]) * step.mantissa, step.shift), code)
    return _concat(step, inputs)


def _layer(step: LayerStep, codes: Codes) -> Codes:
    out = np.zeros((step.channels, step.pixels), np.int64)
    zero = step.source.code.zero_point
    if step.window is None:
        groups = [codes.reshape(step.pixels, step.taps).T]
    else:
        planes = np.split(codes.reshape(step.source.shape), step.groups)
        groups = [np.stack(list(_taps(step.window, group, zero)), 1).reshape(step.taps, -1) for group in planes]
    per_group = step.channels // step.groups
    for part in step.parts:
        ones = (part.levels > 0).sum(axis=1) - step.taps if part.rows == "xnor" else np.zeros(len(part.bias), np.int64)
        for row, channel in enumerate(part.channels):
            sums = (part.levels[row].astype(np.float64) @ groups[channel // per_group]).astype(np.int64)
            sums += part.bias[row] - ones[row]
            out[channel] = _finish(rescale(sums * part.mantissa[row], int(part.shift[row])), step.target.code)
    return (out if step.window else out.T).reshape(-1)


def _average(step: AverageStep, codes: Codes) -> Codes:
    planes = codes.reshape(step.source.shape)
    zero = step.source.code.zero_point
    total = sum(tap - zero for tap in _taps(step.window, planes, zero))
    seen = np.asarray(sum(tap for tap in _taps(step.window, np.ones_like(planes), 0)))
    index = seen - 1 if len(step.multipliers) > 1 else np.zeros_like(seen)
    pairs = np.array(step.multipliers, np.int64)[index]
    return _finish(rescale(total * pairs[..., 0], pairs[..., 1]), step.target.code).reshape(-1)


def _move(step: MoveStep, codes: Codes) -> Codes:
    before, after = step.boxes
    places = [start + np.arange(n) * s for start, n, s in zip(step.starts, after, step.steps, strict=True)]
    a, b, c = ((place >= 0) & (place < n) for place, n in zip(places, before, strict=True))
    index = np.ix_(*[place.clip(0, n - 1) for place, n in zip(places, before, strict=True)])
    seen = codes.reshape(before)[index]
    return np.where(a[:, None, None] & b[:, None] & c, seen, step.source.code.zero_point).reshape(-1)


def _concat(step: ConcatStep, inputs: list[Codes]) -> Codes:
    runs = [
        _finish(rescale(_centred(source, codes) * mantissa, shift), step.target.code).reshape(step.blocks, -1)
        for source, codes, (mantissa, shift) in zip(step.sources, inputs, step.multipliers, strict=True)
    ]
    return np.concatenate(runs, axis=1).reshape(-1)


def _taps(window: Window, planes: Codes, outside: int) -> Iterator[Codes]:
    """For each element of the window what it sees at every output position, (channels, positions)."""
    grid = planes.reshape(-1, window.height, window.width)
    rows = np.arange(window.out_height) * window.stride_height - window.pad_top
    columns = np.arange(window.out_width) * window.stride_width - window.pad_left
    for y in range(window.kernel_height):
        for x in range(window.kernel_width):
            down, right = rows + y * window.dilation_height, columns + x * window.dilation_width
            inside = ((down >= 0) & (down < window.height))[:, None] & ((right >= 0) & (right < window.width))
            seen = grid[:, down.clip(0, window.height - 1)][:, :, right.clip(0, window.width - 1)]
            yield np.where(inside, seen, outside).reshape(len(grid), -1)


def _centred(tensor: Tensor, codes: Codes) -> Codes:
    return codes - tensor.code.zero_point


def _finish(values: Codes, code: Code) -> Codes:
    return np.clip(values + code.zero_point, code.low, code.high)
