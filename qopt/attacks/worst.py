"""The per-example worst of several attacks, with the images that show it."""

from __future__ import annotations

from collections.abc import Sequence

from qopt.attacks.attack import AttackResult
from qopt.errors import DataError


def worst_of(results: Sequence[AttackResult]) -> AttackResult:
    """Of each image, the first of ``results`` that fooled, or else the first; all on the same n images and one model.

    For example the results of one attack on a quantized twin under straight-through gradients and under BPDA, which
    find different examples: neither is always the stronger.

    Raises:
        DataError: no results, or results on different images.
    """
    if len({(result.adversarial.shape, result.fooled.shape) for result in results}) != 1:
        raise DataError(
            "the worst needs one or more results, all on the same images",
            got=f"{len(results)} results of shapes {sorted({tuple(r.adversarial.shape) for r in results})}",
        )
    adversarial, fooled = results[0].adversarial.clone(), results[0].fooled.clone()
    for result in results[1:]:
        rows = result.fooled & ~fooled
        adversarial[rows] = result.adversarial[rows]
        fooled |= rows
    return AttackResult(adversarial, fooled)
