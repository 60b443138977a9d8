"""What is inside a label set, for people: a summary in numbers, and a contact sheet in pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import LabelSetCorrupt, LabelSetError
from pipeline.images.source import Source
from pipeline.labels.encoding import LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.labels.pins import pin_of
from pipeline.labels.replay import pair_of, rendered_view
from pipeline.labels.tables import SampleRows
from pipeline.storage.atomic import replace_file
from pipeline.views.mixing import Mix, apply_mix, draw_mix, mix_batch, shard_pairs

MAX_ROWS = (
    200_000  # labels after which a summary stops reading; a sample that large has an error below 0.3 percentage points
)
TILE_INCHES = (2.1, 3.1)


def summarise(label_set: LabelSet) -> dict[str, Any]:
    """Return what a label set holds and how its labels look, as plain JSON values.

    Agreement, entropy and kept mass are means over the first views, read until there are MAX_ROWS labels.
    """
    plan, manifest = label_set.plan, label_set.manifest
    tables = {name: label_set.samples(name) for name in label_set.shards}
    labels = [entry for entry in manifest.files if entry.kind == "labels"]
    rows, size = sum(entry.rows for entry in labels), sum(entry.bytes for entry in labels)
    bad = [f"{key}: {why}" for table in tables.values() for key, why in zip(table.key, table.bad, strict=True) if why]
    return {
        "labelset_id": plan.labelset_id,
        "manifest": pin_of(label_set.manifest_sha256),
        "sealed": manifest.sealed,
        "teacher_name": plan.teacher.name,
        "teacher": plan.teacher.model_dump(mode="json"),
        "recipe_id": plan.recipe_id,
        "recipe": plan.recipe,
        "source": {
            "kind": plan.source.kind,
            "location": plan.source.location,
            "shards": len(tables),
            "shards_of_plan": len(plan.source.shards),
            "images": sum(map(len, tables.values())),
            "unlabelled": sum(label is None for table in tables.values() for label in table.class_label),
            "bad": bad,
        },
        "views": [label_set.views.start, label_set.views.stop],
        "topk": plan.topk,
        "precision": plan.precision,
        "labels": rows,
        "label_bytes": size,
        "image_bytes": sum(entry.bytes for entry in manifest.files if entry.kind == "images") or None,
        "bytes_per_label": size / rows if rows else None,
        "environments": list(manifest.environments),
        **_look_at_labels(label_set, tables),
    }


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
            if not np.array_equal(rows.row, samples.usable):
                raise LabelSetCorrupt(
                    f"{label_set.folder}: view {view} of {name} does not have the usable rows of its samples file"
                )
            seen += len(rows)
            right.append(_hits(label_set, samples, rows, view))
            if rows.topk_prob.shape[1]:
                entropy.append(_entropy(rows, label_set.num_classes))
                kept.append(1 - rows.tail_mass.astype(float))
    hits = np.concatenate(right) if right else np.empty(0)
    return {
        "labels_looked_at": seen,
        "hard_is_class_label_pct": float(100 * hits.mean()) if len(hits) else None,
        "mean_entropy_nats": float(np.concatenate(entropy).mean()) if entropy else None,
        "mean_kept_mass": float(np.concatenate(kept).mean()) if kept else None,
    }


def _hits(label_set: LabelSet, samples: SampleRows, rows: LabelRows, view: int) -> NDArray[np.bool_]:
    """Return whether `hard` is the class label of the image that makes up the larger part of each labelled view."""
    recipe, hard = label_set.recipe, dict(zip(rows.row.tolist(), rows.hard.tolist(), strict=True))
    hits: list[bool] = []
    for first, second in shard_pairs(recipe, samples.key, samples.usable, view).tolist():
        mix = draw_mix(recipe, samples.key[first], view) if second >= 0 else Mix()
        for own, other in ((first, second), (second, first)):
            larger = own if mix.lam >= 0.5 or other < 0 else other
            if own >= 0 and samples.class_label[larger] is not None:
                hits.append(hard[own] == samples.class_label[larger])
    return np.array(hits, bool)


def _entropy(rows: LabelRows, num_classes: int) -> NDArray[np.float64]:
    """Entropy in nats, float64 [N]; the tail counts as spread evenly over the classes that were not kept."""
    prob, tail = rows.topk_prob.astype(float), rows.tail_mass.astype(float)
    others = max(1, num_classes - prob.shape[1])
    kept = -(prob * np.log(np.where(prob > 0, prob, 1))).sum(1)
    return kept - tail * np.log(np.where(tail > 0, tail / others, 1))


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet, uint8 [H, W, 3], and what stands above it."""

    pixels: NDArray[np.uint8]
    caption: str


