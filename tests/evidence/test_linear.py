"""The linear classifier of both tokens, against scikit-learn, SciPy and NumPy in float64."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from scipy.optimize import minimize
from sklearn.linear_model import Ridge, RidgeClassifier
from support.builders import make_labels, photo, write_tars
from support.s3_server import BUCKET, client, credentials
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
from support.web_server import web_server
from torch import nn

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.images.source import Source, open_source
from pipeline.storage.place import LocalFile
from pipeline.views.draws import stream_of
from trainer.checkpoint import pack_state, unpack_state
from trainer.config import EvaluateConfig
from trainer.evidence import linear as linear_module
from trainer.evidence.linear import (
    FILE_NAME,
    RIDGES,
    OtherStudent,
    Sums,
    best_scales,
    fit_linear,
    load_linear,
    ridge_regressions,
    save_linear,
    student_sha256,
)
from trainer.evidence.scores import evaluate_checkpoint
from trainer.student import Student, create_student, normalise

IMAGES = 150


def tokens_by_hand(student: Student, number: int) -> np.ndarray:
    """The two tokens of each photo, from timm's own features, float64 [N, 2D]."""
    pixels = torch.stack([torch.from_numpy(photo(i, HEIGHT, WIDTH)[CENTRE].copy()) for i in range(number)])
    with torch.no_grad():
        features = student.model.eval().forward_features(normalise(pixels.permute(0, 3, 1, 2).float(), student))
    return features[:, :2].flatten(1).double().numpy()


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student()


@pytest.fixture(scope="module")
def tokens(student) -> np.ndarray:
    return tokens_by_hand(student, IMAGES)


@pytest.fixture(scope="module")
def labels(tokens) -> np.ndarray:
    """Classes that a linear classifier can learn, but not perfectly."""
    rng = np.random.default_rng(3)
    centred = (tokens - tokens.mean(0)) / tokens.std(0)
    return (centred @ rng.normal(size=(tokens.shape[1], CLASSES)) + 3 * rng.normal(size=(len(tokens), CLASSES))).argmax(
        1
    )


@pytest.fixture(scope="module")
def source(labels, tmp_path_factory) -> Source:
    return open_source(write_photos(tmp_path_factory.mktemp("fit") / "data", labels.tolist()))


def without_heads(student: Student) -> Student:
    for head in (student.model.head, student.model.head_dist):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return student


# --- sums and ridge ---------------------------------------------------------------------------------------------------


def rows_of(seed: int, number: int = 200, width: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    label = torch.from_numpy(rng.integers(0, classes, number))
    features = torch.from_numpy(rng.normal(2, 3, (number, width)) + 2 * rng.normal(size=(classes, width))[label])
    return features.float(), label


@pytest.mark.parametrize("number", [200, 9])  # fewer rows than features as well
@pytest.mark.parametrize("factor", [1e-4, 0.1, 10.0])
def test_a_ridge_regression_is_scikit_learns(number, factor):
    features, label = rows_of(0, number)
    one_hot = nn.functional.one_hot(label, 5).float()
    sums = Sums(12, 5)
    sums.add(features, one_hot)
    ((ridge, weight, bias),) = ridge_regressions(sums, [factor])
    theirs = Ridge(alpha=ridge, solver="cholesky").fit(features.double().numpy(), one_hot.double().numpy())
    np.testing.assert_allclose(weight, theirs.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, theirs.intercept_, rtol=1e-6, atol=1e-9)
    scatter = np.cov(features.double().numpy().T, bias=True) * number
    assert ridge == pytest.approx(factor * np.trace(scatter) / 12)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_sums_do_not_depend_on_batches_or_order(size):
    features, label = rows_of(1)
    targets = nn.functional.one_hot(label, 5).float()
    whole, parts = Sums(12, 5), Sums(12, 5)
    whole.add(features, targets)
    for chosen in torch.from_numpy(np.random.default_rng(size).permutation(len(label))).split(size):
        parts.add(features[chosen], targets[chosen])
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-9, atol=1e-9)
    expected = np.c_[features.double(), np.ones(len(label))]
    np.testing.assert_allclose(whole.gram, expected.T @ expected, rtol=1e-12)


