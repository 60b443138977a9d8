"""What a user does with a file that somebody gave him."""

from pathlib import Path

import torch
from support.label_sets import RECIPE, colour_teacher, config_of, read_everything

from pipeline.errors import LabelSetError
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.overview.summary import summarise
from pipeline.settings.configs import TeacherConfig, VerifyConfig
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher
from pipeline.verify.verify import verify
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.run import make_order, open_data
from trainer.stream import BatchRenderer, Catalogue
from trainer.student import create_student, open_student
from trainer.weights import start_from


def read_set(folder: Path) -> None:
    """`labels info`, and every value of it."""
    label_set = LabelSet.open(folder)
    summarise(label_set)
    list(read_everything(label_set))


def verify_set(folder: Path) -> None:
    """`labels verify`: its problems are an error."""
    if problems := verify(str(folder), VerifyConfig(probes=False, threads=1)).problems:
        raise LabelSetError("; ".join(map(str, problems)))


def train_on_set(folder: Path) -> None:
    """`train` up to every batch of an epoch for each view."""
    torch.set_num_threads(1)
    config = TrainConfig(labels=str(folder), output=str(folder.parent / "run"), epochs=4, batch_size=4, repeated_aug=1)
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for index in range(config.epochs * order.steps_per_epoch):
        renderer.render_here(index)


def extend_set(folder: Path) -> None:
    """`precompute --out` of more views; the images lie beside it."""
    torch.set_num_threads(1)
    images = folder.parent / "images"
    precompute(config_of(images, folder, views=(4, 6)), RECIPE, colour_teacher(), open_source(images))


def read_source(path: Path) -> None:
    """Every image of a source, decoded."""
    for shard in open_source(path).shards:
        for sample in shard:
            decode(sample.image, key=sample.key)


def read_image(path: Path) -> None:
    """One image."""
    decode(path.read_bytes(), key=path.name)


def small_student():
    """Return what weights are loaded into."""
    return create_student(
        "deit_tiny_distilled_patch16_224",
        num_classes=3,
        img_size=16,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=2,
        class_names=("a", "b", "c"),
    )


def start(path: Path) -> None:
    """`train --init`."""
    torch.set_num_threads(1)
    start_from(small_student(), path)


def evaluate(folder: Path) -> None:
    """`evaluate --checkpoint` of an exported folder."""
    torch.set_num_threads(1)
    open_student(folder)


def teach(path: Path) -> None:
    """`precompute --teacher-checkpoint`."""
    torch.set_num_threads(1)
    load_teacher(TeacherConfig(teacher=("test_resnet",), teacher_checkpoint=(path,), device="cpu"))


def teach_from_folder(folder: Path) -> None:
    """`precompute --teacher` of an exported folder."""
    torch.set_num_threads(1)
    load_teacher(TeacherConfig(teacher=(f"local-dir:{folder}",), device="cpu"))


def state(path: Path) -> None:
    """`train --resume`."""
    load_state(path)
