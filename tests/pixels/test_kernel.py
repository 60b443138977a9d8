"""The compiled kernel: with each instruction set the pixels of docs/views-v2.md, and no byte of other memory is read or written."""

import itertools
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import shared_data, with_checkout
from support.defined_views import render_by_definition
from support.extreme_views import Pixels, extreme_views
from support.label_sets import make_label_set
from support.photographs import photo
from support.random_views import random_views, views_of_each_op
from support.students import exported, make_student, write_photos
from support.training import TINY

from pipeline.images.decode import decode
from pipeline.pixels import batched, kernel
from pipeline.pixels.render import render
from pipeline.views.recipe import MAX_LAYERS, PRESETS
from pipeline.views.view import DrawnOp, Erase, View, draw_view
from trainer.config import EvaluateConfig, TrainConfig
from trainer.evidence.scores import evaluate_checkpoint
from trainer.loop import train

compiled = pytest.mark.skipif(not kernel.is_compiled(), reason=": ".join(kernel.trouble() or ()))
LEVELS = range(kernel.best_level() + 1) if kernel.is_compiled() else range(0)


def rendered(image: Pixels, view: View, level: int) -> Pixels:
    out = np.full((view.img_size, view.img_size, 3), 77, np.uint8)
    kernel.render_views(image, [view], [out], level=level)
    return out


def assert_as_defined(images_and_views: list[tuple[Pixels, View]]) -> None:
    for image, view in images_and_views:
        defined = render_by_definition(image, view)
        for level in LEVELS:
            assert np.array_equal(rendered(image, view, level), defined), (level, image.shape, view)


def whole(image: Pixels, size: int, **changes: Any) -> View:
    return View(crop=(0, 0, *image.shape[:2]), resize=(size, size), window=(0, 0), img_size=size, **changes)


# --- every instruction set gives the defined pixels -------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("seed", range(6))
def test_views_at_the_limits_are_as_defined(seed):
    assert_as_defined(extreme_views(seed, 200))


@compiled
@pytest.mark.parametrize("size", range(1, 71))
def test_every_operation_is_as_defined_at_every_size(size):
    """So rows end at every place in a vector."""
    random = random_views(size, 4, size, layers=15)
    assert_as_defined(random if size > 20 and size % 9 else random + views_of_each_op(size))


@compiled
@pytest.mark.parametrize("seed", range(2))
def test_views_of_the_usual_size_are_as_defined(seed):
    assert_as_defined(random_views(seed, 20, 224, layers=4, scale=6))


# from a side to another: much smaller, much larger, from one pixel, and sides that are no multiple of 16
@compiled
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(4000, 700, 16), (17, 4099, 3), (1, 1, 224), (1, 3001, 70), (999, 1, 33), (15, 31, 224)],
)
def test_resizes_are_as_defined(height, width, size):
    image = photo(height, width)
    for interpolation, flip in itertools.product(("bilinear", "bicubic"), (False, True)):
        assert_as_defined([(image, whole(image, size, interpolation=interpolation, flip=flip))])


