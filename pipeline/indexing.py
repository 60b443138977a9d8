"""The samples files: every image read, decoded once and hashed, before the teacher sees any."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from pipeline.config import BadImagePolicy
from pipeline.decode import decode
from pipeline.errors import BadImageError, SourceError
from pipeline.labels import SampleRows, SamplesFooter, write_samples
from pipeline.labelset import checked_samples
from pipeline.manifest import Plan, samples_path
from pipeline.rendering import MappedRange, checked, start_loader
from pipeline.sources import Source
from pipeline.storage import publish_file

log = logging.getLogger("deit_cli.indexing")

Progress = Callable[[str, int, int], None]  # phase, done, total


def index_samples(
    out: Path, plan: Plan, source: Source, *, on_bad_image: BadImagePolicy, workers: int, progress: Progress
) -> dict[str, SampleRows]:
    """Write each source shard's samples file where there is none, and return the samples of all.

    Raises:
        SourceError: an image cannot be decoded and `on_bad_image` is `fail`; or no image can.
    """
    missing = [record.name for record in plan.source.shards if not (out / samples_path(record.name)).is_file()]
    scan = partial(scan_shard, source, missing, on_bad_image)
    loader = start_loader(MappedRange(scan, len(missing)), workers=min(workers, len(missing)))
    for done, (name, samples) in enumerate(zip(missing, checked(loader), strict=True)):
        footer = SamplesFooter(labelset_id=plan.labelset_id, source_id=plan.source_id, shard=name, rows=len(samples))
        publish_file(out / samples_path(name), partial(write_samples, samples=samples, footer=footer))
        progress("index", done + 1, len(missing))
    tables = {
        record.name: checked_samples(out / samples_path(record.name), plan, record) for record in plan.source.shards
    }
    bad = sum(len(samples) - len(samples.usable) for samples in tables.values())
    if bad:
        log.warning(
            "%d of %d images cannot be decoded and are left out; `deit-cli labels info` names them",
            bad,
            source.num_samples,
        )
    if bad == source.num_samples:
        raise SourceError(f"{source.location}: no image can be decoded")
    return tables


def scan_shard(source: Source, names: list[str], on_bad_image: BadImagePolicy, index: int) -> SampleRows | Exception:
    """Read, hash and decode all images of a source shard. Errors are returned, so that they cross processes whole."""
    try:
        return _scan(source, names[index], on_bad_image)
    except SourceError as error:
        return error


def _scan(source: Source, name: str, on_bad_image: BadImagePolicy) -> SampleRows:
    shard = source.shard(name)
    sizes, hashes, shapes, bad = [], [], [], []
    for row in range(len(shard)):
        sample = shard[row]
        sizes.append(len(sample.image))
        hashes.append(xxhash.xxh3_128_digest(sample.image))
        try:
            shapes.append(decode(sample.image, key=sample.key).shape[:2])
            bad.append(None)
        except BadImageError as error:
            if on_bad_image == "fail":
                raise SourceError(
                    f"{error}. Mend the image, or leave such images out with --on-bad-image skip"
                ) from error
            shapes.append((0, 0))
            bad.append(error.reason)
    height, width = np.array(shapes, np.uint32).reshape(-1, 2).T
    return SampleRows(
        shard.keys, shard.class_labels, np.array(sizes, np.uint32), tuple(hashes), height, width, tuple(bad)
    )
