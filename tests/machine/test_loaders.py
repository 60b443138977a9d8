"""Loader processes: the memory that they share, and the signals that they do not hear."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.builders import with_checkout

from pipeline.errors import WorkerError
from pipeline.machine import loaders as loading
from pipeline.machine.loaders import PREFETCH, Mapped, Slots, checked, start_loader


class Fill:
    """Writes its item into its slot."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def __call__(self, numbered: tuple[int, int] | None) -> int | None:
        if numbered is None:
            return None
        slot, item = numbered
        self._slots.pixels[slot].fill_(item)
        return slot


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("held", [1, 3])
def test_what_the_caller_holds_is_not_written_to(workers, held):
    slots = Slots((2, 3), workers=workers, held=held)
    items = [*range(20), None, *range(20, 40)]
    loader = start_loader(Mapped(Fill(slots)), workers=workers, sampler=slots.number(items))
    kept: list[tuple[int, int]] = []
    for item, slot in zip(items, checked(loader), strict=True):
        assert (item is None) == (slot is None)
        if item is None:
            continue
        kept = [*kept, (slot, item)][-held:]
        time.sleep(0.002)  # time to go wrong in
        for each, value in kept:
            assert slots.pixels[each].eq(value).all()


def test_slots_are_as_many_as_are_on_their_way():
    assert len(Slots((1,), workers=3, held=2).pixels) == 3 * PREFETCH + 3
    assert Slots((1,), workers=1, held=1).pixels.is_shared()
    assert not Slots((1,), workers=0, held=1).pixels.is_shared()


def test_too_little_shared_memory_is_said_before_a_process_dies_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    with pytest.raises(WorkerError, match=r"need [\d,]+ MB of shared memory, .* has [\d,]+ MB: use fewer --workers"):
        Slots((2**40,), workers=1, held=1)


SCRIPT = """
import os, signal, sys, time
from pipeline.machine.loaders import Mapped, checked, start_loader

def slowly(item):
    time.sleep(0.05)
    return os.getppid(), os.getpid(), item

def main():
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    batches = checked(start_loader(Mapped(slowly, 10**6), workers=2))
    server, worker, _ = next(batches)
    print(server, worker, flush=True)
    for _ in range(40):
        next(batches)
    print("went on", flush=True)
    if sys.argv[1] == "leave":
        globals()["kept"] = batches  # nobody shuts the loaders down
    else:
        time.sleep(600)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "loads.py"
    path.write_text(SCRIPT)
    return path


def started(script: Path, how: str) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, str(script), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=with_checkout(),
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_soon(pids: list[int]) -> bool:
    end = time.monotonic() + 60
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_leaves_the_decision_to_the_parent(script, number):
    process, pids = started(script, "leave")
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert out == "went on\n"
    assert process.returncode == 0  # loaders that nobody shut down do not keep a process from ending
    assert gone_soon(pids)


def test_ctrl_c_while_the_loaders_server_starts_does_not_reach_it():
    """It takes seconds to import torch, and would end in a traceback on the user's terminal."""
    code = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: None)
from pipeline.machine.loaders import Mapped, start_loader
if __name__ == "__main__":
    loader = start_loader(Mapped(abs, 2), workers=1)
    for _ in range(8):  # while it imports
        time.sleep(0.2)
        os.killpg(0, signal.SIGINT)
    print(list(loader))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=with_checkout(), capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("[0, 1]\n", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
def test_loaders_end_with_a_killed_parent(script):
    process, pids = started(script, "stay")
    process.kill()
    process.communicate(timeout=120)
    assert gone_soon(pids)
