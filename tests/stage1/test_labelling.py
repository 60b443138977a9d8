"""`label_images`: the label set of the command for any kind of teacher, and scripts that start processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import confident_cnn, files_of, make_labels, small_recipe, with_checkout, write_tars
from torch import Tensor, nn

import pipeline
from pipeline.errors import DeitCliError, LabelSetMismatch, UsageError
from pipeline.labels.labelset import LabelSet
from pipeline.stage1.plan import extension

QUICK: dict[str, Any] = {"views": (0, 3), "topk": 2, "workers": 0, "device": "cpu", "recipe": small_recipe()}
ABOUT: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def by_command(data, tmp_path_factory) -> LabelSet:
    """What the command makes, with the confident CNN as module:function."""
    return make_labels(tmp_path_factory.mktemp("command") / "set", data)


def labelled(data: str, teacher: Any, out: Path, **more: Any) -> LabelSet:
    made = pipeline.label_images(data, teacher, out, **QUICK | more)
    assert made is not None
    return made


def answers(made: LabelSet) -> list[Any]:
    """Return every stored answer, as lists."""
    every = [made.read(shard, view) for shard in made.shards for view in made.views]
    return [[rows.row.tolist(), rows.hard.tolist(), rows.topk_prob.tolist()] for rows in every]


def test_a_teacher_by_name_gives_the_set_of_the_command(data, by_command, tmp_path):
    made = labelled(data, "support.builders:confident_cnn", tmp_path / "set")
    assert files_of(made.folder) == files_of(by_command.folder)


def test_a_network_and_a_function_give_the_same_answers_under_their_own_names(data, by_command, tmp_path):
    network, _ = confident_cnn()
    one = labelled(data, network, tmp_path / "one", **ABOUT)
    other = labelled(data, lambda images: network(images), tmp_path / "other", name="cnn", version="7", **ABOUT)
    assert [each.plan.teacher.name for each in (one, other)] == ["module/Sequential", "callable/cnn@7"]
    assert answers(one) == answers(other) == answers(by_command)
    assert len({hard for _, every, _ in answers(one) for hard in every}) > 1  # or a constant would pass
    assert one.recipe.img_size == one.plan.teacher.members[0].img_size == 16  # of the views, as nothing else was said
    assert "no weights seen" in (other.folder / "README.md").read_text()


def test_a_set_is_continued_only_with_the_same_teacher(data, tmp_path):
    network, _ = confident_cnn()
    labelled(data, network, tmp_path / "set", **ABOUT)
    more = labelled(data, network, tmp_path / "set", views=(3, 5), **ABOUT)
    assert more.views == range(5)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(LabelSetMismatch, match="weights_sha256"):
        labelled(data, network, tmp_path / "set", views=(5, 6), **ABOUT)
    with pytest.raises(
        UsageError, match=r"this set's teacher module/Sequential is an object .*Call pipeline\.label_images"
    ):
        extension(str(tmp_path / "set"), {}, data=data, views=(5, 6))


WRONG = [
    # the teacher, more arguments, what is said
    ("test_resnet", {"mean": (0, 0, 0)}, "mean describes a teacher that is an object, and test_resnet brings its own"),
    (["test_resnet", 3], {}, "several teachers are given by their names, got int"),
    (3, {}, r"a teacher must be a name, a torch\.nn\.Module or a function from images to logits, got int"),
    ("test_resnet", {"top_k": 2}, r"label_images has no argument 'top_k'\. Did you mean topk\?"),
    ("test_resnet", {"zzzz": 2}, r"has no argument 'zzzz'\. `deit-cli precompute --help` lists"),
    ("test_resnet", {"views": (0, 3, 6)}, r"views must be \(start, stop\), or N for \(0, N\), got \(0, 3, 6\)"),
    ("test_resnet", {"views": (3, 3)}, "START < STOP"),
    ("test_resnet", {"recipe": "nothing"}, "a recipe is one of .*got 'nothing'"),
    (nn.Linear(1, 1), {"img_size": 0}, r"img_size must be a whole number in 1\.\.4096 pixels, got 0"),
    (nn.Linear(1, 1), {"teacher_img_size": 16}, "teacher_img_size is of teachers by name, .*Pass img_size"),
    (nn.Linear(1, 1), {"engine": "ray"}, "engine='ray' needs a teacher by name, got module/Linear"),
    (nn.Linear(16, 1), {}, r"teacher module/Linear must answer 2 images with one tensor of logits \[2, C\], got \[2, 3, 16, 1\]"),
    (lambda x: x, {"name": "a", "version": "1", "processes": 2}, "callable/a@1 cannot be sent to several teacher processes"),
    (nn.Sequential(*list(confident_cnn()[0].children())[:-1]), ABOUT, "has 64 classes, the source has 3"),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "more", "text"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_said_and_nothing_is_written(data, tmp_path, teacher, more, text):
    with pytest.raises(DeitCliError, match=text):
        labelled(data, teacher, tmp_path / "set", **more)
    assert not (tmp_path / "set").exists()


class Answering(nn.Module):
    """A network at the top level of a module, as other processes need it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = confident_cnn()[0]

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


