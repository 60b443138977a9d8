"""Stage 1: render numbered views, let the teacher answer, store what it said. One label shard at a time."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import PrecomputeConfig
from pipeline.decode import decode
from pipeline.drafts import LabelDraft, publish_draft
from pipeline.errors import (
    BadImageError,
    LabelSetCorrupt,
    LabelSetMismatch,
    NonFiniteTeacherError,
    TeacherError,
    UsageError,
)
from pipeline.indexing import Progress, index_samples
from pipeline.labels import MAX_TOPK, SampleRows, read_all_views
from pipeline.labelset import LabelSet, checked_labels_footer, record_of
from pipeline.manifest import (
    PLAN_NAME,
    Plan,
    labels_path,
    pixel_environment,
    read_plan,
    read_probes,
)
from pipeline.mixing import MixBatch, apply_mix, mix_blocks
from pipeline.recipe import PRESETS, Recipe
from pipeline.rendering import BlockRenderer, BlockTask, ViewBatch, checked, plan_workers, start_loader
from pipeline.replay import compare_probes
from pipeline.sealing import check_untouched, claim, seal, sealed_manifest
from pipeline.sources import Sample, Source
from pipeline.storage import TEMPORARY_PREFIX, sweep_temporaries
from pipeline.teacher import Teacher, check_classes
from pipeline.views import draw_view, render

log = logging.getLogger("deit_cli.precompute")

DEFAULT_TOPK = 10


@dataclass(frozen=True)
class Work:
    """What a run would do.

    Attributes:
        plan: of the label set.
        blocks: of views; sealed ones among those asked come along, to be completed where a file was deleted.
        num_samples: of the source.
        views_to_label: views that no sealed block holds yet.
    """

    plan: Plan
    blocks: tuple[range, ...]
    num_samples: int
    views_to_label: int

    @property
    def teacher_passes(self) -> int:
        """Views that the teacher must answer for, if no file exists yet."""
        return self.num_samples * self.views_to_label

    @property
    def bytes_before_compression(self) -> int:
        """Size of all labels before compression: class, K indices and probabilities, tail."""
        index = 2 if self.plan.teacher.num_classes <= 65536 else 4
        prob = 2 if self.plan.precision == "float16" else 4
        topk = self.plan.topk
        return self.teacher_passes * (index + topk * (index + prob) + (prob if topk else 0))


def plan_work(config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source) -> Work:
    """Work out the plan and the blocks of views that are asked and not yet sealed. Writes nothing.

    Raises:
        TeacherError: the teacher's classes are not the source's.
        LabelSetMismatch: the folder holds another label set.
    """
    labels = [label for shard in source.shards for label in shard.class_labels if label is not None]
    check_classes(teacher.identity, source.class_names, max(labels, default=None))
    num_classes = teacher.identity.num_classes
    topk = min(DEFAULT_TOPK, num_classes) if config.topk is None else config.topk
    if topk > min(num_classes, MAX_TOPK):
        most = f"{num_classes} (the teacher's classes)" if num_classes <= MAX_TOPK else f"{MAX_TOPK}"
        raise UsageError(f"--topk must be in 0..{most}, got {topk}")
    plan = Plan.make(
        recipe=recipe, teacher=teacher.identity, source=record_of(source), topk=topk, precision=config.precision
    )
    if (config.out / PLAN_NAME).is_file():
        existing = read_plan(config.out)
        existing.check_same(plan, folder=config.out)
        plan = existing
    elif config.out.exists() and not config.out.is_dir():
        raise UsageError(f"--out {config.out} is a file: choose a folder")
    elif config.out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in config.out.iterdir()):
        raise LabelSetMismatch(f"{config.out} is not empty and holds no label set: choose another --out")
    manifest = sealed_manifest(config.out)
    sealed = sorted((range(*block) for block in manifest.view_blocks), key=lambda b: b.start) if manifest else []
    asked = [view for view in range(*config.views) if not any(view in block for block in sealed)]
    _check_no_gap(sealed, asked, config.views)
    again = [block for block in sealed if block.start < config.views[1] and block.stop > config.views[0]]
    return Work(plan, (*again, *_cut(asked, config.views_per_shard)), source.num_samples, len(asked))


def _check_no_gap(sealed: list[range], asked: list[int], views: tuple[int, int]) -> None:
    """A sealed set has no gap in its views, so new ones must begin or end where it does."""
    known = sorted({view for block in sealed for view in block} | set(asked))
    if known[-1] - known[0] + 1 != len(known):
        held = f"{sealed[0].start}:{sealed[-1].stop}"
        raise UsageError(f"--views {views[0]}:{views[1]} would leave a gap: the set holds {held}. Append to those")


def precompute(
    config: PrecomputeConfig, recipe: Recipe, teacher: Teacher, source: Source, *, progress: Progress = lambda *_: None
) -> LabelSet:
    """Make, continue or extend a label set; return it, sealed.

    Every file is published whole under its final name; a run that was killed continues where it was.
    """
    work = plan_work(config, recipe, teacher, source)
    _check_accuracy(config, teacher, source)
    claim(config.out, work.plan, work.blocks)
    check_untouched(config.out, work.blocks)
    sweep_temporaries(config.out)
    workers = plan_workers(config.workers, teacher.device)
    samples = index_samples(
        config.out, work.plan, source, on_bad_image=config.on_bad_image, workers=workers, progress=progress
    )
    _warn_of_sorted_classes(recipe, samples)
    _label_views(config, work, recipe, teacher, source, samples, workers, progress)
    seal(config.out, work.plan, work.blocks)
    return LabelSet.open(config.out)


def measure_accuracy(teacher: Teacher, source: Source, limit: int) -> tuple[float, int] | None:
    """Return the teacher's top-1 in percent on centre crops of labelled samples, and their number; None without any.

    Samples are spread evenly over the source, so that sorted classes are all seen. Images that cannot be decoded are
    passed over here: indexing is what stops at them, or leaves them out.
    """
    labelled = [
        (shard, row) for shard in source.shards for row, label in enumerate(shard.class_labels) if label is not None
    ]
    chosen = [labelled[i * len(labelled) // limit] for i in range(limit)] if len(labelled) > limit else labelled
    size = teacher.identity.img_size
    recipe = Recipe.from_dict(PRESETS["none"].to_dict() | {"img_size": size, "crop_pct": teacher.crop_pct})
    right = seen = 0
    for start in range(0, len(chosen), 64):
        views = [view for shard, row in chosen[start : start + 64] if (view := _centre_view(shard[row], recipe))]
        if not views:
            continue
        images = torch.from_numpy(np.stack([pixels for pixels, _ in views])).permute(0, 3, 1, 2)
        answer = teacher.answer(images.to(teacher.device).float(), 0)
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
            raise TeacherError("--min-teacher-accuracy needs labelled images and --accuracy-samples above 0")
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


def _label_views(
    config: PrecomputeConfig,
    work: Work,
    recipe: Recipe,
    teacher: Teacher,
    source: Source,
    samples: dict[str, SampleRows],
    workers: int,
    progress: Progress,
) -> None:
    """The loop: rendered batches in, complete label shards out."""
    missing = [
        (shard.name, views)
        for views in work.blocks
        for shard in source.shards
        if not _is_done(config.out, work.plan, shard.name, views, samples[shard.name], recipe, source)
    ]
    tasks = [
        BlockTask(name, views, rows, samples[name])
        for name, views in missing
        for rows in mix_blocks(recipe, samples[name].usable)
    ]
    total = sum(len(task.rows) * len(task.views) for task in tasks)
    environment = pixel_environment(_device_name(teacher.device), str(teacher.dtype).removeprefix("torch."))
    drafts = {(name, views): LabelDraft(samples[name], name, views, work.plan) for name, views in missing}
    for name, views in [key for key, draft in drafts.items() if draft.is_complete]:  # nothing usable in it
        publish_draft(config.out, work.plan, drafts.pop((name, views)), environment)
    done = 0
    loader = start_loader(
        BlockRenderer(source, recipe, tasks), workers=workers, pin_memory=teacher.device.type == "cuda"
    )
    for batch in checked(loader):
        draft = drafts[batch.shard, batch.views]
        draft.add_probe(batch, recipe)
        for rows, images, mix in _teacher_batches(batch, config.batch_size):
            draft.add(batch.view, rows, *_ask(teacher, images, mix, work.plan.topk, batch, rows))
            done += len(rows)
            progress("label", done, total)
        if draft.is_complete:
            publish_draft(config.out, work.plan, drafts.pop((batch.shard, batch.views)), environment)


def _ask(
    teacher: Teacher, images: torch.Tensor, mix: MixBatch, topk: int, batch: ViewBatch, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    pixels = images.to(teacher.device, non_blocking=True).permute(0, 3, 1, 2)
    try:
        answer = teacher.answer(apply_mix(pixels, mix.to(teacher.device)), topk)
    except NonFiniteTeacherError as error:
        raise NonFiniteTeacherError(
            f"{error} (view {batch.view} of {batch.shard}, rows {rows[:8].tolist()}…)"
        ) from error
    return answer.hard, answer.topk_index, answer.topk_prob


def _teacher_batches(batch: ViewBatch, size: int) -> Iterator[tuple[NDArray[np.int64], torch.Tensor, MixBatch]]:
    """Cut a batch into pieces of at most `size`, never between partners: pairs lie at even positions."""
    size -= size % 2
    for start in range(0, len(batch.rows), size):
        piece = slice(start, start + size)
        mix = MixBatch(batch.mix.partner[piece] - start, batch.mix.lam[piece], batch.mix.box[piece])
        yield batch.rows[piece].numpy(), batch.images[piece], mix


def _cut(views: list[int], size: int) -> tuple[range, ...]:
    """Cut view numbers into consecutive runs of at most `size`."""
    blocks: list[range] = []
    for view in views:
        if blocks and blocks[-1].stop == view and len(blocks[-1]) < size:
            blocks[-1] = range(blocks[-1].start, view + 1)
        else:
            blocks.append(range(view, view + 1))
    return tuple(blocks)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_done(
    out: Path, plan: Plan, shard: str, views: range, samples: SampleRows, recipe: Recipe, source: Source
) -> bool:
    """Whether a label shard exists, is whole, and was rendered from the pixels that this machine renders."""
    path = out / labels_path(shard, views)
    if not path.is_file():
        return False
    footer = checked_labels_footer(path, plan, shard, views)
    if any(not np.array_equal(rows.row, samples.usable) for rows in read_all_views(path)):
        raise LabelSetCorrupt(f"{path} does not have the usable rows of its samples file: delete it and run again")
    compare_probes(read_probes(footer.probes, path), recipe, source, {shard: samples}.__getitem__)
    return True
