"""Training state and exported models: safetensors and JSON, no pickle, one atomic rename each.

A state file is an ordinary safetensors file whose only metadata, `deit_cli`, is a JSON object: the caller's `meta`
and a SHA-256 over it and every tensor. All of a run's state is in one file, so a crash leaves the old or the new.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import CheckpointError, TrainingError
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import canonical_json, parse_json

_METADATA_KEY = "deit_cli"
_ANEW = ". Put a sound copy in its place, or start another --output from the last/ beside it with --init"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and metadata as one file, atomically. Same input, same bytes.

    Args:
        path: replaced only by a complete file.
        tensors: any dtype, device and layout; no two may share memory.
        meta: JSON values; NaN and infinity are refused (ValueError).
    """
    plain, meta = on_cpu(tensors), json.loads(canonical_json(meta))  # what a reader will see: lists, keys of text
    header = canonical_json({"meta": meta, "sha256": _digest(plain, meta)}).decode()
    # One metadata key: safetensors writes several in an order that changes from call to call.
    data = safetensors.torch.save(plain, {_METADATA_KEY: header})
    replace_file(path, data)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote, on the CPU, after checking every byte of it.

    Raises:
        CheckpointError: the file is missing, damaged, or not one of ours.
    """
    try:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        # Safe to parse by hand: the reader above has accepted this header.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = parse_json(header["__metadata__"][_METADATA_KEY].encode())
        meta, sha256 = stored["meta"], stored["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read this checkpoint: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: this is not a whole checkpoint of deit-cli ({type(error).__name__}: {error}){_ANEW}"
        ) from error
    found = _digest(tensors, meta)
    if found != sha256:
        raise CheckpointError(f"{path}: this checkpoint is damaged: its SHA-256 is {found}, it says {sha256}{_ANEW}")
    return tensors, meta


def pack_training(student: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """Name every tensor that training continues from: `model.*`, `ema.*`, `optim.<parameter index>.*`.

    The tensors are the live ones: save them before the next update. The optimizer's rate and decay are not among
    them: they are functions of the step and of the configuration.

    Args:
        student: the `Student`, unwrapped.
        optimizer: its AdamW.
        ema: its `ModelEmaV3`, or None.
    """
    tensors = _weights(student, ema)
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{name}": value for name, value in state.items()}
    return tensors


def unpack_training(
    tensors: Mapping[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Put what `pack_training` named back into objects built from the same configuration.

    Raises:
        CheckpointError: names or shapes are not those of these objects, which are then unchanged.
    """
    weights = _weights(student, ema)
    moments = {name: value for name, value in tensors.items() if name.startswith("optim.")}
    _check_names(tensors.keys() - moments.keys(), weights.keys())
    for name, live in weights.items():
        _check_same_kind(name, tensors[name], live)
    state = _optimizer_state(moments, optimizer)
    with torch.no_grad():
        for name, live in weights.items():
            live.copy_(tensors[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, which training on does not change."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainingError if a tensor holds what is no number: such a state must not take the place of a sound one."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is no longer finite; the last checkpoint is, and stays",
                fix="Lower --lr or set --clip-grad, and continue from it with another --output and --init",
            )


class BackgroundWriter:
    """Writes files beside the training, one job at a time and in order; what goes wrong is raised at the next call.

    Use it in a `with` block: at its end all that was begun is finished.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin a job, when the one before is done: so that no more than one snapshot waits in memory."""
        self.wait()
        self._pending = self._pool.submit(job)

    def wait(self) -> None:
        """Return when everything is written, or raise what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()


def _weights(student: nn.Module, ema: nn.Module | None) -> dict[str, Tensor]:
    """Return the live weights; `Student` keeps timm's model under `model`, `ModelEmaV3` a `Student` under `module`."""
    owners = {"model": student.get_submodule("model")}
    if ema is not None:
        owners["ema"] = ema.get_submodule("module.model")
    return {f"{owner}.{name}": value for owner, model in owners.items() for name, value in model.state_dict().items()}


def _optimizer_state(moments: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Group `optim.<index>.<name>` by parameter. One that had no gradient yet has no state; any other has all of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    started = [index for index in range(len(parameters)) if f"optim.{index}.step" in moments]
    scalar = torch.empty(())
    like = {
        f"optim.{index}.{name}": scalar if name == "step" else parameters[index]
        for index in started
        for name in _ADAMW_STATE
    }
    _check_names(moments.keys(), like.keys())
    for name, tensor in like.items():
        _check_same_kind(name, moments[name], tensor)
    # Cloned, because the optimizer goes on to change the tensors that it is given.
    return {index: {name: moments[f"optim.{index}.{name}"].clone() for name in _ADAMW_STATE} for index in started}


def _check_names(found: Set[str], wanted: Set[str]) -> None:
    for what, names in (("lacks", wanted - found), ("has the unknown", found - wanted)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"the checkpoint {what} {min(names)}{more}: it was made with another configuration")


def _check_same_kind(name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise CheckpointError(
            f"the checkpoint's {name} is {found.dtype} {list(found.shape)}, this run needs {wanted.dtype} "
            f"{list(wanted.shape)}: it was made with another configuration"
        )


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors writes them: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor], meta: Any) -> str:
    """Return the SHA-256 over the metadata and, by name, every tensor's name, dtype, shape and bytes."""
    sha256 = hashlib.sha256(canonical_json(meta))
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
