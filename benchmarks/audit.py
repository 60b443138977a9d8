"""How well stored answers point to wrong class labels: real CIFAR-10 with swapped labels.

    python benchmarks/audit.py --data cifar10 --out benchmarks/results/audit.json
    python benchmarks/audit.py --table benchmarks/results/audit.json

3 % of the class labels are swapped for another class, at random. A CNN learns from these labels, for few epochs or many, and
labels several views of the same images, by two recipes: crop and flip, and half of the pairs mixed. Each score ranks the images;
the number of views, the way of treating mixed views and the length of the teacher's training vary. The script also plants copies
of images under other keys, with other bytes but the same pixels, and says how many of them their label patterns would give away.

`--data` is a folder with Hugging Face's CIFAR-10 as Parquet, `train-*.parquet` and `test-*.parquet`. The result file is written
after each teacher and recipe; the same command continues after an interruption.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cifar10 import CROP_FLIP, HALF_MIXED, SCALES
from numpy.typing import NDArray
from PIL import Image
from rounds import machine, write_json
from sklearn.metrics import average_precision_score

from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.precompute import precompute
from pipeline.storage.atomic import replace_file
from pipeline.teacher.loading import load_teacher
from trainer.config import EvaluateConfig, TrainConfig
from trainer.evidence.audit import HALF, LEAST, SeenView, probability_of, seen_views, self_confidence
from trainer.evidence.scores import evaluate_checkpoint
from trainer.loop import train

IMAGES, COPIES = 12_288, 256
SWAPPED = 0.03
# Name of each teacher -> epochs and recipe of its training. The last one is to learn the wrong labels by heart.
TEACHERS = {
    "8 epochs": (8, CROP_FLIP),
    "32 epochs": (32, CROP_FLIP),
    "32 epochs, no augmentation": (32, CROP_FLIP | {"crop": "center", "crop_pct": 1.0, "hflip": 0.0}),
}
VIEWS = (1, 2, 4, 8)
RECIPES = {"crop-flip": CROP_FLIP, "half-mixed": HALF_MIXED}
SCORES = ("share", "self_confidence", "log_self_confidence", "margin")

Array = NDArray[np.float64]


def write_source(data: Path, path: Path) -> dict[str, NDArray[np.int64]]:
    """Write the first images with swapped class labels, and copies of some of them; return which are swapped and copied.

    Returns:
        `swapped`: bool [N]; `copied`: int64 [COPIES], the originals of the last COPIES images. No copy is of a swapped image.
    """
    table = pa.concat_tables([pq.read_table(file) for file in sorted(data.glob("train-*.parquet"))]).slice(0, IMAGES)
    random = np.random.default_rng(0)
    labels = table["label"].to_numpy().copy()
    chosen = random.permutation(IMAGES)
    swapped, copied = chosen[: round(SWAPPED * IMAGES)], chosen[-COPIES:]
    labels[swapped] = (labels[swapped] + random.integers(1, 10, len(swapped))) % 10
    images = table["img"].to_pylist()
    copies = [{"bytes": as_png(images[i]["bytes"]), "path": f"copy-{i:05}.png"} for i in copied.tolist()]
    named = [{"bytes": image["bytes"], "path": f"{i:05}.jpg"} for i, image in enumerate(images)]
    columns = [pa.array(named + copies, table.schema.field("img").type), pa.array([*labels, *labels[copied]])]
    whole = pa.table(columns, schema=table.select(["img", "label"]).schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: pq.write_table(whole, file, row_group_size=1024))
    flags = np.isin(np.arange(IMAGES + COPIES), swapped)
    return {"swapped": flags, "copied": copied}


def as_png(image: bytes) -> bytes:
    """Return the same pixels in other bytes."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "PNG")
    return buffer.getvalue()


def train_teacher(name: str, source: Path, test: Path, work: Path) -> dict[str, Any]:
    """Train the CNN on the swapped labels; return its seconds and its accuracy in percent."""
    began, (epochs, recipe) = time.monotonic(), TEACHERS[name]
    config = TrainConfig(
        data=str(source),
        output=str(work),
        distillation_type="none",
        device="cpu",
        workers=0,
        repeated_aug=1,
        model_ema=False,
        checkpoint_interval=epochs,
        resume="auto",
        **SCALES["small"].teacher | {"epochs": epochs},
    )
    run = train(config, load_recipe("deit", recipe))
    asked = EvaluateConfig(checkpoint=str(run / "last"), data=str(test), workers=0, crop_pct=1.0, device="cpu")
    top1 = evaluate_checkpoint(asked)["scores"]["class_head"]["top1"]
    return {"name": name, "seconds": round(time.monotonic() - began, 1), "top1": round(top1, 2)}


