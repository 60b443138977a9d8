"""Trials in a separate process: imports of packages, the GPUs that torch sees, and comparison of decoders.

A broken package may raise anything, print anything, or end the interpreter. So the process prints a marked JSON line before
and after each trial, which shows the reader during which trial the process ended.
"""

import contextlib
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Trial:
    """The result of one trial.

    Attributes:
        name: name of the trial, as for `try_all`.
        result: value that it returned; None if it failed.
        error: reason of the failure, one line.
    """

    name: str
    result: Any
    error: str | None


def try_all(names: Sequence[str], *, timeout_s: float = TIMEOUT_S) -> list[Trial]:
    """Run trials in one process, and the remaining trials in a new one if a trial ends it; return the results.

    Args:
        names: modules to import, or `module:function` to call, followed by a list of arguments in JSON.
        timeout_s: time limit of a process, in seconds.
    """
    trials: list[Trial] = []
    while left := names[len(trials) :]:
        trials += _try_some(left, timeout_s)
    return trials


def fresh_environment() -> dict[str, str]:
    """Return this environment, changed so that imports find this copy of the project in any working directory."""
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _try_some(names: Sequence[str], timeout_s: float) -> list[Trial]:
    """Return the finished trials, and the one during which the process ended; at least one trial."""
    mark = secrets.token_hex(16)  # distinguishes our lines from other output of a module
    command = [sys.executable, "-P", "-c", "from pipeline.doctor.probing import main; main()", mark, *names]
    late = False
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=fresh_environment(),
    ) as process:
        try:
            told, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
            told, errors = process.communicate()
    trials, begun = _parse(told.splitlines(), mark)
    if len(trials) == len(names) and not late:
        return trials
    at = begun or names[min(len(trials), len(names) - 1)]
    reason = f"it took more than {timeout_s:.0f} s" if late else _how_it_ended(process.returncode, errors)
    return [*trials[: len(names) - 1], Trial(at, None, reason)]


def _parse(lines: Iterable[str], mark: str) -> tuple[list[Trial], str | None]:
    """Return the finished trials, and the name of a trial that began and did not finish."""
    trials: list[Trial] = []
    begun: str | None = None
    for line in lines:
        if not line.startswith(mark):
            continue
        told = json.loads(line.removeprefix(mark))
        if "began" in told:
            begun = told["began"]
        else:
            begun = None
            trials.append(Trial(told["name"], told["result"], told["error"]))
    return trials, begun


def _how_it_ended(code: int, errors: str) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it ended the interpreter with {signal.Signals(-code).name}"
    last = errors.strip().splitlines()[-1:] or [""]
    return f"it ended the interpreter with exit code {code}{': ' if last[0] else ''}{last[0][:200]}"


def main() -> None:
    """Run the trials named on the command line, and print a line for each, beginning with the mark given before them."""
    mark, *names = sys.argv[1:]
    for name in names:
        _tell(mark, {"began": name})
        result, error = None, None
        try:
            result = _call(name) if ":" in name else _import(name)
        except BaseException as failure:  # a module may raise anything, also SystemExit
            error = first_line(failure)
        _tell(mark, {"name": name, "result": result, "error": error})


