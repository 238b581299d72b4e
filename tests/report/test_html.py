"""The page: everything that the report holds, nothing from elsewhere, and nothing that overflows a screen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qopt.report.html import to_html
from qopt.report.markdown import to_markdown
from qopt.report.model import ErrorAmplification, LayerErrors, Report

LATENCY = {"1": {"float": 6.1e-5, "qopt": 4.2e-3}, "8": {"float": 1.5, "qopt": 0.25}}
VOID = {"meta", "br", "rect", "path", "circle"}


class Reader(HTMLParser):
    """Checks that elements nest, and gathers text, headings and what pictures say."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.labels: list[str] = []
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}
        found = dict(attrs)
        if tag == "svg":
            assert found["role"] == "img"
            self.labels.append(found["aria-label"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_every_part_is_there(full_report: Report) -> None:
    assert read(to_html(full_report, LATENCY)).headings == [
        "Setting", "Networks", "Gates and limits", "Attacks", "Accuracy against the size of the attack",
        "Can the attacks be believed?", "Transfers and gradients", "Size, kernels and speed", "Bits along the network",
        "Spectral norms", "Error amplification", "Trade-off", "Layers", "How the plan was found", "Activations",
        "Left out", "Warnings", "Reproduce",
    ]  # fmt: skip


def test_parts_without_content_are_left_out(bare_report: Report) -> None:
    assert read(to_html(bare_report)).headings == [
        "Setting", "Size, kernels and speed", "Bits along the network", "Spectral norms", "Layers",
        "How the plan was found", "Reproduce",
    ]  # fmt: skip


def test_whatever_the_markdown_says_the_page_says_too(full_report: Report) -> None:
    """Cell by cell of every table, and every line of every list."""
    said = " ".join(" ".join(read(to_html(full_report)).text).split())
    for line in to_markdown(full_report).splitlines():
        if not line.startswith("|") or set(line) <= set("|-: "):
            continue
        cells = [cell.replace("\\|", "|").replace("*", "").strip() for cell in re.split(r"(?<!\\)\|", line)]
        for cell in cells:
            if re.search(r"\d", cell):
                assert cell in said, cell
    for line in (*full_report.warnings, *full_report.left_out, full_report.verdict, full_report.command):
        assert line in said


def test_the_verdict_has_the_colour_of_its_outcome(full_report: Report) -> None:
    assert f'<p class="verdict bad">{escape(full_report.verdict)}</p>' in to_html(full_report)
    good = full_report.model_copy(update={"gates": full_report.gates[:1], "limits": full_report.limits[:1]})
    assert 'class="verdict good"' in to_html(good)


def test_it_needs_nothing_else_and_runs_nothing(full_report: Report) -> None:
    page = to_html(full_report, LATENCY)
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "onload", "onclick", "src", "href"} & reader.names
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_every_picture_has_words(full_report: Report) -> None:
    labels = read(to_html(full_report, LATENCY)).labels
    assert len(labels) == 13
    assert all(len(label) > 20 for label in labels)
    assert any("float: 61 us" in unescape(label) for label in labels)
    assert any("qopt: 4.2 ms" in label for label in labels)
    assert any("qopt: 250 ms" in label for label in labels)


def test_equal_reports_give_equal_pages(full_report: Report) -> None:
    again = Report.from_json(full_report.to_json())
    assert to_html(again, LATENCY) == to_html(full_report, LATENCY)


def test_what_a_user_named_is_never_markup(full_report: Report) -> None:
    evil = "<img src=x onerror=alert(1)>"
    layers = [row.model_copy(update={"name": evil, "reason": evil}) for row in full_report.layers]
    rows = [row.model_copy(update={"name": evil, "note": evil}) for row in full_report.rows]
    model = full_report.model.model_copy(update={"name": evil, "notes": [evil]})
    changed = full_report.model_copy(
        update={"layers": layers, "rows": rows, "model": model, "command": evil, "warnings": [evil], "verdict": evil}
    )
    assert "img" not in read(to_html(changed)).names


MEASURE = """<script>
const found = [];
const wide = document.documentElement.scrollWidth;
if (wide > window.innerWidth) found.push(`page ${wide} wider than ${window.innerWidth}`);
for (const svg of document.querySelectorAll('svg')) {
  const box = svg.viewBox.baseVal;
  if (svg.getBoundingClientRect().width < 50) found.push('empty picture');
  for (const text of svg.querySelectorAll('text')) {
    const at = text.getBBox();
    if (at.x < -0.5 || at.x + at.width > box.width + 0.5 || at.y + at.height > box.height + 0.5)
      found.push(`clipped: ${text.textContent}`);
  }
}
document.body.innerHTML = '<pre id="found">' + JSON.stringify(found).replaceAll('<', '(') + '</pre>';
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("long_names", [False, True])
def test_nothing_overflows_in_a_browser(full_report: Report, tmp_path: Path, width: int, long_names: bool) -> None:
    """At the width of a phone and of a desk; set QOPT_SCREENSHOTS to a folder to keep pictures."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    report = full_report
    if long_names:
        layers = [row.model_copy(update={"name": f"features.stage.{i}.block.{i}.convolution.weight" * 2})
                  for i, row in enumerate(report.layers * 8)]  # fmt: skip
        rows = [row.model_copy(update={"name": f"{row.name}, {'of a very long kind ' * 4}"}) for row in report.rows]
        errors = ErrorAmplification(
            images=9,
            layers=[LayerErrors(layer=row.name, attack_float=0.1, attack=0.2, clean=1e-4 * i, attacked=4e3)
                    for i, row in enumerate(layers)],
        )  # fmt: skip
        assert report.transfers is not None
        networks = [row.name for row in rows]
        transfers = report.transfers.model_copy(update={"networks": networks})
        report = report.model_copy(
            update={"layers": layers, "rows": rows, "amplification": errors, "transfers": transfers}
        )
    page = to_html(report, LATENCY)
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", f"{MEASURE}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [browser, *options, f"--window-size={width},2000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', found, re.DOTALL)
    assert text == "[]"
    if folder := os.environ.get("QOPT_SCREENSHOTS"):
        path.write_text(page)
        shot = Path(folder) / f"report-{width}{'-long' * long_names}.png"
        size = f"--window-size={width},{7000 if width < 500 else 4500}"
        subprocess.run(
            [browser, *options, "--hide-scrollbars", size, f"--screenshot={shot}", path.as_uri()],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        assert shot.stat().st_size > 20_000


def test_the_readme_shows_a_picture_of_the_page() -> None:
    """Small, as wide as a reader's window, and with words for those who do not see it."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text()
    ((words, name),) = re.findall(r"!\[([^\]]+)\]\(([\w./]+)\)", text)
    assert len(words) > 40
    assert len(text.splitlines()) <= 120
    content = (root / name).read_bytes()
    assert len(content) < 150_000
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert 600 <= int.from_bytes(content[16:20], "big") <= 1000
