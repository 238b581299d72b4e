"""From an applied plan to the bytes that ship, checked as a stock runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import onnx
import torch

from qopt import __version__
from qopt.emit import check_weight_only, emit, integer_layers
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.job.run import Run
from qopt.measure.network import ArtefactClassifier, TwinClassifier, predictions
from qopt.quantize import Applied, AppliedWeights
from qopt.report.model import KernelFacts
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import Runner, to_bytes


@dataclass(frozen=True, eq=False)
class EmittedFile:
    """A file that ships, or the float one beside it: its bytes, and what the runtime makes of it."""

    data: bytes
    kernels: KernelFacts


@final
@dataclass(frozen=True, eq=False)
class Artefact(EmittedFile):
    """An emitted file with its quantized twin and itself as classifiers."""

    twin: TwinClassifier
    classifier: ArtefactClassifier


def float_file(run: Run) -> EmittedFile:
    """The prepared float network as a file."""
    data = to_bytes(run.prepared.model)
    return EmittedFile(data, _kernels(data))


def float_artefact(run: Run) -> Artefact:
    """The prepared float network as a file, with its twin."""
    file = float_file(run)
    return Artefact(file.data, file.kernels, run.float_twin, _classifier(run, file.data))


def build_file(run: Run, applied: AppliedWeights, layer_metadata: Mapping[str, Mapping[str, str]]) -> EmittedFile:
    """Emit, check and load. A file that quantizes weights alone is run against the same weights in float.

    Raises:
        VerificationError: the emitted graph is invalid, or another one than it must be.
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
    if not applied.quantized.activations and not applied.quantized.biases:
        check_weight_only(run.prepared, applied.quantized, model, data)
    return EmittedFile(data, _kernels(data))


def build_artefact(run: Run, applied: Applied, layer_metadata: Mapping[str, Mapping[str, str]]) -> Artefact:
    """A file as `build_file` makes it, with its twin, compared with it on the report images.

    Raises:
        VerificationError: as `build_file`.
    """
    file = build_file(run, applied, layer_metadata)
    kernels = file.kernels
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    classifier = _classifier(run, file.data)
    if run.data is not None:
        images = torch.from_numpy(run.data.report.images)
        same = predictions(twin, images) == predictions(classifier, images)
        kernels = kernels.model_copy(update={"agreement": float(same.float().mean())})
    return Artefact(file.data, kernels, twin, classifier)


def _kind(prepared: Prepared, applied: AppliedWeights) -> str:
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
