"""The sections on errors along the network and on transfers: every number, the names, and what is missing."""

from __future__ import annotations

import re
from html import unescape

import pytest

from qopt.report.errors_section import error_amplification
from qopt.report.html import to_html
from qopt.report.markdown import to_markdown
from qopt.report.model import ErrorAmplification, LayerErrors, Report, Transfers
from qopt.report.transfers_section import transfers


def errors(report: Report, *layers: LayerErrors) -> Report:
    return report.model_copy(update={"amplification": ErrorAmplification(images=7, layers=[*layers])})


def row(layer: str, clean: float | None, attack: float | None = None) -> LayerErrors:
    return LayerErrors(layer=layer, attack_float=attack, attack=attack, clean=clean, attacked=attack and clean)


def labels(report: Report) -> list[str]:
    return [unescape(text) for text in re.findall(r'aria-label="([^"]*)"', to_html(report))]


def test_charts_say_every_error(full_report: Report) -> None:
    attack, error = (text for text in labels(full_report) if text.startswith("What "))
    assert (
        attack == "What the attack changes. attack, float: 0.125 at 1, 0.25 at 2; attack, qopt: 0.13 at 1, 0.312 at 2"
    )
    assert error == "What quantization changes. error, clean: 0.0525 at 1, 0.0775 at 2; error, attacked: 0.06 at 1"


def test_tables_have_every_layer_by_its_number(full_report: Report) -> None:
    (_, table), *_ = error_amplification(full_report).tables
    assert table.header == ("layer", "no.", "attack, float", "attack, qopt", "error, clean", "error, attacked")
    assert table.rows == (
        ("conv|1", "1", "0.125", "0.13", "0.0525", "0.06"),
        ("fc", "2", "0.25", "0.312", "0.0775", "-"),
    )
    assert "over 64 images" in " ".join(error_amplification(full_report).notes)


def test_without_an_attack_only_the_error_of_clean_images_is_shown(full_report: Report) -> None:
    section = error_amplification(errors(full_report, row("a", 0.1), row("b", None), row("c", 0.3)))
    assert [table.header for _, table in section.tables] == [("layer", "no.", "error, clean")]
    assert section.tables[0][1].rows == (("a", "1", "0.1"), ("b", "2", "-"), ("c", "3", "0.3"))
    assert len(section.maps) == 1
    assert "Attack:" not in " ".join(section.notes)
    assert "error, clean: 0.1 at 1, 0.3 at 3" in section.maps[0].svg()


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0,), (1e-9, 5e3), (None,)])
def test_any_errors_can_be_drawn(full_report: Report, values: tuple[float | None, ...]) -> None:
    section = error_amplification(errors(full_report, *(row(f"l{i}", v, 0.2) for i, v in enumerate(values))))
    for picture in section.maps:
        assert not re.search(r"nan|inf", picture.svg())


def test_nothing_measured_is_no_section(bare_report: Report) -> None:
    assert not error_amplification(bare_report).filled
    assert not error_amplification(errors(bare_report)).filled
    assert not transfers(bare_report).filled


def test_heat_maps_say_every_share_and_cosine(full_report: Report) -> None:
    fooled, cosines = (text for text in labels(full_report) if text.startswith(("Fooled", "Cosine")))
    assert fooled == (
        "Fooled, in percent, columns A, B, C. clean images: 10, 12, 11; A float: 35, 41, 36; "
        "B int4:max@int4: 21, 61, 23; C qopt: 30, 40, 38"
    )
    assert cosines == (
        "Cosine between gradients, columns A, B, C. A float: 1.00, 0.50, 0.75; B int4:max@int4: 0.50, 0.97, -0.25; "
        "C qopt: 0.75, -0.25, 1.00"
    )
    assert "Both on the same 64 images." in to_html(full_report)


def test_the_page_shows_maps_where_the_markdown_has_tables(full_report: Report) -> None:
    assert "| B int4:max@int4 | 21 | 61 | 23 |" in to_markdown(full_report)
    assert "| A float | 1.00 | 0.50 | 0.75 |" in to_markdown(full_report)
    assert "<td>B int4:max@int4</td>" not in to_html(full_report)


def test_more_networks_than_letters(full_report: Report) -> None:
    names = [f"n{i}" for i in range(28)]
    found = Transfers(
        images=1, networks=names, clean=[0.0] * 28, fooled=[[0.0] * 28] * 28, cosines=[[0.0] * 28] * 28
    )  # fmt: skip
    (_, table), *_ = transfers(full_report.model_copy(update={"transfers": found})).tables
    assert [row[0] for row in table.rows][-3:] == ["Z n25", "A1 n26", "B1 n27"]
    assert len(set(table.header)) == 29


def test_reports_written_before_there_were_such_parts_are_read(full_report: Report) -> None:
    content = full_report.model_dump(by_alias=True)
    del content["amplification"], content["transfers"]
    old = Report.model_validate(content)
    assert (old.amplification, old.transfers) == (None, None)
