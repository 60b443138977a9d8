"""The kernel, built by other compilers, with sanitizers, and for ARM64: the defined pixels, and nothing undefined on the way.

ARM64 needs `apt-get install gcc-aarch64-linux-gnu qemu-user-static`. What is not installed is skipped by name.
"""

import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support.defined_views import render_by_definition
from support.extreme_views import extreme_views
from support.random_views import random_views

from pipeline.pixels import kernel
from pipeline.pixels.packed import packed
from pipeline.views.noise import noise_levels

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLAGS = (
    *PROJECT["tool"]["setuptools"]["ext-modules"][0]["extra-compile-args"],
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
)
# `_kernel.c` needs only the names that make it a module, and here it is none.
PYTHON_H = """
#define PyModuleDef_HEAD_INIT 0
#define PyMODINIT_FUNC void *
struct PyModuleDef { int base; const char *m_name; int m_size; };
static inline void *PyModuleDef_Init(struct PyModuleDef *module) { return module; }
"""
VIEWS = extreme_views(41, 400) + random_views(42, 6, 224, layers=4, scale=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, bytes]:
    """Return a file of views for the program, and their defined pixels."""
    path = tmp_path_factory.mktemp("views") / "views"
    with path.open("wb") as file:
        file.write(noise_levels().tobytes())
        for image, view in VIEWS:
            file.write(np.int64(image.size).tobytes())
            file.write(packed(view, height=image.shape[0], width=image.shape[1]))
            file.write(image.tobytes())
    return path, b"".join(render_by_definition(image, view).tobytes() for image, view in VIEWS)


def built(folder: Path, compiler: str, options: tuple[str, ...]) -> Path:
    """Build the program that renders a file, or skip the test if an empty program cannot be built."""
    (folder / "Python.h").write_text(PYTHON_H)
    (folder / "empty.c").write_text("int main(void) { return 0; }\n")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    empty = [compiler, *options, str(folder / "empty.c"), "-o", str(folder / "empty")]
    if subprocess.run(empty, capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot build with {' '.join(options)}")
    includes = [f"-I{folder}", f"-I{ROOT / 'pipeline/pixels'}"]
    source, program = ROOT / "tests/pixels/render_file.c", folder / "program"
    command = [compiler, *FLAGS, *options, *includes, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def rendered(command: list[str], level: int, views: Path) -> bytes:
    out = views.with_name("out")
    done = subprocess.run([*command, str(level), str(views), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out.read_bytes()


SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.skipif(not kernel.is_compiled(), reason="no compiler, or a broken one")
@pytest.mark.parametrize(
    ("compiler", "options"), [("gcc", ("-O2",)), ("clang", ("-O3",)), ("gcc", SANITIZED), ("clang", SANITIZED)]
)
def test_every_build_gives_the_defined_pixels(compiler, options, files, tmp_path):
    views, defined = files
    program = built(tmp_path, compiler, options)
    for level in range(kernel.best_level() + 1):
        assert rendered([str(program)], level, views) == defined, level


def test_arm_gives_the_defined_pixels(files, tmp_path):
    views, defined = files
    emulator = shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("no qemu-aarch64-static")
    program = built(tmp_path, "aarch64-linux-gnu-gcc", ("-static",))
    assert rendered([emulator, str(program)], 0, views) == defined


@pytest.mark.skipif(not kernel.is_compiled() or kernel.best_level() == 0, reason="this processor cannot fuse")
def test_a_build_that_fuses_products_and_sums_gives_other_pixels(files, tmp_path):
    """So the flag of pyproject.toml is needed, and these views are hard enough to show it."""
    views, defined = files
    program = built(tmp_path, "gcc", ("-ffp-contract=fast",))
    assert rendered([str(program)], 1, views) != defined
