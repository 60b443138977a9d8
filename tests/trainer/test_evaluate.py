"""Evaluation against slow references that share no code with it, where that is possible."""

import json
import math
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from support.builders import make_labels, photo, teacher_of, write_tars
from support.students import (
    CENTRE,
    CLASSES,
    CROP_PCT,
    HEIGHT,
    TINY,
    WIDTH,
    exported,
    make_student,
    running,
    write_photos,
)
from torch import nn
from torchvision.transforms import Normalize

from pipeline.errors import BadImageError, CheckpointError, LabelSetMismatch, UsageError
from pipeline.images.decode import decode
from pipeline.images.source import Source, open_source
from pipeline.labels.labelset import LabelSet
from pipeline.machine.ranks import forward_dtype
from pipeline.pixels.render import render
from pipeline.views.mixing import apply_mix, mix_batch
from pipeline.views.pairs import draw_mix, pairs_of
from pipeline.views.view import draw_view
from trainer import student as student_module
from trainer.config import EvaluateConfig
from trainer.evaluate import centre_recipe, evaluate, fused_logits, measure_agreement
from trainer.evidence.scores import evaluate_checkpoint
from trainer.export import export_model, hub_config
from trainer.student import Heads, Student, create_student, normalise

LABELS = [None if number % 6 == 5 else number * 7 % CLASSES for number in range(23)]  # 20 labelled, three unlabelled


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", LABELS)


@pytest.fixture(scope="module")
def source(data) -> Source:
    return open_source(data)


# --- heads and normalisation ----------------------------------------------------------------------------------


