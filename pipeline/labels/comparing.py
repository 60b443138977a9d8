"""Check that a source is the labelled one, and name the differences of a copy: shards, classes, keys, images.

Copies of one collection can differ in ways that are easy to miss: a missing image, another order, other bytes under the same
key. A hash only shows that two copies differ; to repair a copy, people need the names.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from pipeline.errors import LabelSetMismatch, SourceError
from pipeline.images.class_names import ORDERS
from pipeline.images.source import Source, SourceOptions, SourceShard
from pipeline.labels.combined import Labels
from pipeline.labels.manifest import ShardRecord, SourceRecord, short
from pipeline.labels.tables import SampleRows
from pipeline.storage.json import canonical_json
from pipeline.storage.urls import local_path
from pipeline.text import first_few


def check_source(label_set: Labels, source: Source) -> None:
    """Raise LabelSetMismatch unless the source has the keys, class labels and class names that were labelled.

    If the set holds only some source shards, the source may have only these or more. Reading the keys of a remote source would
    mean to download all of it, so only its names of shards and classes are compared here; keys and bytes are compared image by
    image when they are used.
    """
    source = labelled_part(label_set, source)
    found = None if source.is_remote else record_of(source)
    classes, names = label_set.source_record.class_names, tuple(shard.name for shard in source.shards)
    same = (source.class_names, names) == (classes, label_set.shards)
    if same and (found is None or all(map(partial(_is_same, label_set, source), found.shards, label_set.records))):
        return
    differences = [
        compare_names("class", classes, source.class_names),
        compare_names("shard", label_set.shards, names),
        *([] if found is None else _compare_keys(label_set, source, found)),
    ]
    other = "" if found is None or label_set.is_part else f" (id {short(found.id)})"
    raise _another(label_set, f"{source.location}{other}", differences, fix="Pass the --data that was labelled")


def check_names(label_set: Labels, source: Source) -> None:
    """Raise LabelSetMismatch unless the source has the source shards and the class names that were labelled.

    This takes milliseconds, because no key is read. `check_shard` compares the rest when a source shard is first used.
    """
    names = tuple(shard.name for shard in labelled_part(label_set, source).shards)
    if (source.class_names, names) != (label_set.source_record.class_names, label_set.shards):
        check_source(label_set, source)  # it names the samples of the missing or new source shards, too


def check_shard(label_set: Labels, source: Source, name: str, samples: SampleRows) -> None:
    """Raise LabelSetMismatch unless one source shard has the keys and class labels that were labelled.

    Training uses the class labels of the label set, so a copy may have lost all of its own, but may not have others.

    Args:
        label_set: the label set, for the error.
        source: the source.
        name: name of the source shard.
        samples: its samples, from the label set.
    """
    shard = source.shard(name)
    keys, labels, labelled = list(shard.keys), list(shard.class_labels), list(samples.class_label)
    if labels.count(None) == len(labels):
        labelled = [None] * len(labelled)
    if keys == list(samples.key) and labels == labelled:
        return
    if source.kind == "folder":  # one image more or less moves all later ones, so one source shard does not show which
        check_source(label_set, source)
    comparison = Comparison()
    comparison.add(name, Listing(list(samples.key), labelled), Listing(keys, labels))
    differences = comparison.result().describe(limit=3)
    fix = "Pass the --data that was labelled; deit-cli labels verify --data lists all differences"
    raise _another(label_set, source.location, differences, fix=fix)


def _another(label_set: Labels, location: str, differences: Sequence[str], *, fix: str) -> LabelSetMismatch:
    """Return the error for a source that is not the labelled one."""
    return LabelSetMismatch(
        f"{label_set.place} was made from source {short(label_set.source_record.id)}, {location} is another:"
        f" {'; '.join(filter(None, differences))}",
        fix=fix,
    )


def _is_same(label_set: Labels, source: Source, found: ShardRecord, labelled: ShardRecord) -> bool:
    """Return whether a source shard has the keys and class labels that were labelled; it may have lost all class labels.

    Labels from a labels file are in no copy of the images, and those of the label set are used anyway.
    """
    if found == labelled:
        return True
    shard = source.shard(found.name)
    return not has_labels(shard.class_labels) and list(shard.keys) == list(label_set.samples(labelled.name).key)


def has_labels(class_labels: Sequence[int | None]) -> bool:
    """Return whether any sample has a class label."""
    return any(label is not None for label in class_labels)


def listing_of(shard: SourceShard[Any], labelled: SampleRows | None, hashes: Sequence[bytes] = ()) -> "Listing":
    """Return the listing of a source shard of a copy; without class labels of its own it has those that were labelled."""
    if labelled is None or has_labels(shard.class_labels):
        return Listing(shard.keys, shard.class_labels, hashes)
    known = dict(zip(labelled.key, labelled.class_label, strict=True))
    return Listing(shard.keys, [known.get(key) for key in shard.keys], hashes)


def _compare_keys(label_set: Labels, source: Source, found: SourceRecord) -> list[str]:
    """Return the differing samples of a local source as text; only the samples files of differing source shards are read."""
    comparison = Comparison()
    labelled, others = ({record.name: record for record in records} for records in (label_set.records, found.shards))
    for name in dict.fromkeys((*labelled, *others)):
        if labelled.get(name) != others.get(name):
            table = label_set.samples(name) if name in labelled else None
            shard = source.shard(name) if name in others else None
            comparison.add(
                name,
                Listing(table.key, table.class_label) if table else Listing(),
                Listing() if shard is None else listing_of(shard, table),
            )
    return comparison.result().describe(limit=3)


def labelled_part(label_set: Labels, source: Source) -> Source:
    """Return the labelled part of a source: all of it, or only the source shards in the label set.

    Raises:
        LabelSetMismatch: the source lacks one of these source shards.
    """
    if not label_set.is_part:
        return source
    found = {shard.name for shard in source.shards}
    if lacking := [name for name in label_set.shards if name not in found]:
        raise LabelSetMismatch(
            f"{label_set.place} has {len(label_set.shards)} source shards, and {source.location} lacks"
            f" {len(lacking)} of them, such as {lacking[0]!r}",
            fix="Pass the --data that was labelled, or a part of it with these source shards",
        )
    return source.only(label_set.shards)


def record_of(source: Source) -> SourceRecord:
    """Return the record of a source for plan and manifest."""
    path = local_path(source.location)
    location = source.location if path is None else os.path.abspath(source.location)
    record = source.identity() | {"kind": source.kind, "location": location, **_reading_of(source.options)}
    try:
        return SourceRecord.model_validate_json(canonical_json(record))
    except (ValidationError, UnicodeEncodeError) as error:
        raise SourceError(
            f"{source.location!r} cannot be recorded in a label set: {' '.join(str(error).split())[:200]}"
        ) from error


def _reading_of(options: SourceOptions) -> dict[str, Any]:
    """Return the field `reading` of a source's record; nothing for a source that is read without options.

    A labels file is not recorded (nor its columns), nor is a file of class names: the label set holds what they said.
    """
    root = options.image_root
    reading = {
        "image_key": options.image_key,
        "label_key": options.label_key if options.labels_file is None else None,
        "image_root": root if root is None or local_path(root) is None else os.path.abspath(root),
        "class_depth": options.class_depth,
        "class_order": options.class_order if options.class_order in ORDERS else None,
    }
    reading = {name: value for name, value in reading.items() if value is not None}
    return {"reading": reading} if reading else {}


@dataclass(frozen=True)
class Listing:
    """The samples of one source shard in order, as sequences of equal length.

    Attributes:
        keys: sample keys.
        class_labels: class labels, None if unlabelled.
        hashes: XXH3-128 of the encoded images, 16 bytes each; empty if the images were not read.
    """

    keys: Sequence[str] = ()
    class_labels: Sequence[int | None] = ()
    hashes: Sequence[bytes] = ()


@dataclass
class Differences:
    """The differences of a copy, sample by sample; each sample is named `'key' of shard`.

    Attributes:
        missing: labelled samples that are not in the copy.
        new: samples of the copy that were not labelled.
        moved: samples in another order, or in another source shard.
        relabelled: samples with another class label, with both labels.
        changed: samples whose images have other bytes.
    """

    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def sort(self) -> None:
        """Sort the names of each kind, because source shards may be added in any order."""
        for names in (self.missing, self.new, self.moved, self.relabelled, self.changed):
            names.sort()

    def describe(self, limit: int) -> list[str]:
        """Return a line for each kind of difference: its number and the first `limit` names; no lines without differences."""
        kinds = (
            ("missing", self.missing),
            ("new", self.new),
            ("in another place (same keys, other order)", self.moved),
            ("with another class label", self.relabelled),
            ("with other image bytes", self.changed),
        )
        return [f"{_count(len(names))} {what}: {first_few(names, limit)}" for what, names in kinds if names]


@dataclass(frozen=True)
class _Place:
    """The position of a sample: its source shard, its class label, and the hash of its image (None if it was not read)."""

    shard: str
    class_label: int | None
    xxh3: bytes | None


class Comparison:
    """Comparison of two sources, one source shard at a time; only samples without a counterpart in their shard are kept."""

    def __init__(self) -> None:
        self._found = Differences()
        self._labelled: defaultdict[str, list[_Place]] = defaultdict(list)
        self._in_copy: defaultdict[str, list[_Place]] = defaultdict(list)

    def add(self, shard: str, labelled: Listing, copy: Listing) -> None:
        """Add one source shard, as labelled and as in the copy; the listing of a missing shard is empty."""
        places = {key: at for at, key in enumerate(copy.keys)}
        both = {key: (at, places[key]) for at, key in enumerate(labelled.keys) if key in places}
        stayed = _longest_rise([there for _, there in both.values()])
        for key, (at, there) in both.items():
            self._compare(key, _place(shard, labelled, at), _place(shard, copy, there))
            if there not in stayed:
                self._found.moved.append(_named(key, shard))
        for listing, rest in ((labelled, self._labelled), (copy, self._in_copy)):
            for at, key in enumerate(listing.keys):
                if key not in both:
                    rest[key].append(_place(shard, listing, at))

    def result(self) -> Differences:
        """Return all differences, after every source shard was added."""
        for key, places in self._labelled.items():
            copies = self._in_copy.pop(key, [])
            for labelled, copy in zip(places, copies, strict=False):
                self._found.moved.append(f"{_named(key, labelled.shard)} (now in {copy.shard})")
                self._compare(key, labelled, copy)
            self._found.missing += [_named(key, place.shard) for place in places[len(copies) :]]
            self._found.new += [_named(key, place.shard) for place in copies[len(places) :]]
        self._found.new += [_named(key, place.shard) for key, places in self._in_copy.items() for place in places]
        self._labelled.clear()
        self._in_copy.clear()
        return self._found

    def _compare(self, key: str, labelled: _Place, copy: _Place) -> None:
        name = _named(key, labelled.shard)
        if labelled.class_label != copy.class_label:
            self._found.relabelled.append(f"{name} ({_label(copy)}, labelled as {_label(labelled)})")
        if None not in (labelled.xxh3, copy.xxh3) and labelled.xxh3 != copy.xxh3:
            self._found.changed.append(name)


def compare_names(what: str, labelled: Sequence[str] | None, copy: Sequence[str] | None, limit: int = 3) -> str:
    """Return the differences of names and their order as text; empty if they are equal.

    Args:
        what: `shard` or `class`.
        labelled: names in the label set; None if it has no names.
        copy: names in the copy; None if it has no names.
        limit: maximum number of names to give.
    """
    plural = {"class": "classes"}.get(what, f"{what}s")
    if (labelled is None) == (copy is None) and list(labelled or ()) == list(copy or ()):
        return ""
    if labelled is None or copy is None:
        here, there = ("no names", "names") if labelled is None else ("names", "no names")
        return f"the labelled {plural} have {here}, those of the copy have {there}"
    known, found = set(labelled), set(copy)
    missing = first_few([repr(name) for name in labelled if name not in found], limit)
    new = first_few([repr(name) for name in copy if name not in known], limit)
    if missing or new:
        lacks, has = f"lacks the {what} {missing}" if missing else "", f"has the new {what} {new}" if new else ""
        return f"the copy {' and '.join(filter(None, (lacks, has)))}"
    at = next((at for at, (a, b) in enumerate(zip(labelled, copy, strict=False)) if a != b), None)
    if at is None:
        return f"the copy has {len(copy)} {plural}, {len(labelled)} were labelled"
    return f"the {plural} are in another order: number {at} is {copy[at]!r}, labelled as {labelled[at]!r}"


def _longest_rise(places: Sequence[int]) -> set[int]:
    """Return the members of a longest rising subsequence: the samples that kept their order.

    Otherwise, moving one sample to the end would count as moving all samples. Fredman, Discrete Mathematics 11 (1975).
    """
    ends: list[int] = []  # the smallest last member of a rise of each length
    lengths = []
    for place in places:
        length = bisect_left(ends, place)
        ends[length : length + 1] = [place]
        lengths.append(length)
    rise: set[int] = set()
    for place, length in zip(reversed(places), reversed(lengths), strict=True):
        if length == len(ends) - 1 - len(rise):
            rise.add(place)
    return rise


def _place(shard: str, listing: Listing, at: int) -> _Place:
    return _Place(shard, listing.class_labels[at], listing.hashes[at] if listing.hashes else None)


def _named(key: str, shard: str) -> str:
    return f"{key!r} of {shard}"


def _label(place: _Place) -> str:
    return "unlabelled" if place.class_label is None else f"class {place.class_label}"


def _count(number: int) -> str:
    return f"{number:,} {'sample is' if number == 1 else 'samples are'}"
