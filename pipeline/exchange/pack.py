"""`deit-cli pack`: write any source as WebDataset tars of even size, in a shuffled order, with the same bytes every time.

There are two phases, both in loader processes. `read` goes through each source shard once, in its own order, and notes where the
bytes of each image are. `write` takes the images of each tar from these places. Between the two, the command sorts all samples by
a hash of seed and key. So the order depends neither on the order of the source nor on the number of processes, and a source that
is sorted by class is mixed over all tars.

Everything is made in OUT/.pack, from which an interrupted run continues. Finished tars then get their names in OUT, and
SHA256SUMS is written last.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.exchange.pack_rows import Reader, Rows, read_place, read_shard
from pipeline.images.decode import JPEG_QUALITY
from pipeline.images.index import write_sidecar
from pipeline.images.source import Source, open_source
from pipeline.images.tar_archive import (
    INFO_NAME,
    member_extension,
    read_comment,
    timm_info,
    write_tar,
)
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
    sha256_file,
    sweep_temporaries,
)
from pipeline.storage.json import pretty_json, read_json, sha256_json
from pipeline.storage.prefetch import Prefetch
from pipeline.storage.urls import local_path
from pipeline.text import byte_size, count, first_few

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
        shutil.rmtree(scratch, ignore_errors=True)  # while it is locked: nobody else has begun anything in it
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
        raise _not_ours(held)
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


def _not_ours(path: Path) -> StorageError:
    return StorageError(f"{path} was not written by deit-cli pack: move it away, or choose another folder")


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
    return sums.is_file() and all((out / line[66:]).is_file() for line in sums.read_text(errors="replace").splitlines())


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
    if not all(isinstance(about.get(name), int) for name in ("num_samples", "num_shards", "left_out")):
        raise _not_ours(out / ABOUT_NAME)
    if (old := str(about.get("source_id"))) != source_id:
        raise UsageError(
            f"{out} was packed from another source: the keys and labels of that one have the id {old[:12]}…, those of this one"
            f" {source_id[:12]}…",
            fix="Pass the same source again, or choose another folder",
        )
    return about


def _about(source: Source, config: PackConfig, rows: Rows) -> dict[str, Any]:
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


def _finish(task: "_Task", out: Path, about: dict[str, Any], rows: Rows, tars: Sequence["_Tar"]) -> Packed:
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
    write_sidecar(open_source(out))  # not in the list of hashes: `deit-cli index` may write it anew
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    sums |= {tar.name: tar.sha256 for tar in tars}
    _put(out / SUMS_NAME, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
    size = sum(tar.num_bytes for tar in tars)
    return Packed(out, len(rows), len(tars), size, len(rows.left_out), sum(tar.is_new for tar in tars), 0)


def _put(path: Path, content: bytes) -> None:
    """Write a small file, create-only."""
    if not publish_file(path, content) and path.read_bytes() != content:
        raise UsageError(f"{path} exists with other content: move it away, or choose another folder")


# --- the two phases -----------------------------------------------------------------------------------------------------


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
    def rows(self, *, read_images: bool) -> Iterator["Rows"]:
        """Read all source shards, and give their samples in the order in which they are written."""
        shards = self.source.shards
        reader = Reader(self.source, self.scratch, self.config, read_images)
        count_one = ProgressCounter("read", len(shards), self.progress, unit="source shards")
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            rows = Rows(file, self.config.seed)
            read = partial(read_shard, reader)
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


def _write(task: _Task, out: Path, rows: Rows, comment: str) -> list[_Tar]:
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
        image = read_place(scratch, *place)
        yield key + member_extension(image), image
        if label is not None:
            yield f"{key}.cls", b"%d" % label
