"""Search over random instances: the exact strategy's time and proof, and greedy's printed gap beside the true one.

Run: ``OMP_NUM_THREADS=1 python benchmarks/search.py [--layers 500] [--choices 16] [--instances 5] [--write]``.

Layers have 1e4 to 1e8 multiplications and 1e2 to 3e6 weights, choices are widths of weights and activations from 2 to
8 bits, sensitivities fall by 4 per bit times noise of up to 2, layers differing by four orders of magnitude. One limit
is on operations times both widths, two limits add the bytes of the weights, each at a share of the most that could be
spent; greedy is left out where its exchanges take minutes. A Lipschitz limit is on residual blocks of two layers,
norms off by up to a quarter at 2 bits, half way between the least constant and that of the plan without it. The true
gap is against the optimum that the solver proves. Times are process CPU seconds of one thread, the longest of all
instances. Bars: proved, under one limit in under 3 seconds, and no printed gap below the true one.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qopt.search import greedy
from qopt.search.ceiling import Ceiling, keeps
from qopt.search.exact import PROVED, ExactSearch, walked
from qopt.search.items import Item, total
from qopt.search.potentials import Edge, Node, Potentials
from qopt.search.solver import minimise
from qopt.spec import WeightSpec

RESULTS = Path(__file__).resolve().parent / "results" / "search.md"
SECONDS = 3.0
KINDS = {"1 limit, tight": ((0.1,), None), "1 limit": ((0.4,), None), "2 limits": ((0.25, 0.3), None),
         "2 limits, loose": ((0.4, 0.4), None), "1 limit, Lipschitz": ((0.4,), 0.5)}  # fmt: skip


@dataclass
class Row:
    """One kind of instance: times, the solver's gaps, greedy's true and printed gaps."""

    proved: int = 0
    broken: int = 0
    seconds: float = 0.0
    gap: float = 0.0
    greedy_seconds: float = 0.0
    true: float = 0.0
    printed: float = 0.0
    ratio: float = 0.0
    below: int = 0


def instance(seed: int, layers: int, choices: int, shares: tuple[float, ...]) -> tuple[list[Item], list[Column]]:
    """Items, and the logarithms of the norms of every layer's choices."""
    rng = np.random.default_rng(seed)
    side = int(np.sqrt(choices))
    widths = np.linspace(2, 8, side)
    weight, activation = np.repeat(widths, choices // side), np.tile(np.linspace(2, 8, choices // side), side)
    columns, sensitivities, norms = [], [], []
    for _ in range(layers):
        macs, weights = 10 ** rng.uniform(4, 8), 10 ** rng.uniform(2, 6.5)
        columns.append(np.stack([macs * weight * activation, weights * weight], axis=1)[:, : len(shares)])
        noise = rng.uniform(0.5, 2, (2, choices))
        losses = 4.0**-weight * noise[0] + 10 ** rng.uniform(-1, 1) * 4.0**-activation * noise[1]
        sensitivities.append(10 ** rng.uniform(-3, 1) * losses)
        norms.append(np.log(10 ** rng.uniform(-0.2, 0.4) * (1 + rng.standard_normal(choices) * 2.0**-weight)))
    most = np.sum([column.max(axis=0) for column in columns], axis=0) * np.array(shares)
    spec = (WeightSpec("int", 4),) * choices
    items = [Item((f"l{i}",), spec, c / most, s) for i, (c, s) in enumerate(zip(columns, sensitivities, strict=True))]
    return items, norms


Column = NDArray[np.float64]


def residual(layers: int) -> Potentials:
    """A stem and blocks of two layers around which the input goes past; the layer left over, if any, at the end."""
    nodes = [Node("image"), Node("stem", (Edge(0, 0.0, "l0"),))]
    for first in range(1, layers - 1, 2):
        source = len(nodes) - 1
        nodes.append(Node("first", (Edge(source, 0.0, f"l{first}"),)))
        nodes.append(Node("sum", (Edge(source + 1, 0.0, f"l{first + 1}"), Edge(source))))
    last = (layers - 1) // 2 * 2 + 1
    nodes += [Node("end", (Edge(len(nodes) - 1, 0.0, f"l{last}"),))] if last < layers else []
    return Potentials(tuple(nodes))


def limited(items: list[Item], norms: list[Column], share: float) -> Ceiling:
    """Some way up from the least constant to that of the best plan without a Lipschitz limit."""
    names = tuple(item.layers for item in items)
    ceiling = Ceiling(residual(len(items)), np.inf, names, tuple(column[None] for column in norms))
    free = minimise(items, None, 1.0, 60).picks
    assert free is not None
    return replace(ceiling, bound=ceiling.floor + share * (ceiling.constant(free) - ceiling.floor))


def add(row: Row, items: list[Item], ceiling: Ceiling | None, greedily: bool) -> None:
    """Solve one instance exactly, and greedily too unless that takes minutes."""
    began = time.process_time()
    quick = walked(items, ceiling)
    solved = minimise(items, ceiling, total(items, quick) if quick else 1.0, ExactSearch().seconds)
    row.seconds = max(row.seconds, time.process_time() - began)
    assert solved.picks is not None
    best = total(items, solved.picks)
    gap = greedy.gap_of(best, solved.bound)
    row.gap, row.proved = max(row.gap, gap), row.proved + (solved.done and gap <= PROVED)
    row.broken += not keeps(items, ceiling, solved.picks)
    if not greedily:
        return
    began = time.process_time()
    picks, bound = greedy.solve(items, ceiling)
    row.greedy_seconds = max(row.greedy_seconds, time.process_time() - began)
    row.broken += not keeps(items, ceiling, picks)
    true, printed = greedy.gap_of(total(items, picks), best), greedy.gap_of(total(items, picks), bound)
    row.true, row.printed = max(row.true, true), max(row.printed, printed)
    row.ratio = max(row.ratio, true / printed if printed else 0.0)
    row.below += printed < true - 1e-9


HEAD = ["instance", "proved", "seconds", "its gap", "greedy, seconds", "true gap", "printed gap", "true / printed",
        "printed below true", "limits broken"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--choices", type=int, default=16)
    parser.add_argument("--instances", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/search.md")
    args = parser.parse_args()
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    missed = []
    for layers, kinds in ((args.layers, list(KINDS)[:4]), (54, list(KINDS))):
        for kind in kinds:
            shares, share = KINDS[kind]
            row = Row()
            for seed in range(args.instances):
                items, norms = instance(seed, layers, args.choices, shares)
                ceiling = None if share is None else limited(items, norms, share)
                add(row, items, ceiling, greedily=layers < 100 or len(shares) == 1)
            found = f"{row.greedy_seconds:.2f} | {100 * row.true:.3f} % | {100 * row.printed:.3f} % | {row.ratio:.3f}"
            lines.append(
                f"| {layers} x {args.choices}, {kind} | {row.proved} of {args.instances} | {row.seconds:.2f} | "
                f"{row.gap:.1e} | {found if row.greedy_seconds else '- | - | - | -'} | {row.below} | {row.broken} |"
            )
            late = row.seconds >= SECONDS and len(shares) == 1
            missed += [kind] if row.proved < args.instances or late or row.below or row.broken else []
            print(lines[-1], flush=True)
    print("\n".join(lines[:2]), f"bars missed: {', '.join(missed) or 'none'}", sep="\n")
    if args.write:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread; the worst of {args.instances} instances"
        lines += ["", f"Bars missed: {', '.join(missed) or 'none'}."]
        RESULTS.write_text("\n".join(["# Search on random instances", "", f"{machine}.", "", *lines, ""]))


if __name__ == "__main__":
    main()