def test_rows_that_are_all_the_same_have_a_solution():
    sums = Sums(3, 2)
    sums.add(torch.ones(5, 3), torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]]))
    for _, weight, bias in ridge_regressions(sums, RIDGES):
        np.testing.assert_allclose(torch.ones(3).double() @ weight.T + bias, [0.8, 0.2], atol=1e-6)


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scales_have_the_lowest_log_loss():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 4, 400)
    parts = [0.05 * rng.normal(size=(400, 4)) for _ in range(2)]
    parts[0][np.arange(400), label] += 0.05
    parts[1][np.arange(400), label] += 0.02

    def log_loss(scales: np.ndarray) -> float:
        logits = sum(scale * part for scale, part in zip(scales, parts, strict=True))
        shifted = logits - logits.max(1, keepdims=True)
        return float(-(shifted[np.arange(400), label] - np.log(np.exp(shifted).sum(1))).mean())

    best = minimize(log_loss, [1.0, 1.0], tol=1e-12)
    scales, loss = best_scales([torch.from_numpy(part).float() for part in parts], torch.from_numpy(label))
    np.testing.assert_allclose(scales, best.x, rtol=2e-2)
    assert loss == pytest.approx(best.fun, abs=1e-5)
    assert loss < log_loss(np.ones(2)) - 0.01


def test_scales_are_finite_where_every_row_is_right_or_a_part_is_zero():
    sure = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    scales, loss = best_scales([sure, torch.zeros(4, 3)], torch.tensor([0, 1, 2, 0]))
    assert np.isfinite(scales).all()
    assert scales[0] > 1
    assert loss < 0.1


@pytest.mark.parametrize("number", [0.0, 0.1, 1.0, -7.0])
def test_logits_that_are_all_the_same_number_count_for_nothing(number):
    """Such as those of heads of zeros: with a large coefficient they drowned the other part in float32."""
    sure = torch.eye(3)[torch.tensor([0, 1, 2, 0])]
    scales, loss = best_scales([torch.full((4, 3), number), sure], torch.tensor([0, 1, 2, 0]))
    assert scales[0] == 0
    assert scales[1] > 1
    assert loss < 0.1


# --- the fit ----------------------------------------------------------------------------------------------------------


