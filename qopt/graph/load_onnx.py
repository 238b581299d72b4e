"""ONNX files in: parsed once, checked, and their external data kept inside the model's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from qopt.errors import CorruptModelError, ModelError, UnsafeModelError, UsageError


def load_onnx(path: Path) -> ir.Model:
    """The model at ``path``; external tensors stay on disk, memory-mapped, and are written like any others.

    Raises:
        UsageError: the file cannot be read.
        CorruptModelError: not an ONNX model, against the standard, or with tensors that do not fit their data.
        UnsafeModelError: external data outside the model's folder.
    """
    where = str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError("cannot read the model file", where=where, got=error.strerror or str(error)) from error
    try:
        proto = onnx.load_model_from_string(data)
        model = ir.from_proto(proto)
        external = _check_tensors(model, Path(os.path.realpath(path.parent)), where)
        if not external:
            onnx.checker.check_model(proto)
        elif _is_utf8(path):  # the checker finds external files by the path, which it wants as UTF-8
            onnx.checker.check_model(os.fspath(path.resolve()))
        if external:
            _adopt_external(model)
    except ModelError:
        raise
    except Exception as error:  # protobuf, the checker and onnx_ir each have their own exceptions, and leak others
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise CorruptModelError(
            "not a valid ONNX model", where=where, got=f"{type(root).__name__}: {' '.join(str(root).split())[:240]}"
        ) from error
    return model


def _adopt_external(model: ir.Model) -> None:
    """Make external tensors, which have been checked, plain ones: whoever serializes the graph writes their values."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _mapped(value.const_value)
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in (node for owner in owners for node in owner.all_nodes()):
        for name, attribute in list(node.attributes.items()):
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _mapped(tensor))


def _mapped(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """A view of the mapped file."""
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _is_utf8(path: Path) -> bool:
    try:
        return bool(os.fspath(path.resolve()).encode())
    except UnicodeEncodeError:
        return False


def _check_tensors(model: ir.Model, folder: Path, where: str) -> bool:
    """Raise where a tensor does not fit its data or points astray; returns whether any data are external."""
    external = False
    for name, tensor in _tensors(model):
        place = f"{where}: tensor {name or '(unnamed)'}"
        if isinstance(tensor, ir.ExternalTensor):
            external = True
            tensor.base_dir = folder  # without it onnx_ir checks no path
            _check_external(tensor, folder, place)
        elif isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.HasField("raw_data"):
            stored = len(tensor.raw.raw_data)
            if stored != tensor.nbytes:
                raise CorruptModelError(
                    "the data do not fit the shape", where=place, expected=f"{tensor.nbytes} bytes", got=str(stored)
                )
    return external


def _check_external(tensor: ir.ExternalTensor, folder: Path, place: str) -> None:
    location = os.fspath(tensor.location)
    resolved = Path(os.path.realpath(folder / location))
    if os.path.isabs(location) or ".." in Path(location).parts or not resolved.is_relative_to(folder):
        raise UnsafeModelError(
            "external data must lie in the model's folder", where=place, got=repr(location),
            fix="move the data file beside the model and name it without a path",
        )  # fmt: skip
    if not resolved.is_file():
        raise CorruptModelError("the external data file is missing", where=place, got=repr(location))
    if resolved.stat().st_nlink > 1:
        raise UnsafeModelError(
            "external data must not be a hard link, which may lead to any file", where=place, got=repr(location),
            fix="copy the data file",
        )  # fmt: skip
    offset, size = tensor.offset or 0, resolved.stat().st_size
    length = tensor.nbytes if tensor.length is None else tensor.length
    if offset < 0 or length != tensor.nbytes or offset + length > size:
        raise CorruptModelError(
            "the external data do not fit the shape", where=place,
            expected=f"{tensor.nbytes} bytes", got=f"{length} bytes at offset {offset} of {size}",
        )  # fmt: skip


def _tensors(model: ir.Model) -> Iterator[tuple[str | None, ir.TensorProtocol]]:
    """Every stored tensor: initializers and attributes, in subgraphs and functions too."""
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        for node in owner.all_nodes():
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor().name, attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from ((tensor.name, tensor) for tensor in attribute.as_tensors())
