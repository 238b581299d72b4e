"""Images and labels: read, split by the one rule for data, and shaped as the network takes them.

Train images are split into *calibrate* (ranges, sensitivities) and *select* (choosing among plans); test images only
*report*. Pixels are float32 in [0, 1]; an attack's epsilon is in the same unit.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from qopt.cache import digest_arrays
from qopt.errors import DataError, UsageError, nearest
from qopt.factories import resolve

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}
KEYS = ("x_train", "y_train", "x_test", "y_test", "x", "y")


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

    An ``.npz`` holds ``x_train``/``y_train`` and ``x_test``/``y_test``, or ``x``/``y`` alone. A folder holds one folder
    per class, or ``train`` and ``test`` folders of such. A factory takes no argument and returns a mapping with the
    keys of an ``.npz``. Images are (n, c, h, w), uint8 (scaled by 1/255) or float in [0, 1].

    Raises:
        UsageError: nothing there, or a factory that does not import.
        DataError: what is there does not fit.
    """
    path = Path(source)
    if path.is_dir():
        return _from_arrays(_read_folder(path), source)
    if path.exists():
        return _from_arrays(_read_npz(path), source)
    if ":" in source:
        arrays = resolve(source, "--data")()
        if not isinstance(arrays, dict):
            raise DataError("the data factory returned no dict", where=source, got=type(arrays).__name__)
        return _from_arrays({key: np.asarray(value) for key, value in arrays.items()}, source)
    raise UsageError("no such data", where=source, fix="give a .npz file, a folder of class folders or module:factory")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError("not an .npz archive", where=path.name, expected="keys " + ", ".join(KEYS))
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError("cannot read the data", where=path.name, got=str(error).splitlines()[0]) from error


def _read_folder(folder: Path) -> dict[str, NDArray[Any]]:
    parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    if not parts:
        x, y = _read_classes(folder, _class_names(folder))
        return {"x": x, "y": y}
    names = _class_names(parts.get("train", parts.get("test", folder)))
    arrays: dict[str, NDArray[Any]] = {}
    for part, path in parts.items():
        arrays[f"x_{part}"], arrays[f"y_{part}"] = _read_classes(path, names)
    return arrays


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
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
    # interleave the classes, so that the first images of a split are not all of one class
    order = np.argsort(
        [i for name in range(len(names)) for i, (label, _) in enumerate(_of(files, name))], kind="stable"
    )
    images = [_read_image(files[i][1]) for i in order]
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise DataError("images of different sizes", where=str(folder), got=", ".join(map(str, sorted(shapes)[:3])))
    return np.stack(images), np.array([files[i][0] for i in order], np.int64)


def _of(files: list[tuple[int, Path]], label: int) -> list[tuple[int, Path]]:
    return [file for file in files if file[0] == label]


def _read_image(path: Path) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16") else "RGB"), np.uint8)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError("cannot read an image", where=str(path), got=str(error)) from error
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _from_arrays(arrays: dict[str, NDArray[Any]], where: str) -> Data:
    unknown = sorted(set(arrays) - set(KEYS))
    if unknown:
        raise DataError("unknown key", where=where, got=unknown[0], fix=nearest(unknown[0], KEYS))
    if "x_train" in arrays and "x_test" in arrays:
        train, report = _split(arrays, "x_train", "y_train", where), _split(arrays, "x_test", "y_test", where)
        half = (len(train) + 1) // 2
        calibrate = train.first(half)
        select = Split(train.images[half:], train.labels[half:]) if len(train) > 1 else calibrate
        return Data(calibrate, select, report)
    for x, y in (("x", "y"), ("x_train", "y_train"), ("x_test", "y_test")):
        if x in arrays:
            only = _split(arrays, x, y, where)
            note = f"{x} alone serves calibration, selection and report: the reported accuracies flatter the result"
            return Data(only, only, only, (note,))
    raise DataError("no images", where=where, expected="x_train, y_train, x_test, y_test, or x, y")


def _split(arrays: dict[str, NDArray[Any]], x: str, y: str, where: str) -> Split:
    if y not in arrays:
        raise DataError("images without labels", where=where, expected=f"the key {y} beside {x}")
    images, labels = arrays[x], arrays[y].reshape(-1)
    if len(images) != len(labels) or not len(images):
        raise DataError("images and labels do not pair up", where=where, got=f"{len(images)} and {len(labels)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError("labels are not integers", where=f"{where}: {y}", got=str(labels.dtype))
    return Split(_to_float(images, f"{where}: {x}"), labels.astype(np.int64))


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
