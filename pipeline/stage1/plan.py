"""Plan stage 1: the label set that a run makes, its missing blocks of views, and the settings of an extension."""

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import LabelSetMismatch, TeacherError, UsageError
from pipeline.images.class_names import natural_key
from pipeline.images.labels_file import LabelledShard
from pipeline.images.source import Source, SourceShard
from pipeline.labels.comparing import check_source, has_labels, labelled_part, record_of
from pipeline.labels.format import IMAGES_FOLDER, MAX_TOPK, PLAN_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import AnyTeacher, Plan, SourceRecord, label_blocks, read_plan
from pipeline.labels.sealing import sealed_manifest
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.fields import settings_of
from pipeline.stage1.packing import Packing, check_packable, plan_packing
from pipeline.storage.atomic import TEMPORARY_PREFIX
from pipeline.storage.json import MAX_JSON_BYTES
from pipeline.storage.place import Place, open_place
from pipeline.teacher.given import names_given
from pipeline.teacher.loading import names_function
from pipeline.teacher.teacher import Teacher, check_classes
from pipeline.text import byte_size, count, first_few, two_columns
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.precompute")

DEFAULT_TOPK = 10
ENTRY_BYTES = 205  # of a file in manifest.json, without its name


@dataclass(frozen=True)
class Work:
    """The work that a run would do.

    Attributes:
        plan: plan of the label set.
        source: images to label; if the folder holds a subset, only its source shards.
        blocks: requested blocks of views, in ascending order. They include sealed and begun blocks: missing files of these blocks
            are made again.
        views_to_label: number of views that no sealed block holds yet.
        packing: how the images are packed into the set; None: no packing.
    """

    plan: Plan
    source: Source
    blocks: tuple[range, ...]
    views_to_label: int
    packing: Packing | None

    @property
    def num_samples(self) -> int:
        """Number of samples of the source."""
        return self.source.num_samples

    @property
    def shards(self) -> tuple[str, ...] | None:
        """Names of the source shards to label; None: all source shards of the plan."""
        names = tuple(shard.name for shard in self.source.shards)
        return names if len(names) < len(self.plan.source.shards) else None

    @property
    def teacher_passes(self) -> int:
        """Number of views that the teacher must answer for if no file exists yet."""
        return self.num_samples * self.views_to_label

    @property
    def bytes_before_compression(self) -> int:
        """Size of all labels before compression: class, K indices and probabilities, tail."""
        return self.teacher_passes * self.plan.codec.label_bytes

    def described(self, *, as_json: bool) -> str | dict[str, Any]:
        """Return the work of the run as text for people, or as JSON values."""
        return self.to_dict() if as_json else self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the work of the run as JSON values."""
        return {
            "labelset_id": self.plan.labelset_id,
            "recipe_id": self.plan.recipe_id,
            "teacher_name": self.plan.teacher.name,
            "shards": len(self.plan.source.shards),
            "images": self.num_samples,
            "blocks": [[block.start, block.stop] for block in self.blocks],
            "views_to_label": self.views_to_label,
            "teacher_passes": self.teacher_passes,
            "label_bytes": self.bytes_before_compression,
        }

    def table(self) -> str:
        """Return the work of the run as text for people."""
        plan = self.plan
        rows = [
            ("label set", f"{plan.labelset_id[:12]} (recipe {plan.recipe_id[:12]}, teacher {plan.teacher.name})"),
            ("source", f"{count(len(plan.source.shards), 'shard')}, {count(self.num_samples, 'image')}"),
            ("views", f"{self.views_to_label:,} to label, in {count(len(self.blocks), 'block')}"),
            ("teacher passes", f"{self.teacher_passes:,}"),
            ("label bytes", f"{byte_size(self.bytes_before_compression)} before compression"),
        ]
        return two_columns(rows)


def plan_work(config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source) -> Work:
    """Return the work to do: plan, images and requested blocks of views. Writes nothing.

    Raises:
        TeacherError: the teacher's classes are not the source's classes.
        LabelSetMismatch: the folder holds another label set.
        UsageError: K or the views are out of range, or the folder cannot be used.
    """
    source, record = _held_part(config.folder, source)
    check_classes(teacher.identity, source.class_names, source.max_label)
    if not (config.folder / PLAN_NAME).is_file():  # the plan of a set that is continued has decided the order
        check_order(teacher.identity, source, config.class_order)
    topk = choose_topk(config.topk, teacher.identity.num_classes)
    asked = Plan.make(recipe=recipe, teacher=teacher.identity, source=record, topk=topk, precision=config.precision)
    plan = _plan_in(config, asked)
    blocks, views_to_label = _blocks_of(config)
    _check_manifest_fits(config, [shard.name for shard in source.shards], blocks)
    packing = plan_packing(config.folder, config.include_images)
    if packing:
        check_packable(source)
    return Work(plan, source, blocks, views_to_label, packing)


def _held_part(out: Path, source: Source) -> tuple[Source, SourceRecord]:
    """Return the source and its record; if the folder holds a subset, only that part of the source.

    A subset stays a subset: the same source shards get more views, and a source with only these shards is enough.
    """
    manifest = sealed_manifest(out)
    if manifest is None or manifest.shards is None:
        return source, record_of(source)
    held = LabelSet(Place(out))
    check_source(held, source)
    log.info(
        "%s holds %d of %d source shards: only these are labelled", out, len(held.shards), len(held.plan.source.shards)
    )
    return labelled_part(held, source), held.plan.source


def check_order(teacher: AnyTeacher, source: Source, class_order: str | None) -> None:
    """Raise TeacherError if the order of the classes is a guess: no name of the teacher's shows that it is right.

    Classes that were sorted as text (torchvision) and by the numbers in their names (timm) often have other numbers, and each
    label would then stand for another class.

    Args:
        teacher: identity of the teacher.
        source: images to label.
        class_order: order that the user asked for; None: none.
    """
    names = source.class_names
    if class_order is not None or names is None or teacher.class_names is not None:
        return
    text, natural = sorted(names), sorted(names, key=natural_key)
    if list(names) == text != natural:
        raise TeacherError(
            f"the order of the classes of {source.location} is open: as text {first_few(text, 4)}, by numbers"
            f" {first_few(natural, 4)}; and teacher {teacher.name} has no class names to compare with",
            fix="Pass the order with which it was trained: --class-order text (torchvision), --class-order natural (timm), or a"
            " file with one class name per line",
        )


def _plan_in(config: PrecomputeConfig, asked: Plan) -> Plan:
    """Return the plan of the folder, which must equal the requested plan; for a new folder, the requested plan."""
    out = config.folder
    # List first, then look for the plan: another run that begins just now writes its plan before anything else.
    present = [path.name for path in out.iterdir()] if out.is_dir() else []
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"--out {config.out}: {above} is a file: choose a path inside a folder")
    if (out / PLAN_NAME).is_file():
        held = read_plan(out)
        held.check_same(asked, folder=config.out)
        return held
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {config.out} is a file: choose a folder")
    if any(not name.startswith(TEMPORARY_PREFIX) for name in present):
        raise LabelSetMismatch(f"{config.out} is not empty and holds no label set: choose another --out")
    return asked


def _blocks_of(config: PrecomputeConfig) -> tuple[tuple[range, ...], int]:
    """Return the requested blocks of views, and the number of these views that no sealed block holds.

    Ranks that begin one after the other must divide the same tasks: the order of the blocks does not depend on the files in
    the folder.
    """
    manifest = sealed_manifest(config.folder)
    sealed = manifest.blocks if manifest else []
    asked = [view for view in range(*config.views) if not any(view in block for block in sealed)]
    _check_no_gap(sealed, asked, config.views)
    again = [block for block in sealed if block.start < config.views[1] and block.stop > config.views[0]]
    begun = _begun(config.folder, sealed, config.views)
    new = [view for view in asked if not any(view in block for block in begun)]
    blocks = sorted((*again, *begun, *_cut(new, config.views_per_shard)), key=lambda block: block.start)
    return tuple(blocks), len(asked)


def _begun(out: Path, sealed: list[range], views: tuple[int, int]) -> list[range]:
    """Return the unsealed blocks of the requested views in the folder: they are completed and keep their length."""
    inside = [block for block in label_blocks(out) if views[0] <= block.start and block.stop <= views[1]]
    begun = [block for block in inside if block not in sealed]
    together = sorted((*sealed, *begun), key=lambda block: block.start)
    return begun if all(a.stop <= b.start for a, b in itertools.pairwise(together)) else []


def _check_manifest_fits(config: PrecomputeConfig, names: Sequence[str], blocks: Sequence[range]) -> None:
    """Raise UsageError if the set would have more files than a manifest can list: it could not be read when it is sealed."""
    kinds = 2 if config.include_images else 1  # beside the label shards
    all_blocks = {*blocks, *label_blocks(config.folder)}
    files = len(names) * (kinds + len(all_blocks))
    size = files * (ENTRY_BYTES + max(map(len, names), default=0))
    if size > MAX_JSON_BYTES:
        raise UsageError(
            f"{len(names):,} source shards and {count(len(all_blocks), 'block')} of views would make a label set of {files:,} files, whose"
            f" list has about {byte_size(size)}; at most {byte_size(MAX_JSON_BYTES)} can be read",
            fix=f"Pass a larger --views-per-shard than {config.views_per_shard}, or pack the images into larger tars",
        )


def _check_no_gap(sealed: list[range], asked: list[int], views: tuple[int, int]) -> None:
    """Raise UsageError if the new views would leave a gap to the sealed views."""
    known = sorted({view for block in sealed for view in block} | set(asked))
    if known[-1] - known[0] + 1 != len(known):
        held = f"{sealed[0].start}:{sealed[-1].stop}"
        raise UsageError(
            f"--views {views[0]}:{views[1]} would leave a gap: the set holds {held}", fix="Choose views next to these"
        )


def _cut(views: list[int], size: int) -> tuple[range, ...]:
    """Split view numbers into consecutive runs of at most `size` views."""
    blocks: list[range] = []
    for view in views:
        if blocks and blocks[-1].stop == view and len(blocks[-1]) < size:
            blocks[-1] = range(blocks[-1].start, view + 1)
        else:
            blocks.append(range(view, view + 1))
    return tuple(blocks)


def choose_topk(asked: int | None, num_classes: int) -> int:
    """Return K; the default is 10, or all classes if there are fewer."""
    topk = min(DEFAULT_TOPK, num_classes) if asked is None else asked
    if topk > min(num_classes, MAX_TOPK):
        most = f"{num_classes} (the teacher's classes)" if num_classes <= MAX_TOPK else f"{MAX_TOPK}"
        raise UsageError(f"--topk must be in 0..{most}, got {topk}")
    return topk


def extension(
    location: str, values: dict[str, Any], *, data: str | None, views: tuple[int, int]
) -> tuple[PrecomputeConfig, TeacherConfig, Recipe]:
    """Return the settings for `precompute` to add views to a label set.

    Recipe, K, precision and source are those of the plan. A block is as long as the longest block of the set. The teacher is
    the one of the plan, unless another name is passed. `precompute` checks that it is the same teacher before it writes anything.

    Args:
        location: folder or URL of the set, which need not be sealed yet.
        values: settings by name: the fields of PrecomputeConfig that are not `planned`, and the fields of TeacherConfig.
        data: the images; None: the set's own images, or those at the location in its plan.
        views: start and stop of the new views.

    Raises:
        LabelSetError: the label set does not exist.
        UsageError: one image size is passed for teachers with several image sizes.
    """
    label_set = LabelSet(open_place(location))
    plan = label_set.plan
    if data is None:
        data = str(label_set.place / IMAGES_FOLDER) if label_set.has_images else label_set.images_location()
    longest = max(map(len, label_set.manifest.blocks), default=0)  # the last may be short
    config = PrecomputeConfig(
        data=data,
        out=location,
        views=views,
        topk=plan.topk,
        precision=plan.precision,
        **({"views_per_shard": longest} if longest else {}),
        **_named(PrecomputeConfig, values),
    )
    return config, _teacher_of(plan, _named(TeacherConfig, values)), plan.recipe


def extended_source(config: PrecomputeConfig, data: str | None) -> Source:
    """Open the images for an extension: those at `data`, else those of the label set. Class labels that the images lack come
    from the label set, as do those that a labels file gave.
    """
    label_set = LabelSet(open_place(config.out))
    source = label_set.open_source(data, options=config.options_for(data))
    known = {entry.shard for entry in label_set.manifest.files if entry.kind == "samples"}
    return replace(
        source, shards=tuple(_with_labels(each, label_set) if each.name in known else each for each in source.shards)
    )


def _with_labels(shard: SourceShard[Any], label_set: LabelSet) -> SourceShard[Any]:
    if has_labels(shard.class_labels):
        return shard
    samples = label_set.samples(shard.name)
    same = has_labels(samples.class_label) and list(samples.key) == list(shard.keys)
    return LabelledShard.make(shard, samples.class_label) if same else shard


def _named(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that belong to the fields of a config."""
    return {setting.name: values[setting.name] for setting in settings_of(kind) if setting.name in values}


