"""How far a run is and how fast: what is measured, what a person reads, what is said at the end."""

import dataclasses
import json
import logging
import math
import re
import time
from pathlib import Path

import pytest

from pipeline.machine.progress import json_log
from trainer.metrics import MetricsLog
from trainer.pace import SAY_EVERY_S, Pace, Step, left, log_steps, place, rate, span, step_text, summary


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that shows what the test puts into its only place."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def step(**changes) -> Step:
    values = {"done": 12, "total": 30, "made": 12, "epoch": 1, "update": 2, "per_epoch": 10, "lr": 5e-4}
    return Step(**(values | {"numbers": {"loss": 1.25, "class_loss": 2.0}} | changes))


# --- what is measured -----------------------------------------------------------------------------------------


def test_the_rate_is_images_and_waiting_over_the_time_since_the_last_look(clock):
    pace = Pace(total=100, per_epoch=10)
    clock[0] += 3
    pace.count(0, 128, waited_s=0.5, lr=0.1)
    clock[0] += 5
    pace.count(1, 64, waited_s=1.5, lr=0.1)
    assert pace.look({}) == {"images_per_s": 192 / 8, "data_wait": 2.0 / 8}
    clock[0] += 4
    pace.count(2, 100, waited_s=4.0, lr=0.1)
    assert pace.look({}) == {"images_per_s": 25.0, "data_wait": 1.0}  # nothing of the first look is left


def test_a_pause_slows_no_rate_but_counts_in_the_time_that_is_left(clock):
    told: list[Step] = []
    pace = Pace(total=12, per_epoch=10, progress=told.append)
    for index in range(2):
        clock[0] += 2
        pace.count(index, 50, waited_s=1.0, lr=0.1)
    with pace.pause("evaluating"):
        assert told[-1].doing == "evaluating"
        clock[0] += 96
    assert told[-1].doing is None
    clock[0] += 2
    pace.count(2, 50, waited_s=1.0, lr=0.1)
    assert told[-1].left_s == 9 * 100 / 2  # two updates after the first took 2 + 96 + 2 s
    assert told[-1].mean_images_per_s == 25.0
    assert told[-1].elapsed_s == 102
    assert pace.look({}) == {"images_per_s": 25.0, "data_wait": 0.5}


def test_the_first_update_waits_for_loaders_and_says_nothing_of_the_time_left(clock):
    told: list[Step] = []
    pace = Pace(total=12, per_epoch=3, progress=told.append)
    clock[0] += 60
    pace.count(0, 10, waited_s=60.0, lr=0.1)
    clock[0] += 1
    pace.count(1, 10, waited_s=0.0, lr=0.1)
    assert [each.left_s for each in told] == [None, 10.0]


def test_a_continuation_measures_its_own_updates_only(clock):
    told: list[Step] = []
    pace = Pace(total=1000, per_epoch=100, progress=told.append)
    for index in range(950, 953):
        clock[0] += 2
        pace.count(index, 10, waited_s=0.0, lr=0.1)
    assert (told[-1].done, told[-1].made, told[-1].epoch, told[-1].update) == (953, 3, 9, 53)
    assert told[-1].left_s == 47 * 2
    assert told[-1].per_second == 0.5


def test_the_last_update_leaves_nothing(clock):
    told: list[Step] = []
    pace = Pace(total=1, per_epoch=1, progress=told.append)
    pace.count(0, 10, waited_s=0.0, lr=0.1)
    assert told[-1].left_s == 0.0


def test_a_clock_that_has_not_moved_gives_numbers(clock):
    pace = Pace(total=100, per_epoch=10)
    assert all(math.isfinite(value) for value in pace.look({}).values())
    pace.count(0, 7, waited_s=0.0, lr=0.1)
    assert all(math.isfinite(value) for value in pace.look({}).values())


def test_numbers_stay_until_the_next_look_and_are_news_once(clock):
    told: list[Step] = []
    pace = Pace(total=100, per_epoch=10, progress=told.append)
    for index in range(3):
        clock[0] += 1
        pace.count(index, 8, waited_s=0.0, lr=0.1)
        if index == 1:
            pace.look({"loss": 2.5})
    assert [(each.done, each.news, dict(each.numbers)) for each in told] == [
        (1, False, {}),
        (2, False, {}),
        (2, True, {"loss": 2.5}),
        (3, False, {"loss": 2.5}),
    ]
    assert told[-1].images_per_s == 8.0  # the look before is in it: a bar does not jump


def test_nothing_is_told_before_there_is_an_update(clock):
    told: list[Step] = []
    with Pace(total=100, per_epoch=10, progress=told.append).pause("evaluating"):
        pass
    assert told == []


# --- what a person reads --------------------------------------------------------------------------------------


