"""Loading of teachers: from timm, the Hub, an exported folder, a checkpoint, a function, or an object (docs/teachers.md)."""

import contextlib
import difflib
import hashlib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.errors import CheckpointError, TeacherError, UsageError
from pipeline.labels.manifest import AnyTeacher, EnsembleIdentity, TeacherIdentity
from pipeline.machine.ranks import resolve_device
from pipeline.settings.configs import TeacherConfig
from pipeline.teacher.given import CheckedAnswers, GivenTeacher, check_trial
from pipeline.teacher.teacher import Network, Teacher
from pipeline.views.noise import IMAGENET_MEAN, IMAGENET_STD
from pipeline.weights import check_size, read_hub_config, read_tensors

# DeiT's own teacher. timm's untagged `regnety_160` is another network, pretrained on ImageNet-12k.
DEIT_TEACHERS = {"regnety_160": "regnety_160.deit_in1k"}
LOCAL, HUB = "local-dir:", "hf-hub:"
# What a `module:function` may say of its network in a dict, and a program of an object; with the default of each key.
FUNCTION_DEFAULTS: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 0.875,
    "class_names": None,
}


def load_teacher(
    config: TeacherConfig,
    *,
    num_classes: int | None = None,
    device: str | None = None,
    given: GivenTeacher | None = None,
) -> Teacher:
    """Load a teacher: one network, or several whose probabilities are averaged.

    Args:
        config: names (`regnety_160` means DeiT's), weights, image size and dtype.
        num_classes: class count for a network with random weights; None means 1,000.
        device: torch device; None: the device in `config`.
        given: a network or function that is the teacher, instead of the names in `config`.

    Raises:
        TeacherError: a network cannot be loaded, or the networks have different classes.
        UsageError: a name or a checkpoint does not exist, or they cannot be combined.
    """
    if given is not None:
        return _load_given(given, config, resolve_device(device or config.device))
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
            raise TeacherError(_first_problem(error)) from error
    return Teacher(networks, identity, config, num_classes, device=resolve_device(device or config.device))


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers, sorted by name.

    Raises:
        TeacherError: the module's state_dict holds something other than tensors.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # get_extra_state
            raise TeacherError(f"the teacher's state_dict must hold only tensors, {name} is {type(tensor).__name__}")
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def names_function(name: str) -> bool:
    """Return whether a teacher's name is that of a Python function, module:function."""
    return ":" in name and not name.startswith((LOCAL, HUB))


def loaded_as(name: str) -> str:
    """Return the name under which timm loads a teacher that is no function; `local-dir:` stands before an exported folder.

    Raises:
        UsageError: timm has no such model.
    """
    wanted = DEIT_TEACHERS.get(name, name)
    _refuse_run(Path(name.removeprefix(LOCAL)))
    if (Path(name) / "config.json").is_file():
        wanted = LOCAL + name
    if wanted.startswith((LOCAL, HUB)) or timm.is_model(wanted):
        return wanted
    if "/" in name:
        there = "holds no config.json" if Path(name).is_dir() else "is no folder"
        raise UsageError(
            f"--teacher {name}: {there}, and timm has no model of this name",
            fix="Pass a folder that `train` exported, such as RUN/best, or a name that deit-cli models --teachers lists",
        )
    close = difflib.get_close_matches(wanted, timm.list_models(), n=3)
    fix = f"Did you mean {', '.join(close)}?" if close else "deit-cli models --teachers lists names"
    raise UsageError(f"timm has no model {name!r}", fix=fix)


def _refuse_run(folder: Path) -> None:
    """Raise UsageError for the folder of a run: the teacher's weights must be named exactly, its best or its last."""
    if (folder / "model.safetensors").is_file():
        return
    inside = [str(folder / part) for part in ("best", "last") if (folder / part / "model.safetensors").is_file()]
    if inside:
        raise UsageError(f"--teacher {folder} is the folder of a run", fix=f"Pass {' or '.join(inside)}")


def _load_network(name: str, checkpoint: Path | None, options: TeacherConfig, num_classes: int | None) -> Network:
    if names_function(name):
        if checkpoint is not None:
            raise UsageError(
                f"--teacher-checkpoint {checkpoint} cannot be loaded into {name}, which is a function",
                fix="Let the function load it",
            )
        module, config = _from_function(name)
        resolved, fix = name, "The network must take float32 images [B, 3, H, W] in channels-last memory on the CPU"
    else:
        module, resolved = _from_timm(
            name, checkpoint=checkpoint, pretrained=options.pretrained, num_classes=num_classes
        )
        config = timm.data.resolve_model_data_config(module)
        config |= {"class_names": (getattr(module, "pretrained_cfg", None) or {}).get("label_names") or None}
        fix = "Pass --teacher-img-size"
    size = options.teacher_img_size or int(config["input_size"][-1])
    identity = _identity(
        name,
        config,
        name=resolved,
        weights_sha256=weights_sha256(module),
        img_size=size,
        num_classes=_count_classes(module, size, name, fix),
    )
    return Network(module, identity, crop_pct=float(config.get("crop_pct", 0.875)))


