"""Weights that stay in the user's file: mapped into memory, never copied, and read from there by ONNX Runtime too."""

from __future__ import annotations

import ctypes
import json
import mmap
from pathlib import Path
from typing import Any, Final, cast, final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qopt.graph.names import unique, value_names

SMALLEST_FILE: Final = 1 << 24
"""Bytes of a file that is worth mapping; a smaller one is read, and may change afterwards."""

SMALLEST: Final = 1 << 16
"""Bytes of a tensor that ONNX Runtime reads from the file; smaller ones lie in the graph."""


@final
class StoredTensor(ir.Tensor[NDArray[np.float32]]):
    """A float32 tensor whose values are part of a mapped file.

    Args:
        values: the view into the mapping; read in Fortran's order, a matrix, where ``turned``.
        file: what it is a part of.
        offset: of its first byte there.
        name: of the initializer.
        turned: whether the file holds the transpose.
    """

    def __init__(
        self, values: NDArray[np.float32], file: TensorFile, offset: int, name: str, *, turned: bool = False
    ) -> None:
        super().__init__(values, name=name)
        self.file, self.offset, self.turned = file, offset, turned

    def transposed(self, name: str) -> StoredTensor:
        """The transpose of a matrix: another view of the same bytes."""
        return StoredTensor(self.numpy().T, self.file, self.offset, name, turned=not self.turned)


@final
class TensorFile:
    """The float32 tensors of a safetensors file as views into one private mapping of it.

    The file must be valid: its header is not checked again. Pages are read when they are touched and can be given back
    at any time; writing into a view changes no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="c")
        header = int.from_bytes(self._bytes[:8].tobytes(), "little")
        self._start = 8 + header
        self._entries: dict[str, Any] = json.loads(self._bytes[8 : self._start].tobytes())
        self._entries.pop("__metadata__", None)
        self._places: dict[int, int] = {}

    def tensor(self, name: str) -> torch.Tensor | None:
        """The tensor called ``name``; None where it is not float32, empty, or not aligned."""
        entry = self._entries[name]
        first, last = (self._start + end for end in entry["data_offsets"])
        if entry["dtype"] != "F32" or first % 4 or first == last:
            return None
        view = self._bytes[first:last].view(np.float32).reshape(entry["shape"])
        found = torch.from_numpy(view)
        self._places[found.data_ptr()] = first
        return found

    def stored(self, tensor: torch.Tensor, name: str) -> StoredTensor | None:
        """``tensor`` as an initializer, where it is one of `tensor`'s and still whole."""
        place = self._places.get(tensor.data_ptr())
        if place is None or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return None
        length = tensor.numel() * 4
        values = self._bytes[place : place + length].view(np.float32).reshape(tuple(tensor.shape))
        return StoredTensor(values, self, place, name)

    def release(self) -> None:
        """Give the pages of the mapping back; they are read again when they are touched."""
        mapping = cast("mmap.mmap", self._bytes._mmap)  # type: ignore[attr-defined]
        mapping.madvise(mmap.MADV_DONTNEED)


def release(model: ir.Model) -> None:
    """Give back the pages of every file that weights of the model are stored in."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for file in {tensor.file for tensor in tensors if isinstance(tensor, StoredTensor)}:
        file.release()


def give_back() -> None:
    """Return what was freed to the system, where the C library knows how: glibc keeps it for itself otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def turn_stored_matrices(model: ir.Model) -> int:
    """Replace each Transpose of a stored matrix by an initializer that is a view; returns how many there were.

    Folding constants would copy every matrix of a network of linear layers.
    """
    turned = 0
    for node in [node for node in model.graph if node.op_type == "Transpose" and not node.domain]:
        source, output = node.inputs[0], node.outputs[0]
        tensor = source.const_value if source is not None and source.is_initializer() else None
        order = node.attributes.get("perm")
        swaps = order is None or list(order.as_ints()) == [1, 0]
        if not isinstance(tensor, StoredTensor) or len(tensor.shape) != 2 or not swaps or output.is_graph_output():
            continue
        name = str(output.name)
        view = tensor.transposed(name)
        value = ir.Value(name=name, const_value=view, type=ir.TensorType(ir.DataType.FLOAT), shape=view.shape)
        for user, position in tuple(output.uses()):
            user.replace_input_with(position, value)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(value)
        turned += 1
    return turned


def outside(model: ir.Model) -> tuple[bytes, Path | None]:
    """The model as bytes with its stored weights left in their file, and the folder that ONNX Runtime finds it in.

    A matrix that the file holds transposed is turned in the graph, when it runs. None where no weight is stored, or
    where they lie in several folders.
    """
    found = [v for v in model.graph.initializers.values() if is_outside(v.const_value) and not v.is_graph_output()]
    folders = {cast("StoredTensor", value.const_value).file.path.parent for value in found}
    if len(folders) != 1:
        return ir.serde.serialize_model(model).SerializeToString(), None
    copy = model.clone()
    taken = value_names(copy.graph)
    for value in [copy.graph.initializers[str(value.name)] for value in found]:
        _refer(copy.graph, value, taken)
    return ir.serde.serialize_model(copy).SerializeToString(), folders.pop()


def stays_in_file(model: ir.Model) -> bool:
    """Whether weights of the model lie in the user's file, and are never held as a whole."""
    return any(is_outside(value.const_value) for value in model.graph.initializers.values())


def is_outside(tensor: object) -> bool:
    """Whether `outside` leaves a tensor in its file."""
    return isinstance(tensor, StoredTensor) and tensor.nbytes >= SMALLEST


def _refer(graph: ir.Graph, value: ir.Value, taken: set[str]) -> None:
    tensor = cast("StoredTensor", value.const_value)
    name, shape = str(value.name), [int(size) for size in tensor.shape.numpy()]
    if tensor.turned:
        name, shape = unique(f"{name}/stored", taken.__contains__), shape[::-1]
        taken.add(name)
    reference = ir.ExternalTensor(
        tensor.file.path.name, tensor.offset, tensor.nbytes, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name,
        base_dir=tensor.file.path.parent,
    )  # fmt: skip
    if not tensor.turned:
        value.const_value = reference
        return
    source = ir.Value(name=name, const_value=reference, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    graph.register_initializer(source)
    for number, (user, position) in enumerate(tuple(value.uses())):  # each just before it is read: few are held at once
        node = ir.node("Transpose", [source], attributes={"perm": [1, 0]}, name=f"{name}/turned{number}")
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = str(node.name), value.type, value.shape
        graph.insert_before(user, node)
        user.replace_input_with(position, node.outputs[0])
    del graph.initializers[str(value.name)]
