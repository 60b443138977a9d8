"""precompute against its parts: the same teacher on views in memory, and the same rendering with no teacher.

    python benchmarks/stage1.py --data imagenet-sample --teacher resnet18 --out benchmarks/results/stage1.json

Rounds alternate in one run: teacher alone, rendering alone, the teacher while other processes render as much as they can,
precompute. A ratio is taken within a round; medians are quoted. On a CPU the teacher gets `--threads` cores and the loader
processes their own; with as many cores in the machine as both together, neither takes from the other but caches and memory
bandwidth, and the third figure says how much that is.

On a GPU `gpu.py` asks another question (`on_gpu`): the teacher of DeiT's paper, eager and compiled, on views in the GPU's memory, on
views from page-locked memory, and in precompute with more and more loader processes.
"""

import argparse
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import torch
from ceilings import matrix_tflops
from rounds import Job, machine, medians, options, write_json
from torch.profiler import ProfilerActivity, profile

from pipeline.cost.bench import measure_run
from pipeline.cost.rates import forward_flops, measure_rates
from pipeline.images.source import Source, open_source
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.machine.threads import usable_cores
from pipeline.machine.timing import row_s, steady_s, synchronise
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.engines import limit
from pipeline.stage1.indexing import scan_shard
from pipeline.stage1.loop import AHEAD, device_name
from pipeline.stage1.rendering import Block, BlockRenderer, blocks_of, stream_views
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Teacher, one_thread
from pipeline.views.mixing import MixBatch, apply_mix, mix_batch
from pipeline.views.pairs import draw_mix
from pipeline.views.recipe import Recipe


def teacher_alone(teacher: Teacher, recipe: Recipe, batch: int, seconds: float) -> tuple[float, float]:
    """Return views/s of the teacher on random views in (pinned) memory, and the share of the time it computed."""
    images, mix = random_views(recipe, batch)
    images = images.pin_memory() if teacher.device.type == "cuda" else images
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


def random_views(recipe: Recipe, batch: int) -> tuple[torch.Tensor, MixBatch]:
    """Return random pixels, uint8 [batch, H, W, 3], and mixes of neighbours."""
    images = torch.randint(0, 256, (batch, recipe.img_size, recipe.img_size, 3), dtype=torch.uint8)
    pairs = [(at, at + 1) for at in range(0, batch - 1, 2)]
    return images, mix_batch(pairs, [draw_mix(recipe, "key", at) for at, _ in pairs], batch)


def rendering_alone(blocks: list[Any], renderer: BlockRenderer, img_size: int, workers: int, seconds: float) -> float:
    """Return views/s of the loader processes when nothing but this loop takes their batches."""
    most = max(len(block.rows) for block in blocks)
    endless = itertools.cycle(blocks)
    batches = iter(stream_views(renderer, endless, img_size=img_size, most=most, workers=workers, held=AHEAD))
    for _ in islice(batches, 2 * workers + 2):
        pass
    made, began = 0, time.perf_counter()
    for batch in batches:
        made += len(batch.rows)
        if time.perf_counter() - began > seconds:
            break
    return made / (time.perf_counter() - began)


