"""Stage 1, and the contract that both stages share: exact replayable views, and the label sets made from them.

    sources -> decode -> views -> mixing -> teacher -> labels -> manifest

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
    """Import the two public names when they are first used: `deit-cli --help` must not wait for pyarrow."""
    if name == "LabelSet":
        from pipeline.labels.labelset import LabelSet

        return LabelSet
    if name == "Recipe":
        from pipeline.views.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
