"""Stage 1 from plan to seal: run the engine and commit the label set."""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import BadImageError, TeacherError, UsageError
from pipeline.images.source import Sample, Source, SourceShard
from pipeline.labels.format import MANIFEST_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Plan
from pipeline.labels.sealing import check_replaceable, check_untouched, claim, seal
from pipeline.machine.progress import Progress, Tally
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.overview.card import refresh_card
from pipeline.overview.summary import in_short
from pipeline.pixels.handover import refuse_impossible
from pipeline.pixels.render import check_renderer, render_view, warn_without_kernel
from pipeline.repeats import counted_at_the_end
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.engines import limit, run_processes
from pipeline.stage1.indexing import Census, Reading, index_samples
from pipeline.stage1.loop import Job, LabelTask, label_shards, paths_of
from pipeline.stage1.packing import pack_images
from pipeline.stage1.plan import Work, plan_work
from pipeline.stage1.ray import connect_ray, run_ray
from pipeline.storage.atomic import sweep_temporaries
from pipeline.storage.mirror import ChangedElsewhere, ManyWritersMirror
from pipeline.teacher.teacher import Teacher, one_thread
from pipeline.text import count
from pipeline.views.mixing import mix_batch
from pipeline.views.recipe import PRESETS, Recipe

log = logging.getLogger("deit_cli.precompute")


def look_ahead(config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source) -> Work:
    """Return the work of a run without doing it; --out may be a URL."""
    with mirrored(config):
        return plan_work(config, recipe, teacher, source)


@counted_at_the_end()
def precompute(
    config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source, *, progress: Progress = lambda _: None
) -> LabelSet | None:
    """Make, continue or extend a label set.

    Every file is published only when complete; a run that was killed continues where it stopped.

    Returns:
        the sealed label set; None if label shards of other ranks are missing.
    """
    with mirrored(config) as mirror:
        work = plan_work(config, recipe, teacher, source)
        refuse_impossible(config.render, recipe, teacher.device)
        check_renderer(recipe)
        if recipe.renderer > 1:
            warn_without_kernel()
        resources = _prepare(config, teacher)
        _check_accuracy(config, teacher, work.source)
        tasks = _claim_tasks(config, work, mirror)
        mine = _share_of(tasks)
        job, census = _read_images(config, work, recipe, resources, mine, progress)
        _warn_of_sorted_classes(recipe, census)
        _label(job, teacher, resources.devices, mine, census, progress)
        if mirror:
            mirror.send()
            mirror.bring()  # files that other machines have made
        if missing := sum(not path.is_file() for path in paths_of(config.folder, tasks)):
            log.info(
                "%d of %d label shards are still missing from other ranks; the rank that finishes last seals the set",
                missing,
                len(tasks),
            )
            return None
        return _finish(config, work, mirror)


@dataclass(frozen=True)
class Resources:
    """The devices and cores that this process uses for labelling.

    Attributes:
        devices: devices of the teacher, one for each teacher process.
        cores: number of cores for each teacher process.
        loaders: number of loader processes for each teacher process.
    """

    devices: list[str]
    cores: int
    loaders: int


def _prepare(config: PrecomputeConfig, teacher: Teacher) -> Resources:
    """Return the resources of this process; limit the teacher to them, and connect to Ray if it is the engine."""
    rank = rank_from(os.environ)
    devices = plan_devices(teacher.config.device, config.processes, rank)
    cores = 1 if config.engine == "ray" else plan_cores(devices, rank)  # a Ray actor has one core
    limit(teacher, config, cores)
    if config.engine == "ray":
        connect_ray(config.address)  # fail before hours of indexing
    return Resources(devices, cores, plan_loaders(config.workers, cores, devices[0]))


def _claim_tasks(config: PrecomputeConfig, work: Work, mirror: ManyWritersMirror | None) -> list[LabelTask]:
    """Claim the folder for the plan, and return the label shards of all ranks."""
    claim(config.folder, work.plan, work.blocks, offer=mirror.send if mirror else lambda: None)
    check_untouched(config.folder, work.blocks)
    sweep_temporaries(config.folder)
    return [LabelTask(shard.name, views) for views in work.blocks for shard in work.source.shards]


def _share_of(tasks: list[LabelTask]) -> list[LabelTask]:
    rank = rank_from(os.environ)
    mine = rank.share(tasks)
    if rank.world_size > 1:
        log.info("rank %d of %d: %d of %d label shards", rank.rank, rank.world_size, len(mine), len(tasks))
    return mine


def _read_images(
    config: PrecomputeConfig,
    work: Work,
    recipe: Recipe,
    resources: Resources,
    tasks: list[LabelTask],
    progress: Progress,
) -> tuple[Job, Census]:
    """Pack the images of these label shards if requested, index them, and return the job and what was counted."""
    shards = tuple(dict.fromkeys(task.shard for task in tasks))
    workers = resources.loaders * len(resources.devices)
    reading = Reading(work.source, shards, config.on_bad_image, workers, progress)
    if work.packing:
        reading = replace(reading, source=pack_images(config.folder, work.plan, work.packing, reading))
    changes = work.packing.changes if work.packing else None
    job = Job(config, work.plan, recipe, reading.source, resources.loaders, resources.cores, changes)
    return job, index_samples(config.folder, work.plan, reading)


