"""The demo does what README says of it: the whole job, and a student that its teacher helps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders import with_checkout
from label_sets import problems_in

from pipeline.errors import UsageError
from pipeline.inspection import contact_sheet
from pipeline.labelset import LabelSet
from pipeline.precompute import precompute
from pipeline.sources import open_source
from pipeline.teacher_loading import load_teacher
from trainer.demo import THREE_SEEDS, TITLES, draw_results, run_demo, write_digits
from trainer.metrics import MetricsLog

ROOT = Path(__file__).parent.parent


def demo(out) -> str:
    return run_demo(
        out,
        seed=0,
        load_teacher=load_teacher,
        precompute=precompute,
        contact_sheet=contact_sheet,
        progress=lambda *_: None,
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
    with pytest.raises(UsageError, match="is not empty: choose another --out"):
        demo(tmp_path)


def test_the_table_comes_after_the_last_line_of_progress(tmp_path):
    script = """
import cli, trainer.demo
from pipeline.progress import Tick
trainer.demo.run_demo = lambda *_, progress, **__: progress(Tick("label", 1, 2)) or "the table"
cli.main()
"""
    command = [sys.executable, "-c", script, "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, env=with_checkout(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout.splitlines() == ["label 1 of 2  1 of them made before", "the table"]


def test_the_picture_shows_the_results_and_like_with_like(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    runs, results = {}, {}
    for place, name in enumerate(TITLES):
        runs[name] = tmp_path / name
        log = MetricsLog(runs[name], next_index=0)
        numbers = {"teacher_agreement": 0.5} if name in ("hard", "soft") else {}
        for epoch in range(2):
            log.add("train", epoch, epoch=epoch, class_loss=2.0 - epoch, loss=9.0, **numbers)
        results[name] = {"class_head": {"top1": 80.0 + place}} | ({"mean_logits": {"top1": 95.0}} if numbers else {})
    drawn, bars = [], []
    plot, bar = Axes.plot, Axes.bar
    monkeypatch.setattr(
        Axes, "plot", lambda axis, *a, **k: (drawn.append((axis.get_title(), *a)), plot(axis, *a, **k))[1]
    )
    monkeypatch.setattr(Axes, "bar", lambda axis, *a, **k: (bars.append(a[1]), bar(axis, *a, **k))[1])
    draw_results(results, runs, tmp_path / "results.png")
    assert bars == [[80.0, 95.0, 95.0, 83.0]]
    assert [(share, values) for _, share, values in drawn] == [([0.5, 1.0], [2.0, 1.0])] * 2 + [
        ([0.5, 1.0], [0.5, 0.5])
    ] * 2
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_the_seeds_in_the_picture_are_those_that_readme_quotes():
    text = (ROOT / "README.md").read_text()
    gains = {
        kind: [f"{top1 - alone:.1f}" for top1, alone in zip(THREE_SEEDS[kind], THREE_SEEDS["alone"], strict=True)]
        for kind in ("hard", "soft")
    }
    said = re.search(
        r"gained ([\d.]+), ([\d.]+) and\s+([\d.]+) points .*?from hard\s+labels, ([\d.]+), ([\d.]+) and\s+([\d.]+) from",
        text,
        re.DOTALL,
    )
    assert said
    assert sorted(gains["hard"]) == sorted(said.groups()[:3])
    assert sorted(gains["soft"]) == sorted(said.groups()[3:])
    for name, title in TITLES.items():
        shown = re.search(rf"    {re.escape(title)} +(.*)", text)
        assert shown
        assert float(shown[1].split()[2 if name in ("hard", "soft") else 0]) == THREE_SEEDS[name][0]


@pytest.mark.slow
def test_the_distilled_student_beats_the_same_student_alone_by_2_points(tmp_path):
    table = demo(tmp_path / "demo")
    results = json.loads((tmp_path / "demo/results.json").read_text())
    alone = results["alone"]["class_head"]["top1"]
    for kind in ("hard", "soft"):
        assert results[kind]["mean_logits"]["top1"] >= alone + 2, table  # 3.3 at least in three seeds
    assert results["teacher"]["class_head"]["top1"] > 90
    assert problems_in(LabelSet.open(tmp_path / "demo/labels")) == []
    for name in ("labels.png", "results.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:4] == b"\x89PNG"
