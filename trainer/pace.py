"""Progress and speed of a training run: counters of the loop, and their text for people."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.machine.progress import Throttle
from pipeline.text import count
from trainer.metrics import read_metrics

SAY_EVERY_S = 60.0  # at most 3,000 log lines for a run of two days

log = logging.getLogger("deit_cli.train")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The progress of a training run. "This start" is the current process; a resumed run has had earlier ones.

    Attributes:
        phase: `train`; distinguishes a step from the ticks of other commands.
        done: number of updates, those of earlier starts included.
        total: number of updates of the whole run.
        made: number of updates of this start.
        epoch: number of the epoch, from 0, as in metrics.jsonl.
        update: number of updates of the epoch that are done.
        per_epoch: number of updates of an epoch.
        lr: learning rate of the last update.
        numbers: losses and similar values by name, as last read from the device.
        news: whether the numbers were read at this step.
        images_per_s: recent rate without pauses; 0 before there is a rate.
        data_wait: share of the same time in which training waited for data, 0..1.
        elapsed_s: seconds since this start began to train, pauses included.
        images: number of images that this start has trained on, on all ranks together.
        waited_s: seconds in which this start waited for data.
        mean_images_per_s: mean rate of this start without pauses.
        left_s: estimated seconds until the end, pauses included; None before there is a rate.
        doing: name of another activity, such as `evaluating`; None during training.
    """

    phase: str = "train"
    done: int
    total: int
    made: int
    epoch: int
    update: int
    per_epoch: int
    lr: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    news: bool = False
    images_per_s: float = 0.0
    data_wait: float = 0.0
    elapsed_s: float = 0.0
    images: int = 0
    waited_s: float = 0.0
    mean_images_per_s: float = 0.0
    left_s: float | None = None
    doing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"per_second": self.per_second}

    @property
    def per_second(self) -> float:
        """Return the updates per second of this start, pauses included."""
        return self.made / self.elapsed_s if self.elapsed_s else 0.0


StepProgress = Callable[[Step], None]


@dataclass
class _Window:
    """A span of training: its number of images, its seconds, and the seconds of waiting for data."""

    images: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0

    def plus(self, other: "_Window") -> "_Window":
        return _Window(self.images + other.images, self.elapsed_s + other.elapsed_s, self.waited_s + other.waited_s)

    def rates(self) -> dict[str, float]:
        elapsed = max(self.elapsed_s, 1e-9)  # the clock may not have moved
        return {"images_per_s": self.images / elapsed, "data_wait": self.waited_s / elapsed}


