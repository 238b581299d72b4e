"""From whatever ONNX graph the user has to the one that qopt works on, proven to compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from qopt.errors import UnsupportedModelError, VerificationError
from qopt.graph import structure
from qopt.graph.batch_axis import fixed_batch, free_batch, repair_reshapes
from qopt.graph.compare import TOLERANCE, Array, Runner, difference, random_images
from qopt.graph.digest import digest
from qopt.graph.facts import find_layers, left_in_float
from qopt.graph.fold_batchnorm import fold_batchnorm
from qopt.graph.fold_constants import fold_constants, lift_constants
from qopt.graph.model import NOTES, Prepared
from qopt.graph.names import name_everything
from qopt.graph.opset import convert_opset
from qopt.graph.shapes import infer_shapes, set_batch


def prepare(model: ir.Model) -> Prepared:
    """Clean ``model``, which stays as it is, and prove in ONNX Runtime that the result computes the same.

    Functions are inlined, the opset is raised to 21, constants folded, identities, dropout and dead code removed, batch
    norms folded, names made unique and the batch axis freed. The names of inputs, outputs and weights, and metadata,
    survive. What cannot be proven on random images (relative difference 1e-5) is undone: first the folding of batch
    norms, then the freed batch axis.

    Raises:
        UnsupportedModelError: control flow, unknown operators, anything but one image in and logits out.
        CorruptModelError: a graph that is not valid ONNX, or with weights that are not finite.
        VerificationError: where the cleaned graph computes something else; a bug of qopt or of a library.
    """
    source, notes = _adopt(model)
    expected = _expected(source)
    converted, note = convert_opset(source)
    name_everything(converted)
    differs = expected.difference(Runner(converted)) if note else 0.0
    if differs > TOLERANCE:
        raise UnsupportedModelError(
            "the graph computes something else after the conversion to opset 21", expected=f"at most {TOLERANCE}",
            got=f"relative difference {differs:.1e}", fix="export it with opset 21",
        )  # fmt: skip
    candidate = _settle(converted, expected)
    return _finish(candidate, (*model.meta.get(NOTES, ()), *notes, *note, *candidate.notes))


@final
@dataclass(frozen=True)
class _Expected:
    """Images and what the user's graph computes for the first of them, in the batch size that it takes."""

    images: Array
    logits: NDArray[Any]

    def difference(self, runner: Runner) -> float:
        """How far another graph is from the user's, on the images that this one saw."""
        return difference(runner(self.images[: len(self.logits)]), self.logits)


@final
@dataclass(frozen=True)
class _Candidate:
    """A cleaned graph, the batch size it is bound to, and what was done."""

    model: ir.Model
    batch: int | None
    notes: tuple[str, ...]


def _adopt(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """A checked copy with one input and one output, everything named, nothing else changed."""
    source = structure.sorted_copy(model)
    passes.InlinePass()(source)
    passes.RemoveInitializersFromInputsPass()(source)
    structure.check_nodes(source)
    image = structure.image_input(source)
    notes = structure.keep_logits(source)
    structure.check_valid(source)
    lift_constants(source)
    passes.RemoveUnusedNodesPass()(source)
    structure.check_finite(source)
    name_everything(source)
    infer_shapes(source)
    structure.check_sizes(source)
    assert image is source.graph.inputs[0]
    return source, notes


def _expected(source: ir.Model) -> _Expected:
    image = source.graph.inputs[0]
    assert image.shape is not None
    runner, batch = Runner(source), fixed_batch(image)
    images = random_images([dim for dim in image.shape[1:] if isinstance(dim, int)], max(batch or 2, 3))
    try:
        logits = runner(images[: batch or 2])
    except UnsupportedModelError:
        if batch is not None:
            raise
        logits = runner(images[:1])  # a graph that declares any batch and takes one image is held to what it takes
    if logits.ndim != 2 or logits.shape[1] < 2 or logits.dtype != np.float32:
        raise UnsupportedModelError(
            "the first output is no row of logits per image", where=f"output {source.graph.outputs[0].name!r}",
            expected="float32 of shape (batch, classes), at least 2 classes", got=f"{logits.dtype} {logits.shape}",
        )  # fmt: skip
    if len(logits) != (batch or 2) and len(logits) != 1:
        raise UnsupportedModelError(
            "the logits are not one row per image", where=f"output {source.graph.outputs[0].name!r}",
            expected=f"{batch or 2} rows", got=str(len(logits)),
        )  # fmt: skip
    return _Expected(images, logits)


def _settle(source: ir.Model, expected: _Expected) -> _Candidate:
    """The most thoroughly cleaned graph that provably computes what ``source`` does."""
    failure = ""
    for candidate in _candidates(source, len(expected.logits)):
        try:
            runner = Runner(candidate.model)
            differs = expected.difference(runner)
            if candidate.batch is None:
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


def _candidates(source: ir.Model, taken: int) -> Iterator[_Candidate]:
    for free in (True, False):
        candidate, norms = _cleaned(source, taken, free, fold_norms=True)
        yield candidate
        if norms:
            yield _cleaned(source, taken, free, fold_norms=False)[0]


def _cleaned(source: ir.Model, taken: int, free: bool, fold_norms: bool) -> tuple[_Candidate, int]:
    """A cleaned copy, with the batch axis free or bound to ``taken``, and the number of norms folded."""
    model = source.clone()
    declared = fixed_batch(model.graph.inputs[0])
    if free:
        if declared is not None:
            repair_reshapes(model, declared)
        free_batch(model)
    elif declared is None:
        set_batch(model, taken)
    fold_constants(model)
    if free and declared is not None:
        repair_reshapes(model, declared)
        passes.RemoveUnusedNodesPass()(model)
    norms = fold_batchnorm(model) if fold_norms else 0
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    name_everything(model)
    infer_shapes(model)
    bound = None if free else declared or taken
    return _Candidate(model, bound, _notes(model, norms, declared, bound)), norms


def _notes(model: ir.Model, norms: int, declared: int | None, bound: int | None) -> tuple[str, ...]:
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
    if last is not None and last.op_type in ("Softmax", "LogSoftmax"):
        notes.append(f"the output is a {last.op_type}: attacks see probabilities and not logits")
    return tuple(notes)


def _batch_difference(runner: Runner, images: Array) -> float:
    """How far a batch is from its images one by one."""
    single = np.concatenate([runner(image[None]) for image in images])
    return difference(runner(images), single)


def _finish(candidate: _Candidate, notes: tuple[str, ...]) -> Prepared:
    model = candidate.model
    image, logits = model.graph.inputs[0], model.graph.outputs[0]
    assert image.shape is not None
    input_shape = tuple(dim for dim in image.shape[1:] if isinstance(dim, int))
    layers = find_layers(model, input_shape)
    return Prepared(
        model=model, input=str(image.name), output=str(logits.name), input_shape=input_shape,
        classes=_classes(candidate, input_shape), batch=candidate.batch, layers=layers,
        notes=(*notes, *left_in_float(model)), digest=digest(model, layers),
    )  # fmt: skip


def _classes(candidate: _Candidate, input_shape: tuple[int, ...]) -> int:
    """The number of logits; also writes the output's shape where inference could not tell it."""
    logits, image = candidate.model.graph.outputs[0], candidate.model.graph.inputs[0]
    last = logits.shape[-1] if logits.shape is not None and len(logits.shape) else None
    if isinstance(last, int):
        return last
    output = Runner(candidate.model)(np.zeros((candidate.batch or 1, *input_shape), np.float32))
    assert image.shape is not None
    logits.shape = ir.Shape([image.shape[0], output.shape[1]])
    return int(output.shape[1])
