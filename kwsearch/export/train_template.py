#!/usr/bin/env python3
# <head>
"""The script that `kwsearch export --to train.py` writes, around a small network of its own.

The exporter puts a recipe's title, literals and network in place of the parts between
`# <name>` and `# </name>`; all else is written out as it stands here.
"""
# </head>

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.util
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import kwlayers

# <recipe>
INPUT = (1, 8, 8)  # channels, height, width
CLASSES = 10
DEFAULTS: dict[str, Any] = {
    "data": None,
    "epochs": 3,
    "warmup_epochs": 0.15,
    "start": "published",
    "temperature_epochs": 1,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 0.05,
    "weight_decay": 0.0005,
    "momentum": 0.9,
    "label_smoothing": 0.0,
    "augment": "auto",
    "threads": 0,
}
GROUPS: list[dict[str, Any]] = [
    {"name": "all", "cell": [8, 8, 1, 1], "num_cells": 9, "ratio": 1.0, "layers": ["2"]},
]
# </recipe>


# <model>
def make_model() -> nn.Module:
    """The static network. x: (B, *INPUT)  out: (B, CLASSES)"""
    return nn.Sequential(
        nn.Conv2d(INPUT[0], 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


# </model>


class UserError(ValueError):
    """What the user can mend: one line, exit code 2."""


class Unwritable(OSError):
    """A checkpoint that cannot be written: exit code 1."""


class Diverged(ArithmeticError):
    """The loss became infinite or not a number."""


# Options


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    spread = ("warmup_epochs", "temperature_epochs")  # their default is a part of --epochs
    part = {name: f"{DEFAULTS[name]:g} of {DEFAULTS['epochs']}" for name in spread}
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data PATH [options]",
        description=f"{(__doc__ or '').split(chr(10))[0]} Images: {LOOKED_FOR}.",
        epilog="Exit codes: 0 done, 1 diverged or disk full, 2 asked wrongly, 130 interrupted (see "
        "--resume).",
    )
    parser.set_defaults(**{**DEFAULTS, **dict.fromkeys(spread)})

    add = parser.add_argument
    add("--data", type=Path, required=DEFAULTS["data"] is None, help="folder of the images")
    add("--out", type=Path, help="folder for checkpoint.pt and log.csv [runs/train, runs/static]")
    add("--resume", action="store_true", help="go on from --out's checkpoint, if there is one")
    add("--static", action="store_true", help="train the static network instead, the same way")
    add("--weights", type=Path, help="start from them: of the static network, or of this one")
    add("--seed", type=int, default=0, help="of weights, order and augmentation [0]")

    add = parser.add_argument_group("images").add_argument
    add("--resolution", type=int, help=f"their side [{INPUT[1]}x{INPUT[2]}]")
    add("--subset", type=int, help="so many training images, the same for every seed [all]")
    add(
        "--augment",
        choices=("auto", "none", "shift", "flip", "crop"),
        help="shift by an eighth; flip is that and mirrored; crop is a random part, resized and "
        "mirrored, of image files; auto is crop for files, shift for others [%(default)s]",
    )
    add("--mixup", type=float, default=0.0, help="its alpha, a share for each batch; 0 is off [0]")
    add("--workers", type=int, default=4, help="processes that read image files [4]")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="[%(default)s]")
    add("--warmup-epochs", type=float, help=f"of rising learning rate [{part[spread[0]]}]")
    add(
        "--start",
        choices=("published", "static"),
        help="of the plan's network without --weights: published is random attention and a falling "
        "temperature; static computes what the untrained static network does, at temperature 0, "
        "which trains better for few epochs [%(default)s]",
    )
    add(
        "--temperature-epochs",
        type=float,
        help="of falling temperature, where it starts as published; inf keeps it at 1, which "
        f"kwsearch export --to static needs [{part[spread[1]]}]",
    )
    add("--batch-size", type=int, help="images a step, over all processes [%(default)s]")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd is Nesterov's [%(default)s]")
    add("--lr", type=float, help="peak of the learning rate [%(default)s]")
    add("--momentum", type=float, help="of sgd [%(default)s]")
    add("--weight-decay", type=float, help="[%(default)s]")
    add("--label-smoothing", type=float, help="[%(default)s]")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, tested, too; 0 is off")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--channels-last", action="store_true", help="memory format of images and kernels")
    add("--compile", action="store_true", help="torch.compile")
    add("--threads", type=int, help="of the CPU; 0 is torch's own [%(default)s]")
    add("--tensorboard", action="store_true", help="log for it to --out, too")

    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/static" if args.static else "runs/train")
    for name in spread:
        if getattr(args, name) is None:
            setattr(args, name, args.epochs * DEFAULTS[name] / DEFAULTS["epochs"])
    allowed: dict[str, tuple[float, float]] = {
        **dict.fromkeys(("seed", "workers", "threads", "mixup", "lr", "weight_decay"), (0, 1e9)),
        **dict.fromkeys(("epochs", "subset", "batch_size", "resolution"), (1, 1e9)),
        **dict.fromkeys(("momentum", "label_smoothing", "ema"), (0, 1)),
        **dict.fromkeys(spread, (0, args.epochs)),
    }
    endless = {"temperature_epochs": math.inf}
    for name, (least, most) in allowed.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most and value != endless.get(name):
            limit = f"at least {least}" if most == 1e9 else f"{least} to {most}"
            limit += ", or inf" * (name in endless)
            parser.error(f"--{name.replace('_', '-')} {value:g}: allowed is {limit}")
    return args


