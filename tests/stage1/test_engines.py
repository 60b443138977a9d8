"""One process for each device: the same files, also when some are lost (fault 11)."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.background import in_background
from support.builders import files_of, make_labels, teacher_of, write_tars

from pipeline.errors import LabelSetIncomplete, TeacherError, WorkerError
from pipeline.labels.labelset import LabelSet
from pipeline.stage1 import engines
from pipeline.stage1.loop import LabelTask

SETTINGS: dict[str, Any] = {"views": (0, 6), "views_per_shard": 2, "workers": 0, "accuracy_samples": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 16, 16))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes."""
    return files_of(make_labels(tmp_path_factory.mktemp("whole") / "set", data, **SETTINGS).folder)


def labelled(out: Path, data: str, **changes: Any) -> dict[str, bytes]:
    made = make_labels(out, data, **dict(SETTINGS, **({"processes": 2} | changes)))
    assert multiprocessing.active_children() == []
    return files_of(made.folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_make_the_files_of_one(data, whole, tmp_path, workers):
    assert labelled(tmp_path / "set", data, workers=workers) == whole


@pytest.mark.slow
def test_more_processes_than_label_shards_are_not_started(tmp_path, monkeypatch):
    data, started = write_tars(tmp_path / "data", (12,)), []
    start = engines.TeacherProcesses.start
    noting = lambda processes, device: (started.append(device), start(processes, device))  # noqa: E731
    monkeypatch.setattr(engines.TeacherProcesses, "start", noting)
    labelled(tmp_path / "set", data, views=(0, 2), processes=8)
    assert started == ["cpu"]


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_changes_no_byte(data, tmp_path, caplog):
    killed, views = [], (0, 40)  # so many that both are at work when the first file appears
    whole = files_of(make_labels(tmp_path / "whole", data, **dict(SETTINGS, views=views)).folder)

    def kill_one(ended: threading.Event) -> None:
        while not killed and not ended.is_set():
            if list(tmp_path.glob("set/labels/*/*.parquet")):
                children = [c for c in multiprocessing.active_children() if c.name.startswith("teacher-")]
                for child in children[:1]:
                    os.kill(child.pid or 0, signal.SIGKILL)
                    killed.append(child.name)
            time.sleep(0.005)

    with in_background(kill_one):
        got = labelled(tmp_path / "set", data, views=views)
    assert got == whole
    assert "was lost (SIGKILL)" in caplog.text


@pytest.mark.slow
def test_a_label_shard_that_kills_its_workers_is_set_aside_and_the_others_are_finished(
    data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_run_worker", work_and_die_of_shard_1)
        with pytest.raises(
            WorkerError, match=r"1 label shards were set aside after 3 .*: train-000001 views 2:4\. Every"
        ):
            labelled(out, data)
    assert multiprocessing.active_children() == []
    missing = set(whole) - set(files_of(out))
    assert missing == {"labels/views-00002-00003/train-000001.parquet", "README.md"}  # the card comes with the seal
    assert labelled(out, data) == whole


def work_and_die_of_shard_1(pipe, *args) -> None:
    """A teacher process that does not survive one label shard."""

    class Deadly:
        send = pipe.send

        def recv(self) -> LabelTask | None:
            task = pipe.recv()
            if task and task.shard == "train-000001" and task.views.start == 2:
                os._exit(7)
            return task

    engines._run_worker(Deadly(), *args)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_processes_that_cannot_start_are_an_error_and_not_a_loop(data, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_run_worker", die_at_once)
    with pytest.raises(WorkerError, match="3 teacher processes died before their first task"):
        labelled(tmp_path / "set", data)
    assert multiprocessing.active_children() == []


def die_at_once(*_) -> None:
    os._exit(1)


@pytest.mark.slow
def test_what_a_process_cannot_do_arrives_as_its_own_error_and_leaves_no_process(data, tmp_path):
    with pytest.raises(TeacherError, match="is not the teacher that this run began with"):
        labelled(tmp_path / "set", data, teacher=teacher_of("support.builders:changing_cnn"))
    assert multiprocessing.active_children() == []
    with pytest.raises(LabelSetIncomplete):
        LabelSet.open(tmp_path / "set")
