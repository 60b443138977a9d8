"""What `estimate` and `bench stage1` time: small real things, and no test that depends on how fast they are."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.builders import small_recipe, small_teacher, teacher_of, write_tars
from torch import nn

import cli
from pipeline.cost import rates as measuring
from pipeline.cost.bench import measure_run
from pipeline.cost.rates import Rates, forward_flops, measure_rates, training_step_s
from pipeline.errors import SourceError, UsageError
from pipeline.images.source import open_source
from pipeline.settings.configs import PrecomputeConfig
from pipeline.teacher.teacher import Teacher

CPU = torch.device("cpu")


def rates_of(folder: Path, **options) -> Rates:
    source = open_source(str(folder))
    return measure_rates(
        source, small_recipe(), small_teacher(source, **options), topk=2, precision="float16", least_s=0.01
    )


def test_every_rate_is_a_positive_number(tmp_path):
    rates = rates_of(Path(write_tars(tmp_path / "data", (3, 2))))
    for name, seconds in dataclasses.asdict(rates).items():
        assert (0 < seconds < math.inf) == (name != "device_render_s"), name
    assert rates.answer_s == rates.teacher_s + rates.topk_s
    assert rates.device_render_s == 0


def test_a_device_that_renders_has_its_own_time(tmp_path):
    source = open_source(write_tars(tmp_path / "data", (3, 2)))
    recipe, teacher = small_recipe(), small_teacher(source)
    rates = measure_rates(source, recipe, teacher, topk=2, precision="float16", least_s=0.01, on_gpu=True)
    assert rates.device_render_s > 0
    assert rates.answer_s == rates.teacher_s + rates.topk_s + rates.device_render_s


@pytest.mark.parametrize("command", ["stage1", "estimate"])
def test_commands_measure_a_device_that_renders(tmp_path, monkeypatch, command):
    """The CPU plays the GPU."""
    for module in ("pipeline.cost.bench", "pipeline.cost.estimate", "pipeline.stage1.loop"):
        monkeypatch.setattr(f"{module}.renders_on_gpu", lambda *_: True)
    handed_over: list[int] = []
    real = Teacher.rendered
    monkeypatch.setattr(
        Teacher, "rendered", lambda teacher, images, count: handed_over.append(count) or real(teacher, images, count)
    )
    data = write_tars(tmp_path / "data", (8,))
    options = [
        "--data",
        data,
        "--teacher",
        "support.builders:confident_cnn",
        "--set",
        "img_size=16",
        "--set",
        "mix_block=8",
    ]
    arguments = (
        ["bench", "stage1", "--seconds", "0.1"]
        if command == "stage1"
        else ["estimate", "--model", "deit-ti", "--seconds", "0.1"]
    )
    result = CliRunner().invoke(cli.commands, [*arguments, *options, "--views", "0:3", "-j", "0"])
    assert result.exit_code == 0, result.output
    assert handed_over
    lines = [line.split("  ")[0] for line in result.output.splitlines()]
    if command == "stage1":
        assert lines[3:5] == ["hand over", "copy and render"]


def test_one_image_suffices_and_images_that_cannot_be_decoded_are_passed_over(tmp_path):
    folder = Path(write_tars(tmp_path / "data", (3,), bad=(0, 2)))
    source = open_source(str(folder))
    _, samples, images = measuring._first_images(source, least_s=60)
    assert [sample.key for sample in samples] == ["img-0001"]
    assert images[0].shape == (24, 32, 3)
    assert rates_of(folder).decode_s > 0
    with pytest.raises(SourceError, match="image 'img-0001'"):
        rates_of(Path(write_tars(tmp_path / "bad", (2,), bad=(0, 1))))


def test_slow_images_are_not_all_read(tmp_path):
    source = open_source(write_tars(tmp_path / "data", (40, 40)))
    assert len(measuring._first_images(source, least_s=60)[2]) == measuring.IMAGES
    assert len(measuring._first_images(source, least_s=0)[2]) == 1


class Clock:
    """Seconds that pass only while a teacher computes."""

    now = 0.0

    def __call__(self) -> float:
        return Clock.now


class Slow(nn.Module):
    """Takes three seconds of that clock for a view."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Clock.now += 3.0 * len(images)
        return images.flatten(1)[:, :3]


