"""Views per second and core: ours against timm's transform, torchvision v2 and webdataset, on real photographs.

    python benchmarks/render.py --data imagenet-sample --out benchmarks/results/render.json

One process on one core runs all competitors in turn, round after round; every ratio is taken within a round, and
medians are quoted. The three that run in a worker process (timm through a DataLoader, webdataset, ours in processes) have
one worker and an idle parent. The recipe is DeiT's: random resized crop to 224, flip, RandAugment m9 n2 mstd0.5 inc1,
erasing 0.25; mixing happens on the device for all of them, and is left out.

`us_per_view` says where the time of our views goes: microseconds of processor time for drawing, for packing the parameters and the call of
the compiled kernel, and for the parts of the kernel. A part is the difference of views with it and of the same views without it. The whole
kernel is timed with each instruction set that this processor has.
"""

import contextlib
import io
import itertools
import json
import os
import random
import statistics
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rounds import machine, medians, options, ratios, write_json
from stage1 import blocks_in
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from pipeline.cost.bench import Head
from pipeline.images import turbojpeg
from pipeline.images.decode import decode
from pipeline.images.source import Source, open_source
from pipeline.machine.loaders import Note, Slots, _IntoSlot, _Whereabouts, _Work, in_processes
from pipeline.pixels import kernel
from pipeline.pixels.packed import packed
from pipeline.pixels.render import Pixels, draw_encoded, render_into, render_view
from pipeline.settings.files import load_recipe
from pipeline.stage1.rendering import Block, BlockRenderer, deal
from pipeline.views.randaugment import INCREASING, op_argument
from pipeline.views.view import DrawnOp, View, draw_view

RECIPE = load_recipe("deit", {})
PER_DECODE = (1, 2, 3, 4, 8, 30)
EPOCH_VIEWS = 8  # of each image, that our loader process is timed with


def timm_transform() -> Any:
    return create_transform(
        224,
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=RECIPE.reprob,
        interpolation="bicubic",
        color_jitter=0.0,
    )


def v2_transform() -> Any:
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9, interpolation=bicubic),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            v2.RandomErasing(0.25, value="random"),  # pyright: ignore[reportArgumentType]
        ]
    )


def apply(transform: Any, image: bytes) -> Any:
    # Pillow 13 refuses to keep no bit at all, which timm 1.0.31 asks it for now and then (magnitudes above 10).
    with contextlib.suppress(ValueError):
        return transform(Image.open(io.BytesIO(image)).convert("RGB"))
    return torch.zeros(3, 224, 224)


class Photos(Dataset[Any]):
    def __init__(self, images: list[bytes]) -> None:
        self._images, self._transform = images, timm_transform()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        return apply(self._transform, self._images[index])


def ours(images: list[bytes], views: int) -> int:
    """Render as the loader processes do: several views from one decode, or one from no more than its crop."""
    take = partial(render_into, places(views))
    for number, image in enumerate(images):
        draw_encoded(image, RECIPE, str(number), range(views), take)
    return views * len(images)


def places(views: int) -> list[Pixels]:
    """Return memory for so many views, which is used again for each image, as the memory of a loader process is."""
    return list(np.empty((views, 224, 224, 3), np.uint8))


def ours_whole(images: list[bytes]) -> int:
    """Render one view of each image, all of which is decoded."""
    for number, image in enumerate(images):
        render_view(image, RECIPE, str(number), 0)
    return len(images)


class Units(Sampler[Any]):
    """What stage 1 gives its loader processes; other views in every epoch, so that images are decoded again."""

    def __init__(self, source: Source, views: int, slots: Slots) -> None:
        self._blocks, self._views, self._epoch = blocks_in(source, RECIPE, range(views)), views, itertools.count()
        self._slots = slots

    def __iter__(self) -> Iterator[Any]:
        return self._slots.number(deal(self._epoch_blocks(), 1))

    def _epoch_blocks(self) -> Iterator[Block]:
        start = next(self._epoch) * EPOCH_VIEWS
        for first in range(start, start + EPOCH_VIEWS, self._views):
            views = range(first, first + self._views)
            yield from (replace(block, views=views, chunk=views) for block in self._blocks)


class Share:
    """Renders a share of the photographs, in a thread or a process."""

    def __init__(self, images: list[bytes], views: int) -> None:
        self._images, self._views = images, views

    def __call__(self, index: int, _: Note | None = None) -> int:
        return ours(self._images[index % 2 :: 2], self._views)


