"""The grammars that every piece of text in a torch.export archive must fit, since torch evaluates or splices it.

`sympy.sympify` evaluates shape expressions, guards are executed, names become the parameters of a generated function,
and tree specs import the classes they name. Each checker raises `Refused` with the rule that the text breaks.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable
from typing import Any, final

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}", re.ASCII)
_QUALIFIED = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(@[0-9]+)?", re.ASCII)
_VERSION = re.compile(r"[A-Za-z0-9.+<>= _-]{1,64}", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_,.>: -]{0,256}", re.ASCII)
_STACK = re.compile(r"[A-Za-z0-9_.,;@<>'\"\[\]() -]{1,8192}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,40})?(e[+-]?[0-9]{1,2})?", re.ASCII)

_EXPRESSION_LIMIT = 16000
"""Characters of one shape expression or guard: Python's parser recurses with the text."""

_SHAPE_NAMES = """
    Add Mul Max Min Mod PythonMod FloorDiv CeilDiv CleanDiv ModularIndexing Where FloatTrueDiv IntTrueDiv
    CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt ToFloat Identity Abs And Or Not
    Equality Unequality Eq Ne StrictLessThan LessThan StrictGreaterThan GreaterThan
    """
_ASSUMPTION_NAMES = "positive negative nonpositive nonnegative nonzero zero integer real finite"

_SHAPE_FUNCTIONS = frozenset(_SHAPE_NAMES.split())
_ASSUMPTIONS = frozenset(_ASSUMPTION_NAMES.split())
_GUARD_FUNCTIONS = _SHAPE_FUNCTIONS - {"Identity", "Where"}
_SIZE_METHODS = frozenset({"size", "stride", "storage_offset"})
_INT_LIMIT = 2**63
_SPEC_TYPES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})


@final
class Refused(Exception):
    """A text outside its grammar; ``rule`` says which, in a clause."""

    def __init__(self, rule: str, text: object) -> None:
        super().__init__(rule)
        self.rule, self.text = rule, text


Checker = Callable[[str], str]
"""Takes a text, returns what to write into the rebuilt archive, or raises Refused."""


def identifier(text: str) -> str:
    """A Python name that is no keyword and no dunder: it is spliced into a generated function."""
    if not _IDENTIFIER.fullmatch(text) or keyword.iskeyword(text) or (text.startswith("__") and text.endswith("__")):
        raise Refused("a name must be a plain identifier", text)
    return text


def argument_name(text: str) -> str:
    """An operator's argument name: an identifier (``from`` and ``self`` occur), or empty."""
    if text and not _IDENTIFIER.fullmatch(text):
        raise Refused("an argument name must be a plain identifier", text)
    return text


def qualified_name(text: str) -> str:
    """A dotted module or parameter path, such as ``layers.0.weight`` or ``relu@1``."""
    if len(text) > 1024 or not _QUALIFIED.fullmatch(text):
        raise Refused("a qualified name must be identifiers joined by dots", text)
    return text


def module_path(text: str) -> str:
    """A dotted module path, or empty for the root."""
    return qualified_name(text) if text else text


def version(text: str) -> str:
    """A version number."""
    if not _VERSION.fullmatch(text):
        raise Refused("a version must be digits, letters, dots and signs", text)
    return text


def plain_text(text: str) -> str:
    """A string argument of an operator: a mode, a device or an einsum equation; no quotes, no brackets."""
    if not _PLAIN.fullmatch(text):
        raise Refused("a string argument must be plain words", text)
    return text


def stack_text(text: str) -> bool:
    """Whether ``text`` may stay as the ``nn_module_stack`` of a node: items of three comma-separated parts."""
    return bool(_STACK.fullmatch(text)) and all(_has_three_parts(item) for item in text.split(";"))


def _has_three_parts(item: str) -> bool:
    depth = commas = 0
    for character in item:
        depth += (character in "[(") - (character in "])")
        commas += character == "," and depth == 0
    return commas == 2


def shape_expression(text: str) -> str:
    """A sympy expression as `srepr` writes it: constructors from a fixed list over symbols and small integers."""
    _shape(_parse(text, "shape expression"), text, power=True)
    return text


def _parse(text: str, what: str) -> ast.expr:
    if len(text) > _EXPRESSION_LIMIT:
        raise Refused(f"a {what} must be shorter than {_EXPRESSION_LIMIT} characters", text)
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Refused(f"a {what} must parse", text) from error


