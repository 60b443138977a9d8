"""Resources of this machine: cores, memory, shared memory, open files, and the clock."""

import contextlib
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.doctor.findings import Section
from pipeline.text import byte_size, count

LEAST_MEMORY = 2 * 10**9  # `precompute` with one loader took up to 1.7 GB
SHARED_MEMORY = Path("/dev/shm")
SLOT_BYTES = 256 * 224 * 224 * 3  # a batch of the default size at 224 pixels
SLOTS_PER_LOADER, MORE_SLOTS = 2, 3  # slots of a `SlotStream`: two per loader process, and those that training holds
FEW_FILES = 1024
EARLIEST = 1_735_689_600.0  # 2025-01-01: an earlier time means that the clock was never set
CGROUP, MY_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 2**60  # cgroups version 1 reports larger numbers for "no limit"


def examine_machine() -> Section:
    """Return findings on cores, memory, shared memory, the open file limit, the temporary folder and the clock."""
    section = Section("machine")
    section.row("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    section.row("CPU", _cpu_model())
    cores = _cores(section)
    _memory(section)
    _shared_memory(section, cores)
    _open_files(section)
    _temporary_folder(section)
    now = time.time()
    if now < EARLIEST:
        section.problem(
            f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}: servers' certificates will be refused",
            "Set the clock, or start its synchronisation (timedatectl set-ntp true)",
        )
    return section


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores(section: Section) -> int:
    everywhere = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    quota = cpu_quota()
    limit = "" if quota is None else f", limited to {quota:.3g} by the container"
    section.row("cores", f"{ours} usable of {everywhere}{limit}", {"usable": ours, "all": everywhere, "quota": quota})
    if quota is not None and quota + 0.5 < ours:
        section.warning(
            f"{ours} cores are visible, but the container is limited to {quota:.3g}: processes for {ours} cores will wait for each other",
            f"Pass --workers {max(1, int(quota) - 1)} and set OMP_NUM_THREADS={max(1, int(quota))}",
        )
    return ours


def cpu_quota() -> float | None:
    """Return the CPU limit of this process's control groups, in cores; None without a limit."""
    found: list[float] = []
    for folder in _cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            found += [] if quota == "max" else [int(quota) / int(period)]
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            found += [quota / period] if quota > 0 else []
    return min(found, default=None)


def memory_limit() -> int | None:
    """Return the memory limit of this process's control groups, in bytes; None without a limit."""
    found: list[int] = []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((folder / name).read_text()))
    return min((limit for limit in found if limit < _NO_LIMIT), default=None)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of those above it, which limit it too."""
    with contextlib.suppress(OSError):
        for line in MY_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = CGROUP / controller if controllers else CGROUP
            group = top / path.strip("/")
            yield from (group, *(above for above in group.parents if above.is_relative_to(top)))


def _memory(section: Section) -> None:
    kilobytes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            kilobytes[name] = int(value.split()[0])
    total, free = (1024 * kilobytes.get(name, 0) for name in ("MemTotal", "MemAvailable"))
    limit = memory_limit()
    if not total:
        section.row("memory", "unknown")
        return
    text = f"{byte_size(free)} available of {byte_size(total)}"
    if limit is not None and limit < total:
        text += f", the container may use {byte_size(limit)}"
        free = min(free, limit)
    section.row("memory", text, {"available": free, "total": total, "limit": limit})
    if free < LEAST_MEMORY:
        section.warning(
            f"{byte_size(free)} of memory is available, precompute with one loader process uses up to 1.7 GB",
            "End other programs, or pass --workers 0 and a smaller --batch-size",
        )


def _shared_memory(section: Section, cores: int) -> None:
    if not SHARED_MEMORY.is_dir():
        section.row("shared memory", f"no {SHARED_MEMORY}, so no separate limit")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    section.row(
        "shared memory",
        f"{byte_size(usage.free)} free of {byte_size(usage.total)} in {SHARED_MEMORY}",
        {"free": usage.free, "total": usage.total},
    )
    one, all_ = (SLOT_BYTES * (SLOTS_PER_LOADER * loaders + MORE_SLOTS) for loaders in (1, max(1, cores - 1)))
    way_out = f"Enlarge it (docker run --shm-size {max(1, round(1.2 * all_ / 1e9))}g), or pass fewer --workers or a smaller --batch-size"
    if usage.free < one:
        section.problem(
            f"a loader process needs {byte_size(one)} of shared memory at the default batch size of 256, {byte_size(usage.free)} is free",
            way_out,
        )
    elif usage.free < all_:
        section.warning(
            f"loader processes for {count(cores, 'core')} need {byte_size(all_)} of shared memory at the default batch size of 256, {byte_size(usage.free)} is free",
            way_out,
        )


def _open_files(section: Section) -> None:
    soft, hard = (_files(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    section.row("open files", f"at most {soft}, can be raised to {hard}", {"soft": soft, "hard": hard})
    if isinstance(soft, int) and soft < FEW_FILES:
        section.warning(
            f"a process may open only {soft} files; each tar, connection and batch in shared memory needs one",
            f"Raise it before the command: ulimit -n {min(4096, hard) if isinstance(hard, int) else 4096}",
        )


def _files(limit: int) -> int | str:
    return "any number" if limit == resource.RLIM_INFINITY else limit


def _temporary_folder(section: Section) -> None:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
            file.flush()
        section.row("temporary files", tempfile.gettempdir())
    except OSError as error:
        section.row("temporary files", "cannot be written")
        section.problem(
            f"processes cannot start without temporary files: {error.strerror or error}",
            "Set TMPDIR to a folder that can be written",
        )
