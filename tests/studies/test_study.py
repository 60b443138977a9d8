"""The definition of a study and its steps: what is refused, which cells are one, and what an id covers."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.builders import encoded, photo
from support.studies import SCALE, STUDY, write_study

from pipeline.errors import UsageError
from trainer.config import CompareConfig
from trainer.studies.images import Images, images_at
from trainer.studies.steps import Plan, plan_study, ranks_of
from trainer.studies.study import read_study

ROOT = Path(__file__).parents[2]
TRAINING, EVALUATION = Images("/data/train", "a" * 64, 64), Images("/data/val", "b" * 64, 30)


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of nested values with one more or another value; None takes it out."""
    copy = json.loads(json.dumps(values))
    *above, last = path.split("/")
    inside = copy
    for name in above:
        inside = inside.setdefault(name, {})
    inside.pop(last, None) if value is None else inside.__setitem__(last, value)
    return copy


def plan_of(folder: Path, study: dict[str, Any] = STUDY, scale: dict[str, Any] = SCALE, **known: Any) -> Plan:
    read = read_study(write_study(folder, study, scale))
    return plan_study(read, known.pop("training", TRAINING), known.pop("evaluation", EVALUATION), **known)


def keys_of(plan: Plan) -> dict[str, str]:
    return {f"{step.kind} {step.name}": step.key for step in plan.steps}


def test_a_study_is_its_cells_and_their_steps_in_order(tmp_path):
    plan = plan_of(tmp_path)
    assert [f"{step.kind} {step.name}" for step in plan.steps] == [
        "teacher cnn", "evaluation cnn", "labels cnn",
        "student alone-seed0", "evaluation alone-seed0", "student hard-seed0", "evaluation hard-seed0",
        "student alone-seed1", "evaluation alone-seed1", "student hard-seed1", "evaluation hard-seed1",
    ]  # fmt: skip
    places = {step.key: number for number, step in enumerate(plan.steps)}
    assert all(places[each.key] < places[step.key] for step in plan.steps for each in step.inputs.values())
    models = {step.name: step.settings["model"] for step in plan.steps if step.kind == "student"}
    assert models["alone-seed0"] == "deit_tiny_patch16_224"
    assert models["hard-seed0"] == "deit_tiny_distilled_patch16_224"


