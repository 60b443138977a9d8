"""The networks that a command names: folders of runs, exported folders, and models of timm."""

import itertools
from collections.abc import Container, Sequence
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.weights import weights_here
from trainer.student import Student, open_student

PUBLISHED = "timm:"  # before the name of a model whose published weights are meant
WEIGHTS = ("best", "last")  # of a run: the first that is there


def open_networks(names: Sequence[str]) -> dict[str, Student]:
    """Return the networks by short names, in order.

    Args:
        names: folders of runs (their best weights, or else their last), folders with config.json and model.safetensors, URLs of
            these, or `timm:NAME` for the weights that timm publishes.

    Raises:
        UsageError: a name is none of these.
        CheckpointError: a folder's weights are damaged.
    """
    found: dict[str, Student] = {}
    for name in names:
        found[unique(short_name(name), found)] = open_network(name)
    return found


def open_network(name: str) -> Student:
    """Return one network, see `open_networks`."""
    if name.startswith(PUBLISHED):
        return open_student(None, model=name.removeprefix(PUBLISHED), pretrained=True)
    return open_student(exported_folder(name))


def exported_folder(name: str) -> Path:
    """Return the folder with the weights that a name means: of a run its best/, or else its last/."""
    folder = weights_here(name)
    inside = next((folder / each for each in WEIGHTS if (folder / each).is_dir()), None)
    if inside is not None:
        return inside
    if not folder.exists():
        raise UsageError(
            f"{name}: no such folder", fix=f"Pass the folder of a run, an exported folder, or {PUBLISHED}NAME"
        )
    return folder


def short_name(name: str) -> str:
    """Return the name of a network in tables: that of its run, or of its timm model."""
    parts = [part for part in name.removeprefix(PUBLISHED).rstrip("/").split("/") if part not in ("", ".")]
    while len(parts) > 1 and parts[-1] in (*WEIGHTS, "last-ema"):
        parts.pop()
    return parts[-1] if parts else Path(name).resolve().name


def unique(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: itself, or with the next number."""
    return name if name not in taken else next(n for i in itertools.count(2) if (n := f"{name} ({i})") not in taken)
