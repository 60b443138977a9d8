"""The record of a run: one JSON object a line, and the same numbers for the console."""

import json
import time
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage import replace_file

METRICS_NAME = "metrics.jsonl"


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
            file.write(_line({"kind": kind, "index": index, **values}))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run; a last line that was cut by a crash is left out."""
    try:
        lines = (folder / METRICS_NAME).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise StorageError(f"{folder / METRICS_NAME}: {error.strerror}") from error
    return [json.loads(line) for line in lines[:-1]]


class Rate:
    """Images a second, and the share of time spent waiting for data, since the last look."""

    def __init__(self) -> None:
        self._started, self._waited, self._images = time.monotonic(), 0.0, 0

    def add(self, images: int, *, waited_s: float) -> None:
        """Count a batch and the seconds that it was waited for."""
        self._images += images
        self._waited += waited_s

    def take(self) -> tuple[float, float]:
        """Return images a second and the waiting share, and start again."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        result = self._images / elapsed, self._waited / elapsed
        self._started, self._waited, self._images = time.monotonic(), 0.0, 0
        return result


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _write(file: Any, text: str) -> None:
    file.write(text.encode())
