"""What qopt takes: networks compiled weight-only to 4 bits without data, emitted and checked: docs/coverage.md.

Run: ``python benchmarks/coverage.py [--files FOLDER ...] [--only a,b] [--write]``.

Networks: the fifteen architectures of `architectures` (``pip install qopt[architectures]``), exported by qopt; the
light models of the `onnx` package, whose missing weights are made real; and every ``.onnx`` in the folders of
``--files``, those in wheels included. A refusal is shown with its reason.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from architectures import ARCHITECTURES
from onnx import numpy_helper

import qopt
from qopt.errors import QoptError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
OPTIONS = {"target": "int4-uniform", "rows": "off"}


@dataclass(frozen=True)
class Covered:
    """One row: sizes in MB, or why there are none."""

    source: str
    name: str
    layers: int = 0
    float_mb: float = 0.0
    file_mb: float = 0.0
    seconds: float = 0.0
    refused: str = ""


def compiled(source: str, name: str, run: Callable[[], tuple[qopt.Bundle, int]]) -> Covered:
    """Compile, which checks the file; ``run`` returns the bundle and the bytes of float."""
    began = time.perf_counter()
    try:
        bundle, float_bytes = run()
    except QoptError as error:
        return Covered(source, name, seconds=time.perf_counter() - began, refused=str(error))
    seconds = time.perf_counter() - began
    layers = sum(row.format != "float" for row in bundle.report.layers)
    return Covered(source, name, layers, float_bytes / 1e6, len(bundle.model) / 1e6, seconds)


def architectures() -> Iterator[tuple[str, str, Callable[[], tuple[qopt.Bundle, int]]]]:
    """The fifteen, as live modules."""
    for name, build in ARCHITECTURES.items():

        def run(build: Callable = build) -> tuple[qopt.Bundle, int]:
            module, example = build()
            size = sum(4 * p.numel() for p in {id(p): p for p in module.parameters()}.values())
            return qopt.optimize(module, example=example, **OPTIONS), size

        yield "transformers", name, run


def light_models() -> Iterator[tuple[str, str, Callable[[], tuple[qopt.Bundle, int]]]]:
    """The light models of the onnx package, with weights drawn as He et al. do in place of constants of one number."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    for path in sorted(folder.glob("*.onnx")):

        def run(path: Path = path) -> tuple[qopt.Bundle, int]:
            return onnx_bundle(made_real(onnx.load(path)).SerializeToString())

        yield "onnx light", path.stem.removeprefix("light_"), run


def made_real(model: onnx.ModelProto) -> onnx.ModelProto:
    """ConstantOfShape weights replaced by random ones of the scale of their fan-in."""
    generator = np.random.default_rng(0)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in constants:
            kept.append(node)
            continue
        shape = tuple(int(size) for size in constants[node.input[0]])
        spread = np.sqrt(2 / max(int(np.prod(shape[1:])), 1)) if len(shape) > 1 else 0.01
        positive = len(shape) == 1 and node.output[0].endswith(("_var_0", "_riv_0", "_rm_0", "variance"))
        array = np.abs(generator.normal(size=shape)) + 0.5 if positive else generator.normal(size=shape) * spread
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    model.ir_version = max(model.ir_version, 4)  # before, initializers were inputs too
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def files(folders: list[str]) -> Iterator[tuple[str, str, Callable[[], tuple[qopt.Bundle, int]]]]:
    """Every ONNX file in the folders and in the wheels there."""
    for folder in map(Path, folders):
        for path in sorted(folder.glob("*.onnx")):
            yield folder.name, path.stem, lambda path=path: onnx_bundle(path.read_bytes())
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(".onnx")]
            for name in names:

                def run(wheel: Path = wheel, name: str = name) -> tuple[qopt.Bundle, int]:
                    with zipfile.ZipFile(wheel) as archive:
                        return onnx_bundle(archive.read(name))

                yield wheel.name.split("-")[0], Path(name).stem, run


def onnx_bundle(content: bytes) -> tuple[qopt.Bundle, int]:
    """Compile an ONNX file; written to a temporary one, as users have it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        return qopt.optimize(path, **OPTIONS), len(content)


def table(rows: list[Covered]) -> str:
    """The rows as Markdown, refusals below."""
    head = ["source", "network", "layers", "float MB", "file MB", "float / file", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = ["refused", "", "", "", f"{row.seconds:.0f}"]
        if not row.refused:
            ratio = row.float_mb / row.file_mb
            numbers = [
                str(row.layers),
                f"{row.float_mb:.2f}",
                f"{row.file_mb:.2f}",
                f"{ratio:.1f}",
                f"{row.seconds:.0f}",
            ]
        lines.append("| " + " | ".join([row.source, row.name, *numbers]) + " |")
    refused = [f"- {row.name}: {row.refused}" for row in rows if row.refused]
    return "\n".join([*lines, *(["", "Refused:", "", *refused] if refused else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("--only", default="", help="names, with commas")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    only, rows = set(args.only.split(",")) - {""}, []
    for source, name, run in (*architectures(), *light_models(), *files(args.files)):
        if not only or name in only:
            rows.append(compiled(source, name, run))
            print(table(rows[-1:]).split("\n", 2)[2], flush=True)
    taken = sum(not row.refused for row in rows)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    summary = f"{taken} of {len(rows)} compiled, emitted and checked; peak memory {memory:.1f} GB."
    print(summary)
    if args.write:
        text = f"""# What qopt takes

Written by `benchmarks/coverage.py`: every network compiled weight-only to 4 bits without data, the file checked against
the quantized network in ONNX Runtime. Weights of the architectures and of the light models are random.

{table(rows)}

{summary}
"""
        DOCS.write_text(text)


if __name__ == "__main__":
    main()
