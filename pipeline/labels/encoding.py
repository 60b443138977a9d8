"""Label rows: the teacher's answers, their stored form in each precision, and checks for impossible answers.

A codec holds everything that depends on the precision. To add a codec, add a row to CODECS, and a class if it stores other
columns; then name it in `format.Precision` and specify it in docs/format-v1.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.labels.format import Precision

LOG8_STEP = 0.1  # nats; the mean KL divergence that it costs is below 2e-4 nats, see benchmarks/README.md
LOG8_ZERO = 255  # code: this probability and those after it are 0
_FAR = 1100  # steps: exp(-110) is 0 in float32
_FALLEN = np.where(np.arange(_FAR + 1) == _FAR, 0.0, np.exp(-LOG8_STEP * np.arange(_FAR + 1)))

COMPARED_TOPK = 64  # up to this K, every rank is compared with every other; above, sorting is faster
SUM_TOLERANCE = 0.01  # float16 changes each probability, and so their sum, by at most 0.0005 of its value

Columns = Mapping[str, NDArray[Any]] | NDArray[np.void]  # arrays by name, or a structured array with these fields


class Answers(NamedTuple):
    """Stored answers of one label set: the columns of `LabelRows` that students learn from; or of S label sets side by side.

    Attributes:
        hard: [N]; of several sets [N, S].
        topk_index: [N, K]; K is the sum of the sets' K.
        topk_prob: [N, K].
        tail_mass: [N], 0 if K is 0; of several sets [N, S].
    """

    hard: NDArray[Any]
    topk_index: NDArray[Any]
    topk_prob: NDArray[np.floating]
    tail_mass: NDArray[np.floating]


@dataclass(frozen=True)
class LabelRows:
    """The teacher's answers for one view of one source shard.

    Attributes:
        row: uint32 [N], ascending: the samples' rows in the samples file.
        hard: uint16 [N], argmax class (uint32 if C > 65536).
        topk_index: [N, K] in the type of `hard`, most probable first; K may be 0.
        topk_prob: float16 or float32 [N, K], probabilities at temperature 1.
        tail_mass: [N] in the type of `topk_prob`, 1 minus the kept probability.
        topk_code: uint8 [N, K], stored instead of `topk_prob` and `tail_mass` by a codec with codes; else None.
    """

    row: NDArray[np.uint32]
    hard: NDArray[np.unsignedinteger]
    topk_index: NDArray[np.unsignedinteger]
    topk_prob: NDArray[np.floating]
    tail_mass: NDArray[np.floating]
    topk_code: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def answers(self) -> Answers:
        """The columns that students learn from."""
        tail = self.tail_mass if self.topk_index.shape[1] else np.zeros(len(self), self.topk_prob.dtype)
        return Answers(self.hard, self.topk_index, self.topk_prob, tail)

    def part(self, at: slice) -> "LabelRows":
        """Return some rows, which share their memory with these rows."""
        return replace(self, **{name: column[at] for name, column in vars(self).items() if column is not None})


@dataclass(frozen=True)
class Codec:
    """The stored form of a set's labels; this codec stores probabilities and tail directly.

    Attributes:
        num_classes: C.
        topk: K.
        prob_dtype: type of probabilities when they are read.
        rounding: maximum change of a probability when it is stored, with some margin.
    """

    num_classes: int
    topk: int
    prob_dtype: np.dtype[np.floating]
    rounding: float

    @property
    def record(self) -> np.dtype[np.void]:
        """Type of a stored label, with a field for each column except `view` and `row`, named as in `LabelRows`."""
        index, prob, width = index_dtype(self.num_classes), self.prob_dtype, (self.topk,)
        return np.dtype(
            [("hard", index), ("topk_index", index, width), ("topk_prob", prob, width), ("tail_mass", prob)]
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the stored columns, in the order of the file."""
        return self.record.names or ()

    @property
    def label_bytes(self) -> int:
        """Bytes of one label in a file, before compression."""
        return self.record.itemsize

    @property
    def memory_bytes(self) -> int:
        """Bytes of one label in memory after reading, without its row."""
        index, prob = index_dtype(self.num_classes).itemsize, self.prob_dtype.itemsize
        return index + self.topk * (index + prob) + (prob if self.topk else 0)

    def store(self, hard: NDArray[Any], index: NDArray[Any], prob: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the stored columns of the teacher's answers, by name.

        Args:
            hard: int [N], argmax.
            index: int [N, K].
            prob: float32 [N, K], full-precision probabilities; the tail is 1 minus their sum.
        """
        kept, tail = prob.astype(self.prob_dtype), tail_of(prob).astype(self.prob_dtype)
        kind = index_dtype(self.num_classes)
        return {"hard": hard.astype(kind), "topk_index": index.astype(kind), "topk_prob": kept, "tail_mass": tail}

    def decode(self, row: NDArray[np.uint32], stored: Columns) -> LabelRows:
        """Return the label rows for rows, uint32 [N], from their stored columns."""
        return LabelRows(row, stored["hard"], stored["topk_index"], stored["topk_prob"], stored["tail_mass"])

    def encode(
        self, row: NDArray[np.int64], hard: NDArray[Any], index: NDArray[Any], prob: NDArray[np.float32]
    ) -> LabelRows:
        """Return the teacher's answers as they will be read after storage, sorted by row.

        Args:
            row: int [N], samples' rows.
            hard: int [N], argmax.
            index: int [N, K].
            prob: float32 [N, K], full-precision probabilities.
        """
        order = np.argsort(row, kind="stable")
        return self.decode(row[order].astype(np.uint32), self.store(hard[order], index[order], prob[order]))

    def content_xxh3(self, views: Sequence[LabelRows]) -> str:
        """Return the xxh3-128 over the stored values of all views, little-endian: for each view its rows, then each column."""
        digest, columns = xxhash.xxh3_128(), ("row", *self.columns)
        for rows in views:
            for name in columns:
                digest.update(np.ascontiguousarray(getattr(rows, name)).data)
        return digest.hexdigest()

    def numpy_lines(self) -> tuple[str, ...]:
        """Return lines of NumPy that decode `code` [N, K] to `values` [N, K + 1], probabilities and tail; none without codes."""
        return ()


class HardOnly(Codec):
    """A codec that stores only the hard label: K = 0, in any precision."""

    @property
    def record(self) -> np.dtype[np.void]:
        """Type of a stored label."""
        return np.dtype([("hard", index_dtype(self.num_classes))])

    def store(self, hard: NDArray[Any], index: NDArray[Any], prob: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the stored columns of the teacher's answers, by name."""
        return {"hard": hard.astype(index_dtype(self.num_classes))}

    def decode(self, row: NDArray[np.uint32], stored: Columns) -> LabelRows:
        """Return the label rows for rows from their stored columns."""
        index, prob = np.empty((len(row), 0), index_dtype(self.num_classes)), np.empty((len(row), 0), self.prob_dtype)
        return LabelRows(row, stored["hard"], index, prob, np.empty(0, self.prob_dtype))


class Log8(Codec):
    """A codec with K bytes for K probabilities and the tail: each byte is the drop from the value before, in tenths of a nat.

    Only ratios are rounded, and each is computed from the decoded value before it. So the error of a logit is at most half a
    step for any K, and the sum is exactly 1 again. The hard label is the first of top-k.
    """

    @property
    def record(self) -> np.dtype[np.void]:
        """Type of a stored label."""
        index, width = index_dtype(self.num_classes), (self.topk,)
        return np.dtype([("topk_index", index, width), ("topk_code", np.uint8, width)])

    def store(self, hard: NDArray[Any], index: NDArray[Any], prob: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Return the stored columns of the teacher's answers, by name."""
        code = to_codes(prob, tail_of(prob), self.num_classes)
        return {"topk_index": index.astype(index_dtype(self.num_classes)), "topk_code": code}

    def decode(self, row: NDArray[np.uint32], stored: Columns) -> LabelRows:
        """Return the label rows for rows from their stored columns."""
        index, code = stored["topk_index"], stored["topk_code"]
        return LabelRows(row, index[:, 0], index, *from_codes(code, self.num_classes), code)

    def numpy_lines(self) -> tuple[str, ...]:
        """Return the lines of `from_codes` in NumPy."""
        return (
            f"fallen = np.exp(-np.cumsum(np.where(code == {LOG8_ZERO}, np.inf, code), axis=1) / 10)",
            f"fallen[:, -1] *= {self.num_classes - self.topk}  # classes that are not kept",
            "values = np.column_stack([np.ones(len(fallen)), fallen])",
            "values /= values.sum(axis=1, keepdims=True)",
        )


# For each precision: the codec for K > 0, its `prob_dtype` and its `rounding`.
CODECS: dict[Precision, tuple[type[Codec], type[np.floating], float]] = {
    "float16": (Codec, np.float16, 1e-3),
    "float32": (Codec, np.float32, 1e-6),
    "log8": (Log8, np.float32, 0.03),
}


def codec_of(precision: Precision, num_classes: int, topk: int) -> Codec:
    """Return the codec of a precision for C classes and K kept classes."""
    kind, prob, rounding = CODECS[precision]
    return (kind if topk else HardOnly)(num_classes, topk, np.dtype(prob), rounding)


def index_dtype(num_classes: int) -> np.dtype[np.unsignedinteger]:
    """Return uint16, or uint32 if there are more than 65,536 classes."""
    return np.dtype(np.uint16 if num_classes <= 65536 else np.uint32)


def tail_of(prob: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probability of all other classes, float64 [N], for kept probabilities, float32 [N, K]."""
    return np.clip(1.0 - prob.astype(np.float64).sum(1), 0.0, 1.0)


def to_codes(prob: NDArray[np.float32], tail: NDArray[np.float64], num_classes: int) -> NDArray[np.uint8]:
    """Return the `log8` codes of probabilities in descending order.

    Args:
        prob: float32 [N, K], K >= 1.
        tail: float64 [N], probability of the classes that are not kept.
        num_classes: C.

    Returns:
        uint8 [N, K]. Code i < K - 1 is the ratio of probability i to i + 1; the last code is the ratio of the last probability
        to the mean of the C - K other classes. Codes are in steps of LOG8_STEP nats, at most 254. LOG8_ZERO: the value is 0.
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
    codes = np.ascontiguousarray(codes.T)  # [K, N]: each rank is contiguous, ten times as fast as row by row
    fallen, gone = codes.astype(np.uint32), codes == LOG8_ZERO
    if gone.any():
        fallen[gone] = _FAR
    for rank in range(1, topk):
        fallen[rank] += fallen[rank - 1]
    values = np.ones((topk + 1, size))
    _FALLEN.take(fallen, out=values[1:], mode="clip")  # values more than _FAR steps down are 0 too
    values[topk] *= num_classes - topk
    values *= 1 / values.sum(axis=0)
    values = values.astype(np.float32)
    return np.ascontiguousarray(values[:topk].T), values[topk]


def find_problem(rows: LabelRows, num_classes: int, views: int = 1) -> str | None:
    """Return the first reason why these values cannot be a teacher's answers, or None.

    It runs on all data that is read, so for speed it compares bit patterns: floats of 0 and above order like their bit
    patterns, and all others (negative ones, NaN, infinity) are above the pattern of 1.

    Args:
        rows: rows of one view, or of several views in sequence.
        num_classes: C.
        views: number of these views.
    """
    if not len(rows):
        return None
    row = rows.row.reshape(views, -1)
    if (row[:, 1:] <= row[:, :-1]).any():
        return "rows are not in ascending order"
    topk = rows.topk_index.shape[1]
    if not topk:
        return f"a class is not below {num_classes}" if rows.hard.max() >= num_classes else None
    if _has_twice(rows.topk_index):
        return "a class occurs twice in top-k"
    if max(rows.hard.max(), rows.topk_index.max()) >= num_classes:
        return f"a class is not below {num_classes}"
    if rows.topk_code is None and (problem := _find_in_floats(rows)):
        return problem
    return "`hard` is not the first class of top-k" if (rows.topk_index[:, 0] != rows.hard).any() else None


def _find_in_floats(rows: LabelRows) -> str | None:
    """Return the first problem of stored probabilities, or None. Codes need no check: every code gives valid probabilities."""
    topk = rows.topk_prob.shape[1]
    prob, tail, one = _bits(rows.topk_prob), _bits(rows.tail_mass), _bits(np.ones(1, rows.topk_prob.dtype))[0]
    if prob.max() > one or tail.max() > one:
        return "a probability is outside 0..1"
    rises = prob[1:] > prob[:-1]
    rises[topk - 1 :: topk] = False  # from the last value of a row to the first of the next
    if rises.any():
        return "probabilities are not in descending order"
    if (np.abs(np.einsum("nk->n", _float32(rows.topk_prob)) + rows.tail_mass - 1) > SUM_TOLERANCE).any():
        return "probabilities do not add up to 1"
    return None


def _float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return values of 0..1 in float32; float16 is converted by its bits, four times as fast as in NumPy."""
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    moved = np.left_shift(np.ascontiguousarray(values).view(np.uint16), 13, dtype=np.uint32)
    return moved.view(np.float32) * np.float32(2**112)  # the exponents' biases are 15 and 127


def _bits(values: NDArray[np.floating]) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")


def _has_twice(index: NDArray[np.unsignedinteger]) -> bool:
    """Return whether a row of [N, K] holds a value twice."""
    size, topk = index.shape
    if topk > COMPARED_TOPK:
        return bool((np.diff(np.sort(index, axis=1), axis=1) == 0).any())
    ranks = np.ascontiguousarray(index.T)  # each rank is contiguous: a hundred times as fast as row by row
    ranks = np.concatenate([ranks, ranks[: topk // 2]])  # the first ranks follow the last ones
    across, down = ranks.strides[1], ranks.strides[0]
    # Entry [d, k] is rank k + d + 1. The ranks form a circle, so comparing up to half around it compares every pair.
    others = np.ndarray((topk // 2, topk, size), ranks.dtype, ranks, offset=down, strides=(down, down, across))
    return bool((ranks[:topk] == others).any())
