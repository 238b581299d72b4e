"""What a model file is, told by its content alone: nothing is unpickled and the suffix does not count."""

from __future__ import annotations

import stat
import zipfile
from enum import Enum
from pathlib import Path
from typing import BinaryIO, final

from qopt.errors import CorruptModelError, UsageError, nearest

_EXPORT_FILE = "serialized_exported_program.json"
_SAFETENSORS_HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the safetensors format itself."""

_ONNX_WIRE = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field numbers of onnx.ModelProto and their protobuf wire types (0 varint, 2 length-delimited)."""

_GRAPH_FIELD = 7

_FOREIGN = {
    b"\x89HDF": "an HDF5 (Keras) file",
    b"version https": "a Git LFS pointer, not the file itself",
    b"<!DO": "an HTML page",
    b"<htm": "an HTML page",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF file",
}


@final
class Format(Enum):
    """The kinds of model file that qopt knows; the value is what messages call it."""

    ONNX = "ONNX model"
    EXPORT_ARCHIVE = "torch.export archive"
    TORCHSCRIPT = "TorchScript archive"
    STATE_DICT = "state dict"
    PICKLED_MODULE = "pickled module"
    LEGACY_PICKLE = "legacy pickle"
    SAFETENSORS = "safetensors file"


def identify(path: Path) -> Format:
    """The format of the file at ``path``.

    Raises:
        UsageError: no such file, a folder, a device, or no permission to read it.
        CorruptModelError: empty, damaged, or nothing that qopt knows.
    """
    _check_path(path)
    try:
        with path.open("rb") as file:
            return _identify(file, path)
    except OSError as error:
        raise UsageError("cannot read the model file", where=str(path), got=error.strerror or str(error)) from error


def unsafe_globals(path: Path) -> list[str]:
    """The classes and functions that unpickling a torch.save file would import beyond tensors, sorted.

    Nothing is imported or run to find them. Raises CorruptModelError where the pickle inside cannot be parsed.
    """
    import torch.serialization

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # the scanner of a damaged pickle raises whatever it stumbles over
        raise CorruptModelError(
            "the pickle inside is damaged", where=str(path), got=f"{type(error).__name__}: {_head(str(error))}"
        ) from error


def _check_path(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        try:
            beside = [entry.name for entry in path.parent.iterdir()]
        except OSError:
            beside = []
        raise UsageError("no such model file", where=str(path), fix=nearest(path.name, beside)) from error
    except (OSError, ValueError) as error:
        raise UsageError("cannot read the model file", where=str(path), got=str(error)) from error
    if stat.S_ISDIR(mode):
        raise UsageError("the model is a folder", where=str(path), fix="name the model file inside it")
    if not stat.S_ISREG(mode):
        raise UsageError("the model is not a regular file", where=str(path))


def _identify(file: BinaryIO, path: Path) -> Format:
    head = file.read(16)
    size = file.seek(0, 2)
    if size == 0:
        raise CorruptModelError("the model file is empty", where=str(path))
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _identify_zip(file, path)
    if _is_safetensors(head, size):
        return Format.SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return Format.LEGACY_PICKLE
    foreign = next((what for magic, what in _FOREIGN.items() if head.startswith(magic)), None)
    foreign = "a TensorFlow Lite file" if head[4:8] == b"TFL3" else foreign
    if foreign is None and _is_onnx(file, size, path):
        return Format.ONNX
    raise CorruptModelError(
        "not a model file that qopt knows",
        where=str(path),
        expected="ONNX, a torch.export archive, or a state dict",
        got=foreign or f"a file that starts with {head[:8]!r}",
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= min(size - 8, _SAFETENSORS_HEADER_LIMIT)


def _identify_zip(file: BinaryIO, path: Path) -> Format:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except Exception as error:  # besides BadZipFile: ValueError, OverflowError, UnicodeDecodeError, NotImplementedError
        raise CorruptModelError(
            "the zip archive is damaged or cut short", where=str(path), got=_head(str(error))
        ) from error
    inner = {member.partition("/")[2] or member for member in members}
    if _EXPORT_FILE in members or ("archive_format" in inner and any(m.startswith("models/") for m in inner)):
        return Format.EXPORT_ARCHIVE
    if "constants.pkl" in inner and any(member.startswith("code/") for member in inner):
        return Format.TORCHSCRIPT
    if "data.pkl" in inner:
        return Format.PICKLED_MODULE if unsafe_globals(path) else Format.STATE_DICT
    raise CorruptModelError(
        "a zip archive that holds no model",
        where=str(path),
        expected="one written by torch.export.save or torch.save",
        got="the members " + (", ".join(sorted(members)[:3]) or "(none)"),
    )


def _is_onnx(file: BinaryIO, size: int, path: Path) -> bool:
    """Whether the top-level fields are those of onnx.ModelProto, read by skipping from field to field.

    Raises CorruptModelError where the file starts like one and ends early or goes astray.
    """
    file.seek(0)
    seen: set[int] = set()
    while (at := file.tell()) < size:
        tag = _varint(file)
        field, wire = (-1, -1) if tag is None else (tag >> 3, tag & 7)
        length = _varint(file) if _ONNX_WIRE.get(field) == wire else None
        fits = length is not None and (wire == 0 or length <= size - file.tell())
        if not fits:
            if 1 in seen and (length is not None or len(seen) > 1):
                raise CorruptModelError("the ONNX file is damaged or cut short", where=str(path), got=f"byte {at}")
            return False
        seen.add(field)
        if wire == 2 and length is not None:
            file.seek(length, 1)
    return _GRAPH_FIELD in seen


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _head(text: str) -> str:
    return text.strip().splitlines()[0][:160] if text.strip() else "nothing more"
