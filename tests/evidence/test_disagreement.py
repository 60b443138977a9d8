"""How many images two networks answer differently: every pair, on the images of the user."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import make_labels, write_tars

from pipeline.errors import CheckpointError, UsageError
from pipeline.images.source import open_source
from pipeline.pixels.render import render_view
from trainer.config import AnalyseConfig, EvaluateConfig
from trainer.evaluate import centre_recipe
from trainer.evidence.analyse import UNKNOWN, analyse, analysis_text, disagreement, find_networks
from trainer.evidence.scores import evaluate_checkpoint
from trainer.export import export_model, hub_config
from trainer.student import create_student, open_student

CLASSES = ("ant", "bee", "cat")
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def exported(folder: Path, name: str, seed: int, **settings: Any) -> str:
    """Write a network with random weights, whose answers vary, as a run exports it."""
    torch.manual_seed(seed)
    student = create_student(name, **({"num_classes": 3, "class_names": CLASSES} | settings))
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    export_model(folder, student.model.state_dict(), hub_config=hub_config(student))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), (24, 17))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("networks")
    return [
        exported(folder / "deit", "deit-ti", 0, **TINY),
        exported(folder / "cnn", "test_resnet", 1, img_size=16),
    ]


def settings(**changes: Any) -> AnalyseConfig:
    return AnalyseConfig(**({"workers": 0, "batch_size": 7} | changes))


def matrix_of(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    found = result["disagreement"]
    pairs = itertools.product(found["names"], repeat=2)
    return dict(zip(pairs, itertools.chain(*found["share"]), strict=True))


def test_shares_are_those_of_a_double_loop():
    rng = np.random.default_rng(0)
    answers = {name: rng.integers(0, 3, 50) for name in "abc"}
    answers["labels"] = np.where(np.arange(50) % 3 == 0, UNKNOWN, rng.integers(0, 3, 50))
    answers["nobody"] = np.full(50, UNKNOWN)
    found = disagreement(answers, "there")
    assert (found["data"], found["images"], found["names"]) == ("there", 50, list(answers))
    for i, one in enumerate(answers.values()):
        for j, other in enumerate(answers.values()):
            different = counted = 0
            for a, b in zip(one.tolist(), other.tolist(), strict=True):
                if a != UNKNOWN and b != UNKNOWN:
                    counted += 1
                    different += a != b
            assert found["share"][i][j] == (pytest.approx(different / counted) if counted else None)


def test_answers_are_those_of_the_networks_one_image_at_a_time(networks, data):
    result = analyse(networks, settings(data=data))
    source = open_source(data)
    samples = [sample for shard in source.shards for sample in (shard[row] for row in range(len(shard.keys)))]
    expected: dict[str, list[int]] = {"class_labels": [sample.class_label or 0 for sample in samples]}
    for location in networks:
        student = open_student(Path(location)).eval()
        name = Path(location).name
        for sample in samples:
            pixels = torch.from_numpy(render_view(sample.image, centre_recipe(student, None), sample.key, 0))
            mean, std = (torch.tensor(values)[:, None, None] for values in (student.mean, student.std))
            with torch.inference_mode():
                heads = student(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None])
            answers = {"class_head": heads.class_logits}
            if heads.distill_logits is not None:
                answers["distillation_head"] = heads.distill_logits
                answers["mean_logits"] = heads.class_logits + heads.distill_logits
            for answer, logits in answers.items():
                expected.setdefault(f"{name} {answer}", []).append(int(logits.argmax()))
    assert result["disagreement"]["names"] == list(expected)
    found = matrix_of(result)
    for one, other in itertools.product(expected, repeat=2):
        differ = np.mean([a != b for a, b in zip(expected[one], expected[other], strict=True)])
        assert found[one, other] == pytest.approx(differ), (one, other)
    assert max(found.values()) > 0.2


def test_the_share_that_differs_from_the_class_labels_is_the_error_that_evaluate_measures(networks, data):
    found = matrix_of(analyse(networks[:1], settings(data=data, samples=0)))
    scores = evaluate_checkpoint(EvaluateConfig(checkpoint=networks[0], data=data, workers=0, batch_size=5))["scores"]
    for answer in ("class_head", "distillation_head", "mean_logits"):
        assert found["class_labels", f"deit {answer}"] == pytest.approx(1 - scores[answer]["top1"] / 100)


def test_on_a_label_set_all_networks_answer_the_views_that_the_teacher_answered(networks, data, tmp_path):
    label_set = make_labels(tmp_path / "set", data)
    result = analyse(networks, settings(labels=str(label_set.folder), batch_size=8))
    found = matrix_of(result)
    assert result["disagreement"]["names"][0] == "teacher"
    for location in networks:
        asked = EvaluateConfig(checkpoint=location, labels=str(label_set.folder), workers=0, batch_size=8)
        agreement = evaluate_checkpoint(asked)
        assert agreement["agreement_views"] == result["disagreement"]["images"]
        for answer, percent in agreement["agreement"].items():
            if answer != "sum_softmax":
                assert found["teacher", f"{Path(location).name} {answer}"] == pytest.approx(1 - percent / 100)


def test_a_source_without_class_labels_has_no_line_for_them(networks, tmp_path):
    from support.builders import encoded, photo
    from webdataset.writer import TarWriter

    (tmp_path / "bare").mkdir()
    with TarWriter(str(tmp_path / "bare/train-000000.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
        for number in range(9):
            tar.write({"__key__": f"img-{number}", "jpg": encoded(photo(number))})
    names = analyse(networks, settings(data=str(tmp_path / "bare")))["disagreement"]["names"]
    assert names == ["deit class_head", "deit distillation_head", "deit mean_logits", "cnn class_head"]


def test_images_that_have_no_class_label_are_left_out_of_its_pairs_only(networks, tmp_path):
    data = write_tars(tmp_path / "some", (12,), unlabelled=4)
    result = analyse(networks, settings(data=data))
    assert result["disagreement"]["images"] == 12
    assert matrix_of(result)["class_labels", "class_labels"] == 0


def test_class_labels_of_other_classes_are_not_compared(tmp_path, data, caplog):
    five = exported(tmp_path / "five", "test_resnet", 0, img_size=16, num_classes=5, class_names=None)
    result = analyse([five], settings(data=data))
    assert result["disagreement"]["names"] == ["five class_head"]
    assert "has 3 classes, the networks have 5: its class labels are not compared" in caplog.text


def test_networks_of_other_classes_are_refused(networks, tmp_path, data):
    five = exported(tmp_path / "five", "test_resnet", 0, img_size=16, num_classes=5, class_names=None)
    with pytest.raises(UsageError, match=r"deit has 3 classes, five has 5: their answers cannot be compared\. Analyse"):
        analyse([*networks, five], settings(data=data))
    assert len(analyse([*networks, five], settings())["runs"]) == 3  # nothing is compared
    swapped = exported(tmp_path / "swapped", "test_resnet", 0, img_size=16, class_names=("ant", "cat", "bee"))
    with pytest.raises(UsageError, match="class 1 is 'bee' for deit and 'cat' for swapped: their answers cannot be"):
        analyse([*networks, swapped], settings(data=data))


def test_samples_are_spread_over_the_source(networks, data, tmp_path):
    drawn = analyse(networks, settings(data=data, samples=4, attention=4, out=tmp_path / "out"))["attention"]
    keys = [key for shard in open_source(data).shards for key in shard.keys]
    assert [each["key"] for each in drawn] == [keys[i * 41 // 4] for i in range(4)]
    assert {each["run"] for each in drawn} == {"deit"}
    for each in drawn:
        assert all(0 < share < 1 for share in each["on_patches"].values())


def test_chosen_keys_are_drawn_and_an_unknown_one_is_named(networks, data, tmp_path):
    chosen = settings(data=data, key=("img-0030", "img-0002"), block=1, out=tmp_path / "out")
    drawn = analyse(networks, chosen)["attention"]
    assert [(each["key"], each["block"]) for each in drawn] == [("img-0030", 1), ("img-0002", 1)]
    with pytest.raises(UsageError, match=r"--key img-9999: .* has no image with this key"):
        analyse(networks, settings(data=data, key=("img-9999",), out=tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--block must be in 1\.\.2 \(the blocks of deit\), got 3"):
        analyse(networks, settings(data=data, attention=1, block=3, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data": "a", "labels": "b"}, "pass --data or --labels, not both"),
        ({"labels_data": "a"}, "--labels-data names the images of --labels"),
        ({"labels": "a", "key": ("x",)}, "--key names an image of --data"),
        ({"labels": "a", "crop_pct": 0.9}, "--crop-pct is the centre crop of --data"),
        ({"crop_pct": 0.9}, "--crop-pct is the centre crop of --data"),
        ({"data": "a", "block": 1}, "pass --attention or --key too"),
        ({"attention": 1}, "--attention draws images: pass --data or --labels too"),
        ({"data": "a", "attention": 1}, "pass --out too"),
        ({"samples": -1}, "--samples must be at least 0, got -1"),
    ],
)
def test_options_that_belong_together_are_said(changes, text):
    with pytest.raises(UsageError, match=text):
        AnalyseConfig(**changes)


@pytest.mark.parametrize("on_views", [False, True])
def test_a_network_whose_answers_are_no_numbers_is_named(networks, data, tmp_path, on_views):
    student = open_student(Path(networks[0]))
    student.model.blocks[1].mlp.fc2.bias.data.fill_(float("nan"))
    export_model(tmp_path / "diverged", student.model.state_dict(), hub_config=hub_config(student))
    images = {"labels": str(make_labels(tmp_path / "labels", data).place)} if on_views else {"data": data}
    with pytest.raises(CheckpointError, match=r"^diverged: the student's answers are NaN or infinite for some images"):
        analyse([networks[0], str(tmp_path / "diverged")], settings(out=tmp_path / "out", **images))
    if on_views:
        config = {"labels": images["labels"], "workers": 0, "batch_size": 7}
        with pytest.raises(CheckpointError, match=r"answers are NaN or infinite for some images\. Try --amp-dtype"):
            evaluate_checkpoint(EvaluateConfig(checkpoint=str(tmp_path / "diverged"), **config))


def test_names_are_those_of_folders_and_unique(networks, tmp_path):
    for run in ("one/deit-s", "two/deit-s"):
        exported(tmp_path / run / "last", "deit-ti", 0, **TINY)
    exported(tmp_path / "two/deit-s/best", "deit-ti", 0, **TINY)
    (tmp_path / "two/deit-s/metrics.jsonl").write_text("")
    found = find_networks([str(tmp_path / "one/deit-s"), f"{tmp_path}/two/deit-s/", f"{tmp_path}/two/deit-s/last", "timm:resnet50"])  # fmt: skip
    assert [each.name for each in found] == ["deit-s", "deit-s-2", "deit-s-3", "resnet50"]
    parts = [each.weights and each.weights.name for each in found]
    assert parts == ["last", "best", "last", None]
    assert [each.metrics and each.metrics.parent.name for each in found] == [None, "two", "two", None]


def test_a_folder_without_a_network_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no trained network\. Pass the folder of a run, .*timm:NAME"):
        find_networks(["."])
    with pytest.raises(CheckpointError, match=r"^nothing: no such file or folder\. .*timm:NAME"):
        find_networks(["nothing"])


def test_the_table_has_a_line_for_each_classifier(networks, data):
    text = analysis_text(analyse(networks, settings(data=data)))
    assert "cnn has one head: there is no second token" in text
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("share of 41 images"))
    table = lines[begin + 1 :]
    assert table[0].split() == ["1", "2", "3", "4", "5"]
    assert [line.split()[0] for line in table[1:]] == ["1", "2", "3", "4", "5"]
    assert len({len(line) for line in table}) == 1


def test_images_of_a_label_set_that_have_moved_are_named(networks, data, tmp_path):
    label_set = make_labels(tmp_path / "set", data)
    moved = settings(labels=str(label_set.folder), labels_data=data, samples=8, batch_size=4)
    assert analyse(networks, moved)["disagreement"]["images"] == 8
