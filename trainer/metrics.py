"""The record of a run: one JSON object a line, and the same numbers for the console."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import replace_file

METRICS_NAME = "metrics.jsonl"
SAY_EVERY_S = 2.0

log = logging.getLogger("deit_cli.train")


class MetricsLog:
    """`metrics.jsonl` of a run. A continuation drops the lines of batches that it computes again."""

    def __init__(self, folder: Path, *, next_index: int) -> None:
        self._path = folder / METRICS_NAME
        kept = [line for line in read_metrics(folder) if line["index"] < next_index] if self._path.is_file() else []
        text = "".join(_line(values) for values in kept)
        replace_file(self._path, lambda file: _write(file, text))

    def add(self, kind: str, index: int, **values: Any) -> None:
        """Append one line; `index` is the batch after which it holds."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"kind": kind, "index": index, **_finite(values)}))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run; a last line that was cut by a crash is left out."""
    path = folder / METRICS_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise StorageError(f"{path}: line {number} is damaged: delete it and go on") from error
    return values


class Console:
    """One line now and then: losses, rate, the share of time spent waiting for data, and the time left."""

    def __init__(self, total: int, steps_per_epoch: int) -> None:
        self._total, self._steps = total, steps_per_epoch
        self._said = -math.inf
        self.restart()

    def restart(self) -> None:
        """Start measuring anew, after a pause that was not training."""
        self._started, self._waited, self._images, self._batches = time.monotonic(), 0.0, 0, 0

    def count(self, images: int, *, waited_s: float) -> None:
        """Count a batch and the seconds that it was waited for."""
        self._images += images
        self._batches += 1
        self._waited += waited_s

    def say(self, index: int, numbers: dict[str, float], lr: float) -> dict[str, float]:
        """Log a line after batch `index`, at most one in SAY_EVERY_S but for the last; return rate and waiting share."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        speed = {"images_per_s": self._images / elapsed, "data_wait": self._waited / elapsed}
        left_s = (self._total - index - 1) * elapsed / max(self._batches, 1)
        self.restart()
        if now - self._said < SAY_EVERY_S and index + 1 < self._total:
            return speed
        self._said = now
        epoch, step = divmod(index, self._steps)
        log.info(
            "epoch %d %d/%d  %s  lr %.2e  %.0f images/s  waiting %.0f %%  %s left",
            epoch,
            step + 1,
            self._steps,
            "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()),
            lr,
            speed["images_per_s"],
            100 * speed["data_wait"],
            time.strftime("%H:%M:%S", time.gmtime(left_s)) if left_s < 86400 else f"{left_s / 86400:.1f} days",
        )
        return speed


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; a gradient norm may be one, and is recorded as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _write(file: Any, text: str) -> None:
    file.write(text.encode())
