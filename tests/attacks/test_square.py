"""The Square attack: its moves against loops, its search against linear optima, its chance and its manners."""

from __future__ import annotations

from math import sqrt

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from torch import Tensor, nn

from qopt.attacks import accuracy_vector, predict
from qopt.attacks.square import SCHEDULE, Square
from qopt.attacks.square_moves import (
    MOVES,
    bumps,
    change_l2,
    change_linf,
    stripes,
    tiles,
    tiles_chance,
    window,
)
from qopt.errors import UsageError
from qopt.threat import Norm, ThreatModel

THREATS = [ThreatModel("linf", 0.05), ThreatModel("l2", 0.35)]
Data = tuple[Tensor, Tensor]
per_threat = pytest.mark.parametrize("threat", THREATS, ids=str)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def share_of_reference(query: int, queries: int) -> float:
    """The schedule as the authors write it, of p = 0.8, rescaled to 10000 queries."""
    at = int(query / queries * 10000)
    for limit, part in zip(
        (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), (1, 2, 4, 8, 16, 32, 64, 128, 256), strict=True
    ):
        if at <= limit:
            return 0.8 / part
    return 0.8 / 512


@pytest.mark.parametrize("queries", [100, 1000, 5000, 10000])
def test_the_schedule_is_the_rescaled_one(queries: int) -> None:
    attack = Square(queries)
    sides = [attack.side(query, 32, 32) for query in range(queries)]
    assert sides[0] == round(sqrt(0.8 * 32 * 32))
    assert sides[-1] == 1
    assert sides == sorted(sides, reverse=True)
    for query in range(0, queries, 7):
        if query / queries * 10000 == int(query / queries * 10000) or int(query / queries * 10000) not in SCHEDULE:
            assert sides[query] == max(round(sqrt(share_of_reference(query, queries) * 32 * 32)), 1)


