"""Pieces of work that processes share, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

Result = Mapping[str, Any]
"""What came of one, plain JSON."""


@final
@dataclass(frozen=True)
class Piece:
    """A piece of work.

    Attributes:
        key: what its result depends on, as a digest: equal keys have equal results, whoever computes them.
        group: pieces of one group need the same preparation.
        work: plain JSON, for whoever does it.
        failed_on: the workers that it failed on.
        attempts: how often it failed or was lost.
    """

    key: str
    group: str
    work: Mapping[str, Any]
    failed_on: tuple[str, ...] = ()
    attempts: int = 0
