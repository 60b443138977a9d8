"""TensorBoard and Weights & Biases see what metrics.jsonl says, after a continuation too."""

import contextlib
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import StorageError, UsageError
from trainer import trackers
from trainer.metrics import open_recorder, read_metrics
from trainer.trackers import WANDB_NAME, check_trackers, new_run_id, run_id, scalars_of

ROOT = Path(__file__).parents[2]

POINTS = [
    # kind, values, points
    ("train", {"loss": 1.5, "lr": 1e-3, "grad_norm": 2}, {"train/loss": 1.5, "train/lr": 1e-3, "train/grad_norm": 2.0}),
    ("train", {"epoch": 3, "step": 7, "loss": 1.5}, {"train/loss": 1.5}),  # the place is no curve
    ("train", {"loss": 1.5, "grad_norm": math.inf, "extra": math.nan}, {"train/loss": 1.5}),
    ("train", {"note": "text", "nothing": None, "loss": 1.5}, {"train/loss": 1.5}),
    ("train", {"layers": {"first": 0.5}}, {"train/layers_first": 0.5}),
    (
        "eval",
        {"epoch": 0, "weights": "ema", "images": 50, "scores": {"mean_logits": {"top1": 71.5, "top5": 90.0}}},
        {"eval/ema/mean_logits_top1": 71.5, "eval/ema/mean_logits_top5": 90.0},
    ),
]


@pytest.mark.parametrize(("kind", "values", "points"), POINTS, ids=range(len(POINTS)))
def test_a_line_of_metrics_is_these_points_of_curves(kind, values, points):
    assert scalars_of(kind, values) == points


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None if package == name else object())
    asked = {"tensorboard": False, "wandb": False} | {name: True}
    with pytest.raises(UsageError, match=rf'--log-{name} needs .*: pip install "deit-cli\[{name}\]"'):
        check_trackers(**asked)
    with pytest.raises(UsageError, match=name):
        open_recorder(tmp_path / "run", next_index=0, **asked)
    assert not (tmp_path / "run").exists()
    check_trackers(tensorboard=False, wandb=False)  # what nobody asks for may be missing


def test_neither_package_is_imported_before_it_is_asked_for():
    script = "import sys, trainer.metrics; print({'tensorboard', 'wandb', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


# --- TensorBoard ----------------------------------------------------------------------------------------------


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read event files as TensorBoard does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_line_at_its_update(tmp_path):
    pytest.importorskip("tensorboard")
    with open_recorder(tmp_path, next_index=0, tensorboard=True) as recorder:
        recorder.add("train", 4, epoch=0, loss=2.0, grad_norm=math.inf)
        recorder.add("train", 9, epoch=0, loss=1.5, grad_norm=1.0)
        recorder.add("eval", 9, epoch=0, weights="student", scores={"mean_logits": {"top1": 12.5}})
        assert curves(tmp_path)["train/loss"] == [(4, 2.0), (9, 1.5)]  # before it is closed: after a kill, that is
    assert curves(tmp_path) == {
        "train/loss": [(4, 2.0), (9, 1.5)],
        "train/grad_norm": [(9, 1.0)],
        "eval/student/mean_logits_top1": [(9, 12.5)],
    }


@pytest.mark.parametrize("next_index", [0, 5, 10])
def test_a_continuation_does_not_draw_an_update_twice(tmp_path, next_index):
    pytest.importorskip("tensorboard")
    with open_recorder(tmp_path, next_index=0, tensorboard=True) as recorder:
        for index in (4, 9, 14):
            recorder.add("train", index, loss=float(index))
    with open_recorder(tmp_path, next_index=next_index, tensorboard=True) as recorder:
        for index in (4, 9, 14, 19):
            if index >= next_index:
                recorder.add("train", index, loss=float(index))
    assert curves(tmp_path)["train/loss"] == [(index, float(index)) for index in (4, 9, 14, 19)]
    assert [line["index"] for line in read_metrics(tmp_path)] == [4, 9, 14, 19]


def test_an_event_file_that_can_no_longer_be_written_does_not_stop_a_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    with open_recorder(tmp_path, next_index=0, tensorboard=True) as recorder:
        tracker = recorder._trackers[0]
        tracker._writer.file_writer.event_writer.close()  # pyright: ignore[reportAttributeAccessIssue]
        for index in (0, 1):
            recorder.add("train", index, loss=1.0)
    assert caplog.text.count("TensorBoard failed") == 1
    assert len(read_metrics(tmp_path)) == 2


