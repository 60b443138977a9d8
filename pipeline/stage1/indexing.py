"""Write the samples files: every image is read, decoded once and hashed before the teacher sees any image."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from pipeline.errors import BadImageError, SourceError
from pipeline.images.decode import decode
from pipeline.images.source import Source
from pipeline.labels.checked_files import checked_samples
from pipeline.labels.manifest import Plan, samples_path
from pipeline.labels.tables import SampleRows, SamplesFooter, write_samples
from pipeline.machine.loaders import Made, Note, in_processes
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter
from pipeline.settings.configs import BadImagePolicy
from pipeline.storage.atomic import publish_file

log = logging.getLogger("deit_cli.indexing")


@dataclass(frozen=True)
class Reading:
    """The settings for reading images before they are labelled.

    Attributes:
        source: the images.
        shards: names of the source shards to read, in the order in which they are used.
        on_bad_image: `fail` stops at an image that cannot be decoded, `skip` leaves it out.
        workers: loader processes.
        progress: receives the number of source shards that are read.
    """

    source: Source
    shards: tuple[str, ...]
    on_bad_image: BadImagePolicy
    workers: int
    progress: Progress

    def each(self, phase: str, work: Callable[[str, Note], Made], shards: Sequence[str]) -> Iterator[tuple[str, Made]]:
        """Yield each source shard with the result of `work(name, note)`, and report progress."""
        count_one = ProgressCounter(phase, len(shards), self.progress, unit="source shards")
        made = in_processes(work, shards, workers=min(self.workers, len(shards)))
        for result in zip(shards, made, strict=True):
            yield result
            count_one()


@dataclass
class Census:
    """Counts of the samples of many source shards. The samples themselves are not kept: they would take gigabytes.

    Attributes:
        usable: number of usable samples of each source shard, by its name.
        images: number of all samples.
        neighbours: number of pairs of neighbours in a source shard that both have a class label.
        same_class: number of these pairs whose class labels are equal.
        classes: the class labels that occur, and None if a sample has none.
    """

    usable: dict[str, int] = field(default_factory=dict)
    images: int = 0
    neighbours: int = 0
    same_class: int = 0
    classes: set[int | None] = field(default_factory=set)

    def add(self, name: str, samples: SampleRows) -> None:
        """Count the samples of one source shard."""
        self.usable[name] = len(samples.usable)
        self.images += len(samples)
        labels = list(samples.class_label)
        pairs = [(a, b) for a, b in itertools.pairwise(labels) if a is not None and b is not None]
        self.neighbours += len(pairs)
        self.same_class += sum(a == b for a, b in pairs)
        self.classes.update(labels)

    @property
    def bad(self) -> int:
        """Number of samples whose image cannot be decoded."""
        return self.images - sum(self.usable.values())


def index_samples(out: Path, plan: Plan, reading: Reading) -> Census:
    """Write the samples files that are missing for these source shards, check all of them, and return what they hold.

    Raises:
        SourceError: an image cannot be decoded and `on_bad_image` is `fail`; or no image can be decoded.
    """
    source, shards = reading.source, reading.shards
    missing = [name for name in shards if not (out / samples_path(name)).is_file()]
    for name, samples in reading.each("index", partial(scan_shard, source, reading.on_bad_image), missing):
        footer = SamplesFooter(labelset_id=plan.labelset_id, source_id=plan.source_id, shard=name, rows=len(samples))
        publish_file(out / samples_path(name), partial(write_samples, samples=samples, footer=footer))
    census = Census()
    for name in shards:
        census.add(name, checked_samples(out / samples_path(name), plan, name))
    if census.bad:
        log.warning(
            "%d of %d images cannot be decoded and are left out; `deit-cli labels info` lists them",
            census.bad,
            census.images,
        )
    if shards and census.bad == census.images:
        raise SourceError(f"{source.location}: no image can be decoded")
    return census


def scan_shard(source: Source, on_bad_image: BadImagePolicy, name: str, note: Note) -> SampleRows:
    """Read, hash and decode all images of a source shard, and return its samples.

    Raises:
        SourceError: an image cannot be read; or it cannot be decoded and `on_bad_image` is `fail`.
    """
    shard = source.shard(name)
    sizes, hashes, shapes, bad = [], [], [], []
    for row in range(len(shard)):
        note(f"image {shard.keys[row]!r} of {name}")
        sample = shard[row]
        sizes.append(len(sample.image))
        hashes.append(xxhash.xxh3_128_digest(sample.image))
        try:
            shapes.append(decode(sample.image, key=sample.key).shape[:2])
            bad.append(None)
        except BadImageError as error:
            if on_bad_image == "fail":
                raise SourceError(
                    f"{error}", fix="Repair the image, or pass --on-bad-image skip to leave such images out"
                ) from error
            shapes.append((0, 0))
            bad.append(error.reason)
    height, width = np.array(shapes, np.uint32).reshape(-1, 2).T
    return SampleRows(
        shard.keys, shard.class_labels, np.array(sizes, np.uint32), tuple(hashes), height, width, tuple(bad)
    )
