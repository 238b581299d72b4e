"""`package.module:name` references to the user's own code, which the user vouches for by naming it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qopt.errors import UsageError, nearest


def resolve(reference: str, where: str) -> Callable[..., Any]:
    """The callable that ``reference`` names; modules are also looked for in the current directory.

    Raises:
        UsageError: at ``where``: a malformed reference, a module that does not import, a name that is not in it or
            is not callable.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UsageError("not a factory", where=where, expected="package.module:name", got=repr(reference))
    module = _import(module_name, where)
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UsageError(
            f"module {module_name} has no such name", where=where, got=repr(attribute), fix=nearest(attribute, public)
        ) from error
    if not callable(factory):
        raise UsageError("the factory is not callable", where=where, got=f"{reference} is a {type(factory).__name__}")
    return factory  # type: ignore[no-any-return]


def _import(name: str, where: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's module may raise anything on import
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            "cannot import the factory's module", where=where, got=reason, fix="give module:name importable from here"
        ) from error
    finally:
        sys.path.remove(here)
