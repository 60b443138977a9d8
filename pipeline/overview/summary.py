"""A summary of a label set in numbers, for people and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.labels.encoding import LabelRows
from pipeline.labels.format import NO_WEIGHTS, pin_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import SampleRows
from pipeline.text import byte_size, count, two_columns
from pipeline.views.pairs import pairs_of

# What the pixels of views depend on, by the renderer of the recipe.
PIXELS = {
    1: "renderer 1: the versions that they were made with (torch, OpenCV, the image decoder) decide their last bits",
    2: "renderer 2: defined by docs/views-v2.md; no library decides a pixel but the image decoder",
}
MAX_ROWS = 200_000  # maximum number of labels to read; the error of such a sample is below 0.3 percentage points


def summarise(label_set: LabelSet) -> dict[str, Any]:
    """Return the content of a label set and statistics of its labels, as plain JSON values.

    Agreement, entropy and kept mass are means over the first views, read until there are MAX_ROWS labels.
    """
    plan, manifest = label_set.plan, label_set.manifest
    samples = _count_samples(label_set)
    labels = [entry for entry in manifest.files if entry.kind == "labels"]
    rows, size = sum(entry.rows for entry in labels), sum(entry.bytes for entry in labels)
    return {
        "labelset_id": plan.labelset_id,
        "manifest": pin_of(label_set.manifest_sha256),
        "sealed": manifest.sealed,
        "teacher_name": plan.teacher.name,
        "teacher": plan.teacher.model_dump(mode="json"),
        "recipe_id": plan.recipe_id,
        "recipe": dict(sorted(plan.recipe.model_dump(mode="json").items())),
        "pixels": PIXELS[plan.recipe.renderer],
        "source": {
            "kind": plan.source.kind,
            "location": plan.source.location,
            "shards": len(label_set.shards),
            "shards_of_plan": len(plan.source.shards),
            "images": samples.images,
            "unlabelled": samples.unlabelled,
            "bad": samples.bad,
        },
        "views": [label_set.views.start, label_set.views.stop],
        "topk": plan.topk,
        "precision": plan.precision,
        "labels": rows,
        "label_bytes": size,
        "image_bytes": sum(entry.bytes for entry in manifest.files if entry.kind == "images") or None,
        "bytes_per_label": size / rows if rows else None,
        "environments": list(manifest.environments),
        **_look_at_labels(label_set, samples.tables),
    }


def in_short(location: object, label_set: LabelSet | None) -> dict[str, Any]:
    """Return which label set a command made or moved, as JSON values; None: it is not complete yet.

    Every command that writes a label set prints these fields with --json.
    """
    if label_set is None:
        unknown = dict.fromkeys(("labelset_id", "manifest", "views", "images"))
        return {"path": str(location), "sealed": False, **unknown}
    return {
        "path": str(location),
        "sealed": label_set.manifest.sealed,
        "labelset_id": label_set.plan.labelset_id,
        "manifest": pin_of(label_set.manifest_sha256),
        "views": [label_set.views.start, label_set.views.stop],
        "images": label_set.num_samples,
    }


@dataclass
class _Samples:
    """What the samples files say.

    Attributes:
        images: number of samples.
        unlabelled: number of samples without a class label.
        bad: key and reason of each image that cannot be used.
        tables: samples of the first source shards, as many as have MAX_ROWS usable samples: only their labels are read.
    """

    images: int = 0
    unlabelled: int = 0
    bad: list[str] = field(default_factory=list)
    tables: dict[str, SampleRows] = field(default_factory=dict)


def _count_samples(label_set: LabelSet) -> _Samples:
    found, usable = _Samples(), 0
    for name in label_set.shards:
        table = label_set.samples(name)
        found.images += len(table)
        found.unlabelled += sum(label is None for label in table.class_label)
        found.bad += [f"{key}: {why}" for key, why in zip(table.key, table.bad, strict=True) if why]
        if usable < MAX_ROWS:
            found.tables[name] = table
            usable += len(table.usable)
    return found


def info_table(summary: Mapping[str, Any]) -> str:
    """Return the result of `summarise` as text for people."""
    teacher, source, recipe = summary["teacher"], summary["source"], summary["recipe"]
    hit, entropy, kept = (summary[name] for name in ("hard_is_class_label_pct", "mean_entropy_nats", "mean_kept_mass"))
    first, stop = summary["views"]
    rows = [
        ("label set", f"{summary['labelset_id'][:12]}, {'sealed' if summary['sealed'] else 'not sealed'}"),
        ("manifest", summary["manifest"]),
        *(
            (
                "teacher",
                f"{each['name']}, {weights_text(each)}, {each['num_classes']} classes, {each['img_size']} px",
            )
            for each in teacher.get("members", [teacher])
        ),
        ("recipe", f"{summary['recipe_id'][:12]}: " + ", ".join(f"{k} {v}" for k, v in sorted(recipe.items()))),
        ("pixels", summary["pixels"]),
        (
            "source",
            f"{source['kind']} {source['location']}: {source['images']:,} images in {_shards(source)}, {source['unlabelled']:,} unlabelled",
        ),
        (
            "bad images",
            f"{len(source['bad'])} left out" + "".join(f"\n               {line}" for line in source["bad"][:20]),
        ),
        ("views", f"{first}:{stop}"),
        (
            "stored",
            f"K = {summary['topk']}, {summary['precision']}, {summary['labels']:,} labels, {summary['bytes_per_label']:.1f} bytes each",
        ),
        *([("images", f"{byte_size(summary['image_bytes'])}, in the set")] if summary["image_bytes"] else []),
        ("agreement", "-" if hit is None else f"{hit:.1f} %: hard label is the class label of the larger part"),
        ("entropy", "-" if entropy is None else f"{entropy:.3f} nats (tail spread evenly)"),
        ("kept mass", "-" if kept is None else f"{kept:.4f}"),
        ("made with", "; ".join(", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in summary["environments"])),
    ]
    looked = f"agreement, entropy and kept mass over {summary['labels_looked_at']:,} labels"
    return two_columns(rows) + f"\n{'':15}{looked}"


def _look_at_labels(label_set: LabelSet, tables: dict[str, SampleRows]) -> dict[str, Any]:
    right: list[NDArray[np.bool_]] = []
    entropy: list[NDArray[np.float64]] = []
    kept: list[NDArray[np.float64]] = []
    seen = 0
    for view in label_set.views:
        for name, samples in tables.items():
            if seen >= MAX_ROWS:
                break
            rows = label_set.read(name, view)
            seen += len(rows)
            right.append(_hits(label_set, samples, rows, view))
            if rows.topk_prob.shape[1]:
                entropy.append(entropy_of(rows, label_set.num_classes))
                kept.append(1 - rows.tail_mass.astype(float))
    hits = np.concatenate(right) if right else np.empty(0)
    return {
        "labels_looked_at": seen,
        "hard_is_class_label_pct": float(100 * hits.mean()) if len(hits) else None,
        "mean_entropy_nats": float(np.concatenate(entropy).mean()) if entropy else None,
        "mean_kept_mass": float(np.concatenate(kept).mean()) if kept else None,
    }


def _hits(label_set: LabelSet, samples: SampleRows, rows: LabelRows, view: int) -> NDArray[np.bool_]:
    """Return, for each labelled view, whether `hard` is the class label of the image with the larger part of the view."""
    recipe, hard = label_set.recipe, dict(zip(rows.row.tolist(), rows.hard.tolist(), strict=True))
    hits: list[bool] = []
    pairs = pairs_of(recipe, samples.key, samples.usable, view)
    for (first, second), mix in zip(pairs.rows.tolist(), pairs.mixes(view), strict=True):
        for own, other in ((first, second), (second, first)):
            larger = own if mix.lam >= 0.5 or other < 0 else other
            if own >= 0 and samples.class_label[larger] is not None:
                hits.append(hard[own] == samples.class_label[larger])
    return np.array(hits, bool)


def weights_text(teacher: dict[str, Any], *, whole: bool = False) -> str:
    """Return what a label set knows of the weights of one teacher of a summary; `whole`: with the whole hash, for a card."""
    if teacher["weights_sha256"] == NO_WEIGHTS:
        return "no weights seen"
    return f"weights SHA-256 `{teacher['weights_sha256']}`" if whole else f"weights {teacher['weights_sha256'][:12]}"


def entropy_of(rows: LabelRows, num_classes: int) -> NDArray[np.float64]:
    """Return the entropy in nats, float64 [N]; the tail counts as spread evenly over the classes that were not kept."""
    prob, tail = rows.topk_prob.astype(float), rows.tail_mass.astype(float)
    others = max(1, num_classes - prob.shape[1])
    kept = -(prob * np.log(np.where(prob > 0, prob, 1))).sum(1)
    return kept - tail * np.log(np.where(tail > 0, tail / others, 1))


def _shards(source: Mapping[str, Any]) -> str:
    here, of_plan = source["shards"], source["shards_of_plan"]
    return count(here, "shard") if here == of_plan else f"{here:,} of {count(of_plan, 'shard')} (a subset)"
