"""Plan and manifest of a label set. The plan defines the set, is written first and never changes; the manifest is written last
and lists the complete files.

Both are strict JSON: unknown fields, duplicate keys, NaN and unsafe names are refused. Ids are SHA-256 over canonical
JSON; `labelset_id` covers recipe, teacher, source and the stored precision, so a change of any part changes it.
"""

import dataclasses
import re
from collections.abc import Iterable
from functools import cached_property
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch
from pipeline.labels.encoding import Codec, codec_of
from pipeline.labels.format import (
    DAMAGED_MANIFEST,
    DAMAGED_PLAN,
    FORMAT,
    IMAGES_FOLDER,
    IMPORT_FORMAT,
    IMPORT_NAME,
    MANIFEST_NAME,
    MAX_FILE_BYTES,
    MAX_PROBES,
    MAX_SHARD_SAMPLES,
    MAX_TOPK,
    PLAN_NAME,
    VERSION,
    Precision,
    damaged_json,
)
from pipeline.storage.atomic import sha256_file
from pipeline.storage.json import (
    Count,
    Name,
    Record,
    Sha256,
    Text,
    View,
    canonical_json,
    is_version,
    load_json,
    other_version,
    parse_json,
    pretty_json,
    read_small,
    row,
    sha256_json,
)
from pipeline.views.recipe import Recipe

Channels = tuple[float, float, float]
_RecordT = TypeVar("_RecordT", bound=Record)
_TEACHER_TAGS = ("one", "several")


class TeacherIdentity(Record):
    """The properties of a teacher that determine its answers.

    Attributes:
        name: resolved name, such as `regnety_160.deit_in1k`.
        weights_sha256: SHA-256 over names, dtypes, shapes and bytes of all tensors.
        img_size: size in pixels to which views are resized for this teacher.
        mean: mean for normalisation, on the range 0..1, per channel.
        std: standard deviation for normalisation, on the range 0..1, per channel.
        num_classes: C.
        class_names: names of its classes in the order of its outputs; None if it does not know them.
    """

    name: Annotated[Text, Field(min_length=1, max_length=500)]
    weights_sha256: Sha256
    img_size: Annotated[int, Field(ge=1, le=4096)]
    mean: Channels
    std: Channels
    num_classes: Annotated[int, Field(ge=1, le=2**31 - 1)]
    class_names: tuple[Text, ...] | None

    @model_validator(mode="after")
    def _names_are_classes(self) -> Self:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        return self

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256_json(self.model_dump(mode="json"))

    @property
    def members(self) -> tuple["TeacherIdentity", ...]:
        """The teacher itself: it is an ensemble of one."""
        return (self,)


