"""WebDataset tars as source shards, read strictly.

`tarfile` treats a damaged header as the end of the archive and requires no end marker: it reads only a part of a cut or
damaged tar, without an error. Here every header must be valid up to the two zero blocks that end an archive. Nothing is
extracted to disk, and only images and members that may be class labels are read.
"""

import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import ClassVar, NamedTuple

from pipeline.errors import SourceError
from pipeline.images.class_names import class_numbers, names_of_order, read_class_names, reordered
from pipeline.images.samples import (
    LFS_POINTER,
    NO_OPTIONS,
    OTHER_PICTURES,
    Kept,
    ShardIndex,
    SourceOptions,
    SourceShard,
    check_image_bytes,
    file_state,
    reading,
)
from pipeline.images.tar_members import PLAIN, Archive, LabelReader, Member, TarLayout, find_image, layout_of, no_image
from pipeline.repeats import warn_counted
from pipeline.storage.place import File, RemoteFile
from pipeline.text import check_name

log = logging.getLogger("deit_cli.tars")

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
MAX_EXTENSION_BYTES = 1 << 20  # PAX records and long names: 1 MiB is a thousand times as much as names need
MAX_PADDING_BYTES = 64 << 20  # zeros after the end marker; tar writes 10 kB, but a sparse file could have any number

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_UNPACKED_BY = {
    "gzip": "gunzip",
    "bzip2": "bunzip2",
    "xz": "unxz",
    "zstd": "unzstd",
}
_USTAR = b"ustar\x0000"  # also the magic of PAX tars
_MAGICS = (_USTAR, b"ustar  \x00")  # magic of GNU tar
# POSIX reserves keywords without a dot. An unknown one is a damaged keyword, perhaps a damaged "path".
_PAX_KEYWORDS = frozenset(
    {"atime", "charset", "comment", "ctime", "gid", "gname", "hdrcharset"}
    | {"linkpath", "mtime", "path", "size", "uid", "uname"}
)


_UNSAFE = frozenset({"", ".", ".."})  # parts of a name; an absolute one begins with an empty part
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")


class TarPlace(NamedTuple):
    """The position of a sample in its tar, in bytes.

    The samples of a tar cover it without gaps: `stop` is the `start` of the next one, or the end marker. So nothing that an
    index leaves out can stay unnoticed.

    Attributes:
        start: first header that belongs to the sample; 0 for the first sample.
        stop: end of the sample and of what follows it without being a sample.
        data: first byte of the image.
        size: length of the image.
    """

    start: int
    stop: int
    data: int
    size: int


class Header(NamedTuple):
    """The fields of a header block that are used here; the rest (owner, times, links) is covered by its checksum and ignored."""

    name: str
    kind: bytes
    size: int


@contextmanager
def opened(file: File) -> Iterator[Archive]:
    """Open a tar, or the local copy of a remote one, for one use."""
    with reading(file), file.use(lambda path: open(path, "rb", buffering=0)) as tar:
        yield Archive(file, tar.fileno())


