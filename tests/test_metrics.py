"""metrics.jsonl: what is written is read back, after a crash and a continuation too."""

import json
import logging
import math
import time

import pytest

from pipeline.errors import StorageError
from trainer.metrics import METRICS_NAME, SAY_EVERY_S, Console, MetricsLog, read_metrics


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
def test_a_number_that_json_has_not_is_recorded_as_null(tmp_path, value):
    """A gradient norm may be infinite in a step that clipping saves; the run goes on."""
    log = MetricsLog(tmp_path, next_index=0)
    log.add("train", 4, grad_norm=value, loss=1.5)
    assert read_metrics(tmp_path) == [{"kind": "train", "index": 4, "grad_norm": None, "loss": 1.5}]


# --- the console ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that shows what the test puts into its only place."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_images_and_waiting_over_the_time_since_the_last_look(clock):
    console = Console(100, 10)
    clock[0] += 3
    console.count(128, waited_s=0.5)
    clock[0] += 5
    console.count(64, waited_s=1.5)
    assert console.say(1, {}, 0.1) == {"images_per_s": 192 / 8, "data_wait": 2.0 / 8}
    clock[0] += 4
    console.count(100, waited_s=4.0)
    assert console.say(2, {}, 0.1) == {"images_per_s": 25.0, "data_wait": 1.0}  # nothing of the first look is left


def test_a_pause_that_was_not_training_does_not_count(clock):
    console = Console(100, 10)
    console.count(50, waited_s=1.0)
    clock[0] += 3600  # an evaluation
    console.restart()
    clock[0] += 2
    console.count(10, waited_s=0.5)
    assert console.say(1, {}, 0.1) == {"images_per_s": 5.0, "data_wait": 0.25}


def test_a_look_at_nothing_is_zero_and_a_look_at_no_time_is_a_number(clock):
    console = Console(100, 10)
    clock[0] += 2
    assert console.say(0, {}, 0.1) == {"images_per_s": 0.0, "data_wait": 0.0}
    console.count(7, waited_s=0.0)  # a clock need not have moved between two looks
    assert all(math.isfinite(value) for value in console.say(1, {}, 0.1).values())


LINES = [
    # seconds for each of two batches, batches of the run, what is left
    (1.5, 102, "00:02:30 left"),  # a hundred batches more
    (60.0, 62, "01:00:00 left"),
    (1.5, 2, "00:00:00 left"),  # none more
    (864.0, 252, "2.5 days left"),
    (86.4, 1001, "23:58:33 left"),  # just below a day
]


@pytest.mark.parametrize(("seconds", "total", "left"), LINES)
def test_a_line_says_place_numbers_rate_and_time_left(clock, caplog, seconds, total, left):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    console = Console(total, 1)
    for _ in range(2):
        clock[0] += seconds
        console.count(30, waited_s=seconds / 4)
    console.say(1, {"loss": 1.25, "class_loss": 2.0}, 5e-4)
    start = "epoch 1 1/1  loss 1.2500  class_loss 2.0000  lr 5.00e-04"
    assert caplog.messages == [f"{start}  {30 / seconds:.0f} images/s  waiting 25 %  {left}"]


def test_epoch_and_step_are_those_of_the_batch(clock, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    Console(40, 8).say(19, {}, 0.1)  # 8 + 8 + 4: the fourth step of the third epoch
    assert caplog.messages[0].startswith("epoch 2 4/8  ")


def test_lines_come_no_faster_than_they_can_be_read_and_the_last_one_always(clock, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    console = Console(6, 6)
    for index, pause in enumerate((0.1, 0.9 * SAY_EVERY_S, 0.2 * SAY_EVERY_S, 0.5 * SAY_EVERY_S, SAY_EVERY_S, 0.0)):
        clock[0] += pause
        console.say(index, {}, 0.1)
    # 1: too soon; 2: 1.1 times the pause after the first; 3: too soon; 4: long enough; 5: the last
    assert [message.split()[2] for message in caplog.messages] == ["1/6", "3/6", "5/6", "6/6"]
