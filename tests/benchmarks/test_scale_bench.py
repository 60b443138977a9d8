"""benchmarks/scale.py runs every operation on small sources and sets, and its sets are sound."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks/scale.py"


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_rehearsal_runs_every_operation(tmp_path):
    """Verification and replay probes are among the operations, so a set that is not sound fails."""
    out = tmp_path / "scale.json"
    done = program(tmp_path, "--rehearse", "--work", str(tmp_path / "work"), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    case = json.loads(out.read_text())["cases"]["tiny"]
    assert case["case"]["shards"] == 10
    operations = {
        "source",
        "source again",
        "plan",
        "resume",
        "seal",
        "open",
        "info",
        "verify",
        "pull",
        "merge",
        "order",
    }
    assert operations <= case.keys()
    assert case["verify"]["verify"]["seconds"] > 0
    assert case["resume"]["label shards checked"] == 10
    assert case["pull"]["files pulled"] == 3
    assert not (tmp_path / "work/tiny").exists()  # large files do not stay unless --keep is passed
    table = program(tmp_path, "--table", str(out))
    assert table.stdout.startswith("| | tiny |\n")
    assert "| seal: seal |" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scales", "10k,11k", "--work", "x", "--out", "y"), "--scales must be of 10k, 10k-300, 100k"),
        (("--phases", "seal,open it", "--work", "x", "--out", "y"), "--phases must be of source, source again"),
        (("--out", "y"), "--work is needed"),
        (("--work", "x"), "--out is needed"),
    ],
)
def test_misuse_is_named_before_anything_is_made(tmp_path, arguments, words):
    done = program(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []
