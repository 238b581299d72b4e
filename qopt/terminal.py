"""The report on a terminal: the layers, then what the file weighs, holds and withstands."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from qopt.job.bundle import Bundle
from qopt.report.model import Report
from qopt.report.numbers import drop, share

WIDE = 200
"""Columns where stdout is no terminal, so that nothing is cut."""


def show(bundle: Bundle, folder: Path) -> None:
    """Print the result to stdout."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console = Console(width=WIDE)
    report = bundle.report
    console.print(f"target {report.target}", highlight=False, soft_wrap=True)
    console.print(_layers(report))
    if report.rows:
        console.print(_networks(report))
    for line in _facts(bundle, folder):
        console.print(line, highlight=False, soft_wrap=True)


def _layers(report: Report) -> Table:
    table = Table(title=None)
    for header in ("layer", "op", "format"):
        table.add_column(header, no_wrap=True)
    for header in ("bits", "||W||", "||dW||", "MACs"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in report.layers:
        table.add_row(
            row.name, row.op, row.shown_format, f"{row.container_bits:.4g}", f"{row.norm_w:.3g}", f"{row.norm_dw:.3g}",
            f"{row.macs:,}",
        )  # fmt: skip
    return table


def _networks(report: Report) -> Table:
    table = Table(title=None)
    table.add_column("network")
    for header in ("bits", "clean", "robust", "clean drop", "robust drop", "masking"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.name, f"{row.code_bits:.2f}", share(row.clean), share(row.robust), drop(row.clean_drop),
            drop(row.robust_drop), row.masking,
        )  # fmt: skip
    return table


def _facts(bundle: Bundle, folder: Path) -> list[str]:
    report = bundle.report
    size, kernels = report.size, report.kernels
    lines = [
        f"size     {size.file_bytes:,} bytes, {size.ratio:.3f} of float; {size.code_bits:.2f} code bits, "
        f"{size.stored_bits:.2f} stored bits per weight",
        f"kernels  {kernels.integer} integer, {kernels.floating} float",
    ]
    for batch, seconds in bundle.manifest["latency_seconds"].items():
        ratio = seconds["qopt"] / seconds["float"]
        lines.append(f"latency  {1e3 * seconds['qopt']:.3f} ms, {ratio:.2f} of float (batch {batch}, one thread)")
    if "c" in bundle.manifest:
        c = bundle.manifest["c"]
        lines.append(
            f"c        {c['name']}.c: {c['arena_bytes']:,} bytes of memory, {c['flash_bytes']:,} of constants, "
            f"{c['macs']:,} multiply-accumulates; same class on {c['same_class']} of {c['images']} images"
        )
    lines += [f"gate     {g.gate}: {g.found}{'' if g.holds else '  FAILS'}" for g in report.gates]
    lines += [f"limit    {x.limit}: {x.found} ({x.machine}){'' if x.holds else '  BROKEN'}" for x in report.limits]
    lines += [f"left out {item}" for item in report.left_out]
    lines += [f"warning  {item}" for item in report.warnings]
    return [*lines, report.verdict, f"report   {folder / 'report.html'}"]
