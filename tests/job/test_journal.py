"""The journal: what a killed writer leaves is taken over or ignored, never misread; Ctrl-C writes the best plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import UsageError
from qopt.job.journal import NAME, Journal, kept_plan
from qopt.plan import Plan, read_plan
from qopt.search.evaluation import Evaluation

IDENTITY: dict[str, Any] = {"model": "m", "data": "d", "--search": "refit", "--limits": ["bits<=3"]}


def plan(number: int) -> Plan:
    return Plan(weights={"a": f"int{2 + number % 7}", "b": f"int{2 + number // 7 % 7}"}, reasons={"a": f"{number}"})


def measured(number: int, robust: bool = True) -> Evaluation:
    return Evaluation(1 / (number + 3), (number * 7 % 5) / 3 if robust else None, 3.0 + number / 10, 1000 + number)


def journal(path: Path | None, *, resume: bool = False, **changes: Any) -> Journal:
    found = Journal(path, resume=resume)
    found.open({**IDENTITY, **changes})
    return found


def filled(path: Path | None, count: int, **options: Any) -> Journal:
    found = journal(path, **options)
    for number in range(count):
        found.append(plan(number), measured(number, robust=number % 2 == 0))
    return found


def test_what_was_appended_is_found_again_digit_for_digit(tmp_path: Path) -> None:
    first = filled(tmp_path / "out" / NAME, 5)
    second = journal(tmp_path / "out" / NAME, resume=True)
    for number in range(5):
        assert second.measured(plan(number)) == measured(number, robust=number % 2 == 0)
    assert second.measured(plan(5)) is None
    assert second.text == first.text
    assert [json.loads(line)["plan"]["weights"] for line in first.text.splitlines()] == [
        plan(number).weights for number in range(5)
    ]


def test_without_resume_the_file_is_begun_anew(tmp_path: Path) -> None:
    filled(tmp_path / NAME, 5)
    again = journal(tmp_path / NAME)
    assert again.measured(plan(0)) is None
    again.append(plan(9), measured(9))
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 2


def test_nothing_is_written_before_the_first_plan_and_nothing_without_a_path(tmp_path: Path) -> None:
    journal(tmp_path / "out" / NAME)
    assert not (tmp_path / "out").exists()
    found = filled(None, 3)
    found.discard()
    assert found.best is not None
    assert not list(tmp_path.iterdir())


def test_a_plan_is_entered_once(tmp_path: Path) -> None:
    found = filled(tmp_path / NAME, 2)
    found.append(plan(1), measured(8))
    assert found.measured(plan(1)) == measured(1, robust=False)
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 3


@settings(max_examples=60)
@given(data=st.data())
def test_cut_anywhere_the_whole_lines_remain_and_the_next_one_follows_them(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / NAME
    filled(path, 4)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    noise = data.draw(st.sampled_from([b"", b"\0\0\0", b'{"clean": 1', b"\xff\n"]))
    path.write_bytes(content[:cut] + noise)
    kept = max(content[:cut].count(b"\n") - 1, 0)
    found = journal(path, resume=True)
    assert [found.measured(plan(number)) is not None for number in range(4)] == [n < kept for n in range(4)]
    for number in range(4):
        found.append(plan(number), measured(number, robust=number % 2 == 0))
    assert path.read_bytes()[: len(content)] == content, "an uninterrupted run writes something else"
    assert kept == 4 or path.read_bytes() == content, "something is left of the torn line"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, ["another model", 'expected "other", got "m"']),
        ({"data": ""}, ["another data"]),
        ({"--search": "optuna"}, ["another --search", 'expected "optuna", got "refit"']),
        ({"--limits": ["bits<=2"]}, ["another --limits"]),
        ({"--seed": 1}, ["another --seed", "expected 1, got null"]),
    ],
)
def test_a_journal_of_another_run_is_refused_and_stays(
    tmp_path: Path, change: dict[str, Any], words: list[str]
) -> None:
    filled(tmp_path / NAME, 2)
    content = (tmp_path / NAME).read_bytes()
    with pytest.raises(UsageError) as caught:
        journal(tmp_path / NAME, resume=True, **change)
    assert [word for word in ["cannot resume", "without --resume", *words] if word not in str(caught.value)] == []
    assert (tmp_path / NAME).read_bytes() == content


@pytest.mark.parametrize("line", [b'{"journal": 1}', b'{"plan": {}, "clean": 1.0}', b"[]"])
def test_a_first_line_of_something_else_takes_nothing_over(tmp_path: Path, line: bytes) -> None:
    (tmp_path / NAME).write_bytes(line + b"\n")
    if line == b"[]":
        assert journal(tmp_path / NAME, resume=True).best is None
    else:
        with pytest.raises(UsageError, match="cannot resume"):
            journal(tmp_path / NAME, resume=True)


@pytest.mark.parametrize("line", [b"{}", b'{"clean": 1, "plan": {"weights": {"a": "int99"}}}', b'{"plan": 3}'])
def test_a_line_that_holds_no_plan_ends_what_is_taken_over(tmp_path: Path, line: bytes) -> None:
    filled(tmp_path / NAME, 2)
    head, first, second = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / NAME).write_bytes(head + first + line + b"\n" + second)
    found = journal(tmp_path / NAME, resume=True)
    assert found.measured(plan(0)) is not None
    assert found.measured(plan(1)) is None


def test_the_best_is_the_measured_one_of_least_divergence_until_a_plan_is_proposed() -> None:
    assert journal(None).best is None
    found, totals = journal(None), {}
    for number in range(6):
        found.append(plan(number), measured(number))
        totals[number] = measured(number).clean + (measured(number).robust or 0)
    assert found.best == plan(min(totals, key=totals.__getitem__))
    found.propose(plan(40))
    assert found.best == plan(40)


def test_ctrl_c_writes_the_best_plan(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"the best plan so far is .*plan\.json"):
        interrupted(filled(None, 3), tmp_path / "out")
    assert read_plan(tmp_path / "out" / "plan.json").digest == plan(1).digest


def test_ctrl_c_leaves_the_output_of_another_run_whole(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "plan.json").write_text("old")
    with pytest.raises(KeyboardInterrupt, match=r"interrupted\.plan\.json"):
        interrupted(filled(None, 3), tmp_path)
    assert (tmp_path / "plan.json").read_text() == "old"


@pytest.mark.parametrize("count", [0, 2])
def test_ctrl_c_with_nothing_to_write_or_nowhere_says_nothing(tmp_path: Path, count: int) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted(filled(None, count), None if count else tmp_path)
    assert str(caught.value) == ""
    assert not list(tmp_path.iterdir())


def interrupted(found: Journal, folder: Path | None) -> None:
    with kept_plan(found, folder):
        raise KeyboardInterrupt


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write the journal"):
        filled(tmp_path / "file" / NAME, 1)
    (tmp_path / NAME).mkdir()
    with pytest.raises(UsageError, match=r"cannot read the journal"):
        journal(tmp_path / NAME, resume=True)


def test_done_it_is_gone(tmp_path: Path) -> None:
    found = filled(tmp_path / NAME, 1)
    found.discard()
    found.discard()
    assert not list(tmp_path.iterdir())
