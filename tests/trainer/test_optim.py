"""Parameter groups, schedule and EMA against timm's own objects and DeiT's rules."""

import pytest
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from trainer.optim import create_ema, create_optimizer, learning_rate, linear_scaled_lr, set_learning_rate
from trainer.student import Student, create_student


def tiny(model: str = "deit-ti") -> Student:
    torch.manual_seed(0)
    return create_student(model, num_classes=5, img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2)


def decay_by_name(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in student.model.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }


# --- optimizer ------------------------------------------------------------------------------------------------


def test_only_weight_matrices_decay_as_in_deit():
    student = tiny()
    decay = decay_by_name(student, create_optimizer(student, lr=1e-3, weight_decay=0.05, fused=False))
    assert decay.keys() == dict(student.model.named_parameters()).keys()
    assert {name for name, value in decay.items() if value == 0.05} == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
        "head_dist.weight",
    }
    assert set(decay.values()) == {0.05, 0.0}
    # Tokens and position embedding are matrices: only the model's own list keeps them out.
    assert [decay[name] for name in ("cls_token", "dist_token", "pos_embed")] == [0.0, 0.0, 0.0]


def test_the_optimizer_is_adamw_with_the_values_given():
    optimizer = create_optimizer(tiny(), lr=1e-3, weight_decay=0.05, betas=(0.8, 0.99), eps=1e-6, fused=True)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-3, (0.8, 0.99), 1e-6, True)
    default = create_optimizer(tiny(), lr=1e-3, weight_decay=0.05, fused=False).param_groups[0]
    assert (default["betas"], default["eps"], default["fused"]) == ((0.9, 0.999), 1e-8, False)


@pytest.mark.parametrize(("batch", "expected"), [(512, 5e-4), (1024, 1e-3), (64, 6.25e-5)])
def test_the_rate_is_scaled_by_the_global_batch(batch, expected):
    assert linear_scaled_lr(5e-4, batch) == pytest.approx(expected, rel=1e-12)


# --- schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "updates_per_epoch", "lr", "warmup_lr", "min_lr"),
    [
        (30, 5, 7, 5e-4, 1e-6, 1e-5),  # DeiT's values, fewer epochs
        (10, 0, 13, 1e-3, 1e-6, 0.0),  # no warm-up
        (3, 3, 5, 1e-3, 0.0, 1e-5),  # nothing but warm-up
        (4, 1, 1, 1e-3, 1e-2, 1e-5),  # one update an epoch; a warm-up that falls
        (2, 0, 1, 1e-3, 0.0, 1e-3),  # constant
    ],
)
def test_the_rate_is_that_of_timm_at_every_update(epochs, warmup_epochs, updates_per_epoch, lr, warmup_lr, min_lr):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    total = epochs * updates_per_epoch
    for update in range(total + 3):
        scheduler.step_update(update)
        ours = learning_rate(
            update,
            updates_total=total,
            updates_warmup=warmup_epochs * updates_per_epoch,
            lr=lr,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
        )
        assert ours == optimizer.param_groups[0]["lr"], update


def test_the_rate_rises_then_falls_to_its_end():
    rates = [
        learning_rate(update, updates_total=100, updates_warmup=10, lr=1.0, warmup_lr=0.1, min_lr=0.01)
        for update in range(101)
    ]
    assert rates[0] == 0.1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.97 < rates[10] < 1.0
    assert rates[100] == 0.01


def test_setting_the_rate_respects_the_scale_of_a_group():
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.2]


# --- EMA ------------------------------------------------------------------------------------------------------


def test_no_decay_means_no_average():
    assert create_ema(tiny(), None, warmup=False) is None


def test_the_average_is_a_student_of_its_own():
    student = tiny()
    ema = create_ema(student, 0.9, warmup=False)
    assert isinstance(ema, ModelEmaV3)
    assert isinstance(ema.module, Student)
    assert not ema.module.training
    before = student.model.dist_token.detach().clone()
    with torch.no_grad():
        student.model.dist_token.add_(1)
    assert torch.equal(ema.module.model.dist_token, before)
    ema.update(student)
    torch.testing.assert_close(ema.module.model.dist_token, before + 0.1)


@pytest.mark.parametrize(("warmup", "expected"), [(False, 0.999), (True, 1 - 11 ** (-2 / 3))])
def test_the_decay_warms_up_only_when_asked(warmup, expected):
    ema = create_ema(tiny(), 0.999, warmup=warmup)
    assert ema.get_decay(11) == pytest.approx(expected)
    assert ema.get_decay(10**9) == 0.999
