"""Attacks on classifiers, scores under attack, and the verdict on whether the attacks worked."""

from __future__ import annotations

from qopt.attacks.agreement import (
    Agreement,
    Shift,
    Vote,
    activation_shift,
    agreement,
    gradient_cosines,
    strongest_transfers,
    transfer_matrix,
    transfer_predictions,
    vote,
    weight_shift,
)
from qopt.attacks.apgd import APGD
from qopt.attacks.attack import Attack, AttackResult, Classifier, MinimumAttack, keep_within
from qopt.attacks.autoattack import AutoAttack, Within, standard
from qopt.attacks.bim import BIM
from qopt.attacks.checklist import Budget, Known, checklist
from qopt.attacks.cw import CW
from qopt.attacks.distortion import Distortion, distances, distortion
from qopt.attacks.diva import DIVA, evasive_rate
from qopt.attacks.fab import FAB
from qopt.attacks.fgsm import FGSM
from qopt.attacks.gradient import input_gradient
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
from qopt.attacks.masking_rules import queries_nearer
from qopt.attacks.mim import MIM
from qopt.attacks.noise import GaussianNoise, UniformNoise
from qopt.attacks.pgd import PGD
from qopt.attacks.pyautoattack_backend import ReferencePart, reference_parts
from qopt.attacks.rfgsm import RFGSM
from qopt.attacks.score import accuracy_vector, predict, probability_warning, worst_case
from qopt.attacks.spsa import SPSA
from qopt.attacks.square import Square
from qopt.attacks.uncertified import Uncertified
from qopt.attacks.worst import worst_of
from qopt.attacks.zoo import ZOO

__all__ = [
    "APGD",
    "BIM",
    "CW",
    "DIVA",
    "FAB",
    "FGSM",
    "MIM",
    "PGD",
    "RFGSM",
    "SPSA",
    "ZOO",
    "Agreement",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Budget",
    "Classifier",
    "Distortion",
    "Finding",
    "GaussianNoise",
    "Known",
    "MinimumAttack",
    "ReferencePart",
    "Shift",
    "Square",
    "Uncertified", "UniformNoise",
    "Verdict",
    "Vote",
    "Within",
    "accuracy_vector",
    "activation_shift",
    "agreement",
    "checklist",
    "dead_gradients",
    "distances",
    "distortion",
    "evasive_rate",
    "gradient_cosines",
    "input_gradient",
    "keep_within",
    "predict",
    "probability_warning",
    "queries_nearer",
    "reference_parts",
    "standard",
    "strongest_transfers",
    "transfer_matrix",
    "transfer_predictions",
    "transfer_stronger",
    "transferred_correct",
    "unbounded_attack",
    "unbounded_correct",
    "verdict",
    "vote",
    "weight_shift",
    "worst_case",
    "worst_of",
    "zero_gradients",
]  # fmt: skip
