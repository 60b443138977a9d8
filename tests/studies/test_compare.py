"""`compare`: its statistics and tables, how it runs steps, and whole studies with the real commands."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student_t
from support.background import wait_until
from support.builders import encoded, photo, shared_data, with_checkout, write_tars
from support.commands import invoke
from support.studies import SCALE, STUDY, without_times, write_images, write_study
from webdataset.writer import TarWriter

from pipeline.errors import DeitCliError, StorageError, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.settings.program import Terminated
from pipeline.storage.json import pretty_json
from trainer.config import CompareConfig
from trainer.studies.forecast import forecast_table, foresee
from trainer.studies.images import Images, check_remembered, images_at, images_of, remember
from trainer.studies.results import against, check_all_done, spread, study_table, summarise
from trainer.studies.running import KEEPER, Job, Session, only_study_in, share_of_gpus
from trainer.studies.steps import Plan, plan_study
from trainer.studies.study import read_study

# --- statistics -------------------------------------------------------------------------------------------------------


def p_by_hand(differences: list[float]) -> float:
    """The two-sided p of a paired t-test, from its definition, in plain loops."""
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((each - mean) ** 2 for each in differences) / (n - 1)
    return 2 * float(student_t.sf(abs(mean) / (variance / n) ** 0.5, n - 1))


@pytest.mark.parametrize("number", [2, 3, 5, 20])
def test_the_p_is_that_of_the_definition(number):
    draw = random.Random(number)
    mine = {seed: 70 + draw.gauss(1, 1) for seed in range(number)}
    baseline = {seed: 70 + draw.gauss(0, 1) for seed in range(number)}
    differences = [mine[seed] - baseline[seed] for seed in range(number)]
    found = against(mine, baseline)
    assert found["difference"] == pytest.approx(sum(differences) / number)
    assert found["p"] == pytest.approx(p_by_hand(differences), rel=1e-9)
    assert (found["pairs"], found["why"]) == (number, None)


def test_only_seeds_that_both_have_are_paired():
    found = against({0: 50.0, 1: 52.0, 2: 99.0}, {1: 51.0, 0: 50.5, 3: 1.0})
    assert (found["pairs"], found["difference"]) == (2, pytest.approx(0.25))
    assert found["p"] == pytest.approx(p_by_hand([-0.5, 1.0]))


@pytest.mark.parametrize(
    ("mine", "baseline", "why"),
    [
        ({0: 1.0}, {0: 2.0}, "a t-test needs 2 pairs, there is 1"),
        ({0: 1.0}, {1: 2.0}, "a t-test needs 2 pairs, there are 0"),
        ({}, {}, "a t-test needs 2 pairs, there are 0"),
        ({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}, "all differences are equal"),
        ({0: 36.66667, 1: 50.0}, {0: 33.33333, 1: 46.66666}, "all differences are equal"),  # but for rounding
    ],
)
def test_no_p_comes_with_its_reason(mine, baseline, why):
    found = against(mine, baseline)
    assert (found["p"], found["why"]) == (None, why)


def test_the_spread_is_that_of_plain_loops():
    values = [71.5, 70.25, 73.0]
    mean = sum(values) / 3
    std = (sum((each - mean) ** 2 for each in values) / 2) ** 0.5
    assert spread(values) == {"mean": pytest.approx(mean), "low": 70.25, "high": 73.0, "std": pytest.approx(std)}
    assert spread([70.0]) == {"mean": 70.0, "low": 70.0, "high": 70.0, "std": None}
    assert set(spread([]).values()) == {None}


# --- scheduling, with a cheap fake for the commands -------------------------------------------------------------------


class FakeEngine:
    """Makes the results of a step in no time, after so many looks at it; notes what was started and stopped."""

    def __init__(self, *, looks: int = 1, fails: Callable[[Job], bool] = lambda _: False) -> None:
        self.looks, self.fails = looks, fails
        self.started: list[Job] = []
        self.most = 0
        self.stopped: list[int] = []
        self._left: dict[int, int] = {}

    def start(self, job: Job) -> int:
        self.started.append(job)
        number = len(self.started) - 1
        self._left[number] = self.looks
        self.most = max(self.most, len(self._left))
        return number

    def poll(self, number: int) -> int | None:
        self._left[number] -= 1
        if self._left[number] > 0 and not self.stopped:
            return None
        del self._left[number]
        job = self.started[number]
        (job.folder / "log.txt").write_text("line one\nerror: the reason\n")
        if self.stopped:
            return 130
        if self.fails(job):
            return 1
        made(job)
        return 0

    def stop(self, running: int, number: int) -> None:
        self.stopped.append(number)


def made(job: Job) -> None:
    """Write what a command would write; the content depends on its settings."""
    folder, settings = job.folder, (job.folder / "settings.yaml").read_bytes()
    files = {
        "train": {"run/last/model.safetensors": settings},
        "precompute": {
            "set/plan.json": pretty_json({"labelset_id": "f" * 64}),
            "set/manifest.json": b"{}",
        },
        "evaluate": {"output.txt": pretty_json({"scores": {"class_head": {"top1": 50.0 + len(settings) % 7}}})},
    }[job.arguments[0]]
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def plan_in(folder: Path, study: dict[str, Any] = STUDY) -> Plan:
    read = read_study(write_study(folder, study))
    return plan_study(read, Images("/data/train", "a" * 64, 64), Images("/data/val", "b" * 64, 30))


def session(folder: Path, engine: Any, study: dict[str, Any] = STUDY, **known: Any) -> Session:
    return Session(plan_in(folder, study), folder / "out", engine, device="cpu", **known)


def test_every_step_runs_once_after_its_inputs_and_never_again(tmp_path):
    engine, seen = FakeEngine(), []
    first = session(tmp_path, engine, changed=lambda now: seen.append(len(now.records)))
    first.run()
    assert seen == list(range(1, 12))
    assert [job.arguments[0] for job in engine.started[:3]] == ["train", "evaluate", "precompute"]
    assert engine.most == 1
    result = summarise(first, "x")
    assert result["steps"] == {"all": 11, "done": 11, "failed": 0}
    again = FakeEngine()
    second = session(tmp_path, again)
    second.run()
    assert again.started == []
    assert summarise(second, "x") == result


def test_a_changed_setting_makes_a_new_step_beside_the_old_one(tmp_path):
    session(tmp_path, FakeEngine()).run()
    old = sorted(path.name for path in (tmp_path / "out/students").iterdir())
    engine = FakeEngine()
    changed = {**STUDY, "cells": {**STUDY["cells"], "hard": {**STUDY["cells"]["hard"], "lr": 2e-3}}}
    session(tmp_path, engine, changed).run()
    assert [job.arguments[0] for job in engine.started] == ["train", "evaluate"] * 2
    new = sorted(path.name for path in (tmp_path / "out/students").iterdir())
    assert set(old) < set(new)
    assert len(new) == len(old) + 2


def test_another_name_of_a_cell_finds_the_same_folder(tmp_path):
    session(tmp_path, FakeEngine()).run()
    engine = FakeEngine()
    renamed = {**STUDY, "cells": {"alone": STUDY["cells"]["alone"], "firm": STUDY["cells"]["hard"]}}
    session(tmp_path, engine, renamed).run()
    assert engine.started == []


def test_more_views_extend_the_label_set_and_keep_the_students_of_the_others(tmp_path):
    session(tmp_path, FakeEngine()).run()
    more = {**STUDY, "cells": {**STUDY["cells"], "more": {**STUDY["cells"]["hard"], "views": 5}}}
    engine = FakeEngine()
    both = session(tmp_path, engine, more)
    both.run()
    assert [job.arguments[0] for job in engine.started] == ["precompute", "train", "evaluate", "train", "evaluate"]
    assert "views: 0:5" in (engine.started[0].folder / "settings.yaml").read_text()
    assert summarise(both, "x")["teachers"][0]["labels"]["views"] == 5


def test_an_input_with_another_content_makes_what_needs_it_anew(tmp_path):
    session(tmp_path, FakeEngine()).run()
    (done,) = (tmp_path / "out/teachers").glob("*/done.json")
    record = json.loads(done.read_text())
    done.write_bytes(pretty_json(record | {"content": "another"}))
    engine = FakeEngine()
    session(tmp_path, engine).run()
    assert [job.arguments[0] for job in engine.started] == ["evaluate", "precompute"]  # the same labels came out


@pytest.mark.parametrize(("dtype", "again"), [("float32", True), ("auto", False)])
def test_labels_of_another_number_format_make_the_students_anew(tmp_path, dtype, again):
    """The answers differ, and the id of the label set does not: it does not cover the format."""
    session(tmp_path, FakeEngine()).run()
    scale = {**SCALE, "labels": {**SCALE["labels"], "dtype": dtype}}
    engine, read = FakeEngine(), read_study(write_study(tmp_path, scale=scale))
    plan = plan_study(read, Images("/data/train", "a" * 64, 64), Images("/data/val", "b" * 64, 30))
    Session(plan, tmp_path / "out", engine, device="cpu").run()
    started = [job.folder.parent.name for job in engine.started if job.arguments[0] == "train"]
    assert started == (["students"] * 2 if again else [])


def test_jobs_run_side_by_side_and_share_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.studies.running.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    engine = FakeEngine(looks=3)
    session(tmp_path, engine, jobs=4).run()
    assert engine.most == 4
    assert {job.environment["OMP_NUM_THREADS"] for job in engine.started} == {"2"}
    whole = FakeEngine()
    session(tmp_path / "alone", whole).run()
    assert all(not job.environment for job in whole.started)


@pytest.mark.parametrize(
    ("gpus", "jobs", "shares"),
    [
        ([], 2, [None, None]),
        (["0", "1", "2", "3"], 2, ["0,2", "1,3"]),
        (["4", "5"], 2, ["4", "5"]),
        (["0"], 3, ["0", "0", "0"]),
        (["0", "1"], 3, ["0", "1", "0"]),
    ],
)
def test_gpus_are_dealt_out(gpus, jobs, shares):
    assert [share_of_gpus(gpus, place, jobs) for place in range(jobs)] == shares


def test_the_launcher_stands_in_front_of_train_and_precompute(tmp_path):
    engine = FakeEngine()
    session(tmp_path, engine, launcher="torchrun --no-python").run()
    launched = {job.arguments[0]: job.launcher for job in engine.started}
    assert launched == {"train": ("torchrun", "--no-python"), "precompute": ("torchrun", "--no-python"), "evaluate": ()}


def test_a_failing_step_is_shown_and_the_other_cells_go_on(tmp_path, caplog):
    engine = FakeEngine(fails=lambda job: job.arguments[0] == "precompute")
    broken = session(tmp_path, engine)
    broken.run()
    result = summarise(broken, "x")
    assert [len(cell["seeds"]) for cell in result["cells"]] == [2, 0]
    assert result["steps"] == {"all": 11, "done": 6, "failed": 5}
    assert "it ended with exit code 1" in result["failed"][0]["reason"]
    assert result["failed"][1]["reason"] == "it needs labels cnn, which failed"
    assert "error: the reason" in caplog.text
    table = study_table(result)
    assert "failed" in next(line for line in table.splitlines() if line.startswith("hard "))
    assert "labels cnn failed: it ended with exit code 1; its messages are in" in table
    with pytest.raises(DeitCliError, match=r"5 of 11 steps failed or could not be run\. Their logs say why") as caught:
        check_all_done(result)
    assert caught.value.exit_code == 1
    again = FakeEngine()
    repaired = session(tmp_path, again)
    repaired.run()
    assert len(again.started) == 5
    assert summarise(repaired, "x")["failed"] == []


def test_a_step_that_leaves_no_result_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("test_compare.made", lambda job: None)
    broken = session(tmp_path, FakeEngine())
    broken.run()
    assert broken.records == {}
    assert "model.safetensors" in next(iter(broken.failed.values()))


@pytest.mark.parametrize(("error", "number"), [(KeyboardInterrupt, signal.SIGINT), (Terminated, signal.SIGTERM)])
def test_a_signal_reaches_the_running_steps(tmp_path, monkeypatch, error, number):
    engine = FakeEngine(looks=1000)
    running = session(tmp_path, engine, jobs=2)

    def interrupted(_: float) -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr("trainer.studies.running.time.sleep", interrupted)
    with pytest.raises(error):
        running.run()
    assert engine.stopped == [number] * len(engine.started)
    assert running.failed == {}


def test_the_time_of_a_killed_attempt_counts_until_its_last_message(tmp_path):
    plan = plan_in(tmp_path)
    placed = Session(plan, tmp_path / "out", None).placed(plan.steps[0])
    assert placed is not None
    placed.folder.mkdir(parents=True)
    (placed.folder / "attempts.json").write_text("[[100.0, null]]")
    (placed.folder / "log.txt").write_text("x\n")
    os.utime(placed.folder / "log.txt", (107.5, 107.5))
    now = Session(plan, tmp_path / "out", FakeEngine())
    now.run()
    assert 7.5 <= now.records[plan.steps[0].key].seconds < 60


def test_a_record_of_another_step_is_refused(tmp_path):
    session(tmp_path, FakeEngine()).run()
    (done,) = (tmp_path / "out/teachers").glob("*/done.json")
    done.write_text("{}")
    with pytest.raises(StorageError, match=r"done.json is not the record of this step\. Delete .*teachers"):
        session(tmp_path, FakeEngine())


def test_two_compares_in_one_folder_are_refused(tmp_path):
    with (
        only_study_in(tmp_path / "out"),
        pytest.raises(UsageError, match=r"another compare runs in .*out\. Wait until it ends, or choose another --out"),
        only_study_in(tmp_path / "out"),
    ):
        pass


def test_the_table_has_the_numbers_of_study_json(tmp_path):
    done = session(tmp_path, FakeEngine())
    done.run()
    result = summarise(done, "x")
    result["cells"][0]["seeds"] = [{"seed": 0, "top1": 50.0}]
    result["cells"][1] |= {"top1": {"answer": "mean_logits", "mean": 54.321, "low": 53.0, "high": 55.5, "std": 1.0}}
    result["cells"][1] |= {"against_baseline": {"difference": 4.321, "p": 0.0123, "pairs": 2, "why": None}}
    lines = study_table(result).splitlines()
    assert lines[0] == STUDY["title"]
    (row,) = [line for line in lines if line.startswith("hard ") and "mean_logits" in line]
    assert row.split() == ["hard", "54.32", "53.00..55.50", "2", "+4.32", "0.012", "mean_logits"]
    assert "few seeds prove little" in lines[-1]


def test_other_bytes_under_the_same_names_are_refused(tmp_path):
    """Their id is the same, so finished steps would be believed that were made from other images."""
    before, other = images_at(folder_of(tmp_path / "a", 0)), images_at(folder_of(tmp_path / "b", 1))
    assert before.id == other.id
    out = tmp_path / "out"
    out.mkdir()
    remember([before], out)
    remember([replace(before, location="/a/copy")], out)
    remember([Images("s3://bucket", "c" * 64, 0)], out)  # nothing was read of it
    assert json.loads((out / "images.json").read_bytes()) == {before.id: before.sha256}
    refusal = (
        r"has the names and class labels of images that the steps in .*out used, but other bytes\. Pass another --out"
    )
    with pytest.raises(UsageError, match=refusal):
        remember([other], out)
    with pytest.raises(UsageError, match=refusal):
        check_remembered([other], out)


def folder_of(folder: Path, first: int) -> str:
    """Write images of the same names, whose pixels depend on `first`."""
    for number in range(20):
        path = folder / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(first + number)))
    return str(folder)


@pytest.mark.parametrize("number", [0, 1, 3, 40])
def test_the_bytes_that_are_remembered_come_from_the_whole_source(tmp_path, number):
    sizes = (number, 1, number // 2)
    opened = open_source(write_tars(tmp_path / "data", tuple(size for size in sizes if size)))
    samples = [shard[row].image for shard in opened.shards for row in range(len(shard))]
    chosen = sorted({at * len(samples) // 16 for at in range(16)})
    expected = hashlib.sha256(b"".join(hashlib.sha256(samples[at]).digest() for at in chosen)).hexdigest()
    assert images_at(str(tmp_path / "data")).sha256 == expected


def test_the_time_of_steps_on_an_unknown_number_of_images_is_unknown(tmp_path, monkeypatch):
    """It was forecast as no time at all."""
    remote = (Images("s3://bucket/train", "a" * 64, 0), Images("s3://bucket/val", "b" * 64, 0))
    monkeypatch.setattr("trainer.studies.forecast.images_of", lambda *_: remote)
    monkeypatch.setattr(
        "trainer.studies.forecast.measured",
        lambda arguments: {"hours": 1.0, "label_bytes": 5, "together": {"images_per_s": 9.0}},
    )
    session(tmp_path, FakeEngine()).run()  # steps that are alike
    scale = {
        **SCALE,
        "data": "s3://bucket/train",
        "eval_data": "s3://bucket/val",
        "train": {**SCALE["train"], "lr": 1.0},
    }
    write_study(tmp_path, scale=scale)
    result = foresee(tmp_path / "study.yaml", CompareConfig(out=tmp_path / "out", device="cpu"))
    left = {(step["step"], step["seconds"], step["from"]) for step in result["steps"] if not step["done"]}
    assert left == {("student", None, "unknown"), ("evaluation", None, "unknown")}
    assert result["unknown"] == 8


def test_the_first_images_of_parquet_files_are_a_source_with_their_classes(tmp_path):
    files = shared_data("cifar10")
    scale = {**SCALE, "data": str(next(files.glob("test-*.parquet"))), "images": 100}
    read = read_study(write_study(tmp_path, scale=scale), eval_data=str(next(files.glob("train-*.parquet"))))
    first, everything = images_of(read.scale, tmp_path / "data")
    assert (first.count, everything.count) == (100, 50_000)
    mine, whole = open_source(first.location), open_source(scale["data"])
    assert mine.class_names == whole.class_names
    assert [label for shard in mine.shards for label in shard.class_labels] == list(whole.shards[0].class_labels[:100])
    assert mine.shards[0][99].image == whole.shards[0][99].image


def test_the_first_images_are_those_of_the_files_that_are_asked_for(tmp_path):
    """The same number of images of other files is another file, of the same name, which is a part of the source's id."""
    files = shared_data("cifar10")
    found = []
    for name, other in (("test", "train"), ("train", "test")):
        scale = {**SCALE, "data": str(next(files.glob(f"{name}-*.parquet"))), "images": 100}
        read = read_study(write_study(tmp_path, scale=scale), eval_data=str(next(files.glob(f"{other}-*.parquet"))))
        found.append(images_of(read.scale, tmp_path / "data")[0])
    assert found[0].id != found[1].id
    assert {Path(each.location).name for each in found} == {"first-100.parquet"}


