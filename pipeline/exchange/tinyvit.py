"""TinyViT's saved logits (Wu et al. 2022, arXiv 2207.10666), which are in fact probabilities: two files for each rank and epoch.

The layout is that of github.com/microsoft/Cream, files TinyViT/data/augmentation/manager.py and dataset_wrapper.py and
TinyViT/save_logits.py:

    logits_top{K}_epoch{E}/rank{R}-keys.txt      the key of record i in line i
    logits_top{K}_epoch{E}/rank{R}-values.bin    records of 4 + 4 K bytes, little-endian:
                                                 int32 seed of the augmentation, int16 [K] classes, float16 [K] probabilities
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import ImportedLabelsError, SourceError
from pipeline.exchange.foreign import ForeignRows, check_answers
from pipeline.labels.format import MAX_TOPK
from pipeline.storage.atomic import refusals_named
from pipeline.text import MAX_KEY_BYTES, check_name

ROWS_AT_ONCE = 16_384
_EPOCH = re.compile(r"logits_top([1-9]\d{0,4})_epoch(\d{1,6})")
_VALUES = re.compile(r"rank(\d{1,6})-values\.bin")


@dataclass(frozen=True)
class RankFile:
    """The labels that one rank saved in one epoch."""

    folder: Path
    topk: int
    epoch: int
    rank: int

    @property
    def name(self) -> str:
        """Stem of the names of the tables for these labels."""
        return f"epoch-{self.epoch:05d}-rank-{self.rank:04d}"

    @property
    def keys(self) -> Path:
        """Path of the file of keys."""
        return self.folder / f"rank{self.rank}-keys.txt"

    @property
    def values(self) -> Path:
        """Path of the file of records."""
        return self.folder / f"rank{self.rank}-values.bin"

    @property
    def record(self) -> "np.dtype[np.void]":
        """NumPy type of one record."""
        return np.dtype([("seed", "<i4"), ("index", "<i2", (self.topk,)), ("prob", "<f2", (self.topk,))])


def list_files(folder: Path) -> list[RankFile]:
    """Return the rank files of all epochs below a folder, or of the folder if it is itself an epoch; sorted.

    Raises:
        ImportedLabelsError: no files are found, a file lacks its partner, or epochs differ in K.
    """
    with refusals_named(folder):
        inside = [path for path in folder.iterdir() if _EPOCH.fullmatch(path.name)]
        epochs = [folder] if _EPOCH.fullmatch(folder.name) else inside
        found = sorted((file for epoch in epochs for file in _ranks(epoch)), key=lambda file: (file.epoch, file.rank))
    if not found:
        raise ImportedLabelsError(
            f"{folder}: no logits_topK_epochE/rankR-values.bin in this folder",
            fix="Pass the folder that TinyViT's DISTILL.TEACHER_LOGITS_PATH named",
        )
    if len(sizes := sorted({file.topk for file in found})) > 1:
        raise ImportedLabelsError(
            f"{folder}: all epochs must have the same K, got {sizes}", fix="Import each K separately"
        )
    if sizes[0] > MAX_TOPK:
        raise ImportedLabelsError(f"{folder}: at most {MAX_TOPK} classes are stored for a view, these have {sizes[0]}")
    if len({(file.epoch, file.rank) for file in found}) != len(found):
        raise ImportedLabelsError(f"{folder}: two files have the same epoch and rank")
    return found


def _ranks(epoch: Path) -> Iterator[RankFile]:
    match = _EPOCH.fullmatch(epoch.name)
    assert match is not None
    names = {path.name for path in epoch.iterdir()}
    for name in sorted(names):
        if rank := _VALUES.fullmatch(name):
            file = RankFile(epoch, int(match[1]), int(match[2]), int(rank[1]))
            if file.values.name != name or file.keys.name not in names:
                raise ImportedLabelsError(f"{epoch / name} has no {file.keys.name} beside it, which names its records")
            yield file
    for name in sorted(names):
        if name.endswith("-keys.txt") and name.replace("-keys.txt", "-values.bin") not in names:
            raise ImportedLabelsError(f"{epoch / name} has no {name.replace('-keys.txt', '-values.bin')} beside it")


def count_records(file: RankFile) -> int:
    """Return the number of records that a rank saved.

    Raises:
        ImportedLabelsError: the last record is incomplete.
    """
    with refusals_named(file.values):
        size = file.values.stat().st_size
    count, more = divmod(size, file.record.itemsize)
    if more:
        raise ImportedLabelsError(
            f"{file.values}: it is truncated: {size} bytes are {count} records of {file.record.itemsize} bytes,"
            f" and record {count} at byte {count * file.record.itemsize} has {more}",
            fix="Fetch the file again",
        )
    return count


def read_rank(file: RankFile, *, num_classes: int) -> Iterator[ForeignRows]:
    """Yield the labels that a rank saved, some thousands at a time, in their order; `more` has seed (int32).

    Raises:
        ImportedLabelsError: the numbers of keys and records differ, or a record cannot be a teacher's answer.
    """
    total, done, seen = count_records(file), 0, set[str]()
    with refusals_named(file.keys):
        keys = file.keys.open("rb")
    with keys, refusals_named(file.values), file.values.open("rb") as values:
        while done < total:
            count = min(ROWS_AT_ONCE, total - done)
            names = [_key(keys.readline(MAX_KEY_BYTES + 2), file, done + i, total) for i in range(count)]
            for i, name in enumerate(names):
                if name in seen:
                    raise ImportedLabelsError(f"{file.keys}: line {done + i + 1}: the key {name!r} stands twice")
                seen.add(name)
            data = values.read(count * file.record.itemsize)
            if len(data) != count * file.record.itemsize:
                raise ImportedLabelsError(f"{file.values}: it became shorter while it was read")
            yield _rows(file, names, np.frombuffer(data, file.record), done, num_classes)
            done += count
        if keys.readline(1):
            raise ImportedLabelsError(
                f"{file.keys}: it has more than {total} lines, and {file.values.name} has {total} records"
            )


def _rows(file: RankFile, names: list[str], records: np.ndarray, start: int, num_classes: int) -> ForeignRows:
    def refuse(row: int, why: str) -> None:
        at = (start + row) * file.record.itemsize
        raise ImportedLabelsError(f"{file.values}: record {start + row} at byte {at}: {why}")

    index, prob, seed = (
        records["index"].astype(np.int64),
        records["prob"].astype(np.float16),
        records["seed"].astype(np.int32),
    )
    if problem := check_answers(index, prob, num_classes):
        refuse(*problem)
    if (seed < 0).any():
        refuse(int((seed < 0).argmax()), f"a seed must be in 0..{2**31 - 1}, this one is {int(seed.min())}")
    views = np.full(len(names), file.epoch, np.uint32)
    return ForeignRows(names, views, index[:, 0], index, np.minimum(prob, np.float16(1)), {"seed": seed}, file.name)


def _key(line: bytes, file: RankFile, number: int, total: int) -> str:
    if not line:
        raise ImportedLabelsError(f"{file.keys}: it has {number} lines, and {file.values.name} has {total} records")
    try:
        # readline with a limit: a longer line has no end of line, and check_name reports that it is too long
        return check_name(line.removesuffix(b"\n").removesuffix(b"\r").decode(), f"line {number + 1}")
    except (SourceError, UnicodeDecodeError) as error:
        raise ImportedLabelsError(f"{file.keys}: line {number + 1} is not a key: {error}") from error
