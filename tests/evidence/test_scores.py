"""`evaluate` against plain loops, scikit-learn and timm's own model: every answer of one pass, its bins, classes and files."""

import csv
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch
from sklearn.metrics import confusion_matrix
from support.builders import make_labels, photo, with_checkout, write_tars
from support.students import CENTRE, CLASSES, CROP_PCT, HEIGHT, WIDTH, exported, make_student, running, write_photos
from torchvision.transforms import Normalize

from pipeline.errors import CheckpointError, StorageError, UsageError
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from trainer.config import EvaluateConfig
from trainer.evaluate import Tally, evaluate
from trainer.evidence.linear import FILE_NAME
from trainer.evidence.scores import BINS, FullTally, at_size, evaluate_checkpoint, score_table
from trainer.parallel import World
from trainer.student import create_student

LABELS = [None if number % 6 == 5 else number * 7 % CLASSES for number in range(47)]
LABELLED = [number for number, label in enumerate(LABELS) if label is not None]
HEADS = ("class_head", "distillation_head", "mean_logits", "sum_softmax")
NAMES = (*HEADS, "concat_linear")


def answers_for(images: int, classes: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random answers of every name that are right more often than not, and the class labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (images,), generator=generator)
    answers = {name: 2 * torch.randn(images, classes, generator=generator) for name in NAMES}
    for answer in answers.values():
        answer[torch.arange(images), label] += 2
    answers["sum_softmax"] = answers["class_head"].softmax(1) + answers["distillation_head"].softmax(1)
    return answers, label


def tallied(
    answers: dict[str, torch.Tensor], label: torch.Tensor, classes: int, *, batch: int = 10_000, order: Any = None
) -> FullTally:
    tally = FullTally(tuple(answers), classes)
    for chosen in (torch.arange(len(label)) if order is None else torch.from_numpy(order)).split(batch):
        tally.add({name: answer[chosen] for name, answer in answers.items()}, label[chosen])
    return tally


# --- counting ---------------------------------------------------------------------------------------------------------


def test_calibration_is_that_of_a_plain_loop():
    answers, label = answers_for(500, 7)
    tally = tallied(answers, label, 7)
    for name, answer in answers.items():
        bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
        for row, right in zip(answer.double().numpy(), label.tolist(), strict=True):
            prob = row / 2 if name == "sum_softmax" else np.exp(row) / np.exp(row).sum()
            confidence = float(prob.max())
            at = next(m for m in range(15) if m / 15 < confidence <= (m + 1) / 15)
            bins[at].append((confidence, int(prob.argmax()) == right))
        ece = 0.0
        for at, (found, expected) in enumerate(zip(tally.calibration()[name], bins, strict=True)):
            assert (found["low"], found["high"], found["images"]) == (at / 15, (at + 1) / 15, len(expected))
            if not expected:
                assert found["confidence"] is found["accuracy"] is None
                continue
            confidence, accuracy = (sum(column) / len(expected) for column in zip(*expected, strict=True))
            assert found["confidence"] == pytest.approx(confidence, abs=1e-6)
            assert found["accuracy"] == pytest.approx(accuracy)
            ece += len(expected) / 500 * abs(accuracy - confidence)
        assert tally.scores()[name]["ece"] == pytest.approx(100 * ece, abs=1e-4)
        assert 0.1 < 100 * ece < 60


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    sure = torch.tensor([[40.0, 0.0], [0.0, 0.0]])  # confidence 1 and 1/2
    tally = FullTally(("class_head",), 2)
    tally.add({"class_head": sure}, torch.tensor([0, 1]))
    assert [row["images"] for row in tally.calibration()["class_head"]] == [0] * 7 + [1] + [0] * 6 + [1]
    on_edge = FullTally(("sum_softmax",), 2)
    on_edge.add({"sum_softmax": torch.tensor([[1.2, 0.8]], dtype=torch.float64)}, torch.tensor([0]))  # 0.6 = 9/15
    assert [row["images"] for row in on_edge.calibration()["sum_softmax"]].index(1) in (8, 9)  # float32 of 0.6


