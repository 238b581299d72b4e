"""What attacks by queries share: whom they attack, and the margins they are told. No gradient is asked for."""

from __future__ import annotations

from torch import Tensor

from qopt.attacks.attack import Classifier
from qopt.attacks.gradient import check_indices, margin
from qopt.attacks.score import check_labels, predict

QUERIES = 512
"""Images per forward pass of an attack by queries where the caller does not say."""


def right_before(
    model: Classifier, images: Tensor, labels: Tensor, indices: Tensor | None, batch_size: int
) -> tuple[Tensor, list[int], Tensor]:
    """The labels as int64 (n,), the number of each image, and the rows (k,) that the model gets right.

    Raises:
        DataError: images, labels or indices do not fit.
        ModelError: the output is no finite matrix of logits.
    """
    logits = predict(model, images, batch_size)
    labels = check_labels(labels, len(images), logits.shape[1])
    numbers = check_indices(indices, len(images))
    return labels, numbers.tolist(), (logits.argmax(1) == labels).nonzero().flatten()


def margins(model: Classifier, queries: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """How far the best wrong class leads, float64 (k, q), for ``queries`` (k, q, ...) about images of ``labels`` (k,).

    Differences of log-probabilities are the same numbers: the normaliser of the softmax cancels.
    """
    logits = predict(model, queries.flatten(0, 1), batch_size).double()
    return margin(logits, labels.repeat_interleave(queries.shape[1])).reshape(queries.shape[:2])
