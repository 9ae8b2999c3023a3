"""Folders of sound files, as ESC-50 has them or one folder per class, and their log-mels.

ESC-50's layout is meta/esc50.csv (filename, fold, target, category) and audio/*.wav; one fold is
the test part, the first if none is chosen; takes of one recording, which ESC-50's names tell
(FOLD-RECORDING-TAKE-CLASS.wav), are held out together. The other is train/<class>/*.wav and
test/<class>/*.wav. A clip is brought to 32 kHz and to one channel, their mean, and cut or padded
with zeros at its end. Format: https://github.com/karolpiczak/ESC-50.
"""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kwsearch.data import mel_cache
from kwsearch.data.errors import DataError, few
from kwsearch.data.images import Images, Split
from kwsearch.data.mel import HOP, MELS, SAMPLE_RATE, SILENCE, LogMel, frames

ESC50_SECONDS = 5.0
SECONDS = 10.0  # AudioSet's
LOOKED_FOR = "meta/esc50.csv and audio/*.wav (ESC-50), {train,test}/<class>/*.wav (sound)"
_CSV = Path("meta", "esc50.csv")
_COLUMNS = ("filename", "fold", "target", "category")
_ENDINGS = {".wav", ".flac", ".ogg"}
_MAX_BYTES = 8 * 10**9


