"""Who gets which label shards: shares of static ranks, devices and cores, and workers that are lost (fault 11)."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from builders import files_of, make_labels, teacher_of, write_tars

from pipeline import engines
from pipeline.engines import TRIES, Dispatcher, Rank, plan_cores, plan_devices, plan_loaders, plan_ray, rank_from
from pipeline.errors import LabelSetIncomplete, TeacherError, UsageError, WorkerError
from pipeline.labelling import LabelTask
from pipeline.labelset import LabelSet

TASKS = [LabelTask(f"shard-{i}", range(view, view + 2)) for view in (0, 2) for i in range(5)]
SETTINGS: dict[str, Any] = {"views": (0, 6), "views_per_shard": 2, "workers": 0, "accuracy_samples": 0}


# --- static ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Rank(3, 8, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "9"}, Rank(1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8"}, Rank(5, 8)),
        (
            {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
            Rank(3, 4),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Rank(3, 4),
        ),
        (  # srun --ntasks-per-node 4 in one job of two nodes
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "4",
                "SLURM_CPUS_PER_TASK": "6",
            },
            Rank(5, 8, 1, 4, cores=6),
        ),
        (  # srun in each element of a job array
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
            },
            Rank(7, 8, 1, 2),
        ),
        # in sbatch's own script there is one process, however many tasks the job may start
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Rank()),
    ],
)
def test_ranks_are_those_of_the_launcher(environment, rank):
    assert rank_from(environment) == rank


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 of 2: it must be in 0..1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2"),
        ({"RANK": "2"}, "rank 2 of 1"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2(x2)"},
            r"SLURM_NTASKS must be .*, got '2\(x2\)'",
        ),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number, got 'one'"),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"}, "rank 9 of 4"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(environment, text):
    with pytest.raises(UsageError, match=text):
        rank_from(environment)


@pytest.mark.parametrize("world_size", [1, 2, 3, 10, 11])
def test_the_shares_of_all_ranks_are_all_tasks_once(world_size):
    shares = [Rank(rank, world_size).share(TASKS) for rank in range(world_size)]
    assert sorted((task for share in shares for task in share), key=TASKS.index) == TASKS
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


RANK_SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from builders import small_recipe, small_teacher, open_source
from pipeline import labelling
from pipeline.config import PrecomputeConfig
from pipeline.precompute import precompute
publish = labelling.publish_draft
published = []
def publish_or_die(*args):
    if len(published) == int(os.environ["DIES_AFTER"]):
        os._exit(9)
    published.append(publish(*args))
    return published[-1]
labelling.publish_draft = publish_or_die
source = open_source({data!r})
config = PrecomputeConfig(data={data!r}, out=Path({out!r}), topk=2, **{settings!r})
print(precompute(config, small_recipe(), small_teacher(source), source) is not None)
"""


@pytest.mark.slow
def test_four_static_ranks_of_which_one_dies_and_is_run_again_make_the_same_files(tmp_path):
    data = write_tars(tmp_path / "data", (12, 9, 10))
    whole = make_labels(tmp_path / "whole", data, **SETTINGS)
    names = {"root": str(Path(__file__).parent.parent), "tests": str(Path(__file__).parent)}
    script = RANK_SCRIPT.format(data=data, out=str(tmp_path / "set"), settings=SETTINGS, **names)

    def start(rank: int, dies_after: int = -1) -> subprocess.Popen[str]:
        environment = os.environ | {"RANK": f"{rank}", "WORLD_SIZE": "4", "DIES_AFTER": f"{dies_after}"}
        return subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with start(0) as a, start(1) as b, start(2, dies_after=1) as c, start(3) as d:
        ends = [(*process.communicate(timeout=300), process.returncode) for process in (a, b, c, d)]
    assert [code for *_, code in ends] == [0, 0, 9, 0], ends
    assert [out.split()[-1] for out, _, code in ends if code == 0] == ["False"] * 3  # none of them could seal
    with start(2) as again:
        out, err = again.communicate(timeout=300)
    assert (out.split()[-1], again.returncode) == ("True", 0), err
    assert files_of(tmp_path / "set") == files_of(whole.folder)


