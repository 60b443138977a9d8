"""Self-contained sets: pack the images of a source into tars of the label set, before the packed images are labelled.

A tar has the keys, class labels and order of its source shard, so that plan and ids are the same with and without packing.
The comment of a tar says how its images were made. Like every file of a set, a tar is published only when complete.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from pipeline.errors import BadImageError, LabelSetError, LabelSetMismatch, SourceError, UsageError
from pipeline.images.decode import JPEG_QUALITY, decode, shrink
from pipeline.images.samples import Sample, keys_sha256
from pipeline.images.source import Source, SourceShard
from pipeline.images.tar_archive import check_member_key, member_extension, read_comment, write_tar
from pipeline.images.tars import TarShard
from pipeline.labels.checked_files import checked_samples
from pipeline.labels.format import IMAGES_FOLDER
from pipeline.labels.manifest import Plan, images_path, samples_path
from pipeline.labels.sealing import sealed_manifest
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import Note
from pipeline.settings.configs import ORIGINAL, BadImagePolicy
from pipeline.stage1.indexing import Reading
from pipeline.storage.atomic import publish_file, refusals_named, sha256_file
from pipeline.storage.place import LocalFile

log = logging.getLogger("deit_cli.packing")

_COMMENT = "deit-cli images: "
_AS_THEY_WERE = "the original files"


@dataclass(frozen=True)
class Packing:
    """The way in which images are packed.

    Attributes:
        shorter: larger images are shrunk until their shorter side has so many pixels; None: their bytes are kept.
    """

    shorter: int | None

    @property
    def text(self) -> str:
        """The packing in words, for people."""
        if self.shorter is None:
            return _AS_THEY_WERE
        return f"shorter side at most {self.shorter} px: Pillow bicubic, JPEG quality {JPEG_QUALITY} 4:2:0"

    @property
    def changes(self) -> str | None:
        """The changes made to the images; None: no changes."""
        return None if self.shorter is None else self.text

    @property
    def comment(self) -> str:
        """The comment of every tar that is packed in this way."""
        return _COMMENT + self.text

    @property
    def option(self) -> str:
        """The command-line option for this packing."""
        return f"--include-images {self.shorter or ORIGINAL}"


def plan_packing(out: Path, include_images: str | None) -> Packing | None:
    """Return how the images of a set are packed; None if it has no images and none are requested.

    A set with images keeps them: new views are made from the same images.

    Args:
        out: folder of the set, existing or new.
        include_images: the requested packing, `original` or a number of pixels; None: no packing.

    Raises:
        LabelSetMismatch: the images of the set are packed in another way.
        UsageError: the set was begun with images, and now none are requested.
    """
    found = _packed_as(out)
    asked = Packing(None if include_images == ORIGINAL else int(include_images)) if include_images else None
    sealed = sealed_manifest(out)
    if sealed is not None and asked is None:
        return found if any(entry.kind == "images" for entry in sealed.files) else None
    if asked is None and found is not None:
        raise UsageError(f"{out} was begun with images in it: pass {found.option} again, or choose another --out")
    if found is not None and asked is not None and found != asked:
        raise LabelSetMismatch(
            f"{out}/{IMAGES_FOLDER} holds {found.text}, this run asks for {asked.text}",
            fix=f"Pass {found.option}, or choose another --out",
        )
    return asked


def _packed_as(out: Path) -> Packing | None:
    """Return the packing that the comment of the first tar names; None if there is no tar."""
    first = min((out / IMAGES_FOLDER).glob("*.tar"), default=None)
    if first is None:
        return None
    with refusals_named(first), first.open("rb") as file:
        text = (read_comment(file) or "").removeprefix(_COMMENT)
    if text == _AS_THEY_WERE:
        return Packing(None)
    shorter = text.removeprefix("shorter side at most ").partition(" ")[0]
    packing = Packing(int(shorter) if shorter.isdecimal() else 0)
    if packing.text != text:
        raise LabelSetError(f"{first} was not written by --include-images: move it away, or choose another --out")
    return packing


def check_packable(source: Source) -> None:
    """Raise SourceError if a sample key cannot be the name of a file in a WebDataset tar."""
    for shard in source.shards:
        for key in shard.keys:
            check_member_key(key, shard.name)


def packed_source(out: Path, source: Source) -> Source:
    """Return the source that consists of the tars of a label set; the tars may not exist yet."""
    folder = out / IMAGES_FOLDER
    shards = tuple(
        TarShard(shard.name, LocalFile(folder / f"{shard.name}.tar"), source.num_classes) for shard in source.shards
    )
    return Source(str(folder), "tar", source.class_names, shards)


def pack_images(out: Path, plan: Plan, packing: Packing, reading: Reading) -> Source:
    """Pack the images of these source shards that are not packed yet; return the packed images as a source.

    If `on_bad_image` is `skip`, an image that cannot be decoded is packed unchanged.

    Raises:
        SourceError: an image cannot be decoded and `on_bad_image` is `fail`.
        LabelSetMismatch: the existing labels belong to other images.
    """
    source = reading.source
    if source.class_names is not None:
        lines = "".join(f"{name}\n" for name in source.class_names).encode()
        publish_file(out / IMAGES_FOLDER / "classes.txt", lines)
    packed = packed_source(out, source)
    missing = [name for name in reading.shards if not (out / images_path(name)).is_file()]
    for _ in reading.each("pack", _Packer(out, plan, source, packing, reading.on_bad_image), missing):
        pass
    for name in reading.shards:
        shard = packed.shard(name)
        if keys_sha256(shard.keys, shard.class_labels) != plan.shard(name).keys_sha256:
            raise LabelSetMismatch(
                f"{out / images_path(name)} does not hold the images of source shard {name!r}: delete it and run again"
            )
    return packed


@dataclass(frozen=True)
class _Packer:
    """Writes the tar of one source shard, unless another rank has written it; called in loader processes."""

    out: Path
    plan: Plan
    source: Source
    packing: Packing
    on_bad_image: BadImagePolicy

    def __call__(self, name: str, note: Note) -> None:
        path = self.out / images_path(name)
        if path.is_file():
            return
        members = self._members(self.source.shard(name), self._labelled_samples(name), note)
        if publish_file(path, partial(write_tar, members=members, comment=self.packing.comment)):
            _check_as_sealed(self.out, path, name)

    def _labelled_samples(self, name: str) -> SampleRows | None:
        """Return the samples if they are already labelled: the set had no images until now, or this tar was deleted."""
        path = self.out / samples_path(name)
        return checked_samples(path, self.plan, name) if path.is_file() else None

    def _members(self, shard: SourceShard, samples: SampleRows | None, note: Note) -> Iterator[tuple[str, bytes]]:
        """Yield the files of a tar: the image and class label of each sample in turn."""
        for row in range(len(shard)):
            note(f"image {shard.keys[row]!r} of {shard.name}")
            sample = shard[row]
            image = _packed_image(sample, self.packing, self.on_bad_image)
            if samples is not None and xxhash.xxh3_128_digest(image) != samples.image_xxh3[row]:
                raise LabelSetMismatch(
                    f"image {sample.key!r} of {shard.name} would be packed with other bytes than the labelled image:"
                    " pass the --data and --include-images of the labelled images, or choose another --out"
                )
            yield sample.key + member_extension(image), image
            if sample.class_label is not None:
                yield f"{sample.key}.cls", b"%d" % sample.class_label


def _packed_image(sample: Sample, packing: Packing, on_bad_image: BadImagePolicy) -> bytes:
    try:
        if packing.shorter is not None:
            return shrink(sample.image, packing.shorter, key=sample.key)
        if on_bad_image == "fail":
            decode(sample.image, key=sample.key)  # an image in a tar cannot be repaired later
    except BadImageError as error:
        if on_bad_image == "fail":
            raise SourceError(
                f"{error}", fix="Repair the image, or pass --on-bad-image skip to leave such images out"
            ) from error
    return sample.image


def _check_as_sealed(out: Path, path: Path, name: str) -> None:
    """Check that a tar that was deleted and packed again is the one that the sealed manifest lists."""
    sealed = sealed_manifest(out)
    for entry in sealed.files if sealed else ():
        if entry.kind == "images" and entry.shard == name and sha256_file(path) != entry.sha256:
            raise LabelSetMismatch(
                f"{path} was packed again, and differs from the sealed file: another Pillow or Python made it",
                fix="Choose another --out",
            )
