"""Label shards of chosen rows."""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.labels.encoding import LabelRows, content_xxh3
from pipeline.labels.tables import (
    LabelsFooter,
    write_labels,
)


def footer_of(views: list[LabelRows], classes=10, precision: Any = "float16", view_start=0, **changes) -> LabelsFooter:
    footer = LabelsFooter(
        labelset_id="a" * 64,
        recipe_id="b" * 64,
        teacher_id="c" * 64,
        source_id="d" * 64,
        shard="train-000000",
        view_start=view_start,
        view_stop=view_start + len(views),
        rows_per_view=len(views[0]),
        num_classes=classes,
        topk=views[0].topk_index.shape[1],
        precision=precision,
        content_xxh3=content_xxh3(views),
        probes=[],
        environment={"device": "cpu"},
    )
    return footer.model_copy(update=changes)  # unchecked, so that wrong footers can be written


def write(path: Path, views: list[LabelRows], footer: LabelsFooter) -> Path:
    with path.open("wb") as file:
        write_labels(file, views, footer)
    return path


def assert_equal(found: LabelRows, expected: LabelRows) -> None:
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


FIELDS = [field.name for field in dataclasses.fields(LabelRows) if field.name != "topk_code"]