# path in the study, value, what the refusal says
WRONG_STUDIES = [
    ("titel", "x", r"there is no key 'titel'\. Did you mean title\?"),
    ("title", 3, "a study needs `title`, a text"),
    ("title", None, "a study needs `title`"),
    ("baseline", None, "a study needs `baseline`"),
    ("baseline", "alon", r"baseline: there is no cell 'alon'\. Did you mean alone\?"),
    ("scale", None, r"names no scale\. Pass --scale"),
    ("scale", "nothing.yaml", "nothing.yaml: cannot read this file"),
    ("cells", None, "a study needs `cells`, `grid` or both"),
    ("cells", ["x"], "cells must be a mapping of names to values"),
    ("cells/a b", {}, "a name must be letters, digits"),
    ("students", {}, r"study\.yaml is a scale, not a study\. Pass a study, and this file with --scale"),
    (f"cells/{'x' * 101}", {}, r"a name must have at most 100 characters, got 101: x{40}\.\.\."),
    ("grid/opt", ["x" * 101, "y"], r"grid: a name must have at most 100 characters.* Write a cell of a grid"),
    ("cells/hard/teecher", "cnn", r"cells: hard: there is no setting 'teecher'\. Did you mean teacher\?"),
    ("cells/hard/epoch", 3, r"there is no setting 'epoch'\. Did you mean epochs\?"),
    ("cells/hard/teacher", "cnm", r"the scale has no teacher 'cnm'\. Did you mean cnn\?"),
    ("cells/hard/teacher", None, "the cell needs `teacher`, one of cnn, published"),
    ("cells/hard/teacher", "cnn+cnm", r"the scale has no teacher 'cnm'\. Did you mean cnn\?"),
    ("cells/hard/teacher", "cnn+cnn", r"each teacher must be named once, got 'cnn\+cnn'"),
    ("cells/hard/label_mode", "random", r"label_mode needs several teachers, such as teacher: cnn\+published"),
    ("cells/alone/label_mode", "random", "label_mode has no meaning with distillation_type none"),
    ("cells/hard/student", "b", r"the scale has no student 'b'\. Known: ti, plain"),
    ("cells/hard/student", None, "the cell needs `student`, one of ti, plain"),
    ("cells/hard/token", "yes", "token must be true or false, got 'yes'"),
    ("cells/alone/student", "plain", "student plain has no `without_token`"),
    ("cells/hard/epochs", "many", "epochs must be a whole number, got 'many'"),
    ("cells/hard/seed", 3, "seed cannot be set here"),
    ("cells/hard/labels", "x", "labels cannot be set here"),
    ("cells/hard/views", "8:2", "views must be START:STOP"),
    ("cells/hard/views", "x", "views must be a number or START:STOP, got 'x'"),
    ("cells/hard/budget", 0, "budget must be a number above 0, got 0"),
    ("cells/hard/distillation_type", "firm", "distillation_type must be one of"),
    ("cells/alone/teacher", "cnn", "teacher has no meaning with distillation_type none"),
    ("cells/alone/distillation_tau", 2.0, "distillation_tau has no meaning with distillation_type none"),
    ("against", {"hard": "alon"}, r"against: there is no cell 'alon'\. Did you mean alone\?"),
    ("against", {"hard": "hard"}, "against: hard is compared with itself"),
    ("against", ["hard"], "against must be a mapping"),
    ("grid/epochs", 3, "grid: epochs must be a list of values, got 3"),
    ("grid/epochs", [], "grid: epochs must be a list"),
    ("grid/epoch", [1, 2], r"there is no setting 'epoch'\. Did you mean epochs\?"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG_STUDIES)
def test_a_wrong_study_is_refused_by_the_place_and_the_rule(tmp_path, path, value, said):
    with pytest.raises(UsageError, match=said):
        read_study(write_study(tmp_path, changed(STUDY, path, value)))


WRONG_SCALES = [
    ("date", "x", r"there is no key 'date'\. Did you mean data\?"),
    ("data", None, r"names no training images\. Pass --data"),
    ("eval_data", None, r"no evaluation images belong to train\. Pass --eval-data"),
    (
        "eval_data",
        "train",
        "training and evaluation images are both train: students would be tested on what they learn",
    ),
    ("seeds", [], "seeds must be a list of different whole numbers"),
    ("seeds", [0, 0], "seeds must be a list of different whole numbers"),
    ("seeds", 3, "seeds must be a list"),
    ("images", 0, "images must be a whole number from 1"),
    ("source", {"imagekey": "jpg"}, r"source: there is no setting 'imagekey'\. Did you mean image_key\?"),
    ("source", {"epochs": 3}, "source: epochs cannot be set here"),
    ("source", {"class_depth": 0}, "source: --class-depth must be in 1..100, got 0"),
    ("train/image_key", "jpg", "train: image_key cannot be set here"),
    ("train/epoch", 3, r"train: there is no setting 'epoch'\. Did you mean epochs\?"),
    ("train/output", "x", "train: output cannot be set here"),
    ("labels/out", "x", "labels: out cannot be set here"),
    ("labels/set", {"imgsize": 16}, "labels: .*imgsize"),
    ("labels/views", "2:4", "labels: views must start at 0"),
    ("evaluate/checkpoint", "x", "evaluate: checkpoint cannot be set here"),
    ("evaluate/predictions", "x.parquet", "evaluate: predictions cannot be set here"),
    ("evaluate/csv", "x.csv", "evaluate: csv cannot be set here"),
    ("students", None, "students must be a mapping"),
    ("students/ti/model", None, "students: ti needs `model`"),
    ("students/ti/without_token", 3, "without_token must be the name of a model"),
    ("teachers/cnn/train/model", None, "train needs `model`"),
    ("teachers/cnn/zzz", 1, r"there is no key 'zzz'\. Known: train, recipe, set"),
    ("teachers/published/teacher", None, "needs `train`, to train this teacher here, or `teacher`"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG_SCALES)
def test_a_wrong_scale_is_refused_by_the_place_and_the_rule(tmp_path, path, value, said):
    with pytest.raises(UsageError, match=said):
        read_study(write_study(tmp_path, scale=changed(SCALE, path, value)))


def test_a_value_out_of_range_is_refused_with_the_name_of_its_cell(tmp_path):
    with pytest.raises(UsageError, match=r"cell hard: --epochs must be in 1\.\."):
        plan_of(tmp_path, changed(STUDY, "cells/hard/epochs", 0))


@pytest.mark.parametrize("seeds", [(0, 0), (-1,)])
def test_wrong_seeds_on_the_command_line_are_refused(seeds):
    with pytest.raises(UsageError, match="each --seed must be another whole number from 0"):
        CompareConfig(seed=seeds)


def test_data_of_the_command_line_replaces_that_of_the_scale_with_its_evaluation(tmp_path):
    path = write_study(tmp_path)
    with pytest.raises(UsageError, match="no evaluation images belong to other"):
        read_study(path, data="other")
    scale = read_study(path, data="other", eval_data="mine").scale
    assert (scale.data, scale.eval_data) == ("other", "mine")
    assert read_study(path, data="digits").scale.eval_data is None


# --- cells ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_named_by_what_varies(tmp_path):
    grid = {
        "student": ["ti"],
        "teacher": ["cnn"],
        "distillation_type": ["soft", "hard"],
        "token": [True, False],
        "epochs": [1, 2],
    }
    study = changed(STUDY, "grid", grid)
    names = [cell.name for cell in read_study(write_study(tmp_path, study)).cells]
    assert names[:2] == ["alone", "hard"]
    assert sorted(names[2:]) == sorted(
        f"{kind}-{token}-epochs-{epochs}" for kind in ("soft", "hard") for token in ("token", "no-token") for epochs in (1, 2)
    )  # fmt: skip


def test_cells_that_come_to_the_same_commands_are_one(tmp_path):
    study = changed(
        STUDY,
        "cells/again",
        {"student": "ti", "teacher": "cnn", "distillation_type": "hard", "token": True, "epochs": 2},
    )
    plan = plan_of(tmp_path, study)
    assert [(cell.name, cell.also) for cell in plan.cells] == [("alone", ()), ("hard", ("again",))]
    assert keys_of(plan) == keys_of(plan_of(tmp_path))
    assert plan_of(tmp_path, study, chosen=["again"]).steps[-1].name == "hard-seed1"


def test_without_a_teacher_a_grid_has_one_cell_for_all_teachers(tmp_path):
    grid = {"student": ["ti"], "teacher": ["cnn", "published"], "distillation_type": ["none", "hard"], "views": [1, 2]}
    study = changed(changed(STUDY, "cells", None), "grid", grid) | {"baseline": "none"}
    assert [cell.name for cell in read_study(write_study(tmp_path, study)).cells] == [
        "none", "cnn-hard-views-1", "cnn-hard-views-2", "published-hard-views-1", "published-hard-views-2",
    ]  # fmt: skip
    plan = plan_of(tmp_path, study)
    views = {step.name: step.stop for step in plan.steps if step.kind == "labels"}
    assert views == {"cnn": 2, "published": 2}  # one set for both numbers of views
    trained = {step.name: step.settings.get("views") for step in plan.steps if step.kind == "student"}
    assert (trained["cnn-hard-views-1-seed0"], trained["none-seed0"]) == ("0:1", None)
    for chosen, stop in (
        (["cnn-hard-views-1"], 1),
        (["cnn-hard-views-2"], 2),
        (["cnn-hard-views-1", "cnn-hard-views-2"], 2),
    ):
        plan = plan_of(tmp_path, study, chosen=chosen)  # a cell that is not run needs no views
        assert [step.stop for step in plan.steps if step.kind == "labels"] == [stop]


def test_a_cell_with_two_teachers_learns_from_both_label_sets_in_order(tmp_path):
    both = {"student": "ti", "teacher": "published+cnn", "distillation_type": "soft", "label_weights": [3, 1]}
    plan = plan_of(tmp_path, changed(STUDY, "cells/both", both))
    (train,) = [step for step in plan.steps if step.name == "both-seed0" and step.command == "train"]
    (alone,) = [step for step in plan.steps if step.name == "hard-seed0" and step.command == "train"]
    assert [labels.name for labels in train.label_sets] == ["published", "cnn"]
    assert train.label_sets[1].key == alone.label_sets[0].key  # the label set of the cell that has only this teacher
    places = {role: tmp_path / labels.name for role, labels in train.inputs.items()}
    assert train.settings_for(tmp_path, places)["labels"] == [f"{tmp_path}/published/set", f"{tmp_path}/cnn/set"]
    assert train.decides["label_weights"] == [0.75, 0.25]
    assert [each.name for each in plan.teachers_of(plan.study.cell("both"))] == ["published", "cnn"]
    places = {step.key: number for number, step in enumerate(plan.steps)}
    assert all(places[labels.key] < places[train.key] for labels in train.label_sets)


@pytest.mark.parametrize(
    "change",
    [{"teacher": "cnn+published"}, {"label_weights": [1, 3]}, {"label_mode": "random"}, {"teacher": "published"}],
)
def test_order_weights_and_mode_of_two_teachers_make_another_student(tmp_path, change):
    both = {"student": "ti", "teacher": "published+cnn", "distillation_type": "soft", "label_weights": [3, 1]}
    other = {**both, **change}
    if "+" not in other["teacher"]:
        del other["label_weights"]
    one, two = (keys_of(plan_of(tmp_path, changed(STUDY, "cells/both", each))) for each in (both, other))
    assert one["student both-seed0"] != two["student both-seed0"]
    assert one["labels published"] == two["labels published"]
    same = {**both, "label_weights": [0.75, 0.25]}
    assert one == keys_of(plan_of(tmp_path, changed(STUDY, "cells/both", same)))


def test_results_that_are_not_asked_for_are_looked_up_too(tmp_path):
    plan = plan_of(tmp_path, chosen=["alone"], seeds=[1, 7])
    assert plan.known_seeds == (1, 7, 0)
    asked, others = ({f"{step.kind} {step.name}" for step in steps} for steps in (plan.steps, plan.others))
    assert asked == {f"{kind} alone-seed{seed}" for kind in ("student", "evaluation") for seed in (1, 7)}
    assert {"student alone-seed0", "student hard-seed0", "student hard-seed7", "labels cnn", "teacher cnn"} <= others
    assert not asked & others
    places = {step.key: number for number, step in enumerate((*plan.steps, *plan.others))}
    assert all(places[each.key] < places[step.key] for step in plan.others for each in step.inputs.values())


def test_a_probe_of_the_tokens_is_left_out_where_a_student_has_one(tmp_path):
    plan = plan_of(tmp_path, scale=changed(SCALE, "train/probe_interval", 5))
    probes = {step.name: step.settings.get("probe_interval") for step in plan.steps if step.kind == "student"}
    assert probes == {"alone-seed0": None, "hard-seed0": 5, "alone-seed1": None, "hard-seed1": 5}
    with pytest.raises(UsageError, match=r"cell alone: probe_interval compares two tokens, .* has one\. Leave it out"):
        plan_of(tmp_path, changed(STUDY, "cells/alone/probe_interval", 5))


def test_the_control_replays_the_views_of_a_label_set(tmp_path):
    control = {
        "student": "ti",
        "teacher": "cnn",
        "distillation_type": "none",
        "second_token": "class",
        "distillation_alpha": 0.4,
    }
    plan = plan_of(tmp_path, changed(STUDY, "cells/control", control))
    (train,) = [step for step in plan.steps if step.name == "control-seed0" and step.command == "train"]
    assert [labels.name for labels in train.label_sets] == ["cnn"]
    assert (train.settings["distillation_alpha"], train.settings["model"]) == (0.4, "deit_tiny_distilled_patch16_224")
    alone = {"student": "ti", "distillation_type": "none", "second_token": "class", "distillation_alpha": 0.4}
    plan = plan_of(tmp_path, changed(STUDY, "cells/control", alone))
    (train,) = [step for step in plan.steps if step.name == "control-seed0" and step.command == "train"]
    assert train.settings["distillation_alpha"] == 0.4


def test_the_same_images_for_training_and_evaluation_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"are the same images: students would be tested on what they learn"):
        plan_of(tmp_path, evaluation=TRAINING)


def test_only_the_chosen_cells_are_run(tmp_path):
    plan = plan_of(tmp_path, chosen=["alone"])
    assert [step.name for step in plan.steps if step.kind == "student"] == ["alone-seed0", "alone-seed1"]
    assert all(step.kind in ("student", "evaluation") for step in plan.steps)
    assert [cell.name for cell in plan.cells] == ["alone", "hard"]  # the table has all
    with pytest.raises(UsageError, match=r"there is no cell 'alnoe'\. Did you mean alone"):
        plan_of(tmp_path, chosen=["alnoe"])


# --- identity ---------------------------------------------------------------------------------------------------------

SAME = [
    # settings of the scale that do not change a result
    ("train/workers", 1),
    ("train/log_interval", 3),
    ("train/checkpoint_interval", 2),
    ("train/compile", True),
    ("train/smoothing", 0.1),  # the default
    ("train/lr", 0.001),
    ("labels/batch_size", 8),
    ("labels/compile", True),
    ("labels/workers", 1),
    ("evaluate/batch_size", 8),
    ("seeds", [0, 1, 2]),
]


@pytest.mark.parametrize(("path", "value"), SAME)
def test_a_setting_that_does_not_change_a_result_keeps_every_id(tmp_path, path, value):
    before = keys_of(plan_of(tmp_path))
    after = keys_of(plan_of(tmp_path, scale=changed(SCALE, path, value)))
    assert before.items() <= after.items()


def test_an_update_of_as_many_views_keeps_every_id(tmp_path):
    scale = changed(changed(SCALE, "train/batch_size", 6), "train/grad_accum_steps", 2)
    assert keys_of(plan_of(tmp_path, scale=scale)) == keys_of(plan_of(tmp_path))


TEACHER = {"teacher cnn", "evaluation cnn", "labels cnn", "student hard-seed0", "evaluation hard-seed0"}
ALL_STUDENTS = {f"{kind} {name}-seed0" for kind in ("student", "evaluation") for name in ("alone", "hard")}
OTHER = [
    # settings of the scale, and the steps that they make anew
    ("train/lr", 0.002, ALL_STUDENTS),
    ("train/epochs", 3, ALL_STUDENTS),
    ("train/batch_size", 16, ALL_STUDENTS),
    ("train/warmup_epochs", 1, ALL_STUDENTS),
    ("students/ti/depth", 2, ALL_STUDENTS),
    ("train/labelled_fraction", 0.5, TEACHER | ALL_STUDENTS),
    ("teachers/cnn/train/epochs", 2, TEACHER),
    ("teachers/cnn/train/seed", 1, TEACHER),
    ("labels/topk", 2, {"labels cnn", "student hard-seed0", "evaluation hard-seed0"}),
    ("labels/precision", "log8", {"labels cnn", "student hard-seed0", "evaluation hard-seed0"}),
    ("labels/views", "0:4", {"student hard-seed0", "evaluation hard-seed0"}),  # the set grows; it is the same set
    ("labels/set/reprob", 0.0, TEACHER | ALL_STUDENTS),
    ("evaluate/crop_pct", 0.5, {"evaluation cnn", "evaluation alone-seed0", "evaluation hard-seed0"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "steps"), OTHER)
def test_a_setting_that_changes_a_result_makes_new_steps_and_no_others(tmp_path, path, value, steps):
    before = keys_of(plan_of(tmp_path, seeds=[0]))
    after = keys_of(plan_of(tmp_path, scale=changed(SCALE, path, value), seeds=[0]))
    renamed = {name.replace("-labelled-0.5", ""): key for name, key in after.items()}
    assert {name for name in before if before[name] != renamed[name]} == steps


def test_other_images_make_new_steps(tmp_path):
    before, other = plan_of(tmp_path), Images("/data/train", "c" * 64, 64)
    after = plan_of(tmp_path, training=other)
    assert not set(keys_of(before).values()) & set(keys_of(after).values())
    moved = plan_of(tmp_path, training=Images("/elsewhere", "a" * 64, 64))
    assert keys_of(moved) == keys_of(before)
    evaluated = keys_of(plan_of(tmp_path, evaluation=Images("/data/val", "c" * 64, 30)))
    assert {name for name, key in keys_of(before).items() if evaluated[name] != key} == {
        name for name in evaluated if name.startswith("evaluation")
    }


def test_an_input_with_another_content_makes_another_id(tmp_path):
    labels = next(step for step in plan_of(tmp_path).steps if step.kind == "labels")
    assert labels.id({"teacher": "x"}) == labels.id({"teacher": "x"}) != labels.id({"teacher": "y"})


def test_weights_of_a_teacher_are_known_by_their_content(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    scale = changed(SCALE, "teachers/published", {"teacher": "resnet50", "teacher_checkpoint": [str(file)]})
    study = changed(STUDY, "cells/hard/teacher", "published")
    before = keys_of(plan_of(tmp_path, study, scale))
    assert keys_of(plan_of(tmp_path, study, scale)) == before
    file.write_bytes(b"two")
    after = keys_of(plan_of(tmp_path, study, scale))
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if "alone" not in name
    }  # the teacher's evaluation too


# --- equal updates ----------------------------------------------------------------------------------------------------


def test_a_share_of_the_images_makes_as_many_views_in_more_epochs(tmp_path):
    scale = changed(SCALE, "train/warmup_epochs", 1)
    study = changed(changed(STUDY, "cells/alone/labelled_fraction", 0.25), "cells/hard/labelled_fraction", 0.25)
    steps = {f"{step.kind} {step.name}": step for step in plan_of(tmp_path, study, scale).steps}
    alone, teacher = steps["student alone-seed0"].settings, steps["teacher cnn-labelled-0.25"].settings
    assert (alone["epochs"], alone["warmup_epochs"]) == (8, 4.0)
    assert (teacher["epochs"], teacher["labelled_fraction"]) == (4, 0.25)
    assert steps["student hard-seed0"].settings["epochs"] == 2  # it sees all images
    assert steps["student alone-seed0"].work == steps["student hard-seed0"].work == 2 * 64


def test_a_budget_is_a_factor_of_the_epochs(tmp_path):
    study = changed(STUDY, "cells/short", {"student": "ti", "distillation_type": "none", "budget": 0.5})
    steps = {step.name: step for step in plan_of(tmp_path, study).steps if step.kind == "student"}
    assert (steps["short-seed0"].settings["epochs"], steps["alone-seed0"].settings["epochs"]) == (1, 2)


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        (None, 1),
        ("torchrun --nproc-per-node 8 --no-python", 8),
        ("torchrun --nproc_per_node=4 --nnodes=2 --no-python", 8),
        ("srun -n 3", 3),
        ("torchrun --nproc_per_node=2 --nnodes 2", 4),
    ],
)
def test_the_number_of_ranks_is_that_of_the_launcher(launcher, ranks):
    assert ranks_of(launcher) == ranks


