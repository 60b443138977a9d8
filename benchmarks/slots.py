"""What fresh shared memory costs a batch of views, against shared memory that is used again.

    python benchmarks/slots.py --out benchmarks/results/slots.json

Two loader processes copy one view after the other into a batch, and the main process looks at every sixteenth row of it: once
into memory that is allocated for each batch, as a DataLoader does, once into slots, as `pipeline.machine.loaders.SlotStream` does, in
alternating rounds. Both start with full queues. Microseconds for a view of 224 pixels.
"""

import json
import statistics
import time
from typing import Any

import numpy as np
from rounds import machine, options, write_json
from torch import Tensor

from pipeline.machine.loaders import PREFETCH, Note, Slots, _shared_pixels, in_processes

VIEWS, SIZE, WORKERS, BATCHES = 125, 224, 2, 40


class Copy:
    """Fills a batch, and says how long it took; without slots in memory of its own."""

    def __init__(self, slots: Tensor | None) -> None:
        self._slots = slots
        self._view = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)

    def __call__(self, number: int, _: Note) -> tuple[Tensor, float]:
        began = time.perf_counter()
        slots = self._slots
        batch = _shared_pixels(VIEWS, SIZE, SIZE, 3) if slots is None else slots[number % len(slots)]
        for at in range(VIEWS):
            batch.numpy()[at] = self._view
        return batch, time.perf_counter() - began


def measure(slots: Tensor | None) -> dict[str, float]:
    batches = in_processes(Copy(slots), range(BATCHES), workers=WORKERS)
    writing, reading = [], []
    for number, (batch, seconds) in enumerate(batches):
        began = time.perf_counter()
        batch[:, ::16].sum()
        if number >= 2 * WORKERS * PREFETCH:  # by then every slot has been written to
            writing.append(seconds)
            reading.append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(each) / VIEWS for name, each in (("write", writing), ("read", reading))}


def main() -> None:
    parser = options(__doc__, rounds=5)
    args = parser.parse_args()
    slots = Slots((VIEWS, SIZE, SIZE, 3), workers=WORKERS, held=1).pixels
    rounds: list[dict[str, Any]] = [{"fresh": measure(None), "slots": measure(slots)} for _ in range(args.rounds)]
    median = {
        f"{kind}_{side}_us": round(statistics.median(each[kind][side] for each in rounds), 1)
        for kind in ("fresh", "slots")
        for side in ("write", "read")
    }
    result = {
        "what": "microseconds a view, 2 loader processes",
        "machine": machine(),
        "median": median,
        "rounds": rounds,
    }
    write_json(args.out, result)
    print(json.dumps(median, indent=1))


if __name__ == "__main__":
    main()