def log_loss_of(logits: np.ndarray, label: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    return float(-(shifted[np.arange(len(label)), label] - np.log(np.exp(shifted).sum(1))).mean())


def test_the_fit_is_that_of_a_slow_reference(student, source, tokens, labels):
    """All in NumPy and SciPy: the tenth that is held out, the ridge, both coefficients, and the last solution."""
    fitted = fit_linear(student, source, running(7), crop_pct=CROP_PCT)
    model, facts = student.model, fitted.facts
    first = np.concatenate([model.head.weight.detach(), model.head_dist.weight.detach()], axis=1).astype(float) / 2
    start = tokens @ first.T + (model.head.bias + model.head_dist.bias).detach().double().numpy() / 2
    prob = np.exp(start - start.max(1, keepdims=True))
    residual = np.eye(CLASSES)[labels] - prob / prob.sum(1, keepdims=True)

    draws = [stream_of("concat_linear", f"p{number:03}").uniform() for number in range(IMAGES)]
    out = np.isin(np.arange(IMAGES), np.argsort(draws)[: IMAGES // 10])
    scatter = np.cov(tokens[~out].T, bias=True) * (~out).sum()
    tried = []
    for factor in RIDGES:
        ridge = Ridge(alpha=factor * np.trace(scatter) / len(scatter), solver="cholesky").fit(
            tokens[~out], residual[~out]
        )
        parts, stds = [start[out], ridge.predict(tokens[out])], []
        stds = [part.std() for part in parts]

        def loss(c: np.ndarray, parts: Any = parts, stds: Any = stds) -> float:
            logits = sum(x / std * part for x, std, part in zip(c, stds, parts, strict=True))
            return log_loss_of(logits, labels[out]) + c @ c / 200 / out.sum()

        at = minimize(loss, np.ones(2), tol=1e-12).x / stds
        logits = at[0] * parts[0] + at[1] * parts[1]
        tried.append((factor, at, (logits.argmax(1) == labels[out]).sum(), log_loss_of(logits, labels[out])))
    most = max(right for *_, right, _ in tried)
    error = np.sqrt(most * (1 - most / out.sum()))
    factor, at, right, log_loss = min((each for each in tried if each[2] >= most - error), key=lambda each: each[3])
    assert (facts["images"], facts["held_out"]) == (IMAGES, IMAGES // 10)
    assert facts["top1"] == pytest.approx(100 * right / out.sum())
    assert facts["log_loss"] == pytest.approx(log_loss, abs=1e-4)
    np.testing.assert_allclose([facts["heads"], facts["step"]], at, rtol=0.05, atol=0.01)

    scatter = np.cov(tokens.T, bias=True) * IMAGES
    assert facts["ridge"] == pytest.approx(factor * np.trace(scatter) / len(scatter), rel=1e-4)
    last = Ridge(alpha=facts["ridge"], solver="cholesky").fit(tokens, residual)
    expected = facts["heads"] * start + facts["step"] * last.predict(tokens)
    np.testing.assert_allclose(fitted(torch.from_numpy(tokens).float()), expected, atol=2e-3)


def test_without_heads_the_classifier_is_scikit_learns_ridge_classifier(source, tokens, labels):
    student = without_heads(make_student())
    fitted = fit_linear(student, source, running(64), crop_pct=CROP_PCT)
    theirs = RidgeClassifier(alpha=fitted.facts["ridge"]).fit(tokens, labels)
    assert fitted.facts["step"] > 0
    assert (fitted(torch.from_numpy(tokens).float()).argmax(1).numpy() == theirs.predict(tokens)).all()
    assert (theirs.predict(tokens) != labels).any()


@pytest.mark.parametrize("batch_size", [1, 64, 1000])
def test_the_fit_does_not_depend_on_the_batch(student, source, batch_size):
    expected = fit_linear(student, source, running(7), crop_pct=CROP_PCT)
    fitted = fit_linear(student, source, running(batch_size), crop_pct=CROP_PCT)
    torch.testing.assert_close(fitted.weight, expected.weight, rtol=2e-3, atol=2e-3)
    assert fitted.facts["ridge"] == pytest.approx(expected.facts["ridge"], rel=1e-4)


def test_fewer_images_than_features_are_enough(student, tmp_path):
    source = open_source(write_photos(tmp_path / "data", [number % CLASSES for number in range(20)]))
    fitted = fit_linear(student, source, running(), crop_pct=CROP_PCT)
    assert fitted.weight.shape[1] > 20
    assert torch.isfinite(fitted.weight).all()


def test_a_class_without_images_is_said_and_not_answered(tmp_path, caplog):
    source = open_source(write_photos(tmp_path / "data", [number % 3 for number in range(60)]))
    with caplog.at_level(logging.WARNING, logger="deit_cli"):
        student = without_heads(make_student())
        fitted = fit_linear(student, source, running(), crop_pct=CROP_PCT)
    assert "has no image of 5 classes, which concat_linear will hardly answer" in caplog.text
    chosen = fitted(torch.from_numpy(tokens_by_hand(student, 60)).float()).argmax(1)
    assert set(chosen.tolist()) <= {0, 1, 2}


def test_held_out_keys_depend_on_the_keys_alone_and_are_limited(monkeypatch):
    keys = [f"img-{number}" for number in range(500)]
    chosen = {key for key, out in zip(keys, linear_module._held_out(keys, 10), strict=True) if out}
    assert len(chosen) == 50
    turned = keys[::-1]
    assert chosen == {key for key, out in zip(turned, linear_module._held_out(turned, 10), strict=True) if out}
    monkeypatch.setattr(linear_module, "MOST_ROWS", 20)
    assert int(linear_module._held_out(keys, 10).sum()) == 20
    for name, value in (("MOST_ROWS", 10**6), ("MOST_LOGITS", 1000), ("FEWEST_ROWS", 7)):
        monkeypatch.setattr(linear_module, name, value)
    assert int(linear_module._held_out(keys, 100).sum()) == 10  # of 100 classes 1,000 logits
    assert int(linear_module._held_out(keys, 1000).sum()) == 7


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "deit_tiny_patch16_224",
            "concat_linear reads two tokens, one for each head; deit_tiny_patch16_224 has one head",
        ),
        ("test_resnet", "test_resnet has one head"),
        ("levit_128s", "both heads of levit_128s read the same pooled features"),
    ],
)
def test_a_student_without_two_tokens_is_refused(source, model, said):
    with pytest.raises(UsageError, match=said):
        fit_linear(create_student(model, num_classes=CLASSES, img_size=64), source, running())


def test_images_that_do_not_fit_are_refused(student, tmp_path):
    for labels, names, said in (
        ([None] * 12, CLASSES, "data has no class labels to fit concat_linear on"),
        ([0, 1, 2] * 4, 3, r"the student has 8 classes, .*data has 3"),
        ([0, 1, 2] * 3, CLASSES, r"needs at least 10 images with class labels to fit on, .*data has 9"),
    ):
        source = open_source(write_photos(tmp_path / str(names) / str(len(labels)) / "data", labels, names=names))
        with pytest.raises(UsageError, match=said):
            fit_linear(student, source, running())


def test_tokens_that_are_no_numbers_are_refused(source):
    student = make_student()
    with torch.no_grad():
        student.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"the student's tokens are NaN or infinite .*Try --amp-dtype float32"):
        fit_linear(student, source, running())


