"""Expensive evaluations by content: the same model, data, options and code never compute the same number twice."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from qopt.files import write_atomic

Arrays = Mapping[str, NDArray[Any]]

_LIBRARIES = ("torch", "numpy", "onnxruntime")


@functools.cache
def code_digest() -> str:
    """SHA-256 of qopt's own source and of the versions of the libraries that compute: a changed program misses."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()


def default_folder() -> Path:
    """``$QOPT_CACHE``, else ``qopt`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get("QOPT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qopt"


@final
class Cache:
    """Named arrays under a key of plain JSON values, one ``.npz`` file each; without a folder nothing is kept.

    A file that cannot be read counts as a miss; a folder that cannot be written to is left alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits: list[str] = []

    def arrays(self, kind: str, key: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """What ``compute`` returns, from the folder where an equal key stored it before."""
        if self.folder is None:
            return compute()
        text = json.dumps({"kind": kind, "code": code_digest(), "key": dict(key)}, sort_keys=True)
        path = self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"
        found = _read(path)
        if found is not None:
            self.hits.append(kind)
            return found
        result = compute()
        _write(path, result)
        return result


def digest_arrays(*arrays: NDArray[Any]) -> str:
    """SHA-256 of shapes, types and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:  # a path would leak a handle
            return {name: stored[name] for name in stored.files}
    except Exception:  # a missing, truncated or foreign file raises errors of a dozen kinds; all mean a miss
        return None


def _write(path: Path, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    except OSError:
        return
