"""Attacks through the twin, judged by the file: no difference between the two may flatter the file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.attacks import FGSM, PGD, Finding, accuracy_vector, verdict
from qopt.data import Data
from qopt.measure.network import ArtefactClassifier, TwinClassifier, predictions
from qopt.measure.robustness import (
    Attack,
    Scores,
    Setting,
    attack_artefact,
    attack_float,
    masking_findings,
    white_box,
)
from qopt.passes.insert_activation_quantizers import set_gradient
from qopt.plan import uniform
from qopt.quantize import Applied, Quantizer
from qopt.spec import ActivationSpec, WeightSpec
from qopt.threat import ThreatModel

ArtefactOf = Callable[..., ArtefactClassifier]
EPS = 0.2
LINF = ThreatModel("linf", EPS)
L2 = ThreatModel("l2", EPS)


def boundary(at: float, gain: float = 10.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """A classifier of one pixel: class 1 above ``at``."""

    def classify(images: torch.Tensor) -> torch.Tensor:
        score = gain * (images.flatten(1).mean(1) - at)
        return torch.stack([-score, score], 1)

    return classify


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def setting(values: torch.Tensor, labels: torch.Tensor, threat: ThreatModel = LINF) -> Setting:
    return Setting(values, labels, threat, seed=3)


ATTACKS: list[Attack] = [FGSM(), PGD(), PGD(random_start=False, steps=40), PGD(restarts=2), PGD(loss="margin")]


class TestMismatch:
    """Twin and file are planted with boundaries at different places."""

    def test_examples_that_stop_at_the_twins_boundary_are_deepened(self) -> None:
        twin, artefact = boundary(0.5), boundary(0.45)
        case = setting(pixels(0.6, 0.62, 0.9), torch.tensor([1, 1, 1]))
        attack = PGD(random_start=False)
        naive = accuracy_vector(artefact, attack(twin, case.images, case.labels, LINF, seed=3).adversarial, case.labels)
        assert naive.tolist() == [True, True, True], "planted: just across the twin's boundary, not the file's"
        assert white_box(attack, twin, artefact, case).tolist() == [False, False, True]

    def test_the_last_example_that_fools_the_twin_is_tried_too(self) -> None:
        """Wrong in a window only: the steps go 0.48, 0.43, 0.38, 0.33, 0.28, and only 0.38 fools the file."""

        def window(low: float, high: float) -> Callable[[torch.Tensor], torch.Tensor]:
            def classify(images: torch.Tensor) -> torch.Tensor:
                x = images.flatten(1).mean(1)
                inside = ((low < x) & (x < high)).float()
                return torch.stack([100 * inside, 50 + x], 1)

            return classify

        case = setting(pixels(0.48), torch.tensor([1]))
        attack = PGD(random_start=False, steps=4)
        assert white_box(attack, window(0.36, 0.45), window(0.36, 0.40), case).tolist() == [False]
        assert white_box(attack, window(0.41, 0.45), window(0.36, 0.40), case).tolist() == [True]
        assert white_box(attack, window(0.41, 0.45), window(0.25, 0.30), case).tolist() == [False]

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
    @pytest.mark.parametrize("threat", [LINF, L2], ids=str)
    def test_images_that_only_the_twin_gets_wrong_are_attacked(self, attack: Attack, threat: ThreatModel) -> None:
        twin, artefact = boundary(0.5), boundary(0.45)
        case = setting(pixels(0.48, 0.49, 0.9, 0.1), torch.tensor([1, 1, 1, 0]), threat)
        made = attack(twin, case.images, case.labels, threat, seed=3)
        assert torch.equal(made.adversarial[:2], case.images[:2]), "an image the twin gets wrong is returned as it is"
        assert accuracy_vector(artefact, made.adversarial, case.labels)[:2].all()
        assert white_box(attack, twin, artefact, case).tolist() == [False, False, True, True]

    @settings(max_examples=40)
    @given(
        values=st.lists(st.integers(0, 100), min_size=1, max_size=12),
        twin_at=st.integers(35, 65),
        file_at=st.integers(35, 65),
        attack=st.sampled_from(ATTACKS),
    )
    def test_it_finds_what_the_ball_holds(self, values: list[int], twin_at: int, file_at: int, attack: Attack) -> None:
        """One pixel, one boundary: an image falls exactly where the ball reaches across the file's boundary.

        All but these: images at which an attack on the twin fails outright are not attacked further (both are right).
        """
        images = pixels(*(v / 100 for v in values))
        # a third of a pixel off the grid, so that no image lies on a boundary or exactly eps from it
        twin, artefact = boundary(twin_at / 100 + 0.0033), boundary(file_at / 100 + 0.0033)
        labels = (images.flatten() > file_at / 100 + 0.0033).long()
        found = white_box(attack, twin, artefact, setting(images, labels))
        lowered = artefact((images - EPS).clamp(0, 1)).argmax(1) == labels
        raised = artefact((images + EPS).clamp(0, 1)).argmax(1) == labels
        holds = lowered & raised
        reached = attack(twin, images, labels, LINF, seed=3).fooled
        assert not (found & reached & ~holds).any(), "an example that fools the twin was not deepened"
        assert not (holds & ~found).any(), "an image fell that no image of the ball brings down"

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
    def test_without_a_mismatch_it_is_the_attack(self, attack: Attack) -> None:
        model = boundary(0.5)
        case = setting(torch.rand(30, 1, 1, 1, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 2)
        result = attack(model, case.images, case.labels, LINF, seed=3)
        assert torch.equal(white_box(attack, model, model, case), result.correct)

    def test_more_classes_than_two(self) -> None:
        """The file's boundaries lie at 0.3 and 0.7, the twin's 0.05 lower: two images of two labels are wrong there."""

        def nearest(shift: float) -> Callable[[torch.Tensor], torch.Tensor]:
            centres = torch.tensor([0.1, 0.5, 0.9])
            return lambda images: -20 * (images.flatten(1) + shift - centres).abs()

        twin, artefact = nearest(0.05), nearest(0.0)
        case = setting(pixels(0.29, 0.69, 0.71, 0.5), torch.tensor([0, 1, 2, 1]), ThreatModel("linf", 0.05))
        assert accuracy_vector(artefact, case.images, case.labels).all()
        assert accuracy_vector(twin, case.images, case.labels).tolist() == [False, False, True, True]
        for attack in ATTACKS:
            assert white_box(attack, twin, artefact, case).tolist() == [False, False, False, True]


@pytest.fixture(scope="module")
def few(data: Data) -> Setting:
    """Sixty test images, weak attacks."""
    part = data.report.first(60)
    attacks = (FGSM(), PGD(steps=5))
    return Setting(torch.from_numpy(part.images), torch.from_numpy(part.labels), ThreatModel("linf", 0.1), 0, attacks)


@pytest.fixture(scope="module")
def coarse(example: Quantizer) -> Applied:
    """The embedded example in 4-bit weights and activations."""
    return example.apply(uniform(WeightSpec.parse("int4"), ActivationSpec.parse("int4")))


@pytest.fixture(scope="module")
def on_float(example: Quantizer, few: Setting, artefact_of: ArtefactOf) -> tuple[Scores, dict[str, torch.Tensor]]:
    return attack_float(TwinClassifier(example.float_graph), artefact_of(example.prepared), few)


class TestEmbeddedExample:
    """The real file in ONNX Runtime."""

    def test_the_float_network(self, on_float: tuple[Scores, dict[str, torch.Tensor]], few: Setting) -> None:
        scores, adversarial = on_float
        assert set(scores.attacked) == set(adversarial) == {"FGSM", "PGD-5"}
        assert scores.clean.float().mean() > 0.75
        assert torch.equal(scores.robust, scores.clean & scores.attacked["FGSM"] & scores.attacked["PGD-5"])
        for images in adversarial.values():
            assert float((images - few.images).abs().max()) <= 0.1 + 1e-6
            assert images.min() >= 0
            assert images.max() <= 1

    def test_examples_for_transfer_take_all_their_steps(
        self, on_float: tuple[Scores, dict[str, torch.Tensor]], example: Quantizer, few: Setting
    ) -> None:
        twin = TwinClassifier(example.float_graph)
        stopped = PGD(steps=5)(twin, few.images, few.labels, few.threat, seed=0).adversarial
        taken = on_float[1]["PGD-5"]

        def lead(images: torch.Tensor) -> float:
            with torch.no_grad():
                own = twin(images).gather(1, few.labels[:, None]).squeeze(1)
                return float((own - twin(images).amax(1)).mean())

        assert lead(taken) < lead(stopped)

    @pytest.mark.parametrize("activations", ["int8", "int4", "int3"])
    def test_twin_and_file_agree(
        self, activations: str, example: Quantizer, data: Data, artefact_of: ArtefactOf
    ) -> None:
        """What makes attacks through the twin worth anything: the same prediction on every image."""
        applied = example.apply(
            uniform(WeightSpec.parse("int4"), ActivationSpec.parse(activations), bias_correction=True)
        )
        sample = torch.from_numpy(data.report.first(500).images)
        twin, artefact = TwinClassifier(applied.graph), artefact_of(example.prepared, applied.quantized)
        assert (predictions(twin, sample) == predictions(artefact, sample)).float().mean() >= 0.998

    def test_the_quantized_file(
        self,
        coarse: Applied,
        example: Quantizer,
        few: Setting,
        on_float: tuple[Scores, dict[str, torch.Tensor]],
        artefact_of: ArtefactOf,
    ) -> None:
        artefact = artefact_of(example.prepared, coarse.quantized)
        scores, made = attack_artefact(TwinClassifier(coarse.graph), artefact, few, on_float[1])
        assert set(made) == {"FGSM", "PGD-5"}
        for name, images in made.items():
            assert torch.equal(accuracy_vector(artefact, images, few.labels), scores.attacked[name])
            assert float((images - few.images).abs().max()) <= few.threat.eps + 1e-6
        assert set(scores.attacked) == {"FGSM", "PGD-5", "transfer"}
        assert scores.attacked["PGD-5"].float().mean() < scores.clean.float().mean()
        for name, vector in scores.attacked.items():
            assert vector.shape == (60,)
            assert not (scores.robust & ~vector).any(), name
        transferred = [accuracy_vector(artefact, images, few.labels) for images in on_float[1].values()]
        assert torch.equal(scores.attacked["transfer"], torch.stack(transferred).all(0))
        assert "transfer" not in attack_artefact(TwinClassifier(coarse.graph), artefact, few, {})[0].attacked

    def test_the_planted_mismatch_of_a_wrong_twin(
        self, coarse: Applied, example: Quantizer, few: Setting, artefact_of: ArtefactOf
    ) -> None:
        """A twin whose last bias is off: no image that the honest attack brings down may pass for robust unseen."""
        artefact = artefact_of(example.prepared, coarse.quantized)
        graph = copy.deepcopy(coarse.graph)
        wrong = next(name for name, tensor in graph.named_buffers() if tensor.shape == (10,))
        graph.get_buffer(wrong).add_(torch.linspace(-0.5, 0.5, 10))
        one = replace(few, attacks=(PGD(steps=10),))
        attack, twin = one.attacks[0], TwinClassifier(graph)
        found = white_box(attack, twin, artefact, one)
        result = attack(twin, one.images, one.labels, one.threat, seed=one.seed)
        naive = accuracy_vector(artefact, result.adversarial, one.labels)
        assert not (found & ~naive).any()
        assert (naive & result.fooled).any(), "nothing escaped: the mismatch is too small"
        assert int(found.sum()) < int(naive.sum())

    def test_straight_through_gradients_are_not_masked(
        self,
        coarse: Applied,
        few: Setting,
        artefact_of: ArtefactOf,
        example: Quantizer,
        on_float: tuple[Scores, dict[str, torch.Tensor]],
    ) -> None:
        findings = find_masking(coarse, few, artefact_of(example.prepared, coarse.quantized), on_float[1])
        assert [finding.rule for finding in findings] == ["zero_gradients", "unbounded_attack", "transfer_stronger"]
        assert verdict(findings) == "none"

    def test_plain_rounding_is_masked(
        self,
        coarse: Applied,
        few: Setting,
        artefact_of: ArtefactOf,
        example: Quantizer,
        on_float: tuple[Scores, dict[str, torch.Tensor]],
    ) -> None:
        plain = replace(coarse, graph=copy.deepcopy(coarse.graph))
        set_gradient(plain.graph, "plain")
        findings = find_masking(plain, few, artefact_of(example.prepared, coarse.quantized), on_float[1])
        triggered = {finding.rule for finding in findings if finding.triggered}
        assert triggered >= {"zero_gradients", "unbounded_attack"}
        assert findings[0].numbers["share"] == 1.0
        assert verdict(findings) == "masked"


def find_masking(
    applied: Applied, few: Setting, artefact: ArtefactClassifier, transferred: dict[str, torch.Tensor]
) -> list[Finding]:
    """As the job does: the file attacked through its twin with float's examples, then the rules."""
    twin = TwinClassifier(applied.graph)
    return masking_findings(twin, attack_artefact(twin, artefact, few, transferred)[0], few)


