"""Label a few views again, to check that the stored answers come from this teacher and these pixels.

Hashes show that a file has not changed; this check shows that its content is right. Answers of another device or dtype
differ in the last bits, and the argmax flips if two classes are almost equally probable. The margin, the
difference between the two largest probabilities, distinguishes such a flip from a wrong label: rounding
explains only flips with a margin up to `ROUNDING`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import LabelSetError, TeacherError
from pipeline.images.source import Source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import first_difference, short
from pipeline.labels.replay import pair_of, rendered_view
from pipeline.labels.tables import LabelRows, SampleRows
from pipeline.machine.progress import Progress, Tick
from pipeline.teacher.teacher import Teacher, one_thread
from pipeline.verify.report import Flip, Relabelled
from pipeline.views.draws import stream_of
from pipeline.views.mixing import mix_batch
from pipeline.views.pairs import Mix

PAIRS_AT_ONCE = 16
# Maximum change of a probability that rounding explains: 1.7 to 2 times the maximum over 2,048 views of EfficientNet-Lite0 on an
# H200 against float32 (benchmarks/results/gpu-h200.json): 0.012 in float32 (convolutions on a GPU keep 10 bits, TF32), 0.025 in
# float16, 0.17 in bfloat16. On a CPU, 99 % of views are within 0.07 in bfloat16; the tail is long.
ROUNDING = {"float32 on a CPU": 1e-3, "float32": 0.02, "float16": 0.05, "bfloat16": 0.3}


@dataclass(frozen=True)
class _Pair:
    """One view of two partner samples, or of one sample without a partner, that the teacher labels again."""

    shard: str
    view: int
    rows: tuple[int, ...]
    mix: Mix


def relabel(
    label_set: LabelSet,
    source: Source,
    teacher: Teacher,
    *,
    views: int,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> Relabelled:
    """Label at least `views` random views again, and compare them with the stored labels.

    Args:
        label_set: label set to check.
        source: images of the label set.
        teacher: teacher that labelled the set.
        views: number of views to compare; partners that were mixed with each other are compared together.
        seed: random seed for choosing the views.
        progress: function called with the number of views done.

    Raises:
        TeacherError: `teacher` is not the teacher of the set.
        LabelSetError: an image or a file does not match the label set.
    """
    _check_teacher(label_set, teacher)
    samples = {name: label_set.samples(name) for name in label_set.shards}
    pairs = _choose(label_set, samples, views, seed)
    compared = _Compared()
    with one_thread(teacher.device):
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start : start + PAIRS_AT_ONCE]
            _compare(label_set, source, teacher, samples, part, compared)
            done = len(compared.kl)
            progress(Tick("relabel", done, max(views, done), made=done, unit="views"))
    return compared.result(rounding_of(label_set, teacher), label_set.plan.codec.rounding)


def rounding_of(label_set: LabelSet, teacher: Teacher) -> float:
    """Return the maximum change of a probability that rounding explains, on the labelling machines and this one."""
    then = [(each.get("dtype", "").partition(" ")[0], each.get("device")) for each in label_set.manifest.environments]
    now = str(teacher.dtype).removeprefix("torch."), teacher.device.type
    names = ["float32 on a CPU" if each == ("float32", "cpu") else each[0] for each in (*then, now)]
    return max(ROUNDING.get(name, max(ROUNDING.values())) for name in names)


def _check_teacher(label_set: LabelSet, teacher: Teacher) -> None:
    labelled_by, given = label_set.plan.teacher, teacher.identity
    if labelled_by.id != given.id:
        difference = first_difference(labelled_by.model_dump(mode="json"), given.model_dump(mode="json"))
        raise TeacherError(
            f"{label_set.place} was labelled by {labelled_by.name} (id {short(labelled_by.id)}), --teacher is"
            f" {given.name} (id {short(given.id)}){difference}",
            fix="Pass the teacher that labelled it, with its --teacher-checkpoint",
        )


def _choose(label_set: LabelSet, samples: dict[str, SampleRows], views: int, seed: int) -> list[_Pair]:
    """Draw pairs until they have `views` views, or all; every labelled view is equally likely."""
    usable = {name: table.usable for name, table in samples.items()}
    ends = np.cumsum([len(rows) for rows in usable.values()])
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise LabelSetError(f"{label_set.place} has no usable image to label again")
    draws = stream_of(label_set.plan.labelset_id, str(seed), "relabel")
    names, chosen, found = list(usable), {}, 0
    wanted = min(views, total * len(label_set.views))
    while found < wanted:
        number = draws.integer(total * len(label_set.views))
        place, view = number // len(label_set.views), label_set.views.start + number % len(label_set.views)
        shard = names[int(np.searchsorted(ends, place, side="right"))]
        row = int(usable[shard][place - int(ends[names.index(shard)])])  # counted from the end of the shard
        partner, mix = pair_of(label_set.recipe, samples[shard], row, view)
        rows = (row,) if partner is None else (row, partner)
        if (shard, view, min(rows)) not in chosen:
            chosen[shard, view, min(rows)] = _Pair(shard, view, rows, mix)
            found += len(rows)
    return sorted(chosen.values(), key=lambda pair: (pair.shard, pair.view, pair.rows))


def _compare(
    label_set: LabelSet,
    source: Source,
    teacher: Teacher,
    samples: dict[str, SampleRows],
    pairs: list[_Pair],
    compared: "_Compared",
) -> None:
    """Render the views of some pairs, run the teacher, and add its answers to `compared`."""
    images, places = [], []
    for pair in pairs:
        at = len(images)
        places.append((at, at + 1 if len(pair.rows) == 2 else -1))
        images += [
            rendered_view(label_set, source, pair.shard, samples[pair.shard], row, pair.view) for row in pair.rows
        ]
    mix = mix_batch(places, [pair.mix for pair in pairs], len(images))
    num_classes = label_set.num_classes
    answer = teacher.ask(torch.from_numpy(np.stack(images)), mix, num_classes).result()
    prob = np.zeros((len(images), num_classes))
    np.put_along_axis(prob, answer.topk_index, answer.topk_prob, axis=1)
    for number, (pair, row, rows, at) in enumerate(_stored(label_set, pairs)):
        compared.add(
            pair.shard, samples[pair.shard].key[row], pair.view, rows, at, int(answer.hard[number]), prob[number]
        )


def _stored(label_set: LabelSet, pairs: list[_Pair]) -> Iterator[tuple[_Pair, int, LabelRows, int]]:
    """Yield each pair and view with its stored rows and the position in them."""
    for pair in pairs:
        rows = label_set.read(pair.shard, pair.view)
        for row in pair.rows:
            yield pair, row, rows, int(np.searchsorted(rows.row, row))


class _Compared:
    """The accumulated results of comparisons."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self._difference: list[float] = []
        self._flips: list[Flip] = []
        self._has_probabilities = False

    def add(
        self, shard: str, key: str, view: int, rows: LabelRows, at: int, hard: int, prob: NDArray[np.float64]
    ) -> None:
        """Compare one stored label with the teacher's probabilities, float64 [C]."""
        stored, index = rows.topk_prob[at].astype(float), rows.topk_index[at].astype(np.int64)
        self._has_probabilities = bool(len(index))
        tail = float(rows.tail_mass[at]) if len(index) else 1.0
        self.kl.append(_kl(np.append(stored, tail), np.append(prob[index], max(0.0, 1 - prob[index].sum()))))
        self._difference.append(float(np.abs(stored - prob[index]).max(initial=0)))
        if hard != int(rows.hard[at]):
            margins = [_margin(np.sort(prob)[::-1])] + ([_margin(stored)] if len(stored) > 1 else [])
            self._flips.append(Flip(shard, key, view, int(rows.hard[at]), hard, max(margins)))

    def result(self, rounding: float, stored_rounding: float) -> Relabelled:
        """Return the summary of all comparisons."""
        there = self._has_probabilities
        return Relabelled(
            views=len(self.kl),
            agreeing=len(self.kl) - len(self._flips),
            mean_kl=float(np.mean(self.kl)) if there else None,
            max_kl=max(self.kl) if there else None,
            max_difference=max(self._difference) if there else None,
            flips=tuple(sorted(self._flips, key=lambda flip: -flip.margin)),
            rounding=rounding,
            stored_rounding=stored_rounding,
        )


def _margin(falling: NDArray[np.float64]) -> float:
    return float(falling[0] - falling[1]) if len(falling) > 1 else 1.0


def _kl(stored: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Return KL(stored || now) in nats; a probability rounded to 0 counts as the smallest float16."""
    least = 2.0**-24
    stored, now = np.maximum(stored, least), np.maximum(now, least)
    return float(max(0.0, (stored * np.log(stored / now)).sum() - stored.sum() + now.sum()))
