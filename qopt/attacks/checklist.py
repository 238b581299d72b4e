"""All masking rules on one network: what is not known yet is measured, within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import final

import torch
from torch import Tensor

from qopt.attacks.attack import Attack, AttackResult, Classifier, MinimumAttack
from qopt.attacks.ball import random_start
from qopt.attacks.distortion import distances
from qopt.attacks.fgsm import FGSM
from qopt.attacks.gradient import check_options
from qopt.attacks.masking import dead_gradients, unbounded_correct
from qopt.attacks.masking_rules import (
    Finding,
    accuracy_rises,
    iterative_weaker,
    losses_disagree,
    noise_as_strong,
    not_converged,
    queries_nearer,
    queries_stronger,
    transfer_stronger,
    unbounded_attack,
    zero_gradients,
)
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector, check_labels, predict, worst_case
from qopt.attacks.spsa import SPSA
from qopt.errors import DataError, UsageError
from qopt.threat import ThreatModel


@final
@dataclass(frozen=True)
class Budget:
    """What the checks may cost.

    Attributes:
        images: the first ones, to which all rules but that on zero gradients keep.
        queried_images: the first ones, attacked by queries.
        one_step: the attack of one step.
        iterative: the attack by steps, repeated with other eps.
        other_loss: the same through another loss.
        longer: the same with more steps or restarts.
        queries: the attack by queries.
        nearest: Carlini and Wagner's attack and ZOO; None leaves their rule out, which is by far the dearest.
        nearest_images: the first ones, attacked by these two.
        eps_factors: times the declared eps: the balls of the rule on growing eps.

    Raises:
        UsageError: a number of images is below 1, or the factors do not make two balls.
    """

    images: int = 200
    queried_images: int = 50
    one_step: Attack = field(default_factory=FGSM)
    iterative: Attack = field(default_factory=PGD)
    other_loss: Attack = field(default_factory=lambda: PGD(loss="margin"))
    longer: Attack = field(default_factory=lambda: PGD(steps=100))
    queries: Attack = field(default_factory=lambda: SPSA(steps=20))
    nearest: tuple[MinimumAttack, MinimumAttack] | None = None
    nearest_images: int = 20
    eps_factors: tuple[float, ...] = (0.5, 1, 2, 4)

    def __post_init__(self) -> None:
        counts = {"images": self.images, "queried_images": self.queried_images, "nearest_images": self.nearest_images}
        check_options("the masking checks", "margin", **counts)
        if len(set(self.eps_factors)) < 2 or not all(isfinite(factor) and factor > 0 for factor in self.eps_factors):
            raise UsageError(
                "eps_factors must be two or more different positive numbers", where="the masking checks",
                got=str(self.eps_factors),
            )  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class Known:
    """Results on the same images under the same threat model that need not be measured again.

    An attack of the budget that is named here is taken from here.

    Attributes:
        white: bool (n,), which images are right under each white-box attack, by its name.
        queried: the same under attacks by queries.
        transferred: the same under examples made on another model; None leaves the rule on transfers out.
        nearest: results of minimum-distortion attacks, by name.
    """

    white: Mapping[str, Tensor] = field(default_factory=dict)
    queried: Mapping[str, Tensor] = field(default_factory=dict)
    transferred: Tensor | None = None
    nearest: Mapping[str, AttackResult] = field(default_factory=dict)

    def check(self, n: int) -> None:
        """Raise DataError unless everything here is about ``n`` images."""
        named = {**self.white, **self.queried, **{name: result.fooled for name, result in self.nearest.items()}}
        if self.transferred is not None:
            named["transferred"] = self.transferred
        for name, vector in named.items():
            if vector.shape != (n,):
                raise DataError(
                    "known results must be about the same images", where=name, expected=f"{n} entries",
                    got=f"shape {tuple(vector.shape)}",
                )  # fmt: skip


def checklist(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    artefact: Classifier | None = None,
    known: Known = Known(),
    budget: Budget = Budget(),
) -> list[Finding]:
    """What every rule finds on ``model`` for ``images`` (n, ...), float32 in [0, 1], with ``labels`` (n,).

    ``artefact`` is the same network where it is only asked for outputs, for instance its emitted file; by default the
    model itself. The attacks by gradients count by what they reach on ``model``.

    Raises:
        DataError: eps is 0, which leaves nothing to judge; or images, labels or known results do not fit.
        ModelError: an output is no finite matrix of logits.
    """
    if threat.eps <= 0:
        raise DataError("masking cannot be judged without an attack", expected="eps larger than 0", got=str(threat))
    labels = check_labels(labels, len(images), predict(model, images[:1]).shape[1])
    known.check(len(images))
    return list(_Checks(model, artefact or model, images, labels, threat, seed, known, budget).findings())


@final
@dataclass(frozen=True, eq=False)
class _Checks:
    """One run of the checks; ``n`` in its methods is the number of first images that they look at."""

    model: Classifier
    artefact: Classifier
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    seed: int
    known: Known
    budget: Budget

    def findings(self) -> Iterator[Finding]:
        budget, n = self.budget, min(self.budget.images, len(self.images))
        one_step, iterative, other_loss, longer = (
            self.white(attack, n) for attack in (budget.one_step, budget.iterative, budget.other_loss, budget.longer)
        )
        white = worst_case([one_step, iterative, other_loss, longer, *(v[:n] for v in self.known.white.values())])
        yield zero_gradients(dead_gradients(self.model, self.images, self.labels))
        queried = self.queried(min(budget.queried_images, n))
        yield queries_stronger(white[: len(queried)], queried)
        if self.known.transferred is not None:
            yield transfer_stronger(white, self.known.transferred[:n])
        yield unbounded_attack(unbounded_correct(self.model, *self.first(n), seed=self.seed))
        yield accuracy_rises(self.by_eps(iterative, n))
        yield iterative_weaker(one_step, iterative)
        yield not_converged(iterative, longer)
        yield noise_as_strong(accuracy_vector(self.model, *self.first(n)), self.noise(n), one_step)
        yield losses_disagree(iterative, other_loss)
        if budget.nearest is not None:
            yield self.nearer(*budget.nearest, min(budget.nearest_images, n))

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        return self.images[:n], self.labels[:n]

    def white(self, attack: Attack, n: int) -> Tensor:
        if attack.name in self.known.white:
            return self.known.white[attack.name][:n]
        return attack(self.model, *self.first(n), self.threat, seed=self.seed).correct

    def queried(self, n: int) -> Tensor:
        """Under the worst of the budget's attack by queries and all known ones."""
        vectors = [vector[:n] for vector in self.known.queried.values()]
        if self.budget.queries.name not in self.known.queried:
            vectors.append(self.budget.queries(self.artefact, *self.first(n), self.threat, seed=self.seed).correct)
        return worst_case(vectors)

    def by_eps(self, declared: Tensor, n: int) -> dict[float, Tensor]:
        """Vectors of the iterative attack by eps; ``declared`` is that of the declared one."""
        balls = {factor: replace(self.threat, eps=factor * self.threat.eps) for factor in self.budget.eps_factors}
        return {
            ball.eps: declared
            if factor == 1
            else self.budget.iterative(self.model, *self.first(n), ball, seed=self.seed).correct
            for factor, ball in balls.items()
        }

    def noise(self, n: int) -> Tensor:
        images, labels = self.first(n)
        noisy = random_start(images, self.threat, seed=self.seed, indices=torch.arange(n), restart=0)
        return accuracy_vector(self.model, noisy, labels)

    def nearer(self, white: MinimumAttack, queries: MinimumAttack, n: int) -> Finding:
        correct, l2 = [], []
        for attack, model in ((white, self.model), (queries, self.artefact)):
            found = self.known.nearest.get(attack.name) or attack(model, *self.first(n), seed=self.seed)
            correct.append(found.correct[:n])
            l2.append(distances(found.adversarial[:n], self.images[:n], "l2"))
        return queries_nearer(*correct, *l2)
