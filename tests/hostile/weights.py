"""Checkpoints, weights and configurations that lie."""

import argparse
import copy
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hostile.uses import small_student
from pipeline.storage.json import canonical_json
from trainer.export import export_model, hub_config


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def saved(make: Callable[[], Any], name: str = "w.pth") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(make(), folder / name)
        return folder / name

    return build


class Claims:
    """Unpickled, it is what a function makes of arguments, with a state: a pickle may say anything of them."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.said = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.said


class Subclass(np.ndarray):
    """Not NumPy's."""


def trap(
    name: str, *, legacy: bool = False, inside: Callable[[Trap], Any] = lambda trap: trap
) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        values = {"x": torch.zeros(2), "y": inside(Trap(folder / "pwned"))}
        torch.save(values, folder / name, _use_new_zipfile_serialization=not legacy)
        return folder / name

    return build


def written(name: str, data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(data())
        return folder / name

    return build


def inflating(folder: Path) -> Path:
    """A PyTorch file of 1 GB of zeros that was compressed to 1 MB."""
    torch.save({"x": torch.zeros(4)}, folder / "plain.pth")
    with (
        zipfile.ZipFile(folder / "plain.pth") as plain,
        zipfile.ZipFile(folder / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            with packed.open(name, "w") as file:
                for _ in range(64 if name.endswith("data/0") else 0):
                    file.write(bytes(16 << 20))
                if not name.endswith("data/0"):
                    file.write(plain.read(name))
    (folder / "plain.pth").unlink()
    return folder / "w.pth"  # fmt: skip


def tensors(header: Any, body: bytes = b"", *, length: int | None = None) -> Callable[[], bytes]:
    """Return safetensors bytes with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda: struct.pack("<Q", len(text) if length is None else length) + text + body


def npy() -> bytes:
    """A .npy file that claims 7 TiB."""
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def wide(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


F8 = np.dtype("f8")
RECONSTRUCT, SCALAR = np._core.multiarray._reconstruct, np._core.multiarray.scalar


def array(shape: tuple[int, ...], kind: Any = F8, data: Any = b"x", *, version: int = 1) -> Claims:
    """An array that says it has this shape, dtype and bytes."""
    return Claims(RECONSTRUCT, np.ndarray, (0,), b"b", state=(version, shape, kind, False, data))


def beside(value: Any, *, legacy: bool = False) -> Callable[[Path], Path]:
    """Return a builder of sound weights of the small student, beside which something else lies."""

    def build(folder: Path) -> Path:
        values = {"x": value, "model": small_student().model.state_dict()}
        torch.save(values, folder / "w.pth", _use_new_zipfile_serialization=not legacy)
        return folder / "w.pth"

    return build


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
PLAIN = "cannot be read as plain tensors"
NAMED = "cannot be read as plain tensors: it holds "
WEIGHTS = [
    # name, how to build it, text of the CheckpointError
    ("pickle that runs code", trap("w.pth"), NAMED + "_?io.open, which needs code"),
    ("old pickle that runs code", trap("w.pt", legacy=True), NAMED + "_?io.open, which needs code"),
    ("array of code", trap("w.pth", inside=lambda code: np.array([code], object)), NAMED + "_?io.open, which needs code"),
    ("arguments of code", trap("w.pth", inside=lambda code: argparse.Namespace(x=code)), NAMED + "_?io.open, which needs code"),
    ("kind of array of its own", beside(np.zeros(2).view(Subclass)), NAMED + "hostile.weights.Subclass, which needs code"),
    ("array into a tensor", beside(Claims(torch._utils._rebuild_device_tensor_from_numpy, array((10**6, 10**6)), torch.float32, "cpu", False)), PLAIN),
    ("array for a tensor", saved(lambda: {"pos_embed": array((10**6, 10**6))}), "pos_embed is not a tensor"),
    ("pickle called safetensors", trap("w.safetensors"), PLAIN),
    ("pickle called bin", trap("w.bin"), PLAIN),
    ("zip that inflates", inflating, "is compressed, which torch.save never does"),
    ("one number as a matrix", saved(lambda: {"pos_embed": wide(10**6, 10**6)}), "pos_embed is a view of"),
    ("positions of a million squared", saved(lambda: {"pos_embed": wide(1, 2 + 10**12, 12)}), "pos_embed is a view of"),
    ("sparse tensor", saved(lambda: {"x": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (10**12,))}), "x is sparse_coo"),
    ("tensor without memory", saved(lambda: {"x": torch.empty(10**9, 10**3, device="meta")}), "x is on device meta"),
    ("complex numbers", saved(lambda: {"x": torch.zeros(2, dtype=torch.complex64)}), "x is strided torch.complex64"),
    ("NaN", saved(lambda: {"x": torch.tensor([float("nan")])}), "holds NaN or infinity"),
    ("no tensors", saved(lambda: {"state_dict": {"a": {"b": torch.zeros(1)}}}), "holds no state dict"),
    ("numbers as names", saved(lambda: {1: torch.zeros(1)}), PLAIN),
    ("ESC in a name", saved(lambda: {"\x1b]0;x": torch.zeros(1)}), "at most 500 characters and no control characters"),
    ("ESC in a name of safetensors", written("w.safetensors", tensors({"\x1b]0;x": F32}, bytes(8))), "no control characters"),
    ("name without end", saved(lambda: {"x" * 10**6: torch.zeros(1)}), "at most 500 characters"),
    ("nothing", saved(lambda: {}), "it is empty"),
    ("a .npy of 7 TiB", written("w.pth", npy), PLAIN),
    ("a .npz", lambda folder: (np.savez(folder / "w.pth.npz", a=np.zeros(3)), folder / "w.pth.npz")[1], PLAIN),
    ("header of 8 EiB", written("w.safetensors", tensors({}, length=2**62)), PLAIN),
    ("header longer than the file", written("w.safetensors", tensors({"x": F32}, bytes(8), length=10**6)), PLAIN),
    ("deep header", written("w.safetensors", tensors(b"[" * 200_000)), PLAIN),
    ("overlapping tensors", written("w.safetensors", tensors({"x": F32, "y": F32}, bytes(8))), PLAIN),
    ("offsets past the end", written("w.safetensors", tensors({"x": F32 | {"data_offsets": [0, 2**60]}}, bytes(8))), PLAIN),
    ("shape that overflows", written("w.safetensors", tensors({"x": F32 | {"shape": [2**62, 4]}}, bytes(8))), PLAIN),
    ("negative shape", written("w.safetensors", tensors({"x": F32 | {"shape": [-2]}}, bytes(8))), PLAIN),
    ("unknown dtype", written("w.safetensors", tensors({"x": F32 | {"dtype": "OBJECT"}}, bytes(8))), PLAIN),
]  # fmt: skip


BESIDE = [
    # name of what is ignored beside sound weights
    ("array of 7 TiB", array((10**6, 10**6))),
    ("array of 7 TiB at once", Claims(RECONSTRUCT, np.ndarray, (10**6, 10**6), b"d")),
    ("array of 7 TiB by its type", Claims(np.ndarray, (10**6, 10**6))),
    ("shape that overflows", array((2**62, 2**62))),
    ("negative shape", array((-1,))),
    ("shape of texts", array(("a", None))),
    ("no bytes", array((2,), data=None)),
    ("objects as bytes", array((1,), np.dtype("O"), bytes(8))),
    ("objects that are fewer", array((10**6,), np.dtype("O"), [None])),
    ("another version", array((1,), version=10**9)),
    ("a state that is a number", Claims(RECONSTRUCT, np.ndarray, (0,), b"b", state=7)),
    ("a type that is a number", Claims(RECONSTRUCT, 7, (0,), b"b")),
    ("a table of objects", np.zeros(2, [("a", "O"), ("b", "f4", (3,))])),
    ("a dtype of 2 GiB", Claims(np.dtype, "V2147483647", False, True)),
    ("a dtype of nothing", Claims(np.dtype, "no such type", False, True)),
    ("a dtype with another state", Claims(np.dtype, "V8", False, True, state=(3, "|", F8, ("a",), {"a": (F8, 10**9)}, -1, -1, 255))),
    ("a number of one byte", Claims(SCALAR, F8, b"x")),
    ("a number of no bytes", Claims(SCALAR, F8)),
    ("an object at an address", Claims(SCALAR, np.dtype("O"), 4096)),
    ("text of wrong bytes", Claims(SCALAR, np.dtype("U4"), b"\xff" * 16)),
]  # fmt: skip


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """Return a builder of an exported folder whose configuration was changed."""

    def build(folder: Path) -> Path:
        student = small_student()
        config = copy.deepcopy(hub_config(student))
        export_model(folder / "last", student.model.state_dict(), hub_config=config)
        text = change(config)
        data = text if isinstance(text, bytes) else json.dumps(config).encode()
        (folder / "last/config.json").write_bytes(data)
        return folder / "last"

    return build


def setting(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for step in path[:-1]:
            config = config[step]
        config[path[-1]] = value

    return change


EXPORTS = [
    # name, how to build it, text of the error
    ("a billion wide", described(setting("model_args", "embed_dim", value=10**9)), "overflowed|asks for a network of"),
    ("4 GB wide", described(setting("model_args", "embed_dim", value=9216)), "asks for a network of"),
    ("a million deep", described(setting("model_args", "depth", value=10**6)), "asks for 1000000 layers"),
    ("classes without end", described(setting("model_args", "num_classes", value=2**31)), "asks for a network of|cannot be loaded"),
    ("names that are a number", described(setting("label_names", value=7)), "label_names must be a list of texts"),
    ("ESC in a name", described(setting("label_names", value=["\x1b]0;x", "b", "c"])), "without control characters"),
    ("normalisation that is text", described(setting("pretrained_cfg", "mean", value="abc")), "mean must be three numbers"),
    ("filter of lines", described(setting("pretrained_cfg", "interpolation", value="`x`\n---")), "interpolation must be"),
    ("crop of text", described(setting("pretrained_cfg", "crop_pct", value="x")), "crop_pct must be above 0"),
    ("a model of the Hub", described(setting("architecture", value="hf-hub:someone/else")), "cannot be loaded"),
    ("deep", described(lambda config: b"[" * 200_000), "not valid JSON"),
    ("of brackets", described(lambda config: b"[" + b"[]," * (5 << 20) + b"0]"), "not valid JSON: it has up to"),
    ("UTF-16", described(lambda config: json.dumps(config).encode("utf-16")), "not valid JSON"),
    ("a list", described(lambda config: b"[]"), "must hold an object"),
]  # fmt: skip


def state_with(text: Any) -> Callable[[], bytes]:
    """Return a state file with this text as its only metadata."""
    inside = text if isinstance(text, str) else json.dumps(text)
    return tensors({"__metadata__": {"deit_cli": inside}, "x": F32}, bytes(8))


STATES = [
    ("no metadata", tensors({"x": F32}, bytes(8))),
    ("no tensors", tensors({})),
    ("a pickle", lambda: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    ("deep metadata", state_with("[" * 200_000)),
    ("metadata of brackets", state_with("[" + "[]," * (3 << 20) + "0]")),
    ("NaN", state_with('{"meta": {"next_update": NaN}, "sha256": ""}')),
    ("two of a key", state_with('{"meta": {}, "meta": {}, "sha256": ""}')),
    ("a list", state_with([])),
    ("another hash", state_with({"meta": {}, "sha256": "0" * 64})),
    ("a hash that is no text", state_with({"meta": {}, "sha256": 7})),
    ("a header of 8 EiB", tensors({}, length=2**62)),
    ("offsets past the end", tensors({"x": F32 | {"data_offsets": [0, 2**60]}}, bytes(8))),
    ("canonical nonsense", lambda: canonical_json({"a": 1})),
]