def _finish(config: PrecomputeConfig, work: Work, mirror: ManyWritersMirror | None) -> LabelSet:
    sweep_temporaries(config.folder)  # of processes that were lost during the run
    commit(config.folder, work.plan, work.blocks, work.shards, images=work.packing is not None, mirror=mirror)
    label_set = LabelSet.open(config.folder)
    refresh_card(label_set)
    return label_set


def _label(
    job: Job,
    teacher: Teacher,
    devices: list[str],
    tasks: list[LabelTask],
    census: Census,
    progress: Progress,
) -> None:
    total = sum(census.usable[task.shard] * len(task.views) for task in tasks)
    tally = Tally(total, processes=max(1, min(len(devices), len(tasks))), progress=progress)
    if job.config.engine == "ray":
        run_ray(job, teacher, job.config.processes, tasks, tally)
    elif len(devices) == 1:
        label_shards(job, teacher, tasks, report=tally.add)
    else:
        run_processes(job, teacher, devices[: len(tasks)], tasks, tally)


def measure_accuracy(teacher: Teacher, source: Source, limit: int) -> tuple[float, int] | None:
    """Return the teacher's top-1 in percent on centre crops of labelled samples, and their number; None without labelled samples.

    Samples are spread evenly over the source, so that a source sorted by class is covered. Images that cannot be decoded are
    ignored here; indexing stops at them or leaves them out.
    """
    chosen = list(_spread(source, limit))
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


def _spread(source: Source, limit: int) -> Iterator[tuple[SourceShard[Any], int]]:
    """Yield source shard and row of at most `limit` labelled samples, spread evenly, in the order of the source."""
    counts = [summary.num_labelled for summary in source.summaries]
    total, before = sum(counts), 0
    places = deque(i * total // limit for i in range(limit)) if total > limit else deque(range(total))
    for shard, labelled in zip(source.shards, counts, strict=True):
        if places and places[0] < before + labelled:
            rows = [row for row, label in enumerate(shard.class_labels) if label is not None]
            while places and places[0] < before + labelled:
                yield shard, rows[places.popleft() - before]
        before += labelled


def _centre_view(sample: Sample, recipe: Recipe) -> tuple[NDArray[np.uint8], int | None] | None:
    try:
        return render_view(sample.image, recipe, sample.key, 0), sample.class_label
    except BadImageError:
        return None


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
            f"teacher {teacher.identity.name} has top-1 {top1:.1f} % on {count} images, --min-teacher-accuracy requires"
            f" {config.min_teacher_accuracy:g} %: check its classes, their order and its normalisation"
        )


def _warn_of_sorted_classes(recipe: Recipe, census: Census) -> None:
    """Warn if most neighbours have the same class: partners come from one mix block, so mixup would mix only one class."""
    if recipe.mixes and len(census.classes) > 1 and census.same_class > 0.5 * census.neighbours:
        log.warning(
            "%.0f %% of neighbours have the same class: the source seems to be sorted, and mixup partners are chosen among %d"
            " neighbours. For labels as good as DeiT's, shuffle the samples into new shards with `deit-cli pack`",
            100 * census.same_class / census.neighbours,
            recipe.mix_block,
        )


@contextlib.contextmanager
def mirrored(config: PrecomputeConfig) -> Iterator[ManyWritersMirror | None]:
    """If --out is a URL, download its label set, and upload new files while the block runs.

    Raises:
        UsageError: the engine is Ray, whose workers would write to their own folders.
    """
    mirror = ManyWritersMirror.of(config.out, config.folder, last=MANIFEST_NAME, adopt=check_replaceable)
    if mirror is None:
        yield None
        return
    if config.engine == "ray":
        raise UsageError(
            f"--out {config.out}: --engine ray needs an --out folder that all its machines share",
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
    """Seal the set; if another machine has changed the manifest behind a URL, seal the views of both machines."""
    seal(out, plan, blocks, shards, images=images)
    while mirror is not None:
        try:
            mirror.commit()
            return
        except ChangedElsewhere as error:
            log.info("%s: sealing again, with the files of the other machine", error)
            mirror.bring()
            seal(out, plan, blocks, shards, images=images)


def ended(config: PrecomputeConfig, label_set: LabelSet | None, *, as_json: bool) -> str | dict[str, Any]:
    """Return the result of `precompute` as one line of text, or as JSON values."""
    return in_short(config.out, label_set) if as_json else ended_line(config, label_set)


def ended_line(config: PrecomputeConfig, label_set: LabelSet | None) -> str:
    """Return the result of `precompute` as one line of text."""
    if label_set is None:
        return f"{config.out}: this rank's label shards are complete; the rank that finishes last seals the set"
    views, bad = label_set.views, label_set.num_samples - label_set.num_usable
    left_out = f" ({bad:,} more cannot be decoded)" if bad else ""
    return (
        f"{config.out}: views {views.start}:{views.stop} of {count(label_set.num_usable, 'image')}{left_out}, sealed."
        f" To look at it: deit-cli labels show {config.out}"
    )
