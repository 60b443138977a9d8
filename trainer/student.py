"""The student: a timm model whose two heads answer separately, in training and in evaluation alike."""

import difflib
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
from pipeline.weights import check_size, read_hub_config, read_tensors

SHORT_NAMES = {
    "deit-ti": "deit_tiny_distilled_patch16_224",
    "deit-s": "deit_small_distilled_patch16_224",
    "deit-b": "deit_base_distilled_patch16_224",
}


@dataclass(frozen=True)
class Heads:
    """What the student answers, float [B, C] each; `distill_logits` is None for a model with one head."""

    class_logits: Tensor
    distill_logits: Tensor | None


class Student(nn.Module):
    """A timm classifier that always shows both heads (timm's own forward averages them in evaluation).

    Models that hide the second head inside their classifier (repvit, iformer, efficientvim) count as one head:
    timm's average of the two.

    Attributes:
        model: the timm model; its `state_dict` has timm's own keys.
        num_classes: C.
        img_size: height and width of the images it expects, in pixels.
        mean, std: input normalisation, three values each, for images in 0..1.
        class_names: one name per class, or None.
        has_distillation_head: whether `Heads.distill_logits` is there.
        probed: whether the heads alone learn, see `freeze_backbone`.
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
        self.probed = False

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the heads' modules in the timm model, as timm's own configuration has them; () where it has none."""
        names = self.model.pretrained_cfg.get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def freeze_backbone(self) -> None:
        """Let the heads alone learn; all else keeps its weights, and stays in evaluation mode from now on.

        Raises:
            UsageError: timm does not say which modules of this model are its heads.
        """
        if not self.head_names:
            raise UsageError(
                f"timm does not say which part of {self.model.pretrained_cfg.get('architecture')} is its head,"
                " so it cannot be trained alone",
                fix="Leave --linear-probe out",
            )
        self.requires_grad_(False)
        for name in self.head_names:
            self.model.get_submodule(name).requires_grad_(True)
        self.probed = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or back; a frozen backbone stays in evaluation mode: no drop path, no running statistics."""
        super().train(mode and not self.probed)
        self.training = mode
        for name in self.head_names if self.probed else ():
            self.model.get_submodule(name).train(mode)
        return self

    def forward(self, images: Tensor) -> Heads:
        """Answer for normalised images, float [B, 3, H, W]."""
        if not self.has_distillation_head:
            return Heads(self.model(images), None)
        model = self.model
        features = model.forward_features(images)
        if model.global_pool == "token":  # DeiT and PiT: a token for each head
            pooled, pooled_dist = model.head_drop(features[:, 0]), model.head_drop(features[:, 1])
        else:  # LeViT, EfficientFormer, SwiftFormer: both heads read the same average
            pooled = pooled_dist = model.forward_head(features, pre_logits=True)
        return Heads(model.head(pooled), model.head_dist(pooled_dist))


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
    init_checkpoint: Path | None = None,
    pretrained: bool = False,
    class_names: Sequence[str] | None = None,
) -> Student:
    """Build a student; None leaves the architecture's own value.

    Args:
        model: a timm name, with or without a tag, or one of `SHORT_NAMES`.
        num_classes: C, the teacher's and the labels' classes.
        img_size: pixels; a model that takes any size is built as it is and only remembers this one.
        patch_size: pixels.
        embed_dim: D.
        depth: transformer blocks.
        num_heads: attention heads; divides `embed_dim`.
        drop_path: stochastic depth rate of the last block, 0..1.
        init_checkpoint: weights to start from, see `load_weights`.
        pretrained: start from timm's published weights; its head is dropped where its classes are not C.
        class_names: one name per class, for the exported configuration.

    Raises:
        UsageError: no such model, or not with these values.
        CheckpointError: `init_checkpoint` does not fit.
        StorageError: the published weights cannot be fetched.
    """
    name = _known_name(model)
    if pretrained and init_checkpoint is not None:
        raise UsageError(f"start from published weights or from a checkpoint, not both: got {init_checkpoint}")
    if class_names is not None and len(class_names) != num_classes:
        raise UsageError(f"there must be one name for each of the {num_classes} classes, got {len(class_names)}")
    asked: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    asked["drop_path_rate"] = drop_path or None
    built = _build(
        name, img_size, {key: value for key, value in asked.items() if value is not None}, num_classes, pretrained
    )
    size = get_model_input_config(built)["input_size"][-1] if img_size is None else img_size
    student = Student(built, img_size=size, class_names=class_names)
    if init_checkpoint is not None:
        load_weights(student, init_checkpoint)
    return student


def load_weights(student: Student, path: Path) -> None:
    """Load weights that fit exactly, from a file of tensors; nothing in it is ever executed.

    Args:
        student: receives the weights.
        path: safetensors, or a PyTorch file holding a state dict, alone or under `state_dict` or `model`
            (timm's and DeiT's layouts; an EMA beside it is preferred, as timm does). Prefixes left by DDP and
            `torch.compile` are removed.

    Raises:
        CheckpointError: unreadable, or of another model; the student is unchanged.
    """
    found = read_tensors(path)
    _check_classes(student, found, path)
    load_exactly(student, found, path)


def load_exactly(student: Student, found: dict[str, Tensor], path: Path) -> None:
    """Load a state dict that must fit name by name and shape by shape; `path` is where it came from, for errors."""
    wanted = student.model.state_dict()
    _check_names(found, wanted, path)
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


def _known_name(model: str) -> str:
    name = SHORT_NAMES.get(model, model)
    if timm.is_model(name.partition(".")[0]):
        return name
    close = difflib.get_close_matches(model, [*SHORT_NAMES, *timm.list_models()], n=3)
    hint = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() lists them."
    raise UsageError(f"the student must be a timm model or one of {', '.join(SHORT_NAMES)}, got {model!r}. {hint}")


def _build(name: str, img_size: int | None, asked: dict[str, Any], num_classes: int, pretrained: bool) -> nn.Module:
    try:
        source = timm.get_pretrained_cfg(name)
        if img_size is not None and source is not None and source.fixed_input_size:
            asked = {"img_size": img_size, **asked}
        built = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, **asked)
    except OSError as error:
        raise StorageError(f"cannot fetch the published weights of {name}: {_one_line(error)}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        values = ", ".join(f"{key}={value}" for key, value in asked.items()) or "its own values"
        raise UsageError(f"timm cannot build {name} with {values}: {_one_line(error)}") from error
    patch = getattr(getattr(built, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch is not None and any(img_size % side for side in patch):
        # timm would leave out the last columns and rows without a word.
        raise UsageError(f"the image size must be a multiple of the patch size {patch[0]}, got {img_size}")
    return built


def _check_classes(student: Student, found: dict[str, Tensor], path: Path) -> None:
    for head in student.head_names:
        weight = found.get(f"{head}.weight")
        if weight is not None and weight.ndim and weight.shape[0] != student.num_classes:
            raise CheckpointError(
                f"{path}: its {head} knows {weight.shape[0]} classes, this run needs {student.num_classes}"
            )


def _check_names(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has the unknown", found.keys() - wanted.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path} {what} {min(names)}{more}: it belongs to another architecture")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def open_student(
    checkpoint: Path | None, *, model: str | None = None, num_classes: int | None = None, pretrained: bool = False
) -> Student:
    """Open a trained student for evaluation.

    Args:
        checkpoint: a folder with `config.json` and `model.safetensors`, as a run exports it, or a file of weights.
        model: timm name; needed for a file, and for published weights. A folder says its own.
        num_classes: C of a file of weights; None takes the model's own.
        pretrained: timm's published weights instead of a checkpoint.
    """
    if checkpoint is not None and pretrained:
        raise UsageError("pass --checkpoint or --pretrained, not both: they are other weights")
    if checkpoint is not None and checkpoint.is_dir():
        if model is not None:
            raise UsageError(f"{checkpoint} says its architecture itself: leave --model {model} out")
        return _open_folder(checkpoint)
    if checkpoint is not None and not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: there is no such checkpoint")
    if model is None:
        raise UsageError(
            "a file of weights does not say its architecture: pass --model NAME, or a folder with config.json"
        )
    if checkpoint is None and not pretrained:
        raise UsageError("pass --checkpoint, or --pretrained for timm's published weights")
    known = timm.get_pretrained_cfg(_known_name(model))
    published = known.num_classes if known is not None else 1000
    classes = published if checkpoint is None else num_classes or published
    return create_student(model, num_classes=classes, init_checkpoint=checkpoint, pretrained=pretrained)


def _open_folder(folder: Path) -> Student:
    weights = folder / "model.safetensors"
    if not (folder / "config.json").is_file() or not weights.is_file():
        raise CheckpointError(
            f"{folder} is no exported model: it has no config.json and model.safetensors. A run keeps them in last/ and best/"
        )
    described = read_hub_config(folder)
    check_size(folder, described, read_tensors(weights))
    try:
        # timm would bend weights to a configuration that contradicts them: build first, then load exactly.
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
        config = model.pretrained_cfg
        student = Student(model, img_size=config["input_size"][-1], class_names=described.get("label_names"))
    except Exception as error:  # a damaged configuration fails in many ways below timm
        raise CheckpointError(f"{folder} cannot be loaded ({type(error).__name__}): {_one_line(error)}") from error
    if student.class_names is not None and len(student.class_names) != student.num_classes:
        raise CheckpointError(
            f"{folder}: config.json names {len(student.class_names)} classes, the model has {student.num_classes}"
        )
    load_weights(student, weights)
    return student


def normalise(images: Tensor, student: Student) -> Tensor:
    """Turn float32 images [B, 3, H, W] of 0..255 into what the student was made for."""
    mean, std = (_levels(values, images.device) for values in (student.mean, student.std))
    return (images - mean) / std


@lru_cache
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 [1, 3, 1, 1] of 0..255; kept, because to make it on a GPU waits for all that it has to do."""
    return torch.tensor(values, device=device)[None, :, None, None] * 255
