"""Views that are handed over to a device are those that a loader process renders; torch on the CPU plays the device."""

import logging
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import pytest
import torch
from support.photographs import photo
from support.random_views import random_views
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.pixels import batched, handover, packed
from pipeline.pixels.handover import (
    RenderedViews,
    UnrenderedViews,
    begin_batch,
    bytes_for,
    rendered,
    renders_on_gpu,
    slot_shape,
)
from pipeline.pixels.packed import RECORD
from pipeline.views.recipe import PRESETS
from pipeline.views.view import View, draw_view

CPU, GPU = torch.device("cpu"), torch.device("cuda:3")
DEIT = PRESETS["deit"]
Item = tuple[np.ndarray, list[View]]  # an image, uint8 [H, W, 3], and views of it


def drawn(shapes: Sequence[tuple[int, int]], size: int, views: Sequence[int]) -> list[Item]:
    """Draw so many views of images of these shapes in turn."""
    recipe, items = DEIT.with_fields(img_size=size, aa="rand-m9-mstd0.5-inc1-n3"), []
    for number, count in enumerate(views):
        height, width = shapes[number % len(shapes)]
        each = [draw_view(recipe, str(number), view, height=height, width=width) for view in range(count)]
        items.append((photo(height, width, number), each))
    return items


def square(size: int, crop: tuple[int, int, int, int]) -> View:
    """Return the view that shows a crop and nothing else."""
    return View(crop=crop, resize=(size, size), window=(0, 0), img_size=size)


