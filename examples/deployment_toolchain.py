"""The Python API inside a deployment toolchain: compile, gate, fall back, verify, hand over.

    python examples/deployment_toolchain.py OUT

A build step wants a file that is small and as hard to fool as the float network, or to know why there is none. This
one tries targets from the smallest on, takes the first whose gates hold, verifies what was written and runs it as
production would: with ONNX Runtime alone. The last line of stdout is one JSON object for the next step; the exit code
is 0 where a file was handed over, else 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

import qopt
from qopt.data import Data, Split
from qopt.job.check import check_folder

HERE = Path(__file__).resolve().parent
TARGETS = (("int2", ()), ("int4", ("bits<=3.5",)), ("int8", ()))
"""What is tried, with limits, from the smallest on; int2 costs this network too much."""

GATES = ("clean_drop<=15", "robust_drop<=15", "masking=none")
"""In points, at the upper end of the interval: wide, for the few images that this example measures on."""


def images(count: int) -> Data:
    """The first ``count`` images of every part of the embedded data set: a real run takes all of them."""
    data = qopt.load_data(str(HERE / "fashion.npz"))
    parts = [Split(part.images[:count], part.labels[:count]) for part in (data.calibrate, data.select, data.report)]
    return Data(*parts)


def compiled(model: Path, data: Data) -> tuple[str, qopt.Bundle] | None:
    """The first target whose gates hold, with its bundle; None where none does."""
    for target, limits in TARGETS:
        try:
            bundle = qopt.optimize(
                model, data=data, target=target, limits=limits, robust=True, gates=GATES, effort="fast", baselines=(),
                probe_images=8, calibration_images=32, progress=lambda step: print(f"  {step}", file=sys.stderr),
            )  # fmt: skip
        except qopt.QoptError as error:  # one line: what, where, expected and got, what to do
            print(f"{target}: {error}")
            continue
        failed = [f"{gate.gate} (found {gate.found})" for gate in bundle.report.gates if not gate.holds]
        print(f"{target}: {'; '.join(failed) or 'every gate holds'}")
        if bundle.exit_code == 0:
            return target, bundle
    return None


def production(file: Path, pixels: np.ndarray) -> np.ndarray:
    """The classes that the file gives, as a device computes them: no part of qopt runs here."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
    return np.asarray(logits).argmax(axis=1)


def main(out: Path) -> int:
    """Hand over a folder in ``out``; 0 where there is one."""
    data = images(32)
    found = compiled(HERE / "fashion_resnet.pt", data)
    if found is None:
        print("no target passed")
        return 1
    target, bundle = found
    folder = bundle.write(out / target)
    broken = [row.text for row in check_folder(folder, data) if row.holds is False]
    if broken:
        print(f"{folder} is not what its report says: {'; '.join(broken)}")
        return 1
    right = production(folder / "model.onnx", data.report.images) == data.report.labels
    summary = {
        "target": target, "folder": str(folder), "bytes": bundle.report.size.file_bytes,
        "clean": round(100 * float(right.mean()), 1), "robust": round(bundle.robust_accuracy or 0.0, 1),
    }  # fmt: skip
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "deployed")))
