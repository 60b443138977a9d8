"""Every command that the documentation shows is one that the command line takes, those that cannot run here too; its scripts are sound shell."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

import cli

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")), "benchmarks/README.md")


def shown_in(page: str) -> list[str]:
    """Return each `deit-cli ...` of a page's code blocks, continued lines joined, comments and launchers left out."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    lines += [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    return [f"deit-cli{line.split('deit-cli', 1)[1]}" for line in lines if re.search(r"(^|\s)deit-cli ", line)]


SHOWN = sorted({line for page in PAGES for line in shown_in(page)})


def test_the_pages_show_commands():
    assert len(SHOWN) >= 15
    assert any("--engine ray" in line for line in SHOWN)


@pytest.mark.parametrize("line", SHOWN)
def test_a_shown_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # a file of settings that is shown must be there
    args = shlex.split(line, comments=True)[1:]
    command: click.Command = cli.commands
    while isinstance(command, click.Group):
        chosen = command.commands[args.pop(0)]
        command = chosen
    given = {arg.split("=")[0] for arg in args if arg.startswith("-")}
    context = command.make_context("deit-cli", args)
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert given <= known
    assert context.args == []  # nothing of it was left over


@pytest.mark.parametrize("page", PAGES)
def test_shown_scripts_are_sound_shell(page):
    for script in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
