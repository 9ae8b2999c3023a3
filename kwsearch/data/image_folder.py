"""Folders of images, one folder per class: root/train/<class>/*.png with root/val or root/test.

Class folders directly under root are split by file name: an image is test if the first 8 bytes
of its name's SHA-256, big-endian, are a multiple of 5. So a new image changes no other's part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kwsearch.data.errors import DataError, few
from kwsearch.data.images import Images, Split

_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
_ALLOWED = ", ".join(sorted(_ENDINGS))
# ImageNet's test part has no labels: where there are both, val is meant.
_TEST_FOLDERS = ("val", "test")
LOOKED_FOR = "train/<class>/*.png, *.jpg, … or <class>/*.png, *.jpg, … (image folders)"


def holds(root: Path) -> bool:
    """Whether there is a train folder, or a folder with an image."""
    return (root / "train").is_dir() or any(
        True for folder in _folders_in(root) for _ in _walk(folder)
    )


def read(root: Path, split: Split, size: tuple[int, int] | None) -> Images:
    """One split as RGB, resized to `size` (H, W) by pillow's antialiased bilinear filter."""
    classes, files = _files(root, split)
    paths = [path for of_class in files for path in of_class]
    labels = [label for label, of_class in enumerate(files) for _ in of_class]
    return Images(
        x=_decode_all(root, paths, size),
        y=torch.tensor(labels, dtype=torch.int64),
        num_classes=len(classes),
        name=root.resolve().name,
        classes=classes,
    )


def is_test(name: str) -> bool:
    """The part of an image that came without one."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


def _files(root: Path, split: Split) -> tuple[tuple[str, ...], list[list[Path]]]:
    """Class names, and each class's images in the split."""
    if not (root / "train").is_dir():
        parts = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
        if parts:
            raise DataError(
                f"{root}: has {' and '.join(parts)}, but {root / 'train'} is missing; "
                f"looked for {LOOKED_FOR}"
            )
        return _files_split_by_name(root, split)
    classes = _class_folders(root / "train")
    if split == "train":
        return tuple(classes), list(classes.values())
    places = [root / name for name in _TEST_FOLDERS]
    for place in places:
        if place.is_dir():
            found = _class_folders(place)
            unknown = sorted(set(found) - set(classes))
            if unknown:
                raise DataError(
                    f"{place}: class {', '.join(unknown[:5])} is not among the "
                    f"{len(classes)} classes of {root / 'train'}; allowed {few(list(classes))}"
                )
            return tuple(classes), [found.get(name, []) for name in classes]
    raise DataError(
        f"{root}: no test part; looked for {' and '.join(map(str, places))}; "
        "try making one of them, with the class folders of train"
    )


def _files_split_by_name(root: Path, split: Split) -> tuple[tuple[str, ...], list[list[Path]]]:
    classes = _class_folders(root)
    chosen = {
        name: [path for path in paths if is_test(path.name) == (split == "test")]
        for name, paths in classes.items()
    }
    empty = [name for name, paths in chosen.items() if not paths]
    if (split == "train" and empty) or len(empty) == len(classes):
        raise DataError(
            f"{root}: the split by file name leaves no {split} image of {few(empty)}; "
            "give more images, or arrange them as train/<class>/ and val/<class>/"
        )
    return tuple(classes), list(chosen.values())


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, both in the order of their names; at least one of each."""
    classes = {path.name: sorted(_walk(path)) for path in _folders_in(folder)}
    if not classes:
        raise DataError(f"{folder}: no class folders; allowed one folder of images per class")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise DataError(
            f"{folder}: no image in class folder {few(empty)}; allowed {_ALLOWED}; "
            "try deleting the empty folder"
        )
    return classes


def _folders_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _walk(folder: Path) -> Iterator[Path]:
    """Images at any depth: some data sets have <class>/images/*.jpg."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file():
            yield path


def _decode_all(root: Path, paths: list[Path], size: tuple[int, int] | None) -> torch.Tensor:
    """(N, 3, H, W) uint8"""
    first = decode(paths[0], size)
    x = torch.empty((len(paths), 3, *first.shape[:2]), dtype=torch.uint8)
    for i, path in enumerate(paths):
        image = decode(path, size)
        if image.shape != first.shape:
            raise DataError(
                f"{root}: images differ in size: {paths[0]} is {_height_width(first)}, "
                f"{path} is {_height_width(image)}; give the size to bring them to, "
                "e.g. size=(64, 64)"
            )
        x[i] = torch.from_numpy(image).permute(2, 0, 1)
    return x


def decode(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8"""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            f"{path}: reading image files needs pillow, which is not installed; "
            "try pip install pillow"
        ) from None
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise DataError(
                    f"{path}: more than 8 bits per channel (mode {mode}); "
                    "allowed 8; try converting the image"
                )
            if mode in ("P", "PA"):  # straight to RGB, pillow warns about a transparent palette
                rgb = image.convert("RGBA").convert("RGB")
            else:
                rgb = image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # a damaged image raises anything from OSError to SyntaxError
        raise DataError(
            f"{path}: cannot be read as an image ({error}); try another copy, or delete it"
        ) from None
    if size is not None and rgb.size != (size[1], size[0]):
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(rgb)


def _height_width(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
