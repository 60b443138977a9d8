"""What labelling will cost, and from how many students on it costs less than asking the teacher in every step."""

import os
from dataclasses import dataclass
from typing import Literal

from pipeline.cost.measuring import Rates
from pipeline.machine.loaders import usable_cores
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.settings.configs import PrecomputeConfig
from pipeline.teacher.teacher import Teacher

Limit = Literal["teacher", "rendering", "cores"]


@dataclass(frozen=True)
class Pace:
    """How fast the parts of stage 1 can go on one machine, in views/s.

    Attributes:
        teacher: of all devices, when nothing else takes time.
        rendering: of all loader processes, when nothing else takes time.
        cores: of all cores, where they run the teacher too; None where a GPU does.
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


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run labels with here.

    Attributes:
        device: kind of device that runs the teacher, `cpu` or `cuda`.
        devices: how many of them.
        threads: of the teacher on each, where that is the CPU; None where it is a GPU.
        loaders: processes that render.
        cores: of this machine.
        views_per_decode: that are made of an image once it is decoded.
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


def pace(rates: Rates, machine: Machine) -> Pace:
    """Work out how fast a machine of these rates can label."""
    view_s = rates.view_s(machine.views_per_decode)
    return Pace(
        teacher=machine.devices / rates.answer_s,
        rendering=machine.loaders / view_s,
        cores=None if machine.threads is None else machine.cores / (machine.threads * rates.answer_s + view_s),
    )


@dataclass(frozen=True)
class Estimate:
    """Cost of a label set and of the students that learn from it.

    Attributes:
        passes: of the teacher, all views of all images.
        teacher_hours: on one device, when nothing but the teacher costs.
        render_core_hours: on one core.
        hours: on this machine, with its devices and cores.
        limit: what decides: `teacher`, `rendering`, or the `cores` which run both.
        cores_per_device: that render as fast as one device answers.
        label_bytes: before compression.
        online_ratio: a training step with the teacher in it, against one without.
        offline_from: smallest number of students for which labelling once costs less than asking in every step.
        offline_hours: labelling and all students, on one device.
        online_hours: all students with the teacher in every step, on one device.
    """

    passes: int
    teacher_hours: float
    render_core_hours: float
    hours: float
    limit: Limit
    cores_per_device: float
    label_bytes: int
    online_ratio: float
    offline_from: int
    offline_hours: float
    online_hours: float


def estimate(
    rates: Rates,
    reachable: Pace,
    *,
    num_images: int,
    num_views: int,
    views_per_decode: int,
    bytes_per_label: int,
    teacher_s: float,
    student_s: float,
    students: int,
    epochs: int,
) -> Estimate:
    """Work out the cost of both ways.

    Offline, the teacher answers `num_views` times for each image, and every student trains alone. Online, it answers in
    every step of every student: `epochs` times for each image and student.

    Args:
        rates: of this machine.
        reachable: by this machine.
        num_images: of the source.
        num_views: of each image.
        views_per_decode: that are made of an image once it is decoded.
        bytes_per_label: before compression.
        teacher_s: seconds of a teacher's answer for one view, measured, or in any unit that `student_s` shares.
        student_s: the same for a student's forward and backward pass.
        students: how many will be trained.
        epochs: of each.
    """
    passes, steps = num_images * num_views, num_images * epochs * students
    view_s = rates.view_s(views_per_decode)
    to_hours = rates.answer_s / teacher_s / 3600  # from the unit of teacher_s and student_s
    return Estimate(
        passes=passes,
        teacher_hours=passes * rates.answer_s / 3600,
        render_core_hours=passes * view_s / 3600,
        hours=passes / reachable.together / 3600,
        limit=reachable.limit,
        cores_per_device=view_s / rates.answer_s,
        label_bytes=passes * bytes_per_label,
        online_ratio=(student_s + teacher_s) / student_s,
        offline_from=num_views // epochs + 1,  # the first n with n * epochs > num_views
        offline_hours=(passes * teacher_s + steps * student_s) * to_hours,
        online_hours=steps * (student_s + teacher_s) * to_hours,
    )
