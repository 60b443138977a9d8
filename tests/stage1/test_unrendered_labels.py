"""`precompute --render gpu`: loader processes only decode, and the labels are the same. The CPU plays the GPU, with torch."""

from pathlib import Path
from typing import Any

import pytest
from support.builders import encoded, files_of, make_labels, photo, small_recipe
from torch import Tensor
from webdataset.writer import TarWriter

from pipeline.errors import UsageError
from pipeline.images.source import open_source
from pipeline.labels.replay import check_replay
from pipeline.machine.loaders import Note
from pipeline.pixels import handover, kernel
from pipeline.stage1 import loop
from pipeline.stage1.rendering import BlockRenderer, Unit, ViewBatch
from pipeline.teacher.teacher import Teacher

SMALL, LARGE = (24, 32), (60, 52)  # 12 views of a large one take less memory than the image does
SETTINGS: dict[str, Any] = {"accuracy_samples": 0, "batch_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Photographs of two tars; every third one is large."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    for shard, numbers in enumerate((range(19), range(19, 32))):
        with TarWriter(str(folder / f"train-{shard:06}.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for number in numbers:
                image = encoded(photo(number, *(SMALL if number % 3 else LARGE)))
                tar.write({"__key__": f"img-{number:04}", "jpg": image, "cls": str(number % 3).encode()})
    return str(folder)


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a loader renders")


class OnlyDecodes(BlockRenderer):
    """A renderer that may not call the kernel, in whatever process it is."""

    def __call__(self, unit: Unit, out: Tensor, note: Note) -> ViewBatch:
        kernel.render_views, before = refused, kernel.render_views
        try:
            return super().__call__(unit, out, note)
        finally:
            kernel.render_views = before


@pytest.fixture
def on_gpu(monkeypatch) -> list[int]:
    """Let the CPU play a GPU that renders; collects the number of views of each batch that it gets."""
    batches: list[int] = []
    real = Teacher.rendered

    def noted(teacher: Teacher, images: Tensor, num_views: int) -> Tensor:
        assert images.ndim == 1
        batches.append(num_views)
        return real(teacher, images, num_views)

    monkeypatch.setattr(Teacher, "rendered", noted)
    monkeypatch.setattr(loop, "renders_on_gpu", lambda *_: True)
    return batches


def labelled(out: Path, data: str, **settings: Any) -> dict[str, bytes]:
    return files_of(make_labels(out, data, **(SETTINGS | settings)).folder)


@pytest.mark.parametrize(
    ("views", "per_shard", "workers", "changes"),
    [
        ((0, 12), 12, 0, {}),  # images are held decoded; the large ones do not all fit into the memory of a batch
        ((0, 3), 3, 0, {}),  # of the large ones their views are held
        ((4, 6), 1, 0, {}),  # one view of each decode: no image is held
        ((0, 12), 12, 0, {"mixup": 0.0, "cutmix": 0.0}),  # without pairs
        pytest.param((0, 12), 6, 1, {}, marks=pytest.mark.slow),
        pytest.param((0, 6), 3, 2, {}, marks=pytest.mark.slow),
    ],
)
def test_a_gpu_that_renders_labels_the_same(data, tmp_path, on_gpu, monkeypatch, views, per_shard, workers, changes):
    settings = {"views": views, "views_per_shard": per_shard, "workers": workers, "recipe": small_recipe(**changes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "renders_on_gpu", lambda *_: False)
        expected = labelled(tmp_path / "cpu", data, **settings)
    assert not on_gpu
    assert labelled(tmp_path / "gpu", data, **settings) == expected
    assert sum(on_gpu) == 32 * (views[1] - views[0])


@pytest.mark.parametrize(("views", "workers"), [(30, 0), (1, 0), pytest.param(30, 2, marks=pytest.mark.slow)])
def test_loader_processes_render_nothing(data, tmp_path, on_gpu, monkeypatch, views, workers):
    """Thirty views of an image take more memory than the image, so all images are held decoded; with one view, none is held."""
    settings = {"views": (0, views), "views_per_shard": views, "workers": workers}
    monkeypatch.setattr(handover, "VIEWS_OF_MEMORY", 16)  # the large ones fit, too
    monkeypatch.setattr(loop, "BlockRenderer", OnlyDecodes)
    assert labelled(tmp_path / "gpu", data, **settings)
    assert len(on_gpu) == 5 * views  # mix blocks of 8 images
    monkeypatch.setattr(loop, "renders_on_gpu", lambda *_: False)
    with pytest.raises(AssertionError, match="a loader renders"):  # or the test would prove nothing
        labelled(tmp_path / "cpu", data, **settings)


def test_a_run_may_go_on_with_another_device_that_renders(data, tmp_path, on_gpu, monkeypatch):
    settings = {"views": (0, 6), "views_per_shard": 3}
    whole = labelled(tmp_path / "whole", data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "renders_on_gpu", lambda *_: False)
        labelled(tmp_path / "parts", data, **(settings | {"views": (0, 3)}))
    rendered_here = len(on_gpu)
    assert labelled(tmp_path / "parts", data, **settings) == whole
    assert len(on_gpu) == rendered_here * 3 // 2  # of the second half, the labels alone


def test_probes_that_a_gpu_rendered_are_replayed_by_a_cpu(data, tmp_path, on_gpu):
    label_set = make_labels(tmp_path / "set", data, **SETTINGS)
    assert on_gpu
    assert {probe.view for probe in label_set.manifest.probes} == {0, 2}
    assert check_replay(label_set, open_source(data)) == 0.0


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(UsageError, match="--render gpu: it needs a CUDA device, this run uses cpu"):
        labelled(tmp_path / "set", data, render="gpu")
    assert not (tmp_path / "set").exists()


def test_auto_renders_on_the_cpu_where_there_is_no_gpu(data, tmp_path, caplog):
    with caplog.at_level("INFO", "deit_cli.render"):
        found = labelled(tmp_path / "auto", data, render="auto")
    assert found == labelled(tmp_path / "cpu", data)
    assert "views are rendered on the CPU: it needs a CUDA device, this run uses cpu" in caplog.messages
