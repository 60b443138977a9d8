"""Which share of the work, which devices and which cores are ours."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import files_of, make_labels, small_recipe, small_teacher, write_tars
from support.fake_accelerator import imitate_accelerator

from pipeline.errors import UsageError
from pipeline.images.source import open_source
from pipeline.machine import ranks
from pipeline.machine.ranks import (
    Rank,
    double_on,
    forward_dtype,
    plan_cores,
    plan_devices,
    plan_loaders,
    ran_out_of_memory,
    rank_from,
    resolve_device,
)
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.loop import LabelTask
from pipeline.stage1.precompute import precompute
from trainer.parallel import device_of

TASKS = [LabelTask(f"shard-{i}", range(view, view + 2)) for view in (0, 2) for i in range(5)]
SETTINGS: dict[str, Any] = {"views": (0, 6), "views_per_shard": 2, "workers": 0, "accuracy_samples": 0}


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
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
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
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
            },
            Rank(7, 8, 1, 2),
        ),
        (  # seven tasks on two nodes
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_NTASKS": "7", "SLURM_LOCALID": "2"}
            | {"SLURM_STEP_TASKS_PER_NODE": "4,3"},
            Rank(6, 7, 2, 4),
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
        ({"RANK": "2"}, "RANK and WORLD_SIZE belong together, and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "RANK and WORLD_SIZE belong together, and RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "there are 0 ranks: there must be at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "2"}, "local rank 5 of 2"),
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
from support.builders import small_recipe, small_teacher, open_source
from pipeline.stage1 import loop as labelling
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.precompute import precompute
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
    names = {"root": str(Path(__file__).parents[2]), "tests": str(Path(__file__).parents[1])}
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


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)])
def test_ranks_that_begin_one_after_the_other_share_out_the_same_tasks(tmp_path, monkeypatch, order):
    """Each finds files of later blocks of views, which the ranks before it have made, and still makes just its own share."""
    data = write_tars(tmp_path / "data", (12, 9, 10))
    monkeypatch.setenv("WORLD_SIZE", "4")
    source, made = open_source(data), []
    for rank in order:
        monkeypatch.setenv("RANK", f"{rank}")
        config = PrecomputeConfig(data=data, out=tmp_path / "set", topk=2, **SETTINGS)
        sealed = precompute(config, small_recipe(), small_teacher(source), source)
        made.append(len(list((tmp_path / "set").rglob("labels/*/*.parquet"))))
        assert (sealed is not None) == (rank == order[-1])
    assert [b - a for a, b in zip([0, *made], made, strict=False)] == [{0: 3}.get(rank, 2) for rank in order]


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
    imitate_accelerator(monkeypatch, "cuda", gpus)
    assert plan_devices(device, processes, rank) == devices


DEVICES = [
    # accelerator that torch finds, number, devices of a rank, the device that auto is, its dtype, where float64 is kept
    (None, 0, ["cpu"], "cpu", torch.float32, "cpu"),
    ("cuda", 2, ["cuda:0", "cuda:1"], "cuda", torch.bfloat16, "cuda"),  # AMD's GPUs too
    ("cuda", 0, ["cpu"], "cpu", torch.float32, "cpu"),  # a torch that is built for CUDA, without a GPU
    ("xpu", 2, ["xpu:0", "xpu:1"], "xpu", torch.bfloat16, "xpu"),
    ("mps", 1, ["mps:0"], "mps", torch.float32, "cpu"),
    ("hpu", 1, ["cpu"], "cpu", torch.float32, "cpu"),  # nobody has looked at it: only by its name
]


@pytest.mark.parametrize(("kind", "number", "devices", "auto", "dtype", "doubles"), DEVICES, ids=range(len(DEVICES)))
def test_auto_chooses_the_accelerator_of_the_machine(monkeypatch, kind, number, devices, auto, dtype, doubles):
    imitate_accelerator(monkeypatch, kind, number)
    assert plan_devices("auto", None, Rank()) == devices
    assert plan_devices("auto", 1, Rank()) == devices[:1]
    device = resolve_device("auto")
    assert device == torch.device(auto)
    assert forward_dtype("auto", device) == dtype
    assert forward_dtype("float16", device) == torch.float16
    assert double_on(device) == torch.device(doubles)


@pytest.mark.parametrize(("kind", "asked", "device"), [
    ("cuda", "cuda", "cuda:3"), ("xpu", "xpu", "xpu:3"), ("xpu", "auto", "xpu:3"), ("xpu", "xpu:1", "xpu:1"), ("xpu", "cuda", "cuda"),
    ("xpu", "cpu", "cpu"), (None, "cpu", "cpu"), (None, "cuda", "cuda"),
])  # fmt: skip
def test_each_rank_of_a_machine_trains_on_its_own_gpu(monkeypatch, kind, asked, device):
    imitate_accelerator(monkeypatch, kind, 4)
    assert device_of(asked, Rank(3, 4, 3, 4)) == device


@pytest.mark.parametrize(
    ("error", "no_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 MiB, max allowed: 7.93 GiB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_device_without_memory_is_told_from_a_wrong_network(error, no_memory):
    assert ran_out_of_memory(error) == no_memory


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
    monkeypatch.setattr(ranks, "usable_cores", lambda: cores)
    assert plan_cores(["cpu"] * devices, rank) == each


@pytest.mark.parametrize(
    ("asked", "cores", "device", "loaders"),
    [(None, 8, "cuda:0", 7), (None, 8, "cpu", 4), (None, 1, "cpu", 1), (None, 1, "cuda:0", 1), (0, 8, "cpu", 0)],
)
def test_loaders_take_the_cores_that_the_teacher_leaves(asked, cores, device, loaders):
    assert plan_loaders(asked, cores, device) == loaders
