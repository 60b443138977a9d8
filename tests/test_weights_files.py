"""Files of weights that training loops write: what lies beside the weights is ignored, and what needs code is refused by name."""

import argparse
import collections
import datetime
import os
import pathlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from support.builders import write_tars
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV2, NativeScaler
from torch import nn

import cli
from pipeline.errors import CheckpointError
from pipeline.weights import read_tensors
from trainer.student import create_student
from trainer.weights import start_from

WEIGHTS = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.tensor([1, 2], dtype=torch.float16)}
FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


class Own:
    """A class of somebody's training loop."""


class Scores(np.ndarray):
    """A kind of array of somebody's training loop."""


class Escape:
    """A class whose name would clear the terminal."""


Escape.__qualname__ = Escape.__name__ = "\x1b[2J"
globals()["\x1b[2J"] = Escape


def saved(path: Path, value: Any, *, new: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=new)
    return path


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


BESIDE = [
    # what lies beside the weights, value
    ("best accuracy", np.float64(81.2)),
    ("loss", np.float32(0.3)),
    ("epoch", np.int64(299)),
    ("flag", np.bool_(True)),
    ("history", np.arange(5.0)),
    ("history by columns", np.asfortranarray(np.zeros((2, 3), np.float32))),
    ("big endian", np.arange(3, dtype=">i4")),
    ("names", np.array(["ant", "bee"])),
    ("name", np.str_("ant")),
    ("objects", np.array([None, {"a": 1}], object)),
    ("table", np.zeros(2, [("epoch", "i4"), ("top1", "f8")])),
    ("date", np.datetime64("2020-12-23")),
    ("dtype", np.dtype("f4")),
    ("random state", np.random.default_rng(0).bit_generator.state),
    ("state of the old generator", np.random.RandomState(0).get_state()),
    ("nested", {"val": [(1, np.float64(2)), {"best": np.zeros(2)}]}),
    ("arguments", argparse.Namespace(lr=1e-3, mean=np.float64(0.5), betas=(0.9, 0.99))),
    ("plain", {"counter": collections.Counter("ab"), "set": {1}, "bytes": b"\xff", "big": 2**70, "none": None}),
]


@FORMATS
@pytest.mark.parametrize("value", [value for _, value in BESIDE], ids=[name for name, _ in BESIDE])
def test_what_lies_beside_the_weights_is_ignored(tmp_path, value, new):
    before = torch.serialization.get_safe_globals()
    for key in ("model", "state_dict"):
        path = saved(tmp_path / "w.pth", {"x": value, key: WEIGHTS, "y": value}, new=new)
        assert same(read_tensors(path), WEIGHTS)
    assert set(torch.serialization.get_safe_globals()) == set(before)  # allowed for this file, not for the process


def test_files_that_numpy_1_wrote_are_read(tmp_path):
    saved(tmp_path / "new.pth", {"model": WEIGHTS, "best": np.float64(81.2), "history": np.arange(5.0)})
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "w.pth", "w") as old:
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"numpy._core.multiarray") == 2
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, data)
    assert same(read_tensors(tmp_path / "w.pth"), WEIGHTS)


