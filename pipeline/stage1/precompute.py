"""Stage 1 from plan to seal: what is to be labelled, by whom, and when it is complete."""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import BadImageError, LabelSetMismatch, TeacherError, UsageError
from pipeline.images.decode import decode
from pipeline.images.source import Sample, Source
from pipeline.labels.card import refresh_card
from pipeline.labels.comparing import check_source, labelled_part, record_of
from pipeline.labels.format import MANIFEST_NAME, MAX_TOPK, PLAN_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Plan, SourceRecord, label_blocks, read_plan
from pipeline.labels.sealing import check_replaceable, check_untouched, claim, seal, sealed_manifest
from pipeline.labels.tables import SampleRows
from pipeline.machine.progress import Progress, Tally
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.engines import limit, run_here, run_processes
from pipeline.stage1.indexing import index_samples
from pipeline.stage1.loop import Job, LabelTask, paths_of
from pipeline.stage1.packing import Packing, check_packable, pack_images, plan_packing
from pipeline.stage1.ray import connect_ray, run_ray
from pipeline.storage.atomic import TEMPORARY_PREFIX, sweep_temporaries
from pipeline.storage.mirror import ChangedElsewhere, ManyWritersMirror
from pipeline.storage.place import Place
from pipeline.teacher.teacher import Teacher, check_classes, one_thread
from pipeline.text import byte_size, count, two_columns
from pipeline.views.mixing import mix_batch
from pipeline.views.recipe import PRESETS, Recipe
from pipeline.views.view import draw_view, render

log = logging.getLogger("deit_cli.precompute")

DEFAULT_TOPK = 10


@dataclass(frozen=True)
class Work:
    """What a run would do.

    Attributes:
        plan: of the label set.
        source: its images; where the folder holds a subset, those source shards alone.
        blocks: of views, in rising order; sealed and begun ones among those asked come along, to be completed where a file
            is missing.
        views_to_label: views that no sealed block holds yet.
        packing: how the images are packed into the set; None: not at all.
    """

    plan: Plan
    source: Source
    blocks: tuple[range, ...]
    views_to_label: int
    packing: Packing | None

    @property
    def num_samples(self) -> int:
        """Samples of the source."""
        return self.source.num_samples

    @property
    def shards(self) -> tuple[str, ...] | None:
        """Names of the source shards to label; None for all of the plan's."""
        names = tuple(shard.name for shard in self.source.shards)
        return names if len(names) < len(self.plan.source.shards) else None

    @property
    def teacher_passes(self) -> int:
        """Views that the teacher must answer for, if no file exists yet."""
        return self.num_samples * self.views_to_label

    @property
    def bytes_before_compression(self) -> int:
        """Size of all labels before compression: class, K indices and probabilities, tail."""
        plan = self.plan
        return self.teacher_passes * plan.codec.label_bytes


def plan_work(config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source) -> Work:
    """Work out the plan and the blocks of views that are asked and not yet sealed. Writes nothing.

    Raises:
        TeacherError: the teacher's classes are not the source's.
        LabelSetMismatch: the folder holds another label set.
    """
    source, record = _held_part(config.folder, source)
    labels = [label for shard in source.shards for label in shard.class_labels if label is not None]
    check_classes(teacher.identity, source.class_names, max(labels, default=None))
    topk = choose_topk(config.topk, teacher.identity.num_classes)
    plan = Plan.make(recipe=recipe, teacher=teacher.identity, source=record, topk=topk, precision=config.precision)
    # Listed before the plan is looked for: another run that begins just now writes its plan before anything else.
    out = config.folder
    present = [path.name for path in out.iterdir()] if out.is_dir() else []
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"--out {config.out}: {above} is a file: choose a folder in a folder")
    if (out / PLAN_NAME).is_file():
        existing = read_plan(out)
        existing.check_same(plan, folder=config.out)
        plan = existing
    elif out.exists() and not out.is_dir():
        raise UsageError(f"--out {config.out} is a file: choose a folder")
    elif any(not name.startswith(TEMPORARY_PREFIX) for name in present):
        raise LabelSetMismatch(f"{config.out} is not empty and holds no label set: choose another --out")
    manifest = sealed_manifest(out)
    sealed = sorted((range(*block) for block in manifest.view_blocks), key=lambda b: b.start) if manifest else []
    asked = [view for view in range(*config.views) if not any(view in block for block in sealed)]
    _check_no_gap(sealed, asked, config.views)
    again = [block for block in sealed if block.start < config.views[1] and block.stop > config.views[0]]
    packing = plan_packing(out, config.include_images)
    if packing:
        check_packable(source)
    begun = _begun(out, sealed, config.views)
    new = [view for view in asked if not any(view in block for block in begun)]
    # In one order whatever lies in the folder: ranks that begin one after the other must share out the same tasks.
    blocks = sorted((*again, *begun, *_cut(new, config.views_per_shard)), key=lambda block: block.start)
    return Work(plan, source, tuple(blocks), len(asked), packing)


