"""The views of a comparison that was made by hand: no number is lost, pictures are well-formed, tables stay narrow."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.errors import UsageError
from qopt.report.comparison import (
    ActivationShiftRow,
    AgreementRow,
    AttackFigures,
    ComparedModel,
    Comparison,
    ExamplesRow,
    Matrix,
    OnExamples,
    ValueShift,
    VoteRow,
)
from qopt.report.comparison_views import html, markdown, sections, text, write
from qopt.report.heatmap import LONGEST, STYLE, TURN, HeatMap, number
from qopt.report.model import Share
from qopt.report.schemas import schema
from qopt.report.tables import Section, Table, page

ATTACKS = ("FGSM", "BIM-100", "CW-L2 10x100", "SPSA-100")
SVG = "{http://www.w3.org/2000/svg}"


def comparison(networks: int = 3, names: tuple[str, ...] = ()) -> Comparison:
    """Every number is another one, all below 100; the last network is no source of the first attack."""
    numbers = (round(0.7 + 0.1 * k, 1) for k in count())
    keys = "ABCDEF"[:networks]

    def matrix(missing: int | None = None) -> Matrix:
        return [[None if row == missing else next(numbers) for _ in keys] for row in range(networks)]

    models = [
        ComparedModel(
            key=key, name=names[i] if names else f"network-{i}-with-a-name", digest=f"{i}" * 64,
            clean=Share(value=next(numbers), low=1.0, high=99.0, n=50),
            twin_agreement=None if i == 2 else next(numbers), no_gradients="no twin" if i == 2 else "",
            quantized_activations=i == 1,
        )
        for i, key in enumerate(keys)
    ]  # fmt: skip
    attacks = [
        AttackFigures(
            name=name, bound="linf 0.1", accuracy=matrix(networks - 1 if name == "FGSM" else None),
            weight_shift=matrix(),
            examples=[ExamplesRow(source=k, choice="", fooled=7, l2=next(numbers), linf=0.03) for k in keys],
        )
        for name in ATTACKS
    ]  # fmt: skip
    agreement = [
        AgreementRow(
            source=key, clean_right=next(numbers), clean_wrong=None,
            attacks={
                name: OnExamples(fooled=next(numbers), not_fooled=next(numbers))
                for name in ATTACKS
                if (key, name) != (keys[-1], "FGSM")
            },
        )
        for key in keys
    ]  # fmt: skip
    shifts = [
        ActivationShiftRow(
            attack=name, source="A", target="B", rate=next(numbers), quantized=3,
            values=[ValueShift(value=v, rate=next(numbers) / 100, images=100.0) for v in ("relu|1", "relu<2>")],
        )
        for name in ATTACKS
    ]  # fmt: skip
    places = [("", ""), *((name, key) for name in ATTACKS for key in keys)]
    votes = [
        VoteRow(
            attack=name, source=key, threshold=m, prediction_rate=next(numbers),
            accuracy=None if m == networks else next(numbers), defence_accuracy=next(numbers),
        )
        for name, key in places
        for m in range(networks // 2 + 1, networks + 1)
    ]  # fmt: skip
    cosines: Matrix = [[(-1) ** (i + j) * (0.1 + 0.1 * abs(i - j)) for j in range(networks)] for i in range(networks)]
    cosines[-1] = [None] * networks
    return Comparison(
        command="qopt compare a b", threat="linf 0.1", seed=5, images=50, shifted=40, data="ab", models=models,
        attacks=attacks, cosines=cosines, agreement=agreement, activation_shift=shifts, votes=votes,
        notes=["a note, <b>bold</b> & more"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Comparison:
    return comparison()


def shown_numbers(found: Comparison) -> set[str]:
    """What must be in every whole report."""
    matrices = [m for a in found.attacks for m in (a.accuracy, a.weight_shift)]
    wanted = {f"{v:.1f}" for matrix in matrices for row in matrix for v in row if v is not None}
    wanted |= {f"{v:.2f}" for row in found.cosines for v in row if v is not None}
    for vote in found.votes:
        wanted |= {f"{v:.1f}" for v in (vote.prediction_rate, vote.accuracy, vote.defence_accuracy) if v is not None}
    for row in found.agreement:
        pairs = [(row.clean_right, row.clean_wrong), *((m.fooled, m.not_fooled) for m in row.attacks.values())]
        wanted |= {f"{v:.1f}" for pair in pairs for v in pair if v is not None}
    wanted |= {f"{shift.rate:.2f}" for shift in found.activation_shift if shift.rate >= 1}
    return wanted | {f"{m.clean.value:.1f}" for m in found.models}


def test_json_is_read_back(found: Comparison) -> None:
    assert Comparison.from_json(found.to_json()) == found
    assert found.to_json() == comparison().to_json()
    assert found.to_json().startswith('{\n  "schema": 1,\n')
    with pytest.raises(UsageError, match=r"here\.json: the key 'seed' is missing"):
        Comparison.from_json(found.to_json().replace('"seed"', '"sead"'), "here.json")


def test_no_number_is_lost(found: Comparison) -> None:
    for view in (markdown(found), html(found)):
        words = set(re.findall(r"-?\d+\.\d+", view))
        assert shown_numbers(found) - words == set()
        assert {"0.7", "7"} <= set(re.findall(r"\d+(?:\.\d+)?", view))
    assert {f"{m.clean.value:.1f}" for m in found.models} <= set(re.findall(r"\d+\.\d+", text(found)))


def table_of(view: str, after: str) -> list[list[str]]:
    """The cells of the first Markdown table behind some words."""
    lines = view[view.index(after) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_markdown_has_the_matrices_the_right_way_round(found: Comparison) -> None:
    for attack in found.attacks:
        header, rule, clean, *rows = table_of(markdown(found), f"### {attack.name}, linf 0.1")
        assert header == ["", "A", "B", "C"]
        assert rule == ["---", "---:", "---:", "---:"]
        assert clean == ["clean images", *(f"{m.clean.value:.1f}" for m in found.models)]
        for row, model, values in zip(rows, found.models, attack.accuracy, strict=True):
            assert row == [f"{model.key} {model.name}", *("-" if v is None else f"{v:.1f}" for v in values)]


def test_other_tables_of_markdown(found: Comparison) -> None:
    view = markdown(found)
    assert table_of(view, "## Agreement")[-1][:3] == [
        "C network-2-with-a-name", f"{found.agreement[2].clean_right} / -", "-"
    ]  # fmt: skip
    first = found.votes[0]
    assert table_of(view, "## Ensemble")[2][:3] == [
        "clean images", "-", f"{first.prediction_rate} / {first.accuracy} / {first.defence_accuracy}"
    ]  # fmt: skip
    header, _, row, *_ = table_of(view, "## Shift of activations, value by value")
    assert (header, row[0]) == (["value", "A to B"], "relu|1")
    assert table_of(view, "## Networks")[4][3:5] == ["float", "-"]
    assert view.endswith("## Reproduce\n\n    qopt compare a b\n")
    assert "<" not in view.replace("<b>bold</b>", "").replace("relu<2>", "")


@pytest.mark.parametrize("networks", [2, 4, 6])
def test_a_terminal_has_narrow_tables_without_details(networks: int) -> None:
    view = text(comparison(networks))
    tables = [line for line in view.splitlines() if line.startswith("  ")]
    assert max(map(len, tables)) <= 125
    assert not any(line != line.rstrip() for line in tables)
    assert "relu|1" not in view
    assert view.endswith("\n")
    assert not view.endswith("\n\n")
    for attack in comparison(networks).attacks:
        assert f"\n{attack.name}, linf 0.1\n" in view


def test_what_is_empty_is_left_out(found: Comparison) -> None:
    bare = found.model_copy(update={"activation_shift": [], "notes": [], "cosines": [[None] * 3] * 3, "command": ""})
    titles = [section.title for section in sections(bare)]
    assert titles == ["Networks", "Transfers", "Examples", "Agreement", "Shift of logits by the weights", "Ensemble"]
    assert "Reproduce" not in markdown(bare)


class Tags(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing(found: Comparison) -> None:
    view, tags = html(found), Tags()
    tags.feed(view)
    assert tags.open == []
    assert {"svg", "table", "style", "rect"} <= tags.seen
    assert not tags.seen & {"script", "img", "link", "iframe", "object", "b"}
    assert not re.search(r"(?:src|href)=|url\(|@import", view)
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in view
    assert "prefers-color-scheme: dark" in view
    variables = set(re.findall(r"var\((--[\w-]+)\)", view))
    blocks = re.findall(r":root \{(.*?)\}", view, re.DOTALL)
    for theme in (blocks[0::2], blocks[1::2]):  # light and dark, by turns
        assert variables <= set(re.findall(r"(--[\w-]+):", "".join(theme)))
    assert view == html(comparison())


def pictures(view: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", view, re.DOTALL)]


def test_a_page_has_a_picture_of_every_matrix(found: Comparison) -> None:
    drawn = [cells(picture) for picture in pictures(html(found))]
    clean: list[float | None] = [m.clean.value for m in found.models]
    wanted = [[clean, *a.accuracy] for a in found.attacks] + [found.cosines] + [a.weight_shift for a in found.attacks]
    assert len(drawn) == len(wanted) == 9
    for picture, matrix in zip(drawn, wanted, strict=True):
        digits = 2 if matrix is found.cosines else 1
        assert picture == [["-" if v is None else f"{v:.{digits}f}" for v in row] for row in matrix]


def cells(picture: ET.Element) -> list[list[str]]:
    """The numbers by where they stand."""
    places: dict[float, dict[float, str]] = {}
    for group in picture.findall(f"{SVG}g"):
        shown = group.find(f"{SVG}text")
        box = group.find(f"{SVG}rect")
        assert shown is not None
        assert box is not None
        x, y = (float(shown.attrib[name]) for name in "xy")
        left, top, width, height = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert left < x < left + width
        assert top < y < top + height
        assert left + width <= float(picture.attrib["width"])
        assert top + height <= float(picture.attrib["height"])
        places.setdefault(top, {})[left] = str(shown.text)
    return [[row[left] for left in sorted(row)] for _, row in sorted(places.items())]


def heat(values: list[list[float | None]], **options: Any) -> HeatMap:
    names = tuple(f"row {i}" for i in range(len(values)))
    columns = tuple("ABCDEF"[: len(values[0])])
    return HeatMap("a title", names, columns, tuple(map(tuple, values)), **options)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.none() | st.floats(-100, 100), min_size=n, max_size=n), min_size=1, max_size=5)
    )
)
def test_every_number_is_in_its_cell_in_its_strength(values: list[list[float | None]]) -> None:
    picture = ET.fromstring(heat(values).svg())
    assert cells(picture) == [["-" if v is None else number(v, 1) for v in row] for row in values]
    flat = [v for row in values for v in row]
    for value, group in zip(flat, picture.findall(f"{SVG}g"), strict=True):
        box, shown = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        assert box is not None
        assert shown is not None
        if value is None:
            assert (box.attrib["class"], shown.attrib["class"]) == ("missing", "none")
            continue
        assert float(box.attrib["fill-opacity"]) == pytest.approx(abs(value) / 100, abs=5e-4)
        assert box.attrib["class"] == ("less" if value < 0 else "more")
        assert (shown.attrib["class"] == "turned") == (abs(value) / 100 >= TURN)


def test_a_cell_says_what_it_is() -> None:
    picture = ET.fromstring(heat([[1.0, None]], largest=1.0, digits=2, unit=" of 1").svg())
    said = [group.findtext(f"{SVG}title") for group in picture.findall(f"{SVG}g")]
    assert said == ["row 0, A: 1.00 of 1", "row 0, B: -"]
    assert picture.attrib["role"] == "img"
    assert picture.attrib["aria-label"] == "a title, columns A, B. row 0: 1.00, -"


@pytest.mark.parametrize("name", ['<a & "b">', "tab\tand\x00\x1bcontrol", "日本語", "x" * 200, "", "]]>"])
def test_any_name_is_written_well(name: str) -> None:
    picture = ET.fromstring(HeatMap(name, (name,), (name[:3],), ((1.0,),)).svg())
    label = next(t for t in picture.findall(f"{SVG}text") if t.attrib.get("text-anchor") == "end")
    assert len("".join(label.itertext())) >= len(name[:LONGEST])
    shown = (label[0].tail or "") if len(label) else ""
    assert len(shown) <= LONGEST
    assert shown[:5].replace(" ", "") == "".join(c if c.isprintable() else "" for c in name[:5]).replace(" ", "")


def test_names_of_files_cannot_break_the_views() -> None:
    odd = comparison(3, ("a|b", "<i>x</i>", "c`d\ne"))
    assert table_of(markdown(odd), "### FGSM")[3][0] == "A a|b"
    assert len({len(row) for row in table_of(markdown(odd), "## Networks")}) == 1
    tags = Tags()
    tags.feed(html(odd))
    assert "i" not in tags.seen
    assert "C c`d e" in text(odd)


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2, of sRGB in [0, 1]."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["more", "less"])
def test_numbers_can_be_read_on_every_colour(theme: int, kind: str) -> None:
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[theme]
    colours = {
        name: tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, code in re.findall(r"--([\w-]+): #(\w{6})", block)
    }
    worst = 21.0
    for percent in range(101):
        share = percent / 100
        mixed = tuple(share * c + (1 - share) * p for c, p in zip(colours[kind], colours["page"], strict=True))
        ink = colours["cell-turned" if share >= TURN else "cell-ink"]
        bright, dark = sorted((luminance(mixed), luminance(ink)), reverse=True)
        worst = min(worst, (bright + 0.05) / (dark + 0.05))
    assert worst >= 4.0
    contrast = sorted((luminance(colours["page"]), luminance(colours["ink"])))
    assert (contrast[1] + 0.05) / (contrast[0] + 0.05) > 10


def test_numbers_have_no_sign_before_zero() -> None:
    assert [number(v, 1) for v in (-0.04, 0.0, -0.0, 0.06, -1.25)] == ["0.0", "0.0", "0.0", "0.1", "-1.2"]


def test_tables() -> None:
    table = Table(("", "n", "word"), (("a | b", "1", "x\ny"), ("<c>", "22", "z")), left=(2,))
    assert table.markdown().splitlines() == [
        "|  | n | word |", "|---|---:|---|", "| a \\| b | 1 | x y |", "| <c> | 22 | z |"
    ]  # fmt: skip
    assert table.text().splitlines() == ["          n  word", "  a | b   1  x y", "  <c>    22  z"]
    assert '<td>&lt;c&gt;</td><td class="number">22</td><td>z</td>' in table.html()


def test_a_section_shows_pictures_in_place_of_their_tables() -> None:
    first, second = Table(("first",), (("1",),)), Table(("second",), (("2",),))
    section = Section("title", ("a note.",), (("one", first), ("", second)), (heat([[1.0]]),), mapped=1)
    view = page("all", [section])
    assert "<th>first</th>" not in view
    assert "<th>second</th>" in view
    assert view.count("<svg") == 1
    for whole in (section.markdown(), section.text()):
        assert whole.index("title") < whole.index("a note.") < whole.index("one") < whole.index("second")


def test_files(found: Comparison, tmp_path: Path) -> None:
    write(found, tmp_path / "new" / "out")
    contents = {path.name: path.read_text() for path in (tmp_path / "new" / "out").iterdir()}
    assert contents == {
        "compare.json": found.to_json(), "compare.md": markdown(found), "compare.html": html(found)
    }  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the output"):
        write(found, tmp_path / "file")


def test_the_published_schema_takes_it(found: Comparison) -> None:
    published = json.loads((Path(__file__).parents[2] / "docs" / "schemas" / "comparison.schema.json").read_text())
    assert published == schema("comparison")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(published)
    content = json.loads(found.to_json())
    jsonschema.validate(content, published)
    for place, key in ((content, "votes"), (content["attacks"][0], "weight_shift")):
        kept = place.pop(key)
        with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
            jsonschema.validate(content, published)
        place[key] = kept
