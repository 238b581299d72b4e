"""Files that are whole or absent: a reader never sees a half-written one, whatever kills the writer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from qopt.errors import UsageError


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, rename it over ``path``; OSError where that fails.

    A writer that is killed may leave its temporary file, ``.NAME.HEX.part``, behind; it is never taken for ``path``.
    """
    temporary = _stage(path, content)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files into ``folder``, made if needed: none is renamed into place before all are on disk.

    Raises:
        UsageError: the folder cannot be made or written to; a full disk leaves what it held before as it was.
    """
    staged: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            staged[folder / name] = _stage(folder / name, content)
        for path, temporary in staged.items():
            temporary.replace(path)
    except OSError as error:
        raise UsageError("cannot write the output", where=str(folder), got=error.strerror or str(error)) from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    """``content`` on disk under a name of its own beside ``path``, with the permissions that the umask gives."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
