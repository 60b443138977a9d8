"""The commands of the documentation under a real torchrun: two nodes on this machine, each with its own agent."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.background import PATIENCE_S, wait_until
from support.builders import make_labels, named_files, teacher_of, with_checkout, write_tars
from support.s3_server import free_ports
from support.training import TINY, assert_same_state

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SETTINGS = {"views": (0, 12), "views_per_shard": 2, "topk": 2, "accuracy_samples": 0, "workers": 1}
OPTIONS = "--set img_size=16 --set mix_block=8 --views-per-shard 2 --topk 2 --accuracy-samples 0 --workers 1"
STUDENT = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in TINY.items())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (16, 8))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    teacher = teacher_of("support.slow:slow_cnn")
    return make_labels(tmp_path_factory.mktemp("whole") / "set", data, teacher=teacher, **SETTINGS).folder


@contextlib.contextmanager
def nodes(command: str, folder: Path, *, nproc: int, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start a command of two nodes, an agent for each; of them, nothing is left after the with block."""
    (port,) = free_ports(1)
    options = ["--nnodes", "2", "--nproc-per-node", f"{nproc}", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--max-restarts", "1", "-m", "cli"]
    environment = with_checkout(OMP_NUM_THREADS="1", **variables)
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(2):
            log = stack.enter_context((folder / f"node-{number}.log").open("wb"))
            agent = subprocess.Popen(
                [*TORCHRUN, *options, *shlex.split(command)], stdout=log, stderr=log, env=environment, cwd=folder
            )
            started.append(stack.enter_context(agent))
            stack.callback(stop, agent)
        yield started


def stop(agent: subprocess.Popen[bytes]) -> None:
    """End an agent, which then ends its ranks: they have sessions of their own."""
    agent.terminate()
    agent.wait(PATIENCE_S)


def run_on_two_nodes(command: str, folder: Path, *, nproc: int, **variables: str) -> None:
    with nodes(command, folder, nproc=nproc, **variables) as agents:
        codes = [agent.wait(PATIENCE_S) for agent in agents]
    assert codes == [0, 0], [(folder / f"node-{number}.log").read_text()[-2000:] for number in range(2)]


def test_four_ranks_on_two_nodes_make_the_set_of_one_process(data, whole, tmp_path):
    page = re.sub(r"\\\n\s*", "", (ROOT / "docs/clusters.md").read_text())
    shown = next(line for line in page.splitlines() if line.startswith("    torchrun --nnodes"))
    command = shown.split("deit-cli ", 1)[1]
    for old, new in {
        "/shared/imagenet/train": data,
        "/shared/shards": str(tmp_path / "set"),
        "--views 0:300": "--views 0:12",
    }.items():
        assert old in command
        command = command.replace(old, new)
    run_on_two_nodes(f"{command} --teacher support.slow:slow_cnn {OPTIONS}", tmp_path, nproc=2)
    assert named_files(tmp_path / "set") == named_files(whole)


def test_a_rank_that_is_killed_on_one_of_two_nodes_costs_nothing_but_time(whole, tmp_path):
    """torchrun starts all ranks again, and `--resume auto` continues from the last checkpoint."""

    def command(output: Path) -> str:
        return (
            f"train --labels {whole} {STUDENT} --batch-size 6 --epochs 6 --warmup-epochs 1 --workers 1 --seed 3 "
            f"--recovery-interval 1 --resume auto --output {output}"
        )

    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    run_on_two_nodes(command(tmp_path / "undisturbed/run"), tmp_path / "undisturbed", nproc=1)
    folder = tmp_path / "killed"
    with nodes(command(folder / "run"), folder, nproc=1) as agents:
        wait_until(lambda: (folder / "run/state.safetensors").exists() or agents[0].poll() is not None, "a checkpoint")
        os.kill(rank_of(agents[1].pid), signal.SIGKILL)
        assert [agent.wait(PATIENCE_S) for agent in agents] == [0, 0], (folder / "node-0.log").read_text()[-3000:]
    assert_same_state(folder / "run", tmp_path / "undisturbed/run")


def rank_of(agent: int) -> int:
    """Return the process of the only rank of an agent."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 1, children
    return ranks[0]
