"""PHOENIX14 and PHOENIX14T: continuous sign language as folders of frames, and annotations.

annotations/manual/train.corpus.csv (id|folder|signer|annotation) or
PHOENIX-2014-T.train.corpus.csv (name|video|start|end|speaker|orth|translation), and the frames of
each video in features/fullFrame-*/train/<folder>. Classes are the glosses of the training part, by
the alphabet. Sentences are taken as they are written: the official evaluation cleans glosses, and
word error rates of PHOENIX are published on its dev and test parts after that.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

from kwsearch.data.errors import DataError
from kwsearch.data.images import Split
from kwsearch.data.videos import Videos

_MANUAL = Path("annotations") / "manual"
_CORPUS = "train.corpus.csv"
# Columns with the folder of frames and with the sentence: of PHOENIX14, and of PHOENIX14T.
_COLUMNS = (("folder", "annotation"), ("name", "orth"))
LOOKED_FOR = f"{_MANUAL}/*{_CORPUS} and features/fullFrame-*/train/ (PHOENIX14)"


def holds(root: Path) -> bool:
    """Whether the annotations are there."""
    return any((root / _MANUAL).glob(f"*{_CORPUS}"))


def read(root: Path, split: Split, size: tuple[int, int]) -> Videos:
    """One split; frames are resized to `size` (H, W) when they are decoded. Raises DataError."""
    train = list(_rows(root, "train"))
    glosses = sorted({gloss for _, sentence in train for gloss in sentence})
    rows = train if split == "train" else list(_rows(root, split))
    features = _features(root) / split
    frames = tuple(_frames(features, folder) for folder, _ in rows)
    sentences = tuple(sentence for _, sentence in rows)
    # 01April_2010_Thursday_heute_default-0/1/*.png: of the broadcast of that day.
    broadcasts = tuple(re.sub(r"(_default)?-\d+(/.*)?$", "", folder) for folder, _ in rows)
    return Videos(frames, sentences, tuple(glosses), root.resolve().name, size, broadcasts)


def _rows(root: Path, split: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Folder and sentence of each video."""
    found = sorted((root / _MANUAL).glob(f"*{split}.corpus.csv"))
    if len(found) != 1:
        raise DataError(
            f"{root}: {len(found)} files {_MANUAL}/*{split}.corpus.csv; allowed one of each part"
        )
    (path,) = found
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); try another copy") from None
    with io.StringIO(text, newline="") as file:
        lines = csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE)
        names = lines.fieldnames or ()
        columns = next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)
        if columns is None:
            raise DataError(
                f"{path}: columns {', '.join(names) or 'none'}; allowed "
                + " or ".join("|".join(pair) for pair in _COLUMNS)
                + " among them, parted by |"
            )
        for line in lines:
            folder, sentence = (line[name] for name in columns)
            if not folder or not sentence or not sentence.split():
                raise DataError(f"{path}:{lines.line_num}: no folder, or no gloss")
            yield folder, tuple(sentence.split())


def _features(root: Path) -> Path:
    """The largest frames that are there."""
    found = sorted(path for path in (root / "features").glob("fullFrame-*") if path.is_dir())
    if not found:
        raise DataError(f"{root}: no folder features/fullFrame-*; looked for {LOOKED_FOR}")
    return max(found, key=lambda path: math.prod(map(int, re.findall(r"\d+", path.name))))


def _frames(features: Path, folder: str) -> tuple[Path, ...]:
    """folder: as PHOENIX14 says it, 01April_2010_Thursday_heute_default-0/1/*.png, or its name."""
    place = features / folder
    if "*" in place.name:
        place = place.parent
    if not place.resolve().is_relative_to(features.resolve()):
        raise DataError(f"{folder}: a folder outside of {features}")
    found = sorted(path for path in place.glob("*.[pj][np]g") if not path.name.startswith("."))
    if not found:
        raise DataError(f"{place}: no frames *.png or *.jpg there")
    return tuple(found)