@compiled
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_turned_images_of_nearly_whole_numbers_are_as_defined(interpolation):
    """There the binary32 numbers of the fast way say nothing, and the exact way decides."""
    y, x = np.indices((64, 64))
    images = [
        np.repeat((values % 256).astype(np.uint8)[..., None], 3, 2)
        for values in (x, 3 * y, x * 0 + 9, (x + y) // 8 * 85)
    ]
    angles = (1e-14, -1e-14, 1e-9, 1e-4, 0.5, 30.0, 36.86989764584402, 45.0, 60.0, 135.0, 359.9999999)
    for image, degrees in itertools.product(images, angles):
        assert_as_defined([(image, whole(image, 64, ops=(DrawnOp("Rotate", degrees, interpolation),)))])


@compiled
def test_all_levels_of_a_value_are_as_defined():
    """The operations that look at one value meet all 256, and blends all pairs of a value and a base."""
    ramp = np.arange(256, dtype=np.uint8)
    image = np.stack([np.tile(ramp, (256, 1)), np.tile(ramp[:, None], (1, 256)), np.tile(ramp[::-1], (256, 1))], axis=2)
    factors = (0.0, 0.1, 0.37, 1.0, 1.9, -1.0, 1000.0)
    ops = [DrawnOp(name, factor) for name in ("Color", "Contrast", "Brightness", "Sharpness") for factor in factors]
    ops += [DrawnOp("Solarize", threshold) for threshold in (0, 1, 77, 255, 256)]
    ops += [DrawnOp("SolarizeAdd", added) for added in (0, 1, 110, 128)] + [
        DrawnOp("Posterize", bits) for bits in range(-1, 10)
    ]
    ops += [DrawnOp("AutoContrast"), DrawnOp("Equalize"), DrawnOp("Invert")]
    assert_as_defined([(image, whole(image, 256, ops=(op,))) for op in ops])


@compiled
def test_many_views_of_an_image_are_those_one_by_one():
    image = photo(90, 120)
    views = [draw_view(PRESETS["deit"].with_fields(img_size=17 + n), "k", n, height=90, width=120) for n in range(40)]
    out = [np.empty((view.img_size, view.img_size, 3), np.uint8) for view in views]
    kernel.render_views(image, views, out)
    for view, pixels in zip(views, out, strict=True):
        assert np.array_equal(pixels, render_by_definition(image, view))


def photographs() -> Iterator[tuple[str, Pixels]]:
    with tarfile.open(shared_data("imagenet-sample") / "train-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, decode(file.read(), key=member.name)


@compiled
@pytest.mark.slow
def test_views_of_photographs_are_the_same_with_every_instruction_set_and_torch():
    """160 views of each of 125 photographs; every 80th is compared with the definition, too."""
    recipe, seen = PRESETS["deit"], 0
    for key, image in photographs():
        height, width = image.shape[:2]
        for first in range(0, 160, 16):
            views = [draw_view(recipe, key, view, height=height, width=width) for view in range(first, first + 16)]
            expected = batched.render_views(image, views)
            for level in LEVELS:
                out = np.empty_like(expected)
                kernel.render_views(image, views, list(out), level=level)
                assert np.array_equal(out, expected), (key, first, level)
            seen += len(views)
            if first % 80 == 0:
                assert np.array_equal(expected[0], render_by_definition(image, views[0])), views[0]
    assert seen == 20_000


# --- memory -----------------------------------------------------------------------------------------------------------

# Image, scratch memory and places of views touch pages that nothing may read or write: before them, or after them.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
from support.extreme_views import extreme_views
from support.random_views import random_views
from pipeline.pixels import kernel
from pipeline.pixels.packed import packed
from pipeline.views.noise import noise_levels

PAGE, NONE = mmap.PAGESIZE, 0
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

class Guarded:
    def __init__(self, most):
        self.pages = -(-most // PAGE)
        self.memory = mmap.mmap(-1, (self.pages + 2) * PAGE)
        self.all = np.frombuffer(self.memory, np.uint8)
        for page in (0, self.pages + 1):
            start = self.all.__array_interface__["data"][0] + page * PAGE
            assert libc.mprotect(start, PAGE, NONE) == 0

    def last(self, size):
        assert size <= self.pages * PAGE
        return self.all[(self.pages + 1) * PAGE - size : (self.pages + 1) * PAGE]

    def first(self, size):
        return self.all[PAGE : PAGE + size]

image_memory, scratch, place = Guarded(2_000_000), Guarded(20_000_000), Guarded(200_000)
library, noise = kernel._library(), noise_levels()
address = lambda array: array.__array_interface__["data"][0]
for number, (image, view) in enumerate(extreme_views(11, 1200) + random_views(12, 30, 224, scale=3)):
    height, width = image.shape[:2]
    record = packed(view, height=height, width=width)
    shape = (view.img_size, view.img_size, 3)
    expected = np.empty(shape, np.uint8)
    kernel.render_views(image, [view], [expected])
    for level in range(kernel.best_level() + 1):
        for side in ("first", "last"):
            at = getattr(image_memory, side)(image.size)
            at[:] = image.reshape(-1)
            out = getattr(place, side)(expected.size)
            memory = getattr(scratch, side)(library.scratch_bytes(record, 1))
            assert address(memory) % 64 == 0
            if sys.argv[1:] == ["outside"]:
                at = image_memory.all[-PAGE:]
            library.render(level, address(at), address(at) + image.size, record, 1, address(noise), address(memory),
                           (ctypes.c_void_p * 1)(address(out)))
            assert np.array_equal(out.reshape(shape), expected), (number, level, side)
print("all", number + 1)
"""


def run_guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARDED, *arguments]
    return subprocess.run(command, env=with_checkout(), capture_output=True, text=True)


@compiled
def test_nothing_before_or_after_the_memory_is_touched():
    run = run_guarded()
    assert (run.returncode, run.stdout) == (0, "all 1230\n"), run.stderr[-2000:]
    assert run_guarded("outside").returncode == -11  # SIGSEGV: the pages are indeed guarded


@compiled
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_around_the_place_of_a_view_is_written(level):
    for image, view in extreme_views(21, 300):
        size = 3 * view.img_size**2
        around = np.full(size + 256, 201, np.uint8)
        out = around[128 : 128 + size].reshape(view.img_size, view.img_size, 3)
        kernel.render_views(image, [view], [out], level=level)
        assert (around[:128] == 201).all()
        assert (around[128 + size :] == 201).all()


@compiled
def test_images_and_places_may_begin_at_any_byte():
    image = photo(33, 47)
    view = whole(image, 29, ops=(DrawnOp("Rotate", 20.0), DrawnOp("Sharpness", 1.5), DrawnOp("Color", 0.3)))
    expected = render_by_definition(image, view)
    for level, shift in itertools.product(LEVELS, range(0, 64, 7)):
        held, place = np.zeros(image.size + 64, np.uint8), np.zeros(expected.size + 64, np.uint8)
        moved = held[shift : shift + image.size].reshape(image.shape)
        moved[:] = image
        out = place[shift : shift + expected.size].reshape(expected.shape)
        kernel.render_views(moved, [view], [out], level=level)
        assert np.array_equal(out, expected)


@compiled
def test_the_image_and_its_views_stay_as_they_are():
    image = photo(50, 60)
    before = image.copy()
    image.flags.writeable = False
    for view in range(20):
        render(image, draw_view(PRESETS["deit"], "k", view, height=50, width=60))
    assert np.array_equal(image, before)


@compiled
def test_threads_render_at_once_and_scratch_memory_grows_when_it_must():
    """Small and large views alternate in each thread, so a thread that used the memory of another would be seen."""
    work = extreme_views(31, 60) + random_views(32, 6, 224, scale=3)
    expected = [render_by_definition(image, view) for image, view in work]
    wrong: list[int] = []

    def render_all(start: int) -> None:
        for number in [*range(start, len(work)), *range(start), *range(len(work) - 1, -1, -1)] * 5:
            image, view = work[number]
            if not np.array_equal(rendered(image, view, kernel.best_level()), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=render_all, args=(15 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what is refused --------------------------------------------------------------------------------------------------

IMAGE, VIEW = photo(20, 30), View(crop=(0, 0, 20, 30), resize=(8, 9), window=(0, 1), img_size=8)
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # what is changed, the changes, the error
    ("view", {"crop": (0, 1, 20, 30)}, "the crop (0, 1, 20, 30) must lie inside the image of 20 x 30"),
    ("view", {"crop": (-1, 0, 5, 5)}, "the crop (-1, 0, 5, 5) must lie inside the image of 20 x 30"),
    ("view", {"crop": (0, 0, 0, 5)}, "the crop (0, 0, 0, 5) must lie inside the image of 20 x 30"),
    ("view", {"window": (0, 2)}, "the window of 8 pixels at (0, 2) must lie inside the crop resized to (8, 9)"),
    ("view", {"window": (-1, 0)}, "the window of 8 pixels at (-1, 0) must lie inside the crop resized to (8, 9)"),
    ("view", {"resize": (7, 9)}, "the window of 8 pixels at (0, 1) must lie inside the crop resized to (7, 9)"),
    ("view", {"erase": Erase((4, 4, 5, 1), 0)}, "the erased box (4, 4, 5, 1) must lie inside the view of 8 pixels"),
    ("view", {"erase": Erase((0, 0, -1, 1), 0)}, "the erased box (0, 0, -1, 1) must lie inside the view of 8 pixels"),
    ("view", {"ops": (DrawnOp("Invert"),) * 16}, f"a view has at most {MAX_LAYERS} operations, got 16"),
    ("image", {"image": IMAGE.astype(np.int8)}, "an image must be contiguous uint8 [H, W, 3], got int8 [20, 30, 3], contiguous"),
    ("image", {"image": IMAGE[..., 0]}, "an image must be contiguous uint8 [H, W, 3], got uint8 [20, 30], not contiguous"),
    ("image", {"image": np.zeros((20, 30, 4), np.uint8)}, "an image must be contiguous uint8 [H, W, 3], got uint8 [20, 30, 4], contiguous"),
    ("image", {"image": photo(20, 60)[:, ::2]}, "an image must be contiguous uint8 [H, W, 3], got uint8 [20, 30, 3], not contiguous"),
    ("out", {"out": np.zeros((8, 9, 3), np.uint8)}, "a view of 8 pixels needs contiguous writable uint8 [8, 8, 3], got uint8 [8, 9, 3], contiguous"),
    ("out", {"out": np.zeros((8, 8, 3), np.float32)}, "a view of 8 pixels needs contiguous writable uint8 [8, 8, 3], got float32 [8, 8, 3], contiguous"),
    ("out", {"out": np.zeros((3, 8, 8), np.uint8).transpose(1, 2, 0)}, "a view of 8 pixels needs contiguous writable uint8 [8, 8, 3], got uint8 [8, 8, 3], not contiguous"),
    ("out", {"out": np.broadcast_to(np.uint8(0), (8, 8, 3))}, "a view of 8 pixels needs contiguous writable uint8 [8, 8, 3], got uint8 [8, 8, 3], not contiguous, read-only"),
]  # fmt: skip


@compiled
@pytest.mark.parametrize(("what", "changes", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_touch_other_memory_is_refused(what, changes, said):
    image, view, out = IMAGE, VIEW, np.zeros((8, 8, 3), np.uint8)
    match what:
        case "view":
            view = replace(view, **changes)
        case "image":
            image = changes["image"]
        case "out":
            out = changes["out"]
    with pytest.raises(ValueError) as error:
        kernel.render_views(image, [VIEW, view], [np.zeros((8, 8, 3), np.uint8), out])
    assert str(error.value) == said


@compiled
def test_each_view_needs_its_place():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        kernel.render_views(IMAGE, [VIEW, VIEW], [np.zeros((8, 8, 3), np.uint8)])


# --- without the kernel -----------------------------------------------------------------------------------------------


def opened() -> tuple[Any, kernel.Trouble | None]:
    """Return the kernel as a new process opens it."""
    return kernel._opened.__wrapped__()


@compiled
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    path = opened()[0]._name
    for other in (kernel.VERSION + 1, kernel.VERSION - 1):
        monkeypatch.setattr(kernel, "VERSION", other)
        library, trouble = opened()
        assert library is None
        assert trouble == (
            f"{path} was compiled from other sources than those beside it",
            "Run pip install again, with -v to see the messages of the C compiler",
        )


def test_a_library_without_a_version_is_one_of_other_sources(monkeypatch):
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=libc()))
    trouble = opened()[1]
    assert trouble is not None
    assert "was compiled from other sources" in trouble.what


def libc() -> str:
    """Return a library that is on every system: the C library."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says where its libraries are")
    return next(line.split()[-1] for line in maps.read_text().splitlines() if "libc.so" in line or "libc-" in line)


def test_a_library_of_another_processor_is_named(monkeypatch, tmp_path):
    file = tmp_path / "_kernel.abi3.so"
    file.write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(file)))
    library, trouble = opened()
    assert library is None
    assert trouble is not None
    assert trouble.what.startswith(f"the kernel for views cannot be loaded: {file}: ")


