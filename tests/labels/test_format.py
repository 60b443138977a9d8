"""A pin names one manifest by its bytes: everything that reads a label set can be held to it, and a run stays pinned."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.builders import make_labels, write_tars
from support.web_server import web_server

import cli
from pipeline.errors import CheckpointError, LabelSetMismatch, UsageError
from pipeline.labels.format import parse_pin
from pipeline.labels.labelset import LabelSet
from pipeline.storage.cache import Cache
from pipeline.storage.yaml import read_yaml
from trainer.config import TrainConfig
from trainer.loop import train

OTHER = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    return Path(str(make_labels(tmp_path_factory.mktemp("made") / "set", data).folder))


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def pin_of(folder: Path) -> str:
    return "sha256:" + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def settings(labels: Path, output: Path, **changes) -> TrainConfig:
    values = {
        "labels": str(labels),
        "output": output,
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
        "epochs": 2,
        "batch_size": 8,
        "warmup_epochs": 0,
        "repeated_aug": 1,
        "workers": 0,
        "device": "cpu",
        "model_ema": False,
    }
    return TrainConfig(**(values | changes))


def invoke(*arguments: str):
    return CliRunner().invoke(cli.commands, arguments)


@pytest.mark.parametrize(
    "text", ["", "sha256:", "0" * 64, "md5:" + "0" * 32, "sha256:" + "g" * 64, OTHER + "0", OTHER + "\n"]
)
def test_what_is_no_pin_is_a_misuse(text):
    with pytest.raises(
        UsageError, match=r"--expect-manifest must be sha256: and 64 hex digits, as `deit-cli labels info`"
    ):
        parse_pin(text)
    with pytest.raises(UsageError, match="--expect-manifest must be"):
        TrainConfig(labels="x", expect_manifest=text)


def test_a_pin_without_labels_is_a_misuse():
    with pytest.raises(UsageError, match="--expect-manifest names the manifest of --labels"):
        TrainConfig(distillation_type="none", data="x", expect_manifest=OTHER)


def test_the_pinned_set_opens_and_another_is_refused_with_both(made):
    assert LabelSet.open(made, expect_manifest=pin_of(made)).manifest_sha256 == pin_of(made)[7:]
    assert LabelSet.open(made, expect_manifest=pin_of(made).upper().replace("SHA", "sha")).manifest.sealed
    with pytest.raises(LabelSetMismatch) as caught:
        LabelSet.open(made, expect_manifest=OTHER)
    text = str(caught.value)
    assert text.startswith(
        f"{made / 'manifest.json'} is not the pinned manifest: --expect-manifest says {OTHER}, it has {pin_of(made)}."
    )
    assert "deit-cli labels pull" in text


def test_the_pin_is_of_the_bytes_that_are_parsed_from_a_url_too(made, tmp_path):
    cache = Cache(tmp_path / "cache", 10**9)
    with web_server(Path(shutil.copytree(made, tmp_path / "web"))) as server:
        assert LabelSet.open(server.url, cache=cache, expect_manifest=pin_of(made)).manifest_sha256 == pin_of(made)[7:]
        with pytest.raises(LabelSetMismatch, match=rf"{server.url}/manifest\.json is not the pinned manifest"):
            LabelSet.open(server.url, cache=cache, expect_manifest=OTHER)


def test_the_pin_is_held_before_the_manifest_is_parsed(copied):
    pin = pin_of(copied)
    (copied / "manifest.json").write_bytes(b"{")
    with pytest.raises(LabelSetMismatch, match="is not the pinned manifest"):
        LabelSet.open(copied, expect_manifest=pin)


def test_info_prints_the_pin_and_takes_one(made):
    assert f"manifest       {pin_of(made)}\n" in invoke("labels", "info", str(made)).stdout
    pinned = invoke("labels", "info", str(made), "--json", "--expect-manifest", pin_of(made))
    assert json.loads(pinned.stdout)["manifest"] == pin_of(made)
    refused = invoke("labels", "info", str(made), "--expect-manifest", OTHER)
    assert isinstance(refused.exception, LabelSetMismatch)


def test_evaluate_takes_a_pin(made, tmp_path):
    refused = invoke("evaluate", "--checkpoint", str(tmp_path), "--labels", str(made), "--expect-manifest", OTHER)
    assert isinstance(refused.exception, LabelSetMismatch)


def test_training_refuses_another_manifest_before_anything_is_written(made, tmp_path):
    with pytest.raises(LabelSetMismatch, match="is not the pinned manifest"):
        train(settings(made, tmp_path / "run", expect_manifest=OTHER))
    assert not (tmp_path / "run").exists()


def grown(folder: Path, data: str) -> str:
    """Label more views: the same label set under another manifest. Return its pin."""
    make_labels(folder, data, views=(3, 4))
    return pin_of(folder)


def test_a_run_stays_pinned(copied, data, tmp_path):
    pin, run = pin_of(copied), tmp_path / "run"
    train(settings(copied, run, expect_manifest=pin))
    assert read_yaml(run / "config.yaml")["expect_manifest"] == pin
    assert json.loads((run / "config.json").read_text())["config"]["expect_manifest"] == pin
    again = settings(copied, run, expect_manifest=pin, resume="auto")
    train(again)  # there is nothing left to do, and nothing to refuse
    new = grown(copied, data)
    with pytest.raises(LabelSetMismatch, match=f"--expect-manifest says {pin}, it has {new}"):
        train(again)
    with pytest.raises(
        CheckpointError, match=rf"a run that is pinned to a manifest\. Pass --expect-manifest {pin}, or"
    ):
        train(settings(copied, run, resume="auto", views=(0, 3)))
    train(settings(copied, run, resume="auto", views=(0, 3), expect_manifest=new))  # a new pin is a decision


def test_a_run_may_be_pinned_later(made, tmp_path):
    train(settings(made, tmp_path / "run"))
    train(settings(made, tmp_path / "run", expect_manifest=pin_of(made), resume="auto"))


def test_a_yaml_file_may_hold_the_pin(made, tmp_path):
    (tmp_path / "c.yaml").write_text(f"labels: {made}\nexpect_manifest: {OTHER}\n")
    refused = invoke("train", "-c", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run"))
    assert isinstance(refused.exception, LabelSetMismatch)
