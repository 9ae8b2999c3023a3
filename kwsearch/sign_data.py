"""Videos with sentences as a proxy's examples: CTC with `kwlayers.sr_ctc`, scored by word errors.

The network is one of the zoo's for sign language, or one that has `features`, `output_lengths` and
`classifier` as `kwsearch.zoo.sign.SignNet` has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwlayers.convert import prepare_
from kwlayers.dcac import DCAC
from kwlayers.sr_ctc import SRCTCLoss, Tap
from kwsearch import data
from kwsearch.data import DataError, Videos
from kwsearch.recipe import Proxy
from kwsearch.wer import greedy_decode, need, word_errors

NEEDS = ("features", "output_lengths", "classifier", "tap_widths")
# Of a proxy, what is of examples with a label each.
_UNUSED = ("augment", "mixup", "teacher", "fold")
# Videos and frames of each that mean and deviation are of; batches of one that are looked at.
_VIDEOS, _FRAMES, _LOOKED_AT = 64, 8, 10


class SignPart(NamedTuple):
    """x: (B, 3, T, H, W), zeros after each video's end. lengths: (B,) of frames. targets: (B, L), 0
    after each sentence's end. target_lengths: (B,)
    """

    x: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor


@dataclass(frozen=True)
class SignData:
    """mean, std: (3, 1, 1, 1) of frames from 0 to 1. taps: those of the loss, by name. features:
    what the classifier takes. notes: what a user should know. supervision: the loss of one
    training, None before `moved`.
    """

    train: Videos
    valid: Videos
    mean: Tensor
    std: Tensor
    taps: tuple[tuple[str, Tap], ...]
    features: int
    device: torch.device
    notes: tuple[str, ...] = ()
    supervision: SRCTCLoss | None = None

    @property
    def channels(self) -> int:
        """Of the input."""
        return len(self.mean)

    def steps(self, proxy: Proxy) -> int:
        return -(-len(self.train) // proxy.batch_size)

    def batches(
        self, proxy: Proxy, order: torch.Generator, splits: int
    ) -> Iterator[list[tuple[SignPart, float]]]:
        shuffled = torch.randperm(len(self.train), generator=order).tolist()
        for start in range(0, len(shuffled), proxy.batch_size):
            numbers = shuffled[start : start + proxy.batch_size]
            size = -(-len(numbers) // splits)
            parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
            yield [(self.part(self.train, part), len(part) / len(numbers)) for part in parts]

    def part(self, videos: Videos, numbers: list[int]) -> SignPart:
        """Some videos as one batch."""
        x, lengths = self._padded(videos, numbers)
        labels = [torch.tensor(videos.labels(number)) for number in numbers]
        return SignPart(
            x,
            lengths,
            nn.utils.rnn.pad_sequence(labels, batch_first=True).to(self.device),
            torch.tensor([len(one) for one in labels]),
        )

    def loss(self, model: Any, part: SignPart, proxy: Proxy) -> Tensor:
        assert self.supervision is not None
        found = model.features(part.x, part.lengths, [name for name, _ in self.taps])
        loss: Tensor = self.supervision(
            found.logits,
            found.lengths,
            found.taps,
            found.tap_lengths,
            model.classifier,
            part.targets,
            part.target_lengths,
        ).total
        return loss

    @torch.no_grad()
    def score(self, model: Any, batch_size: int) -> float:
        """1 less the word error rate of greedy decoding; below 0 where most is insertions. Of a
        video that is too short for the network nothing is said.
        """
        model.eval()
        said: list[list[str]] = [[] for _ in range(len(self.valid))]
        rows = model.output_lengths(torch.tensor(self.valid.lengths)).tolist()
        known = [number for number, count in enumerate(rows) if count >= 1]
        for start in range(0, len(known), batch_size):
            numbers = known[start : start + batch_size]
            x, lengths = self._padded(self.valid, numbers)
            logits = model(x, lengths)
            paths = greedy_decode(logits, model.output_lengths(lengths))
            for number, path in zip(numbers, paths, strict=True):
                said[number] = self.train.words(path)
        return 1 - word_errors(self.valid.sentences, said).rate

    def prepare(self, model: nn.Module, proxy: Proxy) -> None:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(min(_LOOKED_AT, len(self.train))):
                part = self.part(self.train, [number])
                yield part.x, part.targets

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            frames = torch.tensor([len(logits)])
            counts = torch.tensor([targets.shape[1]])
            return F.ctc_loss(logits.log_softmax(-1), targets, frames, counts)

        prepare_(model, batches(), loss)

    def criterion(self) -> SRCTCLoss:
        assert self.supervision is not None
        return self.supervision

    def progress(self, share: float) -> None:
        self.criterion().set_progress_(share)

    def moved(self, device: torch.device) -> SignData:
        loss = SRCTCLoss(dict(self.taps), self.features).to(device)
        return replace(self, device=device, supervision=loss)

    def _padded(self, videos: Videos, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Some videos, normalised, with zeros after each one's end, and their lengths."""
        clips = [(videos.clip(n).float() / 255 - self.mean) / self.std for n in numbers]
        lengths = [clip.shape[1] for clip in clips]
        padded = [F.pad(clip, (0, 0, 0, 0, 0, max(lengths) - clip.shape[1])) for clip in clips]
        return torch.stack(padded).to(self.device), torch.tensor(lengths)


