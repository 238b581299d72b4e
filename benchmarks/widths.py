"""What bits of activations, chosen together with those of weights, are worth at equal bit operations.

Run: ``QOPT_ASSETS=folder python benchmarks/widths.py [--networks a,b] [--products 20,12] [--images 500]
[--cache folder] [--write]``.

Every row is one run of the main job under the same limit on bit operations, given as the product of weight bits and
activation bits that an average multiplication may have (32 is int4 on int8). ``int8`` and ``int4:mse`` give all tensors
that format and spend what is left on weights; ``chosen`` is what ``--target bops`` does when nothing is asked.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from strategies import ATTACK, NETWORKS, Network, images, percent, scores, words, write_tables
from torch import Tensor

from qopt.api import load
from qopt.cache import Cache
from qopt.config import resolve_options
from qopt.data import Data
from qopt.errors import InfeasibleError
from qopt.job.choose import Choice, choose
from qopt.job.optimize import Task, start
from qopt.job.run import Run
from qopt.size import code_bits
from qopt.spec import ActivationSpec
from qopt.statistics import paired_difference

RESULTS = Path(__file__).resolve().parent / "results" / "widths.md"
ROWS = {"int8": "int8", "int4:mse": "int4:mse", "chosen": None}
"""Name of the row to what ``--activations`` is given."""


@dataclass(frozen=True)
class Row:
    """One run: what it chose and which test images that gets right; no choice where the limit cannot be kept."""

    name: str
    choice: Choice | None
    run: Run
    clean: Tensor | None = None
    robust: Tensor | None = None


def measure(args: argparse.Namespace, network: Network, product: float, name: str, data: Data) -> Row:
    """One run of the main job, and its plan attacked."""
    model = load(args.assets / "onnx" / f"{network.name}.onnx")

    def begin(limit: float) -> Run:
        options = resolve_options(
            target="bops", limits=(f"bops<={limit:g}",), robust=True, eps=network.eps, baselines=(), rounding="gptq",
            bias_correction="on", activations=ROWS[name], probe_images=args.probe, seed=args.seed,
        )  # fmt: skip
        return start(Task(model, network.name, data, options), Cache(args.cache), lambda step: None)

    run = begin(product * begin(1e30).prepared.macs)
    try:
        choice = choose(run)
    except InfeasibleError:
        return Row(name, None, run)
    return Row(name, choice, run, *scores(run, choice.applied.plan, args.images))


def table(args: argparse.Namespace, network: Network, product: float) -> list[str]:
    """One network under one limit, as lines of Markdown."""
    data = images(args.assets / "data" / f"{network.data}.npz")
    rows = [measure(args, network, product, name, data) for name in ROWS]
    floats = scores(rows[0].run, None, args.images)
    chosen = rows[-1]
    assert chosen.robust is not None
    lines = [
        f"\n## {network.name}, {network.eps}, at most {product:g} bit operations per multiplication\n",
        f"Float: clean {percent(floats[0])}, {ATTACK.name} {percent(floats[1])}; {args.images} test images.\n",
        "| activations | code bits of weights | tensors by bits | clean | robust | robust - chosen |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.choice is None:
            lines.append(f"| {row.name} | cannot keep the limit | | | | |")
            continue
        assert row.clean is not None
        assert row.robust is not None
        plan = row.choice.applied.plan
        specs = plan.activation_specs(row.run.quantizer.tensors).values()
        widths = Counter(spec.bits for spec in specs if isinstance(spec, ActivationSpec))
        said = ", ".join(f"{count} x {bits}" for bits, count in sorted(widths.items(), reverse=True))
        apart = paired_difference(row.robust.numpy(), chosen.robust.numpy())
        stored = list(row.choice.applied.quantized.stored(row.run.prepared))
        lines.append(
            f"| {row.name} | {code_bits(stored):.2f} | {said} | {percent(row.clean)} | {percent(row.robust)} "
            f"| {apart.difference:+.1f} +- {apart.standard_error:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", type=words, default=tuple(NETWORKS))
    parser.add_argument("--products", type=lambda text: tuple(map(float, words(text))), default=(20.0, 12.0))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--probe", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.assets = Path(os.environ["QOPT_ASSETS"])
    write_tables(args, "Bits of activations at equal bit operations", RESULTS, args.products, table)


if __name__ == "__main__":
    main()
