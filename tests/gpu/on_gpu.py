"""What the tests of a GPU share: teachers and label sets on a device, small runs, and a device that is kept busy."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.builders import make_labels
from torch import Tensor, nn

from pipeline.images.source import Source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import TeacherIdentity
from pipeline.settings.configs import Dtype, TeacherConfig
from pipeline.stage1.rendering import Block, BlockRenderer, ViewBatch, blocks_of, deal
from pipeline.teacher.loading import load_teacher, weights_sha256
from pipeline.teacher.teacher import Answer, Network, Teacher
from pipeline.views.mixing import apply_mix
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.metrics import read_metrics

CNN = "support.builders:confident_cnn"
TINY = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CYCLES = 1.8e9  # of a GPU in a second, about


def busy(device: torch.device, seconds: float) -> None:
    """Keep the current stream of a GPU busy for about so long; the host goes on."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES))


def load(name: str, device: torch.device, *, num_classes: int | None = None, **options: Any) -> Teacher:
    """Load a teacher onto a device; in float32 unless `dtype` says otherwise."""
    config = TeacherConfig(teacher=(name,), device=str(device), **({"dtype": "float32"} | options))
    return load_teacher(config, num_classes=num_classes)


def teacher_of_module(module: nn.Module, device: torch.device, *, img_size: int, dtype: Dtype = "float32") -> Teacher:
    """Make a teacher of three classes of a network that sees values of -1 to 1."""
    half = (0.5, 0.5, 0.5)
    identity = TeacherIdentity(
        name=type(module).__name__,
        weights_sha256=weights_sha256(module),
        img_size=img_size,
        mean=half,
        std=half,
        num_classes=3,
        class_names=None,
    )
    config = TeacherConfig(teacher=(identity.name,), dtype=dtype, device=str(device))
    return Teacher([Network(module, identity, crop_pct=1.0)], identity, config, device=device)


def labels_of(teacher: Teacher, out: Path, data: str, **settings: Any) -> LabelSet:
    """Label forty images with a teacher, wherever it is."""
    return make_labels(out, data, teacher=teacher, **({"accuracy_samples": 0, "topk": 3} | settings))


def blocks_in(label_set: LabelSet, views: range) -> Iterator[Block]:
    """Yield all mix blocks, as stage 1 cuts them for label shards of all these views."""
    return itertools.chain.from_iterable(
        blocks_of(name, views, label_set.samples(name), label_set.recipe) for name in label_set.shards
    )


def views_in(label_set: LabelSet, source: Source, views: range, *, workers: int = 0) -> Iterator[ViewBatch]:
    """Render in this process the batches of stage 1, in the order in which so many loader processes bring them."""
    renderer = BlockRenderer(source, label_set.recipe)
    for unit in deal(blocks_in(label_set, views), workers):
        if unit is not None:
            block, size = unit[0], label_set.recipe.img_size
            yield renderer(unit, torch.empty(len(block.rows), size, size, 3, dtype=torch.uint8), lambda _: None)


def mixed(batch: ViewBatch) -> Tensor:
    """Return what the teacher sees, on the CPU, float32 [B, 3, H, W] of 0..255."""
    return apply_mix(batch.images, batch.mix)


def columns(label_set: LabelSet, name: str) -> NDArray[Any]:
    """Return one column of all label shards: shard after shard, view after view, row after row."""
    return np.concatenate([getattr(label_set.read(s, v), name) for s in label_set.shards for v in label_set.views])


def same_bits(one: Answer, other: Answer) -> bool:
    names = ("hard", "topk_index", "topk_prob")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def run_config(label_set: LabelSet, output: Path, device: torch.device, **changes: Any) -> TrainConfig:
    """Return the settings of a small run of three updates an epoch."""
    values = {
        "labels": label_set.folder,
        "output": output,
        "device": str(device),
        "batch_size": 12,
        "repeated_aug": 1,
        "epochs": 3,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "workers": 0,
        "log_interval": 1,
        "checkpoint_interval": 1000,
    }
    return TrainConfig(**(values | TINY | changes))


def losses_of(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(run) if line["kind"] == "train"]


def state_of(run: Path) -> dict[str, Tensor]:
    return load_state(run / "state.safetensors")[0]
