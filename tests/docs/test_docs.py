"""Every command that the documentation shows is one that the command line takes, those that cannot run here too; its scripts are sound shell."""

import re
import shlex
import subprocess
from itertools import takewhile
from pathlib import Path

import click
import pytest

import cli

ROOT = Path(__file__).parents[2]
README_LINES = 150  # a reader who is new here decides on this page
DOCS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/examples/*.md")))
PAGES = ("README.md", *DOCS, "benchmarks/README.md")


def shown_in(page: str) -> list[str]:
    """Return each `deit-cli ...` of a page's code blocks, continued lines joined, comments and launchers left out."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    lines += [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    return [f"deit-cli{line.split('deit-cli', 1)[1]}" for line in lines if re.search(r"(^|\s)deit-cli ", line)]


OF_ITS_OWN = {"docs/tutorial.md"}  # tests/docs/test_tutorial.py runs its commands, with the files that the page shows
SHOWN = sorted({line for page in {*PAGES} - OF_ITS_OWN for line in shown_in(page)})


def test_the_pages_show_commands():
    assert len(SHOWN) >= 15
    assert any("--engine ray" in line for line in SHOWN)


@pytest.mark.parametrize("line", SHOWN)
def test_a_shown_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # a file of settings that is shown must be there
    args = shlex.split(line, comments=True)[1:]
    args = list(takewhile(lambda each: each not in (">", "&"), args))  # the rest is the shell's
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


# --- links and paths --------------------------------------------------------------------------------------------------

ALL_PAGES = (*PAGES, "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/adr/*.md"))))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), link
        assert not anchor or anchor in anchors_of(there), link


@pytest.mark.parametrize("page", ALL_PAGES)
def test_paths_of_this_repository_exist(page):
    named = re.findall(r"`((?:pipeline|trainer|tests|docs|benchmarks|configs)/[\w./-]*)`", (ROOT / page).read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_index_has_a_sentence_for_each_page():
    index = (ROOT / "docs/README.md").read_text()
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")):
        if path.name != "README.md":
            assert re.search(
                rf"^- \[[^]]*\]\({path.relative_to(ROOT / 'docs')}\): \w.{{20,}}", index, flags=re.MULTILINE
            ), path


def test_readme_fits_on_a_few_screens_and_has_the_two_set_up_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES
    assert '    pip install ".[demo]" && deit-cli demo' in lines
    assert '    pip install -e ".[test]" && pytest' in lines
