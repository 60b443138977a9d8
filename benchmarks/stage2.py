"""Training from stored labels against training with the teacher in every step, and against the student alone.

    python benchmarks/stage2.py --data imagenet-sample --students deit-ti deit-s deit-b --teacher regnety_160 --out stage2.json
    python benchmarks/stage2.py --table stage2.json

Three ways to train the same student, in turn in every round of one run: the student alone on a batch that lies in memory, with
its labels; the training loop from a label set, loader processes included; and timm's own TokenDistillationTask, whose teacher
answers in every step, on the same mixed images in memory (so it pays for neither mixing nor loading). Batch, precision,
optimizer, EMA and compilation are the same. Ratios are taken within a round; medians are quoted.

The label set is made first, by a small teacher with random weights: the speed of a student does not depend on what its labels
say. So are the teacher's weights random, but for --pretrained. On a GPU the forward passes are in bfloat16, the teacher is
channels-last, AdamW is fused and batches are copied from page-locked memory.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from stage1 import machine
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask

from pipeline.config import PrecomputeConfig, TeacherConfig
from pipeline.engines import load_here
from pipeline.measuring import forward_flops
from pipeline.precompute import precompute
from pipeline.recipe import load_recipe
from pipeline.timing import Work, row_s
from trainer.config import TrainConfig
from trainer.evaluate import mixed_images, normalise
from trainer.loop import Run
from trainer.measuring import batches_in_memory, measure_together, opened_run, update_on
from trainer.optim import create_ema, create_optimizer
from trainer.stream import Batch

VIEWS = 6


def make_labels(args: argparse.Namespace, out: Path) -> Path:
    """Label a few views with a small teacher that knows nothing."""
    asked = TeacherConfig(teacher=("resnet18",), pretrained=False, teacher_img_size=64, device=args.device)
    config = PrecomputeConfig(
        data=args.data, out=out, views=(0, VIEWS), workers=args.workers, accuracy_samples=0, processes=1
    )
    teacher, source = load_here(config, asked)
    precompute(config, load_recipe("deit", {"img_size": args.img_size}), teacher, source)
    return out


def online_step(run: Run, batch: Batch, teacher: torch.nn.Module) -> Work:
    """Return a training step of timm's task: the teacher answers in it."""
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
        torch.nn.functional.one_hot(batch.class_label, num_classes).float() * (1 - smoothing) + smoothing / num_classes
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
            together = measure_together(run, seconds=args.seconds)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each competitor in a round; one step at least")
    parser.add_argument("--machine", help="what to call this machine; by default its processor and device")
    parser.add_argument("--out", type=Path)
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
        labels = make_labels(args, Path(folder) / "labels")
        torch.set_num_threads(args.threads)
        for name in args.students:
            results["students"][name] = measure(args, name, labels)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