def test_the_first_images_of_other_sources_are_refused(tmp_path):
    write_images(tmp_path)
    scale = {**SCALE, "data": str(tmp_path / "train"), "images": 10}
    read = read_study(write_study(tmp_path, scale=scale))
    with pytest.raises(
        UsageError, match=r"images: 10 needs --data in local Parquet files, got .*train\. Leave out `images`"
    ):
        images_of(read.scale, tmp_path / "data")


# --- the keeper -------------------------------------------------------------------------------------------------------


def processes_with(text: str) -> list[str]:
    """Return the command lines of processes that name something, this one aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if text in command and int(path.parent.name) != os.getpid():
            found.append(command)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@needs_proc
@pytest.mark.parametrize("session_of_its_own", [False, True])
def test_the_end_of_the_parent_ends_every_process_below(tmp_path, session_of_its_own):
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'], start_new_session={session_of_its_own}); time.sleep(600)"
    keeper = subprocess.Popen(
        [sys.executable, str(KEEPER), str(tmp_path / "lock"), sys.executable, "-c", child, mark],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(lambda: len(processes_with(mark)) == 3, "keeper, child and grandchild")
    assert keeper.stdin is not None
    keeper.stdin.close()  # as the kernel does when the parent is killed
    keeper.wait(60)
    wait_until(lambda: not processes_with(mark), "all of them have ended")


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -KILL $$", 137), ("exit 0", 0)])
def test_the_keeper_ends_with_the_code_of_its_command(tmp_path, script, code):
    command = [sys.executable, str(KEEPER), str(tmp_path / "lock"), "sh", "-c", script]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert keeper.wait(60) == code
    assert keeper.stdin is not None
    keeper.stdin.close()


@needs_proc
def test_a_restart_waits_for_the_remains_of_a_killed_command(tmp_path):
    """The lock is held by the command itself, so it is free only when that has ended."""
    lock, mark = tmp_path / "lock", f"remains-{os.getpid()}"
    slow = [sys.executable, str(KEEPER), str(lock), sys.executable, "-c", "import time; time.sleep(600)", mark]
    keeper = subprocess.Popen(slow, stdin=subprocess.PIPE, start_new_session=True)
    wait_until(lambda: len(processes_with(mark)) == 2, "the command runs")
    keeper.kill()  # the keeper itself: nobody kills the command then
    keeper.wait()
    again = subprocess.Popen(
        [sys.executable, str(KEEPER), str(lock), "touch", str(tmp_path / "ran")],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    time.sleep(0.5)
    assert not (tmp_path / "ran").exists()
    os.killpg(keeper.pid, signal.SIGKILL)
    assert again.wait(60) == 0
    assert (tmp_path / "ran").exists()
    for process in (keeper, again):
        assert process.stdin is not None
        process.stdin.close()


# --- whole studies with the real commands -----------------------------------------------------------------------------


def compare(folder: Path, *more: str, out: str = "out") -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "cli", "compare", "study.yaml", "--device", "cpu", "--out", out, *more]
    return subprocess.Popen(
        command, cwd=folder, env=with_checkout(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, said = process.communicate(timeout=900)
    assert "Traceback" not in said
    return process.returncode, output, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A study that ran without interruption."""
    folder = tmp_path_factory.mktemp("study")
    write_images(folder)
    write_study(folder)
    code, output, said = ended(compare(folder))
    assert code == 0, said
    assert output.startswith("Does it help?")
    return folder


