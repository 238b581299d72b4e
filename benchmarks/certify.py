"""Certified beside attacked accuracy of 4-bit networks: how much of what PGD leaves is proved, and at what cost.

Run: ``QOPT_ASSETS=folder python benchmarks/certify.py [--images 200] [--weights int4] [--activations float]``.

The networks are public ones with every weight in ``--weights``, rounded by ``--rounding``, and activations in
``--activations``, calibrated on 256 train images. PGD has 20 steps
of the margin loss and cross-entropy each, on the twin that is certified; an image counts where both fail. Time is the
process CPU time of one thread per image, the cheaper methods that are tried first included. ``agreement`` is the
median over the first 16 images of the bound on the largest change of a logit by quantization inside the ball, beside
the largest change that PGD on it finds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from qopt.attacks.pgd import PGD
from qopt.certificates.certificate import METHODS, agreement, certify
from qopt.graph.load import load_model
from qopt.graph.prepare import prepare
from qopt.plan import Defaults, Plan
from qopt.quantize import Quantizer
from qopt.threat import ThreatModel, parse_eps

RESULTS = Path(__file__).resolve().parent / "results"
CALIBRATION, COMPARED = 256, 16

ROWS = {
    "cnn_mnist_madrytiny": ("mnist_small", ("0.05",)),
    "cnn_fashion_kw": ("fashion_small", ("0.02", "0.05")),
    "vresnet2b_cifar10_adv2": ("cifar10_small", ("1/255",)),
}
HEADER = ["network", "eps", "clean", "PGD", *METHODS, "CPU s an image", "agreement (found)"]


def images_of(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Train images, test images and test labels."""
    with np.load(path) as file:
        return (
            torch.from_numpy(file["x_train"][:CALIBRATION]).float() / 255,
            torch.from_numpy(file["x_test"]).float() / 255,
            torch.from_numpy(file["y_test"]).long(),
        )


def largest_change(first: GraphModule, second: GraphModule, images: Tensor, eps: float) -> Tensor:
    """The largest change of a logit that 20 signed gradient steps find, per image."""
    x, best = images.clone(), torch.zeros(len(images))
    for _ in range(20):
        x = x.detach().requires_grad_()
        change = (first(x) - second(x)).abs().amax(1)
        best = torch.maximum(best, change.detach())
        (slope,) = torch.autograd.grad(change.sum(), x)
        x = torch.minimum(torch.maximum(x + eps / 4 * slope.sign(), images - eps), images + eps).clamp(0, 1)
    return best


def measure(assets: Path, name: str, data: str, eps: str, args: argparse.Namespace) -> list[str]:
    """One row of the table."""
    train, images, labels = images_of(assets / "data" / f"{data}.npz")
    images, labels = images[: args.images], labels[: args.images]
    quantizer = Quantizer(prepare(load_model(assets / "onnx" / f"{name}.onnx")), train)
    defaults = Defaults(weights=args.weights, activations=args.activations)
    twin = quantizer.apply(Plan(defaults=defaults, rounding=args.rounding)).graph
    threat = ThreatModel("linf", parse_eps(eps))
    clean = twin(images).argmax(1) == labels
    left = clean.clone()
    for loss in ("margin", "cross_entropy"):
        left &= PGD(steps=20, loss=loss)(twin, images, labels, threat, seed=0).correct
    shares, seconds = [], 0.0
    for method in METHODS:
        began = time.process_time()
        found = certify(twin, images, labels, threat, method=method)
        seconds = time.process_time() - began
        assert not bool((found.certified & ~left).any()), "a certified image was broken"
        shares.append(found.accuracy)
    some = images[:COMPARED]
    bound = agreement(twin, quantizer.float_graph, some, threat).linf
    attacked = largest_change(twin, quantizer.float_graph, some, threat.eps)
    assert bool((attacked <= bound).all())
    percent = [f"{100 * float(v):.1f} %" for v in (clean.double().mean(), left.double().mean(), *shares)]
    change = f"{float(bound.median()):.3g} ({float(attacked.median()):.3g})"
    return [name, eps, *percent, f"{seconds / len(images):.4f}", change]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--activations", default="float")
    parser.add_argument("--rounding", default="gptq", choices=["nearest", "gptq", "adaround"])
    parser.add_argument("--networks", default=",".join(ROWS))
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.md")
    args = parser.parse_args()
    assets = os.environ.get("QOPT_ASSETS")
    if not assets:
        raise SystemExit("set QOPT_ASSETS to the folder of the public networks")
    torch.set_num_threads(1)
    lines = [
        f"Weights {args.weights} ({args.rounding}), activations {args.activations}, {args.images} images, linf.",
        "",
    ]
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    print("\n".join(lines), flush=True)
    for name in args.networks.split(","):
        data, radii = ROWS[name]
        for eps in radii:
            lines.append("| " + " | ".join(measure(Path(assets), name, data, eps, args)) + " |")
            print(lines[-1], flush=True)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.write}.md").write_text("# Certified accuracy\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
