"""`deit-cli compare`: runs a study, and says what came out: a table, and a JSON file with everything behind it.

The spread is over seeds, that is over initial weights and orders of the data of the students. All students of a cell learn from the same
teacher and the same labels, so the luck of the teacher is in no spread.
"""

import contextlib
import logging
import os
import shlex
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DeitCliError, UsageError
from pipeline.settings.fields import settings_of
from pipeline.settings.files import describe_settings, load_recipe
from pipeline.storage.atomic import make_folder, replace_file, sha256_file
from pipeline.storage.json import pretty_json, read_json, sha256_json
from pipeline.storage.yaml import to_yaml
from pipeline.text import byte_size, count, duration
from trainer.config import AnalyseConfig, CompareConfig, ReportConfig, TrainConfig
from trainer.evidence.demo import TRAINING, write_digits
from trainer.studies.running import (
    DONE,
    SCORES,
    LocalEngine,
    RayEngine,
    Record,
    Session,
    measured,
    only_study_in,
    versions,
)
from trainer.studies.steps import Images, Plan, Step, images_at, plan_study, ranks_of
from trainer.studies.study import DIGITS, TOGETHER, Cell, Scale, read_study

log = logging.getLogger("deit_cli.compare")

MEASURE_S = "0.5"  # for each measurement of --dry-run
CELL_WIDTH = 34
EQUAL = 1e-3  # points; one of 50,000 images is 0.002


def compare(path: Path, config: CompareConfig) -> dict[str, Any]:
    """Run a study, and return the content of its JSON file, which is written after every step.

    Args:
        path: YAML file of the study.
        config: settings of the command.

    Raises:
        UsageError: the study or its scale is wrong, or another process compares in the folder.
        KeyboardInterrupt, Terminated: a signal; the running steps have saved their work.
    """
    study = read_study(path, config.scale, data=config.data, eval_data=config.eval_data)
    out = config.out or Path("studies") / study.scale.path.stem
    command = shlex.join(["deit-cli", "compare", str(path), *shlex.split(describe_settings(config))])

    def save(session: Session) -> None:
        replace_file(out / f"{study.name}.json", pretty_json(summarise(session, command)))

    with only_study_in(out):
        training, evaluation = images_of(study.scale, out / "data")
        plan = _plan(study, config, training, evaluation)
        engine = RayEngine() if config.engine == "ray" else LocalEngine()
        session = Session(
            plan, out, engine, jobs=config.jobs, launcher=config.launcher, device=config.device, changed=save
        )
        save(session)
        session.run()
        save(session)
        result = summarise(session, command)
        if config.report and any(cell["seeds"] for cell in result["cells"]):
            log.info("%s shows all of it", write_page(result, out, evaluation.location, study.scale, config.device))
        return result


def write_page(result: Mapping[str, Any], out: Path, evaluation: str, scale: Scale, device: str) -> Path:
    """Analyse the first student of each cell and the teachers that were trained here, and write STUDY.html.

    Args:
        result: content of the study's JSON file.
        out: folder of the study.
        evaluation: location of the evaluation images.
        scale: scale of the study.
        device: device of the networks.
    """
    from trainer.evidence.analyse import analyse_networks
    from trainer.evidence.networks import Network
    from trainer.evidence.report import write_report

    runs = {cell["name"]: cell["seeds"][0]["run"] for cell in result["cells"] if cell["seeds"]}
    runs |= {f"teacher {each['name']}": each["run"] for each in result["teachers"] if each["run"]}
    networks = [Network(name, run, out / run / "last", out / run) for name, run in runs.items()]
    analysis = out / f"{result['name']}-analysis"
    crop_pct = scale.evaluate.get("crop_pct")
    analyse_networks(
        networks, AnalyseConfig(data=evaluation, out=analysis, attention=2, crop_pct=crop_pct, device=device)
    )
    config = ReportConfig(out=out / f"{result['name']}.html", device=device)
    return write_report(config, [str(out / f"{result['name']}.json"), str(analysis)])


