"""Faults are injected into stage 1, and what must hold in spite of them is in the name of each test.

 1 SIGKILL at any call      2 SIGTERM, SIGINT          3 power failure            4 full disk, read-only folder
 5 several writers          6 writers of other sets    7 a paused writer          8 clocks that lie
 9 changed bytes           10 files missing, swapped  11 lost processes          12 loaders that die or hang
13 NaN, one answer for all 14 too little memory; and a source that vanishes while it is read

Others go deeper where one fault needs many tests: random kills in test_kill, lost nodes in test_ray, lost teacher processes
in test_engines, flipped bits of sealed sets in test_tampering, one file at a time in test_storage.
"""

import errno
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.background import PATIENCE_S, wait_until
from support.builders import files_of, make_labels, named_files, teacher_of, with_checkout, write_tars
from support.label_sets import (
    RECIPE,
    colour_teacher,
    coloured_png,
    config_of,
    problems_in,
    read_everything,
    write_source,
    write_tar,
)
from support.label_sets import make_label_set as made_by_stage_1
from torch import nn

from pipeline.errors import (
    DeitCliError,
    LabelSetError,
    LabelSetMismatch,
    LoaderLostError,
    NonFiniteTeacherError,
    SourceError,
    StorageError,
    TeacherError,
    WorkerError,
)
from pipeline.images.samples import ShardIndex, SourceShard
from pipeline.images.source import Source, open_source
from pipeline.labels import sealing
from pipeline.labels.labelset import LabelSet
from pipeline.machine import loaders as loading
from pipeline.stage1 import drafts, plan
from pipeline.stage1 import loop as labelling
from pipeline.stage1 import precompute as stage1
from pipeline.storage import atomic as storage
from pipeline.storage.place import open_place
from pipeline.teacher.teacher import Teacher

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "cv2", "pipeline.stage1.precompute"])
FIRST, LAST = "labels/views-00000-00001/train-0.parquet", "labels/views-00002-00003/train-1.parquet"


def make_label_set(data: Path, out: Path, **settings: Any) -> LabelSet:
    label_set = made_by_stage_1(data, out, **settings)
    assert label_set is not None
    return label_set


def refusal_of(data: Path, out: Path) -> str | None:
    """Return what stage 1 says that it cannot do, or None."""
    try:
        make_label_set(data, out)
    except DeitCliError as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def whole(made) -> dict[str, bytes]:
    return named_files(made)


