"""The parts of AutoAttack as its authors' code runs them, through the optional package pyautoattack."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn

from qopt.attacks.attack import AttackResult, Classifier, keep_within
from qopt.attacks.gradient import check_indices
from qopt.attacks.score import check_labels, predict
from qopt.errors import DataError, UsageError
from qopt.seeds import derive
from qopt.threat import ThreatModel

PartName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]

BATCH = 250
"""Images per forward pass that the package takes by default."""


def reference_parts(batch_size: int = BATCH) -> tuple[ReferencePart, ...]:
    """The standard suite: ``AutoAttack(reference_parts())`` is the reference's result, with what every part left."""
    return tuple(ReferencePart(name, batch_size) for name in ("apgd-ce", "apgd-t", "fab-t", "square"))


@final
@dataclass(frozen=True)
class ReferencePart:
    """One attack of the package, with the parameters of its standard version.

    Its chance depends on ``seed`` and on which images come together, not on their numbers: that is how it is written.

    Raises:
        UsageError: the attack is unknown or the batch size below 1.
    """

    attack: PartName
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        if self.attack not in get_args(PartName):
            raise UsageError(
                "unknown attack", where="pyautoattack", expected=", ".join(get_args(PartName)), got=repr(self.attack)
            )
        if self.batch_size < 1:
            raise UsageError(
                "batch_size must be a whole number, 1 or larger", where="pyautoattack", got=repr(self.batch_size)
            )

    @property
    def name(self) -> str:
        """For example ``APGD-CE (pyautoattack)``."""
        return f"{'Square' if self.attack == 'square' else self.attack.upper()} (pyautoattack)"

    def __call__(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Tensor | None = None,
    ) -> AttackResult:
        """Attack ``images`` (n, c, h, w), float32 in [0, 1].

        Raises:
            UsageError: the package is not installed, or the attack needs more classes than the model has.
            DataError: images, labels or indices do not fit.
            ModelError: the output is no finite matrix of logits.
        """
        package = _package()
        logits = predict(model, images, self.batch_size)
        labels = check_labels(labels, *logits.shape)
        check_indices(indices, len(images))
        self._check_fit(images, logits.shape[1])
        if threat.eps == 0:
            return AttackResult(images.detach().clone(), logits.argmax(1) != labels)
        with torch.inference_mode(False), _undisturbed():
            suite = self._suite(package, model, threat, logits.shape[1], derive(seed, "pyautoattack") % 2**31)
            made, _ = suite.run_standard_evaluation(images.clone(), labels.clone(), batch_size=self.batch_size)
        fooled = predict(model, made, self.batch_size).argmax(1) != labels
        return keep_within(AttackResult(made, fooled), images, threat)

    def _suite(self, package: ModuleType, model: Classifier, threat: ThreatModel, classes: int, seed: int) -> Any:
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        suite = package.AutoAttack(
            _Module(model), attacks=[self.attack], version="custom", eps=threat.eps, norm=norm, seed=seed
        )
        suite.apgd.n_restarts = suite.fab.n_restarts = 1
        suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, classes - 1)
        return suite

    def _check_fit(self, images: Tensor, classes: int) -> None:
        if images.ndim != 4:
            raise DataError(
                "not images with channels", where="pyautoattack", expected="shape (n, channels, height, width)",
                got=str(tuple(images.shape)), fix="use qopt's own AutoAttack",
            )  # fmt: skip
        needed = {"apgd-t": 4, "apgd-dlr": 3}.get(self.attack, 2)
        if classes < needed:
            raise UsageError(
                f"{self.attack} of pyautoattack needs {needed} classes", where="pyautoattack", got=str(classes),
                fix="use qopt's own AutoAttack",
            )  # fmt: skip


def _package() -> ModuleType:
    try:
        return importlib.import_module("pyautoattack.autoattack")
    except ModuleNotFoundError as error:
        raise UsageError(
            "the package pyautoattack is not installed", fix="run: pip install 'qopt[autoattack]'"
        ) from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back what the package changes for the whole process: torch's generator and the trace function.

    Its log is a matter of the program's configuration; without one, warnings would be printed, so it gets a handler.
    """
    logger = logging.getLogger("auto-attack")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    trace = sys.gettrace()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            sys.settrace(trace)


class _Module(nn.Module):
    """A classifier as the package takes it."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self._classifier = model

    def forward(self, images: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self._classifier(images)
        logits: Tensor = _ToImages.apply(images, self._classifier)  # type: ignore[no-untyped-call]
        return logits


class _ToImages(torch.autograd.Function):
    """Gradients to the images only: FAB's ``backward()`` would leave some in the model's parameters too."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, classifier: Classifier) -> Tensor:
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = classifier(ctx.images)
            logits: Tensor = ctx.logits
        return logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.logits.requires_grad:
            return torch.zeros_like(ctx.images), None
        (found,) = torch.autograd.grad(ctx.logits, ctx.images, gradients[0], allow_unused=True)
        return torch.zeros_like(ctx.images) if found is None else found, None
