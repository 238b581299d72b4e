"""Checks the JSON documents of a torch.export archive field by field and returns clean copies.

The walk follows torch's own schema classes, so that the copy holds what torch will read and nothing else. Every field
that is text has a rule in `_RULES`; text without a rule (a field of a newer torch, an operator or object as argument)
is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable
from enum import IntEnum
from typing import Any, final

from torch._export.serde import schema
from torch._export.serde.union import _Union

from qopt.graph import audit_grammar as grammar
from qopt.graph.audit_grammar import Checker, Refused
from qopt.graph.audit_operators import operator

_INT_LIMIT = 2**63
_INFINITIES = frozenset({"Infinity", "-Infinity", "NaN"})
_STRIDED = int(schema.Layout.Strided)

Place = tuple[str | int, ...]


@final
class Malformed(Exception):
    """A document that does not have the shape of torch's schema."""


@final
class Violation(Exception):
    """A rule broken at a place in a document; the audit turns it into an error that names the member."""

    def __init__(self, place: Place, refused: Refused) -> None:
        super().__init__(refused.rule)
        self.place, self.rule, self.text = place, refused.rule, refused.text


def _never(rule: str) -> Checker:
    def check(text: str) -> str:
        raise Refused(rule, text)

    return check


def _device(text: str) -> str:
    if text != "cpu":
        raise Refused("the program must live on the CPU (export it after model.cpu())", text)
    return text


def _verifier(text: str) -> str:
    if text not in ("TRAINING", "ATEN"):
        raise Refused("the verifier must be TRAINING or ATEN", text)
    return text


_CUSTOM = _never("custom objects are unpickled, which runs code")
_RULES: dict[tuple[str, str], Checker] = {
    ("Device", "type"): _device,
    ("SymExpr", "expr_str"): grammar.shape_expression,
    ("SymIntArgument", "as_name"): grammar.identifier,
    ("SymFloatArgument", "as_name"): grammar.identifier,
    ("SymBoolArgument", "as_name"): grammar.identifier,
    ("TensorArgument", "name"): grammar.identifier,
    ("GraphArgument", "name"): grammar.identifier,
    ("CustomObjArgument", "name"): _CUSTOM,
    ("CustomObjArgument", "class_fqn"): _CUSTOM,
    ("TokenArgument", "name"): _never("effect tokens belong to operators with side effects"),
    ("Argument", "as_string"): grammar.plain_text,
    ("Argument", "as_strings"): grammar.plain_text,
    ("Argument", "as_operator"): _never("an operator must not be an argument"),
    ("Argument", "as_string_to_argument"): grammar.identifier,
    ("NamedArgument", "name"): grammar.argument_name,
    ("Node", "target"): operator,
    ("Node", "name"): grammar.identifier,
    ("Graph", "tensor_values"): grammar.identifier,
    ("Graph", "sym_int_values"): grammar.identifier,
    ("Graph", "sym_bool_values"): grammar.identifier,
    ("Graph", "sym_float_values"): grammar.identifier,
    ("Graph", "custom_obj_values"): _CUSTOM,
    ("InputToConstantInputSpec", "name"): grammar.identifier,
    ("ConstantValue", "as_string"): grammar.plain_text,
    ("InputToParameterSpec", "parameter_name"): grammar.qualified_name,
    ("InputToBufferSpec", "buffer_name"): grammar.qualified_name,
    ("InputToTensorConstantSpec", "tensor_constant_name"): grammar.qualified_name,
    ("InputToCustomObjSpec", "custom_obj_name"): _CUSTOM,
    ("BufferMutationSpec", "buffer_name"): grammar.qualified_name,
    ("ParameterMutationSpec", "parameter_name"): grammar.qualified_name,
    ("GradientToParameterSpec", "parameter_name"): grammar.qualified_name,
    ("GradientToUserInputSpec", "user_input_name"): grammar.identifier,
    ("UserInputMutationSpec", "user_input_name"): grammar.identifier,
    ("ModuleCallSignature", "in_spec"): grammar.tree_spec,
    ("ModuleCallSignature", "out_spec"): grammar.tree_spec,
    ("ModuleCallSignature", "forward_arg_names"): grammar.identifier,
    ("ModuleCallEntry", "fqn"): grammar.module_path,
    ("ExportedProgram", "opset_version"): grammar.identifier,
    ("ExportedProgram", "range_constraints"): grammar.identifier,
    ("ExportedProgram", "verifiers"): _verifier,
    ("ExportedProgram", "torch_version"): grammar.version,
    ("ExportedProgram", "guards_code"): grammar.guard,
    ("PayloadMeta", "path_name"): grammar.qualified_name,
    ("PayloadConfig", "config"): grammar.qualified_name,
}
"""Schema class and field to the rule for its text, or for its keys where it is a mapping."""


def clean_program(document: bytes) -> bytes:
    """The audited copy of ``models/model.json``: no metadata but module paths, no guards, no submodule signatures.

    Raises Malformed where the document does not fit torch's schema, Violation where a text breaks its rule.
    """
    program = _walk_document(schema.ExportedProgram, document)
    program["guards_code"] = []  # checked, but nothing needs them: qopt never runs the program under torch
    module = program["graph_module"]
    module["module_call_graph"] = [entry for entry in module["module_call_graph"] if entry["fqn"] == ""]
    return json.dumps(program, allow_nan=False).encode()


