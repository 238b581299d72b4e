"""The last check before anything is written: the bytes that ship, in a process that has ONNX Runtime and numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import numpy as np
import torch
from numpy.typing import NDArray

from qopt.emit import AGREES, check_shipped, dequantized
from qopt.errors import VerificationError
from qopt.graph.compare import largest_difference
from qopt.graph.model import Feeds
from qopt.job.artefact import EmittedFile
from qopt.job.run import Run
from qopt.quantize import Applied, AppliedWeights, whole_batches
from qopt.report.model import KernelFacts
from qopt.runtime.external import loadable, to_files
from qopt.runtime.process import FreshRun, run_fresh
from qopt.runtime.session import open_session, run_feeds

IMAGES: Final = 8
"""Report images that the file is run on; of a graph bound to one batch size, one batch."""

CODES_AGREE: Final = 0.05
"""Largest relative difference of the median image where activations are quantized.

A sum that lies between two codes may be rounded to either, and what follows is another image's. Measured on three
public networks with 2 to 8 bits: below 5e-5 for the median image, up to 0.022 for the worst of 32.
"""


@final
@dataclass(frozen=True, eq=False)
class Verified:
    """What the fresh process found.

    Attributes:
        file: the emitted file with the kernels and the difference that were found there.
        latency: items in a run to seconds by network, ``qopt`` and ``float``; empty where the batch size is fixed.
    """

    file: EmittedFile
    latency: dict[str, dict[str, float]]


def verify(run: Run, applied: AppliedWeights, file: EmittedFile, reference: EmittedFile | None) -> Verified:
    """Check ``file`` as it ships against the quantized network, and time it against the float ``reference``.

    A streamed network has none; its weights were compared one by one, so that the fresh process must compute what this
    one does with the file, without folding, and nothing is timed.

    Report images where there are some, else the prepared network's example; `IMAGES` of them or one batch.

    Raises:
        VerificationError: a layer that the plan quantizes is float in the file, it does not run in a fresh process, or
            its outputs there are further from the quantized graph's than `AGREES`, or with quantized activations
            `CODES_AGREE`.
    """
    check_shipped(run.prepared, applied.quantized, file.data)
    feeds = _feeds(run)
    expected = _expected(run, applied, file, feeds)
    items = None if not run.prepared.image else run.prepared.batch or 1
    files = {"qopt": file.parts, **({"float": reference.parts} if reference is not None else {})}
    found = run_fresh(files, feeds, items=items, lean=run.streamed)
    differs, allowed = _difference(found.outputs, expected, applied)
    if not differs <= allowed:
        raise VerificationError(
            "the file that ships computes something else than the quantized network", expected=f"at most {allowed:g}",
            got=f"relative difference {differs:.2g} in a fresh process",
        )  # fmt: skip
    kernels = found.kernels
    facts = KernelFacts(
        integer=kernels.integer, floating=kernels.float_, counts=kernels.counts, agreement=file.kernels.agreement,
        difference=_rounded_up(differs),
    )  # fmt: skip
    return Verified(replace(file, kernels=facts), _latency(run, feeds, found))


def image_difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """``|got - expected| / |expected|`` (Euclidean norms) of the median image; outputs (n, ...) of one shape.

    Infinite for other shapes, NaN where one of the two is no number.
    """
    if got.shape != expected.shape:
        return float("inf")
    a, b = (values.reshape(len(expected), -1).astype(np.float64) for values in (got, expected))
    length = np.maximum(np.linalg.norm(b, axis=1), np.finfo(np.float32).tiny)
    return float(np.median(np.linalg.norm(a - b, axis=1) / length))


def _feeds(run: Run) -> Feeds:
    if run.data is None:
        return run.prepared.example
    images = torch.from_numpy(run.data.report.images[: run.prepared.batch or IMAGES].copy())
    return {run.prepared.input: whole_batches(run.normalisation(images), run.prepared.batch).numpy()}


def _expected(run: Run, applied: AppliedWeights, file: EmittedFile, feeds: Feeds) -> Sequence[NDArray[Any]]:
    """The outputs of the quantized graph: of the twin where there is one, else of the same weights in float."""
    if isinstance(applied, Applied):
        with torch.no_grad():
            logits: torch.Tensor = applied.graph(torch.from_numpy(feeds[run.prepared.input]))
        return [logits.numpy()]
    parts = file.parts if run.streamed else to_files(dequantized(run.prepared, applied.quantized))
    with loadable(parts) as source:
        return run_feeds(open_session(source, lean=run.streamed), feeds)


def _difference(got: Sequence[NDArray[Any]], expected: Sequence[Any], applied: AppliedWeights) -> tuple[float, float]:
    """How far the outputs are apart and how far they may be."""
    parts = [np.asarray(part) for value in expected for part in (value if isinstance(value, list) else [value])]
    if applied.quantized.activations and len(got) == len(parts) == 1:
        return image_difference(got[0], parts[0]), CODES_AGREE
    return largest_difference(got, parts), AGREES


def _rounded_up(differs: float) -> float:
    """The next power of ten, at least 1e-6: reports are equal byte for byte whatever the last bits are."""
    return float(f"1e{math.ceil(math.log10(max(differs, 1e-6)))}")


def _latency(run: Run, feeds: Feeds, found: FreshRun) -> dict[str, dict[str, float]]:
    if run.prepared.batch is not None or run.streamed:
        return {}
    count = 1 if run.prepared.image else (*feeds[run.prepared.input].shape, 1)[0]
    return {str(count): {name: round(found.seconds[name], 9) for name in ("float", "qopt")}}