def drained(loader: Any) -> Iterator[None]:
    """Take one epoch after the other from a loader whose workers stay; yields when an epoch is over."""
    while True:
        for _ in loader:
            pass
        yield


def competitors(images: list[bytes], tar: Path, data: str) -> dict[str, Callable[[], int]]:
    inline, streamed, second = timm_transform(), timm_transform(), v2_transform()
    stream = wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).map(  # pyright: ignore[reportAttributeAccessIssue]
        lambda sample: apply(streamed, sample["jpg"])
    )

    def counted(work: Callable[[], object], views: int = 1) -> Callable[[], int]:
        def run() -> int:
            work()
            return views * len(images)

        return run

    def loaded(dataset: Any, views: int = 1, **options: Any) -> Callable[[], int]:
        options = {"batch_size": 25, "num_workers": 1, "persistent_workers": True} | options
        epochs = drained(DataLoader(dataset, **options))
        return counted(lambda: next(epochs), views)

    work = {
        "timm": counted(lambda: [apply(inline, image) for image in images]),
        "timm_dataloader": loaded(Photos(images)),
        "torchvision_v2": counted(lambda: [apply(second, image) for image in images]),
        "webdataset_timm": loaded(stream),
        "decode_alone": counted(lambda: [decode(image, key="photo") for image in images]),
    }
    for views in PER_DECODE:  # all of the photographs, as for the others: they differ in size
        work[f"ours_{views}"] = lambda views=views: ours(images, views)
    source = open_source(data)
    source = replace(source, shards=(Head(source.shards[0], len(images)),))
    for views in (1, 8):
        slots = Slots((len(images), 224, 224, 3), workers=1, held=1)
        work[f"ours_{views}_dataloader"] = loaded(
            _Work(_IntoSlot(BlockRenderer(source, RECIPE), slots.pixels), _Whereabouts(1)),
            EPOCH_VIEWS,
            batch_size=None,
            sampler=Units(source, views, slots),
        )
    if turbojpeg.is_installed():
        work["ours_1_whole"] = lambda: ours_whole(images)
    return work


def rate(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    return work() / (time.perf_counter() - began)


# --- where the time of our views goes ------------------------------------------------------------------------------


def parts(images: list[bytes], rounds: int, views: int = 8) -> dict[str, Any]:
    """Return microseconds of processor time that each part of a view takes on average."""
    photos = [decode(image, key="photo") for image in images]
    drawn = [draw_views(photo, number, views) for number, photo in enumerate(photos)]
    plain = [[replace(view, flip=False, ops=(), erase=None) for view in of_photo] for of_photo in drawn]
    variants = {  # what is compared with the plain views
        "flip": [[replace(view, flip=True) for view in of_photo] for of_photo in plain],
        "erase": [[replace(p, erase=d.erase) for p, d in zip(*both, strict=True)] for both in zip(plain, drawn, strict=True)],
    } | {f"op {name.removesuffix('Increasing')}": [with_op(each, name) for each in plain] for name in INCREASING}  # fmt: skip
    out = places(views)

    def kernel_of(all_views: list[list[View]], level: int | None = None) -> Callable[[], object]:
        return lambda: [
            kernel.render_views(photo, each, out, level=level) for photo, each in zip(photos, all_views, strict=True)
        ]

    tiny = [
        [replace(view, crop=(0, 0, 1, 1), resize=(1, 1), img_size=1, erase=None) for view in each] for each in drawn
    ]
    dots = list(np.empty((views, 1, 1, 3), np.uint8))
    work: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode(image, key="photo") for image in images],
        "draw": lambda: [draw_views(photo, number, views) for number, photo in enumerate(photos)],
        "pack": lambda: [[packed(view, height=1, width=1) for view in each] for each in drawn],
        "pack and call": lambda: [kernel.render_views(photo, each, dots) for photo, each in zip(photos, tiny, strict=True)],
        "plain views": kernel_of(plain),
        **{kernel.INSTRUCTION_SETS[level]: kernel_of(drawn, level) for level in range(kernel.best_level() + 1)},
        **{name: kernel_of(each) for name, each in variants.items()},
    }  # fmt: skip
    spent = [processor_us(work, len(photos) * views) for _ in range(rounds)]
    applied = Counter(op.name.removesuffix("Increasing") for each in drawn for view in each for op in view.ops)
    return figures(spent, {name: count / len(photos) / views for name, count in applied.items()}, views)


def draw_views(photo: Pixels, number: int, views: int) -> list[View]:
    height, width = photo.shape[:2]
    return [draw_view(RECIPE, str(number), view, height=height, width=width) for view in range(views)]