@contextmanager
def others_rendering(blocks: list[Any], renderer: BlockRenderer, img_size: int, workers: int) -> Iterator[None]:
    """Render on other cores, and throw it all away."""
    context = multiprocessing.get_context("spawn")
    work = (blocks, renderer, img_size)
    processes = [context.Process(target=render_forever, args=work, daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    time.sleep(10)  # they import libraries first
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def render_forever(blocks: list[Any], renderer: BlockRenderer, img_size: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    most = max(len(block.rows) for block in blocks)
    for _ in stream_views(renderer, itertools.cycle(blocks), img_size=img_size, most=most, workers=0, held=0):
        pass


def blocks_in(source: Source, recipe: Recipe, views: range) -> list[Block]:
    tables = {shard.name: scan_shard(source, "skip", shard.name, lambda _: None) for shard in source.shards}
    return [block for name, samples in tables.items() for block in blocks_of(name, views, samples, recipe)]


def main() -> None:
    parser = options(__doc__, rounds=5)
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
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()

    source, recipe = open_source(args.data), load_recipe(args.recipe, {})
    results: dict[str, Any] = {"what": "precompute against its parts, views/s", "machine": args.machine or machine()}
    results |= {"recipe": args.recipe, "views_per_decode": args.views, "teachers": {}}
    for name in args.teacher:
        results["teachers"][name] = measure(args, name, source, recipe)
        write_json(args.out, results)
        print(name, json.dumps(results["teachers"][name]["median"]), flush=True)


def measure(args: argparse.Namespace, name: str, source: Source, recipe: Recipe) -> dict[str, Any]:
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
                with others_rendering(blocks, BlockRenderer(source, recipe), recipe.img_size, workers):
                    beside, _ = teacher_alone(teacher, recipe, batch, args.seconds)
            rendered = rendering_alone(blocks, BlockRenderer(source, recipe), recipe.img_size, workers, args.seconds)
            tick = measure_run(source, recipe, teacher, config, num_images=args.images, seconds=args.seconds)
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
        "median": medians(rounds, 4),
    }


# --- on a GPU ---------------------------------------------------------------------------------------------------

PROFILED, TOP_KERNELS = 20, 15  # forward passes in a profile, kernels that are named
LOADERS = (15, 8, 4, 2)
TOGETHER_S, COMPILED_S = 45.0, 90.0  # that precompute took for one number of loaders; guessed: a compiled teacher


def on_gpu(job: Job) -> None:
    """Measure stage 1 with the teacher of DeiT's paper, the most telling figures first."""
    name = "test_resnet" if job.rehearse else "regnety_160"
    recipe = load_recipe("deit", {"img_size": 32, "mix_block": 16} if job.rehearse else {})
    source = open_source(job.source(32 if job.rehearse else 1024))
    blocks = blocks_in(source, recipe, range(4 if job.rehearse else 30))
    counts = [1] if job.rehearse else [each for each in LOADERS if each < usable_cores()]
    seconds = 0.2 if job.rehearse else 8.0
    eager = device_teacher(job, name, compiled=False)
    about = {"teacher": name, "img_size": eager.img_size, "dtype": str(eager.dtype), "batch": recipe.mix_block}
    job.note("what", about)
    if job.lacks("eager", 12):
        job.note("eager", teacher_figures(job, eager, recipe))
    if job.lacks("parts_us_a_view", 10):
        rates = measure_rates(source, recipe, eager, topk=10, precision="float16", least_s=seconds / 8)
        job.note("parts_us_a_view", {part: round(1e6 * value, 2) for part, value in asdict(rates).items()})
    if job.lacks("forms", 25):
        job.note("forms", forms(job, eager, recipe.mix_block))
    if job.lacks("profile_eager", 15):
        trace = job.out / "trace-stage1-eager.json.gz"
        job.note("profile_eager", kernels(on_device(eager, recipe, recipe.mix_block), trace))
    if job.lacks(f"precompute, eager, {counts[0]} loaders", TOGETHER_S):
        figures = together_figures(eager, recipe, source, blocks, counts[0], seconds)
        job.note(f"precompute, eager, {counts[0]} loaders", figures)
    if job.lacks("compiled", COMPILED_S):
        compiled = device_teacher(job, name, compiled=True)
        job.note("compiled", teacher_figures(job, compiled, recipe))
        job.note("profile_compiled", kernels(on_device(compiled, recipe, recipe.mix_block)))
        if job.lacks(f"precompute, compiled, {counts[0]} loaders", TOGETHER_S):
            figures = together_figures(compiled, recipe, source, blocks, counts[0], seconds)
            job.note(f"precompute, compiled, {counts[0]} loaders", figures)
    for workers in reversed(counts[1:]):
        if job.lacks(f"precompute, eager, {workers} loaders", TOGETHER_S):
            figures = together_figures(eager, recipe, source, blocks, workers, seconds)
            job.note(f"precompute, eager, {workers} loaders", figures)


def forms(job: Job, teacher: Teacher, batch: int) -> dict[str, float]:
    """Return views/s of the bare network in each memory format, dtype, and way of choosing cuDNN's algorithms.

    Views are normalised and lie in the device's memory. `benchmark` lets cuDNN time its algorithms and take the fastest.
    """
    module, device = teacher.networks[0].module, teacher.device
    images = torch.randn(batch, 3, teacher.img_size, teacher.img_size, device=device)
    found: dict[str, float] = {}
    for layout, memory_format in (("channels last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        pixels = images.contiguous(memory_format=memory_format)
        for dtype, benchmark in itertools.product((torch.bfloat16, torch.float16), (False, True)):
            name = f"{layout}, {str(dtype).removeprefix('torch.')}{', benchmark' if benchmark else ''}"

            def answer(pixels: torch.Tensor = pixels, dtype: torch.dtype = dtype) -> None:
                with torch.inference_mode(), torch.autocast(device.type, dtype=dtype):
                    module(pixels)

            with torch.backends.cudnn.flags(benchmark=benchmark):
                found[name] = round(batch / steady_s(answer, device, 0.05 if job.rehearse else 1.0), 1)
    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return found


def device_teacher(job: Job, name: str, *, compiled: bool) -> Teacher:
    """Load a teacher of random weights onto the GPU."""
    config = TeacherConfig(
        teacher=(name,), pretrained=False, compile=compiled and not job.rehearse, device=str(job.device)
    )
    teacher = load_teacher(config, num_classes=1000)
    teacher.limit_threads(1)
    return teacher


def on_device(teacher: Teacher, recipe: Recipe, batch: int) -> Callable[[], object]:
    """Return a forward pass on views that lie in the device's memory: mixed, normalised, ranked."""
    images, mix = random_views(recipe, batch)
    images, mix = images.to(teacher.device), mix.to(teacher.device)

    def answer() -> None:
        with torch.inference_mode():
            teacher.top_classes(teacher.logits(apply_mix(images, mix)), 10)

    return answer


def teacher_figures(job: Job, teacher: Teacher, recipe: Recipe) -> dict[str, Any]:
    """Return views/s of the teacher on views in its memory and from page-locked memory, and what share of the ceiling that is."""
    device, batch, seconds = teacher.device, recipe.mix_block, 0.2 if job.rehearse else 3.0
    answer = on_device(teacher, recipe, batch)
    first_s = row_s(answer, 1, device)  # compiles, and chooses algorithms
    in_memory = batch / steady_s(answer, device, seconds)
    with one_thread(device):
        page_locked, busy = teacher_alone(teacher, recipe, batch, seconds)
    module = teacher.networks[0].module
    flops = forward_flops(getattr(module, "_orig_mod", module), teacher.img_size)
    ceiling = matrix_tflops(device, rehearse=job.rehearse)
    return {
        "first_pass_s": round(first_s, 2),
        "in_memory_views_per_s": round(in_memory, 1),
        "page_locked_views_per_s": round(page_locked, 1),
        "busy_share": round(busy, 3),
        "gflop_a_view": round(flops / 1e9, 2),
        "tflops": round(in_memory * flops / 1e12, 1),
        "matrix_ceiling_tflops": round(ceiling, 1),
        "share_of_ceiling": round(in_memory * flops / 1e12 / ceiling, 3),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
    }


def together_figures(
    teacher: Teacher, recipe: Recipe, source: Source, blocks: list[Block], workers: int, seconds: float
) -> dict[str, Any]:
    """Return views/s of the teacher alone, of so many loader processes alone, and of precompute, in one round."""
    views = len(blocks[0].views)
    config = PrecomputeConfig(data=str(source.location), out="", views=(0, views), workers=workers, processes=1)
    began = time.monotonic()
    with one_thread(teacher.device):
        alone, _ = teacher_alone(teacher, recipe, recipe.mix_block, seconds / 4)
    marks = [time.monotonic()]
    rendered = rendering_alone(blocks, BlockRenderer(source, recipe), recipe.img_size, workers, seconds)
    marks.append(time.monotonic())
    tick = measure_run(source, recipe, teacher, config, num_images=source.num_samples, seconds=seconds)
    synchronise(teacher.device)
    marks.append(time.monotonic())
    made = tick.per_second or 0.0
    return {
        "teacher_alone": round(alone, 1),
        "rendering_alone": round(rendered, 1),
        "precompute": round(made, 1),
        "of_the_slower": round(made / min(alone, rendered), 3),
        "teacher_busy": tick.teacher_busy,
        # Start and end of processes included.
        "seconds": [round(b - a, 1) for a, b in itertools.pairwise([began, *marks])],
    }


def kernels(work: Callable[[], object], trace: Path | None = None) -> dict[str, Any]:
    """Profile some calls: the share of time in which the GPU computes, and the kernels that take most of it.

    Args:
        work: is called a few times first.
        trace: where to write a trace for a browser (chrome://tracing), compressed; None: nowhere.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    row_s(work, 3, device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        wall_s = PROFILED * row_s(work, PROFILED, device)
    if trace is not None and cuda:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(plain))
            with plain.open("rb") as file, gzip.open(trace, "wb") as packed:
                shutil.copyfileobj(file, packed)
    of = (lambda each: each.self_device_time_total) if cuda else (lambda each: each.self_cpu_time_total)
    # On CUDA the rows of operators repeat what the rows of their kernels have.
    rows = [each for each in seen.key_averages() if not cuda or each.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(of(each) for each in rows)
    top = sorted(rows, key=of, reverse=True)[:TOP_KERNELS]
    return {
        "calls": PROFILED,
        "ms_a_call": round(1e3 * wall_s / PROFILED, 3),
        "device_ms_a_call": round(total / 1e3 / PROFILED, 3),
        "busy_share": round(total / 1e6 / wall_s, 3),
        "kernels_a_call": sum(each.count for each in rows) // PROFILED,
        "top": [[each.key[:90], each.count // PROFILED, round(of(each) / 1e3 / PROFILED, 3)] for each in top],
    }


if __name__ == "__main__":
    main()
