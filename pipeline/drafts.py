"""A label shard on its way: rows arrive in any order, and the file is published when the last one is there."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.labels import LabelRows, LabelsFooter, SampleRows, content_xxh3, encode_rows, write_labels
from pipeline.manifest import Plan, Probe, labels_path
from pipeline.recipe import Recipe
from pipeline.rendering import ViewBatch
from pipeline.replay import make_probe, pair_of
from pipeline.storage import publish_file

log = logging.getLogger("deit_cli.drafts")


class LabelDraft:
    """The rows of one label shard, filled in any order."""

    def __init__(self, samples: SampleRows, shard: str, views: range, plan: Plan) -> None:
        self.shard, self.views, self._samples, self._plan = shard, views, samples, plan
        self._row = samples.usable
        shape = (len(views), len(self._row))
        self._hard = np.zeros(shape, np.int64)
        self._index = np.zeros((*shape, plan.topk), np.int64)
        self._prob = np.zeros((*shape, plan.topk), np.float32)
        self._left = shape[0] * shape[1]
        self.probes: list[Probe] = []

    @property
    def is_complete(self) -> bool:
        """Whether every row of every view has its answer."""
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
        at = view - self.views.start, np.searchsorted(self._row, rows)
        self._hard[at], self._index[at], self._prob[at] = hard, index, prob
        self._left -= len(rows)

    def add_probe(self, batch: ViewBatch, recipe: Recipe) -> None:
        """Keep the first sample's first view and the last sample's last view as probes, when their batch comes by."""
        ends = {(int(self._row[0]), self.views[0]), (int(self._row[-1]), self.views[-1])}
        for row, view in sorted(ends):
            if view == batch.view and (at := (batch.rows == row).nonzero().ravel()).numel():
                partner, mix = pair_of(recipe, self._samples, row, view)
                pixels = batch.images[int(at[0])].numpy()
                self.probes.append(make_probe(pixels, shard=self.shard, row=row, view=view, partner=partner, mix=mix))

    def rows_of_views(self) -> list[LabelRows]:
        """Return the rows as they are stored, view by view."""
        classes, precision = self._plan.teacher.num_classes, self._plan.precision
        return [
            encode_rows(self._row, hard, index, prob, num_classes=classes, precision=precision)
            for hard, index, prob in zip(self._hard, self._index, self._prob, strict=True)
        ]


def publish_draft(out: Path, plan: Plan, draft: LabelDraft, environment: dict[str, str]) -> None:
    """Write a complete draft as the label shard that it is; another writer's finished file stays."""
    views = draft.rows_of_views()
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
        content_xxh3=content_xxh3(views),
        probes=[probe.model_dump(mode="json") for probe in sorted(draft.probes, key=lambda p: (p.view, p.row))],
        environment=environment,
    )
    path = out / labels_path(draft.shard, draft.views)
    created = publish_file(path, partial(write_labels, views=views, footer=footer))
    log.debug("%s %s", "wrote" if created else "another writer had already written", path)
