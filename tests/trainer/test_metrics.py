"""metrics.jsonl: what is written is read back, after a crash and a continuation too."""

import io
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.builders import before_update, make_labels, with_checkout, write_tars
from support.training import TINY

from pipeline.errors import StorageError
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.metrics import METRICS_NAME, MetricsLog, Recorder, open_recorder, read_metrics


def test_lines_come_back_as_they_were_added(tmp_path):
    log = MetricsLog(tmp_path / "run", next_index=0)
    assert read_metrics(tmp_path / "run") == []
    log.add("train", 49, epoch=0, loss=6.907755278982137, lr=1e-6)
    log.add("eval", 49, weights="ema", scores={"class_head": {"top1": 12.5, "top5": 50.0}})
    assert read_metrics(tmp_path / "run") == [
        {"kind": "train", "index": 49, "epoch": 0, "loss": 6.907755278982137, "lr": 1e-6},
        {"kind": "eval", "index": 49, "weights": "ema", "scores": {"class_head": {"top1": 12.5, "top5": 50.0}}},
    ]


def test_every_line_is_one_json_object_that_other_tools_read(tmp_path):
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 0, note="Ampère\nline two")
    text = (tmp_path / METRICS_NAME).read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["note"] for line in text.splitlines()] == ["Ampère\nline two"]


@pytest.mark.parametrize(
    ("next_index", "kept"),
    [
        (0, []),  # from the start: nothing holds any more
        (10, [4, 9, 9]),  # a continuation at batch 10 computes 14 again; 9 and its evaluation were saved
        (14, [4, 9, 9]),  # `next_index` itself is computed again
        (15, [4, 9, 9, 14]),  # nothing to compute again
        (99, [4, 9, 9, 14]),  # a run that was over
    ],
)
def test_a_continuation_drops_the_lines_of_batches_that_it_computes_again(tmp_path, next_index, kept):
    log = MetricsLog(tmp_path, next_index=0)
    for kind, index in (("train", 4), ("train", 9), ("eval", 9), ("train", 14)):
        log.add(kind, index)
    again = MetricsLog(tmp_path, next_index=next_index)
    assert [line["index"] for line in read_metrics(tmp_path)] == kept
    again.add("train", 99)
    assert [line["index"] for line in read_metrics(tmp_path)] == [*kept, 99]


def test_sigkill_loses_no_line(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from trainer.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), next_index=0)
for index in range(5):
    log.add("train", index, loss=0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=with_checkout())
    assert done.returncode == -signal.SIGKILL
    assert [line["index"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_line_is_one_write(tmp_path, monkeypatch):
    log, written = MetricsLog(tmp_path, next_index=0), []

    class Counting(io.FileIO):
        def write(self, data: Any) -> int:
            written.append(bytes(data))
            return super().write(data)

    def opened(path: Path, mode: str, buffering: int) -> io.BufferedWriter:
        return io.BufferedWriter(Counting(path, mode), buffering)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        for index in range(3):
            log.add("eval", index, scores=["x" * 1000] * 30)
    assert [line.count(b"\n") for line in written] == [1, 1, 1]
    assert len(read_metrics(tmp_path)) == 3


def test_the_numbers_of_an_update_are_in_the_file_when_the_next_one_begins(tmp_path):
    labels = make_labels(tmp_path / "set", write_tars(tmp_path / "data", (24,)))
    seen: list[list[int]] = []

    def look() -> None:
        seen.append([line["index"] for line in read_metrics(tmp_path / "run")])

    with before_update(1, look):
        train(
            TrainConfig(
                labels=str(labels.folder), output=str(tmp_path / "run"), batch_size=6, epochs=1, warmup_epochs=0,
                workers=0, log_interval=1, log_tensorboard=True, **TINY,
            )
        )  # fmt: skip
    assert seen == [[0]]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_a_crash_cut_is_left_out_and_a_continuation_goes_on_behind_the_whole_ones(tmp_path, cut):
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 4, loss=1.0)
    log.add("train", 9, loss=0.5)
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["index"] for line in read_metrics(tmp_path)] == [4]
    MetricsLog(tmp_path, next_index=10).add("train", 14, loss=0.25)
    assert [line["index"] for line in read_metrics(tmp_path)] == [4, 14]


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"none/metrics\.jsonl: No such file or directory"):
        read_metrics(tmp_path / "none")


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 20 + b"\n",  # what a power loss leaves of a page that was never written
        b'{"kind": "train", "ind\n',  # a cut line that another one follows
        b'{"kind": "tr\xff"}\n',  # no UTF-8
        b'{"kind": "train", "index": 5, "loss": NaN}\n',  # no JSON: a run never writes it, and `runs --json` would repeat it
    ],
    ids=["zeros", "cut", "encoding", "not a number"],
)
def test_a_damaged_line_before_the_last_is_named(tmp_path, damage):
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 4)
    with (tmp_path / METRICS_NAME).open("ab") as file:
        file.write(damage)
    log.add("train", 9)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_has_not_is_recorded_as_null(tmp_path, value):
    """A gradient norm may be infinite in a step that clipping saves; the run goes on."""
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 4, grad_norm=value, loss=1.5)
    assert read_metrics(tmp_path) == [{"kind": "train", "index": 4, "grad_norm": None, "loss": 1.5}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, next_index=0)
    (tmp_path / METRICS_NAME).unlink()
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left on device"):
        log.add("train", 0, loss=1.0)