def _plan(study: Any, config: CompareConfig, training: Images, evaluation: Images) -> Plan:
    ranks = ranks_of(config.launcher)
    return plan_study(study, training, evaluation, seeds=config.seed, chosen=config.cell, ranks=ranks)


def images_of(scale: Scale, folder: Path) -> tuple[Images, Images]:
    """Return training and evaluation images; scikit-learn's digits are written to a folder."""
    training, evaluation = scale.data, scale.eval_data
    if DIGITS in (training, evaluation):
        _write_digits(folder)
    training = str(folder / "training") if training == DIGITS else training
    evaluation = str(folder / "evaluation") if evaluation in (DIGITS, None) else evaluation
    if scale.images is not None:
        training = _first_images(training, scale.images, folder)
    return images_at(training), images_at(evaluation)


def _first_images(location: str, number: int, folder: Path) -> str:
    """Write the first images of Parquet files, with their class names, to a folder, and return the path.

    Raises:
        UsageError: the images are not in local Parquet files, or there are too few.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(location)
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not all(file.suffix == ".parquet" and file.is_file() for file in files):
        raise UsageError(
            f"images: {number} needs --data in local Parquet files, got {location}", fix="Leave out `images`"
        )
    known = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    # A folder for each choice of files. The name of the file stays the same, because it is a part of the source's id.
    path = folder / sha256_json(known)[:12] / f"first-{number}.parquet"
    if not path.is_file():
        table = pa.concat_tables([pq.read_table(file) for file in files])
        if len(table) < number:
            raise UsageError(f"{location} has {len(table):,} images, the scale asks for {number:,}")
        replace_file(path, lambda file: pq.write_table(table.slice(0, number), file, row_group_size=1024))
    return str(path)


def _write_digits(folder: Path) -> None:
    """Write the digits, all with their class labels; each folder appears whole."""
    if (folder / "training").is_dir():
        return
    make_folder(folder)
    for remains in folder.glob(".tmp-digits-*"):
        shutil.rmtree(remains)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-digits-", dir=folder))
    write_digits(temporary, labelled=TRAINING)
    os.replace(temporary / "evaluation", folder / "evaluation")
    os.replace(temporary / "training", folder / "training")  # last: it says that both are there
    shutil.rmtree(temporary)


# --- what came out ----------------------------------------------------------------------------------------------------


def summarise(session: Session, command: str) -> dict[str, Any]:
    """Return what a study has come to so far, as JSON values; docs/studies.md lists them."""
    plan, study = session.plan, session.plan.study
    cells = [_cell_result(session, cell) for cell in plan.cells]
    baseline = next(
        each for each in cells if each["name"] == study.cell(study.baseline).name or study.baseline in each["also"]
    )
    for cell in cells:
        if cell is not baseline:
            cell["against_baseline"] = against(_by_seed(cell), _by_seed(baseline))
    by_name = {name: cell for cell in cells for name in (cell["name"], *cell["also"])}
    comparisons = [
        {"cell": one, "other": other, **against(_by_seed(by_name[one]), _by_seed(by_name[other]))}
        for one, other in study.against.items()
    ]
    failed = [
        {"step": step.kind, "name": step.name, "reason": session.failed[step.key]}
        for step in plan.steps
        if step.key in session.failed
    ]
    return {
        "kind": "study",
        "version": 1,
        "name": study.name,
        "title": study.title,
        "baseline": baseline["name"],
        "scale": study.scale.path.stem,
        "seeds": list(plan.seeds),
        "command": command,
        "versions": versions(),
        "cells": cells,
        "comparisons": comparisons,
        "teachers": [_teacher_result(session, key) for key in plan.teachers],
        "steps": {"all": len(plan.steps), "done": session.done, "failed": len(failed)},
        "failed": failed,
    }


def _cell_result(session: Session, cell: Cell) -> dict[str, Any]:
    plan, records = session.plan, session.records
    seeds, answer = [], None
    for seed in plan.known_seeds:
        train, evaluation = plan.students[cell.name, seed]
        if train.key in records and evaluation.key in records:
            run, scored = records[train.key], records[evaluation.key]
            scores = read_json(scored.folder / SCORES)["scores"]
            answer = main_answer(cell, scores)
            seeds.append({
                "seed": seed,
                "run": _relative(run.folder / "run", session.out),
                "scores_file": _relative(scored.folder / SCORES, session.out),
                "top1": round(scores[answer]["top1"], 4),  # `evaluate` computes in float32
                "scores": scores,
                "seconds": run.seconds,
            })  # fmt: skip
    teachers = plan.teachers_of(cell)
    stop = max((each.stop for each in plan.students[cell.name, plan.seeds[0]][0].label_sets), default=0)
    return {
        "name": cell.name,
        "also": list(cell.also),
        "settings": dict(cell.written),
        "seeds": seeds,
        "top1": {"answer": answer, **spread([each["top1"] for each in seeds])},
        "against_baseline": None,
        "costs": {
            "teacher_s": _sum([_seconds(records.get(each.train.key)) for each in teachers if each.train is not None]),
            "labelling_s": _sum([_labelling_s(records.get(each.labels.key), stop) for each in teachers]),
            "student_s": statistics.mean(each["seconds"] for each in seeds) if seeds else None,
        },
        "teacher": TOGETHER.join(_teacher_name(each.name, each.labelled_fraction) for each in teachers) or None,
        "failed": sum(step.key in session.failed for seed in plan.seeds for step in plan.students[cell.name, seed]),
    }


def main_answer(cell: Cell, scores: Mapping[str, Any]) -> str:
    """Return the answer of a cell's students that is compared: the mean of both heads' logits, or the only head that was trained."""
    both = cell.written["distillation_type"] != "none" or cell.train.get("second_token") == "class"
    return "mean_logits" if both and "mean_logits" in scores else "class_head"


def _teacher_name(name: str, fraction: float | None) -> str:
    return name if fraction in (None, 1.0) else f"{name}-labelled-{fraction:g}"


def _teacher_result(session: Session, key: str) -> dict[str, Any]:
    taught, records = session.plan.teachers[key], session.records
    train = None if taught.train is None else records.get(taught.train.key)
    scored = None if taught.evaluation is None else records.get(taught.evaluation.key)
    labels = records.get(key)
    scores = {} if scored is None else read_json(scored.folder / SCORES)["scores"]
    return {
        "name": _teacher_name(taught.name, taught.labelled_fraction),
        "labelled_fraction": taught.labelled_fraction,
        "top1": scores["class_head"]["top1"] if scores else None,
        "scores_file": None if scored is None else _relative(scored.folder / SCORES, session.out),
        "run": None if train is None else _relative(train.folder / "run", session.out),
        "seconds": None if train is None else train.seconds,
        "labels": None if labels is None else _labels_result(labels, session.out),
    }


def _labels_result(labels: Record, out: Path) -> dict[str, Any]:
    folder = labels.folder / "set"
    return {
        "path": _relative(folder, out),
        "manifest": f"sha256:{sha256_file(folder / 'manifest.json')}",
        "labelset_id": labels.done["content"],
        "views": labels.done["views"],
        "seconds": labels.seconds,
        "label_bytes": sum(file.stat().st_size for file in (folder / "labels").rglob("*.parquet")),
    }


def _relative(path: Path, out: Path) -> str:
    return path.relative_to(out).as_posix()


def _sum(values: Sequence[float | None]) -> float | None:
    """Return the sum, or None if a value is not known yet."""
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _labelling_s(record: Record | None, views: int) -> float | None:
    """Return the seconds of the first views of a label set, of which other cells may use more."""
    return None if record is None else record.seconds * views / record.done["views"]


def _seconds(record: Record | None) -> float | None:
    return None if record is None else record.seconds


def _by_seed(cell: Mapping[str, Any]) -> dict[int, float]:
    return {each["seed"]: each["top1"] for each in cell["seeds"]}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, lowest and highest value, and the standard deviation of a sample (n - 1), which needs two values."""
    if not values:
        return {"mean": None, "low": None, "high": None, "std": None}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values), "std": std}


