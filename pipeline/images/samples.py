"""The parts of every source: samples, and source shards that build their index on first use."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from json.encoder import encode_basestring as quoted
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pyarrow as pa

from pipeline.errors import BadImageError, SourceError, StorageError
from pipeline.images.columns import Column, Records, records_of
from pipeline.storage.place import File, RemoteFile

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Files that people call images and that are not read: they are counted, so that none is missed in silence.
OTHER_PICTURES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl", ".pbm", ".pgm", ".ppm"}
    | {".svg", ".tga", ".tif", ".tiff"}
)
NO_LABELS = "none"  # as label_key: the class labels of the source are not read
LFS_POINTER = b"version https://git-lfs"  # a clone without Git LFS has these small files in place of the large ones
MAX_IMAGE_BYTES = 1 << 30  # an encoded image is read as a whole; 89 million uncompressed pixels need a quarter of this
_ROWS_AT_ONCE = 4096  # of keys that are hashed
MAX_LABEL = 2**31 - 1  # class labels are stored as int32

Box = tuple[int, int, int, int]  # a box in an image: top, left, height, width; pixels
Where = TypeVar("Where")


@dataclass(frozen=True)
class Sample:
    """An original image with its class label.

    Attributes:
        key: stable name, unique in its source shard; never its position.
        image: the encoded file, as the source holds it.
        class_label: label, 0 <= class_label < num_classes, or None if the source has no labels.
    """

    key: str
    image: bytes
    class_label: int | None


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a source is read where its layout leaves a choice. The default takes what is plainly meant, and refuses the rest.

    Attributes:
        image_key: the image of a sample. Tars: extensions such as `jpg;png`, the first that a sample has is its image.
            Parquet: the name of a column. None: any extension of IMAGE_EXTENSIONS; the one column that holds images.
        label_key: the class label of a sample. Tars: the extension of a member, such as `cls.txt`, or the name of a field of the
            `.json` member. Parquet: the name of a column. `none`: no class labels are read. None: what is plainly the label.
        image_root: folder for the paths in Parquet rows that hold no image bytes; None: such rows are refused.
        labels_file: file with the class labels of the images; None: the source itself has them, or there are none.
        class_depth: number of folder levels that make up the class name of an image folder; images may lie anywhere below.
            None: images must lie in class/name.jpg.
        class_order: order of the class names: `text`, `natural` (by the numbers in the names), or a file with one name per line.
            None: `text`, with a warning where the two orders differ.
    """

    image_key: str | None = None
    label_key: str | None = None
    image_root: str | None = None
    labels_file: str | None = None
    class_depth: int | None = None
    class_order: str | None = None


NO_OPTIONS = SourceOptions()
_LABEL_LIKE = re.compile(r"(?:^|[^a-z])(?:cls|class|label|target|categor)", re.IGNORECASE)


def is_label_like(name: str) -> bool:
    """Return True for the name of a member, field or column that may hold class labels: `cls_id`, `my_label`, `targets`."""
    return _LABEL_LIKE.search(name) is not None


@dataclass(frozen=True)
class ShardIndex(Generic[Where]):
    """The samples of one source shard in order, without their images, as three sequences of the same length."""

    keys: Sequence[str]
    class_labels: Sequence[int | None]
    places: Sequence[Where]

    def to_batch(self, kind: type[Any]) -> pa.RecordBatch:
        """Return the same as Arrow columns: key, class_label, and the place (its fields, or one text)."""
        if kind is str:
            places = {"place": pa.array(self.places, pa.string())}
        else:
            places = dict(zip(kind._fields, records_of(kind, self.places), strict=True))
        columns = {"key": pa.array(self.keys, pa.string()), "class_label": pa.array(self.class_labels, pa.int32())}
        return pa.record_batch(columns | places)

    @classmethod
    def of_batch(cls, batch: pa.RecordBatch, kind: type[Where]) -> "ShardIndex[Where]":
        """Return the index that these columns hold; its values are converted when they are asked for."""
        key, label, *places = batch.columns
        return cls(Column(key), Column(label), Column(places[0]) if kind is str else Records(kind, places))


@dataclass(frozen=True)
class ShardSummary:
    """What the index of a source shard holds in all.

    Attributes:
        num_samples: number of samples.
        num_labelled: number of samples with a class label.
        max_label: largest class label, None if there is none.
        keys_sha256: hash of keys and class labels in order.
    """

    num_samples: int
    num_labelled: int
    max_label: int | None
    keys_sha256: str

    @classmethod
    def of(cls, index: ShardIndex[Any]) -> "ShardSummary":
        """Return the summary of an index."""
        labels = [label for label in index.class_labels if label is not None]
        digest = keys_sha256(index.keys, index.class_labels)
        return cls(len(index.keys), len(labels), max(labels, default=None), digest)


class Kept(Protocol):
    """An index on disk of a whole source, from which its shards take their parts."""

    def load(self, shard: "SourceShard[Any]") -> ShardIndex[Any] | None:
        """Return the index of a source shard, or None if it is not there or its file has changed since."""
        ...

    def summary(self, shard: "SourceShard[Any]") -> ShardSummary | None:
        """Return the summary of a source shard, or None if it is not there or its file has changed since."""
        ...

    def discard(self) -> str:
        """Delete the index because it does not fit its source, and return what the user can do."""
        ...


# What a process finds out for itself.
_FOUND = frozenset({"index", "index_is_kept", "summary", "indexed_state", "_checked_cover", "_keys"})