@pytest.mark.slow
def test_two_processes_with_an_object_make_the_files_of_one(data, tmp_path):
    teacher = Answering()
    one, two = (
        labelled(data, teacher, tmp_path / f"{number}", processes=number, views_per_shard=1, **ABOUT)
        for number in (1, 2)
    )
    assert files_of(one.folder) == files_of(two.folder)


SCRIPT = """
import sys
from torch import nn
import pipeline
from support.builders import confident_cnn, small_recipe

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = confident_cnn()[0]

    def forward(self, images):
        return self.inner(images)

def main():
    made = pipeline.label_images(
        "data", Net(), "set", views=2, views_per_shard=1, topk=2, recipe=small_recipe(), mean=[0.5] * 3, std=[0.5] * 3,
        device="cpu", **SETTINGS)
    print("MADE", made.num_samples)

"""
GUARD = 'if __name__ == "__main__":\n    main()\n'
# Guarded to the eye: it has a test of __name__, and calls main() in spite of it.
HALF = 'if __name__ == "nobody":\n    pass\nmain()\n'


def run_script(folder: Path, end: str, **settings: int) -> subprocess.CompletedProcess[str]:
    write_tars(folder / "data")
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("SETTINGS", repr(settings)) + end)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=with_checkout(OMP_NUM_THREADS="1"),
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"workers": 1}, {"workers": 0, "processes": 2}], ids=["loaders", "teachers"])
def test_a_script_with_a_guard_labels_in_several_processes(tmp_path, settings):
    done = run_script(tmp_path, GUARD, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "MADE 23\n", "")


@pytest.mark.slow
def test_a_script_without_a_guard_labels_in_its_own_process(tmp_path):
    done = run_script(tmp_path, "main()\n", workers=0, processes=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "MADE 23\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "settings"),
    [
        ("main()\n", {"workers": 1}),  # said before any process starts
        (HALF, {"workers": 1}),  # a loader process finds out
        (HALF, {"workers": 0, "processes": 2}),  # a teacher process finds out
    ],
    ids=["at once", "loader", "teacher"],
)
def test_a_script_without_a_guard_is_told_so_once(tmp_path, end, settings):
    done = run_script(tmp_path, end, **settings)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last == (
        f'pipeline.errors.UsageError: {tmp_path}/script.py starts other processes outside an `if __name__ == "__main__":`, and'
        " Python imports it again in each of them, so each would run all of it. Put the call, and what it needs only once,"
        ' below `if __name__ == "__main__":`; or pass workers=0 and processes=1'
    )
    assert (tmp_path / "set").exists() == (end == HALF)


def test_a_script_from_standard_input_is_told_that_it_has_no_file(tmp_path):
    write_tars(tmp_path / "data")
    done = subprocess.run(
        [sys.executable],
        input=SCRIPT.replace("SETTINGS", "workers=1").replace("**workers", "workers") + GUARD,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=with_checkout(OMP_NUM_THREADS="1"),
        timeout=100,
    )
    assert done.stderr.rstrip().splitlines()[-1] == (
        "pipeline.errors.UsageError: a script from standard input cannot start other processes: Python looks for its file in"
        ' each of them. Save it as a file with the call below `if __name__ == "__main__":`; or pass workers=0 and processes=1'
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert not (tmp_path / "set").exists()
