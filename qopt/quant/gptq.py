"""Rounding that sees the layer's inputs: GPTQ (Frantar et al. 2023, algorithm 1) on any set of levels.

The error of codes is ``E ||(W - Wq) u||^2 = tr(dW H dW^T)``, H the second moment of the layer's inputs u (half the
paper's Hessian), or their covariance where a bias absorbs the mean. Columns are rounded one after the other, and those
not yet rounded make up for the error as well as they can: with ``H^-1 = U^T U`` (U upper triangular) an error e in
column j moves the later ones by ``-e U[j, j+1:] / U[j, j]``. Everything is float64.

Rows know nothing of each other, so that each has its own levels: those of its format. A row of several blocks has a
scale and a zero point for each of them, which the columns take with them wherever the order puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant.rows import AnyWeight, QuantizedRows, Weight, parts_of, with_parts

Order = Literal["activation", "stored"]

BLOCK = 128
"""Columns that are finished before the rest of the matrix hears of their errors (the paper's lazy batches)."""

ELEMENTS = 1 << 22
"""Weights rounded at a time: bounds the working memory to a few times 32 MB."""

MULTIPLES = (0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2)
"""Scales that are tried beside the given one, as parts of it."""

REFINEMENTS = 2
"""How often the best scale for the codes, in closed form, is tried as the next scale."""


def gptq(
    weight: Tensor,
    like: Weight,
    moment: Tensor,
    *,
    damping: float = 0.01,
    order: Order = "activation",
    scale_search: bool = True,
) -> Weight:
    """Codes of ``weight`` in the format of ``like`` that keep what the layer computes.

    Every output channel comes out no worse in ``dW H dW^T`` than in ``like``, whose codes stay where nothing is better
    (with one scale per tensor: the sum over channels comes out no worse). Weights that the levels represent exactly
    come out so, and channels of zeros stay as they are.

    Args:
        weight: the target, float, shape of ``like``; row by row what meets one vector of inputs.
        like: the same weight rounded in any way: format or formats, levels and the scales to start from.
        moment: H, (groups, columns, columns), symmetric positive semidefinite; groups split the output channels.
        damping: added to the diagonal of H, in parts of its mean; raised tenfold until the matrix can be inverted.
        order: ``activation`` rounds the columns of largest diagonal first, ``stored`` in the order of the weight.
        scale_search: also try `MULTIPLES` of the scale, and the best scale for the codes found; the lowest
            ``dW H dW^T`` decides. Without it the scale of ``like`` stays. All scales of a row grow by one factor, and
            zero points stay.

    Raises:
        UsageError: for shapes that do not fit together, a damping that is not positive, or a moment that is not finite.
    """
    _check(weight, like, moment, damping)
    problem = _Problem.of(weight, like, moment, damping, order)
    best = problem.given(like)
    best = problem.better(best, problem.rounded(best.scale))
    if scale_search:
        for codes in problem.rounded_under([best.scale * multiple for multiple in MULTIPLES]):
            best = problem.better(best, codes)
        for _ in range(REFINEMENTS):
            best = problem.better(best, problem.rescaled(best))
            best = problem.better(best, problem.rounded(best.scale))
    return problem.assemble(best, like)


def _check(weight: Tensor, like: AnyWeight, moment: Tensor, damping: float) -> None:
    groups, channels = moment.shape[0] if moment.ndim == 3 else 0, like.shape[like.axis]
    columns = like.shape.numel() // channels
    if weight.shape != like.shape:
        raise UsageError("codes of another weight", expected=str(tuple(weight.shape)), got=str(tuple(like.shape)))
    if not groups or channels % groups or tuple(moment.shape[1:]) != (columns, columns):
        raise UsageError(
            "a moment that does not fit the weight", expected=f"(groups, {columns}, {columns}) for {channels} channels",
            got=str(tuple(moment.shape)),
        )  # fmt: skip
    if not bool(torch.isfinite(moment).all()):
        raise UsageError("an input moment that is not finite", fix="check the model and its data")
    if not damping > 0:
        raise UsageError("the damping must be positive", got=str(damping))


@final
@dataclass(frozen=True, eq=False)
class _Codes:
    index: Tensor  # int16 (groups, rows, columns), into the levels of the row
    scale: Tensor  # float64 (groups, rows, blocks), float32 numbers; one block where the row has one scale
    error: Tensor  # float64 (groups, rows), dW H dW^T of what the file computes


@final
@dataclass(frozen=True, eq=False)
class _Problem:
    target: Tensor  # float64 (groups, rows, columns)
    hessian: Tensor  # float64 (groups, columns, columns)
    order: Tensor  # (groups, columns), the column rounded at each step
    factor: Tensor  # float64 (groups, columns, columns): U of the damped matrix in that order
    levels: Tensor  # float64 (groups, rows, n), ascending, as many infinite ones at the end as a row has fewer
    zero: Tensor  # float64 (groups, rows, blocks or 1), the level that stands for zero: 0 but for asymmetric formats
    shared: bool  # one scale for all rows

    @staticmethod
    def of(weight: Tensor, like: AnyWeight, moment: Tensor, damping: float, order: Order) -> _Problem:
        hessian = moment.to(torch.float64)
        target = as_rows(weight.to(torch.float64), like.axis, len(hessian))
        steps, factor = _inverse_factor(hessian, damping, order)
        found = [(part.levels()[0], members) for part, members in parts_of(like)]
        most = max(len(multiples) for multiples, _ in found)
        levels = torch.full((like.shape[like.axis], most), torch.inf, dtype=torch.float64)
        for multiples, members in found:
            levels[members, : len(multiples)] = multiples
        zero = torch.zeros(1) if isinstance(like, QuantizedRows) or like.zero is None else like.zero
        return _Problem(
            target, hessian, steps, factor, as_rows(levels, 0, len(hessian)), _by_row(zero, target.shape),
            like.spec.granularity == "tensor",
        )  # fmt: skip

    def given(self, like: AnyWeight) -> _Codes:
        """What ``like`` holds."""
        groups, rows, columns = self.target.shape
        index = torch.empty(groups * rows, columns, dtype=torch.int16)
        for part, members in parts_of(like):
            codes = part.levels()[1]
            position = torch.zeros(256, dtype=torch.int16)
            position[codes.long()] = torch.arange(len(codes), dtype=torch.int16)
            index[members] = position[as_rows(part.codes, part.axis, 1)[0].long()]
        return self._judged(index.reshape(self.target.shape), _by_row(like.scale, self.target.shape))

    def rounded(self, scale: Tensor) -> _Codes:
        """Codes by compensated rounding under scales (groups, rows, blocks)."""
        scale = _storable(scale)
        rows = max(1, ELEMENTS // (self.target.shape[0] * self.target.shape[2]))
        tensors = (self.target, scale, self.levels, self.zero)
        parts = zip(*(torch.split(tensor, rows, 1) for tensor in tensors), strict=True)
        return self._judged(torch.cat([self._compensated(*part) for part in parts], 1), scale)

    def rounded_under(self, scales: Sequence[Tensor]) -> list[_Codes]:
        """What `rounded` finds for each of several scales; small matrices side by side, to walk their columns once."""
        if self.target.numel() * len(scales) > ELEMENTS:
            return [self.rounded(scale) for scale in scales]
        stored = [_storable(scale) for scale in scales]
        target, levels, zero = (tensor.repeat(1, len(scales), 1) for tensor in (self.target, self.levels, self.zero))
        found = self._compensated(target, torch.cat(stored, 1), levels, zero)
        return [self._judged(index, scale) for index, scale in zip(found.chunk(len(scales), 1), stored, strict=True)]

    def rescaled(self, codes: _Codes) -> _Codes:
        """The same codes under their best scale, ``u H w / u H u`` for multiples u; unused where it would be zero.

        Where a row has several scales, u are its values, and what is found is the factor by which its scales grow.
        """
        unit = codes.scale if codes.scale.shape[2] > 1 else torch.ones_like(codes.scale)
        values = self._multiples(codes.index) * self._by_column(unit)
        seen = values @ self.hessian
        gain, norm = (seen * self.target).sum(2, keepdim=True), (seen * values).sum(2, keepdim=True)
        if self.shared:
            gain, norm = gain.sum().expand_as(gain), norm.sum().expand_as(norm)
        usable = (norm > 0) & (gain * unit * codes.scale > 0)
        return self._judged(codes.index, _storable(torch.where(usable, gain / norm * unit, codes.scale)))

    def better(self, one: _Codes, other: _Codes) -> _Codes:
        """Row by row the one of lower error, ``one`` where they are equal; one for all where the scale is shared."""
        wins = other.error < one.error
        if self.shared and not torch.equal(one.scale, other.scale):
            wins = (other.error.sum() < one.error.sum()).expand_as(wins)
        return _Codes(
            torch.where(wins[:, :, None], other.index, one.index),
            torch.where(wins[:, :, None], other.scale, one.scale),
            torch.where(wins, other.error, one.error),
        )

    def assemble(self, found: _Codes, like: Weight) -> Weight:
        """The codes in the orientation of ``like``."""
        index, scale = found.index.flatten(0, 1), found.scale.to(torch.float32).flatten(0, 1)
        parts = []
        for part, members in parts_of(like):
            codes = as_stored(part.levels()[1][index[members].long()], part.shape, part.axis)
            scales = scale[0] if self.shared else scale[members]
            parts.append(replace(part, codes=codes, scale=scales.reshape(part.scale.shape)))
        return with_parts(like, parts)

    def _judged(self, index: Tensor, scale: Tensor) -> _Codes:
        values = self._multiples(index).to(torch.float32) * self._by_column(scale).to(torch.float32)
        difference = self.target - values
        error = ((difference @ self.hessian) * difference).sum(2)
        return _Codes(index, scale, error)

    def _multiples(self, index: Tensor) -> Tensor:
        """What the scales are multiplied by, float64 (groups, rows, columns)."""
        return self.levels.gather(2, index.long()) - self._by_column(self.zero)

    def _by_column(self, values: Tensor) -> Tensor:
        """(groups, rows, blocks) as a factor or term of (groups, rows, columns)."""
        blocks = values.shape[2]
        return values if blocks == 1 else values.repeat_interleave(self.target.shape[2] // blocks, 2)

    def _of_steps(self, values: Tensor, first: int, last: int) -> Tensor:
        """(groups, rows, blocks) as (groups, steps, rows): that of the block whose column is rounded at each step."""
        block = self.order[:, first:last] // (self.target.shape[2] // values.shape[2])
        return values.gather(2, block[:, None].expand(-1, values.shape[1], -1)).mT.contiguous()

    def _compensated(self, target: Tensor, scale: Tensor, levels: Tensor, zero: Tensor) -> Tensor:
        """The indices of the levels that the algorithm takes, int16, for some rows."""
        work = target.gather(2, self.order[:, None].expand_as(target)).mT.contiguous()
        index = torch.empty(work.shape, dtype=torch.int16)
        middles = (levels[:, :, 1:] + levels[:, :, :-1]) / 2
        for start in range(0, work.shape[1], BLOCK):
            block = work[:, start : start + BLOCK]
            factor = self.factor[:, start : start + BLOCK, start:]
            scales, zeros = (self._of_steps(values, start, start + BLOCK) for values in (scale, zero))
            units = torch.where(scales == 0, 1.0, scales)
            errors = torch.empty_like(block)
            for j in range(block.shape[1]):
                nearest = torch.searchsorted(middles, (block[:, j] / units[:, j] + zeros[:, j])[:, :, None])
                value = (levels.gather(2, nearest)[:, :, 0] - zeros[:, j]) * scales[:, j]
                errors[:, j] = (block[:, j] - value) / factor[:, j, j, None]
                block[:, j + 1 :] -= factor[:, j, j + 1 : block.shape[1], None] * errors[:, None, j]
                index[:, start + j] = nearest[:, :, 0]
            work[:, start + BLOCK :].baddbmm_(factor[:, :, BLOCK:].mT, errors, alpha=-1)
        stored = torch.empty_like(index).scatter_(1, self.order[:, :, None].expand_as(index), index)
        return stored.mT


def as_rows(tensor: Tensor, axis: int, groups: int) -> Tensor:
    """A weight (of any type) as (groups, channels per group, columns); ``axis`` counts its channels."""
    moved = tensor.movedim(axis, 0)
    return moved.reshape(groups, moved.shape[0] // groups, -1)


def as_stored(rows: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """What `as_rows` was made from, of shape ``shape``."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis).contiguous()


def _by_row(values: Tensor, shape: torch.Size) -> Tensor:
    """What has the shape of a weight's scales as float64 (groups, rows, blocks), of a target of ``shape``."""
    groups, rows, _ = shape
    blocks = values.shape[1] if values.ndim == 2 else 1
    return values.to(torch.float64).reshape(-1, blocks).expand(groups * rows, blocks).reshape(groups, rows, blocks)


def _storable(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).to(torch.float64)


def _inverse_factor(hessian: Tensor, damping: float, order: Order) -> tuple[Tensor, Tensor]:
    """The order of the columns, and U with ``U^T U`` the inverse of the damped matrix in that order.

    Of the matrix turned end to end, ``L L^T``, it is ``L^-1`` turned back: one factorisation instead of two.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0  # inputs that are always zero are rounded to nearest: nothing says what else to do
    mean = torch.where(dead, 0.0, diagonal).sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp_min(1)
    steps = torch.arange(hessian.shape[1]).expand(len(hessian), -1)
    if order == "activation":
        steps = diagonal.argsort(dim=1, descending=True, stable=True)
    turned = steps.flip(1)
    matrix = torch.stack([block[chosen[:, None], chosen] for block, chosen in zip(hessian, turned, strict=True)])
    plain, dead = matrix.diagonal(dim1=1, dim2=2).clone(), dead.gather(1, turned)
    while True:
        matrix.diagonal(dim1=1, dim2=2).copy_(torch.where(dead, mean.clamp_min(1.0), plain + damping * mean))
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed.any()):
            break
        damping *= 10
    unit = matrix.zero_()
    unit.diagonal(dim1=1, dim2=2).fill_(1.0)
    return steps, torch.linalg.solve_triangular(lower, unit, upper=False).flip(1, 2)
