"""Images from archives and factories: keys, types, the split, and what does not fit."""

from __future__ import annotations

import pickle
import zipfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.data import KEYS, Data, Split, load_data
from qopt.errors import DataError, UsageError

Arrays = dict[str, NDArray[Any]]


def arrays(train: int = 8, test: int = 4, shape: tuple[int, ...] = (1, 2, 3)) -> Arrays:
    """Every image is told by its pixels; labels are shuffled."""
    size = int(np.prod(shape))
    x = (np.arange((train + test) * size) % 251).astype(np.uint8).reshape(train + test, *shape)
    y = np.arange(train + test) * 7 % 3
    return {"x_train": x[:train], "y_train": y[:train], "x_test": x[train:], "y_test": y[train:]}


def saved(folder: Path, content: Arrays, name: str = "data.npz") -> str:
    np.savez(folder / name, **content)  # type: ignore[arg-type]
    return str(folder / name)


def rows(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_train_is_split_and_test_only_reports(tmp_path: Path) -> None:
    content = arrays()
    data = load_data(saved(tmp_path, content))
    assert (len(data.calibrate), len(data.select), len(data.report)) == (4, 4, 4)
    assert data.notes == ()
    for part, x, y in ((data.calibrate, 0, 4), (data.select, 4, 8)):
        assert np.array_equal(part.images, content["x_train"][x:y].astype(np.float32) / np.float32(255))
        assert part.labels.tolist() == content["y_train"][x:y].tolist()
    assert np.array_equal(data.report.images * 255, content["x_test"])
    assert (data.report.images.dtype.str, data.report.labels.dtype.str) == ("<f4", "<i8")


@settings(max_examples=60)
@given(train=st.integers(2, 40), test=st.integers(1, 9), classes=st.integers(1, 12), ordered=st.booleans())
def test_the_three_parts_are_disjoint_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, train: int, test: int, classes: int, ordered: bool
) -> None:
    x = np.arange(train + test, dtype=np.uint8).reshape(-1, 1, 1, 1)
    y = np.random.default_rng(train).integers(0, classes, train + test)
    y[:train] = np.sort(y[:train]) if ordered else y[:train]
    content: Arrays = {"x_train": x[:train], "y_train": y[:train], "x_test": x[train:], "y_test": y[train:]}
    data = load_data(saved(tmp_path_factory.mktemp("data"), content))
    parts = [rows(data.calibrate), rows(data.select), rows(data.report)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == train + test
    assert len(parts[0]) - len(parts[1]) in (0, 1)
    label = {image.astype(np.float32).tobytes(): y for image, y in zip(x / np.float32(255), y, strict=True)}
    for part in (data.calibrate, data.select, data.report):
        assert [label[image.tobytes()] for image in part.images] == part.labels.tolist()


ALLOWED: dict[frozenset[str], tuple[int, int, int]] = {
    frozenset(("x_train", "y_train", "x_test", "y_test")): (4, 4, 4),
    frozenset(("x_train", "y_train")): (8, 8, 8),
    frozenset(("x_test", "y_test")): (4, 4, 4),
    frozenset(("x", "y")): (8, 8, 8),
}
SUBSETS = [frozenset(keys) for count in range(len(KEYS) + 1) for keys in combinations(KEYS, count)]


@pytest.mark.parametrize("keys", SUBSETS, ids=lambda keys: "+".join(sorted(keys)) or "none")
def test_every_combination_of_keys(tmp_path: Path, keys: frozenset[str]) -> None:
    content = arrays()
    content |= {"x": content["x_train"], "y": content["y_train"]}
    path = saved(tmp_path, {key: content[key] for key in KEYS if key in keys})
    if keys not in ALLOWED:
        with pytest.raises(DataError) as caught:
            load_data(path)
        assert str(caught.value).startswith(path)
        return
    data = load_data(path)
    assert (len(data.calibrate), len(data.select), len(data.report)) == ALLOWED[keys]
    assert len(data.notes) == (0 if len(keys) == 4 else 1)


def test_a_single_set_says_that_it_flatters(tmp_path: Path) -> None:
    content = arrays()
    data = load_data(saved(tmp_path, {"x": content["x_train"], "y": content["y_train"]}))
    assert data.calibrate is data.select is data.report
    assert data.notes == (
        "x alone serves calibration, selection and report: the reported accuracies flatter the result",
    )


def test_one_train_image_says_that_it_serves_twice(tmp_path: Path) -> None:
    data = load_data(saved(tmp_path, arrays(train=1)))
    assert (len(data.calibrate), len(data.select)) == (1, 1)
    assert data.notes == ("the one train image serves calibration and selection",)


SORTED = [
    ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1, 2]),
    ([2, 2, 0, 0, 0, 1], [2, 0, 1, 2, 0, 0]),
    ([1, 1, 1], [1, 1, 1]),
    ([0, 1, 2, 3], [0, 1, 2, 3]),
    ([3, 1, 2], [3, 1, 2]),
    ([0, 0, 1, 1, 0], [0, 0, 1, 1, 0]),
    ([1, 0, 1, 0], [1, 0, 1, 0]),
]


