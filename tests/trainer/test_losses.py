"""The losses against slow references: plain Python over dense float64 arrays, timm's task, DeiT's formula."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from torch import Tensor, nn

from pipeline.errors import UsageError
from trainer.losses import (
    ClassTarget,
    LossSettings,
    TeacherTarget,
    class_loss,
    cross_entropy,
    distillation_loss,
    hard_distillation_loss,
    soft_distillation_loss,
)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def plain_target(labels: Tensor) -> ClassTarget:
    """Unmixed and labelled."""
    num = len(labels)
    return ClassTarget(labels, torch.ones(num, dtype=torch.bool), torch.arange(num), torch.ones(num))


def mirrored_target(labels: Tensor, lam: float) -> ClassTarget:
    """Mixed as timm's batch mode does: sample i with sample B - 1 - i."""
    num = len(labels)
    return ClassTarget(labels, torch.ones(num, dtype=torch.bool), torch.arange(num).flip(0), torch.full((num,), lam))


def topk_of(prob: Tensor, k: int) -> TeacherTarget:
    top = prob.topk(k, dim=-1)
    return TeacherTarget(prob.argmax(-1), top.indices, top.values.float(), (1 - top.values.sum(-1)).float())


# --- slow references ------------------------------------------------------------------------------------------


def dense_teacher(target: TeacherTarget, num_classes: int, tail: str) -> np.ndarray:
    """The stored label as a dense float64 [B, C], at temperature 1."""
    rows = []
    for index, prob, mass in zip(
        target.topk_index.tolist(), target.topk_prob.double().tolist(), target.tail_mass.double().tolist(), strict=True
    ):
        row = [0.0] * num_classes
        if tail == "spread" and num_classes > len(index):
            row = [max(mass, 0) / (num_classes - len(index))] * num_classes
        for position, value in zip(index, prob, strict=True):
            row[position] = value
        total = math.fsum(row)
        rows.append([value / total for value in row])
    return np.array(rows)


def dense_soft_loss(logits: np.ndarray, teacher: np.ndarray, *, tau: float, reduction: str) -> float:
    total = 0.0
    for z, p in zip(logits.tolist(), teacher.tolist(), strict=True):
        biggest = max(z)
        log_sum = biggest / tau + math.log(math.fsum(math.exp((v - biggest) / tau) for v in z))
        tempered = [v ** (1 / tau) for v in p]
        norm = math.fsum(tempered)
        for v, t in zip(z, tempered, strict=True):
            if t > 0:
                total += (t / norm) * (math.log(t / norm) - (v / tau - log_sum))
    batch, classes = logits.shape
    return tau**2 * total / (batch * classes if reduction == "deit" else batch)


def dense_class_loss(logits: np.ndarray, target: ClassTarget, smoothing: float) -> float:
    batch, classes = logits.shape
    total = 0.0
    for i in range(batch):
        j, lam = int(target.partner[i]), float(target.lam[i])
        if not target.labelled[i] or (lam != 1 and not target.labelled[j]):
            continue
        wanted = [smoothing / classes] * classes
        wanted[int(target.class_label[i])] += (1 - smoothing) * lam
        if lam != 1:
            wanted[int(target.class_label[j])] += (1 - smoothing) * (1 - lam)
        log_sum = math.log(math.fsum(math.exp(v) for v in logits[i]))
        total -= math.fsum(w * (v - log_sum) for w, v in zip(wanted, logits[i].tolist(), strict=True))
    return total / batch


