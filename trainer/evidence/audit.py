"""`labels audit`: the images whose class label the teacher contradicts, judged by the stored answers alone.

No image is opened. The label files are read shard by shard and view by view. What is kept of an image is a hash and a place, and
one entry if it is listed: memory grows with the images, not with the views.

**Mixed views.** mixup and CutMix show an image and its partner, so an answer speaks of two classes. Partner and mix of a view
are known (`pipeline.views.pairs`), and three rules follow from them:

1. A view has the weight lam: the share of it that shows the image, 1 if it is not mixed.
2. The class label of the partner does not contradict. It is left out: what counts is the probability of the other classes.
3. If the partner has no class label, it is unknown which answer it explains. Then the view counts only if it shows at least as
   much of the image as of the partner.

With w the weight of a view, p the probability of the image's class label and q that of the partner's (0 if there is none, or if
both are the same), sums over views:

    contradicted = sum(w [the hard label is neither of the two]) / sum(w)
    score = 1 - exp(sum(w (1 - q) ln(p / (1 - q))) / sum(w (1 - q)))

p / (1 - q) is the probability of the class label among the classes that count, at least LEAST, and 1 - q says how much of the answer
they make up. An image is a suspect if `contradicted` is above a half. Suspects are ranked by their score: 1 minus the self-confidence of
confident learning (Northcutt et al., JAIR 70, 2021), averaged over the views by its logarithm. With K = 0 there are no
probabilities, and `contradicted` is the score. `benchmarks/audit.py` compares this score with others. An image of which all views
together show less than half (the sum of w is below a half) is not judged.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LabelSetError, UsageError
from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import pin_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import SampleRows
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter
from pipeline.overview.summary import entropy_of
from pipeline.text import aligned, count, printable, two_columns
from pipeline.views.pairs import pairs_of
from pipeline.views.recipe import Recipe

VERSION = 1  # of audit.json
HALF = 0.5
UNSURE = 0.5  # of the largest entropy, ln C: as unsure as between the square root of C equally probable classes
PENDING = 2**20  # votes that wait to be added up
LEAST = 1e-4  # of a probability, before its logarithm; below, float16 is coarse


@dataclass(frozen=True)
class SeenView:
    """One view of the usable images of a source shard, all arrays in the order of `answers.row`.

    Attributes:
        answers: the teacher's stored answers.
        own: int64 [N], class label of each image; -1 if it has none.
        other: int64 [N], class label of the partner, which does not contradict; -1 if there is no partner, or it has the same class
            label or none.
        shown: float64 [N], lam: the share of the view that shows the image, 0..1.
        weight: float64 [N], `shown`, or 0 if the view does not count (rule 3 above).
    """

    answers: LabelRows
    own: NDArray[np.int64]
    other: NDArray[np.int64]
    shown: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def contradicts(self) -> NDArray[np.bool_]:
        """Whether the hard label is neither the image's class label nor its partner's, bool [N]."""
        hard = self.answers.hard.astype(np.int64)
        return (hard != self.own) & (hard != self.other)


def seen_views(label_set: LabelSet, shard: str, views: range) -> Iterator[SeenView]:
    """Yield the views of a source shard, one after the other."""
    samples = label_set.samples(shard)
    classes = _class_labels(samples)
    for view in views:
        answers = label_set.read(shard, view)
        rows = answers.row.astype(np.int64)
        partner, shown = _partners(label_set.recipe, samples, view)
        partner, shown, own = partner[rows], shown[rows], classes[rows]
        other = np.where(partner >= 0, classes[partner], -1)
        unknown = (partner >= 0) & (other < 0) & (shown < HALF)
        yield SeenView(answers, own, np.where(other == own, -1, other), shown, np.where(unknown, 0.0, shown))


def _partners(recipe: Recipe, samples: SampleRows, view: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the visible partner of each row (int64, -1 for none), and the share of the view that shows the row's image (float64)."""
    partner, shown = np.full(len(samples), -1), np.ones(len(samples))
    if recipe.mixes:
        pairs = pairs_of(recipe, samples.key, samples.usable, view)
        lam = np.array([mix.lam for mix in pairs.mixes(view)])
        mixed = lam < 1
        first, second = pairs.rows[mixed].T
        partner[first], partner[second] = second, first
        shown[first] = shown[second] = lam[mixed]
    return partner, shown


