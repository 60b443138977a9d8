"""Tars, Parquet files, folders and images that lie."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support.label_sets import coloured_png

BLOCK = 512
END = bytes(2 * BLOCK)
IMAGE = coloured_png(1)
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "/etc/passwd" if kind in (b"1", b"2") else ""
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % BLOCK)


def repaired(block: bytes) -> bytes:
    """Return a header block whose checksum is right again."""
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def with_size(field: bytes) -> bytes:
    """Return the header of an image whose size field has other bytes, and a right checksum."""
    block = header("a.png", 0)
    return repaired(block[:124] + field + block[136:])


def a_tar(*parts: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / "t.tar").write_bytes(b"".join(parts) + END)
        return folder / "t.tar"

    return build


def pax(records: bytes) -> bytes:
    return member("x", records, tarfile.XHDTYPE)


def holes(before: bytes, size: int, after: bytes = b"") -> Callable[[Path], Path]:
    """A tar of that many zero bytes between two parts, which take no room on the disk."""

    def build(folder: Path) -> Path:
        with (folder / "t.tar").open("wb") as file:
            file.write(before)
            file.truncate(len(before) + size)
            file.seek(0, os.SEEK_END)
            file.write(after)
        return folder / "t.tar"

    return build


def named_pipe(name: str, *beside: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        os.mkfifo(folder / name)
        if beside:
            a_tar(*beside)(folder)
        return folder

    return build


def a_folder(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder

    return build


def link_to(target: str, name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder

    return build


def a_parquet(rows: Sequence[dict], *, metadata: dict | None = None, **columns) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        table = pa.table({"image": pa.array(rows, IMAGE_TYPE), **columns}).replace_schema_metadata(metadata)
        pq.write_table(table, folder / "t.parquet", compression="zstd")
        return folder / "t.parquet"

    return build


ONE = [{"bytes": IMAGE, "path": "a.png"}]
DEEP = b"[" * 200_000
SOURCES = [
    # name, how to build it, error type, text
    ("absolute name", a_tar(member("/etc/a.png", IMAGE)), "SourceError", "has an unsafe name"),
    ("name upwards", a_tar(member("../../a.png", IMAGE)), "SourceError", "has an unsafe name"),
    ("PAX name upwards", a_tar(pax(b"20 path=../../a.png\n"), member("a.png", IMAGE)), "SourceError", "unsafe name"),
    ("PAX name with NUL", a_tar(pax(b"18 path=a\0bcd.png\n"), member("a.png", IMAGE)), "SourceError", "control characters"),
    ("symbolic link", a_tar(header("a.png", 0, tarfile.SYMTYPE)), "SourceError", "must be a plain file"),
    ("hard link", a_tar(header("a.png", 0, tarfile.LNKTYPE)), "SourceError", "must be a plain file"),
    ("device", a_tar(header("a.png", 0, tarfile.CHRTYPE)), "SourceError", "must be a plain file"),
    ("pipe in a tar", a_tar(header("a.png", 0, tarfile.FIFOTYPE)), "SourceError", "must be a plain file"),
    ("sparse member", a_tar(header("a.png", 0, tarfile.GNUTYPE_SPARSE)), "SourceError", "must be a plain file"),
    ("folder with a size", a_tar(header("a", 1 << 20, tarfile.DIRTYPE) + bytes(1 << 20)), "SourceError", "plain file"),
    ("size of 8 EiB", a_tar(with_size(b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7)), "SourceError", "is cut off"),
    ("negative size", a_tar(with_size(b"\xff" * 12)), "SourceError", "damaged tar header|not a plain"),
    ("negative octal size", a_tar(with_size(b"-0000000001\0")), "SourceError", "damaged tar header|not a plain"),
    ("PAX size of 10 EB", a_tar(pax(b"28 size=9999999999999999999\n"), member("a.png", IMAGE)), "SourceError", "is cut off"),
    ("long name of 8 GiB", a_tar(header("x", (8 << 30) - 1, tarfile.GNUTYPE_LONGNAME)), "SourceError", "cut off|at most"),
    ("PAX header of 2 MiB", a_tar(pax(bytes(2 << 20)), member("a.png", IMAGE)), "SourceError", "at most 1048576 bytes"),
    ("PAX sparse", a_tar(pax(b"22 GNU.sparse.major=1\n"), member("a.png", IMAGE)), "SourceError", "sparse or unknown"),
    ("image of a hole", holes(header("a.png", (2 << 30)), 2 << 30, END), "SourceError", "at most 1073741824 bytes"),
    ("hole behind the end", holes(member("a.png", IMAGE) + END, 1 << 42), "SourceError", "bytes behind the end"),
    ("key twice", a_tar(member("a.png", IMAGE), member("b.png", IMAGE), member("a.cls", b"1")), "SourceError", "ended earlier"),
    ("negative class", a_tar(member("a.png", IMAGE), member("a.cls", b"-1")), "SourceError", "one class number"),
    ("class of a billion digits", a_tar(member("a.png", IMAGE), member("a.cls", b"9" * 10**6)), "SourceError", "one class number"),
    ("class NaN", a_tar(member("a.png", IMAGE), member("a.json", b'{"label": NaN}')), "SourceError", "integer label, got nan"),
    ("deep JSON", a_tar(member("a.png", IMAGE), member("a.json", DEEP)), "SourceError", "is not JSON"),
    ("JSON of brackets", a_tar(member("a.png", IMAGE), member("a.json", b"[" + b"[]," * (5 << 20) + b"0]")), None, ""),
    ("number of a million digits", a_tar(member("a.png", IMAGE), member("a.json", b'{"label": ' + b"9" * 10**6 + b"}")), "SourceError", "is not JSON"),
    ("pickle beside it", a_tar(member("a.png", IMAGE), member("a.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."), member("a.pyd", b"\x80\x04.")), None, ""),
    ("drive letter", a_tar(member("C:\\a.png", IMAGE)), None, ""),  # a key; no key is ever a path here
    ("dots that look like dots", a_tar(member("․․/a.png".encode().decode(), IMAGE)), None, ""),
    ("image that is HTML", a_tar(member("a.jpg", b"<html>")), "BadImageError", "not a JPEG, PNG or WebP"),
    ("pipe as tar", named_pipe("t.tar"), "SourceError", "but not a file"),
    ("pipe as Parquet", named_pipe("t.parquet"), "SourceError", "but not a file"),
    ("pipe as image", named_pipe("t.png"), "SourceError", "but not a file"),
    ("pipe as class names", named_pipe("classes.txt", member("a.png", IMAGE)), "SourceError", "must be a plain file"),
    ("folder as tar", a_folder("t.tar"), "SourceError", "but not a file"),
    ("endless file as tar", link_to("/dev/zero", "t.tar"), "SourceError", "but not a file"),
    ("endless file as image", link_to("/dev/zero", "t.png"), "SourceError", "but not a file"),
    ("endless class names", lambda folder: link_to("/dev/zero", "classes.txt")(a_tar(member("a.png", IMAGE))(folder).parent), "SourceError", "must be a plain file"),
    ("deep metadata", a_parquet(ONE, metadata={"huggingface": "[" * 200_000}), "SourceError", "cannot be read"),
    ("metadata of 17 MiB", a_parquet(ONE, metadata={"huggingface": " " * (17 << 20)}), "SourceError", "at most 16777216"),
    ("path elsewhere", a_parquet([{"bytes": None, "path": "/etc/passwd"}]), "SourceError", "is not followed"),
    ("huge label", a_parquet(ONE, label=pa.array([2**63 - 1])), "SourceError", "class label must be in"),
    ("negative label", a_parquet(ONE, label=pa.array([-7])), "SourceError", "class label must be in"),
    ("names that are numbers", a_parquet(ONE, label=pa.array([0]), metadata={"huggingface": json.dumps({"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}})}), "SourceError", "list of strings"),
    ("ESC in a class name", a_parquet(ONE, label=pa.array([0]), metadata={"huggingface": json.dumps({"info": {"features": {"label": {"names": ["\x1b[2J"], "_type": "ClassLabel"}}}})}), "SourceError", "control characters"),
    # 40 paths of 10 MB from one entry of a dictionary: the key is what is refused
    ("dictionary that unpacks", a_parquet([{"bytes": b"x", "path": "p" * 10**7}] * 40), "BadImageError", "not a JPEG"),
    # 300 images of 10 MB from one entry of a dictionary
    ("images that unpack", a_parquet([{"bytes": bytes(10**7), "path": f"{n}.png"} for n in range(300)]), "SourceError", "more than 2147483648 bytes|damaged, or not Parquet: malloc of size"),
]  # fmt: skip


def png(height: int, width: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, 100 bytes that change nothing, stands there over and over."""
    buffer = io.BytesIO()
    Image.new("L", (2000, 2000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def text_bomb() -> bytes:
    """A PNG with 100 MB of text in 100 kB."""
    body = b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9)
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = png(1, 1, b"\0\0")
    return whole[:33] + text + whole[33:]


IMAGES = [
    ("14,000 x 14,000 pixels in 24 kB", lambda: png(14_000, 14_000, bytes(1751 * 14_000)), "too many pixels"),
    ("2 billion squared", lambda: png(2**31 - 1, 2**31 - 1, b""), "too many pixels|damaged"),
    ("1000 scans", lambda: many_scans(1000), "too many scans: 1006, at most 100"),
    ("text that unpacks", text_bomb, "damaged or truncated|too many"),
    ("pickle", lambda: b"\x80\x04cos\nsystem\n.", "not a JPEG, PNG or WebP"),
    ("PostScript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a JPEG, PNG or WebP"),
    ("SVG", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG or WebP"),
]
