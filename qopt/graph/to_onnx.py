"""PyTorch to ONNX: `torch.export`, then `torch.onnx` without its optimizer, so that `prepare` sees every operator."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qopt.errors import UnsupportedModelError, UsageError
from qopt.graph.model import NOTES
from qopt.graph.stored import TensorFile

OPSET: Final = 21

NAME_SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""The one metadata key that nodes keep: the list of module paths from the root to the node."""

_WAYS_OUT = (
    "rewrite that part of forward(), give a program that you exported yourself (torch.export.save), "
    "or give an ONNX file"
)
_TRAINING_FLAG = {
    "aten.batch_norm.default": 5,
    "aten.native_batch_norm.default": 5,
    "aten._native_batch_norm_legit.default": 5,
    "aten.dropout.default": 2,
    "aten.dropout_.default": 2,
    "aten.native_dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.alpha_dropout.default": 2,
}
"""Operators that behave otherwise in training, and the position of the argument that says so."""

_QUOTED_LINE = re.compile(r'File "([^"]+)", line (\d+), in [^\n]+\n\s+([^\n]+)')
_OPERATOR = re.compile(r"op='([\w.]+)'")
_IN_PLAIN_WORDS = (
    (
        re.compile(r"DataDependentSymNode: Could not extract"),
        "a size or a number that depends on the values of the input",
    ),
    (re.compile(r"DataDependentSymNode"), "a branch or a size that depends on the values of the input"),
    (re.compile(r"\.numpy\(\) is not supported"), "a tensor that leaves torch for numpy"),
)
"""How torch's words begin that say nothing to who does not know it, and what they mean."""

_NOT_THE_USERS = tuple(
    str(Path(folder).resolve()) + "/"
    for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent, sysconfig.get_path("stdlib"))
)
_LIBRARIES = ("/site-packages/onnx", "/site-packages/sympy/", "/site-packages/numpy/")


def module_to_onnx(
    module: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    *,
    example: tuple[Any, ...] | None = None,
    stored: TensorFile | None = None,
) -> ir.Model:
    """Export ``module`` in evaluation mode; its own mode is restored.

    Args:
        module: takes images of shape (batch, *input_shape), returns logits (batch, classes), or a tuple or dict of
            which the entry ``logits``, else the first tensor, is kept.
        input_shape: shape of one image, such as (3, 32, 32); needed where there is no ``example``.
        example: positional arguments of forward() instead; axis 0 of every tensor is the batch.
        stored: a file that parameters are views of; those are not copied into the graph.

    Returns:
        The model, opset 21, with a dynamic batch axis where the module allows it (else batch 1, or the example's own,
        and a note says so). Initializers keep the parameters' qualified names; ``meta[NOTES]`` lists notes.

    Raises:
        UsageError: neither ``input_shape`` nor ``example``, or a shape that is none.
        UnsupportedModelError: parameters that are not float32 on the CPU, or torch cannot export the module.
    """
    dynamic, static = _examples(input_shape, example)
    _check_parameters(module)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with contextlib.suppress(_Failed):
            return _convert(_export(module, dynamic, batched=True), [], stored)
        note = f"the batch axis is fixed at {_batch(static)}: torch could not export it as dynamic"
        return _convert(_export(module, static, batched=False), [note], stored)
    except _Failed as failed:
        raise failed.error from failed.error.__cause__
    finally:
        for part, training in modes.items():
            part.training = training


def program_to_onnx(program: ExportedProgram) -> ir.Model:
    """Translate an exported program, opset 21, with whatever axes it has dynamic.

    Raises UnsupportedModelError where it was exported in training mode or torch.onnx cannot translate it.
    """
    try:
        return _convert(program, [])
    except _Failed as failed:
        raise failed.error from failed.error.__cause__