@dataclass(frozen=True)
class TarShard(SourceShard[TarPlace]):
    """The samples of one tar in the order of the archive.

    The tar is opened for every read (microseconds, while decoding takes a millisecond). So no open file is inherited, counts
    towards the limit of open files, or keeps a replaced file alive.
    """

    name: str
    file: File
    num_classes: int | None
    layout: TarLayout = PLAIN
    kept: Kept | None = None
    place_type: ClassVar[type[TarPlace]] = TarPlace

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """The tar if it is remote, else nothing."""
        return self.file.to_download

    @property
    def state(self) -> tuple[int, ...] | None:
        """Length and date of a local tar."""
        return file_state(self.file)

    def file_of(self, position: int) -> str:
        """Return the sample and the file it lies in."""
        return f"{self.index.keys[position]!r} in {self.file}"

    def build_index(self) -> ShardIndex[TarPlace]:
        """Return the index, from all headers and labels of the tar."""
        with opened(self.file) as archive:
            found = list(_all_samples(archive, self.num_classes, self.layout))
        keys, labels, starts, images = zip(*found, strict=True)
        bounds = [0, *starts[1:], archive.end]
        places = [
            TarPlace(start, stop, image.data, image.size)
            for start, stop, image in zip(bounds, bounds[1:], images, strict=False)
        ]
        return ShardIndex(keys, labels, places)

    def read_image(self, position: int) -> bytes:
        """Return the image of one sample; its headers and its class label are read again, and must be as in the index."""
        index = self.index
        place = index.places[position]
        if self.index_is_kept:
            _ = self._checked_cover
        with opened(self.file) as archive:
            labels = LabelReader(archive, self.layout, self.num_classes)
            try:
                found = list(_samples(archive, self.layout, labels, Counter(), place.start, place.stop))
            except (SourceError, OSError) as error:
                if not self.index_is_kept:
                    raise
                raise self.changed(f"{self.file}: byte {place.start}") from error
            expected = (index.keys[position], index.class_labels[position], place.data, place.size)
            if [(key, label, image.data, image.size) for key, label, _, image in found] != [expected]:
                raise self.changed(f"{self.file}: byte {place.start}")
            check_image_bytes(place.size, f"{self.file}: byte {place.data}")
            return archive.read(place.data, place.size)

    @cached_property
    def _checked_cover(self) -> bool:
        """Compare a kept index with the tar as a whole: its samples must follow each other up to a valid end of the tar."""
        bounds = [0, *(place.stop for place in self.index.places)]
        starts = [place.start for place in self.index.places]
        with opened(self.file) as archive:
            try:
                if starts != bounds[:-1] or archive.read(bounds[-1], BLOCK) != ZEROS:
                    raise archive.error(bounds[-1], "the tar does not end here")
                _check_end(archive, bounds[-1])
            except (SourceError, OSError) as error:
                raise self.changed(self.file) from error
        return True


def open_tars(
    files: Sequence[File], options: SourceOptions = NO_OPTIONS
) -> tuple[tuple[str, ...] | None, tuple[TarShard, ...]]:
    """Return the class names and one shard per tar.

    The names are in `classes.txt` in the folder of the tars, if it exists, or in the file that `class_order` names.
    """
    names = _class_names(dict.fromkeys(file.beside("classes.txt") for file in files))
    renumbered = None
    if names is None:
        names = names_of_order(options)
    elif options.class_order is not None:
        names, renumbered = reordered(names, options, where=files[0].beside("classes.txt"))
    num_classes = None if names is None else len(names)
    layout = layout_of(options, numbers=None if names is None else class_numbers(names), renumbered=renumbered)
    return names, tuple(TarShard(file.stem, file, num_classes, layout) for file in files)


def _class_names(files: Iterable[File]) -> tuple[str, ...] | None:
    """Return the class names in the files that exist."""
    read = {str(file): read_class_names(file) for file in sorted(files, key=str)}
    found = {name: names for name, names in read.items() if names is not None}
    if len(set(found.values())) > 1:
        raise SourceError(
            f"the tars of one source must share their classes; these differ: {', '.join(map(str, found))}"
        )
    return next(iter(found.values()), None)


def _all_samples(
    archive: Archive, num_classes: int | None, layout: TarLayout
) -> Iterator[tuple[str, int | None, int, Member]]:
    """Yield every sample as `_samples` does; raise SourceError for a tar without images, or without the labels that it seems to have."""
    others: Counter[str] = Counter()
    labels, images = LabelReader(archive, layout, num_classes), 0
    for sample in _samples(archive, layout, labels, others, 0, None):
        images += 1
        yield sample
    if not images:
        raise no_image(archive.file, others, layout)
    if unread := sum(others[extension] for extension in OTHER_PICTURES):
        warn_counted(
            log,
            "tars with pictures that are not read",
            "%s: %s not read, because they are not JPEG, PNG or WebP: convert them",
            archive.file,
            "1 picture is" if unread == 1 else f"{unread:,} pictures are",
        )
    labels.check()


