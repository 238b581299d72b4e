"""Images and labels: read, split by the one rule for data, and shaped as the network takes them.

Train images are split into *calibrate* (ranges, sensitivities) and *select* (choosing among plans); test images only
*report*. Pixels are float32 in [0, 1]; an attack's epsilon is in the same unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from qopt.cache import digest_arrays
from qopt.errors import DataError, UsageError, nearest
from qopt.factories import call

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}
PAIRS = (("x_train", "y_train"), ("x_test", "y_test"), ("x", "y"))
KEYS = tuple(key for pair in PAIRS for key in pair)
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
"""How images of 8 bits a channel are read: grey as one channel, all else as three; alpha is dropped."""


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Images float32 (n, ...) in [0, 1] with labels int64 (n,)."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Split:
        """The first ``count`` of them."""
        return Split(self.images[:count], self.labels[:count])


@final
@dataclass(frozen=True, eq=False)
class Data:
    """The three parts, disjoint unless a note says otherwise."""

    calibrate: Split
    select: Split
    report: Split
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of all images and labels."""
        parts = (self.calibrate, self.select, self.report)
        return digest_arrays(*(array for part in parts for array in (part.images, part.labels)))

    def shaped(self, shape: Sequence[int]) -> Data:
        """The same data with images of ``shape`` (channels, height, width, or as the network takes them).

        Raises:
            DataError: the images do not fit.
        """
        calibrate, select, report = (_shaped(p, tuple(shape)) for p in (self.calibrate, self.select, self.report))
        return Data(calibrate, select, report, self.notes)


def load_data(source: str) -> Data:
    """Read ``file.npz``, a folder of class folders, or ``package.module:factory``.

    An ``.npz`` holds ``x_train``/``y_train`` and ``x_test``/``y_test``, one of the two pairs, or ``x``/``y``. A folder
    holds one folder per class, in alphabetical order of the labels as torchvision's ImageFolder has it, or ``train``
    and ``test`` folders of such. A factory takes no argument and returns a mapping with the keys of an ``.npz``. Images
    are (n, c, h, w), uint8 (scaled by 1/255) or float in [0, 1]. Where they come class by class, the classes are
    interleaved, so that the first images of every part hold all classes.

    Raises:
        UsageError: nothing there, or a factory that does not import or raises.
        DataError: what is there does not fit.
    """
    path = Path(source)
    if source and path.is_dir():
        return _from_arrays(_read_folder(path), source)
    if source and path.exists():
        return _from_arrays(_read_npz(path), source)
    if ":" in source:
        return _from_arrays(_made_arrays(call(source, "--data"), source), source)
    raise UsageError("no such data", where=source, fix="give a .npz file, a folder of class folders or module:factory")


