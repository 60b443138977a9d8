"""Sources of original images: an image folder, WebDataset tars, or Hugging Face image Parquet.

A source is an ordered list of source shards, each an ordered run of samples. It is cheap to pickle: shards hold only
paths, and each process finds the samples again when it needs them.
"""

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from braceexpand import braceexpand  # webdataset uses it too, but importing it from there would import torch (7 s)

from pipeline.errors import SourceError
from pipeline.images.index import SIDECAR_NAME, KeptIndex
from pipeline.images.parquet import open_parquets
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    NO_OPTIONS,
    Sample,
    ShardIndex,
    ShardSummary,
    SourceOptions,
    SourceShard,
    check_image_bytes,
    reading,
)
from pipeline.images.tars import open_tars
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.json import sha256_json
from pipeline.storage.place import File, RemoteFile, open_file, open_place
from pipeline.storage.remote import list_url
from pipeline.storage.urls import local_path
from pipeline.text import check_name

__all__ = ["Sample", "Source", "SourceOptions", "SourceShard", "open_source"]

SAMPLES_PER_SHARD = 1024
MAX_FILES = 100_000  # limit of one brace expression; ImageNet-21k has 2,048 tars

ACCEPTED = (
    "an image folder, a .tar or .parquet file, a folder of these, or a brace expression like train-{000..127}.tar"
)


@dataclass(frozen=True)
class Source:
    """An ordered set of original images.

    Attributes:
        location: path or URL from which it was opened; not part of its identity.
        class_names: name of every class label, or None where the source does not say.
    """

    location: str
    kind: Literal["folder", "tar", "parquet"]
    class_names: tuple[str, ...] | None
    shards: tuple[SourceShard[Any], ...]
    kept: KeptIndex | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples of all shards; the first use may read the headers of every tar."""
        if self.kind == "parquet":  # the footers say it
            return sum(map(len, self.shards))
        return sum(summary.num_samples for summary in self.summaries)

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a class label."""
        return sum(summary.num_labelled for summary in self.summaries)

    @property
    def max_label(self) -> int | None:
        """Largest class label, None if no sample has one."""
        return max((s.max_label for s in self.summaries if s.max_label is not None), default=None)

    @cached_property
    def summaries(self) -> tuple[ShardSummary, ...]:
        """Summary of every source shard, in order: from the kept index, which is made or completed where it has to be."""
        if self.kept is not None:
            self.kept.complete(self.shards)
        return tuple(shard.summary for shard in self.shards)

    @property
    def num_classes(self) -> int | None:
        """Number of class names, or None if the source has no names."""
        return None if self.class_names is None else len(self.class_names)

    def shard(self, name: str) -> SourceShard[Any]:
        """Return the source shard with this name."""
        if name not in self._by_name:
            raise SourceError(f"{self.location} has no source shard {name!r}")
        return self._by_name[name]

    def only(self, names: Sequence[str]) -> "Source":
        """Return a source that has only the source shards with these names, in this order."""
        return replace(self, shards=tuple(self._by_name[name] for name in names))

    @cached_property
    def _by_name(self) -> dict[str, SourceShard[Any]]:
        return {shard.name: shard for shard in self.shards}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("summaries", "_by_name")}

    @property
    def is_remote(self) -> bool:
        """True where its files are behind URLs."""
        return any(shard.remote_files for shard in self.shards)

    def remote_files(self, name: str) -> tuple[RemoteFile, ...]:
        """Return the remote files from which a source shard is read, for `Prefetch`; empty for a local source."""
        return self.shard(name).remote_files

    def describe(self) -> str:
        """Return a one-line summary for people."""
        classes = "no class names" if self.num_classes is None else f"{self.num_classes:,} classes"
        return f"{self.location}: {self.kind}, {len(self.shards):,} shards, {self.num_samples:,} samples, {classes}"

    def identity(self) -> dict[str, Any]:
        """Return the names, keys and class labels, which identify this source independently of its kind and location."""
        shards = [
            {"name": shard.name, "num_samples": summary.num_samples, "keys_sha256": summary.keys_sha256}
            for shard, summary in zip(self.shards, self.summaries, strict=True)
        ]
        return {"class_names": self.class_names and list(self.class_names), "shards": shards}

    @property
    def source_id(self) -> str:
        """SHA-256 of the identity as canonical JSON, in hex."""
        return sha256_json(self.identity())


