"""Optimizer, learning rate schedule and EMA, all as in timm.

DeiT's own code changes the learning rate once per epoch; here it changes at every update, as with timm's
`--sched-on-updates`.
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
    """Return AdamW for a `Student`, with DeiT's parameter groups: biases, norms, tokens and position embedding do not decay.

    Args:
        student: student whose parameters are optimized; its timm model lists the tokens and embeddings without decay.
        lr: learning rate until the first call of `set_learning_rate`.
        weight_decay: weight decay of all other parameters; AdamW multiplies it by the learning rate.
        betas: decay rates of AdamW's two moving averages.
        eps: AdamW's constant in the denominator.
        fused: use one kernel for all parameters; for CUDA, and for CPUs with a recent torch.
    """
    model = student.get_submodule("model")  # `Student` itself does not have timm's list of parameters without decay
    return create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused)


def linear_scaled_lr(lr_base: float, batch: int) -> float:
    """Return the learning rate for a global batch size: lr_base * batch / 512 (DeiT, section 6)."""
    return lr_base * batch / 512


def learning_rate(
    update: int, *, updates_total: int, updates_warmup: int, lr: float, warmup_lr: float, min_lr: float
) -> float:
    """Return the learning rate of an update: linear warm-up, then cosine decay, bit for bit timm's `CosineLRScheduler`.

    The cosine spans all updates and the warm-up replaces its start, so the rate right after the warm-up is slightly below
    `lr`.

    Args:
        update: number of the update, from 0; from `updates_total` on, the rate is `min_lr`.
        updates_total: number of updates in the run, with warm-up, > 0.
        updates_warmup: number of updates in the warm-up, 0 for none.
        lr: peak of the cosine.
        warmup_lr: learning rate of update 0 if there is a warm-up.
        min_lr: end of the cosine.
    """
    if update < updates_warmup:
        return warmup_lr + update * ((lr - warmup_lr) / updates_warmup)
    if update >= updates_total:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * update / updates_total))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group, multiplied by its `lr_scale` if it has one (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def create_ema(student: nn.Module, decay: float | None, warmup: bool) -> ModelEmaV3 | None:
    """Return an exponential moving average (EMA) of the student's weights; its `.module` is a `Student`.

    Args:
        student: student, before DDP and `torch.compile` wrap it.
        decay: weight of the old average at each update, 0.99996 in DeiT; None: no average.
        warmup: whether the decay rises from 0 to its value, for short runs. It depends on the update number, so
            `update(student, step)` must get a step.
    """
    return None if decay is None else ModelEmaV3(student, decay=decay, use_warmup=warmup)
