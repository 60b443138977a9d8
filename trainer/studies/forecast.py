"""`deit-cli compare --dry-run`: what a study would do, and what that would cost in time and space."""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.settings.fields import settings_of
from pipeline.settings.files import load_recipe
from pipeline.storage.json import read_json
from pipeline.storage.yaml import to_yaml
from pipeline.text import aligned, byte_size, count, duration
from trainer.config import CompareConfig, TrainConfig
from trainer.studies.images import check_remembered, data_folder, images_of
from trainer.studies.results import label_bytes
from trainer.studies.running import DONE, Session, measured
from trainer.studies.steps import Step, plan_study, ranks_of
from trainer.studies.study import OF_IMAGES, read_study

MEASURE_S = "0.5"  # for each measurement


def foresee(path: Path, config: CompareConfig) -> dict[str, Any]:
    """Return what `compare` would do: cells, steps, seconds and bytes. Nothing is written.

    Seconds come from finished steps like the one in question, else they are measured; bytes come from `estimate`. What neither
    says is None.
    """
    study = read_study(path, config.scale, data=config.data, eval_data=config.eval_data)
    out = config.out or study.folder
    with data_folder(study.scale, out) as folder:
        images = images_of(study.scale, folder)
        check_remembered(images, out)
        plan = plan_study(study, *images, seeds=config.seed, chosen=config.cell, ranks=ranks_of(config.launcher))
        session = Session(plan, out, None, jobs=config.jobs, device=config.device)
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
                found["label_bytes"] = label_bytes(record)
            return found | {"seconds": record.seconds, "from": "done"}
        alike = [each for each in self._known if step.work and each.get("like") == step.like and each.get("work")]
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
        if step.command == "evaluate" or (step.command == "train" and not step.work):  # of a remote source
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
            timed = {setting.name for setting in settings_of(TrainConfig) if setting.timed} | OF_IMAGES
            timed |= {"recipe", "set", "device"}
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
    cells = []
    for cell in result["cells"]:
        cells.append((cell["name"], ", ".join(f"{name} {value}" for name, value in cell["settings"].items())))
        if cell["also"]:
            cells.append(("", f"and {', '.join(cell['also'])}, which come to the same commands"))
    steps = [("step", "", "time", "from")]
    for step in result["steps"]:
        time = "unknown" if step["seconds"] is None else duration(step["seconds"] / 3600)
        size = "" if step["label_bytes"] is None else f", {byte_size(step['label_bytes'])} of labels"
        state = "done" if step["done"] else "left"
        steps.append((f"{step['step']} {step['name']}", state, time, f"{step['from']}{size}"))
    lines = [result["title"], "", "cells:", aligned(cells, left=(0, 1), indent="  ")]
    lines += ["", aligned(steps, left=(0, 1, 3))]
    done = sum(step["done"] for step in result["steps"])
    unknown = f", and {count(result['unknown'], 'step')} whose time is unknown" if result["unknown"] else ""
    total = f"{duration(result['seconds'] / 3600)} one after the other{unknown}"
    lines += ["", f"{done} of {count(len(result['steps']), 'step')} done; left: {total}"]
    lines.append(f"labels: {byte_size(result['label_bytes'])}, those to be made before compression")
    return "\n".join(lines)
