"""JSON documents with a fixed set of keys: read strictly, the first thing wrong named in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from qopt.errors import UsageError, nearest

MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""


class Document(BaseModel):
    """Base of everything that qopt writes as JSON: no unknown keys, no NaN or infinity, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


D = TypeVar("D", bound=Document)


def read(kind: type[D], text: str, where: str, error: type[UsageError]) -> D:
    """Parse ``text`` as ``kind``; types are strict: no string stands for a number and no number for a truth value.

    Raises:
        UsageError: of class ``error``, at ``where`` and the key: the first thing wrong.
    """
    try:
        document = kind.model_validate_json(text, strict=True)
        json.loads(text, object_pairs_hook=_unique)
    except ValidationError as problem:
        raise first_problem(kind, problem, where, error) from problem
    except UsageError as problem:
        raise error(str(problem), where=where) from problem
    return document


def first_problem(kind: type[Document], problem: ValidationError, where: str, error: type[UsageError]) -> UsageError:
    """The first of pydantic's complaints as one line that names the key, and the nearest one where it is unknown."""
    first = problem.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "json_invalid":
            return error("not valid JSON", where=where, got=str(first["ctx"]["error"]))
        case "extra_forbidden":
            known = _keys(kind, first["loc"][:-1])
            return error(f"unknown key {place!r}", where=where, fix=nearest(str(first["loc"][-1]), known))
        case "missing":
            return error(f"the key {place!r} is missing", where=where)
        case _:
            what = f"key {place!r}: {first['msg']}" if place else "the document is no JSON object"
            return error(what, where=where, got=_shown(first["input"]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"the key {twice!r} is there twice", fix="keep one of them")
    return found


def _keys(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys of the document at ``place`` inside ``kind``; indices and the keys of mappings are stepped over."""
    for part in place:
        inner = [found for name, field in _fields(kind) if name == part for found in _documents(field)]
        kind = inner[0] if inner else kind
    return [name for name, _ in _fields(kind)]


def _fields(kind: type[BaseModel]) -> list[tuple[str, Any]]:
    return [(field.alias or name, field.annotation) for name, field in kind.model_fields.items()]


def _documents(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _documents(part)]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