# Images

LOOKED_FOR = (
    "{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz] (MNIST's format); data_batch_1.bin … "
    "test_batch.bin (CIFAR-10) or {train,test}.bin (CIFAR-100), binary version; "
    "train/CLASS/*.jpg, … and val/ or test/ (image folder)"
)
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """x: (N, c, h, w) bytes, or N image files  y: (N,) whole numbers below `classes`"""

    x: Tensor | list[Path]
    y: Tensor
    classes: int

    def chosen(self, index: Tensor) -> Images:
        if isinstance(self.x, Tensor):
            return Images(self.x[index], self.y[index], self.classes)
        return Images([self.x[i] for i in index.tolist()], self.y[index], self.classes)


def find_images(folder: Path, part: str) -> Images:
    """The images of `part`, "train" or "test"."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder; looked for {LOOKED_FOR}")
    for read in (read_idx_files, read_cifar, read_image_folder):
        images = read(folder, part)
        if images is not None:
            return images
    if (folder / "data_batch_1").is_file() or (folder / "meta").is_file():
        raise UserError(
            f"--data {folder}: CIFAR as pickles, which can run code; try the binary version of "
            "https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    raise UserError(f"--data {folder}: no {part} images there; looked for {LOOKED_FOR}")


def read_idx_files(folder: Path, part: str) -> Images | None:
    """MNIST's format: http://yann.lecun.com/exdb/mnist/."""
    stem = "train" if part == "train" else "t10k"
    found = []
    for what, dims in (("images", 3), ("labels", 1)):
        names = [f"{stem}-{what}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
        paths = [folder / name for name in names if (folder / name).is_file()]
        if not paths:
            return None
        found.append(read_idx(paths[0], dims))
    x, y = found
    if len(x) != len(y):
        raise UserError(f"--data {folder}: {len(x)} {part} images but {len(y)} labels")
    return Images(x[:, None], y.long(), int(y.max()) + 1)


def read_idx(path: Path, dims: int) -> Tensor:
    """0, 0, 8, the number of dimensions, each as a big-endian integer, then the bytes."""
    content, head = path.read_bytes(), 4 + 4 * dims
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged ({error}); try another copy of it") from None
    if content[:4] == bytes([0, 0, 8, dims]) and len(content) > head:
        shape = struct.unpack(f">{dims}I", content[4:head])
        if len(content) == head + math.prod(shape):
            return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=head).view(shape)
    raise UserError(f"{path}: not {dims}-dimensional bytes in MNIST's format, or cut off")