def test_fusions_are_their_formulas():
    a, b = [[2.0, 0.0, -1.0], [0.5, 0.25, 0.0]], [[0.0, 3.0, 1.0], [-2.0, 0.5, 4.0]]
    answers = fused_logits(Heads(torch.tensor(a), torch.tensor(b)))
    assert list(answers) == ["class_head", "distillation_head", "mean_logits", "sum_softmax"]

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(x) for x in row)
        return [math.exp(x) / total for x in row]

    assert answers["class_head"].tolist() == a
    assert answers["distillation_head"].tolist() == b
    assert answers["mean_logits"].tolist() == [
        [(x + y) / 2 for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)
    ]
    expected = [[x + y for x, y in zip(softmax(p), softmax(q), strict=True)] for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(answers["sum_softmax"], expected, rtol=1e-6)


def test_the_two_fusions_are_not_the_same_answer():
    """One sure head outweighs the other in the mean of logits, and not in the sum of probabilities."""
    answers = fused_logits(Heads(torch.tensor([[9.0, 0.0, 8.0]]), torch.tensor([[0.0, 3.0, 2.0]])))
    assert int(answers["mean_logits"].argmax()) == 2
    assert int(answers["sum_softmax"].argmax()) == 0


def test_one_head_has_one_answer_and_half_precision_is_fused_in_float32():
    assert list(fused_logits(Heads(torch.zeros(2, 3), None))) == ["class_head"]
    half = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert {answer.dtype for answer in fused_logits(Heads(half, half)).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("deit-ti", (0.485, 0.456, 0.406)),  # ImageNet's
        ("deit_tiny_patch16_224", (0.25, 0.5, 0.75)),  # any other
    ],
)
def test_normalising_is_torchvisions_normalize(model, mean):
    student = make_student(model)
    student.mean = mean
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    expected = Normalize(student.mean, student.std)(pixels / 255)
    torch.testing.assert_close(normalise(pixels, student), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_dtype_of_the_forward_pass(name, device, dtype):
    assert forward_dtype(name, torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("configured", "asked", "crop_pct"),
    [
        (0.9, None, 0.9),  # the model's own
        (0.9, 0.75, 0.75),  # what is asked goes first
        (0.9, 1.0, 1.0),
        (None, None, 0.875),  # timm's default, where the configuration does not say
    ],
)
def test_the_centre_crop_is_the_models_or_the_one_asked_for(configured, asked, crop_pct):
    student = make_student()
    student.model.pretrained_cfg["crop_pct"] = configured
    recipe = centre_recipe(student, asked)
    assert (recipe.crop, recipe.crop_pct, recipe.img_size, recipe.mixes) == ("center", crop_pct, 16, False)


# --- accuracy -------------------------------------------------------------------------------------------------


def scores_by_hand(student: Student, labels: list[int | None]) -> dict[str, dict[str, float]]:
    """One image at a time, and ranks by counting the classes that are above the right one."""
    right: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        if label is None:
            continue
        pixels = torch.from_numpy(photo(number, HEIGHT, WIDTH)[CENTRE].copy()).permute(2, 0, 1)
        with torch.no_grad():
            heads = student.eval()(Normalize(student.mean, student.std)(pixels.float() / 255)[None])
        ways = {"class_head": heads.class_logits[0]}
        if heads.distill_logits is not None:
            ways["distillation_head"] = heads.distill_logits[0]
            ways["mean_logits"] = torch.stack([heads.class_logits[0], heads.distill_logits[0]]).mean(0)
            ways["sum_softmax"] = heads.class_logits[0].softmax(0) + heads.distill_logits[0].softmax(0)
        for name, logits in ways.items():
            above = int((logits > logits[label]).sum())
            right.setdefault(name, []).append(above)
    return {
        name: {
            "top1": 100 * sum(r < 1 for r in ranks) / len(ranks),
            "top5": 100 * sum(r < 5 for r in ranks) / len(ranks),
        }
        for name, ranks in right.items()
    }


@pytest.mark.parametrize("model", ["deit-ti", "test_resnet", "deit_tiny_patch16_224"])
def test_scores_equal_a_slow_reference(source, model):
    student = make_student(model)
    scores, count = evaluate(student, source, running(), crop_pct=CROP_PCT)
    assert count == 20  # unlabelled samples are left out
    assert scores == {
        name: {k: pytest.approx(v) for k, v in way.items()} for name, way in scores_by_hand(student, LABELS).items()
    }
    assert len(scores) == (4 if model == "deit-ti" else 1)
    assert all(0 <= way["top1"] < way["top5"] < 100 for way in scores.values())  # the reference could have failed


def test_the_ways_of_reading_two_heads_score_differently(source):
    scores, _ = evaluate(make_student(), source, running(), crop_pct=CROP_PCT)
    assert scores["class_head"] != scores["distillation_head"]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 7},  # a last batch of 6
        {"batch_size": 1000},  # less than one
        {"workers": 1},  # another process
    ],
    ids=str,
)
def test_scores_do_not_depend_on_batches_or_workers(source, changes):
    student = make_student()
    expected = evaluate(student, source, running(), crop_pct=CROP_PCT)
    assert evaluate(student, source, running(**changes), crop_pct=CROP_PCT) == expected


def test_the_crop_that_is_asked_for_is_the_one_that_is_evaluated(source):
    student = make_student()
    narrow, wide = (evaluate(student, source, running(), crop_pct=pct)[0] for pct in (0.3, 1.0))
    assert narrow != wide
    student.model.pretrained_cfg["crop_pct"] = 0.3
    assert evaluate(student, source, running())[0] == narrow


def test_three_classes_have_a_top_5_of_everything(tmp_path):
    source = open_source(write_photos(tmp_path / "data", [0, 1, 2, 0], names=3))
    scores, _ = evaluate(make_student(num_classes=3), source, running())
    assert scores["class_head"]["top5"] == 100


@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_left_in_its_mode(source, training):
    student = make_student(drop_path=0.5).train(training)
    first = evaluate(student, source, running())
    assert {module.training for module in student.modules()} == {training}
    assert evaluate(student, source, running()) == first  # evaluated without stochastic depth in either case


def test_the_students_mode_comes_back_after_an_error(source):
    student = create_student("deit-ti", num_classes=CLASSES, **(TINY | {"img_size": 32})).train()
    student.img_size = 16  # its patches do not fit
    with pytest.raises(AssertionError, match="doesn't match model"):
        evaluate(student, source, running())
    assert student.training