def open_source(
    location: str | os.PathLike[str], *, options: SourceOptions = NO_OPTIONS, cache: Cache | None = None
) -> Source:
    """Return the source at a location; the path decides its kind.

    Args:
        location: a folder of images `class/name.jpg` (or without class folders: no labels), one `.tar` or `.parquet` file,
            a folder of such files (read in sorted order), or a brace expression for them. Links to images are followed.
            Tars and Parquet files may be http(s)://, s3://, gs:// or hf:// URLs.
        options: how to read what the layout leaves open.
        cache: cache for files that are read from URLs; None: the default cache.
    """
    text, path = os.fspath(location), local_path(location)
    with reading(text):
        if path is None:
            return _open_urls(text, cache)
        if path.is_dir():
            source = _open_directory(text, path)
        else:
            source = _open_files(text, [open_file(name) for name in ([text] if path.is_file() else _existing(text))])
        return _with_index(source, options, cache or open_cache())


def _with_index(source: Source, options: SourceOptions, cache: Cache) -> Source:
    """Return a source of local tars or Parquet files whose shards use the kept index."""
    if source.kind == "folder":
        return source
    names = source.class_names and list(source.class_names)
    identity = sha256_json({"kind": source.kind, "options": asdict(options), "class_names": names})
    location = os.path.abspath(source.location)
    path = cache.folder / "index" / f"{sha256_json([location, identity])[:32]}.arrow"
    kept = KeptIndex(path, identity, _sidecar(source.location))
    return replace(source, shards=tuple(replace(cast(Any, shard), kept=kept) for shard in source.shards), kept=kept)


def _sidecar(location: str) -> Path:
    """Return the path of the index beside a source: in the folder, or in that of the first file."""
    path = Path(location)
    return (path if path.is_dir() else path.parent) / SIDECAR_NAME


def _open_urls(location: str, cache: Cache | None) -> Source:
    """Return a source of remote tars or Parquet files; a missing file is found only when it is used."""
    files = [open_file(name, cache) for name in (_expand(location) if "{" in location else [location])]
    if files[0].suffix in (".tar", ".parquet") or len(files) > 1:
        return _open_files(location, files)
    folder, found = open_place(location, cache), list_url(location)
    archives = [name for name in found if Path(name).suffix in (".tar", ".parquet")]
    if not archives:
        raise SourceError(
            f"{location}: no .tar or .parquet file in this folder",
            fix="Single images are not read from afar: pack them into tars, or copy the folder here",
        )
    if images := [name for name in found if Path(name).suffix.lower() in IMAGE_EXTENSIONS]:
        raise SourceError(f"{location}: holds both images ({images[0]}) and {archives[0]}: give each its own folder")
    return _open_files(location, [folder / name for name in archives])


def _existing(pattern: str) -> list[str]:
    """Return the files of a brace expression, all of which must exist."""
    names = _expand(pattern)
    missing = [name for name in names if not Path(name).is_file()]
    if names == [pattern]:
        raise SourceError(f"{pattern}: does not exist. A source is {ACCEPTED}")
    if missing:
        raise SourceError(f"{pattern}: {len(missing)} of {len(names)} files are missing, the first is {missing[0]}")
    return names


def _expand(pattern: str) -> list[str]:
    try:
        # The library builds a whole range before it yields the first name, so a huge range must be refused first.
        huge = any(abs(int(a) - int(b)) >= MAX_FILES for a, b in re.findall(r"(-?\d+)\.\.(-?\d+)", pattern))
        names = [] if huge else list(islice(braceexpand(pattern, escape=False), MAX_FILES + 1))
    except ValueError as error:
        raise SourceError(f"{pattern}: {error}. A source is {ACCEPTED}") from None
    if huge or len(names) > MAX_FILES:
        raise SourceError(f"{pattern}: a brace expression may name at most {MAX_FILES} files")
    return names


def _open_files(location: str, files: Sequence[File]) -> Source:
    suffixes = {file.suffix for file in files}
    if odd := next((file for file in files if file.path is not None and not file.path.is_file()), None):
        raise SourceError(f"{odd}: named like a file of images, but not a file (a broken link, a folder, or a pipe)")
    if suffixes == {".tar"}:
        return _checked(Source(location, "tar", *open_tars(files)))
    if suffixes == {".parquet"}:
        return _checked(Source(location, "parquet", *open_parquets(files)))
    raise SourceError(f"{location}: cannot tell what these {sorted(suffixes)} files are. A source is {ACCEPTED}")


