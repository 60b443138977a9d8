"""Where a frozen teacher comes from: timm, the Hub, an exported folder, a checkpoint, or a function."""

import contextlib
import difflib
import hashlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config import TeacherConfig
from pipeline.devices import resolve_device
from pipeline.errors import TeacherError, UsageError
from pipeline.manifest import AnyTeacher, EnsembleIdentity, TeacherIdentity
from pipeline.teacher import Network, Teacher
from pipeline.tensors import check_size, read_hub_config, read_tensors
from pipeline.views import IMAGENET_MEAN, IMAGENET_STD

# timm's untagged `regnety_160` is another network, trained on ImageNet-12k; DeiT's teacher is this one.
DEIT_TEACHERS = {"regnety_160": "regnety_160.deit_in1k"}
LOCAL, HUB = "local-dir:", "hf-hub:"


def load_teacher(config: TeacherConfig, *, num_classes: int | None = None, device: str | None = None) -> Teacher:
    """Load a teacher, or several whose probabilities are averaged.

    Args:
        config: names (`regnety_160` means DeiT's), weights, size, dtype.
        num_classes: of the source; the class count of a network with random weights.
        device: torch device; None takes the configuration's.

    Raises:
        TeacherError: it cannot be loaded, or its classes are not those of the other teachers.
    """
    checkpoints = config.teacher_checkpoint or (None,) * len(config.teacher)
    networks = [
        _load_network(name, checkpoint, config, num_classes)
        for name, checkpoint in zip(config.teacher, checkpoints, strict=True)
    ]
    identity: AnyTeacher = networks[0].identity
    if len(networks) > 1:
        try:
            identity = EnsembleIdentity(members=tuple(network.identity for network in networks))
        except ValidationError as error:
            raise TeacherError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    return Teacher(networks, identity, config, num_classes, device=resolve_device(device or config.device))


def _load_network(name: str, checkpoint: Path | None, options: TeacherConfig, num_classes: int | None) -> Network:
    if ":" in name and not name.startswith((LOCAL, HUB)):
        module, config = _from_function(name)
        resolved = name
    else:
        module, resolved = _from_timm(
            name, checkpoint=checkpoint, pretrained=options.pretrained, num_classes=num_classes
        )
        config = timm.data.resolve_model_data_config(module)
        label_names = (getattr(module, "pretrained_cfg", None) or {}).get("label_names")
        config |= {"class_names": tuple(label_names) if label_names else None}
    size = options.teacher_img_size or int(config["input_size"][-1])
    identity = TeacherIdentity(
        name=resolved,
        weights_sha256=weights_sha256(module),
        img_size=size,
        mean=_three(config["mean"], "mean"),
        std=_three(config["std"], "std"),
        num_classes=_count_classes(module, size, name),
        class_names=config.get("class_names"),
    )
    return Network(module, identity, crop_pct=float(config.get("crop_pct", 0.875)))


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
    if wanted.startswith(LOCAL):
        _check_folder(Path(wanted.removeprefix(LOCAL)))
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
        state = read_tensors(checkpoint)
        classifier = (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).classifier
        weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        kwargs: dict[str, Any] = {} if weight is None else {"num_classes": len(weight)}
        module: Any = timm.create_model(name, pretrained=False, **kwargs)
        module.load_state_dict(state, strict=True)
    return module, module.pretrained_cfg["architecture"]


def _check_folder(folder: Path) -> None:
    """Refuse an exported folder whose configuration and weights contradict each other, before it takes memory."""
    weights = folder / "model.safetensors"
    if (folder / "config.json").is_file() and weights.is_file():
        with _named_failure(f"cannot load teacher {folder}", "Export it again"):
            check_size(folder, read_hub_config(folder), read_tensors(weights))


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
    except (TeacherError, UsageError, KeyboardInterrupt):
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


def _three(values: Any, what: str) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise TeacherError(f"the teacher's {what} must be three numbers, got {values!r}")
    return numbers[0], numbers[1], numbers[2]
