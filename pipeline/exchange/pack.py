"""`deit-cli pack`: write any source as WebDataset tars of even size, in a shuffled order, with the same bytes every time.

There are two phases, both in loader processes. `read` goes through each source shard once, in its own order, and notes where the
bytes of each image are: where the source has them, if they are copied from local files that can be read anywhere; else in a
scratch file, because a row group of Parquet, or a file behind a URL, can only be read as a whole. `write` takes the images of
each tar from these places. Between the two, the command sorts all samples by a hash of seed and key. So the order depends neither
on the order of the source nor on the number of processes, and a source that is sorted by class is mixed over all tars.

Everything is made in OUT/.pack, from which an interrupted run continues. Finished tars then get their names in OUT, and
SHA256SUMS is written last.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BadImageError, SourceError, StorageError, UsageError
from pipeline.images.decode import JPEG_QUALITY, decode, shrink
from pipeline.images.labels_file import OtherLabels
from pipeline.images.samples import Sample, check_image_bytes, keys_sha256, reading
from pipeline.images.source import FolderShard, Source, SourceShard, open_source
from pipeline.images.tar_archive import (
    INFO_NAME,
    check_member_key,
    member_extension,
    read_comment,
    timm_info,
    write_tar,
)
from pipeline.images.tars import TarShard
from pipeline.machine.loaders import Note, in_processes
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter, usable_cores
from pipeline.settings.configs import PackConfig
from pipeline.storage.atomic import (
    locked,
    make_folder,
    publish_file,
    publish_partial,
    refusals_named,
    replace_file,
    sha256_file,
    sweep_temporaries,
)
from pipeline.storage.json import pretty_json, read_json, sha256_json
from pipeline.storage.prefetch import Prefetch
from pipeline.storage.urls import local_path
from pipeline.text import byte_size, check_name, count, first_few

log = logging.getLogger("deit_cli.pack")

ABOUT_NAME = "pack.json"
SUMS_NAME = "SHA256SUMS"  # written last: a pack with this file is complete
CLASSES_NAME = "classes.txt"  # the name that `open_tars` reads
LEFT_OUT_NAME = "left-out.jsonl"
SCRATCH_NAME = ".pack"
_COMMENT = "deit-cli pack "


@dataclass(frozen=True)
class Packed:
    """What a pack holds, and what this run has done for it.

    Attributes:
        folder: folder of the tars.
        num_samples: number of images in them.
        num_shards: number of tars.
        num_bytes: size of the tars.
        left_out: number of images that cannot be decoded and are left out.
        written: number of tars that this run wrote; the others were there before.
        seconds: time that this run took.
    """

    folder: Path
    num_samples: int
    num_shards: int
    num_bytes: int
    left_out: int
    written: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self) | {"folder": str(self.folder), "seconds": round(self.seconds, 3)}

    @property
    def line(self) -> str:
        """The result as one line for people."""
        held = f"{self.folder}: {count(self.num_samples, 'image')} in {count(self.num_shards, 'tar')}, {byte_size(self.num_bytes)}"
        if not self.written:
            return f"{held}; it was complete already"
        rate = self.num_samples / self.seconds if self.seconds else 0
        before = self.num_shards - self.written
        found = f", {count(before, 'tar')} of them there before" if before else f", {rate:,.0f} images/s"
        return f"{held}{found}"


@dataclass(frozen=True)
class PackPlan:
    """What a pack would hold.

    Attributes:
        source: the source, described in words.
        out: folder of the tars.
        names: file names of the first and the last tar.
        num_samples: number of images, before any is found bad.
        num_shards: number of tars.
        sizes: smallest and largest number of images of a tar.
        options: the options that decide the content of the tars.
    """

    source: str
    out: Path
    names: tuple[str, str]
    num_samples: int
    num_shards: int
    sizes: tuple[int, int]
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self) | {"out": str(self.out)}

    @property
    def table(self) -> str:
        """The plan as text for people."""
        least, most = self.sizes
        first, last = self.names
        shorter, quality = self.options["shorter_side"], self.options["quality"]
        images = f"shorter side at most {shorter} px (Lanczos, JPEG quality {quality})" if shorter else "as they are"
        rows = [
            ("source", self.source),
            ("tars", f"{self.num_shards:,} in {self.out}: {first}" + (f" to {last}" if first != last else "")),
            ("images", f"{self.num_samples:,}, {least:,}{f' or {most:,}' if most != least else ''} in each tar"),
            ("content", f"{images}, shuffled with seed {self.options['seed']}"),
        ]
        return "\n".join(f"{name:9}{text}" for name, text in rows)


def pack(source: str, out: Path, config: PackConfig, *, progress: Progress = lambda _: None) -> Packed:
    """Write a source as tars, or continue such a run; the same call on a complete pack only checks that it is this pack.

    Args:
        source: path or URL of the images.
        out: new folder, or the folder of the same pack.
        config: settings.
        progress: receives the source shards that are read, then the tars that are written.

    Raises:
        UsageError: the folder holds something else, or was begun with other options or another source.
        SourceError: the source cannot be read, its keys cannot be names of files, or the files changed meanwhile.
    """
    began = time.monotonic()
    _check_claim(out, config)
    images = open_source(source, options=config.options)
    if _is_complete(out):
        return _check_complete(out, images, config, progress, began)
    with _claimed(out, source, config) as scratch:
        task = _Task(images, scratch, config, workers=_workers(config), progress=progress)
        with task.rows(read_images=True) as rows:
            about = _about(images, config, rows)
            if (out / ABOUT_NAME).is_file():
                _check_same_source(out, about["source_id"])
            tars = _write(task, out, rows, _COMMENT + sha256_json(about))
            packed = _finish(task, out, about, rows, tars)
    shutil.rmtree(scratch, ignore_errors=True)
    return dataclasses.replace(packed, seconds=time.monotonic() - began)


def plan_pack(source: str, out: Path, config: PackConfig, *, progress: Progress = lambda _: None) -> PackPlan:
    """Return what `pack` would write; keys are read and checked, images are not. Nothing is written. Raises as `pack` does."""
    _check_claim(out, config)
    images = open_source(source, options=config.options)
    task = _Task(images, None, config, workers=_workers(config), progress=progress)
    with task.rows(read_images=False) as rows:
        sizes = rows.shard_sizes(config.samples_per_shard)
        names = [_tar_name(config.prefix, number) for number in range(len(sizes))]
        classes = "no class names" if images.num_classes is None else f"{images.num_classes:,} classes"
        described = (
            f"{source}: {images.kind}, {count(len(images.shards), 'shard')}, {count(len(rows), 'sample')}, {classes}"
        )
        ends = (names[0], names[-1])
        extremes = (min(sizes), max(sizes))
        return PackPlan(described, out, ends, len(rows), len(sizes), extremes, _options(config))


def _workers(config: PackConfig) -> int:
    return usable_cores() if config.workers is None else config.workers


# --- the folder: what it holds, and who may write to it ---------------------------------------------------------------


def _options(config: PackConfig) -> dict[str, Any]:
    """Return the options that decide the content of the tars."""
    return {
        "samples_per_shard": config.samples_per_shard,
        "prefix": config.prefix,
        "seed": config.seed,
        "shorter_side": config.shorter_side,
        "quality": config.quality if config.shorter_side is None else config.quality or JPEG_QUALITY,
        "prefix_keys": config.prefix_keys,
        "replace_dots": config.replace_dots,
        "on_bad_image": "keep" if config.on_bad_image == "keep" else "fail or skip",
    }


def _check_claim(out: Path, config: PackConfig, source: str | None = None) -> None:
    """Raise UsageError if a folder holds something other than this pack."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose a folder")
    begun = out / SCRATCH_NAME / "begun.json"
    held = next((path for path in (begun, out / ABOUT_NAME) if path.is_file()), None)
    if held is None:
        if out.is_dir() and any(child.name != SCRATCH_NAME for child in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no pack: choose another folder")
        return
    found: Any = read_json(held)
    options = found.get("options") if isinstance(found, dict) else None
    if not isinstance(options, dict):
        raise StorageError(f"{held} was not written by deit-cli pack: move it away, or choose another folder")
    verb = "was begun" if held == begun else "was packed"
    for name, asked in _options(config).items():
        if (old := options.get(name)) != asked:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{out} {verb} with {flag} {_said(old)}, this run asks for {_said(asked)}",
                fix="Pass the same options again, or choose another folder",
            )
    if held == begun and source is not None and (old := found.get("source")) != source:
        raise UsageError(f"{out} was begun from {old}, this run asks for {source}: choose another folder")


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "left out" if value is None else str(value)