@pytest.fixture
def begun(copied) -> Path:
    """A run that was interrupted: two of four label shards are there, and no manifest."""
    for name in ("manifest.json", FIRST, LAST):
        (copied / name).unlink()
    return copied


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of change of every file and folder: any write shows in them."""
    entries = ((path, path.stat()) for path in [folder, *folder.rglob("*")])
    return {str(path): (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in entries}


def inodes(folder: Path) -> dict[str, int]:
    """Return the inode of every data file: a file that was made again has another."""
    return {str(path): path.stat().st_ino for path in folder.rglob("*.parquet")}


def sound(part: dict[str, bytes], whole: dict[str, bytes]) -> bool:
    """Whether every file that has its final name is the whole one; the manifest may still be the open one."""
    return all(content == whole[name] for name, content in part.items() if name != "manifest.json")


@pytest.fixture
def processes() -> Iterator[Callable[..., Any]]:
    """Starts processes, and ends those that a failed test left."""
    started = []

    def start(function: Callable[..., object], *args: object) -> Any:
        process = CONTEXT.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


# 1. SIGKILL at any call


def burn_fuse(length: int) -> None:
    """Let this process vanish, with no clean-up whatever, just before its call number `length` that changes the disk."""
    calls = itertools.count()

    def fused(call: Callable[..., Any]) -> Callable[..., Any]:
        def burn(*args: Any, **options: Any) -> Any:
            if next(calls) == length:
                os._exit(signal.SIGKILL)
            return call(*args, **options)

        return burn

    for name in ("fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, fused(getattr(os, name)))
    storage._temporary_file = fused(storage._temporary_file)  # which opens a file


def die_at_each_call(images: Path, folder: Path) -> None:
    """Begin stage 1 anew again and again, and die one call later each time, until one run gets through."""
    for length in itertools.count():
        child = os.fork()
        if not child:
            try:
                burn_fuse(length)
                make_label_set(images, folder / f"{length:03}")
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != signal.SIGKILL:
            sys.exit(code)


@pytest.mark.slow
def test_fault_01_a_run_killed_before_any_call_that_changes_the_disk_is_continued_to_the_same_bytes(
    images, whole, tmp_path, processes
):
    process = processes(die_at_each_call, images, tmp_path / "runs")
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    *cut, through = sorted((tmp_path / "runs").iterdir())
    assert len(cut) > 5 * len(whole)  # each file is opened, synced, named, its folder synced, its temporary removed
    assert named_files(through) == whole
    states = set()
    for folder in cut:
        before, kept = named_files(folder), inodes(folder)
        assert sound(before, whole), folder
        states.add(tuple(sorted(before)))
        make_label_set(images, folder)
        assert named_files(folder) == whole
        assert temporaries(folder) == []  # the dead writer's were swept
        assert kept.items() <= inodes(folder).items()  # what was complete was not made again
    assert len(states) == len(whole) + 1  # killed with 0, 1, 2, ... files complete


# 2. SIGTERM, SIGINT


LONG_RUN = {"views": (0, 40), "views_per_shard": 1, "topk": 2, "accuracy_samples": 0}  # 80 label shards
STOPS = [
    # signal, to the whole group (as a terminal and Slurm do) or to the command alone, teacher processes, exit code, times
    (signal.SIGTERM, "command", 2, 143, 1),
    (signal.SIGTERM, "group", 1, 143, 1),
    (signal.SIGINT, "group", 1, 130, 1),
    (signal.SIGINT, "group", 2, 130, 5),  # somebody is impatient
]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    data = write_tars(tmp_path_factory.mktemp("data"))
    return data, continued(tmp_path_factory.mktemp("long") / "set", data)


def continued(out: Path, data: str) -> dict[str, bytes]:
    return named_files(make_labels(out, data, teacher=teacher_of("support.slow:slow_cnn"), **LONG_RUN).folder)


def marked_processes(mark: str) -> list[int]:
    """Return the processes that run with a mark in their environment: those of one command, orphans included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and "\nState:\tZ" not in (folder / "status").read_text()
            ):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to", "count", "code", "times"), STOPS, ids=[f"{s[0].name} to {s[1]}, {s[4]} times" for s in STOPS]
)
def test_fault_02_a_run_that_is_told_to_stop_exits_by_the_rule_leaves_no_process_and_can_be_continued(
    long_run, tmp_path, sent, to, count, code, times
):
    data, whole = long_run
    out, mark = tmp_path / "set", f"FAULT_MARK={tmp_path}"
    command = [sys.executable, "-m", "cli", "precompute", "--data", data, "--out", str(out)]
    command += ["--teacher", "support.slow:slow_cnn", "--set", "img_size=16", "--set", "mix_block=8", "--views", "0:40"]
    command += ["--views-per-shard", "1", "--topk", "2", "--accuracy-samples", "0", "--workers", "1"]
    environment = with_checkout(SLOW_TEACHER_S="0.2", FAULT_MARK=str(tmp_path))
    with subprocess.Popen(
        [*command, "--processes", str(count)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: len(list(out.glob("labels/*/*.parquet"))) >= 2 or process.poll() is not None, "labels")
            for _ in range(times):
                if process.poll() is None:
                    (os.killpg if to == "group" else os.kill)(process.pid, sent)
                    time.sleep(0.1)
            _, said = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == code, said
            assert "the same command continues" in said.splitlines()[-1]
            assert "Traceback" not in said
            wait_until(lambda: not marked_processes(mark), "the end of every process that the command started")
        finally:
            for pid in marked_processes(mark):
                os.kill(pid, signal.SIGKILL)
    part = named_files(out)
    assert 2 <= len([name for name in part if name.startswith("labels")]) < 80
    assert sound(part, whole)
    assert temporaries(out) == []  # the file that was being written was finished or dropped
    assert continued(out, data) == whole


# 3. Power failure: what is not synced is lost


@pytest.fixture
def disk_calls(monkeypatch) -> list[tuple[str, Path, object]]:
    """Lists what is done to the disk: ("sync", path, bytes), ("name", final path, temporary), ("make", folder, None)."""
    calls: list[tuple[str, Path, object]] = []
    fsync, mkdir = os.fsync, os.mkdir

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve(), os.fstat(descriptor).st_size))

    def make(folder: Any, *rest: Any, **options: Any) -> None:
        mkdir(folder, *rest, **options)
        calls.append(("make", Path(folder), None))

    def naming(call: Callable[..., None]) -> Callable[..., None]:
        def name(temporary: Any, final: Any) -> None:
            call(temporary, final)
            calls.append(("name", Path(final), Path(temporary)))

        return name

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "link", naming(os.link))
    monkeypatch.setattr(os, "replace", naming(os.replace))
    return calls


def synced(calls: list[tuple[str, Path, object]]) -> set[Path]:
    return {path for what, path, _ in calls if what == "sync"}


def test_fault_03_all_of_a_file_is_synced_before_it_has_its_name_and_the_name_before_the_manifest_lists_it(
    images, whole, tmp_path, disk_calls
):
    out = make_label_set(images, tmp_path / "set").folder
    seal = max(at for at, (what, path, _) in enumerate(disk_calls) if (what, path.name) == ("name", "manifest.json"))
    later = {path for what, path, _ in disk_calls[seal + 1 :] if what == "name"}
    assert later <= {out / "README.md"}  # the card, which is none of the set's files
    named = [(at, path, temporary) for at, (what, path, temporary) in enumerate(disk_calls) if what == "name"]
    assert {path for _, path, _ in named} == {out / name for name in whole}
    for at, path, temporary in named:
        content = ("sync", temporary, path.stat().st_size)
        assert content in disk_calls[:at] or path.name == "manifest.json"  # which is named twice, first when it is open
        assert temporary in synced(disk_calls[:at])
        assert path.parent in synced(disk_calls[at:] if at >= seal else disk_calls[at:seal])
    made = [(at, folder) for at, (what, folder, _) in enumerate(disk_calls) if what == "make"]
    assert {folder.name for _, folder in made} == {"set", "samples", "labels", "views-00000-00001", "views-00002-00003"}
    for at, folder in made:
        assert folder.parent in synced(disk_calls[at:seal])


def test_fault_03_names_that_a_killed_run_gave_and_did_not_sync_are_synced_before_the_manifest_lists_them(
    images, copied, whole, disk_calls
):
    (copied / "manifest.json").unlink()
    make_label_set(images, copied)
    seal = max(at for at, (what, _, _) in enumerate(disk_calls) if what == "name")
    folders = {copied / name for name in whole}
    folders = {folder for file in folders for folder in file.parents if folder.is_relative_to(copied)}
    assert folders <= synced(disk_calls[:seal])


# 4. Full disk, read-only folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, pages: int) -> Path:
    """Fill a disk but for some pages."""
    free, ballast = os.statvfs(disk), disk / "ballast"
    ballast.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
    return ballast


