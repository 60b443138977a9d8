"""Lists the images of a folder: which folders are classes, which files are images, and what is passed over."""

import json
import logging
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import xxhash

from pipeline.errors import SourceError, StorageError
from pipeline.images.class_names import names_of_order, ordered_class_names
from pipeline.images.index import note_use
from pipeline.images.samples import IMAGE_EXTENSIONS, NO_LABELS, OTHER_PICTURES, ShardSummary, SourceOptions, reading
from pipeline.repeats import Told, say_again, warn_counted
from pipeline.storage.atomic import make_folder, replace_file
from pipeline.storage.json import canonical_json
from pipeline.text import check_name, count, first_few, listed, printable

log = logging.getLogger("deit_cli.folders")

# Folders that systems and programs make beside the images: macOS, Jupyter, Synology, Linux, Windows.
NOT_OURS = frozenset(
    {"__MACOSX", ".ipynb_checkpoints", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
    "testing": "test", "eval": "val", "evaluation": "val",
}  # fmt: skip
IMAGE_FOLDERS = frozenset({"image", "images", "img", "imgs", "jpegimages", "jpg", "data"})  # which name no class
ARCHIVES = (".tar", ".parquet")
_VERSION = 1  # of kept listings, and of how a folder is listed: a change of either makes them useless
_SETTLED_NS = 3_000_000_000  # some file systems count dates in steps of two seconds
UNPACK = {
    ".tar.gz": ("tar -xzf {file} -C {folder}", "gunzip"),
    ".tgz": ("tar -xzf {file} -C {folder}", "gunzip"),
    ".tar.bz2": ("tar -xjf {file} -C {folder}", "bunzip2"),
    ".tar.xz": ("tar -xJf {file} -C {folder}", "unxz"),
    ".tar.zst": ("tar --zstd -xf {file} -C {folder}", "unzstd"),
    ".zip": ("unzip -q {file} -d {folder}", None),
    ".7z": ("7z x {file} -o{folder}", None),
    ".rar": ("unrar x {file} {folder}/", None),
}


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
        class_names: names of the classes in the order of their numbers; None if there are no class folders.
        paths: paths of the images below the root, in any order.
        class_depth: number of parts of a path that are the name of its class.
    """

    class_names: tuple[str, ...] | None
    paths: list[str]
    class_depth: int


class KeptListing(NamedTuple):
    """The images of a folder in the form in which a large folder is kept.

    Attributes:
        class_names: as in `Listing`.
        class_depth: as in `Listing`.
        packed_paths: for each source shard, its paths in order, one per line, deflated.
        summaries: for each source shard, what it holds in all.
    """

    class_names: tuple[str, ...] | None
    class_depth: int
    packed_paths: tuple[bytes, ...]
    summaries: tuple[ShardSummary | None, ...]


class FolderStates(dict[str, list[int]]):
    """The state of each folder that was listed, by its path below the root.

    It has both dates (ns), inode and device: the date of the content can be set, the other one cannot, and a link may lead elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.began_ns = time.time_ns()


def list_folder(root: Path, options: SourceOptions, states: FolderStates | None = None) -> Listing:
    """Return the images below a folder, and their classes.

    Args:
        root: the folder.
        options: how it is read.
        states: receives the date of each folder, from before it was listed.

    Raises:
        SourceError: it has no image, or its layout can be read in several ways.
    """
    walk = _Walk(root, states=FolderStates() if states is None else states)
    top = walk.scan("")
    if options.labels_file is not None:
        listing = Listing(None, walk.below("", frozenset()), 0)
    elif not top.folders and options.class_depth is not None and top.images:
        raise SourceError(f"{root}: has no class folders for --class-depth {options.class_depth}")
    elif not top.folders:
        listing = Listing(None, top.images, 0)
    elif top.images:
        raise SourceError(
            f"{root}: holds both images ({min(top.images)}) and folders ({top.folders[0]}): classes are folders",
            fix="Move the images into a class folder, or elsewhere",
        )
    else:
        listing = _class_folders(walk, top.folders, options)
    if not listing.paths:
        raise _no_image(walk, top.folders)
    walk.say_what_was_passed_over()
    return Listing(None, listing.paths, 0) if options.label_key == NO_LABELS else listing


class _Scan(NamedTuple):
    """Paths below the root of the folders, sorted, and the images directly in one folder."""

    folders: list[str]
    images: list[str]


@dataclass
class _Walk:
    """Lists folders below a root, and counts what is passed over."""

    root: Path
    not_ours: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)  # by extension, of those that are not read
    states: FolderStates = field(default_factory=FolderStates)

    def scan(self, folder: str) -> _Scan:
        """Return the folders and images directly in a folder ("" is the root); hidden ones and other files are ignored."""
        scan = _Scan([], [])
        keys: dict[str, str] = {}
        with reading(self.root / folder):
            self.states[folder] = _state(self.root / folder)
        with reading(self.root / folder), os.scandir(self.root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name in NOT_OURS:
                    self.not_ours[entry.name] += 1
                elif entry.name.startswith("."):
                    continue
                elif (extension := os.path.splitext(entry.name)[1].lower()) in IMAGE_EXTENSIONS:
                    scan.images.append(self._image(entry, path, keys))
                elif entry.is_dir():
                    scan.folders.append(path)
                elif not extension and entry.is_symlink() and not os.path.exists(entry.path):
                    raise SourceError(f"{entry.path}: a broken link", fix="Remove it, or bring back where it leads")
                else:
                    self.pictures[extension] += extension in OTHER_PICTURES
        scan.folders.sort()
        return scan

    def _image(self, entry: os.DirEntry[str], path: str, keys: dict[str, str]) -> str:
        if not entry.is_file():
            raise SourceError(f"{entry.path}: named like an image, but not a file (a broken link, or a folder)")
        key = check_name(os.path.splitext(path)[0], f"{self.root}: sample key")
        if key in keys:
            raise SourceError(f"{self.root}: {keys[key]} and {path} share the key {key!r}", fix="Rename one")
        keys[key] = path
        return path

    def below(self, folder: str, above: frozenset[tuple[int, int]]) -> list[str]:
        """Return all images in a folder and below it.

        Args:
            folder: path below the root.
            above: device and inode of the folders above it, among which a link must not lead.
        """
        with reading(self.root / folder):
            state = (self.root / folder).stat()
        if (state.st_dev, state.st_ino) in above:
            raise SourceError(printable(f"{self.root / folder}: a link to a folder above it"), fix="Remove it")
        scan = self.scan(folder)
        inner = (self.below(name, above | {(state.st_dev, state.st_ino)}) for name in scan.folders)
        return [*scan.images, *(path for paths in inner for path in paths)]

    def say_what_was_passed_over(self) -> None:
        """Log how many folders of systems and programs there are, and how many pictures that are not read."""
        if self.not_ours:
            told = listed([f"{name} ({number:,})" for name, number in sorted(self.not_ours.items())])
            log.info("%s: passed over folders that hold no images of yours: %s", self.root, told)
        if number := self.pictures.total():
            warn_counted(
                log,
                "folders with pictures that are not read",
                "%s: %s not read, because they are not JPEG, PNG or WebP (%s): convert them",
                self.root,
                "1 picture is" if number == 1 else f"{number:,} pictures are",
                _kinds(self.pictures),
            )


def _kinds(pictures: Counter[str]) -> str:
    return first_few([extension for extension, number in pictures.most_common() if number], 4)


def _class_folders(walk: _Walk, folders: Sequence[str], options: SourceOptions) -> Listing:
    if options.class_depth is None:
        _refuse_splits(walk.root, folders)
    found: dict[str, list[str]] = {}
    for folder in folders:
        check_name(folder, f"{walk.root}: class name")
        if options.class_depth is None:
            found[folder] = _flat_class(walk, folder, folders)
        else:
            found |= _classes_below(walk, folder, options.class_depth)
    used = [name for name, paths in found.items() if paths]
    if options.class_depth is None and used == list(folders) and len(used) == 1:
        _refuse_one_folder_of_all(walk.root, used[0])
    known = names_of_order(options) or ()
    if used and (empty := sorted(name for name, paths in found.items() if not paths and name not in known)):
        warn_counted(
            log,
            "folders with empty class folders",
            "%s: %s without an image: %s. %s no class; name all classes with --class-order FILE if it should be one",
            walk.root,
            count(len(empty), "class folder"),
            first_few(empty, 5),
            "It is" if len(empty) == 1 else "They are",
        )
    paths = [path for paths in found.values() for path in paths]
    names = ordered_class_names(used, options, where=walk.root) if used else None
    return Listing(names, paths, options.class_depth or 1)


def _flat_class(walk: _Walk, folder: str, folders: Sequence[str]) -> list[str]:
    """Return the images of a class folder, which may have no folders in it."""
    scan = walk.scan(folder)
    if scan.folders:
        inner = scan.folders[0]
        rest = f", or {walk.root / folder} for the folder below" if len(folders) == 1 else ""
        raise SourceError(
            printable(f"{walk.root}: images must lie in class/name.jpg, but {inner} is a folder"),
            fix=f"Pass --class-depth 1 if {folder!r} is the class, or --class-depth 2 if {inner!r} is{rest}",
        )
    return scan.images


def _classes_below(walk: _Walk, folder: str, depth: int) -> dict[str, list[str]]:
    """Return the images of each class folder that is `depth - 1` levels below a folder."""
    if folder.count("/") + 1 == depth:
        return {folder: walk.below(folder, frozenset())}
    scan = walk.scan(folder)
    if scan.images:
        raise SourceError(
            f"{walk.root}: {min(scan.images)} lies above the class folders of --class-depth {depth}",
            fix="Pass a smaller --class-depth, or move it into a class folder",
        )
    found: dict[str, list[str]] = {}
    for inner in scan.folders:
        check_name(inner, f"{walk.root}: class name")
        found |= _classes_below(walk, inner, depth)
    return found or {folder: []}


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    """Raise SourceError for a root whose folders are splits of a data set: they are no classes."""
    found = {name: _splits_in(name) for name in folders}
    plain = [name for name, parts in found.items() if parts and len(parts) == len(_words(name))]  # train, test1
    kinds = {split for name in plain for split in found[name]}
    if all(found.values()) and len(set().union(*found.values())) > 1:  # ILSVRC2012_img_train and ILSVRC2012_img_val
        plain = list(folders)
    elif len(plain) < len(folders) and len(kinds) < 2:
        return
    raise SourceError(
        f"{root}: its folders {listed(plain)} are splits of a data set and no classes",
        fix=f"Pass {root / plain[0]}, or --class-depth 1 if they are classes",
    )


def _words(name: str) -> list[str]:
    return [word for word in re.split("[^a-z]+", name.lower()) if word]


def _splits_in(name: str) -> set[str]:
    return {SPLITS[word] for word in _words(name) if word in SPLITS}


def _refuse_one_folder_of_all(root: Path, folder: str) -> None:
    """Raise SourceError for a root whose only folder is called `images`: it is no class."""
    if folder.lower() in IMAGE_FOLDERS:
        raise SourceError(
            f"{root}: its only folder {folder!r} would be its only class",
            fix=f"Pass {root / folder}, or --class-depth 1 if it is a class",
        )


def _no_image(walk: _Walk, folders: Sequence[str]) -> SourceError:
    """Return the error for a folder without an image, which says what is there instead."""
    with reading(walk.root):
        beside = sorted(os.listdir(walk.root))
    if packed := [name for name in beside if packed_suffix(name)]:
        return unpack_first(str(walk.root / packed[0]), more=len(packed) - 1)
    fix = None
    if kinds := Counter(os.path.splitext(name)[1] for name in beside if not name.startswith(".") and "." in name):
        fix = f"It has {', '.join(f'{kind} ({number:,})' for kind, number in kinds.most_common(3))}"
        if kinds[".arrow"]:  # of datasets.save_to_disk
            fix += ": write it as Parquet with datasets.load_from_disk(FOLDER).to_parquet(FILE)"
    for folder in folders:
        with reading(walk.root / folder):
            inside = os.listdir(walk.root / folder)
        if archives := sorted(name for name in inside if name.endswith(ARCHIVES)):
            fix = f"{folder} holds {archives[0]}: pass {walk.root / folder}"
            break
    if number := walk.pictures.total():
        fix = f"It has {count(number, 'picture')} ({_kinds(walk.pictures)}): convert them to JPEG, PNG or WebP"
    what = f"{walk.root}: no image in this folder (.jpg, .jpeg, .png and .webp are read)"
    return SourceError(what, fix=fix and printable(fix))


def packed_suffix(name: str) -> str | None:
    """Return the ending of a file that must be unpacked, such as `.tar.gz`, or None."""
    return next((suffix for suffix in UNPACK if name.lower().endswith(suffix)), None)


def unpack_first(name: str, more: int = 0) -> SourceError:
    """Return the error for a packed file, with the command that unpacks it.

    Args:
        name: path or URL of the file, which has one of the endings in UNPACK.
        more: how many more such files there are.
    """
    suffix = packed_suffix(name) or ""
    stem = name[: -len(suffix)]
    unpack, decompress = UNPACK[suffix]
    command = unpack.format(file=shlex.quote(name), folder=shlex.quote(stem))
    fix = f"Unpack it:  mkdir {shlex.quote(stem)} && {command}  and pass {stem}"
    if decompress:
        fix += f". If it is a WebDataset tar:  {decompress} {shlex.quote(name)}  and pass {stem}.tar"
    others = f" ({more:,} more in this folder)" if more else ""
    return SourceError(printable(f"{name}{others}: a {suffix} file is not read as it is"), fix=printable(fix))


def refuse_several_splits(location: str, names: Iterable[str]) -> None:
    """Raise SourceError if the files of a folder belong to several splits, such as train-0.tar and validation-0.tar."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        splits = _splits_in(name)
        if len(splits) == 1:
            found.setdefault(splits.pop(), []).append(name)
    if len(found) > 1:
        told = listed([f"{len(files):,} of {split!r} ({files[0]})" for split, files in found.items()])
        one = found.get("train") or next(iter(found.values()))
        raise SourceError(
            printable(f"{location}: holds files of several splits of a data set: {told}"),
            fix=printable(f"Pass one split, such as {location.rstrip('/')}/{_brace_expression(one)}"),
        )


def _brace_expression(names: Sequence[str]) -> str:
    """Return one expression for some sorted names, or the first name if there is no short one."""
    parts = [re.split(r"(\d+)", name) for name in names]  # numbers are at odd positions
    varying = [place for place, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
    if len({len(each) for each in parts}) == 1 and len(varying) == 1 and varying[0] % 2:
        (place,) = varying
        numbers = [each[place] for each in parts]
        if [int(number) for number in numbers] == list(range(int(numbers[0]), int(numbers[0]) + len(numbers))):
            middle = f"{{{numbers[0]}..{numbers[-1]}}}"
            return "".join([*parts[0][:place], middle, *parts[0][place + 1 :]])
    return names[0]


# The listing of a large folder, kept


def _state(folder: Path) -> list[int]:
    found = os.stat(folder)
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def load_listing(path: Path, identity: str, root: Path) -> KeptListing | None:
    """Return a kept listing, with the messages of when it was made; None if there is none, or a folder has changed since.

    It is believed as a whole or not at all: the file ends with the hash of what is before.
    """
    try:
        if not path.is_file():  # opening a pipe would wait
            return None
        data = path.read_bytes()
        body, digest = data[:-16], data[-16:]
        if xxhash.xxh3_128_digest(body) != digest:
            return None
        size = int.from_bytes(body[:8], "little")
        about = json.loads(body[8 : 8 + size])  # ours, as its hash says
        if about["version"] != _VERSION or about["identity"] != identity:
            return None
        if any(_state(root / folder) != state for folder, state in about["folders"].items()):
            return None
        ends = [0, *accumulate(about["packed_bytes"])]
        listing = KeptListing(
            class_names=None if about["class_names"] is None else tuple(about["class_names"]),
            class_depth=about["class_depth"],
            packed_paths=tuple(body[8 + size + a : 8 + size + b] for a, b in pairwise(ends)),
            summaries=tuple(ShardSummary(**each) for each in about["summaries"]),
        )
        told = [Told(*each) for each in about["told"]]
        note_use(path, path.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        log.debug("%s cannot be used: %s", path, error)
        return None
    say_again(told)
    return listing


def keep_listing(path: Path, identity: str, listing: KeptListing, states: FolderStates, told: Sequence[Told]) -> None:
    """Write a listing, unless a folder had just changed when it was listed: it could have changed again with the same date."""
    if max(max(state[:2]) for state in states.values()) > states.began_ns - _SETTLED_NS:
        return
    about = {
        "version": _VERSION,
        "identity": identity,
        "class_names": listing.class_names,
        "class_depth": listing.class_depth,
        "packed_bytes": [len(packed) for packed in listing.packed_paths],
        "summaries": [asdict(summary) for summary in listing.summaries if summary],
        "folders": states,
        "told": told,
    }
    head = canonical_json(about)
    body = b"".join([len(head).to_bytes(8, "little"), head, *listing.packed_paths])
    try:
        make_folder(path.parent)
        replace_file(path, body + xxhash.xxh3_128_digest(body))
    except StorageError as error:  # each command then lists the folder again
        log.debug("%s cannot be written: %s", path, error)
