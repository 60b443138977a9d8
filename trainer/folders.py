"""The folders of runs: the names of their files, and an overview of all runs and label sets below a folder.

The overview reads what a run writes and nothing else: settings, metrics, and the header of the checkpoint, whose content is not checked.
Only a lock says that a run is running; without it the run is over, or on another machine whose locks are not seen here.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from pipeline.errors import DeitCliError, StorageError, UsageError
from pipeline.labels.format import MANIFEST_NAME, PLAN_NAME
from pipeline.labels.manifest import label_blocks, labels_path, read_manifest, read_plan, short
from pipeline.storage.json import read_json
from pipeline.storage.urls import local_path
from pipeline.text import aligned, count, duration, listed
from pipeline.views.recipe import PRESETS
from trainer.config import RunsOrder
from trainer.metrics import METRICS_NAME, read_metrics

STATE_NAME = "state.safetensors"
CONFIG_NAME = "config.json"
LOCK_NAME = "lock"
EVALUATION_NAME = "evaluation.json"
STATE_KEY = "deit_cli"  # of the checkpoint's metadata

_NONE, _NUMBER = type(None), (int, float)
_EVALUATED = {"epoch": int, "top1": _NUMBER, "weights": str, "scores": dict}  # fields of a line of metrics.jsonl
_UPDATED = {"epoch": int, "step": int, "loss": (*_NUMBER, _NONE), "images_per_s": (*_NUMBER, _NONE)}
State = Literal["running", "finished", "stopped", "failed", "not started", "damaged"]
Found = dict[str, Any]  # a run or a label set, as plain JSON values


def find_runs(folders: Sequence[str], order: RunsOrder = "name") -> dict[str, list[Found]]:
    """Return the runs and the label sets in folders and below them, as plain JSON values.

    A run or label set that cannot be read has the state `damaged`, and its reason.

    Raises:
        UsageError: a location is a URL, or there is neither a run nor a label set.
        StorageError: one of the folders cannot be read.
    """
    runs: dict[Path, Found] = {}
    label_sets: dict[Path, Found] = {}
    for folder in map(_local, folders):
        for path, files in _below(folder):
            if PLAN_NAME in files:
                label_sets[path] = _looked_at(path, _label_set)
            else:
                runs[path] = _looked_at(path, _run)
    if not runs and not label_sets:
        raise UsageError(
            f"there is no run and no label set in {listed(folders)} or below",
            fix="Pass the folder that --output of `train` or --out of `precompute` is in",
        )
    return {"runs": sorted(runs.values(), key=_by(order)), "label_sets": sorted(label_sets.values(), key=_by("name"))}


def runs_table(found: Mapping[str, Sequence[Found]]) -> str:
    """Return the result of `find_runs` as text for people."""
    tables = []
    if found["runs"]:
        heads = (
            "run",
            "state",
            "epochs",
            "%",
            "model",
            "learns from",
            "recipe",
            "top-1",
            "of",
            "loss",
            "images/s",
            "written",
        )
        rows = [(*heads, ""), *map(_run_cells, found["runs"])]
        tables.append(aligned(rows, left=(0, 1, 4, 5, 6, 8, 12)))
    if found["label_sets"]:
        heads = ("label set", "state", "views", "%", "teacher", "recipe", "written", "")
        tables.append(aligned([heads, *map(_set_cells, found["label_sets"])], left=(0, 1, 4, 5, 7)))
    return "\n\n".join(tables)


def _local(folder: str) -> Path:
    path = local_path(folder)
    if path is None:
        raise UsageError(
            f"runs are listed in local folders, got {folder}",
            fix="A run whose --output is a URL has a local folder too; `train` names it where it runs",
        )
    if not path.is_dir():
        raise StorageError(f"{folder}: no such folder")
    return path


def _below(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield the folders of runs and label sets, with the names of their files; nothing inside them is looked at."""

    def fail(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise StorageError(f"{folder}: {error.strerror}") from error

    for path, folders, names in os.walk(folder, onerror=fail):
        files = set(names)
        if PLAN_NAME in files or files & {METRICS_NAME, STATE_NAME} or files >= {CONFIG_NAME, LOCK_NAME}:
            yield Path(path), files
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]


def _looked_at(path: Path, look: Callable[[Path], Found]) -> Found:
    """Return what a folder holds; if that cannot be read, the reason."""
    try:
        return {"path": str(path)} | look(path)
    except DeitCliError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror}"
    return {"path": str(path), "state": "damaged", "note": reason.removeprefix(f"{path}{os.sep}")}