@pytest.mark.slow
def test_fault_04_a_disk_that_is_full_at_any_moment_leaves_whole_files_only_and_the_run_goes_on_with_more_space(
    images, whole, small_disk
):
    reached = set()
    for pages in itertools.count():
        out, ballast = small_disk / f"{pages}", leave(small_disk, pages)
        said = refusal_of(images, out)
        if said is None:
            break
        assert said.startswith(f"DiskFullError: {out}")
        assert said.endswith("No space left on device. Free some space")
        before, kept = named_files(out), inodes(out)
        assert sound(before, whole)
        assert temporaries(small_disk) == []
        reached.add(len(before))
        ballast.unlink()
        make_label_set(images, out)
        assert named_files(out) == whole
        assert kept.items() <= inodes(out).items()
        shutil.rmtree(out)
    assert len(reached) >= len(whole) - 2  # it was full at almost every file


def test_fault_04_a_disk_that_is_full_while_views_are_added_leaves_the_older_set_as_it_was(images, whole, small_disk):
    out = make_label_set(images, small_disk / "set").folder
    ballast = leave(small_disk, 1)
    with pytest.raises(StorageError, match=r"views-0000[46].*: No space left on device"):
        make_label_set(images, out, views=(0, 8))
    assert named_files(out).items() >= whole.items()
    assert problems_in(LabelSet.open(out)) == []
    ballast.unlink()
    assert make_label_set(images, out, views=(0, 8)).views == range(8)


def make_within_limit(images: Path, out: Path, limit: int, pipe: Any) -> None:
    """Run stage 1 where no file may be larger than `limit` bytes, then where it may; send the error and what it left."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        make_label_set(images, out)
    except StorageError as error:
        pipe.send(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pipe.send((named_files(out), len(temporaries(out))))
    make_label_set(images, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plan.json", "samples/train-1.parquet", LAST])
def test_fault_04_a_file_over_the_limit_of_a_user_is_named_and_nothing_of_it_is_left(
    images, whole, tmp_path, processes, name
):
    """The limit, RLIMIT_FSIZE, is one byte less than this file needs; smaller files pass."""
    out, (ours, theirs) = tmp_path / "set", CONTEXT.Pipe()
    process = processes(make_within_limit, images, out, len(whole[name]) - 1, theirs)
    with ours, theirs:
        assert ours.poll(PATIENCE_S)
        error = ours.recv()
        assert error.endswith(": File too large")
        refused = Path(error.removesuffix(": File too large")).relative_to(out)
        assert len(whole[str(refused)]) >= len(whole[name])
        left, stray = ours.recv()
    assert sound(left, whole)
    assert str(refused) not in left
    assert stray == 0
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert named_files(out) == whole


@pytest.mark.slow
def test_fault_04_an_error_of_the_disk_at_any_sync_stops_the_run_and_loses_nothing_that_was_complete(
    images, whole, tmp_path, monkeypatch
):
    fsync, calls, broken = os.fsync, itertools.count(), [0]

    def fail_once(descriptor: int) -> None:
        if next(calls) == broken[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    for number in itertools.count():
        calls, broken[0], out = itertools.count(), number, tmp_path / f"{number}"
        said = refusal_of(images, out)
        if said is None:
            break
        assert said.startswith("StorageError: ")
        assert said.endswith(": Input/output error")
        assert sound(named_files(out), whole)
        assert temporaries(out) == []
        make_label_set(images, out)
        assert named_files(out) == whole
    assert number > 2 * len(whole)


def test_fault_04_a_read_only_folder_is_named_and_a_set_in_it_is_read(images, made, whole, small_disk):
    shutil.copytree(made, small_disk / "set")
    shutil.copytree(made, small_disk / "begun")
    (small_disk / "begun" / FIRST).unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("new", "begun"):
        with pytest.raises(
            StorageError, match=rf"{small_disk}/{name}.*Read-only file system. Choose a folder that can"
        ):
            make_label_set(images, small_disk / name)
    assert problems_in(LabelSet.open(small_disk / "set")) == []


def test_fault_04_a_temporary_file_that_may_not_be_deleted_stops_nothing(images, begun, whole, monkeypatch):
    """In a folder that users share, it is another's."""
    stray = begun / f".tmp-{storage._host()}-{NO_PID}-0123456789abcdef"
    stray.write_bytes(b"x")
    unlink = os.unlink

    def refuse(path: Any, **options: Any) -> None:
        if Path(path) == stray:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    make_label_set(images, begun)
    assert named_files(begun) == whole
    assert temporaries(begun) == [stray]


# 5. Several writers of one label set


def make_sets_together(images: Path, folder: Path, barrier: Any, rounds: int) -> None:
    for number in range(rounds):
        barrier.wait(PATIENCE_S)
        make_label_set(images, folder / f"{number}")


@pytest.mark.slow
def test_fault_05_four_writers_of_one_set_all_succeed_and_make_the_files_of_one(images, whole, tmp_path, processes):
    barrier, rounds = CONTEXT.Barrier(4), 5
    writers = [processes(make_sets_together, images, tmp_path / "sets", barrier, rounds) for _ in range(4)]
    for writer in writers:
        writer.join(PATIENCE_S)
    assert [writer.exitcode for writer in writers] == [0] * 4
    for number in range(rounds):
        assert named_files(tmp_path / "sets" / f"{number}") == whole
    assert temporaries(tmp_path) == []


