"""What a layer is called: its weight's qualified name, also where an exporter dropped it."""

from __future__ import annotations

import re

import onnx_ir as ir

_ANONYMOUS = re.compile(r"(?:val|v|const|constant|node|t|_to_copy)?_?\d*|onnx::.*|.*_output_\d+|/.*", re.IGNORECASE)
"""Names that exporters make up: ``val_12``, ``onnx::MatMul_209``, ``/fc/Transpose_output_0``, ``17``."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


def layer_name(weight: ir.Value, node: ir.Node, bias: str | None) -> str:
    """The weight's own name, or the first that can be recovered.

    In order: the parameter that the weight was folded from, the module path that torch's exporter wrote into the
    node's metadata, the name of the bias with its last part replaced, the module path in the node's name, the node's
    name; all but the first with ``.weight`` appended. A weight computed from several parameters counts as unnamed
    unless nothing better is found.
    """
    assert weight.name is not None
    anonymous = _ANONYMOUS.fullmatch(weight.name) is not None
    if not anonymous and _FOLDED_FROM not in weight.metadata_props:
        return weight.name
    origin = _folded_from(weight)
    if origin is not None:
        return origin
    module = _scope(node) or _bias_owner(bias) or _path(node.name or "")
    if module is None and not anonymous:
        return weight.name
    return f"{module or node.name or weight.name}.weight"


def _quoted(text: str | None) -> list[str]:
    return re.findall(r"'([^']*)'", text or "")


def _folded_from(weight: ir.Value) -> str | None:
    named = [name for name in _quoted(weight.metadata_props.get(_FOLDED_FROM)) if not _ANONYMOUS.fullmatch(name)]
    return named[0] if len(named) == 1 else None


def _scope(node: ir.Node) -> str | None:
    """``['', 'net', 'net.fc', 'linear']`` -> ``net.fc``: the last entry is the operator, not a module."""
    scopes = _quoted(node.metadata_props.get(_SCOPES))
    return scopes[-2] or None if len(scopes) >= 2 else None


def _bias_owner(bias: str | None) -> str | None:
    return bias.removesuffix(".bias") if bias and bias.endswith(".bias") and bias != ".bias" else None


def _path(name: str) -> str | None:
    """``/1/1.0/1.0.0/fn/fn.1/query/MatMul`` -> ``1.0.0.fn.1.query``: a part that repeats its parent replaces it."""
    if not name.startswith("/"):
        return None
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts) or None
