"""What makes a damaged label set whole again: every error about one ends with a sentence from here.

Whoever made a set can compute a lost file again; whoever received one can fetch it again. An error cannot know which of
them reads it, so it names both ways.
"""

PULL = "fetch it again with deit-cli labels pull"
DAMAGED_FILE = "Fetch it again with deit-cli labels pull; where the set was made, delete it and run the same deit-cli precompute again"
MISSING_FILE = "Fetch it with deit-cli labels pull; where the set was made, run the same deit-cli precompute again"
INCOMPLETE_SET = "Where the set is made, run the same deit-cli precompute again to complete it; else fetch it with deit-cli labels pull"
DAMAGED_PLAN = (
    "Fetch it again with deit-cli labels pull, or put a copy back; where the set was made, the same deit-cli precompute"
    " with an empty --out makes it again"
)
DAMAGED_MANIFEST = (
    "Fetch it again with deit-cli labels pull; where the set was made, delete it and run the same deit-cli precompute"
    " again with --views of all that it held: every file is looked at, and the set sealed anew"
)
REMOTE_FILE = "Whoever publishes the set repairs it with deit-cli labels push"


def damaged_json(name: object) -> str:
    """Return the way out of a damaged plan or manifest, by its file name."""
    return DAMAGED_PLAN if str(name).endswith("plan.json") else DAMAGED_MANIFEST


def damaged_file(views: range | None = None) -> str:
    """Return the way out of a damaged file of tables; `views` are those of a label shard."""
    return DAMAGED_FILE + _with_views(views)


def missing_file(views: range | None = None) -> str:
    """Return the way out of a file that is not there; `views` are those of a label shard."""
    return MISSING_FILE + _with_views(views)


def _with_views(views: range | None) -> str:
    return f" (--views {views.start}:{views.stop})" if views else ""


def ended(error: object, way_out: str) -> str:
    """Return the text of an error with a way out at its end, unless it names one already."""
    text = str(error)
    named = "deit-cli labels pull" in text or "Upgrade:" in text
    return text if named else f"{text}. {way_out}"
