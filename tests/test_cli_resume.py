"""`qopt optimize --resume`: killed at any moment, the same command ends with the same plan; Ctrl-C keeps the best."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qopt.job.journal import NAME

pytestmark = pytest.mark.long

# a shell that starts tests in the background has them ignore the signal, which Python would inherit
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
RUN = [sys.executable, "-c", f"{LISTEN}; from qopt.cli import main; main()", "optimize", "model.onnx"]
OPTIONS = [
    "--data", "few.npz", "--robust", "--search", "refit", "--evaluations", "6", "--limit", "bits<=3", "--no-cache",
    "--probe-images", "32", "--calibration-images", "64", "--attack-images", "4", "--rows", "off", "--effort", "fast",
    "--baseline", "int4", "--threads", "1",
]  # fmt: skip
PLANS = 6
MANY = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 13)]
"""With those of every run, 20 kills."""


@pytest.fixture(scope="module")
def place(few_images: Path) -> Path:
    return few_images


def begin(place: Path, out: str, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*RUN, *OPTIONS, "-o", out, *more]
    return subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def finish(place: Path, out: str, *more: str) -> str:
    process = begin(place, out, *more)
    said = process.communicate()[1]
    assert process.returncode in (0, 1), said
    return said


def stopped(place: Path, out: str, after: int, wait: float, how: signal.Signals, *more: str) -> tuple[int, str]:
    """Stop a run ``wait`` seconds into the measurement of plan ``after``; returns its exit code and its last words."""
    with begin(place, out, *more) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if f"measured search: plan {after}" in line:
                break
        time.sleep(wait)
        process.send_signal(how)
        rest = process.stderr.read()
    return process.returncode, rest


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    """Plan and journal of a run that nobody interrupted."""
    finish(place, "whole")
    return {name: (place / "whole" / name).read_bytes() for name in ("plan.json", "journal.jsonl")}


def measured(place: Path, out: str) -> int:
    """Whole lines of measured plans in what an interrupted run left."""
    path = place / out / NAME
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def test_an_uninterrupted_run_leaves_its_output_alone(place: Path, whole: dict[str, bytes]) -> None:
    names = sorted(path.name for path in (place / "whole").iterdir())
    reports = ["report.html", "report.json", "report.md"]
    assert names == ["journal.jsonl", "manifest.json", "model.onnx", "plan.json", *reports]
    plans = [json.loads(line) for line in whole["journal.jsonl"].splitlines()]
    assert len(plans) > PLANS, "the selection enters the plans that it measures, too"


@pytest.mark.parametrize("seed", [0, 1, 2, *MANY])
def test_killed_at_any_moment_it_resumes_to_the_same_plan(place: Path, whole: dict[str, bytes], seed: int) -> None:
    chance = random.Random(seed)
    out, lost = f"killed-{seed}", 0
    moments = sorted(chance.sample(range(1, PLANS + 1), 1 + (seed % 2 or seed == 2)))
    for turn, after in enumerate(moments):
        code, _ = stopped(place, out, after, chance.uniform(0, 0.15), signal.SIGKILL, *["--resume"][:turn])
        assert code == -signal.SIGKILL
        assert after - 1 <= measured(place, out)
        assert not (place / out / "plan.json").exists()
        lost = measured(place, out)
    if seed == 2:  # a line that the kill tore
        path = place / out / NAME
        path.write_bytes(path.read_bytes() + b'{"clean": 0.01, "rob')
    said = finish(place, out, "--resume")
    assert said.count("measured search: plan") == max(PLANS - lost, 0), "a plan was measured twice"
    for name, content in whole.items():
        assert (place / out / name).read_bytes() == content, name
    assert not (place / out / NAME).exists()


def test_interrupted_it_writes_the_best_plan_so_far_and_refuses_another_run(place: Path) -> None:
    code, said = stopped(place, "stopped", 3, 0.1, signal.SIGINT)
    assert code == 130
    assert "interrupted, the best plan so far is" in said
    assert "--resume goes on from there" in said
    assert "Traceback" not in said
    kept = [json.loads(line) for line in (place / "stopped" / NAME).read_text().splitlines()[1:]]
    best = min(kept, key=lambda row: row["clean"] + row["robust"])["plan"]["weights"]
    assert json.loads((place / "stopped" / "plan.json").read_text())["weights"] == best
    refused = begin(place, "stopped", "--resume", "--seed", "1")
    words = refused.communicate()[1]
    assert refused.returncode == 2
    assert "cannot resume: the journal is of a run with another --seed (expected 1, got 0)" in words
