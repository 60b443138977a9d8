"""The resources of this machine for labelling, and its reachable speed, computed from the rate of each part."""

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
    """The resources of a run on this machine.

    Attributes:
        device: kind of device that runs the teacher, `cpu` or `cuda`.
        devices: number of devices.
        threads: threads of the teacher on each device, if the device is the CPU; None for a GPU.
        loaders: number of processes that render.
        cores: number of cores of this machine.
        views_per_decode: number of views made from each decoded image.
    """

    device: str
    devices: int
    threads: int | None
    loaders: int
    cores: int
    views_per_decode: int


def plan_machine(config: PrecomputeConfig, teacher: Teacher) -> Machine:
    """Return the resources that precompute would use here with these settings."""
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
    """The reachable speed of the parts of stage 1 on one machine, in views/s.

    Attributes:
        teacher: rate of all devices, if nothing else takes time.
        rendering: rate of all loader processes, if nothing else takes time.
        cores: rate of all cores, if they run the teacher too; None if a GPU does.
    """

    teacher: float
    rendering: float
    cores: float | None

    @property
    def together(self) -> float:
        """The maximum rate of all parts together."""
        return min(self._parts.values())

    @property
    def limit(self) -> Limit:
        """The slowest part, which limits the rate."""
        return min(self._parts, key=self._parts.__getitem__)

    @property
    def _parts(self) -> dict[Limit, float]:
        parts: dict[Limit, float] = {} if self.cores is None else {"cores": self.cores}
        parts["teacher"], parts["rendering"] = self.teacher, self.rendering
        return parts


def reachable_rates(rates: Rates, machine: Machine) -> ReachableRates:
    """Return the rates that a machine can reach, given the rates of its parts."""
    view_s = rates.view_s(machine.views_per_decode)
    return ReachableRates(
        teacher=machine.devices / rates.answer_s,
        rendering=machine.loaders / view_s,
        cores=None if machine.threads is None else machine.cores / (machine.threads * rates.answer_s + view_s),
    )
