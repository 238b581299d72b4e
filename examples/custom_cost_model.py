"""A cost model of one's own, tested against the contract and used to trade latency for accuracy.

    python examples/custom_cost_model.py

The board multiplies 4-bit weights twice as fast as 8-bit ones and takes nothing else. Two plans are made for it: one
that must be fast, and one that may take its time. A package would name the class under the entry-point group
`qopt.cost_models` (`cost_model_plugin/` does); a script has no package, so `register` says the same by hand.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import qopt
from qopt.hardware.cost_model import Constant, LayerDescription, Specs, Step, summed
from qopt.hardware.quantities import units
from qopt.limits import Limit
from qopt.spec import WeightSpec
from qopt.testing import cost_model_contract

HERE = Path(__file__).resolve().parent
SHEET = "data sheet of a board that was made up for this example"


@dataclass(frozen=True)
class Board:
    """64 multiply-accumulates a cycle at 100 MHz; weights of 4 bits pass two at a time."""

    name: ClassVar[str] = "board"
    prices: ClassVar[Mapping[str, str]] = units("latency")
    totals: ClassVar[Mapping[str, str]] = units("latency")
    constants: ClassVar[Mapping[str, Constant]] = {
        "clock": Constant(100e6, "Hz", "published", SHEET),
        "multipliers": Constant(64, "MAC per cycle at 8 bits", "published", SHEET),
        "start": Constant(500, "cycles per layer", "assumed", "writing the registers of one layer"),
    }

    def capabilities(self, layer: LayerDescription, formats: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
        """int4 and int8 with a scale per channel."""
        return tuple(spec for spec in formats if str(spec) in ("int4", "int8"))

    def layer_cost(self, layer: LayerDescription, spec: WeightSpec) -> Mapping[str, float]:
        """Seconds of one image."""
        rate = self.constants["multipliers"].value * (2 if spec.bits <= 4 else 1)
        cycles = self.constants["start"].value * layer.uses + layer.macs / rate
        return {"latency": cycles / self.constants["clock"].value}

    def network_cost(
        self, layers: Sequence[LayerDescription], specs: Specs, steps: Sequence[Step] = ()
    ) -> Mapping[str, float]:
        """The layers one after the other."""
        return summed(self, layers, specs)

    def limits(self) -> tuple[Limit, ...]:
        """None: any network fits."""
        return ()


def register(folder: Path) -> None:
    """What `pip install` of a package leaves behind: metadata that name the class, on the path."""
    info = folder / "board-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: board\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qopt.cost_models]\nboard = custom_cost_model:Board\n")
    sys.path[:0] = [str(folder), str(HERE)]


def plan(limit: str) -> str:
    """Compile for the board within a limit; one line on what came out."""
    bundle = qopt.optimize(HERE / "fashion_resnet.pt", target="board", limits=(limit,))
    formats = Counter(layer.format for layer in bundle.report.layers)
    (row,) = [row for row in bundle.report.limits if row.machine == "board"]
    chosen = ", ".join(f"{count} layers in {name}" for name, count in sorted(formats.items()))
    return f"{limit}: {chosen}; {row.found} of one image; {bundle.report.size.file_bytes:,} bytes"


def main() -> None:
    """Test the model, then use it."""
    cost_model_contract(Board())
    print("the contract holds")
    with tempfile.TemporaryDirectory() as folder:
        register(Path(folder))
        for limit in ("latency<=460us", "latency<=300us"):
            print(plan(limit))
        try:
            plan("latency<=100us")
        except qopt.QoptError as error:
            print(f"latency<=100us: {error}")


if __name__ == "__main__":
    main()
