"""What a run says of itself: rates, time left, how busy the teachers are."""

import dataclasses
import io
import json
import logging
from pathlib import Path

import pytest

import cli
from pipeline.errors import StorageError, UsageError
from pipeline.machine import progress
from pipeline.machine.progress import Tally, Tick, WorkDone, json_log, throttled, tick_text
from trainer.console import ToStderr


class Clock:
    """Stands where `time.monotonic` stood; moves when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def tally(total: int, processes: int, clock: Clock) -> tuple[Tally, list[Tick]]:
    ticks: list[Tick] = []
    return Tally(total, processes, ticks.append, _began=clock()), ticks


def test_rate_and_time_left_count_only_what_this_run_made(clock):
    told, ticks = tally(1000, 1, clock)
    told.add(WorkDone(found=600))  # another run made these: they cost no time, and say nothing of the rate
    clock.now += 10
    told.add(WorkDone(views=100))
    tick = ticks[-1]
    assert (tick.done, tick.made, tick.total) == (700, 100, 1000)
    assert tick.per_second == 10  # 100 views in 10 s
    assert tick.left_s == 30  # 300 views are left


def test_time_counts_from_when_the_first_process_has_its_first_views(clock):
    told, ticks = tally(1000, 2, clock)
    clock.now += 30  # libraries are imported, the teacher is loaded
    told.add(WorkDone())
    clock.now += 5
    told.add(WorkDone(views=100, busy_s=4))
    told.add(WorkDone())  # the second process is later, and changes nothing
    clock.now += 5
    told.add(WorkDone(views=100, busy_s=4))
    assert ticks[-1].elapsed_s == 10
    assert ticks[-1].per_second == 20
    assert ticks[-1].teacher_busy == pytest.approx(0.4)  # of two processes


@pytest.mark.parametrize(
    ("processes", "busy_s", "share"),
    [
        (1, [6.0], 0.6),  # 6 of 10 s
        (2, [6.0, 10.0], 0.8),  # 16 of 2 x 10 s
        (4, [10.0, 10.0, 10.0, 10.0], 1.0),  # never waited
        (4, [10.0], 0.25),  # three of four did nothing
    ],
)
def test_busy_is_the_mean_over_all_processes(clock, processes, busy_s, share):
    told, ticks = tally(100, processes, clock)
    clock.now += 10
    for seconds in busy_s:
        told.add(WorkDone(views=1, busy_s=seconds))
    assert ticks[-1].teacher_busy == pytest.approx(share)


def test_every_report_is_added_up_and_told(clock):
    told, ticks = tally(50, 3, clock)
    for work in (WorkDone(views=20), WorkDone(found=20), WorkDone(views=10, bytes=300), WorkDone(bytes=200)):
        clock.now += 1
        told.add(work)
    assert [tick.done for tick in ticks] == [20, 40, 50, 50]
    assert [tick.bytes_written for tick in ticks] == [0, 0, 300, 500]
    assert {tick.phase for tick in ticks} == {"label"}


def test_a_view_that_is_made_twice_counts_once_in_what_is_done(clock):
    """A lost worker's views are made again by another."""
    told, ticks = tally(10, 2, clock)
    clock.now += 1
    for _ in range(3):
        told.add(WorkDone(views=5))
    assert (ticks[-1].done, ticks[-1].made, ticks[-1].left_s) == (10, 15, 0)


def test_before_there_is_a_rate_the_time_left_is_unknown_and_at_the_end_it_is_nothing(clock):
    assert Tick("label", 0, 10).left_s is None
    assert Tick("label", 5, 10, elapsed_s=3.0).left_s is None  # all of them found
    assert Tick("label", 5, 10, elapsed_s=0.0, made=5).left_s is None  # a clock that has not moved
    assert Tick("label", 10, 10, elapsed_s=3.0).left_s == 0
    told, ticks = tally(10, 1, clock)
    told.add(WorkDone(found=4))
    assert (ticks[0].teacher_busy, ticks[0].per_second) == (None, 0)


VIEWS = {"unit": "views"}
STATES = [
    # what is known, what a person reads
    (Tick("index", 1, 4, 50.0, 1, unit="source shards"), "0.02 source shards/s, 0:02:30 left"),
    (
        Tick("label", 7200, 14400, 60.0, 7200, 0.876, 2_500_000, **VIEWS),
        "120 views/s, 0:01:00 left, teacher busy 88 %, 2.5 MB written",
    ),
    (Tick("label", 10, 100_000_000, 10.0, 10, 0.5, **VIEWS), "1.00 views/s, 27777:46:30 left, teacher busy 50 %"),
    (Tick("label", 375, 375, 2.4, 0, 0.0, **VIEWS), "375 of them there before"),  # nothing left: no rate, nobody busy
    (
        Tick("label", 300, 400, 10.0, 100, 0.5, **VIEWS),
        "200 of them there before, 10 views/s, 0:00:10 left, teacher busy 50 %",
    ),
    (Tick("label", 400, 400, 4.0, 400, 1.0, 999, **VIEWS), "100 views/s, teacher busy 100 %, 999 B written"),
]


