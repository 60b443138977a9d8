"""docs/teachers.md: its example is run as it stands, and its tables are those of the code."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import cli
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.teacher.loading import DEIT_TEACHERS, FUNCTION_DEFAULTS

PAGE = (Path(__file__).parents[2] / "docs/teachers.md").read_text()
(EXAMPLE,) = re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (deit-cli .*my_teacher.*)$", PAGE, flags=re.MULTILINE)]


@pytest.fixture
def my_teacher(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """The page's module in the current folder, with weights that answer differently to different images; and ten images."""
    name, text = EXAMPLE
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = __import__(Path(name).stem)
    rng = np.random.default_rng(0)
    for number, label in enumerate(module.CLASSES):
        folder = tmp_path / "cifar10/train" / label
        folder.mkdir(parents=True)
        for copy in range(2):  # 32 pixels, smooth, each class of another brightness
            coarse = rng.integers(25 * number, 25 * number + 30, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{copy}.png")
    torch.manual_seed(1)
    network = module.ResNet20()
    with torch.no_grad():
        network.head.weight.mul_(20)
    torch.save(network.state_dict(), tmp_path / "resnet20.pth")
    yield module
    del sys.modules[Path(name).stem]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.commands, arguments)
    assert result.exception is None, result.exception
    return result.output


def precomputed(*more: str) -> LabelSet:
    """Run the page's first command on the CPU with few views, and return the set."""
    quick = ["--views", "0:2", "-j", "0", "--device", "cpu", "--set", "mix_block=8"]
    run(*COMMANDS[0], *quick, *more)
    return LabelSet.open(Path(COMMANDS[0][COMMANDS[0].index("--out") + 1]))


def test_the_commands_of_the_example_label_and_verify(my_teacher):
    assert [command[0] for command in COMMANDS] == ["precompute", "labels"]
    label_set = precomputed()
    teacher = label_set.plan.teacher
    assert (teacher.name, teacher.num_classes, teacher.class_names) == ("my_teacher:resnet20", 10, my_teacher.CLASSES)
    assert (label_set.recipe.img_size, teacher.members[0].img_size) == (32, 32)
    rows = [label_set.read(shard, view) for shard in label_set.shards for view in (0, 1)]
    assert sum(len(each.row) for each in rows) == 40
    assert len({int(hard) for each in rows for hard in each.hard}) > 1
    said = run(*COMMANDS[1], "--relabel", "16", "--device", "cpu")
    assert "16 views labelled again: 100.00 % of hard labels agree" in said
    extend = ["labels", "extend", str(label_set.folder), "--views", "2:3", "-j", "0", "--device", "cpu"]
    run(*extend, "--teacher", "my_teacher:resnet20")


def test_the_labels_are_the_answers_of_the_network_for_the_images(my_teacher):
    """Without augmentation a view is the image itself, so the answers can be computed here from the PNG files."""
    label_set = precomputed("--recipe", "none", "--set", "crop_pct=1", "--precision", "float32")
    network, about = my_teacher.resnet20()
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    hard = set()
    for shard in open_source("cifar10/train").shards:
        rows = label_set.read(shard.name, 1)
        for at, row in enumerate(rows.row):
            path = Path("cifar10/train", shard[int(row)].key).with_suffix(".png")
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
            with torch.inference_mode():
                prob = network.eval()((pixels - mean)[None] / std[None]).softmax(dim=1)[0].numpy()
            order = np.argsort(-prob)
            assert rows.hard[at] == order[0]
            np.testing.assert_array_equal(rows.topk_index[at], order)
            np.testing.assert_allclose(rows.topk_prob[at], prob[order], atol=1e-5)
            hard.add(int(order[0]))
    assert len(hard) > 1  # or a constant would pass


def test_without_its_file_the_example_is_the_same_network_every_time(my_teacher):
    my_teacher.WEIGHTS.unlink()
    one, other = (my_teacher.resnet20()[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_page_names_every_key_with_its_default_and_deits_teacher():
    keys = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in PAGE.splitlines() if row.startswith("| `")]
    assert sorted(key for row in keys for key in row if key in FUNCTION_DEFAULTS) == sorted(FUNCTION_DEFAULTS)
    for name in ("input_size", "mean", "std", "crop_pct"):
        assert f"`{FUNCTION_DEFAULTS[name]}`" in PAGE
    for short, full in DEIT_TEACHERS.items():
        assert f"| `{short}` |" in PAGE
        assert f"| `{full}` |" in PAGE
