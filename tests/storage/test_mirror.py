"""Labels and runs that are written to a URL: worked on in a local folder, kept in step with a bucket."""

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support.builders import before_update, interrupt, make_labels, named_files, small_recipe, small_teacher, write_tars
from support.label_sets import problems_in
from support.s3_server import BUCKET, S3, credentials
from support.training import TINY, state_of

from pipeline.errors import LabelSetMismatch, RemoteFileMissing, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1 import loop as labelling
from pipeline.stage1 import precompute as stage1
from pipeline.stage1.precompute import precompute
from pipeline.storage import mirror, remote
from pipeline.storage.mirror import ChangedElsewhere
from pipeline.weights import weights_here
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.loop import train

SETTINGS: dict[str, Any] = {"views": (0, 4), "views_per_shard": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (9, 8))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """The files of a set that was made in a local folder."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    make_labels(folder, data, **SETTINGS)
    return named_files(folder)


@pytest.fixture
def bucket(request, monkeypatch):
    """An empty folder in a store in memory, or in a real one."""
    if getattr(request, "param", "memory") == "s3":
        credentials(monkeypatch, request.getfixturevalue("store"))
        yield f"s3://{BUCKET}/{request.node.originalname}"
        return
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield "memory://bucket"
    system.store.clear()


EVERYWHERE = pytest.mark.parametrize("bucket", ["memory", S3], indirect=True)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Become another machine: one whose caches are empty."""

    def become(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{name}"))

    become("a")
    return become


def at(url: str) -> dict[str, bytes]:
    return {name: remote.read_url(f"{url}/{name}", max_bytes=1 << 24) for name in remote.list_tree(url)}


def label(out: str, data: str, **changes: Any) -> LabelSet | None:
    """Run stage 1 as one rank of perhaps several, which may not be the one that seals."""
    torch.set_num_threads(1)
    source = open_source(data)
    values = {"topk": 2, "workers": 0, "batch_size": 8, "accuracy_samples": 0} | SETTINGS | changes
    return precompute(PrecomputeConfig(data=data, out=out, **values), small_recipe(), small_teacher(source), source)


def list_nothing_at_first(monkeypatch) -> None:
    """Make the store answer the first question for its files with a list of long ago."""
    real, asked = remote.list_tree, []

    def list_tree(url: str) -> dict[str, str]:
        asked.append(url)
        return real(url) if asked[1:] else {}

    monkeypatch.setattr(remote, "list_tree", list_tree)


@EVERYWHERE
def test_a_set_that_is_written_to_a_bucket_is_the_set_of_a_folder_to_the_byte(data, whole, bucket):
    label_set = label(f"{bucket}/set", data)
    assert label_set is not None
    assert at(f"{bucket}/set") == whole


@EVERYWHERE
def test_another_machine_finds_a_sealed_set_and_asks_the_teacher_nothing(data, whole, bucket, machine, monkeypatch):
    label(f"{bucket}/set", data)
    machine("b")
    monkeypatch.setattr(labelling, "publish_draft", lambda *_: pytest.fail("a label shard was made again"))
    assert label(f"{bucket}/set", data) is not None
    assert at(f"{bucket}/set") == whole


@EVERYWHERE
def test_machines_without_a_common_folder_share_the_work_through_a_bucket(data, whole, bucket, machine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert label(f"{bucket}/set", data) is None
    assert "manifest.json" not in at(f"{bucket}/set")
    machine("b")
    monkeypatch.setenv("RANK", "1")
    assert label(f"{bucket}/set", data) is not None
    assert at(f"{bucket}/set") == whole


def test_a_killed_run_goes_on_on_another_machine_with_what_was_sent(data, whole, bucket, machine, monkeypatch):
    real, made = labelling.publish_draft, []

    def publish(*args: Any) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(labelling, "publish_draft", publish)
        with pytest.raises(KeyboardInterrupt):
            label(f"{bucket}/set", data)
    sent = [name for name in at(f"{bucket}/set") if name.startswith("labels/")]
    assert len(sent) == 2
    machine("b")
    assert label(f"{bucket}/set", data) is not None
    assert at(f"{bucket}/set") == whole


@EVERYWHERE
def test_fault_15_an_old_listing_costs_work_and_nothing_else(data, whole, bucket, machine, monkeypatch):
    label(f"{bucket}/set", data)
    machine("b")
    list_nothing_at_first(monkeypatch)
    monkeypatch.setattr(labelling, "device_name", lambda device: "another processor")  # so that files differ
    label_set = label(f"{bucket}/set", data)
    assert label_set is not None
    assert at(f"{bucket}/set") == whole  # the first writer's files, and a manifest of those
    assert problems_in(label_set) == []


def test_other_images_under_the_same_keys_are_refused_when_another_machine_was_first(
    data, bucket, machine, monkeypatch, tmp_path
):
    label(f"{bucket}/set", data)
    before = at(f"{bucket}/set")
    machine("b")
    other = write_tars(tmp_path / "other", (9, 8), bad=(3,))
    list_nothing_at_first(monkeypatch)
    with pytest.raises(
        LabelSetMismatch, match=r"samples/train-000000.parquet: another machine has labelled other images"
    ):
        label(f"{bucket}/set", other, on_bad_image="skip")
    assert at(f"{bucket}/set") == before


@EVERYWHERE
def test_two_machines_that_seal_other_views_at_the_same_time_lose_none(data, whole, bucket, machine, monkeypatch):
    real = stage1.seal

    def seal_late(*args: Any, **how: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(stage1, "seal", real)
            machine("b")
            label(f"{bucket}/set", data, views=(2, 4))
        machine("a")
        monkeypatch.setattr(stage1, "seal", real)
        real(*args, **how)

    monkeypatch.setattr(stage1, "seal", seal_late)
    label_set = label(f"{bucket}/set", data, views=(0, 2))
    assert label_set is not None
    assert label_set.views == range(4)
    assert LabelSet.open(f"{bucket}/set").views == range(4)
    assert at(f"{bucket}/set").keys() == whole.keys()


@EVERYWHERE
def test_a_self_contained_set_is_sent_with_its_images_and_its_card(data, bucket, machine, tmp_path):
    make_labels(tmp_path / "set", data, include_images="20", **SETTINGS)
    label(f"{bucket}/set", data, include_images="20")
    assert at(f"{bucket}/set") == named_files(tmp_path / "set")
    machine("b")
    more = label(f"{bucket}/set", str(tmp_path / "set/images"), views=(4, 6))  # another machine, without the source
    assert more is not None
    assert more.has_images
    assert b"**Views** 0..5" in at(f"{bucket}/set")["README.md"]
    far = LabelSet.open(f"{bucket}/set")
    assert far.open_source().shard("train-000001").keys == open_source(data).shard("train-000001").keys
    assert problems_in(far) == []


def test_machines_that_pack_images_differently_are_stopped(data, bucket, monkeypatch):
    """The other machine's tar appears in the bucket after this one has looked, and has other bytes."""
    list_nothing_at_first(monkeypatch)
    fsspec.filesystem("memory").pipe("/bucket/set/images/train-000000.tar", b"another Pillow's")
    with pytest.raises(LabelSetMismatch, match=r"another machine has packed other images, or has used another Pillow"):
        label(f"{bucket}/set", data, include_images="20")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/set", "https://host/set"])
def test_a_web_server_is_no_place_to_write_to(data, url):
    with pytest.raises(UsageError, match=r"a web server takes no files\. Write to a bucket"):
        label(url, data)
    with pytest.raises(UsageError, match="a web server takes no files"):
        train(TrainConfig(output=url, distillation_type="none", data=data))


def test_ray_workers_would_write_elsewhere(data, bucket):
    with pytest.raises(UsageError, match="--engine ray needs an --out folder that all its machines share"):
        label(f"{bucket}/set", data, engine="ray")


# Runs


@pytest.fixture(scope="module")
def label_set(data, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", data)


def config(label_set: LabelSet, output: Any, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"batch_size": 6, "epochs": 2, "lr": 1e-3, "workers": 0, "log_interval": 1}
    return TrainConfig(output=output, labels=str(label_set.folder), **(values | TINY | changes))


def fetched(url: str, folder: Path) -> Path:
    for name, content in at(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def assert_same_run(url: str, local: Path, scratch: Path) -> None:
    mine, theirs = state_of(fetched(url, scratch)), state_of(local)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def run(label_set, tmp_path_factory) -> Path:
    return train(config(label_set, tmp_path_factory.mktemp("run") / "run"))


@EVERYWHERE
def test_a_run_that_is_written_to_a_bucket_is_the_run_of_a_folder(label_set, run, bucket, tmp_path):
    train(config(label_set, f"{bucket}/run"))
    assert_same_run(f"{bucket}/run", run, tmp_path / "fetched")
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert at(f"{bucket}/run").keys() == {name for name in names if not name.endswith("lock")}


@EVERYWHERE
def test_a_stopped_run_goes_on_on_another_machine(label_set, run, bucket, machine, tmp_path):
    with before_update(3, interrupt), pytest.raises(KeyboardInterrupt):
        train(config(label_set, f"{bucket}/run"))
    machine("b")
    train(config(label_set, f"{bucket}/run", resume="auto"))
    assert_same_run(f"{bucket}/run", run, tmp_path / "fetched")


def test_a_state_that_was_not_sent_before_the_machine_died_is_sent_by_the_next_start(
    label_set, run, bucket, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, "send", lambda *_, **__: None)
        with before_update(3, interrupt), pytest.raises(KeyboardInterrupt):
            train(config(label_set, f"{bucket}/run", recovery_interval=1))
    assert at(f"{bucket}/run") == {}
    train(config(label_set, f"{bucket}/run", resume="auto"))
    assert_same_run(f"{bucket}/run", run, tmp_path / "fetched")


def test_a_run_in_the_bucket_is_not_begun_again_unasked(label_set, bucket, machine):
    train(config(label_set, f"{bucket}/run"))
    machine("b")
    with pytest.raises(UsageError, match=rf"{bucket}/run already holds a run\. Continue it with --resume"):
        train(config(label_set, f"{bucket}/run"))


def test_a_run_that_was_deleted_in_the_bucket_is_gone_here_too(label_set, run, bucket, tmp_path):
    train(config(label_set, f"{bucket}/run", seed=1))
    fsspec.filesystem("memory").rm("/bucket/run", recursive=True)
    train(config(label_set, f"{bucket}/run"))
    assert_same_run(f"{bucket}/run", run, tmp_path / "fetched")


@EVERYWHERE
def test_fault_5_two_machines_that_train_one_run_do_not_mix(label_set, bucket, machine, tmp_path):
    began = []

    def intrude() -> None:
        if began:  # the intruder itself
            return
        began.append(1)
        machine("b")
        train(config(label_set, f"{bucket}/run", seed=1))
        machine("a")

    with before_update(1, intrude), pytest.raises(ChangedElsewhere, match="only one run may write to"):
        train(config(label_set, f"{bucket}/run"))
    folder = fetched(f"{bucket}/run", tmp_path / "fetched")
    assert load_state(folder / "state.safetensors")[1]["config"]["seed"] == 1


def test_weights_behind_a_url_start_another_run_and_are_brought_each_time(label_set, run, bucket, tmp_path):
    train(config(label_set, f"{bucket}/run"))
    folder = weights_here(f"{bucket}/run/last")
    assert (folder / "model.safetensors").read_bytes() == (run / "last" / "model.safetensors").read_bytes()
    assert (folder / "config.json").read_bytes() == (run / "last" / "config.json").read_bytes()
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/run/last/model.safetensors", b"another")
    system.rm_file("/bucket/run/last/config.json")
    assert (weights_here(f"{bucket}/run/last") / "model.safetensors").read_bytes() == b"another"
    assert not (folder / "config.json").exists()
    assert weights_here(f"{bucket}/run/last/model.safetensors").read_bytes() == b"another"
    with pytest.raises(RemoteFileMissing, match="there is no such file"):
        weights_here(f"{bucket}/nothing")
    shutil.rmtree(run.parent / "copy", ignore_errors=True)
    train(config(label_set, run.parent / "copy", init=str(run / "last"), epochs=1))