def memory_of(size: int) -> Tensor:
    """Return memory that an earlier batch has written to."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, np.uint8))


def places_of(items: Sequence[Item], seed: int = 0) -> list[list[int]]:
    """Give each view a position in the batch, in no order."""
    positions = list(range(sum(len(views) for _, views in items)))
    Random(seed).shuffle(positions)
    return [[positions.pop() for _ in views] for _, views in items]


def handed_over(items: Sequence[Item], size: int, memory: Tensor | None = None) -> Tensor:
    """Hand views over, compare them with those rendered here, and return what was handed over."""
    places = places_of(items)
    count = sum(map(len, places))
    there = UnrenderedViews(memory_of(bytes_for(count, size)) if memory is None else memory, count, size)
    here = RenderedViews(memory_of(count * size**2 * 3).view(count, size, size, 3))
    for at, (image, views) in zip(places, items, strict=True):
        there.add(at, image, views)
        here.add(at, image, views)
    found = rendered(there.images, count, CPU)
    assert found.shape == (count, size, size, 3)
    differing = (found != here.images).flatten(1).any(1).nonzero().ravel().tolist()
    assert differing == []
    return there.images


# --- batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "size", "views"),
    [
        (((50, 70), (64, 48)), 48, (1,) * 12),  # one view of each image
        (((50, 70), (64, 48)), 48, (3,) * 8),  # training's default
        (((50, 70), (1, 1), (9, 300)), 48, (1, 5, 2, 3, 1, 4)),
        (((30, 30),), 1, (2, 1, 3)),
        (((1, 1), (3, 2)), 2, (1, 2, 2)),
        (((40, 60), (1, 2)), 448, (2, 1, 1)),  # larger than the images
        (((375, 500),), 224, (3, 1)),
    ],
)
def test_views_are_those_that_are_rendered_here(shapes, size, views):
    handed_over(drawn(shapes, size, views), size)


@pytest.mark.parametrize(("size", "scale"), [(1, 1), (24, 1), (33, 5)])
def test_views_with_parameters_of_every_kind_are_those_that_are_rendered_here(size, scale):
    handed_over([(image, [view]) for image, view in random_views(size, 60, size, scale=scale)], size)


def test_views_of_an_image_share_one_copy_of_the_part_that_they_need():
    image = photo(100, 90)
    items = [(image, [square(16, (10, 20, 5, 6)), square(16, (30, 40, 7, 8)), square(16, (12, 21, 3, 3))])]
    used = handed_over(items, 16)
    assert len(used) == 3 * RECORD.itemsize + 3 * (37 - 10) * (48 - 20)
    assert (used[3 * RECORD.itemsize :].numpy() == image[10:37, 20:48].ravel()).all()


@pytest.mark.parametrize("large", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_views_of_images_that_are_larger_than_the_memory_are_rendered_before(large, monkeypatch):
    """Views of small images stay unrendered, before and after a large one."""
    size, rendered_here = 16, []
    real = handover.render
    monkeypatch.setattr(handover, "render", lambda image, view: rendered_here.append(image.shape) or real(image, view))
    items = []
    for number in range(4):
        height, width = (300, 400) if number in large else (20, 24)
        items += [(photo(height, width, number), [square(size, (0, 0, height, width))] * 2)]
    used = handed_over(items, size)
    assert rendered_here == [(300, 400, 3)] * 2 * len(large)
    pixels = 3 * (len(large) * 2 * size**2 + (4 - len(large)) * 20 * 24)
    assert len(used) == 8 * RECORD.itemsize + pixels


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("missing", "pixels"), [(0, 500 + 64), (1, 64 + 64)])
def test_memory_may_be_full_to_the_last_byte(missing, pixels, last):
    """500 pixels of an image, and 64 of another view; where a byte is missing, the view of 500 is rendered before."""
    items = [(photo(20, 25), [square(8, (0, 0, 20, 25))]), (photo(8, 8), [square(8, (0, 0, 8, 8))])]
    memory = memory_of(2 * RECORD.itemsize + 3 * (500 + 64) - missing)
    used = handed_over(items[::-1] if last else items, 8, memory)
    assert len(used) == 2 * RECORD.itemsize + 3 * pixels


def test_a_view_that_is_rendered_already_is_handed_over_as_it_is():
    size, (image, (view, other)) = 20, drawn([(50, 40)], 20, [2])[0]
    batch = UnrenderedViews(memory_of(bytes_for(3, size)), 3, size)
    here = RenderedViews(torch.empty(3, size, size, 3, dtype=torch.uint8))
    for each in (batch, here):
        each.add([2], image, [view])
        each.add_rendered(0, photo(size, size, 5))
        each.add([1], image, [other])
    views = rendered(batch.images, 3, CPU)
    assert torch.equal(views, here.images)
    assert (views[0].numpy() == photo(size, size, 5)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 16, 224])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_memory_of_a_batch_holds_any_views(count, size):
    """The worst are views of images so large that none fits, and one that takes nearly all that may be taken."""
    memory = bytes_for(count, size)
    assert memory % 64 == 0
    assert memory >= count * (RECORD.itemsize + 3 * size**2)
    free = memory - count * RECORD.itemsize - 3 * (count - 1) * size**2
    images = [np.zeros((1, free // 3, 3), np.uint8), *[np.zeros((1, free // 3 + 1, 3), np.uint8)] * (count - 1)]
    handed_over([(image, [square(size, (0, 0, *image.shape[:2]))]) for image in images], size)


@pytest.mark.parametrize("unrendered", [False, True])
def test_a_batch_may_be_smaller_than_its_slot(unrendered):
    """As the last one of an epoch is."""
    size, items = 16, drawn([(30, 40)], 16, [2, 1])
    slot = memory_of(int(np.prod(slot_shape(8, size, unrendered=unrendered))))
    batch = begin_batch(slot.view(slot_shape(8, size, unrendered=unrendered)), 3, size)
    assert isinstance(batch, UnrenderedViews if unrendered else RenderedViews)
    here = RenderedViews(torch.empty(3, size, size, 3, dtype=torch.uint8))
    for each in (batch, here):
        for at, (image, views) in zip(([2, 0], [1]), items, strict=True):
            each.add(at, image, views)
    assert batch.images.data_ptr() == slot.data_ptr()
    assert torch.equal(rendered(batch.images, 3, CPU), here.images)


# --- whether a device renders ---------------------------------------------------------------------------------


def play_gpu(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor] = lambda views: views) -> list[Tensor]:
    """Let the CPU play a GPU whose pixels are changed; return what it is given."""
    given: list[Tensor] = []

    def on_cpu(images: Tensor, num_views: int, device: torch.device) -> Tensor:
        assert device == GPU
        given.append(images)
        return change(rendered(images, num_views, CPU))

    monkeypatch.setattr(handover, "rendered", on_cpu)
    return given


def dimmer(count: int) -> Callable[[Tensor], Tensor]:
    """Return a function that changes one value of so many views by one level."""

    def change(views: Tensor) -> Tensor:
        views[:count, 5, 7, 1] ^= 1
        return views

    return change


@pytest.mark.parametrize("asked", ["gpu", "auto"])
def test_a_gpu_with_the_same_pixels_renders(asked, monkeypatch, caplog):
    given = play_gpu(monkeypatch)
    monkeypatch.setattr(handover, "missing_for_triton", lambda: None)
    assert renders_on_gpu(asked, DEIT, GPU)
    assert len(given) == 1
    assert not caplog.records


def test_without_triton_a_gpu_is_slow_and_renders_only_if_it_must(monkeypatch, caplog):
    """Plain torch launches a hundred kernels for each view."""
    play_gpu(monkeypatch)
    monkeypatch.setattr(batched, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "deit_cli.render"):
        assert not renders_on_gpu("auto", DEIT, GPU)
        assert renders_on_gpu("gpu", DEIT, GPU)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "views are rendered on the CPU: Triton is not installed"),
        ("WARNING", "views are rendered on cuda:3 in plain torch, which is slow: Triton is not installed"),
    ]


def test_triton_needs_a_compiler(monkeypatch, caplog):
    play_gpu(monkeypatch)
    monkeypatch.setattr(batched, "find_spec", lambda name: object())
    monkeypatch.setattr(batched.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO, "deit_cli.render"):
        assert not renders_on_gpu("auto", DEIT, GPU)
    assert caplog.messages == [
        "views are rendered on the CPU: Triton needs a C compiler (gcc, clang, or the one that CC names)"
    ]
    monkeypatch.setenv("CC", "my-compiler")
    assert renders_on_gpu("auto", DEIT, GPU)


def test_cpu_is_not_questioned(monkeypatch, caplog):
    given = play_gpu(monkeypatch)
    assert not renders_on_gpu("cpu", DEIT, GPU)
    assert not given
    assert not caplog.records


def test_the_views_that_are_compared_have_every_operation(monkeypatch):
    given = play_gpu(monkeypatch)
    assert renders_on_gpu("gpu", DEIT, GPU)
    records = given[0][: 32 * RECORD.itemsize].numpy().view(RECORD)
    kinds = records["ops"]["kind"][np.arange(15) < records["num_ops"][:, None]]
    assert set(kinds.tolist()) == set(range(packed.SHARPNESS + 1))
    assert 4 < np.count_nonzero(records["erase"][:, 2]) < 16
    assert 8 < np.count_nonzero(records["flip"]) < 24


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(handover, "rendered", no_compiler)


PROBLEMS = [
    (CPU, 2, None, "it needs a CUDA device, this run uses cpu"),
    (GPU, 1, None, "views of renderer 1 are defined by libraries of the CPU; label again with renderer 2"),
    (GPU, 2, lambda patch: play_gpu(patch, dimmer(3)), "3 of 32 views had other pixels on cuda:3 than on the CPU"),
    (GPU, 2, failing, "rendering on cuda:3 failed: RuntimeError: Failed to find C compiler."),
]


@pytest.mark.parametrize(("device", "renderer", "arrange", "problem"), PROBLEMS)
def test_a_device_that_cannot_render_is_refused(device, renderer, arrange, problem, monkeypatch, caplog):
    if arrange:
        arrange(monkeypatch)
    with pytest.raises(UsageError) as refused:
        renders_on_gpu("gpu", DEIT.with_fields(renderer=renderer), device)
    assert refused.value.what == f"--render gpu: {problem}"
    assert refused.value.fix == "Pass --render cpu"
    assert not caplog.records


@pytest.mark.parametrize(("device", "renderer", "arrange", "problem"), PROBLEMS)
def test_auto_falls_back_to_the_cpu_and_says_why(device, renderer, arrange, problem, monkeypatch, caplog):
    if arrange:
        arrange(monkeypatch)
    with caplog.at_level(logging.INFO, "deit_cli.render"):
        assert not renders_on_gpu("auto", DEIT.with_fields(renderer=renderer), device)
    assert caplog.messages == [f"views are rendered on the CPU: {problem}"]
