"""Training from stored labels against training with the teacher in every step, and against the student alone.

    python benchmarks/stage2.py --data imagenet-sample --students deit-ti deit-s deit-b --teacher regnety_160 --out stage2.json
    python benchmarks/stage2.py --table stage2.json

Three ways to train the same student, in turn in every round of one run: the student alone on a batch that lies in memory, with
its labels; the training loop from a label set, loader processes included; and timm's own TokenDistillationTask, whose teacher
answers in every step, on the same mixed images in memory (so it pays for neither mixing nor loading). Batch, precision,
optimizer, EMA and compilation are the same. Ratios are taken within a round; medians are quoted.

The label set is made first, by a small teacher with random weights: the speed of a student does not depend on what its labels
say. So are the teacher's weights random, but for --pretrained. On a GPU the forward passes are in bfloat16, the teacher is
channels-last, AdamW is fused and batches are copied from page-locked memory. `gpu.py` measures there what `on_gpu` says.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rounds import Job, machine, options, write_json
from stage1 import kernels
from timm.loss import SoftTargetCrossEntropy
from timm.task import DistillationTeacher, TokenDistillationTask

from pipeline.cost.rates import forward_flops
from pipeline.machine.threads import usable_cores
from pipeline.machine.timing import Work, row_s
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.engines import load_here
from pipeline.stage1.precompute import precompute
from trainer.bench import batches_in_memory, measure_loop, measure_stream, opened_run, update_on
from trainer.config import TrainConfig
from trainer.loop import Run
from trainer.optim import create_ema, create_optimizer
from trainer.stream import Batch, mixed_images
from trainer.student import normalise

VIEWS = 6


def make_labels(args: argparse.Namespace, out: Path, recipe: dict[str, Any]) -> Path:
    """Label a few views with a small teacher that knows nothing."""
    asked = TeacherConfig(teacher=("resnet18",), pretrained=False, teacher_img_size=64, device=args.device)
    config = PrecomputeConfig(
        data=args.data, out=out, views=(0, VIEWS), workers=args.workers, accuracy_samples=0, processes=1
    )
    teacher, source = load_here(config, asked)
    precompute(config, load_recipe("deit", recipe), teacher, source)
    return out


def online_step(run: Run, batch: Batch, teacher: torch.nn.Module) -> Work:
    """Return a training step of timm's task: the teacher, a network or timm's wrapper of one, answers in it."""
    config, device, dtype = run.config, run.running.device, run.running.dtype
    student = copy.deepcopy(run.state.student)
    images = normalise(mixed_images(batch, device), student).clone()
    criterion = SoftTargetCrossEntropy().to(device)
    task = TokenDistillationTask(
        student.model,
        teacher_model=teacher,
        criterion=criterion,
        distill_type=config.distillation_type,
        task_loss_weight=1 - config.distillation_alpha,
        temperature=config.distillation_tau,
        device=device,
        verbose=False,
    )
    if config.compile:
        task.compile()
    optimizer = create_optimizer(student, lr=1e-6, weight_decay=config.weight_decay, fused=True)
    ema = create_ema(student, config.model_ema_decay, warmup=False)
    target = mixed_targets(batch, student.num_classes, config.smoothing)
    task.train()

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = task(images, target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(student, step=0)

    return step


def mixed_targets(batch: Batch, num_classes: int, smoothing: float) -> torch.Tensor:
    """Return the smoothed class labels of mixed views, float32 [B, C]: what timm's Mixup hands to its loss."""
    own = (
        torch.nn.functional.one_hot(batch.classes.class_label, num_classes).float() * (1 - smoothing)
        + smoothing / num_classes
    )
    lam = batch.mix.lam[:, None]
    return lam * own + (1 - lam) * own[batch.mix.partner]


