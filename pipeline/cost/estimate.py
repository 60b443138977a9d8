"""What labelling will cost, and from how many students on it costs less than asking the teacher in every step."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.cost.measuring import Rates
from pipeline.machine.progress import Tick
from pipeline.machine.ranks import plan_cores, plan_devices, plan_loaders, rank_from
from pipeline.machine.threads import usable_cores
from pipeline.settings.configs import PrecomputeConfig
from pipeline.teacher.teacher import Teacher
from pipeline.text import byte_size, count, duration, two_columns

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


LIMITS = {
    "teacher": "the teacher is the limit: another device would help",
    "rendering": "rendering is the limit: more cores would help",
    "cores": "the cores, which run teacher and rendering, are the limit: a GPU or more cores would help",
}


def _processes(machine: Machine) -> str:
    """Return which processes label, such as `1 x cuda and 15 loader processes`."""
    threads = f" of {count(machine.threads, 'thread')}" if machine.threads else ""
    return f"{machine.devices} x {machine.device}{threads} and {count(machine.loaders, 'loader process', 'es')}"


def estimate_table(
    result: Estimate, asked_for: Mapping[str, int], machine: Machine, rates: Rates, reachable: Pace, model: str
) -> str:
    """Return what labelling costs here, and from how many students on it pays; `asked_for` has the counts of `estimate`."""
    images, views, students, epochs = (asked_for[name] for name in ("num_images", "num_views", "students", "epochs"))
    device, threads, shared = machine.device, machine.threads, machine.views_per_decode
    on = f"one {device}" + (f" process of {count(threads, 'thread')}" if threads else "")
    alone = "" if threads else f"; {result.cores_per_device:.1f} cores keep one {device} busy"
    how = (
        "by floating-point operations, a student's step as three forward passes" if threads else f"measured on {device}"
    )
    each = result.label_bytes // result.passes
    ratio = f"{result.online_ratio:,.2f} times as long with the teacher in it ({model}, {how})"
    rows = [
        ("teacher passes", f"{result.passes:,}: {images:,} images x {views:,} views"),
        ("teacher", f"{1 / rates.answer_s:,.1f} views/s on {on}: {duration(result.teacher_hours)}"),
        (
            "rendering",
            f"{1 / rates.view_s(shared):,.0f} views/s on one core, {count(shared, 'view')} from each decode:"
            f" {duration(result.render_core_hours)}{alone}",
        ),
        ("labelling", f"{duration(result.hours)} here, {reachable.together:,.1f} views/s with {_processes(machine)}"),
        ("", LIMITS[result.limit]),
        ("label bytes", f"{byte_size(result.label_bytes)}, {count(each, 'byte')} a label, before compression"),
        ("training step", ratio),
        (count(students, "student"), f"of {count(epochs, 'epoch')} each, time of one {device}:"),
        ("", f"{duration(result.offline_hours)} from stored labels, labelling included"),
        ("", f"{duration(result.online_hours)} with the teacher in every step"),
        (
            "labels pay off",
            f"from {count(result.offline_from, 'student')} on: {views:,} passes an image, once, against",
        ),
        ("", f"{count(epochs, 'pass', 'es')} for each student"),
    ]
    return two_columns(rows)


def parts_table(rates: Rates, together: Tick, machine: Machine, reachable: Pace) -> str:
    """Return where the time of stage 1 goes, each part alone, and what all of them reach together."""
    shared, device, threads = machine.views_per_decode, machine.device, machine.threads
    parts = [
        ("read", rates.read_s / shared, "one core"),
        ("decode", rates.decode_s / shared, "one core"),
        ("render", rates.render_s, "one core"),
        ("copy", rates.copy_s, "in memory; not needed here" if threads else f"to one {device}, while it computes"),
        ("teacher", rates.teacher_s, f"one {device}" + (f", {count(threads, 'thread')}" if threads else "")),
        ("top-k", rates.topk_s, f"one {device}"),
        ("write", rates.write_s, "one core"),
    ]
    lines = [f"{'':17}{'us a view':>12}{'views/s':>12}  on"]
    lines += [f"{name:17}{1e6 * s:12,.1f}{1 / s if s else 0:12,.1f}  {where}" for name, s, where in parts]
    of_best = together.per_second / reachable.together
    busy = "" if together.teacher_busy is None else f", teacher busy {100 * together.teacher_busy:.0f} % of the time"
    lines += [
        f"read and decode are shared by the {shared} views of an image" if shared > 1 else "",
        f"{'teacher alone':29}{reachable.teacher:12,.1f}  {machine.devices} x {device}",
        f"{'rendering alone':29}{reachable.rendering:12,.1f}  {count(machine.loaders, 'loader process', 'es')}",
        f"{'both on these cores':29}{reachable.cores:12,.1f}  {count(machine.cores, 'core')}" if threads else "",
        f"{'together, measured':29}{together.per_second:12,.1f}  {100 * of_best:.0f} % of the slowest of these{busy}",
        LIMITS[reachable.limit],
    ]
    if not 0.5 <= of_best <= 1.2:
        lines.append("measured parts and their sum do not fit: other programs ran here meanwhile? Try longer --seconds")
    return "\n".join(line for line in lines if line)