def _samples(
    archive: Archive, layout: TarLayout, labels: LabelReader, others: Counter[str], start: int, stop: int | None
) -> Iterator[tuple[str, int | None, int, Member]]:
    """Yield key, class label, first byte and image of every sample; consecutive members with the same key are one sample.

    Args:
        archive: the tar.
        layout: which members are read.
        labels: reader of the class labels.
        others: receives the extensions in what has no image.
        start: offset of a header, from which on the tar is read.
        stop: offset of a header or of the end marker, at which reading stops; None: read all, up to a valid end of the tar.
    """
    seen: set[str] = set()
    for key, group in groupby(_named_members(archive, start, stop), key=attrgetter("key")):
        members = list(group)
        if key in seen:
            raise archive.refusal(
                members[0],
                f"belongs to key {key!r}, which ended earlier: keep its files together",
                "GNU tar does so with --sort=name",
            )
        seen.add(key)
        files = {member.extension: member for member in members}
        if len(files) < len(members):
            copy = next(member for member in members if files[member.extension] is not member)
            raise archive.refusal(copy, "stands twice in this tar")
        image = find_image(archive, files, layout)
        label = labels.label(files, of_image=image is not None)
        if image is not None:
            check_name(key, f"{archive.file}: byte {image.offset}: sample key")
            yield key, label, members[0].offset, image
        elif label is not None:
            raise archive.refusal(members[0], f"is a label without an image (of {key!r} there is {', '.join(files)})")
        else:
            others.update(files.keys())


def _named_members(archive: Archive, start: int, stop: int | None) -> Iterator[Member]:
    """Yield the members with a key and an extension; others (`.DS_Store`, `README`) cannot belong to a sample."""
    for member in _members(archive, start, stop):
        parts = member.name.split("/")
        if not _UNSAFE.isdisjoint(parts):
            raise archive.refusal(member, "has an unsafe name: it must be relative, without empty, '.' or '..' parts")
        if member.extension and not parts[-1].startswith("."):
            yield member


def _members(archive: Archive, offset: int, stop: int | None) -> Iterator[Member]:
    """Yield the files from a header to `stop` or the end marker; skip folders, and raise an error for anything else."""
    while offset != stop and (block := _block(archive, offset)) != ZEROS:
        start, header, extra = offset, _header(archive, offset, block), {}
        if header.kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            extra = _extension(archive, offset, header)
            offset = _end_of(archive, offset, header.size)
            header = _header(archive, offset, _block(archive, offset))
        size = int(extra.get("size", header.size))
        data, offset = offset + BLOCK, _end_of(archive, offset, size)
        if header.kind == tarfile.XGLTYPE:
            _check_global(archive, start, size)
            continue
        member = _member(extra.get("path", header.name), start, data, size)
        if header.kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield member
        elif header.kind != tarfile.DIRTYPE or size:
            raise archive.refusal(
                member, f"must be a plain file, got tar type {header.kind!r} (link, device or sparse)"
            )
    archive.end = offset
    if stop is None:
        _check_end(archive, offset)
    elif offset != stop:
        raise archive.error(offset, f"the tar ends here, its index goes on to byte {stop}")


def _member(name: str, offset: int, data: int, size: int) -> Member:
    name = name.removeprefix("./")  # `tar -C folder .` puts it before every name
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return Member(name, folder + slash + stem, (dot + extension).lower(), offset, data, size)


def _block(archive: Archive, offset: int) -> bytes:
    if 0 == offset < archive.size < BLOCK:
        raise _not_a_header(archive, 0, archive.read(0, archive.size))
    if offset >= archive.size:
        raise archive.error(
            offset, "the file is cut off: it has no end-of-archive marker (two zero blocks). Copy it again"
        )
    return archive.read(offset, BLOCK)


def _header(archive: Archive, offset: int, block: bytes) -> Header:
    """Return the fields of one header block. It is ten times as fast as `tarfile`, which matters for a million members."""
    size, checksum, magic = _number(block[124:136]), _number(block[148:156]), block[257:265]
    # The checksum is the sum of the block with eight spaces in place of the checksum: it detects a change of any one byte.
    if size is None or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" ") or magic not in _MAGICS:
        raise _not_a_header(archive, offset, block)
    prefix = _text(block[345:500]) if magic == _USTAR else ""
    return Header(f"{prefix}/{_text(block[:100])}" if prefix else _text(block[:100]), block[156:157], size)


