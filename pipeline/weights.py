"""Weights that a command starts from: a local file or exported folder, or a download from a URL."""

import contextlib
import math
import re
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path, PurePosixPath
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor

from pipeline.errors import CheckpointError, RemoteFileMissing, StorageError
from pipeline.storage.atomic import locked, refusals_named
from pipeline.storage.json import read_json
from pipeline.storage.remote import receive_file
from pipeline.storage.urls import join_url, local_path, url_name, working_folder
from pipeline.text import CONTROL_CHARACTERS

_FILES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".tar"})
SMALL = 1 << 24  # parameters; any machine has memory for so few, and loading gives a more exact error
_REPEATED = re.compile("depth|layer|block|stage|repeat|list")  # names of a network's arguments that repeat a part
_NAMED = re.compile(r"GLOBAL ([\w.]{1,200}) ")  # in torch's errors: the name that a pickle needs and may not load
_LONGEST_NAME = 500
_ANEW = "save the state dict alone, best as safetensors"


def weights_here(location: str) -> Path:
    """Return the local path of a file of weights, or of a folder with `model.safetensors` and perhaps `config.json`.

    Weights behind a URL are downloaded each time, because a run replaces them.

    Raises:
        RemoteFileMissing: the URL has no weights.
        StorageError: the weights cannot be downloaded.
    """
    if (path := local_path(location)) is not None:
        return path
    folder, name = working_folder(location), url_name(location)
    with refusals_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if PurePosixPath(name).suffix in _FILES:
            receive_file(location, folder / name)
            return folder / name
        receive_file(join_url(location, "model.safetensors"), folder / "model.safetensors")
        (folder / "config.json").unlink(missing_ok=True)
        with contextlib.suppress(RemoteFileMissing):
            receive_file(join_url(location, "config.json"), folder / "config.json")
    return folder


class _Ignored:
    """A stand-in for NumPy's types and functions that ignores its arguments.

    So no shape, dtype or state that a file claims reaches NumPy: version 2.4 crashes (SIGSEGV) on an array that has fewer
    objects than its shape says. `argparse.Namespace` needs no stand-in: timm allows it, and torch only sets its attributes.
    """

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# Names in the pickles of NumPy's numbers, arrays and dtypes; modules as in NumPy 1 and 2.
_NUMPY = ("ndarray", "dtype", *(f"{m}.multiarray.{f}" for m in ("core", "_core") for f in ("_reconstruct", "scalar")))
_STAND_INS = [(_Ignored, f"numpy.{name}") for name in _NUMPY]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a PyTorch state dict, alone or under `state_dict` or `model`.

    Plain values, NumPy's numbers and arrays, and an `argparse.Namespace` beside a state dict are ignored.

    Raises:
        CheckpointError: the file has other content, or tensors whose values are not all stored in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file")
    _refuse_packed(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):  # pyright: ignore[reportArgumentType]
            warnings.simplefilter("ignore")  # warnings on kinds of tensors that are refused below
            state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # malicious bytes can cause almost any exception in torch's reader
        raise CheckpointError(f"{path} cannot be read as plain tensors: {_why(path, error)}") from error
    if any(len(name) > _LONGEST_NAME or CONTROL_CHARACTERS.search(name) for name in state):  # errors print names
        raise CheckpointError(
            f"{path}: names of tensors must have at most {_LONGEST_NAME} characters and no control characters"
        )
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None or not state:
        what = "it is empty" if odd is None else f"{odd} is not a tensor"
        raise CheckpointError(
            f"{path} holds no state dict: {what}", fix="It must stand alone, or under state_dict or model"
        )
    for name, tensor in state.items():
        if what := _not_plain(tensor):
            raise CheckpointError(f"{path}: {name} is {what}: a checkpoint holds whole tensors of real numbers")
    return state


