"""The result of a study: its cells with their spread and their comparisons, as JSON values and as a table.

The spread is over seeds, that is over initial weights and orders of the data of the students. All students of a cell learn from the same
teacher and the same labels, so the luck of the teacher is in no spread.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import DeitCliError
from pipeline.storage.atomic import sha256_file
from pipeline.storage.json import read_json
from pipeline.text import aligned, count
from trainer.studies.running import SCORES, Record, Session, versions
from trainer.studies.study import TOGETHER, Cell

EQUAL = 1e-3  # points; one of 50,000 images is 0.002


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
                "top1": round(scores[answer]["top1"], 4),  # `evaluate` once computed in float32
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
        "label_bytes": label_bytes(labels),
    }


def label_bytes(labels: Record) -> int:
    """Return the bytes of all label shards of a finished labelling."""
    return sum(file.stat().st_size for file in (labels.folder / "set/labels").rglob("*.parquet"))


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
    heads = ["cell", "top-1, %", "low..high, %", "seeds", f"against {result['baseline']}, points", "p", "answer"]
    table = aligned([heads, *map(_cell_row, result["cells"])], left=(0, 6))
    lines = [result["title"], "", table, ""]
    return "\n".join([*lines, *_comparison_lines(result), *_cost_lines(result), *_notes(result)])


def _cell_row(cell: Mapping[str, Any]) -> list[str]:
    top1, difference = cell["top1"], cell["against_baseline"] or {}
    if top1["mean"] is None:
        return [cell["name"], "failed" if cell["failed"] else "not run", "", "", "", "", ""]
    delta, p = difference.get("difference"), difference.get("p")
    return [
        cell["name"],
        f"{top1['mean']:.2f}",
        f"{top1['low']:.2f}..{top1['high']:.2f}",
        str(len(cell["seeds"])),
        "" if delta is None else f"{delta:+.2f}",
        "" if delta is None else "-" if p is None else f"{p:.2g}",
        top1["answer"] + (", others failed" if cell["failed"] else ""),
    ]


def _comparison_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for each in result["comparisons"]:
        if each["difference"] is not None:
            p = "-" if each["p"] is None else f"{each['p']:.2g}"
            lines.append(f"{each['cell']} against {each['other']}: {each['difference']:+.2f} points, p {p}")
    return [*lines, ""] if lines else []


def _cost_lines(result: Mapping[str, Any]) -> list[str]:
    rows = [["seconds", "teacher", "labelling", "one student", "together"]]
    for cell in result["cells"]:
        spent = list(cell["costs"].values())
        total = None if None in spent else sum(spent)
        rows.append([cell["name"], *("-" if each is None else f"{each:,.1f}" for each in (*spent, total))])
    lines = [aligned(rows)]
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
