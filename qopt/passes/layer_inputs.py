"""What meets one row of a layer's weight: the inputs of every output position, and their moments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from qopt.passes.nodes import op_of

MAX_COLUMNS = 4608
"""Layers with longer rows than this are left out: the moment of a row of 4608 takes 170 MB already."""

PATCHES = 1 << 20
"""Inputs unfolded at a time, 4 MB, or half as many as a moment has entries: all patches of a batch would take
gigabytes, and with fewer positions than that adding up moments takes longer than computing them."""

BLOCK = 96
"""Columns of a symmetric product that are computed at a time, at least; narrower blocks cost more than they save."""


def has_rows(node: Node, args: Sequence[Any]) -> bool:
    """Whether `input_rows` takes a layer's call: no ConvTranspose, and no row longer than MAX_COLUMNS."""
    if op_of(node) == "ConvTranspose":
        return False
    x, weight = args[:2]
    columns = weight[0].numel() if op_of(node) == "Conv" else x.shape[-1]
    return bool(columns <= MAX_COLUMNS)


def input_rows(node: Node, args: Sequence[Any]) -> Iterator[Tensor]:
    """The inputs of a layer's call, shape (groups, positions, columns), a part of the positions at a time.

    ``args`` are the values of the call's arguments. The product of an input and a row of the weight, in the order that
    the weight is stored in, is what one output channel has at one position, without the bias.
    """
    x = args[0]
    if op_of(node) != "Conv":
        yield x.reshape(1, -1, x.shape[-1])
        return
    weight, stride, rest = args[1], args[3], args[4:]  # rest: padding (one, or before and after), dilation, groups
    before, after, (dilation, groups) = rest[0], rest[-3], rest[-2:]
    if len(stride) == 1:  # one axis: an image of height 1
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, before, after, dilation = (1, *stride), (0, *before), (0, *after), (1, *dilation)
    x = functional.pad(x, (before[1], after[1], before[0], after[0]))
    height, width = weight.shape[2:]
    area = weight[0, 0].numel() * x[0].numel() // (stride[0] * stride[1])
    patches = max(PATCHES, weight[0].numel() ** 2 // 2)
    for images in torch.split(x, max(1, patches // max(area, 1))):
        windows = images.unfold(2, dilation[0] * (height - 1) + 1, stride[0])
        windows = windows.unfold(3, dilation[1] * (width - 1) + 1, stride[1])[..., :: dilation[0], :: dilation[1]]
        # positions last: the one copy of all patches then moves whole lines of the image
        yield windows.permute(1, 4, 5, 0, 2, 3).reshape(groups, weight[0].numel(), -1).mT


@final
class InputMoment:
    """``E[v u^T]`` of two kinds of inputs that come in pairs, of which one may be the other; sums are float64."""

    def __init__(self) -> None:
        self.count = 0
        self._products = self._left = self._right = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor, left: Tensor | None = None) -> None:
        """Take in inputs u, and the inputs v of the same positions (u itself): (groups, positions, columns)."""
        left = rows if left is None else left
        if not self.count:
            groups, _, columns = rows.shape
            self._products = torch.zeros(groups, columns, columns, dtype=torch.float64)
        self.count += rows.shape[1]
        if left is rows:
            self._add_squares(rows)
        else:
            self._products += left.mT @ rows
        total = rows.sum(1, dtype=torch.float64)
        self._right = self._right + total
        self._left = self._left + (total if left is rows else left.sum(1, dtype=torch.float64))

    def _add_squares(self, rows: Tensor) -> None:
        """Add ``u u^T``, block by block from the diagonal on, as it is symmetric."""
        columns = rows.shape[2]
        width = max(BLOCK, columns // 8)
        for start in range(0, columns, width):
            end = start + width
            block = rows[..., start:end].mT @ rows[..., start:]
            self._products[:, start:end, start:] += block
            self._products[:, end:, start:end] += block[..., width:].mT

    @property
    def moment(self) -> Tensor:
        """``E[v u^T]``, float64 (groups, columns, columns)."""
        return self._products / self.count

    @property
    def covariance(self) -> Tensor:
        """``E[v u^T] - E[v] E[u]^T``: what is left of the moment where a bias absorbs the means."""
        left, right = (self._left / self.count)[:, :, None], (self._right / self.count)[:, None, :]
        return torch.baddbmm(self._products, left, right, beta=1 / self.count, alpha=-1)
