"""A tiny student, and what tests compare of its runs."""

from dataclasses import fields
from pathlib import Path

import torch

from trainer.checkpoint import load_state
from trainer.stream import Batch

TINY = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_state(run / "state.safetensors")[0]


def assert_same_state(one: Path, other: Path) -> None:
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def content(batch: Batch) -> dict:
    """Every value of a batch, in a form that can be compared."""
    values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    values |= {f"mix.{name}": getattr(batch.mix, name) for name in ("partner", "lam", "box")}
    del values["mix"]
    return {
        name: (value.dtype, tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
