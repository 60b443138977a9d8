"""The page is enough: a short reader that knows pyarrow alone reads what we read, and refuses what is damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.labels.labelset import LabelSet

READER = Path(__file__).parents[1] / "support/plain_reader.py"
GOLDEN = Path(__file__).parents[1] / "golden"
SETS = {"float16": GOLDEN / "v1/shards", "log8": GOLDEN / "v1-log8/shards"}


def read_plainly(folder: Path, alone: Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of the reader where nothing of ours can be imported."""
    copy = shutil.copy(READER, alone)
    guard = "import sys; sys.modules.update(dict.fromkeys(('pipeline', 'trainer', 'cli')))"
    script = f"{guard}; import runpy; sys.argv = {[str(copy), str(folder)]!r}; runpy.run_path({str(copy)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=alone)


def ours(folder: Path) -> list[Any]:
    label_set = LabelSet.open(folder)
    found = []
    for shard in label_set.shards:
        keys = label_set.samples(shard).key
        for view in label_set.views:
            rows = label_set.read(shard, view)
            for i, row in enumerate(rows.row.tolist()):
                values = [*rows.topk_prob[i].tolist(), float(rows.tail_mass[i])]
                found.append([keys[row], view, int(rows.hard[i]), rows.topk_index[i].tolist(), values])
    return found


@pytest.mark.parametrize("precision", SETS)
def test_the_reader_reads_the_golden_sets_as_we_do(tmp_path, precision):
    done = read_plainly(SETS[precision], tmp_path)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(ours(SETS[precision]), json.loads(done.stdout), strict=True):
        assert mine[:4] == theirs[:4]
        assert mine[4] == pytest.approx(theirs[4], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "labels/views-00000-00002/golden-000000.parquet"])
def test_the_reader_refuses_a_flipped_bit(tmp_path, name):
    shutil.copytree(SETS["log8"], tmp_path / "set")
    content = bytearray((tmp_path / "set" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "set" / name).write_bytes(content)
    assert read_plainly(tmp_path / "set", tmp_path).returncode == 1


def test_the_reader_is_short_and_needs_pyarrow_and_numpy_alone():
    text = READER.read_text()
    assert len(text.splitlines()) < 60
    imported = {
        line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported <= {"pyarrow", "numpy", *sys.stdlib_module_names}
