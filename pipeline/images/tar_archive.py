"""Tars whose bytes depend only on their members: no times, no owners, PAX headers only for names that need one.

Members are written one by one, so memory holds only one of them (`tarfile` keeps a record of each).
"""

import tarfile
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, Protocol

from pipeline.errors import SourceError

BLOCK = tarfile.BLOCKSIZE
INFO_NAME = "_info.json"  # the file beside tars in which timm looks for their names and sizes


class Writable(Protocol):
    """What a tar is written to: an open file, or an object that passes the bytes on to one."""

    def write(self, data: bytes, /) -> Any:
        """Write all bytes."""
        ...


def write_tar(file: Writable, members: Iterable[tuple[str, bytes]], *, comment: str | None = None) -> None:
    """Write a whole tar.

    Args:
        file: open file; the tar is written at its current position.
        members: name and content of each member, in order.
        comment: comment of the archive, in a global PAX header, which tar readers ignore.
    """
    if comment is not None:
        file.write(tarfile.TarInfo.create_pax_global_header({"comment": comment}))
    for name, content in members:
        file.write(_header(name, len(content)))
        file.write(content)
        file.write(bytes(-len(content) % BLOCK))
    file.write(bytes(2 * BLOCK))


def _header(name: str, size: int) -> bytes:
    """Return the header of a member: mode 644, owner 0, mtime 0."""
    if not name.isascii() or len(name) > tarfile.LENGTH_NAME or size >= _MAX_OCTAL:
        return _library_header(name, size)
    # Most names need no PAX header. For these, the header is put together here, a quarter of the time that the library takes.
    fields = name.encode().ljust(tarfile.LENGTH_NAME, b"\0"), b"%011o\0" % size
    checksum = _REST_SUM + sum(map(sum, fields))
    return b"".join((fields[0], _EMPTY[100:124], fields[1], _EMPTY[136:148], b"%06o\0 " % checksum, _EMPTY[156:]))


def _library_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


_MAX_OCTAL = 8**11  # sizes from 8 GiB on do not fit into the field
_EMPTY = _library_header("", 0)
_REST_SUM = sum(_EMPTY[100:124]) + sum(_EMPTY[136:148]) + 8 * ord(" ") + sum(_EMPTY[156:])


def read_comment(file: BinaryIO) -> str | None:
    """Return the comment of a tar that `write_tar` wrote, or None if it has none. The position of the file changes."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return tar.pax_headers.get("comment")
    except (tarfile.TarError, EOFError):
        return None


def check_member_key(key: str, where: str) -> str:
    """Return the sample key if WebDataset can read it back from the name of a member, else raise SourceError.

    Args:
        key: the sample key.
        where: name of the source shard, for the error.
    """
    parts = key.split("/")
    if "." in parts[-1]:
        rule = "its last part may have no dot, which is where WebDataset ends a key"
    elif not {"", ".", ".."}.isdisjoint(parts):
        rule = "it must be relative, without empty, '.' or '..' parts"
    else:
        return key
    raise SourceError(
        f"{where}: sample key {key!r} cannot name a file in a WebDataset tar: {rule}", fix="Rename the image"
    )


def member_extension(image: bytes) -> str:
    """Return the extension for the format of an image, from its first bytes; unknown formats get `.jpg`."""
    if image[:8] == b"\x89PNG\r\n\x1a\n":
        return ".png"
    return ".webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else ".jpg"


def timm_info(files: Mapping[str, int], *, split: str, label_field: str | None = None) -> dict[str, Any]:
    """Return timm's `_info.json` for tars.

    Args:
        files: number of images of each tar, by its name, in order.
        split: name of the split that they make up, which users pass to timm.
        label_field: field of the `.json` members that timm reads as the label unless it is told otherwise; None: `.cls`.
    """
    about: dict[str, Any] = {
        "name": split,
        "num_samples": sum(files.values()),
        "filenames": list(files),
        "shard_lengths": list(files.values()),
    }
    if label_field is not None:
        about["alt_label"] = label_field
    return {"splits": {split: about}}