@pytest.mark.parametrize(
    ("labels", "names", "num_classes", "said"),
    [
        ([0, 1, 2], 3, 8, "has 3"),  # fewer than the student knows: its classes are others
        ([0, 1, 2], 9, 8, "has 9"),  # more, though none of the labels shows it
        ([0, 11, 2], None, 8, "has labels up to 11"),  # the source does not say how many there are
        ([0, 8, 2], None, 8, "has labels up to 8"),  # the first that is too many
    ],
)
def test_other_classes_are_refused_with_both_numbers(tmp_path, labels, names, num_classes, said):
    source = open_source(write_photos(tmp_path / "data", labels, names=names))
    with pytest.raises(UsageError, match=f"the student has {num_classes} classes, .*data {said}$"):
        evaluate(make_student(num_classes=num_classes), source, running())


def test_a_source_that_does_not_name_its_classes_may_have_fewer_labels(tmp_path):
    source = open_source(write_photos(tmp_path / "data", [0, 7], names=None))
    assert evaluate(make_student(), source, running())[1] == 2


def test_images_without_labels_are_refused(tmp_path):
    source = open_source(write_photos(tmp_path / "data", [None, None]))
    with pytest.raises(UsageError, match=r"data has no class labels to evaluate on"):
        evaluate(make_student(), source, running())


def test_a_bad_image_stops_the_evaluation_with_its_key(tmp_path):
    source = open_source(write_tars(tmp_path / "data", (6,), bad=(4,)))
    with pytest.raises(BadImageError, match="img-0004"):
        evaluate(make_student(num_classes=3), source, running())


# --- agreement ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("tars"), (13, 10), unlabelled=4)


@pytest.fixture(scope="module")
def label_set(tars, tmp_path_factory) -> LabelSet:
    return make_labels(tmp_path_factory.mktemp("labels") / "set", tars)


def agreement_by_hand(student: Student, label_set: LabelSet, source: Source, view: int) -> dict[str, float]:
    """Every pair rendered, mixed and answered on its own."""
    recipe, same = label_set.recipe, {}
    for shard in source.shards:
        hard = dict(enumerate(label_set.read(shard.name, view).hard.tolist()))
        for pair in pairs_of(recipe, shard.keys, np.arange(len(shard)), view).rows.tolist():
            rows = [row for row in pair if row >= 0]
            views = []
            for row in rows:
                image = decode(shard[row].image, key="x")
                views.append(render(image, draw_view(recipe, shard.keys[row], view, height=24, width=32)))
            mix = draw_mix(recipe, shard.keys[rows[0]], view)
            mixes = mix_batch([(0, 1 if len(rows) == 2 else -1)], [mix], len(rows))
            for row, pixels in zip(rows, apply_mix(torch.from_numpy(np.stack(views)), mixes), strict=True):
                with torch.no_grad():
                    heads = student.eval()(Normalize(student.mean, student.std)(pixels / 255)[None])
                for name, logits in fused_logits(heads).items():
                    same.setdefault(name, []).append(int(logits.argmax()) == hard[row])
    return {name: 100 * sum(hits) / len(hits) for name, hits in same.items()}


@pytest.mark.parametrize("model", ["deit-ti", "test_resnet"])
def test_agreement_is_counted_on_the_mixed_views_that_the_teacher_saw(label_set, tars, model):
    student, source = make_student(model, 3), open_source(tars)
    got, views = measure_agreement(student, label_set, source, running(24), limit=1000)
    assert views == 23
    assert student.training
    assert got == pytest.approx(agreement_by_hand(student, label_set, source, 0))
    assert all(0 < percent < 100 for percent in got.values())


def test_agreement_is_on_the_first_view_that_the_set_holds(tars, tmp_path):
    later, source, student = (
        make_labels(tmp_path / "set", tars, views=(3, 6)),
        open_source(tars),
        make_student(num_classes=3),
    )
    got, _ = measure_agreement(student, later, source, running(24), limit=1000)
    assert got == pytest.approx(agreement_by_hand(student, later, source, 3))


