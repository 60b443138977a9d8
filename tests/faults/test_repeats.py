"""A warning that a loop repeats is said once, and counted at the end, whichever process it comes from."""

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.builders import with_checkout, write_tars

from pipeline.machine.loaders import in_processes
from pipeline.repeats import FirstOfEachKind, forward_messages, log_forwarded, warn_counted

ROOT = Path(__file__).parents[2]
CONSTANT = """
import torch

class Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(images), 3) + self.weight

def network():
    return Constant(), {"input_size": (3, 16, 16)}
"""
SAID = "the teacher gave class 0 to all of 300 views"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("constant")
    write_tars(folder / "data", (300, 300))
    (folder / "constant.py").write_text(CONSTANT)
    return folder


def label(folder: Path, name: str, *options: str, verbose: bool = False) -> str:
    """Label forty label shards with a teacher that knows one class; return what a person reads."""
    command = [
        sys.executable,
        "-c",
        "import cli; cli.main()",
        *(["-v"] if verbose else []),
        "precompute",
        "--data",
        "data",
    ]
    command += ["--teacher", "constant:network", "--set", "img_size=16", "--views", "20", "--views-per-shard", "1"]
    command += ["-j", "0", "--out", name, "--log-json", f"{name}.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=with_checkout(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_warning_of_every_label_shard_is_said_once_and_counted(folder, processes):
    said = label(folder, f"out{processes}", "--processes", str(processes))
    assert said.count(SAID) == 1
    assert said.endswith("label shards in which the teacher gave one class to all views: 40 in all\n")
    messages = [json.loads(line) for line in (folder / f"out{processes}.json").read_text().splitlines()]
    assert sum(SAID in message.get("text", "") for message in messages) == 40  # for a machine, all of them


@pytest.mark.slow
def test_verbose_says_every_one(folder):
    assert label(folder, "verbose", verbose=True).count(SAID) == 40


PROGRAM = """
import logging
from pathlib import Path
from pipeline.images.source import open_source
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher

teacher = load_teacher(TeacherConfig(teacher=("constant:network",)), num_classes=None, device="cpu")
config = PrecomputeConfig(data="data", out=Path("library"), views=(0, 20), views_per_shard=1, workers=0)
precompute(config, load_recipe("deit", {"img_size": 16}), teacher, open_source("data"))
logging.getLogger("deit_cli.tests").warning("from here on as before")
assert not logging.lastResort.filters
"""


@pytest.mark.slow
def test_a_program_that_has_not_set_up_logging_reads_the_same(folder):
    """Python itself prints warnings there, each time."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=with_checkout(folder, OMP_NUM_THREADS="1")
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SAID) == 1
    assert "label shards in which the teacher gave one class to all views: 40 in all\n" in done.stderr
    assert done.stderr.endswith("from here on as before\n")


def warn(item: int, _: object) -> int:
    """Work of a loader process."""
    text = "x" * 100_000 if item == 3 else "short"
    warn_counted(logging.getLogger("deit_cli.tests"), "slow files", "file %d: %s", item, text)
    return item


def test_warnings_of_all_loader_processes_are_counted_together(caplog):
    assert list(in_processes(warn, range(10), workers=2)) == list(range(10))
    said = [record for record in caplog.records if getattr(record, "repeats", "") == "slow files"]
    assert sorted(record.getMessage()[:6] for record in said) == [f"file {item}" for item in range(10)]
    first = FirstOfEachKind()
    assert [first.filter(record) for record in said] == [True] + 9 * [False]
    assert max(len(record.getMessage()) for record in said) == 2000  # a longer text is cut


def test_each_kind_is_said_once_and_counted_if_it_came_again(caplog):
    log, handler = logging.getLogger("deit_cli.tests"), logging.NullHandler()
    first, said = FirstOfEachKind(), []
    handler.addFilter(first)
    handler.handle = lambda record: said.append(record.getMessage()) if handler.filter(record) else None
    log.addHandler(handler)
    try:
        for number in range(1200):
            warn_counted(log, "bad views", "view %d is bad", number)
        warn_counted(log, "lost files", "file %s is lost", "x")
        log.warning("something else")
        log.warning("something else")
    finally:
        log.removeHandler(handler)
    assert said == ["view 0 is bad", "file x is lost", "something else", "something else"]
    caplog.clear()
    first.log_counts()
    assert caplog.messages == ["bad views: 1,200 in all"]
    first.log_counts()
    assert len(caplog.messages) == 1


def test_messages_of_another_process_are_heard_with_their_kind(monkeypatch, caplog):
    root, sent = logging.getLogger(), []
    before = root.handlers
    try:
        forward_messages(sent.append)
        warn_counted(logging.getLogger("deit_cli.tests"), "bad views", "view %d is bad", 3)
    finally:
        root.handlers = before
    (record,) = sent
    assert (record.msg, record.args, record.repeats) == ("view 3 is bad", None, "bad views")
    log_forwarded(record)
    assert caplog.messages == ["view 3 is bad"]


def test_a_process_that_nobody_hears_goes_on(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError

    root = logging.getLogger()
    before = root.handlers
    try:
        forward_messages(broken)
        logging.getLogger("deit_cli.tests").warning("nobody hears this")
    finally:
        root.handlers = before
    assert capsys.readouterr().err == ""


# A warning that stands here can come only a few times in a command, whatever the size of the data. All others go through
# `warn_counted`.
ONCE = {
    "pipeline.overview.card.refresh_card",
    "pipeline.exchange.export.export_labels",
    "pipeline.exchange.pack.rows",
    "pipeline.exchange.fkd.list_files",
    "pipeline.stage1.indexing.index_samples",
    "pipeline.sharing.merging._has_images",
    "pipeline.stage1.precompute._warn_of_sorted_classes",
    "pipeline.pixels.handover.renders_on_gpu",
    "pipeline.pixels.render.warn_without_kernel",
    "pipeline.repeats.log_counts",
    "pipeline.repeats.warn_counted",
    "pipeline.sharing.transfer._carry",
    "pipeline.teacher.teacher._launch_or_halve",  # halves a batch
    "pipeline.labels.combined._common_records",
    "pipeline.labels.combined._common_views",
    "pipeline.labels.replay._probes_of",
    "trainer.evaluate._compare_names",
    "trainer.evidence.analyse._labels_fit",
    "trainer.evidence.audit_files._open",
    "trainer.evidence.linear._check_images",
    "trainer.evidence.scores._read_linear",
    "trainer.metrics._each",  # removes a tracker
    "trainer.run.announce",
    "trainer.run.open_data",
    "trainer.studies.running._stop",
    "trainer.trackers.__init__",
}


def test_every_other_warning_may_be_repeated():
    found = set()
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if calls & {"log.warning", "logger.warning"}:
                    found.add(".".join((*path.relative_to(ROOT).with_suffix("").parts, function.name)))
    assert found == ONCE
