"""Labelled images as one value, and what is done to it: resize, hold out, thin, fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from kwsearch.data.errors import DataError
from kwsearch.data.groups import held_groups

Split = Literal["train", "test"]
ImagesT = TypeVar("ImagesT", bound="Images")

# Resizing goes through float, four times the bytes: so many images at a time.
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Images:
    """x: (N, C, H, W) uint8   y: (N,) int64 in 0..num_classes-1   classes: their names, or ().

    names: of the examples, as a teacher's file has them, or (). teacher: (N, num_classes) float32,
    a teacher's logits of each, or None. groups: (N,) int64, which of them are of one recording, of
    one person, and are held out together; None where nobody knows.
    """

    x: torch.Tensor = field(repr=False)
    y: torch.Tensor = field(repr=False)
    num_classes: int
    name: str
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = field(default=(), repr=False)
    teacher: torch.Tensor | None = field(default=None, repr=False)
    groups: torch.Tensor | None = field(default=None, repr=False)

    # What is beside an example, in its own numbers.
    silence: ClassVar[float] = 0.0

    @staticmethod
    def floats(x: torch.Tensor) -> torch.Tensor:
        """Some of `x` as numbers from 0 to 1."""
        return x.float() / 255

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel of `floats`, (1, C, 1, 1), to train on."""
        x = self.floats(self.x)
        deviation = x.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
        return x.mean(dim=(0, 2, 3), keepdim=True), deviation

    @staticmethod
    def reach(size: tuple[int, int]) -> tuple[int, int]:
        """How far an example of `size` (H, W) may be moved up or down, and to the sides."""
        return (max(size[1] // 8, 1),) * 2

    def to(self: ImagesT, device: torch.device | str) -> ImagesT:
        """The same on that device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return replace(self, x=self.x.to(device), y=self.y.to(device), teacher=teacher)

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype != torch.uint8 or 0 in self.x.shape:
            raise DataError(
                f"{self.name}: x is {_described(self.x)}; allowed uint8 of shape (N, C, H, W) "
                "with at least one image, channel and pixel"
            )
        if self.y.ndim != 1 or self.y.dtype != torch.int64:
            raise DataError(
                f"{self.name}: y is {_described(self.y)}; allowed int64 of shape (N,), "
                "one label per image"
            )
        if len(self.x) != len(self.y):
            raise DataError(
                f"{self.name}: {len(self.x)} images but {len(self.y)} labels; "
                "allowed one label per image"
            )
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{self.name}: label {low if low < 0 else high} is out of range; "
                f"allowed 0..{self.num_classes - 1} ({self.num_classes} classes)"
            )
        if self.classes and len(self.classes) != self.num_classes:
            raise DataError(
                f"{self.name}: {len(self.classes)} class names for {self.num_classes} classes; "
                "allowed one name per class, or none at all"
            )

    def __len__(self) -> int:
        return len(self.y)


def resize(images: Images, size: tuple[int, int]) -> Images:
    """The images at `size` (H, W): antialiased bilinear in float, rounded back to uint8."""
    check_size(size)
    if tuple(images.x.shape[2:]) == tuple(size):
        return images
    x = torch.empty(*images.x.shape[:2], *size, dtype=torch.uint8, device=images.x.device)
    for i in range(0, len(x), _CHUNK):
        x[i : i + _CHUNK] = (
            F.interpolate(
                images.x[i : i + _CHUNK].float(), size=list(size), mode="bilinear", antialias=True
            )
            .round_()
            .clamp_(0, 255)
        )
    return replace(images, x=x)


def split_holdout(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """(train, held_out): `fraction` of every class is held out, chosen by the seed.

    A class of two images or more has at least one in each part; a single image stays in train.
    Where examples have groups these stay whole, and come as near to the fraction as they can. Both
    parts keep the order of `images`.
    """
    if isinstance(fraction, bool) or not 0 < fraction < 1:
        raise DataError(
            f"cannot hold out a fraction of {fraction!r}; "
            "allowed a number strictly between 0 and 1, e.g. 0.1"
        )
    if images.groups is not None:
        groups, classes = images.groups.cpu().numpy(), images.y.cpu().numpy()
        held = torch.from_numpy(held_groups(groups, classes, fraction, _random(seed), images.name))
        return _select(images, ~held), _select(images, held)
    held = torch.zeros(len(images), dtype=torch.bool)
    for members in _shuffled_classes(images, _random(seed)):
        if len(members) >= 2:
            wanted = math.floor(fraction * len(members) + 0.5)
            held[members[: min(max(wanted, 1), len(members) - 1)]] = True
    if not held.any():
        raise DataError(
            f"{images.name}: nothing can be held out, no class has two images "
            f"({len(images)} images in all); give more images"
        )
    return _select(images, ~held), _select(images, held)


def subset(images: Images, n: int, seed: int) -> Images:
    """`n` images in the proportions of their classes, chosen by the seed, in their order.

    The shares are rounded by largest remainder, equal remainders in an order drawn by the seed.
    `images` itself when it has no more than `n`.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise DataError(f"cannot take a subset of {n!r} images; allowed a whole number, at least 1")
    random = _random(seed)
    if n >= len(images):
        return images
    members = _shuffled_classes(images, random)
    shares = [n * len(of_class) // len(images) for of_class in members]
    remainders = [n * len(of_class) % len(images) for of_class in members]
    drawn = random.permutation(len(members))
    ranked = sorted(range(len(members)), key=lambda i: (-remainders[i], drawn[i]))
    for i in ranked[: n - sum(shares)]:
        shares[i] += 1
    kept = torch.zeros(len(images), dtype=torch.bool)
    for share, of_class in zip(shares, members, strict=True):
        kept[of_class[:share]] = True
    return _select(images, kept)


def fingerprint(images: Images) -> str:
    """16 hex digits of the SHA-256 of pixels, labels and their shape; names do not count."""
    digest = hashlib.sha256(repr(tuple(images.x.shape)).encode())
    digest.update(np.ascontiguousarray(images.x.cpu().numpy()).reshape(-1).data)
    digest.update(np.ascontiguousarray(images.y.cpu().numpy(), dtype="<i8").data)
    return digest.hexdigest()[:16]


def check_size(size: tuple[int, int]) -> None:
    """Raises DataError unless `size` is (H, W)."""
    if not (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(type(side) is int and side >= 1 for side in size)
    ):
        raise DataError(
            f"size {size!r} is not a height and a width; "
            "allowed two whole numbers, each at least 1, e.g. (32, 32)"
        )


def _shuffled_classes(images: Images, random: np.random.RandomState) -> list[torch.Tensor]:
    """The indices of each class that occurs, in class order, each list shuffled."""
    labels = images.y.cpu().numpy()
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [torch.from_numpy(random.permutation(of_class)) for of_class in members]


def _random(seed: int) -> np.random.RandomState:
    # numpy's frozen generator: the one whose draws are the same in every version.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise DataError(f"seed {seed!r} is not usable; allowed a whole number from 0 to 2**32 - 1")
    return np.random.RandomState(seed)


def _select(images: Images, mask: torch.Tensor) -> Images:
    def chosen(part: torch.Tensor) -> torch.Tensor:
        return part[mask.to(part.device)]

    names = tuple(itertools.compress(images.names, mask.tolist()))
    teacher = None if images.teacher is None else chosen(images.teacher)
    groups = None if images.groups is None else chosen(images.groups)
    return replace(
        images, x=chosen(images.x), y=chosen(images.y), names=names, teacher=teacher, groups=groups
    )


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
