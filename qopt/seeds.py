"""Explicit randomness: every use of chance draws from a seed derived from the run's seed and a name."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) that depends only on ``seed`` and ``names``: one independent stream per use.

    Streams with different names are unrelated, so that adding a use never shifts another one.
    """
    text = "/".join([str(seed), *(str(name).replace("\\", "\\\\").replace("/", "\\/") for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
