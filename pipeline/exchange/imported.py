"""Labels of another format, imported: their tables, and the import.json that says what they are and what they lack.

An import is no label set. Its views were made by another program's random draws, so they cannot be rendered again and
proved by probes; only label sets of format v1 can be trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.labels.encoding import index_dtype
from pipeline.labels.manifest import Floats
from pipeline.storage.json import canonical_json

FOOTER_KEY = b"deit_cli_import"
_ELEMENT = "element"
_TALLEST_SUM = 1.01  # as for label sets: what rounding to float16 may add to probabilities


@dataclass(frozen=True)
class Shape:
    """What is the same for all labels of an import.

    Attributes:
        num_classes: C.
        topk: K, probabilities that were stored for each view; 0: hard labels alone.
        precision: in which they were stored.
    """

    num_classes: int
    topk: int
    precision: Floats


@dataclass(frozen=True)
class ForeignRows:
    """Labels of views, as another format holds them.

    Attributes:
        key: sample keys, N of them.
        view: uint32 [N], number of the crop or the epoch.
        hard: int [N], argmax class.
        topk_index: int [N, K], most probable first; K may be 0.
        topk_prob: float16 or float32 [N, K].
        more: what else was recorded, by the name of its column, each [N].
    """

    key: Sequence[str]
    view: NDArray[np.uint32]
    hard: NDArray[Any]
    topk_index: NDArray[Any]
    topk_prob: NDArray[np.floating]
    more: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.key)

    def first(self, count: int) -> "ForeignRows":
        """Return the rows with no more than `count` of their classes."""
        index, prob = self.topk_index[:, :count], self.topk_prob[:, :count]
        return ForeignRows(self.key, self.view, self.hard, index, prob, self.more)


def import_schema(shape: Shape, more: dict[str, np.dtype[Any]]) -> pa.Schema:
    """Return the columns of an import: those of a label shard, with the key in the place of the row, and `more`."""
    index, prob = pa.from_numpy_dtype(index_dtype(shape.num_classes)), pa.from_numpy_dtype(np.dtype(shape.precision))
    columns = [("key", pa.string()), ("view", pa.uint32()), ("hard", index)]
    if shape.topk:
        for name, kind in (("topk_index", index), ("topk_prob", prob)):
            columns.append((name, pa.list_(pa.field(_ELEMENT, kind, nullable=False), shape.topk)))
        columns.append(("tail_mass", prob))
    columns += [(name, pa.from_numpy_dtype(kind)) for name, kind in more.items()]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def write_part(file: BinaryIO, parts: Sequence[ForeignRows], shape: Shape, footer: dict[str, Any]) -> None:
    """Write one table: rows in the order in which they came, in one row group."""
    kinds = {name: column.dtype for name, column in parts[0].more.items()}
    schema = import_schema(shape, kinds)
    index = index_dtype(shape.num_classes)
    keys = pa.array([key for part in parts for key in part.key], pa.string())
    arrays = [keys, _joined([part.view for part in parts]), _joined([part.hard for part in parts], index)]
    if shape.topk:
        prob = np.concatenate([part.topk_prob for part in parts])
        tail = np.clip(1.0 - prob.astype(np.float64).sum(1), 0.0, 1.0).astype(shape.precision)
        flat = _joined([part.topk_index.ravel() for part in parts], index), pa.array(np.ascontiguousarray(prob).ravel())
        for name, values in zip(("topk_index", "topk_prob"), flat, strict=True):
            arrays.append(pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type))
        arrays.append(pa.array(tail))
    arrays += [_joined([part.more[name] for part in parts]) for name in kinds]
    table = pa.table(arrays, schema=schema.with_metadata({FOOTER_KEY: canonical_json(footer)}))
    split = [name for name in schema.names if name not in ("key", *kinds)]
    lists = [f"{name}.list.{_ELEMENT}" if name in ("topk_index", "topk_prob") else name for name in split]
    encoding = dict.fromkeys(lists, "BYTE_STREAM_SPLIT") | {"view": "DELTA_BINARY_PACKED"}
    pq.write_table(
        table,
        file,
        row_group_size=max(1, len(table)),
        compression="zstd",
        compression_level=3,
        use_dictionary=["key"],  # pyright: ignore[reportArgumentType]
        column_encoding=encoding,
        write_page_checksum=True,
    )


def _joined(columns: Sequence[NDArray[Any]], kind: np.dtype[Any] | None = None) -> pa.Array:
    return pa.array(np.concatenate(columns).astype(kind) if kind else np.concatenate(columns))


def check_answers(index: NDArray[Any], prob: NDArray[np.floating], num_classes: int) -> tuple[int, str] | None:
    """Return the first row that no teacher can have answered, and why; None if all may stand.

    Args:
        index: int [N, K], K >= 1.
        prob: floating [N, K].
        num_classes: C.
    """
    wide = prob.astype(np.float32)
    ordered = np.sort(index, axis=1)
    problems = [
        (~np.isfinite(wide).all(1), "a probability is NaN or infinite"),
        (((index < 0) | (index >= num_classes)).any(1), f"a class is not in 0..{num_classes - 1}"),
        ((ordered[:, 1:] == ordered[:, :-1]).any(1), "a class stands twice"),
        (((wide < 0) | (wide > 1.001)).any(1), "a probability is not in 0..1"),
        ((wide[:, 1:] > wide[:, :-1]).any(1), "probabilities do not fall"),
        (wide.sum(1) > _TALLEST_SUM, "probabilities add to more than 1"),
    ]
    with np.errstate(invalid="ignore"):
        for found, why in problems:
            if found.any():
                row = int(found.argmax())
                return row, f"{why}: classes {index[row][:5].tolist()}, probabilities {wide[row][:5].tolist()}"
    return None
