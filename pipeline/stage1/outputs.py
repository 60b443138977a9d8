"""Where stage 1 writes: a folder, or a URL whose local folder is kept in step while several machines write to it."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import LabelSetMismatch, UsageError
from pipeline.labels.manifest import IMAGES_FOLDER, MANIFEST_NAME, PLAN_NAME, Plan, parse_plan
from pipeline.labels.sealing import seal
from pipeline.labels.tables import SampleRows, read_all_views, read_labels_footer, read_samples
from pipeline.settings.configs import PrecomputeConfig
from pipeline.storage.json import read_small
from pipeline.storage.mirror import ChangedElsewhere, Mirror, mirror_of

log = logging.getLogger("deit_cli.outputs")


@contextlib.contextmanager
def mirrored(config: PrecomputeConfig) -> Iterator[Mirror | None]:
    """Bring the label set of an --out that is a URL, and send what is made of it for as long as the block runs.

    Raises:
        UsageError: Ray's workers would write to folders of their own.
    """
    mirror = mirror_of(config.out, config.folder, last=MANIFEST_NAME, shared=True, adopt=check_theirs)
    if mirror is None:
        yield None
        return
    if config.engine == "ray":
        raise UsageError(
            f"--out {config.out}: --engine ray needs an --out that all its machines share as a folder."
            " Push the set afterwards: deit-cli labels push"
        )
    mirror.bring()
    with mirror.sending():
        yield mirror


def commit(
    out: Path,
    plan: Plan,
    blocks: Sequence[range],
    shards: tuple[str, ...] | None,
    *,
    images: bool,
    mirror: Mirror | None,
) -> None:
    """Seal; where another machine has changed the manifest behind a URL meanwhile, seal its views and ours."""
    seal(out, plan, blocks, shards, images=images)
    while mirror is not None:
        try:
            mirror.send(commit=True)
            return
        except ChangedElsewhere as error:
            log.info("%s: sealing once more, with what is there now", error)
            mirror.bring()
            seal(out, plan, blocks, shards, images=images)


def check_theirs(ours: Path, theirs: Path) -> None:
    """Look at another machine's file before it takes the place of ours: whole, and of the same label set and images.

    Raises:
        LabelSetMismatch: it is of another label set, or other images lay under the same keys.
        LabelSetCorrupt: it is damaged.
    """
    if ours.name == PLAN_NAME:
        parse_plan(read_small(ours), ours).check_same(parse_plan(read_small(theirs), theirs), folder=theirs)
    elif ours.parent.name == "samples":
        if not _same(read_samples(ours), read_samples(theirs)):
            raise LabelSetMismatch(
                f"{ours}: another machine has labelled other images under these keys. All machines need the same --data"
            )
    elif ours.parent.name == IMAGES_FOLDER:
        raise LabelSetMismatch(
            f"{ours}: another machine has packed other images, or with another Pillow. All machines need the same --data"
            " and the same versions"
        )
    else:
        mine, other = (read_labels_footer(path).model_dump(exclude=_MAY_DIFFER) for path in (ours, theirs))
        read_all_views(theirs)  # its content hash
        if mine != other:
            raise LabelSetMismatch(
                f"{ours}: another machine's file of this name has other views or rows. Use another --out"
            )


_MAY_DIFFER = {"content_xxh3", "probes", "environment"}  # processors differ in last bits


def _same(mine: SampleRows, theirs: SampleRows) -> bool:
    pairs = ((getattr(mine, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(SampleRows))
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)
