"""A small network trained on synthetic images, and the same weights with coarsely rounded activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Classifier = Callable[[Tensor], Tensor]


def smooth(count: int, generator: torch.Generator) -> Tensor:
    return F.interpolate(torch.randn(count, 1, 3, 3, generator=generator), size=(8, 8), mode="bilinear")


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three classes: one smooth pattern each, under noise; (count, 1, 8, 8) in [0, 1]."""
    patterns = smooth(3, torch.Generator().manual_seed(11))
    labels = torch.arange(count) % 3
    noise = 0.15 * torch.randn(count, 1, 8, 8, generator=generator)
    return (0.5 + 0.12 * patterns[labels] + noise).clamp(0, 1), labels


class SmallNet(nn.Module):
    """Two convolutions and a linear layer; ``rounding`` is applied to both activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(256, 3)
        self.rounding: Classifier = lambda activation: activation

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.rounding(F.relu(self.first(images - 0.5)))
        hidden = self.rounding(F.relu(self.second(hidden)))
        logits: Tensor = self.last(hidden.flatten(1))
        return logits


def plain_rounding(activation: Tensor) -> Tensor:
    return (activation * 8).round() / 8


def straight_through(activation: Tensor) -> Tensor:
    return activation + (plain_rounding(activation) - activation).detach()


def with_rounding(net: SmallNet, rounding: Classifier) -> SmallNet:
    copy = SmallNet().eval()
    copy.load_state_dict(net.state_dict())
    copy.rounding = rounding
    return copy


@pytest.fixture(scope="session")
def net() -> SmallNet:
    images, labels = make_images(600, torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = SmallNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@pytest.fixture(scope="session")
def rounded_net(net: SmallNet) -> SmallNet:
    """Masked: gradients of round() are zero everywhere."""
    return with_rounding(net, plain_rounding)


@pytest.fixture(scope="session")
def ste_net(net: SmallNet) -> SmallNet:
    """The same function as rounded_net, with straight-through gradients."""
    return with_rounding(net, straight_through)


@pytest.fixture(scope="session")
def data() -> tuple[Tensor, Tensor]:
    return make_images(150, torch.Generator().manual_seed(3))