def _made_arrays(made: object, source: str) -> dict[str, NDArray[Any]]:
    if not isinstance(made, Mapping):
        got = type(made).__name__
        raise DataError("the data factory returned no mapping", where=source, expected=", ".join(KEYS), got=got)
    try:
        return {str(key): np.asarray(value) for key, value in made.items()}
    except Exception as error:  # a tensor on a device, a ragged list, or whatever else the user's object raises
        raise DataError("cannot read what the data factory returned", where=source, got=_reason(error)) from error


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                with archive:
                    return {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:  # a truncated or foreign file raises errors of a dozen kinds
        if not is_zipfile(path):  # what numpy says of it speaks of pickles
            raise _not_npz(path) from error
        raise DataError("cannot read the data", where=str(path), got=_reason(error)) from error
    raise _not_npz(path)


def _not_npz(path: Path) -> DataError:
    return DataError(
        "not an .npz archive", where=str(path), expected="the keys " + ", ".join(KEYS),
        fix="images in files go into a folder of class folders",
    )  # fmt: skip


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_folder(folder: Path) -> dict[str, NDArray[Any]]:
    parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    if not parts:
        x, y = _read_classes(folder, _class_names(folder))
        return {"x": x, "y": y}
    names = _class_names(parts.get("train", folder / "test"))
    arrays: dict[str, NDArray[Any]] = {}
    for part, path in parts.items():
        unknown = sorted(set(_class_names(path)) - set(names))
        if unknown:
            raise DataError("a class that the train folder does not have", where=str(path / unknown[0]))
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _read_classes(path, names)
    return arrays


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise DataError("no class folders", where=str(folder), fix="one folder per class, named in the order of labels")
    return names


def _read_classes(folder: Path, names: list[str]) -> tuple[NDArray[np.uint8], Labels]:
    files = [
        (label, path)
        for label, name in enumerate(names)
        for path in sorted((folder / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError("no images", where=str(folder), expected="files " + ", ".join(sorted(SUFFIXES)))
    images = [_read_image(path) for _, path in files]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError("images of different sizes", where=str(folder), got=", ".join(map(str, sorted(shapes)[:3])))
    return np.stack(images), np.array([label for label, _ in files], np.int64)


def _read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image.convert(_MODES.get(image.mode)), np.uint8)
    except Exception as error:  # a broken image raises errors of a dozen kinds
        raise DataError("cannot read an image", where=str(path), got=_reason(error)) from error
    if mode not in _MODES:
        raise DataError("not an image of 8 bits a channel", where=str(path), got=f"mode {mode}")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _from_arrays(arrays: dict[str, NDArray[Any]], where: str) -> Data:
    unknown = sorted(set(arrays) - set(KEYS))
    if unknown:
        raise DataError("unknown key", where=where, got=unknown[0], fix=nearest(unknown[0], KEYS))
    present = [pair for pair in PAIRS if pair[0] in arrays or pair[1] in arrays]
    if not present:
        raise DataError("no images", where=where, expected="x_train, y_train, x_test, y_test, or x, y")
    splits = {x: _split(arrays, x, y, where) for x, y in present}
    if list(splits) == ["x_train", "x_test"]:
        return _three_parts(splits["x_train"], splits["x_test"])
    if len(splits) > 1:
        raise DataError("the key x beside others", where=where, got=", ".join(arrays), fix="keep x, y or the others")
    ((x, only),) = splits.items()
    what = "the folder" if x == "x" and Path(where).is_dir() else x
    note = f"{what} alone serves calibration, selection and report: the reported accuracies flatter the result"
    return Data(only, only, only, (note,))


def _three_parts(train: Split, report: Split) -> Data:
    half = (len(train) + 1) // 2
    if half == len(train):
        return Data(train, train, report, ("the one train image serves calibration and selection",))
    return Data(train.first(half), Split(train.images[half:], train.labels[half:]), report)


def _split(arrays: dict[str, NDArray[Any]], x: str, y: str, where: str) -> Split:
    for key, other in ((x, y), (y, x)):
        if key not in arrays:
            raise DataError(f"{other} without {key}", where=where, expected="images and labels")
    images, labels = arrays[x], arrays[y]
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == len(images):
        got = f"shape {labels.shape}"
        raise DataError("labels are not one class each", where=f"{where}: {y}", got=got, fix="store y.argmax(1)")
    labels = labels.reshape(-1)
    if images.ndim < 2 or not images.size:
        raise DataError("no images", where=f"{where}: {x}", expected="(n, c, h, w)", got=str(images.shape))
    if len(images) != len(labels):
        raise DataError("images and labels do not pair up", where=where, got=f"{len(images)} and {len(labels)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError("labels are not integers", where=f"{where}: {y}", got=str(labels.dtype))
    return _mixed(Split(_to_float(images, f"{where}: {x}"), labels.astype(np.int64)))


def _mixed(split: Split) -> Split:
    """The images in their order, but with the classes interleaved where they come class by class."""
    runs = np.count_nonzero(np.diff(split.labels)) + 1
    classes, counts = np.unique(split.labels, return_counts=True)
    if runs > len(classes) or counts.max() == 1:
        return split
    rank = np.empty(len(split), np.int64)
    for label in classes:
        rank[split.labels == label] = np.arange(np.count_nonzero(split.labels == label))
    order = np.argsort(rank, kind="stable")
    return Split(split.images[order], split.labels[order])


def _to_float(images: NDArray[Any], where: str) -> Images:
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError("pixels of an unknown type", where=where, expected="uint8 or float", got=str(images.dtype))
    if not np.isfinite(images).all():
        raise DataError("pixels that are not finite", where=where)
    if images.min() < 0 or images.max() > 1:
        got = f"[{images.min():g}, {images.max():g}]"
        raise DataError(
            "float pixels outside the box", where=where, expected="[0, 1]", got=got,
            fix="give images before normalisation, and --mean/--std where it lies outside the network",
        )  # fmt: skip
    return images.astype(np.float32)


def _shaped(part: Split, shape: tuple[int, ...]) -> Split:
    have = part.images.shape[1:]
    if have == shape:
        return part
    squeezed_have = [size for size in have if size != 1]
    squeezed_want = [size for size in shape if size != 1]
    flattens = len(squeezed_want) == 1 and int(np.prod(have)) == squeezed_want[0]
    if squeezed_have == squeezed_want or flattens:
        return Split(part.images.reshape(len(part), *shape), part.labels)
    hint = (
        "reorder the axes to channels first" if sorted(have) == sorted(shape) else "give images of the network's size"
    )
    raise DataError(
        "images do not fit the network", where="--data", expected=str(shape), got=str(tuple(have)), fix=hint
    )  # fmt: skip
