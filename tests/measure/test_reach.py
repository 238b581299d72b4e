"""Any attack through a twin that differs from its file: planted boundaries at different places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.attacks import APGD, BIM, CW, FAB, FGSM, MIM, PGD, RFGSM, Attack, Classifier, Within, accuracy_vector
from qopt.measure.presets import Unbounded
from qopt.measure.robustness import Setting, reach, white_box
from qopt.threat import ThreatModel

EPS = 0.2
LINF = ThreatModel("linf", EPS)
STEPS: list[Attack] = [FGSM(), RFGSM(), BIM(), MIM(), PGD(), PGD(compact=False), PGD(loss="margin", restarts=2)]
OTHERS: list[Attack] = [APGD(steps=20), APGD("dlr", steps=20, targets=1), Within(FAB("linf", EPS, steps=20))]
NEAREST: list[Attack] = [Unbounded(CW(steps=60)), Unbounded(FAB("linf", steps=30))]


def boundary(at: float, gain: float = 10.0) -> Classifier:
    """A classifier of one pixel: class 1 above ``at``."""

    def classify(images: torch.Tensor) -> torch.Tensor:
        score = gain * (images.flatten(1).mean(1) - at)
        return torch.stack([-score, score], 1)

    return classify


def setting(*values: float, label: int = 1) -> Setting:
    images = torch.tensor(values).view(-1, 1, 1, 1)
    return Setting(images, torch.full((len(values),), label), LINF, seed=3)


def name(attack: Attack) -> str:
    return attack.name


CERTAIN = [attack for attack in [*STEPS, *OTHERS] if not isinstance(attack, RFGSM)]
"""The random half of R+FGSM may lead away as far as the other leads back."""


@pytest.mark.parametrize("attack", CERTAIN, ids=name)
def test_what_the_ball_holds_is_found(attack: Attack) -> None:
    """0.48 is wrong in the twin alone; 0.6 falls in the file only where the attack goes on; 0.7 withstands."""
    case = setting(0.48, 0.6, 0.7, 0.9)
    found = reach(attack, boundary(0.5), boundary(0.45), case)
    assert found.correct.tolist() == [False, False, True, True]
    assert float((found.adversarial - case.images).abs().max()) <= EPS + 1e-6


@pytest.mark.parametrize("attack", [*STEPS, *OTHERS], ids=name)
class TestBounded:
    def test_examples_are_what_is_said_of_them(self, attack: Attack) -> None:
        case, file = setting(0.48, 0.6, 0.7, 0.9), boundary(0.45)
        found = reach(attack, boundary(0.5), file, case)
        assert torch.equal(found.correct, accuracy_vector(file, found.adversarial, case.labels))

    def test_without_a_difference_it_is_the_attack(self, attack: Attack) -> None:
        case, model = setting(0.3, 0.55, 0.65, 0.75), boundary(0.5)
        made = attack(model, case.images, case.labels, LINF, seed=3)
        found = reach(attack, model, model, case)
        assert torch.equal(found.fooled, made.fooled)
        assert torch.equal(found.adversarial, made.adversarial)

    def test_an_image_fares_the_same_in_any_company(self, attack: Attack) -> None:
        twin, file = boundary(0.5), boundary(0.44)
        case = setting(0.47, 0.49, 0.6, 0.63, 0.66, 0.9)
        whole = reach(attack, twin, file, case)
        for row in range(6):
            one = Setting(case.images[row : row + 1], case.labels[row : row + 1], LINF, seed=3)
            alone = reach(attack, twin, file, one, torch.tensor([row]))
            assert torch.equal(alone.fooled, whole.fooled[row : row + 1])
            assert torch.equal(alone.adversarial, whole.adversarial[row : row + 1])


@pytest.mark.parametrize("attack", NEAREST, ids=name)
def test_the_nearest_example_is_that_of_the_file(attack: Attack) -> None:
    case = setting(0.48, 0.6, 0.9)
    found = reach(attack, boundary(0.5), boundary(0.45), case)
    assert found.fooled.all()
    assert (found.adversarial < 0.45).all()
    assert (found.adversarial > 0.3).all(), "no further than it takes"


@settings(max_examples=25)
@given(
    values=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    twin_at=st.integers(40, 60),
    file_at=st.integers(40, 60),
    attack=st.sampled_from([*STEPS[:5], *OTHERS]),
)
def test_no_success_of_the_twin_is_lost(values: list[int], twin_at: int, file_at: int, attack: Attack) -> None:
    """Where the attack fools the twin and the ball holds an example for the file, it is found."""
    images = torch.tensor([v / 100 for v in values]).view(-1, 1, 1, 1)
    # a third of a pixel off the grid, so that no image lies on a boundary or exactly eps from it
    twin, file = boundary(twin_at / 100 + 0.0033), boundary(file_at / 100 + 0.0033)
    labels = (images.flatten() > file_at / 100 + 0.0033).long()
    case = Setting(images, labels, LINF, seed=3)
    holds = ((images.flatten() - file_at / 100 - 0.0033).abs() > EPS) | (labels != accuracy_label(file, images))
    fooled = attack(twin, images, labels, LINF, seed=3).fooled
    found = reach(attack, twin, file, case)
    assert not (found.correct & fooled & ~holds).any()


def accuracy_label(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    return model(images).argmax(1)


@pytest.mark.parametrize("attack", [FGSM(), PGD(), PGD(restarts=2)], ids=name)
def test_the_main_job_takes_the_same(attack: FGSM | PGD) -> None:
    case, twin, file = setting(0.47, 0.52, 0.6, 0.68, 0.9), boundary(0.5), boundary(0.44)
    assert torch.equal(white_box(attack, twin, file, case), reach(attack, twin, file, case).correct)


def test_no_attack_is_repeated_where_nothing_was_missed() -> None:
    calls: list[int] = []

    def counting(model: Classifier) -> Callable[[torch.Tensor], torch.Tensor]:
        def classify(images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return model(images)

        return classify

    case, model = setting(0.55, 0.9), boundary(0.5)
    PGD()(counting(model), case.images, case.labels, LINF, seed=3)
    once = len(calls)
    calls.clear()
    reach(PGD(), counting(model), model, case)
    assert len(calls) == once
