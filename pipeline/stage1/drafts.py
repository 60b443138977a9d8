"""Drafts of label shards: rows arrive in any order, and the file is published when it is complete."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.labels.encoding import LabelRows
from pipeline.labels.manifest import Plan, Probe, labels_path
from pipeline.labels.replay import make_probe, pair_of
from pipeline.labels.tables import LabelsFooter, SampleRows, write_labels
from pipeline.repeats import warn_counted
from pipeline.stage1.rendering import ViewBatch
from pipeline.storage.atomic import publish_file
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.drafts")

SUSPICIOUS = 256  # minimum number of labels in a label shard for a warning if all have one class


class LabelDraft:
    """The rows of one label shard, filled in any order and held in their stored form (44 bytes each for K = 10 in float16)."""

    def __init__(self, samples: SampleRows, shard: str, views: range, plan: Plan) -> None:
        self.shard, self.views, self._samples = shard, views, samples
        self._row = samples.usable.astype(np.uint32)
        self._codec = plan.codec
        self._stored = np.zeros((len(views), len(self._row)), self._codec.record)
        self._left = self._stored.size
        self.probes: list[Probe] = []

    def __len__(self) -> int:
        return self._stored.size

    @property
    def is_complete(self) -> bool:
        """Return whether every row of every view has its answer."""
        return self._left == 0

    def add(
        self,
        view: int,
        rows: NDArray[np.int64],
        hard: NDArray[np.int64],
        index: NDArray[np.int64],
        prob: NDArray[np.float32],
    ) -> None:
        """Store the answers for some rows of one view."""
        stored, places = self._stored[view - self.views.start], np.searchsorted(self._row, rows)
        for name, column in self._codec.store(hard, index, prob).items():
            stored[name][places] = column
        self._left -= len(rows)

    def add_probe(self, batch: ViewBatch, recipe: Recipe) -> None:
        """Keep the first sample's first view and the last sample's last view as probes, if the batch contains them."""
        ends = {(int(self._row[0]), self.views[0]), (int(self._row[-1]), self.views[-1])}
        for row, view in sorted(ends):
            if view == batch.view and (at := (batch.rows == row).nonzero().ravel()).numel():
                partner, mix = pair_of(recipe, self._samples, row, view)
                pixels = batch.images[int(at[0])].cpu().numpy()
                self.probes.append(make_probe(pixels, shard=self.shard, row=row, view=view, partner=partner, mix=mix))

    def rows_of_views(self) -> list[LabelRows]:
        """Return the rows in their stored form, one entry for each view."""
        return [self._codec.decode(self._row, stored) for stored in self._stored]


def publish_draft(out: Path, plan: Plan, draft: LabelDraft, environment: dict[str, str]) -> int:
    """Publish a complete draft as a label shard, and return its size in bytes; a file of another writer is kept."""
    views = draft.rows_of_views()
    if plan.teacher.num_classes > 1:
        _warn_of_one_class(draft, views)
    footer = LabelsFooter(
        labelset_id=plan.labelset_id,
        recipe_id=plan.recipe_id,
        teacher_id=plan.teacher_id,
        source_id=plan.source_id,
        shard=draft.shard,
        view_start=draft.views.start,
        view_stop=draft.views.stop,
        rows_per_view=len(views[0]),
        num_classes=plan.teacher.num_classes,
        topk=plan.topk,
        precision=plan.precision,
        content_xxh3=plan.codec.content_xxh3(views),
        probes=[probe.model_dump(mode="json") for probe in sorted(draft.probes, key=lambda p: (p.view, p.row))],
        environment=environment,
    )
    path = out / labels_path(draft.shard, draft.views)
    created = publish_file(path, partial(write_labels, views=views, footer=footer))
    log.debug("%s %s", "wrote" if created else "another writer had already written", path)
    return path.stat().st_size


def _warn_of_one_class(draft: LabelDraft, views: list[LabelRows]) -> None:
    """Warn if all views have the same class: the teacher is probably broken, although its answers are finite."""
    if len(draft) < SUSPICIOUS:
        return
    first = views[0].hard[0]
    if all((rows.hard == first).all() for rows in views):
        warn_counted(
            log,
            "label shards in which the teacher gave one class to all views",
            "%s, views %d:%d: the teacher gave class %d to all of %d views. Check its weights and its normalisation",
            *(draft.shard, draft.views.start, draft.views.stop, int(first), len(draft)),
        )
