"""Videos with sentences: PHOENIX's layout, CTC in proxies, word errors as the score, a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kwsearch import data, examples, labelled_data, proxy, sign_data
from kwsearch.data import DataError, Videos
from kwsearch.data import videos as videos_of
from kwsearch.optimize import PlanStudy
from kwsearch.recipe import Proxy, parse_recipe
from kwsearch.run_directory import SearchError
from tests.kwsearch.sign_net import small
from tests.kwsearch.test_architecture_study import Inline, Quiet

pytest.importorskip("PIL", reason="pillow is not installed")
GLOSSES = ("HEUTE", "REGEN", "SONNE")
SENTENCES = {
    "train": ["HEUTE", "REGEN SONNE", "SONNE", "HEUTE REGEN", "SONNE HEUTE", "REGEN", "HEUTE SONNE",
              "REGEN HEUTE", "SONNE REGEN", "HEUTE HEUTE"],
    "dev": ["HEUTE"],
    "test": ["REGEN HEUTE", "SONNE WIND"],
}  # fmt: skip


def frame(gloss: str, number: int) -> np.ndarray:
    """A bright bar, whose place is the gloss, that moves."""
    image = np.full((20, 16, 3), 40, np.uint8)
    places = {"HEUTE": 2, "REGEN": 9, "SONNE": 15, "WIND": 18}
    image[places[gloss] : places[gloss] + 3, number % 12 : number % 12 + 4] = 230
    return image


def corpus(root: Path, layout: str = "phoenix14") -> Path:
    """14 frames for each gloss and 6 more."""
    from PIL import Image

    (root / "annotations" / "manual").mkdir(parents=True)
    for split, sentences in SENTENCES.items():
        lines = ["id|folder|signer|annotation"]
        name = f"{split}.corpus.csv"
        if layout == "phoenix14t":
            lines = ["name|video|start|end|speaker|orth|translation"]
            name = f"PHOENIX-2014-T.{split}.corpus.csv"
        for number, sentence in enumerate(sentences):
            one = f"01April_2010_{split}-{number}"
            folder = root / "features" / "fullFrame-210x260px" / split / one
            if layout == "phoenix14":
                folder = folder / "1"
                lines.append(f"{one}|{one}/1/*.png|Signer01|{sentence}")
            else:
                lines.append(f"{one}|{one}/1/*.png|-1|-1|Signer01|{sentence}|egal")
            folder.mkdir(parents=True)
            shown = [gloss for gloss in sentence.split() for _ in range(14)]
            shown += [shown[-1]] * 6
            for i, gloss in enumerate(shown):
                Image.fromarray(frame(gloss, i)).save(folder / f"images{i:04}.png")
        path = root / "annotations" / "manual" / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("phoenix") / "p")


def settings_of(root: Path, **changed: Any) -> Proxy:
    return Proxy.model_validate(
        {
            "data": str(root), "epochs": 2, "batch_size": 4, "lr": 0.02, "temperature_epochs": 0,
            "threads": 1, "resolution": 16, "device": "cpu", **changed,
        }
    )  # fmt: skip


def loaded(root: Path, **changed: Any) -> sign_data.SignData:
    return sign_data.load(settings_of(root, **changed), (16, 16), small())


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_broadcasts_are_held_out_whole(seed: int) -> None:
    names = ("monday", "tuesday", "monday", "friday", "sunday", "tuesday", "friday", "sunday")
    frames = tuple((Path(str(i)),) for i in range(8))
    videos = Videos(frames, (("HEUTE",),) * 8, ("HEUTE",), "p", (16, 16), names)
    train, held = videos_of.held_out(videos, 0.25, seed)
    assert (len(train), len(held)) == (6, 2)
    assert len(set(held.broadcasts)) == 1
    assert not set(held.broadcasts) & set(train.broadcasts)
    # In their order, and nothing is lost.
    assert sorted(train.frames + held.frames) == list(frames)
    assert list(train.frames) == sorted(train.frames)


@pytest.mark.parametrize("layout", ["phoenix14", "phoenix14t"])
def test_videos_are_read_in_both_layouts(layout: str, tmp_path: Path) -> None:
    made = corpus(tmp_path / "c", layout)
    videos = data.load_videos(made, "train", (20, 16))
    assert videos.glosses == GLOSSES
    assert [" ".join(one) for one in videos.sentences] == SENTENCES["train"]
    assert videos.lengths == [20, 34, 20, 34, 34, 20, 34, 34, 34, 34]
    clip = videos.clip(1)
    assert clip.shape == (3, 34, 20, 16)
    for i, gloss in ((0, "REGEN"), (13, "REGEN"), (14, "SONNE"), (33, "SONNE")):
        torch.testing.assert_close(clip[:, i], torch.from_numpy(frame(gloss, i)).permute(2, 0, 1))
    assert videos.labels(1) == [2, 3]
    assert videos.words([2, 3]) == ["REGEN", "SONNE"]
    test = data.load_videos(made, "test", (20, 16))
    assert test.glosses == GLOSSES  # of the training part
    with pytest.raises(DataError, match="WIND: no gloss of the training part"):
        test.labels(1)


def test_parts_do_not_overlap_and_depend_on_the_seed_alone(root: Path) -> None:
    videos = data.load_videos(root, "train", (16, 16))

    def names(part: Videos) -> list[str]:
        return [files[0].parent.parent.name for files in part.frames]

    rest, held = data.hold_out_videos(videos, 0.3, seed=0)
    assert (len(rest), len(held)) == (7, 3)
    assert sorted(names(rest) + names(held)) == sorted(names(videos))
    assert names(data.hold_out_videos(videos, 0.3, seed=0)[1]) == names(held)
    assert len(data.thinned(videos, 4, seed=0)) == 4
    assert data.thinned(videos, 99, seed=0) is videos
    assert data.fingerprint_videos(rest) != data.fingerprint_videos(held)


BROKEN = [
    ("annotations/manual/train.corpus.csv", "a|b\n1|2\n", "columns a, b; allowed folder"),
    ("annotations/manual/train.corpus.csv",
     "id|folder|signer|annotation\n1|x/1/*.png|s|A\n", "no frames"),
    ("annotations/manual/train.corpus.csv",
     "id|folder|signer|annotation\n1|../../up/*.png|s|A\n", "a folder outside of"),
    ("annotations/manual/train.corpus.csv",
     "id|folder|signer|annotation\n1|x/1/*.png|s|\n", r"corpus\.csv:2: no folder, or no gloss"),
    ("annotations/manual/more.train.corpus.csv", "", "2 files .*train.corpus.csv; allowed one"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_what_is_no_corpus_is_said(name: str, text: str, message: str, tmp_path: Path) -> None:
    made = corpus(tmp_path / "c")
    (made / name).write_text(text)
    with pytest.raises(DataError, match=message):
        data.load_videos(made, "train", (16, 16))


def test_names_and_folders_without_videos_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KWSEARCH_DATA", str(tmp_path))
    with pytest.raises(DataError, match="phoenix14: not found on this machine; looked in "):
        data.load_videos("phoenix14", "train", (16, 16))
    with pytest.raises(DataError, match="no videos with sentences; looked for annotations"):
        data.load_videos(tmp_path, "train", (16, 16))
    with pytest.raises(DataError, match="phoenix14: videos, for networks of videos"):
        data.load("phoenix14")
    corpus(tmp_path / "phoenix2014")
    assert data.load_videos("phoenix14", "test", (16, 16)).name == "phoenix14"


# Examples -----------------------------------------------------------------------------------------


def test_a_part_is_padded_after_each_end(root: Path) -> None:
    found = loaded(root).moved(torch.device("cpu"))
    lengths = found.train.lengths
    short, long = lengths.index(20), lengths.index(34)
    part = found.part(found.train, [short, long])
    assert part.x.shape == (2, 3, 34, 16, 16)
    assert part.lengths.tolist() == [20, 34]
    assert not part.x[0, :, 20:].any()
    assert part.targets[0, 1:].tolist() == [0]
    assert part.target_lengths.tolist() == [1, 2]
    pixels = found.train.clip(short).float() / 255
    expected = (pixels - found.mean) / found.std
    torch.testing.assert_close(part.x[0, :, :20], expected)


def test_without_taps_the_loss_is_ctc(root: Path) -> None:
    torch.manual_seed(0)
    model = small().eval()
    found = loaded(root, taps={}).moved(torch.device("cpu"))
    part = found.part(found.train, [0, 1, 2])
    logits = model(part.x, part.lengths)
    rows = model.output_lengths(part.lengths)
    expected = F.ctc_loss(
        logits.log_softmax(-1), part.targets, rows, part.target_lengths, reduction="none"
    ).mean()
    torch.testing.assert_close(found.loss(model, part, settings_of(root)), expected)


def test_the_score_is_one_less_the_word_error_rate(root: Path) -> None:
    class Says(nn.Module):
        """REGEN for every video."""

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            logits = torch.zeros(5, len(x), 4)
            logits[:, :, 0] = 1
            logits[2, :, 2] = 2
            return logits

        @staticmethod
        def output_lengths(lengths: Tensor) -> Tensor:
            return torch.full_like(lengths, 5)

    found = loaded(root)
    tested = sign_data.load_test(settings_of(root), (16, 16), found)
    # REGEN HEUTE: one deletion; SONNE WIND: a substitution and a deletion; of 4 words.
    assert tested.score(Says(), 2) == pytest.approx(1 - 3 / 4)


def test_videos_that_are_too_short_for_their_sentence_are_left_out(root: Path) -> None:
    videos = data.load_videos(root, "train", (16, 16))
    kept = sign_data._long_enough(videos, small())
    # (20 - 16) // 4 + 1 = 2 rows of logits for one gloss, 5 for two or for two equal ones.
    assert len(kept) == len(videos)

    class Narrow:
        @staticmethod
        def output_lengths(lengths: Tensor) -> Tensor:
            return lengths // 17  # 1 for 20 frames, 2 for 34

    kept = sign_data._long_enough(videos, Narrow())
    assert [" ".join(one) for one in kept.sentences] == SENTENCES["train"][:-1]


def test_a_video_that_is_too_short_for_the_network_says_nothing(tmp_path: Path) -> None:
    made = corpus(tmp_path / "c")
    for folder in ("train-4", "test-0"):
        (one,) = (made / "features").glob(f"*/*/*{folder}/1")
        for path in sorted(one.iterdir())[7:]:
            path.unlink()
    found = loaded(made)
    assert len(found.train) + len(found.valid) == 9
    assert found.notes == ("1 of 10 videos are left out: too short for their sentences",)
    tested = sign_data.load_test(settings_of(made), (16, 16), found)

    class Reads(nn.Module):
        """Says what there is, of the videos that it is given."""

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            assert lengths.tolist() == [34]
            logits = torch.zeros(4, 1, 4)
            logits[[0, 1], 0, [3, 1]] = 9  # SONNE HEUTE
            logits[[2, 3], 0, 0] = 9
            return logits

        @staticmethod
        def output_lengths(lengths: Tensor) -> Tensor:
            return (lengths - 16) // 4 + 1 if len(lengths) == 2 else torch.tensor([4])

    # REGEN HEUTE has two deletions, SONNE WIND a substitution, of four words.
    assert tested.score(Reads(), 8) == pytest.approx(1 - 3 / 4)


def test_the_largest_frames_are_taken(tmp_path: Path) -> None:
    made = corpus(tmp_path / "c")
    (made / "features" / "fullFrame-112x112px").mkdir()
    assert data.load_videos(made, "train", (20, 16)).lengths[0] == 20


def test_what_videos_have_not_and_need_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("augment", "shift"), ("mixup", 0.3), ("fold", 2), ("teacher", "t.npz")):
        with pytest.raises(DataError, match=f"proxy.{name} {value}: not for videos"):
            loaded(root, **{name: value})
    made = corpus(tmp_path / "c")
    path = made / "annotations" / "manual" / "train.corpus.csv"
    text = path.read_text()
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(data.load_videos(made, "train", (4, 4))) == 10
    path.write_bytes(text.replace("SONNE", "K\xd6LN").encode("latin-1"))
    with pytest.raises(DataError, match=r"train\.corpus\.csv: not UTF-8"):
        data.load_videos(made, "train", (4, 4))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"jiwer, which is not installed: pip install 'kwsearch\["):
        loaded(root)


def test_taps_and_networks_that_are_none_are_said(root: Path) -> None:
    with pytest.raises(DataError, match=r"proxy\.taps: layer9: no tap; allowed layer1, layer2"):
        loaded(root, taps={"layer9": {}})
    with pytest.raises(DataError, match="Linear has no features, output_lengths, classifier"):
        sign_data.load(settings_of(root), (16, 16), nn.Linear(2, 2))


# Training -----------------------------------------------------------------------------------------


def trained(
    root: Path, path: Path | None, until: int | None = None, **changed: Any
) -> tuple[list[float], dict[str, Tensor]]:
    seen: list[float] = []
    kept: list[dict[str, Tensor]] = []
    settings = settings_of(root, **{"epochs": 3, "taps": TAPS, **changed})
    proxy.train(
        small,
        None,
        sign_data.load(settings, (16, 16), small()),
        settings,
        0,
        lambda epoch, score: seen.append(score),
        until=until,
        checkpoint=path,
        done=lambda model: kept.append({k: v.clone() for k, v in model.state_dict().items()}),
    )
    return seen, kept[0]


TAPS = {"conv1d": {"distillation": 1}, "layer4": {"weight": 0.5, "final_weight": 0.1}}


@pytest.mark.usefixtures("one_thread")
def test_a_training_that_stops_at_an_epoch_is_the_one_that_does_not(
    root: Path, tmp_path: Path
) -> None:
    whole, weights = trained(root, tmp_path / "whole")
    state = torch.load(tmp_path / "whole", weights_only=True)
    assert any("layer4" in name for name in state["criterion"])
    first, _ = trained(root, tmp_path / "cut", until=1)
    rest, same = trained(root, tmp_path / "cut")
    assert first + rest == whole
    for name, tensor in weights.items():
        assert torch.equal(tensor, same[name]), name


@pytest.mark.usefixtures("one_thread")
def test_what_a_tap_learns_through_is_trained(root: Path, tmp_path: Path) -> None:
    trained(root, tmp_path / "one", until=1)
    trained(root, tmp_path / "two", until=2)
    one, two = (
        torch.load(tmp_path / name, weights_only=True)["criterion"] for name in ("one", "two")
    )
    assert not torch.equal(one["projections.layer4.weight"], two["projections.layer4.weight"])
    # Three epochs are the beginning, the middle and the end.
    assert (float(one["progress"]), float(two["progress"])) == (0, 0.5)


@pytest.mark.slow  # minutes
@pytest.mark.usefixtures("one_thread")
def test_it_learns_to_read(root: Path) -> None:
    seen, _ = trained(root, None, epochs=60, lr=0.05, holdout=0.3)
    assert max(seen) > 0.5


# A search -----------------------------------------------------------------------------------------

SEARCH = """
format: 1
model: {{name: "tests.kwsearch.sign_net:small", num_classes: 4}}
input: [3, 40, 16, 16]
budget: {{ratio: 1}}
search: {{trials: 3, pruner: none, finalists: 1, seeds: 1}}
proxy: {{data: {data}, epochs: 1, batch_size: 4, lr: 0.02, temperature_epochs: 0, threads: 1}}
"""


def study(root: Path, directory: Path, *overrides: str) -> PlanStudy:
    recipe = parse_recipe(SEARCH.format(data=root), overrides=overrides)
    return PlanStudy(recipe, directory, resume=False, watcher=Quiet(), trust=True)


def test_a_search_trains_on_videos_and_scores_by_word_errors(root: Path, tmp_path: Path) -> None:
    result = study(root, tmp_path / "run").run(Inline())
    assert all(trial.state.name == "COMPLETE" for trial in result.trials)
    for trial in result.trials:
        assert trial.values[0] == trial.intermediate_values[1]
        # Whole errors over the words of two videos of one or two.
        errors = [(1 - trial.values[0]) * words for words in (2, 3, 4)]
        assert any(abs(error - round(error)) < 1e-9 for error in errors)
    found = result.budgets[0].finals
    assert found is not None
    assert found.split == "test"
    lock = (tmp_path / "run" / "recipe.lock.yaml").read_text()
    assert f"held_out: {result.held_out}" in lock
    assert result.held_out == 2


def test_a_dry_run_says_what_a_search_of_videos_takes(root: Path, tmp_path: Path) -> None:
    forecast = study(root, tmp_path / "run").forecast()
    assert forecast.train_images == 8
    assert forecast.step_s > 0


REFUSED = [
    (("search.zero_cost=synflow",), SearchError, "search.zero_cost: scores of untrained networks"),
    (("model.num_classes=3",), SearchError, "has 4 classes, the model 3"),
    (("proxy.data=digits",), DataError, "digits: no videos with sentences"),
]


@pytest.mark.parametrize(("overrides", "error", "message"), REFUSED)
def test_what_cannot_be_searched_is_said(
    root: Path, tmp_path: Path, overrides: tuple[str, ...], error: type[Exception], message: str
) -> None:
    if "zero_cost" in overrides[0]:
        overrides += ("search.pruner=halving",)
    with pytest.raises(error, match=message):
        study(root, tmp_path / "run", *overrides).run(Inline())


def test_examples_are_by_the_input(root: Path) -> None:
    recipe = parse_recipe(SEARCH.format(data=root))
    assert recipe.proxy is not None
    found = examples.load(recipe, recipe.proxy, trust=True)
    assert isinstance(found, sign_data.SignData)
    assert examples.fingerprint(found) == data.fingerprint_videos(found.train)
    digits = parse_recipe("format: 1\nmodel: resnet20\ninput: [1, 8, 8]\nbudget: {ratio: 1}\n")
    assert isinstance(examples.load(digits, Proxy()), labelled_data.LabelledData)
