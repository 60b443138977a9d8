"""Unexpected errors: one line for the user, and a file that can be attached to a bug report."""

import os
import platform
import re
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CRASHED = 70  # exit code: EX_SOFTWARE of sysexits.h
ROOT = Path(__file__).parent.parent
OURS = ("pipeline/", "trainer/", "cli.py")
PACKAGES = (
    *("deit-cli", "torch", "torchvision", "timm", "numpy", "pyarrow", "opencv-python-headless", "pillow", "simplejpeg"),
    *("webdataset", "fsspec", "pydantic", "click", "rich"),
)
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
SECRET = re.compile("token|secret|password")
# What torch says of an error in a loader process; that traceback follows.
CAUGHT = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\nOriginal Traceback")
FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


@dataclass(frozen=True)
class Crash:
    """An unexpected error, as text that can be sent to another process.

    Attributes:
        summary: type, message and place of the error, on one line.
        traceback: the whole traceback.
    """

    summary: str
    traceback: str


def crash_of(error: BaseException) -> Crash:
    """Return the summary and the traceback of an error, with shortened paths."""
    text = "".join(traceback.format_exception(error))
    if CAUGHT.match(str(error)):
        what = str(error).rstrip().rpartition("\n")[2]
        frames = [traceback.FrameSummary(file, int(line), name) for file, line, name in FRAME.findall(str(error))]
    else:
        what = traceback.format_exception_only(error)[-1].partition("\n")[0]
        frames = list(traceback.extract_tb(error.__traceback__))
    return Crash(shortened(f"{what[:240]} ({_place(frames)})"), shortened(text))


def _place(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return the innermost line of a traceback that is in our code or in the user's code, such as a teacher module."""
    frame = ([frame for frame in frames if not _is_of_a_library(frame.filename)] or [*frames])[-1] if frames else None
    return "place unknown" if frame is None else f"{_below(frame.filename)}:{frame.lineno}, in {frame.name}"


def _is_of_a_library(filename: str) -> bool:
    if _below(filename).startswith(OURS):  # an installed deit-cli is in the folder of the libraries
        return False
    return filename.startswith((sysconfig.get_path("stdlib"), "<")) or "site-packages" in filename


def _below(filename: str) -> str:
    return filename.removeprefix(f"{ROOT}{os.sep}")


def save_report(crash: Crash, arguments: Sequence[str], settings: Mapping[str, Any]) -> Path | None:
    """Write the report into the current folder, or into the folder for temporary files if that fails.

    Args:
        crash: the error.
        arguments: arguments of the command line, without the name of the program.
        settings: option -> value, as the command parsed them.

    Returns:
        path of the report; None if neither folder can be written to.
    """
    name = f"deit-cli-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    text = _report(crash, arguments, settings)
    for folder in (Path(), Path(tempfile.gettempdir())):
        try:
            with (folder / name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return folder / name
    return None


def _report(crash: Crash, arguments: Sequence[str], settings: Mapping[str, Any]) -> str:
    sections = {
        "error": crash.summary,
        "command": shortened(" ".join(["deit-cli", *_without_secrets(arguments)])),
        "settings": "\n".join(f"{name}: {_value(name, value)}" for name, value in settings.items()),
        "versions": "\n".join([f"python {sys.version.split()[0]} on {platform.platform()}", *_versions()]),
        "launched with": "\n".join(f"{name}={os.environ[name]}" for name in LAUNCHED if name in os.environ),
        "traceback": crash.traceback,
    }
    return "\n".join(f"## {title}\n\n{text.rstrip()}\n" for title, text in sections.items() if text)


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package}: not installed")
    return found


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without the values of options that are secrets."""
    kept: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if kept and SECRET.search(kept[-1]) and kept[-1].startswith("--") and "=" not in kept[-1]:
            kept.append("HIDDEN")
        elif equals and flag.startswith("--") and SECRET.search(flag):
            kept.append(f"{flag}=HIDDEN")
        else:
            kept.append(argument)
    return kept


def _value(name: str, value: Any) -> str:
    return "HIDDEN" if value is not None and SECRET.search(name) else shortened(str(value))


def shortened(text: str) -> str:
    """Return the text with long paths cut to their last two parts, and URLs without user and query."""
    text = text.replace(f"{ROOT}{os.sep}", "").replace(str(Path.home()), "~")
    text = re.sub(r"(?<=[\s\"'(=])[^\s\"'(=]*/site-packages/", "", text)
    text = re.sub(r"(\w+://)[^\s/\"'@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s\"'?]*)\?[^\s\"')]*", r"\1", text)
    return re.sub(r"(?<![\w./~:…])(?:~|)(?:/[^\s/\"':,()]+)+(?=(?:/[^\s/\"':,()]+){2})", "…", text)
