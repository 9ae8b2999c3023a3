"""A data set by name or path. Names are looked up on this machine; nothing is downloaded.

`digits` comes with the package. The other names are folders, and the first that holds one wins:
$KWSEARCH_DATA/<folder>, ./data/<folder>, ~/.cache/kwsearch/<folder>, /usr/share/datasets/<folder>.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from kwsearch.data import audio_folder, cifar, idx, image_folder, npz, phoenix, ts, uci_har
from kwsearch.data.errors import DataError
from kwsearch.data.images import Images, Split, check_size, resize
from kwsearch.data.series import Series
from kwsearch.data.videos import Videos
from kwsearch.files import is_url

_SYSTEM = Path("/usr/share/datasets")


@dataclass(frozen=True)
class _Known:
    """A data set looked up by name. folders: what it may be called, ours before torchvision's."""

    folders: tuple[str, ...]
    num_classes: int
    holds: Callable[[Path], bool]
    looked_for: str
    advice: str
    classes: tuple[str, ...] = ()


_CIFAR_ADVICE = "try unpacking an archive of https://www.cs.toronto.edu/~kriz/cifar.html there"
_KNOWN = {
    "fashion_mnist": _Known(
        ("fashion-mnist", "FashionMNIST/raw"),
        10,
        idx.holds,
        idx.LOOKED_FOR,
        "try apt install dataset-fashion-mnist (Debian), "
        "or the files of https://github.com/zalandoresearch/fashion-mnist",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "mnist": _Known(
        ("mnist", "MNIST/raw"),
        10,
        idx.holds,
        idx.LOOKED_FOR,
        "try putting MNIST's four files there",
        tuple("0123456789"),
    ),
    "cifar10": _Known(
        ("cifar-10", "cifar-10-batches-bin", "cifar-10-batches-py"),
        10,
        partial(cifar.holds, num_classes=10),
        cifar.LOOKED_FOR,
        _CIFAR_ADVICE,
    ),
    "cifar100": _Known(
        ("cifar-100", "cifar-100-binary", "cifar-100-python"),
        100,
        partial(cifar.holds, num_classes=100),
        cifar.LOOKED_FOR,
        _CIFAR_ADVICE,
    ),
    "esc50": _Known(
        ("ESC-50", "ESC-50-master"),
        50,
        audio_folder.holds,
        audio_folder.LOOKED_FOR,
        "try unpacking an archive of https://github.com/karolpiczak/ESC-50 there",
    ),
    "uci_har": _Known(
        ("UCI HAR Dataset", "uci-har"),
        6,
        uci_har.holds,
        uci_har.LOOKED_FOR,
        "try unpacking the archive of https://archive.ics.uci.edu/dataset/240 there",
    ),
}
# Videos with sentences, by the folders that they may be called.
_VIDEOS = {
    "phoenix14": ("phoenix-2014-multisigner", "phoenix2014"),
    "phoenix14t": ("PHOENIX-2014-T", "phoenix2014T"),
}
NAMES = ("digits", *_KNOWN, *_VIDEOS)
_PATHS = (
    "or the path or URL of a folder of IDX files, a CIFAR folder, a folder of class folders, "
    "an ESC-50 folder, a UCI-HAR folder, a folder of NAME_TRAIN.ts and NAME_TEST.ts, "
    "or a _TRAIN.ts or .npz file"
)


def load(
    source: str | Path,
    split: Split = "train",
    *,
    size: tuple[int, int] | None = None,
    fold: int | None = None,
) -> Images:
    """One split of a data set, in memory.

    source: one of `NAMES`, or a path, or a URL such as s3://bucket/images; a name wins over a
    folder called so, `./digits` is the path. size: (H, W) to resize to; needed where the images of
    a folder differ in size. Of sound it is mel bands and frames, 100 a second, and the clips are
    `audio_folder.Clips`. Of time series it is samples and sensors: the windows, which are
    `series.Series`, are padded to it or cut at it from a recording. fold: of ESC-50's, the test
    part; 1 if None.

    Raises DataError.
    """
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}; allowed train and test")
    if size is not None:
        check_size(size)
    try:
        images = _read(source, split, size, fold)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from error
    if fold is not None and not isinstance(images, audio_folder.Clips):
        kind = "time series" if isinstance(images, Series) else "images"
        raise DataError(f"{source}: fold {fold} of {kind}; only ESC-50's sound has folds")
    return images if size is None else resize(images, size)


