"""A study: a question as a grid of cells, and the scale at which it is asked; both are read from YAML and checked here.

A *cell* is one way to train a student. A *scale* says how large everything is: data, teachers, label sets, students, seeds.
"""

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DeitCliError, UsageError
from pipeline.images.class_names import ORDERS
from pipeline.settings.configs import PrecomputeConfig, SourceConfig, TeacherConfig
from pipeline.settings.fields import Setting, check_settings, settings_of
from pipeline.settings.files import load_recipe, settings_in
from pipeline.settings.options import ViewsType
from pipeline.storage.urls import local_path
from pipeline.storage.yaml import read_yaml
from pipeline.text import SAFE_NAME
from pipeline.views.recipe import Recipe
from trainer.config import EvaluateConfig, TrainConfig

STUDY_KEYS = ("title", "baseline", "against", "cells", "grid", "scale")
SCALE_KEYS = ("data", "images", "eval_data", "source", "teachers", "labels", "students", "train", "evaluate", "seeds")
AXES = ("student", "teacher", "token", "budget")  # axes of a cell that are no settings of `train`
OF_IMAGES = {setting.name for setting in settings_of(SourceConfig)}  # the key `source` of a scale, for all steps
EVAL_LABELS = "eval_labels_file"  # in `source`: the `labels_file` of the evaluation images
# Settings of `train` that belong to the scale, or that the study sets itself.
NOT_COMPARED = {"labels", "data", "output", "resume", "seed", "eval_data", "expect_manifest", "model", "device"}
NOT_COMPARED |= OF_IMAGES | {EVAL_LABELS}
NOT_OF_IMAGES = {setting.name for setting in settings_of(TrainConfig)} - OF_IMAGES - {EVAL_LABELS}
NOT_LABELLED = {"data", "out", "teacher", "teacher_checkpoint", "pretrained", "device", "engine", "address", *OF_IMAGES}
NOT_EVALUATED = {
    *OF_IMAGES,
    "checkpoint",
    "model",
    "pretrained",
    "num_classes",
    "data",
    "out",  # one file, which every evaluation would replace
    "csv",
    "predictions",
    "concat_linear",
    "labels",
    "labels_data",
    "expect_manifest",
    "device",
}
TOGETHER = "+"  # between the names of teachers whose label sets a student learns from together
OF_SEVERAL = ("label_weights", "label_mode")  # what has no meaning with one teacher
# What has no meaning for a student that learns without a teacher.
OF_TEACHERS = (
    *OF_SEVERAL, "teacher", "views", "view_policy", "distillation_alpha", "distillation_tau", "tail", "soft_reduction",
)  # fmt: skip
OF_CONTROL = ("teacher", "views", "view_policy", "distillation_alpha")  # but they have one for two class tokens
DIGITS = "digits"
LONGEST_NAME = 100  # characters; a folder of a step has seed and id behind it, and file systems allow 255


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train a student.

    Attributes:
        name: name in the table.
        written: the axes as the study has them, with the defaults of `token` and `distillation_type`.
        student: name of the student in the scale.
        teachers: names of the teachers in the scale, whose label sets the student learns from together; (): it learns
            from class labels alone.
        token: whether the student has the distillation token.
        budget: factor of the epochs, so that a study can vary them at any scale.
        train: settings of `train` that the cell changes.
        also: names of other cells that come to the same commands.
    """

    name: str
    written: Mapping[str, Any]
    student: str
    teachers: tuple[str, ...]
    token: bool
    budget: float
    train: Mapping[str, Any]
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is; see docs/studies.md for each field.

    Attributes:
        path: the file.
        data: training images, or `digits`.
        images: number of training images to use, the first ones of Parquet files; None: all.
        eval_data: evaluation images; None only with `digits`.
        source: how both are read, as settings of `train`.
        teachers: name -> entry.
        labels: settings of `precompute` for every label set.
        students: name -> settings of `train`, with `model` and `without_token`.
        train: settings of `train` for every student.
        evaluate: settings of `evaluate`.
        seeds: a seed for each student of a cell.
    """

    path: Path
    data: str
    images: int | None
    eval_data: str | None
    source: Mapping[str, Any]
    teachers: Mapping[str, Mapping[str, Any]]
    labels: Mapping[str, Any]
    students: Mapping[str, Mapping[str, Any]]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    seeds: tuple[int, ...]

    @property
    def reading(self) -> dict[str, Any]:
        """Return how the training images are read, as settings."""
        return {name: value for name, value in self.source.items() if name != EVAL_LABELS}

    @property
    def eval_reading(self) -> dict[str, Any]:
        """Return how the evaluation images are read, as settings."""
        own = {name: value for name, value in self.source.items() if name not in ("labels_file", EVAL_LABELS)}
        return own | ({"labels_file": self.source[EVAL_LABELS]} if EVAL_LABELS in self.source else {})

    @property
    def views(self) -> int:
        """Return the number of views of a label set, unless a cell asks for more."""
        return views_of(self.labels.get("views", "0:30"), self.path)[1]

    @property
    def recipe(self) -> Recipe:
        """Return the recipe of all views."""
        return load_recipe(self.labels.get("recipe") or "deit", self.labels.get("set"))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study at a scale.

    Attributes:
        name: name of the file.
        title: the question.
        baseline: cell with which all others are compared.
        against: cell -> another cell with which it is compared as well.
        cells: all cells.
        scale: how large everything is.
    """

    name: str
    title: str
    baseline: str
    against: Mapping[str, str]
    cells: tuple[Cell, ...]
    scale: Scale

    @property
    def folder(self) -> Path:
        """Return the folder of the studies at this scale, unless --out is passed."""
        return Path("studies") / self.scale.path.stem

    def cell(self, name: str) -> Cell:
        """Return the cell with this name, which may be another name of it."""
        for cell in self.cells:
            if name in (cell.name, *cell.also):
                return cell
        raise UsageError(f"there is no cell {name!r}. {nearest(name, [cell.name for cell in self.cells])}")


def read_study(
    path: Path, scale: Path | None = None, *, data: str | None = None, eval_data: str | None = None
) -> Study:
    """Return the study of a file at a scale.

    Args:
        path: YAML file of the study.
        scale: YAML file of the scale; None: the one that the study names, relative to its own folder.
        data: training images instead of those of the scale.
        eval_data: evaluation images instead of those of the scale.

    Raises:
        UsageError: a file cannot be read, a name is unknown, or a value has another type or is out of range.
    """
    written = read_yaml(path)
    if isinstance(written, dict) and "students" in written:
        raise UsageError(f"{path} is a scale, not a study", fix="Pass a study, and this file with --scale")
    values = _mapping(written, STUDY_KEYS, f"{path}")
    for key in ("title", "baseline"):
        if not isinstance(values.get(key), str):
            raise UsageError(f"{path}: a study needs `{key}`, a text")
    if scale is None and not isinstance(values.get("scale"), str):
        raise UsageError(f"{path} names no scale", fix="Pass --scale, such as configs/scales/digits.yaml")
    of_scale = read_scale(scale or path.parent / values["scale"], data=data, eval_data=eval_data)
    cells = tuple(_cells(values, of_scale, str(path)))
    if not SAFE_NAME.fullmatch(path.stem):
        raise UsageError(f"{path}: the name of the file must be letters, digits, dots, hyphens and underscores")
    against = dict(_named(values.get("against", {}), f"{path}: against"))
    study = Study(
        name=path.stem, title=values["title"], baseline=values["baseline"], against=against, cells=cells, scale=of_scale
    )
    with said_of(f"{path}: baseline"):
        study.cell(study.baseline)
    with said_of(f"{path}: against"):
        for pair in against.items():
            if study.cell(pair[0]) is study.cell(str(pair[1])):
                raise UsageError(f"{pair[0]} is compared with itself")
    return study


def read_scale(path: Path, *, data: str | None = None, eval_data: str | None = None) -> Scale:
    """Return the scale of a file; `data` and `eval_data` replace its own."""
    values = _mapping(read_yaml(path), SCALE_KEYS, f"{path}")
    own = values.get("data") if data is None else data
    images = eval_data or (values.get("eval_data") if data is None or data == values.get("data") else None)
    if not isinstance(own, str):
        raise UsageError(f"{path}: the scale names no training images", fix="Pass --data, or write `data:` into it")
    if not isinstance(images, str) and own != DIGITS:
        raise UsageError(f"{path}: no evaluation images belong to {own}", fix="Pass --eval-data")
    if images == own:
        raise UsageError(
            f"{path}: training and evaluation images are both {own}: students would be tested on what they learn"
        )
    limit = values.get("images")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UsageError(f"{path}: images must be a whole number from 1, got {limit!r}")
    where = f"{path}: "
    seeds = values.get("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(type(each) is int and each >= 0 for each in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise UsageError(f"{path}: seeds must be a list of different whole numbers from 0, got {seeds!r}")
    labels = _settings(
        values.get("labels", {}), f"{where}labels", PrecomputeConfig, TeacherConfig, recipe=True, refused=NOT_LABELLED
    )
    source = _source(values.get("source", {}), f"{where}source")
    if source and DIGITS in (own, images):
        raise UsageError(f"{path}: source: {next(iter(source))} has no meaning with the digits", fix="Leave it out")
    scale = Scale(
        path=path,
        data=own,
        images=limit,
        eval_data=images,
        source=source,
        teachers={name: _teacher(entry, f"{where}teachers: {name}") for name, entry in _named(values.get("teachers", {}), f"{where}teachers")},
        labels=labels,
        students={name: _student(entry, f"{where}students: {name}") for name, entry in _named(values.get("students"), f"{where}students")},
        train=_settings(values.get("train", {}), f"{where}train", TrainConfig, refused=NOT_COMPARED),
        evaluate=_settings(values.get("evaluate", {}), f"{where}evaluate", EvaluateConfig, refused=NOT_EVALUATED),
        seeds=tuple(seeds),
    )  # fmt: skip
    if views_of(labels.get("views", "0:30"), path)[0] != 0:
        raise UsageError(f"{path}: labels: views must start at 0, got {labels['views']}")
    with said_of(f"{path}: labels"):
        _ = scale.recipe
    return scale


def _source(values: Any, where: str) -> dict[str, Any]:
    """Return the settings of `source`; paths are absolute, as that of `data`, because an engine may run steps in another folder."""
    source = _settings(values, where, TrainConfig, refused=NOT_OF_IMAGES)
    with said_of(where):
        check_settings(SourceConfig(**{name: value for name, value in source.items() if name != EVAL_LABELS}))
    names = ["labels_file", EVAL_LABELS, "image_root"]
    names += ["class_order"] if source.get("class_order") not in ORDERS else []
    local = [name for name in names if name in source and local_path(source[name]) is not None]
    return source | {name: os.path.abspath(source[name]) for name in local}


def _teacher(values: Any, where: str) -> dict[str, Any]:
    """Return an entry of `teachers`: with `train` it is trained here, else it is a network that `precompute` can open."""
    if isinstance(values, dict) and "train" in values:
        entry = _mapping(values, ("train", "recipe", "set"), where)
        train = _settings(entry["train"], f"{where}: train", TrainConfig, refused=NOT_COMPARED - {"model", "seed"})
        if "model" not in train:
            raise UsageError(f"{where}: train needs `model`, the network of this teacher")
        return {**entry, "train": train}
    entry = _settings(values, where, TeacherConfig, refused={"device"})
    if "teacher" not in entry:
        raise UsageError(f"{where} needs `train`, to train this teacher here, or `teacher`, the name of a network")
    return entry


def _student(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise UsageError(f"{where} needs `model`, a model with a distillation token")
    values = dict(values)
    without = values.pop("without_token", None)
    if without is not None and not isinstance(without, str):
        raise UsageError(f"{where}: without_token must be the name of a model, got {without!r}")
    return _settings(values, where, TrainConfig, refused=NOT_COMPARED - {"model"}) | {"without_token": without}


def _cells(values: dict[str, Any], scale: Scale, where: str) -> Iterable[Cell]:
    """Yield the cells of `cells` and `grid`; those of the grid that have the same settings are one."""
    found: dict[str, Cell] = {}
    for name, axes in _named(values.get("cells", {}), f"{where}: cells"):
        found[name] = _cell(name, axes, scale, f"{where}: cells: {name}")
    grid = _mapping(values.get("grid", {}), None, f"{where}: grid")
    for axis, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UsageError(f"{where}: grid: {axis} must be a list of values, got {choices!r}")
    varied = [axis for axis, choices in grid.items() if len(choices) > 1]
    for combination in itertools.product(*grid.values()) if grid else ():
        axes = dict(zip(grid, combination, strict=True))
        if axes.get("distillation_type") == "none":
            axes = {axis: value for axis, value in axes.items() if axis.replace("-", "_") not in OF_TEACHERS}
        name = "-".join(_said(axis, axes[axis]) for axis in varied if axis in axes) or "grid"
        _check_name(name, f"{where}: grid")
        cell = _cell(name, axes, scale, f"{where}: grid: {name}")
        if found.setdefault(name, cell).written != cell.written:
            raise UsageError(f"{where}: two cells have the name {name}", fix="Write one of them under `cells`")
    if not found:
        raise UsageError(f"{where}: a study needs `cells`, `grid` or both")
    yield from found.values()


def _cell(name: str, values: Any, scale: Scale, where: str) -> Cell:
    values = dict(_mapping(values, None, where))
    axes = {axis: values.pop(axis) for axis in AXES if axis in values}
    train = _settings(values, where, TrainConfig, refused=NOT_COMPARED, known=AXES)
    kind = train.setdefault("distillation_type", scale.train.get("distillation_type", "hard"))
    control = train.get("second_token") == "class"  # learns class labels alone, on the views of a teacher's label set
    alone = [each for each in OF_TEACHERS if not (control and each in OF_CONTROL)]
    if kind == "none" and (useless := [each for each in alone if each in axes or each in train]):
        raise UsageError(f"{where}: {useless[0]} has no meaning with distillation_type none", fix="Leave it out")
    student = _chosen(axes.get("student"), scale.students, "student", where)
    taught = kind != "none" or "teacher" in axes
    teachers = _teachers(axes.get("teacher"), scale, where) if taught else ()
    if len(teachers) < 2 and (useless := [each for each in OF_SEVERAL if each in train]):
        raise UsageError(
            f"{where}: {useless[0]} needs several teachers, such as teacher: {TOGETHER.join(list(scale.teachers)[:2])}"
        )
    token = axes.get("token", kind != "none" or train.get("second_token", "distillation") != "distillation")
    if not isinstance(token, bool):
        raise UsageError(f"{where}: token must be true or false, got {token!r}")
    if not token and not scale.students[student]["without_token"]:
        raise UsageError(f"{where}: student {student} has no `without_token` in {scale.path}")
    budget = axes.get("budget", 1.0)
    if type(budget) not in (int, float) or not 0 < budget < 1e6:
        raise UsageError(f"{where}: budget must be a number above 0, got {budget!r}")
    if "views" in train:
        train["views"] = ViewsType.text(views_of(train["views"], where))
    written = {
        "student": student,
        "token": token,
        **({"teacher": TOGETHER.join(teachers)} if teachers else {}),
        **train,
    }
    written |= {"budget": float(budget)} if "budget" in axes else {}
    return Cell(
        name=name, written=written, student=student, teachers=teachers, token=token, budget=float(budget), train=train
    )


def _teachers(value: Any, scale: Scale, where: str) -> tuple[str, ...]:
    """Return the names of the teachers of a cell: one, or several with a plus sign between them."""
    names = value.split(TOGETHER) if isinstance(value, str) else [value]
    if len(set(names)) < len(names):
        raise UsageError(f"{where}: each teacher must be named once, got {value!r}")
    return tuple(_chosen(name, scale.teachers, "teacher", where) for name in names)


def _chosen(name: Any, known: Mapping[str, Any], what: str, where: str) -> str:
    """Return the name that a cell gives, or the only one that the scale has."""
    if name is None and len(known) == 1:
        return next(iter(known))
    if name is None:
        raise UsageError(
            f"{where}: the cell needs `{what}`, one of {', '.join(known) or 'none: the scale has no such entry'}"
        )
    if name not in known:
        raise UsageError(f"{where}: the scale has no {what} {name!r}. {nearest(str(name), known)}")
    return str(name)


def _said(axis: str, value: Any) -> str:
    """Return the part of a cell's name that tells the value of an axis."""
    axis = axis.replace("_", "-")
    if isinstance(value, bool):
        return axis if value else f"no-{axis}"
    if axis in ("student", "teacher", "distillation-type"):
        return str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{axis}-{value:g}" if isinstance(value, float) else f"{axis}-{value}")