@contextmanager
def _claimed(out: Path, source: str, config: PackConfig) -> Iterator[Path]:
    """Claim a folder for this run, and give the scratch folder in it."""
    scratch = out / SCRATCH_NAME
    make_folder(scratch)
    location = source if local_path(source) is None else os.path.abspath(source)
    with locked(scratch / "lock", wait=False) as alone:
        if not alone:
            raise UsageError(f"another process packs into {out}: wait for it, or choose another folder")
        publish_file(scratch / "begun.json", pretty_json({"source": location, "options": _options(config)}))
        _check_claim(out, config, location)
        sweep_temporaries(out)
        yield scratch


def _is_complete(out: Path) -> bool:
    """Return whether a folder holds a complete pack: the list of hashes, and every file in it."""
    sums = out / SUMS_NAME
    return sums.is_file() and all((out / line[66:]).is_file() for line in sums.read_text().splitlines())


def _check_complete(out: Path, source: Source, config: PackConfig, progress: Progress, began: float) -> Packed:
    """Check that a complete pack was made from this source; return what it holds."""
    task = _Task(source, None, config, workers=_workers(config), progress=progress)
    with task.rows(read_images=False) as rows:
        about = _check_same_source(out, rows.source_id(source))
    shutil.rmtree(out / SCRATCH_NAME, ignore_errors=True)  # a run was killed between its last file and this line
    names = [_tar_name(config.prefix, number) for number in range(about["num_shards"])]
    size = sum((out / name).stat().st_size for name in names)
    seconds = time.monotonic() - began
    return Packed(out, about["num_samples"], len(names), size, about["left_out"], 0, seconds)


