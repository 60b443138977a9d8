"""Bytes, error and reading time of every way to lay out label columns that was weighed: why the format is as it is.

    deit-cli precompute --data IMAGES --teacher TEACHER --topk 1000 --precision float32 --views 0:240 --out exact
    python benchmarks/layouts.py --labels exact --out benchmarks/results/layouts.json

Takes the full answers of a label set that keeps every class, `--rows` to a row group, K = 10. Where the images are fewer than
the rows of a group, several views stand side by side, and class numbers are moved round by the number of an image's view times
the number of images: a class is as frequent as any other, no image seems to be seen twice, and classes that
are neighbours stay neighbours, as ImageNet's dogs are.

Columns: bytes a view of each column alone, page headers included, footer not, for encodings and zstd levels, as a list and as
fixed-length binary; microseconds to read a row group of it, the least of many rounds. Steps: probabilities as 8-bit codes of the
ratio between ranks, in steps of equal ratio or of equal parts of a power of it: bytes a view, and KL(full answer ||
stored), the tail spread evenly over the other classes, less what K = 10 in full precision costs. `--other` names a label set of the same teacher in another dtype: how far its own
rounding moves it, on the views that both have. `--table` prints a JSON again.
"""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rounds import machine, options, write_json

from pipeline.labels.labelset import LabelSet

TOPK = 10
LEVELS = (1, 3, 9, 15, 19)
OURS = 15
ROUNDS = 60
SPLIT, PLAIN, DELTA, DICTIONARY = "BYTE_STREAM_SPLIT", "PLAIN", "DELTA_BINARY_PACKED", "dictionary"


def full_answers(label_set: LabelSet, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return classes, most probable first, and probabilities, [labels, C] each, view by view."""
    if label_set.plan.topk != label_set.num_classes:
        raise SystemExit(f"{label_set.place} does not keep every class: make it with --topk {label_set.num_classes}")
    index, prob, images = [], [], 0
    for view in label_set.views:
        for shard in label_set.shards:
            if sum(map(len, prob)) >= most:
                break
            rows = label_set.read(shard, view)
            images = len(rows) if not view else images
            index.append((rows.topk_index.astype(np.int64) + view * images) % label_set.num_classes)
            prob.append(rows.topk_prob.astype(np.float64))
    return np.concatenate(index)[:most], np.concatenate(prob)[:most]


def written(column: NDArray[Any], kind: pa.DataType, encoding: str, level: int, rows: int) -> bytes:
    """Return a Parquet file of this column alone, `rows` to a row group."""
    schema = pa.schema([pa.field("a", kind, nullable=False)])
    path = "a.list.element" if pa.types.is_fixed_size_list(kind) else "a"
    options: dict[str, Any] = {"compression": "zstd", "compression_level": level, "write_page_checksum": True}
    options |= {"write_statistics": False, "use_dictionary": [path] if encoding == DICTIONARY else False}
    options |= {} if encoding == DICTIONARY else {"column_encoding": {path: encoding}}
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema, **options) as writer:
        for start in range(0, len(column), rows):
            writer.write_table(pa.table([_array(column[start : start + rows], kind)], schema=schema))
    return file.getvalue()


def _array(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    values = np.ascontiguousarray(values)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values.tobytes())])
    return pa.array(values)


def measured(column: NDArray[Any], kind: pa.DataType, encoding: str, level: int, rows: int) -> dict[str, float]:
    """Return bytes a view of the column's pages, and microseconds to read a row group."""
    file = pq.ParquetFile(
        pa.BufferReader(written(column, kind, encoding, level, rows)), page_checksum_verification=True
    )
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    size = sum(group.column(0).total_compressed_size for group in groups)
    return {"bytes": size / len(column), "read_us": 1e6 * least(lambda: file.read_row_group(0, use_threads=False))}


def least(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def lists(kind: pa.DataType, count: int) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False), count)


def column_cases(index: NDArray[np.int64], prob: NDArray[np.float64]) -> dict[str, tuple[NDArray[Any], pa.DataType]]:
    """Return each column of a label shard in each of its forms."""
    top, half = index[:, :TOPK].astype(np.uint16), prob[:, :TOPK].astype(np.float16)
    codes, _, _ = coded(prob, np.exp(-0.1 * np.arange(256)))
    return {
        "hard": (top[:, 0], pa.uint16()),
        "topk_index, list": (top, lists(pa.uint16(), TOPK)),
        "topk_index, binary": (top, pa.binary(2 * TOPK)),
        "topk_index without the first, list": (top[:, 1:], lists(pa.uint16(), TOPK - 1)),
        "topk_prob float16, list": (half, lists(pa.float16(), TOPK)),
        "topk_prob float16, binary": (half, pa.binary(2 * TOPK)),
        "topk_prob float32, list": (prob[:, :TOPK].astype(np.float32), lists(pa.float32(), TOPK)),
        "tail_mass float16": ((1 - prob[:, :TOPK].sum(1)).astype(np.float16), pa.float16()),
        "topk_code, list": (codes, lists(pa.uint8(), TOPK)),
        "topk_code, binary": (codes, pa.binary(TOPK)),
    }


