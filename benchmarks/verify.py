"""How fast `labels verify` reads, with one thread and with several: label files (hash, unpack, check), and images.

    python benchmarks/verify.py --rounds 5 --threads 1 2 --out benchmarks/results/verify.json

A label set of C = 1000 and K = 10 is written from random probabilities that fall as a teacher's do, and tars of random
bytes for its images; it is read from the page cache, so that the figures are of the work and not of a disk. Rounds
alternate between the numbers of threads. Beside it, SHA-256 alone over the same label files on one thread.
"""

import hashlib
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from rounds import machine, options, write_json

from pipeline.images.source import Source, open_source
from pipeline.labels.comparing import record_of
from pipeline.labels.encoding import codec_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Plan, TeacherIdentity, labels_path, samples_path
from pipeline.labels.sealing import claim, seal
from pipeline.labels.tables import LabelsFooter, SampleRows, SamplesFooter, write_labels, write_samples
from pipeline.settings.configs import VerifyConfig
from pipeline.settings.files import load_recipe
from pipeline.storage.atomic import publish_file
from pipeline.verify.images import compare_images
from pipeline.verify.report import Report
from pipeline.verify.verify import verify

CLASSES, TOPK, VIEWS_PER_SHARD = 1000, 10, 30


def write_images(folder: Path, shards: int, images: int, image_bytes: int) -> Source:
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:06}.tar", "w") as tar:
            for number in range(images):
                for suffix, data in (("jpg", rng.bytes(image_bytes)), ("cls", b"%d" % (number % CLASSES))):
                    info = tarfile.TarInfo(f"{shard:06}-{number:06}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return open_source(folder)


def write_set(out: Path, source: Source, views: int) -> None:
    """Write a sealed set as stage 1 would, with answers that are drawn."""
    teacher = TeacherIdentity(
        name="drawn",
        weights_sha256="0" * 64,
        img_size=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_classes=CLASSES,
        class_names=None,
    )
    recipe, rng = load_recipe("deit", {}), np.random.default_rng(0)
    plan = Plan.make(recipe=recipe, teacher=teacher, source=record_of(source), topk=TOPK, precision="float16")
    blocks = [range(start, min(start + VIEWS_PER_SHARD, views)) for start in range(0, views, VIEWS_PER_SHARD)]
    ids = {"labelset_id": plan.labelset_id, "source_id": plan.source_id}
    claim(out, plan, blocks)
    for shard in source.shards:
        images = [sample.image for sample in shard]
        size, ones = len(images), np.ones(len(images), np.uint32)
        hashes = tuple(map(xxhash.xxh3_128_digest, images))
        lengths = np.array([len(image) for image in images], np.uint32)
        bad = (None,) * size
        rows = SampleRows(shard.keys, shard.class_labels, lengths, hashes, ones, ones, bad)
        footer = SamplesFooter(**ids, shard=shard.name, rows=size)
        publish_file(out / samples_path(shard.name), partial(write_samples, samples=rows, footer=footer))
        for block in blocks:
            answers = [draw_rows(rng, size) for _ in block]
            labels = LabelsFooter(
                **ids,
                recipe_id=plan.recipe_id,
                teacher_id=plan.teacher_id,
                shard=shard.name,
                view_start=block.start,
                view_stop=block.stop,
                rows_per_view=size,
                num_classes=CLASSES,
                topk=TOPK,
                precision="float16",
                content_xxh3=plan.codec.content_xxh3(answers),
                probes=[],
                environment={},
            )
            publish_file(out / labels_path(shard.name, block), partial(write_labels, views=answers, footer=labels))
    seal(out, plan, blocks)


def draw_rows(rng: np.random.Generator, size: int):
    prob = -np.sort(-rng.dirichlet(np.full(TOPK + 1, 0.3), size)[:, :TOPK], axis=1).astype(np.float32)
    first = rng.integers(0, CLASSES, size)
    index = (first[:, None] + np.arange(TOPK) * rng.integers(1, 99, (size, 1))) % CLASSES
    return codec_of("float16", CLASSES, TOPK).encode(np.arange(size), index[:, 0], index, prob)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def check_set(folder: Path, threads: int) -> None:
    assert verify(str(folder), VerifyConfig(probes=False, threads=threads)).problems == []


def check_images(label_set: LabelSet, source: Source, threads: int) -> None:
    report = Report("")
    compare_images(report, label_set, open_source(source.location), threads=threads)
    assert report.problems == []


def hash_alone(folder: Path) -> None:
    for path in folder.rglob("*.parquet"):
        hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument(
        "--images", type=int, default=1281, help="Of a source shard; ImageNet in 1,000 shards has 1,281."
    )
    parser.add_argument("--image-bytes", type=int, default=110_000)
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        images, folder = Path(root) / "images", Path(root) / "set"
        images.mkdir()
        source = write_images(images, args.shards, args.images, args.image_bytes)
        write_set(folder, source, args.views)
        label_set = LabelSet.open(folder)
        label_bytes = sum(entry.bytes for entry in label_set.manifest.files)
        image_bytes = args.shards * args.images * args.image_bytes
        rounds: list[dict[str, float]] = []
        for number in range(args.rounds):
            times = {"sha256 alone": seconds(lambda: hash_alone(folder))}
            for threads in args.threads:
                times[f"labels, {threads} threads"] = seconds(partial(check_set, folder, threads))
                times[f"images, {threads} threads"] = seconds(partial(check_images, label_set, source, threads))
            rounds.append(times)
            print(f"round {number + 1}: " + ", ".join(f"{k} {v:.2f} s" for k, v in times.items()), flush=True)
    median = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    rates = {name: (image_bytes if "images" in name else label_bytes) / s / 2**20 for name, s in median.items()}
    for name, rate in rates.items():
        print(f"{name:24}{rate:10,.0f} MiB/s")
    size = {"label_bytes": label_bytes, "image_bytes": image_bytes, "labels": args.shards * args.images * args.views}
    result = {"what": "labels verify, from the page cache", "machine": machine(), **size, "mib_per_s": rates}
    write_json(args.out, result | {"rounds": rounds})


if __name__ == "__main__":
    main()
