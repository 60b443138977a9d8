"""FKD's soft labels (Shen & Xing 2022, arXiv 2112.01528): one file for each image, written by torch.save.

The layout is that of the generator that was published with the paper, github.com/szq0214/FKD, files
FKD/FKD_SLG/generate_soft_label.py and FKD/FKD_SLG/utils.py. `class/name.tar` is not a tar, but a pickle in a zip: a list of
three NumPy arrays for N crops of one image,

    coords   float [N, 4]   top, left, height, width, as shares of the image's height, width, height, width
    flip     bool [N]       whether the crop was flipped
    labels                  int [N]            `hard`
                            float [N, 2]       `smoothing`: class, probability
                            float [N, 2, K]    `marginal_smoothing_k5`, `marginal_renorm_k5`, `..._k10`: classes, probabilities
                            float [N, C]       all probabilities

A pickle is a program, so it is read by torch.load(weights_only=True), and only after its opcodes are checked: it may name
only the functions that make up a NumPy array. Our stand-ins replace these functions, and can only build an array from its
bytes.
"""

import codecs
import io
import logging
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ImportedLabelsError, SourceError
from pipeline.exchange.foreign import ForeignRows, check_answers
from pipeline.storage.atomic import refusals_named
from pipeline.text import check_name, count

log = logging.getLogger("deit_cli.fkd")

ENDING = ".tar"
MAX_FILE_BYTES = 64 * 2**20  # 500 crops of 21,841 classes in float32 are 44 MB
MAX_CROPS = 100_000
LARGEST_EXACT = {"float16": 2**11, "float32": 2**24, "float64": 2**53}  # whole numbers up to this one are exact

# Names in numpy.ndarray.__reduce__, in NumPy 1 and 2, and the function that encodes bytes in a pickle of protocol 2.
_NAMES = frozenset(
    {
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray _reconstruct",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    }
)
_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINUNICODE"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD"),
    }
)
_KINDS = {code: np.dtype(code) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "b1")}
_LONGEST_CODEC = 40


