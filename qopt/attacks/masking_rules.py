"""Ten rules on whether gradients are masked (Athalye et al. 2018, Carlini et al. 2019, Bernhard et al. 2019).

Every rule is a pure function of what was measured, mostly of vectors, bool (n,), that say which images are classified
right. Where two accuracies are compared, two standard errors of the binomial are put down to chance, and at least one
image; counts are compared in whole images, so that a difference of exactly the tolerance is never one of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import final

import torch
from torch import Tensor

from qopt.errors import DataError

DEAD_SHARE = 0.01
"""Share of images without a usable gradient that is still put down to chance: trained networks have none or few."""

ROUNDING = 1e-9
"""Images: keeps a difference of exactly the tolerance from hanging on rounding."""


@final
@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: its name.
        triggered: whether it says that gradients are masked, or, of a warning, that attacks have not converged.
        numbers: what it compared; shares in [0, 1], except for ``images``, the number of images, ``eps`` in the norm of
            the threat model, and ``l2``, mean distortions.
        tolerance: how far beyond the expected share it still puts down to chance, a share in [0, 1].
        text: one sentence with the numbers.
        warning: it never makes a verdict: what it says of the attacks is no sign of masked gradients.
    """

    rule: str
    triggered: bool
    numbers: Mapping[str, float]
    tolerance: float
    text: str
    warning: bool = False


def zero_gradients(dead: Tensor) -> Finding:
    """Rule 1: more than 1 % of the images have no usable gradient; ``dead`` bool (n,) as `dead_gradients` returns."""
    n, share = _count(dead), _share(dead)
    text = f"{share:.1%} of {n} images have an input gradient that is zero or not finite (at most {DEAD_SHARE:.0%})"
    return Finding("zero_gradients", share > DEAD_SHARE, {"share": share, "images": n}, DEAD_SHARE, text)


def queries_stronger(white: Tensor, queried: Tensor) -> Finding:
    """Rule 2: attacks that only ask for outputs fool the model more often than those that use its gradients.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    return _stronger("queries_stronger", ("white_box", white), ("queried", queried), "by queries", "by gradients")


def transfer_stronger(white: Tensor, transferred: Tensor) -> Finding:
    """Rule 3: examples made on another model fool this one more often than those made on itself.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    pair = ("white_box", white), ("transferred", transferred)
    return _stronger("transfer_stronger", *pair, "under transferred examples", "under white-box ones")


def unbounded_attack(correct: Tensor) -> Finding:
    """Rule 4: an attacker who may paint any image whatever leaves accuracy, by more than one image.

    ``correct`` bool (n,) as `unbounded_correct` returns.
    """
    n, share = _count(correct), _share(correct)
    tolerance = 1 / n
    text = f"unbounded PGD (linf 1) leaves {share:.1%} of {n} images classified right (at most {tolerance:.1%})"
    return Finding("unbounded_attack", int(correct.sum()) > 1, {"accuracy": share, "images": n}, tolerance, text)


def accuracy_rises(by_eps: Mapping[float, Tensor]) -> Finding:
    """Rule 5: the same attack leaves more accuracy in a larger ball; ``by_eps`` holds its vector for two eps or more.

    Raises:
        DataError: there are fewer than two eps, or the vectors are about different images, or about none.
    """
    if len(by_eps) < 2:
        raise DataError("whether accuracy rises with eps needs two of them", got=f"{len(by_eps)}")
    sizes = sorted(by_eps)
    pairs = [(small, large) for k, small in enumerate(sizes) for large in sizes[k + 1 :]]
    small, large = max(pairs, key=lambda pair: _excess(by_eps[pair[1]], by_eps[pair[0]]))
    n, low, high = _count(by_eps[small]), _share(by_eps[small]), _share(by_eps[large])
    tolerance = _tolerance(by_eps[small])
    numbers = {"eps": small, "larger_eps": large, "accuracy": low, "accuracy_at_larger_eps": high, "images": n}
    text = (
        f"accuracy {low:.1%} at eps {small:g}, {high:.1%} at eps {large:g}, on {n} images (at most {tolerance:.1%} "
        f"higher; the worst pair of {len(sizes)} eps)"
    )
    return Finding("accuracy_rises", _excess(by_eps[large], by_eps[small]) > ROUNDING, numbers, tolerance, text)


def iterative_weaker(one_step: Tensor, iterative: Tensor) -> Finding:
    """Rule 6: many small steps fool the model less often than one large one.

    Equal ones are no sign: on a robust network in a small ball one step does almost all there is to do, and at clean
    accuracy or at zero they cannot differ.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    pair = ("iterative", iterative), ("one_step", one_step)
    return _stronger("iterative_weaker", *pair, "under one step", "under many")


def not_converged(fewer: Tensor, more: Tensor) -> Finding:
    """Rule 7, a warning: more steps or restarts still fool more images, so that accuracy under attack is overstated.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    pair = ("fewer_steps", fewer), ("more_steps", more)
    return _stronger("not_converged", *pair, "under more steps", "under fewer", warning=True)