def first_line(error: BaseException) -> str:
    """Return an error as one short line, with its type if the text alone is unclear."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return text[:300] if isinstance(error, ImportError) and text else f"{kind}: {text[:300]}" if text else kind


def _tell(mark: str, told: dict[str, Any]) -> None:
    # A module may have printed an unfinished line, or replaced sys.stdout.
    os.write(1, f"\n{mark}{json.dumps(told)}\n".encode())


def _import(name: str) -> str:
    return str(getattr(importlib.import_module(name), "__file__", None))


def _call(name: str) -> Any:
    module, _, call = name.partition(":")
    function, _, arguments = call.partition(" ")
    return getattr(importlib.import_module(module), function)(*json.loads(arguments or "[]"))


def see_gpus() -> dict[str, Any]:
    """Return the GPUs that torch sees, and the CUDA or ROCm version that it is built for; `others` are Intel's and Apple's."""
    torch: Any = importlib.import_module("torch")
    found: dict[str, Any] = {"built_for": torch.version.cuda or torch.version.hip, "rocm": bool(torch.version.hip)}
    found |= {"devices": [], "others": []}
    chosen = torch.accelerator.current_accelerator(check_available=True)
    if chosen is not None and chosen.type == "mps":
        found["others"] = [
            {"kind": "mps", "name": "Apple GPU", "memory": torch.mps.recommended_max_memory(), "bf16": False}
        ]
    if chosen is not None and chosen.type == "xpu":
        properties = [torch.xpu.get_device_properties(index) for index in range(torch.xpu.device_count())]
        found["others"] = [
            {
                "kind": f"xpu:{index}",
                "name": each.name,
                "memory": each.total_memory,
                "bf16": torch.xpu.is_bf16_supported(),
            }
            for index, each in enumerate(properties)
        ]
    found["available"] = bool(torch.cuda.is_available())
    for index in range(torch.cuda.device_count() if found["available"] else 0):
        device = torch.cuda.get_device_properties(index)
        found["devices"].append(
            {
                "name": device.name,
                "memory": device.total_memory,
                "capability": f"{device.major}.{device.minor}",
                "bf16": device.major >= 8,
            }
        )
    return found


def compare_decoders() -> dict[str, Any]:
    """Decode a smooth JPEG, a PNG and a WebP with each decoder, and return the differences from Pillow.

    Returns:
        `versions`, `formats` that Pillow reads, `region` (path of the library or None), and `differences`: for each
        decoder the maximum difference of a pixel from Pillow's, 0 if all are equal; None if it did not decode.
    """
    import io

    import numpy as np
    import simplejpeg
    from PIL import Image, features

    from pipeline.images import turbojpeg
    from pipeline.images.decode import decode

    y, x = np.mgrid[0:208, 0:256]
    smooth = [127 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 7 - c) for c in range(3)]
    pixels = np.clip(np.stack(smooth, axis=2), 0, 255).astype(np.uint8)

    def encoded(kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, **options)
        return buffer.getvalue()

    def far(found: Any, expected: Any) -> int:
        return int(np.abs(found.astype(int) - expected).max()) if found.shape == expected.shape else 255

    jpeg = encoded("JPEG", quality=90, subsampling=2)
    pillow = np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    exact = simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, strict=True)
    differences: dict[str, int | None] = {"simplejpeg": far(exact, pillow)}
    if turbojpeg.is_installed():
        part = turbojpeg.decode_region(jpeg, (60, 70, 90, 100))
        differences["region"] = None
        if part is not None:
            found, top, left = part
            height, width = found.shape[:2]
            inner = (slice(60 - top, 150 - top), slice(70 - left, 170 - left))
            differences["region"] = far(found[inner], pillow[top : top + height, left : left + width][inner])
    formats = {"PNG": "zlib", "WEBP": "webp"}
    for kind, feature in formats.items():
        if features.check(feature):
            options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
            differences[kind] = far(decode(encoded(kind, **options), key=kind), pixels)
    return {
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "formats": ["JPEG", *(kind for kind, feature in formats.items() if features.check(feature))],
        "region": turbojpeg.is_installed(),
        "differences": differences,
    }


def try_kernel() -> dict[str, Any]:
    """Render a view with each instruction set of the compiled kernel that this processor has.

    Returns:
        `trouble`: why it cannot be used, and the way out; None if it can. Then `sets`, the names of its instruction sets, the best one last,
        and `differing`, those whose pixels differ from the first one's.
    """
    import numpy as np

    from pipeline.pixels import kernel
    from pipeline.views.recipe import PRESETS
    from pipeline.views.view import draw_view

    if trouble := kernel.trouble():
        return {"trouble": trouble}
    recipe, views = PRESETS["deit"].with_fields(img_size=64, aa="rand-m9-mstd0.5-inc1-n4"), range(32)
    y, x, channel = np.ogrid[:90, :120, :3]
    image = np.ascontiguousarray((x * (channel + 2) + y * 3 + x * y // 16 + 40 * channel) % 256, np.uint8)
    drawn = [draw_view(recipe, "kernel", view, height=90, width=120) for view in views]
    sets = kernel.INSTRUCTION_SETS[: kernel.best_level() + 1]
    out = np.empty((len(sets), len(views), 64, 64, 3), np.uint8)
    for level in range(len(sets)):
        kernel.render_views(image, drawn, list(out[level]), level=level)
    differing = [name for name, pixels in zip(sets, out, strict=True) if not np.array_equal(pixels, out[0])]
    return {"trouble": None, "sets": sets, "differing": differing}
