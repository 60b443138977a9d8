"""`--labelled-fraction`: a share of the class labels, the same everywhere, and a part of every larger share."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import make_labels, write_tars
from support.training import TINY

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from trainer.checkpoint import load_state, save_state
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.run import make_order, open_data
from trainer.stream import BatchRenderer, Catalogue, keeps_label


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (40, 30), unlabelled=5)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2)


def config(output: Path, **changes) -> TrainConfig:
    values = {"output": output, "batch_size": 12, "epochs": 2, "warmup_epochs": 1, "lr": 1e-3, "workers": 0}
    return TrainConfig(**(values | TINY | changes))


def chosen_by_hand(key: str, fraction: float) -> bool:
    """The first word of the stream `labelled`, `key`, as pipeline/views/draws.py defines it, in plain steps."""
    name = b"".join(len(part).to_bytes(4, "little") + part for part in (b"labelled", key.encode()))
    seed = hashlib.blake2b(name, digest_size=32).digest()
    word = int.from_bytes(hashlib.blake2b(seed + bytes(8)).digest()[:8], "little")
    return (word >> 11) / 2**53 < fraction


def test_a_smaller_share_is_a_part_of_a_larger_one_and_close_to_its_size():
    keys = [f"image-{number}" for number in range(4000)]
    chosen = {share: {key for key in keys if keeps_label(key, share)} for share in (0.01, 0.1, 0.5, 1.0)}
    assert chosen[0.01] < chosen[0.1] < chosen[0.5] < chosen[1.0] == set(keys)
    for share, of_share in chosen.items():
        assert of_share == {key for key in keys if share == 1 or chosen_by_hand(key, share)}
        assert abs(len(of_share) / len(keys) - share) < 4 * (share * (1 - share) / len(keys)) ** 0.5 + 1e-12


def test_without_labels_only_the_chosen_images_are_trained_on(data, tmp_path):
    settings = config(tmp_path, distillation_type="none", data=data, labelled_fraction=0.4, repeated_aug=1)
    opened = open_data(settings)
    order = make_order(settings, opened)
    renderer = BatchRenderer(Catalogue(opened.source, None, 0.4), opened.recipe.with_fields(img_size=16), order)
    # A last incomplete update of an epoch is left out, and another epoch leaves out other images.
    seen = {key for index in range(20 * order.steps_per_epoch) for key in renderer.render_here(index).keys}
    wanted = {
        key
        for shard in open_source(data).shards
        for key, label in zip(shard.keys, shard.class_labels, strict=True)
        if label is not None and chosen_by_hand(key, 0.4)
    }
    assert 10 < len(wanted) < 50
    assert seen == wanted


def test_with_labels_every_image_stays_with_its_partner_and_only_class_labels_are_left_out(data, label_set, tmp_path):
    settings = config(tmp_path, labels=label_set.folder)
    opened = open_data(settings)
    order = make_order(settings, opened)
    assert make_order(config(tmp_path, labels=label_set.folder, labelled_fraction=0.3), opened) == order
    all_labels, some = (
        BatchRenderer(Catalogue(opened.source, label_set, share), opened.recipe, order) for share in (1.0, 0.3)
    )
    left_out = 0
    for index in range(order.steps_per_epoch):
        whole, part = all_labels.render_here(index), some.render_here(index)
        assert (whole.keys, whole.views) == (part.keys, part.views)
        assert torch.equal(whole.images, part.images)
        for name in ("partner", "lam", "box"):
            assert torch.equal(getattr(whole.mix, name), getattr(part.mix, name))
        assert whole.teacher is not None
        assert part.teacher is not None
        assert torch.equal(whole.teacher.topk_prob, part.teacher.topk_prob)
        chosen = np.array([chosen_by_hand(key, 0.3) for key in part.keys])
        assert part.classes.labelled.tolist() == (whole.classes.labelled.numpy() & chosen).tolist()
        left_out += int((whole.classes.labelled & ~part.classes.labelled).sum())
    assert left_out > 0


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_share_that_leaves_no_class_label_is_refused_by_its_name(data, label_set, tmp_path, with_labels):
    which = {"labels": label_set.folder} if with_labels else {"data": data, "distillation_type": "none"}
    with pytest.raises(
        UsageError, match=r"--labelled-fraction 1e-07 leaves no image with a class label\. Pass a larger"
    ):
        train(config(tmp_path / "run", labelled_fraction=1e-7, **which))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(UsageError, match="--labelled-fraction must be in"):
        config(tmp_path, data="x", distillation_type="none", labelled_fraction=share)


def test_a_resumed_run_keeps_its_share(label_set, tmp_path):
    settings = {"labels": label_set.folder, "labelled_fraction": 0.5}
    train(config(tmp_path / "run", **settings))
    with pytest.raises(CheckpointError, match=r"other settings \(--labelled-fraction: 0.5, not 0.4\)"):
        train(config(tmp_path / "run", **settings | {"labelled_fraction": 0.4, "resume": "auto"}))


def test_a_run_from_before_a_setting_existed_continues_with_its_default(label_set, tmp_path):
    train(config(tmp_path / "run", labels=label_set.folder))
    path = tmp_path / "run/state.safetensors"
    tensors, meta = load_state(path)
    assert meta["config"].pop("labelled_fraction") == 1.0
    save_state(path, tensors, meta)
    with pytest.raises(CheckpointError, match=r"--labelled-fraction: 1.0, not 0.5"):
        train(config(tmp_path / "run", labels=label_set.folder, resume="auto", labelled_fraction=0.5))
    train(config(tmp_path / "run", labels=label_set.folder, resume="auto"))