class SourceShard(ABC, Generic[Where]):
    """An ordered run of samples. Only its few fields are pickled: each process finds the index again when it needs it.

    Attributes:
        name: unique name in the source, matches [A-Za-z0-9._-]+.
        kept: index on disk of the source, or None.
        place_type: type of the places: a named tuple of integers, or str.
        indexed_state: `state` when `index` was made or loaded.
        index_is_kept: whether `index` came from `kept`, so that nothing of it was read from the files in this process.
    """

    name: str
    kept: Kept | None = None
    place_type: ClassVar[type[Any]] = str
    index_is_kept: ClassVar[bool] = False
    indexed_state: ClassVar[tuple[int, ...] | None] = None

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """Remote files from which the shard is read, for `Prefetch`; empty for a local shard."""
        return ()

    @abstractmethod
    def build_index(self) -> ShardIndex[Where]:
        """Return the index of the samples, from the files themselves. The same files give the same index."""

    @abstractmethod
    def read_image(self, position: int) -> bytes:
        """Return the encoded image of one sample, after checking that the files have what the index says of it."""

    def file_of(self, position: int) -> str:
        """Return the file that holds the image of a sample, in words, for errors."""
        return f"{self.index.keys[position]!r} in source shard {self.name}"

    def unreadable(self, position: int, error: BadImageError) -> BadImageError:
        """Return the error for an image that a command needs, with its file as the way out."""
        return error.with_fix(f"Repair or delete {self.file_of(position)}")

    @property
    def state(self) -> tuple[int, ...] | None:
        """What must be unchanged for a kept index to be used: length and date of the file; None: it cannot be kept."""
        return None

    @cached_property
    def index(self) -> ShardIndex[Where]:
        """Index of the samples: the kept one, or else built when this process first uses it."""
        state = self.state
        kept = self.kept.load(self) if self.kept else None
        object.__setattr__(self, "index_is_kept", kept is not None)  # the shards are frozen dataclasses
        object.__setattr__(self, "indexed_state", state)
        index = kept or ShardIndex.of_batch(self.build_index().to_batch(self.place_type), self.place_type)
        if "summary" in self.__dict__ and self.summary != ShardSummary.of(index):
            raise self.changed(f"source shard {self.name}")  # what was said of it before was of another file, or false
        return index

    def use_index(self, index: ShardIndex[Where], state: tuple[int, ...] | None) -> None:
        """Use an index that was just built elsewhere, when the file had this state."""
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "indexed_state", state)

    @property
    def has_index(self) -> bool:
        """Return whether this process has the index already."""
        return "index" in self.__dict__

    @cached_property
    def summary(self) -> ShardSummary:
        """Summary of the index."""
        kept = None if self.has_index or not self.kept else self.kept.summary(self)
        return kept or ShardSummary.of(self.index)

    @property
    def keys(self) -> Sequence[str]:
        """Sample keys in order."""
        return self.index.keys

    @property
    def class_labels(self) -> Sequence[int | None]:
        """Class labels in the order of `keys`."""
        return self.index.class_labels

    @property
    def num_labelled(self) -> int:
        """Number of samples that have a class label."""
        return self.summary.num_labelled

    def __len__(self) -> int:
        return len(self.index.keys) if self.has_index else self.summary.num_samples

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self.index.keys)))

    def __getitem__(self, position: int) -> Sample:
        index = self.index
        if position >= len(index.keys):
            raise SourceError(
                f"source shard {self.name} has {len(index.keys)} samples, there is no sample {position} in it",
                fix="Pass the --data that was labelled",
            )
        return Sample(index.keys[position], self.read_image(position), index.class_labels[position])

    def changed(self, where: object) -> SourceError:
        """Return the error for files that are not as the index says; a kept index is deleted, so that the next use makes it anew."""
        fix = self.kept.discard() if self.kept and self.index_is_kept else "Run the command again"
        return SourceError(
            f"{where}: its samples are not those of the index: the file was changed after it was indexed", fix=fix
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone, without what this process found."""
        return {field: value for field, value in self.__dict__.items() if field not in _FOUND}


def file_state(file: File) -> tuple[int, ...] | None:
    """Return length and date (ns) of a local file; None for a remote or missing one."""
    if file.path is None:
        return None
    try:
        found = os.stat(file.path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors of the operating system or a server into a SourceError that names the file."""
    try:
        yield
    except StorageError as error:
        raise SourceError(str(error)) from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_image_bytes(size: int, what: object) -> None:
    """Raise SourceError for an absurd size of an encoded image: a header may claim it, or a sparse file may have a hole."""
    if size > MAX_IMAGE_BYTES:
        raise SourceError(f"{what}: an image must have at most {MAX_IMAGE_BYTES} bytes, got {size}")


def check_label(label: int, num_classes: int | None, where: str) -> int:
    """Return a class label that is in range, or raise SourceError; without class names the range is that of int32."""
    if num_classes is not None and not 0 <= label < num_classes:
        raise SourceError(f"{where}: class label must be in 0..{num_classes - 1} ({num_classes} classes), got {label}")
    if not 0 <= label <= MAX_LABEL:
        raise SourceError(f"{where}: class label must be in 0..{MAX_LABEL}, got {label}")
    return label


def keys_sha256(keys: Iterable[str], class_labels: Iterable[int | None]) -> str:
    """Return the hash of keys and class labels in order: one JSON line [key, label] each, so that lists cannot collide."""
    digest, rows = hashlib.sha256(), zip(keys, class_labels, strict=True)
    # Nine times as fast as json.dumps([key, label]), with the same bytes.
    while some := [
        f"[{quoted(key)},{'null' if label is None else label}]\n" for key, label in islice(rows, _ROWS_AT_ONCE)
    ]:
        digest.update("".join(some).encode())
    return digest.hexdigest()
