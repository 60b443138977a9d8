"""Long runs: memory, open files and shared memory of both stages stay what they are after the first minutes.

Each command runs as a program of its own, and every process of it is looked at until it ends. A test that finds nothing could be
blind, so the same commands run once more with a leak.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.builders import make_labels, with_checkout, write_tars

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system has no /proc"),
]

UPDATES, SHARDS = 2000, 500
EVERY_S = 0.08
# What may be more in the last fifth of a run than in the second: noise of the allocators, which was up to 1 MB. 4 MB in 1,200
# updates are 3 kB an update; images or weights that are kept have more.
SLACK = {"memory": 4e6, "files": 3, "shared memory": 1e6, "threads": 3}
PROGRAM = "import cli; cli.main()"
LEAK = """
import os
import torch
import pipeline.stage1.loop as stage1
import trainer.loop as stage2

kept = []

def leaky(real):
    def call(*values):
        kept.append((b"x" * 100_000, os.open("/dev/null", os.O_RDONLY), torch.ones(5_000).share_memory_()))
        return real(*values)
    return call

stage1.publish_draft = leaky(stage1.publish_draft)
stage2.update_weights = leaky(stage2.update_weights)
"""


@dataclass
class Watch:
    """What a program and the processes that it started hold, from the first sign of its work to the last.

    Attributes:
        done: returns how much work is done.
        progress: what `done` returned at each look.
        seen: for each process and each kind of thing, its value at each look.
    """

    process: subprocess.Popen
    done: Callable[[], int]
    progress: list[int] = field(default_factory=list)
    seen: dict[tuple[int, str], dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    def run(self) -> None:
        """Look until the program ends."""
        while self.process.poll() is None:
            if done := self.done():
                for pid in tree_of(self.process.pid):
                    with contextlib.suppress(OSError):  # it has ended
                        for kind, value in holds(pid).items():
                            self.seen[pid, kind][len(self.progress)] = value
                self.progress.append(done)
            time.sleep(EVERY_S)

    @property
    def looks(self) -> int:
        """Return the number of looks until the last work was done."""
        return self.progress.index(self.progress[-1])

    def grown(self) -> dict[str, str]:
        """Return what grew: kind and process -> how."""
        assert self.looks >= 15, "too few looks to say anything: each fifth needs three"
        found = {}
        for (pid, kind), at in self.seen.items():
            values = [value for look, value in at.items() if look < self.looks]
            if len(values) < 0.8 * self.looks:  # a process that does not live as long as the run
                continue
            fifth = len(values) // 5
            early, late = (statistics.median(part) for part in (values[fifth : 2 * fifth], values[-fifth:]))
            if late - early > SLACK[kind]:
                found[f"{kind} of process {pid}"] = f"{early:,.0f} -> {late:,.0f}"
        return found


def tree_of(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    children = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            children[int(stat.rpartition(")")[2].split()[1])].append(int(entry))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1]]
    return found


def holds(pid: int) -> dict[str, float]:
    """Return what a process holds: bytes of its memory that are of no file, open files, bytes of shared memory, threads."""
    proc = Path("/proc", str(pid))
    rollup = dict(re.findall(r"^(\w+): +(\d+) kB", (proc / "smaps_rollup").read_text(), re.MULTILINE))
    own = (int(rollup["Anonymous"]) + int(rollup["Swap"])) * 1024
    shared = 0
    for line in (proc / "maps").read_text().splitlines():
        if "/dev/shm/" in line or "/memfd:" in line:
            start, stop = (int(end, 16) for end in line.partition(" ")[0].split("-"))
            shared += stop - start
    # Files with a name of their own that nobody has mapped any more.
    with os.scandir("/dev/shm") as entries:
        shared += sum(entry.stat().st_size for entry in entries if re.search(rf"_{pid}_", entry.name))
    threads = len(os.listdir(proc / "task"))
    return {"memory": own, "files": len(os.listdir(proc / "fd")), "shared memory": shared, "threads": threads}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_tars(folder / "data", (5,) * 5)
    write_tars(folder / "more", (100, 100))
    make_labels(folder / "set", str(folder / "more"), views=(0, 4))
    return folder


def label(folder: Path, data: str, out: str, *, views: int, program: str = PROGRAM) -> Watch:
    """Label that many views of a folder, a label shard for each view of each of its tars."""
    options = ["--teacher", "support.builders:confident_cnn", "--set", "img_size=16", "--set", "mix_block=4"]
    options += ["--views", str(views), "--views-per-shard", "1", "-j", "1", "--accuracy-samples", "0"]

    def done() -> int:
        return sum(1 for _ in (folder / out / "labels").rglob("*.parquet"))

    return watched(folder, ["precompute", "--data", data, "--out", out, *options], done, program)


def train(folder: Path, out: str, *, updates: int, program: str = PROGRAM) -> Watch:
    """Train a tiny student for that many updates, in epochs of 50."""
    options = ["--labels", "set", "--model", "deit-ti", "--patch-size", "8", "--embed-dim", "16", "--depth", "1"]
    options += [
        "--num-heads",
        "1",
        "-j",
        "1",
        "--batch-size",
        "4",
        "--repeated-aug",
        "1",
        "--epochs",
        str(updates // 50),
    ]
    options += [
        "--warmup-epochs",
        "0",
        "--checkpoint-interval",
        "20",
        "--recovery-interval",
        "100",
        "--log-interval",
        "5",
    ]

    def done() -> int:
        path = folder / out / "metrics.jsonl"
        return path.stat().st_size if path.is_file() else 0

    return watched(folder, ["train", "--output", out, *options], done, program)


def watched(folder: Path, arguments: list[str], done: Callable[[], int], program: str = PROGRAM) -> Watch:
    """Run a command, with a leak, and return what its processes held."""
    command = [sys.executable, "-c", program, *arguments]
    environment = with_checkout(Path(__file__).parents[1], OMP_NUM_THREADS="1")
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        watch = Watch(process, done)
        thread = threading.Thread(target=watch.run)
        thread.start()
        thread.join()
        said.seek(0)
        assert process.returncode == 0, said.read()
    return watch


def test_two_thousand_updates_hold_no_more_at_their_end(folder):
    began = time.monotonic()
    watch = train(folder, "run", updates=UPDATES)
    print(f"{time.monotonic() - began:.0f} s, {watch.looks} looks")
    assert watch.grown() == {}


def test_five_hundred_label_shards_hold_no_more_at_their_end(folder):
    began = time.monotonic()
    watch = label(folder, "data", "out", views=SHARDS // 5)
    print(f"{time.monotonic() - began:.0f} s, {watch.looks} looks")
    assert watch.grown() == {}
    assert len(list((folder / "out/labels").rglob("*.parquet"))) == SHARDS


def test_a_leak_is_seen(folder):
    """100 kB, an open file and 20 kB of shared memory for each update and each label shard."""
    updates = train(folder, "leaky-run", updates=UPDATES // 2, program=LEAK + PROGRAM).grown()
    shards = label(folder, "data", "leaky-set", views=SHARDS // 5, program=LEAK + PROGRAM).grown()
    for found in (updates, shards):
        assert {name.partition(" of ")[0] for name in found} == {"memory", "files", "shared memory"}