def test_the_teacher_agrees_with_itself(tars, tmp_path):
    """A student that labels the images itself agrees in every view: pixels, mix, normalisation and rows are the same."""
    student = make_student(num_classes=3)
    export_model(tmp_path / "model", student.model.state_dict(), hub_config=hub_config(student))
    labels = make_labels(tmp_path / "set", tars, teacher=teacher_of(str(tmp_path / "model")))
    got, _ = measure_agreement(student, labels, open_source(tars), running(6), limit=1000)
    assert got["mean_logits"] == 100
    assert got["class_head"] < 100


@pytest.mark.parametrize(
    ("limit", "batch_size", "least", "most"),
    [
        (1000, 6, 23, 23),  # all of them, in four batches (one of the twelve units is a single sample)
        (12, 6, 11, 12),  # two batches
        (11, 6, 5, 6),  # whole batches only
        (7, 1000, 5, 6),  # a limit below the batch makes the batch smaller; views come in pairs
        (2, 6, 1, 2),
    ],
)
def test_agreement_looks_at_no_more_views_than_asked(label_set, tars, limit, batch_size, least, most):
    student = make_student(num_classes=3)
    got, views = measure_agreement(student, label_set, open_source(tars), running(batch_size), limit=limit)
    assert least <= views <= most
    assert all(abs(percent * views / 100 - round(percent * views / 100)) < 1e-9 for percent in got.values())


def test_agreement_with_labels_of_other_classes_is_refused_with_both_numbers(label_set, tars):
    with pytest.raises(UsageError, match=r"the student has 8 classes, .* has 3"):
        measure_agreement(make_student(num_classes=8), label_set, open_source(tars), running(), limit=8)


def test_agreement_of_a_student_of_another_size_than_the_views_is_refused_with_both_numbers(label_set, tars):
    student = create_student("deit-ti", num_classes=3, **(TINY | {"img_size": 32}))
    with pytest.raises(UsageError, match=r"32.*16"):
        measure_agreement(student, label_set, open_source(tars), running(), limit=8)


# --- checkpoints ----------------------------------------------------------------------------------------------


def ask(**changes) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "agreement_samples": 1000,
        "batch_size": 24,
        "workers": 0,
        "device": "cpu",
        "amp_dtype": "float32",
    }
    return evaluate_checkpoint(EvaluateConfig(**(settings | changes)))