def _shape(node: ast.expr, text: str, power: bool) -> None:
    """Check ``node``; ``power`` tells whether a Pow may still occur (nested powers take sympy for ever)."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "oo"):
        return
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise Refused("a shape expression must be made of sympy constructors", text)
    if node.func.id in _LITERALS:
        if not _LITERALS[node.func.id](node):
            raise Refused(f"{node.func.id} in a shape expression takes plain literals", text)
        return
    if node.keywords or not (node.func.id in _SHAPE_FUNCTIONS or (node.func.id == "Pow" and power)):
        raise Refused(f"a shape expression must not use {node.func.id} here", text)
    if node.func.id == "Pow":
        _power(node, text)
        return
    for argument in node.args:
        _shape(argument, text, power)


def _power(node: ast.Call, text: str) -> None:
    exponent = node.args[1] if len(node.args) == 2 else None
    literal = isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and exponent.func.id == "Integer"
    value = _integer(exponent.args[0]) if literal and isinstance(exponent, ast.Call) and exponent.args else None
    if value is None or abs(value) > 8:
        raise Refused("a power in a shape expression must have a literal exponent of at most 8", text)
    _shape(node.args[0], text, power=False)


def _integer(node: ast.expr) -> int | None:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not (isinstance(inner, ast.Constant) and type(inner.value) is int and inner.value < _INT_LIMIT):
        return None
    return -inner.value if negative else inner.value


def _is_symbol(node: ast.Call) -> bool:
    named = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    if not (named and isinstance(node.args[0], ast.Constant)):
        return False
    name = str(node.args[0].value)
    flags = all(
        word.arg in _ASSUMPTIONS and isinstance(word.value, ast.Constant) and isinstance(word.value.value, bool)
        for word in node.keywords
    )
    fine = bool(_IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name) and not name.startswith("__")
    return flags and fine and name not in _SHAPE_FUNCTIONS and name not in _LITERALS and name != "Pow"


def _is_integer(node: ast.Call) -> bool:
    return not node.keywords and len(node.args) == 1 and _integer(node.args[0]) is not None


def _is_rational(node: ast.Call) -> bool:
    values = [_integer(argument) for argument in node.args]
    return not node.keywords and len(values) == 2 and values[0] is not None and bool(values[1])


def _is_float(node: ast.Call) -> bool:
    digits = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    if not (digits and isinstance(node.args[0], ast.Constant) and _NUMBER.fullmatch(str(node.args[0].value))):
        return False
    precisions = [_integer(word.value) if word.arg == "precision" else None for word in node.keywords]
    return all(value is not None and 1 <= value <= 64 for value in precisions)


_LITERALS: dict[str, Callable[[ast.Call], bool]] = {
    "Symbol": _is_symbol, "Integer": _is_integer, "Rational": _is_rational, "Float": _is_float,
}  # fmt: skip


def guard(text: str) -> str:
    """A condition on input sizes, such as ``L['x'].size()[0] % 2 == 0``."""
    _guard(_parse(text, "guard"), text)
    return text


def _guard(node: ast.expr, text: str) -> None:
    children: list[ast.expr]
    if _is_size(node) or _integer(node) is not None:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | float):
        return
    if isinstance(node, ast.BoolOp):
        children = node.values
    elif isinstance(node, ast.Compare):
        children = [node.left, *node.comparators]
    elif isinstance(node, ast.BinOp):
        children = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        children = [node.operand]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _GUARD_FUNCTIONS:
        children = [*node.args, *(word.value for word in node.keywords)]
    else:
        raise Refused("a guard must compare sizes of inputs", text)
    for child in children:
        _guard(child, text)


def _is_size(node: ast.expr) -> bool:
    """``L['x'][0].size()[1]``, and the same with stride() and storage_offset()."""
    if isinstance(node, ast.Subscript):
        if not _is_key(node.slice):
            return False
        node = node.value
    if isinstance(node, ast.Call):
        if node.args or node.keywords or not isinstance(node.func, ast.Attribute):
            return False
        if node.func.attr not in _SIZE_METHODS:
            return False
        node = node.func.value
    while isinstance(node, ast.Subscript) and _is_key(node.slice):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "L"


def _is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | str)


def tree_spec(text: str) -> str:
    """The nesting of inputs or outputs: tuples, lists and dicts with string keys; any other class would be imported."""
    try:
        protocol, spec = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused("a tree spec must be JSON", text) from error
    if protocol != 1:
        raise Refused("a tree spec must have protocol 1", text)
    return json.dumps([1, _spec(spec, text, 0)])


def _spec(spec: Any, text: str, depth: int) -> dict[str, Any]:
    if not isinstance(spec, dict) or set(spec) != {"type", "context", "children_spec"} or depth > 32:
        raise Refused("a tree spec must nest type, context and children_spec", text)
    children = spec["children_spec"]
    if not isinstance(children, list):
        raise Refused("a tree spec must list its children", text)
    if spec["type"] is None and spec["context"] is None and not children:
        return {"type": None, "context": None, "children_spec": []}
    if not isinstance(spec["type"], str) or spec["type"] not in _SPEC_TYPES:
        raise Refused("inputs and outputs must be tensors in tuples, lists or dicts", spec["type"])
    context = _spec_context(spec["type"], spec["context"], len(children), text)
    return {"type": spec["type"], "context": context, "children_spec": [_spec(c, text, depth + 1) for c in children]}


def _spec_context(kind: str, context: Any, children: int, text: str) -> str:
    if kind in ("builtins.tuple", "builtins.list"):
        if context != "null":
            raise Refused("the context of a tuple or list must be null", text)
        return "null"
    try:
        keys = json.loads(context)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused("the context of a dict must be a list of keys", text) from error
    if not isinstance(keys, list) or len(keys) != children or not all(isinstance(key, str) for key in keys):
        raise Refused("the context of a dict must be a list of keys", text)
    return json.dumps([identifier(key) for key in keys])
