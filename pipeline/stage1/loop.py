"""THE STAGE-1 LOOP: label shards in, complete files out. One process uses one device; `engines` starts the processes."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import LabelSetCorrupt, LabelSetMismatch, NonFiniteTeacherError
from pipeline.images.source import Source
from pipeline.labels.checked_files import check_rows, checked_labels_footer, checked_samples
from pipeline.labels.format import damaged_file
from pipeline.labels.manifest import Plan, labels_path, pixel_environment, read_probes, samples_path
from pipeline.labels.replay import compare_probes
from pipeline.labels.tables import SampleRows, read_all_views
from pipeline.machine.progress import WorkDone
from pipeline.machine.ranks import device_name
from pipeline.pixels.handover import renders_on_gpu
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.drafts import LabelDraft, publish_draft
from pipeline.stage1.rendering import Block, BlockRenderer, ViewBatch, blocks_of, stream_views
from pipeline.teacher.teacher import Answer, PendingAnswer, Teacher, one_thread
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.labelling")

AHEAD = 2  # number of batches queued on the device while the host handles an earlier answer
UNWRITTEN = 2  # maximum number of complete label shards that wait for the writer


@dataclass(frozen=True)
class LabelTask:
    """One label shard: one source shard and one block of views. It is the unit of work; if it fails, all of it is computed again."""

    shard: str
    views: range


@dataclass(frozen=True)
class Job:
    """The data that every process of a run needs; it can be sent to other processes.

    Attributes:
        config: settings of the run.
        plan: plan of the label set.
        recipe: recipe of the views.
        source: source of the images.
        workers: loader processes of each teacher process.
        cores: number of cores that each teacher process may use for a teacher on the CPU.
        images: changes made to the images before they were labelled; None: no changes.
    """

    config: PrecomputeConfig
    plan: Plan
    recipe: Recipe
    source: Source
    workers: int
    cores: int
    images: str | None = None

    def samples(self, shard: str) -> SampleRows:
        """Read the samples file of a source shard, which indexing wrote, and return its samples."""
        return checked_samples(self.config.folder / samples_path(shard), self.plan, shard)


def label_shards(
    job: Job,
    teacher: Teacher,
    tasks: Iterable[LabelTask],
    *,
    report: Callable[[WorkDone], None],
    finished: Callable[[LabelTask], None] = lambda _: None,
) -> None:
    """Label every task, and publish its file.

    Args:
        job: the label set and its source.
        teacher: teacher on the device of this process.
        tasks: tasks to label, taken one by one shortly before they are needed.
        report: called with the work done since the last call; also called, without work, when the first views are ready.
        finished: called with each task whose file is complete under its final name.
    """
    in_progress = ShardsInProgress(job, teacher, report, finished)
    on_gpu = renders_on_gpu(job.config.render, job.recipe, teacher.device)
    batches = stream_views(
        BlockRenderer(job.source, job.recipe),
        in_progress.blocks_of(tasks),
        img_size=job.recipe.img_size,
        most=min(job.recipe.mix_block, max((record.num_samples for record in job.plan.source.shards), default=1)),
        workers=job.workers,
        held=AHEAD,  # the device may not have copied these batches yet
        device=teacher.device,
        unrendered=on_gpu,
    )
    waiting: deque[tuple[ViewBatch, PendingAnswer]] = deque()
    with one_thread(teacher.device), in_progress:
        for number, batch in enumerate(batches):
            if number == 0:
                report(WorkDone())
            if on_gpu:
                batch = replace(batch, images=teacher.rendered(batch.images, len(batch.rows)))
            waiting.append((batch, teacher.ask(batch.images, batch.mix, job.plan.topk)))
            if len(waiting) > AHEAD:
                in_progress.store_answer(*waiting.popleft())
        for batch, pending in waiting:
            in_progress.store_answer(batch, pending)


class ShardsInProgress:
    """The label shards that this process has begun. A thread writes each complete one while labelling goes on."""

    def __init__(
        self, job: Job, teacher: Teacher, report: Callable[[WorkDone], None], finished: Callable[[LabelTask], None]
    ) -> None:
        self._job, self._teacher, self._report, self._finished = job, teacher, report, finished
        self._drafts: dict[LabelTask, LabelDraft] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writes: deque[tuple[LabelTask, Future[int]]] = deque()
        self._busy_s = teacher.busy_s
        self._environment = pixel_environment(
            renderer=job.recipe.renderer,
            device=device_name(teacher.device),
            dtype=str(teacher.dtype).removeprefix("torch."),
            compiled=teacher.config.compile,
        ) | ({"images": job.images} if job.images else {})

    def __enter__(self) -> "ShardsInProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until the writer has finished its current file, even if this process is told to stop."""
        try:
            if kind is None:
                self._report_written(0)
        finally:
            self._writer.shutdown(cancel_futures=True)

    def blocks_of(self, tasks: Iterable[LabelTask]) -> Iterator[Block]:
        """Begin each task that has no file yet, and yield its blocks."""
        for task in tasks:
            samples = self._job.samples(task.shard)
            if is_done(self._job, task, samples):
                self._report(WorkDone(found=len(samples.usable) * len(task.views)))
                self._finished(task)
                continue
            draft = LabelDraft(samples, task.shard, task.views, self._job.plan)
            if draft.is_complete:  # no usable image in the source shard
                self._write(task, draft)
                continue
            self._drafts[task] = draft
            yield from blocks_of(task.shard, task.views, samples, self._job.recipe)

    def store_answer(self, batch: ViewBatch, pending: PendingAnswer) -> None:
        """Wait for the answer for a batch, and store it in its label shard."""
        task = LabelTask(batch.shard, batch.views)
        draft = self._drafts[task]
        rows = batch.rows.numpy()
        answer = _answer(pending, batch, self._job)
        draft.add(batch.view, rows, answer.hard, answer.topk_index, answer.topk_prob)
        draft.add_probe(batch, self._job.recipe)
        busy, self._busy_s = self._teacher.busy_s - self._busy_s, self._teacher.busy_s
        self._report(WorkDone(views=len(rows), busy_s=busy))
        if draft.is_complete:
            self._write(task, self._drafts.pop(task))

    def _write(self, task: LabelTask, draft: LabelDraft) -> None:
        job = self._job
        future = self._writer.submit(publish_draft, job.config.folder, job.plan, draft, self._environment)
        self._writes.append((task, future))
        self._report_written(UNWRITTEN)

    def _report_written(self, most: int) -> None:
        """Wait until at most `most` files remain to be written, and report the written ones."""
        while len(self._writes) > most or (self._writes and self._writes[0][1].done()):
            task, future = self._writes.popleft()
            self._report(WorkDone(bytes=future.result()))
            self._finished(task)


