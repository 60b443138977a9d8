"""`--render gpu`: what is handed over arrives as the views that a CPU renders, and labels and runs are the same to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import CNN, busy, labels_of, load, losses_of, run_config, state_of, views_in
from support.builders import files_of
from torch import Tensor

from pipeline.images.source import open_source
from pipeline.machine.loaders import PREFETCH
from pipeline.pixels.handover import renders_on_gpu
from pipeline.stage1 import loop as labelling
from pipeline.stage1.loop import AHEAD
from pipeline.views.mixing import MixBatch
from pipeline.views.recipe import PRESETS
from trainer.loop import train
from trainer.run import make_order, open_data
from trainer.stream import Batch, BatchRenderer, Catalogue, on_device, stream_batches

pytestmark = pytest.mark.gpu

WORKERS = 2
LATE_S = 0.01


def test_this_gpu_renders_the_pixels_of_the_cpu(gpu):
    assert renders_on_gpu("gpu", PRESETS["deit"], gpu)


def test_stage_1_sees_the_pixels_of_a_cpu_however_late_a_gpu_renders(device, data, label_set, tmp_path, monkeypatch):
    """Sixty batches go through seven page-locked slots, whose memory loader processes write to again."""
    teacher = load(CNN, device)
    compute, render = teacher._compute, teacher.rendered
    arrived: list[Tensor] = []

    def noting(images: Tensor, mix: MixBatch, topk: int) -> Any:
        busy(device, LATE_S)
        arrived.append(images.clone())
        return compute(images, mix, topk)

    def late(images: Tensor, num_views: int) -> Tensor:
        assert images.ndim == 1
        if teacher._copies is not None:
            assert images.is_pinned()
            with torch.cuda.stream(teacher._copies):
                busy(device, LATE_S)
        return render(images, num_views)

    teacher._compute, teacher.rendered = noting, late
    monkeypatch.setattr(labelling, "renders_on_gpu", lambda *_: True)
    labels_of(teacher, tmp_path / "set", data, views=(0, 12), workers=WORKERS)
    expected = list(views_in(label_set, open_source(data), range(12), workers=WORKERS))
    assert len(arrived) == len(expected) >= 5 * (WORKERS * PREFETCH + AHEAD + 1)
    apart = [at for at, (mine, batch) in enumerate(zip(arrived, expected, strict=True)) if not torch.equal(mine.cpu(), batch.images)]  # fmt: skip
    assert apart == []


def test_stage_2_sees_the_pixels_of_a_cpu_however_late_a_gpu_renders(device, label_set, tmp_path, monkeypatch):
    """Forty batches go through six page-locked slots, whose memory loader processes write to again."""
    config = run_config(label_set, tmp_path / "run", device)
    data = open_data(config)
    order = make_order(config, data)
    catalogue = Catalogue(data.source, data.label_set)
    real = Batch.to

    def late(self: Batch, where: torch.device) -> Batch:
        assert self.images.ndim == 1
        assert self.images.is_pinned() == (where.type == "cuda")
        busy(where, LATE_S)  # on the stream that copies and renders
        return real(self, where)

    monkeypatch.setattr(Batch, "to", late)
    renderer, arrived = BatchRenderer(catalogue, data.recipe, order), []
    stream = stream_batches(renderer, range(40), workers=WORKERS, device=device, unrendered=True)
    for batch in on_device(stream, device):
        busy(device, LATE_S / 2)
        arrived.append((batch.index, batch.images.clone()))
    assert [index for index, _ in arrived] == list(range(40))
    again = BatchRenderer(catalogue, data.recipe, order)
    assert [index for index, images in arrived if not torch.equal(images.cpu(), again.render_here(index).images)] == []


def test_labels_are_the_same_files_whatever_renders(gpu, data, tmp_path):
    found = []
    for way in ("cpu", "gpu"):
        settings: dict[str, Any] = {"views": (0, 12), "workers": WORKERS, "render": way}
        found.append(files_of(labels_of(load(CNN, gpu), tmp_path / way, data, **settings).folder))
    assert found[0] == found[1]


def test_a_deterministic_run_has_the_same_weights_whatever_renders(gpu, label_set, tmp_path):
    runs: dict[str, Path] = {}
    for way in ("cpu", "gpu"):
        settings: dict[str, Any] = {"render": way, "workers": WORKERS, "deterministic": True}
        runs[way] = train(run_config(label_set, tmp_path / way, gpu, **settings))
    mine, theirs = state_of(runs["cpu"]), state_of(runs["gpu"])
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert losses_of(runs["cpu"]) == losses_of(runs["gpu"])
