"""Stage 1: render numbered views, let the teacher answer, store what it said. One label shard at a time."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

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
from pipeline.labels import MAX_TOPK, LabelsFooter, SampleRows, read_all_views
from pipeline.labelset import LabelSet, checked_labels_footer, record_of
from pipeline.manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    FileEntry,
    Manifest,
    Plan,
    Probe,
    ShardRecord,
    labels_path,
    pixel_environment,
    read_manifest,
    read_plan,
    read_probes,
    samples_path,
)
from pipeline.mixing import MixBatch, apply_mix, mix_blocks
from pipeline.recipe import PRESETS, Recipe
from pipeline.rendering import BlockRenderer, BlockTask, ViewBatch, plan_workers, start_loader
from pipeline.replay import compare_probes
from pipeline.sources import Sample, Source
from pipeline.storage import TEMPORARY_PREFIX, pretty_json, publish_file, replace_file, sha256_file, sweep_temporaries
from pipeline.teacher import Teacher, check_classes
from pipeline.views import draw_view, render

log = logging.getLogger("deit_cli.precompute")

MANIFEST_PROBES = 8
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
    manifest = _sealed_manifest(config.out)
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
    _claim(config.out, work)
    _check_untouched(config.out, work)
    sweep_temporaries(config.out)
    workers = plan_workers(config.workers, teacher.device)
    samples = index_samples(
        config.out, work.plan, source, on_bad_image=config.on_bad_image, workers=workers, progress=progress
    )
    _warn_of_sorted_classes(recipe, samples)
    _label_views(config, work, recipe, teacher, source, samples, workers, progress)
    _seal(config.out, work)
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


def _claim(out: Path, work: Work) -> None:
    """Write the plan first, create-only, and an open manifest that says which views are on the way."""
    publish_file(out / PLAN_NAME, lambda file: _write(file, work.plan.model_dump(mode="json")))
    read_plan(out).check_same(work.plan, folder=out)  # another writer may have been first
    opened = Manifest(
        labelset_id=work.plan.labelset_id,
        plan_sha256=sha256_file(out / PLAN_NAME),
        sealed=False,
        view_blocks=tuple((block.start, block.stop) for block in work.blocks),
        files=(),
        probes=(),
        environments=(),
    )
    publish_file(out / MANIFEST_NAME, lambda file: _write(file, opened.to_json()))


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
    for batch in loader:
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


def _seal(out: Path, work: Work) -> None:
    """List every complete file with its hash, and replace the manifest: the commit."""
    sealed = _sealed_manifest(out)
    blocks = sorted({*(sealed.view_blocks if sealed else ()), *((block.start, block.stop) for block in work.blocks)})
    shards = [shard.name for shard in work.plan.source.shards]
    files = [_samples_entry(out, record) for record in work.plan.source.shards]
    probes: list[Probe] = []
    environments: list[dict[str, str]] = []
    for start, stop in blocks:
        for name in shards:
            path = out / labels_path(name, range(start, stop))
            footer = checked_labels_footer(path, work.plan, name, range(start, stop))
            files.append(_labels_entry(out, footer))
            probes += read_probes(footer.probes, path)
            environments += [footer.environment] if footer.environment not in environments else []
    if sealed:
        _check_same_samples(sealed, files, out)
    step = max(1, -(-len(probes) // MANIFEST_PROBES))
    manifest = Manifest(
        labelset_id=work.plan.labelset_id,
        plan_sha256=sha256_file(out / PLAN_NAME),
        sealed=True,
        view_blocks=tuple(blocks),
        files=tuple(files),
        probes=tuple(probes[::step]),
        environments=tuple(environments),
    )
    replace_file(out / MANIFEST_NAME, lambda file: _write(file, manifest.to_json()))


def _check_untouched(out: Path, work: Work) -> None:
    """A new manifest must not vouch for a file that changed since it was sealed. A missing one is made again."""
    sealed = _sealed_manifest(out)
    looked_at = {(block.start, block.stop) for block in work.blocks}
    for entry in sealed.files if sealed else ():
        path, views = out / entry.path, (entry.view_start, entry.view_stop)
        if path.is_file() and sha256_file(path) != entry.sha256:
            again = "run again" if entry.kind == "samples" else f"run with --views {views[0]}:{views[1]}"
            raise LabelSetCorrupt(f"{path} is not as it was sealed: delete it and {again}")
        if not path.is_file() and entry.kind == "labels" and views not in looked_at:
            raise LabelSetCorrupt(
                f"{path} is missing: run with --views {views[0]}:{views[1]} first, which makes it again"
            )


def _check_same_samples(sealed: Manifest, files: list[FileEntry], out: Path) -> None:
    """The older labels are those of the images that the sealed samples files name, so these cannot change."""
    found = {entry.path: entry for entry in files}
    for old in sealed.files:
        if old.kind == "samples" and found[old.path] != old:
            raise LabelSetMismatch(
                f"{out / old.path} was made again, and is not the one that was sealed: the images are others than those that"
                " were labelled, or another pyarrow wrote it. Choose another --out"
            )


def _samples_entry(out: Path, record: ShardRecord) -> FileEntry:
    return _entry(out, kind="samples", shard=record.name, views=range(0), rows=record.num_samples)


def _labels_entry(out: Path, footer: LabelsFooter) -> FileEntry:
    views = range(footer.view_start, footer.view_stop)
    return _entry(out, kind="labels", shard=footer.shard, views=views, rows=footer.rows_per_view * len(views))


def _entry(out: Path, *, kind: Literal["samples", "labels"], shard: str, views: range, rows: int) -> FileEntry:
    path = out / (samples_path(shard) if kind == "samples" else labels_path(shard, views))
    return FileEntry(
        kind=kind,
        shard=shard,
        view_start=views.start,
        view_stop=views.stop,
        rows=rows,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )


def _sealed_manifest(out: Path) -> Manifest | None:
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out)
    return manifest if manifest.sealed else None


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


def _write(file: BinaryIO, value: object) -> None:
    file.write(pretty_json(value))
