"""benchmarks/gpu.py loses nothing that a phase has found, whatever becomes of the others, and says what it left out."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pipeline.pixels import kernel

ROOT = Path(__file__).parents[2]
PHASES = ["facts", "tests", "views", "parity", "stage1", "stage2", "losses", "cifar10"]


def program(out: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Run it from a checkout that is not installed; return its exit code, what it printed, and gpu.json's phases."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads((out / "gpu.json").read_text())["phases"]


@pytest.mark.slow
def test_the_rehearsal_runs_every_phase(tmp_path):
    code, said, phases = program(tmp_path / "out", "--rehearse", "--budget", "900")
    assert set(phases) == set(PHASES)
    assert [entry for entry in phases.values() if entry["status"] != "done"] == [], said[-4000:]
    assert code == 0
    results = {name: entry["result"] for name, entry in phases.items()}
    assert results["facts"]["ceilings"]["matrix_tflops"] >= 0
    assert results["facts"]["machine"]["cores"] >= 1
    assert results["tests"]["summary"]["exit_code"] in (0, 5)
    assert results["views"]["equal"]["torch"] == {"asked": 48, "views": 48, "differ": 0}
    assert results["views"]["alone, 8"]["us_a_view"] > 0
    assert min(results["views"]["loaders, 1"]["views_per_s"].values()) > 0
    assert results["parity"]["stored_against_online"]["float32"]["flips"] == 0
    assert results["parity"]["two_runs"]["differing_files"] == []
    assert results["stage1"]["precompute, eager, 1 loaders"]["precompute"] > 0
    case = results["stage2"]["deit-ti, 8, eager"]
    assert min(case[name] for name in ("alone", "online", "from_labels")) > 0
    assert results["stage2"]["feeding"]["stream_views_per_s"]["1"] > 0
    assert results["losses"]["B = 8, C = 100"]["losses"]["class"]["ours"]["peak"] < 2
    assert all(name in said for name in PHASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("error", "failed", "RuntimeError: failed on purpose"),
        ("killed", "failed", "exit code -9"),
        ("hangs", "cut", "ended after its"),  # it has two fifths of 20 s
    ],
)
def test_a_phase_that_fails_takes_nothing_from_the_others(tmp_path, how, status, words):
    code, said, phases = program(
        tmp_path / "out", "--rehearse", "--phases", "losses,facts", "--fail", f"facts:{how}", "--budget", "20"
    )
    assert code == 1
    assert phases["facts"]["status"] == status
    assert words in phases["facts"]["error"]
    assert phases["losses"]["status"] == "done"
    assert phases["losses"]["result"]["B = 8, C = 100"]
    assert words.split()[-1] in said


@pytest.mark.slow
def test_what_an_earlier_run_has_found_is_kept_and_not_measured_again(tmp_path):
    known = tmp_path / "gpu.json"
    case = {"alone": 12345.0}
    found = {"card": "cpu", "deit-ti, 8, eager": case, "feeding": {}, "left_out": ["feeding"]}
    known.write_text(json.dumps({"phases": {"stage2": {"status": "done", "result": found}}}))
    what = ("--rehearse", "--phases", "stage2", "--known", str(known))
    code, _, phases = program(tmp_path / "out", *what)
    assert code == 0
    assert phases["stage2"]["result"]["deit-ti, 8, eager"] == case
    assert phases["stage2"]["result"]["feeding"] == {}
    assert "left_out" not in phases["stage2"]["result"]
    known.write_text(json.dumps({"phases": {"stage2": {"status": "done", "result": found | {"card": "another card"}}}}))
    code, _, phases = program(tmp_path / "other", *what)
    assert code == 1
    assert "has results of another card, this is cpu: leave --known out" in phases["stage2"]["error"]


def test_an_exhausted_budget_says_which_phases_were_left_out(tmp_path):
    code, said, phases = program(tmp_path / "out", "--phases", "facts,losses", "--budget", "2")
    assert code == 0  # nothing failed
    for name in ("facts", "losses"):
        assert phases[name]["status"] == "left out"
        assert f"ask for it with --phases {name}" in phases[name]["error"]
        assert f"{name} is left out" in said


def test_a_library_that_is_missing_or_too_old_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    unmet = importlib.import_module("gpu").unmet
    assert unmet(["click>=8.2", "numpy"]) == []
    assert unmet(["no-such-library>=2"]) == ["no-such-library is not installed, no-such-library>=2 is needed"]
    assert unmet(["click>=1000"]) == [f"click {metadata.version('click')} is here, click>=1000 is needed"]


def test_the_kernel_of_views_is_compiled_or_the_reason_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    compile_kernel = importlib.import_module("gpu").compile_kernel
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compile_kernel(tmp_path).startswith("it is missing: [Errno 2]")
    (tmp_path / "_kernel.c").write_text('#include "_kernel_body.h"\n')
    if shutil.which("cc"):
        monkeypatch.delenv("CC")
        assert compile_kernel(tmp_path).startswith("it is missing: ")  # the other file is not here
        (tmp_path / "_kernel_body.h").write_text("int answer(void) { return 42; }\n")
        assert compile_kernel(tmp_path) == "it was compiled"
        assert {path.name for path in tmp_path.iterdir()} == {"_kernel.abi3.so", "_kernel.c", "_kernel_body.h"}


def test_the_kernel_of_views_is_compiled_only_where_it_is_missing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "compile_kernel", lambda folder: f"compiled into {folder.name}")
    for there, said in ((True, "it was there"), (False, "compiled into pixels")):
        monkeypatch.setattr(kernel, "is_compiled", lambda there=there: there)
        assert gpu.kernel_here() == said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--phases", "facts,lossess"), "--phases must be of facts, tests"),
        (("--photographs", "nowhere"), "--photographs nowhere: no such folder"),
        (("--cifar10", "nowhere"), "--cifar10 nowhere: no such folder"),
        (("--known", "nowhere"), "--known nowhere: no such file"),
    ],
)
def test_misuse_is_named_before_anything_runs(tmp_path, arguments, words):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
