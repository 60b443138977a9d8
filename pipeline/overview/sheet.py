"""A contact sheet: views as the teacher saw them, with class labels and its most probable classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import LabelSetError
from pipeline.images.source import Source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import pair_of, rendered_view
from pipeline.storage.atomic import replace_file
from pipeline.views.mixing import apply_mix, mix_batch

TILE_INCHES = (2.1, 3.1)


@dataclass(frozen=True)
class Tile:
    """A picture of a contact sheet, uint8 [H, W, 3], and the text above it."""

    pixels: NDArray[np.uint8]
    caption: str


def contact_sheet(label_set: LabelSet, source: Source, path: Path, *, samples: int = 4, views: int = 6) -> None:
    """Draw mixed views of a few samples as the teacher saw them, with class labels and the teacher's top five.

    Args:
        label_set: the set whose views are shown.
        source: images of the set.
        path: PNG file to write.
        samples: number of rows of the sheet, spread over the source.
        views: number of columns of the sheet, the first views of the set.
    """
    import warnings

    from matplotlib.figure import Figure

    rows = tiles(label_set, source, samples=samples, views=views)
    width, height = TILE_INCHES
    figure = Figure(figsize=(width * len(rows[0]), height * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, tile in zip(line, row, strict=True):
            draw_tile(axis, tile)
    plan = label_set.plan
    title = f"{plan.teacher.name}\n{len(label_set.views)} views, recipe {plan.recipe_id[:12]}"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # class names in a script that the font lacks are shown as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))


def tiles(label_set: LabelSet, source: Source, *, samples: int, views: int) -> list[list[Tile]]:
    """Return a row of tiles for each of a few samples, spread over the source: its first views as the teacher saw them."""
    columns = list(label_set.views)[:views]
    return [
        [_tile(label_set, source, name, row, view) for view in columns] for name, row in _spread(label_set, samples)
    ]


def draw_tile(axis: Any, tile: Tile, *, fontsize: float = 6) -> None:
    """Draw a tile with its caption into an axis of matplotlib."""
    axis.imshow(tile.pixels, interpolation="nearest")
    axis.set_title(tile.caption, fontsize=fontsize, loc="left", family="monospace", parse_math=False)
    axis.axis("off")


def _spread(label_set: LabelSet, count: int) -> list[tuple[str, int]]:
    places = [(name, row) for name in label_set.shards for row in label_set.samples(name).usable.tolist()]
    if not places:
        raise LabelSetError(f"{label_set.place} has no usable image to show")
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def _tile(label_set: LabelSet, source: Source, name: str, row: int, view: int) -> Tile:
    """Return one view of one sample, mixed with its partner, with its class labels and the teacher's answer."""
    samples = label_set.samples(name)
    partner, mix = pair_of(label_set.recipe, samples, row, view)
    rows = [row] if partner is None else [row, partner]
    batch = torch.from_numpy(np.stack([rendered_view(label_set, source, name, samples, r, view) for r in rows]))
    mixes = mix_batch([(0, 1 if partner is not None else -1)], [mix], len(rows))
    mixed = apply_mix(batch, mixes)[0].permute(1, 2, 0)
    own = f"{'label':8}{mix.lam:6.0%} {_class_name(label_set, samples.class_label[row])}"
    other = ""
    if partner is not None and mix.lam != 1:
        other = f"{'':8}{1 - mix.lam:6.0%} {_class_name(label_set, samples.class_label[partner])}"
    caption = [f"view {view}  {samples.key[row][-18:]}", own, other, *_answer(label_set, name, row, view)]
    return Tile(mixed.round().clamp(0, 255).byte().numpy(), "\n".join(caption))


def _answer(label_set: LabelSet, name: str, row: int, view: int) -> list[str]:
    """Return a line for each of the teacher's five most probable classes; with K = 0, one line with its hard label."""
    labels = label_set.read(name, view)
    at = int(np.searchsorted(labels.row, row))
    if not label_set.plan.topk:
        return [f"teacher  {_class_name(label_set, int(labels.hard[at]))}"]
    pairs = zip(labels.topk_index[at, :5].tolist(), labels.topk_prob[at, :5].tolist(), strict=True)
    return [
        f"{'' if i else 'teacher':8}{prob:6.1%} {_class_name(label_set, index)}"
        for i, (index, prob) in enumerate(pairs)
    ]


def _class_name(label_set: LabelSet, index: int | None) -> str:
    """Return the name of a class in at most 18 characters, or its number if classes have no names."""
    if index is None:
        return "unlabelled"
    if label_set.class_names is None:
        return f"class {index}"
    name = label_set.class_names[index]
    return name if len(name) <= 18 else f"{name[:17]}…"