# --- the recorder ---------------------------------------------------------------------------------------------


class Kept:
    """A tracker that keeps what it is given, and fails from its so-manieth call on."""

    name = "Kept"

    def __init__(self, fails_at: float = math.inf) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []
        self.calls, self.fails_at = 0, fails_at

    def _call(self) -> None:
        self.calls += 1
        if self.calls >= self.fails_at:
            raise ConnectionResetError("Connection lost")

    def add(self, index, scalars) -> None:
        self._call()
        self.points.append((index, dict(scalars)))

    def close(self, *, failed: bool) -> None:
        self._call()
        self.closed.append(failed)


def test_a_recorder_tells_the_record_and_every_tracker(tmp_path):
    one, other = Kept(), Kept()
    with Recorder(MetricsLog(tmp_path, next_index=0), [one, other]) as recorder:
        recorder.add("train", 4, epoch=0, loss=1.5)
    assert read_metrics(tmp_path) == [{"kind": "train", "index": 4, "epoch": 0, "loss": 1.5}]
    assert one.points == other.points == [(4, {"train/loss": 1.5})]
    assert one.closed == other.closed == [False]


def test_a_tracker_that_fails_is_said_once_and_left_out_and_the_others_go_on(tmp_path, caplog):
    broken, sound = Kept(fails_at=2), Kept()
    with Recorder(MetricsLog(tmp_path, next_index=0), [broken, sound]) as recorder:
        for index in range(4):
            recorder.add("train", index, loss=1.0)
    assert [line["index"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert [index for index, _ in sound.points] == [0, 1, 2, 3]
    assert (broken.calls, broken.closed) == (2, [])
    assert [record.getMessage() for record in caplog.records] == [
        "Kept failed and gets no more numbers; training continues, and metrics.jsonl has all numbers"
        " (ConnectionResetError: Connection lost)"
    ]


def test_a_tracker_that_cannot_end_does_not_spoil_a_run_that_is_over(tmp_path, caplog):
    with Recorder(MetricsLog(tmp_path, next_index=0), [Kept(fails_at=1)]):
        pass
    assert "Kept failed" in caplog.text


def test_a_run_that_stops_before_its_end_says_so_to_its_trackers(tmp_path):
    kept = Kept()
    with pytest.raises(KeyboardInterrupt), Recorder(None, [kept]):
        raise KeyboardInterrupt
    assert kept.closed == [True]


def test_a_recorder_without_arguments_keeps_nothing_and_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Recorder() as recorder:
        recorder.add("train", 0, loss=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_recorder_that_is_asked_for_no_more_writes_metrics_alone(tmp_path):
    with open_recorder(tmp_path / "run", next_index=0) as recorder:
        recorder.add("train", 0, loss=1.0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [METRICS_NAME]