@pytest.mark.parametrize(("labels", "expected"), SORTED)
def test_classes_in_blocks_are_interleaved_and_other_orders_stay(
    tmp_path: Path, labels: list[int], expected: list[int]
) -> None:
    x = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    report = load_data(saved(tmp_path, {"x": x, "y": np.array(labels)})).report
    assert report.labels.tolist() == expected
    places = np.round(report.images.ravel() * 255).astype(int)
    assert [labels[place] for place in places] == expected
    for label in set(labels):
        assert (np.diff(places[report.labels == label]) > 0).all()


def halves(scale: float, dtype: str) -> NDArray[Any]:
    return np.linspace(0, scale, 12).reshape(2, 1, 2, 3).astype(dtype)


PIXELS: list[tuple[NDArray[Any], str]] = [
    (halves(255, "uint8"), ""),
    (halves(1, "float16"), ""),
    (halves(1, "float32"), ""),
    (halves(1, "float64"), ""),
    (halves(1, ">f4"), ""),
    (np.asfortranarray(halves(1, "float32")), ""),
    (halves(255, "int64"), "pixels of an unknown type (expected uint8 or float, got int64)"),
    (halves(255, "int8"), "pixels of an unknown type"),
    (halves(255, "uint16"), "got uint16"),
    (halves(1, "bool"), "got bool"),
    (halves(1, "complex64"), "got complex64"),
    (halves(1, "U3"), "pixels of an unknown type"),
    (halves(255, "float32"), "float pixels outside the box (expected [0, 1], got [0, 255]); give images before"),
    (halves(1, "float32") - 0.5, "got [-0.5, 0.5]"),
    (halves(1, "float32") * np.nan, "pixels that are not finite"),
    (np.where(halves(1, "float32") > 0.9, np.inf, 0), "pixels that are not finite"),
    (np.zeros((2, 0, 2, 3), np.float32), "no images (expected (n, c, h, w), got (2, 0, 2, 3))"),
    (np.zeros((0, 1, 2, 3), np.uint8), "no images"),
    (np.zeros(2, np.uint8), "no images (expected (n, c, h, w), got (2,))"),
    (np.array(3.0), "no images"),
]


@pytest.mark.parametrize(("images", "message"), PIXELS, ids=lambda value: str(value)[:30])
def test_pixels(tmp_path: Path, images: NDArray[Any], message: str) -> None:
    path = saved(tmp_path, {"x": images, "y": np.array([0, 1])})
    if message:
        with pytest.raises(DataError) as caught:
            load_data(path)
        assert message in str(caught.value)
        assert f"{path}: x" in str(caught.value)
        return
    found = load_data(path).report.images
    assert found.dtype.str == "<f4"
    exact = images / np.float32(255) if images.dtype == np.uint8 else images
    assert np.array_equal(found, exact.astype(np.float32))