# --- devices and cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "device", "processes", "rank", "devices"),
    [
        (0, "auto", None, Rank(), ["cpu"]),
        (0, "auto", 3, Rank(), ["cpu"] * 3),
        (2, "auto", None, Rank(), ["cuda:0", "cuda:1"]),
        (2, "auto", 4, Rank(), ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        (2, "auto", 1, Rank(), ["cuda:0"]),
        (2, "cpu", None, Rank(), ["cpu"]),
        (2, "cuda:1", None, Rank(), ["cuda:1"]),
        (4, "auto", None, Rank(1, 2, 1, 2), ["cuda:1", "cuda:3"]),  # two ranks on a machine share its GPUs
        (1, "auto", None, Rank(3, 4, 1, 2), ["cuda:0"]),  # srun has bound one GPU to each of them
        (2, "auto", None, Rank(3, 4, 3, 4), ["cuda:1"]),
    ],
)
def test_there_is_a_process_for_each_gpu_of_this_rank(monkeypatch, gpus, device, processes, rank, devices):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert plan_devices(device, processes, rank) == devices


@pytest.mark.parametrize(
    ("cores", "devices", "rank", "each"),
    [
        (16, 1, Rank(), 16),
        (16, 4, Rank(), 4),
        (16, 2, Rank(0, 4, 0, 4), 2),
        (8, 1, Rank(0, 4, 0, 4, cores=8), 8),  # Slurm has bound them
        (64, 1, Rank(0, 4, 0, 4, cores=8), 8),  # or only counts them
        (2, 8, Rank(), 1),
    ],
)
def test_processes_share_the_cores_of_the_machine(monkeypatch, cores, devices, rank, each):
    monkeypatch.setattr(engines, "usable_cores", lambda: cores)
    assert plan_cores(["cpu"] * devices, rank) == each


@pytest.mark.parametrize(
    ("asked", "cores", "device", "loaders"),
    [(None, 8, "cuda:0", 7), (None, 8, "cpu", 4), (None, 1, "cpu", 1), (None, 1, "cuda:0", 1), (0, 8, "cpu", 0)],
)
def test_loaders_take_the_cores_that_the_teacher_leaves(asked, cores, device, loaders):
    assert plan_loaders(asked, cores, device) == loaders


@pytest.mark.parametrize(
    ("nodes", "device", "processes", "plan"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], "auto", None, ("cpu", 6, 1)),
        ([{}, {"CPU": 2.0}], "auto", None, ("cpu", 2, 1)),
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], "auto", None, ("cuda", 4, 8)),  # the node without a GPU is left
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 32.0, "GPU": 2.0}], "cuda", None, ("cuda", 6, 4)),
        ([{"CPU": 1.0, "GPU": 4.0}], "auto", 2, ("cuda", 2, 1)),
        ([{"CPU": 32.0, "GPU": 4.0}], "cpu", None, ("cpu", 32, 1)),
        ([{}], "auto", None, ("cpu", 1, 1)),
    ],
)
def test_a_ray_cluster_has_a_worker_for_each_gpu_with_its_share_of_the_cores(nodes, device, processes, plan):
    assert plan_ray(nodes, device, processes) == plan


# --- handing out ----------------------------------------------------------------------------------------------


def test_a_lost_worker_gives_its_tasks_back_and_gets_no_more():
    dispatcher = Dispatcher(deque(TASKS))
    first, second = dispatcher.take("a"), dispatcher.take("a")
    assert (first, second) == (TASKS[0], TASKS[1])
    assert dispatcher.lose("a") == 2
    assert list(dispatcher.waiting)[-2:] == [first, second]
    assert dispatcher.take("a") is None
    dispatcher.finish("a", TASKS[0])  # it was only out of reach, and its file is whole: the next one finds it there
    assert list(dispatcher.waiting)[-2:] == [first, second]


