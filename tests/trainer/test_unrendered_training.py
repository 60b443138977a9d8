"""`train --render gpu`: loader processes only decode, and the run is the same to the bit. The CPU plays the GPU, with torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import before_update, encoded, files_of, interrupt, make_labels, photo, small_recipe
from support.training import TINY, assert_same_state
from torch import Tensor
from webdataset.writer import TarWriter

from pipeline.errors import TrainingError, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.machine.loaders import Note
from pipeline.pixels import handover, kernel
from trainer import loop, stream
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.stream import Batch, BatchRenderer

SMALL, LARGE = (24, 32), (150, 200)  # a large one does not fit into the memory of a batch of 12 views of 16 pixels
TIMES = {"images_per_s", "data_wait"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Photographs of two tars; every fifth one is large."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    for shard, numbers in enumerate((range(24), range(24, 39))):
        with TarWriter(str(folder / f"train-{shard:06}.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for number in numbers:
                image = encoded(photo(number, *(LARGE if number % 5 == 2 else SMALL)))
                tar.write({"__key__": f"img-{number:04}", "jpg": image, "cls": str(number % 3).encode()})
    return str(folder)


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data, topk=2, accuracy_samples=0)


def config(label_set: LabelSet | None, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"output": output, "batch_size": 12, "epochs": 2, "warmup_epochs": 1, "lr": 1e-3}
    values |= TINY | {"workers": 0, "log_interval": 1} | ({"labels": label_set.folder} if label_set else {})
    return TrainConfig(**(values | changes))


@pytest.fixture
def on_gpu(monkeypatch) -> list[Tensor]:
    """Let the CPU play a GPU that renders; collects what it gets, which is overwritten later."""
    given: list[Tensor] = []

    def noted(images: Tensor, num_views: int, device: torch.device) -> Tensor:
        given.extend([images] if images.ndim == 1 else [])
        return handover.rendered(images, num_views, device)

    monkeypatch.setattr(stream, "rendered", noted)
    monkeypatch.setattr(loop, "renders_on_gpu", lambda *_: True)
    return given


def on_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "renders_on_gpu", lambda *_: False)


def lines_of(run: Path) -> Sequence[dict[str, Any]]:
    """Return what a run has logged, without times."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(run)]


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({}, 6),
        ({"repeated_aug": 1, "drop_path": 0.2, "clip_grad": 1.0}, 6),
        ({"batch_size": 6, "grad_accum_steps": 2, "distillation_type": "soft"}, 12),
        ({"probe_interval": 2, "model_ema_decay": 0.9}, 6),
        ({"deterministic": True, "device": "cpu"}, 6),
        pytest.param({"workers": 2}, 6, marks=pytest.mark.slow),
        pytest.param({"compile": True, "drop_path": 0.0}, 6, marks=pytest.mark.slow),
    ],
)
def test_a_run_with_a_gpu_that_renders_is_the_same_to_the_bit(label_set, tmp_path, on_gpu, settings, batches):
    with pytest.MonkeyPatch.context() as patch:
        on_cpu(patch)
        train(config(label_set, tmp_path / "cpu", **settings))
    assert not on_gpu
    train(config(label_set, tmp_path / "gpu", **settings))
    assert len(on_gpu) == batches
    assert_same_state(tmp_path / "cpu", tmp_path / "gpu")
    assert files_of(tmp_path / "cpu/last") == files_of(tmp_path / "gpu/last")
    assert lines_of(tmp_path / "cpu") == lines_of(tmp_path / "gpu")


def test_without_a_label_set_the_run_is_the_same_to_the_bit(data, tmp_path, on_gpu):
    """Then each image is decoded completely."""
    settings = {"data": data, "distillation_type": "none"}
    for name in ("cpu", "gpu"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "cpu":
                on_cpu(patch)
            train(config(None, tmp_path / name, **settings), small_recipe())
    assert on_gpu
    assert_same_state(tmp_path / "cpu", tmp_path / "gpu")


def test_a_run_may_go_on_with_another_device_that_renders(label_set, tmp_path, on_gpu):
    train(config(label_set, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, before_update(2, interrupt):
        on_cpu(patch)
        with pytest.raises(KeyboardInterrupt):
            train(config(label_set, tmp_path / "cut", recovery_interval=1))
    before = len(on_gpu)
    train(config(label_set, tmp_path / "cut", recovery_interval=1, render="auto", resume="auto"))
    assert len(on_gpu) - before == 4
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a loader renders")


class OnlyDecodes(BatchRenderer):
    """A renderer that may not call the kernel, in whatever process it is."""

    def __call__(self, index: int, out: Tensor, note: Note) -> Batch:
        kernel.render_views, before = refused, kernel.render_views
        try:
            return super().__call__(index, out, note)
        finally:
            kernel.render_views = before


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loader_processes_render_nothing(label_set, tmp_path, on_gpu, monkeypatch, workers):
    monkeypatch.setattr(loop, "BatchRenderer", OnlyDecodes)
    with pytest.raises(AssertionError, match="a loader renders"):  # a large image, as the memory is
        train(config(label_set, tmp_path / "large", workers=workers))
    monkeypatch.setattr(handover, "VIEWS_OF_MEMORY", 2.25 + LARGE[0] * LARGE[1] / 16**2)
    train(config(label_set, tmp_path / "run", workers=workers, recovery_interval=1))
    assert read_metrics(tmp_path / "run")


def test_the_memory_of_a_batch_is_used_again_after_the_device_has_rendered_it(label_set, tmp_path, on_gpu):
    """There is a slot for each batch that is held, and for the one that is made; otherwise this test would see no reuse."""
    train(config(label_set, tmp_path / "run", epochs=4))
    addresses = [images.data_ptr() for images in on_gpu]
    assert len(addresses) == 12
    assert len(set(addresses)) < 4


def test_the_views_of_a_loss_that_is_no_number_are_saved_rendered(label_set, tmp_path, on_gpu):
    wild = {"lr": 1e3, "epochs": 50, "warmup_epochs": 0, "min_lr": 1e3, "smoothing": 0.0}
    with pytest.raises(TrainingError, match=r"the loss of update \d+ is (nan|inf)"):
        train(config(label_set, tmp_path / "run", **wild))
    tensors, _ = load_state(tmp_path / "run/nonfinite-rank0.safetensors")
    assert on_gpu
    assert tensors["0.images"].shape == (12, 16, 16, 3)


def test_a_gpu_that_is_not_there_is_refused_before_a_run_begins(label_set, tmp_path):
    with pytest.raises(UsageError, match="--render gpu: it needs a CUDA device, this run uses cpu"):
        train(config(label_set, tmp_path / "run", render="gpu", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_auto_renders_on_the_cpu_where_there_is_no_gpu(label_set, tmp_path, caplog):
    with caplog.at_level("INFO", "deit_cli.render"):
        train(config(label_set, tmp_path / "auto", render="auto", device="cpu", epochs=1))
    assert "views are rendered on the CPU: it needs a CUDA device, this run uses cpu" in caplog.messages