@given(shape=shapes, rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_windows_against_a_loop(shape: tuple[int, int, int], rows: int, columns: int, seed: int) -> None:
    channels, height, width = shape
    rows, columns = min(rows, height), min(columns, width)
    place = uniform(seed, 4, 2)
    place[0], place[1] = 0.0, 1 - 2**-24
    index = window(place, torch.Size((4, *shape)), (rows, columns))
    for row in range(4):
        top = int(place[row, 0] * (height - rows + 1))
        left = int(place[row, 1] * (width - columns + 1))
        mask = torch.zeros(shape)
        mask[:, min(top, height - rows) :][:, :rows, min(left, width - columns) :][:, :, :columns] = 1
        found = torch.zeros(channels * height * width)
        found[index[row]] = 1
        assert torch.equal(found.view(shape), mask)
        assert len(index[row]) == channels * rows * columns


def test_windows_reach_every_place() -> None:
    index = window(uniform(0, 4000, 2), torch.Size((4000, 1, 5, 4)), (2, 2))
    corners, counts = torch.unique(index[:, 0], return_counts=True)
    assert corners.tolist() == [4 * r + c for r in range(4) for c in range(3)]
    assert counts.min() > 4000 / 12 * 0.75


def slow_bump(height: int, width: int) -> Tensor:
    """Algorithm 3: nested rectangles around the middle, the k-th of them weighing 1 / k^2."""
    bump = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for k in range(max(height, width) // 2 + 1):
        bump[max(top, 0) : min(top + 2 * k + 1, height), max(left, 0) : min(left + 2 * k + 1, width)] += (
            1 / (k + 1) ** 2
        )
        top, left = top - 1, left - 1
    length: Tensor = bump.norm()
    return bump / length


@pytest.mark.parametrize("side", [2, 3, 5, 6, 11])
def test_bumps_against_a_loop(side: int) -> None:
    upright, sideways = bumps(side, side)
    half = side // 2
    expected = torch.cat([slow_bump(half, side), -slow_bump(side - half, side)])
    assert torch.allclose(upright, expected / expected.norm(), atol=1e-6)
    assert torch.allclose(sideways, upright.T, atol=1e-6)


@given(height=st.integers(1, 12), width=st.integers(1, 12))
@settings(max_examples=40)
def test_bumps_have_length_one_at_any_shape(height: int, width: int) -> None:
    found = bumps(height, width)
    assert found.shape == (2, height, width)
    assert found.isfinite().all()
    assert found.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


@given(shape=shapes, side=st.integers(1, 9), seed=st.integers(0, 10**4), eps=st.floats(0.001, 0.6))
@settings(max_examples=60)
def test_linf_changes_one_square_to_the_walls_of_the_ball(
    shape: tuple[int, int, int], side: int, seed: int, eps: float
) -> None:
    clean = 0.999 * uniform(seed, 5, *shape) + 0.0005
    best = stripes(clean, uniform(seed + 1, 5, shape[0] * shape[2]), eps)
    low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
    assert ((best == low) | (best == high)).all()
    assert torch.equal(best[:, :, :1].gt(clean[:, :, :1]).expand_as(best), best > clean)  # stripes are vertical
    candidate = change_linf(clean, best, uniform(seed + 2, 5, 2 + shape[0]), side, eps)
    changed = candidate != best
    assert changed.flatten(1).any(1).all()  # no query is wasted on nothing
    assert ((candidate == low) | (candidate == high)).all()
    for row in range(5):
        places = changed[row].any(0).nonzero()
        assert ((places.amax(0) - places.amin(0)) < side).all()
        signs = [(candidate > clean)[row, c][changed[row, c]] for c in range(shape[0])]
        assert all(s.all() or not s.any() for s in signs)


def slow_change_l2(clean: Tensor, best: Tensor, chance: Tensor, side: int, eps: float) -> Tensor:
    """Algorithm 3 on one image (c, h, w), with slices; double precision."""
    channels, height, width = clean.shape
    side = max(side, 3)
    side += 1 - side % 2
    rows, columns = min(side, height), min(side, width)
    (top, left), (top2, left2) = (
        (int(a * (height - rows + 1)), int(b * (width - columns + 1)))
        for a, b in (chance[:2].tolist(), chance[2:4].tolist())
    )
    one = (slice(top, top + rows), slice(left, left + columns))
    two = (slice(top2, top2 + rows), slice(left2, left2 + columns))
    move = (best - clean).double()
    unspent = max(eps**2 - float(move.square().sum()), 0.0)
    both = torch.zeros(height, width, dtype=torch.bool)
    both[one] = both[two] = True
    pattern = bumps(rows, columns)[1 if chance[4] < 0.5 else 0].double()
    result = move.clone()
    result[(slice(None), *two)] = 0
    for channel in range(channels):
        old = move[channel][one]
        new = pattern * (1.0 if chance[5 + channel] < 0.5 else -1.0) + old / (old.norm() + 1e-12)
        budget = sqrt(unspent / channels + float(move[channel][both].square().sum()))
        result[channel][one] = new / (new.norm() + 1e-12) * budget
    length: Tensor = result.norm() + 1e-12
    return (clean.double() + result / length * eps).clamp(0, 1)


# Windows of one or two pixels may cancel what they are added to, and rounding decides what is left.
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9)),
    side=st.integers(1, 9),
    seed=st.integers(0, 10**4),
    eps=st.floats(0.01, 2.0),
)
@settings(max_examples=60)
def test_l2_moves_against_a_loop(shape: tuple[int, int, int], side: int, seed: int, eps: float) -> None:
    clean = uniform(seed, 4, *shape)
    best = tiles(clean, uniform(seed + 1, 4, tiles_chance(*shape)), eps)
    for _ in range(2):  # from tiles, and from where a change leads
        assert (best - clean).flatten(1).norm(dim=1).max() <= eps * (1 + 1e-5) + 1e-6
        chance = uniform(seed + 2, 4, 5 + shape[0])
        candidate = change_l2(clean, best, chance, side, eps)
        for row in range(4):
            expected = slow_change_l2(clean[row], best[row], chance[row], side, eps)
            assert (candidate[row].double() - expected).abs().max() < 2e-4 * max(eps, 1)
        best = candidate
        seed += 10


