"""Starting points: other sizes, other classes, tokens that come and go, heads that learn alone."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from support.builders import before_update, interrupt, make_labels, small_recipe, write_tars
from torch import nn

from pipeline.errors import CheckpointError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.machine.ranks import resolve_device
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.export import export_model, hub_config
from trainer.loop import train
from trainer.run import build_state, make_order, open_data
from trainer.student import Student, create_student, open_student
from trainer.weights import start_from

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLAIN, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


def student_of(
    model: str = DISTILLED, *, seed: int = 0, num_classes: int = 3, img_size: int = 16, **changes
) -> Student:
    """A small student whose every weight is noise: no two tensors are equal by accident (timm's heads start at zero)."""
    torch.manual_seed(seed)
    student = create_student(model, num_classes=num_classes, img_size=img_size, **(SMALL | changes))
    for parameter in student.parameters():
        nn.init.normal_(parameter)
    return student


def exported(student: Student, folder: Path) -> Path:
    export_model(folder, student.model.state_dict(), hub_config=hub_config(student))
    return folder


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# --- positions ------------------------------------------------------------------------------------------------


def keys(x: float) -> float:
    """The cubic kernel of Keys with a = -0.75, which torch takes when it does not antialias."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_bicubic(grid: torch.Tensor, size: int) -> torch.Tensor:
    """[h, h, D] to [size, size, D], half-pixel centres, edges repeated: written out, one value at a time."""
    old = grid.shape[0]
    out = torch.zeros(size, size, grid.shape[2], dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            y, x = ((k + 0.5) * old / size - 0.5 for k in (i, j))
            for r in range(math.floor(y) - 1, math.floor(y) + 3):
                for c in range(math.floor(x) - 1, math.floor(x) + 3):
                    pixel = grid[min(max(r, 0), old - 1), min(max(c, 0), old - 1)].double()
                    out[i, j] += keys(y - r) * keys(x - c) * pixel
    return out


@pytest.mark.parametrize(("model", "prefix"), [(PLAIN, 1), (DISTILLED, 2)])
@pytest.mark.parametrize("size", [48, 56, 24])
def test_positions_are_interpolated_as_deit_does(tmp_path, model, prefix, size):
    source, target = student_of(model, img_size=32), student_of(model, img_size=size, seed=1)
    said = start_from(target, exported(source, tmp_path / "run"))
    side = size // 8
    assert said == [f"positions are interpolated from 4x4 patches to {side}x{side}"]
    old, new = source.model.pos_embed.detach(), target.model.pos_embed.detach()
    assert torch.equal(new[:, :prefix], old[:, :prefix])
    expected = slow_bicubic(old[0, prefix:].reshape(4, 4, 32), side)
    torch.testing.assert_close(new[0, prefix:].reshape(side, side, 32).double(), expected, rtol=0, atol=1e-5)
    assert differing(weights(source), weights(target)) == {"pos_embed"}


def test_the_same_size_is_loaded_to_the_bit(tmp_path):
    source, target = student_of(), student_of(seed=1)
    assert start_from(target, exported(source, tmp_path / "run")) == []
    assert differing(weights(source), weights(target)) == set()


def test_the_published_file_of_224_pixels_starts_a_student_of_384(tmp_path):
    """DeiT's own layout: the state dict under `model`, 14x14 positions behind two tokens."""
    published = timm.create_model(DISTILLED, depth=1)
    torch.save({"model": published.state_dict()}, tmp_path / "deit.pth")
    student = create_student("deit_base_distilled_patch16_384", num_classes=1000, embed_dim=192, num_heads=3, depth=1)
    assert start_from(student, tmp_path / "deit.pth") == ["positions are interpolated from 14x14 patches to 24x24"]
    assert student.model.pos_embed.shape == (1, 578, 192)


# --- heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said", "new"),
    [
        (DISTILLED, "2 heads are new", {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}),
        (PLAIN, "the head is new", {"head.weight", "head.bias"}),
    ],
)
def test_heads_of_other_classes_are_made_anew(tmp_path, model, said, new):
    source, target = student_of(model, num_classes=7), student_of(model, seed=1)
    before = weights(target)
    changes = start_from(target, exported(source, tmp_path / "run"))
    assert changes == [f"{said}: 7 classes in the checkpoint, 3 here"]
    after = weights(target)
    assert differing(before, after) == before.keys() - new
    assert all(torch.equal(after[name], source.model.state_dict()[name]) for name in before.keys() - new)


