"""Label rows: what a teacher answered, how it is rounded, and what no teacher can have answered.

`log8` stores K bytes for K probabilities and the tail: how many tenths of a nat each lies below the one before it. Only
ratios are rounded, each from what is decoded of the one before, so no logit is off by more than half a step however
large K is, and the sum is exactly 1 again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.labels.format import Precision

LOG8_STEP = 0.1  # nats; the mean KL divergence that it costs is below 2e-4 nats, see benchmarks/README.md
LOG8_ZERO = 255  # a code: this probability is 0, and so are those after it
_FAR = 1100  # steps: exp(-110) is 0 in float32
_FALLEN = np.where(np.arange(_FAR + 1) == _FAR, 0.0, np.exp(-LOG8_STEP * np.arange(_FAR + 1)))

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
        topk_code: uint8 [N, K], what is stored in place of the two where the precision is `log8`; else None.
    """

    row: NDArray[np.uint32]
    hard: NDArray[np.unsignedinteger]
    topk_index: NDArray[np.unsignedinteger]
    topk_prob: NDArray[np.floating]
    tail_mass: NDArray[np.floating]
    topk_code: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def part(self, at: slice) -> "LabelRows":
        """Return some rows; they share their memory with these."""
        return LabelRows(
            self.row[at],
            self.hard[at],
            self.topk_index[at],
            self.topk_prob[at],
            self.tail_mass[at],
            None if self.topk_code is None else self.topk_code[at],
        )


