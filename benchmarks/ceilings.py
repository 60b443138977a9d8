"""What a machine can do at most: the ceilings that the other figures are held against.

A matrix product in bfloat16, copies within the device's memory and to it, and the launch of a small kernel: medians of rows
of calls, on random data.
"""

import os
import shutil
from typing import Any

import torch
from rounds import Job, gpu_facts, machine

from pipeline.machine.loaders import SHARED_MEMORY, Slots
from pipeline.machine.timing import steady_s

SIDE, COPIED_BYTES, VIEWS = 8192, 2**31, 256
TOY_SIDE, TOY_BYTES = 256, 2**20


def on_gpu(job: Job) -> None:
    """Note what the machine is, and its ceilings."""
    job.note("machine", machine() | {"memory_bytes": total_memory(), "shared_memory_bytes": shared_memory()})
    job.note("gpu", gpu_facts())
    job.note("ceilings", ceilings(job.device, rehearse=job.rehearse))


def ceilings(device: torch.device, *, rehearse: bool) -> dict[str, Any]:
    """Return TFLOP/s of the matrix product, GB/s of the copies, microseconds of a launch."""
    least_s = 0.05 if rehearse else 0.5
    size = TOY_BYTES if rehearse else COPIED_BYTES
    few = torch.ones(1, device=device)
    found = {
        "matrix_tflops": matrix_tflops(device, rehearse=rehearse),
        "device_copy_gb_per_s": device_copy_gb_per_s(device, size, least_s),
        "launch_us": 1e6 * steady_s(lambda: few.add_(1), device, least_s),
    }
    views = torch.randint(256, (VIEWS, 224, 224, 3), dtype=torch.uint8)
    ways = {"pageable": views}
    if device.type == "cuda":
        slots = Slots(tuple(views.shape), workers=1, held=1)
        slots.pin(device)
        slots.pixels[0].copy_(views)
        ways |= {"page_locked": views.pin_memory(), "page_locked_slot": slots.pixels[0]}
    for name, source in ways.items():
        target = torch.empty_like(source, device=device)
        seconds = steady_s(lambda a=source, b=target: b.copy_(a, non_blocking=True), device, least_s)
        found[f"host_to_device_gb_per_s_{name}"] = views.nbytes / 1e9 / seconds
    return {name: round(value, 2) for name, value in found.items()}


def device_copy_gb_per_s(device: torch.device, size: int, least_s: float) -> float:
    """Return what a copy within the device's memory moves, each byte counted as read and as written, GB/s."""
    there, other = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / 1e9 / steady_s(lambda: other.copy_(there), device, least_s)


def matrix_tflops(device: torch.device, *, rehearse: bool = False) -> float:
    """Return what a product of two square matrices in bfloat16 reaches, TFLOP/s."""
    side = TOY_SIDE if rehearse else SIDE
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / 1e12 / steady_s(lambda: a @ b, device, 0.05 if rehearse else 0.5)


def total_memory() -> int:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shared_memory() -> int | None:
    """Return the bytes of shared memory, which loader processes need; None where it has no limit of its own."""
    return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None
