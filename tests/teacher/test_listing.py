"""`deit-cli models --teachers`: the networks, and what `--teacher` makes of a name."""

import json
from typing import Any

import pytest
import timm
from support.commands import invoke

from pipeline.errors import UsageError
from pipeline.teacher.listing import classes_of_teacher, list_teachers
from pipeline.teacher.loading import loaded_as


def test_every_published_network_is_listed():
    assert [each["name"] for each in list_teachers()] == timm.list_pretrained()


def test_deits_own_teacher_has_the_short_name():
    found = {each["name"]: each for each in list_teachers("regnety_160")}
    assert found["regnety_160.deit_in1k"]["short_name"] == "regnety_160"
    assert [each["name"] for each in found.values() if each["short_name"]] == ["regnety_160.deit_in1k"]
    assert found["regnety_160.deit_in1k"]["notes"] == ["DeiT's own teacher"]
    assert found["regnety_160.deit_in1k"]["licence"] == "apache-2.0"
    assert found["regnety_160.sw_in12k"]["num_classes"] == 11821
    assert not found["regnety_160.sw_in12k"]["has_imagenet_classes"]


def test_a_short_name_is_what_teacher_resolves_it_to():
    for each in list_teachers("resnet*"):
        if each["short_name"] and each["num_classes"]:
            assert classes_of_teacher(each["short_name"]) == (each["name"], each["num_classes"])
    default: Any = timm.get_pretrained_cfg("resnet50")
    assert classes_of_teacher("resnet50")[0] == f"resnet50.{default.tag}"
    assert loaded_as("regnety_160") == "regnety_160.deit_in1k"


@pytest.mark.parametrize(
    ("pattern", "note"),
    [
        ("convnext_base.fb_in22k", "the classes of imagenet-22k, not the 1,000 of ImageNet-1k"),
        ("vit_base_patch16_clip_224.openai", "512 outputs, not the 1,000 of ImageNet-1k"),
        ("vit_small_patch14_dinov2.lvd142m", "no classifier: cannot be a teacher"),
    ],
)
def test_networks_with_other_outputs_are_flagged(pattern, note):
    code, shown = invoke("models", "--teachers", pattern)
    assert code == 0
    assert note in shown
    assert "1 network" in shown


def test_json_has_the_same_networks():
    assert json.loads(invoke("models", "--teachers", "regnety_160", "--json")[1]) == {
        "teachers": list_teachers("regnety_160")
    }


def test_no_network_is_one_line():
    assert invoke("models", "--teachers", "resnet51") == (
        2,
        "error: timm publishes no weights for 'resnet51'. Pass a pattern such as 'convnext*'",
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet51", "timm has no model 'resnet51'"),
        ("resnet50.nonsense", "Invalid pretrained tag"),
        ("vit_small_patch14_dinov2.lvd142m", "no weights with a classifier"),
        ("nothing:there", "must be a function that can be imported"),
    ],
)
def test_a_name_that_is_no_teacher_is_refused_before_a_download(name, said):
    with pytest.raises(UsageError, match=said):
        classes_of_teacher(name)


def test_the_classes_of_a_function_and_of_a_folder_are_known(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "num_classes": 7}')
    assert classes_of_teacher("support.builders:confident_cnn") == ("support.builders:confident_cnn", 3)
    assert classes_of_teacher(str(tmp_path)) == (str(tmp_path), 7)
    assert classes_of_teacher("hf-hub:owner/name") == ("hf-hub:owner/name", None)
