"""Views that a GPU renders, as a phase of `gpu.py`: are they those of the CPU, and what do they cost?

`equal` compares drawn views of photographs to the bit: loader processes render them with the CPU's kernel and hand the same views over to the
GPU, which renders all of them with Triton, and the first ones with plain torch, too. The first view that differs is named with its record.
`alone` is the time of the GPU's rendering by batch size, `kernels` that of each kernel, by torch's profiler, and `steps` the share that it takes of a
student's training step. `loaders` has the views/s that arrive from loader processes with `--render cpu` and with `--render gpu`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from photographs import made_up, read_photos
from rounds import Job, gpu_facts
from stage1 import kernels as profile
from stage2 import make_labels
from torch import Tensor

from pipeline.cost.rates import training_step_s
from pipeline.images.decode import decode, image_size
from pipeline.machine.loaders import Note, SlotStream
from pipeline.machine.threads import usable_cores
from pipeline.machine.timing import steady_s, synchronise
from pipeline.pixels import batched, kernel
from pipeline.pixels.handover import RenderedViews, UnrenderedViews, bytes_for, rendered, renders_on_gpu
from pipeline.pixels.packed import RECORD
from pipeline.pixels.render import Pixels, draw_decoded
from pipeline.settings.files import load_recipe
from pipeline.views.recipe import Recipe
from pipeline.views.view import View
from trainer.bench import measure_stream, opened_run
from trainer.config import TrainConfig
from trainer.student import create_student

COMPARED = {"triton": 100_000, "torch": 1024}  # views
TOY_COMPARED = 48
EACH = 8  # views of a photograph in a batch that is compared
BATCHES, TRAINED_EACH = (64, 256), 3  # batches that are timed, and their views of a photograph: those of a training
STUDENTS = ("deit-ti", "deit-s", "deit-b")
LOADERS = (15, 4)
LOADERS_S = 45.0  # that two rounds of both ways may take, with the start of the processes
PHOTOGRAPHS = 1024  # of the label set


@dataclass(frozen=True)
class Setting:
    """What all measurements share: photographs as JPEGs, the recipe, and sizes."""

    job: Job
    photos: Sequence[bytes]
    recipe: Recipe
    batch: int
    workers: int

    @property
    def kernels(self) -> tuple[batched.Kernels, ...]:
        """Return what can render on the device, the fastest first."""
        return ("triton", "torch") if batched._fastest(self.job.device) == "triton" else ("torch",)


def on_gpu(job: Job) -> None:
    """Compare and measure."""
    setting = open_setting(job)
    began = time.monotonic()
    said = "a CPU plays the GPU" if job.rehearse else renders_on_gpu("gpu", setting.recipe, job.device)
    about = {"gpu": gpu_facts(), "renders": said, "first_views_s": round(time.monotonic() - began, 2)}
    job.note("what", about | {"cpu_kernel": kernel.is_compiled(), "loader_processes": setting.workers})
    if job.lacks("equal", 15):
        job.note("equal", compare(setting, seconds=max(10.0, job.left() * 0.4)))
    for batch in (8,) if job.rehearse else BATCHES:
        if job.lacks(f"alone, {batch}", 4):
            job.note(f"alone, {batch}", alone(setting, batch))
    largest = 8 if job.rehearse else BATCHES[-1]
    if job.lacks("kernels", 5):
        job.note("kernels", kernels(setting, largest))
    if job.lacks("steps", 8):
        job.note("steps", steps(setting, job.found[f"alone, {largest}"]["us_a_view"]))
    for workers in (1,) if job.rehearse else [each for each in LOADERS if each < usable_cores()]:
        if job.lacks(f"loaders, {workers}", LOADERS_S):
            job.note(f"loaders, {workers}", loaders(setting, workers))
    if differing := [name for name, found in job.found.get("equal", {}).items() if found["differ"]]:
        raise SystemExit(f"views that {' and '.join(differing)} rendered on {job.card} differ from those of the CPU")


def open_setting(job: Job) -> Setting:
    found = read_photos(sorted(job.photographs.glob("*.tar"))[0]) if job.photographs else made_up()
    return Setting(
        job=job,
        photos=[image for _, _, image in found[: 4 if job.rehearse else None]],
        recipe=load_recipe("deit", {"img_size": 32} if job.rehearse else {}),
        batch=16 if job.rehearse else 256,
        workers=1 if job.rehearse else min(LOADERS[0], usable_cores() - 1),
    )


# --- are they the same? -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Both:
    """A batch of views, rendered and unrendered.

    Attributes:
        images: uint8 [N], the rendered views, then what was handed over.
        drawn: photograph and view number of each view.
    """

    images: Tensor
    drawn: tuple[tuple[int, int], ...]


class RenderBoth:
    """Function of loader processes that renders the views of a batch, and hands them over, too."""

    def __init__(self, photos: Sequence[bytes], recipe: Recipe, batch: int) -> None:
        self._photos, self._recipe, self._batch = photos, recipe, batch
        self.rendered_bytes = batch * 3 * recipe.img_size**2
        sizes = [3 * height * width for height, width in (image_size(image, key="photo") for image in photos)]
        turns = batch // EACH
        most = max(sum((sizes * (1 + turns))[start : start + turns]) for start in range(len(sizes)))
        self.shape = (self.rendered_bytes + batch * RECORD.itemsize + most,)  # no view needs to be rendered here

    def __call__(self, number: int, out: Tensor, note: Note) -> Both:
        size, turns = self._recipe.img_size, self._batch // EACH
        here = RenderedViews(out[: self.rendered_bytes].view(self._batch, size, size, 3))
        there = UnrenderedViews(out[self.rendered_bytes :], self._batch, size)
        drawn: list[tuple[int, int]] = []
        for turn in range(number * turns, (number + 1) * turns):
            photo, start = turn % len(self._photos), turn // len(self._photos) * EACH
            note(f"photograph {photo}")
            at, views = range(len(drawn), len(drawn) + EACH), range(start, start + EACH)

            def take(image: Pixels, parameters: Sequence[View], at: range = at) -> None:
                here.add(at, image, parameters)
                there.add(at, image, parameters)

            draw_decoded(decode(self._photos[photo], key="photo"), self._recipe, str(photo), views, take)
            drawn += [(photo, view) for view in views]
        return Both(out[: self.rendered_bytes + len(there.images)], tuple(drawn))


def compare(setting: Setting, seconds: float) -> dict[str, dict[str, Any]]:
    """Compare the GPU's views with the CPU's, for so many seconds at most; count those that differ, and name the first."""
    job, batch = setting.job, setting.batch
    counts = {name: TOY_COMPARED if job.rehearse else COMPARED[name] for name in setting.kernels}
    found: dict[str, dict[str, Any]] = {
        name: {"asked": count, "views": 0, "differ": 0} for name, count in counts.items()
    }
    render = RenderBoth(setting.photos, setting.recipe, batch)
    stream = SlotStream(
        render,
        range(-(-max(counts.values()) // batch)),
        render.shape,
        workers=setting.workers,
        held=0,
        device=job.device,
    )
    began, size = time.monotonic(), setting.recipe.img_size
    for both in stream:
        expected = both.images[: render.rendered_bytes].view(batch, size, size, 3).to(job.device)
        pixels, records = unpacked(both.images[render.rendered_bytes :], batch)
        pixels = pixels.to(job.device)
        for name, result in found.items():
            if result["views"] < counts[name]:
                views = batched.render_batch(pixels, records, kernels=name)  # pyright: ignore[reportArgumentType]
                add_differing(result, views, expected, records, both.drawn)
        if time.monotonic() - began > seconds:
            break
    return found


def unpacked(images: Tensor, num_views: int) -> tuple[Tensor, NDArray]:
    """Return pixels and records of an unrendered batch."""
    start = num_views * RECORD.itemsize
    return images[start:], images[:start].numpy().view(RECORD)


def add_differing(
    result: dict[str, Any], views: Tensor, expected: Tensor, records: NDArray, drawn: Sequence[tuple[int, int]]
) -> None:
    """Add a batch to a result; the first view that differs at all is described."""
    differing = (views != expected).flatten(1).any(1).nonzero().ravel().tolist()
    result["views"] += len(views)
    result["differ"] += len(differing)
    if differing and "first" not in result:
        at = differing[0]
        apart = (views[at].int() - expected[at].int()).abs()
        result["first"] = {
            "photograph": drawn[at][0],
            "view": drawn[at][1],
            "values": int((apart > 0).sum()),
            "levels": int(apart.max()),
            "record": {name: records[at][name].tolist() for name in RECORD.names or ()},
        }


# --- what do they cost? -------------------------------------------------------------------------------------------


def unrendered(setting: Setting, batch: int) -> Tensor:
    """Return an unrendered batch as training hands it over, page-locked for a GPU."""
    size = setting.recipe.img_size
    views = UnrenderedViews(torch.empty(bytes_for(batch, size), dtype=torch.uint8), batch, size)
    for start in range(0, batch, TRAINED_EACH):
        at = range(start, min(start + TRAINED_EACH, batch))
        image = decode(setting.photos[start // TRAINED_EACH % len(setting.photos)], key="photo")
        draw_decoded(image, setting.recipe, str(start), range(len(at)), partial(views.add, at))
    images = views.images.clone()
    return images.pin_memory() if setting.job.device.type == "cuda" else images


def alone(setting: Setting, batch: int) -> dict[str, float]:
    """Return the time of rendering a batch, in microseconds a view, and the bytes of a view."""
    device, seconds = setting.job.device, 0.05 if setting.job.rehearse else 0.7
    images, size = unrendered(setting, batch), setting.recipe.img_size
    pixels, records = unpacked(images, batch)
    there, out = pixels.to(device), torch.empty(batch, size, size, 3, dtype=torch.uint8, device=device)
    in_memory_s = steady_s(lambda: batched.render_batch(there, records, out), device, seconds)
    from_host_s = steady_s(lambda: rendered(images, batch, device), device, seconds)
    return {
        "views_per_s": round(batch / from_host_s),
        "us_a_view": round(1e6 * from_host_s / batch, 3),
        "us_a_view_from_device_memory": round(1e6 * in_memory_s / batch, 3),
        "us_of_the_host_a_view": round(1e6 * host_s(lambda: rendered(images, batch, device), device) / batch, 3),
        "bytes_handed_over_a_view": len(images) // batch,
        "bytes_moved_in_device_memory_a_view": moved_bytes(records) // batch,
    }


def host_s(work: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Return the seconds until a call returns, when the device has nothing else to do: the smallest of some."""
    times = []
    for _ in range(calls):
        synchronise(device)
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def moved_bytes(records: NDArray) -> int:
    """Return the bytes that the passes of the resize and the operations of a batch have to read and write at least."""
    height, width = records["crop"][:, 2:].T.astype(np.int64)
    size = records["size"].astype(np.int64)
    return int((3 * (height * width + 2 * height * size + size**2 + 2 * size**2 * records["num_ops"])).sum())


