"""Label rows: what a teacher answered, how it is rounded, and what no teacher can have answered."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.config import Precision

COMPARED_TOPK = 64  # up to this K every rank is compared with every other; sorting is faster above
SUM_TOLERANCE = 0.01  # float16 moves a probability, and so their sum, by 0.0005 of itself at most


@dataclass(frozen=True)
class LabelRows:
    """The teacher's answers for one view of one source shard.

    Attributes:
        row: uint32 [N], rising: the samples' rows in the samples file.
        hard: uint16 [N], argmax class (uint32 where C > 65536).
        topk_index: as `hard`, [N, K], most probable first; K may be 0.
        topk_prob: float16 or float32 [N, K], probabilities at temperature 1.
        tail_mass: as `topk_prob`, [N], 1 minus the kept probability.
    """

    row: NDArray[np.uint32]
    hard: NDArray[np.unsignedinteger]
    topk_index: NDArray[np.unsignedinteger]
    topk_prob: NDArray[np.floating]
    tail_mass: NDArray[np.floating]

    def __len__(self) -> int:
        return len(self.row)


def index_dtype(num_classes: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16, or uint32 where there are more than 65,536 classes."""
    return np.dtype(np.uint16 if num_classes <= 65536 else np.uint32)


def label_bytes(num_classes: int, topk: int, precision: Precision) -> int:
    """Return the bytes of one label before compression: class, K indices and probabilities, tail."""
    index, prob = index_dtype(num_classes).itemsize, np.dtype(precision).itemsize
    return index + topk * (index + prob) + (prob if topk else 0)


def encode_rows(
    row: NDArray[np.int64],
    hard: NDArray[Any],
    index: NDArray[Any],
    prob: NDArray[np.float32],
    *,
    num_classes: int,
    precision: Precision,
) -> LabelRows:
    """Turn the teacher's float32 answers into stored rows, sorted by row.

    Args:
        row: int [N], samples' rows.
        hard: int [N], argmax.
        index: int [N, K].
        prob: float32 [N, K], full-precision probabilities; the tail is 1 minus their sum.
        num_classes: C.
        precision: of the stored probabilities.
    """
    order = np.argsort(row, kind="stable")
    tail = np.clip(1.0 - prob.astype(np.float64).sum(1), 0.0, 1.0) if prob.shape[1] else np.empty(0)
    kind = index_dtype(num_classes)
    return LabelRows(
        row=row[order].astype(np.uint32),
        hard=hard[order].astype(kind),
        topk_index=index[order].astype(kind),
        topk_prob=prob[order].astype(precision),
        tail_mass=(tail[order] if prob.shape[1] else tail).astype(precision),
    )


def content_xxh3(views: Sequence[LabelRows]) -> str:
    """Return the xxh3-128 over all values: for each view row, hard, topk_index, topk_prob, tail_mass, little-endian."""
    digest = xxhash.xxh3_128()
    for rows in views:
        for field in fields(rows):
            digest.update(np.ascontiguousarray(getattr(rows, field.name)).data)
    return digest.hexdigest()


def find_problem(rows: LabelRows, num_classes: int) -> str | None:
    """Return what is wrong with values that no teacher can have answered, or None.

    It runs for every view that is read, so it looks at bits: floats of 0 and above order like their bit patterns, and all
    others (negative ones, NaN, infinity) lie above the pattern of 1.
    """
    if not len(rows):
        return None
    if (rows.row[1:] <= rows.row[:-1]).any():
        return "rows do not rise"
    topk = rows.topk_index.shape[1]
    if not topk:
        return f"a class is not below {num_classes}" if rows.hard.max() >= num_classes else None
    if _has_twice(rows.topk_index):
        return "a class stands twice in top-k"
    if max(rows.hard.max(), rows.topk_index.max()) >= num_classes:
        return f"a class is not below {num_classes}"
    prob, tail, one = _bits(rows.topk_prob), _bits(rows.tail_mass), _bits(np.ones(1, rows.topk_prob.dtype))[0]
    if prob.max() > one or tail.max() > one:
        return "a probability is outside 0..1"
    rises = prob[1:] > prob[:-1]
    rises[topk - 1 :: topk] = False  # from the last of a row to the first of the next
    if rises.any():
        return "probabilities do not fall"
    total = np.einsum("nk->n", rows.topk_prob.astype(np.float32)) + rows.tail_mass
    if (np.abs(total - 1) > SUM_TOLERANCE).any():
        return "probabilities do not add to 1"
    return "`hard` is not the first of top-k" if (rows.topk_index[:, 0] != rows.hard).any() else None


def _bits(values: NDArray[np.floating]) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def _has_twice(index: NDArray[np.unsignedinteger]) -> bool:
    if index.shape[1] > COMPARED_TOPK:
        return bool((np.diff(np.sort(index, axis=1), axis=1) == 0).any())
    ranks = np.ascontiguousarray(index.T)  # [K, N]: a comparison is one long run
    return any((ranks[apart:] == ranks[:-apart]).any() for apart in range(1, len(ranks)))
