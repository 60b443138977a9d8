"""precompute against its parts: the same teacher on views in memory, and the same rendering with no teacher.

    python benchmarks/stage1.py --data imagenet-sample --teacher resnet18 --out benchmarks/results/stage1.json

Rounds alternate in one run: teacher alone, rendering alone, the teacher while other processes render as much as they can,
precompute. A ratio is taken within a round; medians are quoted. On a CPU the teacher gets `--threads` cores and the loader
processes their own; with as many cores in the machine as both together, neither takes from the other but caches and memory
bandwidth, and the third figure says how much that is.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import torch

from pipeline.config import PrecomputeConfig, TeacherConfig
from pipeline.engines import limit
from pipeline.indexing import scan_shard
from pipeline.labelling import AHEAD, device_name
from pipeline.loading import Whereabouts, usable_cores
from pipeline.measuring import measure_together
from pipeline.mixing import draw_mix, mix_batch
from pipeline.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.recipe import Recipe, load_recipe
from pipeline.rendering import Block, BlockRenderer, blocks_of, deal, stream_views
from pipeline.sources import Source, open_source
from pipeline.teacher import Teacher, one_thread
from pipeline.teacher_loading import load_teacher


def teacher_alone(teacher: Teacher, recipe: Recipe, batch: int, seconds: float) -> tuple[float, float]:
    """Return views/s of the teacher on random views in (pinned) memory, and the share of the time it computed."""
    images = torch.randint(0, 256, (batch, recipe.img_size, recipe.img_size, 3), dtype=torch.uint8)
    images = images.pin_memory() if teacher.device.type == "cuda" else images
    pairs = [(at, at + 1) for at in range(0, batch - 1, 2)]
    mix = mix_batch(pairs, [draw_mix(recipe, "key", at) for at, _ in pairs], batch)
    waiting = [teacher.ask(images, mix, 10) for _ in range(AHEAD + 1)]
    waiting.pop(0).result()
    made, busy, began = 0, teacher.busy_s, time.perf_counter()
    while time.perf_counter() - began < seconds:
        waiting.append(teacher.ask(images, mix, 10))
        waiting.pop(0).result()
        made += batch
    elapsed, busy = time.perf_counter() - began, teacher.busy_s - busy
    for pending in waiting:
        pending.result()
    return made / elapsed, busy / elapsed


def rendering_alone(blocks: list[Any], renderer: BlockRenderer, img_size: int, workers: int, seconds: float) -> float:
    """Return views/s of the loader processes when nothing but this loop takes their batches."""
    most = max(len(block.rows) for block in blocks)
    endless = itertools.cycle(blocks)
    batches = stream_views(renderer, endless, img_size=img_size, most=most, workers=workers, held=AHEAD)
    for _ in islice(batches, 2 * workers + 2):
        pass
    made, began = 0, time.perf_counter()
    for batch in batches:
        made += len(batch.rows)
        if time.perf_counter() - began > seconds:
            break
    return made / (time.perf_counter() - began)


@contextmanager
def others_rendering(blocks: list[Any], renderer: BlockRenderer, workers: int) -> Iterator[None]:
    """Render on other cores, and throw it all away."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=render_forever, args=(blocks, renderer), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    time.sleep(10)  # they import libraries first
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def render_forever(blocks: list[Any], renderer: BlockRenderer) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for unit in deal(itertools.cycle(blocks), 1):
        renderer(unit)


def blocks_in(source: Source, recipe: Recipe, views: range) -> list[Block]:
    names, whereabouts = [shard.name for shard in source.shards], Whereabouts(1)
    tables = [scan_shard(source, names, "skip", whereabouts, index) for index in range(len(names))]
    return [
        block for name, samples in zip(names, tables, strict=True) for block in blocks_of(name, views, samples, recipe)
    ]  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", nargs="+", default=["resnet18"], help="each is measured in turn, random weights")
    parser.add_argument("--teacher-img-size", type=int, help="by default the teacher's own")
    parser.add_argument("--recipe", default="deit")
    parser.add_argument("--views", type=int, default=30)
    parser.add_argument("--images", type=int, default=256, help="of the first source shard")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of the teacher, on a CPU")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--machine", help="what to call this machine; by default its processor and device")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    source, recipe = open_source(args.data), load_recipe(args.recipe, {})
    results: dict[str, Any] = {"what": "precompute against its parts, views/s", "machine": args.machine or machine()}
    results |= {"recipe": args.recipe, "views_per_decode": args.views, "teachers": {}}
    for name in args.teacher:
        results["teachers"][name] = measure(args, name, source, recipe)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results["teachers"][name]["median"]), flush=True)


def measure(args: argparse.Namespace, name: str, source: Source, recipe: Recipe) -> dict[str, Any]:
    import tempfile

    asked = TeacherConfig(
        teacher=(name,),
        pretrained=False,
        teacher_img_size=args.teacher_img_size,
        dtype=args.dtype,
        compile=args.compile,
    )
    rank = rank_from(os.environ)
    devices = plan_devices("auto", 1, rank)
    cores = plan_cores(devices, rank)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the teacher, here and in precompute
    teacher = load_teacher(asked, num_classes=source.num_classes, device=devices[0])
    workers = plan_loaders(args.workers, cores, devices[0])
    with tempfile.TemporaryDirectory() as folder:
        config = PrecomputeConfig(
            data=args.data, out=Path(folder) / "set", views=(0, args.views), workers=workers, processes=1
        )
        limit(teacher, config, cores)
        blocks = blocks_in(source, recipe, range(args.views))
        batch = len(blocks[0].rows) - len(blocks[0].rows) % 2
        rounds = []
        for _ in range(args.rounds):
            with one_thread(teacher.device):
                alone, busy_alone = teacher_alone(teacher, recipe, batch, args.seconds)
                with others_rendering(blocks, BlockRenderer(source, recipe), workers):
                    beside, _ = teacher_alone(teacher, recipe, batch, args.seconds)
            rendered = rendering_alone(blocks, BlockRenderer(source, recipe), recipe.img_size, workers, args.seconds)
            tick = measure_together(source, recipe, teacher, config, num_images=args.images, seconds=args.seconds)
            slower = min(alone, rendered)
            rounds.append(
                {
                    "teacher_alone": alone,
                    "teacher_beside_rendering": beside,
                    "rendering_alone": rendered,
                    "precompute": tick.per_second,
                    "of_the_slower": tick.per_second / slower,
                    "of_the_teacher": tick.per_second / alone,
                    "of_the_teacher_beside_rendering": tick.per_second / beside,
                    "teacher_busy_alone": busy_alone,
                    "teacher_busy": tick.teacher_busy,
                }
            )
            print(name, {key: round(value, 3) for key, value in rounds[-1].items()}, flush=True)
    return {
        "device": device_name(teacher.device),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "compiled": args.compile,
        "teacher_img_size": teacher.img_size,
        "teacher_threads": teacher.threads,
        "loader_processes": workers,
        "batch": batch,
        "seconds": args.seconds,
        "rounds": rounds,
        "median": {key: round(statistics.median(each[key] for each in rounds), 4) for key in rounds[0]},
    }


def machine() -> dict[str, Any]:
    names = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "simplejpeg", "pyarrow")
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": processor,
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    main()