def _open_directory(location: str, folder: Path) -> Source:
    """Return the source in a folder of images, of tars or of Parquet files; a folder may not mix them."""
    names = [entry.name for entry in _entries(folder)]
    archives = sorted(name for name in names if Path(name).suffix in (".tar", ".parquet"))
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    if archives and images:
        raise SourceError(f"{location}: holds both images ({min(images)}) and {archives[0]}: give each its own folder")
    if archives:
        return _open_files(location, [open_file(folder / name) for name in archives])
    return _checked(Source(location, "folder", *_open_folder(folder)))


def _checked(source: Source) -> Source:
    """Return the source if its shard names are valid: they become file names in the label set."""
    for name, count in Counter(shard.name for shard in source.shards).items():
        if not re.fullmatch("[A-Za-z0-9._-]+", name):
            raise SourceError(
                f"{source.location}: a file name may have only A-Z a-z 0-9 . _ -, got {name!r}", fix="Rename it"
            )
        if count > 1:
            raise SourceError(
                f"{source.location}: {count} files are called {name!r}: names must be unique", fix="Rename them"
            )
    return source


def _images(folder: Path) -> list[os.DirEntry[str]]:
    """Return the image files directly in a folder; other files are ignored."""
    images = [entry for entry in _entries(folder) if Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS]
    for entry in images:
        if not entry.is_file():
            raise SourceError(f"{entry.path}: named like an image, but not a file (a broken link, or a folder)")
    return images


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden."""
    with reading(folder), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders directly in a folder, sorted."""
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir())


@dataclass(frozen=True)
class FolderShard(SourceShard[str]):
    """A run of the images of a folder, with their paths, so that no process lists the folder again."""

    name: str
    root: Path
    class_names: tuple[str, ...] | None
    packed_paths: bytes  # paths relative to the root, one per line, deflated: 10 MB in all for ImageNet

    def build_index(self) -> ShardIndex[str]:
        """Return the index from the unpacked paths; a class label is the position of the folder's name."""
        paths = tuple(zlib.decompress(self.packed_paths).decode().split("\n"))
        labels = {name: label for label, name in enumerate(self.class_names or ())}
        return ShardIndex(tuple(map(_key, paths)), tuple(labels.get(path.split("/")[0]) for path in paths), paths)

    def read_image(self, position: int) -> bytes:
        """Return the content of one file."""
        path = self.root / self.index.places[position]
        with reading(path):
            check_image_bytes(path.stat().st_size, path)
            if not path.is_file():  # reading a pipe would block
                raise SourceError(f"{path}: is not a file any more")
            return path.read_bytes()


def _open_folder(root: Path) -> tuple[tuple[str, ...] | None, tuple[FolderShard, ...]]:
    """Return the class names of an image folder (None: no class folders) and its shards.

    Images are ordered by a hash of their keys. In the order of their names, a thousand neighbours would have the same class,
    and neighbours become partners in mixup and CutMix.
    """
    class_names = _class_folders(root)
    paths = [path for folder in class_names or ("",) for path in _paths(root, folder)]
    if not paths:
        raise SourceError(f"{root}: no image in this folder. A source is {ACCEPTED}")
    paths.sort(key=lambda path: (hashlib.blake2b(_key(path).encode(), digest_size=16).digest(), path))
    shards = []
    for number, start in enumerate(range(0, len(paths), SAMPLES_PER_SHARD)):
        packed = zlib.compress("\n".join(paths[start : start + SAMPLES_PER_SHARD]).encode())
        shards.append(FolderShard(f"images-{number:06}", root, class_names or None, packed))
    return class_names or None, tuple(shards)


def _paths(root: Path, folder: str) -> list[str]:
    """Return the paths of the images of one class folder, relative to the root ("" is the root itself)."""
    found: dict[str, str] = {}
    for entry in _images(root / folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        key = check_name(_key(path), f"{root}: sample key")
        if key in found:
            raise SourceError(f"{root}: {found[key]} and {path} share the key {key!r}", fix="Rename one")
        found[key] = path
    return list(found.values())


def _key(path: str) -> str:
    return os.path.splitext(path)[0]


def _class_folders(root: Path) -> tuple[str, ...]:
    """Return the class folders, sorted by name; they may contain only images, and images may not be outside them."""
    names, images = _folders(root), _images(root)
    if names and images:
        raise SourceError(f"{root}: holds both images ({images[0].name}) and folders ({names[0]}): classes are folders")
    for name in names:
        check_name(name, f"{root}: class name")
        for inner in _folders(root / name):
            raise SourceError(f"{root}: images must lie in class/name.jpg, but {name}/{inner} is a folder")
    return tuple(names)
