"""Are views the same, whatever renders them? Drawn views of photographs, rendered in every way that a CPU knows, compared to the bit.

    python benchmarks/identity.py --data imagenet-sample --out benchmarks/results/identity.json

Every second view is of the recipe `deit`, the others have `--interpolation random` and three operations of RandAugment. What renders:

    kernel       the compiled kernel, with each instruction set of this processor
    torch        plain torch operations, in processes in which ATEN_CPU_CAPABILITY chooses torch's instruction set
    triton       the GPU's kernels, in Triton's interpreter, which is slow: few views, and small ones
    reference    docs/views-v2.md in slow and plain Python (tests/support/defined_views.py): some of the views

Each is compared with the kernel of the best instruction set, by a hash of every view. The first view that differs is named with its
parameters, and the exit code is 1. A GPU is compared by `gpu.py --phases views`. It takes about half an hour on one core.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from photographs import read_photos
from rounds import machine, options, write_json

from pipeline.images.decode import decode
from pipeline.pixels import batched, kernel
from pipeline.pixels.packed import packed, records
from pipeline.pixels.render import Pixels
from pipeline.settings.files import load_recipe
from pipeline.views.view import View, draw_view

HERE = Path(__file__).resolve()
CAPABILITIES = ("default", "avx2", "avx512")  # those of torch, for ATEN_CPU_CAPABILITY
OTHER = {"interpolation": "random", "aa": "rand-m9-mstd0.5-inc1-n3"}
SMALL = 24  # pixels of a view in Triton's interpreter
Renderer = Callable[[Pixels, Sequence[View]], Iterable[Pixels]]


@dataclass(frozen=True, eq=False)
class Views:
    """Drawn views of photographs: view i is of photograph i modulo their number.

    Attributes:
        photos: decoded photographs, uint8 [H, W, 3].
        count: number of views.
        size: height and width of the views.
    """

    photos: Sequence[Pixels]
    count: int
    size: int

    def of_photo(self, number: int) -> list[View]:
        """Draw the views of a photograph."""
        height, width = self.photos[number].shape[:2]
        views = range(len(range(number, self.count, len(self.photos))))
        return [
            draw_view(_recipe(self.size, view % 2), str(number), view, height=height, width=width) for view in views
        ]

    def digests(self, render: Renderer) -> list[str]:
        """Render the views, and return a hash of each."""
        found = [""] * self.count
        for number, photo in enumerate(self.photos):
            if views := self.of_photo(number):
                found[number :: len(self.photos)] = [_digest(pixels) for pixels in render(photo, views)]
        return found


@cache
def _recipe(size: int, other: int) -> Any:
    return load_recipe("deit", {"img_size": size} | (OTHER if other else {}))


def _digest(pixels: Pixels) -> str:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()


# --- what renders -------------------------------------------------------------------------------------------------


def with_kernel(level: int) -> Renderer:
    def render(photo: Pixels, views: Sequence[View]) -> Iterable[Pixels]:
        out = list(np.empty((len(views), views[0].img_size, views[0].img_size, 3), np.uint8))
        kernel.render_views(photo, views, out, level=level)
        return out

    return render


def with_triton(photo: Pixels, views: Sequence[View]) -> Iterable[Pixels]:
    """Render with the GPU's kernels on the CPU; the interpreter is chosen by TRITON_INTERPRET=1."""
    height, width = photo.shape[:2]
    pixels = torch.from_numpy(photo.reshape(-1))
    made = records(packed(view, height=height, width=width) for view in views)
    return batched.render_batch(pixels, made, kernels="triton").numpy()


def by_definition(photo: Pixels, views: Sequence[View]) -> Iterable[Pixels]:
    sys.path.append(str(HERE.parent.parent / "tests"))
    defined = importlib.import_module("support.defined_views")
    return [defined.render_by_definition(photo, view) for view in views]


RENDERERS: dict[str, Renderer] = {"torch": batched.render_views, "triton": with_triton, "reference": by_definition}


# --- comparison ---------------------------------------------------------------------------------------------------


