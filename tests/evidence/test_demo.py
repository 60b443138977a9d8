"""The demo does what README says of it: the whole job, and a student that its teacher helps."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import with_checkout
from support.label_sets import problems_in

from pipeline.errors import StoppedError, StorageError, UsageError
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.overview.sheet import Tile
from pipeline.stage1.precompute import precompute
from pipeline.teacher.loading import load_teacher
from trainer.evidence.demo import TITLES, demo_table, draw_results, run_demo, three_seeds_top1, write_digits
from trainer.metrics import MetricsLog

ROOT = Path(__file__).parents[2]


def demo(out) -> dict[str, Any]:
    return run_demo(
        out,
        seed=0,
        load_teacher=load_teacher,
        precompute=precompute,
        shown=lambda: nullcontext(lambda *_: None),
    )


def test_digits_are_written_as_sources_with_900_unlabelled(tmp_path):
    folders = write_digits(tmp_path)
    sources = {name: open_source(folder) for name, folder in folders.items()}
    assert {name: source.num_samples for name, source in sources.items()} == {
        "labelled": 100,
        "training": 1000,
        "evaluation": 797,
    }
    labels = [label for shard in sources["training"].shards for label in shard.class_labels]
    assert sum(label is None for label in labels) == 900
    keys = {name: {key for shard in source.shards for key in shard.keys} for name, source in sources.items()}
    assert keys["labelled"] < keys["training"]
    assert not keys["training"] & keys["evaluation"]
    other = write_digits(tmp_path / "again")
    assert (other["training"] / "training.tar").read_bytes() == (folders["training"] / "training.tar").read_bytes()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty\. Choose another --out"):
        demo(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "demo"))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StorageError, match=r"demo: Permission denied\. Choose a folder that can be written"):
        demo(tmp_path / "demo")


def test_a_stopped_demo_says_how_to_start_again(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise StoppedError("stopped by SIGINT: continue with --resume", 2)

    monkeypatch.setattr("trainer.evidence.demo.train", stopped)
    with pytest.raises(
        StoppedError, match=r"stopped and cannot be resumed: to start again, delete .*demo or choose another --out"
    ) as caught:
        demo(tmp_path / "demo")
    assert caught.value.exit_code == 130


@pytest.mark.slow
def test_what_a_step_says_last_comes_before_the_next_step_and_the_table(tmp_path):
    script = """
import logging, cli, trainer.evidence.demo
from pipeline.machine.progress import Tick
def run_demo(*_, shown, **__):
    for step in ("label", "index"):
        with shown() as progress:
            progress(Tick(step, 1, 2))
        logging.getLogger("deit_cli.demo").info("after %s", step)
    return {}
