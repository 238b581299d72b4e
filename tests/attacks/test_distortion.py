from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qopt.attacks.attack import AttackResult
from qopt.attacks.distortion import Distortion, distances, distortion
from qopt.attacks.pgd import PGD
from qopt.attacks.score import accuracy_vector
from qopt.errors import DataError
from qopt.threat import Norm, ThreatModel


def made(n: int, seed: int) -> tuple[AttackResult, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 2, 3, 4, generator=generator)
    clean, fooled = (torch.rand(n, generator=generator) < 0.6 for _ in range(2))
    adversarial = torch.where(
        (clean & fooled)[:, None, None, None], torch.rand(n, 2, 3, 4, generator=generator), images
    )
    return AttackResult(adversarial, fooled | ~clean), images, clean


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_statistics_are_those_of_a_loop(n: int, seed: int) -> None:
    result, images, clean = made(n, seed)
    l2, linf = [], []
    for i in range(n):
        if clean[i] and result.fooled[i]:
            moved = result.adversarial[i].double().numpy() - images[i].double().numpy()
            l2.append(np.sqrt((moved**2).sum()))
            linf.append(np.abs(moved).max())
    found = distortion(result, images, clean)
    assert found.images == len(l2)
    if l2:
        assert found.mean_l2 == pytest.approx(np.mean(l2), rel=1e-5)
        assert found.mean_linf == pytest.approx(np.mean(linf), rel=1e-5)
        assert found.median_l2 == pytest.approx(sorted(l2)[(len(l2) - 1) // 2], rel=1e-5)
        assert found.median_linf == pytest.approx(sorted(linf)[(len(linf) - 1) // 2], rel=1e-5)


def test_images_that_were_wrong_before_are_left_out() -> None:
    images = torch.full((3, 1, 2, 2), 0.5)
    adversarial = images.clone()
    adversarial[1] += 0.25
    result = AttackResult(adversarial, torch.tensor([True, True, False]))
    found = distortion(result, images, torch.tensor([False, True, True]))
    assert found == Distortion(images=1, mean_l2=0.5, mean_linf=0.25, median_l2=0.5, median_linf=0.25)


def test_without_successes_all_is_zero() -> None:
    images = torch.rand(4, 1, 2, 2)
    result = AttackResult(images.clone(), torch.tensor([True, False, False, False]))
    assert distortion(result, images, torch.tensor([False, True, True, True])) == Distortion(0, 0.0, 0.0, 0.0, 0.0)


def test_examples_that_take_all_their_steps_lie_further(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    clean = accuracy_vector(net, images, labels)
    threat = ThreatModel("linf", 0.05)
    short, full = (
        distortion(PGD(compact=compact)(net, images, labels, threat, seed=0), images, clean)
        for compact in (True, False)
    )
    assert short.images == full.images > 0
    assert short.mean_l2 < full.mean_l2
    assert short.mean_linf <= full.mean_linf <= 0.05 + 1e-6


@pytest.mark.parametrize("norm", get_args(Norm))
def test_distances_are_norms(norm: Norm) -> None:
    images, moved = torch.rand(5, 3, 2, 2), torch.rand(5, 3, 2, 2)
    flat = (moved - images).double().flatten(1).numpy()
    expected = np.linalg.norm(flat, ord=np.inf if norm == "linf" else 2, axis=1)
    found = distances(moved, images, norm)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert not distances(images, images, norm).any()


def test_tiny_distortions_are_not_lost() -> None:
    images = torch.zeros(1, 1, 2, 2)
    assert float(distances(images + 1e-30, images, "l2")) == pytest.approx(2e-30, rel=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    images = torch.rand(3, 1, 2, 2)
    with pytest.raises(DataError, match="must pair up"):
        distances(images[:2], images, "l2")
    result = AttackResult(images, torch.ones(3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"about the same images .*got shape \(2,\)"):
        distortion(result, images, torch.ones(2, dtype=torch.bool))
