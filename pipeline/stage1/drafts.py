"""A label shard on its way: rows arrive in any order, and the file is published when the last one is there."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.labels.encoding import LabelRows, content_xxh3, encode_rows, from_codes, index_dtype, prob_dtype
from pipeline.labels.manifest import Plan, Probe, labels_path
from pipeline.labels.replay import make_probe, pair_of
from pipeline.labels.tables import LabelsFooter, SampleRows, write_labels
from pipeline.repeats import warn_again
from pipeline.stage1.rendering import ViewBatch
from pipeline.storage.atomic import publish_file
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.drafts")

SUSPICIOUS = 256  # that many labels of one and the same class are worth a warning


class LabelDraft:
    """The rows of one label shard, filled in any order, and held as they will be stored (46 bytes each for K = 10)."""

    def __init__(self, samples: SampleRows, shard: str, views: range, plan: Plan) -> None:
        self.shard, self.views, self._samples, self._plan = shard, views, samples, plan
        self._row = samples.usable.astype(np.uint32)
        shape = (len(views), len(self._row))
        index, prob = index_dtype(plan.teacher.num_classes), prob_dtype(plan.precision)
        self._coded = plan.precision == "log8" and plan.topk > 0
        self._hard = np.zeros(shape, index)
        self._index = np.zeros((*shape, plan.topk), index)
        self._prob = np.zeros((*shape, plan.topk), np.uint8 if self._coded else prob)  # or their codes
        self._tail = np.zeros(shape if plan.topk and not self._coded else (len(views), 0), prob)
        self._left = shape[0] * shape[1]
        self.probes: list[Probe] = []

    def __len__(self) -> int:
        return self._hard.size

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
        plan = self._plan
        stored = encode_rows(rows, hard, index, prob, num_classes=plan.teacher.num_classes, precision=plan.precision)
        at = view - self.views.start, np.searchsorted(self._row, stored.row)
        self._hard[at], self._index[at] = stored.hard, stored.topk_index
        self._prob[at] = stored.topk_code if self._coded else stored.topk_prob
        if plan.topk and not self._coded:
            self._tail[at] = stored.tail_mass
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
        if self._coded:
            classes, coded = self._plan.teacher.num_classes, zip(self._index, self._prob, strict=True)
            return [LabelRows(self._row, i[:, 0], i, *from_codes(code, classes), code) for i, code in coded]
        columns = zip(self._hard, self._index, self._prob, self._tail, strict=True)
        return [LabelRows(self._row, *column) for column in columns]

    def warn_of_one_class(self) -> None:
        """A teacher that says the same of everything is broken, though its answers are finite."""
        if len(self) >= SUSPICIOUS and (self._hard == self._hard.flat[0]).all() and self._plan.teacher.num_classes > 1:
            warn_again(
                log,
                "label shards in which the teacher gave one class to all views",
                "%s, views %d:%d: the teacher gave class %d to all of %d views. Is it trained, and its input normalised?",
                *(self.shard, self.views.start, self.views.stop, int(self._hard.flat[0]), len(self)),
            )


def publish_draft(out: Path, plan: Plan, draft: LabelDraft, environment: dict[str, str]) -> int:
    """Write a complete draft as the label shard that it is, and return its bytes; another writer's file stays."""
    views = draft.rows_of_views()
    draft.warn_of_one_class()
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
    return path.stat().st_size
