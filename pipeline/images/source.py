"""Sources of original images: an image folder, WebDataset tars, or Hugging Face image Parquet.

A source is an ordered list of source shards, each an ordered run of samples. It is cheap to pickle: shards hold only
paths, and each process finds the samples again when it needs them.
"""

import hashlib
import logging
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
from pipeline.images.class_names import names_of_order
from pipeline.images.folders import (
    ARCHIVES,
    NOT_OURS,
    FolderStates,
    KeptListing,
    Listing,
    keep_listing,
    list_folder,
    load_listing,
    packed_suffix,
    refuse_several_splits,
    unpack_first,
)
from pipeline.images.index import LEAST_KEPT, SIDECAR_NAME, KeptIndex
from pipeline.images.labels_file import label_shards
from pipeline.images.parquet import open_parquets
from pipeline.images.samples import (
    IMAGE_EXTENSIONS,
    NO_LABELS,
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
from pipeline.repeats import heard, warn_counted
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.json import sha256_json
from pipeline.storage.place import File, RemoteFile, open_file, open_place
from pipeline.storage.remote import list_url
from pipeline.storage.urls import local_path
from pipeline.text import count, first_few, listed, printable

__all__ = ["NO_OPTIONS", "Sample", "Source", "SourceOptions", "SourceShard", "open_source"]

log = logging.getLogger("deit_cli.source")

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
        options: how the user asked to read it.
    """

    location: str
    kind: Literal["folder", "tar", "parquet"]
    class_names: tuple[str, ...] | None
    shards: tuple[SourceShard[Any], ...]
    options: SourceOptions = NO_OPTIONS
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
        classes = "no class names" if self.num_classes is None else count(self.num_classes, "class", "es")
        labelled = self.num_labelled
        known = f"{labelled:,} with a class label{'' if labelled or self.kind != 'tar' else self._why_unlabelled()}"
        return f"{self.location}: {self.kind}, {count(len(self.shards), 'shard')}, {count(self.num_samples, 'sample')}, {known}, {classes}"

    def _why_unlabelled(self) -> str:
        """Return a hint on tars in which folders, or the names of the tars, look like classes."""
        keys = self.shards[0].keys
        if any("/" in key for key in keys):
            return " (folders in a tar are no classes: unpack it for that)"
        if len(self.shards) > 1 and all(key.startswith(f"{self.shards[0].name}_") for key in keys):
            return " (names of tars are no classes: unpack each into a folder of its name)"
        return ""

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
    if not os.fspath(location):
        raise SourceError(f"no source is given: the path is empty. A source is {ACCEPTED}")
    source = replace(_open_location(os.fspath(location), options, cache), options=options)
    _warn_of_useless(options, source)
    if options.labels_file is None:
        return source
    _ = source.summaries  # completes the kept index, on all cores
    names, shards = label_shards(source.shards, source.class_names, options, where=source.location, cache=cache)
    return replace(source, class_names=names, shards=shards, kept=None)  # the index has no class labels of the file


def _open_location(text: str, options: SourceOptions, cache: Cache | None) -> Source:
    path = local_path(text)
    with reading(text):
        if path is None:
            return _open_urls(text, options, cache)
        if path.is_dir():
            source = _open_directory(text, path, options, cache or open_cache())
        else:
            source = _open_files(
                text, [open_file(name) for name in ([text] if path.is_file() else _existing(text))], options
            )
        return _with_index(source, options, cache or open_cache())


def _with_index(source: Source, options: SourceOptions, cache: Cache) -> Source:
    """Return a source of local tars or Parquet files whose shards use the kept index."""
    if source.kind == "folder":
        return source
    first: Any = source.shards[0]
    read = str(
        first.layout if source.kind == "tar" else first.columns
    )  # what is read of each sample, and new class numbers
    names = source.class_names and list(source.class_names)
    decides = {"kind": source.kind, "options": asdict(options), "class_names": names, "read": read}
    identity = sha256_json(decides)
    path = _kept_path(cache, source.location, identity, ".arrow")
    kept = KeptIndex(path, identity, _sidecar(source.location))
    return replace(source, shards=tuple(replace(cast(Any, shard), kept=kept) for shard in source.shards), kept=kept)


def _kept_path(cache: Cache, location: str | Path, identity: str, suffix: str) -> Path:
    """Return the path of what is kept of a local source."""
    where = os.fsencode(os.path.abspath(location)).hex()  # a path need not be UTF-8
    return cache.folder / "index" / f"{sha256_json([where, identity])[:32]}{suffix}"


def _sidecar(location: str) -> Path:
    """Return the path of the index beside a source: in the folder, or in that of the first file."""
    path = Path(location)
    return (path if path.is_dir() else path.parent) / SIDECAR_NAME


def _open_urls(location: str, options: SourceOptions, cache: Cache | None) -> Source:
    """Return a source of remote tars or Parquet files; a missing file is found only when it is used."""
    files = [open_file(name, cache) for name in (_expand(location) if "{" in location else [location])]
    if files[0].suffix in ARCHIVES or len(files) > 1 or packed_suffix(str(files[0])):
        return _open_files(location, files, options)
    folder, found = open_place(location, cache), list_url(location)
    archives = [name for name in found if Path(name).suffix in ARCHIVES]
    if not archives:
        raise SourceError(
            f"{location}: no .tar or .parquet file in this folder",
            fix="Single images are not read from afar: pack them into tars, or copy the folder here",
        )
    if images := [name for name in found if Path(name).suffix.lower() in IMAGE_EXTENSIONS]:
        raise SourceError(f"{location}: holds both images ({images[0]}) and {archives[0]}: give each its own folder")
    refuse_several_splits(location, archives)
    return _open_files(location, [folder / name for name in archives], options)


def _existing(pattern: str) -> list[str]:
    """Return the files of a brace expression, all of which must exist."""
    names = _expand(pattern)
    missing = [name for name in names if not Path(name).is_file()]
    if names == [pattern] and set("*?[") & set(pattern):
        raise SourceError(
            f"{pattern}: does not exist", fix="Pass the folder, or a brace expression like train-{000..127}.tar"
        )
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


def _open_files(location: str, files: Sequence[File], options: SourceOptions) -> Source:
    suffixes = {file.suffix for file in files}
    if odd := next((file for file in files if file.path is not None and not file.path.is_file()), None):
        raise SourceError(f"{odd}: named like a file of images, but not a file (a broken link, a folder, or a pipe)")
    if suffixes == {".tar"}:
        return _checked(Source(location, "tar", *open_tars(files, options)))
    if suffixes == {".parquet"}:
        return _checked(Source(location, "parquet", *open_parquets(files, options)))
    for file in files:
        if packed_suffix(str(file)):
            raise unpack_first(str(file))
    raise SourceError(f"{location}: cannot tell what these {sorted(suffixes)} files are. A source is {ACCEPTED}")


def _open_directory(location: str, folder: Path, options: SourceOptions, cache: Cache) -> Source:
    """Return the source in a folder of images, of tars or of Parquet files; a folder may not mix them."""
    with reading(folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    archives = [name for name in names if Path(name).suffix in ARCHIVES]
    packed = [name for name in names if packed_suffix(name)]
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    if archives and images:
        raise SourceError(f"{location}: holds both images ({min(images)}) and {archives[0]}: give each its own folder")
    if packed and not images and (archives or not any((folder / name).is_dir() for name in names)):
        raise unpack_first(str(folder / packed[0]), more=len(packed) - 1)
    if archives:
        refuse_several_splits(location, archives)
        _look_beside(folder, names, archives)
        return _open_files(location, [open_file(folder / name) for name in archives], options)
    if packed:
        what = "packed files that are not read"
        warn_counted(log, what, "%s: packed files are not read: %s", folder, printable(first_few(packed, 3)))
    return _checked(Source(location, "folder", *_open_folder(folder, options, cache)))


def _look_beside(folder: Path, names: Sequence[str], archives: Sequence[str]) -> None:
    """Raise SourceError for files that seem to belong to the archives of a folder; warn of folders beside them, which are not read."""
    if odd := [name for name in names if name not in archives and name.lower().endswith((*ARCHIVES, ".pq"))]:
        ending = ".tar" if odd[0].lower().endswith(".tar") else ".parquet"
        raise SourceError(
            f"{folder}: {printable(odd[0])} beside {archives[0]} would not be read",
            fix=f"Rename it to {ending}, or move it away",
        )
    if inner := [name for name in names if name not in NOT_OURS and (folder / name).is_dir()]:
        message = "%s: only its files such as %s are read, not the folders beside them: %s"
        told = printable(first_few(inner, 3))
        warn_counted(log, "folders beside tars or Parquet files", message, folder, archives[0], told)


def _warn_of_useless(options: SourceOptions, source: Source) -> None:
    """Warn of options that say nothing about a source of this kind."""
    of_files = {"image_key": options.image_key, "image_root": options.image_root}
    useless = {
        "folder": of_files | ({} if options.labels_file else {"label_key": options.label_key}),
        "tar": {"image_root": options.image_root, "class_depth": options.class_depth},
        "parquet": {"class_depth": options.class_depth},
    }[source.kind]
    names = [f"--{name.replace('_', '-')}" for name, value in useless.items() if value not in (None, NO_LABELS)]
    if names:
        what = {"folder": "an image folder", "tar": "tars", "parquet": "Parquet files"}[source.kind]
        warn_counted(
            log,
            "options without effect",
            "%s: no effect on %s, which is read as %s",
            listed(names),
            source.location,
            what,
        )


def _checked(source: Source) -> Source:
    """Return the source if its shard names are valid: they become file names in the label set."""
    for name, times in Counter(shard.name for shard in source.shards).items():
        if not re.fullmatch("[A-Za-z0-9._-]+", name):
            raise SourceError(
                f"{source.location}: a file name may have only A-Z a-z 0-9 . _ -, got {name!r}", fix="Rename it"
            )
        if times > 1:
            raise SourceError(
                f"{source.location}: {times} files are called {name!r}: names must be unique", fix="Rename them"
            )
    return source


@dataclass(frozen=True)
class FolderShard(SourceShard[str]):
    """A run of the images of a folder, with their paths, so that no process lists the folder again."""

    name: str
    root: Path
    class_names: tuple[str, ...] | None
    packed_paths: bytes  # paths relative to the root, one per line, deflated: 10 MB in all for ImageNet
    class_depth: int = 1  # parts of a path that are the name of its class
    known: ShardSummary | None = None  # from a kept listing

    def build_index(self) -> ShardIndex[str]:
        """Return the index from the unpacked paths; a class label is the position of the folder's name."""
        paths = tuple(zlib.decompress(self.packed_paths).decode().split("\n"))
        labels = {name: label for label, name in enumerate(self.class_names or ())}
        classes = ("/".join(path.split("/")[: self.class_depth]) for path in paths)
        return ShardIndex(tuple(map(_key, paths)), tuple(map(labels.get, classes)), paths)

    @cached_property
    def summary(self) -> ShardSummary:
        """Summary of the index."""
        return self.known or ShardSummary.of(self.index)

    def file_of(self, position: int) -> str:
        """Return the path of the file."""
        return str(self.root / self.index.places[position])

    def read_image(self, position: int) -> bytes:
        """Return the content of one file."""
        path = self.root / self.index.places[position]
        with reading(path):
            check_image_bytes(path.stat().st_size, path)
            if not path.is_file():  # reading a pipe would block
                raise SourceError(f"{path}: is not a file any more")
            return path.read_bytes()


def _open_folder(
    root: Path, options: SourceOptions, cache: Cache
) -> tuple[tuple[str, ...] | None, tuple[FolderShard, ...]]:
    """Return the class names of an image folder (None: no class folders) and its shards; the listing of a large folder is kept."""
    decides = {"options": asdict(options), "names": names_of_order(options), "samples_per_shard": SAMPLES_PER_SHARD}
    identity = sha256_json(decides)
    path = _kept_path(cache, root, identity, ".listing")
    listing = load_listing(path, identity, root)
    if listing is None:
        states = FolderStates()
        with heard() as told:
            listing = _packed(list_folder(root, options, states))
        if len(listing.packed_paths) * SAMPLES_PER_SHARD >= LEAST_KEPT:
            shards = _folder_shards(root, listing)
            listing = listing._replace(summaries=tuple(shard.summary for shard in shards))
            keep_listing(path, identity, listing, states, told)
    return listing.class_names, _folder_shards(root, listing)


def _packed(listing: Listing) -> KeptListing:
    """Return a listing with its images in the order of the source, cut into source shards.

    Images are ordered by a hash of their keys. In the order of their names, a thousand neighbours would have the same class,
    and neighbours become partners in mixup and CutMix.
    """
    paths = listing.paths
    paths.sort(key=lambda path: (hashlib.blake2b(_key(path).encode(), digest_size=16).digest(), path))
    parts = (paths[start : start + SAMPLES_PER_SHARD] for start in range(0, len(paths), SAMPLES_PER_SHARD))
    packed = tuple(zlib.compress("\n".join(part).encode()) for part in parts)
    return KeptListing(listing.class_names, listing.class_depth, packed, (None,) * len(packed))


def _folder_shards(root: Path, listing: KeptListing) -> tuple[FolderShard, ...]:
    return tuple(
        FolderShard(f"images-{number:06}", root, listing.class_names, packed, listing.class_depth, known)
        for number, (packed, known) in enumerate(zip(listing.packed_paths, listing.summaries, strict=True))
    )


def _key(path: str) -> str:
    return os.path.splitext(path)[0]
