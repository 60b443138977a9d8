"""`deit-cli models`: sizes of students are those of the built networks."""

import json

import pytest
from support.commands import invoke

from trainer.models import list_students
from trainer.student import SHORT_NAMES, create_student


def test_the_list_has_deits_models_and_their_short_names():
    found = {each["name"]: each for each in json.loads(invoke("models", "--json")[1])["students"]}
    assert {each["short_name"]: name for name, each in found.items() if each["short_name"]} == SHORT_NAMES
    assert len(found) == 8
    # Touvron et al. 2021, table 1: width, heads, blocks, parameters of the models with a distillation token
    for short, expected in {
        "deit-ti": (192, 3, 12, 6),
        "deit-s": (384, 6, 12, 22),
        "deit-b": (768, 12, 12, 87),
    }.items():
        each = found[SHORT_NAMES[short]]
        millions = round(each["parameters"] / 1e6)
        assert (each["width"], each["attention_heads"], each["blocks"], millions) == expected
        assert each["tokens"] == 14 * 14 + 2
    assert found["deit_base_patch16_384"]["tokens"] == 24 * 24 + 1


def test_the_numbers_are_those_of_the_built_student():
    (listed,) = list_students("deit-ti")
    built = create_student("deit-ti", num_classes=1000)
    assert listed["parameters"] == sum(parameter.numel() for parameter in built.parameters())
    assert listed["distilled"]
    assert listed["published"]


def test_a_network_without_tokens_has_none():
    (listed,) = list_students("test_resnet")
    assert (listed["tokens"], listed["distilled"], listed["published"]) == (None, False, True)
    assert "test_resnet" in invoke("models", "test_resnet")[1]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("deit-xl", "timm has no model 'deit-xl'"), ("*", "at most 100 are shown. Narrow the pattern")],
)
def test_a_pattern_without_a_list_is_one_line(pattern, said):
    code, shown = invoke("models", pattern)
    assert code == 2
    assert said in shown


def test_a_network_that_cannot_be_built_without_memory_is_listed_without_numbers(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("timm.create_model", fail)
    (listed,) = list_students("deit-ti")
    assert listed["parameters"] is None
    assert "meta tensors" in listed["problem"]
    assert " - " in invoke("models", "deit-ti")[1]
