"""SR-CTC: CTC by every alignment, distillation by hand, and what training costs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kwlayers.sr_ctc import SRCTC, NormLinear, SRCTCLoss, Tap, sr_ctc_params

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VOCABULARY, FEATURES = 4, 5


def ctc(logits: Tensor, target: list[int], blank: int) -> float:
    """-log of the sum over every path that collapses to the target. logits: (T, V)"""
    total = 0.0
    log_probs = logits.log_softmax(1).tolist()
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        labels = [label for label, _ in itertools.groupby(path) if label != blank]
        if labels == target:
            total += math.exp(sum(row[label] for row, label in zip(log_probs, path, strict=True)))
    return -math.log(total)


def divergence(student: Tensor, teacher: Tensor, blank: int, temperature: float) -> float:
    """Of one frame. student, teacher: (V,)"""
    labels = [label for label in range(len(teacher)) if label != blank]
    p = torch.softmax(teacher[labels] / temperature, 0)
    q = torch.softmax(student[labels] / temperature, 0)
    return float((p * (p / q).log()).sum()) * temperature**2


class Batch:
    """Two sequences of 5 and 3 rows; a tap of the same rows, and one of 4 and 2."""

    def __init__(self, blank: int = 0) -> None:
        torch.manual_seed(0)
        labels = [label for label in range(VOCABULARY) if label != blank]
        self.sequences = [[labels[0], labels[2]], [labels[1]]]
        self.classifier = NormLinear(FEATURES, VOCABULARY, dtype=torch.float64)
        self.rows = torch.randn(5, 2, FEATURES, dtype=torch.float64, requires_grad=True)
        self.lengths = torch.tensor([5, 3])
        self.taps = {
            "even": torch.randn(5, 2, FEATURES, dtype=torch.float64),
            "short": torch.randn(4, 2, 3, dtype=torch.float64),
        }
        self.tap_lengths = {"even": self.lengths, "short": torch.tensor([4, 2])}
        self.targets = torch.tensor([self.sequences[0], [*self.sequences[1], blank]])
        self.target_lengths = torch.tensor([2, 1])

    def loss_of(self, loss: SRCTCLoss, **changes: Any) -> SRCTC:
        given = {
            "logits": self.classifier(self.rows),
            "lengths": self.lengths,
            "taps": self.taps,
            "tap_lengths": self.tap_lengths,
            "classifier": self.classifier,
            "targets": self.targets,
            "target_lengths": self.target_lengths,
        }
        found = loss.double()(**(given | changes))
        assert isinstance(found, SRCTC)
        return found


def loss_for(blank: int = 0, **even: float) -> SRCTCLoss:
    taps = {"even": Tap(FEATURES, **even), "short": Tap(3, 0.5, 0.0)}
    return SRCTCLoss(taps, FEATURES, blank)


# Values


@pytest.mark.parametrize("blank", [0, 2, 3])
def test_each_part_is_the_sum_over_all_alignments_within_its_own_length(blank: int) -> None:
    batch, loss = Batch(blank), loss_for(blank, weight=2.0)
    found = batch.loss_of(loss)
    projection = loss.projections["short"]
    logits = {
        "ctc": (1.0, batch.classifier(batch.rows), batch.lengths),
        "ctc/even": (2.0, batch.classifier(batch.taps["even"]), batch.lengths),
        "ctc/short": (
            0.5,
            batch.classifier(projection(batch.taps["short"])),
            batch.tap_lengths["short"],
        ),
    }
    assert set(found.parts) == set(logits)
    for name, (weight, z, lengths) in logits.items():
        each = [
            ctc(z[:length, b].detach(), batch.sequences[b], blank)
            for b, length in enumerate(lengths.tolist())
        ]
        assert found.parts[name].item() == pytest.approx(weight * sum(each) / 2, rel=1e-10)
    assert found.total.item() == pytest.approx(sum(p.item() for p in found.parts.values()))


@pytest.mark.parametrize("blank", [0, 2, 3])
def test_distillation_is_the_divergence_of_labels_over_valid_frames(blank: int) -> None:
    batch, loss = Batch(blank), loss_for(blank, distillation=10.0)
    found = batch.loss_of(loss)
    student = batch.classifier(batch.taps["even"]).detach()
    teacher = batch.classifier(batch.rows).detach()
    each = [
        divergence(student[t, b], teacher[t, b], blank, 8.0)
        for b, length in enumerate(batch.lengths.tolist())
        for t in range(length)
    ]
    assert len(each) == 8
    expected = 10 * sum(each) / 8
    assert found.parts["kl/even"].item() == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-3


def test_distillation_teaches_the_tap_and_not_the_network() -> None:
    batch, loss = Batch(), loss_for(distillation=1.0)
    batch.taps["even"].requires_grad_()
    batch.loss_of(loss).parts["kl/even"].backward()
    assert batch.rows.grad is None
    assert batch.taps["even"].grad is not None
    assert batch.taps["even"].grad.abs().max() > 0


def test_frames_past_a_length_do_not_matter() -> None:
    batch, loss = Batch(), loss_for(distillation=1.0)
    before = batch.loss_of(loss)
    with torch.no_grad():
        batch.rows[3:, 1] += 1
        batch.taps["even"][3:, 1] += 1
        batch.taps["short"][2:, 1] += 1
    torch.testing.assert_close(batch.loss_of(loss), before, **EXACT)
    with torch.no_grad():
        batch.taps["short"][1, 1] += 1
    assert batch.loss_of(loss).total != before.total


def test_logits_of_half_precision_count_in_single_precision() -> None:
    batch, loss = Batch(), SRCTCLoss({"even": Tap(FEATURES, distillation=1.0)}, FEATURES)
    classifier = batch.classifier.bfloat16()
    batch.rows = batch.rows.detach().bfloat16()
    given: dict[str, Any] = {
        "taps": {"even": batch.taps["even"].bfloat16()},
        "tap_lengths": {"even": batch.lengths},
    }
    found = batch.loss_of(loss, **given)
    given["logits"] = classifier(batch.rows).float()
    exact = batch.loss_of(loss, **given, classifier=lambda x: classifier(x).float())
    assert found.parts["ctc"].dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_targets_in_one_row_are_those_in_columns() -> None:
    batch, loss = Batch(), loss_for()
    flat = torch.tensor([label for row in batch.sequences for label in row])
    torch.testing.assert_close(batch.loss_of(loss, targets=flat), batch.loss_of(loss), **EXACT)


def test_lambdas_are_constant_or_fall_in_a_straight_line_and_are_saved() -> None:
    batch, loss = Batch(), loss_for()
    start = batch.loss_of(loss).parts
    for progress, share in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        parts = batch.loss_of(loss.set_progress_(progress)).parts
        torch.testing.assert_close(parts["ctc/short"], share * start["ctc/short"], **EXACT)
        assert parts["ctc/even"] == start["ctc/even"]
    restored = loss_for()
    restored.load_state_dict(loss.state_dict())
    assert restored.weight("short") == 0
    assert restored.weight("even") == 1


# Parameters


def test_training_costs_the_projections_and_nothing_for_taps_of_the_classifiers_width() -> None:
    loss = SRCTCLoss({"layer3": Tap(256), "layer4": Tap(512), "conv1d": Tap(1024)})
    # 256 * 1024 + 1024 and 512 * 1024 + 1024
    assert sr_ctc_params([256, 512, 1024]) == 263_168 + 525_312
    assert sum(p.numel() for p in loss.parameters()) == 263_168 + 525_312


def test_the_classifier_learns_from_every_tap_and_is_not_the_losss_own() -> None:
    batch, loss = Batch(), loss_for()
    parts = batch.loss_of(loss).parts
    for part in parts.values():
        (gradient,) = torch.autograd.grad(part, batch.classifier.weight, retain_graph=True)
        assert gradient.abs().max() > 0
    assert {name for name, _ in loss.named_parameters()} == {
        "projections.short.weight",
        "projections.short.bias",
    }


def test_a_normalised_classifier_has_unit_columns_whatever_its_scale() -> None:
    torch.manual_seed(0)
    layer = NormLinear(6, 3, dtype=torch.float64)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = torch.stack(
        [x @ column / math.sqrt(sum(w * w for w in column.tolist())) for column in layer.weight.T],
        2,
    )
    torch.testing.assert_close(layer(x), expected, **EXACT)
    with torch.no_grad():
        layer.weight *= torch.tensor([0.1, 1.0, 30.0])
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_its_weights_start_as_vacs_do() -> None:
    torch.manual_seed(0)
    weight = NormLinear(1024, 300).weight.detach()
    bound = math.sqrt(2) * math.sqrt(6 / (1024 + 300))
    assert bound * 0.999 < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


# Wrong input


def test_a_tap_too_short_for_its_target_is_named() -> None:
    batch, loss = Batch(), loss_for()
    lengths = {**batch.tap_lengths, "short": torch.tensor([1, 2])}
    with pytest.raises(
        ValueError, match=r"tap 'short': sequence 0 has 1 frames, its target needs 2 \(one a label"
    ):
        batch.loss_of(loss, tap_lengths=lengths)


def test_equal_neighbours_need_a_blank_between_them() -> None:
    batch, loss = Batch(), loss_for()
    repeated = {"targets": torch.tensor([[1, 3, 3], [2, 0, 0]])}
    enough = torch.tensor([3, 1])
    batch.loss_of(loss, **repeated, target_lengths=enough)
    lengths = {**batch.tap_lengths, "short": torch.tensor([3, 2])}
    with pytest.raises(ValueError, match=r"tap 'short': sequence 0 has 3 frames, .* needs 4"):
        batch.loss_of(loss, **repeated, target_lengths=enough, tap_lengths=lengths)
    with pytest.raises(ValueError, match=r"the network: sequence 1 has 1 frames, .* needs 2"):
        batch.loss_of(
            loss,
            targets=torch.tensor([[1, 3], [2, 3]]),
            target_lengths=torch.tensor([2, 2]),
            lengths=torch.tensor([5, 1]),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([6, 3])}, r"the network: lengths \[6, 3\]: each from 1 to the 5"),
        ({"lengths": torch.tensor([5])}, r"the network: lengths of shape \(1,\)"),
        ({"taps": {}}, r"taps \[\] with lengths of \['even', 'short'\]: this loss is for"),
        ({"logits": torch.zeros(5, 4)}, r"logits of shape \(5, 4\): expected \(T, B, V\)"),
        ({"target_lengths": torch.tensor([2])}, r"target_lengths \[2\]: expected 2 whole"),
        ({"target_lengths": torch.tensor([2, 3])}, r"\(2, 2\) for target_lengths \[2, 3\]"),
        ({"targets": torch.tensor([[1, 0], [2, 0]])}, "targets from 0 to 2: .* not the blank 0"),
        ({"targets": torch.tensor([[1, 4], [2, 0]])}, "targets from 1 to 4: .* 0 to 3"),
        ({"classifier": nn.Linear(5, 7).double()}, "gives 7 classes for tap 'even', .* have 4"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch().loss_of(loss_for(), **changes)


def test_features_of_another_width_are_refused() -> None:
    batch = Batch()
    taps = {**batch.taps, "short": batch.taps["even"]}
    with pytest.raises(ValueError, match=r"tap 'short' of shape \(5, 2, 5\): .* \(T, 2, 3\)"):
        batch.loss_of(loss_for(), taps=taps)


def test_distillation_needs_the_networks_own_frames() -> None:
    loss = SRCTCLoss({"even": Tap(FEATURES), "short": Tap(3, distillation=1.0)}, FEATURES)
    with pytest.raises(ValueError, match=r"tap 'short': 4 frames .* network's own, 5 of \[5, 3\]"):
        Batch().loss_of(loss)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tap 'conv2d.layer4': a name without dots"):
        SRCTCLoss({"conv2d.layer4": Tap(8)})
    with pytest.raises(ValueError, match="tap 'a': width 0: at least 1"):
        SRCTCLoss({"a": Tap(0)})
    with pytest.raises(ValueError, match=r"tap 'a': final_weight -1: at least 0"):
        SRCTCLoss({"a": Tap(8, final_weight=-1)})
    with pytest.raises(ValueError, match=r"features 1024, blank -1, temperature 8.0: at least 1"):
        SRCTCLoss({"a": Tap(8)}, blank=-1)
    with pytest.raises(ValueError, match=r"progress 1.5: it must be in \[0, 1\]"):
        SRCTCLoss({"a": Tap(8)}).set_progress_(1.5)
    with pytest.raises(ValueError, match="out_features 0: at least 1"):
        NormLinear(8, 0)
