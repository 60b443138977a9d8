"""Teachers that a program passes as objects, a network or any function that gives logits: what is known of them, and their checks."""

import copy
import io
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TeacherError, UsageError

NETWORK, FUNCTION = "module/", "callable/"  # how the names of such teachers begin in a label set
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_PRECISE = {torch.float32, torch.float64}

Answering = Callable[[Tensor], Any]  # float images [B, 3, H, W] to logits [B, C]


@dataclass(frozen=True, kw_only=True)
class GivenTeacher:
    """A network or a function that a program passes as the teacher; it can be sent to other processes (`packed`).

    Attributes:
        answer: a copy of the network on the CPU, or the function: from normalised images [B, 3, H, W] to logits [B, C].
        name: name in the label set: `module/NAME` for a network, `callable/NAME@VERSION` for a function, whose weights nobody sees.
        about: what the program says about it: any of the keys of `pipeline.teacher.loading.FUNCTION_DEFAULTS`.
    """

    answer: Answering
    name: str
    about: dict[str, Any]

    @property
    def is_network(self) -> bool:
        """Return True for an nn.Module, whose weights can be hashed, moved and compiled."""
        return isinstance(self.answer, nn.Module)


def given_teacher(
    answer: Answering, *, name: str | None = None, version: str | None = None, about: dict[str, Any]
) -> GivenTeacher:
    """Return a network or a function as a teacher.

    A network is copied: labelling moves, freezes and switches only the copy to evaluation mode.

    Args:
        answer: function from normalised images, float [B, 3, H, W], to logits [B, C]; an nn.Module is one.
        name: name for the label set; None: the name of the network's class. A function must have one.
        version: which weights and code the function has; None only for a network, whose weights are hashed.
        about: see `GivenTeacher`.

    Raises:
        UsageError: the object cannot be called, or a function has no name or no version.
        TeacherError: the network is wrapped, or cannot be copied.
    """
    for what, text in (("name", name), ("version", version)):
        if text is not None and not (isinstance(text, str) and _NAME.fullmatch(text)):
            raise UsageError(
                f"{what} must be up to 200 letters, digits and . _ + - and begin with a letter or digit, got {text!r}"
            )
    stated = "" if version is None else f"@{version}"
    if isinstance(answer, type) or not callable(answer):
        got = (
            f"the class {answer.__name__}: pass an object of it" if isinstance(answer, type) else type(answer).__name__
        )
        raise UsageError(f"a teacher must be a name, a torch.nn.Module or a function from images to logits, got {got}")
    if isinstance(answer, nn.Module):
        if not answer.state_dict() and version is None:
            raise _without_version(f"no weights of {type(answer).__name__} can be seen", f"version={version!r}")
        name = f"{NETWORK}{name or type(answer).__name__}{stated}"
        return GivenTeacher(answer=_copied(answer, name), name=name, about=about)
    if name is None or version is None:
        raise _without_version("no weights of a function can be seen", f"name={name!r} and version={version!r}")
    return GivenTeacher(answer=answer, name=f"{FUNCTION}{name}{stated}", about=about)


def _without_version(why: str, got: str) -> UsageError:
    return UsageError(
        f"{why} and hashed, so the label set records what you say of the teacher: pass name= and version=, got {got}",
        fix="Change the version whenever its answers change; or pass a torch.nn.Module that holds the weights",
    )


def names_given(name: str) -> bool:
    """Return whether a teacher's name in a label set is that of an object, which only the program that passed it has."""
    return name.startswith((NETWORK, FUNCTION))


def _copied(network: nn.Module, name: str) -> nn.Module:
    """Return a copy of a network on the CPU."""
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(network, "_orig_mod"):
        raise TeacherError(
            f"teacher {name} is wrapped by {type(network).__name__}",
            fix="Pass the network inside it; compile=True compiles it, and every GPU is used without a wrapper",
        )
    try:
        return copy.deepcopy(network).to("cpu")
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TeacherError(
            f"teacher {name} cannot be copied: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="Build it anew, and load its state dict",
        ) from error


