"""The grammars of the audit: what torch writes is taken word for word, everything else is refused."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Callable

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.graph import audit_grammar as grammar
from qopt.graph.audit_grammar import Refused
from qopt.graph.audit_operators import operator

S = "Symbol('s77', positive=True, integer=True)"
LEAF: dict[str, object] = {"type": None, "context": None, "children_spec": []}


def spec(kind: object, context: object, children: int = 1) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": [LEAF] * children}])


HONEST: list[tuple[Callable[[str], str], str]] = [
    (grammar.shape_expression, S),
    (grammar.shape_expression, "Symbol('u0', integer=True)"),
    (grammar.shape_expression, f"Add(Mul(Integer(2), {S}), Integer(-1))"),
    (grammar.shape_expression, f"Mul(Rational(1, 2), {S})"),
    (grammar.shape_expression, f"FloorDiv(Add({S}, Integer(1)), Integer(2))"),
    (grammar.shape_expression, f"Pow({S}, Integer(2))"),
    (grammar.shape_expression, f"Max(Integer(1), Min({S}, Integer(16)))"),
    (grammar.shape_expression, f"Equality(Mod({S}, Integer(2)), Integer(0))"),
    (grammar.shape_expression, "Float('0.5', precision=53)"),
    (grammar.shape_expression, f"And(StrictLessThan({S}, Integer(9)), true)"),
    (grammar.guard, "L['x'].size()[0] == L['y'].size()[0]"),
    (grammar.guard, "((2 + 2*L['x'].size()[2]) % (1 + L['x'].size()[2])) == 0"),
    (grammar.guard, "L['args'][0]['a'].size()[1] >= 2 and not L['x'].stride()[0] < 4"),
    (grammar.guard, "Eq(Mod(L['x'].size()[0], 2), 0)"),
    (grammar.guard, "L['x'].storage_offset() == 0"),
    (grammar.identifier, "p_layers_0_weight"),
    (grammar.argument_name, "self"),
    (grammar.argument_name, "from"),
    (grammar.argument_name, ""),
    (grammar.qualified_name, "layers.0.self_attn.in_proj_weight"),
    (grammar.qualified_name, "relu@1"),
    (grammar.module_path, ""),
    (grammar.version, "2.13.0+cpu"),
    (grammar.version, "<=2.4"),
    (grammar.plain_text, "bij,bjk->bik"),
    (grammar.plain_text, "cuda:0"),
    (grammar.plain_text, "tanh"),
    (grammar.tree_spec, json.dumps([1, LEAF])),
    (grammar.tree_spec, spec("builtins.tuple", "null", 2)),
    (grammar.tree_spec, spec("builtins.dict", '["logits", "aux"]', 2)),
    (grammar.tree_spec, spec("collections.OrderedDict", '["a"]')),
    (operator, "torch.ops.aten.conv2d.default"),
    (operator, "torch.ops.aten.add.Tensor"),
    (operator, "torch.ops.higher_order.cond"),
    (operator, "_operator.getitem"),
    (operator, "torch.sym_max"),
]


@pytest.mark.parametrize(("rule", "text"), HONEST)
def test_what_torch_writes_is_taken_unchanged(rule: Callable[[str], str], text: str) -> None:
    assert rule(text) == text


HOSTILE: list[tuple[Callable[[str], str], str]] = [
    (grammar.shape_expression, "__import__('os').system('true')"),
    (grammar.shape_expression, f"Add(__import__('os').system('true'), {S})"),
    (grammar.shape_expression, "(lambda: 1)()"),
    (grammar.shape_expression, f"{S}.func"),
    (grammar.shape_expression, "Integer(1).__class__"),
    (grammar.shape_expression, "s77"),
    (grammar.shape_expression, "2 + 2"),
    (grammar.shape_expression, ""),
    (grammar.shape_expression, "Integer(1)\nInteger(2)"),
    (grammar.shape_expression, "Integer('1')"),
    (grammar.shape_expression, "Integer(1.5)"),
    (grammar.shape_expression, f"Integer({2**70})"),
    (grammar.shape_expression, "Integer(True)"),
    (grammar.shape_expression, "Rational(1, 0)"),
    (grammar.shape_expression, "Symbol(s77)"),
    (grammar.shape_expression, "Symbol('a b')"),
    (grammar.shape_expression, "Symbol('__import__')"),
    (grammar.shape_expression, "Symbol('Pow')"),
    (grammar.shape_expression, "Symbol('Integer')"),
    (grammar.shape_expression, "Symbol('lambda')"),
    (grammar.shape_expression, "Symbol('s', cls=open)"),
    (grammar.shape_expression, "Symbol('s', positive=1)"),
    (grammar.shape_expression, "Symbol('s', commutative=True)"),
    (grammar.shape_expression, "Symbol('s', **{'positive': True})"),
    (grammar.shape_expression, f"Add(*[{S}])"),
    (grammar.shape_expression, f"Add({S}, evaluate=False)"),
    (grammar.shape_expression, f"Pow({S}, Integer(9))"),
    (grammar.shape_expression, f"Pow({S}, {S})"),
    (grammar.shape_expression, f"Pow({S})"),
    (grammar.shape_expression, f"Pow(Pow({S}, Integer(8)), Integer(8))"),
    (grammar.shape_expression, f"Pow(Add({S}, Pow({S}, Integer(2))), Integer(8))"),
    (grammar.shape_expression, "LShift(Integer(1), Integer(1000000000000))"),
    (grammar.shape_expression, "factorial(Integer(1000000))"),
    (grammar.shape_expression, "Float('1', precision=1000000000)"),
    (grammar.shape_expression, "Float('1', dps=1000000000)"),
    (grammar.shape_expression, "Float('1e999999999')"),
    (grammar.shape_expression, "Float(1)"),
    (grammar.shape_expression, "Abs(" * 3000 + "Integer(1)" + ")" * 3000),
    (grammar.shape_expression, "Integer(1)" + " " * 20000),
    (grammar.guard, "True); print(1); (1"),
    (grammar.guard, "print(1) == 1"),
    (grammar.guard, "torch.load('x') == 1"),
    (grammar.guard, "L['x'].__class__ == 1"),
    (grammar.guard, "L['x'].size(print(1))[0] == 1"),
    (grammar.guard, "L[print(1)].size()[0] == 1"),
    (grammar.guard, "L['x'].size()[print(1)] == 1"),
    (grammar.guard, "M['x'].size()[0] == 1"),
    (grammar.guard, "'a' * 10**9 == 1"),
    (grammar.guard, "[x for x in 1]"),
    (grammar.guard, "(y := 1) == 1"),
    (grammar.guard, "Eq(1, key=print())"),
    (grammar.guard, f"L['x'].size()[0] == {2**70}"),
    (grammar.identifier, ""),
    (grammar.identifier, "a b"),
    (grammar.identifier, "a\n"),
    (grammar.identifier, "a=print(1)"),
    (grammar.identifier, "lambda"),
    (grammar.identifier, "None"),
    (grammar.identifier, "__builtins__"),
    (grammar.identifier, "ﬁeld"),
    (grammar.identifier, "x" * 300),
    (grammar.argument_name, "a'"),
    (grammar.qualified_name, ""),
    (grammar.qualified_name, "a..b"),
    (grammar.qualified_name, "../a"),
    (grammar.qualified_name, 'a"].b'),
    (grammar.qualified_name, "a.b\n"),
    (grammar.version, "2.0'; x"),
    (grammar.version, ""),
    (grammar.plain_text, "a'b"),
    (grammar.plain_text, "f(x)"),
    (grammar.plain_text, "x" * 300),
    (grammar.tree_spec, "x"),
    (grammar.tree_spec, "3"),
    (grammar.tree_spec, "[1]"),
    (grammar.tree_spec, "[" * 100_000),
    (grammar.tree_spec, json.dumps([2, LEAF])),
    (grammar.tree_spec, json.dumps([1, {"type": None}])),
    (grammar.tree_spec, json.dumps([1, {**LEAF, "more": 1}])),
    (grammar.tree_spec, json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": 3}])),
    (grammar.tree_spec, spec("builtins.tuple", "[1]")),
    (grammar.tree_spec, spec("builtins.dict", '["a", "b"]')),
    (grammar.tree_spec, spec("builtins.dict", "[1]")),
    (grammar.tree_spec, spec("builtins.dict", '["a b"]')),
    (grammar.tree_spec, spec("builtins.dict", None)),
    (grammar.tree_spec, spec("builtins.dict", '[{"__enum__": true, "fqn": "antigravity:A"}]')),
    (grammar.tree_spec, spec("collections.defaultdict", '{"default_factory_module": "antigravity"}')),
    (grammar.tree_spec, spec("collections.namedtuple", "null")),
    (grammar.tree_spec, spec(["builtins.tuple"], "null")),
    (operator, "torch.ops.aten.from_file.default"),
    (operator, "torch.ops.aten.add.__class__"),
    (operator, "torch.ops.aten.add.no_such_overload"),
    (operator, "torch.ops.aten.add"),
    (operator, "torch.ops.aten.add.Tensor.name"),
    (operator, "torch.os.system"),
    (operator, "builtins.eval"),
    (operator, "_operator.methodcaller"),
    (operator, "torch.ops.higher_order.while_loop"),
    (operator, ""),
]


@pytest.mark.parametrize(("rule", "text"), HOSTILE)
def test_everything_else_is_refused(rule: Callable[[str], str], text: str) -> None:
    with pytest.raises(Refused) as caught:
        rule(text)
    assert caught.value.rule


ATOMS = st.one_of(
    st.integers(-9, 99).map(sympy.Integer),
    st.sampled_from(["s0", "s77", "u3"]).map(lambda name: sympy.Symbol(name, positive=True, integer=True)),
)
SIZES = st.recursive(
    ATOMS, lambda inner: st.tuples(inner, inner).map(lambda pair: pair[0] * 3 + pair[1]), max_leaves=12
)


@given(SIZES)
@settings(max_examples=60)
def test_any_linear_size_that_sympy_prints_is_taken(size: sympy.Expr) -> None:
    text = sympy.srepr(size)
    assert grammar.shape_expression(text) == text


@given(st.text(string.printable, max_size=40))
@settings(max_examples=200)
def test_random_text_never_gives_anything_but_refused(text: str) -> None:
    for rule in (grammar.shape_expression, grammar.guard, grammar.tree_spec, operator):
        with contextlib.suppress(Refused):
            assert rule(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "context", "children_spec"]), inner)
        ),
    )
)
@settings(max_examples=200)
def test_random_tree_specs_never_give_anything_but_refused(value: object) -> None:
    with contextlib.suppress(Refused):
        assert grammar.tree_spec(json.dumps([1, value]))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("L__self__,,net.Net;L__self__stem,stem,torch.nn.modules.conv.Conv2d", True),
        ("L__self__,,f(a,b)", True),
        ("L__self__,", False),
        ("a,b,c,d", False),
        ("a,b,c\nd", False),
        ("", False),
    ],
)
def test_module_stacks_have_three_parts(text: str, kept: bool) -> None:
    assert grammar.stack_text(text) is kept


def test_every_listed_operator_exists_and_takes_no_file_name() -> None:
    from qopt.graph.audit_operators import _ATEN

    for name in _ATEN:
        packet = getattr(torch.ops.aten, name)
        schemas = [str(getattr(packet, overload)._schema) for overload in packet.overloads()]
        assert not any("filename" in schema for schema in schemas), name
