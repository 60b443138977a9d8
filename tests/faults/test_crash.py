"""An error that nobody foresaw, in any command: one line, a report in a file, exit code 70, and never a traceback."""

import logging
import re
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from support.builders import make_labels, write_tars
from support.command_tree import COMMANDS
from support.loading import faulty

import cli
from pipeline import crash
from pipeline.crash import CRASHED, crash_of, save_report, shortened
from pipeline.errors import DiskFullError, LoaderLostError
from pipeline.machine.loaders import in_processes
from pipeline.settings import program

# Something that each command calls once its arguments are understood, and arguments that bring it there.
LABELS, DATA = "LABELS", "DATA"
TEACHER = ["--data", DATA, "--teacher", "test_resnet", "--no-pretrained", "--device", "cpu"]
INJECTED = {
    "precompute": ("pipeline.stage1.engines.load_here", [*TEACHER, "--out", "out"]),
    "estimate": ("pipeline.cost.estimate.load_here", TEACHER),
    "bench stage1": ("pipeline.cost.bench.load_here", TEACHER),
    "train": ("trainer.loop.build_state", ["--labels", LABELS]),
    "bench stage2": ("trainer.bench.bench_training", ["--labels", LABELS]),
    "evaluate": ("trainer.evidence.scores.open_student", ["--model", "test_resnet", "--data", DATA]),
    "report": ("trainer.evidence.report.collect", [LABELS]),
    "export": ("trainer.exports.export.open_origin", ["run", "--to", "timm"]),
    "bench inference": ("trainer.evidence.speed.find_networks", ["timm:test_resnet"]),
    "analyse": ("trainer.evidence.analyse.find_networks", ["run"]),
    "labels info": ("pipeline.overview.summary.summarise", [LABELS]),
    "labels verify": ("pipeline.verify.verify.check_images", [LABELS]),
    "labels sign": ("pipeline.sharing.signing._library", [LABELS, "--private-key", "team.pem"]),
    "labels audit": ("trainer.evidence.audit._audit_shard", [LABELS]),
    "labels show": ("pipeline.overview.sheet._spread", [LABELS]),
    "labels push": ("pipeline.sharing.transfer._carry", [LABELS, "elsewhere"]),
    "labels pull": ("pipeline.sharing.transfer._carry", [LABELS, "elsewhere"]),
    "labels merge": ("pipeline.sharing.merging.merge", ["out", LABELS]),
    "labels extend": (
        "pipeline.stage1.engines.load_here",
        [LABELS, "--views", "3:5", "--teacher", "support.builders:confident_cnn"],
    ),
    "labels import": ("pipeline.exchange.imports.import_labels", ["fkd", "path", "out"]),
    "labels card": ("pipeline.overview.card.write_card", [LABELS]),
    "labels export": ("pipeline.exchange.export.plan_export", [LABELS, "out"]),
    "pack": ("pipeline.exchange.pack.open_source", [DATA, "out"]),
    "index": ("pipeline.images.index.write_sidecar", [DATA]),
    "doctor": ("pipeline.doctor.findings.report_table", []),
    "compare": ("trainer.studies.compare.read_study", ["study.yaml"]),
    "models": ("trainer.models.create_student", ["deit-ti"]),
    "recipes": ("pipeline.overview.recipes.describe_recipes", []),
    "init": ("trainer.advice.asking.open_source", ["mine", "--data", DATA, "--yes"]),
    "runs": ("trainer.folders.read_plan", [LABELS]),
    "demo": ("trainer.evidence.demo.run_demo", ["--out", "out"]),
    "completion": ("cli.script", ["bash"]),
    "man": ("pipeline.settings.manual.write_pages", ["--out", "out"]),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def labels(data, tmp_path_factory) -> str:
    return str(make_labels(tmp_path_factory.mktemp("labels") / "set", data).folder)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Run the program in this process; return exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["deit-cli", *arguments])
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # given back afterwards
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    return int(code or 0), capsys.readouterr().err


def test_no_command_is_left_out():
    assert sorted(INJECTED) == sorted(COMMANDS)


SLOW = {"doctor": pytest.mark.slow}  # it imports every package in a process of its own


