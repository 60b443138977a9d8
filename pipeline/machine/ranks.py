"""The share of the work, the devices and the cores of this process, on a machine that others may use too."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipeline.errors import UsageError
from pipeline.machine.threads import usable_cores

Task = TypeVar("Task")
ACCELERATORS = ("cuda", "xpu", "mps")  # what `auto` chooses; torch calls AMD's GPUs (ROCm) cuda too


@dataclass(frozen=True)
class Rank:
    """The share of this process in a static split, as launchers set it in the environment.

    Attributes:
        rank: number of this process, 0 <= rank < world_size.
        world_size: number of processes.
        local_rank: number of this process among those of this machine.
        local_world_size: number of processes of this machine.
        cores: number of cores that the launcher gave to this rank alone; None: the ranks of a machine share its cores.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    cores: int | None = None

    def share(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks of this rank: every world_size-th, starting with its own number."""
        return list(tasks[self.rank :: self.world_size])


def rank_from(environment: Mapping[str, str], *, arrays: bool = True) -> Rank:
    """Read torchrun's variables, else those of a Slurm job array and of srun.

    Args:
        environment: environment variables of this process.
        arrays: whether the elements of a job array share the work; else each is on its own.

    Raises:
        UsageError: the variables are not numbers, or contradict each other.
    """

    def number(name: str, default: int) -> int:
        value = environment.get(name) or f"{default}"
        try:
            return int(value)
        except ValueError:
            raise UsageError(f"{name} must be a whole number, got {value!r}") from None

    cores = None
    if "RANK" in environment or "WORLD_SIZE" in environment:
        if missing := {"RANK", "WORLD_SIZE"} - set(environment):
            raise UsageError(f"RANK and WORLD_SIZE belong together, and {missing.pop()} is not set: set both or none")
        rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
        local = number("LOCAL_RANK", 0)
        locals_ = number("LOCAL_WORLD_SIZE", local + 1)
    else:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
        rank, size = (number("SLURM_ARRAY_TASK_ID", first) - first) // step, number("SLURM_ARRAY_TASK_COUNT", 1)
        rank, size = (rank, size) if arrays else (0, 1)
        local, locals_ = 0, 1
        if "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment:  # started by srun, not by sbatch
            tasks = number("SLURM_NTASKS", 1)
            rank, size = rank * tasks + number("SLURM_PROCID", 0), size * tasks
            counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 4(x2),3
            local = number("SLURM_LOCALID", 0)
            locals_ = max(map(int, counts), default=local + 1)
            cores = number("SLURM_CPUS_PER_TASK", 0) or None
    for name, each, of in (("rank", rank, size), ("local rank", local, locals_)):
        if of < 1:
            raise UsageError(f"the launcher says that there are {of} {name}s: there must be at least 1")
        if not 0 <= each < of:
            raise UsageError(f"the launcher says {name} {each} of {of}: it must be in 0..{of - 1}")
    return Rank(rank, size, local, locals_, cores)


def accelerator() -> str | None:
    """Return the type of the GPUs that torch can use on this machine, one of ACCELERATORS; None if there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in ACCELERATORS else None


def plan_devices(device: str, processes: int | None, rank: Rank) -> list[str]:
    """Return one torch device for each teacher process of this machine.

    Args:
        device: device that the user asked for; `auto` means every visible GPU, or the CPU if there is none.
        processes: number that the user asked for; None: one for each GPU, or on a CPU a single one that uses all cores.
        rank: rank of this process; the ranks of a machine divide its GPUs among themselves.
    """
    if device == "auto" and (kind := accelerator()):
        visible = [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        if rank.local_world_size > 1 and len(visible) > 1:
            visible = visible[rank.local_rank % len(visible) :: rank.local_world_size]
        return [visible[i % len(visible)] for i in range(processes or len(visible))]
    return ["cpu" if device == "auto" else device] * (processes or 1)


def plan_cores(devices: Sequence[str], rank: Rank) -> int:
    """Return the number of cores that each teacher process of this machine may use alone."""
    ours = min(usable_cores(), rank.cores) if rank.cores else usable_cores() // rank.local_world_size
    return max(1, ours // len(devices))


def plan_loaders(asked: int | None, cores: int, device: str) -> int:
    """Return the number of loader processes of a teacher process: one less than its cores, or half of them on a CPU.

    On a CPU the teacher also has a thread for each core, so the slower one, teacher or rendering, gets the cores that are free.
    """
    return max(1, cores // 2 if device == "cpu" else cores - 1) if asked is None else asked


def resolve_device(name: str) -> torch.device:
    """Return the torch device with this name; `auto` means the accelerator of this machine, or the CPU if there is none."""
    if name == "auto":
        return torch.device(accelerator() or "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(1).item()  # fails on a device without memory (meta)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def forward_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of forward passes by its name in torch; `auto` is bfloat16 on CUDA and XPU, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    """Return the name of a device for people: the GPU's product name, or its type if it has none, such as cpu or mps."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    return device.type


def double_on(device: torch.device) -> torch.device:
    """Return where sums in float64 are kept: on the device, but for Apple's GPUs, which have no float64, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def free_unused_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later tensors back to a GPU; on a CPU torch keeps none."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device has no memory left; MPS has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error)
