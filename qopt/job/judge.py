"""How far a plan is from float on the select images, clean and attacked: what plans are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.attacks import PGD
from qopt.job.probes import probe_images, withstood
from qopt.job.run import PROBE_STEPS, Run
from qopt.measure.divergence import Probe
from qopt.measure.network import TwinClassifier
from qopt.measure.robustness import BATCH
from qopt.quantize import Applied
from qopt.search.evaluation import Evaluation
from qopt.size import code_bits, stored_bytes


@final
@dataclass(frozen=True, eq=False)
class Judge:
    """The select images: all of them clean, and those that float withstands an attack on, as float's attack left them.

    ``labels`` and ``seed`` are for the attack on a plan's own twin; ``share`` is the part of all images withstood.
    """

    run: Run
    clean: Probe
    held: Probe | None
    transferred: Probe | None
    labels: Tensor
    share: float

    @staticmethod
    def of(run: Run) -> Judge:
        assert run.data is not None
        images, adversarial = probe_images(run, "select")
        clean = Probe.of(run.float_twin, images)
        labels = torch.from_numpy(run.data.select.labels[: len(images)])
        if adversarial is None:
            return Judge(run, clean, None, None, labels, 0.0)
        kept = withstood(run, "select")
        held = Probe(images[kept], clean.reference[kept])
        share = float(kept.double().mean())
        return Judge(run, clean, held, Probe(adversarial[kept], held.reference), labels[kept], share)

    def examples(self, twin: TwinClassifier, part: slice = slice(None)) -> Tensor | None:
        """What a short PGD on ``twin`` makes of a part of the images that float withstands; None where there are none.

        What becomes of an image does not depend on the part.
        """
        if self.held is None or not len(self.labels):
            return None
        attack = PGD(steps=PROBE_STEPS, compact=False, batch_size=BATCH)
        seed, numbers = self.run.seed("select"), torch.arange(len(self.labels))[part]
        images, labels = self.held.images[part], self.labels[part]
        return attack(twin, images, labels, self.run.threat, seed=seed, indices=numbers).adversarial

    def on(self, examples: Tensor, twin: TwinClassifier) -> float:
        """The share's divergence of a plan on ``examples``, as `examples` makes them."""
        assert self.held is not None
        return self.share * Probe(examples, self.held.reference).divergence(twin)

    def first(self, twin: TwinClassifier, examples: Tensor | None) -> float | None:
        """The share's divergence on float's examples or its own, whichever is more; None in a run without attacks."""
        if self.transferred is None:
            return None
        return 0.0 if examples is None else max(self.on(self.transferred.images, twin), self.on(examples, twin))

    def evaluation(self, run: Run, applied: Applied, twin: TwinClassifier, examples: Tensor | None) -> Evaluation:
        """What was measured of a plan made real in ``run``, ``examples`` being those made on its ``twin``."""
        stored = list(applied.quantized.stored(run.prepared))
        return Evaluation(
            self.clean.divergence(twin), self.first(twin, examples), code_bits(stored), stored_bytes(stored)
        )