def encodings_of(kind: pa.DataType) -> tuple[str, ...]:
    if pa.types.is_fixed_size_binary(kind):
        return SPLIT, PLAIN
    element = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    return (SPLIT, PLAIN, DICTIONARY, DELTA) if pa.types.is_integer(element) else (SPLIT, PLAIN, DICTIONARY)


def coded(
    prob: NDArray[np.float64], ratios: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
    """Return codes of the ratio of each rank to the next, uint8 [labels, K], and what they decode to with the tail.

    Args:
        prob: full answers [labels, C], most probable first.
        ratios: what each code means, falling from 1; each code is chosen from what is decoded of the ranks before.
    """
    rest, classes = prob[:, TOPK:], prob.shape[1]
    values = np.concatenate([prob[:, 1:TOPK], rest.mean(1, keepdims=True)], axis=1)
    wanted = np.log(np.maximum(values, 1e-38) / prob[:, :1])
    meant = np.log(np.maximum(ratios, 1e-38))[::-1]  # rising
    reached, codes, weights = np.zeros(len(prob)), np.empty(values.shape, np.uint8), [np.zeros(len(prob))]
    for rank, target in enumerate(wanted.T):
        at = np.clip(np.searchsorted(meant, target - reached), 1, len(meant) - 1)
        at -= (target - reached - meant[at - 1]) < (meant[at] - (target - reached))
        codes[:, rank] = len(meant) - 1 - at
        reached = reached + meant[at]
        weights.append(reached)
    decoded = np.exp(np.stack(weights, axis=1))
    decoded[:, -1] *= classes - TOPK
    decoded /= decoded.sum(1, keepdims=True)
    return codes, decoded[:, :TOPK], decoded[:, TOPK]


def divergence(prob: NDArray[np.float64], kept: NDArray[np.float64], tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(full || stored) in nats, float64 [labels]."""
    others = prob.shape[1] - TOPK
    stored = np.concatenate([kept, np.repeat(tail[:, None] / others, others, axis=1)], axis=1)
    stored = np.maximum(stored / stored.sum(1, keepdims=True), 1e-38)
    return np.where(prob > 0, prob * np.log(np.maximum(prob, 1e-38) / stored), 0).sum(1)


def rounded(prob: NDArray[np.float64], kind: type[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    kept, tail = prob[:, :TOPK], 1 - prob[:, :TOPK].sum(1)
    return kept.astype(kind).astype(np.float64), tail.astype(kind).astype(np.float64)


def step_cases() -> dict[str, NDArray[np.float64]]:
    """Return what the codes mean in each of the ways that were weighed."""
    equal = {
        f"{step:g} nats": np.exp(-step * np.arange(256)) for step in (0.02, 0.04, 1 / 16, 0.08, 0.1, 0.12, 0.2, 0.4)
    }
    powers = {
        f"(1 - code / {top}) to the {power}": (1 - np.arange(top + 1) / top) ** power
        for power in (2, 3)
        for top in (255, 127, 63, 31, 15)
    }
    return equal | powers


def measure_steps(prob: NDArray[np.float64], rows: int) -> dict[str, dict[str, float]]:
    """Return bytes a view of the probabilities with the tail, and what they cost in divergence."""
    exact = divergence(prob, prob[:, :TOPK], prob[:, TOPK:].sum(1))
    result: dict[str, dict[str, float]] = {}

    def add(name: str, size: float, kept: NDArray[np.float64], tail: NDArray[np.float64]) -> None:
        cost = divergence(prob, kept, tail) - exact
        result[name] = {"bytes": size, "kl_mean": float(cost.mean()), "kl_p99": float(np.quantile(cost, 0.99))}

    def size_of(column: NDArray[Any], kind: pa.DataType) -> float:
        return measured(column, kind, SPLIT, OURS, rows)["bytes"]

    for name, kind, arrow in (("float32", np.float32, pa.float32()), ("float16", np.float16, pa.float16())):
        kept, tail = prob[:, :TOPK].astype(kind), (1 - prob[:, :TOPK].sum(1)).astype(kind)
        add(name, size_of(kept, lists(arrow, TOPK)) + size_of(tail, arrow), *rounded(prob, kind))
    for name, ratios in step_cases().items():
        codes, kept, tail = coded(prob, ratios)
        add(name, size_of(codes, lists(pa.uint8(), TOPK)), kept, tail)
    return result


def measure_columns(index: NDArray[np.int64], prob: NDArray[np.float64], rows: int) -> dict[str, Any]:
    return {
        name: {
            encoding: {level: measured(column, kind, encoding, level, rows) for level in LEVELS}
            for encoding in encodings_of(kind)
        }
        for name, (column, kind) in column_cases(index, prob).items()
    }


def compare_teachers(exact: LabelSet, other: LabelSet) -> dict[str, Any]:
    """Return KL(one || other) of the full answers of one teacher in two dtypes, and how many hard labels differ."""
    cost, differ = [], []
    for view in other.views:
        for shard in other.shards:
            mine, theirs = exact.read(shard, view), other.read(shard, view)
            dense = [np.zeros(rows.topk_prob.shape) for rows in (mine, theirs)]
            for values, rows in zip(dense, (mine, theirs), strict=True):
                np.put_along_axis(values, rows.topk_index.astype(np.int64), rows.topk_prob.astype(np.float64), axis=1)
            p, q = (np.maximum(values, 1e-38) for values in dense)
            cost.append((p * np.log(p / q)).sum(1))
            differ.append(mine.hard != theirs.hard)
    divergences = np.concatenate(cost)
    return {
        "labels": len(divergences),
        "environments": other.manifest.environments,
        "kl_mean": float(divergences.mean()),
        "kl_p99": float(np.quantile(divergences, 0.99)),
        "other_hard_labels": float(np.concatenate(differ).mean()),
    }


def print_tables(result: dict[str, Any]) -> None:
    """Print the tables of benchmarks/README.md."""
    levels = [str(level) for level in LEVELS]
    print("| column | encoding | " + " | ".join(f"zstd {level}" for level in levels) + f" | read at {OURS}, us |")
    print("|---|---|" + "--:|" * (len(levels) + 1))
    for name, encodings in result["columns"].items():
        for encoding, found in encodings.items():
            sizes = " | ".join(f"{found[level]['bytes']:.2f}" for level in levels)
            print(f"| {name} | {encoding.lower().replace('_', ' ')} | {sizes} | {found[str(OURS)]['read_us']:.0f} |")
    print("\n| probabilities and tail | bytes a view | mean KL, nats | 99 % below |\n|---|--:|--:|--:|")
    for name, found in result["steps"].items():
        print(f"| {name} | {found['bytes']:.2f} | {found['kl_mean']:.1e} | {found['kl_p99']:.1e} |")
    if other := result["other_dtype"]:
        print(f"\nteacher in another dtype: {other}")


def main() -> None:
    parser = options(__doc__, out_required=False)
    parser.add_argument("--labels", help="Label set that keeps every class in float32.")
    parser.add_argument("--other", help="Label set of the same views and teacher in another dtype.")
    parser.add_argument("--rows", type=int, default=1000, help="Of a row group: samples of a source shard.")
    parser.add_argument("--groups", type=int, default=8, help="Row groups.")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Print the tables of a result, and measure nothing.")
    args = parser.parse_args()
    if args.table:
        print_tables(json.loads(args.table.read_text()))
        return
    if not args.labels or not args.out:
        parser.error("--labels and --out are needed")
    source = LabelSet.open(args.labels)
    index, prob = full_answers(source, args.rows * args.groups)
    prob /= prob.sum(1, keepdims=True)
    result: dict[str, Any] = {
        "teacher": source.plan.teacher.name,
        "classes": source.num_classes,
        "labels": len(prob),
        "rows_per_group": args.rows,
        "most_probable": float(prob[:, 0].mean()),
        "kept_mass": float(prob[:, :TOPK].sum(1).mean()),
        "kl_of_top10": float(divergence(prob, prob[:, :TOPK], prob[:, TOPK:].sum(1)).mean()),
        "columns": measure_columns(index, prob, args.rows),
        "steps": measure_steps(prob, args.rows),
        "other_dtype": compare_teachers(source, LabelSet.open(args.other)) if args.other else None,
        "machine": machine(),
    }
    write_json(args.out, result)
    print_tables(json.loads(args.out.read_text()))


if __name__ == "__main__":
    main()
