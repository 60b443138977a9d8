"""What the commands of stage 1 print: plans, costs, parts, label sets, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cost.estimate import Estimate, Machine, Pace
from pipeline.cost.measuring import Rates
from pipeline.labels.pins import pin_of
from pipeline.machine.progress import Tick
from pipeline.stage1.precompute import Work
from pipeline.text import byte_size, count, duration
from pipeline.verify.report import Report

LIMITS = {
    "teacher": "the teacher is the limit: another device would help",
    "rendering": "rendering is the limit: more cores would help",
    "cores": "the cores, which run teacher and rendering, are the limit: a GPU or more cores would help",
}


def _processes(machine: Machine) -> str:
    """Return which processes label, such as `1 x cuda and 15 loader processes`."""
    threads = f" of {count(machine.threads, 'thread')}" if machine.threads else ""
    return f"{machine.devices} x {machine.device}{threads} and {count(machine.loaders, 'loader process', 'es')}"


def plan_table(work: Work) -> str:
    """Return what a run would do."""
    plan = work.plan
    rows = [
        ("label set", f"{plan.labelset_id[:12]} (recipe {plan.recipe_id[:12]}, teacher {plan.teacher.name})"),
        ("source", f"{count(len(plan.source.shards), 'shard')}, {count(work.num_samples, 'image')}"),
        ("views", f"{work.views_to_label:,} to label, in {count(len(work.blocks), 'block')}"),
        ("teacher passes", f"{work.teacher_passes:,}"),
        ("label bytes", f"{byte_size(work.bytes_before_compression)} before compression"),
    ]
    return _two_columns(rows)


def _two_columns(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:15}{text}" for name, text in rows)


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
    return _two_columns(rows)


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


def _shards(source: Mapping[str, Any]) -> str:
    here, of_plan = source["shards"], source["shards_of_plan"]
    return f"{here} shards" if here == of_plan else f"{here} of {of_plan} shards (a subset)"


def info_table(summary: Mapping[str, Any]) -> str:
    """Return what `inspection.summarise` found, for people."""
    teacher, source, recipe = summary["teacher"], summary["source"], summary["recipe"]
    hit, entropy, kept = (summary[name] for name in ("hard_is_class_label_pct", "mean_entropy_nats", "mean_kept_mass"))
    first, stop = summary["views"]
    rows = [
        ("label set", f"{summary['labelset_id'][:12]}, {'sealed' if summary['sealed'] else 'not sealed'}"),
        ("manifest", summary["manifest"]),
        *(
            (
                "teacher",
                f"{each['name']}, weights {each['weights_sha256'][:12]}, {each['num_classes']} classes, {each['img_size']} px",
            )
            for each in teacher.get("members", [teacher])
        ),
        ("recipe", f"{summary['recipe_id'][:12]}: " + ", ".join(f"{k} {v}" for k, v in sorted(recipe.items()))),
        (
            "source",
            f"{source['kind']} {source['location']}: {source['images']:,} images in {_shards(source)}, {source['unlabelled']:,} unlabelled",
        ),
        (
            "bad images",
            f"{len(source['bad'])} left out" + "".join(f"\n               {line}" for line in source["bad"][:20]),
        ),
        ("views", f"{first}:{stop}"),
        (
            "stored",
            f"K = {summary['topk']}, {summary['precision']}, {summary['labels']:,} labels, {summary['bytes_per_label']:.1f} bytes each",
        ),
        *([("images", f"{byte_size(summary['image_bytes'])}, in the set")] if summary["image_bytes"] else []),
        ("agreement", "-" if hit is None else f"{hit:.1f} %: hard label is the class label of the larger part"),
        ("entropy", "-" if entropy is None else f"{entropy:.3f} nats (tail spread evenly)"),
        ("kept mass", "-" if kept is None else f"{kept:.4f}"),
        ("made with", "; ".join(", ".join(f"{k} {v}" for k, v in sorted(e.items())) for e in summary["environments"])),
    ]
    looked = f"agreement, entropy and kept mass over {summary['labels_looked_at']:,} labels"
    return _two_columns(rows) + f"\n{'':15}{looked}"


def verify_lines(report: Report) -> str:
    """Return what a verification found: all problems, then notes, then what is as promised."""
    lines = [
        *(f"{problem.rule}: {problem}" for problem in report.problems),
        *(f"note: {note}" for note in report.notes),
    ]
    bad = {problem.rule for problem in report.problems}
    if not bad & {"plan", "manifest", "sealed", "present", "length", "sha256", "content"}:
        lines.append(
            f"{count(report.files, 'file')}: lengths, hashes, schemas and rows are as promised ({byte_size(report.bytes)})"
        )
    else:
        lines.append(f"{count(report.files, 'file')} looked at ({byte_size(report.bytes)})")
    if report.manifest_sha256:
        lines.append(
            f"manifest {pin_of(report.manifest_sha256)}{f', signed by {report.signed_by}' if report.signed_by else ''}"
        )
    if report.pixels is not None:
        exact = "every pixel equal" if not report.pixels else f"mean difference up to {report.pixels:.3f} of 255"
        probes = len(report.label_set.manifest.probes) if report.label_set else 0
        lines.append(f"{count(probes, 'replay probe')} rendered again: {exact}")
    if report.images is not None and not bad & {"source", "images"}:
        lines.append(
            f"{count(report.images, 'image')} compared: keys, class labels and bytes are those that were labelled"
        )
    if report.relabelled:
        lines.append(report.relabelled.describe())
        lines += [f"note: {flip}" for flip in report.relabelled.near_flips()[:10]]
    return "\n".join(lines)