def test_classes_and_confusions_are_scikit_learns():
    answers, label = answers_for(400, 6, seed=1)
    label[label == 4] = 2  # a class without images
    tally = tallied(answers, label, 6)
    per_class, confusion = tally.per_class(["a", "b", "c", "d", "e", "f"]), tally.confusion()
    assert [row["class"] for row in per_class] == [0, 1, 2, 3, 5]
    for name, answer in answers.items():
        matrix = confusion_matrix(label, answer.argmax(1), labels=range(6))
        for row in per_class:
            number = row["class"]
            assert row["images"] == matrix[number].sum()
            assert row["name"] == "abcdef"[number]
            assert row["top1"][name] == pytest.approx(100 * matrix[number, number] / matrix[number].sum())
        expected = sorted(
            ((i, j, int(matrix[i, j])) for i in range(6) for j in range(6) if i != j and matrix[i, j]),
            key=lambda pair: (-pair[2], pair[0], pair[1]),
        )
        assert [(pair["class"], pair["answer"], pair["images"]) for pair in confusion[name]] == expected
        assert tally.scores()[name]["top1"] == pytest.approx(100 * matrix.trace() / 400)


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_counts_do_not_depend_on_batches_or_order(batch):
    answers, label = answers_for(300, 5)
    expected = tallied(answers, label, 5)
    found = tallied(answers, label, 5, batch=batch, order=np.random.default_rng(batch).permutation(300))
    assert found.per_class(None) == expected.per_class(None)
    assert found.confusion() == expected.confusion()
    for name in NAMES:
        assert found.scores()[name] == pytest.approx(expected.scores()[name], rel=1e-9)
        assert_same_bins(found.calibration()[name], expected.calibration()[name])


def assert_same_bins(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["images"] == theirs["images"]
        if mine["images"]:
            assert mine == pytest.approx(theirs, rel=1e-9)


def test_both_tallies_count_the_same():
    answers, label = answers_for(200, 9)
    short = Tally(NAMES)
    short.add(answers, label)
    full = tallied(answers, label, 9).scores()
    assert short.scores() == {name: {key: way[key] for key in ("top1", "top5")} for name, way in full.items()}


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_of_equal_answers_the_first_class_is_chosen(classes):
    """Numbers of bfloat16 are often equal; the same class is chosen by `evaluate`, `analyse` and the agreement."""
    answers, label = answers_for(60, classes)
    answers = {name: answer.round() for name, answer in answers.items()}
    answers["class_head"][:] = 0.0
    short, full = Tally(NAMES), FullTally(NAMES, classes, keeps=True)
    short.add(answers, label)
    full.add(answers, label)
    ((chosen, _),) = full.kept
    for at, (name, answer) in enumerate(answers.items()):
        order = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in answer.tolist()]
        assert chosen[at].tolist() == [first for first, *_ in order]
        ranks = [row.index(right) for row, right in zip(order, label.tolist(), strict=True)]
        expected = {"top1": 100 * sum(r < 1 for r in ranks) / 60, "top5": 100 * sum(r < 5 for r in ranks) / 60}
        assert short.scores()[name] == expected  # in float64, to the last digit
        assert full.scores()[name] | expected == full.scores()[name]


def test_an_answer_that_is_no_number_is_never_right():
    answers = {"class_head": torch.tensor([[float("nan"), 1.0, 0.0], [1.0, float("nan"), 0.0]])}
    tally = Tally(("class_head",))
    tally.add(answers, torch.tensor([0, 0]))
    assert tally.scores()["class_head"]["top1"] == 0


def test_many_classes_need_little_memory():
    answers, label = answers_for(64, 21_841)
    tally = tallied(answers, label, 21_841)
    numbers = sum(value.numel() for value in vars(tally).values() if isinstance(value, torch.Tensor))
    assert numbers < 7 * 21_841
    assert sum(pair["images"] for pair in tally.confusion()["class_head"]) <= 64


def test_answers_that_are_no_numbers_are_refused():
    answers, label = answers_for(4, 3)
    answers["distillation_head"][2, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"answers are NaN or infinite for some images\. Try --amp-dtype float32"):
        FullTally(NAMES, 3).add(answers, label)


RANK = """
import json, sys
import torch
sys.path.insert(0, "tests/evidence")
from test_scores import NAMES, FullTally, Tally, answers_for, result_of
from trainer.parallel import joined_world

torch.set_num_threads(1)
with joined_world("cpu", 0) as world:
    answers, label = answers_for(301, 5)
    mine = slice(world.rank, None, world.size)
    tallies = FullTally(NAMES, 5), Tally(NAMES)
    for tally in tallies:
        tally.add({name: answer[mine] for name, answer in answers.items()}, label[mine])
        tally.share(world)
    print(json.dumps([result_of(tallies[0]), tallies[1].scores(), tallies[1].images]))
"""


def result_of(tally: FullTally) -> list[Any]:
    return [tally.images, tally.scores(), tally.calibration(), tally.per_class(None), tally.confusion()]


@pytest.mark.slow
def test_two_ranks_add_up(tmp_path):
    runs = []
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for rank in "01":
        environment = with_checkout(OMP_NUM_THREADS="1", RANK=rank, LOCAL_RANK=rank, **address)
        command = [sys.executable, "-c", RANK]
        runs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        )
    printed = [json.loads(run.communicate(timeout=300)[0].splitlines()[-1]) for run in runs]
    assert printed[0] == printed[1]
    full, scores, images = printed[0]
    answers, label = answers_for(301, 5)
    expected = json.loads(json.dumps(result_of(tallied(answers, label, 5))))
    assert images == 301
    assert [full[0], *full[3:]] == [expected[0], *expected[3:]]
    for name in NAMES:
        assert full[1][name] == pytest.approx(expected[1][name], rel=1e-9)
        assert scores[name] == {key: full[1][name][key] for key in ("top1", "top5")}
        assert_same_bins(full[2][name], expected[2][name])


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


def test_one_rank_is_the_sum_of_itself():
    tally = tallied(*answers_for(50, 4), 4)
    before = result_of(tally)
    tally.share(World(0, 1, torch.device("cpu"), 0))
    assert result_of(tally) == before


# --- the command ------------------------------------------------------------------------------------------------------


def ask(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "batch_size": 24,
        "workers": 0,
        "device": "cpu",
        "amp_dtype": "float32",
        "crop_pct": CROP_PCT,
    }
    return evaluate_checkpoint(EvaluateConfig(**(settings | changes)))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_photos(tmp_path_factory.mktemp("photos") / "data", LABELS)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    """An exported student with its linear classifier."""
    folder = exported(tmp_path_factory.mktemp("student") / "best", make_student())
    ask(checkpoint=folder, data=data, fit_data=data)
    return folder


def pixels_by_hand(model: Any) -> torch.Tensor:
    """Normalised centre crops of the labelled photos, float32 [N, 3, H, W]."""
    crops = torch.stack([torch.from_numpy(photo(number, HEIGHT, WIDTH)[CENTRE].copy()) for number in LABELLED])
    return Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])(crops.permute(0, 3, 1, 2).float() / 255)


def two_heads(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of both heads of timm's model."""
    with torch.no_grad():
        features = model.eval().forward_features(images)
        return model.head(features[:, 0]), model.head_dist(features[:, 1])


def top1(prob: torch.Tensor) -> float:
    return 100 * float((prob.argmax(1) == torch.tensor([LABELS[number] for number in LABELLED])).float().mean())


def test_one_pass_gives_what_separate_passes_give(folder, data):
    result = ask(checkpoint=folder, data=data)
    scores, images = evaluate(make_student(), open_source(data), running(24), crop_pct=CROP_PCT)
    assert result["images"] == images == len(LABELLED)
    assert {name: {key: result["scores"][name][key] for key in ("top1", "top5")} for name in HEADS} == scores
    linear = safetensors.torch.load_file(folder / FILE_NAME)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features(pixels_by_hand(model))[:, :2].flatten(1)
    expected = top1(tokens @ linear["weight"].T + linear["bias"])
    assert result["scores"]["concat_linear"]["top1"] == pytest.approx(expected)


def test_the_folder_of_a_run_means_its_best_weights_or_else_its_last(data, tmp_path):
    run = tmp_path / "run"
    last = exported(run / "last", make_student())
    assert ask(checkpoint=run, data=data)["checkpoint"] == str(last)
    best = exported(run / "best", make_student())
    result = ask(checkpoint=run, data=data)
    assert result == ask(checkpoint=best, data=data)
    with pytest.raises(CheckpointError, match="is not an exported model"):
        ask(checkpoint=tmp_path, data=data)


def test_the_result_has_everything_in_its_place(folder, data):
    result = ask(checkpoint=folder, data=data)
    assert (result["kind"], result["version"], result["checkpoint"]) == ("scores", 1, str(folder))
    assert (result["model"], result["num_classes"]) == ("deit_tiny_distilled_patch16_224", CLASSES)
    assert result["parameters"] == sum(p.numel() for p in make_student().model.parameters())
    assert (result["data"], result["img_size"], result["crop_pct"], result["flip"]) == (data, 16, CROP_PCT, False)
    assert set(result["scores"]) == set(result["calibration"]) == set(result["confusion"]) == set(NAMES)
    assert result["sizes"] == [{"img_size": 16, "scores": result["scores"]}]
    assert all(len(bins) == BINS for bins in result["calibration"].values())
    assert sum(row["images"] for row in result["per_class"]) == len(LABELLED)
    assert result["per_class"][3]["name"] == "class 3"
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_mirror_images_are_averaged_as_each_answer_is_defined(folder, data):
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = pixels_by_hand(model)
    (a, b), (c, d) = two_heads(model, images), two_heads(model, images.flip(-1))
    scores = ask(checkpoint=folder, data=data, flip=True)["scores"]
    assert scores["class_head"]["top1"] == pytest.approx(top1(a + c))
    assert scores["distillation_head"]["top1"] == pytest.approx(top1(b + d))
    assert scores["mean_logits"]["top1"] == pytest.approx(top1(a + b + c + d))
    prob = sum(logits.softmax(1) for logits in (a, b, c, d)) / 4
    assert scores["sum_softmax"]["top1"] == pytest.approx(top1(prob))
    plain = ask(checkpoint=folder, data=data)
    assert scores != plain["scores"]
    rows = ask(checkpoint=folder, data=data, flip=True)["calibration"]["sum_softmax"]
    total = sum(row["confidence"] * row["images"] for row in rows if row["images"])
    assert total == pytest.approx(float(prob.amax(1).sum()), rel=1e-5)


def test_another_size_is_timms_own_interpolation(folder, tmp_path):
    """Images of 24 x 24 pixels, so that a crop of all of it needs no resizing."""
    source = tmp_path / "data"
    write_tars(source, (30,))  # 24 x 32 pixels; the shorter side stays as it is
    (source / "classes.txt").write_text("".join(f"class {number}\n" for number in range(CLASSES)))
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    model.set_input_size(img_size=(24, 24))
    right = 0
    for sample in open_source(source).shards[0]:
        pixels = torch.from_numpy(decode(sample.image, key=sample.key)[:, 4:28].copy()).permute(2, 0, 1).float() / 255
        a, b = two_heads(model, Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])(pixels)[None])
        right += int((a + b).argmax()) == sample.class_label
    result = ask(checkpoint=folder, data=str(source), img_size=(24, 16), crop_pct=1.0)
    assert [size["img_size"] for size in result["sizes"]] == [24, 16]
    assert result["img_size"] == 24
    assert result["scores"] == result["sizes"][0]["scores"] != result["sizes"][1]["scores"]
    assert result["scores"]["mean_logits"]["top1"] == pytest.approx(100 * right / 30)
    assert result["sizes"][1]["scores"] == ask(checkpoint=folder, data=str(source), crop_pct=1.0)["scores"]
    assert 0 < right < 30