class Pace:
    """Counter of updates and their rates; calls `progress` after every update, look and pause.

    Only `look` may be slow, because it reads numbers from the device. The other methods are called for every update.
    """

    def __init__(self, *, total: int, per_epoch: int, progress: StepProgress | None = None) -> None:
        """Start measuring.

        Args:
            total: number of updates of the whole run.
            per_epoch: number of updates of an epoch.
            progress: function to call with each step, or None.
        """
        self._total, self._per_epoch, self._progress = total, per_epoch, progress
        self._began = self._since = time.monotonic()
        self._first: float | None = None  # end of the first update of this start
        self._index, self._made, self._lr = -1, 0, 0.0
        self._numbers: dict[str, float] = {}
        self._before, self._now, self._all = _Window(), _Window(), _Window()

    def count(self, index: int, images: int, *, waited_s: float, lr: float) -> None:
        """Count an update.

        Args:
            index: number of the update, from 0.
            images: number of images that it was computed from, on all ranks together.
            waited_s: seconds in which it waited for its data.
            lr: learning rate of the update.
        """
        self._index, self._lr = index, lr
        self._made += 1
        self._add(images, waited_s)
        self._first = self._since if self._first is None else self._first
        self._tell()

    def look(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Take the numbers of the last update; return `images_per_s` and `data_wait` since the last look."""
        self._add()
        self._numbers = dict(numbers)
        rates = self._now.rates()
        self._before, self._now = self._now, _Window()
        self._tell(news=True)
        return rates

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Mark the block as a pause in training: its time counts for the remaining time, but not for the rates."""
        self._add()
        self._tell(doing=doing)
        yield
        self._since = time.monotonic()
        self._tell()

    def _add(self, images: int = 0, waited_s: float = 0.0) -> None:
        """Count the time since the last call as training."""
        now = time.monotonic()
        passed = _Window(images, now - self._since, waited_s)
        self._since = now
        self._now, self._all = self._now.plus(passed), self._all.plus(passed)

    def _tell(self, *, news: bool = False, doing: str | None = None) -> None:
        if self._progress is None or self._index < 0:
            return
        epoch, step = divmod(self._index, self._per_epoch)
        lately = self._before.plus(self._now).rates()
        self._progress(
            Step(
                done=self._index + 1,
                total=self._total,
                made=self._made,
                epoch=epoch,
                update=step + 1,
                per_epoch=self._per_epoch,
                lr=self._lr,
                numbers=self._numbers,
                news=news,
                images_per_s=lately["images_per_s"],
                data_wait=lately["data_wait"],
                elapsed_s=time.monotonic() - self._began,
                images=self._all.images,
                waited_s=self._all.waited_s,
                mean_images_per_s=self._all.rates()["images_per_s"],
                left_s=self._left_s(),
                doing=doing,
            )
        )

    def _left_s(self) -> float | None:
        left = self._total - self._index - 1
        if left == 0:
            return 0.0
        if self._made < 2 or self._first is None:  # the first update waits for loaders and compilers
            return None
        return left * (time.monotonic() - self._first) / (self._made - 1)


def log_steps(every_s: float = SAY_EVERY_S) -> StepProgress:
    """Return a progress function that logs a step at most once in `every_s` seconds, and always the last one.

    The first step with new numbers is logged at once. Old numbers are not repeated in later lines.
    """
    numbers, lines = Throttle(every_s, due=True), Throttle(every_s)

    def update(step: Step) -> None:
        if lines.due or (step.news and (numbers.due or step.done == step.total)):
            lines.restart()
            if step.news:
                numbers.restart()
            shown = step if step.news else replace(step, numbers={})  # a repeated old loss would look like no progress
            log.info("%s", "  ".join(filter(None, (place(step), step_text(shown, every_number=True), left(step)))))

    return update


def place(step: Step) -> str:
    """Return the epoch and the update of a step."""
    of = f"{step.per_epoch:,}"
    return f"epoch {step.epoch}, update {step.update:>{len(of)},}/{of}"  # constant width, so that the bar does not move


def step_text(step: Step, *, every_number: bool = False) -> str:
    """Return losses, learning rate and speed of a step; without `every_number` they fit a narrow terminal."""
    names = step.numbers if every_number else ("loss",)
    parts = [f"{name} {step.numbers[name]:.4f}" for name in names if name in step.numbers]
    parts += [f"lr {step.lr:.2e}", rate(step.images_per_s), f"waiting for data {100 * step.data_wait:.0f} %"]
    return "  ".join([*parts, step.doing] if step.doing else parts)


def left(step: Step) -> str:
    """Return the remaining time as text; empty if it is not known."""
    return "" if step.left_s is None else f"{span(step.left_s)} left"


def rate(images_per_s: float) -> str:
    """Return a rate with its unit."""
    return f"{images_per_s:,.{0 if images_per_s >= 10 else 2}f} images/s"


def span(seconds: float) -> str:
    """Return seconds as text in hours, minutes and seconds, or in days if it is long."""
    if seconds >= 3 * 86400:
        return f"{seconds / 86400:.1f} days"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def summary(folder: Path, last: Step | None, *, location: str | None = None) -> str:
    """Return the result of a run, in at most three lines.

    Args:
        folder: folder of the run, which is over.
        last: last step of this start; None if all updates were already done.
        location: name that the user gave to the folder.
    """
    name = (location or str(folder)).rstrip("/")
    lines = read_metrics(folder)
    trained = [line for line in lines if line["kind"] == "train"]
    scored = [line for line in lines if line["kind"] == "eval"]
    said = [_work(name, trained, last)]
    results = [_losses(trained)] if trained else []
    if scored:
        best = max(scored, key=lambda line: line["top1"])  # the first of equals, as in the loop
        results.append(f"best top-1 {best['top1']:.2f} % after epoch {best['epoch']} ({best['weights']})")
    said += ["; ".join(results)] if results else []
    said.append(f"weights in {name}/last" + (f", the best in {name}/best" if scored else ""))
    return "\n".join(said)


def run_record(folder: Path, last: Step | None, *, location: str) -> dict[str, Any]:
    """Return the result of a run as JSON values; arguments as for `summary`. What this start did not measure is None."""
    lines = read_metrics(folder)
    trained = [line for line in lines if line["kind"] == "train"]
    scored = [line for line in lines if line["kind"] == "eval"]
    best = max(scored, key=lambda line: line["top1"], default=None)
    return {
        "path": location,
        "updates": last.done if last else None,
        "updates_of_this_start": last.made if last else 0,
        "seconds": round(last.elapsed_s, 3) if last else None,
        "images_per_s": last.mean_images_per_s if last else None,
        "losses": mean_losses(trained) if trained else {},
        "best": best and {name: best[name] for name in ("top1", "epoch", "weights")},
        "exported": [name for name in ("last", "last-ema", "best") if (folder / name).is_dir()],
    }


def _work(folder: str, trained: list[dict], last: Step | None) -> str:
    if last is None:
        return f"{folder}: was already trained; nothing was left to do"
    how = f"in {span(last.elapsed_s)}, {rate(last.mean_images_per_s)}"
    epochs = -(-last.total // last.per_epoch)
    before = f", {last.made:,} of them in this start" if last.made < last.done else ""
    return f"{folder}: trained {count(epochs, 'epoch')}, {count(last.done, 'update')}{before}, {how}"


def _losses(trained: list[dict]) -> str:
    return "last epoch: " + "  ".join(f"{name} {value:.4f}" for name, value in mean_losses(trained).items())


def mean_losses(trained: list[dict]) -> dict[str, float]:
    """Return the losses of the last epoch: means over its lines, because a single batch is noisy."""
    final = [line for line in trained if line["epoch"] == trained[-1]["epoch"]]
    names = [name for name in final[-1] if name == "loss" or name.endswith("_loss")]
    return {name: sum(line[name] for line in final) / len(final) for name in names}