def test_fault_05_a_run_that_begins_while_another_writes_its_plan_joins_it(images, made, whole, tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    is_file, iterdir = Path.is_file, Path.iterdir

    def the_other_goes_on(path: Path) -> None:
        if path in (out, out / "plan.json") and not is_file(out / "plan.json"):
            shutil.copy(made / "plan.json", out)

    def look(path: Path) -> bool:
        found = is_file(path)
        the_other_goes_on(path)
        return found

    def list_all(path: Path) -> Iterator[Path]:
        found = list(iterdir(path))
        the_other_goes_on(path)
        return iter(found)

    monkeypatch.setattr(Path, "is_file", look)
    monkeypatch.setattr(Path, "iterdir", list_all)
    make_label_set(images, out)
    assert named_files(out) == whole


def while_hashing(monkeypatch, other: Callable[[], object]) -> None:
    """Let another run do its work while the next one is hashing the files that its manifest will list."""
    sha256_file, begun = sealing.sha256_file, []

    def hash_slowly(path: Path) -> str:
        if path.suffix == ".parquet" and not begun:
            begun.append(path)
            other()
        return sha256_file(path)

    monkeypatch.setattr(sealing, "sha256_file", hash_slowly)


def test_fault_05_views_that_another_run_seals_while_this_one_is_sealing_stay_sealed(
    images, begun, whole, tmp_path, monkeypatch
):
    expected = named_files(make_label_set(images, tmp_path / "expected", views=(0, 6)).folder)
    while_hashing(monkeypatch, lambda: make_label_set(images, begun, views=(4, 6)))
    assert make_label_set(images, begun).views == range(6)
    assert named_files(begun) == expected


def test_fault_05_views_that_another_run_seals_in_blocks_of_another_size_are_named_and_then_taken(
    images, begun, monkeypatch
):
    def seal_in_another_cut() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(plan, "_begun", lambda *_: [])  # it looked for begun blocks before there were any
            make_label_set(images, begun, views_per_shard=4)

    while_hashing(monkeypatch, seal_in_another_cut)
    with pytest.raises(LabelSetMismatch, match=r"sealed views 0:[24] in blocks of another size\. Run the same command"):
        make_label_set(images, begun)
    sealed = (begun / "manifest.json").read_bytes()
    assert problems_in(make_label_set(images, begun)) == []
    assert (begun / "manifest.json").read_bytes() == sealed


# 6. A writer of another label set


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    # what it has of its own, its settings, what the refusal names
    ("teacher", {"teacher": colour_teacher(4.0)}, "made with teacher"),
    ("seed", {"recipe": RECIPE.with_fields(seed=1)}, r"made with recipe .* \(seed: 0, not 1\)"),
    ("recipe", {"recipe": RECIPE.with_fields(hflip=0.25)}, r"made with recipe .* \(hflip: 0.5, not 0.25\)"),
    ("K", {"topk": 1}, "made with --topk 2, this run asks for 1"),
]


@pytest.mark.parametrize(("what", "settings", "text"), OTHERS, ids=[other[0] for other in OTHERS])
def test_fault_06_a_writer_of_another_set_is_refused_before_it_writes_anything(images, begun, what, settings, text):
    before = listing(begun)
    with pytest.raises(LabelSetMismatch, match=text):
        make_label_set(images, begun, **settings)
    assert listing(begun) == before


