"""Latency of several files, measured fairly on a noisy machine: interleaved, one thread, minimum over repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from qopt.errors import UsageError
from qopt.runtime.fresh import time_round
from qopt.runtime.session import open_session


def measure_latency(
    models: Mapping[str, bytes | Path], image_shape: tuple[int, ...], *, batch: int = 1, repeats: int = 50
) -> dict[str, float]:
    """Seconds per run of every model on ``batch`` images of ``image_shape``, see `fastest`.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses a graph.
        UsageError: fewer than one repeat.
    """
    images = np.random.default_rng(0).random((batch, *image_shape), dtype=np.float32)
    sessions = {name: open_session(model) for name, model in models.items()}
    return fastest(
        {name: partial(s.run, None, {s.get_inputs()[0].name: images}) for name, s in sessions.items()}, repeats
    )


def fastest(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The shortest time in seconds of every call, after one that does not count.

    Each round makes every call once, in turn, so that a slow moment of the machine hits all of them; the minimum over
    ``repeats`` rounds is what the machine can do.
    """
    if repeats < 1:
        raise UsageError("too few repeats of a measurement", expected="at least 1", got=str(repeats))
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    for _ in range(repeats):
        time_round(calls, best)
    return best
