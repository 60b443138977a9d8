"""`bench inference`, and how networks are named."""

import json
from pathlib import Path

import pytest
import torch
from support.training import TINY

from pipeline.errors import CheckpointError, UsageError
from trainer.config import InferenceConfig
from trainer.evidence.networks import find_networks
from trainer.evidence.speed import LARGEST, _Timed, bench_inference, speed_table
from trainer.export import export_model, hub_config
from trainer.student import Student, create_student


def write_student(folder: Path, *, num_classes: int = 3) -> Path:
    """Write an exported student."""
    torch.manual_seed(num_classes)
    student = create_student(num_classes=num_classes, img_size=16, **TINY)
    export_model(folder, student.model.state_dict(), hub_config=hub_config(student))
    return folder


def open_networks(locations: list[str]) -> dict[str, Student]:
    return {network.name: network.open(torch.device("cpu")) for network in find_networks(locations)}


def test_every_network_is_timed_with_every_size_of_batch(tmp_path):
    write_student(tmp_path / "a" / "last")
    write_student(tmp_path / "b")
    config = InferenceConfig(batch_size=(3, 1, 3), seconds=0.02, device="cpu", out=tmp_path / "speed.json")
    result = bench_inference(config, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert json.loads((tmp_path / "speed.json").read_bytes()) == json.loads(json.dumps(result))
    assert [(row["name"], row["batch_size"]) for row in result["rows"]] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    for row in result["rows"]:
        assert row["images_per_s"] == pytest.approx(row["batch_size"] / (row["batch_ms"] / 1000))
        assert row["parameters"] == sum(
            p.numel() for p in create_student(num_classes=3, img_size=16, **TINY).parameters()
        )
        assert (row["model"], row["img_size"], row["dtype"]) == ("deit_tiny_distilled_patch16_224", 16, "float32")
    assert [row["weights"] for row in result["rows"][::2]] == [str(tmp_path / "a" / "last"), str(tmp_path / "b")]
    lines = speed_table(result).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith(f"float32, CPU, {torch.get_num_threads()} thread")
    assert (
        speed_table(result | {"threads": 1}).splitlines()[-1]
        == "float32, CPU, 1 thread: medians of 5 alternating rounds"
    )
    assert (
        speed_table(result | {"threads": 8}).splitlines()[-1]
        == "float32, CPU, 8 threads: medians of 5 alternating rounds"
    )


@pytest.mark.parametrize(("fits", "largest"), [(1, 1), (5, 4), (64, 64), (10**9, LARGEST)])
def test_the_largest_batch_is_the_last_power_of_two_that_fits(monkeypatch, fits, largest):
    def answer(images: int) -> None:
        if images > fits:
            raise torch.cuda.OutOfMemoryError

    timed = _Timed(
        create_student(num_classes=3, img_size=16, **TINY), torch.device("cpu"), torch.float32, compiled=False
    )
    monkeypatch.setattr(timed, "batch", lambda size: size)
    monkeypatch.setattr(timed, "answer", answer)
    assert timed.largest() == largest


def test_a_run_is_its_best_weights_else_its_last(tmp_path):
    write_student(tmp_path / "run" / "last", num_classes=3)
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert {name: each.num_classes for name, each in open_networks([str(tmp_path / "run")]).items()} == {"run": 3}
    write_student(tmp_path / "run" / "best", num_classes=5)
    found = open_networks([str(tmp_path / "run"), str(tmp_path / "run" / "last"), f"{tmp_path}/run/best/"])
    assert {name: each.num_classes for name, each in found.items()} == {"run": 5, "run-2": 3, "run-3": 5}


def test_what_is_no_network_is_refused(tmp_path):
    for location, said in (
        (tmp_path, r"holds no trained network\. Pass the folder of a run, .* or timm:NAME for published weights"),
        (tmp_path / "nowhere", r"nowhere: no such file or folder\. Published weights are written timm:NAME"),
    ):
        with pytest.raises(CheckpointError, match=said):
            find_networks([str(location)])
    with pytest.raises(UsageError, match=r"the student must be a timm model or one of .*, got 'resnet5000'"):
        open_networks(["timm:resnet5000"])


def test_the_current_folder_has_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_student(tmp_path / "run"))
    assert [network.name for network in find_networks(["."])] == ["run"]


def test_a_step_of_a_study_is_its_run_under_the_name_of_the_step(tmp_path):
    step = tmp_path / "hard-seed0-0123456789ab"
    write_student(step / "run" / "last")
    (step / "run" / "metrics.jsonl").touch()
    (step / "done.json").write_text("{}")
    found = find_networks([str(step), str(step / "run"), str(step / "run" / "last")])
    assert [network.name for network in found] == ["hard-seed0", "hard-seed0-2", "hard-seed0-3"]
    assert {network.weights for network in found} == {step / "run" / "last"}
