"""Loading 50 million parameters from a safetensors file takes no copy of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PARAMETERS = 5e7

CODE = """
import json, os, sys
from pathlib import Path
import onnxscript
import streaming
from qopt.graph.load import load_model
streaming.with_torch_onnx()
path = Path(sys.argv[1])
streaming.write_file(path)
from qopt.graph.stored import StoredTensor, give_back
give_back()
base = streaming.status("VmRSS")
streaming.forget_peak()
model = load_model(path, factory="streaming:network")
peak, after = streaming.status("VmHWM"), streaming.status("VmRSS")
held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if isinstance(v.const_value, StoredTensor))
print(json.dumps({"peak": peak - base, "after": after - base, "size": path.stat().st_size, "held": held}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.long
def test_loading_holds_no_copy(tmp_path: Path) -> None:
    environment = {**os.environ, "QOPT_STREAMING_PARAMETERS": str(PARAMETERS), "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model.safetensors")], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 4 * 0.99 * PARAMETERS
    assert found["held"] > 0.99 * found["size"]
    assert found["peak"] <= 1.5 * found["size"], "while the module is built, its own random weights are there"
    assert found["after"] <= 0.4 * found["size"], "afterwards the weights are in the file alone"