def with_op(views: Sequence[View], name: str) -> list[View]:
    """Return these views with one operation, at DeiT's mean magnitude and in both directions."""
    ops = [DrawnOp(name, op_argument(name, 9.0, negate=negate)) for negate in (False, True)]
    return [replace(view, ops=(ops[number % 2],)) for number, view in enumerate(views)]


def processor_us(work: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Return the microseconds of processor time of each call, divided by `count`; the calls take turns in a new order."""
    spent = {}
    for name in random.sample(list(work), len(work)):
        began = time.thread_time()
        work[name]()
        spent[name] = 1e6 * (time.thread_time() - began) / count
    return spent


def figures(spent: list[dict[str, float]], applied: dict[str, float], views: int) -> dict[str, Any]:
    """Return medians over the rounds: of each part, and of the difference that each step of the kernel makes.

    Args:
        spent: microseconds a view, by round.
        applied: how often a view has each operation.
        views: views of each image.
    """

    def median(part: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(map(part, spent)), 1)

    def more(name: str) -> float:
        return median(lambda each: each[name] - each["plain views"])

    ops = {name.removeprefix("op "): more(name) for name in spent[0] if name.startswith("op ")}
    return {
        "decode, an image": median(lambda each: each["decode"] * views),
        "draw": median(lambda each: each["draw"]),
        "pack": median(lambda each: each["pack"]),
        "call": median(lambda each: each["pack and call"] - each["pack"]),
        "resize": median(lambda each: each["plain views"] - each["pack and call"]),
        "flip, of half of the views": round(more("flip") / 2, 1),
        "erase": more("erase"),
        "operations": round(sum(us * applied.get(name, 0.0) for name, us in ops.items()), 1),
        "operation, where it is applied": dict(sorted(ops.items(), key=lambda each: -each[1])),
        "whole kernel with pack and call": {name: median(lambda each, name=name: each[name]) for name in kernel.INSTRUCTION_SETS if name in spent[0]},
    }  # fmt: skip


# --- all of it ----------------------------------------------------------------------------------------------------


def threads_and_processes(images: list[bytes], rounds: int) -> dict[str, Any]:
    """Return views/s of two threads in one process, and of two processes, at eight views per decode."""
    share = Share(images, 8)
    seen: dict[str, list[float]] = {"threads_2": [], "processes_2": []}
    with ThreadPoolExecutor(2) as pool:
        arriving = in_processes(share, range(10**6), workers=2)
        for _ in range(4):
            next(arriving)  # the processes have started
        for _ in range(rounds):
            seen["threads_2"].append(rate(lambda: sum(pool.map(share, range(2)))))
        for _ in range(rounds):
            seen["processes_2"].append(rate(lambda: next(arriving) + next(arriving)))
    return {name: {"rounds": values, "median": statistics.median(values)} for name, values in seen.items()}


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("--data", required=True, help="folder with a tar of JPEGs")
    parser.add_argument("--images", type=int, default=50)
    args = parser.parse_args()
    if not kernel.is_compiled():
        raise SystemExit(
            "the kernel is not compiled: install this project where there is a C compiler (pip install -e .)"
        )
    torch.set_num_threads(1)

    tar = next(Path(args.data).glob("*.tar"))
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
        images = [archive.extractfile(member).read() for member in members]  # pyright: ignore[reportOptionalMemberAccess]
    together = threads_and_processes(images[: args.images], args.rounds)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for everything that follows
    work = competitors(images[: args.images], tar, args.data)
    work["webdataset_timm"], whole = (lambda: whole() and len(images)), work["webdataset_timm"]  # reads the whole tar
    for each in work.values():
        each()
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: rate(each) for name, each in work.items()})
        print({name: round(value) for name, value in rounds[-1].items()}, flush=True)
    result = {
        "what": "views per second on one core, recipe deit",
        "machine": args.machine or machine(),
        "images": args.images,
        "regions_decoded": turbojpeg.is_installed(),  # by ours_1
        "median": medians(rounds),
        "ratio_to_timm_dataloader": {
            name: ratio for name, ratio in ratios(rounds, "timm_dataloader").items() if name.endswith("_dataloader")
        },
        "ratio_to_timm": ratios(rounds, "timm"),
        "us_per_view": parts(images[: args.images], args.rounds),
        "two_at_once": together,
        "rounds": rounds,
    }
    write_json(args.out, result)
    print(
        json.dumps(
            {key: result[key] for key in ("median", "ratio_to_timm", "ratio_to_timm_dataloader", "us_per_view")},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