def index_dtype(num_classes: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16, or uint32 where there are more than 65,536 classes."""
    return np.dtype(np.uint16 if num_classes <= 65536 else np.uint32)


def prob_dtype(precision: Precision) -> np.dtype[np.floating]:
    """Return the type of probabilities as they are read: float32 for codes, else as they are stored."""
    return np.dtype(np.float32 if precision == "log8" else precision)


def label_bytes(num_classes: int, topk: int, precision: Precision) -> int:
    """Return the bytes of one label before compression: class, K indices and probabilities, tail."""
    index, prob = index_dtype(num_classes).itemsize, prob_dtype(precision).itemsize
    if precision == "log8" and topk:
        return topk * (index + 1)
    return index + topk * (index + prob) + (prob if topk else 0)


def to_codes(prob: NDArray[np.float32], tail: NDArray[np.float64], num_classes: int) -> NDArray[np.uint8]:
    """Return the `log8` codes of probabilities that do not rise.

    Args:
        prob: float32 [N, K], K >= 1.
        tail: float64 [N], what is not kept.
        num_classes: C.

    Returns:
        uint8 [N, K]. Code i < K - 1 is the ratio of probability i to i + 1, the last one that of the last probability to
        the mean of the C - K classes that are not kept; in steps of LOG8_STEP nats, at most 254. LOG8_ZERO: it is 0.
    """
    rest = tail / max(1, num_classes - prob.shape[1])
    values = np.concatenate([prob.astype(np.float64), rest[:, None]], axis=1)
    with np.errstate(divide="ignore"):
        below = np.log(values[:, :1] / values) / LOG8_STEP  # steps below the first; infinite for 0
    codes = np.empty(prob.shape, np.uint8)
    fallen = np.zeros(len(prob))  # as decoded
    for rank in range(prob.shape[1]):
        target = below[:, rank + 1]
        step = np.clip(np.rint(np.minimum(target, _FAR) - fallen), 0, LOG8_ZERO - 1)
        step[(target >= _FAR) | (fallen >= _FAR)] = LOG8_ZERO
        codes[:, rank] = step
        fallen += np.where(step == LOG8_ZERO, _FAR, step)
    return codes


def from_codes(codes: NDArray[np.uint8], num_classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return probabilities, float32 [N, K], and tail mass, float32 [N], of `log8` codes, uint8 [N, K]."""
    size, topk = codes.shape
    codes = np.ascontiguousarray(codes.T)  # [K, N]: a rank is one long run, ten times as fast as row by row
    fallen, gone = codes.astype(np.uint32), codes == LOG8_ZERO
    if gone.any():
        fallen[gone] = _FAR
    for rank in range(1, topk):
        fallen[rank] += fallen[rank - 1]
    values = np.ones((topk + 1, size))
    _FALLEN.take(fallen, out=values[1:], mode="clip")  # farther than _FAR is 0 too
    values[topk] *= num_classes - topk
    values *= 1 / values.sum(axis=0)
    values = values.astype(np.float32)
    return np.ascontiguousarray(values[:topk].T), values[topk]


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
    kind, stored, topk = index_dtype(num_classes), prob_dtype(precision), prob.shape[1]
    prob = prob[order]
    tail = np.clip(1.0 - prob.astype(np.float64).sum(1), 0.0, 1.0) if topk else np.empty(0)
    codes = to_codes(prob, tail, num_classes) if precision == "log8" and topk else None
    kept, left = (prob.astype(stored), tail.astype(stored)) if codes is None else from_codes(codes, num_classes)
    return LabelRows(
        row=row[order].astype(np.uint32),
        hard=hard[order].astype(kind),
        topk_index=index[order].astype(kind),
        topk_prob=kept,
        tail_mass=left,
        topk_code=codes,
    )


def content_xxh3(views: Sequence[LabelRows]) -> str:
    """Return the xxh3-128 over all stored values, little-endian.

    For each view these are row, hard, topk_index, topk_prob, tail_mass; with codes row, topk_index, topk_code.
    """
    digest = xxhash.xxh3_128()
    for rows in views:
        floats = (rows.hard, rows.topk_index, rows.topk_prob, rows.tail_mass)
        for column in (rows.row, *(floats if rows.topk_code is None else (rows.topk_index, rows.topk_code))):
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def find_problem(rows: LabelRows, num_classes: int, views: int = 1) -> str | None:
    """Return what is wrong with values that no teacher can have answered, or None.

    It runs for everything that is read, so it looks at bits: floats of 0 and above order like their bit patterns, and all
    others (negative ones, NaN, infinity) lie above the pattern of 1.

    Args:
        rows: of one view, or of several one behind the other.
        num_classes: C.
        views: how many of them.
    """
    if not len(rows):
        return None
    row = rows.row.reshape(views, -1)
    if (row[:, 1:] <= row[:, :-1]).any():
        return "rows do not rise"
    topk = rows.topk_index.shape[1]
    if not topk:
        return f"a class is not below {num_classes}" if rows.hard.max() >= num_classes else None
    if _has_twice(rows.topk_index):
        return "a class stands twice in top-k"
    if max(rows.hard.max(), rows.topk_index.max()) >= num_classes:
        return f"a class is not below {num_classes}"
    if rows.topk_code is None and (problem := _find_in_floats(rows)):
        return problem
    return "`hard` is not the first of top-k" if (rows.topk_index[:, 0] != rows.hard).any() else None


def _find_in_floats(rows: LabelRows) -> str | None:
    """Return what is wrong with stored probabilities; there are no codes that decode to wrong ones."""
    topk = rows.topk_prob.shape[1]
    prob, tail, one = _bits(rows.topk_prob), _bits(rows.tail_mass), _bits(np.ones(1, rows.topk_prob.dtype))[0]
    if prob.max() > one or tail.max() > one:
        return "a probability is outside 0..1"
    rises = prob[1:] > prob[:-1]
    rises[topk - 1 :: topk] = False  # from the last of a row to the first of the next
    if rises.any():
        return "probabilities do not fall"
    if (np.abs(np.einsum("nk->n", _float32(rows.topk_prob)) + rows.tail_mass - 1) > SUM_TOLERANCE).any():
        return "probabilities do not add to 1"
    return None


def _float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return values of 0..1 in float32; float16 by its bits, four times as fast as NumPy does it."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    moved = np.left_shift(np.ascontiguousarray(values).view(np.uint16), 13, dtype=np.uint32)
    return moved.view(np.float32) * np.float32(2**112)  # the exponents' biases are 15 and 127


def _bits(values: NDArray[np.floating]) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def _has_twice(index: NDArray[np.unsignedinteger]) -> bool:
    """Say whether a row of [N, K] holds a value twice."""
    size, topk = index.shape
    if topk > COMPARED_TOPK:
        return bool((np.diff(np.sort(index, axis=1), axis=1) == 0).any())
    ranks = np.ascontiguousarray(index.T)  # a rank is one long run: a hundred times as fast as row by row
    ranks = np.concatenate([ranks, ranks[: topk // 2]])  # and the first follow the last
    across, down = ranks.strides[1], ranks.strides[0]
    # Entry [d, k] is rank k + d + 1: at most half around the circle of ranks, each meets each other.
    others = np.ndarray((topk // 2, topk, size), ranks.dtype, ranks, offset=down, strides=(down, down, across))
    return bool((ranks[:topk] == others).any())
