"""The one way in: any model file becomes an `onnx_ir` model, and nothing in it runs unless the user vouches for it.

This is the only module that unpickles, and it does so only with ``trust``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NoReturn

import onnx_ir as ir
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from qopt.errors import CorruptModelError, UnsafeModelError, UnsupportedModelError, UsageError
from qopt.factories import importable_here
from qopt.graph import factory as factories
from qopt.graph.audit import audit_archive
from qopt.graph.formats import Format, identify, unsafe_globals
from qopt.graph.load_onnx import load_onnx
from qopt.graph.model import NOTES
from qopt.graph.shapes import fix_shapes
from qopt.graph.stored import SMALLEST_FILE, TensorFile, give_back
from qopt.graph.to_onnx import check_input_shape, module_to_onnx, program_to_onnx, quiet

_SAFE_WAYS = (
    "save it with torch.export.save, or save its state_dict() and pass --model package.module:factory, "
    "or give an ONNX file; --trust loads it as it is"
)
_SCRIPT_WAYS = (
    "go back to the module that it was made of and save it with torch.export.save, or save its state_dict() and pass "
    "--model package.module:factory, or export it to ONNX"
)
_NEEDS_FACTORY = (Format.STATE_DICT, Format.SAFETENSORS)


def load_model(
    path: Path, *, factory: str | None = None, trust: bool = False, input_shape: tuple[int, ...] | None = None
) -> ir.Model:
    """Load a model file of any format that `identify` knows.

    Args:
        path: the file.
        factory: ``package.module:name`` of a callable that builds the network for a state dict.
        trust: run what the file brings along: pickled classes, unaudited archives, TorchScript.
        input_shape: shape of one image, such as (3, 32, 32); used where a module is exported that has no example
            inputs, checked against them where it has.

    Returns:
        The model as it is in the file, or opset 21 as exported; ``meta[NOTES]`` may list notes for the report.

    Raises:
        UsageError: the path, the factory or the shape is wrong, missing or not needed.
        CorruptModelError: not readable as what it claims to be.
        UnsafeModelError: loading it would run code, or it breaks a rule of the audit.
        UnsupportedModelError: torch cannot export it.
    """
    if input_shape is not None:
        check_input_shape(input_shape)
    kind = identify(path)
    if factory is not None and kind in (Format.ONNX, Format.EXPORT_ARCHIVE, Format.TORCHSCRIPT):
        raise UsageError(
            f"a factory is only for state dicts, and this is a whole {kind.value}", where=str(path),
            fix=f"leave {factories.OPTION} out",
        )  # fmt: skip
    match kind:
        case Format.ONNX:
            return load_onnx(path)
        case Format.EXPORT_ARCHIVE:
            return program_to_onnx(_load_archive(path, trust))
        case Format.TORCHSCRIPT:
            return _load_script(path, trust, input_shape)
        case Format.SAFETENSORS:
            return _load_mapped(path, factory, input_shape)
        case Format.STATE_DICT:
            return _fill(path, _load_weights(path), factory, input_shape)
        case Format.PICKLED_MODULE | Format.LEGACY_PICKLE:
            return _load_pickle(path, kind, factory, trust, input_shape)


def _load_archive(path: Path, trust: bool) -> ExportedProgram:
    blob = _read(path)
    archive = blob if trust else audit_archive(blob, str(path))
    try:
        with quiet():
            return torch.export.load(io.BytesIO(archive))
    except Exception as error:  # a mutated archive that passes the audit makes torch raise anything
        raise CorruptModelError(
            "torch cannot read the exported program", where=str(path), got=_line(error),
            fix="export it again with this version of torch",
        ) from error  # fmt: skip


def _load_mapped(path: Path, factory: str | None, input_shape: tuple[int, ...] | None) -> ir.Model:
    """A safetensors file; the weights of a large one stay in it and are read when they are needed."""
    if path.stat().st_size < SMALLEST_FILE:
        return _fill(path, _load_safetensors(path), factory, input_shape)
    stored, state = _map_safetensors(path)
    model = _fill(path, state, factory, input_shape, stored)
    state.clear()
    stored.release()
    give_back()
    return model


def _map_safetensors(path: Path) -> tuple[TensorFile, dict[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            stored = TensorFile(path)
            views = {name: stored.tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            return stored, {name: file.get_tensor(name) if view is None else view for name, view in views.items()}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptModelError("the safetensors file is damaged", where=str(path), got=_line(error)) from error


def _fill(
    path: Path,
    checkpoint: object,
    factory: str | None,
    input_shape: tuple[int, ...] | None,
    stored: TensorFile | None = None,
) -> ir.Model:
    state = factories.unwrap(checkpoint, str(path))
    if factory is None:
        raise UsageError(
            "a state dict holds weights but no network", where=str(path),
            fix=f"pass {factories.OPTION} package.module:factory, where factory() returns the nn.Module",
        )  # fmt: skip
    built = factories.build(factory)
    notes = factories.fill(built, state, str(path), adopt=stored is not None)
    model = module_to_onnx(built.module, input_shape, example=built.example, stored=stored)
    model.meta[NOTES] = [*notes, *model.meta[NOTES]]
    return model


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(_read(path))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptModelError("the safetensors file is damaged", where=str(path), got=_line(error)) from error
    return tensors


def _load_weights(path: Path) -> object:
    try:
        with quiet():
            return torch.load(io.BytesIO(_read(path)), weights_only=True, map_location="cpu")
    except Exception as error:  # damaged storages and pickles raise anything, also in the restricted unpickler
        raise CorruptModelError("the state dict is damaged", where=str(path), got=_line(error)) from error


def _load_pickle(
    path: Path, kind: Format, factory: str | None, trust: bool, input_shape: tuple[int, ...] | None
) -> ir.Model:
    if not trust:
        if kind is Format.LEGACY_PICKLE and factory is not None:  # state dicts of torch before 1.6
            return _fill(path, _load_legacy_weights(path), factory, input_shape)
        _refuse_pickle(path, kind)
    loaded = _unpickle(path)
    if not isinstance(loaded, nn.Module):
        return _fill(path, loaded, factory, input_shape)
    if factory is not None:
        raise UsageError("the file holds a whole module", where=str(path), fix=f"leave {factories.OPTION} out")
    return module_to_onnx(loaded, input_shape)


def _refuse_pickle(path: Path, kind: Format) -> NoReturn:
    classes = unsafe_globals(path) if kind is Format.PICKLED_MODULE else []
    more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    raise UnsafeModelError(
        f"a {kind.value}: loading it runs code from the file", where=str(path),
        got="it would import " + ", ".join(classes[:6]) + more if classes else None, fix=_SAFE_WAYS,
    )  # fmt: skip


def _load_legacy_weights(path: Path) -> object:
    try:
        with quiet():
            return torch.load(io.BytesIO(_read(path)), weights_only=True, map_location="cpu")
    except Exception as error:  # the restricted unpickler refuses everything but tensors
        raise UnsafeModelError(
            "a legacy pickle that holds more than tensors: loading it runs code from the file", where=str(path),
            got=_line(error), fix=_SAFE_WAYS,
        ) from error  # fmt: skip


def _unpickle(path: Path) -> Any:
    """Load a pickle with everything it does; the user has said --trust."""
    try:
        with importable_here(), quiet():
            return torch.load(io.BytesIO(_read(path)), weights_only=False, map_location="cpu")
    except (ImportError, AttributeError) as error:
        raise UsageError(
            "a class that the pickle names cannot be imported", where=str(path), got=_line(error),
            fix="run qopt from the folder that defines it, or pass a state dict and --model package.module:factory",
        ) from error  # fmt: skip
    except Exception as error:  # the pickle's own code
        raise CorruptModelError("the pickle cannot be loaded", where=str(path), got=_line(error)) from error


def _load_script(path: Path, trust: bool, input_shape: tuple[int, ...] | None) -> ir.Model:
    if not trust:
        raise UnsafeModelError(
            "a TorchScript archive: loading it runs code from the file", where=str(path), fix=_SAFE_WAYS
        )
    if input_shape is None:
        raise UsageError("the shape of an image is not known", where=str(path), fix="give data, or --input-shape C,H,W")
    from torch._export.converter import TS2EPConverter

    images = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with quiet():
            script = torch.jit.load(io.BytesIO(_read(path)), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:  # damaged code and tensors raise anything
        raise CorruptModelError(
            "torch cannot read the TorchScript archive", where=str(path), got=_line(error)
        ) from error
    try:
        with quiet(), torch.no_grad():
            program = TS2EPConverter(script, (images,)).convert()
            same = _same(program.module()(images), script(images))
    except Exception as error:  # the converter is an experiment of torch and fails in many ways
        raise _not_converted(path, _line(error)) from error
    if not same:
        raise _not_converted(path, "a program that computes something else")
    model = program_to_onnx(program)
    if len(model.graph.inputs) == 1:  # the converter leaves every other axis open
        fix_shapes(model, {str(model.graph.inputs[0].name): tuple(images.shape)})
    model.meta[NOTES] = ["the batch axis is fixed at 1: the file is TorchScript", *model.meta[NOTES]]
    return model


def _same(got: object, expected: object) -> bool:
    """Whether the tensors in two outputs are equal up to rounding."""
    pairs = list(zip(tree_leaves(got), tree_leaves(expected), strict=True))
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs if isinstance(a, torch.Tensor))


def _not_converted(path: Path, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "torch cannot convert this TorchScript archive", where=str(path), got=got, fix=_SCRIPT_WAYS
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError("cannot read the model file", where=str(path), got=error.strerror or str(error)) from error


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}"