trainer.evidence.demo.run_demo = run_demo
trainer.evidence.demo.demo_table = lambda _: "the table"
cli.main()
"""
    command = [sys.executable, "-c", script, "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, env=with_checkout(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    there = "1 of 2  1 of them there before"
    assert done.stdout.splitlines() == [f"label {there}", "after label", f"index {there}", "after index", "the table"]


def small_runs(folder: Path) -> tuple[dict, dict]:
    """Return results and run folders as the demo makes them: two epochs, and two heads where labels were learnt from."""
    runs, results = {}, {}
    for place, name in enumerate(TITLES):
        runs[name] = folder / name
        log = MetricsLog(runs[name], next_index=0)
        numbers = {"teacher_agreement": 0.5, "distill_loss": 7.0} if name in ("hard", "soft") else {}
        for epoch in range(2):
            log.add("train", epoch, epoch=epoch, class_loss=2.0 - epoch, loss=9.0, **numbers)
        results[name] = {"class_head": {"top1": 90.0 + place}} | ({"mean_logits": {"top1": 95.0}} if numbers else {})
    return results, runs


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))[1])
    return figures


def pictured(folder: Path) -> None:
    """Draw small runs, twelve views and the tokens of two runs."""
    results, runs = small_runs(folder)
    views = [[Tile(np.full((4, 4, 3), number, np.uint8), f"view {number}")] for number in range(12)]
    cosines = {"hard": {"input": 0.1, "blocks": [0.5, 0.75]}, "soft": {"input": -0.25, "blocks": [0.5, 0.8]}}
    draw_results(results, runs, views, cosines, folder / "results.png")


def test_the_bars_are_the_compared_answers_and_the_lines_are_the_spread_of_three_seeds(tmp_path, drawn):
    pictured(tmp_path)
    axis = drawn[0].axes[0]
    bars, *lines = axis.containers
    # The second and the third have two heads: their mean of logits is compared.
    assert [bar.get_height() for bar in bars] == [90.0, 95.0, 95.0, 93.0]
    assert [text.get_text() for text in axis.texts] == ["90.0", "95.0", "95.0", "93.0"]
    for name, line in zip(TITLES, lines, strict=True):
        (low, high) = line[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((min(three_seeds_top1(name)), max(three_seeds_top1(name))))
    assert "bars: this run, lines: range of three seeds on one machine, measured in advance" in axis.get_title()
    assert axis.get_ylabel() == f"top-1, % (axis starts at {axis.get_ylim()[0]:.0f}, not at 0)"


def test_the_picture_has_twelve_views_the_tokens_and_the_agreement(tmp_path, drawn):
    pictured(tmp_path)
    _, *views, tokens, agreement = drawn[0].axes
    assert [axis.get_title(loc="left") for axis in views] == [f"view {number}" for number in range(12)]
    assert [axis.images[0].get_array()[0, 0, 0] for axis in views] == list(range(12))
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in (tokens, agreement)
    ]
    assert lines == [
        {"DeiT, hard labels": ([0, 1, 2], [0.1, 0.5, 0.75]), "DeiT, soft labels": ([0, 1, 2], [-0.25, 0.5, 0.8])},
        {name: ([0.5, 1.0], [0.5, 0.5]) for name in ("DeiT, hard labels", "DeiT, soft labels")},
    ]
    assert tokens.get_ylim()[0] < -0.25
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_the_seeds_in_the_picture_are_those_that_readme_quotes():
    text = " ".join((ROOT / "README.md").read_text().split())
    alone = three_seeds_top1("alone")
    for kind in ("hard", "soft"):
        gains = [f"{top1 - base:.1f}" for top1, base in zip(three_seeds_top1(kind), alone, strict=True)]
        assert f"{gains[0]}, {gains[1]} and {gains[2]} points from {kind} labels" in text
    for name, title in TITLES.items():
        heads = re.search(rf"{re.escape(title)}((?: [\d.]+)+)", text)
        assert heads
        assert heads[1].split()[2 if name in ("hard", "soft") else 0] == f"{three_seeds_top1(name)[0]:.1f}"


@pytest.mark.slow
def test_the_distilled_student_beats_the_same_student_alone_by_2_points(tmp_path):
    result = demo(tmp_path / "demo")
    table = demo_table(json.loads(json.dumps(result)))
    study = json.loads((tmp_path / "demo/study.json").read_text())
    for name in ("DeiT, hard labels", "DeiT, soft labels"):
        (cell,) = [cell for cell in study["cells"] if cell["name"] == name]
        assert cell["against_baseline"]["difference"] >= 2, table  # 4.5 at least in three seeds
        scores = json.loads((tmp_path / "demo" / cell["seeds"][0]["scores_file"]).read_text())["scores"]
        assert cell["top1"]["mean"] == scores["mean_logits"]["top1"]
        assert scores == result["scores"][name.split()[1]]
        assert f"  {scores['mean_logits']['top1']:.1f}" in table
    assert study["teachers"][0]["top1"] > 90
    page = (tmp_path / "demo/report.html").read_text()
    for heading in (
        "Results",
        "Training",
        "Answers",
        "Tokens",
        "Disagreement",
        "Calibration",
        "Costs",
        "Label set",
        "Gallery",
    ):
        assert f">{heading}</h2>" in page
    assert page.count('alt="View') == 12
    assert f"Report: {tmp_path}/demo/report.html" in table
    assert problems_in(LabelSet.open(tmp_path / "demo/labels")) == []
    for name in ("labels.png", "results.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:4] == b"\x89PNG"
