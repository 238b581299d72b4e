"""Folders of images: one folder per class, train and test, and pictures that are not what they seem."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qopt.data import load_data
from qopt.errors import DataError


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (4, 3), value: int = 7) -> None:
    """A picture of one colour; a lossless format keeps its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, value)
    image.convert(mode).save(path)


def grey(folder: Path, classes: dict[str, list[int]]) -> str:
    for name, values in classes.items():
        for i, value in enumerate(values):
            picture(folder / name / f"{i:03}.png", value=value)
    return str(folder)


def test_class_folders(tmp_path: Path) -> None:
    data = load_data(grey(tmp_path, {"cat": [10, 11, 12], "ant": [20], "bee": [30, 31]}))
    assert data.report.images.shape == (6, 1, 3, 4)
    values = np.round(data.report.images[:, 0, 0, 0] * 255).astype(int).tolist()
    assert values == [20, 30, 10, 31, 11, 12]  # classes in the order of names, interleaved
    assert data.report.labels.tolist() == [0, 1, 2, 1, 2, 2]
    assert data.notes[0].startswith("the folder alone serves")


def test_train_and_test_folders(tmp_path: Path) -> None:
    grey(tmp_path / "train", {"ant": [1, 2, 3], "bee": [4, 5, 6], "cat": [7, 8, 9]})
    grey(tmp_path / "test", {"cat": [90], "bee": [60]})
    data = load_data(str(tmp_path))
    assert data.calibrate.labels.tolist() == [0, 1, 2, 0, 1]
    assert data.select.labels.tolist() == [2, 0, 1, 2]
    assert sorted(zip(data.report.labels.tolist(), data.report.images[:, 0, 0, 0] * 255, strict=True)) == [
        (1, 60),
        (2, 90),
    ]
    assert data.notes == ()


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_of_the_two_folders_alone(tmp_path: Path, part: str) -> None:
    grey(tmp_path / part, {"ant": [1, 2], "bee": [3]})
    data = load_data(str(tmp_path))
    assert len(data.report) == 3
    assert data.notes[0].startswith(f"x_{part} alone serves")


def test_a_class_that_only_test_has(tmp_path: Path) -> None:
    grey(tmp_path / "train", {"ant": [1, 2]})
    grey(tmp_path / "test", {"ant": [3], "bee": [4]})
    with pytest.raises(DataError, match="test/bee: a class that the train folder does not have"):
        load_data(str(tmp_path))


def test_hidden_folders_and_other_files_are_no_classes(tmp_path: Path) -> None:
    grey(tmp_path, {"ant": [1], "bee": [2]})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "ant" / "notes.txt").write_text("about ants")
    (tmp_path / "ant" / "deeper").mkdir()
    assert load_data(str(tmp_path)).report.labels.tolist() == [0, 1]


MODES = [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]


@pytest.mark.parametrize(("mode", "channels"), MODES)
def test_grey_has_one_channel_and_colour_three(tmp_path: Path, mode: str, channels: int) -> None:
    picture(tmp_path / "a" / "1.png", mode, value=255)
    images = load_data(str(tmp_path)).report.images
    assert images.shape == (1, channels, 3, 4)
    assert (images == 1).all()


def test_colours_are_channels_first(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (5, 2), (10, 20, 30)).save(tmp_path / "a" / "1.bmp")
    image = load_data(str(tmp_path)).report.images[0]
    assert image.shape == (3, 2, 5)
    assert np.round(image[:, 1, 4] * 255).astype(int).tolist() == [10, 20, 30]


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"])
def test_every_suffix(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / "a" / f"1{suffix}", "RGB" if suffix == ".ppm" else "L", value=128)
    images = load_data(str(tmp_path)).report.images
    assert np.abs(images - 128 / 255).max() < 0.02


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((3, 4), 60000, np.uint16)).save(path)


def broken(path: Path) -> None:
    picture(path)
    path.write_bytes(path.read_bytes()[:40])


def bad_chunk(path: Path) -> None:
    picture(path, size=(64, 64))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    path.write_bytes(bytes(content))


WRONG = [
    (sixteen_bits, "not an image of 8 bits a channel (got mode I;16)"),
    (broken, "cannot read an image"),
    (bad_chunk, "cannot read an image"),
    (lambda path: path.write_bytes(b""), "cannot read an image"),
    (lambda path: path.write_text("no picture"), "cannot read an image"),
    (lambda path: path.mkdir(), "cannot read an image"),
]


@pytest.mark.parametrize(("write", "message"), WRONG)
def test_pictures_that_are_none_name_the_file(tmp_path: Path, write: object, message: str) -> None:
    grey(tmp_path, {"ant": [1]})
    assert callable(write)
    write(tmp_path / "ant" / "bad.png")
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'ant' / 'bad.png'}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"size": (5, 3)}, {"mode": "RGB"}])
def test_pictures_of_different_sizes(tmp_path: Path, change: dict[str, str]) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "b" / "1.png", **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images of different sizes"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "message"), [((), "no class folders"), (("ant",), "no images .expected files .bmp")]
)
def test_empty_folders(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))