# --- the file ---------------------------------------------------------------------------------------------------------


def ask(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "batch_size": 24,
        "workers": 0,
        "device": "cpu",
        "amp_dtype": "float32",
        "crop_pct": CROP_PCT,
    }
    return evaluate_checkpoint(EvaluateConfig(**(settings | changes)))


@pytest.fixture
def folder(student, tmp_path) -> Path:
    return exported(tmp_path / "best", student)


def test_the_file_lies_beside_the_checkpoint_and_later_calls_use_it(folder, source):
    data = source.location
    assert "concat_linear" not in ask(checkpoint=folder, data=data)["scores"]
    first = ask(checkpoint=folder, data=data, fit_data=data)
    assert list(first["scores"]) == ["class_head", "distillation_head", "mean_logits", "sum_softmax", "concat_linear"]
    assert first["scores"]["concat_linear"]["top1"] > first["scores"]["mean_logits"]["top1"]
    later = ask(checkpoint=folder, data=data)
    assert later == first
    assert later["concat_linear"]["location"] == data
    assert later["concat_linear"]["source_id"] == source.source_id
    written = (folder / FILE_NAME).read_bytes()
    ask(checkpoint=folder, data=data, fit_data=data)
    assert (folder / FILE_NAME).read_bytes() == written


def test_three_lines_with_timms_model_give_the_same_answers(folder, source, tokens, labels):
    top1 = ask(checkpoint=folder, data=source.location, fit_data=source.location)["scores"]["concat_linear"]["top1"]
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    linear = safetensors.torch.load_file(folder / FILE_NAME)
    pixels = torch.stack([torch.from_numpy(photo(i, HEIGHT, WIDTH)[CENTRE].copy()) for i in range(IMAGES)])
    mean, std = (torch.tensor(model.pretrained_cfg[name])[None, :, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        features = model.forward_features((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)[:, :2].flatten(1)
    logits = features @ linear["weight"].T + linear["bias"]
    assert 100 * float((logits.argmax(1).numpy() == labels).mean()) == pytest.approx(top1)


def test_a_file_of_other_weights_is_never_used(folder, source, caplog):
    ask(checkpoint=folder, data=source.location, fit_data=source.location)
    other = make_student(drop_path=0.1)
    with torch.no_grad():
        other.model.cls_token += 1e-3
    exported(folder, other)
    said = (
        rf"{FILE_NAME} belongs to other weights than this student's, so it is not used\. Fit it again with --fit-data"
    )
    with caplog.at_level(logging.WARNING, logger="deit_cli"):
        assert "concat_linear" not in ask(checkpoint=folder, data=source.location)["scores"]
    assert "belongs to other weights" in caplog.text
    with pytest.raises(OtherStudent, match=said):
        ask(checkpoint=folder, data=source.location, concat_linear=str(folder / FILE_NAME))
    refitted = ask(checkpoint=folder, data=source.location, fit_data=source.location)
    assert refitted["concat_linear"]["student_sha256"] == student_sha256(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, f: (t, f | {"kind": "other"}), "this is not a linear classifier of version 1"),
        (lambda t, f: (t, f | {"version": 2}), "this is not a linear classifier of version 1"),
        (lambda t, f: ({"weight": t["weight"]}, f), r"its tensors must be weight \[8, 64\] and bias \[8\]"),
        (lambda t, f: (t | {"weight": t["weight"][:, 1:]}, f), r"its tensors must be weight \[8, 64\]"),
        (lambda t, f: (t | {"bias": t["bias"].double()}, f), r"its tensors must be weight \[8, 64\]"),
        (lambda t, f: (t | {"bias": t["bias"] * float("nan")}, f), "a weight is NaN or infinite"),
    ],
)
def test_a_file_that_is_not_the_students_is_refused(student, source, tmp_path, change, said):
    file = LocalFile(tmp_path / FILE_NAME)
    save_linear(fit_linear(student, source, running(64)), file)
    tensors, facts = unpack_state(file.path.read_bytes(), file, what="file", fix="")
    file.path.write_bytes(pack_state(*change(tensors, facts)))
    with pytest.raises(CheckpointError, match=said):
        load_linear(file, student)


def test_a_damaged_file_is_refused(student, source, tmp_path):
    file = LocalFile(tmp_path / FILE_NAME)
    assert load_linear(file, student) is None
    save_linear(fit_linear(student, source, running(64)), file)
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"this linear classifier is damaged: .*Fit it again with --fit-data"):
        load_linear(file, student)
    file.path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="not a complete linear classifier of deit-cli"):
        load_linear(file, student)