def views_of(value: Any, where: object) -> tuple[int, int]:
    """Return start and stop of views as a file of settings has them."""
    try:
        start, stop = value if isinstance(value, list | tuple) else ViewsType().convert(value, None, None)
    except Exception as error:
        raise UsageError(f"{where}: views must be a number or START:STOP, got {value!r}") from error
    if not 0 <= start < stop:
        raise UsageError(f"{where}: views must be START:STOP with 0 <= START < STOP, got {start}:{stop}")
    return start, stop


def _settings(
    values: Any, where: str, *kinds: type, recipe: bool = False, refused: Iterable[str] = (), known: Sequence[str] = ()
) -> dict[str, Any]:
    """Return checked settings by the names of their fields, in the form of a settings file."""
    names = [name for kind in kinds for setting in settings_of(kind) for name in setting.names]
    if isinstance(values, dict):
        for key in values:
            if str(key).replace("-", "_") not in {*names, *(("recipe", "set") if recipe else ())}:
                raise UsageError(f"{where}: there is no setting {str(key)!r}. {nearest(str(key), [*names, *known])}")
    found = settings_in(values, where, *kinds, recipe=recipe)
    if wrong := sorted(set(found) & set(refused)):
        raise UsageError(f"{where}: {wrong[0]} cannot be set here: the study or the scale sets it elsewhere")
    by_name = {setting.name: setting for kind in kinds for setting in settings_of(kind)}
    return {name: _plain(value, by_name.get(name)) for name, value in found.items() if value is not None}