def _begun(out: Path, sealed: list[range], views: tuple[int, int]) -> list[range]:
    """Return blocks that lie in the folder unsealed, among those asked: what is done of them is not made in another cut."""
    inside = [block for block in label_blocks(out) if views[0] <= block.start and block.stop <= views[1]]
    begun = [block for block in inside if block not in sealed]
    together = sorted((*sealed, *begun), key=lambda block: block.start)
    return begun if all(a.stop <= b.start for a, b in itertools.pairwise(together)) else []


def _held_part(out: Path, source: Source) -> tuple[Source, SourceRecord]:
    """Return the source and its record; where the folder holds a subset, of the source shards that are in it.

    So a subset stays one: it is the same source shards that get more views, and a source of these alone will do.
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


def look_ahead(config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source) -> Work:
    """Return what a run would do, also where its --out is a URL."""
    with mirrored(config):
        return plan_work(config, recipe, teacher, source)


def choose_topk(asked: int | None, num_classes: int) -> int:
    """Return K, by default 10 or all classes."""
    topk = min(DEFAULT_TOPK, num_classes) if asked is None else asked
    if topk > min(num_classes, MAX_TOPK):
        most = f"{num_classes} (the teacher's classes)" if num_classes <= MAX_TOPK else f"{MAX_TOPK}"
        raise UsageError(f"--topk must be in 0..{most}, got {topk}")
    return topk


def _check_no_gap(sealed: list[range], asked: list[int], views: tuple[int, int]) -> None:
    """A sealed set has no gap in its views, so new ones must begin or end where it does."""
    known = sorted({view for block in sealed for view in block} | set(asked))
    if known[-1] - known[0] + 1 != len(known):
        held = f"{sealed[0].start}:{sealed[-1].stop}"
        raise UsageError(
            f"--views {views[0]}:{views[1]} would leave a gap: the set holds {held}",
            fix="Append to those",
        )


def precompute(
    config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source, *, progress: Progress = lambda _: None
) -> LabelSet | None:
    """Make, continue or extend a label set.

    Every file is published whole under its final name; a run that was killed continues where it was.

    Returns:
        the label set, sealed; None where other ranks still have label shards to make.
    """
    with mirrored(config) as mirror:
        return _precompute(config, recipe, teacher, source, progress, mirror)


def _precompute(
    config: PrecomputeConfig,
    recipe: Recipe,
    teacher: Teacher,
    source: Source,
    progress: Progress,
    mirror: ManyWritersMirror | None,
) -> LabelSet | None:
    work = plan_work(config, recipe, teacher, source)
    source = work.source
    rank = rank_from(os.environ)
    devices = plan_devices(teacher.config.device, config.processes, rank)
    cores = 1 if config.engine == "ray" else plan_cores(devices, rank)  # an actor of Ray has one core
    limit(teacher, config, cores)
    if config.engine == "ray":
        connect_ray(config.address)  # before hours of indexing
    _check_accuracy(config, teacher, source)
    claim(config.folder, work.plan, work.blocks, offer=mirror.send if mirror else lambda: None)
    check_untouched(config.folder, work.blocks)
    sweep_temporaries(config.folder)
    tasks = [LabelTask(shard.name, views) for views in work.blocks for shard in source.shards]
    mine = rank.share(tasks)
    if rank.world_size > 1:
        log.info("rank %d of %d: %d of %d label shards", rank.rank, rank.world_size, len(mine), len(tasks))
    loaders = plan_loaders(config.workers, cores, devices[0])
    reading: dict[str, Any] = {
        "shards": list(dict.fromkeys(task.shard for task in mine)),
        "on_bad_image": config.on_bad_image,
        "workers": loaders * len(devices),
        "progress": progress,
    }
    if work.packing:
        source = pack_images(config.folder, work.plan, source, work.packing, **reading)
    job = Job(config, work.plan, recipe, source, loaders, cores, work.packing.changes if work.packing else None)
    samples = index_samples(config.folder, work.plan, source, **reading)
    _warn_of_sorted_classes(recipe, samples)
    _label(job, teacher, devices, mine, samples, progress)
    if mirror:
        mirror.send()
        mirror.bring()  # what other machines have made
    if missing := sum(not path.is_file() for path in paths_of(config.folder, tasks)):
        log.info("%d of %d label shards are still to come from other ranks; the last one seals", missing, len(tasks))
        return None
    sweep_temporaries(config.folder)  # of processes that were lost meanwhile
    commit(config.folder, work.plan, work.blocks, work.shards, images=work.packing is not None, mirror=mirror)
    label_set = LabelSet.open(config.folder)
    refresh_card(label_set)
    return label_set


def _label(
    job: Job,
    teacher: Teacher,
    devices: list[str],
    tasks: list[LabelTask],
    samples: dict[str, SampleRows],
    progress: Progress,
) -> None:
    """Let the engine run the label shards."""
    total = sum(len(samples[task.shard].usable) * len(task.views) for task in tasks)
    tally = Tally(total, processes=max(1, min(len(devices), len(tasks))), progress=progress)
    if job.config.engine == "ray":
        run_ray(job, teacher, job.config.processes, tasks, tally)
    elif len(devices) == 1:
        run_here(job, teacher, tasks, tally)
    else:
        run_processes(job, teacher, devices[: len(tasks)], tasks, tally)


def measure_accuracy(teacher: Teacher, source: Source, limit: int) -> tuple[float, int] | None:
    """Return the teacher's top-1 in percent on centre crops of labelled samples, and their number; None without any.

    Samples are spread evenly over the source, so that sorted classes are all seen. Images that cannot be decoded are
    passed over here: indexing is what stops at them, or leaves them out.
    """
    labelled = [
        (shard, row) for shard in source.shards for row, label in enumerate(shard.class_labels) if label is not None
    ]
    chosen = [labelled[i * len(labelled) // limit] for i in range(limit)] if len(labelled) > limit else labelled
    size = teacher.img_size
    recipe = PRESETS["none"].with_fields(img_size=size, crop_pct=teacher.crop_pct)
    right = seen = 0
    for start in range(0, len(chosen), 64):
        views = [view for shard, row in chosen[start : start + 64] if (view := _centre_view(shard[row], recipe))]
        if not views:
            continue
        images = torch.from_numpy(np.stack([pixels for pixels, _ in views]))
        with one_thread(teacher.device):
            answer = teacher.ask(images, mix_batch([], [], len(images)), 0).result()
        right += int((answer.hard == np.array([label for _, label in views])).sum())
        seen += len(views)
    return (100 * right / seen, seen) if seen else None


def _centre_view(sample: Sample, recipe: Recipe) -> tuple[NDArray[np.uint8], int | None] | None:
    try:
        image = decode(sample.image, key=sample.key)
    except BadImageError:
        return None
    drawn = draw_view(recipe, sample.key, 0, height=image.shape[0], width=image.shape[1])
    return render(image, drawn), sample.class_label


def _check_accuracy(config: PrecomputeConfig, teacher: Teacher, source: Source) -> None:
    measured = measure_accuracy(teacher, source, config.accuracy_samples) if config.accuracy_samples else None
    if measured is None:
        if config.min_teacher_accuracy:
            raise TeacherError("--min-teacher-accuracy needs labelled images, and the source has none")
        return
    top1, count = measured
    log.info("teacher %s: top-1 %.1f %% on centre crops of %d labelled images", teacher.identity.name, top1, count)
    if top1 < config.min_teacher_accuracy:
        raise TeacherError(
            f"teacher {teacher.identity.name} has top-1 {top1:.1f} % on {count} images, --min-teacher-accuracy asks for"
            f" {config.min_teacher_accuracy:g} %: check its classes, their order and its normalisation"
        )


def _warn_of_sorted_classes(recipe: Recipe, samples: dict[str, SampleRows]) -> None:
    """Partners come from one mix block: where neighbours are of one class, mixup has nothing to mix."""
    labels = [table.class_label for table in samples.values()]
    pairs = [(a, b) for shard in labels for a, b in itertools.pairwise(shard) if a is not None and b is not None]
    same = sum(a == b for a, b in pairs)
    if recipe.mixes and len({label for shard in labels for label in shard}) > 1 and same > 0.5 * len(pairs):
        log.warning(
            "%.0f %% of neighbours are of one class: the source looks sorted, and mixup partners come from among %d"
            " neighbours. Shuffle the samples into new shards for labels as good as DeiT's",
            100 * same / len(pairs),
            recipe.mix_block,
        )


def _cut(views: list[int], size: int) -> tuple[range, ...]:
    """Cut view numbers into consecutive runs of at most `size`."""
    blocks: list[range] = []
    for view in views:
        if blocks and blocks[-1].stop == view and len(blocks[-1]) < size:
            blocks[-1] = range(blocks[-1].start, view + 1)
        else:
            blocks.append(range(view, view + 1))
    return tuple(blocks)


@contextlib.contextmanager
def mirrored(config: PrecomputeConfig) -> Iterator[ManyWritersMirror | None]:
    """Bring the label set of an --out that is a URL, and send what is made of it for as long as the block runs.

    Raises:
        UsageError: Ray's workers would write to folders of their own.
    """
    mirror = ManyWritersMirror.of(config.out, config.folder, last=MANIFEST_NAME, adopt=check_replaceable)
    if mirror is None:
        yield None
        return
    if config.engine == "ray":
        raise UsageError(
            f"--out {config.out}: --engine ray needs an --out that all its machines share as a folder",
            fix="Push the set afterwards: deit-cli labels push",
        )
    mirror.bring()
    with mirror.sending():
        yield mirror


def commit(
    out: Path,
    plan: Plan,
    blocks: Sequence[range],
    shards: tuple[str, ...] | None,
    *,
    images: bool,
    mirror: ManyWritersMirror | None,
) -> None:
    """Seal; where another machine has changed the manifest behind a URL meanwhile, seal its views and ours."""
    seal(out, plan, blocks, shards, images=images)
    while mirror is not None:
        try:
            mirror.commit()
            return
        except ChangedElsewhere as error:
            log.info("%s: sealing once more, with what is there now", error)
            mirror.bring()
            seal(out, plan, blocks, shards, images=images)


def ended_line(config: PrecomputeConfig, label_set: LabelSet | None) -> str:
    """Return what `precompute` came to, for people."""
    if label_set is None:
        return f"{config.out}: this rank's label shards are complete; the rank that ends last seals the set"
    views = label_set.views
    return (
        f"{config.out}: views {views.start}:{views.stop} of {label_set.num_samples:,} images, sealed."
        f" Look: deit-cli labels show {config.out}"
    )


def plan_table(work: Work) -> str:
    """Return what a run would do."""
    plan = work.plan
    rows = [
        ("label set", f"{plan.labelset_id[:12]} (recipe {plan.recipe_id[:12]}, teacher {plan.teacher.name})"),
        ("source", f"{count(len(plan.source.shards), 'shard')}, {count(work.num_samples, 'image')}"),
        ("views", f"{work.views_to_label:,} to label, in {count(len(work.blocks), 'block')}"),
        ("teacher passes", f"{work.teacher_passes:,}"),
        ("label bytes", f"{byte_size(work.bytes_before_compression)} before compression"),
    ]
    return two_columns(rows)
