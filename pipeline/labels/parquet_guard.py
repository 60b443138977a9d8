"""Checks of a Parquet file before pyarrow reads it: it must run no code, and need no more memory than a table of a label set.

pyarrow runs the deserialiser of a registered extension type as soon as a file is opened. It allocates the memory that a page
header asks for at once (a page of some kB may claim 2 GiB unpacked, and zstd can really unpack to that). It ends the process if
statistics contradict each other. So the bytes are checked first. No library does this: pyarrow exposes no page headers and no
memory pool with a limit.

The footer does not limit the size of a page, so the page headers (Thrift, compact protocol) are read at the same positions
as by pyarrow.
"""

import base64
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import LabelSetCorrupt
from pipeline.labels.format import DAMAGED_FILE

MAX_PAGE_BYTES = 16 << 20  # the default page size of every writer is about 1 MiB
MAX_SAMPLES_BYTES = 1 << 30
_BATCH_ROWS = (
    16  # rows of a samples file to read before the limit is checked again, if each text may be MAX_PAGE_BYTES long
)
_MOST_ROWS = 1 << 16
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_WHOLE = (4, 5, 6)  # int16, int32, int64: zigzag varints
_HEADER_BYTES = 256  # bytes of a header; other data in so few bytes unpacks to some MiB at most
_ROW_GROUPS, _COLUMNS, _META = 4, 1, 3  # fields of the footer, a row group, a column chunk
_CHUNK_BYTES, _DATA_OFFSET, _DICTIONARY_OFFSET = 7, 9, 11  # fields of a column's metadata
_UNPACKED, _PACKED = 2, 3  # fields of a page header: uncompressed_page_size, compressed_page_size
_T = TypeVar("_T")


class Chunk(NamedTuple):
    """The location of the pages of one column of one row group, in bytes."""

    start: int
    size: int


def guarded(name: str, read: Callable[[], _T]) -> _T:
    """Return the result of a call of pyarrow; every error that a damaged file causes becomes LabelSetCorrupt."""
    try:
        return read()
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise LabelSetCorrupt(
            f"{name}: damaged Parquet: {str(error).splitlines()[0] if str(error) else error}"
        ) from error


def refuse_extension_types(data: bytes, name: str) -> None:
    """Raise LabelSetCorrupt for a file with Arrow extension types, before pyarrow sees it.

    A registered extension type has a deserialiser that runs as soon as the file is opened, and some deserialisers unpickle.
    So the Parquet footer, which holds the Arrow schema in base64, is searched first. Its structure is not followed, because a
    hostile structure could hide what pyarrow finds.
    """
    start = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    if any(data.find(mark, start) >= 0 for mark in _EXTENSION_MARKS):
        raise LabelSetCorrupt(f"{name} has Arrow extension types, which may run code: no label set has any")


def check_pages(data: bytes, groups: list[list[Chunk]], group: int, name: str) -> int:
    """Return the unpacked size of the largest page of a row group; raise LabelSetCorrupt if it is above MAX_PAGE_BYTES."""
    if group >= len(groups):
        raise LabelSetCorrupt(f"{name}: damaged Parquet: its footer lists {len(groups)} row groups", fix=DAMAGED_FILE)
    largest = guarded(name, lambda: largest_page(data, groups[group]))
    if largest > MAX_PAGE_BYTES:
        raise LabelSetCorrupt(
            f"{name}: a page in it unpacks to {largest} bytes, the maximum is {MAX_PAGE_BYTES}", fix=DAMAGED_FILE
        )
    return largest


def bounded_rows(parquet: pq.ParquetFile, schema: pa.Schema, name: str, *, largest: int) -> pa.Table:
    """Read a whole file and count its bytes meanwhile: a dictionary or shared prefixes can unpack to any length.

    A single text is never longer than the page that has it, or has its entry of a dictionary. So the smaller the pages of a file, the
    more rows can be read at once; a call of the library costs as much as a hundred rows.

    Args:
        parquet: the open file.
        schema: its schema.
        name: its name, for the error.
        largest: size of its largest page, unpacked, as `check_pages` returns it.

    Raises:
        LabelSetCorrupt: the file unpacks to more than MAX_SAMPLES_BYTES.
    """
    batches, size = [], 0
    rows = _BATCH_ROWS * MAX_PAGE_BYTES // max(1, largest)
    for batch in parquet.iter_batches(min(rows, _MOST_ROWS), use_threads=False):
        size += batch.nbytes
        if size > MAX_SAMPLES_BYTES:
            raise LabelSetCorrupt(f"{name} unpacks to more than {MAX_SAMPLES_BYTES} bytes", fix=DAMAGED_FILE)
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=schema)


