"""The stage-1 loop and the memory that a device copies views from: it is not written to before the device has read it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import files_of, make_labels, teacher_of, write_tars
from support.fake_cuda import Cuda
from torch import Tensor

from pipeline.stage1 import loop
from pipeline.stage1.rendering import stream_views
from pipeline.teacher.teacher import Answer, PendingAnswer, Teacher

SETTINGS: dict[str, Any] = {"views": (0, 6), "views_per_shard": 3, "accuracy_samples": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """What a teacher makes that reads its views at once."""
    return labelled(tmp_path_factory.mktemp("whole") / "set", data, a_teacher())


def a_teacher() -> Teacher:
    return teacher_of("support.builders:confident_cnn")


def labelled(out: Path, data: str, teacher: Teacher, workers: int = 0) -> dict[str, bytes]:
    return files_of(make_labels(out, data, teacher=teacher, workers=workers, **SETTINGS).folder)


class Late(PendingAnswer):
    """The answer of a device that copies its views when the last moment for it has come: when the answer is waited for."""

    def __init__(self, copy: Callable[[], PendingAnswer]) -> None:
        self._copy = copy

    def result(self) -> Answer:
        return self._copy().result()


def late(teacher: Teacher) -> Teacher:
    """Let a teacher on the CPU read its views as late as a GPU may."""
    ask = teacher.ask
    teacher.ask = lambda images, mix, topk: Late(lambda: ask(images.clone(), mix, topk))
    return teacher


@pytest.mark.parametrize("workers", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_device_that_copies_views_as_late_as_it_may_labels_the_same(data, whole, tmp_path, workers):
    assert labelled(tmp_path / "set", data, late(a_teacher()), workers) == whole


@pytest.mark.parametrize("held", [0, loop.AHEAD - 1])
def test_with_fewer_views_held_it_would_label_others(data, whole, tmp_path, monkeypatch, held):
    """Or the test above would prove nothing."""
    monkeypatch.setattr(
        loop, "stream_views", lambda *args, **options: stream_views(*args, **(options | {"held": held}))
    )
    spoiled = labelled(tmp_path / "set", data, late(a_teacher()))
    assert spoiled.keys() == whole.keys()
    assert spoiled != whole


def test_the_pages_of_views_are_locked_until_the_last_answer_has_come(data, whole, tmp_path, monkeypatch):
    """A GPU may still have to copy the last views when no more are rendered."""
    cuda, gpu, pages = Cuda(monkeypatch), torch.device("cuda:1"), []
    on_gpu = lambda *args, **options: stream_views(*args, **(options | {"device": gpu}))  # noqa: E731
    monkeypatch.setattr(loop, "stream_views", on_gpu)
    teacher = late(a_teacher())
    ask = teacher.ask

    def asking(images: Tensor, mix: Any, topk: int) -> PendingAnswer:
        ((_, device, first, size, _),) = [call for call in cuda.calls if call[0] == "lock"]
        assert device == gpu
        assert first <= images.data_ptr() < images.data_ptr() + images.nbytes <= first + size
        pending = ask(images, mix, topk)

        def copy() -> PendingAnswer:
            pages.append("unlock" not in [call[0] for call in cuda.calls])
            return pending

        return Late(copy)

    teacher.ask = asking
    assert labelled(tmp_path / "set", data, teacher) == whole
    assert pages == [True] * 6 * 5  # six views of five blocks
    assert [call[0] for call in cuda.calls] == ["lock", "check", "unlock"]
