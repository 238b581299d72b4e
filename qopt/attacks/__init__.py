"""Attacks on classifiers, scores under attack, and the verdict on whether the attacks worked."""

from __future__ import annotations

from qopt.attacks.attack import Attack, AttackResult, Classifier, MinimumAttack, keep_within
from qopt.attacks.fgsm import FGSM
from qopt.attacks.masking import (
    Finding,
    Verdict,
    dead_gradients,
    transfer_stronger,
    transferred_correct,
    unbounded_attack,
    unbounded_correct,
    verdict,
    zero_gradients,
)
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector, predict, probability_warning, worst_case

__all__ = [
    "FGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Classifier",
    "Finding",
    "MinimumAttack",
    "Verdict",
    "accuracy_vector",
    "dead_gradients",
    "keep_within",
    "predict",
    "probability_warning",
    "transfer_stronger",
    "transferred_correct",
    "unbounded_attack",
    "unbounded_correct",
    "verdict",
    "worst_case",
    "zero_gradients",
]
