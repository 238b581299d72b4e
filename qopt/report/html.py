"""The report as one HTML page that needs no other file and runs no script, drawn from the same data as the Markdown."""

from __future__ import annotations

from html import escape

from qopt.report.model import Report
from qopt.report.sections import Latency, sections, title
from qopt.report.tables import Section, page


def to_html(report: Report, latency: Latency | None = None) -> str:
    """The whole report; ``latency`` is what the manifest says of this machine."""
    good = report.gates_hold and report.limits_hold
    verdict = f'<p class="verdict {"good" if good else "bad"}">{escape(report.verdict)}</p>'
    parts = [*sections(report, latency), Section("Reproduce", (report.command,))]
    return page(title(report), parts, verdict)