# --- Weights & Biases -----------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch) -> None:
    """The real package, without its network."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("trainer.trackers.FINISH_S", 300)  # a busy machine may take longer than a user is to wait


def history(folder: Path) -> list[dict]:
    """Read the rows that an offline run keeps: protocol buffers of W&B in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in log_records(next(folder.glob("*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log: blocks of 32 KiB, and before each part four bytes of CRC, its length, its place."""
    position, record = 7, b""  # behind W&B's own mark
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # too little for a header: zeros
            position += room
            continue
        length, place = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if place in (1, 4):  # whole, or the last part
            yield record
            record = b""


def runs(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "wandb").glob("offline-run-*"))


def rows_of(folder: Path, count: int) -> list[dict]:
    """Return the rows of an offline run; its own process may write them a little after it says that it is done."""
    from google.protobuf.message import DecodeError

    rows, end = [], time.monotonic() + 60
    while len(rows) < count and time.monotonic() < end:
        time.sleep(0.1)
        with contextlib.suppress(DecodeError):  # half of a record is there
            rows = history(folder)
    drop = {"_runtime", "_timestamp"}
    return [{name: value for name, value in row.items() if name not in drop} for row in rows]


@pytest.mark.slow
def test_wandb_keeps_rows_offline_and_a_continuation_goes_on_with_its_run(offline, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="deit_cli.train")
    with open_recorder(tmp_path, next_index=0, wandb=True, wandb_project="p", run_config={"lr": 0.1}) as recorder:
        recorder.add("train", 4, epoch=0, loss=2.0, grad_norm=math.inf)
        recorder.add("eval", 4, epoch=0, weights="ema", scores={"class_head": {"top1": 12.5}})
        recorder.add("train", 9, epoch=0, loss=1.5)
    (first,) = runs(tmp_path)
    kept = json.loads((tmp_path / WANDB_NAME).read_text())["id"]
    assert first.name.endswith(kept)
    assert f"recorded offline; to send it: wandb sync --id {kept} {first}" in caplog.text
    assert rows_of(first, 2) == [
        {"_step": 4, "train/loss": 2.0, "eval/ema/class_head_top1": 12.5},
        {"_step": 9, "train/loss": 1.5},
    ]
    with open_recorder(tmp_path, next_index=10, wandb=True) as recorder:
        recorder.add("train", 14, loss=1.0)
    assert len(runs(tmp_path)) in (1, 2)  # W&B names a folder by the second
    assert [path.name for path in runs(tmp_path) if f"-{kept}" not in path.name] == []  # it may add a number
    with open_recorder(tmp_path, next_index=0, wandb=True):  # nothing was saved: another run
        pass
    assert json.loads((tmp_path / WANDB_NAME).read_text())["id"] != kept


@pytest.mark.slow
def test_without_a_login_wandb_is_misuse_with_the_way_out(tmp_path):
    """In a process of its own: a login would be found in the home folder."""
    pytest.importorskip("wandb")
    script = f"""
from pathlib import Path
from pipeline.errors import UsageError
from trainer.metrics import open_recorder
try:
    open_recorder(Path({str(tmp_path / "run")!r}), next_index=0, wandb=True)
except UsageError as error:
    print(error)
"""
    variables = {"HOME": str(tmp_path), "PATH": "", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "--log-wandb: No API key configured" in done.stdout, done.stderr
    assert "To record without a network, set WANDB_MODE=offline" in done.stdout


@pytest.mark.slow
def test_where_the_server_of_wandb_does_not_answer_a_run_is_recorded_offline(tmp_path):
    pytest.importorskip("wandb")
    script = f"""
import logging
from pathlib import Path
from trainer.metrics import open_recorder
logging.basicConfig(level=logging.INFO, format="%(message)s")
with open_recorder(Path({str(tmp_path)!r}), next_index=0, wandb=True) as recorder:
    recorder.add("train", 0, loss=1.0)
"""
    variables = {"HOME": str(tmp_path), "PATH": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, cwd=ROOT, env=variables | {"WANDB_API_KEY": "0" * 40}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases does not answer: " in done.stderr
    kept = json.loads((tmp_path / WANDB_NAME).read_text())["id"]
    (run,) = runs(tmp_path)
    assert f"wandb sync --id {kept} {run}" in done.stderr
    assert [row["train/loss"] for row in rows_of(run, 1)] == [1.0]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0]


def test_an_id_is_kept_and_found_again(tmp_path):
    made = new_run_id(tmp_path)
    assert run_id(tmp_path) == made
    assert new_run_id(tmp_path) != made
    assert run_id(tmp_path / "never-tracked") == run_id(tmp_path / "never-tracked")


@pytest.mark.parametrize("text", ["[]", "{}", '{"id": 7}', '{"id": "a/b"}', '{"id": ""}'])
def test_a_file_that_holds_no_id_is_named_with_the_way_out(tmp_path, text):
    (tmp_path / WANDB_NAME).write_text(text)
    with pytest.raises(StorageError, match=r"wandb\.json holds no id .*: delete it"):
        run_id(tmp_path)