def _number(field: bytes) -> int | None:
    """Return a number from a header: octal digits, or (GNU, from 8 GiB on) 0x80 and a big-endian integer."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    return int(match[1] or b"0", 8) if match else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")  # `check_name` reports names that are not UTF-8


def _not_a_header(archive: Archive, offset: int, block: bytes) -> SourceError:
    if offset:
        return archive.error(offset, "damaged tar header. Copy the file again")
    if block.startswith(LFS_POINTER):
        return archive.error(offset, "a pointer of Git LFS and not the tar itself", "Run git lfs pull")
    packed = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), None)
    advice = f"compressed with {packed}: decompress it first" if packed else "it does not begin with a tar header"
    fix = f"{_UNPACKED_BY[packed]} < {archive.file} > unpacked.tar" if packed else None
    return archive.error(offset, f"not a plain USTAR, GNU or PAX tar ({advice})", fix)


def _end_of(archive: Archive, offset: int, size: int) -> int:
    """Return the offset of the next header, after the data of the header at `offset`."""
    end = offset + BLOCK + -(-size // BLOCK) * BLOCK
    if end > archive.size:
        raise archive.error(offset, f"the file is cut off: a member of {size} bytes ends behind it. Copy it again")
    return end


def _extension(archive: Archive, offset: int, header: Header) -> dict[str, str]:
    """Return the path and size that an extended header gives to the next member, if any."""
    body = _extension_body(archive, offset, header.size)
    if header.kind == tarfile.XHDTYPE:
        return _pax_records(archive, offset, body)
    name, _, rest = body.partition(b"\0")
    if rest.strip(b"\0"):
        raise archive.error(offset, "damaged long name")
    return {"path": _text(name)}


def _extension_body(archive: Archive, offset: int, size: int) -> bytes:
    if size > MAX_EXTENSION_BYTES:
        raise archive.error(offset, f"an extended header must be at most {MAX_EXTENSION_BYTES} bytes, got {size}")
    return archive.read(offset + BLOCK, size)


def _pax_records(archive: Archive, offset: int, body: bytes) -> dict[str, str]:
    """Return path and size from PAX records, "<length> <keyword>=<value>\\n", which must fill the body exactly."""
    records: dict[str, str] = {}
    while body:
        match = re.match(rb"([1-9][0-9]{0,6}) ([^=\n]+)=", body)
        length = int(match[1]) if match else 0
        if not match or match.end() >= length or length > len(body) or body[length - 1 : length] != b"\n":
            raise archive.error(offset, "damaged PAX header")
        keyword = match[2].decode("utf-8", "replace")
        if (
            keyword in records
            or keyword.startswith("GNU.sparse.")
            or ("." not in keyword and keyword not in _PAX_KEYWORDS)
        ):
            raise archive.error(offset, f"PAX header with a repeated, sparse or unknown record {keyword!r}")
        records[keyword] = body[match.end() : length - 1].decode("utf-8", "surrogateescape")
        body = body[length:]
    if not re.fullmatch("[0-9]{1,19}", records.get("size", "0"), re.ASCII):
        raise archive.error(offset, f"PAX header with a size that is not a number: {records['size']!r}")
    return {field: records[field] for field in ("path", "size") if field in records}


def _check_global(archive: Archive, offset: int, size: int) -> None:
    """Check that a global header does not rename or resize members (`git archive` writes one with a comment)."""
    if _pax_records(archive, offset, _extension_body(archive, offset, size)):
        raise archive.error(offset, "global PAX header with a path or size for every member")


def _check_end(archive: Archive, offset: int) -> None:
    """Check that the zero block at `offset` begins the end marker: a second zero block, and then only zeros."""
    if archive.size - offset > MAX_PADDING_BYTES:
        raise archive.error(offset, f"{archive.size - offset} bytes behind the end of the archive. Write it anew")
    if archive.size < offset + 2 * BLOCK or archive.size % BLOCK:
        raise archive.error(offset, "the file is cut off: one zero block where two end an archive. Copy it again")
    for position in range(offset, archive.size, 1 << 20):
        chunk = archive.read(position, min(1 << 20, archive.size - position))
        if chunk.count(0) != len(chunk):
            position += len(chunk) - len(chunk.lstrip(b"\0"))
            raise archive.error(position, "data behind the end of the archive (tars joined with cat?). Write it anew")
