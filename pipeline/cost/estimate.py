"""Estimate the cost of labelling, and the number of students for which it is cheaper than a teacher in every step."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from pipeline.cost.rates import Rates, forward_flops, measure_rates, training_step_s
from pipeline.cost.reach import LIMITS, Limit, Machine, ReachableRates, plan_machine, reachable_rates
from pipeline.labels.encoding import codec_of
from pipeline.pixels.handover import renders_on_gpu
from pipeline.settings.configs import EstimateConfig, PrecomputeConfig, TeacherConfig
from pipeline.stage1.engines import load_here
from pipeline.stage1.plan import choose_topk
from pipeline.text import byte_size, count, duration, two_columns
from pipeline.views.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """Cost of a label set and of the students that learn from it.

    Attributes:
        passes: number of teacher passes: all views of all images.
        teacher_hours: time of one device for the teacher alone.
        render_core_hours: time of one core for rendering.
        hours: time on this machine, with its devices and cores.
        limit: the slowest part: `teacher`, `rendering`, or the `cores` that run both.
        cores_per_device: number of cores that render as fast as one device answers.
        label_bytes: size of the labels before compression.
        online_ratio: time of a training step with the teacher, divided by the time without it.
        offline_from: minimum number of students for which labelling once costs less than a teacher in every step.
        offline_hours: time of labelling and of all students, on one device.
        online_hours: time of all students with the teacher in every step, on one device.
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
    reachable: ReachableRates,
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
    """Return the costs of offline and online distillation.

    Offline, the teacher answers `num_views` times for each image, and every student trains alone. Online, it answers in
    every step of every student: `epochs` times for each image and student.

    Args:
        rates: rates of the parts on this machine.
        reachable: rates that this machine can reach.
        num_images: number of images of the source.
        num_views: number of views of each image.
        views_per_decode: number of views made from each decoded image.
        bytes_per_label: size of a label before compression.
        teacher_s: seconds of a teacher's answer for one view; measured, or in any unit shared with `student_s`.
        student_s: seconds of a student's forward and backward pass for one view, in the unit of `teacher_s`.
        students: number of students that will be trained.
        epochs: number of epochs of each student.
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


@dataclass(frozen=True, kw_only=True)
class LabellingCost:
    """An estimate with all of its inputs.

    Attributes:
        counts: num_images, num_views, students and epochs, as in `estimate`.
        result: the estimate.
        machine: devices, processes and cores that are used.
        rates: rates of the parts of this machine.
        reachable: rates that this machine can reach.
        model: name of the students.
        sizes: sizes of the students that are not those of the model, such as patch_size.
        timed: whether the steps of teacher and student were timed; if False, their floating-point operations were counted.
    """

    counts: dict[str, int]
    result: Estimate
    machine: Machine
    rates: Rates
    reachable: ReachableRates
    model: str
    sizes: Mapping[str, int]
    timed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        measured = {"rates": asdict(self.rates), "compared_by": "time" if self.timed else "FLOPs"}
        student = {"student": {"model": self.model, **self.sizes}}
        return self.counts | student | asdict(self.result) | asdict(self.machine) | measured

    @property
    def student(self) -> str:
        """Return the name of the students and their own sizes in one line."""
        return ", ".join([self.model, *(f"{name} {value}" for name, value in self.sizes.items())])

    def table(self) -> str:
        """Return the cost of labelling, and the minimum number of students for which it pays off, as text for people."""
        images, views, students, epochs = self.counts.values()
        result, rates, machine, device = self.result, self.rates, self.machine, self.machine.device
        threads = f" of {count(machine.threads, 'thread')}" if machine.threads else ""
        on = f"one {device}" + (f" process{threads}" if threads else "")
        processes = f"{machine.devices} x {device}{threads} and {count(machine.loaders, 'loader process', 'es')}"
        alone = "" if machine.threads else f"; {result.cores_per_device:.1f} cores keep one {device} busy"
        by_count = "by floating-point operations, a student's step as three forward passes"
        ratio = f"{result.online_ratio:,.2f} times as long with the teacher in it"
        each, shared = result.label_bytes // result.passes, machine.views_per_decode
        rows = [
            ("teacher passes", f"{result.passes:,}: {images:,} images x {views:,} views"),
            ("teacher", f"{1 / rates.answer_s:,.1f} views/s on {on}: {duration(result.teacher_hours)}"),
            (
                "rendering",
                f"{1 / rates.view_s(shared):,.0f} views/s on one core, {count(shared, 'view')} from each decode:"
                f" {duration(result.render_core_hours)}{alone}",
            ),
            (
                "labelling",
                f"{duration(result.hours)} here, {self.reachable.together:,.1f} views/s with {processes}",
            ),
            ("", LIMITS[result.limit]),
            ("label bytes", f"{byte_size(result.label_bytes)}, {count(each, 'byte')} a label, before compression"),
            ("training step", f"{ratio} ({self.student}, {f'measured on {device}' if self.timed else by_count})"),
            (count(students, "student"), f"of {count(epochs, 'epoch')} each, time of one {device}:"),
            ("", f"{duration(result.offline_hours)} from stored labels, labelling included"),
            ("", f"{duration(result.online_hours)} with the teacher in every step"),
            (
                "labels pay off",
                f"from {count(result.offline_from, 'student')} on: {views:,} passes per image in total, instead of",
            ),
            ("", f"{count(epochs, 'pass', 'es')} for each student"),
        ]
        return two_columns(rows)


def estimate_labelling(
    config: PrecomputeConfig,
    teacher_config: TeacherConfig,
    recipe: Recipe,
    asked: EstimateConfig,
    *,
    create_student: Callable[..., Any],
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> LabellingCost:
    """Time teacher and rendering on the first images, compare the teacher with a student, and return the cost.

    On a GPU the student is timed, too; on a CPU the floating-point operations of both are counted.

    Args:
        config: settings of the labelling.
        teacher_config: the teacher.
        recipe: recipe of the views.
        asked: the students, and how long to measure.
        create_student: `trainer.student.create_student`.
        sizes: its arguments for students of other sizes than the model's: patch_size, embed_dim, depth, num_heads.

    Raises:
        UsageError: the student cannot be built, or an option cannot be used here.
    """
    teacher, source = load_here(config, teacher_config)
    classes = teacher.identity.num_classes
    topk = choose_topk(config.topk, classes)
    student = create_student(asked.model, num_classes=classes, img_size=recipe.img_size, **sizes).model
    on_gpu = renders_on_gpu(config.render, recipe, teacher.device)
    rates = measure_rates(
        source, recipe, teacher, topk=topk, precision=config.precision, least_s=asked.seconds, on_gpu=on_gpu
    )
    timed = teacher.device.type != "cpu"
    if timed:
        teacher_s, student_s = rates.answer_s, training_step_s(student, recipe.img_size, teacher.device)
    else:  # forward and backward pass take three times the forward pass
        teacher_s = sum(forward_flops(network.module, network.img_size) for network in teacher.networks)
        student_s = 3.0 * forward_flops(student, recipe.img_size)
    machine = plan_machine(config, teacher)
    reachable = reachable_rates(rates, machine)
    counts = {
        "num_images": asked.images or source.num_samples,
        "num_views": config.views[1] - config.views[0],
        "students": asked.students,
        "epochs": asked.epochs,
    }
    result = estimate(
        rates,
        reachable,
        **counts,
        views_per_decode=machine.views_per_decode,
        bytes_per_label=codec_of(config.precision, classes, topk).label_bytes,
        teacher_s=teacher_s,
        student_s=student_s,
    )
    return LabellingCost(
        counts=counts,
        result=result,
        machine=machine,
        rates=rates,
        reachable=reachable,
        model=asked.model,
        sizes=sizes,
        timed=timed,
    )
