"""metrics.jsonl: what is written is read back, after a crash and a continuation too."""

import json
import math
import time

import pytest

from pipeline.errors import StorageError
from trainer.metrics import METRICS_NAME, MetricsLog, Rate, read_metrics


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


@pytest.mark.xfail(strict=True, raises=ValueError, reason="read_metrics lets json's and UTF-8's own errors through")
@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 20 + b"\n",  # what a power loss leaves of a page that was never written
        b'{"kind": "train", "ind\n',  # a cut line that another one follows
        b'{"kind": "tr\xff"}\n',  # no UTF-8
    ],
    ids=["zeros", "cut", "encoding"],
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
def test_a_number_that_json_has_not_is_refused_and_leaves_the_file_whole(tmp_path, value):
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 4)
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        log.add("train", 9, grad_norm=value)
    assert [line["index"] for line in read_metrics(tmp_path)] == [4]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that shows what the test puts into its only place."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_images_and_waiting_over_the_time_since_the_last_look(clock):
    rate = Rate()
    clock[0] += 3
    rate.add(128, waited_s=0.5)
    clock[0] += 5
    rate.add(64, waited_s=1.5)
    assert rate.take() == (192 / 8, 2.0 / 8)
    clock[0] += 4
    rate.add(100, waited_s=4.0)
    assert rate.take() == (25.0, 1.0)  # nothing of the first look is left


def test_a_look_at_nothing_is_zero_and_a_look_at_no_time_is_a_number(clock):
    rate = Rate()
    clock[0] += 2
    assert rate.take() == (0.0, 0.0)
    rate.add(7, waited_s=0.0)
    images_per_s, waiting = rate.take()  # a clock need not have moved between two looks
    assert math.isfinite(images_per_s)
    assert waiting == 0.0
