"""Completion in a shell: what it proposes, how fast, and the scripts in real shells."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from click.shell_completion import ShellComplete
from support.builders import with_checkout
from support.terminal import read_to_end

import cli
from pipeline.settings import completion
from pipeline.settings.completion import SHELLS, VARIABLE, script
from pipeline.views.recipe import Recipe
from trainer.student import SHORT_NAMES

ROOT = Path(__file__).parents[2]


def proposed(*words: str) -> list[tuple[str, str]]:
    """Return kind and text of each proposal for the last word."""
    shell = ShellComplete(cli.commands, {}, "deit-cli", VARIABLE)
    return [(item.type, item.value) for item in shell.get_completions(list(words[:-1]), words[-1])]


def plain(*words: str) -> list[tuple[str, str]]:
    return [("plain", word) for word in words]


FILE = ("file", "sh")  # the shell completes paths itself
CASES = [
    # the words of a command line, the last to be completed; what is proposed
    (["tra"], plain("train")),
    (["labels", "p"], plain("pull", "push")),
    (["train", "--distillation-t"], plain("--distillation-type", "--distillation-tau")),
    (["train", "--distillation-type", ""], plain("none", "soft", "hard")),
    (["train", "--model", "deit-"], plain("deit-ti", "deit-s", "deit-b")),
    (["train", "--model", "deit_small_d"], plain("deit_small_distilled_patch16_224")),
    (["precompute", "--teacher", "regnety_16"], plain("regnety_160")),
    (["precompute", "--teacher", "regnety_160.de"], plain("regnety_160.deit_in1k")),
    (["precompute", "--teacher", "runs/te"], [("file", "runs/te")]),
    (["precompute", "--recipe", "d"], plain("deit", "deit-384")),
    (["precompute", "--recipe", "sh"], [FILE]),
    (["precompute", "--set", "mixup"], plain("mixup=", "mixup_prob=", "mixup_switch_prob=")),
    (["precompute", "--set", "mix-b"], plain("mix_block=")),
    (["precompute", "--data", "sh"], [FILE]),
    (["train", "--labels", "sh"], [FILE]),
    (["train", "-c", "sh"], [FILE]),
    (["labels", "info", "sh"], [FILE]),
    (["analyse", "sh"], [FILE]),
    (["completion", ""], plain("bash", "zsh", "fish")),
]


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_a_word_is_completed(words, expected):
    assert proposed(*words) == expected


def test_a_word_is_completed_while_the_rest_is_wrong(monkeypatch):
    """A half-written command line is no error, and neither is a variable."""
    monkeypatch.setenv("DEIT_CLI_TRAIN_EPOCH", "3")
    monkeypatch.setenv("DEIT_CLI_TRAIN_SET", "'not closed")
    monkeypatch.setenv("DEIT_CLI_TRAIN_BATCH_SIZE", "many")
    assert proposed("train", "-c", "nothing.yaml", "-q", "-v", "--labels", "", "--tail", "s") == plain("spread")


def test_the_names_are_those_of_timm_and_of_this_program():
    assert set(timm.list_models()) <= set(completion._timm_models(tags=False))
    published = {name for name in timm.list_pretrained() if "." in name}
    made_otherwise = published - set(completion._timm_models(tags=True))  # names that timm computes from others
    assert len(made_otherwise) < 0.03 * len(published), sorted(made_otherwise)
    assert list(SHORT_NAMES) == list(completion.SHORT_STUDENTS)
    assert [word for _, word in proposed("train", "--set", "")] == [f"{name}=" for name in Recipe.model_fields]


@pytest.mark.parametrize("words", ["train --model regn", "precompute --set mi", "labels in"])
def test_an_answer_takes_under_half_a_second_and_no_torch(words):
    """The time is that of the processor: the machine may be busy with other tests."""
    position = str(len(words.split()))
    variables = {VARIABLE: "bash_complete", "COMP_WORDS": f"deit-cli {words}", "COMP_CWORD": position}
    code = "import sys, cli\ntry: cli.main()\nfinally: print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], env=with_checkout() | variables, cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith("plain,")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_sound(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script(shell), text=True, check=True)


def test_the_changes_to_the_scripts_of_click_find_their_place():
    scripts = "".join(map(script, SHELLS))
    assert [changed for changed in completion._CHANGES.values() if changed not in scripts] == []


SHIM = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(ROOT)!r})
if {VARIABLE!r} in os.environ:
    import cli
    cli.main()
print("CALLED", *sys.argv[1:], sep="|")
"""


@pytest.mark.slow
def test_tab_completes_in_a_real_bash(tmp_path):
    """The keys that a person presses, and what the program is then called with."""
    pty = pytest.importorskip("pty")
    program = tmp_path / "bin" / "deit-cli"
    program.parent.mkdir()
    program.write_text(SHIM)
    program.chmod(0o755)
    (tmp_path / "shards of mine").mkdir()
    (tmp_path / "script").write_text(script("bash"))
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(tmp_path)}
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=environment
    )
    os.close(slave)
    os.write(master, b"source ./script\n")
    os.write(master, b"deit-cli tra\t--set mixup_s\t0.5 --labels sha\t --tail s\t--model deit_small_d\t\nexit\n")
    said = read_to_end(master)
    assert shell.wait(timeout=60) == 0
    called = "CALLED|train|--set|mixup_switch_prob=0.5|--labels|shards of mine/|--tail|spread|--model|deit_small_distilled_patch16_224"
    assert called in said.decode()