@contextlib.contextmanager
def competitors(args: argparse.Namespace, name: str, labels: Path) -> Iterator[tuple[Run, int, dict[str, Work]]]:
    """Yield the run, the views of its update, and the steps that lie in memory, warm."""
    config = TrainConfig(
        labels=labels,
        model=name,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        compile=args.compile,
        distillation_type=args.distillation_type,
    )
    with opened_run(config) as run:
        batches = batches_in_memory(run)
        num_classes = run.state.student.num_classes
        teacher = timm.create_model(args.teacher, pretrained=args.pretrained, num_classes=num_classes).eval()
        teacher.to(run.running.device, memory_format=torch.channels_last).requires_grad_(False)
        works = {"online": online_step(run, batches[0], teacher), "alone": update_on(run, batches)}
        yield run, len(batches[0].keys), works


def measure(args: argparse.Namespace, name: str, labels: Path) -> dict[str, Any]:
    with competitors(args, name, labels) as (run, views, works):
        device, calls, rounds = run.running.device, {}, []
        for kind, work in works.items():
            row_s(work, 1, device)  # warms caches, and compiles
            calls[kind] = max(1, int(args.seconds / row_s(work, 1, device)))
        for _ in range(args.rounds):
            alone = views / row_s(works["alone"], calls["alone"], device)
            together = measure_loop(run, seconds=args.seconds)
            online = views / row_s(works["online"], calls["online"], device)
            rounds.append(
                {
                    "alone": alone,
                    "from_labels": together.images_per_s,
                    "online": online,
                    "from_labels_of_alone": together.images_per_s / alone,
                    "from_labels_of_online": together.images_per_s / online,
                    "data_wait": together.data_wait,
                }
            )
            print(name, {key: round(value, 4) for key, value in rounds[-1].items()}, flush=True)
        median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        flops = count_flops(args, name, run.state.student.num_classes)
        return {
            "dtype": str(run.running.dtype).removeprefix("torch."),
            "views_per_update": views,
            "loader_processes": run.running.world.workers,
            **flops,
            "median": {key: round(value, 4) for key, value in median.items()},
            "step_ms": {kind: round(1000 * views / median[kind], 2) for kind in ("alone", "from_labels", "online")},
            "rounds": rounds,
        }


def count_flops(args: argparse.Namespace, name: str, num_classes: int) -> dict[str, float]:
    """Return the operations for one image, and the ratio of both ways if nothing else took time."""
    from trainer.student import create_student

    student = create_student(name, num_classes=num_classes, img_size=args.img_size).model
    student_flops = forward_flops(student, args.img_size)
    teacher_flops = forward_flops(timm.create_model(args.teacher, num_classes=num_classes), args.img_size)
    step = 3 * student_flops  # the backward pass costs two forward passes
    return {
        "student_forward_gflops": round(student_flops / 1e9, 3),
        "teacher_forward_gflops": round(teacher_flops / 1e9, 3),
        "from_labels_of_online_by_flops": round((step + teacher_flops) / step, 3),
    }


# --- on a GPU ---------------------------------------------------------------------------------------------------

# Student, batch, compiled: the most telling first. The teacher in the step is measured at the first batch size alone.
BATCH = 256
CASES = (
    ("deit-s", BATCH, True),
    ("deit-s", BATCH, False),
    ("deit-ti", BATCH, True),
    ("deit-b", BATCH, True),
    ("deit-ti", BATCH, False),
    ("deit-b", BATCH, False),
    ("deit-s", 1024, True),
    ("deit-b", 1024, True),
    ("deit-ti", 1024, True),
)
TOY_CASES = (("deit-ti", 8, False),)
LOADERS = (15, 8, 4, 2)
EAGER_S, COMPILED_S, FEEDING_S = 60.0, 110.0, 35.0  # that a case took on an H200 with 16 slow cores
ANCHOR = "NVIDIA publishes 7,700 to 8,000 images/s for a ViT-S of 22 M parameters on one H100, bfloat16, compiled"


@dataclass(frozen=True)
class Bench:
    """What all cases share.

    Attributes:
        job: sizes and time.
        labels: the label set.
        network: the teacher that answers in the step; one for all, so that it is compiled once.
        workers: loader processes.
        seconds: of each competitor in a round.
        rounds: that alternate.
    """

    job: Job
    labels: Path
    network: torch.nn.Module
    workers: int
    seconds: float
    rounds: int


