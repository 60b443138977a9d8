"""The losses: pure functions of the student's answers, the class labels, and the teacher's stored answers.

All losses are computed in float32, also under autocast. A target of shape [B, C] is never built: a stored
soft label has K classes and a tail, mixed and smoothed class labels have two classes and a rest. So the cross-entropy
is a sum over these classes plus a closed form for the rest, and its gradient is the only array [B, C] that a step adds.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import UsageError
from pipeline.settings.fields import settings_of
from trainer.config import DistillationType, Reduction, SecondToken, Tail, TrainConfig


@dataclass(frozen=True)
class ClassTarget:
    """The class labels of a batch of mixed images.

    Attributes:
        class_label: int64 [B]; any value if the sample is not labelled.
        labelled: bool [B].
        partner: int64 [B], the partner's position in this batch; the sample's own position if it is not mixed.
        lam: float32 [B] in 0..1, the weight of the sample's own label; 1 if it is not mixed.
    """

    class_label: Tensor
    labelled: Tensor
    partner: Tensor
    lam: Tensor


@dataclass(frozen=True)
class TeacherTarget:
    """The teacher's stored answers for a batch of views. K is 0 if only hard labels are stored.

    Attributes:
        hard: int64 [B], the teacher's argmax class.
        topk_index: int64 [B, K], distinct classes.
        topk_prob: float32 [B, K], probabilities at temperature 1.
        tail_mass: float32 [B], the probability of all other classes together.
    """

    hard: Tensor
    topk_index: Tensor
    topk_prob: Tensor
    tail_mass: Tensor


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the loss of a run; the defaults are those of `deit-cli train`.

    Attributes:
        distillation_type: kind of the distillation loss; `none`: class loss only, for any alpha.
        alpha: weight of the second head's loss, 0..1.
        tau: temperature of the soft distillation loss, see `soft_distillation_loss`.
        tail: how the tail mass counts, see `soft_distillation_loss`.
        reduction: divisor of the soft distillation loss, see `soft_distillation_loss`.
        smoothing: smoothing of the class labels, see `class_loss`.
        second_token: `class`: without distillation, the second head learns the class labels too (the control experiment).
    """

    distillation_type: DistillationType = TrainConfig.distillation_type
    alpha: float = TrainConfig.distillation_alpha
    tau: float = TrainConfig.distillation_tau
    tail: Tail = TrainConfig.tail
    reduction: Reduction = TrainConfig.soft_reduction
    smoothing: float = TrainConfig.smoothing
    second_token: SecondToken = TrainConfig.second_token

    def __post_init__(self) -> None:
        """Raise UsageError for a value that `deit-cli train` refuses."""
        names = {"alpha": "distillation_alpha", "tau": "distillation_tau", "reduction": "soft_reduction"}
        settings = {setting.name: setting for setting in settings_of(TrainConfig)}
        for field in fields(self):
            settings[names.get(field.name, field.name)].check(getattr(self, field.name))

    @classmethod
    def of(cls, config: TrainConfig) -> "LossSettings":
        """Return the loss settings from the settings of a run."""
        return cls(
            distillation_type=config.distillation_type,
            alpha=config.distillation_alpha,
            tau=config.distillation_tau,
            tail=config.tail,
            reduction=config.soft_reduction,
            smoothing=config.smoothing,
            second_token=config.second_token,
        )


