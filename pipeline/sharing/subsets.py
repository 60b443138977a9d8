"""Subsets: some views, some source shards of a label set, which are a label set again, of the same identity.

A subset keeps the plan, byte for byte, so that its parts can be merged later. What is cut is the manifest alone; the
files that it still lists are copied as they are.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from pipeline.errors import LabelSetIncomplete, UsageError
from pipeline.labels.manifest import FileEntry, Manifest, Plan, Probe, read_probes, shards_of
from pipeline.labels.sealing import MANIFEST_PROBES, thin_probes
from pipeline.labels.tables import Contents, read_labels_footer

NAMED = 8  # values that an error lists, at most


def subset_manifest(
    manifest: Manifest,
    plan: Plan,
    *,
    views: tuple[int, int] | None,
    shards: Sequence[str] | None,
    probes_of: Callable[[FileEntry], Iterable[Probe]],
) -> Manifest:
    """Return the sealed manifest of a part of a sealed set.

    Args:
        manifest: of the set.
        plan: of the set, and of the subset.
        views: start and stop of the views that are wanted; whole blocks come, so they may be more. None: all.
        shards: names of source shards, or patterns of the shell (`train-00*`). None: all that are there.
        probes_of: reads the probes in a label shard's footer. It is called for a few files, and only where none of the
            manifest's own probes is of the subset.

    Raises:
        LabelSetIncomplete: the set is not sealed, or the part has no usable image.
        UsageError: the set does not hold these views, or a name or pattern is of no source shard that is there.
    """
    if not manifest.sealed:
        raise LabelSetIncomplete(
            "only a sealed label set has subsets: run its deit-cli precompute again to complete it"
        )
    held = [record.name for record in shards_of(manifest, plan, "manifest")]
    names = held if shards is None else choose_shards(held, shards)
    blocks = tuple(sorted(manifest.view_blocks)) if views is None else choose_blocks(manifest.view_blocks, views)
    chosen = {*names}, {*blocks}
    files = tuple(entry for entry in manifest.files if _is_in(entry, *chosen))
    probes = tuple(probe for probe in manifest.probes if _probe_is_in(probe, *chosen))
    return manifest.model_copy(
        update={
            "shards": tuple(names) if len(names) < len(plan.source.shards) else None,
            "view_blocks": blocks,
            "files": files,
            "probes": probes or _probes_from_files(files, probes_of),
            "content_sha256": None,
        }
    )


def choose_blocks(view_blocks: Iterable[tuple[int, int]], views: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the blocks that hold the views start..stop - 1, in order; their ends may lie beyond these.

    Raises:
        UsageError: some of these views are in none.
    """
    blocks = sorted(view_blocks)
    start, stop = views
    chosen = tuple(block for block in blocks if block[0] < stop and start < block[1])
    gap = any(a[1] != b[0] for a, b in itertools.pairwise(chosen))
    if not chosen or gap or start < chosen[0][0] or stop > chosen[-1][1] or start >= stop:
        raise UsageError(f"--views {start}:{stop} must lie within the views of the label set, {_runs(blocks)}")
    return chosen


def choose_shards(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the source shards that have one of these names or match one of these patterns, in the order of `names`.

    Raises:
        UsageError: a name or pattern is of none, or there is none to choose.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--shards {pattern!r} is none of the {len(names)} source shards that are there: {_few(names)}"
            )
    if not patterns:
        raise UsageError(f"--shards must name at least one of {len(names)} source shards: {_few(names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def probes_in(file: Contents, entry: FileEntry) -> tuple[Probe, ...]:
    """Return the probes in the footer of a label shard whose bytes were checked."""
    return tuple(read_probes(read_labels_footer(file).probes, entry.path))


def _is_in(entry: FileEntry, names: set[str], blocks: set[tuple[int, int]]) -> bool:
    return entry.shard in names and (entry.kind != "labels" or (entry.view_start, entry.view_stop) in blocks)


def _probe_is_in(probe: Probe, names: set[str], blocks: set[tuple[int, int]]) -> bool:
    return probe.shard in names and any(start <= probe.view < stop for start, stop in blocks)


def _probes_from_files(
    files: Sequence[FileEntry], probes_of: Callable[[FileEntry], Iterable[Probe]]
) -> tuple[Probe, ...]:
    """Return probes of a few label shards, evenly spaced; of all, if those have none (their images are all bad)."""
    labels = [entry for entry in files if entry.kind == "labels" and entry.rows]
    few = labels[:: max(1, -(-len(labels) // MANIFEST_PROBES))]
    for entries in (few, labels):
        if probes := [probe for entry in entries for probe in probes_of(entry)]:
            return thin_probes(probes)
    raise LabelSetIncomplete(
        "none of these source shards has an image that can be decoded: choose others with --shards"
    )


def _runs(blocks: Sequence[tuple[int, int]]) -> str:
    text = ", ".join(f"{start}:{stop}" for start, stop in blocks[:NAMED])
    return f"in blocks {text}" + (f" … {blocks[-1][0]}:{blocks[-1][1]}" if len(blocks) > NAMED else "")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" … {names[-1]}" if len(names) > NAMED else "")