# --- class loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_class_loss_equals_timm_mixup_with_soft_cross_entropy(rng, smoothing, lam):
    logits, labels = torch.randn(6, 11, generator=rng), torch.randint(11, (6,), generator=rng)
    dense = mixup_target(labels, 11, lam=lam, smoothing=smoothing)
    ours = class_loss(logits, mirrored_target(labels, lam), smoothing=smoothing)
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits, dense), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("labelled", "lam", "counted"),
    [
        ([1, 1, 1, 1], [0.3, 0.7, 0.6, 0.4], 4),  # all known
        ([0, 1, 1, 1], [0.3, 0.7, 0.6, 0.4], 2),  # half of an image unknown: neither of the pair counts
        ([0, 1, 1, 1], [1.0, 1.0, 0.6, 0.4], 3),  # the unknown partner has no part of the image
        ([0, 0, 0, 0], [0.3, 0.7, 0.6, 0.4], 0),  # nothing known
        ([1, 0, 0, 1], [1.0, 1.0, 1.0, 1.0], 2),  # unmixed
    ],
)
def test_class_loss_counts_a_sample_only_if_all_of_its_image_is_labelled(rng, labelled, lam, counted):
    logits = torch.randn(4, 9, generator=rng, requires_grad=True)
    known = torch.tensor(labelled, dtype=torch.bool)
    labels = torch.where(known, torch.tensor([3, 8, 0, 5]), torch.tensor([-1, 2**40, -100, 9]))  # garbage if unknown
    target = ClassTarget(labels, known, torch.tensor([1, 0, 3, 2]), torch.tensor(lam))
    loss = class_loss(logits, target, smoothing=0.1)
    assert loss.item() == pytest.approx(dense_class_loss(logits.detach().double().numpy(), target, 0.1), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert int(gradient.abs().sum(dim=1).gt(0).sum()) == counted


def test_class_loss_divides_by_the_whole_batch(rng):
    logits, labels = torch.randn(1, 5, generator=rng), torch.tensor([2])
    one = class_loss(logits, plain_target(labels), smoothing=0.0)
    known = torch.tensor([True, False])
    target = ClassTarget(labels.repeat(2), known, torch.arange(2), torch.ones(2))
    torch.testing.assert_close(class_loss(logits.repeat(2, 1), target, smoothing=0.0), one / 2)


def test_class_loss_gradient_equals_that_of_the_dense_form(rng):
    logits = torch.randn(6, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (6,), generator=rng)
    dense = SoftTargetCrossEntropy()(logits, mixup_target(labels, 11, lam=0.3, smoothing=0.1).double())
    ours = class_loss(logits, mirrored_target(labels, 0.3), smoothing=0.1)
    expected, got = torch.autograd.grad(dense, logits)[0], torch.autograd.grad(ours, logits)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


# --- hard distillation ----------------------------------------------------------------------------------------


def test_hard_loss_equals_a_plain_cross_entropy(rng):
    logits, hard = torch.randn(5, 7, generator=rng), torch.randint(7, (5,), generator=rng)
    rows = logits.double().tolist()
    expected = sum(
        math.log(math.fsum(map(math.exp, z))) - z[h] for z, h in zip(rows, hard.tolist(), strict=True)
    ) / len(rows)
    assert hard_distillation_loss(logits, hard).item() == pytest.approx(expected, abs=1e-6)


# --- soft distillation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["batchmean", "deit"])
@pytest.mark.parametrize("tail", ["spread", "renormalise"])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("k", [1, 10, 999, 1000])
def test_soft_loss_equals_the_dense_construction(rng, tau, tail, reduction, k):
    logits = 3 * torch.randn(4, 1000, generator=rng)
    target = topk_of((4 * torch.randn(4, 1000, generator=rng)).softmax(-1), k)
    ours = soft_distillation_loss(logits, target, tau=tau, tail=tail, reduction=reduction)
    teacher = dense_teacher(target, 1000, tail)
    expected = dense_soft_loss(logits.double().numpy(), teacher, tau=tau, reduction=reduction)
    assert ours.dtype == torch.float32
    # A float32 log-probability near -7 is good to half a millionth, and tau² multiplies that.
    rounding = 1e-6 * tau**2 / (1000 if reduction == "deit" else 1)
    assert ours.item() == pytest.approx(expected, rel=1e-5, abs=rounding)


@pytest.mark.parametrize("tail", ["spread", "renormalise"])
@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_soft_loss_gradient_equals_that_of_the_dense_form(rng, tau, tail):
    target = topk_of(torch.randn(4, 50, generator=rng).softmax(-1), 5)
    logits = torch.randn(4, 50, generator=rng, dtype=torch.float64, requires_grad=True)
    teacher = torch.from_numpy(dense_teacher(target, 50, tail)) ** (1 / tau)
    teacher = teacher / teacher.sum(-1, keepdim=True)
    dense = F.kl_div(F.log_softmax(logits / tau, -1), teacher, reduction="batchmean") * tau**2
    ours = soft_distillation_loss(logits, target, tau=tau, tail=tail, reduction="batchmean")
    expected, got = torch.autograd.grad(dense, logits)[0], torch.autograd.grad(ours, logits)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
def test_soft_loss_of_dense_labels_equals_the_published_code_of_deit(rng, tau):
    student, teacher = torch.randn(6, 20, generator=rng), torch.randn(6, 20, generator=rng)
    s, t = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    published = F.kl_div(s, t, reduction="sum", log_target=True) * (tau * tau) / student.numel()
    target = topk_of(teacher.softmax(-1), 20)
    ours = soft_distillation_loss(student, target, tau=tau, tail="spread", reduction="deit")
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-7)
    by_batch = soft_distillation_loss(student, target, tau=tau, tail="spread", reduction="batchmean")
    torch.testing.assert_close(by_batch, published * 20, rtol=1e-5, atol=1e-7)