def kernels(setting: Setting, batch: int) -> dict[str, Any]:
    """Return the microseconds a view of each kernel, by torch's profiler: the time on the device, without gaps between kernels."""
    images, device = unrendered(setting, batch), setting.job.device
    seen = profile(lambda: rendered(images, batch, device))
    device_us = 1e3 * seen["device_ms_a_call"] / batch
    return {
        "device_us_a_view": round(device_us, 3),
        "launches_a_batch": seen["kernels_a_call"],
        "us_a_view": {name: round(1e3 * ms / batch, 3) for name, _, ms in seen["top"]},
        "gb_per_s": round(moved_bytes(unpacked(images, batch)[1]) / batch / device_us / 1e3, 1),
    }


def steps(setting: Setting, us_a_view: float) -> dict[str, dict[str, float]]:
    """Return the share that rendering takes of the time of a student's step, eager, in bfloat16 on a GPU."""
    found, size = {}, setting.recipe.img_size
    for name in STUDENTS[:1] if setting.job.rehearse else STUDENTS:
        changes: dict[str, Any] = {"patch_size": 16, "depth": 2} if setting.job.rehearse else {}
        student = create_student(name, num_classes=1000, img_size=size, **changes).model
        step_us = 1e6 * training_step_s(
            student, size, setting.job.device, least_s=0.05 if setting.job.rehearse else 0.7
        )
        found[name] = {"step_us_a_view": round(step_us, 2), "rendering_share": round(us_a_view / step_us, 4)}
    return found