def noise_as_strong(clean: Tensor, noise: Tensor, one_step: Tensor) -> Finding:
    """Rule 8: random noise fools the model as often as one step along the gradient in the same ball.

    Only where noise costs more than the tolerance, and leaves at least half of the clean accuracy: noise that does
    nothing says nothing about gradients, and nor does one that destroys the images.

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    n = _count(clean, noise, one_step)
    tolerance = _tolerance(clean)
    effect, room = _excess(clean, noise, tolerance) > ROUNDING, 2 * int(noise.sum()) >= int(clean.sum())
    triggered = effect and room and int(one_step.sum()) >= int(noise.sum())
    numbers = {"clean": _share(clean), "noise": _share(noise), "one_step": _share(one_step), "images": n}
    text = (
        f"accuracy under noise {_share(noise):.1%}, under one step of the gradient {_share(one_step):.1%}, clean "
        f"{_share(clean):.1%}, on {n} images (noise that costs more than {tolerance:.1%} must not be as strong)"
    )
    return Finding("noise_as_strong", triggered, numbers, tolerance, text)


def losses_disagree(cross_entropy: Tensor, margin: Tensor) -> Finding:
    """Rule 9: the same attack finds far less through one loss than through the other (a saturated loss, for one).

    Raises:
        DataError: the vectors are about different images, or about none.
    """
    weak, strong = ("cross_entropy", cross_entropy), ("margin", margin)
    if int(margin.sum()) > int(cross_entropy.sum()):
        weak, strong = strong, weak
    texts = [f"through the loss {name.replace('_', '-')}" for name, _ in (strong, weak)]
    return _stronger("losses_disagree", weak, strong, *texts)


def queries_nearer(white: Tensor, queried: Tensor, white_l2: Tensor, queried_l2: Tensor) -> Finding:
    """Rule 10: ZOO leaves more accuracy than CW-L2, and yet its examples are nearer (Bernhard et al. 2019).

    ``white`` and ``queried``, bool (n,), say which images are right after CW-L2 and after ZOO without any bound;
    ``white_l2`` and ``queried_l2`` (n,) are the distortions of their examples, 0 where the image was wrong before.
    Distortions are compared over the images that both fooled, and must differ by two standard errors: over its own
    successes, an attack that succeeds on the easy images only would always look nearer.

    Raises:
        DataError: the vectors are about different images, or about none, or a distortion is negative or not finite.
    """
    n = _count(white, queried)
    own, other = (_distortions(values, n) for values in (white_l2, queried_l2))
    fooled_white, fooled_queried = ~white & (own > 0), ~queried & (other > 0)
    both = fooled_white & fooled_queried
    gap = (own - other)[both]
    error = float(gap.std() / sqrt(len(gap))) if len(gap) > 1 else 0.0
    nearer = len(gap) > 1 and float(gap.mean()) > 2 * error
    numbers = {
        "white_box": _share(white), "queried": _share(queried), "images": n,
        "l2": _mean(own[both]), "l2_queried": _mean(other[both]), "l2_images": int(both.sum()),
        "l2_own_successes": _mean(own[fooled_white]), "l2_queried_own_successes": _mean(other[fooled_queried]),
    }  # fmt: skip
    tolerance = _tolerance(white)
    text = (
        f"ZOO leaves {_share(queried):.1%}, CW-L2 {_share(white):.1%} of {n} images (at most {tolerance:.1%} more); on "
        f"the {int(both.sum())} that both fool, mean l2 {numbers['l2_queried']:.3g} and {numbers['l2']:.3g}"
    )
    return Finding("queries_nearer", nearer and _excess(queried, white) > ROUNDING, numbers, tolerance, text)


def _stronger(
    rule: str,
    expected: tuple[str, Tensor],
    other: tuple[str, Tensor],
    under_other: str,
    under_expected: str,
    *,
    warning: bool = False,
) -> Finding:
    """Triggered where the ``other`` named vector is lower than the ``expected`` one by more than chance."""
    n = _count(expected[1], other[1])
    high, low, tolerance = _share(expected[1]), _share(other[1]), _tolerance(expected[1])
    triggered = _excess(expected[1], other[1], tolerance) > ROUNDING
    text = (
        f"accuracy {under_other} {low:.1%}, {under_expected} {high:.1%}, on {n} images (at most {tolerance:.1%} lower)"
    )
    return Finding(rule, triggered, {expected[0]: high, other[0]: low, "images": n}, tolerance, text, warning)


def _excess(high: Tensor, low: Tensor, tolerance: float | None = None) -> float:
    """Images by which ``high`` is above ``low`` and the tolerance, by default that of ``low``."""
    n = _count(high, low)
    return int(high.sum()) - int(low.sum()) - n * (_tolerance(low) if tolerance is None else tolerance)


def _tolerance(vector: Tensor) -> float:
    """Two standard errors of an accuracy, and at least one image: a share in [0, 1]."""
    n, share = _count(vector), _share(vector)
    return max(2 * sqrt(share * (1 - share) / n), 1 / n)


def _count(*vectors: Tensor) -> int:
    for vector in vectors:
        if vector.dtype != torch.bool or vector.ndim != 1 or not len(vector):
            raise DataError(
                "a masking rule needs one boolean per image", got=f"{vector.dtype} of shape {tuple(vector.shape)}"
            )
        if len(vector) != len(vectors[0]):
            raise DataError(
                "all vectors must be about the same images", expected=f"{len(vectors[0])} entries", got=f"{len(vector)}"
            )
    return len(vectors[0])


def _distortions(values: Tensor, n: int) -> Tensor:
    if values.shape != (n,) or not all(isfinite(value) and value >= 0 for value in values.tolist()):
        raise DataError(
            "not distortions of the images", expected=f"{n} finite numbers, 0 or larger",
            got=f"{values.dtype} of shape {tuple(values.shape)}",
        )  # fmt: skip
    return values.double()


def _share(vector: Tensor) -> float:
    return int(vector.sum()) / len(vector)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
