"""Claim, check and seal a label set: the plan is written first, and the manifest last, as the commit."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.errors import LabelSetCorrupt, LabelSetIncomplete, LabelSetMismatch
from pipeline.labels.checked_files import checked_labels_footer
from pipeline.labels.format import IMAGES_FOLDER, INCOMPLETE_SET, MANIFEST_NAME, PLAN_NAME, PULL, damaged_file
from pipeline.labels.manifest import (
    FileEntry,
    Manifest,
    Plan,
    Probe,
    in_order,
    labels_path,
    parse_plan,
    path_of,
    read_manifest,
    read_plan,
    read_probes,
    stored_blocks,
)
from pipeline.labels.tables import SampleRows, read_all_views, read_labels_footer, read_samples
from pipeline.storage.atomic import publish_file, refusals_named, replace_file, sha256_file, sync_folder
from pipeline.storage.json import pretty_json, read_small

MANIFEST_PROBES = 8
_MAY_DIFFER = {"content_xxh3", "probes", "environment"}  # the last bits differ between processors


def claim(out: Path, plan: Plan, blocks: Sequence[range], *, offer: Callable[[], None] = lambda: None) -> None:
    """Write the plan first, create-only, and an open manifest that lists the views to be made.

    Args:
        out: folder of the label set.
        plan: plan of the label set.
        blocks: blocks of views.
        offer: called after the plan is written; if `out` is the working folder of a URL, it may download another machine's plan.
    """
    _refuse_links(out, blocks)
    publish_file(out / PLAN_NAME, pretty_json(plan.model_dump(mode="json")))
    offer()
    read_plan(out).check_same(plan, folder=out)  # another writer may have been first
    opened = Manifest(
        labelset_id=plan.labelset_id,
        plan_sha256=sha256_file(out / PLAN_NAME),
        sealed=False,
        view_blocks=stored_blocks(blocks),
        files=(),
        probes=(),
        environments=(),
    )
    publish_file(out / MANIFEST_NAME, pretty_json(opened.to_json()))


def _refuse_links(out: Path, blocks: Sequence[range]) -> None:
    """Refuse folders of the set that are links: files would be written elsewhere, and readers refuse files outside the set."""
    for folder in (out / "samples", *((out / labels_path("x", block)).parent for block in blocks)):
        if not folder.resolve().is_relative_to(out.resolve()):
            raise LabelSetCorrupt(
                f"{folder} points outside the label set: nothing is written there", fix="Delete the link"
            )


def seal(
    out: Path, plan: Plan, blocks: Sequence[range], shards: tuple[str, ...] | None = None, *, images: bool = False
) -> None:
    """List every complete file with its hash, and replace the manifest: the commit.

    Args:
        out: folder of the set; if it has a sealed manifest, the blocks of views in it are listed, too.
        plan: plan of the label set.
        blocks: blocks of views, all complete.
        shards: names of the source shards in the set, in the plan's order; None: all.
        images: whether the set holds its images; sealed images stay in the set.
    """
    known = set(blocks)
    manifest = None
    # Hashing takes minutes. Another run may seal other views meanwhile; they are included, so that they are not lost.
    while manifest is None or not known.issuperset(_sealed_blocks(out)):
        known |= _sealed_blocks(out)
        manifest = _list_files(out, plan, in_order(known), shards, images)
    one_of_each = {(entry.kind, entry.views): entry for entry in manifest.files}  # the files of a folder
    listed = {folder for entry in one_of_each.values() for folder in (out / entry.path).parents}
    for folder in sorted(folder for folder in listed if folder.is_relative_to(out)):
        sync_folder(folder)  # a killed run may have named its last file without syncing the folder
    replace_file(out / MANIFEST_NAME, pretty_json(manifest.to_json()))


def check_complete(manifest: Manifest, shards: Sequence[str], place: object) -> None:
    """Raise unless a set is sealed, and its manifest lists the samples of each source shard and labels for each block.

    Args:
        manifest: manifest of the set.
        shards: names of the source shards in the set.
        place: location of the set, for errors.

    Raises:
        LabelSetIncomplete: the set is not sealed, or its views have a gap.
        LabelSetCorrupt: the manifest lists other files.
    """
    if not manifest.sealed:
        raise LabelSetIncomplete(f"{place} is not sealed: some of its labels do not exist yet", fix=INCOMPLETE_SET)
    blocks = manifest.blocks
    if not blocks:
        raise LabelSetIncomplete(f"{place} holds no views")
    if any(a.stop != b.start for a, b in itertools.pairwise(blocks)):
        held = ", ".join(f"{block.start}:{block.stop}" for block in blocks)
        raise LabelSetIncomplete(f"{place}: its views {held} have a gap", fix="Compute the missing ones with --views")
    wanted = len(shards) * (1 + len(blocks))
    if wanted > 1000 + 2 * len(manifest.files):  # the product of two long lists may exceed the memory
        raise LabelSetCorrupt(
            f"{place}: the sealed manifest lists {len(manifest.files)} files, {len(shards)} source"
            f" shards and {len(blocks)} blocks of views need {wanted}"
        )
    expected = {("samples", name, 0, 0) for name in shards}
    if any(entry.kind == "images" for entry in manifest.files):
        expected |= {("images", name, 0, 0) for name in shards}
    expected |= {("labels", name, block.start, block.stop) for name in shards for block in blocks}
    found = {(e.kind, e.shard, e.view_start, e.view_stop) for e in manifest.files}
    for what, difference in (("lacks", expected - found), ("has an unknown", found - expected)):
        if difference:
            kind, shard, *_ = sorted(difference)[0]
            raise LabelSetCorrupt(f"{place}: the sealed manifest {what} {kind} file of {shard!r}")


def _sealed_blocks(out: Path) -> set[range]:
    sealed = sealed_manifest(out)
    return set(sealed.blocks) if sealed else set()


def _list_files(
    out: Path, plan: Plan, blocks: Sequence[range], chosen: tuple[str, ...] | None, images: bool
) -> Manifest:
    """Return the manifest of these blocks of views and source shards, after checking each of their files."""
    for block, following in itertools.pairwise(blocks):
        if following.start < block.stop:
            raise LabelSetMismatch(
                f"{out}: another run has meanwhile sealed views {block.start}:{block.stop} in blocks of another size",
                fix="Run the same command again: it uses those",
            )
    shards = dict.fromkeys(chosen or (shard.name for shard in plan.source.shards))
    records = [record for record in plan.source.shards if record.name in shards]
    files = [_entry(out, "samples", record.name, rows=record.num_samples) for record in records]
    probes: list[Probe] = []
    environments: list[dict[str, str]] = []
    for block in blocks:
        for name in shards:
            path = out / labels_path(name, block)
            footer = checked_labels_footer(path, plan, name, block)
            files.append(_entry(out, "labels", name, rows=footer.rows_per_view * len(block), views=block))
            probes += read_probes(footer.probes, path)
            environments += [footer.environment] if footer.environment not in environments else []
    if sealed := sealed_manifest(out):
        _check_same_samples(sealed, files, out)
    known = {entry.shard: entry for entry in sealed.files if entry.kind == "images"} if sealed else {}
    if images or known:  # a tar is hashed only once: a later manifest keeps its first hash
        files += [known.get(each.name) or _entry(out, "images", each.name, rows=each.num_samples) for each in records]
    return Manifest(
        labelset_id=plan.labelset_id,
        plan_sha256=sha256_file(out / PLAN_NAME),
        sealed=True,
        shards=chosen,
        view_blocks=stored_blocks(blocks),
        files=tuple(files),
        probes=thin_probes(probes),
        environments=tuple(environments),
    )


def thin_probes(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return at most MANIFEST_PROBES of the probes of all label shards, evenly spaced."""
    return tuple(probes[:: max(1, -(-len(probes) // MANIFEST_PROBES))])


def check_untouched(out: Path, blocks: Sequence[range]) -> None:
    """Raise LabelSetCorrupt if a sealed file has changed: a new manifest must not list it. A missing file is made again."""
    sealed = sealed_manifest(out)
    looked_at = {(block.start, block.stop) for block in blocks}
    for entry in sealed.files if sealed else ():
        path, views = out / entry.path, (entry.view_start, entry.view_stop)
        if entry.kind == "images":  # its sealed entry stays, so a new manifest makes no new promise about its bytes
            if path.is_file() and path.stat().st_size != entry.bytes:
                raise LabelSetCorrupt(f"{path} was changed after it was sealed: delete it and run again")
            continue
        if path.is_file() and sha256_file(path) != entry.sha256:
            raise LabelSetCorrupt(f"{path} was changed after it was sealed", fix=damaged_file(entry.views))
        if not path.is_file() and entry.kind == "labels" and views not in looked_at:
            raise LabelSetCorrupt(
                f"{path} is missing: run with --views {views[0]}:{views[1]} first, which makes it again, or {PULL}"
            )


def _check_same_samples(sealed: Manifest, files: list[FileEntry], out: Path) -> None:
    """Check that the sealed samples files are unchanged: they name the images of the older labels."""
    found = {entry.path: entry for entry in files}
    for old in sealed.files:
        if old.kind == "samples" and old.path not in found:
            raise LabelSetMismatch(
                f"{out}: another run has meanwhile sealed further source shards, such as {old.shard!r}",
                fix="Run the same command again: it uses those",
            )
        if old.kind == "samples" and found[old.path] != old:
            raise LabelSetMismatch(
                f"{out / old.path} was made again, and differs from the sealed file: the images are not"
                " those that were labelled, or another pyarrow wrote it",
                fix="Choose another --out",
            )


def _entry(
    out: Path, kind: Literal["samples", "labels", "images"], shard: str, *, rows: int, views: range = range(0)
) -> FileEntry:
    path = out / path_of(kind, shard, views)
    return FileEntry(
        kind=kind,
        shard=shard,
        view_start=views.start,
        view_stop=views.stop,
        rows=rows,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )


def sealed_manifest(out: Path) -> Manifest | None:
    """Return the manifest of a folder if it exists and is sealed, or None."""
    with refusals_named(out):
        there = (out / MANIFEST_NAME).is_file()
    if not there:
        return None
    manifest = read_manifest(out)
    return manifest if manifest.sealed else None


def check_replaceable(ours: Path, other: Path) -> None:
    """Check a file of another machine before it replaces ours: it must be complete, with the same label set and images.

    Raises:
        LabelSetMismatch: the file is of another label set, or had other images under the same keys.
        LabelSetCorrupt: the file is damaged.
    """
    if ours.name == PLAN_NAME:
        parse_plan(read_small(ours), ours).check_same(parse_plan(read_small(other), other), folder=other)
    elif ours.parent.name == "samples":
        if not _same(read_samples(ours), read_samples(other)):
            raise LabelSetMismatch(
                f"{ours}: another machine has labelled other images under these keys",
                fix="All machines need the same --data",
            )
    elif ours.parent.name == IMAGES_FOLDER:
        raise LabelSetMismatch(
            f"{ours}: another machine has packed other images, or has used another Pillow",
            fix="All machines need the same --data and the same versions",
        )
    else:
        ours_says, other_says = (read_labels_footer(path).model_dump(exclude=_MAY_DIFFER) for path in (ours, other))
        read_all_views(other)  # checks its content hash
        if ours_says != other_says:
            raise LabelSetMismatch(
                f"{ours}: another machine's file of this name has other views or rows", fix="Use another --out"
            )


def _same(ours: SampleRows, other: SampleRows) -> bool:
    pairs = ((getattr(ours, f.name), getattr(other, f.name)) for f in dataclasses.fields(SampleRows))
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)
