"""One label set under many versions: made in one environment, rendered and trained on in all others.

    pip install uv
    python benchmarks/versions.py --python 3.11=PATH --python 3.13=PATH --data imagenet-sample --work FOLDER \
        --out benchmarks/results/versions.json

Each environment is a virtual environment with other versions of Python, torch, OpenCV, Pillow and NumPy. This project is installed into all of
them from two wheels of the last commit: one with the compiled kernel, which Python 3.11 builds for all, and one that was built
without a compiler. The first environment makes a label set of photographs for each renderer and image size. Every environment then

    renders    all views of all photographs again, and compares the SHA-256 of each with that of the first environment
    trains     a few updates with `deit-cli train`. Every warning is an error, and the log must not say that views differ

It succeeds if no view of the newest renderer differs and every training of it ends. Renderer 1, with `--renderers 2 1`, shows what
renderer 2 is for. Each environment takes about 6 GB of disk (uv shares equal versions), and is deleted as soon as it is done.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from photographs import write_source
from rounds import processor, write_json

from pipeline.views.recipe import RENDERER

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parent.parent
SIZES, VIEWS = (32, 224), 8
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "pyarrow",
    "scipy",
)
IGNORED = (  # of libraries; those of pyproject.toml, in the notation of PYTHONWARNINGS, which takes the last one that matches
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)

RENDER = """
import hashlib, json, sys
from pipeline import LabelSet, open_source, render_view
labels, source = LabelSet.open(sys.argv[1]), open_source(sys.argv[2])
print(json.dumps([
    hashlib.sha256(render_view(sample.image, labels.recipe, sample.key, view).tobytes()).hexdigest()
    for name in labels.shards for sample in source.shard(name) for view in range(int(sys.argv[3]))
]))
"""
FACTS = """
import json, platform, sys
from importlib import metadata
facts = {"python": platform.python_version()} | {name: metadata.version(name) for name in sys.argv[1:]}
print(json.dumps(facts | {"kernel": any(file.match("_kernel.*.so") for file in metadata.files("deit-cli"))}))
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions to test.

    Attributes:
        name: of the row in the results.
        python: version of an interpreter that --python names.
        pins: requirements; every other library is the newest that fits to them.
        compiled: whether the kernel is compiled.
    """

    name: str
    python: str
    pins: tuple[str, ...] = ()
    compiled: bool = True


ENVIRONMENTS = (
    Environment(name="newest", python="3.13", pins=("opencv-python-headless>=5",)),
    Environment(
        name="oldest",
        python="3.11",
        pins=(
            *(
                "torch==2.11.*",
                "torchvision==0.26.*",
                "numpy==2.2.*",
                "opencv-python-headless==4.10.*",
                "pillow==11.0.*",
            ),
            "simplejpeg==1.8.0",
        ),
    ),
    Environment(
        name="between",
        python="3.11",
        pins=("torch==2.13.*", "numpy==2.2.*", "opencv-python-headless==4.12.*", "pillow==12.3.*"),
    ),
    Environment(
        name="mixed",
        python="3.13",
        pins=("torch==2.11.*", "opencv-python-headless>=5", "pillow==11.3.*", "numpy==2.4.*"),
    ),
    Environment(
        name="no-compiler", python="3.13", pins=("opencv-python-headless==4.14.*", "pillow==12.0.*"), compiled=False
    ),
)


@dataclass(frozen=True)
class Workplace:
    """Folders of one run.

    Attributes:
        folder: all that is made here lies in it.
        pythons: interpreters by version.
        source: folder of photographs in tars.
    """

    folder: Path
    pythons: Mapping[str, str]
    source: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", self.folder / "source")

    def run(self, command: Sequence[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside of the repository, so that what is installed is what is imported."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        plain |= {
            "OMP_NUM_THREADS": "1",
            "UV_CACHE_DIR": str(self.folder / "uv"),
            "CUDA_VISIBLE_DEVICES": "",
        } | variables
        return subprocess.run(
            [*map(str, command)], cwd=self.folder, env=plain, capture_output=True, text=True, check=False
        )

    def must(self, command: Sequence[str | Path], **variables: str) -> str:
        """Run a command that has to succeed; return its output."""
        done = self.run(command, **variables)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
        return done.stdout

    def labels(self, renderer: int, size: int) -> Path:
        """Return the folder of a label set."""
        return self.folder / f"labels-{renderer}-{size}"


# --- wheels and environments ------------------------------------------------------------------------------------------


def build_wheels(place: Workplace) -> dict[bool, Path]:
    """Build the last commit with and without a compiler; return the wheels by whether they are compiled."""
    tree = place.folder / "tree.tar"
    place.must(["git", "-C", REPOSITORY, "archive", "--output", tree, "HEAD"])
    wheels = {}
    for compiled in (True, False):
        checkout, out = place.folder / f"tree-{compiled}", place.folder / f"wheel-{compiled}"
        with tarfile.open(tree) as archive:
            archive.extractall(checkout, filter="data")
        compiler = {} if compiled else {"CC": shutil.which("false") or "false"}
        place.must(
            ["uv", "build", "--wheel", "--python", place.pythons["3.11"], "--out-dir", out, checkout], **compiler
        )
        (wheels[compiled],) = out.glob("*.whl")
    return wheels


def install(place: Workplace, environment: Environment, wheel: Path) -> Path:
    """Make an environment; return its folder."""
    folder = place.folder / f"env-{environment.name}"
    place.must(["uv", "venv", "--python", place.pythons[environment.python], folder])
    place.must(["uv", "pip", "install", "--python", folder, "--only-binary", ":all:", wheel, *environment.pins])
    return folder


def facts(place: Workplace, folder: Path) -> dict[str, Any]:
    """Return the versions in an environment, and whether it has the compiled kernel."""
    return json.loads(place.must([folder / "bin/python", "-c", FACTS, *LIBRARIES]))


# --- what is compared -------------------------------------------------------------------------------------------------


def label(place: Workplace, folder: Path, renderer: int, size: int) -> None:
    """Make a label set."""
    command = [folder / "bin/deit-cli", "precompute", "--data", place.source, "--out", place.labels(renderer, size)]
    command += [
        "--recipe",
        "deit",
        "--set",
        f"img_size={size}",
        "--set",
        f"renderer={renderer}",
        "--views",
        f"0:{VIEWS}",
    ]
    command += ["--teacher", "test_resnet", "--no-pretrained", "--teacher-img-size", "32", "--accuracy-samples", "0"]
    place.must([*command, "--device", "cpu", "--workers", "1"])


def rendered(place: Workplace, folder: Path, labels: Path) -> list[str]:
    """Return the SHA-256 of every view of every photograph."""
    return json.loads(place.must([folder / "bin/python", "-c", RENDER, labels, place.source, str(VIEWS)]))


def trained(place: Workplace, folder: Path, labels: Path, size: int) -> str:
    """Train a few updates; return `trained`, or the last words of a warning or an error."""
    run = place.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [folder / "bin/deit-cli", "train", "--labels", labels, "--data", place.source, "--output", run]
    command += [
        "--model",
        "deit-ti",
        "--patch-size",
        str(size // 4),
        "--embed-dim",
        "48",
        "--depth",
        "1",
        "--num-heads",
        "3",
    ]
    command += ["--epochs", "1", "--batch-size", "12", "--repeated-aug", "1", "--device", "cpu", "--workers", "1"]
    done = place.run(command, PYTHONWARNINGS=",".join(("error", *IGNORED)))
    said = [line for line in done.stderr.splitlines() if "differ" in line]
    if done.returncode == 0 and not said:
        return "trained"
    return (said or done.stderr.strip().splitlines() or ["it said nothing"])[-1][-300:]


def compare(place: Workplace, folder: Path, renderer: int, size: int, first: list[str]) -> dict[str, Any]:
    """Return how many views of an environment are not those of the first one, and how a training ended."""
    labels = place.labels(renderer, size)
    ours = rendered(place, folder, labels)
    different = sum(one != other for one, other in zip(ours, first, strict=True))
    result = {"renderer": renderer, "img_size": size, "views": len(ours), "different_views": different}
    return result | {"training": trained(place, folder, labels, size)}


def main() -> None:
    arguments = options().parse_args()
    place = Workplace(arguments.work.resolve(), dict(pair.split("=", 1) for pair in arguments.python))
    place.folder.mkdir(parents=True)
    write_source(place.source, arguments.photographs, arguments.data)
    results: dict[str, Any] = {"processor": processor(), "photographs": arguments.photographs}
    results["environments"] = rows = []
    wheels, sets = build_wheels(place), [(renderer, size) for renderer in arguments.renderers for size in SIZES]
    results["wheels"] = {("compiled" if compiled else "no compiler"): wheel.name for compiled, wheel in wheels.items()}
    first: dict[tuple[int, int], list[str]] = {}
    for environment in ENVIRONMENTS:
        began = time.monotonic()
        folder = install(place, environment, wheels[environment.compiled])
        row = {
            "name": environment.name,
            "pins": asdict(environment)["pins"],
            "versions": facts(place, folder),
            "results": [],
        }
        rows.append(row)
        for renderer, size in sets:
            if (renderer, size) not in first:
                label(place, folder, renderer, size)
                first[renderer, size] = rendered(place, folder, place.labels(renderer, size))
            row["results"].append(compare(place, folder, renderer, size, first[renderer, size]))
        shutil.rmtree(folder)
        write_json(arguments.out, results)
        print(f"[{time.monotonic() - began:.0f} s]", json.dumps(row), flush=True)
    if not all(is_equal(result) for row in rows for result in row["results"] if result["renderer"] == RENDERER):
        sys.exit(f"views of renderer {RENDERER} differ, or a training failed: see {arguments.out}")


def is_equal(result: Mapping[str, Any]) -> bool:
    return result["different_views"] == 0 and result["training"] == "trained"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", action="append", required=True, help="VERSION=PATH of an interpreter; 3.11 and 3.13 are needed"
    )
    parser.add_argument("--data", type=Path, help="folder with a tar of photographs; by default made-up ones")
    parser.add_argument("--photographs", type=int, default=36, help="number of photographs")
    parser.add_argument("--renderers", type=int, nargs="+", default=[RENDERER], help="renderers to test")
    parser.add_argument(
        "--work", type=Path, required=True, help="new folder for environments, label sets and uv's cache"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    return parser


if __name__ == "__main__":
    main()