# --- runs -----------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Found:
    saved = _with(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME, config=dict, recipe_id=str)
    config, recipe_id = saved["config"], saved["recipe_id"]
    _with(config, folder / CONFIG_NAME, epochs=int, model=str, labels=(str, list, _NONE), eval_data=(str, _NONE))
    lines = _lines(folder / METRICS_NAME)
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    last, best = trained[-1] if trained else {}, max(evaluated, key=lambda line: line["top1"], default={})
    kept = _updates_kept(folder)
    running = _is_locked(folder / LOCK_NAME)
    done = max(kept, last.get("index", -1) + 1) if running else kept
    per_epoch = _updates_per_epoch(folder, saved, lines, kept)
    total = per_epoch and per_epoch * config["epochs"]
    state, note = _state(folder, config, running=running, last=last.get("index", -1), kept=kept, total=total)
    return {
        "state": state,
        "epoch": done // per_epoch if per_epoch else 0,
        "epochs": config["epochs"],
        "updates": done,
        "progress": done / total if total else None if done else 0.0,
        "model": config["model"],
        "labels": [config["labels"]] if isinstance(config["labels"], str) else config["labels"] or [],
        "teacher": None if config.get("distillation_type") == "none" else _teacher_name(saved.get("teacher")),
        "recipe": _recipe_name(recipe_id),
        "recipe_id": recipe_id,
        "best_top1": best.get("top1"),
        "best_epoch": best.get("epoch"),
        "best_weights": best.get("weights"),
        "best_answer": _answer(best),
        "loss": last.get("loss"),
        "images_per_s": last.get("images_per_s"),
        "written": _written(*(folder / name for name in (METRICS_NAME, STATE_NAME, CONFIG_NAME))),
        "note": note,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the metrics that an overview needs; none where there is no file."""
    lines = read_metrics(path.parent) if path.is_file() else []
    return [_with(line, path, **(_EVALUATED if line["kind"] == "eval" else _UPDATED)) for line in lines]


def _with(values: Any, path: Path, **kinds: Any) -> dict[str, Any]:
    """Return JSON values if they are an object whose fields have these types, or raise StorageError."""
    wrong = (
        kinds
        if not isinstance(values, dict)
        else [name for name in kinds if not isinstance(values.get(name), kinds[name])]
    )
    if wrong:
        raise StorageError(f"{path} is not that of a run: it has no {listed(list(wrong))} as a run writes it")
    return values


def _state(
    folder: Path, config: Mapping[str, Any], *, running: bool, last: int, kept: int, total: int | None
) -> tuple[State, str]:
    """Return the state of a run, and what to know about it.

    Args:
        folder: folder of the run.
        config: its settings.
        running: whether a process holds its lock.
        last: update of the last line of its metrics, -1 without one.
        kept: number of updates in its checkpoint.
        total: number of updates of the whole run; None: not known.
    """
    if running:
        return "running", ""
    if total is not None and kept >= total:
        if config["eval_data"] and _evaluated(folder) < total:
            return "stopped", "trained, but not evaluated: --resume evaluates it"
        return "finished", ""
    back = f"--resume continues at update {kept:,}" if kept else "no checkpoint: --resume starts again"
    if (broken := _broken_update(folder)) is not None and broken > last:
        return "failed", f"the loss of update {broken:,} is not finite; {back}"
    return ("not started" if last < 0 and not kept else "stopped"), back


def _updates_kept(folder: Path) -> int:
    """Return the number of updates in the checkpoint of a run, from its header; 0 without a checkpoint.

    Raises:
        StorageError: it is not a complete checkpoint.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="np") as file:
            updates = json.loads((file.metadata() or {})[STATE_KEY])["meta"]["next_update"]
        if type(updates) is not int:
            raise TypeError(f"next_update is {updates!r}")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{path}: this is not a complete checkpoint ({error})") from error
    return updates


def _updates_per_epoch(
    folder: Path, saved: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], kept: int
) -> int | None:
    """Return the number of updates of an epoch; None in the first epoch of a run whose config.json does not have it yet."""
    if "updates_per_epoch" in saved:
        return _with(saved, folder / CONFIG_NAME, updates_per_epoch=int)["updates_per_epoch"]
    for line in reversed(lines):
        if line["kind"] == "eval":
            return (line["index"] + 1) // max(1, line["epoch"] + 1)
        if line["epoch"] > 0:
            return (line["index"] - line["step"]) // line["epoch"]
    # `last` is exported at the end of an epoch, and the last update of an epoch has a line.
    ended = (folder / "last").is_dir() and lines and kept == lines[-1]["index"] + 1
    return kept if ended else None


def _is_locked(path: Path) -> bool:
    """Return whether a process trains in the folder of this lock. It is tried with a shared lock, given back at once."""
    # O_NONBLOCK: opening a pipe of this name must not wait for somebody who writes to it.
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _evaluated(folder: Path) -> int:
    """Return the number of updates at the last evaluation; 0 without one."""
    path = folder / EVALUATION_NAME
    return _with(read_json(path), path, update=int)["update"] if path.is_file() else 0


def _broken_update(folder: Path) -> int | None:
    """Return the update whose loss was not finite, from the file that the run wrote about it."""
    paths = folder.glob("nonfinite-rank*.json")
    return max((_with(read_json(path), path, update=int)["update"] for path in paths), default=None)


def _answer(best: Mapping[str, Any]) -> str | None:
    """Return the answer whose accuracy is that of an evaluation: the mean of both heads, or the class head."""
    accuracies = {name: score["top1"] for name, score in best.get("scores", {}).items() if "top1" in score}
    return next((name for name in ("mean_logits", "class_head") if accuracies.get(name, -1) == best.get("top1")), None)


