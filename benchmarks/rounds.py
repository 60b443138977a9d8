"""Shared by the benchmarks: options, medians over rounds, the machine's description, results written as soon as they are there."""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from photographs import write_source

from pipeline.machine.threads import usable_cores

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "simplejpeg", "pyarrow")


def options(doc: str | None, *, rounds: int | None = None, out_required: bool = True) -> argparse.ArgumentParser:
    """Return a parser with what the benchmarks have in common.

    Args:
        doc: description, the script's docstring.
        rounds: default of --rounds; None: the script measures no rounds.
        out_required: whether --out must be passed.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="rounds in which what is compared alternates")
    parser.add_argument("--machine", help="name of this machine; default its processor and versions")
    parser.add_argument("--out", type=Path, required=out_required, help="JSON to write")
    return parser


def medians(rounds: Sequence[Mapping[str, float]], digits: int = 1) -> dict[str, float]:
    """Return the median of each value over the rounds."""
    return {name: round(statistics.median(each[name] for each in rounds), digits) for name in rounds[0]}


def ratios(rounds: Sequence[Mapping[str, float]], to: str, digits: int = 2) -> dict[str, float]:
    """Return for each value the median of its ratio to one of them, each taken within a round."""
    return {name: round(statistics.median(each[name] / each[to] for each in rounds), digits) for name in rounds[0]}


def machine() -> dict[str, Any]:
    """Return processor, cores, GPU, and the versions of Python and the libraries."""
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def gpu_facts() -> dict[str, Any]:
    """Return what the driver says of the first GPU, and torch's CUDA versions; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    fields = "driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.sm,power.limit"
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    said = dict(zip(fields.split(","), map(str.strip, asked.stdout.splitlines()[0].split(",")), strict=False))
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": said,
    }


@dataclass(kw_only=True)
class Job:
    """One measurement with a time limit: its inputs, and its results, in a JSON file that is whole after every note.

    Attributes:
        seconds: that it may take.
        part: file of the results; None: they are only kept and printed.
        work: folder for large files, which later jobs find there again.
        out: folder for files that are to be kept beside the results.
        photographs: folder with a WebDataset tar of JPEGs and classes; None: made-up images.
        cifar10: folder with CIFAR-10 as Parquet; None: there is none.
        rehearse: whether everything is of toy size, to see that it runs.
        found: results, those of an earlier run that need not be measured again included.
        began: when the time began, on `time.monotonic`.
    """

    seconds: float
    work: Path
    out: Path
    part: Path | None = None
    photographs: Path | None = None
    cifar10: Path | None = None
    rehearse: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def card(self) -> str:
        """The GPU's name, or cpu."""
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    def note(self, name: str, value: Any) -> None:
        """Keep a result, print it, and write all of them."""
        self.found[name] = value
        print(f"[{time.monotonic() - self.began:.1f} s] {name}", json.dumps(value, default=str), flush=True)
        if self.part is not None:
            write_json(self.part, self.found)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.began + self.seconds - time.monotonic()

    def lacks(self, name: str, seconds: float) -> bool:
        """Return whether a result is to be measured: it is not there, and there is time for it, else it is left out."""
        return name not in self.found and self.has(seconds, name)

    def has(self, seconds: float, what: str) -> bool:
        """Return whether so much time is left (in a rehearsal always); note what is left out otherwise."""
        if self.rehearse or self.left() >= seconds:
            return True
        self.note("left_out", [*self.found.get("left_out", ()), what])
        return False

    def source(self, count: int) -> str:
        """Return a source of so many photographs, whole mix blocks in tars; written once."""
        folder = self.work / f"photographs-{count}"
        return str(folder) if folder.is_dir() else write_source(folder, count, self.photographs)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(value, indent=1, default=str) + "\n")
    draft.replace(path)