def read_cifar(folder: Path, part: str) -> Images | None:
    """The binary version: records of the label (CIFAR-100: coarse, fine) and 3x32x32 bytes."""
    ten = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    for names, classes, head in ((ten, 10, 1), ([f"{part}.bin"], 100, 2)):
        paths = [folder / name for name in names]
        if not any(path.is_file() for path in paths):
            continue
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UserError(f"--data {folder}: {', '.join(missing)} missing")
        content = bytearray(b"".join(path.read_bytes() for path in paths))
        if not content or len(content) % (head + 3072):
            raise UserError(f"--data {folder}: {', '.join(names)} not in records of {head + 3072}")
        records = torch.frombuffer(content, dtype=torch.uint8).view(-1, head + 3072)
        x, y = records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1].long()
        return Images(x, y, max(classes, int(y.max()) + 1))
    return None


def read_image_folder(folder: Path, part: str) -> Images | None:
    """train/CLASS/ and val/CLASS/ or test/CLASS/, with images at any depth."""
    places = [folder / name for name in ((part,) if part == "train" else ("val", "test"))]
    place = next((place for place in places if place.is_dir()), None)
    if place is None or not (folder / "train").is_dir():
        return None
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"--data {folder}: reading image files needs pillow: pip install pillow")
    classes, here = (
        sorted(p.name for p in where.iterdir() if p.is_dir() and not p.name.startswith("."))
        for where in (folder / "train", place)
    )
    if strange := sorted(set(here) - set(classes)):
        raise UserError(f"{place}: class {strange[0]!r} is not among those of {folder / 'train'}")
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = sorted(p for p in (place / name).rglob("*") if p.suffix.lower() in ENDINGS)
        files += of_class
        labels += [label] * len(of_class)
    return Images(files, torch.tensor(labels), len(classes)) if files else None


