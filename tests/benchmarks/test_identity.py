"""benchmarks/identity.py compares whatever renders views, and names the first view that differs."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.photographs import photo

from pipeline.pixels import kernel

ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(not kernel.is_compiled(), reason="the kernel is not compiled")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("identity")


@needs_kernel
@pytest.mark.slow
def test_all_ways_to_render_are_compared(tmp_path, benchmark):
    pytest.importorskip("triton", minversion="3.7")  # the interpreter of 3.6 does not work with NumPy 2.4
    importlib.import_module("photographs").write_source(tmp_path / "photographs", 3, None)
    out = tmp_path / "identity.json"
    command = [sys.executable, str(ROOT / "benchmarks/identity.py"), "--data", str(tmp_path / "photographs")]
    command += ["--out", str(out), "--size", "32", "--views", "8", "--reference", "4", "--interpreted", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["renderers"]
    assert [entry["differ"] for entry in found.values()] == [0] * len(found)
    best = kernel.best_level()
    assert len(found) == 2 * (best + 1) + 2
    assert found[f"torch, {benchmark.CAPABILITIES[best]}"]["views"] == 8
    assert found["torch, default"]["torch_instructions"] == "DEFAULT"
    assert found["reference"]["views"] == 4


@needs_kernel
def test_the_first_view_that_differs_is_named(benchmark, capsys):
    views = benchmark.Views([photo(30, 40), photo(20, 50, 1), photo(10, 10, 2)], 8, 16)
    expected = views.digests(benchmark.with_kernel(kernel.best_level()))
    assert len(set(expected)) == 8
    exact = benchmark.with_kernel(0)

    def off_by_one(image, parameters):
        rendered = exact(image, parameters)
        if image.shape == (20, 50, 3):  # photograph 1 has the views 1, 4 and 7
            rendered[1][15, 15, 2] ^= 1
        return rendered

    same = benchmark.compared(views, "exact", views.digests(exact), expected, 1.0)
    assert same == {"views": 8, "size": 16, "differ": 0, "seconds": 1.0}
    other = benchmark.compared(views, "off by one", views.digests(off_by_one), expected, 1.0)
    assert other["differ"] == 1
    assert other["first"]["photograph"] == 1
    assert other["first"]["view"] == 1
    assert other["first"]["parameters"] == repr(views.of_photo(1)[1])
    assert "off by one" in capsys.readouterr().out


def test_views_of_both_recipes_are_drawn(benchmark):
    views = benchmark.Views([np.zeros((40, 50, 3), np.uint8)], 40, 16).of_photo(0)
    assert {view.interpolation for view in views[::2]} == {"bicubic"}
    assert {view.interpolation for view in views[1::2]} == {"bicubic", "bilinear"}
