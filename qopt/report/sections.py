"""The parts of the report, once for the page and for the Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from qopt.limits import readable
from qopt.report.charts import Bar, BarChart, Curves, Point, Scatter, Tone
from qopt.report.errors_section import error_amplification
from qopt.report.model import LayerRow, MeasuredPlan, Report, Row, Share
from qopt.report.numbers import drop, share, short_name
from qopt.report.tables import Section, Table
from qopt.report.transfers_section import transfers

Latency = Mapping[str, Mapping[str, float]]
"""Batch size to seconds of one run by network, ``float`` and ``qopt`` among them: measured, so not part of a report."""

DIGITS: Final = 3
"""Of sizes and latencies beside their bars."""

LEAST: Final = 1e-6
"""Divergences below it, in nats, are drawn at it."""


def title(report: Report) -> str:
    """Of the whole."""
    return f"{report.model.name}: quantization report"


def sections(report: Report, latency: Latency | None = None) -> list[Section]:
    """The parts in order, without those that would be empty; ``latency`` is what the manifest says of this machine."""
    parts = [
        _setting(report), _networks(report), _judged(report), _attacks(report), _sweep(report), _masking(report),
        transfers(report), _size(report, latency or {}), _bits(report), _norms(report), error_amplification(report),
        _trade_off(report), _layers(report), _search(report), _activations(report),
        Section("Left out", items=(*report.left_out,)), Section("Warnings", items=(*report.warnings,)),
    ]  # fmt: skip
    return [part for part in parts if part.filled]


def _setting(report: Report) -> Section:
    model, data = report.model, report.data
    rows = [("target", report.target)]
    if report.threat:
        rows.append(("threat model", f"{report.threat}, seed {report.seed}"))
    if data is not None:
        rows.append(
            (
                "images",
                f"{data.calibrate} to calibrate, {data.select} to select, {data.report} to report, "
                f"{data.attacked} attacked",
            )
        )
    shape = " x ".join(map(str, model.input_shape))
    rows.append(("network", f"{model.layers} layers, {model.weights:,} weights, input {model.input} {shape}".rstrip()))
    notes = (*model.notes, *(data.notes if data else ()))
    return Section("Setting", tables=(("", Table(("", ""), tuple(rows), left=(1,))),), items=notes)


def _networks(report: Report) -> Section:
    header = ("network", "bits", "clean", "robust", "clean drop", "robust drop", "masking", "note")
    rows = tuple(
        (
            row.name, f"{row.code_bits:.2f}", share(row.clean), share(row.robust), drop(row.clean_drop),
            drop(row.robust_drop), row.masking, row.note or "",
        )
        for row in report.rows
    )  # fmt: skip
    bars = tuple((f"{short_name(row.name)}, {row.code_bits:.3g} bits", tuple(_accuracies(row))) for row in report.rows)
    chart = BarChart(
        "Accuracy in percent, with 95 % intervals", bars, 100.0, (("first", "clean"), ("second", "robust"))
    )
    notes = ("Drops are against float on the same images, in points, with their standard errors.",)
    return Section("Networks", notes if rows else (), (("", Table(header, rows, left=(7,))),), (chart,) if rows else ())


def _accuracies(row: Row) -> Iterator[Bar]:
    yield _share_bar(row.clean, "first")
    if row.robust is not None:
        yield _share_bar(row.robust, "second")


def _share_bar(value: Share, tone: Tone) -> Bar:
    return Bar(value.value, f"{value.value:.1f} %", tone, (value.low, value.high))


def _judged(report: Report) -> Section:
    gates = tuple((gate.gate, gate.found, "holds" if gate.holds else "FAILS") for gate in report.gates)
    limits = tuple(
        (row.limit, row.machine, row.found, "holds" if row.holds else "BROKEN") for row in report.limits
    )  # fmt: skip
    tables = [("Gates", Table(("gate", "found", ""), gates, left=(1, 2)))] if gates else []
    tables += [("Limits", Table(("limit", "on", "found", ""), limits, left=(1, 2, 3)))] if limits else []
    return Section("Gates and limits", tables=tuple(tables))


def _attacks(report: Report) -> Section:
    names = list(dict.fromkeys(name for row in report.rows for name in row.attacked))
    rows = tuple(
        (row.name, *(share(row.attacked.get(name)) for name in names), share(row.robust))
        for row in report.rows
        if row.attacked
    )
    notes = ("Accuracy under each attack; robust counts an image that no attack fooled.",) if rows else ()
    return Section("Attacks", notes, (("", Table(("network", *names, "robust"), rows)),))


def _sweep(report: Report) -> Section:
    if not report.sweep:
        return Section("Accuracy against the size of the attack")
    tones: tuple[Tone, ...] = ("quiet", "first", "second", "third")
    lines = tuple(
        (line.network, tones[i % len(tones)], tuple((point.eps, point.accuracy.value) for point in line.points))
        for i, line in enumerate(report.sweep)
    )
    chart = Curves("Accuracy under PGD, in percent", "radius of the attack", "accuracy, %", lines, 100.0)
    header = ("network", *(f"{point.eps:.4g}" for point in report.sweep[0].points))
    rows = tuple((line.network, *(share(point.accuracy) for point in line.points)) for line in report.sweep)
    notes = (f"On {report.sweep[0].points[0].accuracy.n} images, attacked anew at each radius.",)
    return Section("Accuracy against the size of the attack", notes, (("", Table(header, rows)),), (chart,))


def _masking(report: Report) -> Section:
    rows = tuple((m.network, m.rule, "TRIGGERED" if m.triggered else "no", m.text) for m in report.masking)
    table = Table(("network", "rule", "triggered", "numbers"), rows, left=(1, 2, 3))
    notes = ("Rules on gradients that mislead attacks; one that is triggered makes the robust accuracy worthless.",)
    return Section("Can the attacks be believed?", notes if rows else (), (("", table),))


def _size(report: Report, latency: Latency) -> Section:
    size, kernels = report.size, report.kernels
    rows = [
        ("file", f"{size.file_bytes:,} bytes, {size.ratio:.3f} of float's {size.float_bytes:,}"),
        ("weights", f"{size.code_bits:.2f} code bits and {size.stored_bits:.2f} stored bits each"),
        ("kernels", f"{kernels.integer} integer, {kernels.floating} float, by ONNX Runtime on this machine"),
    ]
    if kernels.agreement is not None:
        rows.append(("file and graph", f"same class on {100 * kernels.agreement:.2f} % of images"))
    if kernels.difference is not None:
        rows.append(
            ("fresh process", f"the file's outputs are within {kernels.difference:.0e} of the quantized graph's")
        )
    largest = max(size.float_bytes, size.file_bytes)
    pictures = [
        BarChart(
            "Size of the file",
            (
                ("float", (Bar(size.float_bytes, readable("size", size.float_bytes, DIGITS), "quiet"),)),
                ("quantized", (Bar(size.file_bytes, readable("size", size.file_bytes, DIGITS)),)),
            ),
            largest,
        )
    ]
    for batch, seconds in latency.items():
        rows.append(
            (f"latency, batch {batch}", ", ".join(f"{n} {readable('latency', s, DIGITS)}" for n, s in seconds.items()))
        )
        bars = tuple(
            (name, (Bar(value, readable("latency", value, DIGITS), "first" if name == "qopt" else "quiet"),))
            for name, value in seconds.items()
        )
        pictures.append(BarChart(f"Latency, batch {batch}, one thread", bars, max(seconds.values())))
    return Section(
        "Size, kernels and speed", tables=(("", Table(("", ""), tuple(rows), left=(1,))),), maps=(*pictures,)
    )


def _label(name: str) -> str:
    """A layer's name as charts show it: of most exporters all end alike."""
    return name.removesuffix(".weight")


