"""How far several networks agree about the same images (Bernhard et al. 2019): transfers, gradients, errors, votes.

All functions but `transfer_predictions` are pure functions of tensors. ``m`` is the number of networks, for instance
one in float and others with fewer and fewer bits; ``n`` is the number of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import Classifier
from qopt.attacks.score import BATCH_SIZE, predict
from qopt.errors import DataError, UsageError


def transfer_predictions(
    examples: Sequence[Tensor], targets: Sequence[Classifier], batch_size: int = BATCH_SIZE
) -> Tensor:
    """Classes, int64 (s, t, n), that ``t`` targets give to the examples (n, ...), float32 in [0, 1], of ``s`` sources.

    Raises:
        DataError: there are no examples or no targets, or the sources' examples differ in shape.
        ModelError: an output is no finite matrix of logits.
    """
    if not examples or not targets or len({made.shape for made in examples}) > 1:
        raise DataError(
            "transfers need examples of the same images from every source, and targets",
            got=f"examples of shapes {sorted({tuple(e.shape) for e in examples})} and {len(targets)} targets",
        )
    rows = [[predict(target, made, batch_size).argmax(1) for target in targets] for made in examples]
    return torch.stack([torch.stack(row) for row in rows])


def transfer_matrix(predicted: Tensor, labels: Tensor) -> Tensor:
    """Accuracies, float64 (s, t) in [0, 1], of targets (columns) on the examples of sources (rows).

    ``predicted`` (s, t, n) are classes as `transfer_predictions` returns; ``labels`` (n,).

    Raises:
        DataError: the shapes do not fit, or there are no images.
    """
    _check_classes(predicted, labels, 3)
    return (predicted == labels).double().mean(2)


def strongest_transfers(matrices: Tensor) -> Tensor:
    """Which of ``k`` attacks transfers best from each source, int64 (s,): it leaves others the lowest mean accuracy.

    ``matrices`` (k, s, s) are transfer matrices of the same networks as sources and targets, such as one for each
    confidence of Carlini and Wagner's attack.

    Raises:
        DataError: the matrices are not square, or there are fewer than two networks.
    """
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or matrices.shape[1] < 2 or not len(matrices):
        raise DataError("transfers between the same networks are needed", expected="shape (k, s, s), s of 2 or more",
                        got=f"shape {tuple(matrices.shape)}")  # fmt: skip
    others = matrices.sum(2) - matrices.diagonal(dim1=1, dim2=2)
    return others.argmin(0)


def gradient_cosines(gradients: Tensor) -> Tensor:
    """Mean over the images of the cosines between the input gradients of two networks, float64 (m, m) in [-1, 1].

    ``gradients`` (m, n, ...). A gradient that is zero or not finite points nowhere: it counts as a cosine of 0, also
    with itself, so that the diagonal is the share of usable gradients.

    Raises:
        DataError: there are no networks, images or pixels.
    """
    if gradients.ndim < 3 or not gradients.numel():
        raise DataError(
            "not gradients of images", expected="shape (m, n, ...), nothing of it 0", got=f"{tuple(gradients.shape)}"
        )
    flat = gradients.flatten(2).double()
    flat = torch.where(flat.isfinite().all(2, keepdim=True), flat, 0.0)
    # Divided by the largest entry first: squares of very small numbers are 0.
    largest = flat.abs().amax(2, keepdim=True)
    flat = torch.where(largest > 0, flat / largest, 0.0)
    flat = flat / flat.norm(dim=2, keepdim=True).clamp_min(1.0)
    rows = flat.flatten(1)
    cosines: Tensor = torch.mm(rows, rows.T) / flat.shape[1]
    return cosines


@final
@dataclass(frozen=True)
class Agreement:
    """Share of images, in [0, 1], on which all other networks fare like the source; None where there is no such image.

    Attributes:
        clean_right: others right, of the clean images that the source gets right.
        clean_wrong: others wrong, of the clean images that the source gets wrong.
        fooled: others wrong, of the examples of images it gets right that fool the source.
        not_fooled: others right, of the examples of images it gets right that do not fool the source.
    """

    clean_right: float | None
    clean_wrong: float | None
    fooled: float | None
    not_fooled: float | None


def agreement(clean: Tensor, attacked: Tensor, source: int) -> Agreement:
    """Table 5 of Bernhard et al. for one ``source``, a row of ``clean`` and ``attacked``.

    ``clean`` and ``attacked``, bool (m, n), say which network is right about which clean image, and about which
    example that was made on the source.

    Raises:
        DataError: there are fewer than two networks, or the shapes do not fit.
        UsageError: the source is none of the networks.
    """
    if (
        clean.shape != attacked.shape
        or clean.ndim != 2
        or len(clean) < 2
        or {clean.dtype, attacked.dtype} != {torch.bool}
    ):
        raise DataError(
            "agreement needs one boolean per network and image, clean and attacked", expected="bool (2 or more, n)",
            got=f"{clean.dtype} {tuple(clean.shape)} and {attacked.dtype} {tuple(attacked.shape)}",
        )  # fmt: skip
    if not 0 <= source < len(clean):
        raise UsageError("no such network", expected=f"0 to {len(clean) - 1}", got=repr(source))
    others = [row for row in range(len(clean)) if row != source]
    before, after = clean[source], attacked[source]
    return Agreement(
        clean_right=_share(clean[others].all(0), before),
        clean_wrong=_share(~clean[others].any(0), ~before),
        fooled=_share(~attacked[others].any(0), before & ~after),
        not_fooled=_share(attacked[others].all(0), before & after),
    )


@final
@dataclass(frozen=True)
class Shift:
    """How often quantization undoes the order of two values.

    Attributes:
        rate: undone pairs over pairs, in [0, 1]; 0 where there are none.
        pairs: pairs of values, of all images, whose order there was to undo.
        images: share of the images with at least one undone pair, in [0, 1].
    """

    rate: float
    pairs: int
    images: float


def weight_shift(clean: Tensor, adversarial: Tensor, quantized: Tensor) -> Shift:
    """Of the pairs of logits whose order the attack reversed, those that quantized weights put back in order.

    ``clean`` and ``adversarial`` (n, classes) are logits of the float network on the clean images and on adversarial
    ones; ``quantized`` are those of the network with quantized weights on the same adversarial images. A pair counts
    where ``f_i(x) > f_j(x)`` and ``f_i(x') < f_j(x')``, and is undone where ``q_i(x') > q_j(x')``.

    Raises:
        DataError: the shapes differ, or are not of logits.
    """
    if not clean.shape == adversarial.shape == quantized.shape or clean.ndim != 2 or not clean.numel():
        raise DataError(
            "the logits must be of the same images and classes", expected="three of shape (n, classes)",
            got=f"{tuple(clean.shape)}, {tuple(adversarial.shape)} and {tuple(quantized.shape)}",
        )  # fmt: skip
    counts = []
    for before, after, restored in zip(clean, adversarial, quantized, strict=True):
        turned = (before[:, None] > before) & (after[:, None] < after)
        counts.append((int((turned & (restored[:, None] > restored)).sum()), int(turned.sum())))
    return _shift(counts)


def activation_shift(floats: Tensor, quantized: Tensor) -> Shift:
    """Of the pairs of activations of one layer that differ, those that quantization makes equal, image by image.

    ``floats`` and ``quantized`` (n, ...) are one layer's activations on the same adversarial images, before and after
    quantization. Takes time ``n d log d`` for d activations; nothing of size d x d is held.

    Raises:
        DataError: the shapes differ, or there are no activations.
    """
    if floats.shape != quantized.shape or floats.ndim < 2 or not floats.numel():
        raise DataError(
            "activations must pair up", expected="two of shape (n, ...)",
            got=f"{tuple(floats.shape)} and {tuple(quantized.shape)}",
        )  # fmt: skip
    counts = []
    for before, after in zip(map(_codes, floats.flatten(1)), map(_codes, quantized.flatten(1)), strict=True):
        d = len(before)
        different = d * (d - 1) // 2 - _equal_pairs(before)
        counts.append((_equal_pairs(after) - _equal_pairs(before * d + after), different))
    return _shift(counts)


@final
@dataclass(frozen=True)
class Vote:
    """What an ensemble does that only answers where enough of its networks agree.

    Attributes:
        prediction_rate: share of the images that it answers (PR of Bernhard et al.), in [0, 1].
        accuracy: share of right answers among its answers; None where it never answers.
        defence_accuracy: share of the images that it does not answer wrongly (d_acc), in [0, 1].
    """

    prediction_rate: float
    accuracy: float | None
    defence_accuracy: float


def vote(predicted: Tensor, labels: Tensor, threshold: int) -> Vote:
    """The ensemble of all networks, answering where ``threshold`` or more give the same class.

    ``predicted`` (m, n) are classes, ``labels`` (n,) the true ones, of clean images or of adversarial ones.

    Raises:
        DataError: the shapes do not fit, or there are no images.
        UsageError: the threshold is no majority of the networks, so that two answers could both reach it.
    """
    _check_classes(predicted, labels, 2)
    members = len(predicted)
    if not members < 2 * threshold <= 2 * members:
        raise UsageError(
            "the threshold must be a majority of the networks", expected=f"{members // 2 + 1} to {members}",
            got=repr(threshold),
        )  # fmt: skip
    # A class that a majority gives is the median of all that are given.
    answer = predicted.median(0).values
    answered = (predicted == answer).sum(0) >= threshold
    right = answered & (answer == labels)
    wrong = answered & ~right
    n = len(labels)
    return Vote(int(answered.sum()) / n, _share(right, answered), 1 - int(wrong.sum()) / n)


def _share(flags: Tensor, among: Tensor) -> float | None:
    count = int(among.sum())
    return int((flags & among).sum()) / count if count else None


def _shift(counts: Sequence[tuple[int, int]]) -> Shift:
    """From every image's pairs that were undone, and that there were to undo."""
    undone, pairs = (sum(column) for column in zip(*counts, strict=True))
    return Shift(undone / max(pairs, 1), pairs, sum(count > 0 for count, _ in counts) / len(counts))


def _codes(values: Tensor) -> Tensor:
    """Numbers from 0, int64 (d,), the same where ``values`` (d,) are."""
    _, codes = torch.unique(values, return_inverse=True)
    return torch.as_tensor(codes)


def _equal_pairs(codes: Tensor) -> int:
    """Pairs of equal entries of ``codes`` (d,)."""
    _, counts = torch.unique(codes, return_counts=True)
    return int((counts * (counts - 1) // 2).sum())


def _check_classes(predicted: Tensor, labels: Tensor, axes: int) -> None:
    if predicted.ndim != axes or labels.shape != predicted.shape[-1:] or not predicted.numel():
        raise DataError(
            "the predictions do not fit the labels", expected=f"{axes} axes, the last one of {len(labels)} images",
            got=f"shape {tuple(predicted.shape)}",
        )  # fmt: skip
