"""SIGKILL at random moments, in both stages: the resumed result equals the uninterrupted one (faults 1 and 18)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import SMALL, files_of, write_tars

from pipeline.labelset import LabelSet
from trainer.checkpoint import load_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KILLS = 10
# The command, and a pause in each unit of work, so that kills fall in the middle of it and not in imports.
PRECOMPUTE = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import pipeline.rendering as rendering, pipeline.storage as storage
slow, link = rendering.BlockRenderer._render_task, storage._link
def render_slowly(self, task):
    for batch in slow(self, task):
        time.sleep(0.03)
        yield batch
def link_slowly(a, b):
    time.sleep(0.05)
    link(a, b)
    time.sleep(0.05)
rendering.BlockRenderer._render_task, storage._link = render_slowly, link_slowly
print("ready", flush=True)
from pathlib import Path
from builders import make_labels
make_labels(Path({out!r}), {data!r}, views=(0, 6), views_per_shard=2, batch_size=8)
"""
TRAIN = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import trainer.loop as loop, pipeline.storage as storage
update, replace = loop._update, storage.os.replace
def update_slowly(*args):
    time.sleep(0.04)
    return update(*args)
loop._update = update_slowly
print("ready", flush=True)
from pathlib import Path
from trainer.config import TrainConfig
loop.train(TrainConfig(labels=Path({labels!r}), output=Path({out!r}), model="deit-ti", patch_size=8, embed_dim=32, depth=2,
    num_heads=2, batch_size=12, epochs=20, warmup_epochs=1, lr=1e-3, workers=0, resume=True, recovery_interval=2, repeated_aug=1))
"""


def start(script: str) -> subprocess.Popen[str]:
    """Start a script and return once its imports are done."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
    return process


def finish(script: str) -> None:
    process = start(script)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def kill_at(script: str, seconds: float) -> bool:
    """Kill the script some seconds after it is ready; return whether it was still running."""
    process = start(script)
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def test_precompute_killed_at_random_moments_makes_the_same_files(tmp_path):
    data = write_tars(tmp_path / "data", (24, 16, 16))
    paths = {"root": str(ROOT), "tests": str(ROOT / "tests"), "data": data}
    began = time.monotonic()
    finish(PRECOMPUTE.format(out=str(tmp_path / "whole"), **paths))
    length = time.monotonic() - began

    moments, partial, killed = random.Random(0), 0, 0
    script = PRECOMPUTE.format(out=str(tmp_path / "cut"), **paths)
    while killed < KILLS:
        if not kill_at(script, moments.uniform(0, 0.6 * length)):
            for path in sorted((tmp_path / "cut").rglob("*.parquet"))[:2]:
                path.unlink()  # it got through: take something away, and go on killing
            (tmp_path / "cut/manifest.json").unlink()
            continue
        killed += 1
        believed = files_of(tmp_path / "cut") if (tmp_path / "cut").exists() else {}
        whole = files_of(tmp_path / "whole")
        final = {name: content for name, content in believed.items() if ".tmp-" not in name}
        wrong = [name for name, content in final.items() if name != "manifest.json" and content != whole[name]]
        assert wrong == []  # what has its final name is whole, at every moment
        partial += 0 < len(final) < len(whole)
    assert partial >= 3  # kills did fall in the middle of the work
    finish(script)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")  # temporaries are swept too
    assert LabelSet.open(tmp_path / "cut").verify() == []


def test_training_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    from builders import make_labels

    assert SMALL["img_size"] == 16
    label_set = make_labels(tmp_path / "labels", write_tars(tmp_path / "data", (24, 16)))
    paths = {"root": str(ROOT), "tests": str(ROOT / "tests"), "labels": str(label_set.folder)}
    began = time.monotonic()
    finish(TRAIN.format(out=str(tmp_path / "whole"), **paths))
    length = time.monotonic() - began

    moments, killed, positions = random.Random(1), 0, set()
    script = TRAIN.format(out=str(tmp_path / "cut"), **paths)
    while killed < KILLS and kill_at(script, moments.uniform(0, 0.45 * length)):
        killed += 1
        state = tmp_path / "cut/state.safetensors"
        if state.exists():
            positions.add(load_state(state)[1]["next_index"])  # always loads
    assert len(positions) >= 2  # kills fell at different places of the run
    finish(script)
    whole, cut = (load_state(tmp_path / name / "state.safetensors")[0] for name in ("whole", "cut"))
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    assert files_of(tmp_path / "cut/last") == files_of(tmp_path / "whole/last")