def _teacher_of(plan: Plan, asked: dict[str, Any]) -> TeacherConfig:
    """Return the config of the plan's teacher with the requested settings."""
    members = plan.teacher.members
    if not asked.get("teacher"):
        asked["teacher"] = tuple(member.name for member in members)
        function = next(filter(names_function, asked["teacher"]), None)
        if function:
            raise UsageError(
                f"this set's teacher is the Python function {function}. A label set may be a stranger's, so code that it"
                " names is run only on request",
                fix=f"If you trust that function, pass --teacher {function}",
            )
        if given := next(filter(names_given, asked["teacher"]), None):
            raise UsageError(
                f"this set's teacher {given} is an object of a program, which no command can load",
                fix="Call pipeline.label_images again in that program, with the same out and the new views",
            )
        # Every published network of timm has a tag in its name; an architecture alone does not identify its weights.
        unknown = next((name for name in asked["teacher"] if not re.search("[.:]", name)), None)
        if unknown and asked.get("pretrained", True):
            raise UsageError(
                f"the weights of this set's teacher {unknown} came from a folder or a file: pass it again with --teacher"
                f" FOLDER, or with --teacher {unknown} --teacher-checkpoint FILE"
            )
    sizes = {member.img_size for member in members}
    if asked.get("teacher_img_size") is None and len(sizes) == 1:
        (asked["teacher_img_size"],) = sizes
    if len(sizes) > 1 and asked.get("teacher_img_size") is not None:
        raise UsageError(f"the teachers of this set have image sizes {sorted(sizes)}: omit --teacher-img-size")
    return TeacherConfig(**asked)