def test_with_all_classes_kept_the_tail_policies_agree(rng):
    logits = torch.randn(3, 8, generator=rng)
    full = topk_of(torch.randn(3, 8, generator=rng).softmax(-1), 8)
    # A tail left over by rounding has no class to go to.
    target = TeacherTarget(full.hard, full.topk_index, full.topk_prob, torch.full((3,), 1e-3))
    spread, kept = (
        soft_distillation_loss(logits, target, tau=2.0, tail=tail, reduction="batchmean")
        for tail in ("spread", "renormalise")
    )
    assert torch.equal(spread, kept)


def test_soft_loss_does_not_depend_on_a_shift_of_the_logits_or_on_the_scale_of_the_label(rng):
    logits = torch.randn(3, 30, generator=rng)
    target = topk_of(torch.randn(3, 30, generator=rng).softmax(-1), 4)
    scaled = TeacherTarget(target.hard, target.topk_index, target.topk_prob * 0.97, target.tail_mass * 0.97)
    for tail in ("spread", "renormalise"):
        base = soft_distillation_loss(logits, target, tau=2.0, tail=tail, reduction="batchmean")
        shifted = soft_distillation_loss(logits + 5, target, tau=2.0, tail=tail, reduction="batchmean")
        rescaled = soft_distillation_loss(logits, scaled, tau=2.0, tail=tail, reduction="batchmean")
        torch.testing.assert_close(shifted, base, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rescaled, base, rtol=1e-5, atol=1e-6)


