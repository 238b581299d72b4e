"""From an applied plan to the bytes that ship, checked as a stock runtime sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import onnx
import onnx_ir as ir
import torch

from qopt import __version__
from qopt.emit import check_structure, check_weight_only, check_weights, emit, fused_layers, lower_opset
from qopt.errors import VerificationError
from qopt.graph.stored import StoredTensor, outside
from qopt.job.run import Run
from qopt.measure.network import ArtefactClassifier, TwinClassifier, predictions
from qopt.quantize import Applied, AppliedWeights
from qopt.report.model import KernelFacts
from qopt.runtime.external import DATA, LARGEST_FILE, MODEL, loadable, to_files
from qopt.runtime.kernels import Kernels, count_kernels, kernels_in
from qopt.runtime.session import Runner


@dataclass(frozen=True, eq=False)
class EmittedFile:
    """A file that ships, or the float one beside it: its bytes, and what the runtime makes of it."""

    data: bytes
    kernels: KernelFacts
    external: bytes = field(default=b"", kw_only=True)
    """What lies beside it as ``model.onnx.data``; empty where one file holds it all."""

    @property
    def parts(self) -> dict[str, bytes]:
        """The files by name, the model first."""
        return {MODEL: self.data, **({DATA: self.external} if self.external else {})}

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return len(self.data) + len(self.external)


@final
@dataclass(frozen=True, eq=False)
class Artefact(EmittedFile):
    """An emitted file with its quantized twin and itself as classifiers."""

    twin: TwinClassifier
    classifier: ArtefactClassifier


def float_file(run: Run, *, largest: int = LARGEST_FILE) -> EmittedFile:
    """The prepared float network as a file; ``largest`` as `to_files` takes it."""
    parts = to_files(run.prepared.model, largest)
    with loadable(parts) as file:
        return EmittedFile(parts[MODEL], _kernels(file), external=parts.get(DATA, b""))


def float_size(model: ir.Model) -> int:
    """Bytes of the graph and its weights as ONNX files, without writing them."""
    graph, _ = outside(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return len(graph) + sum(tensor.nbytes for tensor in tensors if isinstance(tensor, StoredTensor))


def float_artefact(run: Run) -> Artefact:
    """The prepared float network as a file, with its twin."""
    file = float_file(run)
    return _classified(run, file, run.float_twin)


def build_file(
    run: Run,
    applied: AppliedWeights,
    layer_metadata: Mapping[str, Mapping[str, str]],
    *,
    largest: int = LARGEST_FILE,
) -> EmittedFile:
    """Emit, check and load. A file that quantizes weights alone is run against the same weights in float.

    Of a streamed network each weight is compared by itself, and the operators are counted as the file has them.

    Raises:
        VerificationError: the emitted graph is invalid, or another one than it must be.
        PlanError: a format that the dialect asked for does not have.
    """
    metadata = {
        "qopt.version": __version__,
        "qopt.plan": applied.plan.digest,
        "qopt.kind": _kind(run, applied),
    }
    model = emit(
        run.prepared, applied.quantized, metadata=metadata, layer_metadata=layer_metadata, dialect=run.options.dialect,
        memory=run.options.memory,
    )  # fmt: skip
    parts = to_files(lower_opset(model, run.prepared.example, lean=run.streamed), largest)
    with loadable(parts) as file:
        try:
            onnx.checker.check_model(file, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise VerificationError("the emitted graph is not valid ONNX", got=str(error).splitlines()[0]) from error
        if run.streamed:
            check_structure(run.prepared, applied.quantized, model)
            check_weights(run.prepared, applied.quantized, model)
            return EmittedFile(parts[MODEL], _facts(kernels_in(file)), external=parts.get(DATA, b""))
        if not applied.quantized.activations and not applied.quantized.biases:
            check_weight_only(run.prepared, applied.quantized, model, file)
        return EmittedFile(parts[MODEL], _kernels(file), external=parts.get(DATA, b""))


def build_artefact(run: Run, applied: Applied, layer_metadata: Mapping[str, Mapping[str, str]]) -> Artefact:
    """A file as `build_file` makes it, with its twin, compared with it on the report images.

    Raises:
        VerificationError, PlanError: as `build_file`.
    """
    twin = TwinClassifier(applied.graph, run.normalisation, run.prepared.batch)
    artefact = _classified(run, build_file(run, applied, layer_metadata), twin)
    if run.data is None:
        return artefact
    images = torch.from_numpy(run.data.report.images)
    same = predictions(twin, images) == predictions(artefact.classifier, images)
    return replace(artefact, kernels=artefact.kernels.model_copy(update={"agreement": float(same.float().mean())}))


def _classified(run: Run, file: EmittedFile, twin: TwinClassifier) -> Artefact:
    with loadable(file.parts) as source:
        runner = Runner(source, batch=run.prepared.batch, threads=torch.get_num_threads())
    classifier = ArtefactClassifier(runner, run.normalisation)
    return Artefact(file.data, file.kernels, twin, classifier, external=file.external)


def _kind(run: Run, applied: AppliedWeights) -> str:
    """Whether integer kernels run the network, or weights are only stored in few bits."""
    quantized = set(applied.quantized.weights)
    fused = fused_layers(run.prepared, applied.quantized, run.options.dialect)
    return "integer" if quantized and quantized <= fused else "simulated"


def _kernels(data: bytes | Path) -> KernelFacts:
    return _facts(count_kernels(data))


def _facts(kernels: Kernels) -> KernelFacts:
    return KernelFacts(integer=kernels.integer, floating=kernels.float_, counts=kernels.counts)