def test_fault_06_of_two_sets_begun_in_one_folder_at_once_only_the_first_goes_on(
    images, made, whole, tmp_path, monkeypatch
):
    """The second looked at the folder before the first wrote its plan there."""
    out, claim = tmp_path / "set", stage1.claim

    def claim_second(*args: Any, **how: Any) -> None:
        out.mkdir()
        shutil.copy(made / "plan.json", out)
        claim(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(stage1, "claim", claim_second)
        with pytest.raises(LabelSetMismatch, match="made with teacher"):
            make_label_set(images, out, teacher=colour_teacher(4.0))
    assert named_files(out) == {"plan.json": whole["plan.json"]}
    assert temporaries(out) == []
    make_label_set(images, out)
    assert named_files(out) == whole


# 7. A paused writer


def pause_once(images: Path, out: Path, where: str) -> None:
    """Run stage 1, and stop like a process on a frozen machine at one place."""
    paused = []

    def pausing(call: Callable[..., Any]) -> Callable[..., Any]:
        def pause(path: Path, *rest: Any) -> Any:
            if (path.suffix == ".parquet" or "labels" in path.parts) and not paused:
                paused.append(path)
                os.kill(os.getpid(), signal.SIGSTOP)
            return call(path, *rest)

        return pause

    if where == "before it names a label shard":
        storage._link = pausing(storage._link)
    else:
        sealing.sha256_file = pausing(sealing.sha256_file)
    make_label_set(images, out)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before it names a label shard", "while it hashes for the manifest"])
def test_fault_07_a_writer_that_wakes_up_when_others_have_done_its_work_changes_nothing(
    images, whole, tmp_path, processes, where
):
    out = tmp_path / "set"
    writer = processes(pause_once, images, out, where)
    wait_until(lambda: is_stopped(writer.pid), where)
    make_label_set(images, out)
    assert named_files(out) == whole
    later = make_label_set(images, out, views=(0, 6)).folder
    before, kept = named_files(later), inodes(later)
    os.kill(writer.pid, signal.SIGCONT)
    writer.join(PATIENCE_S)
    assert writer.exitcode == 0
    assert named_files(out) == before
    assert inodes(out) == kept
    assert temporaries(out) == []


# 8. Clocks that lie


TEN_YEARS_S = 10 * 365 * 86400
NO_PID = 2**22 + 1  # Linux never gives one above 2**22


def set_times(folder: Path, offsets: list[int]) -> None:
    for path, offset in zip(sorted(folder.rglob("*")), itertools.cycle(offsets), strict=False):
        changed_s = path.stat().st_mtime + offset
        os.utime(path, times=(changed_s, changed_s))


def test_fault_08_files_do_not_depend_on_a_clock_that_jumps(images, whole, tmp_path, monkeypatch):
    now, jumps = time.time(), random.Random(0)
    monkeypatch.setattr(time, "time", lambda: now + jumps.choice([-1, 1]) * TEN_YEARS_S)
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    assert abs(time.time() - now) == TEN_YEARS_S
    make_label_set(images, tmp_path / "set")
    assert named_files(tmp_path / "set") == whole


@pytest.mark.parametrize("offsets", [[TEN_YEARS_S], [-TEN_YEARS_S], [TEN_YEARS_S, -TEN_YEARS_S]], ids=["+", "-", "+-"])
@pytest.mark.parametrize("state", ["begun", "sealed"])
def test_fault_08_what_is_complete_is_told_by_its_bytes_and_not_by_its_times(images, copied, whole, state, offsets):
    if state == "begun":
        for name in ("manifest.json", FIRST, LAST):
            (copied / name).unlink()
    kept, teacher, asked = inodes(copied), colour_teacher(), []
    teacher.networks[0].module.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    set_times(copied, offsets)
    make_label_set(images, copied, teacher=teacher)
    assert named_files(copied) == whole
    assert kept.items() <= inodes(copied).items()
    assert sum(asked) == (2 * 5 + 2 * 4 if state == "begun" else 0)  # nothing that was complete is asked again


@pytest.mark.parametrize("offset", [TEN_YEARS_S, -TEN_YEARS_S])
def test_fault_08_temporaries_of_the_living_stay_and_those_of_the_dead_go_whatever_their_age(
    images, begun, whole, offset
):
    living = begun / f".tmp-{storage._host()}-{os.getpid()}-0123456789abcdef"
    dead = begun / f".tmp-{storage._host()}-{NO_PID}-0123456789abcdef"
    for path in (living, dead):
        path.write_bytes(b"x")
    set_times(begun, [offset])
    make_label_set(images, begun)
    assert temporaries(begun) == [living]
    assert named_files(begun) == whole


# 9. Changed bytes


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return other bytes: one bit flipped, the end cut off, or something appended."""
    place = rng.randrange(len(data))
    return rng.choice(
        [
            data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :],
            data[:place],
            data + rng.randbytes(rng.randrange(1, 64)),
        ]
    )


def problems_of(folder: Path) -> list[str]:
    try:
        return problems_in(LabelSet.open(folder))
    except (LabelSetError, StorageError) as error:
        return [str(error)]


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_fault_09_any_change_of_a_sealed_file_is_found_and_the_file_is_named(copied, whole, count):
    rng = random.Random(count)
    names = sorted(whole.keys() - {"README.md"})  # the card is none of the set's files
    for number in range(count):
        name = names[number % len(names)]
        change = damaged(whole[name], rng)
        (copied / name).write_bytes(change)
        problems = problems_of(copied)
        (copied / name).write_bytes(whole[name])
        assert problems, (name, number)
        assert all(name in problem for problem in problems), problems
    assert problems_of(copied) == []


@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_fault_09_a_run_is_not_continued_from_a_damaged_file_that_no_manifest_lists_yet(images, copied, whole, count):
    """Or else not one value in it is another: Parquet's own headers hold statistics and names that we do not use."""
    (copied / "manifest.json").unlink()
    rng = random.Random(count)
    source = open_source(str(images))
    plan = labelling.Plan.model_validate_json(whole["plan.json"])
    job = labelling.Job(config_of(images, copied), plan, RECIPE, source, workers=0, cores=1)
    files = [name for name in sorted(whole) if name.endswith(".parquet")]
    tasks = [labelling.LabelTask(shard, views) for shard in ("train-0", "train-1") for views in (range(2), range(2, 4))]
    reference = values_of(copied, job, tasks)
    for number in range(count):
        name = files[number % len(files)]
        change = damaged(whole[name], rng)
        (copied / name).write_bytes(change)
        said = refusal_to_continue(job, tasks)
        if said is None:
            assert values_of(copied, job, tasks) == reference, (name, number)
            assert len(change) == len(whole[name])
        else:
            assert name in said or "renders other pixels" in said
        (copied / name).write_bytes(whole[name])


def refusal_to_continue(job: labelling.Job, tasks: list[labelling.LabelTask]) -> str | None:
    try:
        assert all(labelling.is_done(job, task, job.samples(task.shard)) for task in tasks)
    except LabelSetError as error:
        return str(error)
    return None


def values_of(folder: Path, job: labelling.Job, tasks: list[labelling.LabelTask]) -> list[object]:
    """Return every value of some label shards and of their samples."""
    arrays = ("row", "hard", "topk_index", "topk_prob", "tail_mass")
    labels = [
        getattr(rows, name).tolist()
        for path in labelling.paths_of(folder, tasks)
        for rows in labelling.read_all_views(path)
        for name in arrays
    ]
    samples = [job.samples(task.shard) for task in tasks]
    columns = ("key", "class_label", "image_bytes", "image_xxh3", "height", "width", "bad")
    return [*labels, *([np.asarray(getattr(table, name)).tolist() for name in columns] for table in samples)]


@pytest.mark.parametrize("state", ["begun", "sealed"])
def test_fault_09_a_damaged_label_shard_is_refused_with_the_way_out_and_the_way_leads_out(images, copied, whole, state):
    if state == "begun":
        (copied / "manifest.json").unlink()
    kept = {path: inode for path, inode in inodes(copied).items() if not path.endswith(FIRST)}
    data = whole[FIRST]
    for change in (data[:100] + bytes([data[100] ^ 1]) + data[101:], data[:-1], data[:4], b"", data + b"\0"):
        (copied / FIRST).write_bytes(change)
        with pytest.raises(LabelSetError, match=rf"{FIRST}.*[Dd]elete it and run"):
            make_label_set(images, copied)
        (copied / FIRST).unlink()
        make_label_set(images, copied, views=(0, 4) if state == "begun" else (0, 2))
        assert named_files(copied) == whole
        assert kept.items() <= inodes(copied).items()  # nothing else was made again
        if state == "begun":
            (copied / "manifest.json").unlink()


# 10. Files missing, swapped, twice, too many


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


SECOND, OTHER_VIEWS = "labels/views-00000-00001/train-1.parquet", "labels/views-00002-00003/train-0.parquet"
MIXED_UP: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    # what was done, how, the files that may be named
    ("a shard is missing", lambda f: (f / FIRST).unlink(), (FIRST,)),
    ("a samples file is missing", lambda f: (f / "samples/train-0.parquet").unlink(), ("samples/train-0.parquet",)),
    ("two shards are swapped", lambda f: swap(f / FIRST, f / SECOND), (FIRST, SECOND)),
    ("two blocks of views are swapped", lambda f: swap(f / FIRST, f / OTHER_VIEWS), (FIRST, OTHER_VIEWS)),
    ("a shard stands in place of another", lambda f: shutil.copy(f / SECOND, f / FIRST), (FIRST,)),
    ("a block stands in place of another", lambda f: shutil.copy(f / OTHER_VIEWS, f / FIRST), (FIRST,)),
]


