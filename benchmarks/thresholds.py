"""Which Lipschitz threshold tells harmless formats from harmful ones: where the default threshold comes from.

Run: ``QOPT_ASSETS=folder python benchmarks/thresholds.py [--images 256] [--harm 0.05] [--attacked 64] [--write]``.

`qopt analyze` looks at every layer of public networks in every format, one at a time and rounded to nearest, and
measures the robust loss: of each select image as hard as the float network withstands it. Three quantities are held
against the change of it: the factor by which a candidate exceeds the paper's two thresholds (``paper``, 1 passes),
``||dW|| / ||W||`` (``relative``) and the same weighted by the second moment of the layer's inputs (``weighted``).

- Rank correlation (Spearman) over the layers of one format, mean and standard error over formats; of ``paper`` it is
  that of ``||dW||``.
- A candidate is harmful where it raises the robust loss by more than ``--harm`` nats. AUC is the chance that a harmful
  one has the larger quantity of the two; the best threshold is the one of highest balanced accuracy, the mean of the
  shares of harmful ones above it and of harmless ones at or below it. `others'` is the balanced accuracy on a network
  of the threshold that is best on the other networks: what a default can be expected to do on a new network.

``--attacked`` also attacks every candidate's own network on that many images, of networks trained to withstand the
attack, and says how well the measured change ranks candidates by that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from scipy.stats import rankdata
from torch.nn import functional

from qopt.api import load
from qopt.attacks import PGD, predict
from qopt.cache import Cache
from qopt.data import load_data
from qopt.graph.prepare import prepare
from qopt.job.analyze import AnalyzeTask, analyze_model
from qopt.measure.network import TwinClassifier
from qopt.measure.ranks import spearman
from qopt.plan import Plan
from qopt.quantize import Quantizer
from qopt.report.analysis_report import AnalysisReport, CandidateFacts
from qopt.search.thresholds import Thresholds
from qopt.threat import ThreatModel

RESULTS = Path(__file__).resolve().parent / "results"
FORMATS = (
    "ternary", "int2", "int3", "int4", "int4:max", "log4", "log4:max", "int8", "int1", "log3", "int2:tensor:max",
    "int3:tensor:max", "int4:tensor:max", "log2:tensor:max", "log3:tensor:max", "log4:tensor:max",
)  # fmt: skip
"""Those of the target int4, and those of Algorithm 1 at 1 to 4 bits (log1 is int1, int1 per tensor like it)."""

FORMS: dict[str, Callable[[CandidateFacts], float]] = {
    "paper": lambda row: row.paper,
    "relative": lambda row: row.relative,
    "weighted": lambda row: row.weighted.upper if row.weighted is not None else float("nan"),
}
DEFAULTS = {"paper": 1.0, "relative": Thresholds().value, "weighted": Thresholds().value}


@dataclass(frozen=True)
class Network:
    """A public network with its images and threat model; ``robust`` where it was trained to withstand it."""

    name: str
    data: str
    eps: float
    robust: bool = True


NETWORKS = (
    Network("resnet20_cifar10_std", "cifar10_small", 2 / 255, robust=False),
    Network("vresnet2b_cifar10_adv2", "cifar10_small", 2 / 255),
    Network("cnn_cifar10_mix4", "cifar10_small", 2 / 255),
    Network("cnn_mnist_madrytiny", "mnist_small", 0.3),
    Network("cnn_fashion_kw", "fashion_small", 0.1),
)


@dataclass(frozen=True)
class Pairs:
    """All pairs of layer and format: the three quantities, and the change of the robust loss."""

    quantities: dict[str, np.ndarray]
    harm: np.ndarray

    @staticmethod
    def of(report: AnalysisReport) -> Pairs:
        rows = [row for layer in report.layers for row in layer.candidates if row.measured is not None]
        harm = np.array([row.measured.robust_loss for row in rows if row.measured is not None])
        return Pairs({form: np.array([get(row) for row in rows]) for form, get in FORMS.items()}, harm)

    @staticmethod
    def joined(parts: Sequence[Pairs]) -> Pairs:
        quantities = {form: np.concatenate([part.quantities[form] for part in parts]) for form in FORMS}
        return Pairs(quantities, np.concatenate([part.harm for part in parts]))


def auc(values: np.ndarray, harmful: np.ndarray) -> float:
    """The chance that a harmful candidate has the larger value, ties by halves (Mann and Whitney)."""
    many, few = int(harmful.sum()), int((~harmful).sum())
    if not many or not few:
        return float("nan")
    return float((rankdata(values)[harmful].sum() - many * (many + 1) / 2) / (many * few))


def balanced(values: np.ndarray, harmful: np.ndarray, threshold: float) -> float:
    """The mean of the shares of harmful candidates above the threshold and of harmless ones at or below it."""
    if not harmful.any() or harmful.all():
        return float("nan")
    return float(((values[harmful] > threshold).mean() + (values[~harmful] <= threshold).mean()) / 2)


def best_threshold(values: np.ndarray, harmful: np.ndarray) -> tuple[float, float, float]:
    """The threshold of highest balanced accuracy and the ends of the interval within which nothing changes."""
    steps = np.unique(values)
    scores = [balanced(values, harmful, step) for step in steps]
    place = int(np.argmax(scores))
    upper = steps[place + 1] if place + 1 < len(steps) else steps[place]
    return float((steps[place] + upper) / 2), float(steps[place]), float(upper)


def correlation_row(report: AnalysisReport) -> list[str]:
    """Mean and standard error over formats of the correlation within each, for the loss and for the divergence."""
    cells = [report.model, str(len(report.layers))]
    for quantity in ("robust_loss", "divergence"):
        for form in FORMS:
            rows = [row for row in report.correlations if row.quantity == quantity and row.format]
            found = [getattr(row, form) for row in rows if getattr(row, form) is not None]
            cells.append(f"{fmean(found):+.2f} +- {stdev(found) / len(found) ** 0.5:.2f}")
    return cells


def separation_rows(pairs: dict[str, Pairs], harm: float) -> list[list[str]]:
    """For each network and all together: what each form separates, and at which threshold."""
    rows = []
    for name, group in {**pairs, "all": Pairs.joined(list(pairs.values()))}.items():
        harmful = group.harm > harm
        others = Pairs.joined([other for key, other in pairs.items() if key != name])
        for form in FORMS:
            values = group.quantities[form]
            threshold, _, _ = best_threshold(values, harmful)
            learned = best_threshold(others.quantities[form], others.harm > harm)[0]
            cells = [name, form, f"{int(harmful.sum())} of {len(harmful)}", f"{auc(values, harmful):.3f}"]
            cells += [f"{threshold:.3g}", f"{balanced(values, harmful, threshold):.3f}"]
            cells += ["" if name == "all" else f"{balanced(values, harmful, learned):.3f}"]
            rows.append([*cells, f"{balanced(values, harmful, DEFAULTS[form]):.3f} at {DEFAULTS[form]:g}"])
    return rows


def by_harm(pairs: dict[str, Pairs]) -> list[list[str]]:
    """How the best threshold over all networks depends on what counts as harm; networks weigh as their pairs do."""
    everything, rows = Pairs.joined(list(pairs.values())), []
    for harm in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        harmful, cells = everything.harm > harm, [f"{harm:g}"]
        cells.append(f"{int(harmful.sum())} of {len(harmful)}")
        for form in FORMS:
            values = everything.quantities[form]
            threshold, low, high = best_threshold(values, harmful)
            cells += [f"{auc(values, harmful):.3f}", f"{threshold:.3g} ({low:.3g}-{high:.3g})"]
            cells.append(f"{balanced(values, harmful, threshold):.3f}")
        rows.append(cells)
    return rows


def attacked_row(assets: Path, network: Network, report: AnalysisReport, count: int) -> list[str]:
    """How the measured changes rank candidates by the loss under an attack made for each of them."""
    prepared = prepare(load(assets / "onnx" / f"{network.name}.onnx"))
    part = load_data(str(assets / "data" / f"{network.data}.npz")).shaped(prepared.input_shape).select.first(count)
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    threat, quantizer = ThreatModel("linf", network.eps), Quantizer(prepared)

    def loss(plan: Plan) -> float:
        twin = TwinClassifier(quantizer.apply(plan).graph, batch=prepared.batch)
        found = PGD(steps=10, compact=False)(twin, images, labels, threat, seed=0)
        return float(functional.cross_entropy(predict(twin, found.adversarial).double(), labels))

    plain, own = loss(Plan()), {}
    rows = [(layer.name, row) for layer in report.layers for row in layer.candidates]
    for layer, row in rows:
        own[layer, row.format] = loss(Plan(weights={layer: row.format})) - plain
    order = [own[layer, row.format] for layer, row in rows]
    cells = [network.name, str(len(rows)), f"{plain:.3f}"]
    fields = ("robust_loss", "adversarial_loss", "clean_loss", "divergence")
    found = [[getattr(row.measured, field) for _, row in rows] for field in fields]
    found += [[get(row) for _, row in rows] for get in FORMS.values()]
    return cells + [f"{spearman(values, order):+.2f}" for values in found]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--harm", type=float, default=0.05)
    parser.add_argument("--attacked", type=int, default=0)
    parser.add_argument("--networks", default=",".join(network.name for network in NETWORKS))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/thresholds.md")
    args = parser.parse_args()
    folder = os.environ.get("QOPT_ASSETS")
    if not folder:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    torch.set_num_threads(1)
    assets, wanted = Path(folder), args.networks.split(",")
    networks = [network for network in NETWORKS if network.name in wanted]
    reports = []
    for network in networks:
        data = load_data(str(assets / "data" / f"{network.data}.npz"))
        task = AnalyzeTask(
            assets / "onnx" / f"{network.name}.onnx", data, eps=network.eps, formats=FORMATS, images=args.images
        )
        reports.append(analyze_model(task, Cache(args.cache), lambda step: None))
        print(reports[-1].verdict, flush=True)
    text = _text(networks, reports, assets, args)
    print(text)
    if args.write:
        (RESULTS / "thresholds.md").write_text(text)


def _text(
    networks: Sequence[Network], reports: Sequence[AnalysisReport], assets: Path, args: argparse.Namespace
) -> str:
    forms = list(FORMS)
    pairs = {report.model: Pairs.of(report) for report in reports}
    parts = [
        "# Which threshold tells harmless formats from harmful ones",
        f"{args.images} select images, {len(FORMATS)} formats, one layer at a time, rounded to nearest. Robust loss: "
        "each image as hard as the float network withstands it (PGD-10, "
        + ", ".join(f"{n.name} {ThreatModel('linf', n.eps)}" for n in networks) + ").",
        "## Rank correlation over the layers of one format, mean +- standard error over formats",
        table(["network", "layers", *(f"loss: {f}" for f in forms), *(f"KL: {f}" for f in forms)],
              [correlation_row(report) for report in reports]),
        f"## Harmful is more than {args.harm:g} nats of robust loss",
        table(["network", "form", "harmful", "AUC", "best threshold", "balanced accuracy", "with the others' threshold",
               "with the default"], separation_rows(pairs, args.harm)),
        "## The best threshold over all networks, by what counts as harm (nats)",
        table(["more than", "harmful", *(f"{f} {c}" for f in forms for c in ("AUC", "threshold", "balanced accuracy"))],
              by_harm(pairs)),
    ]  # fmt: skip
    if args.attacked:
        made = f"{args.attacked} images"
        rows = [
            attacked_row(assets, network, report, args.attacked)
            for network, report in zip(networks, reports, strict=True)
            if network.robust
        ]
        parts += [
            f"## Rank correlation with the loss under PGD-10 made for each candidate's own network, {made}",
            table(["network", "pairs", "float loss", "robust loss", "adversarial", "clean loss", "KL", *forms], rows),
        ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