class EnsembleIdentity(Record):
    """Several teachers whose probabilities are averaged.

    Attributes:
        members: teachers in the requested order; all have the same number of classes.
    """

    members: Annotated[tuple[TeacherIdentity, ...], Field(min_length=2, max_length=64)]

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if len({member.num_classes for member in self.members}) > 1:
            counts = ", ".join(f"{member.name} {member.num_classes}" for member in self.members)
            raise ValueError(f"teachers must have the same number of classes, got {counts}")
        return self

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256_json(self.model_dump(mode="json"))

    @property
    def name(self) -> str:
        """The members' names."""
        return " + ".join(member.name for member in self.members)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.members[0].num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names of the first member that knows them."""
        return next((member.class_names for member in self.members if member.class_names), None)


AnyTeacher = TeacherIdentity | EnsembleIdentity


def _teacher_tag(value: Any) -> str:
    several = "members" in value if isinstance(value, dict) else isinstance(value, EnsembleIdentity)
    return _TEACHER_TAGS[several]


_TaggedTeacher = Annotated[
    Annotated[TeacherIdentity, Tag(_TEACHER_TAGS[0])] | Annotated[EnsembleIdentity, Tag(_TEACHER_TAGS[1])],
    Discriminator(_teacher_tag),
]


@row
class ShardRecord:
    """A source shard: its name, its number of samples, and a hash over their keys and class labels."""

    name: Name
    num_samples: Annotated[int, Field(ge=0, le=MAX_SHARD_SAMPLES)]
    keys_sha256: Sha256


class ReadingRecord(Record):
    """How the source was read where its layout left a choice; what is None was left to the reader, and is absent from the file.

    Attributes are those of `SourceOptions`; `image_root` is absolute. A labels file and a file of class names are not here: class
    labels are in the samples files, and names in the plan.
    """

    image_key: Annotated[Text, Field(min_length=1, max_length=1000)] | None = None
    label_key: Annotated[Text, Field(min_length=1, max_length=1000)] | None = None
    image_root: Annotated[Text, Field(min_length=1)] | None = None
    class_depth: Annotated[int, Field(ge=1, le=100)] | None = None
    class_order: Literal["text", "natural"] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set or any(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("each field must have a value or be absent, and one must be there")
        return self


class SourceRecord(Record):
    """The source of the images. Their location at labelling and how they were read are not part of the identity."""

    kind: Literal["folder", "tar", "parquet"]
    location: Text
    class_names: tuple[Text, ...] | None
    shards: tuple[ShardRecord, ...]
    reading: ReadingRecord | None = None

    @model_validator(mode="after")
    def _reading_is_there_or_absent(self) -> Self:
        if self.reading is None and "reading" in self.model_fields_set:
            raise ValueError("reading must be an object or be absent")
        return self

    @model_serializer(mode="wrap")
    def _without_reading(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is None: a source that needs no choice is written as before there were any."""
        values = dump(self)
        reading = values.pop("reading", None)
        return values | ({"reading": {k: v for k, v in reading.items() if v is not None}} if reading else {})

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of class names and shards."""
        return sha256_json(self.model_dump(mode="json", include={"class_names", "shards"}))


class Plan(Record):
    """The definition of a label set. Written first, create-only, and never changed."""

    format: Literal["deit-cli-labels"] = FORMAT
    version: Literal[1] = VERSION
    labelset_id: Sha256
    recipe_id: Sha256
    teacher_id: Sha256
    source_id: Sha256
    recipe: Recipe
    teacher: _TaggedTeacher
    source: SourceRecord
    topk: Annotated[int, Field(ge=0, le=MAX_TOPK)]
    precision: Precision

    @classmethod
    def make(
        cls, *, recipe: Recipe, teacher: AnyTeacher, source: SourceRecord, topk: int, precision: Precision
    ) -> Self:
        """Return a plan with the ids that follow from its parts."""
        ids = {"recipe_id": recipe.id, "teacher_id": teacher.id, "source_id": source.id}
        return cls(
            labelset_id=_labelset_id(ids, topk, precision),
            recipe_id=recipe.id,
            teacher_id=teacher.id,
            source_id=source.id,
            recipe=recipe,
            teacher=teacher,
            source=source,
            topk=topk,
            precision=precision,
        )

    @model_validator(mode="after")
    def _ids_follow_from_parts(self) -> Self:
        ids = {"recipe_id": self.recipe.id, "teacher_id": self.teacher.id, "source_id": self.source.id}
        for name, value in (ids | {"labelset_id": _labelset_id(ids, self.topk, self.precision)}).items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {short(getattr(self, name))}, but its parts hash to {short(value)}")
        names = [shard.name for shard in self.source.shards]
        if len(set(names)) != len(names):
            raise ValueError("two source shards have the same name")
        return self

    @property
    def codec(self) -> Codec:
        """The codec that stores its labels."""
        return codec_of(self.precision, self.teacher.num_classes, self.topk)

    def shard(self, name: str) -> ShardRecord:
        """Return the plan's record of one source shard, or raise LabelSetMismatch."""
        if name not in self.shards_by_name:
            raise LabelSetMismatch(f"the plan has no source shard {name!r}")
        return self.shards_by_name[name]

    @cached_property
    def shards_by_name(self) -> dict[str, ShardRecord]:
        """The records of the source shards by name."""
        return {record.name: record for record in self.source.shards}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        fields = {name: value for name, value in state["__dict__"].items() if name != "shards_by_name"}
        return state | {"__dict__": fields}

    def check_same(self, other: "Plan", *, folder: str | Path) -> None:
        """Raise LabelSetMismatch with the first part that differs, unless `other` is the same label set."""
        for part in ("recipe", "teacher", "source"):
            mine, theirs = getattr(self, f"{part}_id"), getattr(other, f"{part}_id")
            if mine != theirs:
                fields = {"class_names", "shards"} if part == "source" else None  # its location is no part of its id
                difference = first_difference(
                    *(getattr(plan, part).model_dump(mode="json", include=fields) for plan in (self, other))
                )
                counts = len(self.teacher.members), len(other.teacher.members)
                if part == "teacher" and counts[0] != counts[1]:  # one teacher and several share no field
                    difference = f" ({counts[0]} of them, not {counts[1]})"
                fix = f"Use the same {part} or another --out"
                if part == "recipe" and self.recipe.renderer < other.recipe.renderer:
                    fix = f"Continue it with --set renderer={self.recipe.renderer}, or use another --out"
                raise LabelSetMismatch(
                    f"{folder} was made with {part} {short(mine)}, this run asks for {short(theirs)}{difference}",
                    fix=fix,
                )
        for part in ("topk", "precision"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine != theirs:
                raise LabelSetMismatch(
                    f"{folder} was made with --{part} {mine}, this run asks for {theirs}",
                    fix="Use the same or another --out",
                )


@row
class FileEntry:
    """A complete file of the set. Its path follows from kind, shard and views."""

    kind: Literal["samples", "labels", "images"]
    shard: Name
    view_start: View  # 0 and 0 for samples and images
    view_stop: View
    rows: Count
    bytes: Count
    sha256: Sha256

    @model_validator(mode="after")
    def _a_table_fits_in_memory(self) -> Self:
        if self.kind != "images" and self.bytes > MAX_FILE_BYTES:
            raise ValueError(f"a file of {self.kind} has at most {MAX_FILE_BYTES} bytes, got {self.bytes}")
        return self

    @property
    def path(self) -> PurePosixPath:
        """Path inside the label set."""
        return path_of(self.kind, self.shard, self.views)

    @property
    def views(self) -> range:
        """The views of a label shard; an empty range for other files."""
        return range(self.view_start, self.view_stop)


_ENTRY_FIELDS = tuple(field.name for field in dataclasses.fields(FileEntry))


class Probe(Record):
    """The pixels of one view as the teacher saw them, before mixing, and the mix that followed.

    Attributes:
        shard: source shard.
        row: row of the sample.
        view: view number.
        pixels_sha256: SHA-256 over uint8 [H, W, 3].
        sample: base64 of 768 of these bytes, evenly spaced, for measuring differences.
        partner: row of the partner, or None.
        lam: weight of the sample's own view.
        box: top, left, height, width of CutMix's box, or None.
    """

    shard: Name
    row: Count
    view: View
    pixels_sha256: Sha256
    sample: Annotated[str, Field(max_length=4096)]
    partner: Count | None
    lam: Annotated[float, Field(ge=0, le=1)]
    box: tuple[int, int, int, int] | None


class Manifest(Record):
    """The complete files of a label set. Replaced atomically, and written last: it is the commit.

    Attributes:
        labelset_id: id of the label set, from the plan.
        plan_sha256: SHA-256 of the bytes of plan.json.
        sealed: whether all files of the source shards and blocks are complete.
        shards: names of the source shards in the set, in the plan's order, if it is a subset; else None.
        view_blocks: start and stop of each block of views, as they are stored; see `blocks`.
        files: complete files; empty before sealing.
        probes: some of the replay probes in the footers of the label shards.
        environments: library versions, device and dtype that made the labels, without duplicates.
        content_sha256: SHA-256 of the canonical JSON of all other fields, which detects every flipped bit.
    """

    format: Literal["deit-cli-labels"] = FORMAT
    version: Literal[1] = VERSION
    labelset_id: Sha256
    plan_sha256: Sha256
    sealed: bool
    shards: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    view_blocks: tuple[tuple[View, View], ...]
    files: tuple[FileEntry, ...]
    probes: Annotated[tuple[Probe, ...], Field(max_length=MAX_PROBES)]
    environments: tuple[dict[Text, Text], ...]
    content_sha256: Sha256 | None = None  # None while the manifest is being made

    @property
    def blocks(self) -> list[range]:
        """The blocks of views, in ascending order."""
        return in_order(range(*block) for block in self.view_blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the stored form: the fields, with the hash over the other fields filled in."""
        absent = {"content_sha256", "files"} if self.shards is not None else {"content_sha256", "files", "shards"}
        content = self.model_dump(mode="json", exclude=absent) | {"files": [_values_of(e) for e in self.files]}
        return content | {"content_sha256": sha256_json(content)}

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        stop = 0
        for start, end in sorted(self.view_blocks):
            if not stop <= start < end:
                raise ValueError(f"view blocks must be ranges that do not overlap, got {list(self.view_blocks)}")
            stop = end
        # What the path follows from; making 100,000 paths takes a second.
        places = {(e.kind, e.shard, *((e.view_start, e.view_stop) if e.kind == "labels" else ())) for e in self.files}
        if len(places) != len(self.files):
            raise ValueError("one file is listed twice")
        return self


def _values_of(entry: FileEntry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in _ENTRY_FIELDS}


class _Import(Record, extra="ignore"):
    """The fields of an import.json that an error needs; `exchange.import_record` has all fields."""

    imported_from: Text
    lost: Annotated[tuple[Text, ...], Field(min_length=1)]


def shards_of(manifest: Manifest, plan: Plan, name: object) -> tuple[ShardRecord, ...]:
    """Return the plan's record of every source shard in a set, in order; `name` is for errors.

    Raises:
        LabelSetCorrupt: the manifest names shards that are not in the plan, in another order, or all of them (instead of None).
    """
    if manifest.shards is None:
        return plan.source.shards
    named = set(manifest.shards)
    records = tuple(record for record in plan.source.shards if record.name in named)
    if tuple(record.name for record in records) != manifest.shards:
        known = {record.name for record in plan.source.shards}
        unknown = next((f"{shard!r} is not one of them" for shard in manifest.shards if shard not in known), None)
        raise LabelSetCorrupt(
            f"{name}: shards must be source shards of the plan, each once and in the plan's order:"
            f" {unknown or 'they are not in that order'}"
        )
    if len(records) == len(plan.source.shards):
        raise LabelSetCorrupt(f"{name}: shards names all {len(records)} source shards: it must be absent in this case")
    return records


def path_of(kind: Literal["samples", "labels", "images"], shard: str, views: range) -> PurePosixPath:
    """Return the path of a file in a label set."""
    if kind == "labels":
        return labels_path(shard, views)
    return samples_path(shard) if kind == "samples" else images_path(shard)


def samples_path(shard: str) -> PurePosixPath:
    """Return the path of the samples of a source shard in a label set."""
    return PurePosixPath("samples") / f"{shard}.parquet"


def images_path(shard: str) -> PurePosixPath:
    """Return the path of the images of a source shard in a self-contained label set."""
    return PurePosixPath(IMAGES_FOLDER) / f"{shard}.tar"


def labels_path(shard: str, views: range) -> PurePosixPath:
    """Return the path of the labels of a source shard and a block of views in a label set."""
    return PurePosixPath("labels") / f"views-{views.start:05d}-{views.stop - 1:05d}" / f"{shard}.parquet"


def in_order(blocks: Iterable[range]) -> list[range]:
    """Return blocks of views in ascending order, each once."""
    return sorted(set(blocks), key=lambda block: (block.start, block.stop))


def stored_blocks(blocks: Iterable[range]) -> tuple[tuple[int, int], ...]:
    """Return blocks of views as a manifest stores them."""
    return tuple((block.start, block.stop) for block in blocks)


def label_blocks(folder: Path) -> list[range]:
    """Return the blocks of views that have label shards in a folder, by the names of the subfolders, in order."""
    blocks = []
    for path in sorted((folder / "labels").glob("views-*-*")):
        first, _, last = path.name.removeprefix("views-").partition("-")
        if max(len(first), len(last)) <= 10 and re.fullmatch("[0-9]+-[0-9]+", f"{first}-{last}"):
            blocks.append(range(int(first), int(last) + 1))
    return in_order(blocks)


def read_plan(folder: Path) -> Plan:
    """Read and check `plan.json`, and return the plan."""
    return parse_plan(read_small(folder / PLAN_NAME), folder / PLAN_NAME)


def parse_plan(data: bytes, name: object) -> Plan:
    """Check the bytes of a `plan.json`, and return the plan; `name` is for errors."""
    values = load_json(data, name, fix=damaged_json(name))
    plan = _load_record(values, Plan, name)
    if canonical_json(plan.recipe.model_dump(mode="json")) != canonical_json(values["recipe"]):
        raise LabelSetCorrupt(f"{name}: the recipe must be complete: its hash covers every field", fix=DAMAGED_PLAN)
    return plan


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`, check that it is unchanged and belongs to the plan in the same folder, and return it."""
    path = folder / MANIFEST_NAME
    return parse_manifest(read_small(path), path, plan_sha256=sha256_file(folder / PLAN_NAME))


def parse_manifest(data: bytes, name: object, *, plan_sha256: str | None) -> Manifest:
    """Check the bytes of a `manifest.json` for a plan with this hash, and return the manifest; `name` is for errors.

    Without the hash of a plan (None), only the manifest is checked.
    """
    values = load_json(data, name, fix=damaged_json(name))
    manifest = _load_record(values, Manifest, name)
    if manifest.shards is None and "shards" in values:
        raise LabelSetCorrupt(f"{name}: shards: must be a list of names, or absent for all source shards")
    if manifest.content_sha256 != manifest.to_json()["content_sha256"]:
        raise LabelSetCorrupt(
            f"{name}: its content does not have the hash that it states: it was changed", fix=DAMAGED_MANIFEST
        )
    # The hash covers the JSON's meaning. White space or extra digits of a number keep the meaning, but are damage too.
    if data != pretty_json(values):
        raise LabelSetCorrupt(
            f"{name}: its content is the same, in other bytes (white space, or the form of a number): it was changed",
            fix=DAMAGED_MANIFEST,
        )
    if plan_sha256 is not None and plan_sha256 != manifest.plan_sha256:
        raise LabelSetMismatch(
            f"{name} belongs to another {PLAN_NAME}: it says SHA-256 {short(manifest.plan_sha256)}…, the file has"
            f" {short(plan_sha256)}…",
            fix=DAMAGED_PLAN,
        )
    return manifest


def refuse_import(data: bytes, folder: object) -> LabelSetMismatch:
    """Return the error for a folder of imported labels, which is not a label set; `data` are the bytes of its import.json."""
    try:
        values = parse_json(data)
        if not is_version(values, IMPORT_FORMAT, VERSION):
            raise ValueError(f"it is not {IMPORT_FORMAT} of version {VERSION}")
        record = _Import.model_validate_json(canonical_json(values))
    except (ValueError, RecursionError) as error:
        why = _first_problem(error) if isinstance(error, ValidationError) else error
        return LabelSetMismatch(
            f"{folder} is not a label set, and its {IMPORT_NAME} cannot be read: {why}", fix="Import the labels again"
        )
    made_by = {"fkd": "FKD", "tinyvit": "TinyViT"}.get(record.imported_from, record.imported_from)
    return LabelSetMismatch(
        f"{folder} is an import of {made_by}'s labels, not a label set: its views cannot be replayed, because"
        f" {record.lost[0]}",
        fix=f"Read labels/*.parquet; {IMPORT_NAME} says what they can be used for. To train, make labels with: deit-cli precompute",
    )


def read_probes(values: list[dict[str, Any]], path: object) -> list[Probe]:
    """Check the probes of a label shard's footer, and return them."""
    try:
        return [Probe.model_validate_json(canonical_json(value)) for value in values]
    except ValidationError as error:
        raise LabelSetCorrupt(f"{path}: a probe in its footer: {error.errors()[0]['msg']}") from error


def pixel_environment(*, renderer: int, device: str, dtype: str, compiled: bool) -> dict[str, str]:
    """Return the environment that pixels and outputs depend on besides the recipe: library versions, device and dtype.

    Args:
        renderer: the recipe's; only views of renderer 1 depend on OpenCV.
        device: name of the teacher's device.
        dtype: of the forward pass.
        compiled: whether the teacher is compiled.
    """
    packages = ["numpy", "pillow", "simplejpeg", "timm", "torch"] + ["opencv-python-headless"] * (renderer == 1)
    how = f"{dtype} compiled" if compiled else dtype
    return {name: metadata.version(name) for name in packages} | {"device": device, "dtype": how}


def short(digest: str) -> str:
    """Return the first twelve digits of a hash, for people."""
    return digest[:12]


def first_difference(mine: Any, theirs: Any, path: str = "") -> str:
    """Return ` (path: mine, not theirs)` for the first difference of two JSON values, or an empty text."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        keys = sorted({*mine, *theirs}, key=lambda k: (k not in mine or k not in theirs, k))  # those of both first
        pairs: Iterable[tuple[str, Any, Any]] = ((k, mine.get(k), theirs.get(k)) for k in keys)
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        pairs = ((str(i), a, b) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
    elif isinstance(mine, list) and isinstance(theirs, list):
        return f" ({path}: {len(mine)} entries, not {len(theirs)})"
    else:
        return f" ({path}: {_brief(mine)}, not {_brief(theirs)})"
    name, a, b = next(((k, a, b) for k, a, b in pairs if a != b), ("", None, None))
    return first_difference(a, b, f"{path}.{name}".lstrip(".")) if name else ""


def _load_record(values: Any, kind: type[_RecordT], path: object) -> _RecordT:
    if not is_version(values, FORMAT, VERSION):
        what, fix = other_version(values, FORMAT, VERSION)
        raise LabelSetMismatch(f"{path} {what}", fix=fix)
    try:
        # Validated as text: JSON has no tuples, so strict mode accepts lists for tuples only in text.
        return kind.model_validate_json(canonical_json(values))
    except ValidationError as error:
        raise LabelSetCorrupt(f"{path}: {_first_problem(error)}", fix=damaged_json(path)) from error
    except DeitCliError as error:
        raise LabelSetMismatch(f"{path}: {error}", fix=damaged_json(path)) from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in _TEACHER_TAGS)
    # pydantic speaks of arguments where the fields of a dataclass are meant
    what = "Extra inputs are not permitted" if first["type"] == "unexpected_keyword_argument" else first["msg"]
    return f"{where or 'content'}: {what}"


def _labelset_id(ids: dict[str, str], topk: int, precision: str) -> str:
    return sha256_json(ids | {"format": FORMAT, "version": VERSION, "topk": topk, "precision": precision})


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
