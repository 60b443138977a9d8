"""Manifests of subsets and unions of label sets. Both are label sets, too: they have all their views of all their source shards."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from pipeline.errors import LabelSetIncomplete, LabelSetMismatch, UsageError
from pipeline.labels.manifest import (
    FileEntry,
    Manifest,
    Plan,
    Probe,
    in_order,
    read_probes,
    shards_of,
    short,
    stored_blocks,
)
from pipeline.labels.sealing import MANIFEST_PROBES, thin_probes
from pipeline.labels.tables import Contents, read_labels_footer

NAMED = 8  # maximum number of values in an error


def subset_manifest(
    manifest: Manifest,
    plan: Plan,
    *,
    views: tuple[int, int] | None,
    shards: Sequence[str] | None,
    probes_of: Callable[[FileEntry], Iterable[Probe]],
) -> Manifest:
    """Return the sealed manifest of a subset of a sealed set.

    Args:
        manifest: manifest of the set.
        plan: plan of the set, and of the subset.
        views: start and stop of the wanted views; the subset has whole blocks, so it may have more. None: all.
        shards: names of source shards, or shell patterns (`train-00*`). None: all shards of the set.
        probes_of: function that reads the probes in a label shard's footer. It is called for a few files, and only if the
            manifest has no probes of the subset.

    Raises:
        LabelSetIncomplete: the set is not sealed, or the subset has no usable image.
        UsageError: the set does not hold these views, or a name or pattern matches no source shard of the set.
    """
    if not manifest.sealed:
        raise LabelSetIncomplete(
            "only a sealed label set has subsets: run deit-cli precompute again to complete the set"
        )
    held = [record.name for record in shards_of(manifest, plan, "manifest")]
    names = held if shards is None else choose_shards(held, shards)
    blocks = manifest.blocks if views is None else choose_blocks(manifest.blocks, views)
    shards_kept, blocks_kept = set(names), set(blocks)
    files = tuple(
        e for e in manifest.files if e.shard in shards_kept and (e.kind != "labels" or e.views in blocks_kept)
    )
    probes = tuple(p for p in manifest.probes if p.shard in shards_kept and any(p.view in block for block in blocks))
    return manifest.model_copy(
        update={
            "shards": tuple(names) if len(names) < len(plan.source.shards) else None,
            "view_blocks": stored_blocks(blocks),
            "files": files,
            "probes": probes or _probes_from_files(files, probes_of),
            "content_sha256": None,
        }
    )


def choose_blocks(blocks: Iterable[range], views: tuple[int, int]) -> list[range]:
    """Return the blocks that hold the views start..stop - 1, in order; the first and last may hold further views.

    Raises:
        UsageError: some of these views are in no block.
    """
    blocks = in_order(blocks)
    start, stop = views
    chosen = [block for block in blocks if block.start < stop and start < block.stop]
    gap = any(a.stop != b.start for a, b in itertools.pairwise(chosen))
    if not chosen or gap or start < chosen[0].start or stop > chosen[-1].stop or start >= stop:
        raise UsageError(f"--views {start}:{stop} must be within the views of the label set, {_runs(blocks)}")
    return chosen


def choose_shards(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the source shards that have one of these names or match one of these patterns, in the order of `names`.

    Raises:
        UsageError: a name or pattern matches no source shard, or no pattern is given.
    """
    known, chosen = set(names), set()
    for pattern in patterns:  # thousands of names may be listed, and none of them is a pattern
        found = {pattern} if pattern in known else {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise UsageError(f"--shards {pattern!r} matches none of the {len(names)} source shards: {_few(names)}")
        chosen |= found
    if not patterns:
        raise UsageError(f"--shards must name at least one of {len(names)} source shards: {_few(names)}")
    return [name for name in names if name in chosen]


def probes_in(file: Contents, entry: FileEntry) -> tuple[Probe, ...]:
    """Return the probes in the footer of a label shard; its bytes must have been checked."""
    return tuple(read_probes(read_labels_footer(file).probes, entry.path))


def _probes_from_files(
    files: Sequence[FileEntry], probes_of: Callable[[FileEntry], Iterable[Probe]]
) -> tuple[Probe, ...]:
    """Return probes of a few evenly spaced label shards, or of all label shards if these have no probes (all images bad)."""
    labels = [entry for entry in files if entry.kind == "labels" and entry.rows]
    few = labels[:: max(1, -(-len(labels) // MANIFEST_PROBES))]
    for entries in (few, labels):
        if probes := [probe for entry in entries for probe in probes_of(entry)]:
            return thin_probes(probes)
    raise LabelSetIncomplete(
        "none of these source shards has an image that can be decoded: choose others with --shards"
    )


def _runs(blocks: Sequence[range]) -> str:
    text = ", ".join(f"{block.start}:{block.stop}" for block in blocks[:NAMED])
    return f"in blocks {text}" + (f" … {blocks[-1].start}:{blocks[-1].stop}" if len(blocks) > NAMED else "")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" … {names[-1]}" if len(names) > NAMED else "")


def contains(large: Manifest, small: Manifest) -> bool:
    """Return whether one set is sealed and has all files and views of another."""
    return large.sealed and set(large.files) >= set(small.files) and set(large.blocks) >= set(small.blocks)


def unite(ours: Manifest, there: Manifest, plan: Plan, *, names: tuple[str, str]) -> Manifest:
    """Return the manifest of a set with the files of both; if one manifest lists all files, it is returned unchanged.

    Args:
        ours: sealed manifest of the set that is transferred.
        there: manifest at the destination, of the same label set.
        plan: plan of both. The result has the `plan_sha256` of `there`, because it will be stored beside that plan.
        names: locations of the two sets, for errors.

    Raises:
        LabelSetIncomplete: `there` is not sealed, or together they leave a gap.
        LabelSetMismatch: the label sets differ, divide views into other blocks, or have different bytes in one file.
    """
    if ours.labelset_id != there.labelset_id:
        raise LabelSetMismatch(
            f"{names[1]} holds label set {short(there.labelset_id)}, {names[0]} holds {short(ours.labelset_id)}",
            fix="Choose another address",
        )
    if not there.sealed:
        raise LabelSetIncomplete(
            f"{names[1]} is not sealed: deit-cli precompute is running there, or was stopped",
            fix="Run deit-cli precompute there again to complete the set, or choose another address",
        )
    ours = ours.model_copy(update={"plan_sha256": there.plan_sha256, "content_sha256": None})
    _check_files(ours, there, names)
    for large, small in ((there, ours), (ours, there)):
        if contains(large, small):
            return large
    held = {record.name for each in (ours, there) for record in shards_of(each, plan, names[0])}
    shards = tuple(record.name for record in plan.source.shards if record.name in held)
    blocks, places = in_order([*ours.blocks, *there.blocks]), {name: at for at, name in enumerate(shards)}
    files = {entry.path: entry for entry in (*there.files, *ours.files)}
    _check_whole(shards, blocks, files.values(), names)
    probes = {(p.shard, p.row, p.view): p for p in (*there.probes, *ours.probes)}
    environments = {repr(sorted(e.items())): e for e in (*there.environments, *ours.environments)}
    return there.model_copy(
        update={
            "shards": shards if len(shards) < len(plan.source.shards) else None,
            "view_blocks": stored_blocks(blocks),
            "files": tuple(sorted(files.values(), key=lambda e: (e.kind != "samples", e.view_start, places[e.shard]))),
            "probes": thin_probes([probes[key] for key in sorted(probes)]),
            "environments": tuple(environments.values()),
            "content_sha256": None,
        }
    )


def _check_files(ours: Manifest, there: Manifest, names: tuple[str, str]) -> None:
    for a, b in itertools.pairwise(in_order([*ours.blocks, *there.blocks])):
        if b.start < a.stop:
            cut = f"{a.start}:{a.stop} and {b.start}:{b.stop}"
            raise LabelSetMismatch(
                f"{names[0]} and {names[1]} divide the same views into different blocks: {cut}",
                fix="Choose another address, or make both with the same --views-per-shard",
            )
    known = {entry.path: entry for entry in there.files}
    for entry in ours.files:
        if (other := known.get(entry.path, entry)) != entry:
            raise LabelSetMismatch(
                f"{entry.path} has SHA-256 {short(entry.sha256)}… in {names[0]} and {short(other.sha256)}… in"
                f" {names[1]}: it was made twice, and processors differ in the last bits",
                fix="Keep one of the two sets, or choose another address",
            )


def _check_whole(
    shards: tuple[str, ...], blocks: list[range], files: Iterable[FileEntry], names: tuple[str, str]
) -> None:
    for a, b in itertools.pairwise(blocks):
        if a.stop != b.start:
            raise LabelSetIncomplete(
                f"{names[0]} and {names[1]} together lack views {a.stop}:{b.start}", fix="Transfer those first"
            )
    files = list(files)
    with_images = {entry.shard for entry in files if entry.kind == "images"}
    if with_images and (lacking := [shard for shard in shards if shard not in with_images]):
        raise LabelSetIncomplete(
            f"{names[0]} and {names[1]} together have the images of some source shards only, not of {lacking[0]!r}",
            fix="Choose another address",
        )
    found = {(entry.shard, entry.view_start, entry.view_stop) for entry in files if entry.kind == "labels"}
    for shard, block in itertools.product(shards, blocks):
        if (shard, block.start, block.stop) not in found:
            raise LabelSetIncomplete(
                f"{names[0]} and {names[1]} together lack views {block.start}:{block.stop} of source shard {shard!r}: a"
                " label set must have all its views of all its source shards",
                fix="Transfer those first, or choose another address",
            )
