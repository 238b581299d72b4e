"""CW-L2 (Carlini & Wagner 2017): the smallest l2 distortion that fools, by Adam in a variable that knows no box."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from typing import Final, final

import torch
from torch import Tensor

from qopt.attacks.attack import AttackResult, Classifier
from qopt.attacks.gradient import aim, check_indices, check_options, check_positive
from qopt.attacks.losses import Misclassified
from qopt.attacks.score import BATCH_SIZE, predict
from qopt.errors import UsageError

SHRINK: Final = 1e-2
"""How far pixels start from the walls of the box, as a share of the way to the middle."""

FLATTEST: Final = 0.1
"""Steps in the variable are divided by the slope of pixels over it (1 in the middle of the box), at least by this: at
the walls the slope is 0, and with the paper's equal steps a black-and-white image would hardly move in hundreds."""

WINDOW: Final = 10
STALL: Final = 1e-3
"""A search step ends early where its best loss has not fallen by this share within a window of steps."""

LARGEST: Final = 1e10
"""Of the constant."""

HELD: Final = 4
"""Batches whose images are worked on together: as images leave, the rest still fills whole batches."""


@final
@dataclass(frozen=True)
class CW:
    """``min |x' - x|_2^2 + c * max(z_y - max_{j != y} z_j + kappa, 0)``, by Adam in w with ``x' = (tanh w + 1) / 2``.

    The constant c is searched for each image on its own: times 10 until it fools, then by halves between the largest
    that did not and the smallest that did. What differs from the paper: every search step starts with a fresh Adam
    but at the image where the one before it ended, it ends as soon as it stalls, and steps near the walls are longer.
    That takes fewer than half of the gradients for the same distortion. Images are not in step with each other: each
    goes on with its own search, and leaves after its last one.

    Attributes:
        steps: gradient steps of each search step, at most.
        search_steps: constants tried for each image.
        constant: the first of them, larger than 0.
        learning_rate: of Adam, larger than 0; in the middle of the box a step moves a pixel by half of it.
        kappa: the lead in logits that the wrong class (or the target) must have, 0 or larger.
        batch_size: images per forward pass.

    Raises:
        UsageError: an option is out of its range.
    """

    steps: int = 100
    search_steps: int = 5
    constant: float = 1.0
    learning_rate: float = 0.01
    kappa: float = 0.0
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        check_options("CW", "margin", steps=self.steps, search_steps=self.search_steps, batch_size=self.batch_size)
        check_positive("CW", constant=self.constant, learning_rate=self.learning_rate)
        if not (isfinite(self.kappa) and self.kappa >= 0):
            raise UsageError("kappa must be a finite number, 0 or larger", where="CW", got=repr(self.kappa))

    @staticmethod
    def low_bitwidth(kappa: float = 0.0) -> CW:
        """The parameters of Bernhard et al. 2019: longer steps and more constants, less precise and faster."""
        return CW(steps=100, search_steps=10, constant=0.9, learning_rate=0.1, kappa=kappa)

    @property
    def name(self) -> str:
        """For example ``CW-L2 5x100``, ``CW-L2 10x100 kappa 5``: constants, steps, and kappa where it is not 0."""
        return f"CW-L2 {self.search_steps}x{self.steps}" + (f" kappa {self.kappa:g}" if self.kappa else "")

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, ...), float32 in [0, 1]; there is no chance in it, so the seed changes nothing.

        With ``targets`` (n,), classes, the prediction is to become those. Images that are fooled from the start are
        returned as they are; so are those that nothing was found for.

        Raises:
            DataError: images, labels, targets or indices do not fit.
            ModelError: the output is no finite matrix of logits.
        """
        logits = predict(model, images, self.batch_size)
        goal = aim(labels, targets, logits)
        check_indices(indices, len(images))
        rows = (~goal.reached(logits)).nonzero().flatten()
        with torch.inference_mode(False):  # under a caller's inference mode there would be no gradients, silently
            best = images.detach().clone()
            for part in torch.split(rows, HELD * self.batch_size):
                state = _Search.begin(self, best, part.clone(), goal)
                while len(state.rows):
                    state.advance(self, model, best)
        return AttackResult(best, goal.reached(predict(model, best, self.batch_size)))


@final
@dataclass(eq=False)
class _Search:
    """Where each of m images stands; everything but ``goal`` has m rows.

    Attributes:
        rows: which images these are.
        clean: the images.
        variable: w, like them, with Adam's two averages in ``mean`` and ``square``.
        moves: steps taken since the constant was chosen; ``tried``: constants that are done with.
        constant: c, between ``low``, the largest that did not fool, and ``high``, the smallest that did.
        found: whether this c did.
        lowest: the lowest loss under this c, ``stalled`` steps ago.
        shortest: the smallest squared distance of an example so far.
    """

    rows: Tensor
    goal: Misclassified
    clean: Tensor
    variable: Tensor
    mean: Tensor
    square: Tensor
    moves: Tensor
    tried: Tensor
    constant: Tensor
    low: Tensor
    high: Tensor
    found: Tensor
    lowest: Tensor
    stalled: Tensor
    shortest: Tensor

    @staticmethod
    def begin(options: CW, images: Tensor, rows: Tensor, goal: Misclassified) -> _Search:
        clean = images[rows]
        counts = torch.zeros_like(rows)
        start = torch.atanh((2 * clean - 1) * (1 - SHRINK))
        zeros, without_end = clean.new_zeros(len(rows)), clean.new_full((len(rows),), torch.inf)
        return _Search(
            rows=rows, goal=goal.at(rows), clean=clean, variable=start, mean=torch.zeros_like(start),
            square=torch.zeros_like(start), moves=counts, tried=counts.clone(), constant=zeros + options.constant,
            low=zeros, high=without_end, found=counts.bool(), lowest=without_end.clone(), stalled=counts.clone(),
            shortest=without_end.clone(),
        )  # fmt: skip

    def advance(self, options: CW, model: Classifier, best: Tensor) -> None:
        """One step of every image; what fools with less distortion than before goes to ``best``."""
        heights = self.variable.tanh()
        images = (heights + 1) / 2
        rise, reached, gradient = self._look(options, model, images)
        moved = images - self.clean
        squares = moved.flatten(1).square().sum(1)
        self._remember(best, images, squares, reached & (rise >= options.kappa))
        self._watch(squares + self.constant * (options.kappa - rise).clamp_min(0))
        self._descend(options, gradient.add_(moved, alpha=2), 1 - heights.square())
        ended = ((self.moves >= options.steps) | (self.stalled >= WINDOW)).nonzero().flatten()
        if len(ended):
            self._choose_constants(ended)
            left = (self.tried < options.search_steps).nonzero().flatten()
            if len(left) < len(self.rows):
                self._keep(left)

    def _look(self, options: CW, model: Classifier, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The margin and whether the goal is reached, (m,), and the gradient of c times the hinge, like ``images``."""
        found = []
        for begin in range(0, len(images), options.batch_size):
            rows = slice(begin, begin + options.batch_size)
            tracked, goal = images[rows].detach().requires_grad_(), self.goal.at(rows)
            with torch.enable_grad():
                logits = model(tracked)
                rise = goal.rise(logits.double())
            pull = torch.where(rise.detach() < options.kappa, -self.constant[rows], 0.0).to(rise.dtype)
            gradient = _finite_gradient(rise, tracked, pull)
            found.append((rise.detach().to(images.dtype), goal.reached(logits.detach()), gradient))
        rises, reached, gradients = zip(*found, strict=True)
        return torch.cat(rises), torch.cat(reached), torch.cat(gradients)

    def _remember(self, best: Tensor, images: Tensor, squares: Tensor, fooled: Tensor) -> None:
        self.found |= fooled
        shorter = (fooled & (squares < self.shortest)).nonzero().flatten()
        best[self.rows[shorter]] = images[shorter]
        self.shortest[shorter] = squares[shorter]

    def _watch(self, loss: Tensor) -> None:
        falls = loss < self.lowest * (1 - STALL)
        self.stalled = torch.where(falls, 0, self.stalled + 1)
        self.lowest = torch.where(falls, loss, self.lowest)

    def _descend(self, options: CW, gradient: Tensor, slope: Tensor) -> None:
        """A step of Adam for each image, by the gradient over pixels; ``slope`` is 1 in the middle of the box."""
        gradient = gradient.mul_(slope).div_(2)
        self.moves = self.moves + 1
        moves = self.moves.to(slope.dtype)
        self.mean.mul_(0.9).add_(gradient, alpha=0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        rate = _columns(options.learning_rate / (1 - 0.9**moves), slope)
        spread = (self.square / _columns(1 - 0.999**moves, slope)).sqrt_().add_(1e-8)
        spread.mul_(slope.clamp_min(FLATTEST))
        self.variable -= rate * self.mean / spread

    def _choose_constants(self, rows: Tensor) -> None:
        """The next constants of some images, and a fresh start of all that belongs to a constant."""
        constant, found = self.constant[rows], self.found[rows]
        self.high[rows] = torch.where(found, constant, self.high[rows])
        self.low[rows] = torch.where(found, self.low[rows], constant)
        middle = (self.low[rows] + self.high[rows]) / 2
        self.constant[rows] = torch.where(self.high[rows].isinf(), 10 * constant, middle).clamp_max(LARGEST)
        self.tried[rows] += 1
        self.lowest[rows] = torch.inf
        for state in (self.moves, self.stalled, self.found, self.mean, self.square):
            state[rows] = 0

    def _keep(self, rows: Tensor) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            setattr(self, field.name, value.at(rows) if isinstance(value, Misclassified) else value[rows])


def _finite_gradient(rise: Tensor, tracked: Tensor, weights: Tensor) -> Tensor:
    """Gradient of ``rise * weights`` like ``tracked``, 0 where it is not finite or where none leads there."""
    if not (rise.requires_grad and weights.any()):
        return torch.zeros_like(tracked)
    (gradient,) = torch.autograd.grad(rise, tracked, weights, allow_unused=True)
    return torch.zeros_like(tracked) if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (n,) shaped to multiply ``like`` (n, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
