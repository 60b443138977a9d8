"""The student that is exported, and what is known of its training. Locations on this machine are left out: exports are published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.settings.fields import settings_of
from pipeline.storage.atomic import sha256_file
from pipeline.storage.json import read_json
from trainer.config import TrainConfig
from trainer.evidence.linear import student_sha256
from trainer.evidence.networks import Network, find_networks
from trainer.exports.answers import check_weights
from trainer.metrics import read_metrics
from trainer.student import Student

RECORD_NAME = "export.json"
KIND, VERSION = "export", 1
_RESOLVED = ("views", "views_per_update")  # what settings came to, which runs of earlier versions do not have
_OWNERS = {"last": "student", "last-ema": "ema"}  # exported folder of a run -> weights in its metrics.jsonl


@dataclass(frozen=True)
class Origin:
    """A student with its origin.

    Attributes:
        network: what the user named.
        folder: folder with its weights.
        student: the student on the CPU.
        record: JSON values for `export.json`: name, weights, hashes, model; `run`: settings, recipe, label sets and teachers, or
            None if unknown; `scores`: accuracy that the run measured for these weights, or None.
    """

    network: Network
    folder: Path
    student: Student
    record: dict[str, Any]


def open_origin(location: str) -> Origin:
    """Open the student at a location that `find_networks` knows.

    Raises:
        UsageError: published weights are meant.
        CheckpointError: there is no student, or its weights are damaged.
    """
    (network,) = find_networks([location])
    folder = network.weights
    if folder is None:
        raise UsageError(
            f"{location} names weights that timm publishes: timm has them already", fix="Pass the folder of a run"
        )
    student = network.open(torch.device("cpu"))
    check_weights(student, network.shown)
    record: dict[str, Any] = {
        "name": network.name,
        "weights": folder.name if network.metrics else None,
        "weights_sha256": sha256_file(folder / "model.safetensors"),
        "student_sha256": student_sha256(student),
        "model": student.model.pretrained_cfg.get("architecture"),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "num_classes": student.num_classes,
    }
    return Origin(network, folder, student, record | _training(network, folder, record["weights_sha256"]))


def _training(network: Network, folder: Path, sha256: str) -> dict[str, Any]:
    """Return `run` and `scores` of the run, or of an earlier export of the same weights."""
    if network.metrics is not None:
        return {"run": _run(network.metrics), "scores": _scores(network.metrics, folder.name)}
    earlier = read_json(folder / RECORD_NAME) if (folder / RECORD_NAME).is_file() else {}
    source = earlier.get("source", {}) if isinstance(earlier, dict) and earlier.get("kind") == KIND else {}
    known = source if source.get("weights_sha256") == sha256 else {}
    return {"run": known.get("run"), "scores": known.get("scores")}


def _run(folder: Path) -> dict[str, Any] | None:
    """Return settings, recipe, label sets and teachers in the config.json of a run; None if there is no such file."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    saved = read_json(path)
    settings = saved.get("config", {})
    kept = [each.name for each in settings_of(TrainConfig) if not each.free or each.name == "batch_size"]
    ids, teachers = (_as_list(saved.get(name)) for name in ("labelset_id", "teacher"))
    return {
        "settings": {name: settings[name] for name in kept if name in settings},
        **{name: saved[name] for name in _RESOLVED if name in saved},
        "recipe": saved.get("recipe"),
        "recipe_id": saved.get("recipe_id"),
        "label_sets": [{"labelset_id": i, "teacher": t} for i, t in zip(ids, teachers, strict=True)],
        "label_weights": saved.get("label_weights"),
        "label_mode": saved.get("label_mode"),
    }  # fmt: skip


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _scores(run: Path, part: str) -> dict[str, Any] | None:
    """Return what the run measured for the weights of one of its folders; None if it cannot be told."""
    lines = read_metrics(run)
    found = [line for line in lines if line["kind"] == "eval"]
    if part in _OWNERS:  # they are those of the last evaluation only if the training came to its end
        epochs = read_json(run / "config.json")["config"]["epochs"] if (run / "config.json").is_file() else None
        found = [line for line in found if line["weights"] == _OWNERS[part] and line["epoch"] + 1 == epochs]
    if not found:
        return None
    line = max(found, key=lambda line: line["top1"])  # of equal ones the first, as in training
    return {name: line[name] for name in ("weights", "epoch", "images", "scores")}
