"""Models of any size as files: one where protobuf can hold it, else the large tensors in a second one beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import onnx_ir as ir

from qopt.runtime.session import to_bytes

LARGEST_FILE: Final = 2**31 - 2**24
"""Bytes of tensors that one protobuf message holds beside the graph: its own limit is 2 GB."""

SMALLEST_TENSOR: Final = 1024
"""Bytes from which a tensor lies outside, where any does."""

ALIGNED: Final = 64
"""Bytes of which every tensor begins at a multiple: a cache line."""

MODEL: Final = "model.onnx"
DATA: Final = "model.onnx.data"


def to_files(model: ir.Model, largest: int = LARGEST_FILE) -> dict[str, bytes]:
    """The model as files by name, the model first; deterministic for equal models.

    Args:
        model: which stays as it is.
        largest: bytes of tensors above which those of `SMALLEST_TENSOR` and more go to ``model.onnx.data``.
    """
    tensors = {n: v.const_value for n, v in model.graph.initializers.items() if v.const_value is not None}
    if sum(tensor.nbytes for tensor in tensors.values()) <= largest:
        return {MODEL: to_bytes(model)}
    outside = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= SMALLEST_TENSOR}
    data = bytearray()
    copy = model.clone()
    for name, tensor in outside.items():
        data += bytes(-len(data) % ALIGNED)
        offset = len(data)
        data += tensor.tobytes()
        copy.graph.initializers[name].const_value = ir.ExternalTensor(
            DATA, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tuple(tensor.shape.numpy())), name=name
        )
    return {MODEL: to_bytes(copy), DATA: bytes(data)}


@contextmanager
def loadable(files: Mapping[str, bytes]) -> Iterator[bytes | Path]:
    """What ONNX and ONNX Runtime load: the bytes of one file, the path of the first of several.

    A session that was opened outlives the folder: it has read or mapped its data.
    """
    if len(files) == 1:
        yield next(iter(files.values()))
        return
    with tempfile.TemporaryDirectory(prefix="qopt-") as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name) / next(iter(files))