def _check_same_source(out: Path, source_id: str) -> dict[str, Any]:
    """Check that a pack was made from the source with this id; return its `pack.json`."""
    about: Any = read_json(out / ABOUT_NAME)
    if (old := str(about.get("source_id"))) != source_id:
        raise UsageError(
            f"{out} was packed from another source: the keys and labels of that one have the id {old[:12]}…, those of this one"
            f" {source_id[:12]}…",
            fix="Pass the same source again, or choose another folder",
        )
    return about


def _about(source: Source, config: PackConfig, rows: "_Rows") -> dict[str, Any]:
    """Return the content of `pack.json`: it says what decides the bytes of the tars, and nothing of this machine."""
    return {
        "format": "deit-cli-pack",
        "version": 1,
        "source_id": rows.source_id(source),
        "num_samples": len(rows),
        "num_shards": len(rows.shard_sizes(config.samples_per_shard)),
        "num_classes": source.num_classes,
        "left_out": len(rows.left_out),
        "options": _options(config),
    }


def _finish(task: "_Task", out: Path, about: dict[str, Any], rows: "_Rows", tars: Sequence["_Tar"]) -> Packed:
    """Give all files their names in the folder: `pack.json`, which claims it, first, and the list of their hashes last."""
    assert task.scratch is not None
    small = {ABOUT_NAME: pretty_json(about)}
    _put(out / ABOUT_NAME, small[ABOUT_NAME])
    for tar in tars:
        made = task.scratch / "tars" / tar.name
        if made.is_file():
            publish_partial(made, out / tar.name)
    info = timm_info({tar.name: tar.num_samples for tar in tars}, split=task.config.prefix)
    small[INFO_NAME] = pretty_json(info)
    if task.source.class_names is not None:
        small[CLASSES_NAME] = "".join(f"{name}\n" for name in task.source.class_names).encode()
    if rows.left_out:
        lines = (
            json.dumps({"key": key, "reason": reason}, ensure_ascii=False) for key, reason in sorted(rows.left_out)
        )
        small[LEFT_OUT_NAME] = "".join(f"{line}\n" for line in lines).encode()
    for name, content in small.items():
        _put(out / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    sums |= {tar.name: tar.sha256 for tar in tars}
    _put(out / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
    size = sum(tar.num_bytes for tar in tars)
    return Packed(out, len(rows), len(tars), size, len(rows.left_out), sum(tar.is_new for tar in tars), 0)


def _put(path: Path, content: bytes) -> None:
    """Write a small file, create-only."""
    if not publish_file(path, content) and path.read_bytes() != content:
        raise UsageError(f"{path} exists with other content: move it away, or choose another folder")


# --- read: where the bytes of each image are --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
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


Place = tuple[str, int, int, int]  # file, offset, size, time of the last change


@dataclass(frozen=True)
class _Task:
    """A source and what is made of it.

    Attributes:
        source: the images.
        scratch: folder for what is read; None if nothing is kept.
        config: settings of the pack.
        workers: loader processes.
        progress: receives what is done.
    """

    source: Source
    scratch: Path | None
    config: PackConfig
    workers: int
    progress: Progress

    @contextmanager
    def rows(self, *, read_images: bool) -> Iterator["_Rows"]:
        """Read all source shards, and give their samples in the order in which they are written."""
        shards = self.source.shards
        reader = _Reader(self.source, self.scratch, self.config, read_images)
        count_one = ProgressCounter("read", len(shards), self.progress, unit="source shards")
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            rows = _Rows(file, self.config.seed)
            read = partial(_read_shard, reader)
            with Prefetch(file for shard in shards if not reader.has(shard) for file in shard.remote_files):
                for each in in_processes(read, range(len(shards)), workers=min(self.workers, len(shards))):
                    rows.add(each)
                    count_one()
            rows.sort()
            if not len(rows):
                raise SourceError(f"{self.source.location}: no image can be decoded")
            if rows.left_out:
                log.warning(
                    "%s cannot be decoded and are left out (%s lists them): %s",
                    f"{len(rows.left_out):,} of {len(rows) + len(rows.left_out):,} images",
                    LEFT_OUT_NAME,
                    first_few([key for key, _ in sorted(rows.left_out)], 3),
                )
            yield rows


@dataclass(frozen=True)
class _Reader:
    """What a process needs to read source shards; see `_Task`."""

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

    def has(self, shard: SourceShard[Any]) -> bool:
        """Return whether an earlier run has read a source shard."""
        kept = self.kept(shard)
        return kept is not None and kept.is_file()


def _read_shard(reader: _Reader, number: int, note: Note) -> _Read:
    """Read a source shard, or what an earlier run has kept of it; called in loader processes."""
    # A copy has no index: each process would end up with the index of every source shard otherwise.
    shard = copy.copy(reader.source.shards[number])
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
    read = _Read(shard.name, len(keys), keys_sha256(shard.keys, shard.class_labels), b"".join(rows), left_out)
    if kept is not None:
        replace_file(kept, json.dumps(read.head).encode() + b"\n" + read.rows)
    return read


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
    reader: _Reader, shard: SourceShard[Any], keys: list[str], left_out: list[tuple[str, str]], note: Note
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
    name, found = f"read/{shard.name}.images", []

    def write(file: BinaryIO) -> None:
        for row, key in enumerate(keys):
            if (image := _usable(reader, shard, row, left_out, note)) is not None:
                found.append(_row(key, labels[row], (name, file.tell(), len(image), 0)))
                file.write(image)

    replace_file(reader.scratch / name, write)
    yield from found


def _usable(
    reader: _Reader, shard: SourceShard[Any], row: int, left_out: list[tuple[str, str]], note: Note
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


def _load(reader: _Reader, shard: SourceShard[Any], kept: Path) -> _Read:
    """Return what an earlier run has kept of a source shard, if the shard is still the same."""
    with refusals_named(kept):
        head, _, rows = kept.read_bytes().partition(b"\n")
    read = _Read(**json.loads(head), rows=rows)
    read.left_out[:] = [(key, reason) for key, reason in read.left_out]
    # A file behind a URL is not received once more: its images are in the scratch file.
    if not shard.remote_files and keys_sha256(shard.keys, shard.class_labels) != read.keys_sha256:
        raise _changed(f"source shard {shard.name} has other samples than", reader.scratch)
    if read.left_out and reader.config.on_bad_image == "fail":
        key, reason = read.left_out[0]
        raise SourceError(f"{shard.name}: image {key!r}: {reason}", fix=_BAD)
    return read


def _changed(what: str, scratch: Path | None) -> SourceError:
    return SourceError(f"{what} when this pack was begun", fix=f"Delete {scratch} and run the same command again")


# --- between: the order ------------------------------------------------------------------------------------------------


class _Rows:
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

    def add(self, read: _Read) -> None:
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


# --- write: the tars ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tar:
    """A complete tar.

    Attributes:
        name: file name.
        num_samples: its images.
        num_bytes: its size.
        sha256: hash of its bytes.
        is_new: whether this run wrote it.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    is_new: bool


def _tar_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06}.tar"


def _write(task: _Task, out: Path, rows: _Rows, comment: str) -> list[_Tar]:
    """Write the tars that do not exist yet, and return all."""
    assert task.scratch is not None
    per_shard = task.config.samples_per_shard
    number = len(rows.shard_sizes(per_shard))
    count_some = ProgressCounter("write", len(rows), task.progress, unit="images")
    items = (
        (_tar_name(task.config.prefix, each), b"".join(lines)) for each, lines in enumerate(rows.of_shards(per_shard))
    )
    tars = []
    for tar in in_processes(partial(_write_one, out, task.scratch, comment), items, workers=min(task.workers, number)):
        tars.append(tar)
        count_some(tar.num_samples)
    return tars


def _write_one(out: Path, scratch: Path, comment: str, item: tuple[str, bytes], note: Note) -> _Tar:
    """Write a tar, or find it complete; called in loader processes."""
    name, lines = item
    rows = [json.loads(line) for line in lines.splitlines()]
    for path in (out / name, scratch / "tars" / name):
        if path.is_file():
            _check_ours(path, comment)
            return _Tar(name, len(rows), path.stat().st_size, sha256_file(path), is_new=False)
    hashed: list[_Hashed] = []

    def write(file: BinaryIO) -> None:
        hashed.append(_Hashed(file))
        write_tar(hashed[0], _members(scratch, rows, name, note), comment=comment)

    publish_file(scratch / "tars" / name, write)
    return _Tar(name, len(rows), hashed[0].num_bytes, hashed[0].digest.hexdigest(), is_new=True)


def _check_ours(path: Path, comment: str) -> None:
    with refusals_named(path), path.open("rb") as file:
        found = read_comment(file)
    if found != comment:
        raise StorageError(f"{path} is not a tar of this pack: move it away, or choose another folder")


class _Hashed:
    """A file that is written to, with the hash and the number of the bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)


def _members(scratch: Path, rows: Iterable[list[Any]], name: str, note: Note) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a tar: image and class label of each sample in turn."""
    for key, label, *place in rows:
        note(f"image {key!r} for {name}")
        image = _read_place(scratch, *place)
        yield key + member_extension(image), image
        if label is not None:
            yield f"{key}.cls", b"%d" % label


def _read_place(scratch: Path, name: str, offset: int, size: int, changed: int) -> bytes:
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
