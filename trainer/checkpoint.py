"""Checkpoints: the whole state of a run in one safetensors file, which is replaced atomically.

The file's only metadata entry, `deit_cli`, is a JSON object with the caller's `meta` and a SHA-256 of it and of all
tensors. A crash leaves either the old file or the new one. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
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
from pipeline.weights import check_names
from trainer.folders import STATE_KEY

_FIX = "Replace it with an intact copy, or start a new run from the last/ folder next to it, with --init and another --output"
_OTHER = "it was made with another configuration"
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and metadata as one file, atomically. The same input gives the same bytes.

    Args:
        path: file to write; an old one is replaced only by a complete new one.
        tensors: tensors of any dtype, device and layout; no two may share memory.
        meta: JSON values.

    Raises:
        ValueError: `meta` holds NaN or infinity.
    """
    replace_file(path, pack_state(tensors, meta))


def pack_state(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> bytes:
    """Return the content of the file that `save_state` writes."""
    plain, meta = on_cpu(tensors), json.loads(canonical_json(meta))  # as readers get it: lists, text keys
    header = canonical_json({"meta": meta, "sha256": tensors_sha256(plain, meta)}).decode()
    # One metadata key: safetensors writes several in an order that changes from call to call.
    return safetensors.torch.save(plain, {STATE_KEY: header})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_state` wrote, and check every byte of it.

    Returns:
        the tensors by name, on the CPU, and the metadata.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by `save_state`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read this checkpoint: {error.strerror}") from error
    return unpack_state(data, path, what="checkpoint", fix=_FIX)


def unpack_state(data: bytes, path: object, *, what: str, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Check the bytes of a file that `pack_state` made, and return its tensors and metadata.

    Args:
        data: content of the file.
        path: its path or URL, for errors.
        what: kind of the file, for errors.
        fix: what to do about a damaged one.

    Raises:
        CheckpointError: the content is damaged, or `pack_state` did not make it.
    """
    try:
        tensors = safetensors.torch.load(data)
        # Safe to parse by hand: the reader above has accepted this header.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = parse_json(header["__metadata__"][STATE_KEY].encode())
        meta, sha256 = stored["meta"], stored["sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: this is not a complete {what} of deit-cli ({type(error).__name__}: {error})", fix=fix
        ) from error
    found = tensors_sha256(tensors, meta)
    if found != sha256:
        raise CheckpointError(
            f"{path}: this {what} is damaged: its SHA-256 is {found}, but its metadata says {sha256}", fix=fix
        )
    return tensors, meta


def pack_training(student: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Tensor]:
    """Return all tensors that a resumed training needs, by name: `model.*`, `ema.*`, `optim.<parameter index>.*`.

    The tensors share memory with the objects, so save them before the next update. The optimizer's learning rate and
    weight decay are not included: they follow from the step and the configuration.

    Args:
        student: `Student` without DDP or `torch.compile`.
        optimizer: AdamW of the student.
        ema: `ModelEmaV3` of the student, or None.
    """
    tensors = _weights(student, ema)
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{name}": value for name, value in state.items()}
    return tensors


def unpack_training(
    tensors: Mapping[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Copy the tensors of `pack_training` into a student, optimizer and EMA built from the same configuration.

    Raises:
        CheckpointError: names, shapes or dtypes differ from those of the objects, which are unchanged.
    """
    weights = _weights(student, ema)
    moments = {name: value for name, value in tensors.items() if name.startswith("optim.")}
    check_names(tensors.keys() - moments.keys(), weights.keys(), "the checkpoint", why=_OTHER)
    for name, live in weights.items():
        _check_same_kind(name, tensors[name], live)
    state = _optimizer_state(moments, optimizer)
    with torch.no_grad():
        for name, live in weights.items():
            live.copy_(tensors[name])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU; further training does not change them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU and contiguous, as safetensors needs them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainingError if a tensor holds NaN or infinity: such a state must not replace the last good checkpoint."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} became NaN or infinite, so the last checkpoint is kept",
                fix="Lower --lr or set --clip-grad, and start from that checkpoint with --init and another --output",
            )


class BackgroundWriter:
    """A thread that writes files during training, one after the other; the next call raises the error of a failed write.

    Use it in a `with` block: at its end, every submitted write has finished.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the previous one is done, so that at most one snapshot waits in memory."""
        self.wait()
        self._pending = self._pool.submit(job)

    def wait(self) -> None:
        """Wait until everything is written, and raise the error of a failed write."""
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
    """Return the weights in use, by name; `Student` has timm's model as `model`, `ModelEmaV3` a `Student` as `module`."""
    owners = {"model": student.get_submodule("model")}
    if ema is not None:
        owners["ema"] = ema.get_submodule("module.model")
    return {f"{owner}.{name}": value for owner, model in owners.items() for name, value in model.state_dict().items()}


def _optimizer_state(moments: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return the tensors `optim.<index>.<name>` by parameter index; parameters that never had a gradient have none."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    started = [index for index in range(len(parameters)) if f"optim.{index}.step" in moments]
    scalar = torch.empty(())
    like = {
        f"optim.{index}.{name}": scalar if name == "step" else parameters[index]
        for index in started
        for name in _ADAMW_STATE
    }
    check_names(moments.keys(), like.keys(), "the checkpoint", why=_OTHER)
    for name, tensor in like.items():
        _check_same_kind(name, moments[name], tensor)
    # Clones, because the optimizer later changes these tensors in place.
    return {index: {name: moments[f"optim.{index}.{name}"].clone() for name in _ADAMW_STATE} for index in started}


def _check_same_kind(name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise CheckpointError(
            f"the checkpoint's {name} is {found.dtype} {list(found.shape)}, this run needs {wanted.dtype} "
            f"{list(wanted.shape)}: {_OTHER}"
        )


def tensors_sha256(tensors: Mapping[str, Tensor], meta: Any = None) -> str:
    """Return the SHA-256 of the metadata and of each CPU tensor's name, dtype, shape and bytes, sorted by name."""
    sha256 = hashlib.sha256(canonical_json(meta))
    for name, tensor in sorted(tensors.items()):
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
