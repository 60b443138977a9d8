"""The networks that can be students, with their sizes: built without memory for their weights, and without a download."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.text import aligned
from trainer.student import SHORT_NAMES, Student, create_student, names_like

OURS = "deit_*"  # timm's names of DeiT's models
MOST = 100  # networks in a list: building one takes about a tenth of a second
CLASSES = 1000  # of the heads that are counted
SIZES = (
    "distilled", "parameters", "width", "blocks", "attention_heads", "img_size", "patch_size", "tokens", "published",
)  # fmt: skip


def list_students(pattern: str | None = None) -> list[dict[str, Any]]:
    """Return students as plain JSON values, in timm's order.

    Args:
        pattern: shell pattern for names of timm, or one of the short names; None: DeiT's models.

    Raises:
        UsageError: no model of timm matches, or more than `MOST` do.
    """
    names = names_like(pattern or OURS)
    if not names:
        raise UsageError(f"timm has no model {pattern!r}", fix="Pass a pattern such as 'deit3*'")
    if len(names) > MOST:
        raise UsageError(
            f"{pattern!r} matches {len(names):,} models, at most {MOST} are shown", fix="Narrow the pattern"
        )
    return [_record(name) for name in names]


def students_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the result of `list_students` as text for people."""
    headings = "student short heads parameters width blocks attention pixels patch tokens weights"
    rows = [headings.split(), *map(_cells, found)]
    said = f"parameters with {CLASSES:,} classes; attention: heads of each block; weights: those of --pretrained"
    return f"{aligned(rows, left=(0, 1, 2, 10))}\n{said}"


def _cells(each: Mapping[str, Any]) -> list[str]:
    numbers = (each[name] for name in ("width", "blocks", "attention_heads", "img_size", "patch_size", "tokens"))
    return [
        each["name"],
        each["short_name"] or "",
        {None: "-", True: "class, distillation", False: "class"}[each["distilled"]],
        "-" if each["parameters"] is None else f"{each['parameters'] / 1e6:.1f} M",
        *("-" if number is None else str(number) for number in numbers),
        "published" if each["published"] else "",
    ]


def _record(name: str) -> dict[str, Any]:
    short = next((short for short, full in SHORT_NAMES.items() if full == name), None)
    try:
        with torch.device("meta"):
            student = create_student(name, num_classes=CLASSES)
    except UsageError as error:  # some networks of timm compute with their weights while they are built
        return {"name": name, "short_name": short} | dict.fromkeys(SIZES) | {"problem": error.what}
    return {"name": name, "short_name": short} | dict(zip(SIZES, _sizes(student), strict=True)) | {"problem": None}


def _sizes(student: Student) -> tuple[Any, ...]:
    """Return the values of `SIZES`; None for what a network does not have."""
    model, published = student.model, student.model.pretrained_cfg
    blocks: Sequence[Any] = getattr(model, "blocks", ())
    embed, prefix = getattr(model, "patch_embed", None), getattr(model, "num_prefix_tokens", None)
    patch, patches = getattr(embed, "patch_size", None), getattr(embed, "num_patches", None)
    return (
        student.has_distillation_head,
        sum(parameter.numel() for parameter in model.parameters()),
        model.num_features,
        len(blocks) or None,
        getattr(getattr(next(iter(blocks), None), "attn", None), "num_heads", None),
        student.img_size,
        patch[0] if isinstance(patch, tuple) else patch,
        None if prefix is None or patches is None else prefix + patches,
        bool(published.get("url") or published.get("hf_hub_id")),
    )
