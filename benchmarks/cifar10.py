"""Accuracy of students that learn from stored labels, alone, and with the teacher in every step: real CIFAR-10.

    python benchmarks/cifar10.py --data cifar10 --out benchmarks/results/cifar10.json
    python benchmarks/cifar10.py --data cifar10 --scale full --device cuda --out cifar10-full.json

A CNN learns from the class labels, answers once for the views of the training images, and small DeiTs learn from what it
said: every arm is the same network (but for the distillation token) and has the same number of updates and views. All
training images have class labels. What each size of the experiment is made of stands in `SCALES`.

`--data` is a folder with Hugging Face's CIFAR-10 as Parquet, `train-*.parquet` and `test-*.parquet`. Results are written
after each run; the same command goes on where it was interrupted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from stage1 import machine

from pipeline.config import PrecomputeConfig, TeacherConfig
from pipeline.devices import resolve_device
from pipeline.errors import UsageError
from pipeline.loading import plan_workers
from pipeline.precompute import precompute
from pipeline.recipe import load_recipe
from pipeline.sources import open_source
from pipeline.storage import pretty_json, replace_file
from pipeline.teacher import Answer, Teacher
from pipeline.teacher_loading import load_teacher
from trainer.checkpoint import export_model
from trainer.config import TrainConfig
from trainer.evaluate import evaluate_checkpoint, forward_dtype
from trainer.loop import batch_loss, train
from trainer.optim import learning_rate, set_learning_rate
from trainer.setup import build_state, make_order, open_data, top_rate
from trainer.stream import Batch, BatchRenderer, Catalogue, stream_batches
from trainer.student import hub_config

WITH_TOKEN, WITHOUT = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
HEADS = ("class_head", "distillation_head", "mean_logits", "sum_softmax")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the experiment: everything that decides its numbers but seeds and machine."""

    images: int  # the first of the training file, whose classes are shuffled
    views: int  # of each image; a student sees each of them once
    recipe: dict[str, Any]  # of the views that the teacher answers for
    teacher_recipe: dict[str, Any]  # of the views that the teacher itself learns from
    teacher: dict[str, Any]
    student: dict[str, Any]