def against(mine: Mapping[int, float], baseline: Mapping[int, float]) -> dict[str, Any]:
    """Return the mean difference to the baseline over the seeds that both have, and a paired t-test (two-sided).

    Args:
        mine: top-1 in percent by seed.
        baseline: the same of the baseline.

    Returns:
        `difference` in points, `p`, `pairs`, and `why` there is no p; values that do not exist are None.
    """
    seeds = sorted(set(mine) & set(baseline))
    differences = [mine[seed] - baseline[seed] for seed in seeds]
    found: dict[str, Any] = {
        "difference": statistics.fmean(differences) if seeds else None,
        "p": None,
        "pairs": len(seeds),
        "why": None,
    }
    if len(seeds) < 2:
        return found | {"why": f"a t-test needs 2 pairs, there {'is' if len(seeds) == 1 else 'are'} {len(seeds)}"}
    if max(differences) - min(differences) < EQUAL:
        return found | {"why": "all differences are equal"}
    from scipy.stats import ttest_rel

    result: Any = ttest_rel([mine[seed] for seed in seeds], [baseline[seed] for seed in seeds])
    return found | {"p": float(result.pvalue)}


def study_table(result: Mapping[str, Any]) -> str:
    """Return the result of a study as a table for people."""
    lines = [result["title"], ""]
    against_name = f"against {result['baseline']}"
    head = f"{'cell':{CELL_WIDTH}}{'top-1, %':>9}{'low..high':>16}{'seeds':>7}  {against_name:>20}{'p':>8}  answer"
    lines.append(head)
    for cell in result["cells"]:
        top1, difference = cell["top1"], cell["against_baseline"] or {}
        if top1["mean"] is None:
            lines.append(f"{cell['name']:{CELL_WIDTH}}{'failed' if cell['failed'] else 'not run':>9}")
            continue
        delta, p = difference.get("difference"), difference.get("p")
        cells = (
            f"{top1['mean']:9.2f}",
            f"{top1['low']:.2f}..{top1['high']:.2f}".rjust(16),
            f"{len(cell['seeds']):7}",
            f"  {'' if delta is None else f'{delta:+.2f}':>20}",
            f"{'' if delta is None else '-' if p is None else f'{p:.3f}':>8}",
            f"  {top1['answer']}" + (", others failed" if cell["failed"] else ""),
        )
        lines.append(f"{cell['name']:{CELL_WIDTH}}" + "".join(cells))
    lines += ["", *_comparison_lines(result), *_cost_lines(result), *_notes(result)]
    return "\n".join(lines)


