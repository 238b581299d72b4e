"""References to the user's code: found beside the current directory, called without arguments, mistakes in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qopt.errors import UsageError
from qopt.factories import call, importable_here, resolve

SOURCE = """
print("imported")
number = 3
def made():
    print("called")
    return {"x": 1}
def lazy():
    import userside_beside
    return userside_beside.value
def raises():
    raise ValueError("first line\\nsecond line")
def silent():
    raise ValueError
def exits():
    raise SystemExit(3)
class Class:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "userside_code.py").write_text(SOURCE)
    (tmp_path / "userside_beside.py").write_text("value = 7\n")
    monkeypatch.chdir(tmp_path)
    for name in [key for key in sys.modules if key.startswith("userside_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_the_callable_is_found_and_called(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    assert resolve("userside_code:made", "--data")() == {"x": 1}
    assert call("userside_code:lazy", "--data") == 7
    assert type(call("userside_code:Class", "--data")).__name__ == "Class"
    assert sys.path == path
    assert capsys.readouterr().out == "called\n"  # by the test itself


def test_prints_go_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("userside_code:made", "--data")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "imported\ncalled\n"


WRONG: list[tuple[str, str]] = [
    ("userside_code", "--data: not a factory (expected package.module:name, got 'userside_code')"),
    ("userside_code:", "--data: not a factory"),
    (":made", "--data: not a factory"),
    ("userside_code:made()", "--data: not a factory"),
    ("userside_code:a.b", "--data: not a factory"),
    ("userside_cod:made", "--data userside_cod:made: there is no module 'userside_cod'; did you mean 'userside_code'"),
    ("userside_code:mad", "--data: module userside_code has no 'mad'; did you mean 'made'?"),
    ("userside_code:number", "--data userside_code:number: the factory is not callable (got int)"),
    (
        "userside_code:raises",
        "--data userside_code:raises: the factory raised (got ValueError: first line at userside_code.py:11)",
    ),
    (
        "userside_code:silent",
        "--data userside_code:silent: the factory raised (got ValueError: at userside_code.py:13)",
    ),
    (
        "userside_code:exits",
        "--data userside_code:exits: the factory raised (got SystemExit: 3 at userside_code.py:15)",
    ),
]


@pytest.mark.parametrize(("reference", "message"), WRONG)
def test_mistakes_are_one_line(folder: Path, reference: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call(reference, "--data")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_current_directory_is_added_once_and_taken_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    with importable_here():
        assert sys.path == [str(folder), *before]
        with importable_here():
            assert sys.path == [str(folder), *before]
        assert sys.path == [str(folder), *before]
    assert sys.path == before
    monkeypatch.syspath_prepend(str(folder))
    with importable_here():
        assert sys.path.count(str(folder)) == 1
    assert sys.path.count(str(folder)) == 1