def test_soft_loss_does_not_depend_on_the_order_of_the_kept_classes(rng):
    logits = torch.randn(3, 30, generator=rng)
    target = topk_of(torch.randn(3, 30, generator=rng).softmax(-1), 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = TeacherTarget(target.hard, target.topk_index[:, order], target.topk_prob[:, order], target.tail_mass)
    base, moved = (
        soft_distillation_loss(logits, t, tau=2.0, tail="spread", reduction="batchmean") for t in (target, shuffled)
    )
    torch.testing.assert_close(moved, base, rtol=1e-6, atol=1e-6)


def test_soft_loss_is_zero_where_the_student_is_the_teacher_and_positive_elsewhere(rng):
    logits = torch.randn(3, 12, generator=rng)
    target = topk_of(logits.softmax(-1), 12)
    own = soft_distillation_loss(logits, target, tau=1.0, tail="spread", reduction="batchmean")
    other = soft_distillation_loss(logits.flip(1), target, tau=1.0, tail="spread", reduction="batchmean")
    assert abs(own.item()) < 1e-6 < other.item()


@pytest.mark.parametrize("tail", ["spread", "renormalise"])
@pytest.mark.parametrize("tau", [0.05, 1.0, 10.0])
@pytest.mark.parametrize(
    ("prob", "tail_mass", "scale"),
    [
        ([1.0, 0.0, 0.0], 0.0, 1.0),  # certain teacher: the others underflowed in float16
        ([0.9995, 2.0**-24, 0.0], 0.0005, 1.0),  # smallest float16, and one below it
        ([2e-3, 1e-3, 1e-3], 0.996, 1.0),  # nearly uniform: at a small temperature every power underflows
        ([0.5, 0.3, 0.1], 0.1, 1e4),  # a student sure of one class
        ([0.7, 0.2, 0.1], -1e-4, 1.0),  # 1 minus a sum that was rounded up
    ],
)
def test_extreme_probabilities_give_finite_losses_and_gradients(rng, prob, tail_mass, scale, tau, tail):
    logits = (scale * torch.randn(2, 600, generator=rng)).requires_grad_()
    target = TeacherTarget(
        torch.tensor([4, 4]),
        torch.tensor([[4, 9, 1]] * 2),
        torch.tensor([prob] * 2, dtype=torch.float16).float(),
        torch.tensor([tail_mass] * 2, dtype=torch.float16).float(),
    )
    loss = soft_distillation_loss(logits, target, tau=tau, tail=tail, reduction="batchmean")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_a_certain_teacher_gives_the_hard_loss(rng):
    logits, hard = torch.randn(3, 40, generator=rng), torch.tensor([7, 0, 39])
    index = (hard[:, None] + torch.arange(3)) % 40
    target = TeacherTarget(hard, index, torch.tensor([[1.0, 0.0, 0.0]] * 3), torch.zeros(3))
    soft = soft_distillation_loss(logits, target, tau=1.0, tail="spread", reduction="batchmean")
    torch.testing.assert_close(soft, hard_distillation_loss(logits, hard))


# --- the whole ------------------------------------------------------------------------------------------------


class FixedStudent(nn.Module):
    """Answers stored logits, so that timm's task computes nothing but its losses."""

    num_classes, in_chans = 15, 3
    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # noqa: RUF012

    def __init__(self, class_logits: Tensor, distill_logits: Tensor) -> None:
        super().__init__()
        self.answers = class_logits, distill_logits

    def set_distilled_training(self, enable: bool) -> None:
        assert enable

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.answers


def settings(distillation_type: Any, **changes: Any) -> LossSettings:
    """Equal shares of both losses at temperature 1, unless changed."""
    common: dict[str, Any] = {"alpha": 0.5, "tau": 1.0, "tail": "spread", "reduction": "batchmean", "smoothing": 0.1}
    return LossSettings(distillation_type=distillation_type, **(common | changes))


class FixedTeacher(FixedStudent):
    def forward(self, images: Tensor) -> Tensor:
        return self.answers[0]


@pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("soft", 0.5), ("soft", 1.0), ("soft", 3.0)])
def test_whole_loss_equals_timm_token_distillation_task_with_a_live_teacher(rng, kind, tau):
    class_logits, distill_logits, teacher_logits = torch.randn(3, 6, 15, generator=rng)
    labels = torch.randint(15, (6,), generator=rng)
    task = TokenDistillationTask(
        FixedStudent(class_logits, distill_logits),
        FixedTeacher(teacher_logits, teacher_logits),
        criterion=nn.CrossEntropyLoss(label_smoothing=0.1),
        distill_type=kind,
        task_loss_weight=0.3,
        temperature=tau,
        verbose=False,
    )
    theirs = task(torch.zeros(6, 3, 4, 4), labels)
    loss, parts = distillation_loss(
        class_logits,
        distill_logits,
        plain_target(labels),
        topk_of(teacher_logits.softmax(-1), 15),
        settings(kind, alpha=0.7, tau=tau),
    )
    torch.testing.assert_close(loss, theirs["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["class_loss"], theirs["task_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["distill_loss"], theirs["distill_loss"], rtol=1e-5, atol=1e-6)


def test_without_distillation_the_loss_is_the_class_loss_alone(rng):
    logits, target = torch.randn(4, 6, generator=rng, requires_grad=True), plain_target(torch.tensor([0, 5, 2, 2]))
    loss, parts = distillation_loss(logits, None, target, None, settings("none"))
    assert torch.equal(loss, class_loss(logits, target, smoothing=0.1))
    assert loss.requires_grad
    assert list(parts) == ["class_loss"]
    assert not parts["class_loss"].requires_grad


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_in_the_control_experiment_both_heads_learn_the_mixed_smoothed_class_labels(rng, alpha):
    first, second = torch.randn(2, 4, 6, generator=rng).requires_grad_().unbind()
    labels, lam, partner = [0, 5, 2, 2], [0.3, 0.6, 0.4, 0.7], [3, 2, 1, 0]
    target = ClassTarget(
        torch.tensor(labels), torch.ones(4, dtype=torch.bool), torch.tensor(partner), torch.tensor(lam)
    )
    dense = torch.full((4, 6), 0.1 / 6)
    for row, (label, other, weight) in enumerate(zip(labels, partner, lam, strict=True)):
        dense[row, label] += 0.9 * weight
        dense[row, labels[other]] += 0.9 * (1 - weight)
    control = settings("none", alpha=alpha, second_token="class")
    loss, parts = distillation_loss(first, second, target, None, control)
    one, two = (nn.functional.cross_entropy(logits, dense) for logits in (first, second))
    torch.testing.assert_close(loss, (1 - alpha) * one + alpha * two)
    torch.testing.assert_close([parts["class_loss"], parts["second_class_loss"]], [one.detach(), two.detach()])
    assert list(parts) == ["class_loss", "second_class_loss"]
    assert not any(part.requires_grad for part in parts.values())
    got, expected = (torch.autograd.grad(each, (first, second)) for each in (loss, (1 - alpha) * one + alpha * two))
    torch.testing.assert_close(got, expected)


def test_in_the_control_experiment_unlabelled_images_count_for_neither_head(rng):
    first, second = torch.randn(2, 4, 6, generator=rng)
    target = ClassTarget(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 0, 1]) == 1, torch.arange(4), torch.ones(4))
    loss, _ = distillation_loss(first, second, target, None, settings("none", smoothing=0.0, second_token="class"))
    rows = [
        nn.functional.cross_entropy(logits[row], torch.tensor(c))
        for logits in (first, second)
        for row, c in ((0, 1), (3, 4))
    ]
    torch.testing.assert_close(loss, sum(rows) / 8)


