"""How others formulate the search, on the instances of `search.py`: what each gives beside the proved optimum.

| label | formulation | as in |
|---|---|---|
| Optuna, a parameter per layer | TPE over one categorical choice per layer, limits as constraints of a trial | Olive |
| HAWQ-style | integer program under one limit, sensitivity = a proxy | HAWQ-v3: Hessian trace x ||dW||^2 |
| ModelOpt-style | bisection on one multiplier, every layer on its own | auto_quantize: one budget, relaxed, rounded |

The instances have no network, so HAWQ's proxy is the given sensitivity times a factor per layer, lognormal with sigma
0.5: right within a layer, off between layers, as a trace is. HAWQ and ModelOpt know one budget; how they would be used
under several is ours to invent, so they are held to instances with one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qopt.search.items import Item, keeps_limits, total
from qopt.search.solver import minimise

TRIALS = 200
SIGMA = 0.5
ONE_LIMIT = ("HAWQ-style", "ModelOpt-style")
"""Formulations that know one budget only."""

Found = tuple[list[int] | None, float]
"""A plan within all limits, or None; CPU seconds."""


def optuna_per_layer(items: Sequence[Item], seed: int) -> Found:
    """The best of `TRIALS` trials; choices are numbered by cost, from cheap to dear."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    orders = [np.argsort(item.weight, kind="stable") for item in items]
    best: list[int] | None = None
    began = time.process_time()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(TRIALS):
        trial = study.ask()
        picks = [int(order[trial.suggest_int(f"l{i}", 0, len(order) - 1)]) for i, order in enumerate(orders)]
        over = np.sum([item.costs[p] for item, p in zip(items, picks, strict=True)], axis=0) - 1
        trial.set_constraint("limits", float(over.max()))
        study.tell(trial, total(items, picks))
        if keeps_limits(items, picks) and (best is None or total(items, picks) < total(items, best)):
            best = picks
    return best, time.process_time() - began


def hawq_style(items: Sequence[Item], seed: int) -> Found:
    """The integer program under the limit, on the proxy."""
    factors = np.random.default_rng(seed).lognormal(0, SIGMA, len(items))
    proxy = [replace(item, sensitivities=f * item.sensitivities) for item, f in zip(items, factors, strict=True)]
    began = time.process_time()
    plan = minimise(proxy, None, total(proxy, [0] * len(proxy)), 20.0).picks
    return plan, time.process_time() - began


def modelopt_style(items: Sequence[Item], seed: int) -> Found:
    """The smallest multiplier of the cost at which every layer's own best keeps the limit."""
    del seed
    began = time.process_time()
    best, low, high = None, 1e-12, 1e6
    for _ in range(60):
        price = float(np.sqrt(low * high))
        picks = [int((item.sensitivities + price * item.weight).argmin()) for item in items]
        if keeps_limits(items, picks):
            best, high = picks, price
        else:
            low = price
    return best, time.process_time() - began


FORMULATIONS: dict[str, Callable[[Sequence[Item], int], Found]] = {
    f"Optuna, a parameter per layer, {TRIALS} trials": optuna_per_layer,
    "HAWQ-style": hawq_style,
    "ModelOpt-style": modelopt_style,
}
