"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qopt.report.model import Drop, Report, Row, Share


def to_markdown(report: Report) -> str:
    """The whole report; tables in GitHub's flavour, no HTML."""
    parts = [
        f"# {report.model.name}: quantization report\n\n{report.verdict}",
        _setting(report),
        _section("Networks", _networks(report)),
        _section("Accuracy against the size of the attack", _sweep(report)),
        _section("Gates", _gates(report)),
        _section("Limits", _limits(report)),
        _section("Can the attacks be believed?", _masking(report)),
        _section("Size and kernels", _size(report)),
        _section("Layers", _layers(report)),
        _section("How the plan was found", _search(report)),
        _section("Activations", _activations(report)),
        _section("Left out", _bullets(report.left_out)),
        _section("Warnings", _bullets(report.warnings)),
        _section("Reproduce", f"    {report.command}"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def share(value: Share | None) -> str:
    """``87.3 % (85.1-89.2)``."""
    return "-" if value is None else f"{value.value:.1f} % ({value.low:.1f}-{value.high:.1f})"


def drop(value: Drop | None) -> str:
    """``+1.2 +- 0.4``: float minus this network in points, with the paired standard error."""
    return "-" if value is None else f"{value.value:+.1f} +- {value.standard_error:.1f}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _setting(report: Report) -> str:
    lines = [f"- target {report.target}"]
    if report.threat:
        lines.append(f"- threat model {report.threat}, seed {report.seed}")
    if report.data:
        data = report.data
        lines.append(
            f"- images: {data.calibrate} to calibrate, {data.select} to select, {data.report} to report, "
            f"{data.attacked} of them attacked"
        )
        lines += [f"- {note}" for note in data.notes]
    model = report.model
    lines.append(f"- model: {model.layers} layers, {model.weights:,} weights, input {model.input} {model.input_shape}")
    lines += [f"- {note}" for note in model.notes]
    return "\n".join(lines)


def _networks(report: Report) -> str:
    attacks = list(dict.fromkeys(name for row in report.rows for name in row.attacked))
    header = ["network", "bits", "clean", *attacks, "robust", "clean drop", "robust drop", "masking"]
    body = _table(header, [_network(row, attacks) for row in report.rows])
    notes = [f"{row.name}: {row.note}." for row in report.rows if row.note]
    return body + ("\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "") if report.rows else ""


def _network(row: Row, attacks: Sequence[str]) -> list[str]:
    return [
        row.name, f"{row.code_bits:.2f}", share(row.clean), *(share(row.attacked.get(name)) for name in attacks),
        share(row.robust), drop(row.clean_drop), drop(row.robust_drop), row.masking,
    ]  # fmt: skip


def _sweep(report: Report) -> str:
    if not report.sweep:
        return ""
    header = ["network, PGD", *(f"{point.eps:.4g}" for point in report.sweep[0].points)]
    return _table(header, [[line.network, *(share(p.accuracy) for p in line.points)] for line in report.sweep])


def _gates(report: Report) -> str:
    rows = [[gate.gate, gate.found, "holds" if gate.holds else "**fails**"] for gate in report.gates]
    return _table(["gate", "found", ""], rows) if rows else ""


def _limits(report: Report) -> str:
    rows = [[row.limit, row.machine, row.found, "holds" if row.holds else "**broken**"] for row in report.limits]
    return _table(["limit", "on", "found", ""], rows) if rows else ""


def _masking(report: Report) -> str:
    rows = [[m.network, m.rule, "**triggered**" if m.triggered else "no", m.text] for m in report.masking]
    return _table(["network", "rule", "triggered", "numbers"], rows) if rows else ""


def _size(report: Report) -> str:
    size, kernels = report.size, report.kernels
    lines = [
        f"- file {size.file_bytes:,} bytes, {size.ratio:.3f} of float's {size.float_bytes:,}",
        f"- {size.code_bits:.2f} code bits and {size.stored_bits:.2f} stored bits per weight",
        f"- ONNX Runtime runs {kernels.integer} convolutions and matrix products on integer kernels, "
        f"{kernels.floating} on float ones",
    ]
    if kernels.agreement is not None:
        lines.append(f"- file and quantized graph predict the same class on {100 * kernels.agreement:.2f} % of images")
    if kernels.difference is not None:
        lines.append(
            f"- in a fresh process the file's outputs are within {kernels.difference:.0e} of the quantized graph's"
        )
    return "\n".join(lines)


def _layers(report: Report) -> str:
    rows = [
        [
            row.name, row.op, "x".join(map(str, row.shape)), row.shown_format, f"{row.container_bits:.4g}",
            f"{row.norm_w:.3g}", f"{row.norm_dw:.3g}", f"{row.macs:,}", "yes" if row.integer else "no",
            "-" if row.worst_pair_sum is None else str(row.worst_pair_sum), row.reason,
        ]
        for row in report.layers
    ]  # fmt: skip
    header = [
        "layer", "op", "shape", "format", "bits", "||W||", "||dW||", "MACs", "integer", "worst pair sum", "why",
    ]  # fmt: skip
    return _table(header, rows)


def _search(report: Report) -> str:
    search = report.search
    lines = [f"- strategy {search.strategy} on {search.sensitivity}", f"- thresholds: {search.thresholds}"]
    if search.factor > 1:
        layers = ", ".join(search.relaxed)
        lines.append(f"- all thresholds relaxed by the factor {search.factor:.3g}, because of: {layers}")
    lines += [f"- {note}" for note in search.notes]
    if not search.evaluated:
        return "\n".join(lines)
    rows = [
        [
            plan.name, f"{plan.code_bits:.2f}", f"{plan.clean_divergence:.4g}",
            "-" if plan.adversarial_divergence is None else f"{plan.adversarial_divergence:.4g}",
            "-" if plan.clean_drop is None else f"{plan.clean_drop:+.1f}",
            "-" if plan.robust_drop is None else f"{plan.robust_drop:+.1f}", "chosen" if plan.chosen else "",
        ]
        for plan in search.evaluated
    ]  # fmt: skip
    header = [
        "plan, measured on select images", "bits", "KL clean", "KL adversarial", "clean drop", "robust drop", "",
    ]  # fmt: skip
    return "\n".join(lines) + "\n\n" + _table(header, rows)


def _activations(report: Report) -> str:
    rows = [
        [a.tensor, a.format, f"{a.low:.4g}", f"{a.high:.4g}", f"{a.scale:.4g}", str(a.zero_point)]
        for a in report.activations
    ]
    return _table(["tensor", "format", "low", "high", "scale", "zero point"], rows) if rows else ""


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(map(_cell, header)) + " |", "|" + "---|" * len(header), *body])


def _cell(text: str) -> str:
    """One line without a column's end in it, whatever a user's network calls its layers."""
    return " ".join(text.split()).replace("|", "\\|")
