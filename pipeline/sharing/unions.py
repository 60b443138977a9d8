"""Unions: one manifest for the files of two sealed sets of one identity, views or source shards made apart."""

import itertools
from collections.abc import Iterable

from pipeline.errors import LabelSetIncomplete, LabelSetMismatch
from pipeline.labels.manifest import FileEntry, Manifest, Plan, shards_of, short
from pipeline.labels.sealing import thin_probes


def contains(large: Manifest, small: Manifest) -> bool:
    """Return whether one sealed set has everything that another has."""
    return large.sealed and set(large.files) >= set(small.files) and set(large.view_blocks) >= set(small.view_blocks)


def unite(mine: Manifest, theirs: Manifest, plan: Plan, *, names: tuple[str, str]) -> Manifest:
    """Return the manifest of a set with the files of both; one of them itself, where that has everything.

    Args:
        mine: sealed.
        theirs: of the same label set.
        plan: of both. The result has the `plan_sha256` of `theirs`, beside whose plan it will stand.
        names: where the two lie, for errors.

    Raises:
        LabelSetIncomplete: `theirs` is not sealed, or together they leave a gap.
        LabelSetMismatch: they are of two label sets, cut views into other blocks, or have other bytes for one file.
    """
    if mine.labelset_id != theirs.labelset_id:
        raise LabelSetMismatch(
            f"{names[1]} holds label set {short(theirs.labelset_id)}, {names[0]} holds {short(mine.labelset_id)}."
            " Choose another address"
        )
    if not theirs.sealed:
        raise LabelSetIncomplete(
            f"{names[1]} is not sealed: a deit-cli precompute is, or was, at work there. Run it again to complete it, or"
            " choose another address"
        )
    mine = mine.model_copy(update={"plan_sha256": theirs.plan_sha256, "content_sha256": None})
    _check_files(mine, theirs, names)
    for large, small in ((theirs, mine), (mine, theirs)):
        if contains(large, small):
            return large
    held = {record.name for each in (mine, theirs) for record in shards_of(each, plan, names[0])}
    shards = tuple(record.name for record in plan.source.shards if record.name in held)
    blocks = sorted({*mine.view_blocks, *theirs.view_blocks})
    files = {entry.path: entry for entry in (*theirs.files, *mine.files)}
    _check_whole(shards, blocks, files.values(), names)
    probes = {(p.shard, p.row, p.view): p for p in (*theirs.probes, *mine.probes)}
    environments = {repr(sorted(e.items())): e for e in (*theirs.environments, *mine.environments)}
    return theirs.model_copy(
        update={
            "shards": shards if len(shards) < len(plan.source.shards) else None,
            "view_blocks": tuple(blocks),
            "files": tuple(
                sorted(files.values(), key=lambda e: (e.kind != "samples", e.view_start, shards.index(e.shard)))
            ),
            "probes": thin_probes([probes[key] for key in sorted(probes)]),
            "environments": tuple(environments.values()),
            "content_sha256": None,
        }
    )


def _check_files(mine: Manifest, theirs: Manifest, names: tuple[str, str]) -> None:
    for (start, stop), (following, end) in itertools.pairwise(sorted({*mine.view_blocks, *theirs.view_blocks})):
        if following < stop:
            raise LabelSetMismatch(
                f"{names[0]} and {names[1]} cut the same views into other blocks: {start}:{stop} and {following}:{end}."
                " Choose another address, or make them with one --views-per-shard"
            )
    known = {entry.path: entry for entry in theirs.files}
    for entry in mine.files:
        if (other := known.get(entry.path, entry)) != entry:
            raise LabelSetMismatch(
                f"{entry.path} has SHA-256 {short(entry.sha256)}… in {names[0]} and {short(other.sha256)}… in {names[1]}:"
                " it was made twice, and processors differ in the last bits. Keep one of the two sets, or choose another address"
            )


def _check_whole(
    shards: tuple[str, ...], blocks: list[tuple[int, int]], files: Iterable[FileEntry], names: tuple[str, str]
) -> None:
    for (_, stop), (following, _) in itertools.pairwise(blocks):
        if stop != following:
            raise LabelSetIncomplete(
                f"{names[0]} and {names[1]} together lack views {stop}:{following}. Bring those first"
            )
    files = list(files)
    with_images = {entry.shard for entry in files if entry.kind == "images"}
    if with_images and (lacking := [shard for shard in shards if shard not in with_images]):
        raise LabelSetIncomplete(
            f"{names[0]} and {names[1]} together have the images of some source shards only, not of {lacking[0]!r}."
            " Choose another address"
        )
    found = {(entry.shard, entry.view_start, entry.view_stop) for entry in files if entry.kind == "labels"}
    for shard, (start, stop) in itertools.product(shards, blocks):
        if (shard, start, stop) not in found:
            raise LabelSetIncomplete(
                f"{names[0]} and {names[1]} together lack views {start}:{stop} of source shard {shard!r}: a label set has"
                " all its views of all its source shards. Bring those first, or choose another address"
            )
