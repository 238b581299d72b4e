"""Files that are whole or absent: a reader never sees a half-written one, whatever kills the writer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qopt.errors import UsageError


def write_atomic(path: Path, content: bytes) -> None:
    """Write to a temporary file beside ``path``, flush it to disk, rename it over ``path``."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files into ``folder``, made if needed, each atomically and only once all are at hand.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomic(folder / name, content)
    except OSError as error:
        raise UsageError("cannot write the output", where=str(folder), got=error.strerror or str(error)) from error
