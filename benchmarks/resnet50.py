"""Wall time and memory of `qopt optimize` with images on ResNet-50's shape: 25.6 million weights, 224 x 224.

Run: ``python benchmarks/resnet50.py [--images 512] [--effort normal] [--write]`` (``pip install qopt[architectures]``).

Weights and images are random and labels are what the network says, so that only time, memory and size mean anything.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from architectures import Logits

import qopt
from qopt.data import Data, Split

RESULTS = Path(__file__).resolve().parent / "results" / "resnet50.md"


def network() -> torch.nn.Module:
    """ResNet-50 with the weights that `transformers` draws."""
    import transformers

    torch.manual_seed(0)
    return Logits(transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))).eval()


def images(module: torch.nn.Module, count: int) -> Data:
    """Three parts of ``count`` smooth random images each, labelled by the network."""

    def part(seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 14, 14, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")
        with torch.no_grad():
            labels = torch.cat([module(chunk).argmax(1) for chunk in fine.split(32)])
        return Split(fine.numpy(), labels.numpy().astype(np.int64))

    return Data(part(1), part(2), part(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="in each part of the data")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--write", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args()
    module = network()
    data = images(module, args.images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began, cpu = time.perf_counter(), time.process_time()

    def say(step: str) -> None:
        print(f"  {time.perf_counter() - began:.0f} s {step}", flush=True)

    bundle = qopt.optimize(module, data=data, effort=args.effort, progress=say)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = bundle.report.size
    row = (
        f"ResNet-50's shape, {args.images} images in each part, `--effort {args.effort}`, {torch.get_num_threads()} "
        f"threads: {wall:.0f} s wall, {cpu:.0f} CPU s; peak memory {peak:.2f} GB, {before:.2f} of it before, "
        f"for images, module and libraries; {size.code_bits:.2f} code bits, file {size.ratio:.3f} of float."
    )
    steps = "\n".join(f"- {name}: {seconds:.0f} s" for name, seconds in bundle.manifest["seconds"].items())
    print(row, steps, sep="\n\n")
    if args.write:
        RESULTS.write_text(f"# A large network\n\n{row}\n\n{steps}\n")


if __name__ == "__main__":
    main()
