"""From whatever ONNX graph the user has to the one that qopt works on, proven to compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from qopt.errors import UnsupportedModelError, UsageError, VerificationError
from qopt.graph import structure
from qopt.graph.batch_axis import fixed_batch, free_batch, repair_reshapes
from qopt.graph.compare import TOLERANCE, Array, Runner, difference, largest_difference, random_images
from qopt.graph.digest import digest
from qopt.graph.example import graph_inputs, running_examples
from qopt.graph.facts import find_layers, left_in_float
from qopt.graph.fold_batchnorm import fold_batchnorm
from qopt.graph.fold_constants import fold_constants, lift_constants
from qopt.graph.model import NOTES, Feeds, Prepared
from qopt.graph.names import name_everything
from qopt.graph.opset import convert_opset
from qopt.graph.shapes import infer_shapes, set_batch
from qopt.graph.split_sequences import split_sequences
from qopt.graph.stored import release, turn_stored_matrices
from qopt.graph.tied_tables import tie_tables

BatchAxis = Literal["freed", "bound", "as declared"]
"""What becomes of the batch axis; only that of a classifier of images is touched."""

NO_AXES: Final[Mapping[str, int]] = {}


def prepare(model: ir.Model, axes: Mapping[str, int] = NO_AXES) -> Prepared:
    """Clean ``model``, which stays as it is, and prove in ONNX Runtime that the result computes the same.

    Functions are inlined, the opset is raised to 21, constants folded, identities, dropout and dead code removed, batch
    norms folded and names made unique. The names of inputs, outputs and weights, and metadata, survive. Of a classifier
    of images, one float image in and one row of logits out, the first output is kept and the batch axis freed; any
    other graph keeps its axes and all its outputs. What cannot be proven on random inputs (relative difference 1e-5) is
    undone: first the folding of batch norms, then the freed batch axis.

    Args:
        model: as loaded.
        axes: sizes that dynamic axes have in the inputs that are drawn for a network that is no classifier of images,
            by the name of the axis or ``INPUT.AXIS``; all others are tried.

    Raises:
        UnsupportedModelError: control flow, unknown operators, inputs that cannot be drawn or that nothing drawn fits.
        CorruptModelError: a graph that is not valid ONNX, or with weights that are not finite.
        UsageError: ``axes`` that the graph does not have.
        VerificationError: where the cleaned graph computes something else; a bug of qopt or of a library.
    """
    source = _adopt(model)
    release(source)
    expected = _expected(source, axes)
    dropped = _keep_logits(source) if expected.image else ()
    converted, note = convert_opset(source)
    name_everything(converted)
    differs = expected.difference(Runner(converted)) if note else 0.0
    if differs > TOLERANCE:
        raise UnsupportedModelError(
            "the graph computes something else after the conversion to opset 21", expected=f"at most {TOLERANCE}",
            got=f"relative difference {differs:.1e}", fix="export it with opset 21",
        )  # fmt: skip
    candidate = _settle(converted, expected)
    return _finish(candidate, expected, (*model.meta.get(NOTES, ()), *dropped, *note, *candidate.notes))


@final
@dataclass(frozen=True)
class _Expected:
    """What the user's graph computes.

    Attributes:
        other: why it is no classifier of images; empty where it is.
        runs: inputs with the outputs for them; of a classifier the logits, of as many images as it takes at once.
        images: three images or more, of which the run saw the first; None where the network is none for images.
    """

    other: str
    runs: tuple[tuple[Feeds, list[Any]], ...]
    images: Array | None = None

    @property
    def image(self) -> bool:
        return self.images is not None

    @property
    def taken(self) -> int:
        """How many images the graph took at once."""
        return len(self.runs[0][1][0])

    def difference(self, runner: Runner) -> float:
        """How far another graph is from the user's, on the inputs that this one saw."""
        return max(largest_difference(runner.all(feeds), outputs) for feeds, outputs in self.runs)


