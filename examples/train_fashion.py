"""Train the embedded example adversarially on Fashion-MNIST and write `fashion_resnet.pt` and `fashion.npz`.

The data are the four IDX files of the Debian package `dataset-fashion-mnist` (`apt install dataset-fashion-mnist`).
Each step perturbs its batch by PGD inside the linf ball of 0.1 (Madry et al. 2018) and takes one step on the
perturbed images only; the saved weights and batch-norm statistics are their exponential moving averages over steps.
Run: `python examples/train_fashion.py`.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fashion_resnet import FashionResNet, build
from torch import nn

HERE = Path(__file__).resolve().parent
EPS = 0.1


def read_idx(path: Path) -> np.ndarray:
    """An IDX file (gzip): unsigned bytes with big-endian sizes."""
    raw = gzip.decompress(path.read_bytes())
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 1, 28, 28) and labels int64 (n,)."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[:, None]
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return images, labels.astype(np.int64)


def to_float(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255)


def perturb(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, step: float) -> torch.Tensor:
    """PGD on cross-entropy inside the linf ball of EPS from a uniform random start; images stay in [0, 1]."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = F.cross_entropy(net((x + delta).clamp(0, 1)), y)
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * grad.sign()).clamp(-EPS, EPS)
    return (x + delta.detach()).clamp(0, 1)


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    """Share of images classified correctly, after PGD with step EPS / 4 when ``steps`` > 0."""
    net.eval().requires_grad_(False)
    right = 0
    for i in range(0, len(x), 500):
        images, labels = x[i : i + 500], y[i : i + 500]
        adversarial = perturb(net, images, labels, steps, EPS / 4) if steps else images
        right += int(((net(images).argmax(1) == labels) & (net(adversarial).argmax(1) == labels)).sum())
    return right / len(x)


def train(x: torch.Tensor, y: torch.Tensor, args: argparse.Namespace) -> FashionResNet:
    net = build().to(memory_format=torch.channels_last)
    average = copy.deepcopy(net)
    updates = args.epochs * (len(x) // args.batch)
    optimiser = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, updates, pct_start=0.25)
    began = time.perf_counter()
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(x)), 0.0
        for i in range(0, len(x) - args.batch + 1, args.batch):
            pick = order[i : i + args.batch]
            images, labels = x[pick], y[pick]
            net.train().requires_grad_(False)
            adversarial = perturb(net, images, labels, args.steps, args.step)
            net.requires_grad_(True)
            loss = F.cross_entropy(net(adversarial), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
            for a, b in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
                a.lerp_(b, 0.004) if a.is_floating_point() else a.copy_(b)
        mean = total / (len(x) // args.batch)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {mean:.3f}  {time.perf_counter() - began:.0f} s", flush=True)
    return average.eval()


def save(net: FashionResNet, folder: Path, train_set: tuple, test_set: tuple) -> None:
    net = net.to(memory_format=torch.contiguous_format).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would carry the paths of whoever trained
    archive = io.BytesIO()
    torch.export.save(program, archive)
    (folder / "fashion_resnet.pt").write_bytes(archive.getvalue())
    cut = {"x_train": train_set[0], "y_train": train_set[1], "x_test": test_set[0], "y_test": test_set[1]}
    arrays = {key: value[:2000] for key, value in cut.items()}
    np.savez_compressed(folder / "fashion.npz", **{k: v.astype(np.uint8) for k, v in arrays.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="PGD steps per batch")
    parser.add_argument("--step", type=float, default=0.05, help="PGD step size")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--decay", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_set, test_set = load_split(args.data, "train"), load_split(args.data, "t10k")
    began = time.perf_counter()
    net = train(to_float(train_set[0]), torch.from_numpy(train_set[1]), args)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    save(net, args.out, train_set, test_set)
    x, y = to_float(test_set[0]), torch.from_numpy(test_set[1])
    torch.manual_seed(args.seed)
    print(
        f"clean {100 * accuracy(net, x, y, 0):.2f} %  PGD-20 {100 * accuracy(net, x, y, 20):.2f} %  (10000 test images)"
    )


if __name__ == "__main__":
    main()