@pytest.mark.parametrize(
    "launcher", ["accelerate launch --num_processes 8", "srun --ntasks-per-node 4", "torchrun", "nice", ""]
)
def test_a_launcher_whose_number_of_ranks_is_not_known_is_refused(launcher):
    with pytest.raises(UsageError, match="--launcher must be torchrun with --nproc-per-node, or srun with --ntasks"):
        ranks_of(launcher)


@pytest.mark.parametrize(
    "launcher",
    ["torchrun --nproc-per-node gpu", "torchrun --nproc-per-node 2 --nnodes 1:4", "torchrun --nproc-per-node 2 '"],
)
def test_a_number_of_ranks_that_is_no_number_is_refused(launcher):
    with pytest.raises(UsageError, match="must be written as whole numbers"):
        ranks_of(launcher)


@pytest.mark.parametrize(
    ("batch", "passes", "ranks", "divided"),
    [(256, 4, 8, (128, 1)), (256, 4, 2, (256, 2)), (12, 1, 3, (4, 1)), (256, 4, 1, (256, 4))],
)
def test_an_update_is_the_same_on_any_number_of_ranks(tmp_path, batch, passes, ranks, divided):
    scale = changed(changed(SCALE, "train/batch_size", batch), "train/grad_accum_steps", passes)
    scale = changed(scale, "teachers/cnn/train/batch_size", 24)
    one, many = plan_of(tmp_path, scale=scale), plan_of(tmp_path, scale=scale, ranks=ranks)
    assert keys_of(one) == keys_of(many)
    settings = next(step.settings for step in many.steps if step.kind == "student")
    assert (settings["batch_size"], settings["grad_accum_steps"]) == divided


