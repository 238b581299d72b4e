"""The twin: the prepared graph as torch.fx, which everything that needs gradients or tensors works on."""

from __future__ import annotations

import keyword
import operator
import re
from typing import Any, final

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from qopt.errors import UnsupportedModelError
from qopt.graph.model import Prepared
from qopt.graph.names import unique
from qopt.graph.operators import TABLE, Op


def build_twin(prepared: Prepared) -> fx.GraphModule:
    """``prepared`` as a torch.fx graph with the same names, in eval mode, on the CPU.

    The graph has one placeholder, the image of shape (batch, ...), one ``get_attr`` per constant in use, one
    ``call_function`` per ONNX node (and ``getitem`` for each further output), and returns the logits. For every node
    that holds an ONNX value, ``meta["value"]`` is that value's name and ``name`` a sanitised version of it, and
    ``meta["op"]`` is the ONNX operator that computes it. A call
    that applies a layer has ``meta["layer"]``, the layer's name, and ``meta["use"]``, its place in ``layer.uses``; its
    first arguments are the activations, the weight as ONNX stores it and, except for MatMul, the bias or None.
    Constants are buffers and take no gradient; the image does.

    Raises:
        UnsupportedModelError: naming the operator and the node that the twin does not have.
    """
    twin = _Importer(prepared).build()
    twin.eval()
    return twin


@final
class _Importer:
    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._model = prepared.model
        self._opset = self._model.opset_imports[""]
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._uses = {
            use.node: (layer.name, index) for layer in prepared.layers for index, use in enumerate(layer.uses)
        }

    def build(self) -> fx.GraphModule:
        image = self._model.graph.inputs[0]
        placeholder = self._graph.placeholder(_identifier(str(image.name)))
        self._hold(image, placeholder)
        for node in self._model.graph:
            self._add(node)
        self._graph.output(self._lookup(self._model.graph.outputs[0]))
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph, class_name="Twin")

    def _add(self, node: ir.Node) -> None:
        op = Op(node, self._opset, self._lookup)
        handler = TABLE.get(node.op_type)
        if handler is None:
            raise op.refuse("in the attackable twin")
        call = handler(op)
        name = _identifier(str(node.outputs[0].name))
        made = self._call(call.function, call.args, call.kwargs, f"{name}_parts" if call.parts else name)
        made.meta["op"] = node.op_type
        if node.name in self._uses:
            made.meta["layer"], made.meta["use"] = self._uses[node.name]
        if not call.parts:
            self._hold(node.outputs[0], made)
            return
        for index, output in enumerate(node.outputs):
            if not op.uses_output(index):
                continue
            part = self._call(operator.getitem, (made, index), {}, _identifier(str(output.name)))
            part.meta["op"] = node.op_type
            self._hold(output, part)

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> fx.Node:
        return self._graph.create_node("call_function", function, args, kwargs, name=name)

    def _lookup(self, value: ir.Value) -> fx.Node:
        if value not in self._nodes:
            self._hold(value, self._constant(value))
        return self._nodes[value]

    def _hold(self, value: ir.Value, node: fx.Node) -> None:
        self._nodes[value] = node
        node.meta["value"] = str(value.name)

    def _constant(self, value: ir.Value) -> fx.Node:
        if value.const_value is None:
            raise UnsupportedModelError("the value has no producer", where=repr(value.name))
        # modules have attributes of their own ("training", "code"), which a constant must not replace
        name = unique(_identifier(str(value.name)), lambda name: hasattr(self._root, name) or _is_reserved(name))
        array = np.array(value.const_value.numpy(), copy=True)
        try:
            tensor = torch.from_numpy(array)
        except TypeError as error:
            raise UnsupportedModelError(
                "a constant of a type that torch does not have", where=repr(value.name), got=str(value.dtype)
            ) from error
        self._root.register_buffer(name, tensor)
        return self._graph.create_node("get_attr", name, name=name)


def _is_reserved(name: str) -> bool:
    return hasattr(fx.GraphModule, name)


def _identifier(name: str) -> str:
    """A Python identifier close to ``name``."""
    text = re.sub(r"\W", "_", name, flags=re.ASCII)
    if keyword.iskeyword(text):
        return f"{text}_"
    return f"_{text}" if not text or text[0].isdigit() else text
