from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qopt.attacks import accuracy_vector, predict, probability_warning, worst_case
from qopt.errors import DataError, ModelError

IMAGES = torch.linspace(0, 1, 7).view(7, 1, 1, 1).expand(7, 1, 2, 2)


def threshold(images: Tensor) -> Tensor:
    """Class 1 above a mean of one half."""
    mean = images.flatten(1).mean(1)
    return torch.stack([torch.full_like(mean, 0.5), mean], 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_predictions_are_batched_in_order(batch_size: int) -> None:
    seen: list[int] = []

    def model(images: Tensor) -> Tensor:
        seen.append(len(images))
        return threshold(images)

    assert torch.equal(predict(model, IMAGES, batch_size), threshold(IMAGES))
    assert sum(seen) == 7
    assert max(seen) <= batch_size


def test_predictions_carry_no_gradient(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    assert not predict(net, data[0]).requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_accuracy_vector_says_which(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 0, 1, 0, 1, 0, 1], dtype=dtype)
    assert accuracy_vector(threshold, IMAGES, labels).tolist() == [True, True, False, True, True, False, True]


def test_worst_case_needs_every_attack_to_fail() -> None:
    vectors = [torch.tensor([True, True, False]), torch.tensor([True, False, True])]
    assert worst_case(vectors).tolist() == [True, False, False]
    assert worst_case(vectors[:1]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "vectors",
    [[], [torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)], [torch.ones(3)]],
    ids=["none", "lengths", "floats"],
)
def test_vectors_that_do_not_match_have_no_worst_case(vectors: list[Tensor]) -> None:
    with pytest.raises(DataError, match="one vector of booleans per attack"):
        worst_case(vectors)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 2, 2), "not a batch of images"),
        (torch.zeros(3), "not a batch of images"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), r"torch.uint8 of shape \(3, 1, 2, 2\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.float64), "expected float32"),
        (IMAGES * 255, "image 1: pixel values outside the box .*--mean, --std"),
        (IMAGES - 0.5, "image 0: pixel values outside the box"),
        (torch.where(IMAGES > 0.9, torch.nan, IMAGES), "image 6: pixel values outside the box"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        predict(threshold, images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 0, 0, 0, 0]), "image 2: label out of range .*expected 0 to 1.*got 2"),
        (torch.tensor([0, 1, 0, 0, 0, -1, 0]), "image 5: label out of range"),
        (torch.zeros(6, dtype=torch.long), "expected 7 whole numbers"),
        (torch.zeros(7, 1, dtype=torch.long), "expected 7 whole numbers"),
        (torch.zeros(7), "torch.float32"),
        (torch.zeros(7, dtype=torch.bool), "torch.bool"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy_vector(threshold, IMAGES, labels)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_the_first_image_with_a_bad_logit_is_named(bad: float, batch_size: int) -> None:
    def model(images: Tensor) -> Tensor:
        return torch.where(images.flatten(1)[:, :2] > 0.6, bad, threshold(images))

    with pytest.raises(ModelError, match="image 4: the model returned a logit that is not finite"):
        predict(model, IMAGES, batch_size)


@pytest.mark.parametrize(
    "output",
    [torch.zeros(7), torch.zeros(7, 1), torch.zeros(6, 2), torch.zeros(7, 2, 1), torch.zeros(7, 2, dtype=torch.long)],
    ids=["scores", "one class", "rows", "three axes", "whole numbers"],
)
def test_outputs_that_are_no_logits_are_refused(output: Tensor) -> None:
    with pytest.raises(ModelError, match="not a classifier's output"):
        predict(lambda images: output, IMAGES)


def test_a_changing_number_of_classes_is_refused() -> None:
    with pytest.raises(ModelError, match="number of classes changes"):
        predict(lambda images: torch.zeros(len(images), 1 + len(images)), IMAGES, batch_size=4)


def test_probabilities_are_told_from_logits(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    logits = predict(net, data[0])
    assert probability_warning(logits) is None
    assert probability_warning(logits.abs()) is None
    assert probability_warning(logits - logits.mean(1, keepdim=True)) is None
    warning = probability_warning(logits.softmax(1))
    assert warning is not None
    assert warning.startswith("softmax-output: ")
    assert "\n" not in warning