@pytest.mark.parametrize(("what", "mix_up", "names"), MIXED_UP, ids=[case[0] for case in MIXED_UP])
def test_fault_10_a_sealed_set_with_files_missing_or_mixed_up_is_refused_by_name(copied, what, mix_up, names):
    mix_up(copied)
    problems = problems_of(copied)
    assert problems
    assert all(any(name in problem for name in names) for problem in problems)


@pytest.mark.parametrize(("what", "mix_up", "names"), MIXED_UP, ids=[case[0] for case in MIXED_UP])
def test_fault_10_a_run_with_files_missing_or_mixed_up_makes_them_again_or_refuses_them_by_name(
    images, copied, whole, what, mix_up, names
):
    (copied / "manifest.json").unlink()
    mix_up(copied)
    if "missing" in what:
        make_label_set(images, copied)
        assert named_files(copied) == whole
    else:
        with pytest.raises(LabelSetMismatch, match="|".join(names)):
            make_label_set(images, copied)
        assert not LabelSet(open_place(copied)).manifest.sealed


def test_fault_10_a_file_too_many_changes_no_label_and_is_never_listed(images, begun, made, whole):
    extra = {"labels/views-00000-00001/train-9.parquet": FIRST, "labels/views-00000-00003/train-0.parquet": SECOND}
    for name, origin in extra.items():
        (begun / name).parent.mkdir(exist_ok=True)
        shutil.copy(made / origin, begun / name)
    label_set = make_label_set(images, begun)
    assert list(read_everything(label_set)) == list(read_everything(LabelSet.open(made)))
    assert {name: content for name, content in named_files(begun).items() if name not in extra} == whole


# 11. Lost processes, and 12. loaders that die or hang


@dataclass(frozen=True)
class Trapped(SourceShard[Any]):
    """A source shard of which one image harms the process that reads it, as long as a file `armed` is there."""

    name: str
    shard: SourceShard[Any]
    key: str
    harm: str
    armed: Path

    def build_index(self) -> ShardIndex[Any]:
        return self.shard.build_index()

    @property
    def place_type(self) -> type[Any]:
        return self.shard.place_type

    def read_image(self, position: int) -> bytes:
        if self.index.keys[position] == self.key and self.armed.exists():
            if self.harm == "hangs":
                time.sleep(10 * PATIENCE_S)
            self.armed.unlink()
            if self.harm == "exits":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.shard.read_image(position)


def trapped(source: Source, key: str, harm: str, armed: Path) -> Source:
    armed.touch()
    shards = (Trapped(s.name, s, key, harm, armed) if key in s.keys else s for s in source.shards)
    return replace(source, shards=tuple(shards))


def label_trapped(images: Path, out: Path, source: Source, **settings: Any) -> None:
    stage1.precompute(config_of(images, out, **settings), RECIPE, colour_teacher(), source)


def test_fault_11_what_a_lost_process_was_writing_is_gone_when_the_set_is_sealed(images, begun, whole):
    dead = begun / "labels" / f".tmp-{storage._host()}-{NO_PID}-0123456789abcdef"
    ticks = []

    def leave_a_half_file(tick: Any) -> None:
        ticks.append(tick.phase)
        dead.write_bytes(b"half")

    stage1.precompute(
        config_of(images, begun), RECIPE, colour_teacher(), open_source(str(images)), progress=leave_a_half_file
    )
    assert "label" in ticks
    assert files_of(begun) == whole