def _comparison_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for each in result["comparisons"]:
        if each["difference"] is not None:
            p = "-" if each["p"] is None else f"{each['p']:.3f}"
            lines.append(f"{each['cell']} against {each['other']}: {each['difference']:+.2f} points, p {p}")
    return [*lines, ""] if lines else []


def _cost_lines(result: Mapping[str, Any]) -> list[str]:
    lines = [f"{'seconds':{CELL_WIDTH}}{'teacher':>10}{'labelling':>11}{'one student':>13}{'together':>10}"]
    for cell in result["cells"]:
        spent = list(cell["costs"].values())
        total = None if None in spent else sum(spent)
        shown = ["-" if each is None else f"{each:,.1f}" for each in (*spent, total)]
        lines.append(f"{cell['name']:{CELL_WIDTH}}{shown[0]:>10}{shown[1]:>11}{shown[2]:>13}{shown[3]:>10}")
    for teacher in result["teachers"]:
        top1 = "not measured" if teacher["top1"] is None else f"top-1 {teacher['top1']:.2f} %"
        lines.append(f"teacher {teacher['name']}: {top1}")
    return lines


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [f"{cell['name']} stands for {', '.join(cell['also'])} too: the commands are the same" for cell in result["cells"] if cell["also"]]  # fmt: skip
    reasons = [(cell["against_baseline"] or {}).get("why") for cell in result["cells"] if cell["seeds"]]
    notes += [f"no p: {reason}" for reason in sorted({reason for reason in reasons if reason})]
    notes += [f"{each['step']} {each['name']} failed: {each['reason']}" for each in result["failed"]]
    if any((cell["against_baseline"] or {}).get("p") is not None for cell in result["cells"]):
        notes.append("p: paired t-test over the seeds, which share teacher and labels; few seeds prove little")
    return ["", *notes] if notes else []


