"""The steps of a study: train a teacher, evaluate it, label, train a student for each seed, evaluate it.

Each step is one command of this program. Its id is the SHA-256 of everything that decides its result: its settings, the content of
its inputs, and the images. So a step that is done is never repeated, whichever study asks for it, and a changed setting makes
a new step.
"""

import hashlib
import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError
from pipeline.settings.fields import settings_of
from pipeline.settings.files import load_recipe
from pipeline.settings.options import ViewsType
from pipeline.storage.atomic import sha256_file
from pipeline.storage.json import sha256_json
from pipeline.storage.urls import local_path
from trainer.config import TrainConfig
from trainer.studies.images import Images
from trainer.studies.study import OF_TEACHERS, Cell, Study, said_of, views_of

# Settings of `precompute` that decide the labels, besides recipe and teacher; the number of views may grow.
OF_NETWORK = ("model", "img_size", "patch_size", "embed_dim", "depth", "num_heads")  # settings of `train`
DECIDE_LABELS = ("topk", "precision", "views_per_shard", "include_images", "on_bad_image", "teacher_img_size", "dtype")
OF_TWO_TOKENS = "probe_interval"  # setting of `train` that has no meaning for a student with one token
LABELS = "labels"  # role of the label set of a training; of several sets labels-0, labels-1 ...
Kind = Literal["teacher", "labels", "student", "evaluation"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One command of a study.

    Attributes:
        kind: the folder below the study's folder that holds it; an evaluation is in the folder of what it evaluates.
        name: readable part of the folder's name, which is not part of the identity.
        command: `train`, `precompute` or `evaluate`.
        settings: settings for `-c`, without folders of other steps.
        decides: everything that decides the result, except the inputs.
        inputs: role -> step whose result this one needs.
        work: amount of work, for forecasts: views of images that are trained on, or labelled.
        like: what else decides the speed, for forecasts.
        stop: number of views to label; 0 for other steps.
    """

    kind: Kind
    name: str
    command: str
    settings: Mapping[str, Any]
    decides: Mapping[str, Any]
    inputs: Mapping[str, "Step"]
    work: float = 0.0
    like: Mapping[str, Any]
    stop: int = 0

    @property
    def label_sets(self) -> list["Step"]:
        """Return the labellings that a training needs, in the order of its teachers."""
        return [step for role, step in self.inputs.items() if role.startswith(LABELS)]

    @cached_property
    def key(self) -> str:
        """Return what distinguishes the step before its inputs exist."""
        return sha256_json([self.command, self.decides, {role: step.key for role, step in self.inputs.items()}])

    def id(self, contents: Mapping[str, str]) -> str:
        """Return the id of the step; `contents` has the content of each input by its role."""
        return sha256_json({"command": self.command, "decides": self.decides, "inputs": dict(contents)})

    def settings_for(self, folder: Path, inputs: Mapping[str, Path]) -> dict[str, Any]:
        """Return the settings for `-c` in a folder, with the folders of the inputs by their roles."""
        places: dict[str, Any] = {
            "train": {"output": str(folder / "run"), "resume": "auto"},
            "precompute": {"out": str(folder / "set"), "views": f"0:{self.stop}"},
            "evaluate": {},
        }[self.command]
        if sets := [str(folder / "set") for role, folder in inputs.items() if role.startswith(LABELS)]:
            places["labels"] = sets if len(sets) > 1 else sets[0]
        if "teacher" in inputs:
            places["teacher"] = str(inputs["teacher"] / "run/last")
        if "of" in inputs:
            places["checkpoint"] = str(inputs["of"] / "run/last")
        return {**self.settings, **places}


@dataclass(frozen=True, kw_only=True)
class TaughtBy:
    """The steps of one teacher, which cells share.

    Attributes:
        name: name of the teacher in the scale.
        labelled_fraction: share of the class labels that it is trained on; None for a published teacher.
        train: training of the teacher; None for a published one.
        evaluation: its evaluation; None where `evaluate` cannot open it.
        labels: its label set.
    """

    name: str
    labelled_fraction: float | None
    train: Step | None
    evaluation: Step | None
    labels: Step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a study, each after its inputs; and the steps of each cell.

    Attributes:
        study: the study.
        cells: all cells.
        seeds: seeds of the students to train.
        known_seeds: these, and the other seeds of the scale, whose students may be there from before.
        steps: steps to run.
        others: steps that are not asked for; their results are shown if they are there.
        teachers: by the key of the labelling.
        students: cell and seed -> training and evaluation.
    """

    study: Study
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    known_seeds: tuple[int, ...]
    steps: tuple[Step, ...]
    others: tuple[Step, ...]
    teachers: Mapping[str, TaughtBy]
    students: Mapping[tuple[str, int], tuple[Step, Step]]

    def teachers_of(self, cell: Cell) -> list[TaughtBy]:
        """Return the teachers of a cell."""
        train, _ = self.students[cell.name, self.seeds[0]]
        return [self.teachers[labels.key] for labels in train.label_sets]


def plan_study(
    study: Study,
    training: Images,
    evaluation: Images,
    *,
    seeds: Sequence[int] = (),
    chosen: Sequence[str] = (),
    ranks: int = 1,
) -> Plan:
    """Return the steps of a study.

    Args:
        study: the study.
        training: the training images.
        evaluation: the evaluation images.
        seeds: a seed for each student of a cell; empty: those of the scale.
        chosen: names of the cells to run; empty: all.
        ranks: number of processes that the launcher starts for a training.

    Raises:
        UsageError: settings of a cell contradict each other, an update cannot be divided among the ranks, or training and
            evaluation images are the same.
    """
    if training.id == evaluation.id:
        raise UsageError(
            f"{training.location} and {evaluation.location} are the same images: students would be tested on what they learn"
        )
    maker = _Maker(study, training, evaluation, ranks)
    seeds = tuple(seeds) or study.scale.seeds
    cells = maker.distinct(study.cells, seeds[0])
    names = {Study.cell(replace(study, cells=cells), name).name for name in chosen}
    wanted = [cell for cell in cells if cell.name in names or not chosen]
    known_seeds = tuple(dict.fromkeys((*seeds, *study.scale.seeds)))
    students = {(cell.name, seed): maker.student(cell, seed) for cell in cells for seed in known_seeds}
    teachers = maker.teachers(cells, wanted, seeds[0])
    steps = _in_order(wanted, seeds, students, teachers)
    others = {key: step for key, step in _in_order(cells, known_seeds, students, teachers).items() if key not in steps}
    return Plan(
        study=study,
        cells=cells,
        seeds=seeds,
        known_seeds=known_seeds,
        steps=tuple(steps.values()),
        others=tuple(others.values()),
        teachers=teachers,
        students=students,
    )


def _in_order(
    cells: Sequence[Cell],
    seeds: Sequence[int],
    students: Mapping[tuple[str, int], tuple[Step, Step]],
    teachers: Mapping[str, TaughtBy],
) -> dict[str, Step]:
    """Return the steps of some cells by their keys: teachers first, then students, seed by seed."""
    taught = [teachers[labels.key] for cell in cells for labels in students[cell.name, seeds[0]][0].label_sets]
    steps = [getattr(each, step) for step in ("train", "evaluation", "labels") for each in taught]
    steps += [step for seed in seeds for cell in cells for step in students[cell.name, seed]]
    return {step.key: step for step in steps if step is not None}


class _Maker:
    """Makes the steps of a study."""

    def __init__(self, study: Study, training: Images, evaluation: Images, ranks: int) -> None:
        self._study, self._scale, self._ranks = study, study.scale, ranks
        self._training, self._evaluation = training, evaluation
        self._recipe = self._scale.recipe

    def distinct(self, cells: Sequence[Cell], seed: int) -> tuple[Cell, ...]:
        """Return the cells without those that come to the same commands as an earlier one, which gets their names."""
        kept: dict[str, Cell] = {}
        for cell in cells:
            key = self.student(cell, seed)[0].key
            known = kept.get(key)
            kept[key] = cell if known is None else replace(known, also=(*known.also, cell.name))
        return tuple(kept.values())

    def student(self, cell: Cell, seed: int) -> tuple[Step, Step]:
        """Return training and evaluation of a student."""
        of_student = dict(self._scale.students[cell.student])
        without = of_student.pop("without_token")
        settings = {**self._scale.train, **of_student, **cell.train, "seed": seed}
        if cell.budget != 1:
            settings["epochs"] = max(1, round(cell.budget * settings.get("epochs", 300)))
            if "warmup_epochs" in settings:
                settings["warmup_epochs"] = cell.budget * settings["warmup_epochs"]
        where = f"cell {cell.name}"
        if not cell.token:
            settings["model"] = without
            settings.pop(OF_TWO_TOKENS, None)  # of the scale: its other students have two tokens
            if OF_TWO_TOKENS in cell.train:
                raise UsageError(
                    f"{where}: {OF_TWO_TOKENS} compares two tokens, this student has one", fix="Leave it out"
                )
        if not cell.teachers:
            kept = {"distillation_alpha"} if settings.get("second_token") == "class" else set()
            settings = {name: value for name, value in settings.items() if name not in set(OF_TEACHERS) - kept}
            train = self._train(
                "student", f"{cell.name}-seed{seed}", settings, self._recipe_settings(self._scale.labels), where
            )
        else:
            views = views_of(settings.get("views", self._scale.views), where)
            settings["views"] = ViewsType.text(views)
            fraction = settings.get("labelled_fraction", 1.0)
            sets = [self._labels(name, fraction, views[1]) for name in cell.teachers]
            train = self._train("student", f"{cell.name}-seed{seed}", settings, None, where, sets)
        return train, self._evaluate(train, train.name)

    def teachers(self, cells: Sequence[Cell], wanted: Sequence[Cell], seed: int) -> dict[str, TaughtBy]:
        """Return the teachers of all cells by the key of the labelling, which has as many views as a wanted cell needs at most."""
        found: dict[str, TaughtBy] = {}
        for cell in (*wanted, *cells):
            for name, labels in zip(cell.teachers, self.student(cell, seed)[0].label_sets, strict=True):
                known = found.get(labels.key)
                if known is None or (cell in wanted and labels.stop > known.labels.stop):
                    found[labels.key] = self.taught_by(name, labels)
        return found

    def taught_by(self, name: str, labels: Step) -> TaughtBy:
        """Return the steps of a teacher, which end with its label set."""
        entry = self._scale.teachers[name]
        train = labels.inputs.get("teacher")
        fraction = None if train is None else train.settings.get("labelled_fraction", 1.0)
        evaluation = self._evaluate(train, train.name) if train else self._evaluate_published(name, entry)
        return TaughtBy(name=name, labelled_fraction=fraction, train=train, evaluation=evaluation, labels=labels)

    def _teacher(self, name: str, fraction: float) -> Step:
        """Return the training of a teacher on a share of the class labels."""
        entry = self._scale.teachers[name]
        settings = {**entry["train"], "distillation_type": "none", "labelled_fraction": fraction}
        said = name if fraction == 1 else f"{name}-labelled-{fraction:g}"
        recipe = entry if "recipe" in entry or "set" in entry else self._scale.labels
        return self._train("teacher", said, settings, self._recipe_settings(recipe), f"teacher {name}")

    def _recipe_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in ("recipe", "set") if name in values}

    def _train(
        self,
        kind: Kind,
        name: str,
        settings: dict[str, Any],
        recipe: dict[str, Any] | None,
        where: str,
        sets: Sequence[Step] = (),
    ) -> Step:
        """Return a training on label sets, or on class labels alone, with views of `recipe`."""
        settings = {"distillation_type": "hard", **settings}
        with said_of(f"{self._scale.path}: {where}"):
            checked = _train_config(settings, len(sets))
            settings = settings | self._as_many_views(checked, alone=not sets) | self._divided(checked)
            config = _train_config(settings, len(sets))
            recipe_id = None if recipe is None else load_recipe(recipe.get("recipe") or "deit", recipe.get("set")).id
        decides = deciding(config) | {
            "source": self._training.id,
            "views_per_update": checked.batch_size * checked.grad_accum_steps,
            "recipe": recipe_id,
            "init": _content_of(config.init) if config.init else None,
            "views": config.views,
        }
        if len(sets) > 1:
            weights = config.label_weights or (1.0,) * len(sets)
            decides |= {"label_mode": config.label_mode, "label_weights": [each / sum(weights) for each in weights]}
        dtypes = [each.decides.get("dtype", "auto") for each in sets]
        if any(dtype != "auto" for dtype in dtypes):  # the id of a label set does not cover it
            decides |= {"teacher_dtype": dtypes}
        share = 1.0 if sets else config.labelled_fraction
        timed = {setting.name for setting in settings_of(TrainConfig) if setting.timed}
        like = {
            name: value for name, value in decides.items() if name in timed | {"views_per_update"} and name != "views"
        }
        return Step(
            kind=kind,
            name=name,
            command="train",
            settings={"data": self._training.location, **self._scale.reading, **settings, **(recipe or {})},
            decides=json.loads(json.dumps({name: value for name, value in decides.items() if value is not None})),
            inputs={LABELS: sets[0]} if len(sets) == 1 else {f"{LABELS}-{n}": each for n, each in enumerate(sets)},
            work=self._training.count * config.epochs * share,
            like=json.loads(json.dumps(like)) | {"labels": bool(sets)},
        )

    def _as_many_views(self, config: TrainConfig, *, alone: bool) -> dict[str, Any]:
        """Return the epochs on a share of the images that have as many views as those that are written, on all images."""
        share = config.labelled_fraction
        if not alone or share == 1:
            return {}
        epochs = max(1, round(config.epochs / share))
        return {
            "epochs": epochs,
            "warmup_epochs": min(config.warmup / share, float(epochs)),
            "checkpoint_interval": math.ceil(config.checkpoint_interval / share),
        }

    def _divided(self, config: TrainConfig) -> dict[str, Any]:
        """Return batch size and passes of each rank, so that an update has the same number of views on any number of ranks."""
        if self._ranks == 1:
            return {}
        total, passes = config.batch_size * config.grad_accum_steps, max(1, config.grad_accum_steps // self._ranks)
        if total % (passes * self._ranks):
            passes = 1
        if total % (passes * self._ranks):
            raise UsageError(f"an update of {total} views cannot be divided among {self._ranks} ranks")
        return {"batch_size": total // (passes * self._ranks), "grad_accum_steps": passes}

    def _labels(self, teacher: str, fraction: float, stop: int) -> Step:
        """Return the labelling by a teacher."""
        entry, labels = self._scale.teachers[teacher], dict(self._scale.labels)
        labels.pop("views", None)
        trained = "train" in entry
        inputs = {"teacher": self._teacher(teacher, fraction)} if trained else {}
        settings = labels if trained else {**labels, **entry}
        decides = {name: settings[name] for name in DECIDE_LABELS if name in settings}
        decides |= {"source": self._training.id, "recipe": self._recipe.id}
        if not trained:
            decides["teacher"] = _published(entry)
        return Step(
            kind="labels",
            name=inputs["teacher"].name if trained else teacher,
            command="precompute",
            settings={"data": self._training.location, **self._scale.reading, **settings},
            decides=decides,
            inputs=inputs,
            work=self._training.count * stop,
            like={name: value for name, value in decides.items() if name not in ("source",)}
            | {"trained": entry["train"]["model"] if trained else None},
            stop=stop,
        )

    def _evaluate(self, of: Step, name: str) -> Step:
        decides = {name: value for name, value in self._scale.evaluate.items() if name not in ("batch_size", "workers")}
        return Step(
            kind="evaluation",
            name=name,
            command="evaluate",
            settings={"data": self._evaluation.location, **self._scale.eval_reading, **self._scale.evaluate},
            decides=decides | {"source": self._evaluation.id},
            inputs={"of": of},
            work=self._evaluation.count,
            like={"of": {name: value for name, value in of.like.items() if name in OF_NETWORK}},
        )

    def _evaluate_published(self, name: str, entry: Mapping[str, Any]) -> Step | None:
        """Return the evaluation of a published teacher; None if `evaluate` cannot open it."""
        names, files = _listed(entry["teacher"]), _listed(entry.get("teacher_checkpoint", []))
        if len(names) != 1 or ":" in names[0]:
            return None
        student: dict[str, Any]
        if Path(names[0]).is_dir():
            student = {"checkpoint": names[0]}
        elif files:
            student = {"model": names[0], "checkpoint": files[0]}
        elif entry.get("pretrained", True):
            student = {"model": {"regnety_160": "regnety_160.deit_in1k"}.get(names[0], names[0]), "pretrained": True}
        else:
            return None
        decides = {
            name: value
            for name, value in self._scale.evaluate.items()
            if name not in ("batch_size", "workers", "crop_pct")
        }
        of_teacher = {name: value for name, value in self._scale.evaluate.items() if name != "crop_pct"}  # its own crop
        return Step(
            kind="teacher",
            name=name,
            command="evaluate",
            settings={"data": self._evaluation.location, **self._scale.eval_reading, **of_teacher, **student},
            decides=decides | {"source": self._evaluation.id, "teacher": _published(entry)},
            inputs={},
            work=self._evaluation.count,
            like={"teacher": _published(entry)},
        )


def deciding(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a training that decide its result and are not the default, with DeiT's warm-up as a number."""
    defaults = {setting.name: setting.default for setting in settings_of(TrainConfig)}
    return {name: value for name, value in config.identity().items() if value != defaults[name]} | {
        "warmup_epochs": float(config.warmup), "epochs": config.epochs, "model": config.model,
    }  # fmt: skip


def _train_config(settings: Mapping[str, Any], label_sets: int) -> TrainConfig:
    """Return the config of these settings for a number of label sets; it checks their ranges and relations."""
    values: dict[str, Any] = {**settings, "data": "data", "labels": tuple(f"{LABELS}-{n}" for n in range(label_sets))}
    if "views" in values:
        values["views"] = views_of(values["views"], "views")
    return TrainConfig(**values)


def _published(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a teacher that is not trained here: names, and the content of its files."""
    names = [_content_of(name) if Path(name).is_dir() else name for name in _listed(entry["teacher"])]
    files = [_content_of(file) for file in _listed(entry.get("teacher_checkpoint", []))]
    return {"names": names, "files": files, "pretrained": entry.get("pretrained", True)}


def _listed(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _content_of(location: str) -> str:
    """Return the SHA-256 of the weights at a path; the location itself for a URL."""
    path = local_path(location)
    if path is None or not path.exists():
        return str(location)
    files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return hashlib.sha256("".join(sha256_file(each) for each in files).encode()).hexdigest()


def ranks_of(launcher: str | None) -> int:
    """Return the number of processes that a launcher starts: torchrun's --nproc-per-node times --nnodes, or srun's --ntasks.

    Raises:
        UsageError: the launcher is another one, or a number is not written as a whole number.
    """
    if launcher is None:
        return 1
    words = launcher.replace("=", " ").split()
    options = {name.replace("_", "-"): value for name, value in itertools.pairwise(words)}
    name = Path(words[0]).name if words else ""
    counts = {
        "torchrun": [options.get("--nproc-per-node"), options.get("--nnodes", "1")],
        "srun": [options.get("--ntasks", options.get("-n"))],
    }.get(name, [None])
    if None in counts:
        raise UsageError(
            "--launcher must be torchrun with --nproc-per-node, or srun with --ntasks, because each update is divided among"
            f" their processes; got {launcher}",
            fix='Pass --launcher "torchrun --nproc-per-node 8 --no-python"',
        )
    try:
        shlex.split(launcher)
        return math.prod(int(each) for each in counts if each is not None)
    except ValueError:
        raise UsageError(f"--launcher {launcher}: the number of processes must be written as whole numbers") from None