@pytest.mark.slow
def test_fault_11_a_killed_loader_ends_the_run_at_once_and_the_next_run_completes_it(images, begun, whole, tmp_path):
    kept = inodes(begun)
    source = trapped(open_source(str(images)), "n002", "is killed", tmp_path / "armed")
    with pytest.raises(
        WorkerError, match=r"a loader process was lost .* at image 'n002' of train-0.*Use fewer --workers"
    ):
        label_trapped(images, begun, source, workers=2)
    assert sound(named_files(begun), whole)
    label_trapped(images, begun, source, workers=2)
    assert named_files(begun) == whole
    assert kept.items() <= inodes(begun).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "text"),
    [("exits", "a loader process was lost"), ("hangs", "no batch came for 15 s")],
)
def test_fault_12_a_loader_that_dies_or_hangs_over_an_image_is_an_error_that_names_it(
    images, begun, whole, tmp_path, monkeypatch, harm, text
):
    if harm == "hangs":
        monkeypatch.setattr(loading, "TIMEOUT_S", 15)
    source = trapped(open_source(str(images)), "n003", harm, tmp_path / "armed")
    with pytest.raises(LoaderLostError, match=rf"{text}.*, at image 'n003' of train-0\. Killed for memory\?"):
        label_trapped(images, begun, source, workers=1)
    assert sound(named_files(begun), whole)
    (tmp_path / "armed").unlink(missing_ok=True)
    label_trapped(images, begun, source, workers=1)
    assert named_files(begun) == whole


@pytest.mark.slow
def test_fault_12_a_loader_that_dies_while_samples_are_indexed_ends_the_run_and_the_next_one_completes_it(
    images, whole, tmp_path
):
    source = trapped(open_source(str(images)), "n007", "exits", tmp_path / "armed")
    with pytest.raises(WorkerError, match=r"a loader process was lost .*, at image 'n007' of train-1\."):
        label_trapped(images, tmp_path / "set", source, workers=1)
    assert not (tmp_path / "set/samples/train-1.parquet").exists()
    label_trapped(images, tmp_path / "set", source, workers=1)
    assert named_files(tmp_path / "set") == whole


# 13. A teacher that answers NaN, or the same of everything


def spoil(teacher: Teacher, at: int, rows: list[int], value: float) -> list[torch.Tensor]:
    """Put a value into some answers of forward pass number `at`; return a list that will hold what passes were asked."""
    asked: list[torch.Tensor] = []

    def hook(_: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        asked.append(inputs[0])
        if len(asked) - 1 == at:
            logits = logits.clone()
            logits[rows, 1] = value
        return logits

    teacher.networks[0].module.register_forward_hook(hook)
    return asked


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 5, 11])
def test_fault_13_views_of_a_non_finite_answer_are_named_and_no_label_of_their_shard_is_stored(
    images, whole, tmp_path, monkeypatch, at, value
):
    """The fault passes, as one of a GPU would: the next run, of the same teacher, completes the set."""
    batches = []
    store = labelling.ShardsInProgress.store_answer
    noting = lambda shards, b, p: (batches.append(b), store(shards, b, p))  # noqa: E731
    monkeypatch.setattr(labelling.ShardsInProgress, "store_answer", noting)
    teacher, out = colour_teacher(), tmp_path / "set"
    spoil(teacher, at, [0, 2], value)
    with pytest.raises(NonFiniteTeacherError, match="these labels were not stored") as caught:
        make_label_set(images, out, teacher=teacher)
    batch = batches[at]
    keys = [open_source(str(images)).shard(batch.shard).keys[int(batch.rows[position])] for position in (0, 2)]
    assert f"for view {batch.view} of {keys[0]!r}, {keys[1]!r} in {batch.shard}" in str(caught.value)
    left = named_files(out)
    assert sound(left, whole)
    assert f"labels/views-{batch.views.start:05}-{batch.views.stop - 1:05}/{batch.shard}.parquet" not in left
    make_label_set(images, out, teacher=teacher)
    assert named_files(out) == whole


def test_fault_13_a_teacher_that_says_the_same_of_everything_is_warned_about(images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(drafts, "SUSPICIOUS", 10)  # a label shard of this set has ten labels or eight
    make_label_set(images, tmp_path / "sound")
    assert "Check its weights" not in caplog.text
    teacher = colour_teacher(name="constant")
    teacher.networks[0].module.register_forward_hook(lambda *_: torch.tensor([[0.0, 0.0, 9.0]]).expand(len(_[1][0]), 3))
    make_label_set(images, tmp_path / "constant", teacher=teacher)
    warnings = [record.getMessage() for record in caplog.records if "Check its weights" in record.getMessage()]
    assert warnings == [
        f"train-0, views {start}:{start + 2}: the teacher gave class 2 to all of 10 views."
        " Check its weights and its normalisation"
        for start in (0, 2)
    ]


# 14. Too little memory


@pytest.fixture
def no_pool(monkeypatch):
    """Let a teacher on the CPU go the way of one on a GPU, whose memory may not suffice."""
    limit = Teacher.limit_threads

    def limit_and_close(teacher: Teacher, threads: int) -> None:
        limit(teacher, threads)
        teacher._pool = None

    monkeypatch.setattr(Teacher, "limit_threads", limit_and_close)


def teacher_with_room(views: int) -> tuple[Teacher, list[int]]:
    """Return a teacher whose device holds so many views, and a list that will hold how many each pass was asked."""
    teacher, asked = colour_teacher(), []

    def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        asked.append(len(inputs[0]))
        if len(inputs[0]) > views:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs[0])} views")

    teacher.networks[0].module.register_forward_pre_hook(hook)
    return teacher, asked