LABELS: list[tuple[NDArray[Any], str]] = [
    (np.array([0, 1]), ""),
    (np.array([0, 1], np.uint8), ""),
    (np.array([[0], [1]], np.int32), ""),
    (np.array([0, 1, 2]), "images and labels do not pair up (got 2 and 3)"),
    (np.array([0]), "got 2 and 1"),
    (np.array([]), "got 2 and 0"),
    (np.array(1), "got 2 and 1"),
    (np.eye(2, 10), "got shape (2, 10)"),
    (np.eye(2, 3, dtype=np.int64), "y: labels are not one class each (got shape (2, 3)); store y.argmax(1)"),
    (np.array([0.0, 1.0]), "y: labels are not integers (got float64)"),
    (np.array([True, False]), "labels are not integers (got bool)"),
    (np.array(["cat", "dog"]), "labels are not integers"),
]


@pytest.mark.parametrize(("labels", "message"), LABELS)
def test_labels(tmp_path: Path, labels: NDArray[Any], message: str) -> None:
    path = saved(tmp_path, {"x": np.zeros((2, 1, 2, 3), np.uint8), "y": labels})
    if message:
        with pytest.raises(DataError) as caught:
            load_data(path)
        assert message in str(caught.value)
    else:
        assert load_data(path).report.labels.tolist() == [0, 1]


def test_an_unknown_key_offers_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path, {**arrays(), "x_tset": np.zeros(1)})
    with pytest.raises(DataError) as caught:
        load_data(path)
    assert str(caught.value).startswith(f"{path}: unknown key (got x_tset); did you mean 'x_test'")


class Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path(self.path).touch, ()


def test_a_pickle_inside_an_archive_is_refused_and_does_not_run(tmp_path: Path) -> None:
    bombs = np.array([Bomb(str(tmp_path / "exploded"))], dtype=object)
    with pytest.raises(DataError, match="allow_pickle"):
        load_data(saved(tmp_path, {"x": bombs, "y": np.array([0])}))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    with pytest.raises(DataError, match=r"not an \.npz archive") as caught:
        load_data(str(tmp_path / "bare.npz"))
    assert "allow_pickle" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def compressed_with_a_flipped_byte(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 1, 20, 20)).astype(np.uint8)
    np.savez_compressed(path, x=noise, y=np.array([0, 1]))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :][:50] = b""
    content[300:320] = bytes(20)
    path.write_bytes(bytes(content))


def text_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"no array")
        archive.writestr("y", b"no array")


def bad_header(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 9), }\n"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def garbage(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


def truncated(path: Path) -> None:
    saved(path.parent, arrays(), path.name)
    path.write_bytes(path.read_bytes()[:-30])


FILES = [
    garbage(b""), garbage(b"garbage"), garbage(b"PK\x03\x04" + bytes(50)), garbage(b"\x93NUMPY\x01\x00"),
    truncated, compressed_with_a_flipped_byte, text_member, bad_header,
]  # fmt: skip