def check_all_done(result: Mapping[str, Any]) -> None:
    """Raise DeitCliError if a step failed."""
    if result["failed"]:
        failed = result["steps"]["failed"]
        raise DeitCliError(
            f"{failed} of {count(result['steps']['all'], 'step')} failed or could not be run",
            fix="Their logs say why; the same command tries them again, and keeps what is done",
        )


# --- what it would cost -----------------------------------------------------------------------------------------------


def foresee(path: Path, config: CompareConfig) -> dict[str, Any]:
    """Return what `compare` would do: cells, steps, seconds and bytes. Nothing is written.

    Seconds come from finished steps like the one in question, else they are measured; bytes come from `estimate`. What neither
    says is None.
    """
    study = read_study(path, config.scale, data=config.data, eval_data=config.eval_data)
    out = config.out or Path("studies") / study.scale.path.stem
    with _data_folder(study.scale, out) as folder:
        session = Session(
            _plan(study, config, *images_of(study.scale, folder)), out, None, jobs=config.jobs, device=config.device
        )
        forecast = _Forecast(session, config.device)
        steps = [forecast.step(step) for step in session.plan.steps]
    left = [step["seconds"] for step in steps if not step["done"]]
    return {
        "title": study.title,
        "cells": [{"name": cell.name, "also": list(cell.also), "settings": dict(cell.written)} for cell in session.plan.cells],
        "steps": steps,
        "seconds": sum(each for each in left if each is not None),
        "unknown": sum(each is None for each in left),
        "label_bytes": sum(step["label_bytes"] or 0 for step in steps),
        "jobs": config.jobs,
        "failed": [],
    }  # fmt: skip


@contextlib.contextmanager
def _data_folder(scale: Scale, out: Path) -> Iterator[Path]:
    """Return the folder of the digits: that of the study, or else one for the time being."""
    if (DIGITS not in (scale.data, scale.eval_data) and scale.images is None) or (out / "data").is_dir():
        yield out / "data"
        return
    temporary = Path(tempfile.mkdtemp(prefix="deit-cli-compare-"))
    try:
        yield temporary / "data"
    finally:
        shutil.rmtree(temporary)


