"""The documentation against the program: its code runs, and every command, option, name and link in it exists.

Every ```python block and every line of a ```console or ```sh block that begins with ``qopt`` runs, page by page and in
the order of the page, in a folder of its own that holds the embedded example under the names that the pages use. What
stands below a line ``<!-- not run: REASON -->`` is only read.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import typer
from typer.testing import CliRunner

import qopt
from qopt.cli import app
from qopt.commands.settings import options

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("examples/**/*.md")]
FENCE = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOREIGN = {"--no-deps", "--durations"}
"""Options of other programs that pages mention."""


@dataclass(frozen=True)
class Block:
    """One block of code: its language, its text, and whether it is to run."""

    language: str
    text: str
    runs: bool


def blocks(text: str) -> list[Block]:
    return [Block(match[2], match[3], match[1] is None) for match in FENCE.finditer(text)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every ``qopt`` line, a backslash at the end joining the next one; comments are left out."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip().startswith("qopt "):
            yield shlex.split(line, comments=True)[1:]


def code(block: Block) -> list[str | list[str]]:
    """What of a block runs: the source of Python, or command lines."""
    if not block.runs:
        return []
    if block.language == "python":
        return [block.text]
    return list(commands(block.text)) if block.language in ("console", "sh") else []


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


RUNNING = [page for page in [*PAGES, ROOT / "README.md"] if any(code(block) for block in blocks(page.read_text()))]


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory, examples: Path) -> Path:
    """The embedded example as a newcomer has it, with so few images that every command takes seconds."""
    folder = tmp_path_factory.mktemp("example")
    model = qopt.load(examples / "fashion_resnet.pt")
    ir.save(model, folder / "model.onnx")
    shutil.copy(folder / "model.onnx", folder / "float.onnx")
    shutil.copy(examples / "fashion_resnet.py", folder)
    with np.load(examples / "fashion.npz") as file:
        np.savez(folder / "images.npz", **{name: file[name][: 24 if "train" in name else 12] for name in file.files})
    network = importlib.util.spec_from_file_location("example_network", folder / "fashion_resnet.py")
    assert network is not None
    assert network.loader is not None
    module = importlib.util.module_from_spec(network)
    network.loader.exec_module(module)
    torch.save(module.build().state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the pages share."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.long) for page in RUNNING], ids=named)
def test_code_runs(page: Path, example: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(example, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("QOPT_CACHE", str(kept))
    module = ModuleType("page")  # where classes that a page defines are found again, by pickle for one
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks(page.read_text()):
        for piece in code(block):
            if isinstance(piece, str):
                exec(compile(piece, str(page), "exec", dont_inherit=True), vars(module))
            else:
                run(piece)


def run(words: list[str]) -> None:
    """Run a command; of a few dozen images a gate may fail, or two plans differ, which is exit code 1."""
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"qopt {shlex.join(words)}: {done.exception}") from done.exception
    assert done.exit_code in ((0, 1) if words[0] in ("optimize", "attack", "plan") else (0,)), f"{words}: {done.output}"


def test_most_of_the_code_runs() -> None:
    every = [block for page in PAGES for block in blocks(page.read_text()) if block.language in ("python", "console")]
    assert len(every) > 30
    assert sum(block.runs for block in every) > 0.85 * len(every)


# what pages name


def leaves(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*words, name))
        else:
            yield (*words, name), command


GROUP: Any = typer.main.get_command(app)
COMMANDS = dict(leaves(GROUP))


def spelled(command: Any) -> set[str]:
    """All spellings of a command's options."""
    return {word for one in command.params for word in (*one.opts, *one.secondary_opts)} | {"-h", "--help"}


EVERY = set.union(*(spelled(command) for command in COMMANDS.values()), spelled(GROUP))


def called(words: list[str]) -> tuple[tuple[str, ...], Any]:
    """The command that a line calls; a KeyError where there is none."""
    plain = list(words)
    while plain and plain[0].startswith("-"):  # options before the command, --config FILE
        plain = plain[1:] if plain[0] in ("--version", "--help") else plain[2:]
    key = (plain[0],) if (plain[0],) in COMMANDS else tuple(plain[:2])
    return key, COMMANDS[key]


def lines_of(page: Path) -> list[list[str]]:
    """All ``qopt`` lines of a page: in blocks, indented, and within the text."""
    text = page.read_text()
    fenced = [words for block in blocks(text) if block.language in ("console", "sh", "text") for words in
              commands(block.text)]  # fmt: skip
    indented = list(
        commands("\n".join(line for line in text.split("\n") if line.startswith("    ") or line.endswith("\\")))
    )
    return [words for words in [*fenced, *indented] if words]