@pytest.mark.parametrize("write", FILES)
def test_broken_files_are_data_errors(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "data.npz")
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "data.npz"))
    assert str(caught.value).startswith(str(tmp_path / "data.npz"))
    assert "\n" not in str(caught.value)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 2, 3)))
    with pytest.raises(
        DataError, match=r"not an \.npz archive .expected the keys x_train, y_train, x_test, y_test, x, y"
    ):
        load_data(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("source", ["nothing.npz", "no/such/folder", ""])
def test_nothing_there(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"no such data; give a \.npz file, a folder of class folders or module:factory"
    ):
        load_data(source)


FACTORY = """
import numpy as np
import torch
from types import MappingProxyType
x, y = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])
def right(): return {"x": x, "y": y}
def mapping(): return MappingProxyType({"x_test": x, "y_test": y})
def tensors(): return {"x": torch.zeros(4, 1, 2, 2), "y": torch.tensor([0, 1, 0, 1])}
def lists(): return {"x": x.tolist(), "y": y.tolist()}
def floats(): return {"x": (x / 1.0).tolist(), "y": y.tolist()}
def a_pair(): return x, y
def nothing(): return None
def gradient(): return {"x": torch.zeros(4, 1, 2, 2, requires_grad=True), "y": y}
def ragged(): return {"x": [[1.0], [1.0, 2.0]], "y": [0, 1]}
def number(): return {1: x, "y": y}
def raises(): raise KeyError("planted")
def objects(): return {"x": np.array([object()] * 4).reshape(4, 1), "y": y}
"""

FACTORIES = [
    ("right", ""),
    ("mapping", ""),
    ("tensors", ""),
    ("floats", ""),
    ("lists", "pixels of an unknown type (expected uint8 or float, got int64)"),
    ("a_pair", "the data factory returned no mapping (expected x_train, y_train, x_test, y_test, x, y, got tuple)"),
    ("nothing", "the data factory returned no mapping"),
    ("gradient", "cannot read what the data factory returned"),
    ("ragged", "cannot read what the data factory returned"),
    ("number", "unknown key (got 1)"),
    ("raises", "the factory raised (got KeyError: 'planted'"),
    ("objects", "pixels of an unknown type (expected uint8 or float, got object)"),
    ("missing", "has no 'missing'"),
]


@pytest.mark.parametrize(("name", "message"), FACTORIES)
def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "userside_data.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    if message:
        with pytest.raises(UsageError) as caught:
            load_data(f"userside_data:{name}")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        data = load_data(f"userside_data:{name}")
        assert data.report.images.shape == (4, 1, 2, 2)


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], str]] = [
    ((1, 28, 28), (1, 28, 28), ""),
    ((28, 28), (1, 28, 28), ""),
    ((28, 28, 1), (1, 28, 28), ""),
    ((1, 28, 28), (28, 28), ""),
    ((1, 28, 28), (784,), ""),
    ((28, 28), (1, 784), ""),
    ((3, 4, 4), (48,), ""),
    ((784,), (1, 784), ""),
    ((784,), (784, 1, 1), ""),
    ((784,), (1, 28, 28), "give images of the network's size"),
    ((3, 32, 32), (1, 32, 32), "give images of the network's size"),
    ((3, 32, 32), (3, 28, 28), "expected (3, 28, 28), got (3, 32, 32)"),
    ((32, 32, 3), (3, 32, 32), "reorder the axes to channels first"),
    ((1, 28, 28), (783,), "give images of the network's size"),
    ((1, 28, 28), (), "give images of the network's size"),
]


@pytest.mark.parametrize(("have", "want", "message"), SHAPES)
def test_shapes(have: tuple[int, ...], want: tuple[int, ...], message: str) -> None:
    images = np.arange(3 * int(np.prod(have)), dtype=np.float32).reshape(3, *have)
    split = Split(images, np.array([0, 1, 2]))
    data = Data(split, split.first(2), split.first(1), ("a note",))
    if message:
        with pytest.raises(DataError) as caught:
            data.shaped(want)
        assert message in str(caught.value)
        return
    shaped = data.shaped(want)
    assert [part.images.shape for part in (shaped.calibrate, shaped.select, shaped.report)] == [
        (3, *want), (2, *want), (1, *want),
    ]  # fmt: skip
    assert np.array_equal(shaped.calibrate.images.ravel(), images.ravel())
    assert shaped.notes == data.notes
    assert shaped.shaped(want).calibrate is shaped.calibrate


def test_the_digest_sees_every_part() -> None:
    base = load_parts(1.0, 1.0, 1.0)
    assert base.digest == load_parts(1.0, 1.0, 1.0).digest
    others = [load_parts(0.5, 1, 1), load_parts(1, 0.5, 1), load_parts(1, 1, 0.5), load_parts(1, 1, 1, label=1)]
    assert len({data.digest for data in (base, *others)}) == 5


def load_parts(a: float, b: float, c: float, label: int = 0) -> Data:
    calibrate, select, report = (
        Split(np.full((1, 1, 2, 2), value, np.float32), np.array([label])) for value in (a, b, c)
    )
    return Data(calibrate, select, report)