def load_videos(source: str | Path, split: Split, size: tuple[int, int]) -> Videos:
    """One split of videos with sentences: `phoenix14`, `phoenix14t`, or a folder laid out as they
    are. size: (H, W) of the frames, which are decoded when they are asked for. Raises DataError.
    """
    check_size(size)
    try:
        if source in _VIDEOS:
            tried = places(str(source))
            root = next((folder for folder in tried if phoenix.holds(folder)), None)
            if root is None:
                raise DataError(
                    f"{source}: not found on this machine; looked in {', '.join(map(str, tried))}, "
                    f"for {phoenix.LOOKED_FOR}; try https://www-i6.informatik.rwth-aachen.de/~koller/"
                )
            return replace(phoenix.read(root, split, size), name=str(source))
        root = Path(os.path.expanduser(source))
        if not phoenix.holds(root):
            raise DataError(
                f"{source}: no videos with sentences; looked for {phoenix.LOOKED_FOR}; allowed "
                f"{', '.join(_VIDEOS)}, or such a folder"
            )
        return phoenix.read(root, split, size)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error})") from error


def places(name: str) -> list[Path]:
    """The folders where a known name is looked up, first to last."""
    folders = _VIDEOS[name] if name in _VIDEOS else _KNOWN[name].folders
    given = os.environ.get("KWSEARCH_DATA")
    roots = [Path("data"), Path(os.path.expanduser("~/.cache/kwsearch")), _SYSTEM]
    if given:
        roots.insert(0, Path(os.path.expanduser(given)))
    return [root / folder for root in roots for folder in folders]


def _read(
    source: str | Path, split: Split, size: tuple[int, int] | None, fold: int | None
) -> Images:
    if source == "digits":
        return _digits(split)
    if source in _VIDEOS:
        raise DataError(f"{source}: videos, for networks of videos such as sign_resnet18")
    if isinstance(source, str) and source in _KNOWN:
        return _named(source, split, size, fold)
    if isinstance(source, str) and is_url(source):
        from kwsearch.data.remote import fetched

        return _read(fetched(source), split, size, fold)
    path = Path(os.path.expanduser(source))
    if source == "" or not os.path.exists(path):
        raise _nothing_at(source, path)
    if path.is_dir():
        return _folder(path, split, size, fold)
    if path.suffix.lower() == ".npz":
        return npz.read(path, split, size)
    if path.suffix.lower() == ".ts":
        return ts.read(path, split, size)
    raise DataError(
        f"{source}: not a folder, a .npz or a .ts file; allowed {', '.join(NAMES)}, {_PATHS}"
    )


def _digits(split: Split) -> Images:
    """1,797 grey images of 8x8, in 10 classes; see assets/digits.md."""
    with (
        (resources.files("kwsearch") / "assets" / "digits.npz").open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        x, y = arrays["x"], arrays["y"]
    part = npz.is_test(np.arange(len(y))) == (split == "test")
    pixels = np.rint(x[part] * (255 / 16)).astype(np.uint8)  # 0..16 as published
    return Images(
        x=torch.from_numpy(pixels[:, None]),
        y=torch.from_numpy(y[part].astype(np.int64)),
        num_classes=10,
        name="digits",
        classes=tuple("0123456789"),
    )


def _named(name: str, split: Split, size: tuple[int, int] | None, fold: int | None) -> Images:
    known, tried = _KNOWN[name], places(name)
    for folder in tried:
        if known.holds(folder):
            images = _folder(folder, split, size, fold)
            return replace(
                images,
                name=name,
                num_classes=known.num_classes,
                classes=images.classes or known.classes,
            )
    variable = "" if os.environ.get("KWSEARCH_DATA") else " and KWSEARCH_DATA, which is not set"
    raise DataError(
        f"{name}: not found on this machine; looked in {', '.join(map(str, tried))}{variable}, "
        f"for {known.looked_for}; {known.advice}, "
        f"or set KWSEARCH_DATA to the folder that contains {known.folders[0]}/"
    )


def _folder(folder: Path, split: Split, size: tuple[int, int] | None, fold: int | None) -> Images:
    if idx.holds(folder):
        return idx.read(folder, split)
    layout = cifar.find(folder)
    if layout is not None:
        return cifar.read(folder, split, layout)
    if uci_har.holds(folder):  # it and sound before images, whose train/ they share
        return uci_har.read(folder, split, size)
    if audio_folder.holds(folder):
        return audio_folder.read(folder, split, size, fold)
    if ts.holds(folder):
        return ts.read(folder, split, size)
    if image_folder.holds(folder):
        return image_folder.read(folder, split, size)
    raise DataError(
        f"{folder}: no images found; looked for {idx.LOOKED_FOR}; {cifar.LOOKED_FOR}; "
        f"{image_folder.LOOKED_FOR}; {audio_folder.LOOKED_FOR}; {uci_har.LOOKED_FOR}; "
        f"{ts.LOOKED_FOR}"
    )


def _nothing_at(source: str | Path, path: Path) -> DataError:
    allowed = f"allowed {', '.join(NAMES)}, {_PATHS}"
    if isinstance(source, Path) or path.suffix or os.path.basename(source) != source:
        where = path.absolute()
        return DataError(f"{source}: no such file or folder; looked for {where}; {allowed}")
    close = difflib.get_close_matches(source.lower(), NAMES, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return DataError(f"unknown data set {source!r}{meant}, and no such file or folder; {allowed}")