def _identity(asked: str, config: dict[str, Any], **fields: Any) -> TeacherIdentity:
    """Return the identity of the teacher that was asked for, with the normalisation and class names of a configuration."""
    names = config["class_names"]
    fields |= {what: _channel_values(config[what], what, asked) for what in ("mean", "std")}
    try:
        return TeacherIdentity(**fields, class_names=None if names is None else tuple(names))
    except ValidationError as error:
        raise TeacherError(f"teacher {asked}: {_first_problem(error)}") from error


def _load_given(given: GivenTeacher, options: TeacherConfig, device: torch.device) -> Teacher:
    """Return a teacher that a program passed as an object, after a trial on its device."""
    name, network = given.name, given.answer if isinstance(given.answer, nn.Module) else None
    if network is None and options.compile:
        raise UsageError(f"compile is for networks, and teacher {name} is a function: compile what it calls")
    if network is None and options.dtype == "auto":  # autocast knows nothing of what a function calls
        options = replace(options, dtype="float32")
    config = _about(network) | given.about
    _check_config(name, config)
    config = FUNCTION_DEFAULTS | config
    size = int(config["input_size"][-1])
    checked = CheckedAnswers(given).to(device).eval()
    halves = {weight.dtype for weight in checked.parameters()} & {torch.float16, torch.bfloat16}
    fix = f"Its weights are {halves.pop()}: pass network.float()" if halves else "Check its img_size, and its device"
    images = _trial_images(size, *(_channel_values(config[what], what, name) for what in ("mean", "std"))).to(device)
    with _as_teacher_error(f"teacher {name} does not answer float32 images {list(images.shape)} on {device}", fix=fix):
        num_classes = check_trial(checked, images)
    identity = _identity(
        name,
        config,
        name=name,
        weights_sha256=weights_sha256(network or nn.Module()),  # of a function nothing is seen, and nothing is hashed
        img_size=size,
        num_classes=num_classes,
    )
    return Teacher(
        [Network(checked, identity, float(config["crop_pct"]))], identity, options, device=device, given=given
    )


