"""AdamW with DeiT's parameter groups, the learning rate as a function of the update, and the EMA: timm's.

DeiT's own code changes the rate once an epoch; here it changes every update, as timm's `--sched-on-updates`.
"""

import math

import torch
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.utils.model_ema import ModelEmaV3
from torch import nn


def create_optimizer(
    student: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: bool,
) -> torch.optim.Optimizer:
    """Return AdamW over a `Student`: no decay on biases, norms, tokens and position embedding, as DeiT.

    Args:
        student: the student; its timm model says which of its parameters must not decay.
        lr: learning rate until `set_learning_rate` is called.
        weight_decay: decay of all other parameters, as a fraction of the rate.
        betas, eps: AdamW's.
        fused: one kernel for all parameters; CUDA, and CPU on recent torch.
    """
    model = student.get_submodule("model")  # timm asks the model itself, and the wrapper has no such list
    return create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused)


def linear_scaled_lr(lr_base: float, batch: int) -> float:
    """Return the rate for a global batch: lr_base * batch / 512 (DeiT, section 6)."""
    return lr_base * batch / 512


def learning_rate(
    update: int, *, updates_total: int, updates_warmup: int, lr: float, warmup_lr: float, min_lr: float
) -> float:
    """Return the rate of one update: a linear warm-up, then a cosine (timm's `CosineLRScheduler`, to the bit).

    The cosine spans all updates, so the warm-up cuts off its start: right after it the rate is a little below `lr`.

    Args:
        update: 0 for the first; from `updates_total` on the rate stays at `min_lr`.
        updates_total: updates of the run, warm-up included, > 0.
        updates_warmup: updates of the warm-up, 0 for none.
        lr: top of the cosine.
        warmup_lr: rate of update 0 of a warm-up.
        min_lr: end of the cosine.
    """
    if update < updates_warmup:
        return warmup_lr + update * ((lr - warmup_lr) / updates_warmup)
    if update >= updates_total:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * update / updates_total))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group, times the group's `lr_scale` where it has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def create_ema(student: nn.Module, decay: float | None, warmup: bool) -> ModelEmaV3 | None:
    """Return a moving average of the student's weights, itself a `Student` under `.module`; None means off.

    Args:
        student: the student, before DDP and `torch.compile` wrap it.
        decay: weight of the old average at each update; DeiT 0.99996. None for no average.
        warmup: let the decay rise to that value from 0, for runs too short for it. It follows the update number, so
            `update(student, step)` must be given one.
    """
    return None if decay is None else ModelEmaV3(student, decay=decay, use_warmup=warmup)
