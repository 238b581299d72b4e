"""Predictions on batches of images, and the checks that come before any number is believed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qopt.attacks.attack import Classifier
from qopt.errors import DataError, ModelError

BATCH_SIZE = 64
"""Images per forward pass where the caller does not say."""


def predict(model: Classifier, images: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Logits (n, classes) of ``images`` (n, ...), float32 in [0, 1], without gradients.

    Raises:
        DataError: the images are not what a Classifier takes.
        ModelError: the output is not a finite matrix of one row per image and at least two classes.
    """
    check_images(images)
    rows = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            rows.append(check_logits(model(batch), len(batch), start))
    if len({row.shape[1] for row in rows}) > 1:
        raise ModelError("the number of classes changes from batch to batch", where="the model's output")
    return torch.cat(rows)


def accuracy_vector(model: Classifier, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """Bool (n,): whether each image's largest logit is its label's.

    Raises:
        DataError: the images or the labels do not fit the model.
        ModelError: as `predict`.
    """
    logits = predict(model, images, batch_size)
    return logits.argmax(1) == check_labels(labels, len(images), logits.shape[1])


def worst_case(vectors: Sequence[Tensor]) -> Tensor:
    """Bool (n,): whether each image is classified right under *every* attack; ``vectors`` hold one bool (n,) each.

    Raises:
        DataError: no vectors, or vectors about different numbers of images.
    """
    shapes = {tuple(vector.shape) for vector in vectors}
    if len(shapes) != 1 or any(vector.dtype != torch.bool for vector in vectors):
        raise DataError(
            "the worst case needs one vector of booleans per attack, all about the same images",
            got=f"{len(vectors)} vectors of shapes {sorted(shapes)}",
        )
    return torch.stack(list(vectors)).all(0)


def probability_warning(logits: Tensor) -> str | None:
    """A warning where ``logits`` (n, classes) look like probabilities, else None.

    Gradients through a softmax vanish where the model is confident, which makes attacks weak and the model look robust.
    """
    if (logits < 0).any() or (logits.sum(1) - 1).abs().max() > 1e-3:
        return None
    return (
        "softmax-output: the model returns probabilities (rows are non-negative and sum to 1), not logits; "
        "attacks on it are weaker than they should be; remove its last softmax"
    )


def check_images(images: Tensor) -> None:
    """Raise DataError unless ``images`` is float32 (n, ...) with n >= 1 and all values in [0, 1]."""
    if images.ndim < 2 or images.dtype != torch.float32 or not images.numel():
        raise DataError(
            "not a batch of images", expected="float32 of shape (n, channels, height, width)",
            got=f"{images.dtype} of shape {tuple(images.shape)}",
        )  # fmt: skip
    pixels = images.flatten(1)
    inside = (pixels.amin(1) >= 0) & (pixels.amax(1) <= 1)  # both pass NaN on, which is inside of nothing
    if not inside.all():
        first = int((~inside).nonzero()[0])
        raise DataError(
            "pixel values outside the box", where=f"image {first}", expected="values in [0, 1]",
            got=f"{images[first].min().item():g} to {images[first].max().item():g}",
            fix="scale the images, and put mean and standard deviation into the model (--mean, --std)",
        )  # fmt: skip


def check_labels(labels: Tensor, n: int, classes: int) -> Tensor:
    """``labels`` as int64 (n,); raises DataError unless they are n whole numbers in 0..classes-1."""
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex() or labels.shape != (n,):
        raise DataError(
            "the labels do not fit the images", expected=f"{n} whole numbers",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
        )  # fmt: skip
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise DataError(
            "label out of range", where=f"image {first}", expected=f"0 to {classes - 1}, the model's classes",
            got=str(int(labels[first])),
        )  # fmt: skip
    return labels.long()


def check_logits(logits: Tensor, n: int, start: int) -> Tensor:
    """``logits`` of the images ``start``..``start + n - 1``; raises ModelError unless finite, (n, at least 2)."""
    if logits.ndim != 2 or logits.shape[0] != n or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ModelError(
            "not a classifier's output", where="the model's output", expected=f"logits of shape ({n}, 2 or more)",
            got=f"{logits.dtype} of shape {tuple(logits.shape)}",
        )  # fmt: skip
    finite = logits.isfinite().all(1)
    if not finite.all():
        raise ModelError(
            "the model returned a logit that is not finite", where=f"image {start + int((~finite).nonzero()[0])}",
            fix="look for overflow, a division by zero, or non-finite weights",
        )  # fmt: skip
    return logits
