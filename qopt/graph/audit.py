"""The audit of torch.export archives: read once, check every member, rebuild, and load only the rebuilt copy.

`torch.export.load` runs code that a doctored archive brings along: pickles, shape expressions, guards, names spliced
into generated source, imported classes and shared libraries. The audit lets pass what it understands and refuses the
rest. Rebuilding from the audited bytes closes the gap between checking and loading: torch never sees the original,
and a file that two zip readers read differently has only one reading here.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from typing import Any, Final, NoReturn, final

import torch
from torch.export.pt2_archive import PT2ArchiveWriter

from qopt.errors import CorruptModelError, UnsafeModelError
from qopt.graph.audit_program import Malformed, Violation, clean_config, clean_program, dotted

PROGRAM: Final = "models/model.json"
SAMPLE_INPUTS: Final = "data/sample_inputs/model.pt"
WEIGHTS: Final = "data/weights/"
CONSTANTS: Final = "data/constants/"
_WEIGHTS_CONFIG = WEIGHTS + "model_weights_config.json"
_CONSTANTS_CONFIG = CONSTANTS + "model_constants_config.json"

_REQUIRED = ("archive_format", "archive_version", PROGRAM, SAMPLE_INPUTS, _WEIGHTS_CONFIG, _CONSTANTS_CONFIG)
_ALLOWED = re.compile(
    r"archive_format|archive_version|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/(version|serialization_id)|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(model_weights_config\.json|weight_[0-9]+)"
    r"|data/constants/(model_constants_config\.json|tensor_[0-9]+)"
    r"|extra/[A-Za-z0-9_.-]+",
    re.ASCII,
)
_KNOWN_DANGERS = (
    ("data/aotinductor/", "it holds compiled code, which loading would run"),
    ("data/constants/opaque_obj_", "it is a pickle, which loading would run"),
    ("data/constants/custom_obj_", "it is a pickle, which loading would run"),
    ("serialized_", "the layout is that of torch 2.7 and older, made of pickles"),
    ("data/weights/model.pt", "it is a pickle of an older layout"),
    ("data/constants/model.pt", "it is a pickle of an older layout"),
)
_FIX = "export it again with torch.export.save, give an ONNX file, or pass --trust if you vouch for it"

_PLAIN_TYPES = (torch.Tensor, bool, int, float, str, type(None))
_REPEAT_LIMIT = 2**20
"""Bytes that stride 0 may add to a tensor over its data; without a limit 4 bytes become terabytes."""

_ELEMENT_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2, 29: 1, 30: 1, 31: 1,
    32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip
"""Bytes per element for the numbers of torch's schema.ScalarType."""


def audit_archive(blob: bytes, where: str) -> bytes:
    """An archive rebuilt from the audited members of ``blob``, safe to hand to torch.

    Args:
        blob: the whole file.
        where: its name, for messages.

    Raises:
        UnsafeModelError: a member breaks a rule; the message names both.
        CorruptModelError: not readable as an archive of torch.export.
    """
    audit = _Audit(where)
    members = audit.members(blob)
    audit.header(members)
    program = audit.document(PROGRAM, members)
    weights = audit.payloads(WEIGHTS, _WEIGHTS_CONFIG, members)
    constants = audit.payloads(CONSTANTS, _CONSTANTS_CONFIG, members)
    records = {PROGRAM: program, SAMPLE_INPUTS: audit.sample_inputs(members[SAMPLE_INPUTS]), **weights, **constants}
    rebuilt = io.BytesIO()
    with PT2ArchiveWriter(rebuilt) as writer:
        for name, data in records.items():
            writer.write_bytes(name, data)
    return rebuilt.getvalue()


