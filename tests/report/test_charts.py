"""Charts: marks where the numbers say, the same bytes each time, nothing outside the picture."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qopt.report.charts import DOTTED, NAME, NUMBER, WIDTH, Bar, BarChart, Curves, Point, Scatter, log_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"
sizes = st.floats(1e-9, 1e9)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(svg).iter(f"{SVG}text")]


def bars(svg: str) -> list[float]:
    """Widths of the bars, legends left out."""
    rects = [node for node in parsed(svg).iter(f"{SVG}rect") if node.get("width") != "11"]
    return [float(node.get("width", "nan")) for node in rects]


def test_bars_are_as_long_as_their_shares() -> None:
    rows = (("a", (Bar(10, "10"),)), ("b", (Bar(5, "5"),)), ("c", (Bar(0, "0"),)))
    room = WIDTH - NAME - NUMBER
    assert bars(BarChart("t", rows, 10).svg()) == pytest.approx([room, room / 2, 0], abs=0.1)


def test_rows_of_several_bars_have_their_name_above() -> None:
    svg = BarChart(
        "t", (("name", (Bar(1, "one"), Bar(2, "two", "second"))),), 2, (("first", "x"), ("second", "y"))
    ).svg()
    assert texts(svg) == ["t", "x", "y", "name", "one", "two"]
    assert [node.get("class") for node in parsed(svg).iter(f"{SVG}rect")] == ["first", "second", "first", "second"]
    wide, double = bars(svg)
    assert double == pytest.approx(2 * wide, abs=0.2)


def test_intervals_span_their_ends() -> None:
    svg = BarChart("t", (("a", (Bar(50, "50", interval=(40, 60)),)),), 100).svg()
    (path,) = [node for node in parsed(svg).iter(f"{SVG}path") if node.get("class") == "range"]
    low, high = (float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", path.get("d", "")).groups())  # type: ignore[union-attr]
    assert high - low == pytest.approx(0.2 * (WIDTH - NAME - NUMBER), abs=0.2)


@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_nothing_is_drawn_past_the_width(largest: float) -> None:
    assert all(0 <= width <= WIDTH for width in bars(BarChart("t", (("a", (Bar(7, "7"),)),), largest).svg()))


def test_a_long_name_is_shortened_and_whole_for_pointers() -> None:
    name = "features.very.deep.block.17.conv.weight"
    svg = BarChart("t", ((name, (Bar(1, "1"),)),), 1).svg()
    assert f"<title>{name}</title>" in svg
    assert all(len(node.tail or "") <= 17 for node in parsed(svg).iter(f"{SVG}title"))


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b', "a&b", "a\x00b\nc"])
def test_whatever_a_user_calls_things_it_stays_text(name: str) -> None:
    bar = BarChart(name, ((name, (Bar(1, name),)),), 1, (("first", name),)).svg()
    scatter = Scatter(name, name, name, (Point(1, 1, name), Point(2, 2, name))).svg()
    curves = Curves(name, name, name, ((name, "first", ((0, 1), (1, 2))),), 3).svg()
    for svg in (bar, scatter, curves):
        assert parsed(svg).tag == f"{SVG}svg"
        assert not list(parsed(svg).iter(f"{SVG}script"))


def test_every_picture_says_its_numbers() -> None:
    bar = BarChart("size", (("float", (Bar(3, "3 KB"),)),), 3).svg()
    assert parsed(bar).get("aria-label") == "size. float: 3 KB"
    scatter = Scatter("plans", "x", "y", (Point(3, 1, "the first"), Point(4, 2, "the second"))).svg()
    assert parsed(scatter).get("aria-label") == "plans. the first; the second"
    curves = Curves("t", "x", "y", (("float", "quiet", ((0, 90), (0.5, 10))),), 100).svg()
    assert parsed(curves).get("aria-label") == "t. float: 90.0 at 0, 10.0 at 0.5"


def circles(svg: str) -> list[tuple[str, float, float]]:
    return [
        (node.get("class", ""), float(node.get("cx", "nan")), float(node.get("cy", "nan")))
        for node in parsed(svg).iter(f"{SVG}circle")
    ]


def test_points_lie_in_order_and_the_ringed_one_is_last() -> None:
    points = (Point(2, 100, "chosen", "first", ringed=True, path=True), Point(3, 10, "b", path=True), Point(4, 1, "c"))
    svg = Scatter("t", "bits", "nats", points, logarithmic=True).svg()
    found = circles(svg)
    assert [kind for kind, _, _ in found] == ["quiet", "quiet", "first", "ring"]
    (_, bx, by), (_, cx, cy), (_, ax, ay), ring = found
    assert ax < bx < cx
    assert ay < by < cy, "more is higher up"
    assert by - ay == pytest.approx(cy - by, abs=0.2), "powers of ten are evenly spaced"
    assert ring[1:] == (ax, ay)
    (path,) = [node.get("d", "") for node in parsed(svg).iter(f"{SVG}path") if node.get("class") == "path"]
    assert path.count("L") == 1


@given(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=12), st.booleans())
def test_points_never_leave_the_frame(pairs: list[tuple[float, float]], logarithmic: bool) -> None:
    svg = Scatter("t", "x", "y", tuple(Point(x, y, "p") for x, y in pairs), logarithmic=logarithmic).svg()
    height = float(parsed(svg).get("height", "nan"))
    assert all(0 <= x <= WIDTH and 0 <= y <= height for _, x, y in circles(svg))
    assert svg == Scatter("t", "x", "y", tuple(Point(x, y, "p") for x, y in pairs), logarithmic=logarithmic).svg()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_ticks_enclose_the_values(values: list[float]) -> None:
    found = ticks(values)
    assert 2 <= len(found) <= 8
    slack = 1e-6 * max(map(abs, values))
    assert found[0] <= min(values) + slack
    assert found[-1] >= max(values) - slack
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 100.0], [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        ([0.0, 0.2], [0.0, 0.1, 0.2]),
        ([3.4, 4.0], [3.4, 3.6, 3.8, 4.0]),
        ([5.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
    ],
)
def test_ticks_are_round(values: list[float], expected: list[float]) -> None:
    assert ticks(values) == pytest.approx(expected)


@given(st.lists(sizes, min_size=1, max_size=20))
def test_powers_of_ten_enclose_the_values(values: list[float]) -> None:
    found = log_ticks(values)
    assert 2 <= len(found) <= 7
    assert found[0] <= min(values) * (1 + 1e-6)
    assert found[-1] >= max(values) * (1 - 1e-6)
    assert all(math.log10(value) == pytest.approx(round(math.log10(value))) for value in found)


@pytest.mark.parametrize("count", [1, 2, 3, 9, 22, 53])
def test_what_is_counted_has_whole_ticks(count: int) -> None:
    marks = ticks([float(i) for i in range(1, count + 1)], 1.0)
    assert all(mark == round(mark) for mark in marks)
    assert marks[0] <= 1
    assert marks[-1] >= count
    assert 2 <= len(marks) <= 7


@pytest.mark.parametrize("count", [1, DOTTED, DOTTED + 1])
def test_points_of_curves_are_marked_where_there_is_room(count: int) -> None:
    points = tuple((float(i), i / count) for i in range(1, count + 1))
    svg = Curves("t", "x", "y", (("one", "first", points),), 1.0, counted=True, form=".3g").svg()
    assert len(list(parsed(svg).iter(f"{SVG}circle"))) == (count if count <= DOTTED else 0)
    assert f"{1 / count:.3g} at 1" in parsed(svg).get("aria-label", "")
    assert not re.search(r"nan|inf", svg)
