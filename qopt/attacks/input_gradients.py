"""Gradients of what an attack raises, with respect to the pixels, and what to do where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.attacks.attack import Classifier
from qopt.attacks.losses import Goal, LossName, Misclassified


def input_gradient(model: Classifier, images: Tensor, labels: Tensor, loss: LossName) -> Tensor:
    """Gradient, like ``images`` (n, ...), of each image's loss with respect to its pixels, as autograd gives it."""
    with torch.inference_mode(False):
        return _fresh_gradient(model, images, Misclassified(labels.clone(), loss))


def unusable(gradient: Tensor) -> Tensor:
    """Bool (n,): whether an image's gradient, of (n, ...), is zero everywhere or not finite somewhere."""
    largest = gradient.flatten(1).abs().amax(1)  # which passes NaN on
    return (largest == 0) | ~largest.isfinite()


def reached_and_gradient(
    model: Classifier, images: Tensor, goal: Goal, batch_size: int, *, compact: bool
) -> tuple[Tensor, Tensor]:
    """Of ``images`` (n, ...): whether the goal is reached, bool (n,), and the gradient of what it raises, finite.

    Where the gradient is zero or not finite, it is that of the goal's fallback. With ``compact``, images that have
    reached the goal may be given zeros instead.
    """
    parts = zip(torch.split(images, batch_size), _slices(len(images), batch_size), strict=True)
    found = [_of_batch(model, batch, goal.at(rows), compact) for batch, rows in parts]
    if len(found) == 1:
        return found[0]
    return torch.cat([reached for reached, _ in found]), torch.cat([gradient for _, gradient in found])


def reached(model: Classifier, images: Tensor, goal: Goal, batch_size: int) -> Tensor:
    """Bool (n,): whether ``images`` (n, ...) reach the goal; logits that are not finite are left to the last score."""
    with torch.no_grad():
        parts = zip(torch.split(images, batch_size), _slices(len(images), batch_size), strict=True)
        return torch.cat([goal.at(rows).reached(model(batch)) for batch, rows in parts])


def _slices(n: int, batch_size: int) -> list[slice]:
    return [slice(start, start + batch_size) for start in range(0, n, batch_size)]


def _of_batch(model: Classifier, images: Tensor, goal: Goal, compact: bool) -> tuple[Tensor, Tensor]:
    tracked = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(tracked)
    done = goal.reached(logits.detach())
    left = (~done).nonzero().flatten()
    if compact and 3 * len(left) < 2 * len(images):
        # Back through all takes about twice a pass; there and back through the rest takes less.
        gradient = torch.zeros_like(images)
        if len(left):
            gradient[left] = _of_batch(model, images.index_select(0, left), goal.at(left), compact=False)[1]
        return done, gradient
    gradient = _gradient(logits, tracked, goal)
    dead = unusable(gradient)
    if dead.any():
        rows = dead.nonzero().flatten()
        gradient[rows] = _fresh_gradient(model, images[rows], goal.at(rows), fallback=True)
        gradient = torch.where(gradient.isfinite(), gradient, 0.0)
    return done, gradient


def _fresh_gradient(model: Classifier, images: Tensor, goal: Goal, fallback: bool = False) -> Tensor:
    tracked = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(tracked)
    return _gradient(logits, tracked, goal, fallback)


def _gradient(logits: Tensor, tracked: Tensor, goal: Goal, fallback: bool = False) -> Tensor:
    """Zero where no gradient leads from the logits to the images at all: a finding for the masking rules, no error."""
    if not logits.requires_grad:
        return torch.zeros_like(tracked)
    with torch.enable_grad():
        total = (goal.fallback if fallback else goal.rise)(logits.double()).sum()
    (gradient,) = torch.autograd.grad(total, tracked, allow_unused=True)
    return torch.zeros_like(tracked) if gradient is None else gradient
