"""benchmarks/render.py and benchmarks/loader.py run; nothing here depends on how fast anything is."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.pixels import kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photographs(tmp_path, monkeypatch) -> Path:
    """Six made-up photographs in a tar."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("photographs").write_source(tmp_path / "photographs", 6, None)
    return tmp_path / "photographs"


def program(name: str, photographs: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark on these photographs, and return its JSON."""
    out = photographs.parent / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--data", str(photographs), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not kernel.is_compiled(), reason="the kernel is not compiled")
def test_rendering_is_measured_with_its_parts(photographs):
    result = program("render.py", photographs, "--images", "4", "--rounds", "2")
    assert {"timm", "torchvision_v2", "webdataset_timm", "decode_alone", "ours_1", "ours_3", "ours_30"} <= set(
        result["median"]
    )
    assert min(result["median"].values()) > 0
    assert len(result["rounds"]) == 2
    parts = result["us_per_view"]
    assert min(parts[name] for name in ("decode, an image", "draw", "pack", "resize")) > 0
    assert len(parts["operation, where it is applied"]) == 15
    assert len(parts["whole kernel with pack and call"]) == kernel.best_level() + 1


@pytest.mark.slow
def test_loader_processes_are_measured_side_by_side(photographs):
    options = ("--repeat", "32", "--rounds", "1", "--seconds", "0.2", "--only", "ours_3", "timm")
    result = program("loader.py", photographs, "--work", str(photographs.parent / "work"), *options)
    assert result["competitors"]["ours_3"]["batch"].startswith("uint8 [6")  # 63 views: 21 images, 3 of each
    assert result["competitors"]["timm"]["batch"] == "float32 [64, 3, 224, 224]"
    assert result["per_second"]["ratio_to"]["ours_3"]["timm"] > 0
    assert result["left_out"] == {}