@pytest.mark.parametrize("command", [pytest.param(name, marks=SLOW.get(name, ())) for name in INJECTED])
def test_an_error_that_nobody_foresaw_is_one_line_and_a_report(command, data, labels, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("the moon\nand the stars")

    target, arguments = INJECTED[command]
    monkeypatch.setattr(target, broken)
    monkeypatch.chdir(tmp_path)
    given = [{LABELS: labels, DATA: data}.get(word, word) for word in arguments]
    code, stderr = run(monkeypatch, capsys, *command.split(), *given)
    assert code == CRASHED == 70
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert re.match(
        r"error: KeyError: .*the moon.* \(tests/faults/test_crash\.py:\d+, in broken\)\. This is a fault of deit-cli",
        last,
    )
    (report,) = tmp_path.glob("deit-cli-crash-*.txt")
    assert report.name in last
    text = report.read_text()
    for part in ("KeyError", f"command: deit-cli {command}", "Traceback", "torch ", f"python {sys.version.split()[0]}"):
        assert part in text
    assert str(tmp_path) not in text


ONWARD = {
    "precompute": "; the same command continues",
    "train": "; the same command continues, with --resume: from the last checkpoint, or from the beginning if there is none",
    "labels push": "; the same command continues",
    "labels verify": "",
    "export": "",
}


@pytest.mark.parametrize("command", ONWARD)
@pytest.mark.parametrize(
    ("reason", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (DiskFullError("/a: No space left on device", fix="Free some space"), 1, "error: /a: No space left on device. Free some space"),
        (LoaderLostError("no batch came for 9 s", fix="Use fewer"), 1, "error: no batch came for 9 s. Use fewer"),
    ],
)  # fmt: skip
def test_what_interrupts_a_command_says_how_to_go_on_where_a_command_does(
    reason, code, said, command, data, labels, tmp_path, monkeypatch, capsys
):
    def ended(*_, **__):
        raise reason

    target, arguments = INJECTED[command]
    monkeypatch.setattr(target, ended)
    monkeypatch.chdir(tmp_path)
    given = [{LABELS: labels, DATA: data}.get(word, word) for word in arguments]
    found, stderr = run(monkeypatch, capsys, *command.split(), *given)
    assert found == code
    assert [line for line in stderr.splitlines() if line.strip()][-1] == said + ONWARD[command]


@pytest.mark.parametrize("kind", [KeyError, RuntimeError])
def test_an_error_in_a_loader_process_is_told_with_its_own_words_and_place(kind):
    with pytest.raises(kind) as caught:
        list(in_processes(partial(faulty, kind), range(9), workers=1))
    found = crash_of(caught.value)
    words = repr("a defect") if kind is KeyError else "a defect"
    assert re.fullmatch(rf"{kind.__name__}: {words} \(tests/support/loading\.py:\d+, in faulty\)", found.summary)
    assert "in_processes" in found.traceback
    assert "in faulty" in found.traceback


def test_verbose_prints_it_too(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("trainer.evidence.demo.run_demo", broken)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("deit_cli").level
    try:
        code, stderr = run(monkeypatch, capsys, "--verbose", "demo")
    finally:
        logging.getLogger("deit_cli").setLevel(level)
    assert code == 70
    assert "Traceback (most recent call last)" in stderr
    assert stderr.splitlines()[-1].startswith("error: KeyError: 'x'")


def test_secrets_and_long_paths_are_not_in_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["labels", "sign", "/data/team/x/shards", "--identity-token", "abc123", "--other-token=abc123"]
    path = save_report(
        crash_of(ValueError("https://me:abc123@host/x?sig=abc123")), arguments, {"identity_token": "abc123"}
    )
    text = (path or Path()).read_text()
    assert "abc123" not in text
    assert "deit-cli labels sign …/x/shards --identity-token HIDDEN --other-token=HIDDEN" in text


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("--data /data/team/imagenet/train --out x", "--data …/imagenet/train --out x"),
        ("--data=/data/team/imagenet/train", "--data=…/imagenet/train"),
        (f"{Path.home()}/a/b/c", "…/b/c"),
        ("/etc/passwd", "/etc/passwd"),
        ("a/relative/path/of/mine", "a/relative/path/of/mine"),
        ("s3://bucket/a/b/c", "s3://bucket/a/b/c"),
        ("https://u:p@host/a/b?signature=1, gone", "https://host/a/b gone"),
        ('File "/v/lib/python3.11/site-packages/torch/nn/x.py", line 3', 'File "torch/nn/x.py", line 3'),
        (f'File "{crash.ROOT}/pipeline/x.py"', 'File "pipeline/x.py"'),
    ],
)
def test_paths_keep_their_end(text, short):
    assert shortened(text) == short


def test_a_report_that_no_folder_takes_is_said_to_be_missing(monkeypatch, capsys):
    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("trainer.evidence.demo.run_demo", broken)
    monkeypatch.chdir("/proc")
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    code, stderr = run(monkeypatch, capsys, "demo")
    assert code == 70
    assert "the report could not be written" in stderr


def test_a_thread_that_fails_has_no_traceback_either(tmp_path, monkeypatch, capsys):
    def starts_a_thread(*_, **__):
        thread = threading.Thread(target=lambda: {}["x"])
        thread.start()
        thread.join()
        return {}

    monkeypatch.setattr("trainer.evidence.demo.run_demo", starts_a_thread)
    monkeypatch.chdir(tmp_path)
    code, stderr = run(monkeypatch, capsys, "demo", "--json")
    assert code == 0
    assert "Traceback" not in stderr
    assert "error: KeyError: 'x'" in stderr


@pytest.mark.slow
def test_a_teacher_process_that_fails_says_of_what(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "failing.py").write_text(
        "import multiprocessing, torch\n\n"
        "class Failing(torch.nn.Linear):\n"
        "    def forward(self, images):\n"
        "        if multiprocessing.parent_process() and len(images) > 2:\n"
        "            raise KeyError('only elsewhere')\n"
        "        return super().forward(images.flatten(1))\n\n"
        "def network():\n    torch.manual_seed(0)\n    return Failing(768, 3), {'input_size': (3, 16, 16)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["--data", data, "--teacher", "failing:network", "--set", "img_size=16", "--out", "out", "-j", "0"]
    code, stderr = run(monkeypatch, capsys, "precompute", *arguments, "--processes", "2")
    assert code == 1
    assert "Traceback" not in stderr
    assert re.search(
        r"Everything else is complete\. The last worker died of KeyError: 'only elsewhere' \(\S*failing\.py:6, in forward\);",
        stderr,
    )
