"""A suite of attacks on one file, some images at a time: what is done is kept, so that an interrupted run goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from qopt.attacks import AttackResult, Classifier, accuracy_vector, distances, keep_within
from qopt.cache import Arrays, Cache, digest_arrays
from qopt.job.run import Progress
from qopt.measure.network import TwinClassifier
from qopt.measure.presets import Entry, Unbounded, changed
from qopt.measure.robustness import Setting, reach
from qopt.measure.subject import Subject
from qopt.passes.insert_activation_quantizers import set_gradient
from qopt.quant import Gradient
from qopt.report.attack_report import Access
from qopt.threat import ThreatModel

CHUNK = 100
"""Images that are attacked, and kept in the cache, together."""

Gradients = Literal["honest", "plain"]
MODES: Mapping[Gradients, tuple[Gradient, ...]] = {"honest": ("ste", "bpda"), "plain": ("plain",)}
"""How gradients pass quantized activations: honestly, both ways, and the per-example worst of them."""


def modes(subject: Subject, gradients: Gradients) -> tuple[str, ...]:
    """The names of the ways that there are; ``exact`` where no activation is quantized, empty without a twin."""
    if subject.twin is None:
        return ()
    return MODES[gradients] if subject.staircase else ("exact",)


def models(subject: Subject, gradients: Gradients) -> tuple[TwinClassifier, ...]:
    """One twin for each of `modes`; the subject's own stays as it is."""
    if subject.twin is None or not subject.staircase:
        return () if subject.twin is None else (subject.twin,)
    found = []
    for mode in MODES[gradients]:
        graph = copy.deepcopy(subject.twin.graph)
        set_gradient(graph, mode)
        found.append(TwinClassifier(graph, subject.twin.normalisation, subject.twin.batch))
    return tuple(found)


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What one attack did to the file, one entry per image.

    Attributes:
        entry: the attack.
        access: what the attacker has.
        source: the name of the model that the examples were made on; empty for the attacked one.
        correct: bool (n,), whether the file is still right.
        within: bool (n,), whether it was right before and an example in the declared ball fooled it.
        l2: distance of the example from the image; ``linf``: its largest change of a pixel; 0 where not attacked.
    """

    entry: Entry
    access: Access
    source: str
    correct: Tensor
    within: Tensor
    l2: Tensor
    linf: Tensor


@final
@dataclass(frozen=True, eq=False)
class Field:
    """The file, the images and the rules of the game.

    Attributes:
        subject: the model file.
        gradients: how they pass quantized activations.
        images: float32 (n, ...) in [0, 1]; ``labels``: int64 (n,).
        clean: bool (n,), whether the file is right about them.
        threat: the declared threat model.
        seed: every chance derives from it and the image's number.
        cache: keeps what was found on every `CHUNK` of images.
        progress: told what is going on.
        examples: whether the examples are to be had too, by `Battery.examples`.
    """

    subject: Subject
    gradients: Gradients
    images: Tensor
    labels: Tensor
    clean: Tensor
    threat: ThreatModel
    seed: int
    cache: Cache
    progress: Progress
    examples: bool = False


@final
class Battery:
    """Runs attacks one after the other and keeps the per-example worst.

    Attributes:
        robust: bool (n,), which images withstood all examples so far that lie in the declared ball.
        outcomes: of all attacks so far.
        examples: the images, with those that did not withstand replaced by what fooled the file first.
        fooled_by: for every image the attack that made it, empty where it withstood or was wrong before.
    """

    def __init__(self, field: Field) -> None:
        self.field = field
        self.models = models(field.subject, field.gradients)
        self.robust = field.clean.clone()
        self.outcomes: list[Outcome] = []
        self.examples = field.images.clone() if field.examples else field.images
        self.fooled_by = [""] * len(field.images)

    def run(self, entry: Entry, *, in_turn: bool = False) -> None:
        """Attack the file: by queries itself, otherwise through its twin; ``in_turn`` only what is left."""
        access: Access = "queries" if entry.queries else "white"
        self._run(entry, access, None, in_turn)

    def transfer(self, entry: Entry, source: Subject, access: Access) -> None:
        """Make examples on ``source`` and give them to the file."""
        self._run(entry, access, source, in_turn=False)

    def _run(self, entry: Entry, access: Access, source: Subject | None, in_turn: bool) -> None:
        field = self.field
        n = len(field.images)
        alive = (self.robust if in_turn else field.clean).clone()
        correct, within, l2, linf = alive.clone(), torch.zeros_like(alive), *torch.zeros(2, n, dtype=torch.float64)
        label = _label(entry, "" if source is None else source.name)
        for start in range(0, n, CHUNK):
            share = 100 * float(self.robust.float().mean())
            field.progress(f"{label}: {start} of {n} images, robust accuracy so far {share:.1f} %")
            part = slice(start, min(start + CHUNK, n))
            rows = torch.arange(n)[part][alive[part]]
            if len(rows):
                found = self._chunk(entry, source, part, rows)
                correct[rows], within[rows] = found["correct"], found["within"]
                l2[rows], linf[rows] = found["l2"], found["linf"]
                self._note(label, rows[found["within"]], found.get("examples"))
        name = "" if source is None else source.name
        self.outcomes.append(Outcome(entry, access, name, correct, within, l2, linf))

    def _note(self, label: str, rows: Tensor, examples: Tensor | None) -> None:
        new = self.robust[rows]
        if examples is not None:
            self.examples[rows[new]] = examples[new]
        for row in rows[new].tolist():
            self.fooled_by[row] = label
        self.robust[rows] = False

    def _chunk(self, entry: Entry, source: Subject | None, part: slice, rows: Tensor) -> dict[str, Tensor]:
        field = self.field
        key = {
            "file": field.subject.content, "attack": _described(entry), "threat": _plain(entry.threat),
            "declared": _plain(field.threat), "range": [part.start, part.stop], "rows": rows.tolist(),
            "images": digest_arrays(field.images[part].numpy(), field.labels[part].numpy()), "seed": field.seed,
            "normalisation": repr(field.subject.artefact.normalisation), "examples": field.examples,
            "gradients": modes(field.subject, field.gradients), "source": None if source is None else source.content,
        }  # fmt: skip
        found = field.cache.arrays("attack", key, lambda: self._attack(entry, source, rows))
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _attack(self, entry: Entry, source: Subject | None, rows: Tensor) -> Arrays:
        field = self.field
        clean, labels = field.images[rows], field.labels[rows]
        if source is not None:
            result = self._made(entry, source.gradients, rows)
        elif entry.queries:
            result = self._made(entry, field.subject.artefact, rows)
        else:
            result = self._white(entry, rows)
        correct = accuracy_vector(field.subject.artefact, result.adversarial, labels)
        within = keep_within(AttackResult(result.adversarial, ~correct), clean, field.threat).fooled
        found = {
            "correct": correct, "within": within, "l2": distances(result.adversarial, clean, "l2"),
            "linf": distances(result.adversarial, clean, "linf"),
        }  # fmt: skip
        if field.examples:
            found["examples"] = result.adversarial[within]
        return {name: value.numpy() for name, value in found.items()}

    def _made(self, entry: Entry, model: Classifier, rows: Tensor) -> AttackResult:
        field = self.field
        threat = entry.threat or field.threat
        return entry.attack(model, field.images[rows], field.labels[rows], threat, seed=field.seed, indices=rows)

    def _white(self, entry: Entry, rows: Tensor) -> AttackResult:
        """Through the twin under every way that gradients may pass: the first example that counts, else any."""
        field = self.field
        best: AttackResult | None = None
        left = torch.arange(len(rows))
        for model in self.models:
            own = rows[left]
            setting = Setting(field.images[own], field.labels[own], entry.threat or field.threat, field.seed)
            result = reach(entry.attack, model, field.subject.artefact, setting, own)
            best = result if best is None else _better(best, result, left, self._counting(entry, result, own))
            counting = self._counting(entry, best, rows)
            left = (~counting).nonzero().flatten()
            if not len(left):
                break
        assert best is not None
        return best

    def _counting(self, entry: Entry, result: AttackResult, rows: Tensor) -> Tensor:
        """Bool (m,): which examples fool, and of an unbounded attack lie in the declared ball."""
        bounded = not isinstance(entry.attack, Unbounded)
        return result.fooled if bounded else keep_within(result, self.field.images[rows], self.field.threat).fooled


def _better(best: AttackResult, result: AttackResult, left: Tensor, counting: Tensor) -> AttackResult:
    """``best`` (n), with those of ``result``, made for ``left`` (m,), that count, or fool where nothing did."""
    taken = counting | (result.fooled & ~best.fooled[left])
    adversarial, fooled = best.adversarial.clone(), best.fooled.clone()
    adversarial[left[taken]] = result.adversarial[taken]
    fooled[left[taken]] = True
    return AttackResult(adversarial, fooled)


def _label(entry: Entry, source: str) -> str:
    """``PGD-20 (linf 8/255)``, ``PGD-20 (linf 8/255) on other``."""
    bound = "" if entry.threat is None else f" ({entry.threat})"
    return entry.attack.name + bound + (f" on {source}" if source else "")


def _described(entry: Entry) -> str:
    """The attack with its options; how many images it takes at once makes no difference."""
    return repr(changed(entry.attack, batch_size=1))


def _plain(threat: ThreatModel | None) -> list[Any] | None:
    return None if threat is None else [threat.norm, threat.eps]
