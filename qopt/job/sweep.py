"""Accuracy against the size of the attack: the same images under PGD at growing radii."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from qopt.attacks import PGD, accuracy_vector
from qopt.job.artefact import Artefact
from qopt.job.rows import share
from qopt.job.run import Run
from qopt.measure.robustness import BATCH, Setting, white_box
from qopt.report.model import SweepLine, SweepPoint

FACTORS: Final = (0.25, 0.5, 1.0, 2.0)
"""Radii as shares of that of the threat model."""

IMAGES: Final = 128
"""Report images that are attacked at every radius, at most."""


def sweep(run: Run, networks: dict[str, Artefact]) -> list[SweepLine]:
    """One line for each network; empty where nothing is attacked.

    An image that a smaller radius loses is lost at every larger one: the example is within both.
    """
    if not run.options.robust:
        return []
    run.progress("accuracy against the size of the attack")
    assert run.data is not None
    few = run.data.report.first(min(IMAGES, run.options.attack_images))
    images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
    lines = []
    for name, artefact in networks.items():
        held = accuracy_vector(artefact.classifier, images, labels)
        points = [SweepPoint(eps=0.0, accuracy=share(held))]
        for factor in FACTORS:
            threat = replace(run.threat, eps=factor * run.threat.eps)
            setting = Setting(images, labels, threat, run.seed("sweep", str(factor)))
            held = held & white_box(PGD(batch_size=BATCH), artefact.twin, artefact.classifier, setting)
            points.append(SweepPoint(eps=threat.eps, accuracy=share(held)))
        lines.append(SweepLine(network=name, points=points))
    return lines