def check_input_shape(input_shape: tuple[int, ...]) -> None:
    """Raise UsageError unless ``input_shape`` is one or more positive integers."""
    if not input_shape or not all(type(size) is int and size > 0 for size in input_shape):
        raise UsageError(
            "an input shape must be positive integers", where="--input-shape", expected="C,H,W, such as 3,32,32",
            got=",".join(map(str, input_shape)) or "nothing",
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's prints, logs and warnings away from stdout and stderr: the library is silent."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


class _Failed(Exception):
    """An export that failed in torch, with the error to show if no other way works."""

    def __init__(self, error: UnsupportedModelError) -> None:
        super().__init__(str(error))
        self.error = error


def _examples(
    input_shape: tuple[int, ...] | None, example: tuple[Any, ...] | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments for the dynamic export, of batch 2 or more (torch specialises on 1), and for the static one."""
    if input_shape is not None:
        check_input_shape(input_shape)
    if example is None:
        if input_shape is None:
            raise UsageError("the shape of an image is not known", fix="give data, or --input-shape C,H,W")
        return (torch.zeros(2, *input_shape),), (torch.zeros(1, *input_shape),)
    first = next((a for a in example if isinstance(a, torch.Tensor)), None)
    if first is None or first.dim() == 0:
        raise UsageError(
            "example inputs need a tensor with a batch axis", got=repr([type(a).__name__ for a in example])
        )
    if input_shape is not None and tuple(first.shape[1:]) != input_shape:
        raise UsageError(
            "the example input has another shape", where="--input-shape", expected=str(tuple(first.shape[1:])),
            got=str(input_shape),
        )  # fmt: skip
    doubled = tuple(
        torch.cat([a, a]) if isinstance(a, torch.Tensor) and a.dim() and len(a) == 1 else a for a in example
    )
    return doubled, example


def _batch(arguments: tuple[Any, ...]) -> int:
    return next(len(a) for a in arguments if isinstance(a, torch.Tensor))


def _check_parameters(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise UnsupportedModelError(
                "the model is not on the CPU", where=name, got=str(tensor.device), fix="model.cpu()"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and isinstance(tensor, nn.Parameter):
            raise UnsupportedModelError(
                "parameters must be float32", where=name, got=str(tensor.dtype).removeprefix("torch."),
                fix="model.float()",
            )  # fmt: skip


def _export(module: nn.Module, arguments: tuple[Any, ...], *, batched: bool) -> ExportedProgram:
    shapes: tuple[Any, ...] | None = None
    if batched:
        axis, size = Dim("batch"), _batch(arguments)
        shapes = tuple(
            {0: axis} if isinstance(a, torch.Tensor) and a.dim() and len(a) == size else None for a in arguments
        )
    try:
        with quiet():
            return torch.export.export(module, arguments, dynamic_shapes=shapes)
    except Exception as error:  # tracing runs the user's forward(), which may raise anything
        what = f"torch.export cannot trace the model with {_described(arguments)}"
        raise _Failed(_failure(what, error)) from error


def _described(arguments: tuple[Any, ...]) -> str:
    """The inputs that it was traced with, such as ``an input of shape (2, 3, 32, 32)``."""
    shapes = [str(tuple(a.shape)) for a in arguments if isinstance(a, torch.Tensor)]
    return f"an input of shape {shapes[0]}" if len(arguments) == 1 else f"inputs of shape {', '.join(shapes)}"


def _convert(program: ExportedProgram, notes: list[str], stored: TensorFile | None = None) -> ir.Model:
    _check_program(program)
    try:
        with quiet():
            exported = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )  # fmt: skip
    except Exception as error:  # the exporter wraps failures of decompositions, dispatch and shape inference
        raise _Failed(_failure("torch.onnx cannot translate the program", error, program)) from error
    assert exported is not None
    model: ir.Model = exported.model
    notes = [*notes, *_keep_logits(model, program)]
    _strip_metadata(model)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = _kept(value.const_value, name, stored)
    model.meta[NOTES] = notes
    return model


def _kept(tensor: ir.TensorProtocol, name: str, stored: TensorFile | None) -> ir.TensorProtocol:
    """The tensor as part of a file that is there, else a copy: training the module later must not change the graph."""
    raw = getattr(tensor, "raw", None)
    found = stored.stored(raw, name) if stored is not None and isinstance(raw, torch.Tensor) else None
    return found if found is not None else ir.tensor(tensor.numpy().copy(), name=name)


def _check_program(program: ExportedProgram) -> None:
    """Refuse what the exporter would translate wrongly or stumble over."""
    outputs = program.graph_signature.user_outputs
    if not any(isinstance(name, str) for name in outputs):
        raise UnsupportedModelError("the model returns no tensor", fix="return the logits from forward()")
    if any(name is not None and not isinstance(name, str) for name in outputs):
        raise UnsupportedModelError(
            "the model returns plain numbers beside tensors", got=str(outputs)[:80], fix="return the logits alone"
        )
    for node in program.graph.nodes:
        place = _TRAINING_FLAG.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise UnsupportedModelError(
                "the program behaves as in training", where=f"{node.name} ({node.target})",
                fix="call model.eval() before torch.export.export, and leave out dropout(training=True)",
            )  # fmt: skip


def _keep_logits(model: ir.Model, program: ExportedProgram) -> list[str]:
    """Leave one output: the entry ``logits`` of a dict, else the first; it is called like its key, else ``logits``."""
    outputs = model.graph.outputs
    count, key = len(outputs), "logits"
    if count > 1 or isinstance(_structure(program), Mapping):
        key, chosen = _logits_name(program, [str(value.name) for value in outputs])
        kept = next(value for value in outputs if value.name == chosen)
        outputs.clear()
        outputs.append(kept)
    value = outputs[0]
    taken = {v.name for node in model.graph.all_nodes() for v in node.outputs} | set(model.graph.initializers)
    taken |= {v.name for v in model.graph.inputs}
    if value.producer() is not None and key not in taken:
        value.name = key
    return [f"of {count} outputs, {value.name!r} is taken as the logits"] if count > 1 else []


def _structure(program: ExportedProgram) -> Any:
    """The program's outputs as nested containers of their positions."""
    spec = program.call_spec.out_spec
    return None if spec is None else pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def _logits_name(program: ExportedProgram, outputs: list[str]) -> tuple[str, str]:
    """The name to give the logits, and the name of the output that they are."""
    structure, names = _structure(program), program.graph_signature.user_outputs
    if not isinstance(structure, Mapping):
        return "logits", outputs[0]
    keys = [key for key, item in structure.items() for leaf in pytree.tree_leaves(item)[:1] if names[leaf] in outputs]
    key = "logits" if "logits" in keys or not keys else keys[0]
    if key not in keys:
        return key, outputs[0]
    return str(key), str(names[pytree.tree_leaves(structure[key])[0]])


def _strip_metadata(model: ir.Model) -> None:
    """Drop what the exporter notes down (stack traces with the user's paths, signatures), except the module paths."""
    model.metadata_props.clear()
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in itertools.chain.from_iterable(graph.all_nodes() for graph in graphs):
        scopes = node.metadata_props.get(NAME_SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[NAME_SCOPES] = scopes
        for value in node.outputs:
            value.metadata_props.clear()


def _failure(what: str, error: Exception, program: ExportedProgram | None = None) -> UnsupportedModelError:
    chain = _chain(error)
    line = next((place for link in chain if (place := _user_line(link))), None)
    root = chain[-1]
    text = next((part.strip() for part in str(root).splitlines() if part.strip()), "")
    if line is None and program is not None:
        line = _line_of_operator(program, " ".join(map(str, chain)))
    plain = next((words for sign, words in _IN_PLAIN_WORDS if sign.search(f"{type(root).__name__}: {text}")), None)
    got = f"{type(root).__name__}: {text[:200]}"
    result = UnsupportedModelError(what, where=line, got=plain or got, fix=_WAYS_OUT)
    result.__cause__ = error
    return result


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and the causes that it was raised from, outermost first."""
    links = [error]
    while (cause := links[-1].__cause__) is not None and cause not in links:
        links.append(cause)
    return links


def _user_line(error: BaseException) -> str | None:
    """``net.py:12 `if x.sum() > 0:` `` for the innermost line of the user's own code, from frames or the message."""
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    return _innermost(frames) or _innermost(_quoted(str(error)))


def _line_of_operator(program: ExportedProgram, message: str) -> str | None:
    """The line that the operator named in ``message`` came from, or the one that it was made of."""
    for operator in _OPERATOR.findall(message):
        for node in program.graph.nodes:
            if str(node.target).startswith(operator):
                line = _innermost(_quoted(str(node.meta.get("stack_trace", ""))))
                if line is not None:
                    return line
    return None


def _quoted(text: str) -> list[tuple[str, int | None, str | None]]:
    return [(name, int(number), line) for name, number, line in _QUOTED_LINE.findall(text)]


def _innermost(frames: list[tuple[str, int | None, str | None]]) -> str | None:
    for name, number, line in reversed(frames):
        path = str(Path(name).resolve())
        if (
            not name.startswith("<")
            and not path.startswith(_NOT_THE_USERS)
            and not any(part in path for part in _LIBRARIES)
        ):
            return f"{Path(name).name}:{number} `{(line or '').strip()[:120]}`"
    return None
