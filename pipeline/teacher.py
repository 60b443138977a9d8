"""The frozen teacher: how it is found, what identifies it, and what it answers for a batch of views."""

import contextlib
import difflib
import hashlib
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import timm.data
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import DeitCliError, NonFiniteTeacherError, TeacherError, UsageError
from pipeline.manifest import TeacherIdentity
from pipeline.views import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger("deit_cli.teacher")

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# timm's untagged `regnety_160` is another network, trained on ImageNet-12k; DeiT's teacher is this one.
DEIT_TEACHERS = {"regnety_160": "regnety_160.deit_in1k"}
LOCAL, HUB = "local-dir:", "hf-hub:"


@dataclass(frozen=True)
class Answer:
    """What the teacher says of a batch.

    Attributes:
        hard: int64 [B], argmax class.
        topk_index: int64 [B, K], most probable first.
        topk_prob: float32 [B, K], probabilities at temperature 1.
    """

    hard: NDArray[np.int64]
    topk_index: NDArray[np.int64]
    topk_prob: NDArray[np.float32]


class Teacher:
    """A frozen network that turns views into hard labels and top-k probabilities."""

    def __init__(
        self, module: nn.Module, identity: TeacherIdentity, *, crop_pct: float, device: str, dtype: Dtype
    ) -> None:
        self.identity = identity
        self.crop_pct = crop_pct
        self.device = torch.device(device)
        self.dtype = _resolve_dtype(dtype, self.device)
        self._module = module.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
        scale = torch.tensor([identity.mean, identity.std], device=self.device)[:, None, :, None, None] * 255
        self._mean, self._std = scale

    def answer(self, images: Tensor, topk: int) -> Answer:
        """Label a batch of mixed views.

        Args:
            images: float32 [B, 3, H, W], 0..255, on the teacher's device.
            topk: K, 0..C.

        Raises:
            NonFiniteTeacherError: NaN or infinity, also in float32.
        """
        with torch.inference_mode():
            logits = self._finite_logits(images)
            top = logits.topk(max(topk, 1), dim=1)
            prob = logits.softmax(dim=1).gather(1, top.indices[:, :topk])
            return Answer(top.indices[:, 0].cpu().numpy(), top.indices[:, :topk].cpu().numpy(), prob.cpu().numpy())

    def logits(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return float32 logits [B, C] for float32 images [B, 3, H, W] of 0..255."""
        dtype = dtype or self.dtype
        size = self.identity.img_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)
        images = ((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self._module(images).float()

    def _finite_logits(self, images: Tensor) -> Tensor:
        """The argmax of NaN is a valid class: such rows are tried again in float32, and never stored."""
        logits = self.logits(images)
        bad = ~logits.isfinite().all(dim=1)
        if bad.any() and self.dtype != torch.float32:
            log.warning("%d views gave non-finite outputs in %s: trying float32", int(bad.sum()), self.dtype)
            logits[bad] = self.logits(images[bad], torch.float32)
            bad = ~logits.isfinite().all(dim=1)
        if bad.any():
            raise NonFiniteTeacherError(
                f"teacher {self.identity.name} answered NaN or infinity in float32 for batch positions {bad.nonzero().ravel().tolist()[:8]}"
            )
        return logits


def load_teacher(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    img_size: int | None = None,
    device: str = "cpu",
    dtype: Dtype = "auto",
) -> Teacher:
    """Load a teacher.

    Args:
        name: timm name (`regnety_160` means DeiT's), `hf-hub:` name, a folder that `deit-cli train` exported, or
            `module:function` that returns a network.
        checkpoint: weights to load instead of timm's: safetensors or a state dict.
        pretrained: False takes random weights of a fixed seed, for tests.
        num_classes: of the source; the class count of a network with random weights.
        img_size: pixels the teacher sees; None takes its configuration's.
        device: torch device.
        dtype: of its forward pass; `auto` is bfloat16 on CUDA, else float32.
    """
    if ":" in name and not name.startswith((LOCAL, HUB)):
        module, config = _from_function(name)
        resolved = name
    else:
        module, resolved = _from_timm(name, checkpoint=checkpoint, pretrained=pretrained, num_classes=num_classes)
        config = timm.data.resolve_model_data_config(module)
        label_names = (getattr(module, "pretrained_cfg", None) or {}).get("label_names")
        config |= {"class_names": tuple(label_names) if label_names else None}
    size = img_size or int(config["input_size"][-1])
    identity = TeacherIdentity(
        name=resolved,
        weights_sha256=weights_sha256(module),
        img_size=size,
        mean=_three(config["mean"], "mean"),
        std=_three(config["std"], "std"),
        num_classes=_count_classes(module, size, name),
        class_names=config.get("class_names"),
    )
    return Teacher(module, identity, crop_pct=float(config.get("crop_pct", 0.875)), device=device, dtype=dtype)


def check_classes(teacher: TeacherIdentity, class_names: tuple[str, ...] | None, highest_label: int | None) -> None:
    """Raise TeacherError unless the teacher's classes are those of the source.

    Args:
        teacher: identity of the teacher.
        class_names: of the source, where it has them.
        highest_label: of the source, None where nothing is labelled.
    """
    if class_names is not None and len(class_names) != teacher.num_classes:
        raise TeacherError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the source has {len(class_names)}"
        )
    if highest_label is not None and highest_label >= teacher.num_classes:
        raise TeacherError(
            f"teacher {teacher.name} has {teacher.num_classes} classes, the source has class labels up to {highest_label}"
        )
    if class_names is not None and teacher.class_names is not None and class_names != teacher.class_names:
        place = next(i for i, (a, b) in enumerate(zip(class_names, teacher.class_names, strict=True)) if a != b)
        raise TeacherError(
            f"class {place} is {class_names[place]!r} in the source and {teacher.class_names[place]!r} for teacher {teacher.name}:"
            " the order of classes differs"
        )


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_timm(name: str, *, checkpoint: Path | None, pretrained: bool, num_classes: int | None) -> tuple[Any, str]:
    wanted = DEIT_TEACHERS.get(name, name)
    if (Path(name) / "config.json").is_file():
        wanted = LOCAL + name
    if not wanted.startswith((LOCAL, HUB)) and not timm.is_model(wanted):
        close = difflib.get_close_matches(wanted, timm.list_models(), n=3)
        raise UsageError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    if checkpoint is not None:
        return _from_checkpoint(wanted, checkpoint)
    module: Any = None
    with _named_failure(f"cannot load teacher {wanted}", "Pass --teacher-checkpoint, or --no-pretrained for a trial"):
        if pretrained:
            module = timm.create_model(wanted, pretrained=True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = timm.create_model(wanted, pretrained=False, num_classes=num_classes or 1000)
    config = module.pretrained_cfg
    tag = config.get("tag") if pretrained and not wanted.startswith(LOCAL) else None
    resolved = wanted if wanted.startswith(HUB) else ".".join(filter(None, (config["architecture"], tag)))
    return module, resolved


def _from_checkpoint(name: str, checkpoint: Path) -> tuple[Any, str]:
    if not checkpoint.is_file():
        raise UsageError(f"--teacher-checkpoint {checkpoint}: no such file")
    with _named_failure(f"cannot load {checkpoint} into teacher {name}", "Pass the --teacher that it was saved from"):
        state = timm.models.load_state_dict(str(checkpoint), device="cpu", weights_only=True)
        classifier = (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).classifier
        weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        kwargs: dict[str, Any] = {} if weight is None else {"num_classes": len(weight)}
        module: Any = timm.create_model(name, pretrained=False, **kwargs)
        module.load_state_dict(state, strict=True)
    return module, module.pretrained_cfg["architecture"]


def _from_function(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Call `module:function`; it returns a network, or a network and its {input_size, mean, std, class_names}."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"--teacher {name!r} is no function that can be imported: {error}") from error
    result = function()
    network, config = result if isinstance(result, tuple) else (result, getattr(result, "pretrained_cfg", None) or {})
    if not isinstance(network, nn.Module):
        raise TeacherError(f"{name} must return a torch.nn.Module, got {type(network).__name__}")
    defaults = {"input_size": (3, 224, 224), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return network, defaults | dict(config)


@contextlib.contextmanager
def _named_failure(what: str, remedy: str) -> Iterator[None]:
    """Loading fails in as many ways as there are libraries below timm; the user needs the last line and a way out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DeitCliError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise TeacherError(f"{what}: {' '.join(lines)[:300]}. {remedy}") from error


def _count_classes(module: nn.Module, size: int, name: str) -> int:
    """Ask the network itself: its answer for one image has as many columns as it has classes."""
    with (
        torch.inference_mode(),
        _named_failure(f"teacher {name} does not take images of {size} pixels", "Pass --teacher-img-size"),
    ):
        output = module.eval()(torch.zeros(1, 3, size, size))
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise TeacherError(
            f"teacher {name} must return logits [B, C], got {getattr(output, 'shape', type(output).__name__)}"
        )
    return output.shape[1]


def _resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _three(values: Any, what: str) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise TeacherError(f"the teacher's {what} must be three numbers, got {values!r}")
    return numbers[0], numbers[1], numbers[2]
