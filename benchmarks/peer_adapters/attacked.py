"""What a file withstands: which test images it gets right as they are, under PGD-50, and under AutoAttack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.attacks import PGD, accuracy_vector
from qopt.cache import Cache, digest_arrays
from qopt.data import Data
from qopt.job.attack_rows import Battery, Field
from qopt.measure.network import Normalisation
from qopt.measure.presets import Entry, preset
from qopt.measure.subject import Subject, open_subject
from qopt.seeds import derive
from qopt.threat import ThreatModel

STEPS = PGD(steps=50, loss="margin", batch_size=100)
"""The attack that `benchmarks/strategies.py` uses, too."""

TRIES = 3
"""Starts for float, whose gradients are exact: other files are tried straight through, by BPDA and by transfer."""


@dataclass(frozen=True)
class Attacked:
    """One file under attack, bool (n,) each in the order of the test images.

    Attributes:
        clean: which images are right as they are.
        steps: which withstand PGD-50 on the margin and float's examples; of the first images.
        autoattack: which withstand all this and the standard version of AutoAttack; of the first of those.
        gradients: whether there were any: else only queries and float's examples attack.
    """

    clean: NDArray[np.bool_]
    steps: NDArray[np.bool_]
    autoattack: NDArray[np.bool_]
    gradients: bool


@dataclass(frozen=True)
class Arena:
    """The same images, threat model, examples of float and cache for all files of one network."""

    source: Path
    data: Data
    threat: ThreatModel
    images: int
    strong: int
    cache: Cache
    progress: Callable[[str], None]

    @property
    def seed(self) -> int:
        return derive(0, "peers")

    def examples(self) -> Tensor:
        """Adversarial images that PGD-50 makes on float, every step taken: (images, ...)."""
        few = self.data.report.first(self.images)
        key = {
            "file": self.source.name, "images": digest_arrays(few.images, few.labels), "eps": self.threat.eps,
            "attack": repr(STEPS),
        }  # fmt: skip

        def compute() -> dict[str, NDArray[np.float32]]:
            twin = _open(self.source).gradients
            images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
            made = replace(STEPS, compact=False)(twin, images, labels, self.threat, seed=self.seed)
            return {"examples": made.adversarial.numpy()}

        return torch.from_numpy(self.cache.arrays("peers_examples", key, compute)["examples"])

    def attack(self, file: Path) -> Attacked:
        """Attack a file; what counts is its own answer in ONNX Runtime.

        Gradients pass quantized activations straight through and by BPDA, and the worst of both counts; so do, for
        other files than float, the examples made on that.
        """
        subject = _open(file)
        part = self.data.report
        clean = accuracy_vector(subject.artefact, torch.from_numpy(part.images), torch.from_numpy(part.labels))
        battery = self._battery(subject, clean[: self.images])
        if subject.twin is not None:
            tries = STEPS if subject.staircase else replace(STEPS, restarts=TRIES)
            battery.run(Entry(tries, self.threat))
        labels = torch.from_numpy(part.labels[: self.images])
        if file != self.source:
            battery.robust &= accuracy_vector(subject.artefact, self.examples(), labels)
        strong = self._battery(subject, battery.robust[: self.strong])
        for entry in preset("standard", self.threat).entries if self.strong else ():
            if subject.twin is not None or entry.queries:
                strong.run(entry, in_turn=True)
        return Attacked(clean.numpy(), battery.robust.numpy(), strong.robust.numpy(), subject.twin is not None)

    def _battery(self, subject: Subject, left: Tensor) -> Battery:
        few = self.data.report.first(len(left))
        images, labels = torch.from_numpy(few.images), torch.from_numpy(few.labels)
        field = Field(subject, "honest", images, labels, left, self.threat, self.seed, self.cache, self.progress)
        return Battery(field)


def _open(file: Path) -> Subject:
    return open_subject(file, Normalisation())