@pytest.mark.parametrize(("room", "sizes"), [(8, [16, 8]), (5, [16, 8, 4]), (2, [16, 8, 4, 2])])
def test_fault_14_a_batch_that_does_not_fit_is_halved_until_it_does_and_the_labels_are_the_same(
    tmp_path, no_pool, caplog, room, sizes
):
    images, recipe = write_source(tmp_path / "tars", (19, 16)), RECIPE.with_fields(mix_block=16)
    expected = make_label_set(images, tmp_path / "enough", recipe=recipe)
    teacher, asked = teacher_with_room(room)
    found = make_label_set(images, tmp_path / "little", recipe=recipe, teacher=teacher)
    assert asked[: len(sizes)] == sizes
    assert max(asked[len(sizes) :]) == sizes[-1]  # it goes on with what fits
    assert [record.args[-1] for record in caplog.records if "out of memory" in record.msg] == sizes[1:]
    for shard, view in itertools.product(expected.shards, expected.views):
        mine, theirs = expected.read(shard, view), found.read(shard, view)
        assert (mine.row.tolist(), mine.hard.tolist()) == (theirs.row.tolist(), theirs.hard.tolist())
        np.testing.assert_array_equal(mine.topk_index, theirs.topk_index)
        np.testing.assert_allclose(mine.topk_prob.astype(float), theirs.topk_prob.astype(float), atol=1e-3)


def test_fault_14_a_device_too_small_for_two_views_is_named_and_nothing_is_stored(images, whole, tmp_path, no_pool):
    with pytest.raises(TeacherError, match="two views of 16 pixels do not fit into the memory of cpu: no memory for 2"):
        make_label_set(images, tmp_path / "set", teacher=teacher_with_room(1)[0])
    assert sound(named_files(tmp_path / "set"), whole)
    assert not (tmp_path / "set/labels").exists()
    make_label_set(images, tmp_path / "set")
    assert named_files(tmp_path / "set") == whole


# And a source that vanishes or changes while it is read


def other_image(tar: Path) -> None:
    """Write the tar again with the same keys and labels, and another picture in its last sample."""
    pictures = [coloured_png(number if number != 8 else 80) for number in range(5, 9)]
    members = [(f"n{number:03}.png", picture) for number, picture in enumerate(pictures, start=5)]
    labels = [(f"n{number:03}.cls", b"%d" % (number % 3)) for number in range(5, 8)]
    write_tar(tar, sorted(members + labels, key=lambda member: member[0].replace("png", "a")))  # images come first


VANISHING: list[tuple[str, Callable[[Path], object], str, str]] = [
    # what happens to the tar, how, what the run says, what the next run says
    ("deleted", Path.unlink, r"train-1\.tar: cannot be read: No such file", "made with source"),
    ("cut", lambda tar: os.truncate(tar, 1000), r"train-1\.tar: byte \d+: the file is cut off", r"train-1\.tar: byte"),
    ("replaced", other_image, r"image 'n008' of train-1 has other bytes", r"image 'n008' of train-1 has other bytes"),
]


@pytest.mark.parametrize(("what", "harm", "text", "again"), VANISHING, ids=[case[0] for case in VANISHING])
def test_a_source_shard_that_is_lost_while_it_is_read_is_named_and_the_run_goes_on_when_it_is_back(
    images, tmp_path, what, harm, text, again
):
    data, out = Path(shutil.copytree(images, tmp_path / "tars")), tmp_path / "set"
    whole = named_files(make_label_set(data, tmp_path / "whole").folder)
    tar = data / "train-1.tar"
    content, seen = tar.read_bytes(), []

    def lose(tick: Any) -> None:
        if tick.phase == "label" and not seen:
            seen.append(tick)
            harm(tar)

    with pytest.raises((SourceError, LabelSetMismatch), match=text):
        stage1.precompute(config_of(data, out), RECIPE, colour_teacher(), open_source(str(data)), progress=lose)
    assert sound(named_files(out), whole)
    with pytest.raises((SourceError, LabelSetMismatch), match=again):
        make_label_set(data, out)
    assert sound(named_files(out), whole)
    tar.write_bytes(content)
    make_label_set(data, out)
    assert named_files(out) == whole


# 22. Strict umask, odd and long paths


@pytest.mark.parametrize("name", ["spaces and ümläuts", "x" * 200, "deep/" * 40 + "set", "100%{}$HOME"])
def test_fault_22_odd_and_long_names_of_a_label_set_work(images, whole, tmp_path, name):
    make_label_set(images, tmp_path / name)
    assert named_files(tmp_path / name) == whole


def test_fault_22_a_name_that_is_too_long_is_named(images, tmp_path):
    with pytest.raises(StorageError, match="File name too long"):
        make_label_set(images, tmp_path / ("x" * 300))


def test_fault_22_a_strict_umask_leaves_what_the_user_can_read(images, whole, tmp_path):
    before = os.umask(0o077)
    try:
        make_label_set(images, tmp_path / "set", views=(0, 2))
        make_label_set(images, tmp_path / "set", views=(2, 4))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "set").rglob("*.*") if path.is_file()} == {0o600}
    labels = {name: data for name, data in named_files(tmp_path / "set").items() if name.endswith(".parquet")}
    assert labels == {name: data for name, data in whole.items() if name.endswith(".parquet")}


# 24. Few file descriptors, many shards


@pytest.mark.slow
def test_fault_24_few_file_descriptors_and_many_label_shards_are_enough(tmp_path):
    """64 descriptors, 300 tars, 600 label files, two loader processes; then all of it is verified."""
    data, out = write_tars(tmp_path / "data", (2,) * 300), tmp_path / "set"
    words = ["--teacher=test_resnet", "--no-pretrained", "--teacher-img-size=16", "--set=img_size=16", "--topk=2"]
    words += ["--views=0:2", "--views-per-shard=1", "--accuracy-samples=0", "--device=cpu", "--workers=2"]
    for command in (["precompute", f"--data={data}", f"--out={out}", *words], ["labels", "verify", str(out)]):
        run = subprocess.run(
            [sys.executable, "-m", "cli", *command],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=with_checkout(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        )
        assert run.returncode == 0, run.stderr
    assert len(list(out.rglob("labels/*/*.parquet"))) == 600
