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

The public reader API is `LabelSet` and `Recipe`:

    from pipeline import LabelSet
    labels = LabelSet.open("shards/")
    rows = labels.read(labels.shards[0], view=0)     # row, hard, topk_index, topk_prob, tail_mass
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.labels.labelset import LabelSet
    from pipeline.views.recipe import Recipe

__all__ = ["LabelSet", "Recipe"]


def __getattr__(name: str) -> Any:
    """Return a public name, imported at its first use: `deit-cli --help` must not wait for pyarrow."""
    if name == "LabelSet":
        from pipeline.labels.labelset import LabelSet

        return LabelSet
    if name == "Recipe":
        from pipeline.views.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
