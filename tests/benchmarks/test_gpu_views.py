"""The phase `views` of benchmarks/gpu.py sees a view that differs, and stops in time."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.photographs import photo
from torch import Tensor

from pipeline.images.samples import Box
from pipeline.pixels import batched
from pipeline.pixels.packed import packed, records
from pipeline.views.view import DrawnOp, View

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_views")


@pytest.fixture
def setting(program, tmp_path) -> Any:
    """A rehearsal in this process."""
    job = importlib.import_module("rounds").Job(seconds=100, work=tmp_path, out=tmp_path, rehearse=True)
    return replace(program.open_setting(job), workers=0)


def off_by_two(number: int) -> Any:
    """Return a renderer that changes a value of the view of this number in a batch by two levels."""
    real = batched.render_batch

    def render_batch(pixels: Tensor, records: Any, *arguments: Any, **options: Any) -> Tensor:
        views = real(pixels, records, *arguments, **options)
        views[number, 3, 4, 2] ^= 2
        return views

    return render_batch


def test_views_that_do_not_differ_are_counted(program, setting):
    assert program.compare(setting, 100) == {"torch": {"asked": 48, "views": 48, "differ": 0}}


def test_the_first_view_that_differs_is_named_with_its_record(program, setting, monkeypatch):
    monkeypatch.setattr(batched, "render_batch", off_by_two(11))
    found = program.compare(setting, 100)["torch"]
    assert (found["views"], found["differ"]) == (48, 3)  # one in each batch of 16
    first = found["first"]
    assert (first["photograph"], first["view"], first["values"], first["levels"]) == (1, 3, 1, 2)
    assert first["record"]["size"] == 32
    assert len(first["record"]["ops"]) == 15


def test_a_difference_fails_the_phase_after_everything_is_measured(program, setting, monkeypatch):
    monkeypatch.setattr(program, "open_setting", lambda _: setting)
    monkeypatch.setattr(program, "compare", lambda *_, **__: {"triton": {"differ": 1}, "torch": {"differ": 0}})
    monkeypatch.setattr(program, "loaders", lambda *_: {})
    with pytest.raises(SystemExit, match="views that triton rendered on cpu differ from those of the CPU"):
        program.on_gpu(setting.job)
    assert {"equal", "alone, 8", "kernels", "steps", "loaders, 1"} <= set(setting.job.found)


def test_a_comparison_stops_in_time_and_says_how_far_it_came(program, setting):
    assert program.compare(setting, 0) == {"torch": {"asked": 48, "views": 16, "differ": 0}}


def test_what_there_is_no_time_for_is_left_out(program, setting, monkeypatch):
    setting.job.rehearse = False
    monkeypatch.setattr(program, "open_setting", lambda _: setting)
    monkeypatch.setattr(program, "renders_on_gpu", lambda *_: True)
    setting.job.seconds = 0
    program.on_gpu(setting.job)
    assert set(setting.job.found) == {"what", "left_out"}
    assert setting.job.found["left_out"][:3] == ["equal", "alone, 64", "alone, 256"]


def test_all_views_that_are_compared_are_handed_over_unrendered(program, setting):
    """A view that a loader had rendered would be compared with itself."""
    render = program.RenderBoth(setting.photos, setting.recipe, 16)
    both = render(0, torch.empty(render.shape, dtype=torch.uint8), lambda _: None)
    _, records = program.unpacked(both.images[render.rendered_bytes :], 16)
    assert (records["image"] > 32).all()
    assert both.drawn == tuple((number // 8, number % 8) for number in range(16))


def test_bytes_are_counted_by_hand(program):
    crop: Box = (1, 2, 30, 40)
    view = View(crop=crop, resize=(16, 16), window=(0, 0), img_size=16, ops=(DrawnOp("Invert", 0.0),))
    height, width = photo(50, 60).shape[:2]
    made = records([packed(view, height=height, width=width)])
    # The crop is read; its rows are written and read; the view is written, and read and written by the operation.
    assert program.moved_bytes(made) == 3 * (30 * 40 + 2 * 30 * 16 + 16 * 16 + 2 * 16 * 16)
