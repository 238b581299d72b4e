"""`package.module:name` references to the user's own code, which the user vouches for by naming it."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from qopt.errors import UsageError, nearest


def resolve(reference: str, where: str) -> Callable[..., Any]:
    """The callable that ``reference`` names; modules beside the current directory are found. Prints go to stderr.

    Raises:
        UsageError: at ``where``: a malformed reference, a module that does not import, a name that is not in it or
            is not callable.
    """
    module_name, _, name = reference.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError("not a factory", where=where, expected="package.module:name", got=repr(reference))
    with importable_here(), contextlib.redirect_stdout(sys.stderr):
        module = _import(module_name, f"{where} {reference}")
        factory = getattr(module, name, None)
    if factory is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"module {module_name} has no {name!r}", where=where, fix=nearest(name, known))
    if not callable(factory):
        raise UsageError("the factory is not callable", where=f"{where} {reference}", got=type(factory).__name__)
    return factory  # type: ignore[no-any-return]


def call(reference: str, where: str) -> Any:
    """What the callable that ``reference`` names returns when called without arguments. Prints go to stderr.

    Raises:
        UsageError: at ``where``: what `resolve` raises, or the factory raised.
    """
    factory = resolve(reference, where)
    with importable_here(), contextlib.redirect_stdout(sys.stderr):
        try:
            return factory()
        except (Exception, SystemExit) as error:  # the user's code
            raise _raised("the factory raised", f"{where} {reference}", error) from error


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Let imports see the current directory, as ``python -m`` does, for the duration of the block."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _raised("the factory's module cannot be imported", where, error) from error
        beside = [path.stem for path in Path.cwd().glob("*.py")]
        hint = nearest(name, beside) if beside else "run qopt from the folder that holds it, or install it"
        raise UsageError(f"there is no module {error.name!r}", where=where, fix=hint) from error
    except (Exception, SystemExit) as error:  # the user's module may do anything when it is imported
        raise _raised("the factory's module cannot be imported", where, error) from error


def _raised(what: str, where: str, error: BaseException) -> UsageError:
    frames = traceback.extract_tb(error.__traceback__)
    line = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if len(frames) > 1 else ""
    text = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
    return UsageError(what, where=where, got=f"{type(error).__name__}: {text}{line}")