def loaders(setting: Setting, workers: int) -> dict[str, Any]:
    """Return the views/s that arrive from loader processes that render and that only decode, in alternating rounds."""
    job = setting.job
    asked: dict[str, Any] = {"labels": labels_of(setting), "batch_size": setting.batch, "device": str(job.device)}
    asked |= {"patch_size": 16, "depth": 2} if job.rehearse else {}
    config = TrainConfig(model="deit-ti", workers=workers, **asked)
    rounds: list[dict[str, float]] = []
    with opened_run(config) as run:
        for _ in range(1 if job.rehearse else 2):
            rates = {}
            for way in ("cpu", "gpu"):
                run.on_gpu = way == "gpu"
                rates[way] = round(measure_stream(run, seconds=0.1 if job.rehearse else 3.0), 1)
            rounds.append(rates)
    best = {way: max(each[way] for each in rounds) for way in ("cpu", "gpu")}
    return {"views_per_s": best, "gpu_to_cpu": round(best["gpu"] / best["cpu"], 2), "rounds": rounds}


def labels_of(setting: Setting) -> Path:
    """Label a few views of photographs, once."""
    job, folder = setting.job, setting.job.work / "views-labels"
    if not folder.is_dir():
        data = job.source(32 if job.rehearse else PHOTOGRAPHS)
        args = argparse.Namespace(data=data, device=str(job.device), workers=setting.workers)
        make_labels(args, folder, {"img_size": setting.recipe.img_size} | ({"mix_block": 16} if job.rehearse else {}))
    return folder
