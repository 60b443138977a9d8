"""Accuracy of students that learn from stored labels, alone, and with the teacher in every step: real CIFAR-10.

    python benchmarks/cifar10.py --data cifar10 --out benchmarks/results/cifar10.json
    python benchmarks/cifar10.py --data cifar10 --scale full --device cuda --budget 540 --out benchmarks/results/cifar10_full.json
    python benchmarks/cifar10.py --table benchmarks/results/cifar10_full.json

A CNN learns from the class labels, answers once for the views of the training images, and small DeiTs learn from its answers:
every arm is the same network (but for the distillation token) and has the same number of updates and views. All training
images have class labels. `SCALES` defines each size of the experiment.

`--data` is a folder with Hugging Face's CIFAR-10 as Parquet, `train-*.parquet` and `test-*.parquet`. Results are written
after each run; the same command continues after an interruption, also on another machine that has the result file.

Teacher and labels are in `--work`. A machine without them trains a teacher of its own, with another seed, and appends it to
`teachers` in the result file. An arm and seed that are in the file are not run again, whichever teacher they learned from. So over
several machines the spread of an arm is that of students and teachers together, while on one machine all arms share the luck of
one teacher. The arms run seed by seed: where a machine stops within a seed, the other arms of this seed learn from the next teacher.
`teacher` of each run says which one it was.
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rounds import Job, machine
from safetensors.torch import load_file

from pipeline.errors import UsageError
from pipeline.images.source import open_source
from pipeline.labels.manifest import first_difference
from pipeline.machine.loaders import plan_workers
from pipeline.machine.ranks import forward_dtype, resolve_device
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.loop import device_name
from pipeline.stage1.precompute import precompute
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json, read_json
from pipeline.teacher.loading import load_teacher
from pipeline.teacher.teacher import Answer, Teacher, one_thread
from pipeline.views.draws import stream_of
from trainer.config import EvaluateConfig, TrainConfig
from trainer.evidence.scores import evaluate_checkpoint
from trainer.export import export_model, hub_config
from trainer.loop import batch_loss, train
from trainer.losses import LossSettings, TeacherTarget
from trainer.optim import learning_rate, set_learning_rate
from trainer.run import build_state, make_order, open_data, top_rate
from trainer.stream import Batch, BatchRenderer, Catalogue, stream_batches

WITH_TOKEN, WITHOUT = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
HEADS = ("class_head", "distillation_head", "mean_logits", "sum_softmax")
WHAT = "top-1 on CIFAR-10's test images, percent"
SPARE = 1.2  # an arm may take so many times what the slowest one took
ONLINE = 1.5  # an arm with the teacher in every step may take so many times one without; until one is measured


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the experiment: everything that decides its numbers but seeds and machine, and how long it takes."""

    images: int  # the first of the training file, whose classes are shuffled
    views: int  # of each image; a student sees each of them once
    recipe: dict[str, Any]  # of the views that the teacher answers for
    teacher_recipe: dict[str, Any]  # of the views that the teacher itself learns from
    teacher: dict[str, Any]
    student: dict[str, Any]
    prepare_s: float  # guess of the seconds for teacher and labels, until a machine has measured them
    arm_s: float  # guess of the seconds for one arm, likewise

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as plain JSON values."""
        values = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in values.items() if name not in ("prepare_s", "arm_s")}


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
        prepare_s=4,
        arm_s=2,
    ),
    # Twenty minutes on one core of a quiet machine.
    "small": Scale(
        images=16_384,
        views=2,
        recipe=HALF_MIXED,
        teacher_recipe=CROP_FLIP,
        teacher={"model": "test_resnet", "epochs": 18, "batch_size": 128, "lr": 3e-3, "warmup_epochs": 1},
        student=SMALL_DEIT | {"batch_size": 64, "lr": 2e-3, "warmup_epochs": 0.25},
        prepare_s=330,
        arm_s=80,
    ),
    # Four times the training of `small`, with the same teacher.
    "medium": Scale(
        images=16_384,
        views=8,
        recipe=HALF_MIXED,
        teacher_recipe=CROP_FLIP,
        teacher={"model": "test_resnet", "epochs": 18, "batch_size": 128, "lr": 3e-3, "warmup_epochs": 1},
        student=SMALL_DEIT | {"batch_size": 64, "lr": 2e-3, "warmup_epochs": 1},
        prepare_s=480,
        arm_s=140,
    ),
    # Sized for one H100 with 16 cores: about a minute for teacher and labels, one to two for an arm. DeiT-Ti's own width and
    # depth on patches of 4. ResNet-18 sees the images at twice their size, because its first layers divide them by four.
    # Guessed: an eager update of 512 views takes 18 ms, most of it to launch kernels, so the 3,492 updates of 36 views take 63 s
    # and ask for 28,000 views/s. Measured on a shared EPYC core: one of 15 loader processes renders 4,500 views/s of a batch
    # with their labels, 12,000 for the teacher's training, and 9,600 for the labels, so 12 processes are enough.
    # Mix blocks of 512 halve the teacher's forward passes, which are of one block each.
    "full": Scale(
        images=50_000,
        views=36,
        recipe=HALF_MIXED | {"mix_block": 512},
        teacher_recipe=CROP_FLIP | {"img_size": 64},
        teacher={
            "model": "resnet18",
            "epochs": 16,
            "batch_size": 512,
            "lr": 2e-3,
            "warmup_epochs": 2,
            "drop_path": 0.0,  # too few epochs to overfit
        },
        student=DEIT_TI | {"batch_size": 512, "lr": 1e-3, "warmup_epochs": 4},
        prepare_s=75,
        arm_s=80,
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
            makes it a replication that shares nothing with the stored labels but the teacher; `same`, of one seed alone,
            asks for its very views.
    """

    title: str
    kind: str
    model: str
    online: str | None = None