@final
@dataclass(frozen=True)
class _Candidate:
    """A cleaned graph, the batch size it is bound to, and what was done."""

    model: ir.Model
    batch: int | None
    notes: tuple[str, ...]


def _adopt(model: ir.Model) -> ir.Model:
    """A checked copy, everything named, nothing else changed."""
    source = structure.sorted_copy(model)
    passes.InlinePass()(source)
    split_sequences(source)
    passes.RemoveInitializersFromInputsPass()(source)
    structure.check_nodes(source)
    structure.free_negative_sizes(source)
    structure.check_interface(source)
    structure.check_valid(source)
    lift_constants(source)
    passes.RemoveUnusedNodesPass()(source)
    structure.check_finite(source)
    name_everything(source)
    infer_shapes(source)
    structure.check_sizes(source)
    return source


def _keep_logits(source: ir.Model) -> tuple[str, ...]:
    notes = structure.keep_logits(source)
    passes.RemoveUnusedNodesPass()(source)
    return notes


def _expected(source: ir.Model, axes: Mapping[str, int]) -> _Expected:
    other = structure.takes_no_image(source)
    if not other:
        images, logits = _run_images(source)
        other = _no_logits(source, logits, fixed_batch(source.graph.inputs[0]) or 2)
        if not other and axes:
            raise UsageError("images have one size, and any batch is taken", where=f"--axis {next(iter(axes))}")
        if not other:
            return _Expected("", (({str(source.graph.inputs[0].name): images[: len(logits)]}, [logits]),), images)
    return _Expected(other, tuple(running_examples(source, axes)))


def _run_images(source: ir.Model) -> tuple[Array, NDArray[Any]]:
    """Images, and the first output for the first of them, in the batch size that the graph takes."""
    image = source.graph.inputs[0]
    assert image.shape is not None
    runner, batch = Runner(source), fixed_batch(image)
    images = random_images([dim for dim in image.shape[1:] if isinstance(dim, int)], max(batch or 2, 3))
    try:
        return images, runner(images[: batch or 2])
    except UnsupportedModelError:
        if batch is not None:
            raise
        # a graph that declares any batch and takes one image is held to what it takes
        return images, runner(images[:1])


def _no_logits(source: ir.Model, logits: Any, images: int) -> str:
    """Why the first output for ``images`` images is no row of logits for each, in one clause; empty where it is."""
    name = repr(source.graph.outputs[0].name)
    if not isinstance(logits, np.ndarray) or source.graph.outputs[0].producer() is None:
        return f"its first output {name} is no row of logits per image"
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.dtype != np.float32:
        return f"its first output {name} is no row of logits per image but {logits.dtype} {logits.shape}"
    if len(logits) not in (1, images):
        return f"its first output {name} is not one row of logits per image but {len(logits)} for {images} images"
    return ""


def _settle(source: ir.Model, expected: _Expected) -> _Candidate:
    """The most thoroughly cleaned graph that provably computes what ``source`` does."""
    failure = ""
    for candidate in _candidates(source, expected):
        try:
            runner = Runner(candidate.model)
            differs = expected.difference(runner)
            if candidate.batch is None and expected.images is not None:
                differs = max(differs, _batch_difference(runner, expected.images))
        except UnsupportedModelError as error:
            failure = str(error)
            continue
        if differs <= TOLERANCE:
            return candidate
        failure = f"relative difference {differs:.1e}"
    raise VerificationError(
        "the cleaned graph computes something else", where=f"graph {source.graph.name!r}",
        expected=f"a relative difference of at most {TOLERANCE}", got=failure,
    )  # fmt: skip


def _candidates(source: ir.Model, expected: _Expected) -> Iterator[_Candidate]:
    axes: tuple[BatchAxis, ...] = ("freed", "bound") if expected.image else ("as declared",)
    norms = -1
    for axis, fold in product(axes, (True, False)):
        if fold or norms:
            candidate, norms = _cleaned(source, expected, axis, fold_norms=fold)
            yield candidate