def _bits(report: Report) -> Section:
    tones: dict[str, Tone] = {"log": "second", "float": "quiet"}
    rows = tuple(
        (
            _label(row.name),
            (
                Bar(
                    min(float(row.container_bits), 8.0), row.shown_format.split(":")[0],
                    next((tone for word, tone in tones.items() if row.format.startswith(word)), "first"),
                ),
            ),
        )
        for row in report.layers
    )  # fmt: skip
    kinds = {bars[0].tone for _, bars in rows}
    named: tuple[tuple[Tone, str], ...] = (("first", "linear"), ("second", "powers of two"), ("quiet", "float"))
    legend = tuple(entry for entry in named if entry[0] in kinds)
    return Section(
        "Bits along the network", maps=(BarChart("Bits of a weight, from input to output", rows, 8.0, legend),)
    )


def _norms(report: Report) -> Section:
    largest = max((max(row.norm_w, row.norm_wq) for row in report.layers), default=0.0)
    before = tuple((_label(row.name), tuple(_norm_bars(row))) for row in report.layers)
    worst = max((_relative(row) for row in report.layers), default=0.0)
    errors = tuple(
        (_label(row.name), (Bar(_relative(row), f"{_relative(row):.3g}", "second"),)) for row in report.layers
    )
    notes = (
        "Upper ends of sound bounds. The first is the largest factor by which a layer, as a matrix, can stretch its "
        "input; the second how far quantization moves that matrix, as a share of the first.",
    )
    legend: tuple[tuple[Tone, str], ...] = (("quiet", "float, ||W||"), ("first", "quantized, ||W_q||"))
    return Section(
        "Spectral norms", notes,
        maps=(
            BarChart("Spectral norm", before, largest, legend),
            BarChart("Error ||dW|| / ||W||", errors, worst),
        ),
    )  # fmt: skip