def trained() -> tuple[nn.Module, torch.optim.Optimizer, ModelEmaV2]:
    """A network after one update, so that its average has other weights and the optimizer has a state."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    average = ModelEmaV2(network)
    optimizer = create_optimizer_v2(network, "adamw", lr=0.1)
    network(torch.randn(2, 3, 160, 160)).square().sum().backward()
    optimizer.step()
    return network, optimizer, average


def test_what_timms_saver_writes_is_read(tmp_path):
    network, optimizer, average = trained()
    args = argparse.Namespace(model="test_vit", lr=0.1, mean=None, class_map="", opt_betas=[0.9, 0.99])
    parts = {"args": args, "amp_scaler": NativeScaler(device="cpu"), "checkpoint_dir": str(tmp_path)}
    CheckpointSaver(network, optimizer, **parts).save_checkpoint(0, metric=np.float64(77.1))
    assert same(read_tensors(tmp_path / "model_best.pth.tar"), network.state_dict())
    saver = CheckpointSaver(network, optimizer, model_ema=average, **parts)
    saver.save_checkpoint(0, metric=np.float64(77.1))
    saver.save_checkpoint(1, metric=np.float64(78.1))  # the first one's metric stands in its history
    for name in ("last", "model_best", "checkpoint-0"):
        assert same(read_tensors(tmp_path / f"{name}.pth.tar"), average.module.state_dict())


@FORMATS
def test_what_deits_training_loop_writes_starts_a_student(tmp_path, new):
    """The layout of facebookresearch/deit, main.py; the average of the weights is preferred, as in timm."""
    network, optimizer, average = trained()
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=10, warmup_epochs=2)
    schedule.step(1)
    state = {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": np.int64(1),
        "model_ema": average.module.state_dict(),
        "scaler": NativeScaler(device="cpu").state_dict(),
        "args": argparse.Namespace(model="test_vit", output_dir="", max_accuracy=np.float64(77.1)),
    }
    student = create_student("test_vit", num_classes=3)
    assert start_from(student, saved(tmp_path / "checkpoint.pth", state, new=new)) == []
    assert same(student.model.state_dict(), average.module.state_dict())
    assert not same(network.state_dict(), average.module.state_dict())


NEEDS_CODE = [
    # value, what the error must name
    (Own(), f"{__name__}.Own"),
    (argparse.Namespace(out=pathlib.PosixPath("x")), f"{pathlib.PosixPath.__module__}.PosixPath"),
    (datetime.datetime(2020, 12, 23), "datetime.datetime"),
    (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (np.random.default_rng(0), "numpy.random._pickle.__generator_ctor"),
    (np.zeros(2).view(Scores), f"{__name__}.Scores"),
    (np.ma.array([1.0]), "numpy.ma.core._mareconstruct"),
    (np.array([Own()], object), f"{__name__}.Own"),
    (max, "max"),
    (os.system, "posix.system"),  # of a module that torch blocks in any case
]


@FORMATS
@pytest.mark.parametrize(("value", "named"), NEEDS_CODE, ids=[named for _, named in NEEDS_CODE])
def test_what_needs_code_to_load_is_refused_by_its_name(tmp_path, value, named, new):
    path = saved(tmp_path / "w.pth", {"model": WEIGHTS, "x": value}, new=new)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert str(caught.value) == (
        f"{path} cannot be read as plain tensors: it holds {named}, which needs code to load."
        " Load it where you trust it, and save the state dict alone, best as safetensors"
    )


@FORMATS
def test_a_name_that_writes_to_the_terminal_is_not_said(tmp_path, new):
    path = saved(tmp_path / "w.pth", {"model": WEIGHTS, "x": Escape()}, new=new)
    assert b"\x1b[2J" in path.read_bytes()
    with pytest.raises(CheckpointError, match=r"holds no state dict as torch\.save writes it") as caught:
        read_tensors(path)
    assert "\x1b" not in str(caught.value)


NO_STATE = [
    # value, options of torch.save, text
    (
        {"model": WEIGHTS},
        {"pickle_protocol": 4},
        "holds no state dict as torch.save writes it. Fetch it again, or load",
    ),
    ([1, 2], {}, "holds no state dict as torch.save writes it"),
    (torch.zeros(2), {}, "holds no state dict as torch.save writes it"),
    ({"model": {"w": np.zeros(2)}}, {}, "holds no state dict: w is not a tensor. It must stand alone, or under"),
    ({"net": WEIGHTS, "epoch": 3}, {}, "holds no state dict: net is not a tensor. It must stand alone, or under"),
    ({"model": {}}, {}, "holds no state dict: it is empty"),
]


@pytest.mark.parametrize(("value", "options", "text"), NO_STATE, ids=range(len(NO_STATE)))
def test_what_is_no_state_dict_is_refused_with_a_way_out(tmp_path, value, options, text):
    torch.save(value, tmp_path / "w.pth", **options)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "w.pth")
    assert text in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_the_command_line_says_it_in_one_line(tmp_path):
    saved(tmp_path / "w.pth", {"model": WEIGHTS, "args": Own()})
    data = write_tars(tmp_path / "data")
    asked = ["--distillation-type", "none", "--data", data, "--output", str(tmp_path / "run"), "--device", "cpu"]
    asked += ["--model", "test_vit", "--set", "img_size=32", "--init", str(tmp_path / "w.pth")]
    result = CliRunner().invoke(cli.commands, ["train", *asked])
    assert isinstance(result.exception, CheckpointError), result.exception
    text = str(result.exception)
    assert f"w.pth cannot be read as plain tensors: it holds {__name__}.Own, which needs code to load. Load" in text
    assert "\n" not in text
    assert ".." not in text
