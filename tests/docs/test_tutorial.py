"""docs/tutorial.md runs from its first command to its last, on real images where there are some, with smaller numbers.

A fence with a title is a file of the reader, an indented line is a command, and a fence of text is what a command printed, numbers aside.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from support.builders import encoded, photo, with_checkout

import cli

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
SMALLER = {  # what takes minutes on the page, in seconds
    "slice(0, 8192)": "slice(0, 256)",
    "--epochs 20": "--epochs 1",
    "epochs: 12": "epochs: 1",
    "warmup_epochs: 1\n": "warmup_epochs: 0\n",
    "--warmup-epochs 1": "--warmup-epochs 0",
    "--batch-size 128": "--batch-size 60",
    "--views 0:12": "--views 0:2",
    "--samples 3 --views 5": "--samples 3 --views 2",
}
ADDED = "-j 0 --device cpu"  # no loader processes: each takes seconds to start
TAKES_THEM = ("train", "precompute", "evaluate", "report")
CANNOT = ("python -m venv", "pip install", "hf download")  # the tests have an environment, and no network
TEST_IMAGES = 64
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIECE = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$|^    (\S[^\n]*)$', flags=re.MULTILINE | re.DOTALL)


def pieces() -> list[tuple[str, str, str]]:
    """Return what a reader does, in order: ("file", name, text), ("command", "", line) and ("printed", "", lines)."""
    page = re.sub(r"<!--.*?-->", "", TUTORIAL, flags=re.DOTALL)
    page = re.sub(r" *\\\n *", " ", page)
    found: list[tuple[str, str, str]] = []
    for kind, title, text, command in PIECE.findall(page):
        if command:
            found.append(("command", "", command))
        elif title:
            found.append(("file", title, text))
        else:
            assert kind == "text"
            found.append(("printed", "", text))
    return found


def smaller(text: str) -> str:
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    return text


def write_cifar10(folder: Path) -> None:
    """Write the two Parquet files that the Hub has, with real images where there are some."""
    folder.mkdir(parents=True)
    real = Path(os.environ.get("DEIT_CLI_DATA", "nowhere"), "cifar10")
    for name, rows in (("train", 50_000), ("test", TEST_IMAGES)):
        file = f"{name}-00000-of-00001.parquet"
        if (real / file).exists():
            pq.write_table(pq.read_table(real / file).slice(0, rows), folder / file, row_group_size=1000)
        else:
            pq.write_table(made_up(min(rows, 256)), folder / file)


def made_up(rows: int) -> pa.Table:
    """Return photo-like images in the columns of CIFAR-10 on the Hub."""
    images = [{"bytes": encoded(photo(row, 32, 32)), "path": None} for row in range(rows)]
    label = {"names": list(CLASSES), "_type": "ClassLabel"}
    about = json.dumps({"info": {"features": {"label": label}}})
    return pa.table({"img": images, "label": [row % len(CLASSES) for row in range(rows)]}).replace_schema_metadata(
        {"huggingface": about}
    )


def run(line: str, folder: Path) -> str:
    """Run a command of the page, and return what it printed: deit-cli in this process, which has torch already."""
    words = shlex.split(line)
    if words[0] == "deit-cli":
        return run_here([*words[1:], *(ADDED.split() if words[1] in TAKES_THEM else [])])
    assert words[0] == "python", line
    done = subprocess.run(
        [sys.executable, *words[1:]],
        env=with_checkout(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
    return done.stdout


def run_here(arguments: list[str]) -> str:
    messages: list[str] = []
    keeper = logging.NullHandler()
    keeper.handle = lambda record: bool(messages.append(record.getMessage()))
    logging.getLogger("deit_cli").addHandler(keeper)
    try:
        result = CliRunner().invoke(cli.commands, arguments)
    finally:
        logging.getLogger("deit_cli").removeHandler(keeper)
    printed = "\n".join([*messages, result.output])
    assert result.exit_code == 0, f"{arguments}\n{printed[-3000:]}\n{result.exception}"
    return printed


def without_values(line: str) -> str:
    """Return a pattern of a printed line with any hash, any number and any white space."""
    words = re.sub(r"(?<=weights )[0-9a-f]{12}", "HASH", line).split()
    numbers = [re.sub(r"\d[\d,]*(?:\\\.\d+)?", r"[\\d,.]+", re.escape(word)) for word in words]
    return r"\s+".join(numbers).replace("HASH", "[0-9a-f]{12}")


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_cifar10(tmp_path / "cifar10/plain_text")
    printed = ""
    for kind, name, text in pieces():
        if kind == "file":
            (tmp_path / name).write_text(smaller(text))
        elif kind == "command" and not text.startswith(CANNOT):
            printed += run(smaller(text), tmp_path)
        elif kind == "printed":
            for line in text.splitlines():
                assert re.search(without_values(line), printed), f"nothing printed {line!r}"
    for name in ("first.png", "views.png", "report.html", "runs/student/last/model.safetensors"):
        assert (tmp_path / name).exists(), name


def test_each_smaller_number_is_one_of_the_page():
    assert [long for long in SMALLER if long not in TUTORIAL] == []


def test_each_picture_is_small_and_has_a_description():
    shown = re.findall(r"!\[([^\]]*)\]\((pictures/[\w.-]+)\)", TUTORIAL)
    assert {path for _, path in shown} == {
        f"pictures/{path.name}" for path in (ROOT / "docs/pictures").glob("tutorial-*")
    }
    for text, path in shown:
        assert len(text) > 30
        assert (ROOT / "docs" / path).stat().st_size < 150_000