def _why(path: Path, error: Exception) -> str:
    """Return the reason why torch's or safetensors' reader refused a file, and the fix."""
    if named := _NAMED.search(f"{error} {error.__cause__}"):
        return f"it holds {named[1]}, which needs code to load. Load it where you trust it, and {_ANEW}"
    if path.suffix == ".safetensors":
        return "it is damaged, or not a safetensors file. Fetch or export it again"
    return (
        "it is damaged, or holds no state dict as torch.save writes it."
        f" Fetch it again, or load it where you trust it and {_ANEW}"
    )


def _refuse_packed(path: Path) -> None:
    """Raise for a PyTorch zip file with compressed members, which torch would inflate a thousandfold without a limit."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return
        with zipfile.ZipFile(path) as archive:
            packed = next((m.filename for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED), None)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch reports the problem
    if packed is not None:
        raise CheckpointError(
            f"{path}: its member {packed!r} is compressed, which torch.save never does", fix="Save it anew"
        )


def _not_plain(tensor: Tensor) -> str | None:
    """Return the kind of a tensor, or None if it is dense, on the CPU, and all its values are stored."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        return f"{str(tensor.layout).removeprefix('torch.')} {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"on device {tensor.device.type}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"a view of {list(tensor.shape)} of {tensor.untyped_storage().nbytes()} stored bytes"
    return None


def read_hub_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of an exported folder, check the entries in use, and return it.

    Raises:
        CheckpointError: the file is not an exported configuration.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold an object, got {type(config).__name__}")
    names = config.get("label_names")
    if names is not None and not _is_list_of_names(names):
        raise CheckpointError(f"{path}: label_names must be a list of texts without control characters")
    values = config.get("pretrained_cfg", {})
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: pretrained_cfg must be an object, got {type(values).__name__}")
    for name in ("mean", "std"):
        if values.get(name) is not None and not _is_three_numbers(values[name]):
            raise CheckpointError(f"{path}: {name} must be three numbers, got {str(values[name])[:80]!r}")
    filter_ = values.get("interpolation")
    if filter_ is not None and not (isinstance(filter_, str) and re.fullmatch(r"[a-z-]+", filter_)):
        raise CheckpointError(f"{path}: interpolation must be the name of a filter, got {str(filter_)[:80]!r}")
    if not _is_share(values.get("crop_pct")):
        raise CheckpointError(f"{path}: crop_pct must be above 0 and at most 1, got {str(values['crop_pct'])[:80]!r}")
    return config


def check_size(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise if a configuration describes a larger network than its weights, before memory is allocated.

    Raises:
        CheckpointError: the network is larger, or timm cannot build it.
    """
    path = folder / "config.json"
    most = _largest(config.get("model_args"))
    if most > len(weights):
        raise CheckpointError(
            f"{path} asks for {most} layers, and {len(weights)} tensors lie beside it", fix="Export it again"
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shell: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # a damaged configuration can raise many exceptions inside timm
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}): {' '.join(str(error).split())[:300]}"
        ) from error
    asked, there = (sum(tensor.numel() for tensor in t.values()) for t in (shell.state_dict(), weights))
    if asked > max(2 * there, SMALL):  # factor 2: weights that two parts share may be stored once
        raise CheckpointError(
            f"{path} asks for a network of {asked} numbers, and {there} lie beside it", fix="Export it again"
        )


def check_names(found: Set[str], wanted: Set[str], what: object, *, why: str) -> None:
    """Raise CheckpointError, with the reason `why`, unless the names of the tensors of `what` are the wanted ones."""
    for has, names in (("lacks", wanted - found), ("has an unknown tensor", found - wanted)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{what} {has} {min(names)}{more}: {why}")


def _largest(values: Any, counts: bool = False) -> float:
    """Return the largest number under a name that sets the repetitions of a part of the network."""
    if isinstance(values, dict):
        return max((_largest(v, counts or bool(_REPEATED.search(k))) for k, v in values.items()), default=0)
    if isinstance(values, list):
        return max((_largest(value, counts) for value in values), default=0)
    return values if counts and isinstance(values, (int, float)) and not isinstance(values, bool) else 0


def _is_list_of_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(n, str) and not CONTROL_CHARACTERS.search(n) for n in names)


def _is_three_numbers(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(_is_number(value) for value in values)


def _is_share(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 < value <= 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
