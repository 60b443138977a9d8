"""A small study in a folder, and what tests compare of its results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.builders import write_tars

SCALE = {
    "data": "train",
    "eval_data": "val",
    "labels": {"recipe": "deit", "set": {"img_size": 16, "mix_block": 8}, "views": "0:2", "workers": 0},
    "teachers": {
        "cnn": {"train": {"model": "test_resnet", "epochs": 1, "batch_size": 16, "lr": 1e-3, "workers": 0, "model_ema": False}},
        "published": {"teacher": "regnety_160"},
    },
    "students": {
        "ti": {
            "model": "deit_tiny_distilled_patch16_224",
            "without_token": "deit_tiny_patch16_224",
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
        },
        "plain": {"model": "deit_small_distilled_patch16_224"},
    },
    "train": {"epochs": 2, "batch_size": 12, "lr": 1e-3, "workers": 0, "repeated_aug": 1, "model_ema": False},
    "evaluate": {"workers": 0, "crop_pct": 1.0},
    "seeds": [0, 1],
}  # fmt: skip
STUDY = {
    "title": "Does it help?",
    "scale": "scale.yaml",
    "baseline": "alone",
    "cells": {
        "alone": {"student": "ti", "distillation_type": "none"},
        "hard": {"student": "ti", "teacher": "cnn", "distillation_type": "hard"},
    },
}
TIMES = ("seconds", "costs", "command")


def write_study(folder: Path, study: Mapping[str, Any] = STUDY, scale: Mapping[str, Any] = SCALE) -> Path:
    """Write study.yaml and scale.yaml (JSON is YAML) into a folder, and return the path of the study."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.yaml").write_text(json.dumps(scale))
    (folder / "study.yaml").write_text(json.dumps(study))
    return folder / "study.yaml"


def write_images(folder: Path) -> None:
    """Write the training and the evaluation images of the scale."""
    write_tars(folder / "train", (40, 24))
    write_tars(folder / "val", (30,))


def without_times(value: Any) -> Any:
    """Return the content of a study.json without what differs between two runs."""
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value
