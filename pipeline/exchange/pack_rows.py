"""The rows of a pack: where the bytes of each image are, and the order in which the images are written.

Loader processes go through each source shard once, in its own order. An image stays where the source has it, if it is copied from
a local file that can be read anywhere; else it goes to a scratch file, because a row group of Parquet, or a file behind a URL,
can only be read as a whole. Samples are then sorted by a hash of seed and key.
"""

import copy
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BadImageError, SourceError
from pipeline.images.decode import JPEG_QUALITY, decode, shrink
from pipeline.images.labels_file import OtherLabels
from pipeline.images.samples import Sample, check_image_bytes, keys_sha256, reading
from pipeline.images.source import FolderShard, Source, SourceShard
from pipeline.images.tar_archive import check_member_key
from pipeline.images.tars import TarShard
from pipeline.machine.loaders import Note
from pipeline.settings.configs import PackConfig
from pipeline.storage.atomic import refusals_named, replace_file
from pipeline.storage.json import sha256_json
from pipeline.text import check_name, count

Place = tuple[str, int, int, int]  # file, offset, size, time of the last change


@dataclass(frozen=True)
class Read:
    """A source shard that was read.

    Attributes:
        name: name of the source shard.
        num_samples: its samples, those left out included.
        keys_sha256: hash of its keys and class labels.
        rows: a line of JSON for each sample: key, class label, file of the image (below the scratch folder, or absolute),
            offset, size, time of the file's last change in ns (0: a scratch file).
        left_out: key and reason of each image that is left out.
    """

    name: str
    num_samples: int
    keys_sha256: str
    rows: bytes
    left_out: list[tuple[str, str]]

    @property
    def head(self) -> dict[str, Any]:
        """The fields other than the rows, the first line of the file in which they are kept."""
        return {field: getattr(self, field) for field in ("name", "num_samples", "keys_sha256", "left_out")}


@dataclass(frozen=True)
class Reader:
    """What a process needs to read source shards.

    Attributes:
        source: the images.
        scratch: folder in which the result is kept; None if it is not.
        config: settings of the pack.
        read_images: whether images are read, too; else only keys are, and the rows name no places.
    """

    source: Source
    scratch: Path | None
    config: PackConfig
    read_images: bool

    @property
    def copies(self) -> bool:
        """Whether images are copied as they are."""
        return self.config.shorter_side is None

    def kept(self, shard: SourceShard[Any]) -> Path | None:
        """Return the file in which the rows of a source shard are kept; None if they are not."""
        return None if self.scratch is None else self.scratch / "read" / f"{shard.name}.jsonl"

    def images_of(self, shard: SourceShard[Any]) -> str:
        """Return the name of the scratch file for the images of a source shard, below the scratch folder."""
        return f"read/{shard.name}.images"

    def has(self, shard: SourceShard[Any]) -> bool:
        """Return whether an earlier run has read a source shard."""
        kept = self.kept(shard)
        return kept is not None and kept.is_file()


def read_shard(reader: Reader, number: int, note: Note) -> Read:
    """Read a source shard, or what an earlier run has kept of it; called in loader processes."""
    shard = _anew(reader.source.shards[number])
    note(f"source shard {shard.name}")
    kept = reader.kept(shard)
    if kept is not None and reader.has(shard):
        return _load(reader, shard, kept)
    keys = [_new_key(key, shard.name, reader.config) for key in shard.keys]
    left_out: list[tuple[str, str]] = []
    if reader.read_images:
        rows = list(_rows_with_images(reader, shard, keys, left_out, note))
    else:
        rows = [_row(key, None, ("", 0, 0, 0)) for key in keys]
    read = Read(shard.name, len(keys), keys_sha256(shard.keys, shard.class_labels), b"".join(rows), left_out)
    if kept is not None:
        replace_file(kept, json.dumps(read.head).encode() + b"\n" + read.rows)
    return read


def _anew(shard: SourceShard[Any]) -> SourceShard[Any]:
    """Return a copy of a source shard that reads its index from the files, not from a kept index that could be of other files.

    Only the copy has the index, so no process ends up with the index of every source shard.
    """
    if isinstance(shard, OtherLabels):
        return replace(cast(Any, shard), shard=_anew(shard.shard))
    return copy.copy(shard) if shard.kept is None else replace(cast(Any, shard), kept=None)


def _new_key(key: str, shard: str, config: PackConfig) -> str:
    """Return the key of a sample in the tars, which WebDataset can read."""
    folder, slash, last = key.rpartition("/")
    new = f"{folder}{slash}{last.replace('.', '_')}" if config.replace_dots else key
    if config.prefix_keys:
        new = f"{shard}/{new}"
    try:
        return check_name(check_member_key(new, shard), f"{shard}: sample key")
    except SourceError as error:
        fix = "Pass --replace-dots, which puts _ for each, or rename the image" if "." in last else error.fix
        raise SourceError(error.what, fix=fix) from error


