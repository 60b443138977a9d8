"""The content of import.json: the imported labels, the lost data, and possible uses."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipeline.labels.encoding import Codec
from pipeline.labels.format import IMPORT_FORMAT, MAX_TOPK, VERSION
from pipeline.storage.json import Count, Name, Record, Sha256
from pipeline.text import byte_size, count, two_columns

Foreign = Literal["fkd", "tinyvit"]


@dataclass(frozen=True)
class Format:
    """The properties that all labels of a format share.

    Attributes:
        lost: data that the format does not record.
        use: uses of its labels, in addition to ANY_USE.
        columns: other recorded columns: a name and a meaning for each.
    """

    lost: tuple[str, ...]
    use: str
    columns: dict[str, str]


FORMATS: dict[Foreign, Format] = {
    "fkd": Format(
        lost=(
            "its random crops and flips are recorded, but not the pixels, nor how they were resized, so nothing proves that a view is the one that the teacher saw",
            "boxes are shares of the image's height and width; the sizes of the images are not recorded",
            "the class label of an image is only in the name of its folder, and its file name was cut at the first dot",
        ),
        use="distil at the level of images: the mean over the crops of an image is a soft label that needs no crop",
        columns={
            "crop_top": "top of the crop, as a share of the image's height",
            "crop_left": "left of the crop, as a share of the image's width",
            "crop_height": "height of the crop, as a share of the image's height",
            "crop_width": "width of the crop, as a share of the image's width",
            "flip": "whether the crop was flipped from left to right",
        },
    ),
    "tinyvit": Format(
        lost=(
            "of a view, only the seed of TinyViT's augmentation code is recorded, not the version or the settings of that code",
            "if its settings had mixup or CutMix, the partner of a view depends on the sampler's order and is not recorded",
            "an epoch may have a key twice, from two ranks, because its sampler pads",
        ),
        use="distil at the level of images, if its settings had no mixup and no CutMix: the mean over the epochs of an image",
        columns={"seed": "seed of TinyViT's augmentation code"},
    ),
}
ANY_LOST = (
    "the teacher (its name, weights, input size and normalisation) is not recorded: ask the publisher of the labels",
    "the temperature of the probabilities is not recorded; they are copied as they were stored",
    "class names and their order are not recorded; classes are numbers",
    "no hash of the images is recorded, so nothing proves that your copy has the same images",
)
ANY_USE = (
    "inspect the teacher's answers: entropy, its most frequent classes, hard samples",
    "compare with other label sets of the same images, by key",
    "train with the program that made them, on the files that were imported",
)
COLUMNS = {
    "key": "sample key",
    "view": "number of the crop (fkd) or of the epoch (tinyvit)",
    "hard": "the teacher's most probable class",
    "topk_index": "most probable classes, most probable first",
    "topk_prob": "their probabilities, as they were stored",
    "tail_mass": "1 minus the sum of the stored probabilities, at least 0; includes their rounding",
}


class PartRecord(Record):
    """A Parquet file of an import."""

    path: Annotated[str, Field(pattern=r"^labels/[A-Za-z0-9._-]+\.parquet$")]
    rows: Count
    bytes: Count
    sha256: Sha256


class ImportRecord(Record):
    """The content of import.json. It is written last: a folder without it is not a complete import.

    Attributes:
        imported_from: the format.
        num_classes: C.
        topk: K.
        precision: type of the probabilities.
        rows: number of labels in all files.
        views: minimum and maximum view number.
        source_files: number of files that were read.
        source_bytes: bytes of these files.
        lost: data that the format does not record or this import left out.
        use: uses of the labels.
        columns: meaning of each column.
        files: the tables.
    """

    format: Literal["deit-cli-import"] = IMPORT_FORMAT
    version: Literal[1] = VERSION
    imported_from: Foreign
    num_classes: Annotated[int, Field(ge=1, le=2**31 - 1)]
    topk: Annotated[int, Field(ge=0, le=MAX_TOPK)]
    precision: Literal["float16", "float32"]
    rows: Count
    views: tuple[Count, Count]
    source_files: Count
    source_bytes: Count
    lost: tuple[str, ...]
    use: tuple[str, ...]
    columns: dict[Name, str]
    files: tuple[PartRecord, ...]


def columns_of(kind: Foreign, codec: Codec) -> dict[str, str]:
    """Return the meaning of each column of an import, by name and in the order of the tables."""
    return {name: COLUMNS[name] for name in ("key", "view", *codec.columns)} | FORMATS[kind].columns


def losses(kind: Foreign, codec: Codec, *, stored: int, keys_are_numbers: bool) -> Iterator[str]:
    """Yield descriptions of the lost data, those of the format first.

    Args:
        kind: format of the labels.
        codec: stored form of the labels in the import.
        stored: number of classes that the format held for each view.
        keys_are_numbers: whether all keys consist of digits.
    """
    yield from FORMATS[kind].lost
    if codec.topk < stored:
        yield f"--topk kept {codec.topk} of {stored} classes a view, the others are in tail_mass"
    if not stored:
        yield "only the most probable class was stored, without its probability"
    elif stored < codec.num_classes:
        yield f"of {codec.num_classes} classes {stored} were stored for each view; of the others only the sum is known"
    if codec.prob_dtype == "float16":
        what = "probabilities and boxes" if kind == "fkd" else "probabilities"
        yield f"{what} were stored in float16: 11 significant bits, and tail_mass has the rounding of all of them"
    if keys_are_numbers:
        yield "its keys are positions in a list of images, which you need, too"
    yield from ANY_LOST


def import_table(record: ImportRecord, out: str | os.PathLike[str]) -> str:
    """Return the sizes of an import, the lost data and the uses of its labels, as text for people."""
    size = sum(part.bytes for part in record.files)
    kept = f"{f'K = {record.topk}' if record.topk else 'hard labels'} of {record.num_classes} classes"
    rows = [
        (
            "imported",
            f"{count(record.rows, 'label')} into {count(len(record.files), 'table')}: {os.fspath(out)}/labels",
        ),
        ("views", f"{record.views[0]}:{record.views[1] + 1}"),
        ("stored", f"{kept}, {record.precision}" if record.topk else kept),
        (
            "bytes a label",
            f"{record.source_bytes / record.rows:.1f} before ({byte_size(record.source_bytes)} in {count(record.source_files, 'file')}), {size / record.rows:.1f} now ({byte_size(size)})",
        ),
    ]
    lines = [two_columns(rows), "not a label set: it cannot be trained on. Lost or never recorded:"]
    lines += [f"  - {loss}" for loss in record.lost]
    return "\n".join([*lines, "It can be used to:", *(f"  - {use}" for use in record.use)])