@pytest.mark.parametrize("page", READ, ids=named)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in lines_of(page):
        key, command = called(words)
        known = spelled(command) | spelled(GROUP)
        unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
        assert not unknown, f"{page.name}: qopt {' '.join(key)} has no {unknown}"


@pytest.mark.parametrize("page", READ, ids=named)
def test_options_in_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    found = {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    theirs = set(re.findall(r"--[a-z][a-z-]*", (ROOT / "Makefile").read_text())) | FOREIGN
    programs = set(re.findall(r"--[a-z][a-z-]*", "".join(f.read_text() for f in ROOT.glob("benchmarks/*.py"))))
    assert found <= EVERY | theirs | programs, sorted(found - EVERY - theirs - programs)


@pytest.mark.parametrize("page", READ, ids=named)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    spans = [*re.findall(r"`make ([a-z ]+)`", text), *re.findall(r"^ {4}make ([a-z]+)", text, re.MULTILINE)]
    fenced = re.findall(r"^make ([a-z]+)", text, re.MULTILINE)
    assert {word for span in [*spans, *fenced] for word in span.split()} <= targets


@pytest.mark.parametrize("page", READ, ids=named)
def test_files_that_the_text_names_are_there(page: Path) -> None:
    known = ("benchmarks/", "examples/", "docs/", "qopt/", "tests/")
    for span in re.findall(r"`([^`\s]+)`", FENCE.sub("", page.read_text())):
        if span.startswith(known) and re.fullmatch(r"[\w./-]+", span) and "NAME" not in span:
            assert (ROOT / span).exists(), f"{page.name} names {span}"


@pytest.mark.parametrize("page", READ, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s#]+)[^)]*\)", FENCE.sub("", page.read_text())):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_dotted_names_exist(page: Path) -> None:
    spans = re.findall(r"`(qopt(?:\.\w+)+)`", page.read_text())
    directives = re.findall(r"auto\w+:: (qopt[\w.]+)", page.read_text())
    for name in dict.fromkeys([*spans, *directives]):
        if name not in ("qopt.toml", *(group for group in groups()), "qopt.format"):
            assert there(name), f"{page.name} names {name}"


def groups() -> tuple[str, ...]:
    from qopt.plugins import BUILT_IN

    return tuple(BUILT_IN)


def there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    words = name.split(".")
    for place in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:place]))
        except ImportError:
            continue
        for word in words[place:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


# the pages themselves


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pages_are_short_and_have_one_title(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", FENCE.sub("", text), re.MULTILINE)) == 1
    assert len(text.splitlines()) < 150


def test_every_page_is_in_the_index() -> None:
    text = (DOCS / "index.md").read_text()
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^[\w/-]+$", "\n".join(trees), re.MULTILINE)
    assert sorted(entries) == sorted({page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"})


def test_the_public_surface_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "api.md").read_text() + (DOCS / "reference" / "file-formats.md").read_text()
    missing = [name for name in qopt.__all__ if not re.search(rf"qopt\.{name}\b|\b{name}\b", text)]
    assert missing in ([], ["__version__"])


def test_the_options_of_python_and_of_the_command_line_are_one() -> None:
    keys = {key.replace("-", "_").removesuffix("s") for key in options(COMMANDS[("optimize",)])}
    fields = {name.removesuffix("s") for name in qopt.Options.__dataclass_fields__}
    assert fields <= keys, sorted(fields - keys)


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    shutil.copy(DOCS / "pictures" / "draw.py", tmp_path)
    subprocess.run([sys.executable, str(tmp_path / "draw.py")], check=True)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_bytes() for path in (DOCS / "pictures").glob("*.svg")}
    text = (DOCS / "idea.md").read_text()
    assert set(drawn) == set(re.findall(r"\(pictures/([\w.]+)\)", text))


# what is written when the documentation is built


@pytest.fixture(scope="module")
def generated() -> Any:
    return imported("generated")


def imported(name: str) -> Any:
    place = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def test_marks_are_known(generated: Any) -> None:
    marks = {mark for page in PAGES for mark in generated.MARK.findall(page.read_text())}
    assert marks == set(generated.GENERATED)
    with pytest.raises(KeyError):
        generated.filled("<!-- generated: nothing -->")


def test_the_command_line_page_has_every_option(generated: Any) -> None:
    text = generated.commands()
    sections = dict(re.findall(r"^## qopt ([a-z ]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == {" ".join(words) for words in COMMANDS}
    for words, command in COMMANDS.items():
        for key in options(command):
            assert f"`--{key}`" in sections[" ".join(words)], (words, key)
    assert "| `--target` | Targets" in sections["optimize"]
    assert "| `--threshold` | Bound of relative and weighted thresholds. | `0.25` |" in sections["optimize"]


def test_tables_are_whole(generated: Any) -> None:
    assert set(re.findall(r"\.\./schemas/([\w.]+)\)", generated.schemas())) == {
        path.name for path in (DOCS / "schemas").iterdir()
    }
    assert all(f"`{name}`" in generated.targets() for name in ("int4", "stm32f4", "x86-avx2"))
    assert all(f"| `{group}` |" in generated.plugins() for group in groups())
    logs = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert set(re.findall(r"^```\{include\} \S+/(\S+\.md)$", generated.figures(), re.MULTILINE)) == logs


def test_tables_hold_their_cells(generated: Any) -> None:
    for table in (generated.commands(), generated.schemas(), generated.targets(), generated.plugins()):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        width = 0
        for row in rows:
            cells = len(re.findall(r"(?<!\\)\|", row))
            width = width if not re.match(r"\| (option|document|group|target) ", row) else cells
            assert cells == width, row


def test_headings_of_logs_go_down_one_level_at_a_time() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        levels = [len(mark) for mark in re.findall(r"^(#+) ", FENCE.sub("", path.read_text()), re.MULTILINE)]
        assert levels[0] == 1, path.name
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), path.name


FIELDS = [
    (["What it does.", "", "Args:", "    one: a number.", "    **rest: the", "        others.", "", "Returns:",
      "    The bundle: bytes.", "", "Raises:", "    UsageError: a wrong option."],
     ["What it does.", "", "", ":param one: a number.", ":param \\*\\*rest: the", "    others.", "", "",
      ":returns:", "    The bundle: bytes.", "", "", ":raises UsageError: a wrong option."]),
    (["One thing: another."], ["One thing: another."]),
    (["Attributes:", "    a: b; ``c: d`` too.", "", "Then text."],
     ["", ":ivar a: b; ``c: d`` too.", "", "", "Then text."]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "expected"), FIELDS)
def test_sections_of_docstrings_become_fields(lines: list[str], expected: list[str]) -> None:
    assert imported("docstrings").fields(lines) == expected


# docstrings


def public_functions() -> Iterator[tuple[str, Any, str]]:
    """Every function and method of the names in `qopt.__all__` and of the plugin protocols."""
    import inspect

    text = (DOCS / "reference" / "api.md").read_text()
    for name in re.findall(r"auto(?:function|class):: (qopt[\w.]+)", text):
        module, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(module), last)
        yield name, found, inspect.getdoc(found) or ""
        for method, member in vars(found).items() if isinstance(found, type) else ():
            if inspect.isfunction(member) and not method.startswith("_") and member.__module__.startswith("qopt"):
                yield f"{name}.{method}", member, inspect.getdoc(member) or ""


def test_public_functions_have_docstrings() -> None:
    found = list(public_functions())
    assert len(found) > 80
    assert not [name for name, _, text in found if len(text) < 15]


def test_calls_document_every_argument_and_their_errors() -> None:
    for name in ("optimize", "attack", "certify", "analyze"):
        call = getattr(importlib.import_module("qopt"), name)
        text = call.__doc__
        arguments = [word for word in call.__annotations__ if word not in ("return", "options")]
        assert not [word for word in arguments if not re.search(rf"^ +{word}: |``{word}``", text, re.MULTILINE)], name
        assert "Raises:" in text
        assert "Returns:" in text


def test_exit_codes_are_those_of_the_program() -> None:
    from qopt import errors

    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", (DOCS / "reference" / "cli.md").read_text(), re.MULTILINE))
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)
             and issubclass(kind, errors.QoptError)}  # fmt: skip
    assert {int(code) for code in table} == codes | {0, 1}


def test_what_the_program_writes_is_in_the_table_of_files(example: Path) -> None:
    text = (DOCS / "reference" / "file-formats.md").read_text()
    bundle = qopt.optimize(example / "model.onnx", target="int8")
    assert all(f"`{name}`" in text for name in bundle.files())
    manifest = json.loads(bundle.files()["manifest.json"])
    assert [key for key in manifest if f"`{key}`" not in text] == []
