"""The scripts of docs/clusters.md under a real Slurm of two nodes: a job array that is pre-empted once, and `srun`."""

import re
import sys
from pathlib import Path

import pytest
from support.background import wait_until
from support.builders import make_labels, named_files, teacher_of, with_checkout, write_tars
from support.slurm_server import slurm_server, states_of, submit

from pipeline.labels.labelset import LabelSet

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS = {"views": (0, 12), "views_per_shard": 1, "topk": 2, "accuracy_samples": 0, "workers": 1}
OPTIONS = "--set img_size=16 --set mix_block=8 --views-per-shard 1 --topk 2 --accuracy-samples 0 --workers 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    teacher = teacher_of("support.slow:slow_cnn")
    return named_files(make_labels(tmp_path_factory.mktemp("whole") / "set", data, teacher=teacher, **SETTINGS).folder)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Slurm, and a home folder in which `source "$HOME/deit/bin/activate"` activates this checkout."""
    home = tmp_path_factory.mktemp("home")
    activate = home / "deit/bin/activate"
    activate.parent.mkdir(parents=True)
    (activate.parent / "deit-cli").write_text(f'#!/bin/sh\nexec {sys.executable} -m cli "$@"\n')
    (activate.parent / "deit-cli").chmod(0o755)
    there = with_checkout(Path(__file__).parents[1])
    lines = [
        f"export {name}='{value}'"
        for name, value in {"PYTHONPATH": there["PYTHONPATH"], "OMP_NUM_THREADS": "1"}.items()
    ]
    activate.write_text("\n".join([*lines, f'export PATH="{activate.parent}:$PATH"', "export SLOW_TEACHER_S=0.5", ""]))
    with slurm_server(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"HOME": str(home)}


def script_of_the_page(number: int, folder: Path, data: str, changes: dict[str, str]) -> Path:
    """Write a Slurm script of docs/clusters.md with the paths of this test; return its file."""
    page = (ROOT / "docs/clusters.md").read_text()
    text = [block for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "#SBATCH" in block][number]
    changes |= {
        "/shared/imagenet/train": data,
        "--teacher regnety_160": f"--teacher support.slow:slow_cnn {OPTIONS}",
        "/shared/shards": str(folder / "set"),
        "--views 0:300": "--views 0:12",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "labels.sbatch"
    path.write_text(text)
    return path


def label_shards(folder: Path) -> int:
    return len(list(folder.glob("set/labels/*/*.parquet")))


def ended(slurm: dict[str, str], job: str) -> bool:
    return not states_of(slurm, "squeue", "-h", "-j", job, "-o", "%T")


def logs_of(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.log")))


def test_a_job_array_that_is_preempted_once_seals_the_set_of_one_process(slurm, data, whole, tmp_path):
    script = script_of_the_page(0, tmp_path, data, {"--array=0-15": "--array=0-2"})
    job = submit(slurm, script, "--exclusive")  # two elements run, the third waits
    wait_until(lambda: label_shards(tmp_path) >= 3, "label shards")
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    other = submit(slurm, urgent, "--partition=urgent", "--exclusive", "--output=urgent.log")
    wait_until(lambda: ended(slurm, other), "the urgent job")
    assert label_shards(tmp_path) < 24  # it ran in the middle of the work
    wait_until(lambda: ended(slurm, job), "the array")
    log = logs_of(tmp_path)
    assert log.count("terminated; the same command continues") == 1, log
    assert named_files(tmp_path / "set") == whole, log
    assert LabelSet.open(tmp_path / "set").manifest.sealed


def test_the_ranks_of_srun_on_two_nodes_make_the_set_of_one_process(slurm, data, whole, tmp_path):
    script = script_of_the_page(
        1, tmp_path, data, {"--nodes=4": "--nodes=2", "--ntasks-per-node=8": "--ntasks-per-node=2"}
    )
    job = submit(slurm, script, "--output=srun.log")
    wait_until(lambda: ended(slurm, job), "the job")
    assert named_files(tmp_path / "set") == whole, logs_of(tmp_path)
