"""Stage 1 as one call for programs: `label_images`, with a teacher by its name or as an object."""

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pipeline.errors import UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.machine.progress import Progress
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.machine.scripts import end_if_imported_again, refuse_unguarded_script
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.fields import settings_of
from pipeline.settings.files import load_recipe
from pipeline.stage1.engines import load_here
from pipeline.stage1.precompute import precompute
from pipeline.teacher.given import GivenTeacher, given_teacher, packed
from pipeline.teacher.loading import FUNCTION_DEFAULTS
from pipeline.views.recipe import Recipe

BY_NAME = ("teacher_checkpoint", "teacher_img_size", "pretrained")  # settings that an object does not need


def label_images(
    data: str | os.PathLike[str],
    teacher: str | list[str] | tuple[str, ...] | Callable[[Tensor], Any],
    out: str | os.PathLike[str],
    *,
    views: int | tuple[int, int] = (0, 30),
    recipe: Recipe | str = "deit",
    name: str | None = None,
    version: str | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
    **settings: Any,
) -> LabelSet | None:
    """Make, continue or extend a label set, as the command `precompute` does, and return it when it is sealed.

    A teacher given by name brings its own image size, normalisation and class names. `name`, `version`, `img_size`, `mean`, `std`,
    `crop_pct` and `class_names` describe a teacher that is an object.

    Args:
        data: images, as `precompute --data` takes them: folder, tars or Parquet; path or URL.
        teacher: what `precompute --teacher` takes, or several of these names; or a torch.nn.Module; or any function. The last two get
            normalised images, float32 [B, 3, H, W] in channels-last memory on the device, for any B, and return logits, float [B, C].
            On a CPU several threads call them at the same time.
        out: folder or URL of the label set.
        views: numbers of the views to label, (start, stop); N means (0, N).
        recipe: recipe, name of a preset, or path of a YAML file.
        name: name of the teacher for the label set; None: the name of its class. A function must have one.
        version: version of its weights and code, any text. A function must have one; the weights of an nn.Module are hashed.
        img_size: height and width of the images that it gets, in pixels; None: those of the views, or of timm's configuration.
        mean: it gets (pixels / 255 - mean) / std, three numbers each; None: ImageNet's, or those of timm's configuration.
        std: as `mean`.
        crop_pct: share of the shorter side in the centre crop on which its accuracy is measured, 0.01..1; None: 0.875, or timm's.
        class_names: names of its classes in the order of its outputs, to compare with those of the images; None: no comparison.
        progress: function called with the work done so far.
        settings: any other option of `precompute` by its name in Python: `device`, `dtype`, `workers`, `processes`, `topk`, `precision`,
            `min_teacher_accuracy`, `teacher_checkpoint`, ...

    Returns:
        the sealed label set; None if label shards of other ranks are missing.

    Raises:
        UsageError: an argument is out of range or contradicts another; or the script would run again in each process.
        TeacherError: the teacher cannot be loaded, answers wrongly, or its classes are not those of the images.
    """
    end_if_imported_again()
    said = {"name": name, "version": version, "img_size": img_size, "mean": mean, "std": std}
    said |= {"crop_pct": crop_pct, "class_names": class_names}
    said = {key: value for key, value in said.items() if value is not None}
    planned = {"data": os.fspath(data), "out": os.fspath(out), "views": _range_of(views)}
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if isinstance(teacher, (str, list, tuple)):
        names = (teacher,) if isinstance(teacher, str) else tuple(teacher)
        _check_by_name(names, said)
        config, asked, given = *_configs(settings | planned | {"teacher": names}), None
    else:
        given = _given(teacher, said, settings, chosen)
        config, asked = _configs(settings | planned | {"teacher": (given.name,)})
    _check_processes(config, asked, given)
    loaded, source = load_here(config, asked, given=given)
    return precompute(config, chosen, loaded, source, progress=progress)


def _check_by_name(names: tuple[Any, ...], said: dict[str, Any]) -> None:
    """Raise UsageError if a teacher is no name, or is described although it has a name."""
    if wrong := next((each for each in names if not isinstance(each, str)), None):
        raise UsageError(f"several teachers are given by their names, got {type(wrong).__name__}")
    if said:
        raise UsageError(
            f"{next(iter(said))} describes a teacher that is an object, and {' and '.join(names)} brings its own",
            fix="For another image size pass teacher_img_size",
        )


def _given(teacher: Any, said: dict[str, Any], settings: dict[str, Any], recipe: Recipe) -> GivenTeacher:
    """Return a teacher that is an object, with what is said of it; by default it sees views of their own size."""
    if wrong := next((each for each in BY_NAME if each in settings), None):
        raise UsageError(
            f"{wrong} is of teachers by name, and this one is an object", fix="Pass img_size for its image size"
        )
    size = said.get("img_size")
    if size is None and getattr(teacher, "pretrained_cfg", None) is None:
        size = recipe.img_size
    elif size is not None and not (type(size) is int and 1 <= size <= 4096):
        raise UsageError(f"img_size must be a whole number in 1..4096 pixels, got {size!r}")
    about = {key: said[key] for key in said.keys() & FUNCTION_DEFAULTS.keys()}
    about |= {} if size is None else {"input_size": (3, size, size)}
    return given_teacher(teacher, name=said.get("name"), version=said.get("version"), about=about)


def _range_of(views: int | tuple[int, int]) -> tuple[int, int]:
    start_stop = (0, views) if isinstance(views, int) else tuple(views)
    if len(start_stop) != 2 or not all(isinstance(each, int) for each in start_stop):
        raise UsageError(f"views must be (start, stop), or N for (0, N), got {views!r}")
    return start_stop


def _configs(values: dict[str, Any]) -> tuple[PrecomputeConfig, TeacherConfig]:
    """Return the settings of the labelling and of the teacher."""
    by_kind = {kind: {setting.name for setting in settings_of(kind)} for kind in (PrecomputeConfig, TeacherConfig)}
    known = set().union(*by_kind.values())
    if unknown := next((name for name in values if name not in known), None):
        close = difflib.get_close_matches(unknown, known, n=3)
        raise UsageError(
            f"label_images has no argument {unknown!r}",
            fix=f"Did you mean {', '.join(close)}?" if close else "`deit-cli precompute --help` lists the settings",
        )
    config, asked = ({name: values[name] for name in names if name in values} for names in by_kind.values())
    return PrecomputeConfig(**config), TeacherConfig(**asked)


def _check_processes(config: PrecomputeConfig, asked: TeacherConfig, given: GivenTeacher | None) -> None:
    """Check, before anything takes time, that the processes of the run can be started.

    Raises:
        UsageError: the script has no guard, or the teacher cannot be sent to other processes.
    """
    rank = rank_from(os.environ)
    devices = plan_devices(asked.device, config.processes, rank)
    if config.engine == "ray" and given is not None:
        raise UsageError(f"engine='ray' needs a teacher by name, got {given.name}", fix="Pass module:function")
    if given is not None and len(devices) > 1:
        packed(given)
    if len(devices) > 1 or plan_loaders(config.workers, plan_cores(devices, rank), devices[0]):
        refuse_unguarded_script()