def _teacher_name(teacher: Any) -> str | None:
    """Return the names of the teachers in config.json: of one, of an ensemble, or of several label sets."""
    if isinstance(teacher, list):
        return ", ".join(filter(None, map(_teacher_name, teacher)))
    if not isinstance(teacher, dict):
        return None
    return _teacher_name(teacher["members"]) if "members" in teacher else teacher.get("name")


# --- label sets -----------------------------------------------------------------------------------------------------


def _label_set(folder: Path) -> Found:
    plan = read_plan(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    blocks = label_blocks(folder)
    wanted = manifest.blocks if manifest else []
    shards = (manifest and manifest.shards) or [shard.name for shard in plan.source.shards]
    sealed = manifest is not None and manifest.sealed
    # Only the first command of a set writes which views it wants. Blocks beside these are of a later one, whose end nobody knows.
    further = [block for block in blocks if block not in wanted]
    known = wanted if sealed or not further else []
    shown = wanted if sealed else [*wanted, *further]
    files, of = _label_files(folder, shards, known or blocks), len(shards) * len(known)
    return {
        "state": "sealed" if sealed else "unfinished",
        "views": [min(block.start for block in shown), max(block.stop for block in shown)] if shown else None,
        "label_shards": files,
        "of_label_shards": of or None,
        "progress": files / of if of else None if files else 0.0,
        "teacher": _teacher_name(plan.teacher.model_dump(mode="json")),
        "recipe": _recipe_name(plan.recipe_id),
        "recipe_id": plan.recipe_id,
        "written": _written(folder / MANIFEST_NAME, folder / PLAN_NAME, *(folder / "labels").glob("views-*-*")),
        "note": _further_note(further, sealed=sealed, claimed=wanted),
    }


def _label_files(folder: Path, shards: Sequence[str], blocks: Sequence[range]) -> int:
    """Return the number of label shards of some source shards and blocks of views that are there."""
    wanted, found = {f"{name}.parquet" for name in shards}, 0
    for block in blocks:
        with contextlib.suppress(FileNotFoundError):  # nobody has begun this block yet
            found += len(wanted & set(os.listdir((folder / labels_path("x", block)).parent)))
    return found


def _further_note(further: Sequence[range], *, sealed: bool, claimed: Sequence[range]) -> str:
    """Return what to know about blocks of views that the manifest does not list."""
    if not further:
        return ""
    if sealed:
        return f"{count(len(further), 'further block')} of views begun, not sealed"
    begun = f"{count(len(further), 'block')} of views begun"
    return f"{begun} beside those of the first command: how many are wanted is not stored" if claimed else begun


# --- text -----------------------------------------------------------------------------------------------------------


def _recipe_name(recipe_id: str) -> str:
    return next((name for name, preset in PRESETS.items() if preset.id == recipe_id), short(recipe_id))


def _written(*paths: Path) -> str | None:
    """Return the time of the last change of these files, in UTC; None if none is there."""
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return datetime.fromtimestamp(max(times), UTC).isoformat(timespec="seconds") if times else None


def _ago(written: str | None) -> str:
    if written is None:
        return "-"
    return f"{duration(max(0.0, time.time() - datetime.fromisoformat(written).timestamp()) / 3600)} ago"


def _run_cells(run: Found) -> tuple[str, ...]:
    if run["state"] == "damaged":
        return (run["path"], "damaged", *["-"] * 10, run["note"])
    answer = " ".join(filter(None, (run["best_weights"], run["best_answer"])))
    return (
        run["path"],
        run["state"],
        f"{run['epoch']} of {run['epochs']}",
        _share(run["progress"]),
        run["model"],
        run["teacher"] or "class labels",
        run["recipe"],
        _number(run["best_top1"], ".2f"),
        answer or "-",
        _number(run["loss"], ".4f"),
        _number(run["images_per_s"], ",.0f"),
        _ago(run["written"]),
        run["note"],
    )


def _set_cells(found: Found) -> tuple[str, ...]:
    if found["state"] == "damaged":
        return (found["path"], "damaged", *["-"] * 5, found["note"])
    return (
        found["path"],
        found["state"],
        ":".join(map(str, found["views"] or ["-"])),
        _share(found["progress"]),
        found["teacher"],
        found["recipe"],
        _ago(found["written"]),
        found["note"],
    )


def _share(progress: float | None) -> str:
    """Return a share in percent; a dash if it is not known."""
    return "-" if progress is None else f"{100 * progress:.0f}"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else f"{value:{how}}"


def _by(order: RunsOrder) -> Callable[[Found], tuple[Any, ...]]:
    """Return the key of an order; what has no value comes last. Numbers and times begin with the largest, a loss with the smallest."""
    field = {"top1": "best_top1", "speed": "images_per_s", "name": "path"}.get(order, order)

    def key(found: Found) -> tuple[Any, ...]:
        value = found.get(field)
        if order == "written" and value is not None:
            value = datetime.fromisoformat(value).timestamp()
        known = -value if order in ("top1", "speed", "progress", "written") and value is not None else value
        return (value is None, "" if value is None else known, found["path"])

    return key
