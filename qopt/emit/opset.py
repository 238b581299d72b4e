"""The oldest opset that a file can declare without meaning anything else, so that older runtimes load it.

qopt works at opset 21 or newer, and 4-bit types and scales per block need it; 8-bit codes per channel need 13. A node
may be declared at an older opset where the older operator has all the attributes, inputs and types that the node uses,
and the same defaults for what it leaves out. Operators that changed what they compute under the same signature are
left alone, and what comes out must give the same outputs bit for bit on the same kernels.
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx_ir as ir

from qopt.errors import UnsupportedModelError
from qopt.graph.model import Feeds
from qopt.runtime.external import loadable, to_files
from qopt.runtime.kernels import Kernels, session_and_kernels
from qopt.runtime.session import open_session, run_feeds

OLDEST: Final = 13
"""The first opset with scales per channel."""

CHANGED: Final = frozenset({"AveragePool", "GridSample", "GroupNormalization", "MaxPool", "Resize", "RoiAlign"})
"""Operators whose versions since 13 compute different things under one signature, some with one setting only."""


def lower_opset(model: ir.Model, feeds: Feeds, *, lean: bool = False) -> ir.Model:
    """A copy at the oldest opset that provably means the same, or ``model`` itself where there is none.

    Args:
        model: at opset 13 or newer.
        feeds: inputs on which both must give the same outputs, bit for bit, with all optimisations of ONNX Runtime.
        lean: compare in lean sessions instead, see `qopt.runtime.fresh.session_options`.
    """
    lowest = lowest_opset(model)
    if lowest >= model.opset_imports[""]:
        return model
    lowered = model.clone()
    lowered.opset_imports[""] = lowest
    domains = [onnx.helper.make_opsetid(domain, version) for domain, version in lowered.opset_imports.items()]
    lowered.ir_version = onnx.helper.find_min_ir_version_for(domains, ignore_unknown=True)
    with loadable(to_files(model)) as before, loadable(to_files(lowered)) as after:
        return lowered if _same(before, after, feeds, lean) else model


def lowest_opset(model: ir.Model) -> int:
    """The oldest opset, at least 13, at which every node has the signature that it uses."""
    current = model.opset_imports[""]
    return max((_lowest(node, current) for node in model.graph if not node.domain), default=current)


def _lowest(node: ir.Node, current: int) -> int:
    newest = onnx.defs.get_schema(node.op_type, current, "")
    found = min(current, newest.since_version)
    while found > OLDEST and node.op_type not in CHANGED and onnx.defs.has(node.op_type, found - 1, ""):
        older = onnx.defs.get_schema(node.op_type, found - 1, "")
        if older.deprecated or not _takes(older, newest, node):
            break
        found = older.since_version
    return max(found, OLDEST)


def _takes(older: Any, newest: Any, node: ir.Node) -> bool:
    """Whether the older operator has the signature of the newest one as far as ``node`` uses it."""
    used = node.attributes
    if any(name not in older.attributes or not _alike(older, newest, name, type_only=True) for name in used):
        return False
    left_out = (set(older.attributes) & set(newest.attributes)) - set(used)
    if any(older.attributes[name].required or not _alike(older, newest, name) for name in left_out):
        return False
    if any(older.attributes[name].required for name in set(older.attributes) - set(newest.attributes)):
        return False
    return _accepts(older, newest, older.inputs, newest.inputs, node.inputs) and _accepts(
        older, newest, older.outputs, newest.outputs, node.outputs
    )


def _alike(older: Any, newest: Any, name: str, *, type_only: bool = False) -> bool:
    a, b = older.attributes[name], newest.attributes[name]
    return a.type == b.type and (type_only or a.default_value == b.default_value)


def _accepts(older: Any, newest: Any, old: Any, new: Any, values: Any) -> bool:
    for formal, modern, value in zip_longest(old, new, values):
        if value is None:
            continue
        if formal is None:
            return bool(old) and old[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
        if modern is None or formal.name != modern.name:
            return False
        if value.dtype is not None and f"tensor({value.dtype.name.lower()})" not in formal.types:
            return False
    return True


def _same(model: bytes | Path, lowered: bytes | Path, feeds: Feeds, lean: bool) -> bool:
    """Whether ONNX takes the lowered file and ONNX Runtime makes the same of both."""
    try:
        onnx.checker.check_model(lowered, full_check=True)
        (kernels, outputs), (others, lowers) = _run(model, feeds, lean), _run(lowered, feeds, lean)
        return kernels == others and all(map(_equal, outputs, lowers))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, UnsupportedModelError):
        return False


def _run(data: bytes | Path, feeds: Feeds, lean: bool) -> tuple[Kernels | None, list[Any]]:
    if lean:
        return None, run_feeds(open_session(data, lean=True), feeds)
    session, kernels = session_and_kernels(data)
    return kernels, run_feeds(session, feeds)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
