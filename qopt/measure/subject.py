"""A model file under attack: itself in ONNX Runtime, which is what is judged, and its twin where it has one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import final

import onnx_ir as ir
from torch.fx import GraphModule, Node

from qopt.attacks import Classifier
from qopt.errors import ModelError, UnsupportedModelError, VerificationError
from qopt.graph.batch_axis import fixed_batch
from qopt.graph.formats import Format, identify
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin
from qopt.measure.network import ArtefactClassifier, Normalisation, TwinClassifier
from qopt.passes.insert_activation_quantizers import quantizes_activations
from qopt.runtime.session import Runner, to_bytes

ABSORBED = frozenset(
    {
        "BatchNormalization", "Cast", "Clip", "DequantizeLinear", "DynamicQuantizeLinear", "Identity", "QuantizeLinear",
        "Relu",
    }
)  # fmt: skip
"""Operators that make no difference of structure: codes that start at zero take over a ReLU or Clip before them, and
batch norms are folded in one file and not in another."""


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A classifier of images to be attacked.

    Attributes:
        name: the file's name without its ending.
        digest: SHA-256 of the file.
        artefact: the file as it is in ONNX Runtime; of other formats the ONNX graph that they were exported to.
        twin: the same with gradients; None where the importer cannot rebuild it, and only queries can be made.
        no_twin: why there is none, one clause; empty where there is one.
        staircase: whether gradients meet quantized activations, which straight-through and BPDA pass differently.
        input_shape: shape of one image.
        content: SHA-256 of everything that computes: the file, weights beside it, what a factory builds.
        outline: the operators of the graph with the shapes of their weights, sorted, but for those that quantization
            adds or absorbs; empty where there is no twin. Equal ones are the same structure.
    """

    name: str
    digest: str
    artefact: ArtefactClassifier
    twin: TwinClassifier | None
    no_twin: str
    staircase: bool
    input_shape: tuple[int, ...]
    content: str = ""
    outline: tuple[str, ...] = ()

    @property
    def gradients(self) -> Classifier:
        """What attacks by gradients are made on; raises UnsupportedModelError where there is no twin."""
        if self.twin is None:
            raise UnsupportedModelError("the model has no gradients", where=self.name, got=self.no_twin)
        return self.twin


def open_subject(
    path: Path,
    normalisation: Normalisation,
    *,
    factory: str | None = None,
    trust: bool = False,
    input_shape: tuple[int, ...] | None = None,
    threads: int = 1,
) -> Subject:
    """Load a model of any kind that `qopt.graph.load` takes, quantized by anyone.

    A model that the importer refuses, or whose cleaned graph computes something else, has no twin.

    Raises:
        UsageError: the path, the factory or the shape is wrong.
        ModelError: it cannot be loaded, or classifies no images.
    """
    model = load_model(path, factory=factory, trust=trust, input_shape=input_shape)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    own = path if identify(path) is Format.ONNX else to_bytes(model)
    content = _content(model, digest, own)
    twin, no_twin, shape = _twin(model, normalisation, path.stem)
    runner = Runner(own, batch=fixed_batch(model.graph.inputs[0]), threads=threads)
    artefact = ArtefactClassifier(runner, normalisation)
    staircase = twin is not None and quantizes_activations(twin.graph)
    outline = () if twin is None else _outline(twin.graph)
    return Subject(path.stem, digest, artefact, twin, no_twin, staircase, shape, content, outline)


def _content(model: ir.Model, digest: str, own: Path | bytes) -> str:
    if isinstance(own, bytes):
        return hashlib.sha256(own).hexdigest()
    content = hashlib.sha256(digest.encode())
    for name, value in model.graph.initializers.items():  # those of an ONNX file may lie in a file beside it
        if value.const_value is not None:
            content.update(name.encode("utf-8", "backslashreplace") + value.const_value.tobytes())
    return content.hexdigest()


def _twin(
    model: ir.Model, normalisation: Normalisation, name: str
) -> tuple[TwinClassifier | None, str, tuple[int, ...]]:
    try:
        prepared = prepare(model)
        if not prepared.image:
            raise ModelError("no classifier of images", where=name, got=prepared.other)
        graph = build_twin(prepared)
    except (UnsupportedModelError, VerificationError) as error:
        return None, str(error), _image_shape(model, name)
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return TwinClassifier(graph, normalisation, prepared.batch), "", prepared.input_shape


def _outline(graph: GraphModule) -> tuple[str, ...]:
    steps = []
    for node in graph.graph.nodes:
        operator = node.meta.get("op")
        if operator is not None and operator not in ABSORBED:
            sizes = [_sizes(graph, argument) for argument in node.args if isinstance(argument, Node)]
            steps.append(" ".join([operator, *filter(None, sizes)]))
    return tuple(sorted(steps))  # branches come in any order


def _sizes(graph: GraphModule, node: Node) -> str:
    """Of a weight; biases come and go with batch norms."""
    shape = tuple(graph.get_buffer(str(node.target)).shape) if node.op == "get_attr" else ()
    return str(shape) if len(shape) > 1 else ""


def _image_shape(model: ir.Model, name: str) -> tuple[int, ...]:
    image = model.graph.inputs[0]
    sizes = () if image.shape is None else tuple(image.shape)[1:]
    if len(model.graph.inputs) != 1 or image.dtype != ir.DataType.FLOAT or not all(isinstance(s, int) for s in sizes):
        raise ModelError(
            "no classifier of images", where=name, expected="one float input of a known size", got=str(image)
        )
    return tuple(int(size) for size in sizes if isinstance(size, int))