def probability_of(classes: NDArray[np.int64], answers: LabelRows, num_classes: int) -> NDArray[np.float64]:
    """Return the teacher's probability of one class in each row; the tail is spread evenly over the classes that were not kept.

    Args:
        classes: int64 [N]; the probability of -1 is 0.
        answers: N label rows with K > 0.
        num_classes: C.

    Returns:
        float64 [N].
    """
    kept = answers.topk_index == classes[:, None]
    prob = (answers.topk_prob.astype(float) * kept).sum(1)
    rest = answers.tail_mass.astype(float) / max(1, num_classes - kept.shape[1])
    return np.where(kept.any(1), prob, np.where((classes >= 0) & (classes < num_classes), rest, 0.0))


def self_confidence(seen: SeenView, num_classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return p / (1 - q), LEAST..1, and 1 - q, 0..1, float64 [N] each; K must be above 0."""
    room = np.clip(1 - probability_of(seen.other, seen.answers, num_classes), 0, 1)
    own = probability_of(seen.own, seen.answers, num_classes)
    return np.clip(np.divide(own, room, out=np.ones_like(own), where=room > 0), LEAST, 1), room


@dataclass(frozen=True)
class Image:
    """An image of the label set; `row` is that of its samples file."""

    shard: str
    row: int
    key: str
    class_label: int | None


@dataclass(frozen=True)
class Suspect:
    """An image whose class label is contradicted.

    Attributes:
        image: the image.
        answer: the class that contradicts most, by weight.
        score: 0..1, larger is more suspicious.
        contradicted: share of what the views show of the image that contradicts, 0..1.
    """

    image: Image
    answer: int
    score: float
    contradicted: float


@dataclass(frozen=True)
class Unsure:
    """An image of which no view has a clear answer; `entropy` is that of the surest view, 0..1, where 1 is ln C."""

    image: Image
    entropy: float


@dataclass(frozen=True)
class Confused:
    """A class label and the class that the teacher answers instead.

    Attributes:
        class_label: class label.
        answer: class that contradicts most.
        images: number of suspects with both.
        share: their share of all judged images with this class label.
    """

    class_label: int
    answer: int
    images: int
    share: float


@dataclass(frozen=True)
class Audit:
    """What an audit found, each list with the most remarkable entry first.

    Attributes:
        label_set: the label set.
        views: views that were read.
        images: number of usable images.
        labelled: number of those with a class label.
        judged: number of those of which the views show enough.
        suspects: all suspects; empty if no image has a class label.
        confused: the pairs of classes of the suspects.
        unsure: images without a clear answer; empty if K = 0.
        duplicates: groups of byte-equal images; groups with different class labels come first.
    """

    label_set: LabelSet
    views: range
    images: int
    labelled: int
    judged: int
    suspects: list[Suspect]
    confused: list[Confused]
    unsure: list[Unsure]
    duplicates: list[list[Image]]

    @property
    def score(self) -> str:
        """Name of the score that ranks the suspects; `benchmarks/audit.py` compares it with others."""
        return "log_self_confidence" if self.label_set.plan.topk else "contradicted"

    def class_name(self, label: int | None) -> str | None:
        """Return the name of a class; None if it has none."""
        names = self.label_set.class_names
        return None if names is None or label is None or label >= len(names) else names[label]

    def notes(self) -> list[str]:
        """Return what could not be judged, and what looks odd, as sentences."""
        found = []
        if not self.labelled:
            found.append("No image has a class label, so there are no suspects and no confused classes.")
        elif left := self.images - self.labelled:
            found.append(f"{count(left, 'image')} without a class label: never suspects.")
        if left := self.labelled - self.judged:
            found.append(f"{count(left, 'image')} not judged: all views together show less than half of each.")
        if 2 * len(self.suspects) > self.judged:
            found.append(
                "More than half of the class labels are contradicted: are they numbered as the teacher's classes?"
            )
        if not self.label_set.plan.topk:
            found.append(
                "The set has only hard labels (K = 0): the score is the share of contradicting answers, and no image is called unsure."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; a list that cannot be made is None."""
        plan = self.label_set.plan
        return {
            "kind": "audit",
            "version": VERSION,
            "labels": str(self.label_set.place),
            "labelset_id": plan.labelset_id,
            "manifest": pin_of(self.label_set.manifest_sha256),
            "teacher": plan.teacher.name,
            "views": [self.views.start, self.views.stop],
            "topk": plan.topk,
            "images": self.images,
            "labelled": self.labelled,
            "judged": self.judged,
            "score": self.score,
            "suspects": [self._flat(each) for each in self.suspects] if self.labelled else None,
            "confused": [self._flat(each) for each in self.confused] if self.labelled else None,
            "unsure": [self._flat(each) for each in self.unsure] if plan.topk else None,
            "duplicates": [
                {"same_class_label": not differ(group), "images": [self._flat(each) for each in group]}
                for group in self.duplicates
            ],
            "notes": self.notes(),
        }

    def _flat(self, entry: Suspect | Confused | Unsure | Image) -> dict[str, Any]:
        """Return an entry without nesting, with the names of its classes."""
        values = asdict(entry)
        values = values.pop("image", {}) | values
        names = {"class_label": "class_name", "answer": "answer_name"}
        return values | {name: self.class_name(values[field]) for field, name in names.items() if field in values}


def differ(group: Sequence[Image]) -> bool:
    """Return whether copies have different class labels; an image without one differs from none."""
    return len({image.class_label for image in group} - {None}) > 1


def audit(label_set: LabelSet, views: tuple[int, int] | None = None, *, progress: Progress = lambda _: None) -> Audit:
    """Read the answers of a label set, and return what is probably wrong.

    Args:
        label_set: label set; its images are not needed.
        views: first view and the one after the last; None: all.
        progress: function called after each source shard.

    Raises:
        UsageError: the set does not hold these views.
        LabelSetError: the set has no usable image.
        LabelSetCorrupt: a file is damaged.
    """
    chosen = _chosen(label_set, views)
    shards, done = [], ProgressCounter("audit", len(label_set.shards), progress, unit="source shards")
    for name in label_set.shards:
        shards.append(_audit_shard(label_set, name, chosen))
        done()
    if not (images := sum(len(each.rows) for each in shards)):
        raise LabelSetError(f"{label_set.place} has no usable image to audit")
    judged = sum((each.judged for each in shards), Counter())
    suspects = sorted((found for each in shards for found in each.suspects), key=lambda found: -found.score)
    return Audit(
        label_set=label_set,
        views=chosen,
        images=images,
        labelled=sum(each.labelled for each in shards),
        judged=judged.total(),
        suspects=suspects,
        confused=_confused(suspects, judged),
        unsure=sorted((found for each in shards for found in each.unsure), key=lambda found: -found.entropy),
        duplicates=_duplicates(label_set, shards),
    )


def _chosen(label_set: LabelSet, views: tuple[int, int] | None) -> range:
    held = label_set.views
    start, stop = views or (held.start, held.stop)
    if not held.start <= start < stop <= held.stop:
        raise UsageError(
            f"--views must be START:STOP within the labelled views {held.start}:{held.stop}, got {start}:{stop}"
        )
    return range(start, stop)


@dataclass(frozen=True)
class _Findings:
    """What was found in one source shard.

    Attributes:
        rows: int64 [N], the usable rows.
        hashes: uint64 [N, 3], the two halves of the hash of each image, and its length.
        labelled: number of usable images with a class label.
        judged: number of judged images by class label.
        suspects: suspects in row order.
        unsure: unsure images in row order.
    """

    rows: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    labelled: int
    judged: Counter[int]
    suspects: list[Suspect]
    unsure: list[Unsure]


def _audit_shard(label_set: LabelSet, shard: str, views: range) -> _Findings:
    samples = label_set.samples(shard)
    rows = samples.usable
    sums = _Sums(len(rows), label_set)
    for seen in seen_views(label_set, shard, views):
        sums.add(seen)
    classes = _class_labels(samples)[rows]
    judged = (classes >= 0) & (sums.weight >= HALF)
    contradicted, score, answers = sums.contradicted(), sums.score(), sums.votes.winners(len(rows))
    suspects = [
        Suspect(_image(samples, shard, int(rows[at])), int(answers[at]), float(score[at]), float(contradicted[at]))
        for at in np.flatnonzero(judged & (contradicted > HALF))
    ]
    unsure = [
        Unsure(_image(samples, shard, int(rows[at])), float(sums.surest[at]))
        for at in np.flatnonzero(np.isfinite(sums.surest) & (sums.surest >= UNSURE))
    ]
    counts = Counter(classes[judged].tolist())
    return _Findings(rows, _hashes(samples), int((classes >= 0).sum()), counts, suspects, unsure)


class _Sums:
    """What is added up over the views of one source shard, float64 [N] each: a value for each usable image.

    Attributes:
        weight: sum of the weights w.
        against: sum of the weights of the contradicting views.
        logs: sum of w (1 - q) ln(p / (1 - q)).
        room: sum of w (1 - q).
        surest: smallest normalised entropy of the views that show at least as much of the image as of its partner; infinite if none
            do, or if K = 0.
        votes: contradicting answers.
    """

    def __init__(self, size: int, label_set: LabelSet) -> None:
        self._topk, self._classes = label_set.plan.topk, label_set.num_classes
        self.weight, self.against, self.logs, self.room = np.zeros((4, size))
        self.surest = np.full(size, np.inf)
        self.votes = _Votes(self._classes)

    def add(self, seen: SeenView) -> None:
        """Add one view."""
        against = seen.weight * seen.contradicts
        self.weight += seen.weight
        self.against += against
        voters = np.flatnonzero((against > 0) & (seen.own >= 0))
        self.votes.add(voters, seen.answers.hard[voters].astype(np.int64), against[voters])
        if self._topk:
            own, room = self_confidence(seen, self._classes)
            self.logs += seen.weight * room * np.log(own)
            self.room += seen.weight * room
            entropy = entropy_of(seen.answers, self._classes) / math.log(max(2, self._classes))
            np.minimum(self.surest, entropy, out=self.surest, where=seen.shown >= HALF)

    def contradicted(self) -> NDArray[np.float64]:
        """Return the share of what is shown that contradicts, 0..1; 0 if nothing is shown."""
        return np.divide(self.against, self.weight, out=np.zeros_like(self.weight), where=self.weight > 0)

    def score(self) -> NDArray[np.float64]:
        """Return the score, 0..1."""
        if not self._topk:
            return self.contradicted()
        # Where the answers speak of nothing but the partners, nothing is suspicious.
        return 1 - np.exp(np.divide(self.logs, self.room, out=np.zeros_like(self.room), where=self.room > 0))


class _Votes:
    """The weights of answers, by image and class; only pairs that occur are kept."""

    def __init__(self, num_classes: int) -> None:
        self._classes = num_classes
        self._pairs: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._weights: list[NDArray[np.float64]] = [np.empty(0)]
        self._pending = 0

    def add(self, images: NDArray[np.int64], classes: NDArray[np.int64], weights: NDArray[np.float64]) -> None:
        """Add an answer for each of some images."""
        self._pairs.append(images * self._classes + classes)
        self._weights.append(weights)
        self._pending += len(images)
        if self._pending > PENDING:
            self._add_up()

    def _add_up(self) -> None:
        pairs, place = np.unique(np.concatenate(self._pairs), return_inverse=True)
        weights = np.bincount(place, np.concatenate(self._weights), minlength=len(pairs)).astype(float)
        self._pairs, self._weights, self._pending = [pairs], [weights], 0

    def winners(self, size: int) -> NDArray[np.int64]:
        """Return the class with the most weight for each image, int64 [N]; the smallest of equal ones, -1 without an answer."""
        self._add_up()
        (pairs,), (weights,) = self._pairs, self._weights
        images, classes = np.divmod(pairs, self._classes)
        order = np.lexsort((classes, -weights, images))
        first = order[np.flatnonzero(np.diff(images[order], prepend=-1))]
        found = np.full(size, -1)
        found[images[first]] = classes[first]
        return found


def _confused(suspects: Sequence[Suspect], judged: Counter[int]) -> list[Confused]:
    """Return the pairs of class label and answer, those with the most images first."""
    pairs = Counter((each.image.class_label, each.answer) for each in suspects)
    found = [
        Confused(label, answer, images, images / judged[label])
        for (label, answer), images in pairs.items()
        if label is not None
    ]
    return sorted(found, key=lambda pair: (-pair.images, -pair.share, pair.class_label, pair.answer))


def _duplicates(label_set: LabelSet, shards: Sequence[_Findings]) -> list[list[Image]]:
    """Return the groups of images with equal bytes: those with different class labels first, then in the order of the set."""
    hashes = np.concatenate([each.hashes for each in shards])
    number = np.repeat(np.arange(len(shards)), [len(each.rows) for each in shards])
    rows = np.concatenate([each.rows for each in shards])
    _, group, size = np.unique(hashes, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)  # NumPy 2.0 returns a column
    groups: dict[int, list[Image]] = {}
    copies = np.flatnonzero(size[group] > 1)
    for shard in np.unique(number[copies]).tolist():
        name = label_set.shards[shard]
        samples = label_set.samples(name)
        for at in copies[number[copies] == shard].tolist():
            groups.setdefault(int(group[at]), []).append(_image(samples, name, int(rows[at])))
    return sorted(groups.values(), key=lambda images: not differ(images))


def _hashes(samples: SampleRows) -> NDArray[np.uint64]:
    """Return hash and length of the usable encoded images, uint64 [N, 3]."""
    halves = np.frombuffer(b"".join(samples.image_xxh3), "<u8").reshape(-1, 2)
    return np.column_stack([halves, samples.image_bytes.astype(np.uint64)])[samples.usable]


def _image(samples: SampleRows, shard: str, row: int) -> Image:
    return Image(shard, row, samples.key[row], samples.class_label[row])


def _class_labels(samples: SampleRows) -> NDArray[np.int64]:
    """Return the class labels, int64 [N]; -1 for none."""
    return np.array([-1 if label is None else label for label in samples.class_label], np.int64)


# --- the table --------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, ...]]  # headings, then cells


def audit_table(found: Audit, top: int) -> str:
    """Return a summary as text, and as tables the first `top` entries of each list that has any."""
    unsure = "unsure: images without a clear answer in any view (entropy of the surest view, 1 = all classes equal)"
    lists = (
        ("suspects: class labels that most of the answers contradict", found.suspects, _suspect_rows, 3),
        ("confused classes: suspects by class label and answer", found.confused, _confused_rows, 2),
        (unsure, found.unsure, _unsure_rows, 2),
        ("duplicates: images with the same bytes under several keys", found.duplicates, _duplicate_rows, 1),
    )
    parts = [two_columns(list(_summary(found)))]
    for title, entries, rows_of, numbers in lists:
        if entries:
            more = f", the first {top:,} of {len(entries):,}" if len(entries) > top else ""
            rows = rows_of(found, top)
            parts.append(f"{title}{more}\n{aligned(rows, left=range(numbers, len(rows[0])), indent='  ')}")
    return "\n\n".join(parts)


def _summary(found: Audit) -> Iterator[tuple[str, str]]:
    yield "label set", f"{found.label_set.place}, teacher {printable(found.label_set.plan.teacher.name)}"
    yield "read", f"views {found.views.start}:{found.views.stop} of {found.images:,} images"
    if found.labelled:
        share = percent(len(found.suspects) / found.judged) if found.judged else "-"
        yield "suspects", f"{len(found.suspects):,} of {count(found.judged, 'judged class label')} ({share})"
    if found.label_set.plan.topk:
        yield "unsure", f"{count(len(found.unsure), 'image')} ({percent(len(found.unsure) / found.images)})"
    different = sum(map(differ, found.duplicates))
    groups = count(len(found.duplicates), "group")
    yield "duplicates", f"{groups} of byte-equal images, {different:,} with different class labels"
    yield from (("note", note) for note in found.notes())


def _suspect_rows(found: Audit, top: int) -> Rows:
    rows: Rows = [("", "score", "contradicted", "class label", "teacher's answer", "key")]
    for rank, each in enumerate(found.suspects[:top], 1):
        classes = class_text(found, each.image.class_label), class_text(found, each.answer)
        rows.append((f"{rank:,}", f"{each.score:.4f}", percent(each.contradicted), *classes, place(each.image)))
    return rows


def _confused_rows(found: Audit, top: int) -> Rows:
    rows: Rows = [("images", "of the class", "class label", "teacher's answer")]
    for each in found.confused[:top]:
        classes = class_text(found, each.class_label), class_text(found, each.answer)
        rows.append((f"{each.images:,}", percent(each.share), *classes))
    return rows


def _unsure_rows(found: Audit, top: int) -> Rows:
    rows: Rows = [("", "entropy", "class label", "key")]
    for rank, each in enumerate(found.unsure[:top], 1):
        label = class_text(found, each.image.class_label)
        rows.append((f"{rank:,}", f"{each.entropy:.3f}", label, place(each.image)))
    return rows


def _duplicate_rows(found: Audit, top: int) -> Rows:
    """Return a row for each copy; the first of each group has its rank."""
    rows: Rows = [("", "class label", "key")]
    for rank, group in enumerate(found.duplicates[:top], 1):
        for image in group:
            number = f"{rank:,}" if image is group[0] else ""
            rows.append((number, class_text(found, image.class_label), place(image)))
    return rows


def class_text(found: Audit, label: int | None) -> str:
    """Return number and name of a class; `-` for no class label."""
    name = found.class_name(label)
    return "-" if label is None else f"{label} {printable(name)}" if name else str(label)


def place(image: Image) -> str:
    """Return key and source shard of an image."""
    return f"{image.key} ({image.shard})"


def percent(share: float) -> str:
    """Return a share of 0..1 in percent."""
    return f"{100 * share:.1f} %"