def test_a_resized_student_is_a_copy():
    student = make_student()
    before = student.model.pos_embed.clone()
    resized = at_size(student, 24)
    assert (student.img_size, resized.img_size) == (16, 24)
    assert torch.equal(student.model.pos_embed, before)
    assert resized.model.pos_embed.shape[1] == 2 + 36
    assert at_size(student, 16) is student


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ("deit-ti", 18, "--img-size must be a multiple of the patch size 4, got 18"),
        ("levit_128s", 96, "levit_128s takes images of 64 pixels only, got --img-size 96"),
    ],
)
def test_a_size_that_a_model_does_not_take_is_refused(model, size, said):
    student = make_student() if model == "deit-ti" else create_student(model, num_classes=3, img_size=64)
    with pytest.raises(UsageError, match=said):
        at_size(student, size)


def test_a_cnn_takes_images_of_any_size(tmp_path, data):
    folder = exported(tmp_path / "cnn", make_student("test_resnet"))
    sizes = ask(checkpoint=folder, data=data, img_size=(16, 32))["sizes"]
    assert [size["img_size"] for size in sizes] == [16, 32]
    assert sizes[0]["scores"] != sizes[1]["scores"]


# --- files and table --------------------------------------------------------------------------------------------------


def test_files_hold_the_result_the_classes_and_every_image(folder, data, tmp_path):
    files = {"out": tmp_path / "new/scores.json", "csv": tmp_path / "c.csv", "predictions": tmp_path / "p.parquet"}
    result = ask(checkpoint=folder, data=data, **files)
    assert json.loads(files["out"].read_text()) == result
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class", "name", "images", *(f"{name}_top1" for name in NAMES)]
    for row, expected in zip(rows, result["per_class"], strict=True):
        assert (int(row["class"]), row["name"], int(row["images"])) == tuple(
            expected[key] for key in ("class", "name", "images")
        )
        assert float(row["concat_linear_top1"]) == expected["top1"]["concat_linear"]
    table = pq.read_table(files["predictions"])
    assert table.column_names == ["key", "class_label", *(w for name in NAMES for w in (name, f"{name}_confidence"))]
    assert {str(table.schema.field(name).type) for name in ("class_label", *NAMES)} == {"int32"}
    assert str(table.schema.field("class_head_confidence").type) == "float"
    columns = table.to_pydict()
    assert columns["key"] == [f"p{number:03}" for number in LABELLED]
    assert columns["class_label"] == [LABELS[number] for number in LABELLED]
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    a, b = two_heads(model, pixels_by_hand(model))
    prob = (a.softmax(1) + b.softmax(1)) / 2
    assert columns["sum_softmax"] == prob.argmax(1).tolist()
    np.testing.assert_allclose(columns["sum_softmax_confidence"], prob.amax(1), rtol=1e-4)
    np.testing.assert_allclose(columns["class_head_confidence"], a.softmax(1).amax(1), rtol=1e-4)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("out", "csv", "predictions"):
        with pytest.raises(StorageError, match="file/x cannot be written"):
            ask(checkpoint="nowhere", data="nowhere", **{name: tmp_path / "file/x"})
        with pytest.raises(StorageError, match="cannot be written"):
            ask(checkpoint="nowhere", data="nowhere", **{name: tmp_path})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "pass --data to measure accuracy"),
        ({"labels": "x", "flip": True}, "--flip is about the accuracy: pass --data too"),
        ({"labels": "x", "img_size": (24,)}, "--img-size is about the accuracy: pass --data too"),
        ({"labels": "x", "csv": Path("x")}, "--csv is about the accuracy: pass --data too"),
        ({"labels": "x", "predictions": Path("x")}, "--predictions is about the accuracy: pass --data too"),
        ({"labels": "x", "crop_pct": 0.9}, "--crop-pct is the centre crop of --data and --fit-data"),
        ({"data": "x", "labels_data": "x"}, "--labels-data belongs to --labels: pass that too"),
        ({"data": "x", "expect_manifest": "sha256:0"}, "--expect-manifest belongs to --labels: pass that too"),
        ({"data": "x", "out": Path("y"), "csv": Path("y")}, "must be different files, got y, y"),
        ({"data": "x", "fit_data": "x", "fit_labels": "x"}, "on --fit-data or on --fit-labels, not on both"),
        ({"data": "x", "img_size": (24, 24)}, "each --img-size must be passed once, got 24 24"),
        ({"data": "x", "img_size": (24, 0)}, "--img-size must be in 1..4096, got 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        EvaluateConfig(checkpoint="x", **settings)


def test_the_agreement_has_the_linear_classifier_too(tmp_path):
    data = write_tars(tmp_path / "data", (13, 10))
    label_set = make_labels(tmp_path / "set", data)
    folder = exported(tmp_path / "best", make_student(num_classes=3))
    result = ask(checkpoint=folder, data=data, labels=str(label_set.folder), fit_data=data)
    assert list(result["agreement"]) == list(NAMES)
    table = score_table(result).splitlines()
    assert table[0].split("  ")[-1] == "agrees, %"
    assert all("-" not in line.split() for line in table[:6])
    assert f"agreement with the teacher on {result['agreement_views']} replayed views" in table


def test_the_table_is_aligned_and_says_what_is_weak(folder, data):
    result = ask(checkpoint=folder, data=data, img_size=(16, 24), flip=True)
    lines = score_table(result).splitlines()
    assert lines[0] == " " * 17 + "  top-1, %  top-5, %  calibration error, %  agrees, %"
    for line, name in zip(lines[1:6], NAMES, strict=True):
        way = result["scores"][name]
        assert line.split() == [name, *(f"{way[key]:.2f}" for key in ("top1", "top5", "ece")), "-"]
    assert {len(line) for line in lines[:6]} == {len(lines[0])}
    assert lines[6] == f"accuracy on 40 images, each with its mirror image: {data}, 16 pixels, centre crop 0.8"
    assert lines[8].split() == ["top-1,", "%", "at", *NAMES]
    assert lines[9].startswith("16 pixels  ")
    assert lines[10].startswith("24 pixels  ")
    weakest = min(result["per_class"], key=lambda row: (row["top1"]["mean_logits"], row["class"]))
    at = next(number for number, line in enumerate(lines) if "weakest classes of mean_logits" in line)
    assert lines[at + 1].split() == [
        f"{weakest['top1']['mean_logits']:.2f}",
        str(weakest["images"]),
        str(weakest["class"]),
        "class",
        str(weakest["class"]),
    ]
    assert lines[at + 6] == ""
    pair = result["confusion"]["mean_logits"][0]
    assert lines[at + 7] == "images  largest confusions of mean_logits"
    assert (
        lines[at + 8].strip()
        == f"{pair['images']}  {pair['class']} class {pair['class']} taken for {pair['answer']} class {pair['answer']}"
    )
    assert len(lines) == at + 13


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("0", "1", "2"), "class 0 taken for class 2"),
        (("cat", "dog", "hen"), "0 cat taken for 2 hen"),
        ((None, None, None), "class 0 taken for class 2"),
        (("2", "0", "1"), "0 2 taken for 2 1"),
    ],
)
def test_a_class_whose_name_is_its_number_is_named_once(names, said):
    answers = {"class_head": {"top1": 50.0, "top5": 90.0, "ece": 1.0}}
    result = {
        "scores": answers,
        "images": 6,
        "flip": False,
        "data": "x",
        "img_size": 8,
        "crop_pct": 1.0,
        "num_classes": 3,
    }
    result["per_class"] = [
        {"class": n, "name": name, "images": 2, "top1": {"class_head": 50.0}} for n, name in enumerate(names)
    ]
    result["confusion"] = {"class_head": [{"class": 0, "answer": 2, "images": 1}]}
    assert score_table(result).splitlines()[-1] == f"     1  {said}"


def test_two_classes_have_no_weak_ones(tmp_path):
    data = write_photos(tmp_path / "data", [0, 1] * 5, names=2)
    folder = exported(tmp_path / "best", make_student(num_classes=2))
    assert "weakest" not in score_table(ask(checkpoint=folder, data=data))