def test_masking_without_transfers_leaves_their_rule_out(coarse: Applied, few: Setting) -> None:
    scores = Scores(torch.ones(60, dtype=torch.bool), {"FGSM": torch.ones(60, dtype=torch.bool)})
    part = replace(few, images=few.images[:10], labels=few.labels[:10])
    findings = masking_findings(TwinClassifier(coarse.graph), scores, part)
    assert [finding.rule for finding in findings] == ["zero_gradients", "unbounded_attack"]


def test_scores_without_attacks_are_the_clean_ones() -> None:
    clean = torch.tensor([True, False, True])
    assert torch.equal(Scores(clean).robust, clean)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_static_batch_is_attacked_like_a_dynamic_one(
    attack: Attack, networks: dict[str, Quantizer], images: Callable[..., torch.Tensor], artefact_of: ArtefactOf
) -> None:
    """Seven images, three at a time, some of which leave the batch early."""
    static, dynamic = networks["static"], networks["dynamic"]
    sample = images(static.prepared, 7)
    twin = TwinClassifier(static.float_graph, batch=3)
    labels = predictions(twin, sample)
    case = setting(sample, labels, ThreatModel("linf", 0.08))
    found = white_box(attack, twin, artefact_of(static.prepared), case)
    expected = white_box(attack, TwinClassifier(dynamic.float_graph), artefact_of(dynamic.prepared), case)
    assert torch.equal(found, expected)
    assert 0 < int(found.sum()) < 7