def load(proxy: Proxy, size: tuple[int, int], model: Any) -> SignData:
    """The proxy's videos with frames of that size, part of the training videos held out.

    model: the network, on any device, for the widths of its taps and the frames that it needs.
    Raises DataError.
    """
    try:
        need()
    except ValueError as error:
        raise DataError(str(error)) from None
    strangers = [
        f"proxy.{name} {value}"
        for name, value in proxy.model_dump(include=set(_UNUSED)).items()
        if value != Proxy.model_fields[name].default
    ]
    if strangers:
        raise DataError(f"{', '.join(strangers)}: not for videos with sentences; leave it out")
    missing = [name for name in NEEDS if not hasattr(model, name)]
    if missing:
        raise DataError(
            f"{type(model).__name__} has no {', '.join(missing)}: videos with sentences are for "
            "sign_resnet18 and sign_resnet34, or networks with what those have"
        )
    found = data.load_videos(proxy.data, "train", size)
    videos = _long_enough(found, model)
    notes: tuple[str, ...] = ()
    if short := len(found) - len(videos):
        notes = (f"{short} of {len(found)} videos are left out: too short for their sentences",)
    if proxy.subset is not None:
        videos = data.thinned(videos, proxy.subset, seed=0)
    train, valid = data.hold_out_videos(videos, proxy.holdout, seed=0)
    taps = {
        name: Tap(model.tap_widths[name], tap.weight, tap.final_weight, tap.distillation)
        for name, tap in proxy.taps.items()
        if name in model.tap_widths
    }
    if unknown := sorted(set(proxy.taps) - set(taps)):
        raise DataError(
            f"proxy.taps: {', '.join(unknown)}: no tap; allowed {', '.join(model.tap_widths)}"
        )
    if set(taps) - {"conv1d"} or any(isinstance(part, DCAC) for part in model.modules()):
        notes += (
            "DCAC, and taps below conv1d, are our reconstruction of DESign (arXiv 2507.03339), "
            "which has no public code",
        )
    features = model.classifier.weight.shape[0]
    mean, std = _statistics(train)
    device = torch.device("cpu")
    return SignData(train, valid, mean, std, tuple(taps.items()), features, device, notes)


def load_test(proxy: Proxy, size: tuple[int, int], examples: SignData) -> SignData:
    """`examples` with the test videos to score on. Raises DataError where there are none."""
    return replace(examples, valid=data.load_videos(proxy.data, "test", size))


def _long_enough(videos: Videos, model: Any) -> Videos:
    """Those with as many rows of logits as their sentences need: one a gloss, and a blank between
    equal neighbours.
    """
    rows = model.output_lengths(torch.tensor(videos.lengths)).tolist()
    kept = []
    for number, sentence in enumerate(videos.sentences):
        twice = sum(a == b for a, b in itertools.pairwise(sentence))
        if rows[number] >= max(len(sentence) + twice, 1):
            kept.append(number)
    if not kept:
        raise DataError(
            f"{videos.name}: no video has enough frames for its sentence: the network makes "
            f"{max(rows)} rows of logits at most"
        )
    return videos if len(kept) == len(videos) else videos.chosen(kept)


def _statistics(videos: Videos) -> tuple[Tensor, Tensor]:
    some = []
    for number in range(min(_VIDEOS, len(videos))):
        clip = videos.clip(number)
        step = max(clip.shape[1] // _FRAMES, 1)
        some.append(clip[:, ::step].flatten(1))
    pixels = torch.cat(some, 1).float() / 255
    mean, std = pixels.mean(1), pixels.std(1).clamp(min=1e-3)
    return mean[:, None, None, None], std[:, None, None, None]