def top_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return top-1 and top-5 of a result, as the evaluation while training has them."""
    return {name: {key: way[key] for key in ("top1", "top5")} for name, way in result["scores"].items()}


def test_an_exported_folder_is_measured_on_images_and_labels(label_set, tars, tmp_path):
    student = make_student(num_classes=3)
    folder = exported(tmp_path / "last", student)
    result = ask(checkpoint=folder, data=tars, labels=label_set.folder)
    scores, images = evaluate(student, open_source(tars), running(24))
    agreement, views = measure_agreement(student, label_set, open_source(tars), running(24), limit=1000)
    assert top_of(result) == scores
    assert {name: result[name] for name in ("checkpoint", "images", "agreement", "agreement_views")} == {
        "checkpoint": str(folder),
        "images": images,
        "agreement": agreement,
        "agreement_views": views,
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_is_not_asked_is_not_measured(label_set, tars, tmp_path):
    folder = exported(tmp_path / "last", make_student(num_classes=3))
    assert not {"agreement", "agreement_views"} & set(ask(checkpoint=folder, data=tars))
    student = {"kind", "version", "checkpoint", "model", "parameters", "num_classes"}
    assert set(ask(checkpoint=folder, labels=label_set.folder)) == student | {"agreement", "agreement_views"}


def test_the_size_of_the_crop_and_the_dtype_are_handed_on(data, tmp_path):
    student = make_student()
    folder = exported(tmp_path / "last", student)
    assert ask(checkpoint=folder, data=data, crop_pct=0.3)["scores"] != ask(checkpoint=folder, data=data)["scores"]
    rounded = evaluate(student, open_source(data), running(24, dtype=torch.bfloat16))[0]
    assert top_of(ask(checkpoint=folder, data=data, amp_dtype="bfloat16")) == rounded


def test_images_that_are_not_those_of_the_labels_are_refused_before_anything_is_measured(tars, tmp_path):
    moved = tmp_path / "moved"
    data = write_tars(tmp_path / "data", (13, 10))
    labels = make_labels(tmp_path / "set", data)
    (tmp_path / "data").rename(moved)
    write_tars(tmp_path / "data", (13, 9))
    folder = exported(tmp_path / "last", make_student(num_classes=3))
    with pytest.raises(LabelSetMismatch, match=r"1 sample is missing: 'img-0022' of train-000001"):
        ask(checkpoint=folder, labels=labels.folder)


def test_a_folder_of_other_classes_than_the_images_is_refused(data, tmp_path):
    folder = exported(tmp_path / "last", make_student(num_classes=3))
    with pytest.raises(UsageError, match=r"the student has 3 classes, .*data has 8"):
        ask(checkpoint=folder, data=data)


LAYOUTS = [
    ("weights.safetensors", lambda state: state),  # a run's model.safetensors, away from its folder
    ("timm.pth", lambda state: {"epoch": 3, "state_dict": state}),  # timm's train.py
    ("deit.pth", lambda state: {"model": state}),  # DeiT's published checkpoints
]


@pytest.mark.parametrize(("file", "layout"), LAYOUTS, ids=[file for file, _ in LAYOUTS])
def test_a_file_of_weights_scores_as_timms_own_model_does(tmp_path, file, layout):
    name, few = "deit_tiny_distilled_patch16_224", 6
    model: Any = timm.create_model(name, num_classes=CLASSES)
    for number, head in enumerate((model.head, model.head_dist)):
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(number))
    path = tmp_path / file
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(layout(model.state_dict()), path)
    else:
        torch.save(layout(model.state_dict()), path)
    source = open_source(write_photos(tmp_path / "data", [5, 2, 0, 3, 1, 2]))
    theirs: Any = timm.create_model(name, num_classes=CLASSES, checkpoint_path=str(path)).eval()
    config = timm.data.resolve_model_data_config(theirs)
    recipe = centre_recipe(Student(theirs, img_size=224), None)
    assert (recipe.img_size, recipe.crop_pct) == (config["input_size"][-1], config["crop_pct"]) == (224, 0.9)
    ranks = []
    for sample in source.shards[0]:
        image = decode(sample.image, key=sample.key)
        view = render(image, draw_view(recipe, sample.key, 0, height=HEIGHT, width=WIDTH))
        pixels = Normalize(config["mean"], config["std"])(torch.from_numpy(view).permute(2, 0, 1).float() / 255)
        with torch.inference_mode():
            logits = theirs(pixels[None])[0]
        ranks.append(int((logits > logits[sample.class_label]).sum()))
    result = ask(checkpoint=path, model=name, data=str(tmp_path / "data"), batch_size=4)
    expected = {"top1": 100 * sum(r < 1 for r in ranks) / few, "top5": 100 * sum(r < 5 for r in ranks) / few}
    assert top_of(result)["mean_logits"] == pytest.approx(expected)
    assert 0 < expected["top5"] < 100
    assert result["checkpoint"] == str(path)


def test_a_file_of_weights_of_other_classes_than_the_images_is_refused(data, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    with pytest.raises(CheckpointError, match="its fc has 5 classes, this run needs 8"):
        ask(checkpoint=path, model="test_resnet", data=data)


def test_published_weights_are_measured_with_their_own_head(data, monkeypatch):
    """Images of other classes than the published ones are refused, and never answered by a head of random weights."""
    create = student_module.create_student
    monkeypatch.setattr(
        student_module, "create_student", lambda model, **values: create(model, **(values | {"pretrained": False}))
    )
    with pytest.raises(UsageError, match=r"the student has 1000 classes, .* has 8"):
        ask(model="test_resnet", pretrained=True, data=data)
