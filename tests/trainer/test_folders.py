"""`deit-cli runs`: what it says of each run is what the run is, and a damaged one is a line and not an error."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.builders import make_labels, write_tars
from support.commands import invoke

from pipeline.labels.manifest import read_manifest
from pipeline.storage.json import pretty_json
from trainer.checkpoint import load_state, save_state
from trainer.config import TrainConfig
from trainer.folders import find_runs, runs_table
from trainer.loop import train

SMALL = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder with images, a label set and a finished run of three epochs."""
    folder = tmp_path_factory.mktemp("made")
    data = write_tars(folder / "data")
    make_labels(folder / "labels", data)
    settings = {"labels": str(folder / "labels"), "eval_data": data, "batch_size": 6, "workers": 0, "log_interval": 1}
    train(TrainConfig(output=str(folder / "run"), epochs=3, device="cpu", **settings, **SMALL))
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """Return a copy of the finished run."""
    return shutil.copytree(made / "run", tmp_path / "runs/one")


def only(folder: Path) -> dict:
    (found,) = find_runs([str(folder)])["runs"]
    return found


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(run: Path, updates: int, *, logged: int | None = None) -> None:
    """Make a run look as if it was killed: its checkpoint has `updates`, its metrics `logged` of them."""
    tensors, meta = load_state(run / "state.safetensors")
    save_state(run / "state.safetensors", tensors, meta | {"next_update": updates})
    kept = [line for line in lines_of(run) if line["index"] < (logged or updates)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_a_finished_run(run, made):
    found, lines = only(run.parent), lines_of(run)
    evaluated = [line for line in lines if line["kind"] == "eval"]
    best = max(evaluated, key=lambda line: line["top1"])
    assert found["path"] == str(run)
    assert (found["state"], found["progress"], found["epoch"], found["epochs"]) == ("finished", 1.0, 3, 3)
    assert (found["model"], found["teacher"]) == ("deit-ti", "support.builders:confident_cnn")
    assert found["labels"] == [str(made / "labels")]
    assert found["best_top1"] == best["top1"] == best["scores"][found["best_answer"]]["top1"]
    assert (found["best_weights"], found["best_epoch"]) == (best["weights"], best["epoch"])
    assert found["loss"] == [line for line in lines if line["kind"] == "train"][-1]["loss"]
    assert found["updates"] == load_state(run / "state.safetensors")[1]["next_update"]


def test_only_a_held_lock_means_running(run):
    per_epoch = only(run)["updates"] // 3
    cut(run, per_epoch, logged=per_epoch + 1)
    found = only(run)
    assert (found["state"], found["updates"]) == ("stopped", per_epoch)
    assert found["note"] == f"--resume continues at update {per_epoch}"
    with (run / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = only(run)
        assert (found["state"], found["updates"], found["epoch"]) == ("running", per_epoch + 1, 1)
    assert only(run)["state"] == "stopped"


def test_looking_does_not_keep_the_lock(run):
    only(run)
    with (run / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(run):
    (run / "lock").unlink(missing_ok=True)
    os.mkfifo(run / "lock")
    assert only(run)["state"] == "finished"


def test_the_share_of_a_run_in_its_first_epoch_counts_updates(run):
    total = only(run)["updates"]
    cut(run, 1)
    shutil.rmtree(run / "last")
    found = only(run)
    assert (found["state"], found["epoch"], found["updates"]) == ("stopped", 0, 1)
    assert found["progress"] == 1 / total > 0


def test_an_older_run_in_its_first_epoch_has_no_share(run):
    config = json.loads((run / "config.json").read_text())
    del config["updates_per_epoch"]
    (run / "config.json").write_text(json.dumps(config))
    assert only(run)["progress"] == 1.0
    cut(run, 1)
    shutil.rmtree(run / "last")
    found = only(run)
    assert (found["progress"], found["epoch"], found["updates"]) == (None, 0, 1)
    assert "0 of 3  -  deit-ti" in runs_table({"runs": [found], "label_sets": []})
    assert find_runs([str(run)], "progress")["runs"] == [found]


def test_a_run_on_class_labels_has_no_teacher_even_if_a_label_set_gave_its_images(run):
    config = json.loads((run / "config.json").read_text())
    assert config["teacher"]
    config["config"]["distillation_type"] = "none"
    (run / "config.json").write_text(json.dumps(config))
    assert only(run)["teacher"] is None
    assert "class labels" in invoke("runs", str(run))[1]


def test_a_run_of_one_epoch_can_be_finished(run):
    updates = only(run)["updates"] // 3
    cut(run, updates)
    config = json.loads((run / "config.json").read_text())
    config["config"] |= {"epochs": 1, "eval_data": None}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines_of(run) if x["kind"] == "train"))
    assert only(run)["state"] == "finished"
    assert only(run)["best_top1"] is None


def test_a_trained_run_without_its_last_evaluation_is_not_finished(run):
    (run / "evaluation.json").write_text('{"update": 1, "best_top1": 10.0}')
    assert only(run)["state"] == "stopped"
    assert only(run)["note"] == "trained, but not evaluated: --resume evaluates it"


def test_a_loss_that_was_not_finite_means_failed_until_the_run_is_past_it(run):
    updates = only(run)["updates"]
    cut(run, updates - 1)
    (run / "nonfinite-rank0.json").write_text(json.dumps({"update": updates - 1, "loss": "nan"}))
    found = only(run)
    assert found["state"] == "failed"
    assert found["note"].startswith(f"the loss of update {updates - 1} is not finite; --resume continues")
    (run / "nonfinite-rank0.json").write_text(json.dumps({"update": 0, "loss": "nan"}))
    assert only(run)["state"] == "stopped"


def test_a_run_that_did_not_begin_to_train(run):
    for name in ("metrics.jsonl", "state.safetensors", "evaluation.json"):
        (run / name).unlink()
    shutil.rmtree(run / "last")
    found = only(run)
    assert (found["state"], found["note"]) == ("not started", "no checkpoint: --resume starts again")
    assert "not started" in invoke("runs", str(run))[1]


def truncated(run: Path) -> None:
    data = (run / "state.safetensors").read_bytes()
    (run / "state.safetensors").write_bytes(data[: len(data) // 2])


def foreign(run: Path) -> None:
    tensors = load_file(run / "last/model.safetensors")
    shutil.copy(run / "last/model.safetensors", run / "state.safetensors")
    assert tensors


DAMAGES = {
    # what happened to a run, and the reason that its line must say
    "no config": (lambda run: (run / "config.json").unlink(), "config.json: no such file or folder"),
    "config is no JSON": (lambda run: (run / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config of something else": (
        lambda run: (run / "config.json").write_text("[1]"),
        "config.json is not that of a run: it has no config and recipe_id",
    ),
    "a damaged line": (lambda run: (run / "metrics.jsonl").write_text('{"kind"\n'), "metrics.jsonl: line 1 is damaged"),
    "half a checkpoint": (truncated, "state.safetensors: this is not a complete checkpoint"),
    "a checkpoint of something else": (foreign, "state.safetensors: this is not a complete checkpoint"),
    "a config without epochs": (
        lambda run: (run / "config.json").write_text('{"config": {"model": "deit-ti"}, "recipe_id": "0"}'),
        "config.json is not that of a run: it has no epochs",
    ),
    "a line of something else": (
        lambda run: (run / "metrics.jsonl").write_text('{"kind": "eval", "index": 3, "epoch": 0, "top1": "many"}\n'),
        "metrics.jsonl is not that of a run: it has no top1, weights and scores",
    ),
    "a damaged evaluation": (
        lambda run: (run / "evaluation.json").write_text("nothing"),
        "evaluation.json: not valid JSON",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_a_line_with_its_reason_beside_the_others(run, damage):
    shutil.copytree(run, run.parent / "two")
    happen, reason = DAMAGES[damage]
    happen(run)
    code, shown = invoke("runs", str(run.parent))
    assert code == 0
    states = {Path(each["path"]).name: each for each in find_runs([str(run.parent)])["runs"]}
    assert states["two"]["state"] == "finished"
    assert states["one"]["state"] == "damaged"
    assert states["one"]["note"].startswith(reason)
    assert reason in shown


def test_a_last_line_that_a_crash_cut_off_is_no_damage(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert only(run)["state"] == "finished"


def test_runs_of_studies_and_label_sets_are_found_and_exported_folders_are_not(run, made):
    shutil.copytree(run, run.parent / "study/students/ti-1234/run")
    shutil.copytree(made / "labels", run.parent / "study/labels/cnn/set")
    found = find_runs([str(run.parent), str(run)])  # one of them twice
    assert [each["path"] for each in found["runs"]] == [str(run), str(run.parent / "study/students/ti-1234/run")]
    (labels,) = found["label_sets"]
    assert (labels["state"], labels["progress"], labels["views"]) == ("sealed", 1.0, [0, 3])


def test_a_label_set_that_is_being_made_says_how_far_it_is(made, tmp_path):
    labels = shutil.copytree(made / "labels", tmp_path / "labels")
    manifest = json.loads((labels / "manifest.json").read_text())
    total = len(list(labels.glob("labels/*/*.parquet")))
    assert total > 1
    next(labels.glob("labels/*/*.parquet")).unlink()
    found = find_runs([str(labels)])["label_sets"][0]
    assert (found["label_shards"], found["of_label_shards"]) == (total - 1, total)
    manifest["sealed"] = False
    (labels / "manifest.json").write_text(json.dumps(manifest))
    assert find_runs([str(labels)])["label_sets"][0]["state"] == "damaged"  # its hash no longer fits
    (labels / "manifest.json").unlink()
    found = find_runs([str(labels)])["label_sets"][0]
    assert found["state"] == "unfinished"
    assert "unfinished" in runs_table({"runs": [], "label_sets": [found]})


def opened(labels: Path, *views: tuple[int, int]) -> Path:
    """Give a label set an open manifest, as the first command of a set writes it, and return its folder."""
    open_ = {"sealed": False, "view_blocks": views, "files": (), "probes": (), "environments": ()}
    manifest = read_manifest(labels).model_copy(update=open_ | {"content_sha256": None})
    (labels / "manifest.json").write_bytes(pretty_json(manifest.to_json()))
    return labels


def test_the_share_of_a_set_is_of_the_views_that_its_first_command_wanted(made, tmp_path):
    labels = opened(shutil.copytree(made / "labels", tmp_path / "labels"), (0, 3), (3, 6))
    there = len(list(labels.glob("labels/views-00000-00002/*.parquet")))
    (labels / "labels/views-00000-00002/.tmp-1.parquet").write_bytes(b"half")
    (found,) = find_runs([str(labels)])["label_sets"]
    assert (found["state"], found["views"], found["progress"], found["note"]) == ("unfinished", [0, 6], 0.5, "")
    assert (found["label_shards"], found["of_label_shards"]) == (there, 2 * there)


def test_a_set_of_two_commands_has_no_share_because_nobody_stored_what_the_second_wants(made, tmp_path):
    labels = opened(shutil.copytree(made / "labels", tmp_path / "labels"), (0, 3))
    for block in ("00003-00012", "00013-00022"):
        shutil.copytree(labels / "labels/views-00000-00002", labels / f"labels/views-{block}")
    (found,) = find_runs([str(labels)])["label_sets"]
    there = len(list(labels.glob("labels/*/*.parquet")))
    assert (found["views"], found["label_shards"], found["of_label_shards"]) == ([0, 23], there, None)
    assert found["progress"] is None
    assert found["note"].startswith("2 blocks of views begun beside those of the first command")
    assert "unfinished   0:23  -" in runs_table({"runs": [], "label_sets": [found]})


def test_a_sealed_set_that_is_extended_is_still_that_of_its_manifest(made, tmp_path):
    labels = shutil.copytree(made / "labels", tmp_path / "labels")
    shutil.copytree(labels / "labels/views-00000-00002", labels / "labels/views-00003-00005")
    (found,) = find_runs([str(labels)])["label_sets"]
    assert (found["state"], found["views"], found["progress"]) == ("sealed", [0, 3], 1.0)
    assert found["note"] == "1 further block of views begun, not sealed"


def test_the_current_folder_is_the_default(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    code, shown = invoke("runs")
    assert (code, "one" in shown, "finished" in shown) == (0, True, True)


def test_orders(run):
    for name, top1 in {"two": 99.0, "three": None}.items():
        other = shutil.copytree(run, run.parent / name)
        lines = [line | {"top1": top1} if line["kind"] == "eval" else line for line in lines_of(other)]
        kept = [line for line in lines if line["kind"] == "train" or top1]
        (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.utime(other / "metrics.jsonl", (1, 2e9 if top1 else 3e9))

    def names(order) -> list[str]:
        return [Path(each["path"]).name for each in find_runs([str(run.parent)], order)["runs"]]

    assert names("name") == ["one", "three", "two"]
    assert names("top1") == ["two", "one", "three"]
    assert names("written") == ["three", "two", "one"]


def test_five_hundred_runs_are_listed_in_seconds(run):
    for number in range(500):
        shutil.copytree(run, run.parent / f"run-{number:03}", copy_function=os.link)
    began = time.process_time()
    found = find_runs([str(run.parent)])["runs"]
    assert len(found) == 501
    assert {each["state"] for each in found} == {"finished"}
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("folder", "code", "said"),
    [
        ("empty", 2, "there is no run and no label set in"),
        ("nowhere", 1, "nowhere: no such folder"),
        ("s3://bucket/runs", 2, "runs are listed in local folders, got s3://bucket/runs"),
        ("file", 1, "file: no such folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, folder, code, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("")
    ended, shown = invoke("runs", folder)
    assert ended == code
    assert said in shown


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    assert invoke("runs", str(tmp_path)) == (1, f"error: {tmp_path}: Permission denied")