ARMS = {  # in the order in which they run
    "alone": Arm("student alone, class labels", "none", WITHOUT),
    "soft": Arm("soft labels, token", "soft", WITH_TOKEN),
    "hard": Arm("hard labels, token", "hard", WITH_TOKEN),
    "hard_one_head": Arm("hard labels, no token", "hard", WITHOUT),
    "soft_one_head": Arm("soft labels, no token", "soft", WITHOUT),
    "hard_online": Arm("hard, token, teacher online, other views", "hard", WITH_TOKEN, "fresh"),
    "soft_online": Arm("soft, token, teacher online, other views", "soft", WITH_TOKEN, "fresh"),
    "hard_online_same": Arm("hard, token, teacher online, same views", "hard", WITH_TOKEN, "same"),
    "soft_online_same": Arm("soft, token, teacher online, same views", "soft", WITH_TOKEN, "same"),
}


class Bench:
    """The folder of one experiment, and its result file."""

    def __init__(
        self, *, name: str, data: Path, work: Path, out: Path, device: str, workers: int | None, compiled: bool = False
    ) -> None:
        self.scale, self.device, self.workers, self.compiled = SCALES[name], resolve_device(device), workers, compiled
        if workers is None and self.device.type == "cpu":
            self.workers = 0
        self.work, self.out = work / name, out
        self.settings = {"name": name, "device": self.device.type} | self.scale.settings()
        self.results = open_results(out, self.settings)
        self.teacher = ""  # SHA-256 of its weights; `prepare` sets it
        self.training = self.work / "train.parquet"
        (self.test,) = sorted(data.glob("test-*.parquet"))
        self._files = sorted(data.glob("train-*.parquet"))

    @property
    def card(self) -> str:
        """The GPU's product name, or cpu."""
        return device_name(self.device)

    def _write_training(self) -> None:
        """Write the first images of the training files as a source of its own, with its class names."""
        if not self.training.is_file():
            table = pa.concat_tables([pq.read_table(file) for file in self._files]).slice(0, self.scale.images)
            self.training.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.training, lambda file: pq.write_table(table, file, row_group_size=1024))

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.results["summary"] = summary(self.results["runs"])
        replace_file(self.out, lambda file: file.write(pretty_json(self.results)))

    def config(self, name: str, seed: int, **settings: Any) -> TrainConfig:
        return TrainConfig(
            output=self.work / name,
            seed=seed,
            device=str(self.device),
            workers=self.workers,
            compile=self.compiled,
            repeated_aug=1,  # three views of an image would leave too few images in a small batch
            model_ema=False,  # DeiT's averages over 25,000 updates
            checkpoint_interval=10,
            resume="auto",
            **settings,
        )

    def evaluate(self, run: Path) -> dict[str, float]:
        """Return top-1 by way of reading the heads."""
        config = EvaluateConfig(
            checkpoint=str(run / "last"),
            data=str(self.test),
            workers=0,  # 4,000 small images take less than it takes to start loader processes
            crop_pct=1.0,
            device=str(self.device),
        )
        scores = evaluate_checkpoint(config)["scores"]
        return {head: round(values["top1"], 4) for head, values in scores.items()}

    def todo(self, arms: Sequence[str], seeds: int) -> list[tuple[str, int]]:
        """Return the arms and seeds that have no result yet: all arms of a seed, then the next; the same views last."""
        done = {(run["arm"], run["seed"]) for run in self.results["runs"]}
        names = [name for name in ARMS if name in arms]
        pairs = [(name, seed) for seed in range(seeds) for name in names if ARMS[name].online != "same"]
        compared = [name for name in names if ARMS[name].online == "same" and name not in {arm for arm, _ in done}]
        return [pair for pair in pairs if pair not in done] + [(name, 0) for name in compared]

    def go(self, arms: Sequence[str], seeds: int, *, budget_s: float = math.inf) -> list[str]:
        """Run what has no result yet and ends in time; return the arms and seeds that are left.

        Nothing is begun where teacher, labels and a first arm would take too long. An arm of the same views is left where
        no student has learned from the stored labels of this folder's teacher: there is nothing to compare it with.
        """
        end, todo = time.monotonic() + budget_s, self.todo(arms, seeds)
        if all(ARMS[name].online == "same" for name, _ in todo) and not self._teacher_note():
            return [f"{name} {seed}" for name, seed in todo]
        if todo and (needed := self.preparation_s() + self.arm_s(todo[0][0])) > budget_s:
            print(f"the budget of {budget_s:.0f} s is too small: teacher, labels and one arm take {needed:.0f} s")
            return [f"{name} {seed}" for name, seed in todo]
        if todo:
            self.prepare()
        left = []
        for number, (name, seed) in enumerate(todo):
            if time.monotonic() + self.arm_s(name) > end:
                left += [f"{name} {seed}" for name, seed in todo[number:]]
                break
            if not self.run(name, seed):
                left.append(f"{name} {seed}")
        return left

    def preparation_s(self) -> float:
        """Return how long teacher and labels will take: 0 where this folder has them."""
        if "labels" in self._teacher_note():
            return 0.0
        known = [each for each in self.results["teachers"] if each.get("device") == self.card]
        seconds = [each["seconds"] + each["evaluation_s"] + each["labels"]["seconds"] for each in known]
        return SPARE * max(seconds) if seconds else self.scale.prepare_s

    def arm_s(self, name: str) -> float:
        """Return how long an arm will take at most, judged by the slowest one on such a device so far."""
        known = [run for run in self.results["runs"] if run.get("device") == self.card]
        seconds = {
            online: [run["seconds"] + run["evaluation_s"] for run in known if is_online(run["arm"]) == online]
            for online in (False, True)
        }
        if mine := seconds[is_online(name)]:
            return SPARE * max(mine)
        stored = SPARE * max(seconds[False]) if seconds[False] else self.scale.arm_s
        return ONLINE * stored if is_online(name) else stored

    def _teacher_note(self) -> dict[str, Any]:
        """Return what this folder notes of its teacher; empty before there is one."""
        path = self.work / "teacher.json"
        if not path.is_file():
            return {}
        found = read_json(path)
        check_settings(path, found["settings"], self.settings)
        return found["teacher"]

    def _note_teacher(self, teacher: dict[str, Any]) -> None:
        values = {"settings": self.settings, "teacher": teacher}
        replace_file(self.work / "teacher.json", lambda file: file.write(pretty_json(values)))

    def prepare(self) -> None:
        """Train the teacher and make its labels, unless this folder has them; enter it in the results."""
        self._write_training()
        teacher = self._teacher_note() or self.train_teacher()
        if "labels" not in teacher:
            teacher["labels"] = self.label()
            self._note_teacher(teacher)
        self.teacher = teacher["sha256"]
        if all(each["sha256"] != self.teacher for each in self.results["teachers"]):
            self.results["teachers"].append(teacher)
            self.save()

    def train_teacher(self) -> dict[str, Any]:
        """Train the CNN on the class labels; return its seed, what it scores, and its weights' hash."""
        began, seed = time.monotonic(), self._teacher_seed()
        config = self.config("teacher", seed, data=str(self.training), distillation_type="none", **self.scale.teacher)
        run = train(config, load_recipe("deit", self.scale.teacher_recipe))
        with (run / "last" / "model.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        teacher = {"sha256": digest, "seed": seed, "seconds": seconds_since(began)}
        began, top1 = time.monotonic(), self.evaluate(run)["class_head"]
        teacher |= {"evaluation_s": seconds_since(began), "top1": top1, "device": self.card, "machine": machine()}
        self._note_teacher(teacher)
        print("teacher", json.dumps(teacher), flush=True)
        return teacher

    def _teacher_seed(self) -> int:
        """Return the seed of the teacher that was begun in this folder; else one that no teacher of the results has."""
        begun = self.work / "teacher" / "config.json"
        if begun.is_file():
            return read_json(begun)["config"]["seed"]
        return max((each["seed"] + 1 for each in self.results["teachers"]), default=0)

    def load_teacher(self) -> Teacher:
        asked = TeacherConfig(teacher=(str(self.work / "teacher" / "last"),), device=str(self.device))
        return load_teacher(asked)

    def label(self) -> dict[str, Any]:
        """Ask the teacher once for every view; return how long it took, how many views they are, and the size of the labels."""
        began = time.monotonic()
        config = PrecomputeConfig(
            data=str(self.training),
            out=self.work / "labels",
            views=(0, self.scale.views),
            views_per_shard=self.scale.views,
            workers=self.workers,
            processes=1,
        )
        precompute(config, load_recipe("deit", self.scale.recipe), self.load_teacher(), open_source(self.training))
        size = sum(path.stat().st_size for path in (self.work / "labels" / "labels").rglob("*.parquet"))
        labels = {"seconds": seconds_since(began), "views": self.scale.views * self.scale.images, "bytes": size}
        print("labels", json.dumps(labels), flush=True)
        return labels

    def run(self, name: str, seed: int) -> bool:
        """Train and evaluate one student; return False where there is nothing that it could be compared with."""
        arm = ARMS[name]
        if arm.online == "same":
            if (base := self._comparable(arm.kind)) is None:
                return False
            seed = base
        began, (run, extra) = time.monotonic(), self.train_student(name, seed)
        seconds = seconds_since(began)
        began, top1 = time.monotonic(), self.evaluate(run)
        if arm.online == "same":
            extra["largest_weight_difference"] = largest_difference(run, self.work / f"{arm.kind}-{seed}")
        entry = {"arm": name, "seed": seed, "seconds": seconds, "evaluation_s": seconds_since(began), "top1": top1}
        entry |= {"teacher": self.teacher, "device": self.card, "torch": torch.__version__, "compiled": self.compiled}
        self.results["runs"].append(entry | extra)
        self.save()
        print(name, seed, f"{seconds} s", top1, extra, flush=True)
        return True

    def train_student(self, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """Train one student; return its folder, and for the same views how the teacher's answers compare."""
        arm = ARMS[name]
        config = self.config(
            f"{name}-{seed}",
            seed,
            labels=self.work / "labels",
            distillation_type=arm.kind,
            model=arm.model,
            epochs=self.scale.views,
            **self.scale.student,
        )
        if arm.online is None:
            return train(config), {}
        return train_online(config, self.load_teacher(), same=arm.online == "same")

    def _comparable(self, kind: str) -> int | None:
        """Return the first seed whose student learned here, from stored labels of this teacher; None: there is none."""
        seeds = [run["seed"] for run in self.results["runs"] if (run["arm"], run["teacher"]) == (kind, self.teacher)]
        return next((seed for seed in sorted(seeds) if (self.work / f"{kind}-{seed}" / "last").is_dir()), None)


def open_results(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results in a file, or new ones.

    Raises:
        UsageError: the file is of other settings.
    """
    if not out.is_file():
        return {"what": WHAT, "settings": settings, "teachers": [], "runs": []}
    found = upgraded(read_json(out))
    check_settings(out, found["settings"], settings)
    return found


def check_settings(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UsageError with the first field in which a file's settings differ from those that were asked for."""
    if difference := first_difference(found, asked):
        raise UsageError(f"{path} was made with other settings{difference}: choose another --out and --work")


def upgraded(results: dict[str, Any]) -> dict[str, Any]:
    """Return results of one machine and one teacher, as older files hold them, in the form of several."""
    if "teachers" in results:
        return results
    kept = {name: value for name, value in results.items() if name not in ("teacher", "labels", "machine")}
    labels = results.get("labels", {"seconds": 0, "views": 0, "bytes": 0})
    teacher = {
        "sha256": None,
        "seed": 0,
        "evaluation_s": 0,
        "device": "cpu",
        "machine": results["machine"],
        "labels": labels,
    }
    about = {"teacher": None, "device": "cpu", "torch": results["machine"]["versions"]["torch"], "evaluation_s": 0}
    return kept | {
        "teachers": [teacher | results["teacher"]] if "teacher" in results else [],
        "runs": [about | run for run in results["runs"]],
    }


def is_online(name: str) -> bool:
    return ARMS[name].online is not None


def seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 1)


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
    workers = plan_workers(config.workers, device)
    total, comparison = order.steps_per_epoch * config.epochs, Comparison()
    settings = LossSettings.of(config)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    for batch in stream_batches(renderer, range(total), workers=workers, device=device):
        with one_thread(teacher.device):
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
        torch.manual_seed(stream_of("step", str(config.seed), str(batch.index)).bits())  # stochastic depth
        asked = replace(batch, teacher=target_of(answer)).to(device)
        loss, _ = batch_loss(settings, state.student, state.student, asked, dtype)
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    export_model(config.folder / "last", state.student.model.state_dict(), hub_config=hub_config(state.student))
    return config.folder, comparison.to_dict() if same else {}


def target_of(answer: Answer) -> TeacherTarget:
    """Return everything that the teacher said of a batch as a batch holds it: K = C, no tail."""
    columns = (torch.from_numpy(each) for each in (answer.hard, answer.topk_index, answer.topk_prob))
    return TeacherTarget(*columns, torch.zeros(len(answer.hard)))


class Comparison:
    """Stored labels against the answers of the step."""

    def __init__(self) -> None:
        self._views = self._other = 0
        self._furthest = 0.0

    def add(self, batch: Batch, answer: Answer) -> None:
        assert batch.teacher is not None
        stored, online = (
            torch.zeros(len(index), int(index.max()) + 1).scatter_(1, index, prob)
            for index, prob in (
                (batch.teacher.topk_index, batch.teacher.topk_prob),
                (torch.from_numpy(answer.topk_index), torch.from_numpy(answer.topk_prob)),
            )
        )
        self._views += len(batch.keys)
        self._other += int((batch.teacher.hard != torch.from_numpy(answer.hard)).sum())
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


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each arm its seeds, the teachers of these, and the spread of top-1 by way of reading the heads."""
    result: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm]
        if mine:
            counts = {"seeds": len(mine), "teachers": len({run["teacher"] for run in mine})}
            heads = {head: spread([run["top1"][head] for run in mine]) for head in mine[0]["top1"]}
            result[arm] = counts | heads
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, lowest, highest, and of several values the sample standard deviation."""
    numbers = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
    numbers |= {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {key: round(value, 2) for key, value in numbers.items()}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table: mean (lowest to highest) in percent."""
    results = upgraded(results)
    yield "| | seeds | teachers | " + " | ".join(head.replace("_", " ") for head in HEADS) + " |"
    yield "|---|--:|--:|" + "--:|" * len(HEADS)
    if teachers := [each["top1"] for each in results["teachers"]]:
        cells = [str(len(teachers)), str(len(teachers)), cell(spread(teachers)), "", "", ""]
        yield f"| teacher, {results['settings']['teacher']['model']} | " + " | ".join(cells) + " |"
    for arm, found in summary(results["runs"]).items():
        cells = [str(found["seeds"]), str(found["teachers"]), *(cell(found.get(head)) for head in HEADS)]
        yield f"| {ARMS[arm].title} | " + " | ".join(cells) + " |"


def cell(values: dict[str, float] | None) -> str:
    return f"{values['mean']:.1f} ({values['min']:.1f} to {values['max']:.1f})" if values else ""


def on_budget(
    data: Path,
    work: Path,
    out: Path,
    *,
    scale: str,
    budget_s: float,
    device: str,
    workers: int | None,
    seeds: int,
    arms: Sequence[str],
    compiled: bool = False,
) -> dict[str, Any]:
    """Run what ends in time and has no result yet.

    Args:
        data: folder with CIFAR-10 as Parquet.
        work: folder of teacher, labels and students.
        out: result file, which is continued.
        scale: name of the size of the experiment.
        budget_s: seconds for everything; may be infinite.
        device: torch device, or `auto`.
        workers: loader processes; None: none on a CPU, all cores but one on a GPU.
        seeds: of each arm.
        arms: names of arms.
        compiled: whether to compile the networks that learn.

    Returns:
        `results`, what the result file holds; `left_out`, the arms and seeds that are left, such as `soft 1`, in their order.

    Raises:
        UsageError: the result file is of other settings.
    """
    bench = Bench(name=scale, data=data, work=work, out=out, device=device, workers=workers, compiled=compiled)
    left_out = bench.go(arms, seeds, budget_s=budget_s)
    return {"results": bench.results, "left_out": left_out}


def on_gpu(job: Job) -> None:
    """Run as many arms as there is time for, after those in the results of the checkout."""
    if job.cifar10 is None:
        job.note("left_out", ["everything: there is no CIFAR-10"])
        return
    scale = "trial" if job.rehearse else "full"
    out = job.out / f"cifar10_{scale}.json"
    known = Path(__file__).parent / "results" / out.name
    if known.is_file() and not out.exists():
        job.out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known, out)
    arms, seeds = (("alone", "hard"), 1) if job.rehearse else (tuple(ARMS), 3)
    found = on_budget(
        job.cifar10,
        job.work / "cifar10",
        out,
        scale=scale,
        budget_s=job.left(),
        device=str(job.device),
        workers=None,
        seeds=seeds,
        arms=arms,
    )
    for name in ("teachers", "runs", "summary"):
        job.note(name, found["results"].get(name, []))
    job.note("left_out", found["left_out"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print the results in this file as Markdown, and run nothing")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--out", type=Path, help="result file; an existing one is continued")
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10"), help="teacher, labels and students")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; no arm is begun that would end later; default no limit")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks that learn: faster after a minute for each"
    )
    parser.add_argument(
        "--workers", type=int, help="loader processes; default none on a CPU, all cores but one on a GPU"
    )
    args = parser.parse_args()
    if not args.table and not (args.data and args.out):
        parser.error("pass --data and --out, or --table")
    return args


def main() -> None:
    args = parse()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_bytes()))))
        return
    found = on_budget(
        args.data,
        args.work,
        args.out,
        scale=args.scale,
        budget_s=args.budget,
        device=args.device,
        workers=args.workers,
        seeds=args.seeds,
        arms=args.arms,
        compiled=args.compile,
    )
    if found["results"]["runs"]:
        print("\n".join(table(found["results"])))
    if found["left_out"]:
        print(f"left for another run: {', '.join(found['left_out'])}")


if __name__ == "__main__":
    main()