def test_a_suspect_goes_to_a_worker_that_has_nothing_else():
    dispatcher = Dispatcher(deque(TASKS[:3]))
    assert [dispatcher.take("a"), dispatcher.take("a"), dispatcher.take("b")] == TASKS[:3]
    dispatcher.lose("a")
    assert dispatcher.take("b") is None  # it still has one
    assert [dispatcher.take("c"), dispatcher.take("c")] == [TASKS[0], None]
    assert not dispatcher.finished
    dispatcher.finish("c", TASKS[0])
    assert dispatcher.take("d") == TASKS[1]


@pytest.mark.parametrize("seed", range(50))
def test_whatever_happens_every_task_is_finished_or_set_aside_and_only_for_its_own_fault(seed):
    """Workers take, finish and die at random; a few tasks kill whoever has them in hand."""
    chance = random.Random(seed)
    deadly = set(chance.sample(TASKS, chance.randint(0, 2)))
    dispatcher = Dispatcher(deque(TASKS))
    hands: dict[str, list[LabelTask]] = {"0": []}
    number, done = 0, set()
    for _ in range(10_000):
        if dispatcher.finished:
            break
        if len(hands) < 3:
            number += 1
            hands[f"{number}"] = []
        name = chance.choice(sorted(hands))
        mine = hands[name]
        if mine and chance.random() < 0.5:
            if mine[0] in deadly:
                assert dispatcher.lose(name) == len(hands.pop(name))
            else:
                dispatcher.finish(name, mine[0])
                done.add(mine.pop(0))
        elif len(mine) < 3 and (task := dispatcher.take(name)) is not None:
            mine.append(task)
        elif not mine:
            del hands[name]  # there was nothing for it: it ended
    assert dispatcher.finished
    assert set(dispatcher.set_aside) == deadly
    assert done == set(TASKS) - deadly
    assert all(dispatcher.losses[task] == TRIES for task in deadly)


# --- processes ------------------------------------------------------------------------------------------------


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
    start = engines._Crew.start
    monkeypatch.setattr(engines._Crew, "start", lambda crew, device: (started.append(device), start(crew, device)))
    labelled(tmp_path / "set", data, views=(0, 2), processes=8)
    assert started == ["cpu"]


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_changes_no_byte(data, tmp_path, caplog):
    killed, views = [], (0, 40)  # so many that both are at work when the first file appears
    whole = files_of(make_labels(tmp_path / "whole", data, **dict(SETTINGS, views=views)).folder)

    def kill_one() -> None:
        while not killed:
            if list(tmp_path.glob("set/labels/*/*.parquet")):
                children = [c for c in multiprocessing.active_children() if c.name.startswith("teacher-")]
                for child in children[:1]:
                    os.kill(child.pid or 0, signal.SIGKILL)
                    killed.append(child.name)
            time.sleep(0.005)

    saboteur = threading.Thread(target=kill_one)
    saboteur.start()
    got = labelled(tmp_path / "set", data, views=views)
    saboteur.join()
    assert got == whole
    assert "was lost (SIGKILL)" in caplog.text


@pytest.mark.slow
def test_a_label_shard_that_kills_its_workers_is_set_aside_and_the_others_are_finished(
    data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(engines, "_work", work_and_die_of_shard_1)
        with pytest.raises(
            WorkerError, match=r"1 label shards were set aside after 3 .*: train-000001 views 2:4\. Every"
        ):
            labelled(out, data)
    assert multiprocessing.active_children() == []
    missing = set(whole) - set(files_of(out))
    assert missing == {"labels/views-00002-00003/train-000001.parquet"}
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

    engines._work(Deadly(), *args)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_processes_that_cannot_start_are_an_error_and_not_a_loop(data, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_work", die_at_once)
    with pytest.raises(WorkerError, match="3 teacher processes died before they took any work"):
        labelled(tmp_path / "set", data)
    assert multiprocessing.active_children() == []


def die_at_once(*_) -> None:
    os._exit(1)


@pytest.mark.slow
def test_what_a_process_cannot_do_arrives_as_its_own_error_and_leaves_no_process(data, tmp_path):
    with pytest.raises(TeacherError, match="is not the one that this run began with"):
        labelled(tmp_path / "set", data, teacher=teacher_of("builders:changing_cnn"))
    assert multiprocessing.active_children() == []
    with pytest.raises(LabelSetIncomplete):
        LabelSet.open(tmp_path / "set")
