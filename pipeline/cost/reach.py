"""What this machine labels with, and how fast its parts could go together, from the rates of each part alone."""

import os
from dataclasses import dataclass
from typing import Literal

from pipeline.cost.rates import Rates
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.machine.threads import usable_cores
from pipeline.settings.configs import PrecomputeConfig
from pipeline.teacher.teacher import Teacher

Limit = Literal["teacher", "rendering", "cores"]
LIMITS: dict[Limit, str] = {
    "teacher": "the teacher is the limit: another device would help",
    "rendering": "rendering is the limit: more cores would help",
    "cores": "the cores, which run teacher and rendering, are the limit: a GPU or more cores would help",
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run labels with here.

    Attributes:
        device: kind of device that runs the teacher, `cpu` or `cuda`.
        devices: number of devices.
        threads: threads of the teacher on each device, where that is the CPU; None where it is a GPU.
        loaders: number of processes that render.
        cores: number of cores of this machine.
        views_per_decode: number of views that are made of an image once it is decoded.
    """

    device: str
    devices: int
    threads: int | None
    loaders: int
    cores: int
    views_per_decode: int


def plan_machine(config: PrecomputeConfig, teacher: Teacher) -> Machine:
    """Return what precompute would use here for these settings."""
    rank, kind = rank_from(os.environ), teacher.device.type
    devices = plan_devices(teacher.config.device, config.processes, rank)
    return Machine(
        device=kind,
        devices=len(devices),
        threads=teacher.threads if kind == "cpu" else None,
        loaders=len(devices) * max(1, plan_loaders(config.workers, plan_cores(devices, rank), kind)),
        cores=usable_cores(),
        views_per_decode=min(config.views[1] - config.views[0], config.views_per_shard),
    )


@dataclass(frozen=True)
class ReachableRates:
    """How fast the parts of stage 1 can go on one machine, in views/s.

    Attributes:
        teacher: rate of all devices, when nothing else takes time.
        rendering: rate of all loader processes, when nothing else takes time.
        cores: rate of all cores, where they run the teacher too; None where a GPU does.
    """

    teacher: float
    rendering: float
    cores: float | None

    @property
    def together(self) -> float:
        """The most that all parts together can reach."""
        return min(self._parts.values())

    @property
    def limit(self) -> Limit:
        """The part that decides."""
        return min(self._parts, key=self._parts.__getitem__)

    @property
    def _parts(self) -> dict[Limit, float]:
        parts: dict[Limit, float] = {} if self.cores is None else {"cores": self.cores}
        parts["teacher"], parts["rendering"] = self.teacher, self.rendering
        return parts


def reachable_rates(rates: Rates, machine: Machine) -> ReachableRates:
    """Work out how fast a machine of these rates can label."""
    view_s = rates.view_s(machine.views_per_decode)
    return ReachableRates(
        teacher=machine.devices / rates.answer_s,
        rendering=machine.loaders / view_s,
        cores=None if machine.threads is None else machine.cores / (machine.threads * rates.answer_s + view_s),
    )