def result_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "study.json").read_text())


@pytest.mark.slow
def test_a_study_comes_to_a_table_and_a_file(whole):
    result = result_in(whole / "out")
    assert (result["kind"], result["version"], result["baseline"]) == ("study", 1, "alone")
    assert result["steps"] == {"all": 11, "done": 11, "failed": 0}
    for cell in result["cells"]:
        assert [each["seed"] for each in cell["seeds"]] == [0, 1]
        for each in cell["seeds"]:
            scores = json.loads((whole / "out" / each["scores_file"]).read_text())
            assert scores["images"] == 30
            assert round(scores["scores"][cell["top1"]["answer"]]["top1"], 4) == each["top1"]
            assert (whole / "out" / each["run"] / "last/model.safetensors").is_file()
        assert cell["costs"]["student_s"] > 0
    (teacher,) = result["teachers"]
    assert teacher["labels"]["views"] == 2
    assert (whole / "out" / teacher["labels"]["path"] / "manifest.json").is_file()


@pytest.mark.slow
def test_a_study_ends_with_a_page_of_its_first_students(whole):
    page = (whole / "out/study.html").read_text()
    for heading in (
        "Results",
        "Training",
        "Answers",
        "Tokens",
        "Disagreement",
        "Calibration",
        "Costs",
        "Label set",
        "Gallery",
    ):
        assert f">{heading}</h2>" in page
    report = json.loads((whole / "out/study.json").with_name("study-analysis").joinpath("analysis.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["alone", "hard", "teacher cnn"]
    assert "hard mean_logits" in report["disagreement"]["names"]


@pytest.mark.slow
def test_a_study_reads_images_and_class_labels_as_its_scale_says(tmp_path):
    for name, number in (("train", 64), ("val", 30)):
        (tmp_path / name).mkdir()
        with TarWriter(str(tmp_path / name / "images.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for each in range(number):
                images = {"photo.jpg": encoded(photo(each)), "mask.jpg": encoded(photo(999))}
                tar.write({"__key__": f"{each:04}"} | images)
        rows = "".join(f"{each:04},{each % 3},{number}\n" for each in range(number))
        (tmp_path / f"{name}.csv").write_text(f"path,kind,size\n{rows}")
    source = {"image_key": "photo.jpg", "label_key": "kind", "labels_file": "train.csv", "eval_labels_file": "val.csv"}
    write_study(tmp_path, scale=SCALE | {"seeds": [0], "source": source})
    code, _, said = ended(compare(tmp_path, "--dry-run"))
    assert code == 0, said
    code, _, said = ended(compare(tmp_path))
    assert code == 0, said
    result = result_in(tmp_path / "out")
    assert result["steps"] == {"all": 7, "done": 7, "failed": 0}
    for cell in result["cells"]:
        assert json.loads((tmp_path / "out" / cell["seeds"][0]["scores_file"]).read_text())["images"] == 30
    label_set = LabelSet.open(tmp_path / "out" / result["teachers"][0]["labels"]["path"])
    (samples,) = (label_set.samples(name) for name in label_set.shards)
    assert list(samples.class_label) == [each % 3 for each in range(64)]
    assert (tmp_path / "out/study.html").is_file()


@pytest.mark.slow
def test_a_step_can_be_run_by_hand_and_gives_the_same_weights(whole, tmp_path, monkeypatch):
    (run,) = (whole / "out/students").glob("hard-seed0-*")
    monkeypatch.chdir(tmp_path)
    code, output = invoke("train", "-c", str(run / "settings.yaml"), "--output", "mine")
    assert code == 0, output
    name = "last/model.safetensors"
    assert (tmp_path / "mine" / name).read_bytes() == (run / "run" / name).read_bytes()


@pytest.mark.slow
def test_a_finished_study_runs_nothing(whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "out").rglob("done.json")}
    code, output, said = ended(compare(whole, "--json"))
    assert code == 0, said
    assert "11 of 11 steps are done" in said
    assert json.loads(output)["steps"]["done"] == 11
    assert {path: path.stat().st_mtime_ns for path in (whole / "out").rglob("done.json")} == before


@pytest.mark.slow
def test_two_jobs_come_to_the_same(whole):
    code, _, said = ended(compare(whole, "--jobs", "2", out="two"))
    assert code == 0, said
    assert without_times(result_in(whole / "two")) == without_times(result_in(whole / "out"))


@pytest.mark.slow
@needs_proc
def test_a_killed_study_leaves_no_process_and_continues_to_the_same_end(whole):
    """SIGKILL at moments that follow progress: some time after so many steps are done."""
    draw, out = random.Random(3), whole / "killed"
    finished: dict[Path, bytes] = {}
    for number in sorted(draw.sample(range(11), 3)):
        process = compare(whole, out="killed")

        def is_there(number: int = number, process: subprocess.Popen[str] = process) -> bool:
            return len(list(out.rglob("done.json"))) >= number or process.poll() is not None

        wait_until(is_there, f"{number} steps are done")
        time.sleep(draw.uniform(0, 4))
        process.kill()
        process.communicate()
        began = time.monotonic()
        wait_until(lambda: not processes_with(str(out)), "the steps have ended too")
        assert time.monotonic() - began < 10
        finished |= {path: path.read_bytes() for path in out.rglob("done.json") if path not in finished}
    code, _, said = ended(compare(whole, out="killed"))
    assert code == 0, said
    assert {path: path.read_bytes() for path in finished} == finished
    assert without_times(result_in(out)) == without_times(result_in(whole / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_study_saves_its_work_and_says_how_to_continue(whole, number, code, said):
    out = whole / f"stopped-{code}"
    scale = json.loads((whole / "scale.yaml").read_text())
    scale["train"] |= {"epochs": 5000, "checkpoint_interval": 5000, "log_interval": 1}
    (whole / f"long-{code}.yaml").write_text(json.dumps(scale))
    process = compare(whole, "--scale", f"long-{code}.yaml", "--cell", "alone", out=out.name)

    def trains() -> bool:
        return (
            any(path.stat().st_size for path in out.glob("students/*/run/metrics.jsonl")) or process.poll() is not None
        )

    wait_until(trains, "it trains")
    process.send_signal(number)
    found, _, messages = ended(process)
    assert (found, messages.splitlines()[-1]) == (code, f"{said}; the same command continues")
    assert list(out.glob("students/*/run/state.safetensors"))
    assert not list(out.rglob("done.json"))
    assert processes_with(str(out)) == []


@pytest.mark.slow
def test_a_ray_cluster_comes_to_the_same(whole, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, said = ended(compare(whole, "--engine", "ray", "--cell", "alone", "--seed", "0", out="ray"))
    assert code == 0, said
    mine, theirs = result_in(whole / "ray")["cells"][0], result_in(whole / "out")["cells"][0]
    assert mine["seeds"][0]["scores"] == theirs["seeds"][0]["scores"]


@pytest.mark.slow
def test_a_step_that_fails_ends_with_one_line_and_code_1(whole):
    scale = json.loads((whole / "scale.yaml").read_text())
    scale["teachers"] = {"cnn": {"teacher": "no_such_network", "pretrained": False}}
    (whole / "broken.yaml").write_text(json.dumps(scale))
    code, output, said = ended(compare(whole, "--scale", "broken.yaml", "--seed", "0", out="broken"))
    assert code == 1
    assert "labels cnn failed: it ended with exit code" in output
    assert "no_such_network" in said  # the last lines of the log
    assert re.search(r"error: \d of \d steps failed or could not be run\. Their logs say why", said.splitlines()[-1])
    alone, hard = result_in(whole / "broken")["cells"]
    assert (len(alone["seeds"]), len(hard["seeds"])) == (1, 0)


@pytest.mark.slow
def test_a_dry_run_measures_and_writes_nothing(whole, monkeypatch):
    monkeypatch.chdir(whole)
    before = sorted(whole.rglob("*"))
    code, output = invoke(
        "compare", "study.yaml", "--device", "cpu", "--out", "nowhere", "--seed", "0", "--json", "--dry-run"
    )
    assert code == 0, output
    assert sorted(whole.rglob("*")) == before
    result = json.loads(output)
    by_kind = {step["step"]: step for step in result["steps"]}
    assert by_kind["student"]["from"] == by_kind["labels"]["from"] == by_kind["teacher"]["from"] == "measured"
    assert all(by_kind[kind]["seconds"] > 0 for kind in ("student", "labels", "teacher"))
    assert (by_kind["evaluation"]["seconds"], by_kind["evaluation"]["from"]) == (None, "unknown")
    assert (
        by_kind["labels"]["label_bytes"] == 64 * 2 * 16
    )  # three classes: a hard label, three indices and numbers, no tail
    table = forecast_table(result)
    assert "0 of 7 steps done; left:" in table
    assert "3 steps whose time is unknown" in table
    code, output = invoke(
        "compare", "study.yaml", "--device", "cpu", "--out", "out", "--seed", "7", "--json", "--dry-run"
    )
    of_seed = {step["name"]: step for step in json.loads(output)["steps"] if step["step"] == "student"}
    assert of_seed["hard-seed7"]["from"] == "2 finished steps like it"