def test_a_student_with_one_head_learns_from_both_on_it(rng):
    logits, target = torch.randn(4, 6, generator=rng), plain_target(torch.tensor([0, 5, 2, 2]))
    teacher = topk_of(torch.randn(4, 6, generator=rng).softmax(-1), 3)
    one, _ = distillation_loss(logits, None, target, teacher, settings("soft"))
    two, _ = distillation_loss(logits, logits, target, teacher, settings("soft"))
    assert torch.equal(one, two)


def test_the_parts_carry_no_gradient_and_the_heads_get_their_own(rng):
    class_logits, distill_logits = torch.randn(2, 4, 6, generator=rng).requires_grad_().unbind()
    target, teacher = plain_target(torch.tensor([0, 5, 2, 2])), topk_of(torch.eye(6)[:4] * 0.5 + 1 / 12, 3)
    loss, parts = distillation_loss(class_logits, distill_logits, target, teacher, settings("soft", alpha=0.25))
    torch.testing.assert_close(loss, 0.75 * parts["class_loss"] + 0.25 * parts["distill_loss"])
    assert not any(part.requires_grad for part in parts.values())
    own = torch.autograd.grad(class_loss(class_logits, target, smoothing=0.1), class_logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, class_logits, retain_graph=True)[0], 0.75 * own)
    soft = soft_distillation_loss(distill_logits, teacher, tau=1.0, tail="spread", reduction="batchmean")
    torch.testing.assert_close(
        torch.autograd.grad(loss, distill_logits)[0], 0.25 * torch.autograd.grad(soft, distill_logits)[0]
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_of_bfloat16_logits_is_that_of_the_same_logits_in_float32(rng, kind):
    logits = (10 * torch.randn(4, 1000, generator=rng)).bfloat16()
    target = mirrored_target(torch.tensor([1, 2, 3, 4]), 0.3)
    teacher = topk_of(torch.randn(4, 1000, generator=rng).softmax(-1), 10)
    plain, _ = distillation_loss(logits.float(), logits.float(), target, teacher, settings(kind))
    for autocast in (True, False):  # without it too: no operation is left to torch's list of float32 ones
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            low, parts = distillation_loss(logits, logits, target, teacher, settings(kind))
        assert {low.dtype, *(part.dtype for part in parts.values())} == {torch.float32}
        assert torch.equal(low, plain)


def test_soft_distillation_from_hard_labels_is_refused():
    empty = TeacherTarget(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0).long(), torch.zeros(2, 0), torch.ones(2))
    logits, target = torch.zeros(2, 5), plain_target(torch.tensor([0, 1]))
    with pytest.raises(UsageError, match=r"needs top-k labels .* holds only hard labels \(K = 0\)\. Train with hard"):
        distillation_loss(logits, logits, target, empty, settings("soft"))
    loss, _ = distillation_loss(logits, logits, target, empty, settings("hard"))
    assert loss.item() == pytest.approx(math.log(5))


def test_distillation_without_labels_is_refused():
    logits, target = torch.zeros(2, 5), plain_target(torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="distillation type 'hard' needs stored teacher labels"):
        distillation_loss(logits, logits, target, None, settings("hard"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_backward_pass_keeps_the_logits_and_nothing_else_of_their_size(rng, tau, dtype):
    class_logits, distill_logits = torch.randn(2, 8, 5000, generator=rng).to(dtype)
    target = mirrored_target(torch.randint(5000, (8,), generator=rng), 0.3)
    teacher = topk_of(torch.randn(8, 5000, generator=rng).softmax(-1), 10)
    saved: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() >= 8 * 5000:
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    both = [logits.clone().requires_grad_() for logits in (class_logits, distill_logits)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = distillation_loss(*both, target, teacher, settings("soft", tau=tau))
    assert saved == {logits.untyped_storage().data_ptr() for logits in both}
    loss.backward()
    assert [logits.grad.dtype for logits in both if logits.grad is not None] == [dtype, dtype]


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_cross_entropy_has_the_gradient_of_its_values(rng, tau):
    index = torch.tensor([[1, 4], [0, 6], [2, 2], [5, 3]])  # the third row: partners of one class
    rest = torch.tensor([0.0, 0.02, 0.1, 0.05], dtype=torch.float64)
    weight = torch.tensor([0.7, 0.9, 0.5, 1.1], dtype=torch.float64) * (1 - 7 * rest)
    weight = torch.stack([weight, 1 - 7 * rest - weight], dim=1)  # the last row has a class below its rest
    logits = (3 * torch.randn(4, 7, generator=rng, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, index, weight, rest, tau=tau), logits)