@final
class _Audit:
    """One archive under audit; the methods return clean bytes or raise errors that name the member and the rule."""

    def __init__(self, where: str) -> None:
        self.where = where

    def refuse(self, member: str, rule: str, got: object = None) -> NoReturn:
        text = None if got is None else repr(got)[:120]
        raise UnsafeModelError(f"refused: {rule}", where=f"{self.where}: {member}", got=text, fix=_FIX)

    def corrupt(self, member: str, fact: str) -> NoReturn:
        raise CorruptModelError(fact, where=f"{self.where}: {member}" if member else self.where)

    def members(self, blob: bytes) -> dict[str, bytes]:
        """Name below the root to content, of every member."""
        try:
            with zipfile.ZipFile(io.BytesIO(blob)) as archive:
                entries = archive.infolist()
                names = self._names(entries, len(blob))
                return {name: archive.read(entry) for name, entry in zip(names, entries, strict=True)}
        except (UnsafeModelError, CorruptModelError):
            raise
        except Exception as error:  # zipfile raises far more than BadZipFile on damaged headers
            raise CorruptModelError(
                "the archive is damaged or cut short", where=self.where, got=f"{type(error).__name__}: {error}"[:160]
            ) from error

    def _names(self, entries: list[zipfile.ZipInfo], limit: int) -> list[str]:
        names: list[str] = []
        roots: set[str] = set()
        for entry in entries:
            root, _, name = entry.filename.partition("/")
            roots.add(root)
            danger = next((why for prefix, why in _KNOWN_DANGERS if (name or root).startswith(prefix)), None)
            if danger:
                self.refuse(entry.filename, danger)
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                self.refuse(entry.filename, "members must be stored, neither compressed nor encrypted")
            if root in ("", ".", "..") or "\\" in root or not _ALLOWED.fullmatch(name):
                self.refuse(entry.filename, "the member is not on the list of those an exported program has")
            names.append(name)
        if len(roots) > 1:
            self.refuse(sorted(roots)[1], "all members must share one root folder")
        seen: set[str] = set()
        for name in (name.casefold() for name in names):
            if name in seen:
                self.refuse(name, "two members have this name, and readers disagree on which counts")
            seen.add(name)
        if sum(entry.file_size for entry in entries) > limit:
            self.refuse("", "the members claim more bytes than the file has")
        return names

    def header(self, members: dict[str, bytes]) -> None:
        for name in _REQUIRED:
            if name not in members:
                self.corrupt("", f"the archive lacks {name}")
        if members["archive_format"] != b"pt2" or members["archive_version"] != b"0":
            self.corrupt("archive_version", "an archive format that qopt does not know")
        if members.get("byteorder", b"little") != b"little":
            self.corrupt("byteorder", "the archive was written on a big-endian machine")

    def document(self, name: str, members: dict[str, bytes]) -> bytes:
        try:
            return clean_program(members[name])
        except Malformed as error:
            self.corrupt(name, str(error))
        except Violation as error:
            self.refuse(f"{name} {dotted(error.place)}", error.rule, error.text)

    def payloads(self, folder: str, config: str, members: dict[str, bytes]) -> dict[str, bytes]:
        """The clean configuration with the raw tensors that it names, each large enough for its shape."""
        try:
            entries = clean_config(members[config])
        except Malformed as error:
            self.corrupt(config, str(error))
        except Violation as error:
            self.refuse(f"{config} {dotted(error.place)}", error.rule, error.text)
        records: dict[str, bytes] = {}
        dtypes: dict[str, int] = {}
        for name, entry in entries.items():
            member = folder + entry["path_name"]
            if member == config or member not in members:
                self.corrupt(member, f"the data of {name} is missing")
            dtype = entry["tensor_meta"]["dtype"]
            if dtypes.setdefault(member, dtype) != dtype:
                self.refuse(member, "tensors that share data must share a type", name)
            self._fits(name, entry["tensor_meta"], member, len(members[member]))
            records[member] = members[member]
        records[config] = json.dumps({"config": entries}, allow_nan=False).encode()
        return records

    def _fits(self, name: str, meta: dict[str, Any], member: str, size: int) -> None:
        width = _ELEMENT_BYTES.get(meta["dtype"])
        lengths = [[axis.get("as_int", -1) for axis in meta[key]] for key in ("sizes", "strides")]
        sizes, strides = lengths
        offset = meta["storage_offset"].get("as_int", -1)
        if width is None or len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
            self.refuse(member, "shape, stride and offset must be known and not negative", name)
        last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if size % width or (0 not in sizes and (last + 1) * width > size):
            self.refuse(member, f"shape, stride and offset must fit the {size} bytes of the member", name)
        if math.prod(sizes) * width > size + _REPEAT_LIMIT:
            self.refuse(member, "a tensor must not repeat its data to a size out of proportion", name)

    def sample_inputs(self, data: bytes) -> bytes:
        """The example inputs, loaded as plain tensors and written anew; an archive may have none (no bytes)."""
        if not data:
            return data
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as inner:
                entries = inner.infolist()
        except Exception as error:  # see members()
            raise CorruptModelError(
                "the sample inputs are damaged", where=f"{self.where}: {SAMPLE_INPUTS}", got=f"{error}"[:160]
            ) from error
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > len(data):
            self.refuse(SAMPLE_INPUTS, "members must be stored, not compressed")
        try:
            inputs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:  # a hostile pickle makes the restricted unpickler raise almost anything
            raise UnsafeModelError(
                "refused: the sample inputs must be plain tensors",
                where=f"{self.where}: {SAMPLE_INPUTS}", got=f"{type(error).__name__}: {error}"[:120], fix=_FIX,
            ) from error  # fmt: skip
        if not (isinstance(inputs, tuple) and len(inputs) == 2 and _is_plain(inputs, 0)):
            self.refuse(SAMPLE_INPUTS, "the sample inputs must be a pair of plain positional and keyword arguments")
        rewritten = io.BytesIO()
        torch.save(inputs, rewritten)
        return rewritten.getvalue()


def _is_plain(value: object, depth: int) -> bool:
    if depth > 16:
        return False
    if type(value) in (tuple, list) and isinstance(value, tuple | list):
        return all(_is_plain(item, depth + 1) for item in value)
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item, depth + 1) for key, item in value.items())
    return type(value) in _PLAIN_TYPES