def _row(key: str, label: int | None, place: Place) -> bytes:
    return json.dumps([key, label, *place], separators=(",", ":")).encode() + b"\n"


def _rows_with_images(
    reader: Reader, shard: SourceShard[Any], keys: list[str], left_out: list[tuple[str, str]], note: Note
) -> Iterator[bytes]:
    """Yield the row of each sample whose image is used; images that cannot stay where they are go to a scratch file."""
    labels = shard.class_labels
    places = _places(shard) if reader.copies else None
    if places is not None:
        for row, (key, place) in enumerate(zip(keys, places, strict=True)):
            if reader.config.on_bad_image == "keep" or _usable(reader, shard, row, left_out, note) is not None:
                yield _row(key, labels[row], place)
        return
    assert reader.scratch is not None
    name, found = reader.images_of(shard), []

    def write(file: BinaryIO) -> None:
        for row, key in enumerate(keys):
            if (image := _usable(reader, shard, row, left_out, note)) is not None:
                found.append(_row(key, labels[row], (name, file.tell(), len(image), 0)))
                file.write(image)

    replace_file(reader.scratch / name, write)
    yield from found


def _usable(
    reader: Reader, shard: SourceShard[Any], row: int, left_out: list[tuple[str, str]], note: Note
) -> bytes | None:
    """Return an image as it is packed; None if it cannot be decoded and is left out."""
    note(f"image {shard.keys[row]!r} of {shard.name}")
    sample = shard[row]
    try:
        return _packed_image(sample, reader.config)
    except BadImageError as error:
        if reader.config.on_bad_image == "fail":
            raise SourceError(f"{shard.name}: {error.what}", fix=_BAD) from error
        left_out.append((_new_key(sample.key, shard.name, reader.config), error.reason))
        return None


_BAD = "Repair the image, or pass --on-bad-image skip to leave such images out"


def _packed_image(sample: Sample, config: PackConfig) -> bytes:
    try:
        if config.shorter_side is not None:
            quality = config.quality or JPEG_QUALITY
            return shrink(sample.image, config.shorter_side, key=sample.key, kernel="lanczos", quality=quality)
        if config.on_bad_image != "keep":
            decode(sample.image, key=sample.key)  # an image in a tar cannot be repaired later
    except BadImageError:
        if config.on_bad_image != "keep":
            raise
    return sample.image


def _places(shard: SourceShard[Any]) -> list[Place] | None:
    """Return where the images of a source shard are, if they are in local files that can be read anywhere; else None."""
    if isinstance(shard, OtherLabels):
        return _places(shard.shard)
    if isinstance(shard, FolderShard):
        files = [os.path.abspath(shard.root / path) for path in shard.index.places]
        places = [(path, 0, *_size_and_time(path)) for path in files]
    elif isinstance(shard, TarShard) and shard.file.path is not None:
        path = os.path.abspath(shard.file.path)
        _, changed = _size_and_time(path)
        places = [(path, place.data, place.size, changed) for place in shard.index.places]
    else:
        return None
    for path, offset, size, _ in places:
        check_image_bytes(size, f"{path}: byte {offset}")
    return places


def _size_and_time(path: str) -> tuple[int, int]:
    """Return the size of a file in bytes, and the time of its last change in ns."""
    with reading(path):
        found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block
        raise SourceError(f"{path}: is not a file")
    return found.st_size, found.st_mtime_ns


def _load(reader: Reader, shard: SourceShard[Any], kept: Path) -> Read:
    """Return what an earlier run has kept of a source shard, if the shard is still the same."""
    with refusals_named(kept):
        head, _, rows = kept.read_bytes().partition(b"\n")
    try:
        read = Read(**json.loads(head), rows=rows)
        read.left_out[:] = [(key, reason) for key, reason in read.left_out]
        places = [tuple(place) for _, _, *place in map(json.loads, rows.splitlines())]
    except (ValueError, TypeError):
        raise _changed(f"{kept} is not the file that was written", reader.scratch) from None
    # A file behind a URL is not received once more: its images are in the scratch file.
    if not shard.remote_files and keys_sha256(shard.keys, shard.class_labels) != read.keys_sha256:
        raise _changed(f"source shard {shard.name} has other samples than", reader.scratch)
    there = set(_places(shard) or ()) if reader.copies else set()
    for place in places:
        if place not in there and place[0::3] != (reader.images_of(shard), 0):
            raise _changed(f"{place[0]} is not the file that it was", reader.scratch)
    if read.left_out and reader.config.on_bad_image == "fail":
        key, reason = read.left_out[0]
        raise SourceError(f"{shard.name}: image {key!r}: {reason}", fix=_BAD)
    return read


