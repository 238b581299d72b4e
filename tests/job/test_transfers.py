"""The networks of the table against each other: examples, transfers and cosines, against predictions one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qopt.attacks import PGD, predict
from qopt.job.artefact import Artefact, build_artefact, float_artefact
from qopt.job.rows import Table
from qopt.job.run import Run
from qopt.job.transfers import ATTACK, attacked, transfers
from qopt.measure.robustness import BATCH
from qopt.plan import uniform
from qopt.spec import WeightSpec


@pytest.fixture(scope="module")
def networks(run: Run) -> dict[str, Artefact]:
    applied = run.quantizer.apply(uniform(WeightSpec.parse("int3"), run.target.activations))
    return {"float": float_artefact(run), "qopt": build_artefact(run, applied, {})}


@pytest.fixture(scope="module")
def table(run: Run, networks: dict[str, Artefact]) -> Table:
    table = Table(run)
    table.add_float(networks["float"])
    table.add_baseline("int2:max")
    applied = run.quantizer.apply(uniform(WeightSpec.parse("int3"), run.target.activations))
    table.add("qopt", networks["qopt"], applied, naive=False)
    table.compare(networks["float"], networks["qopt"])
    return table


def test_every_network_is_tried_on_every_other(table: Table) -> None:
    found = table.transfers
    assert found is not None
    assert found.networks == ["float", "uniform int2:max", "qopt"]
    assert found.images == 40
    labels = table.setting.labels
    for column, target in enumerate(table.attacked.values()):
        clean = predict(target.classifier, table.setting.images).argmax(1) != labels
        assert found.clean[column] == pytest.approx(100 * float(clean.double().mean()), abs=1e-5)
        for row, source in enumerate(table.attacked.values()):
            wrong = predict(target.classifier, source.examples).argmax(1) != labels
            assert found.fooled[row][column] == pytest.approx(100 * float(wrong.double().mean()), abs=1e-5)


def test_the_diagonal_is_the_attack_that_the_table_reports(table: Table) -> None:
    """Examples made again with every step taken fool their own network as often as those that stopped."""
    found = table.transfers
    assert found is not None
    for number, name in enumerate(found.networks):
        row = next(row for row in table.rows if row.name == name)
        assert found.fooled[number][number] == pytest.approx(100 - row.attacked[ATTACK.name].value, abs=2.6)


def test_examples_are_within_the_threat_model(table: Table) -> None:
    for network in table.attacked.values():
        assert network.examples.shape == table.setting.images.shape
        assert float((network.examples - table.setting.images).abs().max()) <= table.setting.threat.eps + 1e-6
        assert 0 <= float(network.examples.min()) <= float(network.examples.max()) <= 1


def test_examples_are_those_of_the_attack_with_every_step(table: Table, networks: dict[str, Artefact]) -> None:
    """What the validation left is kept where nothing was fooled; the rest is as if it had been made in full at once."""
    setting, artefact = table.setting, networks["qopt"]
    full = replace(ATTACK, compact=False)
    whole = full(artefact.twin, setting.images, setting.labels, setting.threat, seed=setting.seed).adversarial
    right = predict(artefact.classifier, setting.images).argmax(1) == setting.labels
    assert float((table.attacked["qopt"].examples - whole)[right].abs().max()) < 1e-4
    short = ATTACK(artefact.twin, setting.images, setting.labels, setting.threat, seed=setting.seed).adversarial
    assert float((short - whole)[right].abs().max()) > 1e-2, "else nothing had to be made again"


def test_no_more_than_one_batch_is_looked_at(run: Run, networks: dict[str, Artefact]) -> None:
    setting = Table(replace(run, options=replace(run.options, attack_images=BATCH + 20))).setting
    made = attacked(networks["float"], {PGD().name: setting.images}, setting)
    assert len(made.examples) == BATCH
    found = transfers({"float": made}, setting)
    assert found is not None
    assert found.images == BATCH
    assert found.fooled == [found.clean], "clean images fool no more than clean images"


def test_cosines_are_those_of_the_gradients(run: Run, table: Table, networks: dict[str, Artefact]) -> None:
    found = table.transfers
    assert found is not None
    rows = []
    applied = run.quantizer.apply(uniform(WeightSpec.parse("int2:max"), run.target.activations))
    twins = (networks["float"].twin, build_artefact(run, applied, {}).twin, networks["qopt"].twin)
    for twin in twins:
        images = table.setting.images.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(twin(images), table.setting.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        flat = gradient.flatten(1).double().numpy()
        rows.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    expected = [[float((a * b).sum(1).mean()) for b in rows] for a in rows]
    np.testing.assert_allclose(found.cosines, expected, atol=1e-4)


def test_again_is_the_same(table: Table) -> None:
    assert transfers(table.attacked, table.setting) == table.transfers


def test_without_attacks_there_are_none(run: Run, networks: dict[str, Artefact]) -> None:
    table = Table(replace(run, options=replace(run.options, robust=False)))
    table.add_float(networks["float"])
    table.compare(networks["float"], networks["qopt"])
    assert table.transfers is None
    assert table.amplification is not None
    assert {row.attack for row in table.amplification.layers} == {None}
    assert all(row.clean is not None for row in table.amplification.layers)
