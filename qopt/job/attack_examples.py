"""The adversarial images of an attack as a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qopt.errors import UsageError
from qopt.files import write_atomic


def check_place(path: Path) -> None:
    """Refuse a place that nothing can be written to, before anything is computed.

    Raises:
        UsageError: the folder does not exist, or the path is one.
    """
    if not path.parent.is_dir():
        raise UsageError("no such folder", where=f"--save {path}", fix="make it, or choose another")
    if path.is_dir():
        raise UsageError("a folder and not a file", where=f"--save {path}", fix="add a name such as adversarial.npz")


def write_examples(
    path: Path, images: NDArray[np.float32], labels: NDArray[np.int64], fooled_by: Sequence[str]
) -> None:
    """Write an ``.npz``: ``images``, ``labels``, and ``fooled_by``, the name of the attack or nothing.

    Raises:
        UsageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, images=images, labels=labels, fooled_by=np.array(list(fooled_by), np.str_))
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UsageError("cannot write the examples", where=str(path), got=error.strerror or str(error)) from error