@pytest.mark.parametrize(("tick", "text"), STATES, ids=range(len(STATES)))
def test_what_a_person_reads(tick, text):
    assert tick_text(tick) == text


def test_ticks_pass_now_and_then_and_the_last_of_each_phase_always(clock):
    said: list[tuple[str, int]] = []
    with throttled(lambda tick: said.append((tick.phase, tick.done)), every_s=60) as update:
        for done in (1, 2):
            update(Tick("index", done, 2))
        for done in range(1, 101):
            clock.now += 1
            update(Tick("label", done, 1000))
    assert said == [("index", 2), ("label", 61), ("label", 100)]


def test_how_far_a_run_came_is_said_when_it_fails(clock):
    said: list[int] = []

    def fail() -> None:
        with throttled(lambda tick: said.append(tick.done), every_s=60) as update:
            for done in (1, 2, 3):
                update(Tick("label", done, 10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert said == [3]


def test_where_there_is_no_terminal_there_is_no_bar_and_stdout_is_left_alone(monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli")
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with cli.shown_progress() as update:
        for done in range(1, 11):
            update(Tick("label", done, 10, 1.0, done, unit="views"))
    assert [record.getMessage() for record in caplog.records] == ["label 10 of 10  10 views/s"]
    assert capsys.readouterr().out == ""


TICK_FIELDS = ["time", "event", "phase", "done", "total", "elapsed_s", "made", "teacher_busy", "bytes_written"]
TICK_FIELDS += ["per_second", "left_s"]


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_json_log_holds_messages_progress_and_the_end_in_lines_with_fixed_names(tmp_path, clock):
    path = tmp_path / "log.jsonl"
    cli.log.setLevel(logging.INFO)
    with json_log(path) as update:
        logging.getLogger("deit_cli.teacher").warning("out of %s", "memory")
        update(Tick("index", 1, 1, 2.0, 1))
        update(Tick("label", 5, 10, 2.0, 5, 0.5, 100))
    message, index, label, ended = written(path)
    assert list(message) == ["time", "event", "level", "from", "text"]
    assert (message["level"], message["from"], message["text"]) == ("WARNING", "deit_cli.teacher", "out of memory")
    assert list(index) == list(label) == TICK_FIELDS
    assert (label["phase"], label["per_second"], label["left_s"], label["teacher_busy"]) == ("label", 2.5, 2.0, 0.5)
    assert list(ended) == ["time", "event"]
    assert [line["event"] for line in (message, index, label, ended)] == ["message", "progress", "progress", "ended"]
    assert {field.name for field in dataclasses.fields(Tick)} - {"unit"} < set(TICK_FIELDS)


def test_a_json_log_is_appended_to_and_says_what_stopped_a_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "of a run before"}\n')

    def stop() -> None:
        with json_log(path) as update:
            update(Tick("label", 3, 10, 1.0, 3))
            raise ValueError("broken\nimage")

    with pytest.raises(ValueError):
        stop()
    before, progress, stopped = written(path)
    assert (before["event"], progress["done"]) == ("of a run before", 3)
    assert (stopped["event"], stopped["error"], stopped["text"]) == ("stopped", "ValueError", "broken\nimage")


def test_a_json_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--log-json .*: Is a directory"), json_log(tmp_path):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_json_log_on_a_full_disk_is_one_error(monkeypatch):
    with pytest.raises(StorageError, match="--log-json /dev/full: No space left on device") as caught:  # noqa: SIM117
        with json_log(Path("/dev/full")):
            logging.getLogger("deit_cli.test").warning("a message")
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, OSError)


def test_a_message_goes_to_what_stderr_is_at_the_time(monkeypatch):
    """A bar on a terminal replaces stderr; a message that went past it would be drawn into the bar."""
    handler = ToStderr()
    bar = io.StringIO()
    monkeypatch.setattr("sys.stderr", bar)
    handler.handle(logging.LogRecord("deit_cli", logging.INFO, "", 0, "%d views", (3,), None))
    assert bar.getvalue() == "3 views\n"