@dataclass(frozen=True, eq=False)
class Clips(Images):
    """x: (N, 1, n_mels, frames) float16, log-mels   all else as of images.

    They are trained on as the front end gives them, which is what published weights expect.
    """

    silence: ClassVar[float] = SILENCE

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype != torch.float16 or 0 in self.x.shape:
            raise DataError(
                f"{self.name}: log-mels are {str(self.x.dtype).removeprefix('torch.')} of shape "
                f"{tuple(self.x.shape)}; allowed float16 of shape (N, 1, n_mels, frames); "
                "log-mels cannot be resized, try loading them at that size"
            )

    @staticmethod
    def reach(size: tuple[int, int]) -> tuple[int, int]:
        """In time only: bands are pitches."""
        return 0, max(size[1] // 8, 1)

    @staticmethod
    def floats(x: Tensor) -> Tensor:
        return x.float()

    def statistics(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(1, 1, 1, 1)
        return zero, zero + 1


@dataclass(frozen=True)
class ClipFiles:
    """Clips on disk, each read when it is asked for: a data set of (waveform (samples,), label).

    For a torch DataLoader, and a LogMel on its batches. names: of the clips in a teacher's file,
    the file's in ESC-50, else class/file.
    """

    paths: tuple[Path, ...] = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    num_classes: int
    classes: tuple[str, ...] = field(repr=False)
    samples: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_clip(self.paths[index], self.samples), self.labels[index]


def holds(root: Path) -> bool:
    """Whether there is ESC-50's table, or sound where either layout has it."""
    if (root / _CSV).is_file() or ((root / "audio").is_dir() and _sounds(root / "audio")):
        return True
    # The first class folder with a file tells: the others may hold a million images.
    for folder in _folders_in(root / "train"):
        if any(path.is_file() and not path.name.startswith(".") for path in folder.iterdir()):
            return bool(_sounds(folder))
    return False


def find(
    root: Path, split: Split, *, fold: int | None = None, seconds: float | None = None
) -> ClipFiles:
    """The clips of one split, none of them read yet.

    fold: of ESC-50's, the test part; 1 if None. seconds: of a clip; if None, 5 in ESC-50, else 10.
    """
    esc50 = (root / _CSV).is_file() or not (root / "train").is_dir()
    if seconds is None:
        seconds = ESC50_SECONDS if esc50 else SECONDS
    if not 1 <= seconds * SAMPLE_RATE < math.inf:
        raise DataError(
            f"clips of {seconds!r} seconds; allowed a sample at {SAMPLE_RATE:,} Hz or more, e.g. 5"
        )
    samples = round(seconds * SAMPLE_RATE)
    if esc50:
        return _esc50(root, split, 1 if fold is None else fold, samples)
    if fold is not None:
        raise DataError(
            f"{root}: fold {fold} of train/ and test/; only {_CSV.as_posix()} has folds"
        )
    return _class_folders(root, split, samples)


def read(
    root: Path, split: Split, size: tuple[int, int] | None = None, fold: int | None = None
) -> Clips:
    """The log-mels of one split, in memory: N * n_mels * frames * 2 bytes, made once and kept.

    ESC-50's 2,000 clips take 256 MB; more than 8 GB are refused. size: (n_mels, frames), of which
    a second has 100; if None, 128 bands of the layout's clips.
    """
    n_mels = MELS if size is None else size[0]
    files = find(
        root, split, fold=fold, seconds=None if size is None else size[1] * HOP / SAMPLE_RATE
    )
    shape = (len(files), 1, n_mels, frames(files.samples))
    if 2 * math.prod(shape) > _MAX_BYTES:
        raise DataError(
            f"{root}: {len(files):,} log-mels of {shape[2]}x{shape[3]} take "
            f"{2e-9 * math.prod(shape):.3g} GB; allowed {1e-9 * _MAX_BYTES:g} in memory; try "
            "fewer frames, or audio_folder.find, whose clips are read when they are asked for"
        )

    def make() -> Tensor:
        to_mels = LogMel(n_mels).eval()
        x = torch.empty(shape, dtype=torch.float16)
        for i, path in enumerate(files.paths):
            x[i] = to_mels(read_clip(path, files.samples))
        return x

    return Clips(
        x=mel_cache.kept(files.paths, shape[1:], make),
        y=torch.tensor(files.labels),
        num_classes=files.num_classes,
        name=root.resolve().name,
        classes=files.classes,
        names=files.names,
        groups=_recordings(files.names),
    )


def _recordings(names: Sequence[str]) -> Tensor | None:
    """Which clips are takes of one recording, by ESC-50's names; None of others."""
    found = [re.fullmatch(r"\d+-(\w+)-[A-Z]-\d+\.\w+", name) for name in names]
    keys = [match[1] for match in found if match is not None]
    if len(keys) < len(names):
        return None
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([places[key] for key in keys])


def read_clip(path: Path, samples: int) -> Tensor:
    """out: (samples,) float32 in -1..1, at 32 kHz."""
    soundfile = _package("soundfile", path)
    try:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except Exception as error:  # of libsndfile, or what a damaged header makes of numpy
        raise DataError(
            f"{path}: cannot be read as sound ({error}); try another copy, or delete it"
        ) from None
    if not (len(channels) and np.isfinite(channels).all()):
        what = "samples that are not finite" if len(channels) else "no samples"
        raise DataError(f"{path}: {what}; try another copy, or delete it")
    mono = channels.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = _package("soxr", path).resample(mono, rate, SAMPLE_RATE)
    # A negative padding cuts.
    return F.pad(torch.from_numpy(mono), (0, samples - len(mono)))


@dataclass(frozen=True)
class _Row:
    filename: str
    fold: int
    target: int
    category: str


def _esc50(root: Path, split: Split, fold: int, samples: int) -> ClipFiles:
    table = root / _CSV
    rows = _rows(table)
    folds = sorted({row.fold for row in rows})
    if fold not in folds:
        raise DataError(f"{table}: no fold {fold}; allowed {', '.join(map(str, folds))}")
    chosen = [row for row in rows if (row.fold == fold) == (split == "test")]
    if not chosen:
        raise DataError(f"{table}: fold {fold} is all there is, which leaves no clip for {split}")
    missing = [row.filename for row in rows if not (root / "audio" / row.filename).is_file()]
    if missing:
        raise DataError(
            f"{root / 'audio'}: {few(missing)} of {table} missing; try unpacking the archive again"
        )
    num_classes = 1 + max(row.target for row in rows)
    categories = {row.target: row.category for row in rows}
    return ClipFiles(
        paths=tuple(root / "audio" / row.filename for row in chosen),
        names=tuple(row.filename for row in chosen),
        labels=tuple(row.target for row in chosen),
        num_classes=num_classes,
        classes=tuple(categories[i] for i in sorted(categories))
        if len(categories) == num_classes
        else (),
        samples=samples,
    )


def _rows(table: Path) -> list[_Row]:
    """ESC-50's table."""
    if not table.is_file():
        raise DataError(
            f"{table}: missing, beside {table.parents[1] / 'audio'}; looked for {LOOKED_FOR}"
        )
    try:
        reader = csv.DictReader(io.StringIO(table.read_text("utf-8-sig")), strict=True)
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{table}: not a table of comma-separated text ({error}); try another copy"
        ) from None
    absent = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if absent or not lines:
        what = f"no column {', '.join(absent)}" if absent else "no clips"
        raise DataError(f"{table}: {what}; allowed {', '.join(_COLUMNS)}, one line for each clip")
    return [_row(table, number, line) for number, line in enumerate(lines, 2)]


def _row(table: Path, number: int, line: dict[str, str | None]) -> _Row:
    filename, fold, target, category = (line[name] or "" for name in _COLUMNS)
    if not (filename and fold.isdecimal() and target.isdecimal()):
        raise DataError(
            f"{table}:{number}: filename {filename!r}, fold {fold!r}, target {target!r}; "
            "allowed a name, and whole numbers from 0 for the others"
        )
    return _Row(filename, int(fold), int(target), category)


def _class_folders(root: Path, split: Split, samples: int) -> ClipFiles:
    """Clips in the order of their classes' names, then of their own."""
    classes = [folder.name for folder in _folders_in(root / "train")]
    if not (root / split).is_dir():
        raise DataError(
            f"{root}: no {split} part; looked for {root / split}; "
            "try making it, with the class folders of train"
        )
    found = {folder.name: _sounds(folder) for folder in _folders_in(root / split)}
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(
            f"{root / split}: class {few(unknown)} is not among the {len(classes)} classes of "
            f"{root / 'train'}; allowed {few(classes)}"
        )
    empty = [name for name, paths in found.items() if not paths]
    if empty or not found:
        where = f"class folder {few(empty)}" if empty else "any class folder"
        raise DataError(
            f"{root / split}: no sound in {where}; allowed {', '.join(sorted(_ENDINGS))}; "
            "try deleting the empty folder"
        )
    clips = [(path, classes.index(name)) for name, paths in found.items() for path in paths]
    return ClipFiles(
        paths=tuple(path for path, _ in clips),
        names=tuple(f"{path.parent.name}/{path.name}" for path, _ in clips),
        labels=tuple(label for _, label in clips),
        num_classes=len(classes),
        classes=tuple(classes),
        samples=samples,
    )


def _folders_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _sounds(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()
    )


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile may lack its library
        raise DataError(
            f"{path}: reading sound needs {name}, which cannot be imported "
            f"({' '.join(str(error).split())}); try pip install 'kwsearch[audio]'"
        ) from None