def _plain(value: Any, setting: Setting | None) -> Any:
    if setting is not None and setting.kind is float and type(value) is int:
        return float(value)  # 1 and 1.0 are the same setting
    return list(value) if isinstance(value, tuple) else value


def _mapping(values: Any, keys: Sequence[str] | None, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{where} must be a mapping of names to values, got {values!r}")
    for key in values:
        if keys is not None and key not in keys:
            raise UsageError(f"{where}: there is no key {str(key)!r}. {nearest(str(key), keys)}")
    return values


def _named(values: Any, where: str) -> list[tuple[str, Any]]:
    found = _mapping(values, None, where)
    for name in found:
        _check_name(name, where)
    return list(found.items())


def _check_name(name: object, where: str) -> None:
    """Raise UsageError unless a name, with what steps add to it, can be that of a folder on every system."""
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        raise UsageError(f"{where}: a name must be letters, digits, dots, hyphens and underscores, got {name!r}")
    if len(name) > LONGEST_NAME:
        raise UsageError(
            f"{where}: a name must have at most {LONGEST_NAME} characters, got {len(name)}: {name[:40]}...",
            fix="Write a cell of a grid under `cells`, with a short name",
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a wrong one, or all of them, as a sentence."""
    names = list(known)
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1) or difflib.get_close_matches(name, names, n=1)
    return (
        f"Did you mean {close[0]}?" if close else f"Known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    )


@contextlib.contextmanager
def said_of(where: str) -> Iterator[None]:
    """Put a place in front of the errors inside the block."""
    try:
        yield
    except DeitCliError as error:
        raise UsageError(f"{where}: {error}") from error
