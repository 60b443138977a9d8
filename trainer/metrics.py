"""The record of a run: metrics.jsonl, one JSON object in each line, and the trackers that get the same numbers."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage.atomic import replace_file
from pipeline.storage.json import parse_json
from trainer.trackers import TensorBoard, Tracker, WandB, check_trackers, scalars_of

METRICS_NAME = "metrics.jsonl"

log = logging.getLogger("deit_cli.train")


class MetricsLog:
    """The file `metrics.jsonl` of a run. A resumed run drops the lines of updates that it computes again."""

    def __init__(self, folder: Path, *, next_index: int) -> None:
        self._path = folder / METRICS_NAME
        kept = [line for line in read_metrics(folder) if line["index"] < next_index] if self._path.is_file() else []
        text = "".join(_line(values) for values in kept)
        replace_file(self._path, text.encode())

    def add(self, kind: str, index: int, **values: Any) -> None:
        """Append one line with values measured after update `index`; it is in the file at once, and never in parts."""
        line = _line({"kind": kind, "index": index, **_finite(values)}).encode()
        try:
            with self._path.open("ab", buffering=len(line) + 1) as file:  # one write
                file.write(line)
        except OSError as error:
            raise StorageError(f"{self._path}: {error.strerror}") from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run without a last line that a crash cut off."""
    path = folder / METRICS_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            value = parse_json(line)
            if not (isinstance(value, dict) and isinstance(value.get("index"), int) and "kind" in value):
                raise ValueError("not a record of a run")
            values.append(value)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{path}: line {number} is damaged: delete it and continue") from error
    return values


class Recorder:
    """The record of a run: metrics.jsonl and the trackers. Without arguments it records nothing.

    The trackers are copies of `metrics.jsonl`: a tracker that fails is dropped, and training continues.
    """

    def __init__(self, record: MetricsLog | None = None, trackers: Iterable[Tracker] = ()) -> None:
        self._record, self._trackers = record, list(trackers)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def add(self, kind: str, index: int, **values: Any) -> None:
        """Record numbers measured after update `index`.

        Args:
            kind: `train`, `eval` or `tokens` (of --probe-interval).
            index: number of the update, from 0.
            values: JSON values; numbers in them become points of curves, see `trackers.scalars_of`.

        Raises:
            StorageError: `metrics.jsonl` cannot be written.
        """
        if self._record is not None:
            self._record.add(kind, index, **values)
        scalars = scalars_of(kind, values)
        self._each(lambda tracker: tracker.add(index, scalars))

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers, which write their buffered values.

        Args:
            failed: whether the run stopped before its end.
        """
        self._each(lambda tracker: tracker.close(failed=failed))
        self._trackers.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._trackers):
            try:
                do(tracker)
            except Exception as error:  # a tracker can fail in any way: a lost network, a full disk, a killed process
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed and gets no more numbers; training continues, and %s has all numbers (%s: %s)",
                    tracker.name, METRICS_NAME, type(error).__name__, error,
                )  # fmt: skip


def open_recorder(
    folder: Path,
    *,
    next_index: int,
    tensorboard: bool = False,
    wandb: bool = False,
    wandb_project: str | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> Recorder:
    """Open the record of a run and the requested trackers, in the process that records.

    Args:
        folder: folder of the run.
        next_index: first update that will be computed; records from this update on are dropped.
        tensorboard: whether to write event files.
        wandb: whether to record with Weights & Biases.
        wandb_project: project in Weights & Biases; None: WANDB_PROJECT, or W&B's own default.
        run_config: JSON values that W&B shows beside the curves.

    Raises:
        UsageError: a package is missing, or no user is logged in to W&B.
        StorageError: the folder cannot be read or written.
    """
    check_trackers(tensorboard=tensorboard, wandb=wandb)
    record = MetricsLog(folder, next_index=next_index)
    trackers: list[Tracker] = []
    if tensorboard:
        trackers.append(TensorBoard(folder, next_index=next_index))
    if wandb:
        trackers.append(WandB(folder, next_index=next_index, project=wandb_project, run_config=run_config or {}))
    return Recorder(record, trackers)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with null for a number that is not finite: JSON has none, and a gradient norm may be infinite."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: kept(value) for name, value in values.items()}


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"