class _Forecast:
    """Forecasts of the steps of a study."""

    def __init__(self, session: Session, device: str) -> None:
        self._session, self._device = session, device
        self._known = [read_json(file) for file in session.out.rglob(DONE)] if session.out.is_dir() else []
        self._measured: dict[str, dict[str, Any] | None] = {}

    def step(self, step: Step) -> dict[str, Any]:
        """Return the forecast of a step; of a finished one, what it took."""
        record = self._session.records.get(step.key)
        found: dict[str, Any] = {"step": step.kind, "name": step.name, "done": record is not None, "label_bytes": None}
        if record is not None:
            if step.command == "precompute":
                found["label_bytes"] = _labels_result(record, self._session.out)["label_bytes"]
            return found | {"seconds": record.seconds, "from": "done"}
        alike = [each for each in self._known if each.get("like") == step.like and each.get("work")]
        cost = self._measure(step) if step.command == "precompute" or not alike else None
        if step.command == "precompute" and cost is not None:
            found["label_bytes"] = cost["label_bytes"]
        if alike:
            rate = statistics.median(each["seconds"] / each["work"] for each in alike)
            return found | {"seconds": rate * step.work, "from": f"{count(len(alike), 'finished step')} like it"}
        if cost is None:
            return found | {"seconds": None, "from": "unknown"}
        return found | {"seconds": cost["seconds"], "from": "measured"}

    def _measure(self, step: Step) -> dict[str, Any] | None:
        """Return seconds (and bytes) of a step, from `estimate` or `bench stage2`; None if they cannot say."""
        if step.command == "evaluate":
            return None
        settings: dict[str, Any] = {**step.settings, "device": self._device}
        if step.command == "precompute":
            settings["views"] = f"0:{step.stop}"
            if "teacher" in step.inputs:  # a network with random weights is as fast
                trained = step.inputs["teacher"].settings
                size = load_recipe(trained.get("recipe") or "deit", trained.get("set")).img_size
                settings |= {"teacher": trained["model"], "pretrained": False, "teacher_img_size": size}
            arguments, names = ("estimate",), set(settings) - {"out", "accuracy_samples", "min_teacher_accuracy", "on_bad_image", "include_images"}  # fmt: skip
        else:
            timed = {setting.name for setting in settings_of(TrainConfig) if setting.timed} | {
                "recipe",
                "set",
                "device",
            }
            if step.label_sets:  # without a label set, which is read in no time
                labels = step.label_sets[0].settings
                settings |= {"distillation_type": "none"} | {name: labels[name] for name in ("recipe", "set") if name in labels}  # fmt: skip
                settings.pop("views", None)
            arguments, names = ("bench", "stage2"), timed & set(settings)
        kept = {name: settings[name] for name in sorted(names)}
        key = f"{arguments}{kept}"
        if key not in self._measured:
            self._measured[key] = self._run(arguments, kept)
        result = self._measured[key]
        if result is None:
            return None
        if step.command == "precompute":
            return {"seconds": 3600 * result["hours"], "label_bytes": result["label_bytes"]}
        return {"seconds": step.work / result["together"]["images_per_s"]}

    def _run(self, arguments: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any] | None:
        with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
            file.write(to_yaml(settings))
            file.flush()
            return measured([*arguments, "-c", file.name, "--seconds", MEASURE_S])


def forecast_table(result: Mapping[str, Any]) -> str:
    """Return the result of `foresee` as a table for people."""
    lines = [result["title"], "", "cells:"]
    for cell in result["cells"]:
        settings = ", ".join(f"{name} {value}" for name, value in cell["settings"].items())
        lines.append(f"  {cell['name']:{CELL_WIDTH}}{settings}")
        lines += (
            [f"  {'':{CELL_WIDTH}}and {', '.join(cell['also'])}, which come to the same commands"]
            if cell["also"]
            else []
        )
    lines += ["", f"{'step':{CELL_WIDTH + 12}}{'':9}{'time':>10}  from"]
    for step in result["steps"]:
        name = f"{step['step']} {step['name']}"
        time = "unknown" if step["seconds"] is None else duration(step["seconds"] / 3600)
        size = "" if step["label_bytes"] is None else f", {byte_size(step['label_bytes'])} of labels"
        lines.append(f"{name:{CELL_WIDTH + 12}}{'done' if step['done'] else 'left':9}{time:>10}  {step['from']}{size}")
    done = sum(step["done"] for step in result["steps"])
    unknown = f", and {count(result['unknown'], 'step')} whose time is unknown" if result["unknown"] else ""
    total = f"{duration(result['seconds'] / 3600)} one after the other{unknown}"
    lines += ["", f"{done} of {count(len(result['steps']), 'step')} done; left: {total}"]
    lines.append(f"labels: {byte_size(result['label_bytes'])}, those to be made before compression")
    return "\n".join(lines)