def _changed(what: str, scratch: Path | None) -> SourceError:
    return SourceError(f"{what} when this pack was begun", fix=f"Delete {scratch} and run the same command again")


class Rows:
    """The rows of all samples in the order in which they are written.

    A scratch file holds the rows; in memory there are at most 80 bytes for each sample, and 16 after sorting.
    """

    def __init__(self, file: BinaryIO, seed: int) -> None:
        self._file, self._seed = file, seed
        self._ranks: list[NDArray[np.uint64]] = []  # [n, 2] of each source shard: the 128-bit hash of seed and key
        self._lengths: list[NDArray[np.uint32]] = []  # [n]
        self._starts = np.zeros(1, np.uint64)  # [N + 1] where each row begins, in the order of the source
        self._order = np.zeros(0, np.int64)  # [N]
        self._shards: list[tuple[str, int, str, int]] = []  # name, samples, hash of the keys, rows
        self.left_out: list[tuple[str, str]] = []

    def add(self, read: Read) -> None:
        """Add the rows of the next source shard."""
        lines = read.rows.splitlines(keepends=True)
        salt = self._seed.to_bytes(16, "little")
        digests = (hashlib.blake2b(json.loads(line)[0].encode(), digest_size=16, salt=salt).digest() for line in lines)
        self._ranks.append(np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2))
        self._lengths.append(np.fromiter(map(len, lines), np.uint32, len(lines)))
        self._shards.append((read.name, read.num_samples, read.keys_sha256, len(lines)))
        self.left_out += read.left_out
        self._file.write(read.rows)

    def sort(self) -> None:
        """Order all rows by their ranks.

        Raises:
            SourceError: two samples have the same key.
        """
        self._file.flush()
        self._starts = np.concatenate([np.zeros(1, np.uint64), *self._lengths]).cumsum(dtype=np.uint64)
        self._lengths.clear()
        high = np.concatenate([ranks[:, 0] for ranks in self._ranks])
        low = np.concatenate([ranks[:, 1] for ranks in self._ranks])
        self._ranks.clear()
        self._order = np.lexsort((low, high))
        high, low = high[self._order], low[self._order]
        if len(same := np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))):
            first, second = int(self._order[same[0]]), int(self._order[same[0] + 1])
            key = json.loads(self._line(first))[0]
            raise SourceError(
                f"sample key {key!r} stands twice, in source shard {self._shard_of(first)} and in {self._shard_of(second)}"
                f" ({count(len(same), 'key')} in all)",
                fix="Pass --prefix-keys, which puts the name of the source shard before each key",
            )

    def _shard_of(self, row: int) -> str:
        ends = np.cumsum([rows for *_, rows in self._shards])
        return self._shards[int(np.searchsorted(ends, row, side="right"))][0]

    def _line(self, row: int) -> bytes:
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        return os.pread(self._file.fileno(), stop - start, start)

    def __len__(self) -> int:
        return len(self._order)

    def source_id(self, source: Source) -> str:
        """Return the id of the source, `Source.source_id`, without another look at it."""
        shards = [
            {"name": name, "num_samples": samples, "keys_sha256": sha256} for name, samples, sha256, _ in self._shards
        ]
        return sha256_json({"class_names": source.class_names and list(source.class_names), "shards": shards})

    def shard_sizes(self, samples_per_shard: int) -> list[int]:
        """Return the number of samples of each tar: at most so many, and the numbers differ by at most one."""
        shards = -(-len(self) // samples_per_shard)
        bounds = [len(self) * number // shards for number in range(shards + 1)]
        return [stop - start for start, stop in itertools.pairwise(bounds)]

    def of_shards(self, samples_per_shard: int) -> Iterator[list[bytes]]:
        """Yield the rows of each tar in turn."""
        start = 0
        for size in self.shard_sizes(samples_per_shard):
            yield [self._line(int(row)) for row in self._order[start : start + size]]
            start += size


def read_place(scratch: Path, name: str, offset: int, size: int, changed: int) -> bytes:
    """Return the bytes of an image.

    Raises:
        SourceError: the file is not the one that was read, by size or time of its last change.
    """
    path = os.path.join(scratch, name)  # an absolute name stays as it is
    with reading(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or (changed and found.st_mtime_ns != changed):
            raise _changed(f"{path} is not the file that it was", scratch)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            image = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    if len(image) != size:
        raise _changed(f"{path} is shorter than", scratch)
    return image
