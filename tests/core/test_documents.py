"""Strict reading of JSON documents, nested ones included."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qopt.documents import Document, read
from qopt.errors import PlanError, UsageError


class Leaf(Document):
    width: float
    flag: bool = False


class Tree(Document):
    name: str
    leaves: list[Leaf] = []  # noqa: RUF012
    best: Leaf | None = None
    table: dict[str, Leaf] = {}  # noqa: RUF012
    pair: tuple[int, int] = (0, 0)


RIGHT = [
    ('{"name": "a"}', Tree(name="a")),
    (
        '{"name": "a", "leaves": [{"width": 1}, {"width": 2.5}]}',
        Tree(name="a", leaves=[Leaf(width=1), Leaf(width=2.5)]),
    ),
    ('{"name": "", "best": {"width": 0, "flag": true}}', Tree(name="", best=Leaf(width=0, flag=True))),
    (
        '{"name": "a", "pair": [1, 2], "table": {"x": {"width": 1}}}',
        Tree(name="a", pair=(1, 2), table={"x": Leaf(width=1)}),
    ),
]


@pytest.mark.parametrize(("text", "tree"), RIGHT)
def test_documents_are_read(text: str, tree: Tree) -> None:
    assert read(Tree, text, "tree.json", UsageError) == tree


WRONG = [
    ("{}", "the key 'name' is missing"),
    ('{"name": 1}', "key 'name': Input should be a valid string (got 1)"),
    ('{"nam": "a"}', "the key 'name' is missing"),
    ('{"name": "a", "leafs": []}', "unknown key 'leafs'; did you mean 'leaves'"),
    ('{"name": "a", "leaves": [{"width": 1}, {"with": 1}]}', "the key 'leaves.1.width' is missing"),
    ('{"name": "a", "leaves": [{"width": 1, "flog": true}]}', "unknown key 'leaves.0.flog'; did you mean 'flag'?"),
    ('{"name": "a", "best": {"width": 1, "hue": 1}}', "unknown key 'best.hue'; one of flag, width"),
    ('{"name": "a", "table": {"x": {"width": 1, "wide": 1}}}', "unknown key 'table.x.wide'; did you mean 'width'?"),
    ('{"name": "a", "leaves": [{"width": NaN}]}', "key 'leaves.0.width': Input should be a finite number (got nan)"),
    ('{"name": "a", "leaves": [{"width": "1"}]}', "key 'leaves.0.width': Input should be a valid number (got '1')"),
    ('{"name": "a", "leaves": [{"width": 1, "flag": 1}]}', "key 'leaves.0.flag': Input should be a valid boolean"),
    ('{"name": "a", "pair": [1.5, 2]}', "key 'pair.0': Input should be a valid integer (got 1.5)"),
    ('{"name": "a", "table": {"x": {"width": 1}, "x": {"width": 2}}}', "the key 'x' is there twice; keep one of them"),
    ('"name"', "the document is no JSON object (got 'name')"),
    ('{"name": "a"} {}', "not valid JSON (got trailing characters"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_the_first_thing_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        read(Tree, text, "tree.json", PlanError)
    assert str(caught.value).startswith(f"tree.json: {message}")
    assert "\n" not in str(caught.value)


def test_documents_do_not_change_and_hold_finite_numbers() -> None:
    leaf = Leaf(width=1)
    with pytest.raises(ValidationError, match="frozen"):
        leaf.width = 2
    with pytest.raises(ValidationError, match="finite"):
        Leaf(width=float("inf"))