@pytest.fixture
def uncompiled(monkeypatch) -> kernel.Trouble:
    """Let this process be one of a machine without a C compiler."""
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: None)
    nothing = opened()
    assert nothing[0] is None
    assert nothing[1] is not None
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "_opened", lambda: nothing)
    return nothing[1]


def test_without_the_kernel_torch_gives_the_same_pixels(uncompiled):
    image = photo(60, 80)
    for number in range(10):
        view = draw_view(PRESETS["deit"].with_fields(img_size=32), "k", number, height=60, width=80)
        assert np.array_equal(render(image, view), render_by_definition(image, view))


def labelled(images: Path, folder: Path) -> None:
    make_label_set(images, folder / "set")


def trained(images: Path, folder: Path) -> None:
    label_set = make_label_set(images, folder / "set")
    assert label_set is not None
    settings: dict[str, Any] = TINY | {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "workers": 0}
    train(TrainConfig(labels=(str(label_set.folder),), output=str(folder / "run"), **settings))


def evaluated(_: Path, folder: Path) -> None:
    checkpoint = exported(folder / "student", make_student())
    val = write_photos(folder / "val", [0, 1, 2])
    evaluate_checkpoint(EvaluateConfig(checkpoint=str(checkpoint), data=val, workers=0, device="cpu"))


@pytest.mark.parametrize(("stage", "times"), [(labelled, 1), (trained, 2), (evaluated, 1)])  # `trained` labels first
def test_a_run_without_the_kernel_says_so_once(stage, times, uncompiled, images, tmp_path, caplog):
    stage(images, tmp_path)
    said = [record.getMessage() for record in caplog.records if record.name == "deit_cli.render"]
    assert said == times * [
        "the kernel for views was not compiled when deit-cli was installed: torch renders the views on the CPU, about thirty times"
        " slower; the pixels are the same. Install a C compiler (gcc or clang), then run pip install again, with -v to see its messages"
    ]


@compiled
def test_a_run_with_the_kernel_says_nothing(images, tmp_path, caplog):
    labelled(images, tmp_path)
    assert [record for record in caplog.records if record.name == "deit_cli.render"] == []