def on_gpu(job: Job) -> None:
    """Measure stage 2: student alone, from labels, and with the teacher in the step; and how many loaders feed it."""
    bench = open_bench(job)
    job.note("what", {"teacher": teacher_of(job), "loader_processes": bench.workers, "anchor": ANCHOR})
    for name, batch, compiled in TOY_CASES if job.rehearse else CASES:
        case = f"{name}, {batch}, {'compiled' if compiled else 'eager'}"
        if not job.lacks(case, COMPILED_S if compiled else EAGER_S):
            continue
        if batch != BATCH:
            torch.compiler.reset()  # else torch compiles again for batches of any size, which is slower
        job.note(case, fitting_figures(bench, name, batch, compiled))
        release()
    if job.lacks("feeding", FEEDING_S):
        job.note("feeding", feeding(bench))


def fitting_figures(bench: Bench, name: str, batch: int, compiled: bool) -> dict[str, Any]:
    """Return the figures of the largest batch up to this one that fits into the memory: it is halved until one does."""
    while True:
        try:
            return case_figures(bench, name, batch, compiled)
        except torch.OutOfMemoryError:
            if batch <= BATCH:
                raise
        release()  # not in the handler, which holds the arrays of the failed pass
        batch //= 2


def release() -> None:
    """Give back the memory of what is not used any more."""
    gc.collect()
    torch.cuda.empty_cache()


def teacher_of(job: Job) -> str:
    """Return the name of the teacher in the step."""
    return "test_resnet" if job.rehearse else "regnety_160"


def open_bench(job: Job) -> Bench:
    """Make the label set, and the teacher that answers in the step."""
    toy = {"img_size": 32, "mix_block": 16}
    data = job.source(32 if job.rehearse else 4096)
    workers = 1 if job.rehearse else min(LOADERS[0], usable_cores() - 1)
    args = argparse.Namespace(data=data, device=str(job.device), workers=workers)
    labels = make_labels(args, job.work / "stage2-labels", toy if job.rehearse else {})
    network = timm.create_model(teacher_of(job), num_classes=1000).eval()
    network.to(job.device, memory_format=torch.channels_last).requires_grad_(False)
    return Bench(
        job=job,
        labels=labels,
        network=network,
        workers=workers,
        seconds=0.1 if job.rehearse else 2.0,
        rounds=1 if job.rehearse else 2,
    )


def config_of(bench: Bench, name: str, batch: int, compiled: bool, workers: int | None = None) -> TrainConfig:
    return TrainConfig(
        labels=bench.labels,
        model=name,
        batch_size=batch,
        workers=workers or bench.workers,
        device=str(bench.job.device),
        compile=compiled,
        distillation_type="hard",
        **({"patch_size": 16, "depth": 2} if bench.job.rehearse else {}),
    )