def test_a_line_says_place_numbers_rate_and_time_left(caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    log_steps()(step(news=True, images_per_s=1234.4, data_wait=0.25, left_s=150.0))
    assert caplog.messages == [
        "epoch 1, update  2/10  loss 1.2500  class_loss 2.0000  lr 5.00e-04  1,234 images/s  waiting for data 25 %  0:02:30 left"
    ]


def test_a_line_comes_once_a_minute_with_losses_only_if_they_are_new_and_the_first_and_last_look_always(clock, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    say = log_steps()
    moments = [
        # seconds since the last, whether there is news, what is said
        (0.0, False, None),
        (1.0, True, "losses"),  # the first
        (0.9 * SAY_EVERY_S, True, None),
        (0.2 * SAY_EVERY_S, False, "place"),  # long enough, but an old loss
        (0.0, True, "losses"),
        (0.5 * SAY_EVERY_S, True, None),
        (0.6 * SAY_EVERY_S, False, "place"),
        (0.5 * SAY_EVERY_S, False, None),
        (0.0, True, "losses"),  # half a minute after a line, and more than one after the last losses
        (0.0, True, "losses"),  # the last of the run
    ]
    for number, (passed, news, _) in enumerate(moments, 1):
        clock[0] += passed
        say(step(done=number, total=len(moments), update=number, news=news))
    said = {
        int(re.search(r"update +(\d+)/", line)[1]): "losses" if "loss" in line else "place" for line in caplog.messages
    }
    assert said == {number: expected for number, (_, _, expected) in enumerate(moments, 1) if expected}


def test_a_run_whose_first_look_is_far_away_says_within_a_minute_that_it_goes_on(clock, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    say = log_steps()
    for update in range(1, 4):
        clock[0] += 0.6 * SAY_EVERY_S
        say(step(done=update, update=update))
    assert [line.partition("  lr")[0] for line in caplog.messages] == ["epoch 1, update  2/10"]


SPANS = [
    (0.0, "0:00:00"),
    (150.9, "0:02:30"),
    (86_313.0, "23:58:33"),
    (2.5 * 86400, "60:00:00"),  # less than three days
    (259_200.0, "3.0 days"),
]


@pytest.mark.parametrize(("seconds", "text"), SPANS)
def test_a_span_is_read_at_a_glance(seconds, text):
    assert span(seconds) == text


def test_the_place_keeps_its_width():
    assert place(step(update=7, per_epoch=1251)) == "epoch 1, update     7/1,251"
    assert place(step(update=1251, per_epoch=1251)) == "epoch 1, update 1,251/1,251"


def test_what_is_not_known_yet_is_left_out():
    assert left(step(left_s=None)) == ""
    assert step_text(step(numbers={})) == "lr 5.00e-04  0.00 images/s  waiting for data 0 %"
    assert step_text(step(doing="saving")).endswith("  saving")
    assert rate(9.5) == "9.50 images/s"


def test_a_bar_fits_eighty_columns_in_a_long_run():
    """ImageNet, 300 epochs: what stands beside the bar, and the line below it."""
    late = step(epoch=299, update=1250, per_epoch=1251, images_per_s=12345.6, data_wait=1.0, doing="evaluating")
    assert len(place(late)) + len("100 %") + len(left(step(left_s=2.9 * 86400))) <= 70
    assert len(step_text(late)) <= 80


def test_a_step_fits_the_json_log(tmp_path):
    with json_log(tmp_path / "log") as write:
        write(step(left_s=3.0))
    line = json.loads((tmp_path / "log").read_text().splitlines()[0])
    assert line["event"] == "progress"
    assert (line["phase"], line["done"], line["total"], line["left_s"], line["numbers"]["loss"]) == (
        "train",
        12,
        30,
        3.0,
        1.25,
    )
    assert {field.name for field in dataclasses.fields(Step)} < set(line)


# --- the end --------------------------------------------------------------------------------------------------


def recorded(folder: Path, *, scored: bool = True) -> Path:
    log = MetricsLog(folder, next_index=0)
    for index, loss in enumerate((9.0, 8.0, 3.0, 2.0)):
        log.add("train", index, epoch=index // 2, lr=0.1, loss=loss, distill_loss=loss / 2, grad_norm=7.0)
        if scored and index % 2:
            for weights, top1 in (("student", 50.0), ("ema", 60.0 if index == 1 else 55.0)):
                log.add("eval", index, epoch=index // 2, weights=weights, top1=top1, scores={})
    return folder


def test_the_summary_says_what_a_run_came_to(tmp_path):
    run = recorded(tmp_path / "run")
    last = step(done=4, total=4, made=4, per_epoch=2, elapsed_s=3725.0, mean_images_per_s=1234.0)
    assert summary(run, last).splitlines() == [
        f"{run}: trained 2 epochs, 4 updates, in 1:02:05, 1,234 images/s",
        "last epoch: loss 2.5000  distill_loss 1.2500; best top-1 60.00 % after epoch 0 (ema)",
        f"weights in {run}/last, the best in {run}/best",
    ]


def test_the_summary_of_a_continuation_says_what_its_time_is_of(tmp_path):
    run = recorded(tmp_path / "run", scored=False)
    last = step(done=4, total=4, made=1, per_epoch=2, elapsed_s=5.0, mean_images_per_s=8.0)
    assert summary(run, last).splitlines() == [
        f"{run}: trained 2 epochs, 4 updates, 1 of them in this start, in 0:00:05, 8.00 images/s",
        "last epoch: loss 2.5000  distill_loss 1.2500",
        f"weights in {run}/last",
    ]


def test_the_summary_of_a_run_that_was_over_says_so(tmp_path):
    run = recorded(tmp_path / "run", scored=False)
    assert summary(run, None).splitlines()[0] == f"{run}: was already trained; nothing was left to do"
