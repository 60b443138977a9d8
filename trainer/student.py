"""The student: a timm model that returns the logits of both its heads, in training and in evaluation."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.weights import check_names, check_size, read_hub_config, read_tensors

SHORT_NAMES = {
    "deit-ti": "deit_tiny_distilled_patch16_224",
    "deit-s": "deit_small_distilled_patch16_224",
    "deit-b": "deit_base_distilled_patch16_224",
}


@dataclass(frozen=True)
class Heads:
    """The student's logits for a batch, one tensor per head.

    Attributes:
        class_logits: logits of the class head, float [B, C].
        distill_logits: logits of the distillation head, float [B, C]; None for a model with one head.
    """

    class_logits: Tensor
    distill_logits: Tensor | None


class Student(nn.Module):
    """A timm classifier that always returns both heads (timm's own `forward` averages them in evaluation).

    Some models hide the second head inside their classifier (repvit, iformer, efficientvim). They count as models with
    one head, whose logits are timm's average of the two.

    Attributes:
        model: timm model; its `state_dict` has timm's own keys.
        num_classes: number of classes, C.
        img_size: height and width of the input images, in pixels.
        mean, std: input normalisation, three values each, for images in 0..1.
        class_names: one name per class, or None.
        has_distillation_head: True if the answers have `Heads.distill_logits`.
        backbone_frozen: True after `freeze_backbone`: only the heads learn.
    """

    def __init__(self, model: nn.Module, *, img_size: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model: Any = model  # timm has no static type for "a classifier"
        self.img_size = img_size
        self.num_classes: int = self.model.num_classes
        self.mean: tuple[float, ...] = tuple(self.model.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(self.model.pretrained_cfg["std"])
        self.class_names = None if class_names is None else tuple(class_names)
        self.has_distillation_head = isinstance(getattr(model, "head_dist", None), nn.Module)
        self.backbone_frozen = False

    @property
    def head_names(self) -> tuple[str, ...]:
        """Return the names of the heads' modules in the timm model, from timm's configuration; () if it has none."""
        names = self.model.pretrained_cfg.get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def freeze_backbone(self) -> None:
        """Freeze everything but the heads: all other modules keep their weights and stay in evaluation mode.

        Raises:
            UsageError: timm does not say which modules of this model are its heads.
        """
        if not self.head_names:
            raise UsageError(
                f"timm does not say which part of {self.model.pretrained_cfg.get('architecture')} is its head,"
                " so the head cannot be trained alone",
                fix="Leave out --linear-probe",
            )
        self.requires_grad_(False)
        for name in self.head_names:
            self.model.get_submodule(name).requires_grad_(True)
        self.backbone_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch training mode on or off; a frozen backbone stays in evaluation mode: no drop path, no running statistics."""
        super().train(mode and not self.backbone_frozen)
        self.training = mode
        for name in self.head_names if self.backbone_frozen else ():
            self.model.get_submodule(name).train(mode)
        return self

    @property
    def has_two_tokens(self) -> bool:
        """Return True if each head reads a token of its own (DeiT, PiT), not the same pooled features (LeViT)."""
        return self.has_distillation_head and self.model.global_pool == "token"

    def forward(self, images: Tensor) -> Heads:
        """Return the logits of both heads for normalised images, float [B, 3, H, W]."""
        if not self.has_distillation_head:
            return Heads(self.model(images), None)
        return self.read(*self.tokens(images))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the class head and the distillation head read, float [B, D] each; only for a model with both heads."""
        model = self.model
        features = model.forward_features(images)
        if self.has_two_tokens:
            return model.head_drop(features[:, 0]), model.head_drop(features[:, 1])
        pooled = model.forward_head(features, pre_logits=True)  # LeViT, EfficientFormer, SwiftFormer
        return pooled, pooled

    def read(self, class_token: Tensor, distill_token: Tensor) -> Heads:
        """Return the logits of both heads for the two tensors that `tokens` returns."""
        return Heads(self.model.head(class_token), self.model.head_dist(distill_token))


def create_student(
    model: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    patch_size: int | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    drop_path: float = 0.0,
    init_checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    class_names: Sequence[str] | None = None,
) -> Student:
    """Build a student. None: the architecture's own value.

    Args:
        model: timm name, with or without a tag, or one of `SHORT_NAMES`.
        num_classes: number of classes of the labels, C.
        img_size: height and width of the images, in pixels. A model for any size only records it.
        patch_size: height and width of a patch, in pixels.
        embed_dim: embedding dimension, D.
        depth: number of transformer blocks.
        num_heads: number of attention heads; must divide `embed_dim`.
        drop_path: stochastic depth rate of the last block, 0..1.
        init_checkpoint: file of weights to load, see `load_weights`.
        pretrained: whether to load timm's published weights; their heads are replaced if the number of classes differs.
        class_names: one name per class, for the exported configuration.

    Raises:
        UsageError: timm has no such model, or cannot build it with these values.
        CheckpointError: the weights in `init_checkpoint` do not fit.
        StorageError: the published weights cannot be downloaded.
    """
    name = _resolve_name(model)
    if pretrained and init_checkpoint is not None:
        raise UsageError(f"start from published weights or from a checkpoint, not both: got {init_checkpoint}")
    if class_names is not None and len(class_names) != num_classes:
        raise UsageError(f"there must be one name for each of the {num_classes} classes, got {len(class_names)} names")
    asked: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    asked["drop_path_rate"] = drop_path or None
    built = _build_model(
        name, img_size, {key: value for key, value in asked.items() if value is not None}, num_classes, pretrained
    )
    size = get_model_input_config(built)["input_size"][-1] if img_size is None else img_size
    student = Student(built, img_size=size, class_names=class_names)
    if init_checkpoint is not None:
        load_weights(student, Path(init_checkpoint))
    return student


def open_student(
    checkpoint: str | os.PathLike[str] | None,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
) -> Student:
    """Open a trained student for evaluation.

    Args:
        checkpoint: file of weights, or a folder with `config.json` and `model.safetensors`, as a run exports it.
        model: timm name, for a file of weights and for published weights; a folder names its own model.
        num_classes: number of classes in a file of weights, C; None: as in timm's model.
        pretrained: whether to load timm's published weights instead of a checkpoint.

    Raises:
        UsageError: the arguments contradict each other, or an argument is missing.
        CheckpointError: the checkpoint does not exist, is damaged, or does not fit the model.
        StorageError: the published weights cannot be downloaded.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and pretrained:
        raise UsageError("--checkpoint and --pretrained exclude each other", fix="Pass only one")
    if checkpoint is not None and checkpoint.is_dir():
        if model is not None:
            raise UsageError(f"{checkpoint} names its own architecture", fix=f"Leave out --model {model}")
        return _open_folder(checkpoint)
    if checkpoint is not None and not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such file or folder")
    if model is None:
        raise UsageError(
            "the architecture is unknown: a file of weights does not name it",
            fix="Pass --model NAME, or a folder with config.json",
        )
    if checkpoint is None and not pretrained:
        raise UsageError("no weights are given", fix="Pass --checkpoint, or --pretrained for timm's published weights")
    known = timm.get_pretrained_cfg(_resolve_name(model))
    published = known.num_classes if known is not None else 1000
    classes = published if checkpoint is None else num_classes or published
    return create_student(model, num_classes=classes, init_checkpoint=checkpoint, pretrained=pretrained)


def load_weights(student: Student, path: Path) -> None:
    """Load weights that fit exactly from a file of tensors. Code in the file is never executed.

    Args:
        student: student that receives the weights.
        path: safetensors file, or PyTorch file with a state dict, which is the whole content or stored under `state_dict`
            or `model` (timm's and DeiT's layouts). If the file also has EMA weights, these are loaded instead, as in timm.
            Prefixes that DDP and `torch.compile` add to names are removed.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another model; the student is unchanged.
    """
    found = read_tensors(path)
    _check_classes(student, found, path)
    load_exactly(student, found, path)


def load_exactly(student: Student, found: dict[str, Tensor], path: Path) -> None:
    """Load a state dict whose names and shapes must be exactly those of the student's model.

    Args:
        student: student that receives the weights.
        found: tensors by name.
        path: file that the tensors came from, for errors.

    Raises:
        CheckpointError: a name or a shape differs; the student is unchanged.
    """
    wanted = student.model.state_dict()
    check_names(found.keys(), wanted.keys(), path, why="it belongs to another architecture")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(found[name].shape)}, this model needs {list(tensor.shape)}",
                fix="Build the student with the image size, patch size and width of the checkpoint",
            )
    try:
        student.model.load_state_dict(found)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error