def column_chunks(data: bytes) -> list[list[Chunk]]:
    """Return the location of the pages of each column of each row group; raise ValueError for an unreadable footer.

    pyarrow has this information too, but ends the process if statistics in a footer contradict each other.
    """
    stop = len(data) - 8
    start = stop - int.from_bytes(data[stop : stop + 4], "little")
    if start < 0:
        raise ValueError("the footer is longer than the file")
    try:
        groups = _Reader(data, start, stop).struct()[_ROW_GROUPS]
        return [[_chunk_of(column[_META]) for column in group[_COLUMNS]] for group in groups]
    except (KeyError, TypeError) as error:
        raise ValueError("the footer lacks the location of a column") from error


def _chunk_of(meta: dict[int, Any]) -> Chunk:
    start = meta[_DATA_OFFSET]
    return Chunk(min(start, meta.get(_DICTIONARY_OFFSET, start)), meta[_CHUNK_BYTES])


def largest_page(data: bytes, chunks: Iterable[Chunk]) -> int:
    """Return the maximum unpacked size of a page in bytes; raise ValueError for unreadable headers."""
    largest = 0
    for chunk in chunks:
        at, stop = chunk.start, chunk.start + chunk.size
        if not 0 <= at <= stop <= len(data):
            raise ValueError("a column is outside of the file")
        if (sizes := _begins_plainly(data, at, stop)) and 0 <= stop - at - sizes[1] <= _HEADER_BYTES:
            largest = max(largest, sizes[0])  # nearly always a single page: ten times as fast
            continue
        while at < stop:
            header = _Reader(data, at, stop)
            fields = header.numbers()
            unpacked, packed = fields.get(_UNPACKED, -1), fields.get(_PACKED, -1)
            if unpacked < 0 or not 0 <= packed <= stop - header.at:
                raise ValueError("a page header does not fit its column")
            largest = max(largest, unpacked)
            at = header.at + packed
    return largest


def _begins_plainly(data: bytes, at: int, stop: int) -> tuple[int, int] | None:
    """Return the unpacked and packed size of the page whose header begins here, if it has the usual layout of writers."""
    values: list[int] = []
    for _ in range(3):  # fields 1 to 3, each an int32 one field on: type, unpacked, packed
        value = shift = 0
        if at >= stop or data[at] != 0x15:
            return None
        while True:
            at += 1
            if at >= stop or shift > 28:
                return None
            value |= (data[at] & 0x7F) << shift
            shift += 7
            if data[at] < 0x80:
                break
        at += 1
        values.append(value >> 1 ^ -(value & 1))
    return (values[1], values[2]) if min(values) >= 0 else None


def _base64_marks(text: bytes) -> tuple[bytes, ...]:
    """Return the texts that base64 of `text` contains, one for each offset of `text` in a group of 3 bytes."""
    whole = [base64.b64encode(bytes(lead) + text + bytes(2)) for lead in range(3)]
    return tuple(code[-(-lead * 8 // 6) : (lead + len(text)) * 8 // 6] for lead, code in enumerate(whole))


_EXTENSION_MARKS = _base64_marks(b"ARROW:extension")


class _Reader:
    """Reader of one Thrift struct, limited by `stop`."""

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self._data, self.at, self._stop = data, at, stop

    def numbers(self, depth: int = 0) -> dict[int, int]:
        """Return the whole numbers of a struct by field; other fields are skipped."""
        if depth > 8:
            raise ValueError("a page header is nested too deep")
        found: dict[int, int] = {}
        field = 0
        while (head := self._byte()) & 15 != _STOP:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            if head & 15 in _WHOLE:
                found[field] = self._zigzag()
            else:
                self._pass(head & 15, depth, in_field=True)
        return found

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the whole numbers, structs and lists of a struct by field; other fields are None."""
        if depth > 8:
            raise ValueError("a footer is nested too deep")
        found: dict[int, Any] = {}
        field = 0
        while (head := self._byte()) & 15 != _STOP:
            field = field + (head >> 4) if head >> 4 else self._zigzag()
            found[field] = self._value(head & 15, depth, in_field=True)
        return found

    def _value(self, kind: int, depth: int, *, in_field: bool = False) -> Any:
        if depth > 16:
            raise ValueError("a footer is nested too deep")
        if kind in _WHOLE:
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind == _LIST:
            head = self._byte()
            size = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15, depth + 1) for _ in range(size)]
        self._pass(kind, depth, in_field=in_field)
        return None

    def _pass(self, kind: int, depth: int, *, in_field: bool = False) -> None:
        if depth > 16:
            raise ValueError("a page header is nested too deep")
        if kind in (_TRUE, _FALSE, _BYTE):
            self.at += 0 if in_field and kind != _BYTE else 1
        elif kind in _WHOLE:
            self._varint()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            size = self._varint()
            self.at += size
        elif kind in (_LIST, _SET):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._pass(head & 15, depth + 1)
        elif kind == _STRUCT:
            self.numbers(depth + 1)
        else:
            raise ValueError(f"a page header has a field of kind {kind}")
        if self.at > self._stop:
            raise ValueError("a page header is cut off")

    def _byte(self) -> int:
        if self.at >= self._stop:
            raise ValueError("a page header is cut off")
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of a page header is too long")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
