"""Extend: more views of a label set, with everything that makes its identity taken from its plan."""

import dataclasses
import re
from typing import Any

from pipeline.errors import UsageError
from pipeline.labels.format import IMAGES_FOLDER
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Plan
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.storage.place import open_place
from pipeline.views.recipe import Recipe


def extension(
    location: str, values: dict[str, Any], *, data: str | None, views: tuple[int, int]
) -> tuple[PrecomputeConfig, TeacherConfig, Recipe]:
    """Return the settings with which precompute adds views to a label set.

    Recipe, K, precision and source are those of the plan, a block is as long as the set's longest, and the teacher is the
    plan's, unless it is named. Whether it is the same one is checked by precompute, before it writes anything.

    Args:
        location: folder or URL of the set, which may be one that was not sealed yet.
        values: how to run, by name: fields of PrecomputeConfig that the plan does not decide, and of TeacherConfig.
        data: the images; None: the set's own, or those where it found them.
        views: start and stop.

    Raises:
        LabelSetError: there is no label set.
        UsageError: one image size for teachers that see several.
    """
    label_set = LabelSet(open_place(location))
    plan = label_set.plan
    longest = max((stop - start for start, stop in label_set.manifest.view_blocks), default=0)  # the last may be short
    config = PrecomputeConfig(
        data=_images_of(label_set) if data is None else data,
        out=location,
        views=views,
        topk=plan.topk,
        precision=plan.precision,
        **({"views_per_shard": longest} if longest else {}),
        **_of(PrecomputeConfig, values),
    )
    return config, _teacher_of(plan, _of(TeacherConfig, values)), plan.recipe


def _images_of(label_set: LabelSet) -> str:
    return str(label_set.place / IMAGES_FOLDER) if label_set.has_images else label_set.images_location()


def _of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _teacher_of(plan: Plan, asked: dict[str, Any]) -> TeacherConfig:
    """Return the plan's teacher, run as was asked."""
    members = plan.teacher.members
    if not asked.get("teacher"):
        asked["teacher"] = tuple(member.name for member in members)
        # Every published network of timm has a tag in its name; an architecture alone does not say where its weights are.
        unknown = next((name for name in asked["teacher"] if not re.search("[.:]", name)), None)
        if unknown and asked.get("pretrained", True):
            raise UsageError(
                f"the weights of this set's teacher {unknown} came from a folder or a file: pass that again with --teacher"
                f" FOLDER, or with --teacher {unknown} --teacher-checkpoint FILE"
            )
    sizes = {member.img_size for member in members}
    if asked.get("teacher_img_size") is None and len(sizes) == 1:
        (asked["teacher_img_size"],) = sizes
    if len(sizes) > 1 and asked.get("teacher_img_size") is not None:
        raise UsageError(f"the teachers of this set see {sorted(sizes)} pixels each: leave --teacher-img-size out")
    return TeacherConfig(**asked)
