"""Labels as FKD and TinyViT publish them, written anew."""

import struct
from pathlib import Path

import numpy as np
import torch


def write_fkd(folder: Path, kind: str = "marginal_smoothing_k5", *, half: bool = False) -> Path:
    """Write the labels of four images of two classes as FKD does."""
    for seed, name in enumerate(("n01/n01_7", "n01/n01_12", "n02/n02_3", "n02/n02_4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(fkd_state(seed, kind, half), folder / f"{name}.tar")
    return folder


def write_tinyvit(folder: Path, *, epochs=(0, 1), ranks=(0, 1), rows: int = 7, k: int = 10) -> Path:
    """Write what ranks save, the key of record i in line i."""
    for epoch in epochs:
        place = folder / f"logits_top{k}_epoch{epoch}"
        place.mkdir(parents=True)
        for rank in ranks:
            prob = probabilities(100 * epoch + rank, rows)
            keys = [f"n000{rank}_{row}" for row in range(rows)]
            (place / f"rank{rank}-keys.txt").write_text("".join(f"{key}\n" for key in keys))
            records = [tinyvit_record(p, 7919 * row + epoch, k) for row, p in enumerate(prob)]
            (place / f"rank{rank}-values.bin").write_bytes(b"".join(records))
    return folder


CLASSES, CROPS = 40, 6


def probabilities(seed: int, rows: int = CROPS, classes: int = CLASSES) -> np.ndarray:
    """Softmax of a teacher that knows something, float32 [rows, classes]."""
    logits = 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(logits, 1).numpy()


def fkd_state(seed: int, kind: str = "marginal_smoothing_k5", half: bool = False) -> list[np.ndarray]:
    """Coordinates, flips and labels of one image of 375 x 500 pixels."""
    rng = np.random.default_rng(seed)
    size = rng.integers(20, 300, (CROPS, 2))
    corner = np.stack([rng.integers(0, 375 - size[:, 0] + 1), rng.integers(0, 500 - size[:, 1] + 1)], axis=1)
    coords = (np.concatenate([corner, size], axis=1) / [375, 500, 375, 500]).astype(np.float32)
    flip, labels = rng.random(CROPS) < 0.5, fkd_labels(probabilities(seed), kind)
    return [np.float16(coords), flip, np.float16(labels)] if half else [coords, flip, labels]


def tinyvit_record(prob: np.ndarray, seed: int, k: int = 10) -> bytes:
    """One record: int32 seed, int16 classes, float16 probabilities."""
    order = np.argsort(-prob, kind="stable")[:k]
    return struct.pack("<i", seed) + order.astype("<i2").tobytes() + prob[order].astype("<f2").tobytes()


def fkd_labels(prob: np.ndarray, kind: str) -> np.ndarray:
    """What `label_quantization` makes of probabilities, or all of them."""
    order = np.argsort(-prob, axis=1, kind="stable")
    if kind == "full":
        return prob
    if kind == "hard":
        return order[:, 0].astype(np.int64)
    top = order[:, :1] if kind == "smoothing" else order[:, :5]
    pairs = np.stack([top.astype(np.float32), np.take_along_axis(prob, top, 1)], axis=1)
    return pairs[:, :, 0] if kind == "smoothing" else pairs