def test_every_step_reads_the_images_as_the_scale_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"image_key": "photo", "labels_file": "train.csv", "eval_labels_file": "val.csv", "class_order": "natural"}
    plan = plan_of(tmp_path, scale=SCALE | {"source": source})
    both = {"image_key": "photo", "class_order": "natural"}
    for step in plan.steps:
        labels = tmp_path / ("val.csv" if step.command == "evaluate" else "train.csv")
        assert {name: step.settings.get(name) for name in source} == {
            **both,
            "labels_file": str(labels),
            "eval_labels_file": None,
        }


def test_the_digits_are_read_in_one_way(tmp_path):
    scale = SCALE | {"data": "digits", "eval_data": None, "source": {"image_key": "png"}}
    with pytest.raises(UsageError, match=r"source: image_key has no meaning with the digits\. Leave it out"):
        plan_of(tmp_path, scale=scale)


def test_images_of_another_column_are_other_images(tmp_path):
    images = [[encoded(photo(number, 8, 8), "PNG") for number in chosen] for chosen in (range(3), range(3, 6))]
    file = tmp_path / "images.parquet"
    pq.write_table(pa.table({"small": images[0], "large": images[1], "label": [0, 1, 2]}), file)
    small, large, again = (images_at(str(file), image_key=name).id for name in ("small", "large", "small"))
    assert small == again != large


def test_an_update_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(UsageError, match="an update of 12 views cannot be divided among 5 ranks"):
        plan_of(tmp_path, scale=changed(SCALE, "teachers/cnn/train/batch_size", 15), ranks=5)


# --- the files of configs/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", sorted((ROOT / "configs/scales").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("study", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_planned_at_every_scale(study, scale):
    read = read_study(study, scale)
    plan = plan_study(read, TRAINING, EVALUATION)
    assert len(plan.cells) >= 4
    assert [cell.also for cell in plan.cells if cell.also] == []
    assert len(plan.seeds) == 3
    assert read_study(study).scale.path.name == "digits.yaml"
