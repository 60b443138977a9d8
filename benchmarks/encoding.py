"""What a label costs in bytes, in divergence from the teacher, and in time to read, for each way to store it.

    deit-cli precompute --data IMAGES --teacher TEACHER --topk 1000 --precision float32 --views 0:240 --out exact
    python benchmarks/encoding.py --labels exact --out benchmarks/results/encoding.json

Takes the full answers of a label set that keeps every class, and stores them again with K = 10 and K = 0 in each precision: real
label sets, of source shards of 1,000 samples and blocks of 30 views. Counted is everything: label files with their footers,
manifest and plan; the samples files, which do not grow with the views, stand apart. Where the images are fewer than
1,000, several views stand side by side in a row group; so that no compressor profits from seeing an image twice, classes are
renamed by another random permutation in each of them. Divergence is KL(full answer || stored), the tail spread evenly, less
what K = 10 in full precision costs. Reading is `LabelSet.read` of one view after the other, on one thread, from files in
the page cache, hashes and checks included, in alternating rounds.
"""

import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rounds import machine, options, write_json

from pipeline.images.samples import keys_sha256
from pipeline.labels.encoding import codec_of
from pipeline.labels.format import Precision
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Plan, ShardRecord, SourceRecord, samples_path
from pipeline.labels.sealing import claim, seal
from pipeline.labels.tables import SampleRows, SamplesFooter, write_samples
from pipeline.stage1.drafts import LabelDraft, publish_draft
from pipeline.storage.atomic import publish_file
from pipeline.storage.place import open_place

ROWS, VIEWS, TOPK = 1000, 30, 10
SHARD = "train-000000"
WAYS: dict[str, tuple[int, Precision]] = {
    "K=10 float32": (TOPK, "float32"),
    "K=10 float16": (TOPK, "float16"),
    "K=10 log8": (TOPK, "log8"),
    "K=0": (0, "float16"),
}
PUBLISHED = {"ml-dr, K=10": 65, "TinyViT, K=10": 44, "FKD, K=5": 40}  # bytes a view, augmentation parameters included


def full_answers(label_set: LabelSet) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return classes, most probable first, and probabilities, [labels, C] each, view by view."""
    read = [label_set.read(shard, view) for view in label_set.views for shard in label_set.shards]
    if label_set.plan.topk != label_set.num_classes:
        raise SystemExit(
            f"{label_set.place} keeps {label_set.plan.topk} of {label_set.num_classes} classes: make it with --topk C"
        )
    index = np.concatenate([rows.topk_index.astype(np.int64) for rows in read])
    return index, np.concatenate([rows.topk_prob.astype(np.float64) for rows in read])


def renamed(index: NDArray[np.int64], images: int, num_classes: int) -> NDArray[np.int64]:
    """Give the classes other names in each view of the images."""
    draws, result = np.random.default_rng(0), index.copy()
    for start in range(0, len(index), images):
        result[start : start + images] = draws.permutation(num_classes)[index[start : start + images]]
    return result


def divergence(index: NDArray[np.int64], prob: NDArray[np.float64], precision: Precision) -> NDArray[np.float64]:
    """Return KL(full || stored) of every label in nats, float64 [labels]."""
    kept, classes = prob[:, :TOPK], prob.shape[1]
    rows = np.arange(len(prob))
    codec = codec_of(precision, classes, TOPK)
    stored = codec.encode(rows, index[:, 0], index[:, :TOPK], kept.astype(np.float32))
    tail = np.repeat(stored.tail_mass.astype(np.float64)[:, None] / (classes - TOPK), classes - TOPK, axis=1)
    whole = np.concatenate([stored.topk_prob.astype(np.float64), tail], axis=1)
    whole /= whole.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(prob > 0, prob * np.log(prob / np.maximum(whole, 1e-30)), 0).sum(1)


def write_set(
    folder: Path, plan: Plan, samples: SampleRows, index: NDArray[np.int64], prob: NDArray[np.float64]
) -> LabelSet:
    """Write these answers as a label set of one source shard."""
    block = range(len(index) // ROWS)
    claim(folder, plan, [block])
    footer = SamplesFooter(labelset_id=plan.labelset_id, source_id=plan.source_id, shard=SHARD, rows=len(samples))
    publish_file(folder / samples_path(SHARD), lambda file: write_samples(file, samples, footer))
    draft = LabelDraft(samples, SHARD, block, plan)
    for view in block:
        at, kept = slice(view * ROWS, (view + 1) * ROWS), plan.topk
        draft.add(view, np.arange(ROWS), index[at, 0], index[at, :kept], prob[at, :kept].astype(np.float32))
    publish_draft(folder, plan, draft, {"device": "cpu"})
    seal(folder, plan, [block])
    return LabelSet(open_place(folder))


def plan_of(source: LabelSet, samples: SampleRows, topk: int, precision: Precision) -> Plan:
    record = ShardRecord(
        name=SHARD, num_samples=len(samples), keys_sha256=keys_sha256(samples.key, samples.class_label)
    )
    where = SourceRecord(kind="tar", location="images", class_names=None, shards=(record,))
    return Plan.make(recipe=source.recipe, teacher=source.plan.teacher, source=where, topk=topk, precision=precision)


def named_samples(num_classes: int) -> SampleRows:
    """Return samples as ImageNet's are named."""
    key = tuple(f"n{i % num_classes:08d}/n{i % num_classes:08d}_{i}" for i in range(ROWS))
    xxh3 = tuple(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in key)
    labels = tuple(i % num_classes for i in range(ROWS))
    size, height, width = (np.full(ROWS, value, np.uint32) for value in (110_000, 375, 500))
    return SampleRows(key, labels, size, xxh3, height, width, (None,) * ROWS)


