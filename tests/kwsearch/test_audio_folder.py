"""Folders of sound: read from files made by hand, every kind of damage one clear error."""

from __future__ import annotations

import math
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kwsearch import data, labelled_data, proxy, zoo
from kwsearch.data import Clips, DataError, audio_folder, mel_cache
from kwsearch.data.audio_folder import find, read_clip
from kwsearch.data.mel import SILENCE, LogMel
from kwsearch.recipe import Proxy

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
soxr = pytest.importorskip("soxr", reason="soxr is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("mels")
    monkeypatch.setattr(mel_cache, "CACHE", folder)
    return folder


HEADER = "filename,fold,target,category,esc10,src_file,take\n"


def tone(hertz: float, seconds: float = 0.1, rate: int = 32_000) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    samples: np.ndarray = 0.5 * np.sin(2 * math.pi * hertz * t)
    return samples


def wav(path: Path, samples: np.ndarray, rate: int = 32_000) -> Path:
    """16-bit PCM, by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples * 32_767).astype("<i2").tobytes())
    return path


def esc50(root: Path, rows: list[tuple[str, int, int, str]]) -> Path:
    """Clip i is a tone of 1000 (target + 1) Hz."""
    for name, _, target, _ in rows:
        wav(root / "audio" / name, tone(1_000 * (target + 1)))
    table(root, *(f"{name},{fold},{target},{category}" for name, fold, target, category in rows))
    return root


def table(root: Path, *lines: str, header: str = HEADER) -> Path:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    path = root / "meta" / "esc50.csv"
    path.write_text(header + "".join(f"{line},False,1,A\n" for line in lines))
    return path


# As published, the table is not in the order of the targets.
ROWS = [
    ("1-1-A-2.wav", 1, 2, "rain"),
    ("1-2-A-0.wav", 1, 0, "dog"),
    ("2-3-A-1.wav", 2, 1, "rooster"),
    ("3-4-A-0.wav", 3, 0, "dog"),
]


def folders(root: Path, **splits: dict[str, int]) -> Path:
    """Split -> class -> how many clips; those of the class at i are tones of 1000 (i + 1) Hz."""
    for split, classes in splits.items():
        for i, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                wav(root / split / name / f"{number}.wav", tone(1_000 * (i + 1)))
    return root


def loudest(clip: torch.Tensor) -> float:
    """The frequency of the loudest of 128 bands, in Hz."""
    step = 1127 * math.log(1 + 15_000 / 700) / 129
    band = int(clip[0, :, 2:8].float().mean(dim=1).argmax())
    return 700 * (math.exp((band + 1) * step / 1127) - 1)


def refused(source: Path, *said: str, split: Any = "train", **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        data.load(source, split, **options)
    for words in said:
        assert words in str(caught.value)


# --- clips -----------------------------------------------------------------------------------


def test_a_clip_is_padded_with_zeros_or_cut_at_its_end(tmp_path: Path) -> None:
    ramp = np.arange(10) / 16
    path = wav(tmp_path / "ramp.wav", ramp)
    short, long = read_clip(path, 4), read_clip(path, 13)
    assert (short.shape, long.shape, short.dtype) == ((4,), (13,), torch.float32)
    assert torch.allclose(short, torch.tensor([0, 1, 2, 3]) / 16, atol=1e-4)
    assert torch.allclose(long[9], torch.tensor(9 / 16), atol=1e-4)
    assert not long[10:].any()


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.wav", [[0.5, 0.25], [-0.5, 0.0]], 32_000, subtype="FLOAT")
    assert read_clip(tmp_path / "two.wav", 2).tolist() == [0.375, -0.25]


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_brought_to_32_khz(tmp_path: Path, rate: int) -> None:
    path = wav(tmp_path / "tone.wav", tone(1_000, 0.5, rate), rate)
    x = read_clip(path, 16_000)
    inner = slice(2_000, -2_000)
    assert np.abs(x.numpy() - tone(1_000, 0.5))[inner].max() < 1e-3


@pytest.mark.parametrize("ending", ["flac", "ogg", "WAV"])
def test_other_endings_are_read(tmp_path: Path, ending: str) -> None:
    folders(tmp_path, train={"a": 1}, test={"a": 1})
    for split in ("train", "test"):
        (tmp_path / split / "a" / "0.wav").unlink()
        soundfile.write(tmp_path / split / "a" / f"0.{ending}", tone(2_000), 32_000)
    assert loudest(data.load(tmp_path, size=(128, 10)).x[0]) == pytest.approx(2_000, rel=0.02)


# --- ESC-50 ----------------------------------------------------------------------------------


def test_esc50_is_split_by_folds(tmp_path: Path) -> None:
    root = esc50(tmp_path / "ESC-50", ROWS)
    train, test = data.load(root), data.load(root, "test")
    assert (train.y.tolist(), test.y.tolist()) == ([1, 0], [2, 0])
    assert data.load(root, "test", fold=3).y.tolist() == [0]
    assert data.load(root, fold=3).y.tolist() == [2, 0, 1]
    assert isinstance(train, Clips)
    assert (train.name, train.num_classes, train.classes) == (
        "ESC-50",
        3,
        ("dog", "rooster", "rain"),
    )
    assert (train.x.shape, train.x.dtype) == ((2, 1, 128, 500), torch.float16)
    found = find(root, "test")
    assert (found.names, found.samples) == (("1-1-A-2.wav", "1-2-A-0.wav"), 160_000)


def test_clips_are_the_log_mels_of_their_files(tmp_path: Path) -> None:
    root = esc50(tmp_path, ROWS)
    got = data.load(root, "test", size=(64, 10))
    waves = torch.stack([read_clip(root / "audio" / name, 3_200) for name, *_ in ROWS[:2]])
    expected = LogMel(64).eval()(waves)
    assert got.x.shape == (2, 1, 64, 10)
    # A float16 has 11 bits, and the values are below 4.
    assert (got.x.float() - expected).abs().max() < 2**-10 + 1e-5
    train = data.load(root, fold=2)
    assert [round(loudest(x), -3) for x in train.x] == [3_000, 1_000, 1_000]


def test_classes_have_names_only_if_all_have_one(tmp_path: Path) -> None:
    root = esc50(tmp_path, [ROWS[0], ROWS[2]])
    got = data.load(root, size=(8, 10))
    assert (got.num_classes, got.classes) == (3, ())


def test_a_table_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    root = esc50(tmp_path, ROWS)
    path = root / "meta" / "esc50.csv"
    path.write_text("\ufeff" + path.read_text(), "utf-8")
    assert len(find(root, "train")) == 2


@pytest.mark.parametrize(
    ("lines", "header", "said"),
    [
        ([], HEADER, "no clips; allowed filename, fold, target, category, one line for each"),
        (["a.wav,1,0,dog"], "filename,target,category\n", "no column fold"),
        ([], "", "no column filename, fold, target, category"),
        (["a.wav,1,0,dog", "b.wav,one,0,dog"], HEADER, ":3: filename 'b.wav', fold 'one', "),
        (["a.wav,1,-1,dog"], HEADER, "target '-1'; allowed a name, and whole numbers from 0"),
        ([",1,0,dog"], HEADER, "filename ''"),
        (["a.wav,2"], HEADER, "target 'False'"),
        (['"a.wav,1,0,dog'], HEADER, "not a table of comma-separated text"),
        ([f"{i}.wav,2,0,dog" for i in range(7)], HEADER, "no fold 1; allowed 2"),
        (["a.wav,1,0,dog"], HEADER, "fold 1 is all there is, which leaves no clip for train"),
        ([f"{i}.wav,{i},0,dog" for i in range(7)], HEADER, "2.wav, 3.wav, 4.wav, … (7 in all) of"),
        (["a.wav,1,0,dog", "b.wav,2,0,dog"], HEADER, "try unpacking the archive again"),
    ],
)
def test_a_damaged_table_is_refused(
    tmp_path: Path, lines: list[str], header: str, said: str
) -> None:
    path = table(tmp_path, *lines, header=header)
    refused(tmp_path, said, str(path))


def test_a_table_of_other_bytes_is_refused(tmp_path: Path) -> None:
    table(tmp_path).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "esc50.csv: not a table of comma-separated text")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    esc50(tmp_path, ROWS)
    (tmp_path / "meta" / "esc50.csv").unlink()
    refused(tmp_path, f"{tmp_path / 'meta' / 'esc50.csv'}: missing, beside", "looked for meta/esc")


def test_a_fold_that_is_not_there_is_refused(tmp_path: Path) -> None:
    esc50(tmp_path, ROWS)
    refused(tmp_path, "esc50.csv: no fold 6; allowed 1, 2, 3", fold=6)


# --- class folders ---------------------------------------------------------------------------


def test_class_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    folders(tmp_path / "mine", train={"b": 2, "a": 1}, test={"b": 1})
    (tmp_path / "mine" / "train" / "a" / "notes.txt").write_text("not sound")
    (tmp_path / "mine" / "train" / "b" / ".hidden.wav").write_text("nor this")
    (tmp_path / "mine" / "train" / "c.txt").write_text("nor a class")
    train = data.load(tmp_path / "mine", size=(128, 10))
    test = data.load(tmp_path / "mine", "test", size=(128, 10))
    assert (train.y.tolist(), test.y.tolist()) == ([0, 1, 1], [1])
    assert [round(loudest(x), -3) for x in train.x] == [2_000, 1_000, 1_000]
    assert (test.num_classes, test.classes, test.name) == (2, ("a", "b"), "mine")
    found = find(tmp_path / "mine", "train")
    assert found.names == ("a/0.wav", "b/0.wav", "b/1.wav")
    assert found.samples == 320_000


@pytest.mark.parametrize(
    ("splits", "split", "said"),
    [
        ({"train": {"a": 1}}, "test", "no test part; looked for"),
        ({"train": {"a": 1}, "test": {"b": 1}}, "test", "class b is not among the 1 classes of"),
        ({"train": {"a": 1, "b": 0}}, "train", "no sound in class folder b; allowed .flac, .ogg"),
        ({"train": {"a": 1}, "test": {}}, "test", "no sound in any class folder"),
    ],
)
def test_class_folders_that_do_not_fit_are_refused(
    tmp_path: Path, splits: dict[str, dict[str, int]], split: str, said: str
) -> None:
    folders(tmp_path, **splits)
    for name in splits:
        (tmp_path / name).mkdir(exist_ok=True)
    refused(tmp_path, said, split=split)


def test_only_esc50_has_folds(tmp_path: Path) -> None:
    folders(tmp_path, train={"a": 1}, test={"a": 1})
    refused(tmp_path, "fold 1 of train/ and test/; only meta/esc50.csv has folds", fold=1)
    with pytest.raises(DataError, match="digits: fold 1 of images; only ESC-50's sound has folds"):
        data.load("digits", fold=1)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"<html>", b"RIFF\0\0\0\0WAVE"])
def test_files_that_are_no_sound_are_refused(tmp_path: Path, content: bytes) -> None:
    root = esc50(tmp_path, ROWS)
    (root / "audio" / "2-3-A-1.wav").write_bytes(content)
    refused(root, "2-3-A-1.wav: cannot be read as sound", "try another copy, or delete it")


def test_no_samples_and_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty.wav: no samples; try another copy"):
        read_clip(wav(tmp_path / "empty.wav", np.zeros(0)), 10)
    soundfile.write(tmp_path / "nan.wav", [0.0, math.nan], 32_000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"nan.wav: samples that are not finite"):
        read_clip(tmp_path / "nan.wav", 1)


@pytest.mark.parametrize(("package", "rate"), [("soundfile", 32_000), ("soxr", 8_000)])
def test_a_missing_package_is_named_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, rate: int
) -> None:
    path = wav(tmp_path / "tone.wav", tone(1_000, rate=rate), rate)
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"tone.wav: reading sound needs {package}, .* try pip install 'kwsearch\[audio\]'"
    with pytest.raises(DataError, match=said):
        read_clip(path, 100)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 1e-5])
def test_clips_of_no_length_are_refused(tmp_path: Path, seconds: float) -> None:
    esc50(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"clips of .* seconds; allowed a sample at 32,000 Hz"):
        find(tmp_path, "train", seconds=seconds)


def test_sizes_that_no_log_mel_has_are_refused(tmp_path: Path) -> None:
    esc50(tmp_path, ROWS)
    refused(tmp_path, "513 mel bands; allowed 1 to 512", size=(513, 10))
    refused(tmp_path, "a clip of 320 samples; allowed 514 or more, 2 frames", size=(128, 1))


def test_more_than_memory_takes_is_refused_and_read_lazily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clips of 128x500 float16 are 256,000 bytes."""
    root = esc50(tmp_path, ROWS)
    monkeypatch.setattr(audio_folder, "_MAX_BYTES", 255_999)
    refused(
        root, "2 log-mels of 128x500 take 0.000256 GB", "try fewer frames, or audio_folder.find"
    )
    monkeypatch.setattr(audio_folder, "_MAX_BYTES", 256_000)
    assert data.load(root).x.nbytes == 256_000
    files = find(root, "train", seconds=0.1)
    loader: Any = torch.utils.data.DataLoader(files, batch_size=2)  # type: ignore[arg-type]
    ((waves, labels),) = loader
    assert (waves.shape, labels.tolist()) == ((2, 3_200), [1, 0])
    # Sixteen bits round to 1.5e-5.
    assert np.abs(waves[0].numpy() - tone(2_000)).max() < 4e-5


# --- with the rest of kwsearch.data ----------------------------------------------------------


def test_clips_are_held_out_thinned_and_told_apart_as_images_are(tmp_path: Path) -> None:
    folders(tmp_path, train={"a": 4, "b": 4}, test={"a": 1})
    clips = data.load(tmp_path, size=(8, 10))
    train, held_out = data.split_holdout(clips, 0.25, seed=0)
    assert (type(train), len(train), held_out.y.tolist()) == (Clips, 6, [0, 1])
    assert data.subset(clips, 4, seed=0).y.tolist() == [0, 0, 1, 1]
    assert data.fingerprint(train) != data.fingerprint(held_out)
    with pytest.raises(DataError, match="log-mels cannot be resized, try loading them at that"):
        data.resize(clips, (8, 8))


def test_folders_of_images_stay_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    wav(tmp_path / "train" / "b" / "0.wav", tone(1_000))  # one that strayed
    assert data.load(tmp_path).x.shape == (2, 3, 4, 4)


def test_a_folder_of_nothing_says_where_sound_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    refused(tmp_path, "meta/esc50.csv and audio/*.wav (ESC-50), {train,test}/<class>/*.wav")


# Kept on disk


def test_log_mels_are_made_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = esc50(tmp_path / "esc", ROWS)
    first = audio_folder.read(root, "train", (16, 10))
    assert len(list(cache.glob("*.pt"))) == 1
    with monkeypatch.context() as closed:
        closed.setattr(audio_folder, "read_clip", None)
        assert torch.equal(audio_folder.read(root, "train", (16, 10)).x, first.x)
        with pytest.raises(TypeError):  # another part, and another size, are not there
            audio_folder.read(root, "test", (16, 10))
        with pytest.raises(TypeError):
            audio_folder.read(root, "train", (16, 12))
    (file,) = cache.glob("*.pt")
    file.write_bytes(b"half")
    assert torch.equal(audio_folder.read(root, "train", (16, 10)).x, first.x)


def test_a_clip_that_changes_is_read_again(tmp_path: Path) -> None:
    root = esc50(tmp_path / "esc", ROWS)
    first = audio_folder.read(root, "train", (16, 10)).x
    for name, *_ in ROWS:
        wav(root / "audio" / name, tone(5_000, 0.2))
    assert not torch.equal(audio_folder.read(root, "train", (16, 10)).x, first)


def test_where_nothing_can_be_kept_log_mels_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mel_cache, "CACHE", tmp_path / "file" / "folder")
    root = esc50(tmp_path / "esc", ROWS)
    assert audio_folder.read(root, "train", (16, 10)).x.isfinite().all()


