"""`deit-cli init`: its files are taken as they are, its reasons hold, and a wrong answer is asked for again."""

import dataclasses
import fcntl
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from support.builders import encoded, photo, with_checkout, write_unlabelled
from support.commands import invoke

import cli
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe, read_settings
from pipeline.settings.options import split_values
from pipeline.settings.questions import Questions
from trainer.advice import asking
from trainer.advice.answers import Answers, Images, Machine
from trainer.advice.commands import later_commands
from trainer.advice.files import settings_files
from trainer.config import TrainConfig

TEACHER = "support.builders:confident_cnn"  # three classes
CPU = Machine(gpus=(), gpu_bytes=0, cores=2, memory_bytes=8 * 10**9)


def write_folder(folder: Path, number: int, first: int = 0, size: int = 24) -> str:
    """Write an image folder of three classes."""
    for place, name in enumerate(("cat", "dog", "emu")):
        (folder / name).mkdir(parents=True)
        for each in range(number):
            pixels = photo(first + 100 * place + each, size, size + 8)
            (folder / name / f"{each}.png").write_bytes(encoded(pixels, "PNG"))
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder with pets/train and pets/val."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder / "pets/train", 8)
    write_folder(folder / "pets/val", 2, first=1000)
    return folder


@pytest.fixture
def here(images, tmp_path, monkeypatch) -> Path:
    """Return the current folder, which has the images in pets/."""
    (tmp_path / "pets").symlink_to(images / "pets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_run_as_they_are(here):
    code, shown = invoke(
        "init", "mine", "--data", "pets/train", "--teacher", TEACHER, "--epochs", "2", "--views", "1", "--yes"
    )
    assert code == 0, shown
    assert "read them, then run" in shown
    assert sorted(path.name for path in Path("mine").iterdir()) == ["precompute.yaml", "train.yaml"]
    assert read_settings(Path("mine/train.yaml"), TrainConfig)["eval_data"] == "pets/val"  # found beside train
    assert invoke("precompute", "-c", "mine/precompute.yaml", "-j", "0", "--device", "cpu")[0] == 0
    code, shown = invoke("train", "-c", "mine/train.yaml", "-j", "0", "--device", "cpu")
    assert code == 0, shown
    assert "trained 2 epochs" in shown
    assert "best top-1" in shown
    code, shown = invoke("runs", "mine")
    assert "mine/student" in shown
    assert "finished" in shown


def test_a_published_teacher_with_other_classes_learns_them_first(here):
    code, shown = invoke("init", "mine", "--data", "pets/train", "--teacher", "test_resnet", "--yes")
    assert code == 0, shown
    assert "deit-cli train -c mine/teacher.yaml" in shown.splitlines()[1]
    settings = read_settings(Path("mine/teacher.yaml"), TrainConfig)
    assert settings["model"] == "test_resnet.r160_in1k"
    assert settings["pretrained"] is True
    assert (settings["set"], settings["crop_pct"]) == ({"img_size": 32, "scale": [0.4, 1.0]}, 1.0)
    small = ["-j", "0", "--device", "cpu", "--no-pretrained", "--epochs", "1"]
    code, shown = invoke("train", "-c", "mine/teacher.yaml", *small)
    assert code == 0, shown
    code, shown = invoke("precompute", "-c", "mine/precompute.yaml", "--views", "1", "-j", "0", "--device", "cpu")
    assert code == 0, shown
    teacher = read_settings(Path("mine/precompute.yaml"), PrecomputeConfig, TeacherConfig)["teacher"]
    assert teacher == ("mine/teacher/best",)  # there is evaluation


@pytest.mark.parametrize("teacher", ["test_resnet", "resnet18"])
def test_without_the_hub_nothing_is_pretrained(here, teacher):
    code, shown = invoke(
        "init", "mine", "--data", "pets/train", "--eval-data", "none", "--teacher", teacher, "--no-pretrained", "--yes"
    )
    assert code == 0, shown
    settings = read_settings(Path("mine/teacher.yaml"), TrainConfig)
    assert (settings["pretrained"], settings["lr_base"]) == (False, 0.012)
    assert "pretrained" not in read_settings(Path("mine/train.yaml"), TrainConfig)
    values = read_settings(Path("mine/precompute.yaml"), PrecomputeConfig, TeacherConfig)
    assert values["teacher"] == ("mine/teacher/last",)  # there is no evaluation, and no best/


@pytest.mark.slow
def test_the_commands_that_init_prints_run(here):
    """All of them, as they are printed, quick ones for long ones."""
    asked = ["--data", "pets/train", "--teacher", "test_resnet", "--no-pretrained", "--epochs", "1", "--views", "1"]
    code, shown = invoke("init", "mine", *asked, "--yes", "--json")
    assert code == 0, shown
    made = json.loads(shown[shown.index("{\n") :])
    quick = {"train": ["--epochs", "1"], "estimate": ["--seconds", "0.1"]}
    lines = [shlex.split(line)[1:] for line in made["next"] + made["after"] if "torchrun" not in line]
    assert [" ".join(words[:2]) for words in lines if words[0] in ("labels", "export", "runs")] == [
        "labels show", "export mine/student", "runs mine",
    ]  # fmt: skip
    for words in lines:
        code, shown = invoke(*words, *quick.get(words[0], []))
        assert code == 0, (words, shown)
    for name in ("labels.png", "report.html", "student-timm/model.safetensors"):
        assert Path("mine", name).is_file()


def test_a_teacher_with_the_classes_needs_no_file_of_its_own(here, tmp_path):
    """ImageNet's classes: regnety_160 is DeiT's, and is written with its tag."""
    code, shown = invoke("init", "mine", "--data", "pets/train", "--teacher", "regnety_160", "--yes", "--json")
    assert code == 0, shown
    assert read_settings(Path("mine/teacher.yaml"), TrainConfig)["model"] == "regnety_160.deit_in1k"


# --- bad input --------------------------------------------------------------------------------------------------------


def test_without_a_terminal_the_missing_options_are_named(here):
    code, shown = invoke("init", "mine", "--data", "pets/train", "--epochs", "3")
    assert code == 2
    assert "standard input is no terminal" in shown
    assert "missing: --eval-data, --model, --teacher, --views. Pass them, or --yes" in shown
    assert not Path("mine").exists()


BAD = [
    # options, and the line that they end in
    (["--yes"], 2, "--data has no default"),
    (["--data", "nowhere", "--yes"], 1, "nowhere"),
    (["--data", "pets", "--yes"], 1, "pets"),
    (["--data", "pets/train", "--eval-data", "pets/train", "--yes"], 2, "has the images to learn from"),
    (["--data", "pets/train", "--eval-data", "other", "--yes"], 2, "their names must be equal"),
    (["--data", "pets/train", "--model", "deit-xl", "--yes"], 2, "the student must be a timm model"),
    (["--data", "pets/train", "--teacher", "resnet51", "--yes"], 2, "timm has no model 'resnet51'"),
    (["--data", "pets/train", "--teacher", "mine:nothing", "--yes"], 2, "must be a function that can be imported"),
    (["--data", "pets/train", "--teacher", "exported", "--yes"], 2, "exported has 7 classes, pets/train has 3"),
    (["--data", "pets/train", "--epochs", "0", "--yes"], 2, "--epochs must be in 1..1000000, got 0"),
    (["--data", "plain", "--no-pretrained", "--yes"], 2, "cannot learn from plain, which has no class labels"),
    (["--data", "broken", "--yes"], 1, "broken: none of 3 images that were looked at can be decoded"),
]


@pytest.mark.parametrize(("options", "code", "said"), BAD, ids=[" ".join(options) for options, *_ in BAD])
def test_a_wrong_answer_is_one_line_and_writes_nothing(here, options, code, said):
    shutil.copytree("pets/train/cat", "other/cat")
    shutil.copytree("pets/train/dog", "other/goat")
    write_unlabelled(Path("plain"), Path("labels.csv"), 3)
    Path("exported").mkdir()
    Path("exported/config.json").write_text('{"architecture": "test_resnet", "num_classes": 7}')
    for name in ("cat", "dog", "emu"):
        Path("broken", name).mkdir(parents=True)
        Path("broken", name, "0.png").write_bytes(b"no image")
    ended, shown = invoke("init", "mine", *options)
    assert said in shown
    assert ended == code
    assert not Path("mine").exists()


def test_nothing_is_overwritten_unasked(here):
    Path("mine").mkdir()
    Path("mine/train.yaml").write_text("epochs: 7\n")
    asked = ["init", "mine", "--data", "pets/train", "--teacher", TEACHER, "--yes"]
    code, shown = invoke(*asked)
    assert (code, Path("mine/train.yaml").read_text()) == (2, "epochs: 7\n")
    assert "mine/train.yaml exists. Choose another FOLDER, or pass --overwrite" in shown
    assert list(Path("mine").iterdir()) == [Path("mine/train.yaml")]
    assert invoke(*asked, "--overwrite")[0] == 0
    assert "pets/val" in Path("mine/train.yaml").read_text()


@pytest.mark.parametrize("existing", ["file", "link"])
def test_a_folder_that_is_none(here, existing):
    Path("mine").touch() if existing == "file" else Path("mine").symlink_to("nowhere")
    code, shown = invoke("init", "mine", "--data", "pets/train", "--yes")
    assert (code, shown) == (2, "error: mine is not a folder. Choose another FOLDER")


def test_a_link_to_nowhere_is_not_taken_for_a_written_file(here):
    Path("mine").mkdir()
    Path("mine/train.yaml").symlink_to("nowhere")
    code, shown = invoke("init", "mine", "--data", "pets/train", "--teacher", TEACHER, "--yes")
    assert code == 2
    assert "mine/train.yaml exists" in shown


NAMES = ["two words", "it's \"#: {x}", "new\nepochs: 7", "bell\a", "line\N{LINE SEPARATOR}x", "next\x85x: 1", "图"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_with_any_characters_are_read_back_and_can_be_typed(here, name):
    Path(name).symlink_to("pets")
    data, mine = f"{name}/train", f"{name}-mine"
    code, shown = invoke("init", mine, "--data", data, "--teacher", TEACHER, "--yes", "--json", "-q")
    assert code == 0, shown
    labelling = read_settings(Path(mine, "precompute.yaml"), PrecomputeConfig, TeacherConfig)
    training = read_settings(Path(mine, "train.yaml"), TrainConfig)
    assert (labelling["data"], labelling["out"]) == (data, f"{mine}/labels")
    assert (training["output"], training["eval_data"], training["epochs"]) == (f"{mine}/student", f"{name}/val", 30)
    made = json.loads(shown)
    train, runs = made["next"][-1], made["after"][-1]
    assert shlex.split(train) == ["deit-cli", "train", "-c", f"{mine}/train.yaml"]
    assert shlex.split(runs) == ["deit-cli", "runs", mine]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_wrong_answer_is_asked_for_again(here, monkeypatch):
    monkeypatch.setattr(Questions, "check_askable", lambda *_: None)  # the runner's standard input is no terminal
    typed = ["nowhere", "pets/train", "", "deit-xl", "deit-ti", "resnet51", TEACHER, "many", "0", "4", ""]
    result = CliRunner().invoke(cli.commands, ["init", "mine"], input="\n".join(typed) + "\n")
    assert result.exit_code == 0, result.output
    for said in (
        "nowhere",
        "the student must be a timm model",
        "timm has no model 'resnet51'",
        "got many",
        "1..1000000, got 0",
    ):
        assert f"Error: {said}" in result.stderr or said in result.stderr
    settings = read_settings(Path("mine/train.yaml"), TrainConfig)
    assert (settings["epochs"], settings["model"], settings["eval_data"]) == (4, "deit-ti", "pets/val")
    assert read_settings(Path("mine/precompute.yaml"), PrecomputeConfig, TeacherConfig)["views"] == "0:4"
    assert "pets/train: 24 images, 3 classes, 24 labelled" in Path("mine/train.yaml").read_text()


def test_the_end_of_the_answers_writes_nothing(here, monkeypatch):
    monkeypatch.setattr(Questions, "check_askable", lambda *_: None)
    result = CliRunner().invoke(cli.commands, ["init", "mine"], input="pets/train\n")
    assert result.exit_code == 1  # click's Abort, which main turns into `stopped` and 130
    assert not Path("mine").exists()


def on_terminal(here: Path, answers: list[bytes]) -> tuple[int, bytes]:
    """Run `init` on a terminal of its own, and type an answer after each question; return exit code and what it shows."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "import cli; cli.main()", "init", "mine"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=here, env=with_checkout(), start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    for answer in answers:
        seen = len(shown)
        while not shown[seen:].rstrip(b" ").endswith(b":"):
            shown += os.read(ours, 1024)
        os.write(ours, answer)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            shown += os.read(ours, 1024)
        except OSError:  # the other end is closed
            break
    code = process.wait(30)
    os.close(ours)
    return code, shown


@pytest.mark.slow
def test_on_a_real_terminal(here):
    code, shown = on_terminal(here, [b"pets/train\n", b"none\n", b"\n", f"{TEACHER}\n".encode(), b"2\n", b"\n"])
    assert code == 0, shown
    assert b"How many epochs [" in shown
    assert b"wrote mine/precompute.yaml, mine/train.yaml" in shown
    assert Path("mine/train.yaml").is_file()


@pytest.mark.slow
def test_ctrl_c_at_a_question_writes_nothing(here):
    code, shown = on_terminal(here, [b"pets/train\n", b"\x03"])
    assert code == 130
    assert b"stopped" in shown
    assert b"Traceback" not in shown
    assert not Path("mine").exists()


# --- advice -----------------------------------------------------------------------------------------------------------


def answers(samples: int, *, side: int = 400, model: str = "deit-s", classes: int = 1000, **changes: Any) -> Answers:
    unused: Any = None
    found = Images(
        location="images/train",
        source=unused,
        samples=samples,
        labelled=samples,
        classes=classes,
        side=side,
        looked_at=32,
        bad=(),
    )
    settings = {
        "images": found,
        "evaluation": None,
        "model": model,
        "sizes": asking._sizes(model, found),
        "reading": {},
    }
    settings |= {"teacher": "regnety_160.deit_in1k", "teacher_classes": 1000, "epochs": 300, "views": 300}
    return Answers(**settings | changes)


def gpus(number: int) -> Machine:
    return dataclasses.replace(CPU, gpus=("H200",) * number, gpu_bytes=10**11)


def train_config(tmp_path: Path, given: Answers, machine: Machine) -> TrainConfig:
    (tmp_path / "train.yaml").write_text(settings_files(given, tmp_path, machine)["train.yaml"] or "")
    return TrainConfig(**read_settings(tmp_path / "train.yaml", TrainConfig))


@pytest.mark.parametrize("number", [0, 1, 2, 3, 8, 16])
@pytest.mark.parametrize("model", ["deit-ti", "deit-b"])
def test_imagenet_gets_deits_settings_on_any_number_of_gpus(tmp_path, model, number):
    given = answers(1_281_167, model=model)
    config = train_config(tmp_path, given, gpus(number))
    total = config.batch_size * config.grad_accum_steps * max(1, number)
    assert 768 <= total <= 1024
    assert total == 1024 or number == 3
    assert (config.lr, config.lr_base, config.epochs, config.pretrained) == (None, 5e-4, 300, False)
    assert (config.repeated_aug, config.model_ema, config.drop_path, config.patch_size) == (None, True, 0.1, None)
    text = (tmp_path / "train.yaml").read_text()
    assert f"{total:,} images in an update" in text
    assert ("as in DeiT" in text) == (total == 1024)


def test_few_photographs_start_from_published_weights(tmp_path):
    config = train_config(
        tmp_path, answers(5_000, classes=37, teacher="own:net", teacher_classes=37, epochs=50), gpus(1)
    )
    assert (config.pretrained, config.lr, config.batch_size, config.model_ema) == (True, 5e-5, 128, False)


def test_small_images_get_small_views_and_patches(tmp_path):
    given = answers(50_000, side=32, classes=10, teacher="own:net", teacher_classes=10)
    config = train_config(tmp_path, given, gpus(1))
    assert (config.patch_size, config.pretrained, config.batch_size) == (4, False, 256)
    (tmp_path / "p.yaml").write_text(settings_files(given, tmp_path, CPU)["precompute.yaml"] or "")
    values = read_settings(tmp_path / "p.yaml", PrecomputeConfig, TeacherConfig)
    recipe = load_recipe(values["recipe"], values["set"])
    assert (recipe.img_size, recipe.scale, recipe.mixup_prob) == (32, (0.4, 1.0), 0.5)
    chosen, _ = split_values(values | {"views": (0, 300)}, PrecomputeConfig, TeacherConfig)
    assert chosen.data == "images/train"


@pytest.mark.parametrize(
    ("side", "size", "patch"), [(8, 32, 4), (33, 64, 8), (96, 96, 8), (200, 224, 16), (3000, 224, 16)]
)
def test_the_size_of_views_is_at_least_that_of_the_images(side, size, patch):
    assert answers(1000, side=side).sizes == (size, patch)


@pytest.mark.parametrize(
    ("options", "machine", "expected"),
    [
        ([], CPU, (8, 64, 4, 2)),  # the default of a machine without a GPU
        ([], "gpu", (4, None, None, None)),
        (["--model", "deit-ti"], CPU, (4, None, None, None)),  # asked for: its own sizes
    ],
)
def test_without_a_gpu_the_default_student_of_small_images_is_smaller(here, monkeypatch, options, machine, expected):
    chosen = gpus(1) if machine == "gpu" else machine
    monkeypatch.setattr(Machine, "here", lambda: chosen)
    code, shown = invoke("init", "mine", "--data", "pets/train", "--teacher", TEACHER, *options, "--yes", "--json")
    assert code == 0, shown
    settings = read_settings(Path("mine/train.yaml"), TrainConfig)
    assert tuple(settings.get(name) for name in ("patch_size", "embed_dim", "depth", "num_heads")) == expected
    made = json.loads(shown[shown.index("{\n") :])
    sizes = zip(("--patch-size", "--embed-dim", "--depth", "--num-heads"), expected, strict=True)
    printed = " ".join(f"{flag} {value}" for flag, value in sizes if value)
    assert [line for line in made["next"] if " estimate " in line and line.endswith(f"--model deit-ti {printed}")]
    assert len(made["slow"]) == (0 if machine == "gpu" else 2)


def test_commands_for_remote_images_say_where_they_are():
    """`labels show` and `report` know only the place of local images."""
    given = answers(1000, teacher="own:net", reading={"image_key": "jpg"})
    remote = dataclasses.replace(given.images, source=SimpleNamespace(is_remote=True), location="https://a.org/x.tar")
    show, evaluate, report, *_ = later_commands(dataclasses.replace(given, images=remote), Path("a b"))
    assert show == (
        "deit-cli labels show 'a b/labels' --out 'a b/labels.png' --data https://a.org/x.tar --image-key jpg"
    )
    assert evaluate == (
        "deit-cli evaluate --checkpoint 'a b/student/last' --labels 'a b/labels' --labels-data https://a.org/x.tar"
    )
    assert report.endswith("--out 'a b/report.html' --data https://a.org/x.tar --image-key jpg")


def test_a_cnn_as_student_has_no_patches():
    assert answers(1000, model="resnet18").sizes == (224, None)


def test_every_line_says_why(tmp_path):
    given = answers(1_000, side=32, teacher="resnet18.a1_in1k", classes=5, views=3, reading={"image_key": "jpg"})
    for name, text in settings_files(given, tmp_path, gpus(2)).items():
        lines = [line for line in (text or "").splitlines() if line]
        assert len(lines) > 8, name
        assert [line for line in lines if not line.startswith("#") and not line.split(" # ")[-1].strip()] == []
        assert all("#" in line for line in lines)


def test_images_are_looked_at_all_over_the_source(images):
    found = asking.look_at(str(images / "pets/train"), asking.SourceOptions())
    assert (found.samples, found.classes, found.side) == (24, 3, 24)
    assert "shorter side 24 pixels (median of 24 images)" in found.line
    places = list(asking._spread(found.source))
    assert [position for _, position in places] == list(range(24))