@pytest.mark.parametrize("side", [8, 32])
def test_the_first_l2_perturbation_fills_eps_with_tiles(side: int) -> None:
    clean = torch.full((3, 3, side, side), 0.5)
    first = tiles(clean, uniform(1, 3, tiles_chance(3, side, side)), 0.2) - clean
    assert first.flatten(1).norm(dim=1).tolist() == pytest.approx([0.2] * 3, rel=1e-4)
    assert (first != 0).double().mean() > 0.7
    if side == 32:  # five tiles of 6 pixels, one pixel of margin
        assert not first[:, :, 0].any()
        assert not first[:, :, :, -1].any()
        parts = first[:, :, 1:31, 1:31].reshape(3, 3, 5, 6, 5, 6).permute(0, 1, 2, 4, 3, 5).flatten(4)
        assert torch.allclose(parts.norm(dim=4), torch.tensor(0.2 / sqrt(75)), rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_moves_take_the_chance_they_say(norm: Norm) -> None:
    moves, clean = MOVES[norm], uniform(0, 2, 3, 7, 6)
    first = moves.first(clean, uniform(1, 2, moves.first_chance(3, 7, 6)), 0.1)
    assert moves.change(clean, first, uniform(2, 2, moves.chance(3)), 2, 0.1).shape == clean.shape


def test_linear_linf_problems_are_solved() -> None:
    """Each pixel counts for itself, so a search that keeps what helps ends at the optimum."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(25, 2, generator=generator)
    images = 0.4 + 0.2 * torch.rand(60, 1, 5, 5, generator=generator)

    def model(batch: Tensor) -> Tensor:
        return (batch - 0.5).flatten(1) @ weights

    labels = predict(model, images).argmax(1)
    normal = weights[:, 1] - weights[:, 0]
    threat = ThreatModel("linf", 0.012)
    optimum = images + threat.eps * (normal.sign() * (1 - 2 * labels[:, None])).view(-1, 1, 5, 5)
    fooled = ~accuracy_vector(model, optimum, labels)
    assert 0.2 < fooled.double().mean() < 0.8
    result = Square(600)(model, images, labels, threat, seed=0)
    assert torch.equal(result.fooled, fooled)
    assert torch.allclose(result.adversarial[~fooled], optimum[~fooled], atol=1e-6)


@per_threat
def test_more_queries_only_take_away_until_the_schedule_moves(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    few, many = (Square(queries)(net, *data, threat, seed=0) for queries in (20, 400))
    clean = accuracy_vector(net, *data)
    assert int(many.correct.sum()) < int(few.correct.sum()) < int(clean.sum())


@per_threat
def test_images_leave_when_they_are_fooled(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    asked = 0

    def counted(images: Tensor) -> Tensor:
        nonlocal asked
        asked += len(images)
        logits: Tensor = net(images)
        return logits

    result = Square(100)(counted, *data, threat, seed=0)
    right = int(accuracy_vector(net, *data).sum())
    left = int(result.correct.sum())
    assert 300 + 101 * left <= asked < 300 + 101 * right * 0.95


@per_threat
def test_only_logits_are_asked_for(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    images, labels = (tensor[:30] for tensor in data)

    def queries_only(batch: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not batch.requires_grad
        return torch.from_numpy(net(batch).numpy().copy())

    expected = Square(40)(net, images, labels, threat, seed=0)
    assert torch.equal(Square(40)(queries_only, images, labels, threat, seed=0).adversarial, expected.adversarial)


def test_a_file_in_onnx_runtime_can_be_attacked(text_model: object) -> None:
    weights = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    assert callable(text_model)
    model: ModelProto = text_model(
        "g (float[n, 3, 2, 2] x) => (float[n, 3] z) <float[12, 3] w> { f = Flatten(x) z = MatMul(f, w) }", w=weights
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def artefact(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": images.numpy()})[0])

    images = uniform(3, 20, 3, 2, 2)
    labels = predict(artefact, images).argmax(1)
    result = Square(200)(artefact, images, labels, ThreatModel("linf", 0.1), seed=0)
    assert int(result.fooled.sum()) > 0
    assert torch.equal(result.correct, accuracy_vector(artefact, result.adversarial, labels))


@per_threat
@pytest.mark.parametrize("shape", [(12,), (12, 1), (1, 3, 4), (1, 2, 2, 3), (3, 1, 4)])
def test_inputs_of_any_shape(threat: ThreatModel, shape: tuple[int, ...]) -> None:
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))

    def model(batch: Tensor) -> Tensor:
        assert batch.shape[1:] == shape
        return batch.flatten(1) @ weights

    images = uniform(5, 30, *shape)
    labels = predict(model, images).argmax(1)
    result = Square(60)(model, images, labels, threat, seed=0)
    assert result.adversarial.shape == images.shape
    move = (result.adversarial - images).flatten(1)
    assert (move.abs().amax(1) if threat.norm == "linf" else move.norm(dim=1)).max() <= threat.eps + 1e-6
    assert result.fooled.any()


@per_threat
def test_chance_belongs_to_the_image(net: nn.Module, data: Data, threat: ThreatModel) -> None:
    """More queries than are drawn ahead, so that later draws are tried as well."""
    images, labels = (tensor[:12] for tensor in data)
    small = ThreatModel(threat.norm, threat.eps / 4)
    whole = Square(230)(net, images, labels, small, seed=0)
    part = torch.tensor([10, 3, 11])
    alone = Square(230, batch_size=2)(net, images[part], labels[part], small, seed=0, indices=part)
    assert torch.equal(alone.fooled, whole.fooled[part])
    assert (alone.adversarial - whole.adversarial[part]).abs().flatten(1).amax(1).median() < 1e-5
    other = Square(230)(net, images, labels, small, seed=1)
    assert not torch.equal(other.adversarial, whole.adversarial)
    renumbered = Square(230)(net, images, labels, small, seed=0, indices=torch.arange(12) + 100)
    assert not torch.equal(renumbered.adversarial, whole.adversarial)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be .*got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"share": 1.5}, "share must lie"),
        ({"share": float("nan")}, "share must lie"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Square(**options)  # type: ignore[arg-type]


def test_names() -> None:
    assert Square().name == "Square"
    assert Square(100).name == "Square-100"
