"""What the presets hold: each paper's parameters, spelled out here once more by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qopt.attacks import (
    APGD,
    BIM,
    CW,
    FAB,
    FGSM,
    MIM,
    PGD,
    RFGSM,
    SPSA,
    ZOO,
    Attack,
    Classifier,
    GaussianNoise,
    Square,
    UniformNoise,
    Within,
)
from qopt.errors import UsageError
from qopt.measure.presets import PRESETS, Entry, Preset, Unbounded, changed, merged, preset
from qopt.threat import ThreatModel

LINF = ThreatModel("linf", 8 / 255)


def linf(pixels: float) -> ThreatModel:
    return ThreatModel("linf", pixels / 255)


def held(name: str, threat: ThreatModel = LINF, channels: int = 3) -> list[tuple[Attack, ThreatModel | None]]:
    """Attacks, batch sizes left out, with their threat models."""
    return [(changed(e.attack, batch_size=1), e.threat) for e in preset(name, threat, channels).entries]


def test_quick() -> None:
    expected = [FGSM(batch_size=1), PGD(batch_size=1), PGD(loss="margin", restarts=3, batch_size=1)]
    assert held("quick") == [(attack, LINF) for attack in expected]
    assert [e.attack.name for e in preset("quick", LINF).blind] == ["Square-1000"]
    assert not preset("quick", LINF).in_turn


@pytest.mark.parametrize("threat", [LINF, ThreatModel("l2", 0.5)], ids=str)
def test_standard(threat: ThreatModel) -> None:
    expected: list[Attack] = [
        APGD(batch_size=1), APGD("dlr", targets=9, batch_size=1),
        Within(FAB(threat.norm, threat.eps, batch_size=1)), Square(batch_size=1),
    ]  # fmt: skip
    assert held("standard", threat) == [(attack, threat) for attack in expected]
    assert preset("standard", threat).in_turn
    assert [e.attack.name for e in preset("standard", threat).against(gradients=False)] == ["Square"]


def whole(*kinds: type[PGD | BIM | MIM]) -> list[Attack]:
    return [kind(compact=False, batch_size=1) for kind in kinds]


def lin(pixels: int, steps: int) -> list[tuple[Attack, ThreatModel]]:
    by_steps: list[Attack] = [
        BIM(steps=steps, step=1 / 255, compact=False, batch_size=1),
        PGD(steps=steps, step=1 / 255, compact=False, batch_size=1),
    ]
    others: list[Attack] = [UniformNoise(batch_size=1), FGSM(batch_size=1), RFGSM(batch_size=1)]
    return [(attack, linf(pixels)) for attack in others + by_steps]


LIN = [*lin(2, 2), *lin(8, 10), *lin(16, 20)]
"""Steps: floor(min(eps + 4, 1.25 eps)) for 2, 8 and 16."""
CW_L2 = Unbounded(CW(steps=100, search_steps=10, constant=0.9, learning_rate=0.1, kappa=0.0, batch_size=1))
BERNHARD: list[tuple[Attack, ThreatModel | None]] = [
    (FGSM(batch_size=1), ThreatModel("linf", 0.03)),
    (BIM(steps=100, step=0.0003, compact=False, batch_size=1), ThreatModel("linf", 0.03)),
    (SPSA(steps=100, learning_rate=0.01, delta=0.01, samples=128, batch_size=1), ThreatModel("linf", 0.03)),
    (CW_L2, None),
    (Unbounded(ZOO(steps=100, search_steps=10, constant=0.9, h=1e-4, batch_size=1)), None),
]


@pytest.mark.parametrize(
    ("channels", "weak", "strong"), [(3, linf(2), linf(8)), (1, ThreatModel("linf", 0.1), ThreatModel("linf", 0.3))]
)
def test_papers(channels: int, weak: ThreatModel, strong: ThreatModel) -> None:
    declared = ThreatModel("linf", 0.05)
    song: list[tuple[Attack, ThreatModel | None]] = [
        (Unbounded(GaussianNoise(strong.eps, batch_size=1)), None), (UniformNoise(batch_size=1), strong),
        (FGSM(batch_size=1), weak), (FGSM(batch_size=1), strong), (CW_L2, None),
        *((attack, weak) for attack in whole(PGD, BIM, MIM)),
    ]  # fmt: skip
    ours = [
        (FGSM(batch_size=1), declared), (PGD(compact=False, batch_size=1), declared),
        (PGD(loss="margin", restarts=3, compact=False, batch_size=1), declared),
    ]  # fmt: skip
    found = held("papers", declared, channels)
    for expected in (ours, song, LIN, BERNHARD):
        for pair in expected:
            assert pair in found
    assert {str(p) for p in found} == {str(p) for p in [*ours, *song, *LIN, *BERNHARD]}
    assert len(found) == len({str(p) for p in found}), "no attack is run twice"


def test_gray_boxes_of_song_have_a_larger_eps() -> None:
    transfers = [(e.attack, e.threat) for e in preset("papers", LINF).transfers]
    for attack in (PGD(compact=False, batch_size=100), MIM(compact=False, batch_size=100)):
        assert (attack, linf(8)) in transfers
        assert (attack, linf(2)) not in transfers


def test_an_attack_of_two_papers_names_both() -> None:
    (found,) = [e for e in preset("papers", ThreatModel("linf", 0.05)).entries if isinstance(e.attack, Unbounded)
                and isinstance(e.attack.attack, CW)]  # fmt: skip
    assert "Song" in found.origin
    assert "Bernhard" in found.origin


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_is_whole(name: str, channels: int) -> None:
    suite = preset(name, LINF, channels)
    assert suite.name == name
    assert all(not entry.queries for entry in suite.transfers)
    assert all(entry.queries for entry in suite.against(gradients=False))
    assert suite.against(gradients=False), "a model without gradients is attacked too"
    assert any(e.threat == LINF and not e.queries for e in suite.entries), "the declared threat model is attacked"
    for entry in suite.transfers:
        assert getattr(entry.attack, "compact", False) is False, "examples that are to transfer take all their steps"
        assert entry.origin


@pytest.mark.parametrize(
    ("threat", "counts"),
    [
        (LINF, True), (linf(2), True), (linf(8.01), False), (ThreatModel("l2", 8 / 255), False), (None, False),
    ],
)  # fmt: skip
def test_what_counts_for_the_declared_threat_model(threat: ThreatModel | None, counts: bool) -> None:
    assert Entry(FGSM(), threat).counts_for(LINF) is counts


@pytest.mark.parametrize(
    ("attack", "queries"),
    [
        (FGSM(), False), (PGD(), False), (APGD(), False), (Within(FAB()), False), (Unbounded(CW()), False),
        (Unbounded(ZOO()), True), (Unbounded(GaussianNoise()), True), (UniformNoise(), True), (SPSA(), True),
        (Square(), True),
    ],
)  # fmt: skip
def test_what_needs_no_gradients(attack: Attack, queries: bool) -> None:
    assert Entry(attack, LINF).queries is queries


def test_changed_reaches_the_attack_inside_and_leaves_what_is_not_there() -> None:
    assert changed(Within(FAB(steps=3)), batch_size=7) == Within(FAB(steps=3, batch_size=7))
    assert changed(PGD(), compact=False, kappa=3.0) == PGD(compact=False)
    assert changed(RFGSM(), compact=False) == RFGSM()


def test_batched() -> None:
    suite = preset("papers", LINF).batched(7)
    every = [*suite.entries, *suite.transfers, *suite.blind]
    assert {getattr(getattr(e.attack, "attack", e.attack), "batch_size", None) for e in every} == {7}
    assert preset("quick", LINF).batched(None) == preset("quick", LINF)


def test_merged_keeps_the_order_and_all_origins() -> None:
    entries = [Entry(FGSM(), LINF, "a"), Entry(PGD(), LINF, "b"), Entry(FGSM(), LINF, "c"), Entry(FGSM(), LINF, "a"),
               Entry(FGSM(), linf(2), "d")]  # fmt: skip
    assert [(e.attack.name, e.threat, e.origin) for e in merged(entries)] == [
        ("FGSM", LINF, "a; c"), ("PGD-20", LINF, "b"), ("FGSM", linf(2), "d"),
    ]  # fmt: skip


def test_another_eps_changes_bounded_attacks_only() -> None:
    assert Entry(FGSM(), LINF).within(0.2).threat == ThreatModel("linf", 0.2)
    assert Entry(Unbounded(CW()), None).within(0.2).threat is None


@pytest.mark.parametrize("name", ["", "fast", "Quick", "standart"])
def test_unknown_presets(name: str) -> None:
    with pytest.raises(UsageError, match="--preset: unknown preset"):
        preset(name, LINF)


def test_suites_that_make_no_sense() -> None:
    entry = Entry(FGSM(), LINF)
    with pytest.raises(UsageError, match="a preset needs attacks"):
        Preset("own", ())
    with pytest.raises(UsageError, match="only attacks by gradients transfer"):
        Preset("own", (entry,), (replace(entry, attack=Square()),))
    with pytest.raises(UsageError, match="blind attacks only ask for outputs"):
        Preset("own", (entry,), blind=(entry,))


def test_an_unbounded_attack_pays_no_heed_to_the_ball() -> None:
    """One pixel, the boundary at 0.5, images at 0.9: the ball of 0.01 is left behind."""

    def classify(images: torch.Tensor) -> torch.Tensor:
        score = 10 * (images.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)

    model: Classifier = classify
    images, labels = torch.full((3, 1, 1, 1), 0.9), torch.ones(3, dtype=torch.int64)
    attack = Unbounded(CW())
    found = attack(model, images, labels, ThreatModel("linf", 0.01), seed=0)
    assert attack.name == CW().name
    assert found.fooled.all()
    assert float((images - found.adversarial).min()) > 0.3
