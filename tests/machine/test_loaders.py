"""Loader processes: the work that they do, the memory that they share, and the signals that they do not hear."""

import gc
import multiprocessing.forkserver
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import factorial
from pathlib import Path

import pytest
import torch
from support.builders import with_checkout
from support.fake_cuda import Cuda
from support.loading import Fill, Filled, faculty, faulty, process, sleepy
from torch import Tensor

from pipeline.errors import BadImageError, WorkerError
from pipeline.machine import loaders as loading
from pipeline.machine.loaders import PREFETCH, Slots, SlotStream, in_processes, plan_workers
from pipeline.machine.server import parent_has_stopped

# --- work in order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(in_processes(faculty, range(3, 7), workers=workers)) == [6, 24, 120, 720]
    assert list(in_processes(faculty, iter([3, 0, 5]), workers=workers)) == [6, 1, 120]
    assert list(in_processes(faculty, [], workers=workers)) == []


def test_without_workers_everything_runs_here():
    assert list(in_processes(process, range(2), workers=0)) == [os.getpid()] * 2
    assert os.getpid() not in in_processes(process, range(2), workers=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_ours_arrives_whole_after_what_was_made_before_it(workers):
    results = in_processes(faculty, [3, 4, -2, 5], workers=workers)
    assert [next(results), next(results)] == [6, 24]
    with pytest.raises(BadImageError) as caught:
        next(results)
    assert (caught.value.key, caught.value.reason) == ("img", "of -2")


def test_a_defect_of_ours_keeps_its_class():
    with pytest.raises(TypeError, match="not supported between"):
        list(in_processes(faculty, ["3"], workers=0))


@pytest.mark.parametrize("kind", [TypeError, KeyError, RuntimeError])  # torch raises RuntimeErrors of its own
def test_a_defect_in_a_process_keeps_its_class_and_its_line_and_ends_the_processes(kind):
    with pytest.raises(kind, match=r"(?s)Caught .*faulty.*a defect") as caught:
        list(in_processes(partial(faulty, kind), range(9), workers=2))
    assert multiprocessing.active_children() == []  # though the error refers to all that it went through
    del caught


def test_errors_leave_no_stream_to_the_garbage_collector():
    """It would end the processes of a stream after it had closed their queues: they would wait forever."""

    def consume() -> None:
        stream = in_processes(faculty, range(9), workers=1)  # has more to give when the other one fails
        list(in_processes(partial(faulty, KeyError), [next(stream), 3], workers=1))

    gc.disable()
    try:
        with pytest.raises(KeyError, match="a defect"):
            consume()
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(loading, "GRACE_S", 0.5)
    results = in_processes(sleepy, [0, 600], workers=1)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_the_server_of_the_processes_imports_the_module_of_the_work():
    stream = SlotStream(Fill(), [1], (2, 3), workers=1, held=1)
    here, names = "support.loading", ["pipeline.machine.server", "pipeline.machine.loaders", "support.loading"]
    into_slot = loading._IntoSlot(Fill(), stream._slots.pixels)
    assert [loading._module_of(work) for work in (faculty, partial(partial(faculty)), into_slot)] == [here] * 3
    assert loading._module_of(factorial) == "math"
    list(stream)
    assert multiprocessing.forkserver._forkserver._preload_modules == names  # pyright: ignore[reportAttributeAccessIssue]


# --- slots ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("held", [1, 3])
def test_what_the_caller_holds_is_not_written_to(workers, held):
    items = [*range(20), None, *range(20, 40)]
    kept: list[Filled] = []
    seen: list[int] = []
    for batch in SlotStream(Fill(), items, (2, 3), workers=workers, held=held):
        seen.append(batch.number)
        kept = [*kept, batch][-held:]
        time.sleep(0.002)  # time to go wrong in
        for each in kept:
            assert each.images.shape == (1 + each.number % 2, 3)
            assert each.images.eq(each.number).all()
    assert seen == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_device_may_copy_as_late_as_its_batch_is_held(workers):
    """A copy that is queued reads the memory when the device comes to it: at the latest when the caller waits for it."""
    queued: list[Callable[[], tuple[int, Tensor]]] = []
    copied: list[tuple[int, Tensor]] = []
    for batch in SlotStream(Fill(), range(30), (2, 3), workers=workers, held=2):
        queued.append(lambda batch=batch: (batch.number, batch.images.clone()))
        time.sleep(0.002)
        if len(queued) > 2:
            copied.append(queued.pop(0)())
    copied += [copy() for copy in queued]
    assert [number for number, _ in copied] == list(range(30))
    assert all(images.eq(number).all() for number, images in copied)


@pytest.mark.parametrize("workers", [0, 1])
def test_slots_are_used_again_and_only_so_many_as_are_on_their_way(workers):
    places = {batch.images.data_ptr() for batch in SlotStream(Fill(), range(30), (2, 3), workers=workers, held=1)}
    assert len(places) == workers * PREFETCH + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_tensors_beside_the_images_arrive_as_they_are(workers):
    (batch,) = SlotStream(Fill(), [7], (2, 3), workers=workers, held=1)
    assert (batch.one.dtype, batch.one.tolist()) == (torch.int64, [7, 8])
    assert batch.one is batch.same  # what was one tensor still is
    assert not batch.one.is_shared()  # no file of shared memory for a few bytes
    batch.one[0] = 1  # and it can be written to


def test_what_cannot_be_rendered_stops_a_stream_behind_the_batches_before_it():
    batches = iter(SlotStream(Fill(), [3, -1, 4], (2, 3), workers=1, held=1))
    assert next(batches).number == 3
    with pytest.raises(BadImageError, match="of -1"):
        next(batches)


def test_the_pages_of_a_stream_are_locked_for_its_gpu_until_it_goes(monkeypatch):
    cuda, gpu = Cuda(monkeypatch), torch.device("cuda:1")
    stream = SlotStream(Fill(), range(9), (2, 3), workers=0, held=2, device=gpu)
    address, size = stream._slots.pixels.data_ptr(), 3 * 2 * 3
    locked = [("lock", gpu, address, size, 0), ("check", 0)]
    assert cuda.calls == locked
    *_, last = stream
    del stream, _
    assert cuda.calls == locked  # the last batch may still have to be copied
    assert last.images.eq(8).all()
    del last
    assert cuda.calls == [*locked, ("unlock", gpu, address)]


def test_no_pages_are_locked_for_a_cpu_or_for_nobody(monkeypatch):
    cuda = Cuda(monkeypatch)
    for device in (None, torch.device("cpu")):
        assert len(list(SlotStream(Fill(), range(3), (2, 3), workers=0, held=2, device=device))) == 3
    assert cuda.calls == []


def test_slots_are_as_many_as_are_on_their_way():
    assert len(Slots((1,), workers=3, held=2).pixels) == 3 * PREFETCH + 3
    assert Slots((1,), workers=1, held=1).pixels.is_shared()
    assert not Slots((1,), workers=0, held=1).pixels.is_shared()


def test_too_little_shared_memory_is_said_before_a_process_dies_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SHARED_MEMORY", tmp_path)
    with pytest.raises(WorkerError, match=r"need [\d,]+ MB of shared memory, .* has [\d,]+ MB: use fewer --workers"):
        Slots((2**40,), workers=1, held=1)


# --- signals --------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from pipeline.machine.loaders import in_processes

def slowly(item, note):
    time.sleep(0.05)
    return os.getppid(), os.getpid(), item

def main():
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    batches = in_processes(slowly, range(10**6), workers=2)
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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process_of_a_job_leaves_the_decision_to_the_parent(script, number):
    process, pids = started(script, "leave")
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert out == "went on\n"
    assert process.returncode == 0  # loaders that nobody shut down do not keep a process from ending
    assert gone_soon(pids)


@pytest.mark.slow
def test_ctrl_c_while_the_loaders_server_starts_does_not_reach_it():
    """It takes seconds to import torch, and would end in a traceback on the user's terminal."""
    code = """
import operator, os, signal, threading, time
signal.signal(signal.SIGINT, lambda *_: None)
from pipeline.machine.loaders import in_processes

def interrupt():
    for _ in range(8):  # while it imports
        time.sleep(0.2)
        os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    threading.Thread(target=interrupt).start()
    print(list(in_processes(operator.is_, range(2), workers=1)))  # whether a number is the function that takes notes
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=with_checkout(), capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("[False, False]\n", "")


@pytest.mark.slow
def test_a_run_that_is_stopped_while_its_loaders_start_says_only_that():
    """The names of the semaphores are gone when the server has imported torch and forks a loader."""
    code = """
import operator, os, signal, threading
from pipeline.machine.loaders import in_processes

if __name__ == "__main__":
    threading.Timer(0.3, os.killpg, (0, signal.SIGINT)).start()
    try:
        list(in_processes(operator.is_, range(10**6), workers=2))
    except KeyboardInterrupt:
        print("stopped")
"""
    command = [sys.executable, "-c", code]  # run() returns when the last process has closed its stderr
    done = subprocess.run(command, env=with_checkout(), capture_output=True, text=True, start_new_session=True)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


class Broken:
    """Work that a starting loader cannot unpickle."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self):
        return raise_it, (self.error,)


def raise_it(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", [FileNotFoundError, EOFError, pickle.UnpicklingError])
def test_other_errors_of_a_starting_loader_are_shown(kind):
    with pytest.raises(kind) as caught:
        pickle.loads(pickle.dumps(Broken(kind("a file of the user"))))
    assert not parent_has_stopped(caught.value, caught.tb)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are read from /proc")
def test_loaders_end_with_a_killed_parent(script):
    process, pids = started(script, "stay")
    process.kill()
    process.communicate(timeout=120)
    assert gone_soon(pids)


# --- how many -------------------------------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLANS = [
    # asked, device, cores, OMP_NUM_THREADS, workers, threads of torch (7: as they were)
    (None, CPU, 8, None, 4, 4),  # half each
    (None, CPU, 1, None, 1, 1),  # never none
    (3, CPU, 8, None, 3, 5),  # what is asked, and the rest for the network
    (0, CPU, 8, None, 0, 8),  # loading happens between the forward passes
    (12, CPU, 8, None, 12, 1),  # more than there are
    (None, CPU, 8, "2", 4, 7),  # the environment decides the threads
    (3, CPU, 8, "2", 3, 7),  # and not the workers
    (None, CUDA, 8, None, 7, 7),  # the network needs one core only
    (None, CUDA, 1, None, 1, 7),
    (5, CUDA, 8, None, 5, 7),
]


@pytest.mark.parametrize(("asked", "device", "cores", "omp", "workers", "threads"), PLANS)
def test_loaders_and_network_share_the_cores(monkeypatch, asked, device, cores, omp, workers, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    set_to = [7]
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert plan_workers(asked, device) == workers
    assert set_to[-1] == threads


def test_cores_are_counted_where_the_system_knows_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert plan_workers(None, CUDA) == 5


@pytest.mark.parametrize(("moves", "hangs"), [(True, False), (False, True)])
def test_a_loader_hangs_when_it_comes_to_no_other_image_and_not_when_a_batch_takes_long(monkeypatch, moves, hangs):
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr("pipeline.machine.loaders.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("pipeline.machine.loaders.TIMEOUT_S", 60)
    whereabouts = loading._Whereabouts(1)

    class Slow:
        asked = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.asked += 1
            if self.asked == 100:
                return "batch"
            whereabouts.note(f"image {self.asked if moves else 0}")
            raise RuntimeError("DataLoader timed out after 5 seconds")

    batches = loading._checked(Slow(), whereabouts)
    if hangs:
        with pytest.raises(WorkerError, match=r"no batch came for 60 s, at image 0\."):
            next(batches)
    else:
        assert next(batches) == "batch"
