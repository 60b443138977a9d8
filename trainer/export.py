"""Export of a student as a folder that timm loads: its weights, and the configuration that rebuilds the model."""

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

# Entries of timm's configuration that describe its published weights, not the weights trained here.
_PROVENANCE = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")


def export_model(folder: Path, weights: Mapping[str, Tensor], *, hub_config: dict[str, Any]) -> None:
    """Write `model.safetensors` and then `config.json`; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads them.

    Args:
        folder: folder to write to, created if missing; each file is replaced atomically.
        weights: `state_dict` of a student's timm model.
        hub_config: content of `config.json`, from the function `hub_config`.
    """
    # Other programs that read from the Hub expect the framework's name here.
    data = safetensors.torch.save(on_cpu(weights), {"format": "pt"})
    replace_file(folder / "model.safetensors", data)
    replace_file(folder / "config.json", pretty_json(hub_config))


def hub_config(student: Student) -> dict[str, Any]:
    """Return the content of `config.json`, from which timm rebuilds the student beside its `model.safetensors`."""
    config: dict[str, Any] = {} if student.class_names is None else {"label_names": list(student.class_names)}
    with tempfile.TemporaryDirectory() as folder:  # timm can only write this configuration to a file
        path = Path(folder, "config.json")
        size = (3, student.img_size, student.img_size)
        save_config_for_hf(student.model, str(path), model_config=config, data_config={"input_size": size})
        config = json.loads(path.read_bytes())
    for key in _PROVENANCE:
        config["pretrained_cfg"].pop(key, None)
    return config