def _norm_bars(row: LayerRow) -> Iterator[Bar]:
    yield Bar(row.norm_w, f"{row.norm_w:.3g}", "quiet")
    yield Bar(row.norm_wq, f"{row.norm_wq:.3g}", "first")


def _relative(row: LayerRow) -> float:
    return row.norm_dw / row.norm_w if row.norm_w > 0 else 0.0


def _trade_off(report: Report) -> Section:
    found = report.search.measured
    if len(found) < 2:
        return Section("Trade-off")
    points = tuple(
        Point(
            one.code_bits, max(_total(one), LEAST), _said(one),
            "first" if one.chosen else "second" if one.front else "quiet", one.chosen, one.front,
        )
        for one in found
    )  # fmt: skip
    chart = Scatter(
        "Plans that were measured", "bits of a weight", "divergence from float, nats", points,
        (("first", "chosen"), ("second", "on the front"), ("quiet", "others")), logarithmic=True,
    )  # fmt: skip
    knee = next(one for one in found if one.knee)
    notes = (
        f"{len(found)} plans were measured on the select images; {sum(one.front for one in found)} of them are on the "
        f"front, where less of bits, clean or robust divergence costs more of another. Its knee: {_said(knee)}.",
    )
    return Section("Trade-off", notes, maps=(chart,))


def _total(one: MeasuredPlan) -> float:
    return one.clean + (one.robust or 0.0)


def _said(one: MeasuredPlan) -> str:
    robust = "" if one.robust is None else f", {one.robust:.3g} attacked"
    return f"{one.code_bits:.3g} bits, divergence {one.clean:.3g} clean{robust}"


def _layers(report: Report) -> Section:
    header = (
        "layer", "op", "shape", "format", "bits", "||W||", "||W_q||", "||dW||", "MACs", "integer", "pair sum", "why",
    )  # fmt: skip
    rows = tuple(
        (
            row.name, row.op, "x".join(map(str, row.shape)), row.shown_format, f"{row.container_bits:.4g}",
            f"{row.norm_w:.3g}", f"{row.norm_wq:.3g}", f"{row.norm_dw:.3g}", f"{row.macs:,}",
            "yes" if row.integer else "no", "-" if row.worst_pair_sum is None else str(row.worst_pair_sum), row.reason,
        )
        for row in report.layers
    )  # fmt: skip
    return Section("Layers", tables=(("", Table(header, rows, left=(1, 2, 3, 9, 11))),))


def _search(report: Report) -> Section:
    search = report.search
    notes = [f"Strategy {search.strategy} on {search.sensitivity}; thresholds: {search.thresholds}."]
    if search.factor > 1:
        notes.append(f"All thresholds were relaxed by {search.factor:.3g}, because of {', '.join(search.relaxed)}.")
    rows = tuple(
        (
            plan.name, f"{plan.code_bits:.2f}", f"{plan.clean_divergence:.4g}",
            _shown(plan.adversarial_divergence, ".4g"), _shown(plan.clean_drop, "+.1f"),
            _shown(plan.robust_drop, "+.1f"), "chosen" if plan.chosen else "",
        )
        for plan in search.evaluated
    )  # fmt: skip
    header = ("plan", "bits", "KL clean", "KL adversarial", "clean drop", "robust drop", "")
    return Section(
        "How the plan was found", tuple(notes), (("", Table(header, rows, left=(6,))),), items=(*search.notes,)
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _activations(report: Report) -> Section:
    rows = tuple(
        (a.tensor, a.format, f"{a.low:.4g}", f"{a.high:.4g}", f"{a.scale:.4g}", str(a.zero_point))
        for a in report.activations
    )
    return Section("Activations", tables=(("", Table(("tensor", "format", "low", "high", "scale", "zero"), rows)),))
