"""A setting that is written once: its option, its place in --help, its values in a file and its checks follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from pipeline.errors import UsageError
from pipeline.settings.configs import (
    BenchConfig,
    EstimateConfig,
    ExportConfig,
    PrecomputeConfig,
    TeacherConfig,
    VerifyConfig,
)
from pipeline.settings.fields import GROUPS, REQUIRED, check_settings, option, settings_of
from pipeline.settings.files import read_settings
from pipeline.settings.options import config_option, options_of, split_values
from pipeline.settings.program import Command
from trainer.config import EvaluateConfig, TrainConfig

CONFIGS = (
    *(TeacherConfig, PrecomputeConfig, EstimateConfig, BenchConfig, VerifyConfig, ExportConfig),
    *(TrainConfig, EvaluateConfig),
)


@dataclass(frozen=True, kw_only=True)
class Kite:
    """A config in small, with a field of each kind."""

    name: str = option(REQUIRED, "Name of the kite.", group="Data")
    tails: int | Literal["many"] = option(2, "Number of tails.", "--streamers", group="Run", low=1, high=10**6)
    length: float | None = option(None, "Length in metres.", "-l", group="Run", low=0.5, high=30, free=True)
    cords: int = option(1, "Number of cords.", group="Student", low=1)
    colour: Literal["red", "blue"] = option("red", "Colour of the kite.", group="Data")
    wind: tuple[int, int] | None = option(None, "Range of wind speeds.", group="Data")
    fliers: tuple[Path, ...] = option((), "People who fly it.", group="Data", timed=False)
    lights: bool = option(False, "Fly it at night.", group="Logging", planned=True)

    def __post_init__(self) -> None:
        check_settings(self)


@click.command(cls=Command)
@config_option(Kite)
@options_of(Kite)
def fly(**values):
    """Fly a kite."""
    click.echo(repr(split_values(values, Kite)[0]))


def flown(*arguments: str) -> str:
    result = CliRunner().invoke(fly, list(arguments))
    return result.output if result.exception is None or result.exit_code == 2 else str(result.exception)


def test_an_option_follows_from_its_field(tmp_path):
    (tmp_path / "kite.yaml").write_text("streamers: many\nfliers: [ann, bob]\nwind: '3:7'\nlights: true\n")
    found = flown("-c", str(tmp_path / "kite.yaml"), "--name", "a", "-l", "2", "--colour", "blue")
    assert (
        found
        == f"{Kite(name='a', tails='many', length=2.0, colour='blue', wind=(3, 7), fliers=(Path('ann'), Path('bob')), lights=True)!r}\n"
    )
    assert flown("--name", "a", "--no-lights", "--tails", "7") == f"{Kite(name='a', tails=7)!r}\n"


def test_options_stand_in_groups_in_a_fixed_order():
    lines = flown("--help").splitlines()
    assert [line for line in lines if line[:1].isupper() and line.endswith(":")] == [
        "Data:",
        "Student:",
        "Run:",
        "Logging:",
        "Other:",
    ]
    assert lines.index("Run:") < next(i for i, line in enumerate(lines) if "--tails" in line) < lines.index("Logging:")
    assert any(line.startswith("  -l, --length FLOAT") for line in lines)


def test_a_command_may_leave_settings_out():
    @click.command(cls=Command)
    @options_of(Kite, where=lambda setting: setting.timed and not setting.planned)
    def short(**values): ...

    own = ["name", "tails", "length", "cords", "colour", "wind"]
    assert [parameter.name for parameter in short.params] == [
        *own,
        "config",
        "quiet",
        "verbose",
    ]  # every command has these


REFUSED = [
    # what is wrong, what a user reads
    ({"tails": 0}, "--tails must be in 1..1000000, got 0"),
    ({"tails": 10**7}, "--tails must be in 1..1000000, got 10000000"),
    ({"length": 0.25}, "--length must be in 0.5..30, got 0.25"),
    ({"length": float("nan")}, "--length must be in 0.5..30, got nan"),
    ({"cords": 0}, "--cords must be at least 1, got 0"),
    ({"colour": "green"}, "--colour must be one of red, blue, got 'green'"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=range(len(REFUSED)))
def test_a_value_out_of_its_range_is_refused(changes, text):
    with pytest.raises(UsageError) as caught:
        Kite(name="a", **changes)
    assert str(caught.value) == text


IN_A_FILE = [
    # a line that does not fit, what its value must be
    ("tails: few", "tails must be a whole number or many, got 'few'"),
    ("length: long", "length must be a number or null, got 'long'"),
    ("colour: 3", "colour must be one of red, blue, got 3"),
    ("wind: [1, a]", "wind must be START:STOP or a whole number or null, got [1, 'a']"),
    ("fliers: 3", "fliers must be text (in quotes) or a list of them, got 3"),
    ("lights: 1", "lights must be true or false, got 1"),
    ("recipe: none", "there is no setting 'recipe'. Settings are named as the options that --help shows"),
]


@pytest.mark.parametrize(("line", "text"), IN_A_FILE, ids=range(len(IN_A_FILE)))
def test_a_line_of_a_file_is_checked_by_the_type_of_its_field(tmp_path, line, text):
    path = tmp_path / "kite.yaml"
    path.write_text(line)
    with pytest.raises(UsageError) as caught:
        read_settings(path, Kite, recipe=False)
    assert str(caught.value) == f"{path}: {text}"
    assert str(caught.value) in flown("-c", str(path), "--name", "a")


def test_a_resumed_run_may_change_where_things_lie_and_how_fast_they_go():
    free = {setting.name for setting in settings_of(TrainConfig) if setting.free}
    changed = TrainConfig(labels="elsewhere", output="other", workers=3, compile=True, log_interval=7, data="copy")
    assert changed.identity() == TrainConfig(labels="shards").identity()
    assert TrainConfig(labels="shards", lr=1.0).identity() != TrainConfig(labels="shards").identity()
    assert free | {*TrainConfig(labels="x").identity()} == {setting.name for setting in settings_of(TrainConfig)}
    assert not {"lr", "epochs", "seed", "model", "view_policy", "amp_dtype"} & free


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_setting_has_a_group_and_a_default_in_its_range(config):
    for setting in settings_of(config):
        assert setting.group in GROUPS
        assert setting.high is None or setting.low is not None, setting.name
        if setting.default is not REQUIRED:
            setting.check(setting.default)
