"""What all commands share: where values come from, quiet and verbose, errors of one line, JSON results, groups in --help."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from support.builders import with_checkout
from support.command_tree import COMMANDS
from support.commands import invoke

import cli
from pipeline.errors import DeitCliError
from pipeline.settings.fields import run_option, views_option
from pipeline.settings.options import (
    AS_JSON,
    COMMON,
    GroupedOption,
    options_of,
    plain_option,
    show_result,
    variables_used,
    without_options,
)
from pipeline.settings.program import OTHER, Group, one_line
from trainer.studies.running import environment_of

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/v1/shards"


@dataclass(frozen=True, kw_only=True)
class Kite:
    """Settings of a flight."""

    cord_length: int = run_option(1, "Length of the cord in metres.", "--cord", "-l", low=1, high=99)
    fliers: tuple[Path, ...] = run_option((), "People who fly it.")
    lights: bool = run_option(True, "Whether it has lights.")
    wind: tuple[int, int] = views_option((0, 3), "Range of the wind.")
    device: str = run_option("auto", "Device of the kite.")


def sky() -> Group:
    """Return a program with one command, which prints its values."""
    program = Group("sky")

    @program.command()
    @options_of(Kite)
    @plain_option("--height", type=click.IntRange(1, 9), default=5, help="Height.", group="Run")
    @plain_option("--colour", "paint", type=click.Choice(["red", "blue"]), default="red", help="Colour.", group="Run")
    @plain_option("--tail", "tails", multiple=True, help="Tails.", group="Run")
    @AS_JSON
    def fly(**values: Any) -> None:
        values["fliers"] = [str(name) for name in values["fliers"]]
        show_result(values | {"variables": variables_used(click.get_current_context())})

    return program


def flown(*arguments: str, file: Path | None = None, **variables: str) -> dict[str, Any] | str:
    """Return the values of the command, or its error."""
    config = ["-c", str(file)] if file else []
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        done = CliRunner().invoke(sky(), ["fly", *config, *arguments], standalone_mode=False)
        if isinstance(done.exception, click.ClickException):
            return one_line(done.exception)
    return str(done.exception) if isinstance(done.exception, DeitCliError) else json.loads(done.stdout)


ORDER = [
    # arguments, variables, file; what --cord-length and --height are
    ([], {}, "", (1, 5)),
    ([], {}, "cord_length: 2\nheight: 2\n", (2, 2)),
    ([], {"DEIT_CLI_FLY_CORD_LENGTH": "3", "DEIT_CLI_FLY_HEIGHT": "3"}, "", (3, 3)),
    ([], {"DEIT_CLI_FLY_CORD_LENGTH": "3", "DEIT_CLI_FLY_HEIGHT": "3"}, "cord_length: 2\nheight: 2\n", (3, 3)),
    (["-l", "4", "--height", "4"], {"DEIT_CLI_FLY_CORD_LENGTH": "3", "DEIT_CLI_FLY_HEIGHT": "3"}, "cord_length: 2\nheight: 2\n", (4, 4)),
    (["-l", "4"], {"DEIT_CLI_FLY_HEIGHT": "3"}, "cord_length: 2\n", (4, 3)),
    ([], {"DEIT_CLI_FLY_CORD_LENGTH": ""}, "cord_length: 2\n", (2, 5)),  # an empty variable is not set
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "variables", "text", "expected"), ORDER)
def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    tmp_path, arguments, variables, text, expected
):
    file = tmp_path / "kite.yaml"
    file.write_text(text or "lights: true\n")
    found = flown(*arguments, file=file, **variables)
    assert isinstance(found, dict), found
    assert (found["cord_length"], found["height"]) == expected


VALUES = [
    # variables, what they set
    ({"DEIT_CLI_FLY_CORD": "7"}, {"cord_length": 7}),  # another name of the option
    ({"DEIT_CLI_FLY_CORD_LENGTH": "6", "DEIT_CLI_FLY_CORD": "7"}, {"cord_length": 6}),  # its own name goes first
    ({"DEIT_CLI_FLY_FLIERS": "ann 'bob b' c:d"}, {"fliers": ["ann", "bob b", "c:d"]}),
    ({"DEIT_CLI_FLY_TAIL": "a 'b c'"}, {"tails": ["a", "b c"]}),
    ({"DEIT_CLI_FLY_LIGHTS": "0"}, {"lights": False}),
    ({"DEIT_CLI_FLY_LIGHTS": "yes"}, {"lights": True}),
    ({"DEIT_CLI_FLY_WIND": "2:8"}, {"wind": [2, 8]}),
    ({"DEIT_CLI_FLY_COLOUR": "blue"}, {"paint": "blue"}),  # named as the option, and not as the function's argument
    ({"DEIT_CLI_FLY_JSON": "1"}, {"as_json": True}),
    ({"DEIT_CLI_DEVICE": "cpu"}, {"device": "cpu", "variables": ["DEIT_CLI_DEVICE"]}),
    ({"DEIT_CLI_DEVICE": "cpu", "DEIT_CLI_FLY_DEVICE": "cuda"}, {"device": "cuda", "variables": ["DEIT_CLI_FLY_DEVICE"]}),
    ({"DEIT_CLI_DATA": "x", "DEIT_CLI_HEIGHT": "9"}, {"height": 5, "variables": []}),  # height is nothing common
]  # fmt: skip


@pytest.mark.parametrize(("variables", "expected"), VALUES)
def test_a_variable_is_read_as_its_option(variables, expected):
    found = flown(**variables)
    assert isinstance(found, dict), found
    assert {name: found[name] for name in expected} == expected


WRONG = [
    # arguments, variables, file, the error
    ([], {"DEIT_CLI_FLY_HEIGHT": "x"}, "", "Invalid value for '--height' (from DEIT_CLI_FLY_HEIGHT): 'x' is not a valid integer range."),
    ([], {"DEIT_CLI_FLY_LIGHTS": "perhaps"}, "", "(from DEIT_CLI_FLY_LIGHTS): 'perhaps' is not a valid boolean"),
    ([], {"DEIT_CLI_FLY_TAIL": "a 'b"}, "", "DEIT_CLI_FLY_TAIL: No closing quotation, got \"a 'b\""),
    ([], {"DEIT_CLI_FLY_CORD_LENTH": "2"}, "", "DEIT_CLI_FLY_CORD_LENTH: sky fly has no such option. Did you mean CORD_LENGTH?"),
    ([], {"DEIT_CLI_FLY_ZZZ": "2"}, "", "DEIT_CLI_FLY_ZZZ: sky fly has no such option. Unset it"),
    ([], {}, "height: 99\n", "Invalid value for '--height' (from {file}): 99 is not in the range"),
    ([], {}, "colour: blu\n", "colour must be one of red, blue or null, got 'blu'"),
    ([], {}, "heigth: 2\n", "there is no setting 'heigth'. Did you mean height?"),
    ([], {}, "height: high\n", "height must be a whole number or null, got 'high'"),
    ([], {}, "paint: blue\n", "there is no setting 'paint'"),
    (["--colour", "blu"], {}, "", "'blu' is not one of 'red', 'blue'. Did you mean blue?"),
    (["--heigth", "2"], {}, "", "No such option '--heigth'. Did you mean '--height'? Help: sky fly --help"),
    (["-q", "-v"], {}, "", "--quiet and --verbose contradict each other"),
    (["-q"], {"DEIT_CLI_FLY_VERBOSE": "1"}, "", None),  # the command line goes first
    ([], {"DEIT_CLI_FLY_VERBOSE": "1"}, "quiet: true\n", None),
    ([], {"DEIT_CLI_FLY_VERBOSE": "1", "DEIT_CLI_FLY_QUIET": "1"}, "", "contradict each other"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "variables", "text", "error"), WRONG)
def test_an_error_names_where_the_value_comes_from_and_what_was_meant(tmp_path, arguments, variables, text, error):
    file = tmp_path / "kite.yaml"
    file.write_text(text)
    found = flown(*arguments, file=file if text else None, **variables)
    if error is None:
        assert isinstance(found, dict), found
    else:
        assert isinstance(found, str)
        assert error.format(file=file) in found
        assert "\n" not in found


def test_a_value_that_its_config_refuses_is_traced_to_its_variable(monkeypatch):
    monkeypatch.setenv("DEIT_CLI_TRAIN_EPOCHS", "-1")
    assert invoke("train", "--labels", "x") == (
        2,
        "error: --epochs must be in 1..1000000, got -1 (--epochs comes from DEIT_CLI_TRAIN_EPOCHS)",
    )
    assert "comes from" not in invoke("train", "--labels", "x", "--epochs", "-1")[1]


def test_the_message_about_the_settings_names_the_variables(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DEIT_CLI_DEVICE", "cpu")
    with caplog.at_level("INFO", logger="deit_cli"):
        invoke("train", "--labels", str(tmp_path), "--output", str(tmp_path / "run"))
    assert "--device cpu (with DEIT_CLI_DEVICE of the environment)" in caplog.text


MEANT = [
    # what was typed, what was meant
    (["trian"], "Did you mean 'train'?"),
    (["labels", "pul"], "Did you mean 'pull'?"),
    (["train", "--epoch", "3"], "'--epochs'"),
    (["precompute", "--data", "x", "--out", "y", "--precision", "flot16"], "Did you mean float16?"),
    (["precompute", "--data", "x", "--out", "y", "--set", "imgsize=32"], "Did you mean img_size?"),
    (["precompute", "--data", "x", "--out", "y", "--recipe", "deit384"], "Did you mean deit-384?"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), MEANT)
def test_a_misspelt_name_is_answered_with_the_nearest(arguments, text):
    code, output = invoke(*arguments)
    assert code == 2
    assert text in output


@pytest.mark.parametrize(
    ("command", "flag", "meant"),
    [
        ("precompute", "--img-size", " Did you mean '--set img_size=...'?"),
        ("train", "--mixup-prob", " Did you mean '--set mixup_prob=...'?"),
        ("models", "--img-size", ""),  # has no recipe
    ],
)
def test_an_option_that_is_a_recipe_field_is_answered_with_set(command, flag, meant):
    error = CliRunner().invoke(cli.commands, [command, flag, "64"], standalone_mode=False).exception
    assert isinstance(error, click.NoSuchOption)
    assert re.fullmatch(
        re.escape(f"No such option '{flag}'.{meant} Help: ") + rf"\S+ {command} --help", one_line(error)
    )


@pytest.mark.parametrize("group", [[], ["labels"], ["bench"]])
def test_a_group_without_a_command_shows_its_help(group):
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *group], capture_output=True, text=True, env=with_checkout()
    )
    assert done.stderr == invoke(*group, "--help")[1]
    assert (done.returncode, done.stdout) == (2, "")


def every_option() -> list[tuple[click.Context, GroupedOption]]:
    """Return each option of the real program that a variable may set, in the context of its command."""
    root = click.Context(cli.commands, info_name="deit-cli")
    found = [(root, option) for option in cli.commands.params if isinstance(option, GroupedOption)]
    for words, command in COMMANDS.items():
        context, group = root, cli.commands
        for word in words.split():
            group = group.commands[word]  # pyright: ignore
            context = click.Context(group, info_name=word, parent=context)
        found += [(context, option) for option in command.params if isinstance(option, GroupedOption)]
    return found


def test_every_option_has_a_variable_of_its_own():
    owners: dict[str, set[tuple[str, str]]] = {}
    for context, option in every_option():
        assert option.variables(context)
        for name in option.variables(context):
            owners.setdefault(name, set()).add((context.command_path, str(option.name)))
    common = {f"DEIT_CLI_{flag[2:].replace('-', '_').upper()}" for flag in COMMON}
    assert common <= set(owners)
    assert {name for name, used_by in owners.items() if len(used_by) > 1} == common
    assert not {"DEIT_CLI_DATA", "DEIT_CLI_CACHE"} & set(owners)  # variables of the tests
    plain = [option.name for command in COMMANDS.values() for option in command.params if type(option) is click.Option]
    assert plain == []  # only a GroupedOption has a variable


def test_the_variables_of_one_command_are_not_those_of_another():
    """A misspelt variable of `train` is refused; those of `train-more`, if there were one, would begin in the same way."""
    prefixes = {f"{name.upper().replace(' ', '_').replace('-', '_')}_" for name in COMMANDS}
    assert [(a, b) for a in prefixes for b in prefixes if a != b and a.startswith(b)] == []


def test_the_steps_of_a_study_do_not_see_variables_that_set_options(monkeypatch):
    monkeypatch.setenv("DEIT_CLI_TRAIN_EPOCHS", "1")
    monkeypatch.setenv("DEIT_CLI_DEVICE", "cpu")
    monkeypatch.setenv("DEIT_CLI_CACHE_DIR", "cache")
    found = environment_of({"OMP_NUM_THREADS": "3"})
    assert {name for name in found if name.startswith("DEIT_CLI_")} == {"DEIT_CLI_CACHE_DIR"}
    assert found["OMP_NUM_THREADS"] == "3"
    assert without_options({"PATH": "x", "DEIT_CLI_LABELS_PUSH_WORKERS": "1"}) == {"PATH": "x"}


# --- quiet and verbose ------------------------------------------------------------------------------------------------


def pushed(tmp_path: Path, before: list[str], after: list[str], **variables: str) -> tuple[int, str, str]:
    """Copy a label set with the real program; return exit code, stdout and stderr."""
    words = [
        *before,
        *(["labels"] if "labels" not in before else []),
        "push",
        str(GOLDEN),
        str(tmp_path / "copy"),
        *after,
    ]
    called = [sys.executable, "-c", "import cli; cli.main()", *words]
    done = subprocess.run(called, capture_output=True, text=True, cwd=ROOT, env=with_checkout() | variables)
    return done.returncode, done.stdout, done.stderr


LOUD = [
    # in front of the command, behind it, variables; whether progress and details are shown
    ([], [], {}, (True, False)),
    (["-q"], [], {}, (False, False)),
    (["labels", "-q"], [], {}, (False, False)),
    ([], ["--quiet"], {}, (False, False)),
    ([], [], {"DEIT_CLI_QUIET": "1"}, (False, False)),
    (["-v"], [], {"DEIT_CLI_LABELS_PUSH_WORKERS": "3"}, (True, True)),
    ([], ["-v"], {"DEIT_CLI_LABELS_PUSH_WORKERS": "3", "DEIT_CLI_QUIET": "1"}, (True, True)),
]


@pytest.mark.parametrize(("before", "after", "variables", "shown"), LOUD)
def test_quiet_shows_no_progress_and_verbose_every_message(tmp_path, before, after, variables, shown):
    code, stdout, stderr = pushed(tmp_path, before, after, **variables)
    assert (code, stdout.count("\n")) == (0, 1)
    assert ("push " in stderr, "from the environment: DEIT_CLI_LABELS_PUSH_WORKERS" in stderr) == shown
    assert bool(stderr) == shown[0]


def test_quiet_and_verbose_contradict_each_other_and_an_error_is_shown_in_any_case(tmp_path):
    assert pushed(tmp_path, ["-q"], ["-v"]) == (2, "", "error: --quiet and --verbose contradict each other: pass one of them\n")  # fmt: skip
    code, stdout, stderr = pushed(tmp_path, [], ["-q", "--workers", "x"])
    assert (code, stdout) == (2, "")
    assert stderr == "error: Invalid value for '-j' / '--workers': 'x' is not a valid integer range. Help: deit-cli labels push --help\n"  # fmt: skip


def test_a_quiet_command_writes_everything_to_its_log(tmp_path):
    script = (
        "import logging, sys; from pathlib import Path; from trainer.console import set_up, shown_progress;"
        " from pipeline.machine.progress import Tick; set_up('quiet'); log = logging.getLogger('deit_cli.test')\n"
        "with shown_progress(Path(sys.argv[1])) as tell:\n"
        "    log.info('a message'); log.warning('a warning'); tell(Tick('label', 1, 1))\n"
    )
    called = [sys.executable, "-c", script, str(tmp_path / "log")]
    done = subprocess.run(called, capture_output=True, text=True, cwd=ROOT, env=with_checkout(), check=True)
    assert done.stderr == "a warning\n"
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event.get("text", event["event"]) for event in events] == ["a message", "a warning", "progress", "ended"]


def test_the_retries_of_the_hubs_client_are_one_line_and_a_count():
    script = (
        "from trainer.console import set_up, shown_progress; set_up(''); from huggingface_hub.utils import _http\n"
        "with shown_progress():\n"
        "    for number in range(5):\n"
        "        _http.logger.warning(\"'no route' thrown while requesting HEAD https://hub/x\")\n"
        "        _http.logger.warning(f'Retrying in 1s [Retry {number}/5].')\n"
        "_http.logger.warning('another warning')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=with_checkout(), check=True
    )
    asked = "the Hub is asked again: 'no route' thrown while requesting HEAD https://hub/x"
    assert done.stderr.splitlines()[:2] == [asked, "failed requests to the Hub: 5 in all"]
    assert set(done.stderr.splitlines()[2:]) == {"another warning"}


# --- results ----------------------------------------------------------------------------------------------------------

NO_JSON = {"completion": "its result is a script for a shell"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_result_as_json(name):
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert ("--json" in flags) != (name in NO_JSON)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_quiet_verbose_and_if_it_has_options_a_file_of_them(name):
    flags = [flag for parameter in COMMANDS[name].params for flag in parameter.opts]
    assert (flags.count("--quiet"), flags.count("-v")) == (1, 1)
    own = [each for each in COMMANDS[name].params if isinstance(each, GroupedOption)]
    assert flags.count("--config") == (len(own) > 2)


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        # command, line of its file, end of the error
        (["train"], 'output: ""', "output has an empty value. Leave it out, or give one"),
        (["train"], 'labels: [shards, ""]', "labels has an empty value. Leave it out, or give one"),
        (["train"], 'model: ""', "model has an empty value. Leave it out, or give one"),
        (["labels", "show", "shards"], 'out: ""', "out has an empty value. Leave it out, or give one"),
        (["labels", "show", "shards"], r'out: "a\0.png"', r"out must not contain a zero character, got 'a\x00.png'"),
        (["train"], r'labels: ["a\0"]', r"labels must not contain a zero character, got 'a\x00'"),
    ],
)
def test_a_file_has_no_value_that_a_command_line_cannot_have(tmp_path, monkeypatch, command, line, said):
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(line)
    code, output = invoke(*command, "-c", "settings.yaml")
    assert (code, output) == (2, f"error: settings.yaml: {said}")
    assert list(tmp_path.iterdir()) == [tmp_path / "settings.yaml"]


def test_a_file_sets_options_that_belong_to_no_config(tmp_path):
    file = tmp_path / "push.yaml"
    file.write_text("workers: 3\njson: true\n")
    code, output = invoke("labels", "push", "-c", str(file), str(GOLDEN), str(tmp_path / "copy"))
    assert code == 0
    assert json.loads(output[output.index("{") :])["sealed"] is True
    file.write_text("worker: 3\n")
    code, output = invoke("labels", "push", "-c", str(file), str(GOLDEN), str(tmp_path / "copy"))
    assert (code, output) == (2, f"error: {file}: there is no setting 'worker'. Did you mean workers?")


# --- the list of commands ---------------------------------------------------------------------------------------------

GROUPS = {"deit-cli": cli.commands} | {n: c for n, c in cli.commands.commands.items() if isinstance(c, click.Group)}


@pytest.mark.parametrize("name", GROUPS)
def test_every_command_is_listed_once_under_a_heading_that_says_its_purpose(name):
    group = GROUPS[name]
    assert isinstance(group, Group)
    sections = group.sections()
    assert OTHER not in sections, "give the command a heading in program.SECTIONS"
    assert sorted(word for words in sections.values() for word in words) == sorted(group.commands)


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", GROUPS)
def test_the_list_of_commands_has_whole_sentences(name, width):
    words = [] if name == "deit-cli" else [name]
    shown = CliRunner().invoke(cli.commands, [*words, "--help"], terminal_width=width).output
    text = " ".join(shown.split())
    for command in GROUPS[name].commands.values():
        sentence = " ".join((command.help or "").partition("\n")[0].split())
        assert sentence in re.sub(r"\s+", " ", text)
    assert max(map(len, shown.splitlines())) <= max(width, 110)


def test_an_unknown_command_is_listed_as_other():
    group = Group("labels")
    group.command("dance")(lambda: None)
    assert group.sections() == {OTHER: ["dance"]}


# --- man pages --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    try:
        assert invoke("man", "--out", str(folder))[0] == 0
    finally:
        del os.environ["SOURCE_DATE_EPOCH"]
    return folder


def test_every_command_has_a_man_page_with_its_options_and_examples(pages):
    assert len(list(pages.iterdir())) == len(COMMANDS) + len(GROUPS)
    for name, command in COMMANDS.items():
        text = (pages / f"deit-cli-{name.replace(' ', '-')}.1").read_text().replace("\\-", "-")
        assert '"2023-11-14"' in text
        flags = [flag for each in command.params if isinstance(each, click.Option) for flag in each.opts]
        assert [flag for flag in flags if f"\\fB{flag}\\fP" not in text] == []
        kept = re.search(r"^\.SH EXAMPLES?\n\.nf\n(.+?)\n\.fi$", text, flags=re.DOTALL | re.MULTILINE)
        assert kept, name
        assert f"deit-cli {name}" in kept[1]
        assert "\b" not in text


def test_man_pages_are_sound(pages):
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    found = subprocess.run(["mandoc", "-Tlint", "-Wwarning", *pages.iterdir()], capture_output=True, text=True)
    assert found.stdout == ""


def test_man_replaces_its_own_pages_only(pages, tmp_path):
    folder = Path(shutil.copytree(pages, tmp_path / "man"))
    page = folder / "deit-cli-train.1"
    page.write_text(page.read_text() + "old\n")
    assert invoke("man", "--out", str(folder))[0] == 0
    assert "old\n" not in page.read_text()
    page.write_text("mine\n")
    code, output = invoke("man", "--out", str(folder))
    assert (code, output) == (
        2,
        f"error: {page} is no page that deit-cli wrote, and is not replaced. Choose another --out",
    )
    assert page.read_text() == "mine\n"


@pytest.mark.parametrize("seconds", ["today", "1e9", "9" * 20])
def test_a_date_of_man_pages_that_is_none(tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)
    code, output = invoke("man", "--out", str(tmp_path))
    said = f"error: SOURCE_DATE_EPOCH must be a number of seconds since 1970, got '{seconds}'. Unset it"
    assert (code, output) == (2, said)


def test_man_pages_where_none_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    code, output = invoke("man", "--out", str(tmp_path / "file"))
    assert (code, output.splitlines()) == (1, [output])
    assert str(tmp_path / "file") in output
    page = tmp_path / "man/deit-cli.1"
    page.mkdir(parents=True)
    code, output = invoke("man", "--out", str(tmp_path / "man"))
    said = f"error: {page} is no page that deit-cli wrote, and is not replaced. Choose another --out"
    assert (code, output) == (2, said)
