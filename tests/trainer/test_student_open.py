"""Opening a trained student: what a run exported, a file of weights, and whatever else a user may point at."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from support.builders import make_labels, write_tars
from torch import nn

from pipeline.errors import CheckpointError, UsageError
from trainer.config import TrainConfig
from trainer.evaluate import centre_recipe
from trainer.export import export_model, hub_config
from trainer.loop import train
from trainer.student import Student, create_student, open_student

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
NAMES = ("ant", "bee", "cat")


def small_student(model: str = "deit-ti", **changes) -> Student:
    torch.manual_seed(0)
    shape = TINY if "deit" in model else {}
    student = create_student(model, num_classes=3, **({"img_size": 16, "class_names": NAMES} | shape | changes))
    for name in ("head", "head_dist"):  # timm starts DeiT's heads at zero: other weights would not show
        if isinstance(getattr(student.model, name, None), nn.Linear):
            nn.init.normal_(getattr(student.model, name).weight)
    return student.eval()


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(5))


def export(folder: Path, student: Student) -> Path:
    export_model(folder, student.model.state_dict(), hub_config=hub_config(student))
    return folder


def assert_same_answers(one: Student, other: Student, size: int = 16) -> None:
    with torch.no_grad():
        mine, theirs = one.eval()(images(size)), other.eval()(images(size))
    assert torch.equal(mine.class_logits, theirs.class_logits)
    assert (mine.distill_logits is None) is (theirs.distill_logits is None)
    if mine.distill_logits is not None and theirs.distill_logits is not None:
        assert torch.equal(mine.distill_logits, theirs.distill_logits)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("run") / "last", small_student())


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the export, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "last"))


# --- folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("deit-ti", 16),  # two heads
        ("deit_tiny_patch16_224", 16),  # one
        ("test_resnet", 24),  # takes any size, and remembers this one
        ("levit_128s", 64),  # two heads on one pooled vector
    ],
)
def test_a_folder_opens_as_the_student_that_was_exported(tmp_path, model, size):
    student = small_student(model, img_size=size)
    opened = open_student(export(tmp_path / "last", student))
    assert_same_answers(opened, student, size)
    attributes = ("img_size", "num_classes", "class_names", "has_distillation_head", "mean", "std")
    assert [getattr(opened, name) for name in attributes] == [getattr(student, name) for name in attributes]


def test_class_names_come_along_or_are_none(tmp_path):
    assert open_student(export(tmp_path / "named", small_student())).class_names == NAMES
    assert open_student(export(tmp_path / "plain", small_student(class_names=None))).class_names is None


def test_the_normalisation_that_the_student_was_trained_with_comes_along(tmp_path):
    student = small_student()
    student.model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    opened = open_student(export(tmp_path / "last", student))
    assert (opened.mean, opened.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "run#2",  # no fragment
        "run?x=1",  # no query
        "100%25",  # no escape
        "a:b",  # no scheme
        "läufe",
    ],
)
def test_a_folder_may_have_any_name(exported, tmp_path, name):
    opened = open_student(Path(shutil.copytree(exported, tmp_path / name / "last")))
    assert opened.class_names == NAMES


def test_the_model_is_read_from_the_folder_and_not_from_the_arguments(exported):
    opened = open_student(exported, num_classes=7)
    assert opened.num_classes == 3
    assert opened.has_distillation_head


def test_what_contradicts_a_folder_is_refused(exported):
    with pytest.raises(UsageError, match=r"names its own architecture\. Leave out --model test_resnet"):
        open_student(exported, model="test_resnet")
    with pytest.raises(UsageError, match=r"--checkpoint and --pretrained exclude each other\. Pass only one"):
        open_student(exported, pretrained=True)


def test_other_files_beside_the_two_are_not_read(folder):
    state = {name: torch.zeros_like(value) for name, value in small_student().model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    assert_same_answers(open_student(folder), small_student())


def test_the_crop_that_a_run_evaluates_with_survives_its_export(tmp_path):
    data = write_tars(tmp_path / "data", (8,))
    labels = make_labels(tmp_path / "set", data, views=(0, 1))
    settings: dict[str, Any] = {
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": 8,
        "workers": 0,
        "model": "deit-ti",
        **TINY,
    }
    run = train(TrainConfig(labels=labels.folder, output=tmp_path / "run", crop_pct=0.55, eval_data=data, **settings))
    for name in ("last", "last-ema", "best"):
        assert json.loads((run / name / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.55
        student = open_student(run / name)
        assert centre_recipe(student, None).crop_pct == 0.55
        assert timm.data.resolve_model_data_config(student.model)["crop_pct"] == 0.55
    assert centre_recipe(small_student(), None).crop_pct == 0.9  # another student of the same model has timm's


# --- folders that are not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [("config.json",), ("model.safetensors",), ("config.json", "model.safetensors")])
def test_a_folder_without_the_two_files_is_refused_with_where_they_are_kept(folder, missing):
    for name in missing:
        (folder / name).unlink()
    text = f"{folder} is not an exported model: it must hold config.json and model.safetensors. Pass last/ or best/ of a run"
    with pytest.raises(CheckpointError, match=f"^{re.escape(text)}$"):
        open_student(folder)


def other_depth(weights: Path) -> None:
    safetensors.torch.save_file(small_student(depth=2).model.state_dict(), weights)


def other_width(weights: Path) -> None:
    safetensors.torch.save_file(small_student(embed_dim=64).model.state_dict(), weights)


def other_classes(weights: Path) -> None:
    safetensors.torch.save_file(
        create_student("deit-ti", num_classes=5, img_size=16, **TINY).model.state_dict(), weights
    )


def pickled(weights: Path) -> None:
    torch.save(small_student().model.state_dict(), weights)


NO_SAFETENSORS = "it is damaged, or not a safetensors file. Fetch or export it again"
DAMAGED_WEIGHTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("empty", lambda path: path.write_bytes(b""), NO_SAFETENSORS),
    ("cut", lambda path: path.write_bytes(path.read_bytes()[:-100]), NO_SAFETENSORS),
    ("longer", lambda path: path.write_bytes(path.read_bytes() + b"\0"), NO_SAFETENSORS),
    ("header", lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), NO_SAFETENSORS),
    ("a pickle under its name", pickled, NO_SAFETENSORS),
    ("deeper", other_depth, "another architecture"),
    ("wider", other_width, "this model needs"),
    ("five classes", other_classes, "has 5 classes, this run needs 3"),
]


@pytest.mark.parametrize(
    ("damage", "kind"), [row[1:] for row in DAMAGED_WEIGHTS], ids=[row[0] for row in DAMAGED_WEIGHTS]
)
def test_damaged_weights_are_refused_by_name_in_one_line(folder, damage, kind):
    damage(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(folder))}/model.safetensors.*{re.escape(kind)}"
    ) as caught:
        open_student(folder)
    assert "\n" not in str(caught.value)


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: {key: value for key, value in config.items() if key != name}


def with_cfg(**changes) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config | {"pretrained_cfg": config["pretrained_cfg"] | changes}


def with_args(**changes) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config | {"model_args": config["model_args"] | changes}


DAMAGED_CONFIGS = [
    # what, how, what is said
    ("a list", lambda config: [config], r"/config\.json must hold an object, got list"),
    ("nothing", lambda config: {}, r" cannot be loaded \(KeyError\): 'architecture'"),
    ("no architecture", without("architecture"), r" cannot be loaded \(KeyError\): 'architecture'"),
    (
        "unknown",
        lambda config: config | {"architecture": "deit_huge"},
        r" cannot be loaded .*Unknown model \(deit_huge\)",
    ),
    ("no sizes", without("model_args"), r".* lacks blocks.*another architecture"),
    ("other sizes", with_args(embed_dim=64), r".*: cls_token has shape \[1, 1, 32\], this model needs \[1, 1, 64\]"),
    ("no input size", with_cfg(input_size=None), r" cannot be loaded \(TypeError\): "),
    ("no mean", with_cfg(mean=None), r" cannot be loaded \((KeyError|TypeError)\): "),
    ("no std", with_cfg(std=None), r" cannot be loaded \((KeyError|TypeError)\): "),
    ("more classes than the weights", with_args(num_classes=5), ".* classes"),
    ("smaller patches than the weights", with_args(patch_size=4), ".* has shape .*, this model needs"),
]


@pytest.mark.parametrize(("what", "damage", "text"), DAMAGED_CONFIGS)
def test_a_damaged_configuration_is_refused_by_name_in_one_line(folder, what, damage, text):
    path = folder / "config.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(folder))}{text}") as caught:
        open_student(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b'{"architecture": "deit', b"\xff\xfe"])
def test_a_configuration_that_is_no_json_is_refused_by_name(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"last/config\.json: not valid JSON: ."):
        open_student(folder)


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_opens_with_the_model_it_belongs_to(tmp_path, suffix):
    student = small_student("test_resnet", img_size=160, class_names=None)
    path = tmp_path / f"weights.{suffix}"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(student.model.state_dict(), path)
    opened = open_student(path, model="test_resnet", num_classes=3)
    assert_same_answers(opened, student, 160)
    assert opened.class_names is None
    assert opened.img_size == 160  # the model's own


def test_a_file_has_the_models_own_classes_where_none_are_said(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), path)
    assert open_student(path, model="test_resnet").num_classes == 1000


REFUSED = [
    # checkpoint, arguments, error, text
    (
        "weights",
        {},
        UsageError,
        r"the architecture is unknown: a file of weights does not name it\. Pass --model NAME, or a folder with",
    ),
    (
        None,
        {"model": "test_resnet"},
        UsageError,
        r"no weights are given\. Pass --checkpoint, or --pretrained for timm's published weights",
    ),
    ("weights", {"model": "test_resnt"}, UsageError, r"got 'test_resnt'. Did you mean test_resnet"),
    ("weights", {"model": "test_resnet"}, CheckpointError, r"weights: its fc has 3 classes, this run needs 1000"),
    ("weights", {"model": "test_vit", "num_classes": 3}, CheckpointError, r"weights lacks .*another architecture"),
    ("none", {"model": "test_resnet"}, CheckpointError, r"none: no such file or folder"),
    (
        "weights",
        {"model": "test_resnet", "pretrained": True},
        UsageError,
        r"--checkpoint and --pretrained exclude each other\. Pass only one",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "error", "text"), REFUSED, ids=range(len(REFUSED)))
def test_a_file_that_cannot_be_opened_is_refused_with_the_fix(tmp_path, name, arguments, error, text):
    torch.save(small_student("test_resnet").model.state_dict(), tmp_path / "weights")
    with pytest.raises(error, match=text):
        open_student(tmp_path / name if name else None, **arguments)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"run/lost: no such file or folder"):
        open_student(tmp_path / "run/lost")


def test_a_student_for_images_that_are_not_square_is_refused(tmp_path):
    student = small_student()
    weights = student.model.state_dict() | {"pos_embed": torch.zeros(1, 2 + 2 * 4, 32)}  # two rows of four patches
    export_model(tmp_path, weights, hub_config=hub_config(student))
    described = json.loads((tmp_path / "config.json").read_text())
    described["model_args"]["img_size"] = [16, 32]
    described["pretrained_cfg"]["input_size"] = [3, 16, 32]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"a student takes square images, this one takes 16 x 32$"):
        open_student(tmp_path)