def _cleaned(source: ir.Model, expected: _Expected, axis: BatchAxis, *, fold_norms: bool) -> tuple[_Candidate, int]:
    """A cleaned copy and the number of norms folded."""
    model = source.clone()
    declared = fixed_batch(model.graph.inputs[0]) if expected.image else None
    if axis == "freed":
        if declared is not None:
            repair_reshapes(model, declared)
        free_batch(model)
    elif axis == "bound" and declared is None:
        set_batch(model, expected.taken)
    turn_stored_matrices(model)
    fold_constants(model)
    if axis == "freed" and declared is not None:
        repair_reshapes(model, declared)
        passes.RemoveUnusedNodesPass()(model)
    norms = fold_batchnorm(model) if fold_norms else 0
    if not expected.image:
        tie_tables(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    name_everything(model)
    infer_shapes(model)
    bound = (declared or expected.taken) if axis == "bound" else None
    return _Candidate(model, bound, _notes(model, norms, declared, bound, expected)), norms


def _notes(
    model: ir.Model, norms: int, declared: int | None, bound: int | None, expected: _Expected
) -> tuple[str, ...]:
    notes = []
    if norms:
        notes.append(f"batch norm folded into {norms} layer{'s' if norms > 1 else ''}")
    kept = sum(node.op_type == "BatchNormalization" for node in model.graph)
    if kept:
        notes.append(f"{kept} batch norm{'s' if kept > 1 else ''} left in place")
    if bound is not None:
        notes.append(f"batch axis fixed to {bound}: freeing it changes what the graph computes")
    elif declared is not None:
        notes.append("batch axis made dynamic")
    last = model.graph.outputs[0].producer()
    if expected.image and last is not None and last.op_type in ("Softmax", "LogSoftmax"):
        notes.append(f"the output is a {last.op_type}: attacks see probabilities and not logits")
    return tuple(notes)


def _batch_difference(runner: Runner, images: Array) -> float:
    """How far a batch is from its images one by one."""
    single = np.concatenate([runner(image[None]) for image in images])
    return difference(runner(images), single)


def _finish(candidate: _Candidate, expected: _Expected, notes: tuple[str, ...]) -> Prepared:
    model = candidate.model
    example, outputs = expected.runs[0]
    input_shape: tuple[int, ...] = ()
    classes = 0
    if expected.images is not None:
        input_shape, classes = expected.images.shape[1:], int(outputs[0].shape[1])
        example = {name: images[: candidate.batch or 1] for name, images in example.items()}
    _declare_outputs(model, expected)
    layers = find_layers(model, example, tables=not expected.image)
    content = digest(model, layers)
    release(model)
    return Prepared(
        model=model, inputs=graph_inputs(model), other=expected.other, input=str(model.graph.inputs[0].name),
        output=str(model.graph.outputs[0].name), input_shape=input_shape, classes=classes, batch=candidate.batch,
        layers=layers, notes=(*notes, *left_in_float(model, tables=not expected.image)), digest=content,
        example=example,
    )  # fmt: skip


def _declare_outputs(model: ir.Model, expected: _Expected) -> None:
    """Write the shapes of outputs where inference could not tell them: what an ONNX file must say."""
    if expected.image:
        logits, image = model.graph.outputs[0], model.graph.inputs[0]
        if logits.shape is None or not len(logits.shape) or not isinstance(logits.shape[-1], int):
            assert image.shape is not None
            logits.shape = ir.Shape([image.shape[0], expected.runs[0][1][0].shape[1]])
        return
    for value, output in zip(model.graph.outputs, expected.runs[0][1], strict=True):
        if value.shape is None and isinstance(output, np.ndarray):
            value.shape = ir.Shape([None] * output.ndim)
