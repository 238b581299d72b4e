"""The report as Markdown: the sections that the page has, but for those that are pictures alone."""

from __future__ import annotations

from qopt.report.model import Report
from qopt.report.sections import sections, title


def to_markdown(report: Report) -> str:
    """The whole report; tables in GitHub's flavour, no HTML."""
    parts = [part.markdown() for part in sections(report) if not part.pictured]
    return "\n\n".join([f"# {title(report)}", report.verdict, *parts, f"## Reproduce\n\n    {report.command}"]) + "\n"