# Small and strongly compressed images bear less than ImageNet's: no crop below 0.4 of the area, weaker RandAugment.
AUGMENTED = {"img_size": 32, "scale": [0.4, 1.0], "aa": "rand-m5-mstd0.5-inc1"}
HALF_MIXED = AUGMENTED | {"mixup_prob": 0.5}  # in few epochs, a student alone learnt more so than with every view mixed
CROP_FLIP = {"img_size": 32, "scale": [0.4, 1.0], "aa": None, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}
SMALL_DEIT = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "drop_path": 0.0}
DEIT_TI = {"patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3, "drop_path": 0.1}
SCALES = {
    # A minute or two: whether the script runs, no more.
    "trial": Scale(
        images=512,
        views=1,
        recipe=HALF_MIXED,
        teacher_recipe=CROP_FLIP,
        teacher={"model": "test_resnet", "epochs": 2, "batch_size": 64, "lr": 3e-3, "warmup_epochs": 0.5},
        student=SMALL_DEIT | {"batch_size": 64, "lr": 2e-3, "warmup_epochs": 0.25},
    ),
    # Twenty minutes on one core of a quiet machine.
    "small": Scale(
        images=16_384,
        views=2,
        recipe=HALF_MIXED,
        teacher_recipe=CROP_FLIP,
        teacher={"model": "test_resnet", "epochs": 18, "batch_size": 128, "lr": 3e-3, "warmup_epochs": 1},
        student=SMALL_DEIT | {"batch_size": 64, "lr": 2e-3, "warmup_epochs": 0.25},
    ),
    # Four times the training of `small`, with the same teacher.
    "medium": Scale(
        images=16_384,
        views=8,
        recipe=HALF_MIXED,
        teacher_recipe=CROP_FLIP,
        teacher={"model": "test_resnet", "epochs": 18, "batch_size": 128, "lr": 3e-3, "warmup_epochs": 1},
        student=SMALL_DEIT | {"batch_size": 64, "lr": 2e-3, "warmup_epochs": 1},
    ),
    # For a GPU. DeiT-Ti's own width and depth on patches of 4; ResNet-18 sees the images at twice their size, because
    # its first layers divide them by four.
    "full": Scale(
        images=50_000,
        views=300,
        recipe=AUGMENTED,
        teacher_recipe=CROP_FLIP | {"img_size": 64},
        teacher={"model": "resnet18", "epochs": 100, "batch_size": 256, "lr": 2e-3, "warmup_epochs": 5},
        student=DEIT_TI | {"batch_size": 512, "lr": 1e-3, "warmup_epochs": 10},
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        title: for the table.
        kind: `--distillation-type`.
        model: with the distillation token, or without.
        online: no labels are read: `fresh` asks the teacher in each step for views beyond those of the label set, which
            makes it a replication that shares nothing with the stored labels but the teacher; `same`, of the first seed alone,
            asks for its very views.
    """

    title: str
    kind: str
    model: str
    online: str | None = None


ARMS = {
    "alone": Arm("student alone, class labels", "none", WITHOUT),
    "hard": Arm("hard labels, token", "hard", WITH_TOKEN),
    "soft": Arm("soft labels, token", "soft", WITH_TOKEN),
    "hard_one_head": Arm("hard labels, no token", "hard", WITHOUT),
    "soft_one_head": Arm("soft labels, no token", "soft", WITHOUT),
    "hard_online": Arm("hard, token, teacher online, other views", "hard", WITH_TOKEN, "fresh"),
    "soft_online": Arm("soft, token, teacher online, other views", "soft", WITH_TOKEN, "fresh"),
    "hard_online_same": Arm("hard, token, teacher online, same views", "hard", WITH_TOKEN, "same"),
    "soft_online_same": Arm("soft, token, teacher online, same views", "soft", WITH_TOKEN, "same"),
}


class Bench:
    """The folder of one experiment, and its result file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.scale, self.device, self.workers = SCALES[args.scale], args.device, args.workers
        self.work, self.out = args.work / args.scale, args.out
        self.training = self.work / "train.parquet"
        (self.test,) = sorted(args.data.glob("test-*.parquet"))
        self._write_training(sorted(args.data.glob("train-*.parquet")))
        self.results = self._begin(args.scale)

    def _write_training(self, files: Sequence[Path]) -> None:
        """Write the first images of the training files as a source of its own, with its class names."""
        if not self.training.is_file():
            table = pa.concat_tables([pq.read_table(file) for file in files]).slice(0, self.scale.images)
            self.training.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.training, lambda file: pq.write_table(table, file, row_group_size=1024))

    def _begin(self, name: str) -> dict[str, Any]:
        settings = json.loads(
            json.dumps({"name": name, "device": str(resolve_device(self.device))} | asdict(self.scale))
        )
        started = {"what": "top-1 on CIFAR-10's test images, percent", "machine": machine(), "settings": settings}
        if not self.out.is_file():
            return started | {"runs": []}
        found = json.loads(self.out.read_bytes())
        if any(found[key] != value for key, value in started.items()):
            raise UsageError(f"{self.out} was made with other settings, or on another machine: choose another --out")
        return found

    def save(self) -> None:
        replace_file(self.out, lambda file: file.write(pretty_json(self.results)))

    def config(self, name: str, seed: int, **settings: Any) -> TrainConfig:
        return TrainConfig(
            output=self.work / name,
            seed=seed,
            device=self.device,
            workers=self.workers,
            repeated_aug=1,  # three views of an image would leave too few images in a small batch
            model_ema=False,  # DeiT's averages over 25,000 updates
            checkpoint_interval=10,
            resume="auto",
            **settings,
        )

    def evaluate(self, run: Path) -> dict[str, float]:
        """Return top-1 by way of reading the heads."""
        scores = evaluate_checkpoint(
            checkpoint=str(run / "last"),
            model=None,
            pretrained=False,
            data=str(self.test),
            labels=None,
            agreement_samples=0,
            batch_size=256,
            workers=self.workers,
            crop_pct=1.0,
            device=self.device,
            amp_dtype="auto",
        )["scores"]
        return {head: round(values["top1"], 4) for head, values in scores.items()}

    def train_teacher(self) -> None:
        """Train the CNN on the class labels, unless it is there; note what it scores."""
        if "teacher" in self.results:
            return
        began = time.monotonic()
        config = self.config("teacher", 0, data=str(self.training), distillation_type="none", **self.scale.teacher)
        run = train(config, load_recipe("deit", self.scale.teacher_recipe))
        self.results["teacher"] = {"seconds": round(time.monotonic() - began), "top1": self.evaluate(run)["class_head"]}
        self.save()

    def load_teacher(self) -> Teacher:
        asked = TeacherConfig(teacher=(str(self.work / "teacher" / "last"),), device=str(resolve_device(self.device)))
        return load_teacher(asked)

    def label(self) -> None:
        """Ask the teacher once for every view."""
        began = time.monotonic()
        config = PrecomputeConfig(
            data=str(self.training),
            out=self.work / "labels",
            views=(0, self.scale.views),
            workers=self.workers,
            processes=1,
        )
        precompute(config, load_recipe("deit", self.scale.recipe), self.load_teacher(), open_source(self.training))
        if "labels" not in self.results:
            size = sum(path.stat().st_size for path in (self.work / "labels" / "labels").rglob("*.parquet"))
            views = self.scale.views * self.scale.images
            self.results["labels"] = {"seconds": round(time.monotonic() - began), "views": views, "bytes": size}
            self.save()

    def run(self, name: str, seed: int) -> None:
        """Train and evaluate one student, unless its result is there."""
        if any((each["arm"], each["seed"]) == (name, seed) for each in self.results["runs"]):
            return
        arm, began = ARMS[name], time.monotonic()
        config = self.config(
            f"{name}-{seed}",
            seed,
            labels=self.work / "labels",
            distillation_type=arm.kind,
            model=arm.model,
            epochs=self.scale.views,
            **self.scale.student,
        )
        extra = {}
        if arm.online is None:
            run = train(config)
        else:
            run, extra = train_online(config, self.load_teacher(), same=arm.online == "same")
        seconds = round(time.monotonic() - began)
        if arm.online == "same":
            extra["largest_weight_difference"] = largest_difference(run, self.work / f"{arm.kind}-{seed}")
        top1 = self.evaluate(run)
        self.results["runs"].append({"arm": name, "seed": seed, "seconds": seconds, "top1": top1} | extra)
        self.results["summary"] = summary(self.results["runs"])
        self.save()
        print(name, seed, f"{seconds} s", top1, extra, flush=True)


def train_online(config: TrainConfig, teacher: Teacher, *, same: bool) -> tuple[Path, dict[str, Any]]:
    """Train as `trainer.loop.train` does, but ask the teacher in each step, as DeiT's code does.

    This is all that this script knows of the inside of the trainer. On the views of the label set the hard labels must
    be the stored ones, so that the weights come out the same: it shows that both loops are one computation.

    Args:
        config: of the same run with stored labels.
        teacher: answers for each batch, as the student sees it.
        same: take the views of the label set, and compare what it holds; else as many views after them.

    Returns:
        The run's folder, with `last/`, and how the answers compare with the stored ones (empty without `same`).
    """
    data = open_data(config)
    data = data if same else replace(data, label_set=None)
    order = make_order(config, data)
    if not same:
        order = replace(order, views=range(config.epochs, 2 * config.epochs))
    device = resolve_device(config.device)
    dtype = forward_dtype(config.amp_dtype, device)
    state = build_state(config, data, order, device)
    total, comparison = order.steps_per_epoch * config.epochs, Comparison()
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for batch in stream_batches(renderer, range(total), workers=plan_workers(config.workers, device)):
        answer = teacher.ask(batch.images, batch.mix, data.num_classes).result()
        if same:
            comparison.add(batch, answer)
        rate = learning_rate(
            batch.index,
            updates_total=total,
            updates_warmup=round(order.steps_per_epoch * config.warmup),
            lr=top_rate(config, order),
            warmup_lr=min(config.warmup_lr, top_rate(config, order)),
            min_lr=min(config.min_lr, top_rate(config, order)),
        )
        set_learning_rate(state.optimizer, rate)
        asked = replace(batch, **target_of(answer)).to(device)
        loss, _ = batch_loss(config, state.student, state.student, asked, dtype)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    export_model(config.folder / "last", state.student.model.state_dict(), hub_config=hub_config(state.student))
    return config.folder, comparison.to_dict() if same else {}


def target_of(answer: Answer) -> dict[str, torch.Tensor]:
    """Return everything that the teacher said of a batch as a batch holds it: K = C, no tail."""
    columns = {name: torch.from_numpy(getattr(answer, name)) for name in ("hard", "topk_index", "topk_prob")}
    return columns | {"tail_mass": torch.zeros(len(answer.hard))}


class Comparison:
    """Stored labels against the answers of the step."""

    def __init__(self) -> None:
        self._views = self._other = 0
        self._furthest = 0.0

    def add(self, batch: Batch, answer: Answer) -> None:
        stored, online = (
            torch.zeros(len(index), int(index.max()) + 1).scatter_(1, index, prob)
            for index, prob in (
                (batch.topk_index, batch.topk_prob),
                (torch.from_numpy(answer.topk_index), torch.from_numpy(answer.topk_prob)),
            )
        )
        self._views += len(batch.keys)
        self._other += int((batch.hard != torch.from_numpy(answer.hard)).sum())
        self._furthest = max(self._furthest, float((stored - online).abs().max()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "views_compared": self._views,
            "other_hard_labels": self._other,
            "largest_probability_difference": self._furthest,
        }


def largest_difference(run: Path, other: Path) -> float:
    """Return how far the weights of two runs are apart."""
    one, two = (load_file(folder / "last" / "model.safetensors") for folder in (run, other))
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return mean, lowest, highest and sample standard deviation over the seeds, by arm and way of reading the heads."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for arm in ARMS:
        mine = [run["top1"] for run in runs if run["arm"] == arm]
        for head in mine[0] if mine else ():
            values = [top1[head] for top1 in mine]
            numbers = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
            numbers |= {"std": statistics.stdev(values)} if len(values) > 1 else {}
            result.setdefault(arm, {})[head] = {key: round(value, 2) for key, value in numbers.items()}
    return result


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table: mean (lowest to highest) in percent."""
    yield "| | seeds | " + " | ".join(head.replace("_", " ") for head in HEADS) + " |"
    yield "|---|--:|" + "--:|" * len(HEADS)
    yield f"| teacher, {results['settings']['teacher']['model']} | 1 | {results['teacher']['top1']:.1f} |" + " |" * 3
    for arm, heads in results.get("summary", {}).items():
        seeds = sum(run["arm"] == arm for run in results["runs"])
        cells = [
            f"{heads[head]['mean']:.1f} ({heads[head]['min']:.1f} to {heads[head]['max']:.1f})" if head in heads else ""
            for head in HEADS
        ]
        yield f"| {ARMS[arm].title} | {seeds} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="teacher, labels and students")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    args = parser.parse_args()
    bench = Bench(args)
    bench.train_teacher()
    bench.label()
    for seed in range(args.seeds):  # all arms of a seed, then the next
        for name in args.arms:
            if ARMS[name].online != "same":
                bench.run(name, seed)
    for name in args.arms:  # these are compared with the stored labels of the first seed
        if ARMS[name].online == "same":
            bench.run(name, 0)
    print("\n".join(table(bench.results)))


if __name__ == "__main__":
    main()
