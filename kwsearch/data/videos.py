"""Videos and what is signed in them: frames as image files, decoded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kwsearch.data.errors import DataError, few
from kwsearch.data.groups import held_groups
from kwsearch.data.image_folder import decode


@dataclass(frozen=True, eq=False)
class Videos:
    """frames: the files of each video, in order. sentences: what is signed in it, in order.
    glosses: those that have a class; the first has class 1, as class 0 is CTC's blank. size: (H, W)
    of decoded frames. broadcasts: what each is from, held out as a whole, or (). kept: clips that
    were decoded, by their first file.
    """

    frames: tuple[tuple[Path, ...], ...] = field(repr=False)
    sentences: tuple[tuple[str, ...], ...] = field(repr=False)
    glosses: tuple[str, ...] = field(repr=False)
    name: str
    size: tuple[int, int]
    broadcasts: tuple[str, ...] = field(default=(), repr=False)
    kept: dict[Path, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.sentences):
            raise DataError(
                f"{self.name}: {len(self.frames)} videos and {len(self.sentences)} sentences; "
                "allowed as many, at least one"
            )

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def num_classes(self) -> int:
        """With the blank."""
        return len(self.glosses) + 1

    @property
    def lengths(self) -> list[int]:
        """Frames of each."""
        return [len(files) for files in self.frames]

    def clip(self, number: int) -> Tensor:
        """out: (3, T, H, W) uint8. Raises DataError for a file that is no image."""
        files = self.frames[number]
        if files[0] not in self.kept:
            images = [torch.from_numpy(decode(file, self.size)) for file in files]
            self.kept[files[0]] = torch.stack(images).permute(3, 0, 1, 2).contiguous()
        return self.kept[files[0]]

    def labels(self, number: int) -> list[int]:
        """The classes of a sentence. Raises DataError for a gloss that has none."""
        places = {gloss: place for place, gloss in enumerate(self.glosses, 1)}
        unknown = [gloss for gloss in self.sentences[number] if gloss not in places]
        if unknown:
            raise DataError(f"{self.name}: {few(unknown)}: no gloss of the training part")
        return [places[gloss] for gloss in self.sentences[number]]

    def words(self, labels: Sequence[int]) -> list[str]:
        """The inverse of `labels`."""
        return [self.glosses[label - 1] for label in labels]

    def chosen(self, numbers: Sequence[int]) -> Videos:
        """Some of them, in that order."""
        return replace(
            self,
            frames=tuple(self.frames[i] for i in numbers),
            sentences=tuple(self.sentences[i] for i in numbers),
            broadcasts=tuple(self.broadcasts[i] for i in numbers) if self.broadcasts else (),
        )


def thinned(videos: Videos, count: int, seed: int) -> Videos:
    """So many of them at random, in their order; all if there are no more."""
    if count >= len(videos):
        return videos
    drawn = np.random.RandomState(seed).permutation(len(videos))[:count]
    return videos.chosen(sorted(drawn.tolist()))


def held_out(videos: Videos, fraction: float, seed: int) -> tuple[Videos, Videos]:
    """(the rest, held out) at random, at least one in each, in their order; broadcasts stay whole
    where there is more than one.
    """
    if len(videos) < 2:
        raise DataError(f"{videos.name}: one video, of which none can be held out; give more")
    random = np.random.RandomState(seed)
    held = np.zeros(len(videos), bool)
    if len(set(videos.broadcasts)) > 1:
        alike = np.zeros(len(videos), int)
        held = held_groups(np.array(videos.broadcasts), alike, fraction, random, videos.name)
    else:
        count = min(max(round(fraction * len(videos)), 1), len(videos) - 1)
        held[random.permutation(len(videos))[:count]] = True
    kept, out = (np.flatnonzero(mask).tolist() for mask in (~held, held))
    return videos.chosen(kept), videos.chosen(out)


def fingerprint(videos: Videos) -> str:
    """16 hex digits of the SHA-256 of names, sizes and sentences of the videos; not of pixels."""
    digest = hashlib.sha256()
    for files, sentence in zip(videos.frames, videos.sentences, strict=True):
        first = files[0]
        facts = (first.parent.name, len(files), first.stat().st_size, *sentence)
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]
