"""ONNX Runtime sessions on the CPU: quiet, with a fixed number of threads, and one way to run images through them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from qopt.errors import DataError, UnsupportedModelError
from qopt.runtime.fresh import session_options

BATCH = 250
"""Images per run where the batch axis is dynamic."""


def to_bytes(model: ir.Model) -> bytes:
    """The model as a serialized ONNX protobuf; deterministic for equal models.

    Initializers say themselves of what type and shape they are: what onnx_ir notes beside them is left out.
    """
    proto = ir.serde.serialize_model(model)
    stored = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return bytes(proto.SerializeToString(deterministic=True))


def open_session(
    model: bytes | Path, *, threads: int = 1, optimized: Path | None = None, lean: bool = False
) -> ort.InferenceSession:
    """A CPU session with all graph optimisations, or a lean one, see `session_options`.

    ``optimized`` names a file that receives the optimised graph.

    Raises:
        UnsupportedModelError: ONNX Runtime refuses the graph.
    """
    options = session_options(threads, optimized, lean=lean)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen unrelated classes here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            "ONNX Runtime cannot load the graph", where=None if isinstance(model, bytes) else model.name, got=reason
        ) from error


def run_feeds(session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
    """All outputs for the inputs that the session takes, by name; ``feeds`` may hold more."""
    return list(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}))


@final
class Runner:
    """Logits of one file for any number of images, in chunks that the graph accepts.

    Args:
        model: an emitted file or its bytes.
        batch: the only batch size the graph takes, or None where it takes any.
        threads: intra-operator threads.
    """

    def __init__(self, model: bytes | Path, *, batch: int | None = None, threads: int = 1) -> None:
        self.session = open_session(model, threads=threads)
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name
        self.batch = batch

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 (n, classes) of images float32 (n, ...) as the graph takes them; DataError without any."""
        if not len(images):
            raise DataError("no images to run through the graph", expected="at least one")
        size = self.batch or BATCH
        rows = [self._run(images[i : i + size]) for i in range(0, len(images), size)]
        return np.concatenate(rows)

    def _run(self, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(chunk)
        if self.batch is not None and count < self.batch:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], self.batch - count, axis=0)])
        logits: NDArray[np.float32] = self.session.run([self.output], {self.input: np.ascontiguousarray(chunk)})[0]
        return logits[:count]
