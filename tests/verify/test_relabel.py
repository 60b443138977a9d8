"""The teacher is asked again: true labels agree, rounding is told apart from wrong labels, and another teacher is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.builders import ROOT, make_labels, small_recipe, teacher_of, write_tars
from support.label_changes import forge, other_class
from support.label_sets import colour_teacher, seal_again

import cli
from pipeline.errors import LabelSetMismatch, TeacherError
from pipeline.images.source import open_source
from pipeline.labels.encoding import LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.settings.configs import TeacherConfig, VerifyConfig
from pipeline.teacher.teacher import Teacher
from pipeline.verify.relabel import ROUNDING, Flip, Relabelled, relabel, rounding_of
from pipeline.verify.verify import verify

TEACHER = "support.builders:confident_cnn"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), unlabelled=4)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    return Path(str(make_labels(tmp_path_factory.mktemp("made") / "set", data, topk=2).folder))


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def asked(folder: Path, data: str, *, views: int = 40, seed: int = 0, teacher: Teacher | None = None) -> Relabelled:
    return relabel(LabelSet.open(folder), open_source(data), teacher or teacher_of(TEACHER), views=views, seed=seed)


def flatter(rows: LabelRows) -> LabelRows:
    """Keep the order of the classes, and move a tenth of the mass."""
    prob = rows.topk_prob.copy()
    prob[:, 0] = prob[:, 0] * 0.9 + 0.1 * (rows.topk_prob.sum(1) / 2)
    tail = np.clip(1 - prob.astype(np.float32).sum(1), 0, 1).astype(prob.dtype)
    return dataclasses.replace(rows, topk_prob=np.sort(prob, axis=1)[:, ::-1], tail_mass=tail)


def test_the_teacher_that_labelled_agrees(made, data):
    result = asked(made, data)
    assert result.views >= 40
    assert result.agreeing == result.views
    assert result.flips == ()
    assert result.problems() == []
    assert result.mean_kl is not None
    assert result.mean_kl < 1e-5
    assert result.max_difference is not None
    assert result.max_difference < 1e-3  # of float16
    assert "% of hard labels agree, KL " in result.describe()


def test_the_sample_is_drawn_by_its_seed(made, data):
    def keys(seed: int) -> list:
        label_set = LabelSet.open(made)
        from pipeline.verify.relabel import _choose

        samples = {name: label_set.samples(name) for name in label_set.shards}
        return [(pair.shard, pair.view, pair.rows) for pair in _choose(label_set, samples, 12, seed)]

    assert keys(0) == keys(0) != keys(1)
    assert len({view for _, view, _ in keys(0)}) > 1
    assert len({shard for shard, _, _ in keys(0)}) == 2


def test_all_views_are_the_most_that_are_asked(made, data):
    assert asked(made, data, views=10**6).views == 23 * 3


def test_forged_classes_are_found_with_key_and_margin(copied, data):
    forge(copied, other_class)
    assert verify(str(copied), VerifyConfig(probes=False)).problems == []
    result = asked(copied, data)
    assert 0 < result.agreeing < result.views
    problems = result.problems()
    assert len(problems) >= 10
    assert "is stored, the teacher says" in problems[0]
    assert "of train-000000: class" in problems[0]
    assert result.flips[0].margin == max(flip.margin for flip in result.flips) > result.rounding
    assert any("more views with another class" in line for line in problems)


def test_forged_probabilities_are_found_though_the_classes_agree(copied, data):
    forge(copied, flatter)
    result = asked(copied, data)
    assert result.agreeing == result.views
    (problem,) = result.problems()
    assert problem.startswith("a stored probability differs by 0.")


def test_a_flip_at_a_tiny_margin_is_reported_and_no_problem():
    near, far = (Flip("s", "k", 1, 0, 2, margin) for margin in (4e-4, 0.3))
    one = Relabelled(100, 99, 1e-6, 1e-5, 4e-4, (near,), rounding=1e-3, stored_rounding=1e-3)
    assert one.problems() == []
    assert one.near_flips() == [near]
    assert "; 1 flip with a margin up to 0.0004, explained by rounding" in one.describe()
    both = dataclasses.replace(one, flips=(far, near), agreeing=98)
    assert both.problems() == [str(far)]


def test_a_teacher_in_another_dtype_flips_no_label_beyond_rounding(made, data):
    teacher = teacher_of(TEACHER, dtype="bfloat16")
    assert rounding_of(LabelSet.open(made), teacher) == 0.3
    result = asked(made, data, teacher=teacher, views=69)
    assert result.problems() == []
    assert result.max_difference is not None
    assert result.max_difference > 1e-3  # it is another arithmetic, and that is seen


def test_on_a_cpu_in_float32_rounding_is_small(made):
    assert rounding_of(LabelSet.open(made), teacher_of(TEACHER)) == 1e-3


def test_labels_of_a_gpu_have_more_room(copied):
    seal_again(copied, lambda m: m["environments"][0].update(device="NVIDIA H100 80GB HBM3", dtype="bfloat16 compiled"))
    assert rounding_of(LabelSet.open(copied), teacher_of(TEACHER)) == 0.3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_explains_what_a_gpu_was_measured_to_change(dtype):
    """With some room, but not with so much that it explains everything."""
    results = json.loads((ROOT / "benchmarks/results/gpu-h200.json").read_text())
    measured = results["phases"]["parity"]["result"]["against_float32_without_tf32"][dtype]
    worst = max(measured["largest_probability_difference"], measured["largest_margin_of_a_flip"])
    assert 1.5 * worst < ROUNDING[dtype] < 2.5 * worst


def test_another_teacher_is_refused_with_both(made, data):
    with pytest.raises(TeacherError) as caught:
        asked(made, data, teacher=colour_teacher())
    text = str(caught.value)
    assert text.startswith(f"{made} was labelled by {TEACHER} (id ")
    assert "--teacher is mean-colour (id " in text
    assert "Pass the teacher that labelled it" in text


def test_the_same_name_with_other_weights_is_refused(made, data):
    """Identity is the weights', not the name's."""
    teacher = teacher_of(TEACHER)
    teacher.identity = teacher.identity.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(
        TeacherError, match=rf"was labelled by {TEACHER} .*--teacher is {TEACHER} .*\(weights_sha256: .*not 000"
    ):
        asked(made, data, teacher=teacher)


def test_other_images_are_refused_before_they_are_labelled(made, tmp_path):
    other = write_tars(tmp_path / "other", (13, 10), bad=tuple(range(23)))
    with pytest.raises(LabelSetMismatch, match="has other bytes than the one that was labelled"):
        asked(made, other)


@pytest.mark.parametrize("topk", [0, 1])
def test_sets_of_hard_labels_are_compared_too(data, tmp_path, topk):
    folder = Path(str(make_labels(tmp_path / "set", data, topk=topk).folder))
    result = asked(folder, data)
    assert result.problems() == []
    assert (result.mean_kl is None) == (topk == 0)
    assert ("KL" in result.describe()) == (topk > 0)


def test_unmixed_views_are_compared_too(data, tmp_path):
    recipe = small_recipe(mixup=0.0, cutmix=0.0)
    folder = Path(str(make_labels(tmp_path / "set", data, recipe=recipe).folder))
    assert asked(folder, data).problems() == []


def run(*arguments: str):
    return CliRunner().invoke(cli.commands, ["labels", "verify", *arguments])


def test_the_command_line_asks_the_teacher(made, copied, data):
    sound = run(str(made), "--teacher", TEACHER, "--relabel", "20")
    assert sound.exit_code == 0, sound.output
    assert "views labelled again: 100.00 % of hard labels agree" in sound.stdout
    forge(copied, other_class)
    forged = run(str(copied), "--teacher", TEACHER, "--relabel", "40", "--no-probes", "--json")
    report = json.loads(forged.stdout)
    assert forged.exit_code == 1
    assert {problem["rule"] for problem in report["problems"]} == {"teacher"}
    assert report["teacher"]["agreeing"] < report["teacher"]["views"]
    assert report["teacher"]["flips"][0]["key"].startswith("img-")
    assert "Do not train on this set" in report["problems"][0]["way_out"]


def test_another_teacher_is_a_problem_of_the_report(made, data):
    report = verify(str(made), VerifyConfig(), TeacherConfig(teacher=("support.builders:changing_cnn",)))
    (problem,) = report.problems
    assert problem.rule == "teacher"
    assert report.relabelled is None
