"""What a checkpoint costs the training: the copy of the state, against writing it.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.json

Weights, their moving average and AdamW's moments of each student are copied (`snapshot`: training waits for this), then
looked through for what is no number, hashed, and written as a run writes them (another thread does this while training
goes on). Medians over the rounds; on a GPU the copy crosses the bus.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import machine, options, write_json

from trainer.checkpoint import check_finite, pack_training, save_state, snapshot
from trainer.optim import create_ema, create_optimizer
from trainer.student import create_student


def measure(model: str, device: torch.device, folder: Path, rounds: int) -> dict[str, Any]:
    student = create_student(model, num_classes=1000).to(device)
    ema = create_ema(student, 0.99996, False)
    optimizer = create_optimizer(student, lr=1e-3, weight_decay=0.05, fused=True)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = pack_training(student, optimizer, ema)

    def write(copy: dict[str, torch.Tensor]) -> None:
        check_finite(copy)
        save_state(folder / "state.safetensors", copy, {"next_update": 1})

    copies, writes = [], []
    for _ in range(rounds):
        seconds, copy = timed(lambda: snapshot(tensors), device)
        copies.append(seconds)
        writes.append(timed(lambda copy=copy: write(copy), device)[0])
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"model": model, "bytes": size, "copy_s": copies, "write_s": writes}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def main() -> None:
    parser = options(__doc__, rounds=5, out_required=False)
    parser.add_argument("--models", nargs="+", default=["deit-ti", "deit-s", "deit-b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in asked.models:
            row = measure(model, torch.device(asked.device), Path(folder), asked.rounds)
            copy, write = statistics.median(row["copy_s"]), statistics.median(row["write_s"])
            print(f"{model}: {row['bytes'] / 1e6:,.0f} MB, copied in {copy:.3f} s, written in {write:.3f} s")
            rows.append(row | {"copy_median_s": copy, "write_median_s": write})
    if asked.out:
        write_json(asked.out, {"machine": machine(), "device": asked.device, "states": rows})


if __name__ == "__main__":
    main()