def test_a_file_of_weights_has_its_classifier_beside_it(student, source, tmp_path):
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights/deit.safetensors"
    model = create_student("deit_tiny_distilled_patch16_224", num_classes=CLASSES).model
    safetensors.torch.save_file(model.state_dict(), path)
    few = write_photos(tmp_path / "few/data", [number % CLASSES for number in range(16)])
    asked = {"checkpoint": path, "model": "deit_tiny_distilled_patch16_224", "data": few, "fit_data": few}
    assert "concat_linear" in ask(**asked)["scores"]
    assert (path.parent / FILE_NAME).is_file()


def test_weights_behind_a_web_server_need_a_place_for_the_file(folder, source, tmp_path):
    data = source.location
    with web_server(folder.parent) as server:
        url = f"{server.url}/best"
        with pytest.raises(StorageError, match=r"a web server takes no files.*Pass --concat-linear FILE"):
            ask(checkpoint=url, data=data, fit_data=data)
        mine = tmp_path / "mine.safetensors"
        scores = ask(checkpoint=url, data=data, fit_data=data, concat_linear=str(mine))["scores"]
        assert ask(checkpoint=url, data=data, concat_linear=str(mine))["scores"] == scores
        assert "concat_linear" not in ask(checkpoint=url, data=data)["scores"]
        (folder / FILE_NAME).write_bytes(mine.read_bytes())
        assert ask(checkpoint=url, data=data)["scores"] == scores


@pytest.mark.slow
def test_weights_in_a_bucket_have_the_file_beside_them(folder, source, store, monkeypatch):
    credentials(monkeypatch, store)
    url = f"s3://{BUCKET}/linear/best"
    for file in folder.iterdir():
        client(store).put_file(str(file), f"{url}/{file.name}")
    scores = ask(checkpoint=url, data=source.location, fit_data=source.location)["scores"]
    assert client(store).exists(f"{url}/{FILE_NAME}")
    assert ask(checkpoint=url, data=source.location)["scores"] == scores
    assert "concat_linear" in scores


def test_a_folder_that_takes_no_file_is_refused_before_the_fit(folder, source, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evidence.scores.fit_linear", lambda *_, **__: pytest.fail("it was fitted"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/x cannot be written\. Pass --concat-linear FILE"):
        ask(checkpoint=folder, data=source.location, fit_data=source.location, concat_linear=str(tmp_path / "file/x"))


def test_a_label_set_gives_its_usable_images_in_centre_crops(tmp_path):
    student = make_student(num_classes=3)
    folder = exported(tmp_path / "best", student)
    data = write_tars(tmp_path / "data", (13, 10), unlabelled=4, bad=(5,))
    label_set = make_labels(tmp_path / "set", data, on_bad_image="skip")
    good = write_tars(tmp_path / "good", (13, 10), unlabelled=4)
    result = ask(checkpoint=folder, data=good, fit_labels=str(label_set.folder))
    assert result["concat_linear"]["images"] == 16  # of 17 with labels, one is bad


def test_a_student_with_one_head_has_no_such_answer(tmp_path, source):
    folder = exported(tmp_path / "best", make_student("test_resnet"))
    assert list(ask(checkpoint=folder, data=source.location)["scores"]) == ["class_head"]
    with pytest.raises(UsageError, match=r"test_resnet has one head\. Leave out --fit-data"):
        ask(checkpoint=folder, data=source.location, fit_data=source.location)
    with pytest.raises(UsageError, match="test_resnet has one head"):
        ask(checkpoint=folder, data=source.location, concat_linear="somewhere.safetensors")


def test_published_weights_need_a_place_for_the_file(source, monkeypatch):
    from trainer import student as student_module

    create = student_module.create_student
    tiny = TINY | {"num_classes": CLASSES, "pretrained": False}
    monkeypatch.setattr(student_module, "create_student", lambda model, **values: create(model, **(values | tiny)))
    with pytest.raises(
        UsageError, match=rf"published weights have no folder for {FILE_NAME}\. Pass --concat-linear FILE"
    ):
        ask(model="deit-ti", pretrained=True, data=source.location, fit_data=source.location)