def clean_config(document: bytes) -> dict[str, dict[str, Any]]:
    """The audited entries of a weights or constants configuration: qualified name to schema.PayloadMeta as a dict.

    Raises Malformed and Violation like `clean_program`; pickled payloads are refused.
    """
    entries: dict[str, dict[str, Any]] = _walk_document(schema.PayloadConfig, document)["config"]
    for name, entry in entries.items():
        if entry["use_pickle"]:
            raise Violation(("config", name, "use_pickle"), Refused("pickled payloads run code", True))
        if entry["tensor_meta"] is None:
            raise Malformed(f"config.{name} has no tensor_meta")
    return entries


def _walk_document(cls: type, document: bytes) -> dict[str, Any]:
    try:
        data = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid JSON: {error}") from error
    try:
        result: dict[str, Any] = _dataclass(cls, data, ())
    except RecursionError as error:
        raise Malformed("nested too deeply") from error
    return result


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Field name to its type and whether it may be missing."""
    hints = typing.get_type_hints(cls, globalns=vars(schema))
    required = {
        field.name: field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
    }
    return {name: (hint, not required.get(name, False)) for name, hint in hints.items() if not name.startswith("_")}


def _dataclass(cls: type, data: Any, place: Place) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Malformed(f"{dotted(place)} is no object")
    clean: dict[str, Any] = {}
    for name, (hint, optional) in _fields(cls).items():
        special = _SPECIAL.get((cls.__name__, name))
        if special is not None:
            clean[name] = special(data.get(name))
        elif name in data:
            clean[name] = _value(hint, data[name], (cls.__name__, name), (*place, name))
        elif not optional:
            raise Malformed(f"{dotted(place)} lacks {name!r}")
    if cls is schema.TensorMeta and clean["layout"] != _STRIDED:
        raise Violation(place, Refused("tensors must be strided", clean["layout"]))
    return clean


def _union(cls: type, data: Any, place: Place) -> dict[str, Any]:
    fields = _fields(cls)
    if not isinstance(data, dict) or len(data) != 1 or next(iter(data)) not in fields:
        raise Malformed(f"{dotted(place)} is no {cls.__name__}")
    ((name, value),) = data.items()
    return {name: _value(fields[name][0], value, (cls.__name__, name), (*place, name))}


def _value(hint: Any, data: Any, owner: tuple[str, str], place: Place) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if data is None else _value(inner, data, owner, place)
    if origin is list:
        if not isinstance(data, list):
            raise Malformed(f"{dotted(place)} is no list")
        return [_value(arguments[0], item, owner, (*place, index)) for index, item in enumerate(data)]
    if origin is dict:
        if not isinstance(data, dict):
            raise Malformed(f"{dotted(place)} is no object")
        return {
            _text(key, owner, place): _value(arguments[1], item, owner, (*place, key)) for key, item in data.items()
        }
    if isinstance(hint, type) and issubclass(hint, _Union):
        return _union(hint, data, place)
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), data, place)
    return _scalar(hint, data, owner, place)


def _scalar(hint: Any, data: Any, owner: tuple[str, str], place: Place) -> Any:
    if hint is str and isinstance(data, str):
        return _text(data, owner, place)
    if hint is bool and isinstance(data, bool):
        return data
    if isinstance(hint, type) and issubclass(hint, IntEnum) and type(data) is int and data in {int(m) for m in hint}:
        return data
    if hint is int and type(data) is int and -_INT_LIMIT <= data < _INT_LIMIT:
        return data
    if hint is float and _is_number(data):
        return data
    raise Malformed(f"{dotted(place)} is no {getattr(hint, '__name__', hint)}: {str(data)[:60]!r}")


def _is_number(data: Any) -> bool:
    if isinstance(data, str):
        return data in _INFINITIES
    if type(data) is int:
        return -_INT_LIMIT <= data < _INT_LIMIT
    return isinstance(data, float) and data == data and abs(data) != float("inf")


def _text(data: str, owner: tuple[str, str], place: Place) -> str:
    rule = _RULES.get(owner)
    try:
        if rule is None:
            raise Refused(f"qopt has no rule for the text field {owner[0]}.{owner[1]}", data)
        return rule(data)
    except Refused as refused:
        raise Violation(place, refused) from refused


def _node_metadata(data: Any) -> dict[str, str]:
    """Only the module path survives: names in the ONNX graph come from it; the rest is free text."""
    stack = data.get("nn_module_stack") if isinstance(data, dict) else None
    return {"nn_module_stack": stack} if isinstance(stack, str) and grammar.stack_text(stack) else {}


def _nothing(data: Any) -> dict[str, Any]:
    return {}


_SPECIAL: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("Node", "metadata"): _node_metadata,
    ("GraphModule", "metadata"): _nothing,
    ("GraphModule", "treespec_namedtuple_fields"): _nothing,
}
"""Fields that are rewritten whatever they hold: none of them changes what the program computes."""


def dotted(place: Place) -> str:
    """``graph_module.graph.nodes[3].target`` for a place."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.lstrip(".")[:200] or "the document"