def test_a_convolutional_student_is_transferred_too(tmp_path):
    source, target = (create_student("test_resnet", num_classes=n, img_size=32) for n in (7, 3))
    source.model.layer1[0].bn1.running_mean.fill_(3.0)
    assert start_from(target, exported(source, tmp_path / "run")) == [
        "the head is new: 7 classes in the checkpoint, 3 here"
    ]
    assert differing(weights(source) | {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, weights(target)) == {
        "fc.weight",
        "fc.bias",
    }


def test_as_many_classes_of_other_names_are_other_classes(tmp_path):
    names = ["ant", "bee", "cat"]
    for other, expected in (
        (names, []),
        (["bee", "ant", "cat"], ["2 heads are new: the 3 classes have other names or another order in the checkpoint"]),
    ):
        source, target = student_of(class_names=names), student_of(seed=1, class_names=other)
        assert start_from(target, exported(source, tmp_path / "run")) == expected


def test_everything_may_change_at_once(tmp_path):
    source, target = student_of(PLAIN, num_classes=7, img_size=32), student_of(DISTILLED, img_size=48, seed=1)
    assert start_from(target, exported(source, tmp_path / "run")) == [
        "the head is new: 7 classes in the checkpoint, 3 here",
        "the distillation token, its position and its head are new: the checkpoint has none",
        "positions are interpolated from 4x4 patches to 6x6",
    ]


# --- the distillation token -----------------------------------------------------------------------------------


def test_a_student_with_token_starts_from_a_checkpoint_without(tmp_path):
    source, target = student_of(PLAIN), student_of(DISTILLED, seed=1)
    before = weights(target)
    assert start_from(target, exported(source, tmp_path / "run")) == [
        "the distillation token, its position and its head are new: the checkpoint has none"
    ]
    old, new = weights(source), weights(target)
    for name in ("dist_token", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(new[name], before[name])
    assert torch.equal(new["pos_embed"][:, 1], before["pos_embed"][:, 1])
    assert torch.equal(new["pos_embed"][:, [0, *range(2, 6)]], old["pos_embed"])
    assert torch.equal(new["head.weight"], old["head.weight"])


def test_a_student_without_token_starts_from_a_checkpoint_with_one(tmp_path):
    source, target = student_of(DISTILLED), student_of(PLAIN, seed=1)
    assert start_from(target, exported(source, tmp_path / "run")) == [
        "its distillation token is left out, with its position and head: this student has none"
    ]
    old, new = weights(source), weights(target)
    assert torch.equal(new["pos_embed"], old["pos_embed"][:, [0, *range(2, 6)]])
    assert differing({n: v for n, v in old.items() if n in new}, new) == {"pos_embed"}


# --- refusals -------------------------------------------------------------------------------------------------


def changed(state: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | renamed).items() if value is not None}


MISFITS = [
    # what is wrong with the checkpoint, the message
    ({"norm__bias": None}, r"lacks norm\.bias: it belongs to another architecture"),
    ({"extra": torch.zeros(1)}, "has an unknown tensor extra: "),
    ({"pos_embed": torch.zeros(1, 7, 32)}, r"pos_embed has shape \[1, 7, 32\], this model needs \[1, 6, 32\]"),
    ({"pos_embed": torch.zeros(1, 1, 32)}, r"pos_embed has shape \[1, 1, 32\]"),
    ({"pos_embed": torch.zeros(6, 32)}, r"pos_embed has shape \[6, 32\]"),
    # of another patch size
    ({"patch_embed__proj__weight": torch.zeros(32, 3, 4, 4)}, r"patch_embed\.proj\.weight has shape"),
    # a token missing, and its position too: not what the token's absence looks like in a model without one
    ({"dist_token": None}, r"pos_embed has shape \[1, 7, 32\]"),
    ({"head_dist__weight": torch.zeros(12, 32)}, "its heads disagree on the number of classes: 3 and 12"),
    # scalars where a matrix should be
    ({"head__weight": torch.tensor(1.0)}, r"head\.weight has shape \[\]"),
    # no head at all
    ({"head__weight": None, "head__bias": None}, r"lacks head\.bias and 1 more"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS, ids=range(len(MISFITS)))
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, changes, message):
    student = student_of(seed=1)
    before = weights(student)
    torch.save(changed(student_of().model.state_dict(), **changes), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        start_from(student, tmp_path / "w.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'w.pt'}")
    assert differing(before, weights(student)) == set()


@pytest.mark.parametrize("changes", [{"embed_dim": 48}, {"depth": 3}, {"patch_size": 4}])
def test_another_architecture_is_refused(tmp_path, changes):
    for model in (PLAIN, DISTILLED):
        with pytest.raises(CheckpointError, match=r"this model needs|another architecture"):
            start_from(student_of(), exported(student_of(model, **changes), tmp_path / model))


def test_a_folder_without_weights_is_named_and_the_right_one_told(tmp_path):
    exported(student_of(), tmp_path / "run" / "last")
    with pytest.raises(
        CheckpointError, match=rf"no model.safetensors. Did you mean {re.escape(str(tmp_path))}/run/last\?"
    ):
        start_from(student_of(), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors\. Pass last/ or best/ of a run"):
        start_from(student_of(), tmp_path / "empty")
    with pytest.raises(CheckpointError, match="there is no such checkpoint file"):
        start_from(student_of(), tmp_path / "none.pth")
    (tmp_path / "run/last/config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: ."):
        start_from(student_of(), tmp_path / "run/last")


def test_evaluation_never_fits_weights(tmp_path):
    """What `--init` does on purpose would be a wrong accuracy in `evaluate`."""
    safetensors.torch.save_file(student_of(num_classes=7).model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError):
        open_student(tmp_path / "w.safetensors", model=DISTILLED, num_classes=3)


# --- in a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (16, 12))


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return exported(student_of(num_classes=7), tmp_path_factory.mktemp("start"))


def config(label_set: LabelSet | None, output: Path, **changes) -> TrainConfig:
    values = {"model": DISTILLED, "output": output, "batch_size": 12, "epochs": 2, "lr": 1e-2, "workers": 0}
    labels = {"labels": label_set.folder} if label_set else {"distillation_type": "none"}
    return TrainConfig(**(values | SMALL | labels | changes))


def test_a_run_says_what_it_did_to_start(label_set, start, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    train(config(label_set, tmp_path / "run", init=start))
    assert f"starting from {start}: 2 heads are new: 7 classes in the checkpoint, 3 here" in caplog.text
    train(config(label_set, tmp_path / "next", init=tmp_path / "run/last"))
    assert f"starting from {tmp_path / 'run/last'}: all weights as they are" in caplog.text


def test_new_heads_depend_on_the_seed_alone(label_set, start, tmp_path):
    """A run that is started twice starts from the same weights, so that it can be resumed and repeated."""
    device = resolve_device("cpu")
    settings = {"init": start, "model": PLAIN, "img_size": 16}
    asked = config(label_set, tmp_path / "run", **settings)
    data = open_data(asked)
    one, two = (build_state(asked, data, make_order(asked, data), device).student for _ in range(2))
    assert differing(weights(one), weights(two)) == set()


def test_other_sizes_than_the_views_are_refused_with_the_way_out(label_set, start, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"--img-size must be the size of the views, 16, got 24: .* For 24 pixels, label with --recipe deit-384 or --set img_size=24",
    ):
        train(config(label_set, tmp_path / "run", img_size=24, init=start))


def test_views_of_a_larger_size_continue_a_smaller_student(data, label_set, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    small = train(config(label_set, tmp_path / "small"))
    large = make_labels(tmp_path / "large", data, recipe=small_recipe(img_size=24))
    run = train(config(large, tmp_path / "run", init=small / "last", lr=0.0, warmup_lr=0.0, min_lr=0.0))
    assert "positions are interpolated from 2x2 patches to 3x3" in caplog.text
    student = open_student(run / "last")
    assert student.img_size == 24
    assert differing(weights(student), weights(open_student(small / "last"))) == {"pos_embed"}


def pretend_published(monkeypatch, model: nn.Module) -> None:
    """Let timm's own loading find these weights where it would fetch them."""
    from timm.models import _builder

    fetched = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(fetched))
    monkeypatch.setattr(_builder, "load_state_dict_from_url", lambda *_, **__: dict(fetched))


def test_published_weights_fit_other_classes_and_sizes(monkeypatch):
    """timm does it: heads of other classes are dropped, positions interpolated (antialiased, unlike DeiT)."""
    published = student_of(DISTILLED, num_classes=1000, img_size=224, patch_size=16, embed_dim=192, num_heads=3).model
    pretend_published(monkeypatch, published)
    student = create_student("deit-ti", num_classes=3, img_size=64, depth=2, pretrained=True)
    assert torch.equal(student.model.blocks[1].mlp.fc1.weight, published.blocks[1].mlp.fc1.weight)
    assert student.model.head.weight.shape == student.model.head_dist.weight.shape == (3, 192)
    assert student.model.pos_embed.shape == (1, 18, 192)


# --- linear probe ---------------------------------------------------------------------------------------------

HEADS = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(
    ("kind", "model", "learn"),
    [
        ("hard", DISTILLED, HEADS),
        ("soft", DISTILLED, HEADS),
        ("hard", PLAIN, {"head.weight", "head.bias"}),
        # class labels alone give the distillation head no gradient
        ("none", DISTILLED, {"head.weight", "head.bias"}),
    ],
)
def test_a_probe_trains_the_heads_and_nothing_else(label_set, start, tmp_path, kind, model, learn):
    settings = {"init": start, "model": model, "distillation_type": kind, "linear_probe": True, "drop_path": 0.5}
    settings |= {"model_ema_decay": 0.5, "weight_decay": 0.3}
    fresh = config(label_set, tmp_path / "x", **settings)
    data = open_data(fresh)
    before = weights(build_state(fresh, data, make_order(fresh, data), resolve_device("cpu")).student)
    run = train(config(label_set, tmp_path / "run", **settings))
    assert differing(before, weights(open_student(run / "last"))) == learn
    assert differing(before, weights(open_student(run / "last-ema"))) == learn
    moments = {name for name in load_state(run / "state.safetensors")[0] if name.startswith("optim.")}
    assert len(moments) == 3 * len(learn)


def test_running_statistics_of_a_probed_network_stay(data, tmp_path):
    source = create_student("test_resnet", num_classes=7, img_size=16)
    init = exported(source, tmp_path / "start")
    shape = dict.fromkeys(SMALL) | {"model": "test_resnet", "drop_path": 0.0}
    run = train(config(None, tmp_path / "run", data=data, init=init, linear_probe=True, **shape), small_recipe())
    probed = weights(open_student(run / "last"))
    assert "bn1.running_mean" in probed
    assert {
        name for name in probed if name[:3] != "fc." and not torch.equal(probed[name], weights(source)[name])
    } == set()
    assert not torch.equal(probed["fc.weight"], torch.zeros_like(probed["fc.weight"]))


def test_a_probe_keeps_no_gradients_of_the_backbone_and_drops_no_paths():
    student = student_of(drop_path=0.9)
    student.freeze_backbone()
    student.train()
    features: list[torch.Tensor] = []
    student.model.norm.register_forward_hook(lambda *args: features.append(args[2]))
    images = torch.randn(2, 3, 16, 16)
    first, second = student(images), student(images)
    assert torch.equal(first.class_logits, second.class_logits)
    assert all(not value.requires_grad and value.grad_fn is None for value in features)
    (first.class_logits.sum() + first.distill_logits.sum()).backward()
    assert {name for name, p in student.model.named_parameters() if p.grad is not None} == HEADS
    assert {name for name, module in student.model.named_modules() if module.training} == {"head", "head_dist"}
    assert student.training
    student.eval()
    assert not any(module.training for module in student.modules())


def test_a_resumed_probe_equals_an_uninterrupted_one(label_set, start, tmp_path):
    settings = {"init": start, "linear_probe": True, "recovery_interval": 1, "repeated_aug": 1, "clip_grad": 1.0}
    train(config(label_set, tmp_path / "whole", **settings))
    with before_update(3, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(label_set, tmp_path / "cut", **settings))
    train(config(label_set, tmp_path / "cut", resume="auto", **settings))
    assert differing(*(load_state(tmp_path / name / "state.safetensors")[0] for name in ("whole", "cut"))) == set()


def test_a_probe_is_not_continued_as_a_full_run(label_set, start, tmp_path):
    train(config(label_set, tmp_path / "run", init=start, linear_probe=True))
    with pytest.raises(CheckpointError, match=r"--linear-probe: True, not False"):
        train(config(label_set, tmp_path / "run", init=start, resume="auto"))


def test_a_probe_needs_something_to_probe(label_set, tmp_path):
    with pytest.raises(UsageError, match=r"--linear-probe trains heads on features that are there: pass --init or"):
        config(label_set, tmp_path / "run", linear_probe=True)


def test_a_model_whose_head_timm_does_not_name_is_not_probed():
    student = create_student("test_resnet", num_classes=3, img_size=16)
    student.model.pretrained_cfg["classifier"] = None
    with pytest.raises(UsageError, match="timm does not say which part of test_resnet is its head"):
        student.freeze_backbone()


# --- the default warm-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [({}, 5), ({"epochs": 50}, 5), ({"epochs": 30}, 3), ({"epochs": 1}, 0.1), ({"epochs": 6, "warmup_epochs": 5}, 5)],
)
def test_the_default_warm_up_fits_short_runs(settings, warmup):
    assert TrainConfig(**({"labels": Path("x")} | settings)).warmup == pytest.approx(warmup)


def test_a_run_of_one_epoch_needs_no_setting_of_the_warm_up(label_set, tmp_path):
    run = train(config(label_set, tmp_path / "run", epochs=1))
    assert json.loads((run / "config.json").read_text())["config"]["warmup_epochs"] is None


def test_the_default_warm_up_said_aloud_is_the_same_run():
    quiet, loud = (TrainConfig(labels=Path("x"), warmup_epochs=value) for value in (None, 5.0))
    assert quiet.identity() == loud.identity()