# Training on it


def proxy_of(root: Path, **settings: Any) -> Proxy:
    return Proxy(data=str(root), epochs=2, batch_size=4, threads=1, **settings)


def many(root: Path) -> Path:
    """Two classes of ten clips in five folds."""
    rows = [(f"{i}.wav", 1 + i % 5, i // 10, "AB"[i // 10]) for i in range(20)]
    return esc50(root, rows)


def test_a_proxy_trains_on_the_log_mels_as_they_are(tmp_path: Path) -> None:
    root = many(tmp_path)
    images = labelled_data.load(proxy_of(root, fold=2), (1, 16, 10))
    assert len(images.train) + len(images.valid) == 16
    batch = images.batch(images.train.x[:3])
    assert torch.equal(batch, images.train.x[:3].float())
    tested = labelled_data.load_test(proxy_of(root, fold=2), images)
    assert tested.valid.names == ("1.wav", "6.wav", "11.wav", "16.wav")

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return zoo.create("mn01", num_classes=2, width=0.5)

    accuracies: list[float] = []
    settings = proxy_of(root, augment="shift", lr=0.01)
    proxy.train(make, None, images, settings, 0, lambda _, value: accuracies.append(value))
    assert len(accuracies) == 2


def test_shifting_moves_sound_in_time_only_and_fills_up_with_silence() -> None:
    x = torch.zeros(1, 1, 8, 16, dtype=torch.float16)
    x[..., 3, 8] = 1
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        moved = labelled_data.augment(x, "shift", generator, Clips)
        ((*_, band, frame),) = (moved == 1).nonzero().tolist()
        seen.add((band, frame))
        assert set(moved.unique().tolist()) <= {0.0, 1.0, torch.tensor(SILENCE).half().item()}
    assert {band for band, _ in seen} == {3}
    assert {frame for _, frame in seen} == {6, 7, 8, 9, 10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 32}, "proxy.resolution 32: of images; .* is sound"),
        ({"augment": "flip"}, "proxy.augment flip: it would turn time around"),
        ({"fold": 7}, "no fold 7; allowed 1, 2, 3, 4, 5"),
    ],
)
def test_settings_of_images_are_refused_for_sound(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        labelled_data.load(proxy_of(many(tmp_path), **settings), (1, 16, 10))


def test_a_fold_of_images_is_refused() -> None:
    with pytest.raises(DataError, match="fold 2 of images"):
        labelled_data.load(Proxy(data="digits", fold=2), (1, 8, 8))


def test_a_teacher_s_logits_stay_with_their_clips(tmp_path: Path) -> None:
    root = many(tmp_path / "esc")
    rows = torch.arange(20.0)
    file = tmp_path / "teacher.npz"
    np.savez(
        file,
        names=[f"{i}.wav" for i in reversed(range(20))],
        logits=torch.stack([rows, -rows], 1).flip(0).numpy(),
    )
    images = labelled_data.load(proxy_of(root, teacher=str(file), subset=9), (1, 16, 10))
    for part in (images.train, images.valid):
        assert part.teacher is not None
        assert [f"{int(row[0])}.wav" for row in part.teacher] == list(part.names)

    def trained(**settings: Any) -> torch.nn.Module:
        found: list[torch.nn.Module] = []

        def make() -> torch.nn.Module:
            torch.manual_seed(0)
            return zoo.create("mn01", num_classes=2, width=0.5)

        chosen = proxy_of(root, teacher=str(file), **settings)
        own = labelled_data.load(chosen, (1, 16, 10))
        proxy.train(make, None, own, chosen, 0, lambda *_: None, done=found.append)
        return found[0]

    # Another weight of the teacher trains another network.
    first, second = (next(trained(teacher_weight=w).parameters()) for w in (0.1, 1.0))
    assert not torch.allclose(first, second)


def test_a_teacher_of_a_named_data_set_is_told_by_index(tmp_path: Path) -> None:
    train = data.load("digits", "train")
    file = tmp_path / "teacher.npz"
    logits = torch.eye(10)[train.y].numpy()
    np.savez(file, names=np.arange(len(train)), logits=logits)
    images = labelled_data.load(Proxy(data="digits", teacher=str(file), subset=100), (1, 8, 8))
    assert images.train.teacher is not None
    assert torch.equal(images.train.teacher.argmax(1), images.train.y)