def make_labels(source: Path, work: Path, teacher: Path, recipe: dict[str, Any]) -> LabelSet:
    config = PrecomputeConfig(
        data=str(source), out=work, views=(0, max(VIEWS)), views_per_shard=max(VIEWS), workers=0, accuracy_samples=0
    )
    asked = TeacherConfig(teacher=(str(teacher / "last"),), device="cpu")
    label_set = precompute(config, load_recipe("deit", recipe), load_teacher(asked), open_source(config.data))
    assert label_set is not None
    return label_set


class Tally:
    """The sums of every score over the views so far: plain, and with the rules for mixed views of `trainer.evidence.audit`."""

    def __init__(self, label_set: LabelSet) -> None:
        size = label_set.num_samples
        self.classes = label_set.num_classes
        self.views = 0
        self.plain = {name: np.zeros(size) for name in SCORES}
        self.mixed = {name: np.zeros(size) for name in SCORES}
        self.weight, self.room = np.zeros(size), np.zeros(size)

    def add(self, at: slice, view: SeenView) -> None:
        """Add one view of the images of a source shard, which are at these places; K must be C."""
        prob = dense(view, self.classes)
        own = probability_of(view.own, view.answers, self.classes)
        rows = np.arange(len(prob))
        prob[rows, view.own] = -1
        self.plain["share"][at] += view.answers.hard != view.own
        self.plain["self_confidence"][at] += 1 - own
        self.plain["log_self_confidence"][at] -= np.log(np.maximum(own, LEAST))
        self.plain["margin"][at] += prob.max(1) - own
        mixed = view.other >= 0
        prob[rows[mixed], view.other[mixed]] = -1
        confidence, room = self_confidence(view, self.classes)
        self.weight[at] += view.weight
        self.room[at] += view.weight * room
        self.mixed["share"][at] += view.weight * view.contradicts
        self.mixed["self_confidence"][at] += view.weight * room * (1 - confidence)
        self.mixed["log_self_confidence"][at] -= view.weight * room * np.log(confidence)
        self.mixed["margin"][at] += view.weight * (prob.max(1) - own)

    def scores(self) -> Iterator[tuple[str, str, Array]]:
        """Yield the name of each score, how it treats mixed views, and its value for each image."""
        for name in SCORES:
            yield name, "plain", self.plain[name]
            divisor = self.room if "self_confidence" in name else self.weight
            yield name, "weighted", self.mixed[name] / np.maximum(divisor, LEAST)


def dense(view: SeenView, classes: int) -> Array:
    prob = np.zeros((len(view.answers), classes))
    np.put_along_axis(prob, view.answers.topk_index.astype(int), view.answers.topk_prob.astype(float), axis=1)
    return prob


def precision_at(score: Array, true: NDArray[np.bool_], number: int) -> float:
    """Return the expected share of true ones among the first, in percent, when equal scores are in random order."""
    last = np.sort(score)[::-1][number - 1]
    above, equal = score > last, score == last
    hits = true[above].sum() + true[equal].mean() * (number - above.sum())
    return 100 * float(hits) / number


def measure(label_set: LabelSet, swapped: NDArray[np.bool_], copied: NDArray[np.int64]) -> dict[str, Any]:
    """Return all numbers of one label set."""
    number, tally, scores = int(swapped.sum()), Tally(label_set), []
    mean, logs = (np.zeros((label_set.num_samples, label_set.num_classes)) for _ in range(2))
    kept, rules = 0, {}
    given = 0.0
    for view in label_set.views:
        start = 0
        for shard in label_set.shards:
            (seen,) = seen_views(label_set, shard, range(view, view + 1))
            at = slice(start, start := start + len(seen.own))
            tally.add(at, seen)
            prob = dense(seen, label_set.num_classes)
            mean[at] += prob
            logs[at] += np.log(np.maximum(prob, LEAST))
            given += float((seen.answers.hard == seen.own)[swapped[at]].sum())
        kept += 1
        if kept in VIEWS:
            for name, mixed, score in tally.scores():
                found = {"precision": precision_at(score, swapped, number)}
                found["average_precision"] = 100 * float(average_precision_score(swapped, score))
                scores.append({"score": name, "mixed": mixed, "views": kept} | rounded(found))
            rules[kept] = by_rule(tally, swapped)
    return {
        "scores": scores,
        "suspects": rules,
        "swaps_answered_as_labelled": round(100 * given / number / kept, 2),
        "duplicates": {
            "mean_probability": pairs_found(mean / kept, copied),
            "mean_log_probability": pairs_found(logs / kept - (logs / kept).mean(1, keepdims=True), copied),
        },
    }


