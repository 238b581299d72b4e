"""Every exception that qopt raises on purpose.

    QoptError                       anything the user can act on; printed as one line, never as a traceback
    ├── UsageError          exit 2  a wrong option, name, file path, plan or configuration
    │   ├── DataError       exit 2  images or labels that do not fit
    │   ├── PlanError       exit 2  a plan that does not parse or does not match the model
    │   └── InfeasibleError exit 2  no plan satisfies the limits
    ├── ModelError          exit 3  the model cannot be used
    │   ├── CorruptModelError       not readable as what it claims to be, or non-finite weights
    │   ├── UnsafeModelError        loading it could run code that nobody vouched for
    │   └── UnsupportedModelError   an operator or structure that qopt cannot take
    ├── PluginError         exit 4  a plugin that raised or broke its contract
    ├── VerificationError   exit 4  a pass or an emitted file that does not compute what it must
    └── InterruptedRunError exit 130  the user stopped the run

A message answers four questions in one line: what, where, expected and got, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar, Self, final


class QoptError(Exception):
    """Base of all errors.

    Args:
        what: the fact, in one clause.
        where: the node, layer, file or option it was found at.
        expected: what would have been right.
        got: what was there instead.
        fix: what the user can do.
    """

    exit_code: ClassVar[int] = 4

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        super().__init__(self._line())

    def at(self, where: str) -> Self:
        """The same error with ``where`` before the place it was found at."""
        place = f"{where}: {self.where}" if self.where else where
        return type(self)(self.what, where=place, expected=self.expected, got=self.got, fix=self.fix)

    def _line(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        facts = [f"expected {self.expected}"] if self.expected else []
        facts += [f"got {self.got}"] if self.got else []
        text += f" ({', '.join(facts)})" if facts else ""
        text += f"; {self.fix}" if self.fix else ""
        return " ".join(text.split())


class UsageError(QoptError):
    """A wrong option, name, path or configuration."""

    exit_code: ClassVar[int] = 2


@final
class DataError(UsageError):
    """Images or labels that do not fit the model or the format."""


@final
class PlanError(UsageError):
    """A plan that does not parse, or names what the model does not have."""


@final
class InfeasibleError(UsageError):
    """No plan satisfies the limits."""


class ModelError(QoptError):
    """A model that cannot be used."""

    exit_code: ClassVar[int] = 3


@final
class CorruptModelError(ModelError):
    """A file that is not readable as what it claims to be, or that holds non-finite weights."""


@final
class UnsafeModelError(ModelError):
    """A file whose loading could run code that nobody vouched for."""


@final
class UnsupportedModelError(ModelError):
    """An operator or a structure that qopt cannot take."""


@final
class PluginError(QoptError):
    """A plugin that raised, or returned what its contract forbids."""


@final
class VerificationError(QoptError):
    """A pass or an emitted file that does not compute what it must."""


@final
class InterruptedRunError(QoptError):
    """The user stopped the run."""

    exit_code: ClassVar[int] = 130


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to ``name``, as a phrase for an error's ``fix``; all of them when they are few."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(options) <= 12:
        return "one of " + ", ".join(options) if options else "there are none"
    return "for example " + ", ".join(options[:count])
