"""From an applied plan to the bytes that ship, checked as a stock runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import onnx
import torch

from qopt import __version__
from qopt.emit import emit, integer_layers
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.job.run import Run
from qopt.measure.network import ArtefactClassifier, TwinClassifier, predictions
from qopt.quantize import Applied
from qopt.report.model import KernelFacts
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import Runner, to_bytes


@final
@dataclass(frozen=True, eq=False)
class Artefact:
    """An emitted file: its bytes, its quantized twin and itself as classifiers, and what the runtime makes of it."""

    data: bytes
    twin: TwinClassifier
    classifier: ArtefactClassifier
    kernels: KernelFacts


def float_artefact(run: Run) -> Artefact:
    """The prepared float network as a file."""
    data = to_bytes(run.prepared.model)
    return Artefact(data, run.float_twin, _classifier(run, data), _kernels(data))


def build_artefact(run: Run, applied: Applied, layer_metadata: Mapping[str, Mapping[str, str]]) -> Artefact:
    """Emit, check and load.

    Raises:
        VerificationError: the emitted graph is invalid.
    """
    metadata = {
        "qopt.version": __version__,
        "qopt.plan": applied.plan.digest,
        "qopt.kind": _kind(run.prepared, applied),
    }
    model = emit(run.prepared, applied.quantized, metadata=metadata, layer_metadata=layer_metadata)
    data = to_bytes(model)
    try:
        onnx.checker.check_model(data, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError("the emitted graph is not valid ONNX", got=str(error).splitlines()[0]) from error
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    classifier = _classifier(run, data)
    kernels = _kernels(data)
    if run.data is not None:
        images = torch.from_numpy(run.data.report.images)
        same = predictions(twin, images) == predictions(classifier, images)
        kernels = kernels.model_copy(update={"agreement": float(same.float().mean())})
    return Artefact(data, twin, classifier, kernels)


def _kind(prepared: Prepared, applied: Applied) -> str:
    """Whether integer kernels run the network, or weights are only stored in few bits."""
    quantized = set(applied.quantized.weights)
    return "integer" if quantized and quantized <= integer_layers(prepared, applied.quantized) else "simulated"


def _classifier(run: Run, data: bytes) -> ArtefactClassifier:
    return ArtefactClassifier(
        Runner(data, batch=run.prepared.batch, threads=torch.get_num_threads()), run.normalisation
    )


def _kernels(data: bytes) -> KernelFacts:
    kernels = count_kernels(data)
    return KernelFacts(integer=kernels.integer, floating=kernels.float_, counts=kernels.counts)
