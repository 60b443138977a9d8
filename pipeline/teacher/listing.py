"""The published networks that can be teachers, from timm's own records: nothing is built or downloaded."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.data import infer_imagenet_subset

from pipeline.errors import TeacherError, UsageError
from pipeline.settings.configs import TeacherConfig
from pipeline.teacher.loading import DEIT_TEACHERS, HUB, LOCAL, load_teacher, loaded_as, names_function
from pipeline.text import aligned, count
from pipeline.weights import read_hub_config

IMAGENET = 1000  # classes of ImageNet-1k


def list_teachers(pattern: str | None = None) -> list[dict[str, Any]]:
    """Return timm's published networks as plain JSON values, in timm's order.

    Args:
        pattern: shell pattern for names with or without the tag; None: all.

    Raises:
        UsageError: no network matches.
    """
    found = [_record(name) for name in timm.list_pretrained() if _matches(name, pattern or "*")]
    if not found:
        raise UsageError(f"timm publishes no weights for {pattern!r}", fix="Pass a pattern such as 'convnext*'")
    return found


def teachers_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the result of `list_teachers` as text for people."""
    rows = [("teacher", "name without tag", "classes", "pixels", "licence", "")]
    rows += [
        (
            each["name"],
            each["short_name"] or "",
            str(each["num_classes"]),
            str(each["img_size"]),
            each["licence"] or "not stated",
            "; ".join(each["notes"]),
        )
        for each in found
    ]
    return f"{aligned(rows, left=(0, 1, 4, 5))}\n{count(len(found), 'network')}"


def classes_of_teacher(name: str) -> tuple[str, int | None]:
    """Return the resolved name and the number of classes of a teacher, without downloading anything.

    Args:
        name: what `--teacher` takes. A function is called; the classes of a network on the Hub are not known here (None).

    Raises:
        TeacherError: an exported folder or a function is no teacher.
        UsageError: the name does not exist, or timm has no weights or no classifier for it.
    """
    if names_function(name):
        identity = load_teacher(TeacherConfig(teacher=(name,), device="cpu")).identity
        return name, identity.num_classes
    wanted = loaded_as(name)
    if wanted.startswith(HUB):
        return wanted, None
    if wanted.startswith(LOCAL):
        classes = read_hub_config(Path(name)).get("num_classes")
        if not isinstance(classes, int):
            raise TeacherError(f"{name}: its config.json does not say how many classes it has", fix="Export it again")
        return name, classes
    try:
        config = timm.get_pretrained_cfg(wanted)
    except RuntimeError as error:  # an unknown tag
        raise UsageError(f"--teacher {name}: {error}", fix="deit-cli models --teachers lists all names") from error
    if config is None or not config.has_weights or not config.num_classes:
        raise UsageError(
            f"timm publishes no weights with a classifier for {name}", fix="deit-cli models --teachers lists all names"
        )
    return ".".join(filter(None, (config.architecture, config.tag))), config.num_classes


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name.partition(".")[0], pattern)


def _record(name: str) -> dict[str, Any]:
    config: Any = timm.get_pretrained_cfg(name)
    return {
        "name": name,
        "short_name": _short_name(name),
        "num_classes": config.num_classes,
        "img_size": config.input_size[-1],
        "licence": config.license,
        "deits_own": name in DEIT_TEACHERS.values(),
        "has_imagenet_classes": config.num_classes == IMAGENET,
        "notes": list(_notes(name, config.num_classes)),
    }


def _short_name(name: str) -> str | None:
    """Return the name without tag if `--teacher` resolves it to this network."""
    architecture = name.partition(".")[0]
    default: Any = timm.get_pretrained_cfg(architecture)
    resolved = DEIT_TEACHERS.get(architecture) or ".".join(filter(None, (architecture, default.tag)))
    return architecture if resolved == name else None


def _notes(name: str, classes: int) -> Iterator[str]:
    if name in DEIT_TEACHERS.values():
        yield "DeiT's own teacher"
    if not classes:
        yield "no classifier: cannot be a teacher"
    elif classes != IMAGENET:
        subset = infer_imagenet_subset({"num_classes": classes})
        yield f"{f'the classes of {subset}' if subset else f'{classes:,} outputs'}, not the 1,000 of ImageNet-1k"
