"""Twin and artefact as classifiers: normalisation, static batches, gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qopt.data import Data
from qopt.errors import UsageError
from qopt.measure.network import ArtefactClassifier, Normalisation, TwinClassifier, predictions
from qopt.quantize import Quantizer

Images = Callable[..., torch.Tensor]


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (), r"^--mean/--std: .*same number of channels \(got 1 and 0\)"),
        ((), (0.5,), r"same number of channels \(got 0 and 1\)"),
        ((0.5, 0.5), (0.2,), r"got 2 and 1"),
        ((0.5,), (0.0,), r"^--std: std must be positive"),
        ((0.5,), (-0.2,), r"^--std"),
        ((0.5,), (float("nan"),), r"^--std"),
        ((0.5,), (float("inf"),), r"^--std"),
        ((float("nan"),), (0.2,), r"^--mean: mean must be finite"),
        ((float("-inf"),), (0.2,), r"^--mean"),
    ],
)
def test_a_normalisation_that_is_none(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Normalisation(mean, std)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_normalisation_for_other_channels(channels: int) -> None:
    with pytest.raises(UsageError, match=rf"one mean and std per channel \(expected {channels}, got 2\)"):
        Normalisation((0.1, 0.2), (0.3, 0.4))(torch.rand(5, channels, 2, 2))


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 3, 5), (4, 3)])
def test_normalisation_is_per_channel(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    found = Normalisation(mean, std)(images).numpy()
    for channel in range(3):
        expected = (images[:, channel].numpy() - np.float32(mean[channel])) / np.float32(std[channel])
        np.testing.assert_allclose(found[:, channel], expected, rtol=1e-6)


def test_no_normalisation_changes_nothing() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert Normalisation()(images) is images


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_a_static_batch_gives_the_logits_of_the_dynamic_network(
    count: int, networks: dict[str, Quantizer], images: Images
) -> None:
    static, dynamic = networks["static"], networks["dynamic"]
    assert (static.prepared.batch, dynamic.prepared.batch) == (3, None)
    sample = images(static.prepared, count)
    found = TwinClassifier(static.float_graph, batch=3)(sample)
    assert found.shape == (count, 4)
    torch.testing.assert_close(found, TwinClassifier(dynamic.float_graph)(sample))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_static_batch_gives_the_gradients_of_the_dynamic_network(
    count: int, networks: dict[str, Quantizer], images: Images
) -> None:
    """The images that fill the last batch are copies: the copied image's gradient must not count them."""

    def gradient(model: TwinClassifier) -> torch.Tensor:
        tracked = images(networks["static"].prepared, count).requires_grad_()
        return torch.autograd.grad(model(tracked).pow(2).sum(), tracked)[0]

    normalisation = Normalisation((0.4, 0.6), (0.5, 0.25))
    expected = gradient(TwinClassifier(networks["dynamic"].float_graph, normalisation))
    assert expected.abs().flatten(1).sum(1).min() > 0
    torch.testing.assert_close(gradient(TwinClassifier(networks["static"].float_graph, normalisation, 3)), expected)


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("name", ["conv", "shared", "dynamic", "static"])
def test_twin_and_file_agree(
    name: str,
    count: int,
    networks: dict[str, Quantizer],
    images: Images,
    artefact_of: Callable[..., ArtefactClassifier],
    twin_of: Callable[[Quantizer], TwinClassifier],
) -> None:
    quantizer = networks[name]
    sample = images(quantizer.prepared, count, seed=8)
    twin, artefact = twin_of(quantizer), artefact_of(quantizer.prepared)
    torch.testing.assert_close(twin(sample), artefact(sample), rtol=1e-5, atol=1e-5)
    assert torch.equal(predictions(twin, sample), predictions(artefact, sample))
    assert predictions(twin, sample).dtype == torch.int64


def test_both_normalise_alike(
    networks: dict[str, Quantizer], images: Images, artefact_of: Callable[..., ArtefactClassifier]
) -> None:
    quantizer = networks["conv"]
    normalisation = Normalisation((0.3, 0.5), (0.2, 0.4))
    sample = images(quantizer.prepared, 5)
    twin = TwinClassifier(quantizer.float_graph, normalisation)
    artefact = ArtefactClassifier(artefact_of(quantizer.prepared).runner, normalisation)
    torch.testing.assert_close(twin(sample), artefact(sample), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(twin(sample), TwinClassifier(quantizer.float_graph)(sample), atol=1e-2)


def test_the_embedded_example_classifies(
    example: Quantizer, data: Data, artefact_of: Callable[..., ArtefactClassifier]
) -> None:
    part = data.report.first(300)
    sample, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    found = predictions(TwinClassifier(example.float_graph), sample)
    assert (found == labels).float().mean() > 0.8
    assert torch.equal(found, predictions(artefact_of(example.prepared), sample))
