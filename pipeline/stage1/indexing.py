"""The samples files: every image read, decoded once and hashed, before the teacher sees any."""

import logging
import time
from collections.abc import Sequence
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
from pipeline.machine.loaders import Mapped, Whereabouts, checked, start_loader
from pipeline.machine.progress import Progress, Tick
from pipeline.settings.configs import BadImagePolicy
from pipeline.storage.atomic import publish_file

log = logging.getLogger("deit_cli.indexing")


def index_samples(
    out: Path,
    plan: Plan,
    source: Source,
    *,
    shards: Sequence[str],
    on_bad_image: BadImagePolicy,
    workers: int,
    progress: Progress,
) -> dict[str, SampleRows]:
    """Write these source shards' samples files where there are none, and return their samples.

    Raises:
        SourceError: an image cannot be decoded and `on_bad_image` is `fail`; or no image can.
    """
    records = {record.name: record for record in plan.source.shards}
    missing = [name for name in shards if not (out / samples_path(name)).is_file()]
    began = time.monotonic()
    whereabouts = Whereabouts(workers)
    scan = partial(scan_shard, source, missing, on_bad_image, whereabouts)
    loader = start_loader(Mapped(scan, len(missing)), workers=min(workers, len(missing)))
    for done, (name, samples) in enumerate(zip(missing, checked(loader, whereabouts), strict=True)):
        footer = SamplesFooter(labelset_id=plan.labelset_id, source_id=plan.source_id, shard=name, rows=len(samples))
        publish_file(out / samples_path(name), partial(write_samples, samples=samples, footer=footer))
        progress(Tick("index", done + 1, len(missing), time.monotonic() - began, done + 1, unit="source shards"))
    tables = {name: checked_samples(out / samples_path(name), plan, records[name]) for name in shards}
    bad = sum(len(samples) - len(samples.usable) for samples in tables.values())
    if bad:
        log.warning(
            "%d of %d images cannot be decoded and are left out; `deit-cli labels info` names them",
            bad,
            sum(map(len, tables.values())),
        )
    if tables and bad == sum(map(len, tables.values())):
        raise SourceError(f"{source.location}: no image can be decoded")
    return tables


def scan_shard(
    source: Source, names: list[str], on_bad_image: BadImagePolicy, whereabouts: Whereabouts, index: int
) -> SampleRows | Exception:
    """Read, hash and decode all images of a source shard. Errors are returned, so that they cross processes whole."""
    try:
        return _scan(source, names[index], on_bad_image, whereabouts)
    except SourceError as error:
        return error


def _scan(source: Source, name: str, on_bad_image: BadImagePolicy, whereabouts: Whereabouts) -> SampleRows:
    shard = source.shard(name)
    sizes, hashes, shapes, bad = [], [], [], []
    for row in range(len(shard)):
        whereabouts.note(f"image {shard.keys[row]!r} of {name}")
        sample = shard[row]
        sizes.append(len(sample.image))
        hashes.append(xxhash.xxh3_128_digest(sample.image))
        try:
            shapes.append(decode(sample.image, key=sample.key).shape[:2])
            bad.append(None)
        except BadImageError as error:
            if on_bad_image == "fail":
                raise SourceError(
                    f"{error}",
                    fix="Mend the image, or leave such images out with --on-bad-image skip",
                ) from error
            shapes.append((0, 0))
            bad.append(error.reason)
    height, width = np.array(shapes, np.uint32).reshape(-1, 2).T
    return SampleRows(
        shard.keys, shard.class_labels, np.array(sizes, np.uint32), tuple(hashes), height, width, tuple(bad)
    )