def packed(given: GivenTeacher) -> bytes:
    """Return a given teacher as bytes for other processes; `pickle.loads` there unpacks it.

    Raises:
        UsageError: it cannot be pickled, as lambdas and functions inside functions cannot, or other processes cannot import it.
    """
    buffer = io.BytesIO()
    try:
        _Packer(buffer, pickle.HIGHEST_PROTOCOL).dump(given)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"teacher {given.name} cannot be sent to several teacher processes: {' '.join(str(error).split())[:300]}",
            fix="Define it at the top level of a module or script, or pass processes=1 to use one device in this process",
        ) from error
    return buffer.getvalue()


class _Packer(pickle.Pickler):
    """Pickler that refuses what is defined in a notebook, where other processes cannot import it."""

    def reducer_override(self, obj: Any) -> Any:
        if (
            isinstance(obj, (type, FunctionType))
            and obj.__module__ == "__main__"
            and not hasattr(sys.modules["__main__"], "__file__")
        ):
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in a notebook or an interactive session, which other processes cannot import"
            )
        return NotImplemented


class CheckedAnswers(nn.Module):
    """A given network or function, each of whose answers is checked before it is used."""

    def __init__(self, given: GivenTeacher) -> None:
        super().__init__()
        self.answer = copy.deepcopy(given.answer) if given.is_network else given.answer
        self.name = given.name
        self.num_classes: int | None = None  # of the first answer

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of images [B, 3, H, W].

        Raises:
            TeacherError: the answer has another type, shape, dtype or device, or not the number of classes of the first one.
        """
        logits = self.answer(images)
        self._check(logits, images)
        if self.num_classes is None:
            self.num_classes = logits.shape[1]
        return logits

    def _check(self, logits: Any, images: Tensor) -> None:
        wanted = f"teacher {self.name} must answer {len(images)} images with one tensor of logits [{len(images)},"
        if not isinstance(logits, Tensor):
            raise TeacherError(f"{wanted} C], got {_kind(logits)}", fix="Return the logits alone, as a torch.Tensor")
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] != (self.num_classes or logits.shape[1]):
            raise TeacherError(f"{wanted} {self.num_classes or 'C'}], got {list(logits.shape)}")
        if logits.device != images.device:
            raise TeacherError(
                f"teacher {self.name} must answer on the device of the images, {images.device}, got logits on {logits.device}",
                fix='Return logits.to(images.device), or pass device="cpu"',
            )
        if not logits.is_floating_point():
            raise TeacherError(f"teacher {self.name} must answer with floating-point logits, got {logits.dtype}")
        if logits.dtype not in _PRECISE and not torch.is_autocast_enabled(images.device.type):
            raise TeacherError(
                f"teacher {self.name} must answer float32 images with float32 logits, got {logits.dtype}: the label set records the"
                " precision of the forward pass",
                fix='Compute in float32; dtype="bfloat16" or "float16" runs a network in that precision by autocast',
            )


def _kind(answer: Any) -> str:
    parts: Sequence[Any] = answer if isinstance(answer, (tuple, list)) else ()
    inside = f" of {', '.join(type(part).__name__ for part in parts[:4])}" if parts else ""
    return f"{type(answer).__name__}{inside}"


def check_trial(checked: CheckedAnswers, images: Tensor) -> int:
    """Ask a given teacher twice for the same images, and return its number of classes.

    Args:
        checked: the teacher, on the device of the images, in evaluation mode.
        images: normalised, float32 [B, 3, H, W], no two the same.

    Raises:
        TeacherError: the answer is not finite, looks like probabilities, or is another one the second time.
    """
    with torch.inference_mode():
        logits, again = (checked(images).float() for _ in range(2))
    name = checked.name
    if not logits.isfinite().all():
        raise TeacherError(f"teacher {name} answered NaN or infinity for a trial image", fix="Check its weights")
    sums = logits.sum(dim=1)
    if logits.shape[1] > 1 and (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise TeacherError(
            f"teacher {name} must answer with logits, got probabilities: none is negative, and each row sums to 1",
            fix="Return the logits, or the logarithm of the probabilities, whose softmax is the same",
        )
    far = (logits - again).abs().max()
    if far > 1e-2 * logits.abs().max():  # rounding on a GPU changes far less
        raise TeacherError(
            f"teacher {name} answered the same images twice with other logits, {far:.2g} apart",
            fix="Switch the network to evaluation mode (dropout, batch norm), and seed what is random",
        )
    return logits.shape[1]