def sizes(label_set: LabelSet, folder: Path, labels: int) -> dict[str, float]:
    files = {path.relative_to(folder).parts[0]: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    samples = files.pop("samples")
    return {"bytes_per_view": sum(files.values()) / labels, "samples_bytes_per_image": samples / ROWS}


def rate(folder: Path) -> float:
    """Return rows/s of reading every view once, from opening the set on."""
    began, label_set = time.perf_counter(), LabelSet.open(folder)
    read = sum(len(label_set.read(SHARD, view)) for view in label_set.views)
    return read / (time.perf_counter() - began)


def later_rate(folder: Path) -> float:
    """Return rows/s of the views after the first of a file, as a sequential reader meets them."""
    label_set = LabelSet.open(folder)
    label_set.read(SHARD, label_set.views[0])
    began = time.perf_counter()
    read = sum(len(label_set.read(SHARD, view)) for view in label_set.views[1:])
    return read / (time.perf_counter() - began)


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("--labels", required=True, help="Label set that keeps every class in float32.")
    args = parser.parse_args()
    source = LabelSet.open(args.labels)
    index, prob = full_answers(source)
    num_labels = min(len(index) // ROWS, VIEWS) * ROWS
    index, prob = index[:num_labels], prob[:num_labels]
    exact = divergence(index, prob, "float32")
    index = renamed(index, source.num_samples, source.num_classes)
    samples, ways = named_samples(source.num_classes), {}
    with tempfile.TemporaryDirectory() as scratch:
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for name, (topk, precision) in WAYS.items():
            folder = Path(scratch) / name
            label_set = write_set(folder, plan_of(source, samples, topk, precision), samples, index, prob)
            ways[name] = sizes(label_set, folder, num_labels)
            if topk:
                cost = divergence(index, prob, precision) - exact
                ways[name] |= {"kl_mean": float(cost.mean()), "kl_p99": float(np.quantile(cost, 0.99))}
        for _ in range(args.rounds):
            for name in WAYS:
                rates[name].append((rate(Path(scratch) / name), later_rate(Path(scratch) / name)))
    for name, found in rates.items():
        whole, later = zip(*found, strict=True)
        ways[name] |= {"rows_per_s": statistics.median(whole), "rows_per_s_after_the_first": statistics.median(later)}
    result: dict[str, Any] = {
        "teacher": source.plan.teacher.name,
        "recipe": source.plan.recipe,
        "classes": source.num_classes,
        "images": source.num_samples,
        "labels": num_labels,
        "kept_mass": float(prob[:, :TOPK].sum(1).mean()),
        "kl_of_top10": float(exact.mean()),
        "ways": ways,
        "published_bytes_per_view": PUBLISHED,
        "machine": machine(),
    }
    write_json(args.out, result)
    for name, way in ways.items():
        print(name, {key: float(f"{value:.4g}") for key, value in way.items()})


if __name__ == "__main__":
    main()