def _trial_images(size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return two images with all levels of 0..1, normalised, float32 [2, 3, size, size] in channels-last memory."""
    levels = (torch.arange(2 * 3 * size * size) * 7919 % 251 / 250).reshape(2, 3, size, size)
    normalised = (levels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return normalised.contiguous(memory_format=torch.channels_last)


def _first_problem(error: ValidationError) -> str:
    """Return the name of the first invalid field of a record, and the rule that it breaks."""
    found = error.errors()[0]
    return ": ".join([".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")]).removeprefix(": ")


def _from_timm(name: str, *, checkpoint: Path | None, pretrained: bool, num_classes: int | None) -> tuple[Any, str]:
    wanted = loaded_as(name)
    if checkpoint is not None:
        return _from_checkpoint(wanted, checkpoint)
    if wanted.startswith(LOCAL):
        _check_exported_folder(Path(wanted.removeprefix(LOCAL)))
    module: Any = None
    with _as_teacher_error(
        f"cannot load teacher {wanted}",
        fix="Export it again"
        if wanted.startswith(LOCAL)
        else "Pass the weights as a file with --teacher-checkpoint FILE, or --no-pretrained for a trial with random weights",
    ):
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
    with _as_teacher_error(
        f"cannot load {checkpoint} into teacher {name}", fix="Pass the --teacher that it was saved from"
    ):
        state = read_tensors(checkpoint)
        classifier = (timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).classifier
        weight = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
        kwargs: dict[str, Any] = {} if weight is None else {"num_classes": len(weight)}
        module: Any = timm.create_model(name, pretrained=False, **kwargs)
        module.load_state_dict(state, strict=True)
    return module, module.pretrained_cfg["architecture"]


def _check_exported_folder(folder: Path) -> None:
    """Raise TeacherError if config.json asks for a larger network than its weights, before it takes memory."""
    weights = folder / "model.safetensors"
    if (folder / "config.json").is_file() and weights.is_file():
        with _as_teacher_error(f"cannot load teacher {folder}", fix="Export it again"):
            check_size(folder, read_hub_config(folder), read_tensors(weights))


def _from_function(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Call a `module:function`, and return its network and the values for all keys of FUNCTION_DEFAULTS.

    The function returns a network from normalised float32 images [B, 3, H, W] to logits [B, C], or a pair of a network and
    a dict with some of the keys. Without a dict, the values are taken from the network's `pretrained_cfg`, which timm sets.

    Raises:
        UsageError: the function cannot be imported.
        TeacherError: the function fails, or returns something else.
    """
    function = _import_function(name)
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise TeacherError(f"teacher {name} failed{_failing_line(error, function)}: {_kind_and_text(error)}") from error
    match result:
        case nn.Module() as network:
            config = _about(network)
        case (nn.Module() as network, dict() as config):
            pass
        case _:
            kind = ", ".join(type(part).__name__ for part in (result if isinstance(result, tuple) else (result,)))
            raise TeacherError(
                f"teacher {name} must return a torch.nn.Module, or a torch.nn.Module and a dict, got {kind}"
            )
    _check_config(name, config)
    return network, FUNCTION_DEFAULTS | config


def _about(network: nn.Module | None) -> dict[str, Any]:
    """Return what a network of timm says of itself, by the keys of FUNCTION_DEFAULTS; nothing for any other network."""
    about = getattr(network, "pretrained_cfg", None)
    about = about if isinstance(about, dict) else {}
    return {key: about[key] for key in FUNCTION_DEFAULTS if about.get(key) is not None}


def _import_function(name: str) -> Callable[[], Any]:
    """Import a function; modules in the current folder come first."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing a module can raise anything
        raise UsageError(
            f"--teacher {name!r} must be a function that can be imported: {_kind_and_text(error)}",
            fix="Pass module:function, with the module in the current folder or on Python's search path",
        ) from error
    if not callable(function):
        raise UsageError(f"--teacher {name!r} must name a function, got {type(function).__name__}")
    return function


def _kind_and_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('. ')}"


def _failing_line(error: BaseException, function: Callable[[], Any]) -> str:
    """Return ` at line N of FILE`: the innermost line of the function's own file in the traceback; "" if there is none."""
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" at line {lines[-1]} of {file}" if lines else ""


def _check_config(name: str, config: dict[str, Any]) -> None:
    """Raise TeacherError if a function's dict has an unknown key or a bad value; `_channel_values` checks mean and std."""
    unknown = next((key for key in config if key not in FUNCTION_DEFAULTS), None)
    if unknown is not None:
        raise TeacherError(
            f"teacher {name}: the dict may have only the keys {', '.join(FUNCTION_DEFAULTS)}; got {unknown!r}"
        )
    size = config.get("input_size", (3, 224, 224))
    if not _is_list_of(size, int) or len(size) != 3 or size[0] != 3 or size[1] != size[2] or not 1 <= size[1] <= 4096:
        raise TeacherError(f"teacher {name}: input_size must be (3, H, H) with H in 1..4096 pixels, got {size!r}")
    crop = config.get("crop_pct", 1.0)
    if not isinstance(crop, (int, float)) or not 0.01 <= crop <= 1:
        raise TeacherError(f"teacher {name}: crop_pct must be in 0.01..1 (a share, not a percentage), got {crop!r}")
    names = config.get("class_names")
    if names is not None and not _is_list_of(names, str):
        raise TeacherError(f"teacher {name}: class_names must be a list of strings, got {str(names)[:80]!r}")


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) is kind for value in values)


@contextlib.contextmanager
def _as_teacher_error(what: str, *, fix: str) -> Iterator[None]:
    """Turn any error inside the block into a TeacherError of one line: the libraries below timm raise many kinds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (TeacherError, UsageError, KeyboardInterrupt):
        raise
    except CheckpointError as error:  # it already names its file and has a fix
        raise TeacherError(error.what, fix=error.fix) from error
    except Exception as error:
        text = " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__
        raise TeacherError(f"{what}: {text}", fix=fix) from error


def _count_classes(module: nn.Module, size: int, name: str, fix: str) -> int:
    """Return the number of classes: the number of columns in the network's answer for two blank images.

    The images have the memory layout of the later forward passes, so that a network that cannot take it fails here.
    """
    images = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), _as_teacher_error(f"teacher {name} does not take images of {size} pixels", fix=fix):
        output = module.eval()(images)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TeacherError(f"teacher {name} must answer {len(images)} images with logits [{len(images)}, C], got {got}")
    return output.shape[1]


def _channel_values(values: Any, what: str, name: str) -> tuple[float, float, float]:
    """Return a mean or a standard deviation as three numbers, or raise TeacherError."""
    low, high = (0, 1) if what == "mean" else (1e-6, 1)
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(low <= number <= high for number in numbers):
        rule = "three numbers in 0..1" if what == "mean" else "three numbers above 0 and at most 1"
        raise TeacherError(f"teacher {name}: {what} must be {rule} (for pixels in 0..1, not 0..255), got {values!r}")
    return numbers[0], numbers[1], numbers[2]
