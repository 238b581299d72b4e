"""Latency of several files, measured fairly on a noisy machine: interleaved, one thread, minimum over repeats."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qopt.runtime.session import open_session


def measure_latency(
    models: Mapping[str, bytes | Path], image_shape: tuple[int, ...], *, batch: int = 1, repeats: int = 50
) -> dict[str, float]:
    """Seconds per run of every model on ``batch`` images of ``image_shape``.

    Each round runs every model once, in turn, so that a slow moment of the machine hits all of them; the minimum over
    ``repeats`` rounds is what the machine can do.
    """
    images = np.random.default_rng(0).random((batch, *image_shape), dtype=np.float32)
    sessions = {name: open_session(model) for name, model in models.items()}
    feeds = {name: {s.get_inputs()[0].name: images} for name, s in sessions.items()}
    best = dict.fromkeys(models, float("inf"))
    for name, session in sessions.items():
        session.run(None, feeds[name])
    for _ in range(repeats):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds[name])
            best[name] = min(best[name], time.perf_counter() - began)
    return best