def contact_sheet(label_set: LabelSet, source: Source, path: Path, *, samples: int = 4, views: int = 6) -> None:
    """Draw mixed views of a few samples as the teacher saw them, with class labels and the teacher's top five.

    Args:
        label_set: to show.
        source: its images.
        path: PNG to write.
        samples: rows of the sheet, spread over the source.
        views: columns of the sheet, the first views of the set.
    """
    import warnings

    from matplotlib.figure import Figure

    chosen = _spread(label_set, samples)
    columns = list(label_set.views)[:views]
    width, height = TILE_INCHES
    figure = Figure(figsize=(width * len(columns), height * len(chosen) + 0.5), layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for line, (name, row) in zip(axes, chosen, strict=True):
        for axis, view in zip(line, columns, strict=True):
            tile = _tile(label_set, source, name, row, view)
            axis.imshow(tile.pixels, interpolation="nearest")
            axis.set_title(tile.caption, fontsize=6, loc="left", family="monospace", parse_math=False)
            axis.axis("off")
    plan = label_set.plan
    title = f"{plan.teacher.name}\n{len(label_set.views)} views, recipe {plan.recipe_id[:12]}"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # class names in a script that the font lacks show as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _spread(label_set: LabelSet, count: int) -> list[tuple[str, int]]:
    places = [(name, row) for name in label_set.shards for row in label_set.samples(name).usable.tolist()]
    if not places:
        raise LabelSetError(f"{label_set.folder} has no usable image to show")
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def _tile(label_set: LabelSet, source: Source, name: str, row: int, view: int) -> Tile:
    samples = label_set.samples(name)
    partner, mix = pair_of(label_set.recipe, samples, row, view)
    rows = [row] if partner is None else [row, partner]
    batch = torch.from_numpy(np.stack([rendered_view(label_set, source, name, samples, r, view) for r in rows]))
    mixes = mix_batch([(0, 1 if partner is not None else -1)], [mix], len(rows))
    mixed = apply_mix(batch.permute(0, 3, 1, 2), mixes)[0].permute(1, 2, 0)
    labels = label_set.read(name, view)
    at = int(np.searchsorted(labels.row, row))
    return Tile(
        mixed.round().clamp(0, 255).byte().numpy(), _caption(label_set, samples, row, partner, mix, view, labels, at)
    )


def _cut(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _caption(
    label_set: LabelSet,
    samples: SampleRows,
    row: int,
    partner: int | None,
    mix: Mix,
    view: int,
    labels: LabelRows,
    at: int,
) -> str:
    def named(index: int | None) -> str:
        names = label_set.class_names
        return "unlabelled" if index is None else _cut(names[index]) if names else f"class {index}"

    lines = [f"view {view}  {samples.key[row][-18:]}", f"{mix.lam:4.0%} {named(samples.class_label[row])}"]
    lines.append("" if partner is None or mix.lam == 1 else f"{1 - mix.lam:4.0%} {named(samples.class_label[partner])}")
    if labels.topk_prob.shape[1]:
        pairs = list(zip(labels.topk_index[at].tolist(), labels.topk_prob[at].tolist(), strict=True))[:5]
        lines += [f"  {prob:6.1%} {named(index)}" for index, prob in pairs]
    else:
        lines.append(f"  teacher: {named(int(labels.hard[at]))}")
    return "\n".join(lines)