class Files(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Image files as bytes (C, H, W): a random part of each, or the middle."""

    def __init__(self, images: Images, size: tuple[int, int, int], random: bool, part: float):
        self.images, self.size, self.random, self.part = images, size, random, part

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        channels, height, width = self.size
        path = self.images.x[index]
        assert isinstance(path, Path)
        try:
            with Image.open(path) as file:
                image = file.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # a damaged image raises anything
            raise UserError(f"{path}: cannot be read as an image ({error})") from None
        box = self.box(image.width, image.height, width / height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return x.view(height, width, channels).permute(2, 0, 1), self.images.y[index]

    def box(self, width: int, height: int, shape: float) -> tuple[float, float, float, float]:
        """Left, top, right, bottom. Random: 8 to 100 % of the area, 3:4 to 4:3 (timm, ImageNet)."""
        for _ in range(10 if self.random else 0):
            area, ratio, x, y = torch.rand(4).tolist()
            area = width * height * (0.08 + 0.92 * area)
            ratio = shape * (4 / 3) ** (2 * ratio - 1)
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = x * (width - w), y * (height - h)
                return left, top, left + w, top + h
        h = self.part * min(height, width / shape)
        left, top = (width - h * shape) / 2, (height - h) / 2
        return left, top, left + h * shape, top + h


def prepared(images: Images, size: tuple[int, int, int], device: torch.device) -> Images:
    """Images in memory on the device, resized by antialiased bilinear interpolation.

    1,024 at a time, since that goes through floats.
    """
    assert isinstance(images.x, Tensor)
    x = torch.empty(*images.x.shape[:2], *size[1:], dtype=torch.uint8)
    for part, out in zip(torch.split(images.x, 1024), torch.split(x, 1024), strict=True):
        exact = F.interpolate(part.float(), size[1:], mode="bilinear", antialias=True)
        out.copy_(exact.round_().clamp_(0, 255))
    return Images(x.to(device), images.y.to(device), images.classes)


class Data:
    """Both parts, and batches of them: normalised (B, C, H, W) and labels, on the device."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        side = args.resolution
        self.args, self.device = args, device
        self.size = INPUT if side is None else (INPUT[0], side, side)
        self.train, self.test = (find_images(args.data, part) for part in ("train", "test"))
        in_memory = isinstance(self.train.x, Tensor)
        self.augment = args.augment
        if args.augment == "auto":
            self.augment = "shift" if in_memory else "crop"
        self.check()
        if args.subset:
            order = torch.randperm(len(self.train.y), generator=torch.Generator().manual_seed(0))
            self.train = self.train.chosen(order[: args.subset])
        if in_memory:
            self.train, self.test = (
                prepared(images, self.size, device) for images in (self.train, self.test)
            )
        self.mean, self.std = self.statistics()

    def check(self) -> None:
        x, count, batch = self.train.x, len(self.train.y), self.args.batch_size
        # Image files become grey or RGB, as the network takes them.
        channels = x.shape[1] if isinstance(x, Tensor) else 1 if INPUT[0] == 1 else 3
        classes = max(self.train.classes, self.test.classes)
        used = self.args.subset or count
        problem = ""
        if self.train.classes != CLASSES or classes != CLASSES:
            problem = (
                f"{classes} classes, the network has {CLASSES} (model.num_classes of its recipe)"
            )
        elif channels not in (1, INPUT[0]):
            problem = f"images of {channels} channels, the network takes {INPUT[0]}"
        elif self.augment == "crop" and isinstance(x, Tensor):
            problem = "--augment crop is for image files; try flip"
        elif used > count:
            problem = f"--subset {used}, but there are {count} training images"
        elif batch > used:
            problem = f"--batch-size {batch}, but there are {used} training images"
        if problem:
            raise UserError(f"--data {self.args.data}: {problem}")

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training images' channels, of 1,024 of them if in files."""
        index = torch.randperm(len(self.train.y), generator=torch.Generator().manual_seed(0))
        if not isinstance(self.train.x, Tensor):
            index = index[:1024]
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x, _ in self.raw(self.train, torch.split(index, 1024)):
            x = x.double().cpu() / 255
            count += x[:, 0].numel()
            total, squares = total + x.sum((0, 2, 3)), squares + x.square().sum((0, 2, 3))
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-6).sqrt()
        return tuple(v.float().view(1, -1, 1, 1).to(self.device) for v in (mean, std))  # type: ignore

    def raw(
        self, images: Images, steps: Iterable[Tensor], random: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes and labels of each step's images."""
        if isinstance(images.x, Tensor):
            for index in steps:
                there = index.to(self.device)
                yield images.x[there], images.y[there]
            return
        loader = torch.utils.data.DataLoader(
            Files(images, self.size, random, 0.875 if self.augment == "crop" else 1.0),
            batch_sampler=[index.tolist() for index in steps],
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
        )
        for x, y in loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def batches(
        self, images: Images, steps: Iterable[Tensor], training: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.raw(images, steps, training and self.augment == "crop"):
            if training and self.augment in ("shift", "flip"):
                x = shifted(x)
            if training and self.augment in ("flip", "crop"):
                mirrored = (torch.rand(len(x)) < 0.5).to(x.device)
                x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
            x = ((x.float() / 255 - self.mean) / self.std).expand(-1, INPUT[0], -1, -1)
            yield (x.contiguous(memory_format=memory_format(self.args)), y)


def shifted(x: Tensor) -> Tensor:
    """x: (B, C, H, W), each image moved by up to an eighth of its side, zeros coming in."""
    batch, channels, height, width = x.shape
    reach = max(min(height, width) // 8, 1)
    top, left = torch.randint(0, 2 * reach + 1, (2, batch, 1)).to(x.device)
    rows, columns = (
        start + torch.arange(n, device=x.device) for start, n in ((top, height), (left, width))
    )
    b = torch.arange(batch, device=x.device)[:, None, None, None]
    c = torch.arange(channels, device=x.device)[None, :, None, None]
    return F.pad(x, (reach,) * 4)[b, c, rows[:, None, :, None], columns[:, None, None, :]]


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


# Training


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Of step 0 to steps - 1: linear over the first `warmup`, then half a cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Moving average of weights and norm statistics; whole numbers are the latest."""

    def update(average: Tensor, current: Tensor, _: Any) -> Tensor:
        return average.lerp(current, 1 - decay) if average.is_floating_point() else current

    return AveragedModel(model, avg_fn=update, use_buffers=True)


def make_network(args: argparse.Namespace, size: tuple[int, int, int]) -> nn.Module:
    """The static network, or that converted by the plan, with --weights if they are given."""
    model = make_model()
    kwlayers.trace(model, size)  # says so if the network cannot take it
    weights = weights_in(read_file(args.weights), args.weights) if args.weights else {}
    if problem := not_finite(weights):
        raise UserError(f"{args.weights}: {problem}")
    # What only dynamic layers have.
    dynamic = tuple(f"{layer}." for group in GROUPS for layer in group["layers"])
    static_names = model.state_dict().keys()
    converted = any(n.startswith(dynamic) and n not in static_names for n in weights)
    if weights and not converted:
        load_weights(model, weights, args.weights)
    if not args.static:
        plan = kwlayers.Plan.from_groups(kwlayers.trace(model, INPUT), GROUPS)
        static = args.start == "static" or bool(weights)
        kwlayers.convert_(model, plan, warm_start=static and not converted)
    if converted:
        load_weights(model, weights, args.weights, strict=True)
    return model


def read_file(path: Path) -> Any:
    """What torch.save wrote, as far as it is data: code does not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: it depends on what the file is
        reason = getattr(error, "strerror", None) or (
            "torch.save did not write it, or there is more than weights and numbers in it; "
            "looked for is the training script's checkpoint or torch.save(model.state_dict(), …)"
        )
        raise UserError(f"{path}: cannot be read: {reason}") from None


def weights_in(state: Any, path: Path) -> dict[str, Tensor]:
    """state: of a checkpoint of this script or a like one, or a state_dict by itself."""
    for part in ("model", "state_dict"):
        if isinstance(state, dict):
            state = state.get(part, state)
    found = state if isinstance(state, dict) else {}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: has no weights; a state_dict is looked for")
    parallel = all(str(name).startswith("module.") for name in found)
    return {str(name).removeprefix("module." * parallel): v for name, v in found.items()}


def not_finite(weights: dict[str, Tensor]) -> str:
    names = [name for name, value in weights.items() if not value.isfinite().all()]
    return f"not all numbers are finite, see {', '.join(names[:3])}" if names else ""


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: Path, strict: bool = False
) -> None:
    """All weights into the model. Not strict: a last layer for other classes stays as it is."""
    own = model.state_dict()
    last = [*model.named_parameters()][-1][0].rpartition(".")[0] + "."
    other = [name for name in own.keys() & weights if own[name].shape != weights[name].shape]
    spared = [] if strict else [name for name in other if name.startswith(last)]
    if own.keys() != weights.keys() or other != spared:
        names = sorted(own.keys() ^ weights.keys()) + sorted(other)
        raise UserError(f"{path}: of another network or plan, see {', '.join(names[:3])}")
    model.load_state_dict({**weights, **{name: own[name] for name in other}})
    if other:
        print(f"{last[:-1]}: for other classes, not from {path}", file=sys.stderr)


class Run:
    """A training and all that changes from epoch to epoch.

    Each epoch draws its order, augmentation and dropout from a seed of its own, so that a
    resumed run is the uninterrupted one.
    """

    def __init__(self, args: argparse.Namespace, data: Data, rank: int, world: int) -> None:
        self.args, self.data, self.rank, self.world = args, data, rank, world
        torch.manual_seed(args.seed)
        model: Any = make_network(args, data.size)
        self.model: nn.Module = model.to(data.device, memory_format=memory_format(args))
        self.steps_per_epoch = len(data.train.y) // args.batch_size
        self.rows: list[dict[str, float | None]] = []  # of the log, one per epoch
        held = getattr(model, "kw_warehouses", None)
        self.temperature = None
        # Others have theirs.
        if held is not None and not args.weights and args.start == "published":
            self.temperature = kwlayers.TemperatureSchedule(
                model, args.temperature_epochs, self.steps_per_epoch
            )
        # Weights of a converted network have it behind them.
        if held is not None and (not args.weights or held.warm_start is not None):
            seen = data.batches(data.train, self.order()[:10], training=False)
            kwlayers.prepare_(model, seen, nn.functional.cross_entropy)
        self.net: Any = torch.compile(self.model) if args.compile else self.model
        self.parallel: Any = (
            nn.parallel.DistributedDataParallel(self.net) if world > 1 else self.net
        )
        groups = kwlayers.parameter_groups(self.model, args.weight_decay)
        self.optimizer: torch.optim.Optimizer
        if args.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, lr=args.lr, momentum=args.momentum, nesterov=args.momentum > 0
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=args.lr)
        self.ema = averaged(self.model, args.ema) if args.ema else None
        self.steps = args.epochs * self.steps_per_epoch
        self.step = 0

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.rows)

    def order(self) -> list[Tensor]:
        """This process's images of each step: every world-th of the step's, for all the same."""
        generator = torch.Generator().manual_seed(self.seed(0))
        order = torch.randperm(len(self.data.train.y), generator=generator)
        batch = self.args.batch_size
        steps = torch.split(order[: self.steps_per_epoch * batch], batch)
        return [index[self.rank :: self.world] for index in steps]

    def seed(self, use: int) -> int:
        return int(self.args.seed * 10_000 + self.epoch) * 10_000 + use

    def autocast(self) -> Any:
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.args.amp)

    def train_epoch(self) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of images, as augmented. Raises Diverged."""
        args = self.args
        torch.manual_seed(self.seed(1 + self.rank))
        self.parallel.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.data.device)
        said = time.monotonic()
        for x, y in self.data.batches(self.data.train, self.order(), training=True):
            rate = learning_rate(
                self.step, self.steps, round(args.warmup_epochs * self.steps_per_epoch), args.lr
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if self.temperature is not None:
                self.temperature.step()
            share, other = 1.0, y
            if args.mixup:
                share = float(torch.distributions.Beta(args.mixup, args.mixup).sample())
                partner = torch.randperm(len(y)).to(y.device)
                x, other = share * x + (1 - share) * x[partner], y[partner]
            with self.autocast():
                logits = self.parallel(x)
            loss = share * self.loss(logits, y)
            if share < 1:
                loss = loss + (1 - share) * self.loss(logits, other)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            self.optimizer.step()
            self.step += 1
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            with torch.no_grad():
                guess = logits.argmax(1)
                right = share * (guess == y).sum() + (1 - share) * (guess == other).sum()
                sums += torch.stack([loss.detach() * len(y), right, right.new_tensor(len(y))])
            if self.rank == 0 and time.monotonic() - said > 30:
                said = time.monotonic()
                done = self.step - self.epoch * self.steps_per_epoch
                print(
                    f"epoch {self.epoch + 1}: step {done}/{self.steps_per_epoch}, "
                    f"loss {float(sums[0] / sums[2]):.4f}",
                    file=sys.stderr,
                    flush=True,
                )
        mean_loss, accuracy, images = self.means(sums)
        if not math.isfinite(mean_loss):
            raise Diverged(f"the loss became {mean_loss} in epoch {self.epoch + 1}; lower --lr")
        return mean_loss, accuracy, images

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y, label_smoothing=self.args.label_smoothing)

    def means(self, sums: Tensor) -> tuple[float, float, int]:
        """Loss, accuracy and number of images over all processes, from their sums."""
        if self.world > 1:
            dist.all_reduce(sums)
        loss, right, count = sums.tolist()
        return loss / count, right / count, int(count)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        model.eval()
        if self.world > 1:  # each process has seen other images: the first one's norms count
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        mine = torch.arange(len(self.data.test.y))[self.rank :: self.world]
        sums = torch.zeros(3, dtype=torch.float64, device=self.data.device)
        steps = torch.split(mine, self.args.batch_size // self.world) if len(mine) else ()
        for x, y in self.data.batches(self.data.test, steps, training=False):
            with self.autocast():
                logits = model(x).float()
            loss = F.cross_entropy(logits, y, reduction="sum")
            right = (logits.argmax(1) == y).sum()
            sums += torch.stack([loss, right, right.new_tensor(len(y))])
        return self.means(sums)[:2]

    def run_epoch(self) -> dict[str, float | None]:
        """Train and test once; the log's row."""
        start = time.monotonic()
        train_loss, train_accuracy, images = self.train_epoch()
        test_loss, test_accuracy = self.evaluate(self.net)
        temperature = None if self.temperature is None else self.temperature.temperature
        ema_accuracy = None
        if self.ema is not None:
            if temperature is not None:
                kwlayers.set_temperature_(self.ema.module, temperature)
            ema_accuracy = self.evaluate(self.ema.module)[1]
        self.rows.append(
            {
                "epoch": self.epoch + 1,
                "step": self.step,
                "images": images,
                "lr": self.optimizer.param_groups[0]["lr"],
                "temperature": temperature,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "ema_accuracy": ema_accuracy,
                "seconds": round(time.monotonic() - start, 3),
            }
        )
        return self.rows[-1]

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        free = {"data", "out", "resume", "workers", "device", "threads", "tensorboard"}
        args = self.args
        given = {name: value for name, value in vars(args).items() if name not in free}
        weights = args.weights and str(args.weights)
        network = [INPUT, CLASSES, GROUPS]
        return {**given, "weights": weights, "augment": self.data.augment, "network": network}

    def save(self) -> None:
        """checkpoint.pt and log.csv, all or nothing."""
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "temperature": None if self.temperature is None else self.temperature.state_dict(),
            "mean": self.data.mean.flatten(),
            "std": self.data.std.flatten(),
            "settings": self.settings,
            "rows": self.rows,
        }
        out = self.args.out
        try:
            torch.save(state, out / "checkpoint.tmp")
            os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")
            with open(out / "log.tmp", "w", newline="") as file:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(out / "log.tmp", out / "log.csv")
        except (OSError, RuntimeError) as error:  # torch.save has an error of its own
            raise Unwritable(
                f"epoch {self.epoch} cannot be written to {out} (is the disk full? "
                f"{' '.join(str(error).split())[:80]}); --resume goes on from what was there"
            ) from error

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        state = read_file(path)
        settings = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(settings, dict):
            raise UserError(f"{path}: not a checkpoint of this script")
        for name, now in self.settings.items():
            if (before := settings.get(name)) != now:
                told = "another network" if name == "network" else f"{name} {before}, now {now}"
                raise UserError(f"{path} is of another training ({told}); try another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows = state["step"], state["rows"]
        if self.temperature is not None:
            self.temperature.load_state_dict(state["temperature"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(self.step)


def train(args: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise UserError(f"{checkpoint} exists: --resume goes on from it, or give another --out")
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {world} processes")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    run = Run(args, Data(args, device), rank, world)
    if checkpoint.exists():
        run.load(checkpoint)
    writer: Any = None
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(args.out)
    say = print if rank == 0 else lambda *_, **__: None
    params = sum(p.numel() for p in run.model.parameters())
    size = "x".join(map(str, run.data.size))
    say(
        f"{'static network' if args.static else 'plan'}: {params:,} parameters; "
        f"{len(run.data.train.y):,} + {len(run.data.test.y):,} images at {size}, "
        f"{run.steps_per_epoch} steps an epoch on {world} x {device.type}"
        + (f", going on after epoch {run.epoch}" if run.epoch else ""),
        flush=True,
    )
    if args.weights and not run.epoch:
        loss, accuracy = run.evaluate(run.net)
        say(f"weights of {args.weights}: test {loss:.4f} {100 * accuracy:.2f} %", flush=True)
    while run.epoch < args.epochs:
        row = run.run_epoch()
        if rank == 0:
            run.save()
        say(line(row, args.epochs), flush=True)
        for name, value in row.items() if writer else ():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, run.epoch)
    if writer:
        writer.close()
    say(f"weights in {checkpoint}, log in {args.out / 'log.csv'}")


def line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"lr {row['lr']:.3g}"]
    if row["temperature"] is not None:
        parts.append(f"temperature {row['temperature']:.2f}")
    for part in ("train", "test"):
        parts.append(f"{part} {row[f'{part}_loss']:.4f} {100 * row[f'{part}_accuracy']:.2f} %")
    if row["ema_accuracy"] is not None:
        parts.append(f"EMA {100 * row['ema_accuracy']:.2f} %")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    try:
        if args.device == "cuda" and not cuda:
            raise UserError("--device cuda: torch finds none; try auto or cpu")
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        train(args, rank, world, device)
        if world > 1:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        kept = (args.out / "checkpoint.pt").exists()
        how = "the same command with --resume goes on" if kept else "no epoch was finished"
        problem, code = f"interrupted: {how}", 130
    except (Diverged, Unwritable) as error:
        problem, code = str(error), 1
    except (UserError, kwlayers.PlanError, OSError) as error:
        # From a worker it comes with a traceback, our words last.
        problem, code = " ".join(str(error).split("UserError: ")[-1].split()), 2
    if rank == 0:
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
