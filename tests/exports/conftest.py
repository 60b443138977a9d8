"""A run with its label set, and students, that all tests of exports share."""

from pathlib import Path

import pytest
import torch
from support.builders import make_labels, write_tars
from support.students import exported, lively, make_student, write_photos

from pipeline.storage.place import LocalFile
from trainer.config import TrainConfig
from trainer.evidence.linear import FILE_NAME, Linear, save_linear, student_sha256
from trainer.loop import train
from trainer.student import Student


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of two epochs, evaluated after each."""
    folder = tmp_path_factory.mktemp("exports")
    data = write_tars(folder / "data")
    labels = make_labels(folder / "labels", data)
    config = TrainConfig(
        labels=(str(labels.folder),),
        eval_data=data,
        output=str(folder / "tiny"),
        model="deit-ti",
        patch_size=8,
        embed_dim=32,
        depth=1,
        num_heads=2,
        batch_size=12,
        epochs=2,
        workers=0,
        device="cpu",
    )
    return Path(train(config, None))


@pytest.fixture(scope="session")
def student() -> Student:
    """A student with two tokens whose heads answer differently."""
    return lively(make_student()).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, student) -> Path:
    """The exported folder of the student, with a linear classifier of both tokens."""
    folder = exported(tmp_path_factory.mktemp("students") / "two", student)
    draws = torch.Generator().manual_seed(1)
    weight = torch.randn(student.num_classes, 2 * student.model.head.in_features, generator=draws)
    facts = {"kind": "concat_linear", "version": 1, "student_sha256": student_sha256(student)}
    save_linear(Linear(weight, torch.randn(student.num_classes, generator=draws), facts), LocalFile(folder / FILE_NAME))
    return folder


@pytest.fixture(scope="session")
def cnn(tmp_path_factory) -> Path:
    """The exported folder of a student with one head."""
    return exported(tmp_path_factory.mktemp("students") / "cnn", make_student("test_resnet"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> str:
    return write_photos(tmp_path_factory.mktemp("photos") / "all", [number % 8 for number in range(40)])
