"""A student as files that timm loads: its weights, and the configuration with which timm builds it again."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models._hub import save_config_for_hf
from torch import Tensor

from pipeline.storage.atomic import replace_file
from pipeline.storage.json import pretty_json
from trainer.checkpoint import on_cpu
from trainer.student import Student


def export_model(folder: Path, weights: Mapping[str, Tensor], *, hub_config: dict[str, Any]) -> None:
    """Write `model.safetensors` and then `config.json`, with which `timm.create_model("local-dir:...")` loads them.

    Args:
        folder: created; the two files are replaced, each atomically.
        weights: `state_dict` of a student's timm model.
        hub_config: see `trainer.export.hub_config`.
    """
    # Other readers of the Hub look for this mark of the framework.
    data = safetensors.torch.save(on_cpu(weights), {"format": "pt"})
    replace_file(folder / "model.safetensors", data)
    replace_file(folder / "config.json", pretty_json(hub_config))


# What timm's configuration says of its own published weights and not of ones trained here.
_PROVENANCE = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")


def hub_config(student: Student) -> dict[str, Any]:
    """Return the `config.json` with which timm rebuilds the student from a folder holding `model.safetensors`."""
    config: dict[str, Any] = {} if student.class_names is None else {"label_names": list(student.class_names)}
    with tempfile.TemporaryDirectory() as folder:  # timm writes this configuration only to a file
        path = Path(folder, "config.json")
        size = (3, student.img_size, student.img_size)
        save_config_for_hf(student.model, str(path), model_config=config, data_config={"input_size": size})
        config = json.loads(path.read_bytes())
    for key in _PROVENANCE:
        config["pretrained_cfg"].pop(key, None)
    return config
