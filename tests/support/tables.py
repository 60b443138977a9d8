"""Label shards of chosen rows."""

import dataclasses
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.labels.encoding import LabelRows, codec_of
from pipeline.labels.format import Precision
from pipeline.labels.tables import LabelsFooter, write_labels


def encode_rows(
    row: NDArray[Any],
    hard: NDArray[Any],
    index: NDArray[Any],
    prob: NDArray[Any],
    *,
    num_classes: int,
    precision: Precision,
) -> LabelRows:
    """Encode answers of as many classes as `prob` has columns."""
    return codec_of(precision, num_classes, prob.shape[1]).encode(row, hard, index, prob)


def footer_of(views: list[LabelRows], classes=10, precision: Any = "float16", view_start=0, **changes) -> LabelsFooter:
    topk = views[0].topk_index.shape[1]
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
        topk=topk,
        precision=precision,
        content_xxh3=codec_of(precision, classes, topk).content_xxh3(views),
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