def is_done(job: Job, task: LabelTask, samples: SampleRows) -> bool:
    """Return whether a label shard exists; raise if it is damaged, or does not fit the pixels rendered on this machine.

    Raises:
        LabelSetError: the file is damaged, or belongs to another label set or other pixels.
    """
    path = job.config.folder / labels_path(task.shard, task.views)
    if not path.is_file():
        return False
    try:
        footer = checked_labels_footer(path, job.plan, task.shard, task.views)
        for view, rows in enumerate(read_all_views(path), task.views.start):
            check_rows(path, view, rows, samples.usable, block=task.views)
    except (LabelSetCorrupt, LabelSetMismatch) as error:
        raise error.with_fix(damaged_file(task.views)) from error.__cause__
    compare_probes(read_probes(footer.probes, path), job.recipe, job.source, {task.shard: samples}.__getitem__)
    return True


def _answer(pending: PendingAnswer, batch: ViewBatch, job: Job) -> Answer:
    """Wait for the answer for a batch, and return it; an error names its view and its images."""
    try:
        return pending.result()
    except NonFiniteTeacherError as error:
        keys = job.samples(batch.shard).key
        rows = [int(batch.rows[position]) for position in error.positions]
        names = ", ".join(repr(keys[row]) for row in rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise NonFiniteTeacherError(
            f"{error.what} for view {batch.view} of {names} in {batch.shard}: these labels were not stored."
            " Check the teacher's weights and normalisation",
            error.positions,
        ) from error


def paths_of(out: Path, tasks: Iterable[LabelTask]) -> list[Path]:
    """Return the paths of the files of these tasks."""
    return [out / labels_path(task.shard, task.views) for task in tasks]