def normalise(images: Tensor, student: Student) -> Tensor:
    """Normalise float32 images [B, 3, H, W] in 0..255 with the student's mean and standard deviation."""
    mean, std = (_channel_levels(values, images.device) for values in (student.mean, student.std))
    return (images - mean) / std


def names_like(pattern: str) -> list[str]:
    """Return the names of timm's models that match a shell pattern, such as `deit_*`; one of `SHORT_NAMES` matches its model."""
    return timm.list_models(SHORT_NAMES.get(pattern, pattern))


def _resolve_name(model: str) -> str:
    """Return the timm name of a model, or raise UsageError with similar names."""
    name = SHORT_NAMES.get(model, model)
    if timm.is_model(name.partition(".")[0]):
        return name
    close = difflib.get_close_matches(model, [*SHORT_NAMES, *timm.list_models()], n=3)
    raise UsageError(
        f"the student must be a timm model or one of {', '.join(SHORT_NAMES)}, got {model!r}",
        fix=f"Did you mean {', '.join(close)}?" if close else "deit-cli models PATTERN lists names",
    )


def _build_model(
    name: str, img_size: int | None, asked: dict[str, Any], num_classes: int, pretrained: bool
) -> nn.Module:
    try:
        source = timm.get_pretrained_cfg(name)
        if img_size is not None and source is not None and source.fixed_input_size:
            asked = {"img_size": img_size, **asked}
        built = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, **asked)
    except OSError as error:
        raise StorageError(
            f"cannot fetch the published weights of {name}: {_one_line(error).rstrip('. ')}",
            fix="Without the Hub pass a file of weights (train: --init FILE, evaluate: --checkpoint FILE) in place of"
            " --pretrained; train --no-pretrained starts from random weights",
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        values = ", ".join(f"{key}={value}" for key, value in asked.items()) or "its own values"
        raise UsageError(f"timm cannot build {name} with {values}: {_one_line(error)}") from error
    patch = getattr(getattr(built, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch is not None and any(img_size % side for side in patch):
        # timm would silently leave out the last columns and rows.
        raise UsageError(f"the image size must be a multiple of the patch size {patch[0]}, got {img_size}")
    return built


def _open_folder(folder: Path) -> Student:
    weights = folder / "model.safetensors"
    if not (folder / "config.json").is_file() or not weights.is_file():
        raise CheckpointError(
            f"{folder} is not an exported model: it must hold config.json and model.safetensors",
            fix="Pass last/ or best/ of a run",
        )
    described = read_hub_config(folder)
    check_size(folder, described, read_tensors(weights))
    try:
        # Build first, then load exactly: timm alone would adapt weights that contradict the configuration.
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
        config = model.pretrained_cfg
        student = Student(model, img_size=config["input_size"][-1], class_names=described.get("label_names"))
    except Exception as error:  # a damaged configuration can raise anything inside timm
        raise CheckpointError(f"{folder} cannot be loaded ({type(error).__name__}): {_one_line(error)}") from error
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and len(set(size)) > 1:
        raise CheckpointError(f"{folder}: a student takes square images, this one takes {' x '.join(map(str, size))}")
    if student.class_names is not None and len(student.class_names) != student.num_classes:
        raise CheckpointError(
            f"{folder}: config.json names {len(student.class_names)} classes, the model has {student.num_classes}"
        )
    load_weights(student, weights)
    return student


def _check_classes(student: Student, found: dict[str, Tensor], path: Path) -> None:
    for head in student.head_names:
        weight = found.get(f"{head}.weight")
        if weight is not None and weight.ndim and weight.shape[0] != student.num_classes:
            raise CheckpointError(
                f"{path}: its {head} has {weight.shape[0]} classes, this run needs {student.num_classes}"
            )


@lru_cache
def _channel_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return three values in 0..1 as float32 [1, 3, 1, 1] in 0..255. Cached: creating it on a GPU waits for all queued work."""
    return torch.tensor(values, device=device)[None, :, None, None] * 255


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
