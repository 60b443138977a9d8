"""PrecomputeConfig: every setting of stage 1 but recipe and teacher. The command line takes its options from here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError

Precision = Literal["float16", "float32"]
MAX_VIEW = 2**20  # a million epochs; the plan of a run lists every block of views
BadImagePolicy = Literal["fail", "skip"]


def option(default: Any, text: str, *flags: str) -> Any:
    """Return a config field with its help text and further flags for the command line."""
    return field(default=default, metadata={"help": text, "flags": flags})


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """What to label, and how."""

    data: str = field(
        metadata={"help": "Images: a folder class/name.jpg, tars (train-{000..127}.tar), or image Parquet."}
    )
    out: Path = field(metadata={"help": "Folder of the label set; run the same command again to continue it."})
    views: tuple[int, int] = option((0, 30), "View numbers START:STOP; one view for each epoch of training.")
    topk: int | None = option(None, "Most probable classes to store, by default 10 or all; 0: the hard label alone.")
    precision: Precision = option("float16", "Of the stored probabilities.")
    views_per_shard: int = option(30, "Views in one file: the unit of work, and of loss at a crash.")
    batch_size: int = option(256, "Views in one forward pass of the teacher.", "-b")
    workers: int | None = option(None, "Loader processes; by default from the number of cores.", "-j", "--num-workers")
    on_bad_image: BadImagePolicy = option("fail", "An image that cannot be decoded stops the run, or is left out.")
    min_teacher_accuracy: float = option(0.0, "Refuse a teacher below this top-1 on centre crops, percent.")
    accuracy_samples: int = option(256, "Labelled images on which the teacher is measured first; 0: none.")

    def __post_init__(self) -> None:
        start, stop = self.views
        if not 0 <= start < stop <= MAX_VIEW:
            raise UsageError(f"--views must be START:STOP with 0 <= START < STOP <= {MAX_VIEW}, got {start}:{stop}")
        for name, low in (
            ("topk", 0),
            ("batch_size", 2),
            ("views_per_shard", 1),
            ("accuracy_samples", 0),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
        if not 0 <= self.min_teacher_accuracy <= 100:
            raise UsageError(f"--min-teacher-accuracy is a percentage, 0..100, got {self.min_teacher_accuracy}")