def compared(views: Views, name: str, found: list[str], expected: list[str], seconds: float) -> dict[str, Any]:
    """Count the views that differ from the expected ones, and name the first."""
    differing = [number for number, both in enumerate(zip(found, expected, strict=True)) if both[0] != both[1]]
    result: dict[str, Any] = {
        "views": views.count,
        "size": views.size,
        "differ": len(differing),
        "seconds": round(seconds, 1),
    }
    if differing:
        photo, view = differing[0] % len(views.photos), differing[0] // len(views.photos)
        result["first"] = {"photograph": photo, "view": view, "parameters": repr(views.of_photo(photo)[view])}
    print(
        f"{name:32}{views.count:8} views of {views.size:3} pixels, {len(differing)} differ, {seconds:.1f} s", flush=True
    )
    return result


def in_process(
    args: argparse.Namespace, name: str, views: Views, **environment: str
) -> tuple[list[str], dict[str, Any]]:
    """Render in a process of its own with these variables; return the hashes, and what the process says of itself."""
    command = [sys.executable, str(HERE), "--data", str(args.data), "--photographs", str(args.photographs)]
    command += ["--out", str(args.out), "--renderer", name, "--views", str(views.count), "--size", str(views.size)]
    paths = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths} | environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} with {environment} failed:\n{done.stderr}")
    said = json.loads(done.stdout)
    return said.pop("digests"), said


def compare_all(args: argparse.Namespace, photos: Sequence[Pixels]) -> dict[str, dict[str, Any]]:
    """Render all views in every way, and compare."""
    best, found = kernel.best_level(), {}
    whole, some = Views(photos, args.views, args.size), Views(photos, args.reference, args.size)
    few = Views(photos, args.interpreted, SMALL)
    expected = {views: views.digests(with_kernel(best)) for views in (whole, some, few)}

    def add(name: str, views: Views, render: Callable[[], tuple[list[str], dict[str, Any]]]) -> None:
        began = time.monotonic()
        digests, about = render()
        found[name] = compared(views, name, digests, expected[views], time.monotonic() - began) | about

    for level in range(best + 1):
        add(
            f"kernel, {kernel.INSTRUCTION_SETS[level]}",
            whole,
            lambda level=level: (whole.digests(with_kernel(level)), {}),
        )
    add("triton, interpreted", few, lambda: in_process(args, "triton", few, TRITON_INTERPRET="1"))
    for capability in CAPABILITIES[: best + 1]:
        variables = {"ATEN_CPU_CAPABILITY": capability}
        add(f"torch, {capability}", whole, lambda v=variables: in_process(args, "torch", whole, **v))
    add("reference", some, lambda: (some.digests(by_definition), {}))
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a tar of JPEGs and classes")
    parser.add_argument("--photographs", type=int, default=125, help="photographs that are used")
    parser.add_argument("--views", type=int, default=20_000, help="views of the kernel and of torch")
    parser.add_argument("--reference", type=int, default=1000, help="views of the reference")
    parser.add_argument(
        "--interpreted",
        type=int,
        default=60,
        help=f"views of {SMALL} pixels in Triton's interpreter",
    )
    parser.add_argument("--size", type=int, default=224, help="pixels of all other views")
    parser.add_argument("--renderer", choices=RENDERERS, help=argparse.SUPPRESS)  # prints hashes, for `in_process`
    args = parser.parse_args()
    if not kernel.is_compiled():
        raise SystemExit(
            "the kernel is not compiled: install this project where there is a C compiler (pip install -e .)"
        )
    torch.set_num_threads(1)
    files = read_photos(sorted(args.data.glob("*.tar"))[0])[: args.photographs]
    photos = [decode(image, key=name) for name, _, image in files]
    if args.renderer:
        digests = Views(photos, args.views, args.size).digests(RENDERERS[args.renderer])
        print(json.dumps({"digests": digests, "torch_instructions": torch.backends.cpu.get_cpu_capability()}))
        return
    found = compare_all(args, photos)
    versions = {name: metadata.version(name) for name in ("Pillow", "triton")}
    result = {
        "what": "views that differ from those of the compiled kernel with this processor's best instruction set",
        "machine": args.machine or machine() | {"kernel": kernel.INSTRUCTION_SETS[kernel.best_level()]} | versions,
        "photographs": len(photos),
        "recipes": ["deit", f"deit with {OTHER}"],
        "renderers": found,
    }
    write_json(args.out, result)
    sys.exit(int(any(each["differ"] for each in found.values())))


if __name__ == "__main__":
    main()
