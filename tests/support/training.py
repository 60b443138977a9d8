"""A tiny student, and what tests compare of its runs."""

from pathlib import Path
from types import SimpleNamespace

import torch

from trainer.checkpoint import load_state
from trainer.stream import Batch

NOTHING = SimpleNamespace()
TINY = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_state(run / "state.safetensors")[0]


def assert_same_state(one: Path, other: Path) -> None:
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def content(batch: Batch) -> dict:
    """Every value of a batch, in a form that can be compared."""
    values = dict(vars(batch))
    for record in ("mix", "classes", "teacher"):
        values |= {f"{record}.{name}": value for name, value in vars(values.pop(record) or NOTHING).items()}
    return {
        name: (value.dtype, tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