def by_rule(tally: Tally, swapped: NDArray[np.bool_]) -> dict[str, Any]:
    """Return how many images are suspects: most of what the views show of them contradicts."""
    share = tally.mixed["share"] / np.maximum(tally.weight, LEAST)
    suspects = (share > HALF) & (tally.weight >= HALF)
    right = int((suspects & swapped).sum())
    return {"images": int(suspects.sum()), "swapped": right, "of": int(swapped.sum())}


def pairs_found(pattern: Array, copied: NDArray[np.int64]) -> dict[str, Any]:
    """Return how well the cosine of two images' patterns tells copies from other pairs.

    Args:
        pattern: [N, C]; the last rows are copies of the rows `copied`.

    Returns:
        `nearest`: percent of the copies whose original is the most similar of all images; `found_even`, `found_certain`: percent
        of the copies that a threshold finds, if as many other pairs are above it as there are copies, or one for 100 copies.
    """
    unit = (pattern / np.linalg.norm(pattern, axis=1, keepdims=True)).astype(np.float32)
    count = len(unit) - len(copied)
    cosine = unit[count:] @ unit.T
    rows = np.arange(len(copied))
    true = cosine[rows, copied].copy()
    cosine[rows, count + rows] = cosine[rows, copied] = -1
    nearest = float((true > cosine.max(1)).mean())
    others: list[NDArray[np.float32]] = []
    for start in range(0, count, 1024):
        block = unit[start : start + 1024] @ unit[:count].T
        above = np.triu(np.ones(block.shape, bool), start + 1)
        others.append(np.sort(block[above])[-len(copied) :])
    highest = np.sort(np.concatenate(others))[::-1]
    limits = {"found_even": highest[len(copied) - 1], "found_certain": highest[len(copied) // 100]}
    found = {name: 100 * float((true > limit).mean()) for name, limit in limits.items()}
    return rounded({"nearest": 100 * nearest} | found)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table: precision at the number of swaps (average precision), percent."""
    yield "| teacher | recipe | score | mixed views | " + " | ".join(f"{views} views" for views in VIEWS) + " |"
    yield "|---|---|---|---|" + "--:|" * len(VIEWS)
    for run in results["runs"]:
        for name in SCORES:
            for mixed in ("plain", "weighted") if run["recipe"] == "half-mixed" else ("plain",):
                cells = {
                    each["views"]: each for each in run["scores"] if (each["score"], each["mixed"]) == (name, mixed)
                }
                shown = (f"{cells[n]['precision']:.1f} ({cells[n]['average_precision']:.1f})" for n in VIEWS)
                yield f"| {run['teacher']} | {run['recipe']} | {name} | {mixed} | " + " | ".join(shown) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print the results in this file as Markdown, and run nothing")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as Parquet")
    parser.add_argument("--out", type=Path, help="result file; an existing one is continued")
    parser.add_argument("--work", type=Path, default=Path("runs/audit"), help="teachers and labels")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(args.table.read_bytes()))))
        return
    if not (args.data and args.out):
        parser.error("pass --data and --out, or --table")
    torch.set_num_threads(1)
    source, (test,) = args.work / "train.parquet", args.data.glob("test-*.parquet")
    planted = write_source(args.data, source)
    settings = {"images": IMAGES, "copies": COPIES, "swapped": int(planted["swapped"].sum()), "recipes": RECIPES}
    new = {"what": "wrong class labels found on CIFAR-10, percent", "settings": settings, "machine": machine()}
    results = json.loads(args.out.read_bytes()) if args.out.is_file() else new | {"teachers": [], "runs": []}
    for number, name in enumerate(TEACHERS):
        teacher = args.work / f"teacher-{number}"
        if name not in {each["name"] for each in results["teachers"]}:
            results["teachers"].append(train_teacher(name, source, test, teacher))
        for views, recipe in RECIPES.items():
            if (name, views) in {(run["teacher"], run["recipe"]) for run in results["runs"]}:
                continue
            began = time.monotonic()
            label_set = make_labels(source, args.work / f"labels-{number}-{views}", teacher, recipe)
            seconds = {"labelling_s": round(time.monotonic() - began, 1)}
            results["runs"].append({"teacher": name, "recipe": views} | seconds | measure(label_set, **planted))
            write_json(args.out, results)
            print(json.dumps(results["runs"][-1]), flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