# Exceptions from reading a damaged zip or pickle.
_DAMAGED = (
    *(ValueError, TypeError, AttributeError, LookupError, RuntimeError, AssertionError, EOFError, MemoryError, OSError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


class _Refused(Exception):
    """The reason why a pickle is not loaded."""


class _Kind:
    """A stand-in for numpy.dtype: one of a few number types, in a byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _KINDS:
            raise ValueError(f"arrays must be of plain numbers, got {code!r}")
        self.dtype = _KINDS[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"a byte order must be < or >, got {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """A stand-in for numpy.ndarray: its bytes, number type and shape; the bytes must fill the shape."""

    value: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes) or not all(type(n) is int for n in shape):
            raise ValueError("an array must have a shape, a number type and bytes")
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_columns else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


_STAND_INS = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_Array, "numpy.ndarray"),
    (_Kind, "numpy.dtype"),
]


def list_files(folder: Path) -> list[Path]:
    """Return the label files below a folder, also through links, sorted by path.

    Raises:
        ImportedLabelsError: the folder has no label files.
        StorageError: a folder cannot be listed.
    """
    found: list[Path] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()  # folders, to detect a circle of links
    with refusals_named(folder):
        for place, below, names in os.walk(folder, onerror=_raise, followlinks=True):
            stat = os.stat(place)
            if (stat.st_dev, stat.st_ino) in seen:
                below.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            below.sort()
            for name in sorted(names):
                (found if name.endswith(ENDING) else others).append(Path(place) / name)
    if not found:
        raise ImportedLabelsError(
            f"{folder}: no {ENDING} file below this folder. FKD's labels are class/name.tar: pass the folder that contains the class folders"
        )
    if others:
        more = f", and so are {count(len(others) - 1, 'other')}" if others[1:] else ""
        log.warning("%s is not a %s file and is left out%s", others[0], ENDING, more)
    return found


def _raise(error: OSError) -> None:
    raise error


def read_file(path: Path, folder: Path, *, num_classes: int) -> ForeignRows:
    """Read the labels of one image, and return them.

    Args:
        path: label file.
        folder: imported folder; the key is the path below it, without the file extension.
        num_classes: C.

    Returns:
        one row for each crop; `more` has crop_top, crop_left, crop_height, crop_width (float32) and flip (bool).

    Raises:
        ImportedLabelsError: the file is not in FKD's layout, or its values cannot be a teacher's answers.
    """
    key = _key(path, folder)
    coords, flip, labels = _checked_arrays(path, _load(path))
    hard, index, prob = _answers(path, labels, num_classes)
    boxes = ("crop_top", "crop_left", "crop_height", "crop_width")
    more: dict[str, NDArray[Any]] = {name: coords[:, i].astype(np.float32) for i, name in enumerate(boxes)}
    views = np.arange(len(hard), dtype=np.uint32)
    return ForeignRows([key] * len(hard), views, hard, index, prob, more | {"flip": flip.astype(bool)})


def _key(path: Path, folder: Path) -> str:
    key = path.relative_to(folder).with_suffix("").as_posix()
    try:
        return check_name(key, f"the name of {path.name!r}")
    except SourceError as error:
        raise ImportedLabelsError(f"{folder}: {error}") from error


def _load(path: Path) -> list[Any]:
    """Return the three values of a file, with arrays as NumPy arrays."""
    with refusals_named(path):
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ImportedLabelsError(
                f"{path}: a file of labels may have at most {MAX_FILE_BYTES} bytes, this one has {size}"
            )
        data = path.read_bytes()
    try:
        program = _pickle_of(data)
        _look_through(program)
        with torch.serialization.safe_globals(_STAND_INS):  # pyright: ignore[reportArgumentType]
            values = torch.load(_packed_again(program), map_location="cpu", weights_only=True)
        return [value.value if isinstance(value, _Array) else value for value in values]
    except _DAMAGED as error:
        text = next(iter(str(error).splitlines()), "")[:200]
        raise ImportedLabelsError(
            f"{path}: these {size} bytes were not written by torch.save, or are damaged: {text or type(error).__name__}",
            fix="Fetch the file again",
        ) from error
    except _Refused as refused:
        raise ImportedLabelsError(
            f"{path}: {refused}", fix="The file is not loaded, because a pickle can run code"
        ) from None


def _pickle_of(data: bytes) -> bytes:
    """Return the pickle in a file of torch.save; refuse a zip that is compressed or holds more bytes than the file."""
    if data[:4] != b"PK\x03\x04":
        if data[:1] == b"\x80":
            raise _Refused(
                "it was written by a torch before 1.6, or by pickle itself. If you trust it, load it and torch.save it again"
            )
        raise ValueError("it does not begin like a zip file")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed or sum(member.file_size for member in members) > len(data):
            raise _Refused(f"it is compressed ({', '.join(packed)[:100]}), which torch.save never does")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"it must have one pickle, it has {len(pickles)}")
        return archive.read(pickles[0])


def _packed_again(program: bytes) -> io.BytesIO:
    """Return a file of torch.save with only this pickle: torch and Python might find different pickles in the same zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", program), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"labels/{name}", content)
    file.seek(0)
    return file


def _look_through(program: bytes) -> None:
    """Refuse a pickle that does anything but put NumPy arrays into lists. The pickle is not run."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in _OPCODES:
            raise _Refused(f"its pickle uses {opcode.name}, which arrays do not need")
        if opcode.name == "GLOBAL" and argument not in _NAMES:
            raise _Refused(f"its pickle names {'.'.join(str(argument).split(' '))}")
        if opcode.name == "BINUNICODE" and isinstance(argument, str) and len(argument) <= _LONGEST_CODEC:
            _refuse_codec(argument)


def _refuse_codec(text: str) -> None:
    """Refuse codecs other than latin1, which encodes bytes as text; some other codecs expand a short text."""
    try:
        name = codecs.lookup(text).name
    except (LookupError, ValueError, UnicodeError):
        return
    if name != "iso8859-1":
        raise _Refused(f"its pickle encodes with {name}")


def _checked_arrays(path: Path, values: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(each, np.ndarray) for each in values):
        raise ImportedLabelsError(
            f"{path}: it must hold three arrays, coordinates, flips and labels; it holds {_kinds(values)}"
        )
    coords, flip, labels = values
    crops = len(labels) if labels.ndim else 0
    if not 1 <= crops <= MAX_CROPS:
        raise ImportedLabelsError(f"{path}: an image must have 1 to {MAX_CROPS} crops, it has {crops}")
    if coords.shape != (crops, 4) or coords.dtype.kind != "f":
        raise ImportedLabelsError(
            f"{path}: coordinates must be floating [{crops}, 4], they are {coords.dtype} {list(coords.shape)}"
        )
    if flip.shape != (crops,) or not np.isin(flip, (0, 1)).all():
        raise ImportedLabelsError(
            f"{path}: flips must be {crops} values, each true or false, they are {flip.dtype} {list(flip.shape)}"
        )
    # In float16, a box at the edge of the image may seem to end slightly outside it.
    box = coords.astype(np.float64)
    inside = (box >= 0).all(1) & (box[:, 2:] > 0).all(1) & (box[:, :2] + box[:, 2:] <= 1.002).all(1)
    if not inside.all():
        crop = int((~inside).argmax())
        raise ImportedLabelsError(
            f"{path}: crop {crop} must be inside the image, its top, left, height and width are the shares {box[crop].tolist()}"
        )
    return coords, flip, labels


def _kinds(values: Any) -> str:
    if not isinstance(values, list):
        return type(values).__name__
    return (
        ", ".join(f"{v.dtype} {list(v.shape)}" if isinstance(v, np.ndarray) else type(v).__name__ for v in values[:4])
        or "nothing"
    )


def _answers(
    path: Path, labels: NDArray[Any], num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.floating]]:
    """Return hard int [N], index int [N, K], prob floating [N, K] of any of the four kinds of labels."""
    if labels.dtype.kind in "iu" and labels.ndim == 1:
        hard = labels.astype(np.int64)
        _refuse_impossible(path, hard[:, None], np.ones((len(hard), 1), np.float32), num_classes)
        return hard, np.empty((len(hard), 0), np.int64), np.empty((len(hard), 0), np.float32)
    shaped = labels.ndim == 2 or (labels.ndim == 3 and labels.shape[1] == 2)
    if labels.dtype.kind != "f" or not shaped or not labels.size:
        raise ImportedLabelsError(
            f"{path}: labels must be int [N], or floating [N, 2], [N, 2, K] or [N, {num_classes}], they are {labels.dtype} {list(labels.shape)}"
        )
    with np.errstate(over="ignore"):  # infinity is refused below
        native = labels.astype(np.float16 if labels.dtype.itemsize == 2 else np.float32)
    if labels.ndim == 2 and labels.shape[1] == num_classes > 2:
        order = np.argsort(-native.astype(np.float32), axis=1, kind="stable")
        prob = np.take_along_axis(native, order, axis=1)
    elif labels.ndim == 2 and labels.shape[1] != 2:
        raise ImportedLabelsError(
            f"{path}: it has probabilities of {labels.shape[1]} classes, not of {num_classes}: pass --num-classes {labels.shape[1]}"
        )
    else:
        pairs = labels[:, :, None] if labels.ndim == 2 else labels
        order = _whole(path, pairs[:, 0], labels.dtype)
        prob = native.reshape(pairs.shape)[:, 1]
    _refuse_impossible(path, order, prob, num_classes)
    return order[:, 0], order, np.minimum(prob, prob.dtype.type(1))


def _refuse_impossible(path: Path, index: NDArray[Any], prob: NDArray[np.floating], num_classes: int) -> None:
    if problem := check_answers(index, prob, num_classes):
        raise ImportedLabelsError(f"{path}: crop {problem[0]}: {problem[1]}")


def _whole(path: Path, classes: NDArray[np.floating], kind: np.dtype[Any]) -> NDArray[np.int64]:
    """Return classes that were stored together with probabilities as whole numbers."""
    if not np.isfinite(classes).all() or (classes != np.rint(classes)).any():
        raise ImportedLabelsError(f"{path}: classes must be whole numbers, they begin {classes.ravel()[:5].tolist()}")
    largest, exact = int(np.abs(classes).max()), LARGEST_EXACT[kind.newbyteorder("=").name]
    if largest > exact:
        raise ImportedLabelsError(
            f"{path}: class {largest} is stored in {kind.name}, which rounds whole numbers above {exact}:"
            " the class is lost",
            fix="Import labels that were stored in float32",
        )
    return classes.astype(np.int64)
