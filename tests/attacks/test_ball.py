from __future__ import annotations

from math import sqrt
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.attacks.ball import Ball, direction, mean_length_one, project, random_halfway, random_start, start
from qopt.threat import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)


def distance(a: Tensor, b: Tensor, norm: Norm) -> Tensor:
    move = (a - b).double().flatten(1)
    return move.abs().amax(1) if norm == "linf" else move.norm(dim=1)


def random_images(seed: int, count: int = 5, spread: float = 1.0) -> Tensor:
    return spread * torch.rand(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.0, 4.0), scale=st.floats(0.0, 10.0))
@settings(max_examples=60)
def test_projection_ends_in_ball_and_box(norm: Norm, seed: int, eps: float, scale: float) -> None:
    threat, clean = ThreatModel(norm, eps), random_images(seed)
    outside = clean + scale * (random_images(seed + 1) - 0.5)
    inside = project(outside, clean, threat)
    assert (distance(inside, clean, norm) <= eps + 1e-6).all()
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert torch.allclose(project(inside, clean, threat), inside, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.0, 4.0), scale=st.floats(0.0, 10.0))
@settings(max_examples=60)
def test_a_ball_projects_as_the_function_does(norm: Norm, seed: int, eps: float, scale: float) -> None:
    threat, clean = ThreatModel(norm, eps), random_images(seed)
    outside = clean + scale * (random_images(seed + 1) - 0.5)
    ball = Ball.around(clean, threat)
    assert torch.equal(ball.project(outside), project(outside, clean, threat))
    rows = torch.tensor([4, 0, 3])
    assert torch.equal(ball.at(rows).project(outside[rows]), project(outside[rows], clean[rows], threat))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_leaves_allowed_images_alone(norm: Norm) -> None:
    clean = random_images(1)
    near = (clean + 0.01).clamp(0, 1)
    assert torch.equal(project(near, clean, ThreatModel(norm, 1.0)), near)


def test_l2_projection_lands_on_the_sphere() -> None:
    clean = torch.full((1, 1, 2, 2), 0.5)
    moved = project(clean + torch.tensor([0.4, 0.0, 0.0, 0.3]).view(1, 1, 2, 2), clean, ThreatModel("l2", 0.1))
    assert (moved - clean).flatten().tolist() == pytest.approx([0.08, 0.0, 0.0, 0.06], abs=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_directions_have_length_one_at_any_scale(norm: Norm, scale: float) -> None:
    images = torch.full((4, 2, 3, 3), 0.5)
    gradient = (random_images(2, 4) - 0.5) * scale
    step = direction(gradient, images, norm)
    assert distance(step, torch.zeros_like(step), norm).tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    assert (step * gradient >= 0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm: Norm) -> None:
    gradient = torch.zeros(2, 1, 2, 2)
    gradient[1, 0, 0, 0] = -3.0
    step = direction(gradient, torch.full_like(gradient, 0.5), norm)
    assert step.flatten(1).tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0]]


def test_l2_directions_spend_nothing_on_the_walls_of_the_box() -> None:
    images = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 2, 2)
    gradient = torch.tensor([-5.0, 3.0, 5.0, -4.0]).view(1, 1, 2, 2)
    assert direction(gradient, images, "l2").flatten().tolist() == pytest.approx([0.0, 0.6, 0.0, -0.8])


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_depend_on_seed_index_and_restart_only(norm: Norm) -> None:
    threat, clean = ThreatModel(norm, 0.2), random_images(5, 6)
    indices = torch.tensor([10, 3, 7, 3, 0, 99])
    whole = random_start(clean, threat, seed=1, indices=indices, restart=0)
    for row in range(6):
        one = random_start(clean[row : row + 1], threat, seed=1, indices=indices[row : row + 1], restart=0)
        assert torch.equal(one[0], whole[row])
    for other in (
        random_start(clean, threat, seed=2, indices=indices, restart=0),
        random_start(clean, threat, seed=1, indices=indices, restart=1),
        random_start(clean, threat, seed=1, indices=indices + 1, restart=0),
    ):
        assert (other != whole).flatten(1).any(1).all()


def test_random_starts_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    random_start(random_images(5), ThreatModel("l2", 1.0), seed=1, indices=torch.arange(5), restart=0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball_uniformly(norm: Norm) -> None:
    count, eps = 2000, 0.3
    clean = torch.full((count, 1, 1, 2), 0.5)
    start = random_start(clean, ThreatModel(norm, eps), seed=3, indices=torch.arange(count), restart=0)
    lengths = distance(start, clean, norm)
    assert lengths.max() <= eps + 1e-6
    # In the plane, half of a disc or a square lies within sqrt(1/2) of its radius.
    inner = float((lengths <= eps * sqrt(0.5)).double().mean())
    assert inner == pytest.approx(0.5, abs=0.04)
    assert (start - clean).mean((0, 1, 2)).tolist() == pytest.approx([0.0, 0.0], abs=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_halfway_is_half_of_eps_in_both_norms(norm: Norm) -> None:
    clean, eps = torch.full((200, 2, 3, 3), 0.5), 0.4
    halfway = random_halfway(clean, ThreatModel(norm, eps), seed=3, indices=torch.arange(200), restart=0)
    assert distance(halfway, clean, norm).tolist() == pytest.approx([eps / 2] * 200, rel=1e-5)
    if norm == "linf":
        assert torch.allclose((halfway - clean).abs(), torch.tensor(eps / 2))
    assert (halfway - clean).mean((0, 1, 2, 3)).item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_halfway_depends_on_seed_and_number_only(norm: Norm) -> None:
    threat, clean = ThreatModel(norm, 0.2), random_images(5, 4)
    indices = torch.tensor([7, 3, 7, 0])
    whole = random_halfway(clean, threat, seed=1, indices=indices, restart=0)
    one = random_halfway(clean[1:2], threat, seed=1, indices=indices[1:2], restart=0)
    assert torch.equal(one[0], whole[1])
    other = random_halfway(clean, threat, seed=2, indices=indices, restart=0)
    assert (other != whole).flatten(1).any(1).all()
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_kinds_of_start() -> None:
    clean, threat, numbers = random_images(4), ThreatModel("linf", 0.1), torch.arange(5)
    assert torch.equal(start("clean", clean, threat, seed=0, indices=numbers, restart=0), clean)
    ball = random_start(clean, threat, seed=0, indices=numbers, restart=2)
    assert torch.equal(start("ball", clean, threat, seed=0, indices=numbers, restart=2), ball)
    halfway = random_halfway(clean, threat, seed=0, indices=numbers, restart=2)
    assert torch.equal(start("halfway", clean, threat, seed=0, indices=numbers, restart=2), halfway)
    assert not torch.equal(ball, halfway)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_mean_length_one(scale: float) -> None:
    gradient = (random_images(2, 3) - 0.5) * scale
    gradient[1] = 0.0
    scaled = mean_length_one(gradient)
    assert scaled.flatten(1).abs().mean(1).tolist() == pytest.approx([1.0, 0.0, 1.0], rel=1e-5)
    assert torch.equal(scaled.sign(), gradient.sign())
