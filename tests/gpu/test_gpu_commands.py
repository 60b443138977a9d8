"""Commands on a GPU: two teacher processes, evaluate, verify with the teacher, doctor."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from on_gpu import CNN, columns, labels_of, load, run_config
from support.builders import CLASSES
from support.label_changes import forge, other_class

import cli
from pipeline.doctor import packages, probing
from pipeline.stage1 import precompute
from pipeline.stage1.loop import device_name
from trainer.loop import train

pytestmark = pytest.mark.gpu


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    """Run a command in this process, and return the JSON that it prints."""
    result = CliRunner().invoke(cli.commands, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_two_teacher_processes_on_one_device_give_the_labels_of_one(device, data, tmp_path, monkeypatch):
    """In the dtype of a run: the same hard labels, and probabilities within what float16 stores."""
    started: list[list[str]] = []
    real = precompute.run_processes

    def noting(job: Any, teacher: Any, devices: Any, *others: Any) -> None:
        started.append(list(devices))
        real(job, teacher, devices, *others)

    monkeypatch.setattr(precompute, "run_processes", noting)
    settings = {"views": (0, 4), "views_per_shard": 2}
    one, two = (
        labels_of(load(CNN, device, dtype="auto"), tmp_path / f"{number}", data, processes=number, **settings)
        for number in (1, 2)
    )
    assert started == [[str(device)] * 2]
    np.testing.assert_array_equal(columns(two, "hard"), columns(one, "hard"))
    np.testing.assert_allclose(columns(two, "topk_prob"), columns(one, "topk_prob"), atol=2e-3)
    assert {each["device"] for each in two.manifest.environments} == {device_name(device)}


@pytest.fixture(scope="module")
def checkpoint(device, label_set, tmp_path_factory) -> str:
    """A student that has learned something."""
    config = run_config(label_set, tmp_path_factory.mktemp("run") / "run", device, epochs=20, lr=3e-3, drop_path=0.0)
    return str(train(config) / "last")


@pytest.mark.usefixtures("full_float32")
def test_evaluate_counts_on_a_gpu_what_it_counts_on_a_cpu(device, data, label_set, checkpoint):
    """In float32; one image of all may fall to the other side of a tie."""
    what = ("--checkpoint", checkpoint, "--data", data, "--labels", str(label_set.folder), "--workers", "0")
    here, there = (
        run("evaluate", *what, "--device", where, "--amp-dtype", "float32") for where in (str(device), "cpu")
    )
    assert here["images"] == there["images"] == 32  # every fifth of the forty has no class label
    for name, scores in there["scores"].items():
        assert here["scores"][name]["top1"] == pytest.approx(scores["top1"], abs=100 / 32 + 1e-6)
    for name, agreement in there["agreement"].items():
        assert here["agreement"][name] == pytest.approx(agreement, abs=100 / here["agreement_views"] + 1e-6)
    chance = 100 / len(CLASSES)
    assert here["agreement"]["distillation_head"] > chance + 10
    fast = run("evaluate", *what, "--device", str(device))  # bfloat16 on a GPU
    assert fast["agreement"]["distillation_head"] > chance + 10


def verify(folder: Path, device: torch.device, *options: str, code: int = 0) -> dict[str, Any]:
    where = ("--teacher", CNN, "--device", str(device), "--relabel", "60")
    return run("labels", "verify", str(folder), *where, *options, code=code)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_labels_made_on_a_cpu_are_found_true_by_a_gpu(device, label_set, dtype):
    report = verify(Path(label_set.folder), device, "--dtype", dtype)
    assert report["problems"] == []
    assert report["teacher"]["views"] >= 60
    assert report["teacher"]["agreeing"] >= 0.9 * report["teacher"]["views"]


def test_labels_made_on_a_gpu_are_found_true_by_a_cpu(device, data, tmp_path):
    made = labels_of(load(CNN, device, dtype="auto"), tmp_path / "set", data)
    report = verify(Path(made.folder), torch.device("cpu"))
    assert report["problems"] == []
    assert report["teacher"]["agreeing"] >= 0.9 * report["teacher"]["views"]


def test_forged_labels_are_found_by_a_gpu(device, data, tmp_path):
    made = labels_of(load(CNN, device), tmp_path / "made", data)
    copied = Path(shutil.copytree(made.folder, tmp_path / "set"))
    forge(copied, other_class)
    report = verify(copied, device, "--no-probes", code=1)
    assert {problem["rule"] for problem in report["problems"]} == {"teacher"}
    assert report["teacher"]["agreeing"] < report["teacher"]["views"]


@pytest.mark.slow
def test_doctor_names_the_gpu(device):
    (trial,) = probing.try_all([packages.GPUS])
    assert trial.error is None
    rows = {row.name: row.text for row in packages._devices(trial).rows}
    if device.type == "cuda":
        assert rows["cuda:0"].startswith(f"{torch.cuda.get_device_name(0)}, ")
        assert "bfloat16" in rows["cuda:0"]
    elif not torch.cuda.is_available():
        assert rows["CUDA"].startswith("no GPU; torch is built for")
