"""The parts of every source: samples, and source shards that build their index on first use."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from pipeline.errors import SourceError, StorageError
from pipeline.storage.place import RemoteFile

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
MAX_IMAGE_BYTES = 1 << 30  # an encoded image is read as a whole; 89 million uncompressed pixels need a quarter of this
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
            `.json` member. Parquet: the name of a column. None: what is plainly the label.
        image_root: folder for the paths in Parquet rows that hold no image bytes; None: such rows are refused.
        labels_file: file with the class labels of the images; None: the source itself has them, or there are none.
        class_depth: number of folder levels that make up the class name of an image folder; None: images must lie in class/name.jpg.
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


@dataclass(frozen=True)
class ShardIndex(Generic[Where]):
    """The samples of one source shard in order, without their images, as three sequences of the same length."""

    keys: tuple[str, ...]
    class_labels: tuple[int | None, ...]
    places: Sequence[Where]


class SourceShard(ABC, Generic[Where]):
    """An ordered run of samples. Only its few fields are pickled: each process builds the index again when it needs it.

    Attributes:
        name: unique name in the source, matches [A-Za-z0-9._-]+.
    """

    name: str

    @property
    def remote_files(self) -> tuple[RemoteFile, ...]:
        """Remote files from which the shard is read, for `Prefetch`; empty for a local shard."""
        return ()

    @abstractmethod
    def build_index(self) -> ShardIndex[Where]:
        """Return the index of the samples. The same files give the same index."""

    @abstractmethod
    def read_image(self, place: Where) -> bytes:
        """Return the encoded image at one place of the index."""

    @cached_property
    def index(self) -> ShardIndex[Where]:
        """Index of the samples, built when this process first uses it."""
        return self.build_index()

    @property
    def keys(self) -> tuple[str, ...]:
        """Sample keys in order."""
        return self.index.keys

    @property
    def class_labels(self) -> tuple[int | None, ...]:
        """Class labels in the order of `keys`."""
        return self.index.class_labels

    def __len__(self) -> int:
        return len(self.index.keys)

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Sample:
        index = self.index
        if position >= len(index.keys):
            raise SourceError(
                f"source shard {self.name} has {len(index.keys)} samples, there is no sample {position} in it",
                fix="Pass the --data that was labelled",
            )
        image = self.read_image(index.places[position])
        return Sample(index.keys[position], image, index.class_labels[position])

    def __getstate__(self) -> dict[str, Any]:
        return {field: value for field, value in self.__dict__.items() if field != "index"}


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
    digest = hashlib.sha256()
    for key, label in zip(keys, class_labels, strict=True):
        digest.update(json.dumps([key, label], ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return digest.hexdigest()