def case_figures(bench: Bench, name: str, batch: int, compiled: bool) -> dict[str, Any]:
    """Return images/s of a student alone, from labels, and with the teacher in its step, in alternating rounds."""
    device, began = bench.job.device, time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with opened_run(config_of(bench, name, batch, compiled)) as run:
        batches = batches_in_memory(run)
        views = len(batches[0].keys)
        works = {"alone": update_on(run, batches)}
        if batch <= BATCH:
            teacher = DistillationTeacher(bench.network, device=device)
            works["online"] = online_step(run, batches[0], teacher)  # compiles the teacher where the student is
            works["teacher"] = asking(run, batches[0], teacher)
        first_s = {kind: round(row_s(work, 1, device), 2) for kind, work in works.items()}  # they compile
        calls = {kind: max(1, int(bench.seconds / row_s(work, 3, device))) for kind, work in works.items()}
        rounds, marks = [], [began, time.monotonic()]
        for _ in range(bench.rounds):
            together = measure_loop(run, seconds=bench.seconds)
            marks.append(time.monotonic())
            rates = {kind: views / row_s(work, calls[kind], device) for kind, work in works.items()}
            rounds.append(rates | {"from_labels": together.images_per_s, "data_wait": together.data_wait})
        median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        ratio = {
            kind: round(statistics.median(each["from_labels"] / each[kind] for each in rounds), 3)
            for kind in ("alone", "online")
            if kind in works
        }
        figures = {key: round(value, 3 if key == "data_wait" else 1) for key, value in median.items()}
        figures |= {"views_per_update": views, "first_call_s": first_s}
        figures |= {f"from_labels_of_{kind}": value for kind, value in ratio.items()}
        if "teacher" in works:
            # What a step of both would take, one after the other, against the student's alone.
            figures["from_labels_of_online_by_rates"] = round(1 + median["alone"] / median["teacher"], 3)
        if device.type == "cuda":
            figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        label = f"trace-stage2-{name}.json.gz" if not compiled and name == "deit-s" else None
        figures["profile_alone"] = kernels(works["alone"], label and bench.job.out / label)
        # To open the run and call everything once, then each round: the loop with the start of its processes, and the rest.
        seconds = [round(b - a, 1) for a, b in itertools.pairwise([*marks, time.monotonic()])]
        return figures | {"rounds": rounds, "seconds": seconds}


def asking(run: Run, batch: Batch, teacher: torch.nn.Module) -> Work:
    """Return the teacher's part of a step by itself."""
    images = normalise(mixed_images(batch, run.running.device), run.state.student).clone()
    dtype = run.running.dtype

    def ask() -> None:
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            teacher(images)

    return ask


def feeding(bench: Bench) -> dict[str, Any]:
    """Return the views/s of more and more loader processes, and how many would feed each student that was measured."""
    streams: dict[int, float] = {}
    for workers in (1,) if bench.job.rehearse else LOADERS:
        with opened_run(config_of(bench, "deit-ti", BATCH, False, workers)) as run:
            streams[workers] = round(measure_stream(run, seconds=bench.seconds), 1)
    most = max(streams)
    students = {case: figures["alone"] for case, figures in bench.job.found.items() if "alone" in figures}
    return {
        "stream_views_per_s": streams,
        "loaders_that_would_feed": {case: math.ceil(rate * most / streams[most]) for case, rate in students.items()},
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| student | alone, images/s | from labels | of alone | teacher in every step | from labels against it | by FLOPs |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in results["students"].items():
        median, flops = found["median"], found["from_labels_of_online_by_flops"]
        cells = [f"{median[kind]:,.4g}" for kind in ("alone", "from_labels")]
        cells += [f"{median['from_labels_of_alone']:.2f}", f"{median['online']:,.4g}"]
        cells += [f"{median['from_labels_of_online']:.2f}x", f"{flops:.2f}x"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = options(__doc__, rounds=5, out_required=False)
    parser.add_argument("--table", type=Path, help="print the results in this file as Markdown, and measure nothing")
    parser.add_argument("--data", help="folder with a tar of photographs")
    parser.add_argument("--students", nargs="+", default=["deit-ti", "deit-s", "deit-b"], help="each in turn")
    parser.add_argument("--teacher", default="regnety_160")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--distillation-type", choices=("hard", "soft"), default="hard")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of student and teacher, on a CPU")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each competitor in a round; one step at least")
    args = parser.parse_args()
    if not args.table and not (args.data and args.out):
        parser.error("pass --data and --out, or --table")
    return args


def main() -> None:
    args = parse()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # else the loop takes all cores that loader processes leave
    asked = ("teacher", "pretrained", "img_size", "batch_size", "distillation_type", "compile", "threads", "seconds")
    results: dict[str, Any] = {"what": "training from labels against a teacher in every step, images/s"}
    results |= {"machine": args.machine or machine(), **{name: getattr(args, name) for name in asked}, "students": {}}
    with tempfile.TemporaryDirectory() as folder:
        labels = make_labels(args, Path(folder) / "labels", {"img_size": args.img_size})
        torch.set_num_threads(args.threads)
        for name in args.students:
            results["students"][name] = measure(args, name, labels)
            write_json(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
