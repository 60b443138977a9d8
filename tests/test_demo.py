"""The demo does what README says of it: the whole job, and a student that its teacher helps."""

import json

import pytest
from label_sets import problems_in

from pipeline.errors import UsageError
from pipeline.inspection import contact_sheet
from pipeline.labelset import LabelSet
from pipeline.precompute import precompute
from pipeline.sources import open_source
from pipeline.teacher_loading import load_teacher
from trainer.demo import run_demo, write_digits


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


@pytest.mark.slow
def test_the_distilled_student_beats_the_same_student_alone_by_2_points(tmp_path):
    table = demo(tmp_path / "demo")
    results = json.loads((tmp_path / "demo/results.json").read_text())
    alone = results["alone"]["class_head"]["top1"]
    for kind in ("hard", "soft"):
        assert results[kind]["mean_logits"]["top1"] >= alone + 2, table  # 3.3 at least in three seeds
    assert results["teacher"]["class_head"]["top1"] > 90
    assert problems_in(LabelSet.open(tmp_path / "demo/labels")) == []
    for name in ("labels.png", "curves.png"):
        assert (tmp_path / "demo" / name).read_bytes()[:4] == b"\x89PNG"
