"""Stage 1, and what both stages share: views that are rendered the same every time, and label sets.

An image becomes a stored label in these steps, which `stage1.loop` runs:

    images.source      list the images of the source and read their bytes
    images.decode      decode an image
    views.view         draw the parameters of a view, and render it
    views.mixing       mix the views of two partners (mixup, CutMix)
    teacher.teacher    compute the teacher's answers for a batch of views
    labels.encoding    round the answers to the precision of the label set
    labels.tables      write a label shard as a Parquet file
    labels.sealing     write the manifest, which commits the label set

Training (`trainer`) runs the first four steps again, and reads the stored labels through `labels.labelset`.

The public API reads a label set and renders the views that its labels belong to:

    from pipeline import LabelSet, open_source, render_view
    labels = LabelSet.open("shards/")
    shard = labels.shards[0]
    rows = labels.read(shard, view=0)     # row, hard, topk_index, topk_prob, tail_mass
    sample = open_source("images/").shard(shard)[int(rows.row[0])]
    pixels = render_view(sample.image, labels.recipe, sample.key, 0)     # before mixing, uint8 [H, W, 3]

`trainer` has the dataset for a training loop of one's own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.images.decode import decode
    from pipeline.images.source import open_source
    from pipeline.labels.labelset import LabelSet
    from pipeline.pixels.render import render, render_view
    from pipeline.stage1.labelling import label_images
    from pipeline.views.recipe import Recipe
    from pipeline.views.view import draw_view

__all__ = [
    "LabelSet",
    "Recipe",
    "decode",
    "draw_view",
    "label_images",
    "open_source",
    "render",
    "render_view",
]

_HOMES = {
    "LabelSet": "pipeline.labels.labelset",
    "Recipe": "pipeline.views.recipe",
    "decode": "pipeline.images.decode",
    "draw_view": "pipeline.views.view",
    "label_images": "pipeline.stage1.labelling",
    "open_source": "pipeline.images.source",
    "render": "pipeline.pixels.render",
    "render_view": "pipeline.pixels.render",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `deit-cli --help` must not wait for pyarrow and torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the names of this package, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