def distillation_loss(
    class_logits: Tensor,
    distill_logits: Tensor | None,
    class_target: ClassTarget,
    teacher: TeacherTarget | None,
    settings: LossSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (1 - alpha) * class loss + alpha * loss of the second head, and the two parts.

    The second head learns the teacher's answers; in the control experiment, the same class labels as the first (DeiT,
    section 4); without either, the loss is the class loss alone.

    Args:
        class_logits: float [B, C].
        distill_logits: float [B, C]; None for a student with one head, which then learns from both.
        class_target: the class labels.
        teacher: the stored labels; without distillation they are not used, and may be None.
        settings: kind and weights of the loss.

    Returns:
        The loss, a scalar; its detached parts `class_loss` and, with distillation, `distill_loss`, or in the control
        experiment `second_class_loss`.
    """
    kind, alpha = settings.distillation_type, settings.alpha
    class_part = class_loss(class_logits, class_target, smoothing=settings.smoothing)
    if kind == "none" and settings.second_token == "class" and distill_logits is not None:
        second_part = class_loss(distill_logits, class_target, smoothing=settings.smoothing)
        parts = {"class_loss": class_part.detach(), "second_class_loss": second_part.detach()}
        return (1 - alpha) * class_part + alpha * second_part, parts
    if kind == "none":
        return class_part, {"class_loss": class_part.detach()}
    if teacher is None:
        raise UsageError(f"distillation type {kind!r} needs stored teacher labels, but there are none")
    logits = class_logits if distill_logits is None else distill_logits
    if kind == "hard":
        distill_part = hard_distillation_loss(logits, teacher.hard)
    else:
        distill_part = soft_distillation_loss(
            logits, teacher, tau=settings.tau, tail=settings.tail, reduction=settings.reduction
        )
    loss = (1 - alpha) * class_part + alpha * distill_part
    return loss, {"class_loss": class_part.detach(), "distill_loss": distill_part.detach()}


def class_loss(class_logits: Tensor, target: ClassTarget, *, smoothing: float) -> Tensor:
    """Return the cross-entropy to the mixed, smoothed class labels (timm's `mixup_target`, which is not built).

    A sample counts if it is labelled and, unless lam is 1, its partner is labelled; other samples add 0. The sum is
    always divided by B.

    Args:
        class_logits: float [B, C].
        target: the class labels.
        smoothing: probability mass spread evenly over all C classes, 0..1.

    Returns:
        A float32 scalar.
    """
    label = torch.where(target.labelled, target.class_label, 0)  # `gather` needs a valid index for unlabelled rows, too
    index = torch.stack([label, label[target.partner]], dim=1)
    weight = (1 - smoothing) * torch.stack([target.lam, 1 - target.lam], dim=1)
    rest = torch.full_like(target.lam, smoothing / class_logits.shape[1])
    known = target.labelled & (target.labelled[target.partner] | (target.lam == 1))
    return torch.where(known, cross_entropy(class_logits, index, weight, rest), 0.0).mean()


def hard_distillation_loss(distill_logits: Tensor, hard: Tensor) -> Tensor:
    """Return the mean cross-entropy to the teacher's argmax (DeiT, eq. 3).

    Args:
        distill_logits: float [B, C].
        hard: int64 [B].
    """
    return F.cross_entropy(distill_logits.float(), hard)


def soft_distillation_loss(
    distill_logits: Tensor, target: TeacherTarget, *, tau: float, tail: Tail, reduction: Reduction
) -> Tensor:
    """Return tau² · KL(teacher || student), both at temperature tau, over stored top-k labels (DeiT, eq. 2).

    Args:
        distill_logits: float [B, C].
        target: the stored labels, 1 <= K <= C.
        tau: temperature, > 0. The stored p become p^(1/tau), normalised.
        tail: `spread` gives the tail mass to the other C - K classes in equal parts, before the temperature;
            `renormalise` drops it. With K = C there is no tail, and both are equal.
        reduction: `batchmean` divides by B (timm), `deit` by B · C (facebookresearch/deit, losses.py).

    Returns:
        A float32 scalar.
    """
    num_kept, num_classes = target.topk_index.shape[1], distill_logits.shape[1]
    if num_kept == 0:
        raise UsageError(
            "soft distillation needs top-k labels (K >= 1), and this label set holds only hard labels (K = 0)",
            fix="Train with hard distillation, or precompute labels with K >= 1",
        )
    num_rest = num_classes - num_kept if tail == "spread" else 0
    prob, rest_prob = _tempered_teacher(target, tau=tau, num_rest=num_rest)
    negative_entropy = torch.xlogy(prob, prob).sum(dim=-1) + num_rest * torch.xlogy(rest_prob, rest_prob)
    divergence = negative_entropy + cross_entropy(
        distill_logits, target.topk_index, prob - rest_prob[:, None], rest_prob, tau=tau
    )
    divisor = distill_logits.shape[0] * (num_classes if reduction == "deit" else 1)
    return divergence.sum() * (tau**2 / divisor)


def cross_entropy(logits: Tensor, index: Tensor, weight: Tensor, rest: Tensor, *, tau: float = 1.0) -> Tensor:
    """Return the cross-entropy of softmax(logits / tau) to targets with a few classes and a constant rest.

    Args:
        logits: float [B, C], the only input that gets a gradient.
        index: int64 [B, K]; a class may occur twice.
        weight: float32 [B, K], target minus `rest` at the classes of `index`; may be negative.
        rest: float32 [B], part of the target that every class has. A row's weights and C times its rest add up to 1.
        tau: temperature, > 0.

    Returns:
        float32 [B]; float64 for float64 logits.
    """
    return _CrossEntropy.apply(logits, index, weight, rest, tau)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps only the logits and computes one gradient [B, C] in place.

    Plain operations keep the log-probabilities, and compute one gradient for each use of these and one for the logits:
    three arrays at a time instead of one, and more time (benchmarks/losses.py).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor, rest: Tensor, tau: float) -> Tensor:
        ctx.save_for_backward(logits, index, weight, rest)
        ctx.tau = tau
        log_prob = F.log_softmax(_at_temperature(logits, tau), dim=-1)
        return -(weight * log_prob.gather(1, index)).sum(dim=-1) - rest * log_prob.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return (softmax - target) / tau, times the gradient of each row."""
        logits, index, weight, rest = ctx.saved_tensors
        scale = (grad / ctx.tau)[:, None]
        result = F.softmax(_at_temperature(logits, ctx.tau), dim=-1)
        result.mul_(scale).sub_(scale * rest[:, None]).scatter_add_(1, index, -scale * weight)
        return result.to(logits.dtype), None, None, None, None


def _at_temperature(logits: Tensor, tau: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if tau == 1 else wide / tau


def _tempered_teacher(target: TeacherTarget, *, tau: float, num_rest: int) -> tuple[Tensor, Tensor]:
    """Return the teacher at temperature tau: its kept classes float32 [B, K], and each other class float32 [B].

    Probabilities of 0 (float16 underflow) stay 0. Kept classes and tail need not add up to 1; the result does, if
    its second part is counted `num_rest` times. Computed with logarithms, so a small tau cannot underflow the whole row.
    """
    log_weight = target.topk_prob.float().log() / tau
    if num_rest == 0:
        return log_weight.softmax(dim=-1), torch.zeros_like(target.tail_mass)
    tail_mass = target.tail_mass.float().clamp(min=0)  # 1 minus a rounded sum can fall below 0
    log_rest = (tail_mass / num_rest).log() / tau
    log_total = torch.logaddexp(log_weight.logsumexp(dim=-1), log_rest + math.log(num_rest))
    return (log_weight - log_total[:, None]).exp(), (log_rest - log_total).exp()