class Quick(Slow):
    """Takes a thousandth of a second."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Clock.now += 0.001 * len(images)
        return images.flatten(1)[:, :3]


def make_slow():
    return Slow(), {"input_size": (3, 16, 16)}


def make_quick():
    return Quick(), {"input_size": (3, 16, 16)}


@pytest.mark.parametrize(
    ("name", "each_s", "most_views"),
    [
        ("make_slow", 3.0, 4),  # two views twice: 12 s, where a full pass would take 96
        ("make_quick", 0.001, 2 * 2 + 32 * 70),  # full passes for two seconds
    ],
)
def test_a_slow_teacher_is_timed_with_few_views(monkeypatch, name, each_s, most_views):
    monkeypatch.setattr(measuring.time, "perf_counter", Clock())
    teacher = teacher_of(f"test_rates:{name}")
    rendered = np.zeros((3, 16, 16, 3), np.uint8)
    before = Clock.now
    found = measuring._answer_s(rendered, small_recipe(), teacher, topk=1, least_s=2.0)
    assert found == pytest.approx(each_s)
    assert (Clock.now - before) / each_s <= most_views + 0.5


def test_all_threads_of_a_teacher_are_asked_and_every_view_once(monkeypatch):
    teacher = teacher_of("test_rates:make_quick")
    teacher.limit_threads(3)
    asked = []
    original = teacher.ask
    monkeypatch.setattr(teacher, "ask", lambda *arguments: asked.append(arguments) or original(*arguments))
    pixels = torch.zeros(12, 16, 16, 3, dtype=torch.uint8)
    measuring._asking(teacher, small_recipe(), pixels, topk=1)()
    assert [len(images) for images, _, _ in asked] == [4, 4, 4]
    assert asked[0][1].partner.tolist() == [1, 0, 3, 2]  # mixed, as in a run


def settings(data: str, **changes) -> PrecomputeConfig:
    return PrecomputeConfig(data=data, out=Path("nowhere"), **({"views": (0, 3), "topk": 2, "workers": 0} | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "bad", "views"),
    [
        ((13, 10), (), (0, 3)),
        ((1,), (), (0, 3)),  # one image, whose pair is missing
        ((9,), (4,), (5, 6)),  # an image that cannot be decoded; one view from each decode
    ],
)
def test_a_run_of_all_parts_labels_views_and_leaves_nothing(tmp_path, monkeypatch, sizes, bad, views):
    data = write_tars(tmp_path / "data", sizes, bad=bad)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    source = open_source(data)
    tick = measure_run(
        source, small_recipe(), small_teacher(source), settings(data, views=views), num_images=8, seconds=0.05
    )
    assert tick.made > 0
    assert 0 < tick.per_second < math.inf
    assert 0 <= (tick.teacher_busy or 0) <= 1
    assert not list((tmp_path / "temporary").iterdir())
    assert not Path("nowhere").exists()


def test_operations_are_counted_by_hand():
    """A convolution of 3x3 from 3 to 5 channels on 8x8 pixels, and a linear layer: two for each multiplication."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 64, 7))
    assert forward_flops(network, 8) == 2 * (64 * 5 * 3 * 9 + 5 * 64 * 7)


def test_attention_is_counted():
    """Queries against keys, and weights against values: two matrix products of 64 x 64 x 3, for one image and one head."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))  # says the device

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = images.flatten(2).transpose(1, 2)[:, None]
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    assert forward_flops(Attention(), 8) == 2 * 2 * 64 * 64 * 3


class TwoHeads(nn.Module):
    """Answers with a tuple, as timm's distilled models may in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 3), nn.Linear(48, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(images.flatten(1)), self.second(images.flatten(1))


@pytest.mark.parametrize("module", [TwoHeads(), nn.Sequential(nn.Flatten(), nn.Linear(48, 3))])
def test_a_training_step_is_timed_and_leaves_no_gradient(module):
    assert 0 < training_step_s(module, 4, CPU, least_s=0.001) < math.inf
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_student_that_fits_into_no_memory_is_named():
    class Huge(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UsageError, match="two images of 4 pixels in training do not fit into the memory of cpu"):
        training_step_s(Huge(), 4, CPU)


class Formula(nn.Module):
    """A teacher without parameters: logit c is the mean of channel c."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


def test_a_network_without_parameters_has_a_cost_too():
    """`estimate` divides by it."""
    assert forward_flops(Formula(), 8) == 1
