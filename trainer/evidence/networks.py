"""The networks that a command names: folders of runs, exported folders, and models of timm."""

import itertools
import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.storage.urls import local_path
from pipeline.weights import weights_here
from trainer.metrics import METRICS_NAME
from trainer.student import Student, open_student

log = logging.getLogger("deit_cli.evidence")

PUBLISHED = "timm:"  # before the name of a model whose published weights are meant
IN_A_STEP, DONE_NAME = (
    "run",
    "done.json",
)  # in the folder of a step of a study: its run, and the record that it is finished
WEIGHTS = ("best", "last")  # of a run: the first that is there is used


@dataclass(frozen=True)
class Network:
    """A network that a user named.

    Attributes:
        name: short name, another one for each network.
        location: what the user passed.
        weights: exported folder; None for published weights.
        metrics: folder of the run that holds metrics.jsonl, or None.
    """

    name: str
    location: str
    weights: Path | None
    metrics: Path | None

    @property
    def shown(self) -> str:
        """Return the location of the weights for messages."""
        return self.location if self.weights is None else str(self.weights)

    def open(self, device: torch.device) -> Student:
        """Load the network onto a device, in evaluation mode."""
        published = self.location.removeprefix(PUBLISHED)
        given: dict[str, Any] = {"model": published, "pretrained": True} if self.weights is None else {}
        student = open_student(self.weights, **given)
        log.info("%s: %s", self.name, self.shown)
        return student.to(device).eval()


def find_networks(locations: Sequence[str]) -> list[Network]:
    """Return the networks at these locations, with a name for each: the name of its run or folder, numbered if taken.

    Args:
        locations: folders of runs (their best weights, or else their last) or of steps of studies, folders with config.json and model.safetensors, URLs of
            the latter, or `timm:NAME` for the weights that timm publishes.

    Raises:
        CheckpointError: a folder is neither a run nor an exported network.
    """
    found: list[Network] = []
    for location in locations:
        name, weights, metrics = _find(location)
        found.append(Network(unique(name, {network.name for network in found}), location, weights, metrics))
    return found


def unique(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: itself, or with the next number."""
    return name if name not in taken else next(n for i in itertools.count(2) if (n := f"{name}-{i}") not in taken)


def run_in(folder: Path) -> Path:
    """Return the folder of the run that a folder means: a step of a study holds its run in run/, others are the run."""
    return folder / IN_A_STEP if (folder / IN_A_STEP / METRICS_NAME).is_file() else folder


def name_of_run(run: Path) -> str:
    """Return the name of a run in tables: that of its folder, or of its step in a study, without the id of the step."""
    run = run.resolve()
    if run.name == IN_A_STEP and (run.parent / DONE_NAME).is_file():
        return run.parent.name.rpartition("-")[0] or run.parent.name
    return run.name


def exported_folder(run: Path) -> Path | None:
    """Return the folder with the best weights of a run, or else with its last; None if it has neither."""
    return next((run / part for part in WEIGHTS if (run / part / "model.safetensors").is_file()), None)


def weights_in(location: str) -> str:
    """Return the location of the weights that a location means: those in the folder of a run or of a step, or itself."""
    path = local_path(location)
    if path is None or not path.is_dir() or (path / "model.safetensors").is_file():
        return location
    inside = exported_folder(run_in(path))
    return location if inside is None else str(inside)


def _find(location: str) -> tuple[str, Path | None, Path | None]:
    """Return name, exported folder and folder of metrics.jsonl of a network."""
    if location.startswith(PUBLISHED):
        return location.removeprefix(PUBLISHED).replace("/", "-"), None, None
    path = run_in(weights_here(location))
    if (path / "model.safetensors").is_file():
        run = path.resolve().parent
        of_run = path.resolve().name in (*WEIGHTS, "last-ema") and (run / METRICS_NAME).is_file()
        return (name_of_run(run) if of_run else path.resolve().name), path, run if of_run else None
    inside = exported_folder(path)
    if inside is None and not path.exists():
        raise CheckpointError(f"{location}: no such file or folder", fix="Published weights are written timm:NAME")
    if inside is None:
        raise CheckpointError(
            f"{location} holds no trained network",
            fix="Pass the folder of a run, a folder that `train` exported, or timm:NAME for published weights",
        )
    return name_of_run(path), inside, path if (path / METRICS_NAME).is_file() else None
