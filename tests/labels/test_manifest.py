"""Plan and manifest are read strictly, and their ids follow from their parts."""

import copy
import dataclasses
import hashlib
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch, StorageError
from pipeline.labels.manifest import (
    EnsembleIdentity,
    FileEntry,
    Manifest,
    Plan,
    Probe,
    ShardRecord,
    SourceRecord,
    TeacherIdentity,
    first_difference,
    labels_path,
    pixel_environment,
    read_manifest,
    read_plan,
    read_probes,
    samples_path,
    short,
)
from pipeline.storage.json import canonical_json, pretty_json, sha256_json
from pipeline.views.recipe import Recipe

TEACHER = TeacherIdentity(
    name="regnety_160.deit_in1k",
    weights_sha256="7" * 64,
    img_size=224,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    num_classes=3,
    class_names=("tench", "goldfish", "shark"),
)
SOURCE = SourceRecord(
    kind="tar",
    location="/data/train",
    class_names=("tench", "goldfish", "shark"),
    shards=(
        ShardRecord(name="train-0", num_samples=5, keys_sha256="1" * 64),
        ShardRecord(name="train-1", num_samples=4, keys_sha256="2" * 64),
    ),
)


def make_plan(**changes: Any) -> Plan:
    parts = {"recipe": Recipe(), "teacher": TEACHER, "source": SOURCE, "topk": 2, "precision": "float16"}
    return Plan.make(**(parts | changes))


def make_manifest() -> Manifest:
    def entry(kind: Any, shard: str, start: int, stop: int) -> FileEntry:
        return FileEntry(kind=kind, shard=shard, view_start=start, view_stop=stop, rows=10, bytes=1000, sha256="3" * 64)

    probe = Probe(
        shard="train-0", row=1, view=2, pixels_sha256="4" * 64, sample="AAAA", partner=3, lam=0.5, box=(1, 2, 3, 4)
    )
    return Manifest(
        labelset_id=make_plan().labelset_id,
        plan_sha256=hashlib.sha256(pretty_json(make_plan().model_dump(mode="json"))).hexdigest(),
        sealed=True,
        view_blocks=((0, 3), (3, 6)),
        files=(entry("samples", "train-0", 0, 0), entry("labels", "train-0", 0, 3), entry("labels", "train-0", 3, 6)),
        probes=(probe,),
        environments=({"device": "cpu"},),
    )


def written(folder: Path) -> Path:
    (folder / "plan.json").write_bytes(pretty_json(make_plan().model_dump(mode="json")))
    (folder / "manifest.json").write_bytes(pretty_json(make_manifest().to_json()))
    return folder


def bend(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Return a change that sets one place of a JSON value."""

    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        del values[path[-1]]

    return change


def test_plan_and_manifest_come_back_as_they_were(tmp_path):
    written(tmp_path)
    assert read_plan(tmp_path) == make_plan()
    manifest = read_manifest(tmp_path)
    assert manifest.model_copy(update={"content_sha256": None}) == make_manifest()
    assert manifest.to_json() == json.loads((tmp_path / "manifest.json").read_text())


def test_paths_follow_from_kind_shard_and_views():
    assert str(samples_path("train-0")) == "samples/train-0.parquet"
    assert str(labels_path("train-0", range(0, 30))) == "labels/views-00000-00029/train-0.parquet"
    assert str(labels_path("a", range(123_456, 123_457))) == "labels/views-123456-123456/a.parquet"
    assert [str(entry.path) for entry in make_manifest().files[1:]] == [
        "labels/views-00000-00002/train-0.parquet",
        "labels/views-00003-00005/train-0.parquet",
    ]


# What is not exactly the format is refused, with the place.

PLAN_REFUSED = [
    # change, where the error points
    (put("exec", value="import os"), "exec: Extra inputs are not permitted"),
    (put("teacher", "url", value="x"), "teacher.url: Extra inputs"),
    (put("source", "shards", 0, "path", value="/etc/passwd"), "source.shards.0.path: Extra inputs"),
    (put("recipe", "colour_jitter", value=0.4), "a recipe has no field colour_jitter"),
    (drop("topk"), "topk: Field required"),
    (put("teacher", "num_classes", value=4), "teacher: Value error, 3 class names for 4 classes"),
    (drop("recipe", "seed"), "the recipe must be complete: its hash covers every field"),
    (put("recipe", "cutmix", value=1), "the recipe must be complete: its hash covers every field"),
    (drop("teacher", "std"), "teacher.std: Field required"),
    (put("topk", value="2"), "topk: Input should be a valid integer"),
    (put("topk", value=2.0), "topk: Input should be a valid integer"),
    (put("topk", value=True), "topk: Input should be a valid integer"),
    (put("topk", value=None), "topk: Input should be a valid integer"),
    (put("topk", value=-1), "topk: Input should be greater than or equal to 0"),
    (put("topk", value=4097), "topk: Input should be less than or equal to 4096"),
    (put("topk", value=10**400), "topk: Input should be less than or equal to 4096"),
    (put("precision", value="float64"), "precision: Input should be 'float16', 'float32' or 'log8'"),
    (put("recipe", value=[]), "recipe: Input should be an object"),
    (put("recipe", "hflip", value=None), "hflip must be a number"),
    (put("recipe", "hflip", value=True), "hflip must be a number"),
    (put("recipe", "hflip", value=7), "hflip must be a number in 0..1, got 7"),
    (put("recipe", "img_size", value=10**9), "img_size must be a whole number in 1..4096"),
    (put("recipe", "renderer", value=3), "this version renders recipes of renderer 1 and 2, the recipe asks for 3"),
    (put("recipe", "crop", value="../x"), "crop must be one of random, center"),
    (put("teacher", "mean", value=[0.5, 0.5]), "teacher.mean.2: Field required"),
    (put("teacher", "mean", value=[0.5, 0.5, "0.5"]), "teacher.mean.2: Input should be a valid number"),
    (put("teacher", "num_classes", value=0), "teacher.num_classes: Input should be greater than or equal to 1"),
    (put("teacher", "img_size", value=1e9), "teacher.img_size"),
    (put("teacher", "weights_sha256", value="7" * 63), "teacher.weights_sha256: String should match pattern"),
    (put("teacher", "weights_sha256", value="A" * 64), "teacher.weights_sha256: String should match pattern"),
    (put("labelset_id", value="7" * 64 + "\n"), "labelset_id: String should match pattern"),
    (put("source", "kind", value="pipe"), "source.kind: Input should be 'folder', 'tar' or 'parquet'"),
    (put("source", "shards", 0, "name", value="../x"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="/etc/passwd"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="s3://x"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="a\n"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="a\0"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="ä"), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value=""), "source.shards.0.name: String should match pattern"),
    (put("source", "shards", 0, "name", value="a" * 201), "source.shards.0.name: String should have at most 200"),
    (put("source", "shards", 0, "num_samples", value=-1), "source.shards.0.num_samples: Input should be greater"),
    (put("source", "shards", 0, "num_samples", value=2**48), "source.shards.0.num_samples: Input should be less"),
    (put("source", "shards", value={}), "source.shards: Input should be a valid array"),
]


def named(change: Callable[[Any], None], text: str) -> str:
    return text.partition(": ")[0] + "-" + text[-12:]


@pytest.mark.parametrize(("change", "text"), PLAN_REFUSED, ids=[named(*case) for case in PLAN_REFUSED])
def test_a_plan_that_is_not_exactly_the_format_is_refused(tmp_path, change, text):
    bend(written(tmp_path) / "plan.json", change)
    with pytest.raises(DeitCliError) as caught:
        read_plan(tmp_path)
    assert isinstance(caught.value, (LabelSetCorrupt, LabelSetMismatch))
    assert str(caught.value).startswith(f"{tmp_path / 'plan.json'}: ")
    assert text in str(caught.value)


MANIFEST_REFUSED = [
    (put("exec", value=1), "exec: Extra inputs"),
    (put("files", 0, "path", value="../../x"), "files.0.path: Extra inputs"),
    (put("files", 0, "shard", value="../train-0"), "files.0.shard: String should match pattern"),
    (put("files", 0, "shard", value="a/b"), "files.0.shard: String should match pattern"),
    (put("files", 0, "kind", value="pictures"), "files.0.kind: Input should be 'samples', 'labels' or 'images'"),
    (put("files", 0, "bytes", value=-1), "files.0.bytes: Input should be greater than or equal to 0"),
    (put("files", 0, "rows", value=-1), "files.0.rows: Input should be greater than or equal to 0"),
    (put("files", 0, "rows", value=2**48), "files.0.rows: Input should be less than"),
    (put("files", 0, "rows", value=1.0), "files.0.rows: Input should be a valid integer"),
    (put("files", 0, "sha256", value="3" * 63 + "G"), "files.0.sha256: String should match pattern"),
    (put("files", 1, "view_start", value=-3), "files.1.view_start: Input should be greater"),
    (put("files", 2, value=dataclasses.asdict(make_manifest().files[1])), "one file is listed twice"),
    (
        put("files", 1, value=dataclasses.asdict(make_manifest().files[0]) | {"view_start": 5}),
        "one file is listed twice",
    ),
    (put("view_blocks", value=[[0, 3], [2, 6]]), "view blocks must be ranges that do not overlap"),
    (put("view_blocks", value=[[3, 6], [0, 4]]), "view blocks must be ranges that do not overlap"),
    (put("view_blocks", value=[[0, 3], [0, 3]]), "view blocks must be ranges that do not overlap"),
    (put("view_blocks", value=[[3, 3]]), "view blocks must be ranges that do not overlap"),
    (put("view_blocks", value=[[3, 0]]), "view blocks must be ranges that do not overlap"),
    (put("view_blocks", value=[[0]]), "view_blocks.0.1: Field required"),
    (put("view_blocks", value=[[0, 1, 2]]), "view_blocks.0"),
    (put("sealed", value=1), "sealed: Input should be a valid boolean"),
    (put("sealed", value="true"), "sealed: Input should be a valid boolean"),
    (put("probes", 0, "lam", value=1.5), "probes.0.lam: Input should be less than or equal to 1"),
    (put("probes", 0, "box", value=[1, 2, 3]), "probes.0.box.3: Field required"),
    (put("probes", 0, "box", value=[1, 2, 3, 4.5]), "probes.0.box.3: Input should be a valid integer"),
    (put("probes", 0, "row", value=-1), "probes.0.row: Input should be greater"),
    (put("probes", 0, "sample", value="A" * 4097), "probes.0.sample: String should have at most 4096"),
    (put("environments", value=[{"device": 1}]), "environments.0.device: Input should be a valid string"),
    (put("plan_sha256", value="3" * 63), "plan_sha256: String should match pattern"),
    (put("content_sha256", value="G" * 64), "content_sha256: String should match pattern"),
    (drop("probes"), "probes: Field required"),
    (drop("plan_sha256"), "plan_sha256: Field required"),
    (drop("files", 0, "rows"), "files.0.rows: Field required"),
    # Sound in all else: only the hash over the content can tell.
    (drop("content_sha256"), "its content does not have the hash that it states"),
    (put("content_sha256", value=None), "its content does not have the hash that it states"),
    (put("content_sha256", value="0" * 64), "its content does not have the hash that it states"),
    (put("environments", value=[]), "its content does not have the hash that it states"),
    (put("environments", 0, "device", value="gpu"), "its content does not have the hash that it states"),
    (put("probes", value=[]), "its content does not have the hash that it states"),
    (put("probes", 0, "lam", value=0.5000000000000001), "its content does not have the hash that it states"),
    (put("view_blocks", value=[[0, 3]]), "its content does not have the hash that it states"),
    (put("files", 0, "sha256", value="4" * 64), "its content does not have the hash that it states"),
]


@pytest.mark.parametrize(("change", "text"), MANIFEST_REFUSED, ids=[named(*case) for case in MANIFEST_REFUSED])
def test_a_manifest_that_is_not_exactly_the_format_is_refused(tmp_path, change, text):
    bend(written(tmp_path) / "manifest.json", change)
    with pytest.raises(LabelSetCorrupt) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'}: ")
    assert text in str(caught.value)


def test_the_manifest_is_held_against_the_bytes_of_its_plan(tmp_path):
    """Where the images lay is covered by no id; and a plan of equal content is another file."""
    path = written(tmp_path) / "plan.json"
    theirs = hashlib.sha256(path.read_bytes()).hexdigest()
    for change in (put("source", "location", value="/elsewhere"), lambda plan: None):
        bend(path, change)
        read_plan(tmp_path)
        mine = hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(LabelSetMismatch) as caught:
            read_manifest(tmp_path)
        text = f"belongs to another plan.json: it says SHA-256 {short(theirs)}…, the file has {short(mine)}…"
        assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'} {text}. Fetch it again")


@pytest.mark.parametrize("name", ["view_start", "view_stop"])
def test_a_file_entry_without_its_views_is_refused(tmp_path, name):
    """Another reader would take the content's hash without the field, and find another."""
    bend(written(tmp_path) / "manifest.json", drop("files", 0, name))
    with pytest.raises(LabelSetCorrupt, match=f"files.0.{name}: Field required"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        0,
        "1",
        None,
        [1],
        True,  # equal to 1 in Python
        1.0,
    ],
)
@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_another_version_is_refused_by_name(tmp_path, name, value):
    bend(written(tmp_path) / name, put("version", value=value))
    with pytest.raises(LabelSetMismatch) as caught:
        read_plan(tmp_path) if name == "plan.json" else read_manifest(tmp_path)
    text = f"{tmp_path / name} says ('deit-cli-labels', {value!r}); this version reads ('deit-cli-labels', 1)"
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_a_newer_version_says_so_and_what_to_do(tmp_path, name):
    """Whatever else such a file holds: its fields are those of that version, and are not looked at."""
    bend(written(tmp_path) / name, put("version", value=2))
    bend(tmp_path / name, put("of_version_2", value={"any": "thing"}))
    with pytest.raises(LabelSetMismatch) as caught:
        read_plan(tmp_path) if name == "plan.json" else read_manifest(tmp_path)
    text = f"{tmp_path / name} was made by a newer deit-cli: it is of format v2, this one reads v1."
    assert str(caught.value) == f"{text} Upgrade: pip install --upgrade deit-cli"


@pytest.mark.parametrize("text", ["[]", "null", "3", '"deit-cli-labels"', "{}", '{"version": 1}'])
def test_json_that_is_no_plan_at_all_is_refused_by_name(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(LabelSetMismatch, match=r"plan\.json says .*; this version reads"):
        read_plan(tmp_path)


def test_a_missing_plan_is_an_error(tmp_path):
    with pytest.raises(StorageError, match=r"plan\.json: no such file"):
        read_plan(tmp_path)


UNREADABLE = [
    # what stands in the file, instead of what
    ('"location": "\\ud800"', '"location": "/data/train"'),
    ('"topk": 1e400', '"topk": 2'),
    ('"hflip": 1e400', '"hflip": 0.5'),
    ('"hflip": 1' + 400 * "0", '"hflip": 0.5'),
    ('"aa": "rand-n' + 400 * "9" + '"', '"aa": "rand-m9-mstd0.5-inc1"'),
    ('"aa": "rand-m' + 400 * "9" + '"', '"aa": "rand-m9-mstd0.5-inc1"'),
]


@pytest.mark.parametrize(("text", "instead_of"), UNREADABLE, ids=lambda text: text[:24])
def test_numbers_and_texts_that_no_machine_can_hold_are_refused_by_name(tmp_path, text, instead_of):
    path = written(tmp_path) / "plan.json"
    content = path.read_text()
    assert instead_of in content
    path.write_text(content.replace(instead_of, text, 1))
    with pytest.raises(DeitCliError, match=r"plan\.json"):
        read_plan(tmp_path)


# Ids.

CHANGES = [
    # the part, another value of it
    ({"recipe": Recipe(seed=1)}, "recipe_id"),
    ({"recipe": Recipe(hflip=0.25)}, "recipe_id"),
    ({"teacher": TEACHER.model_copy(update={"weights_sha256": "8" * 64})}, "teacher_id"),
    ({"teacher": TEACHER.model_copy(update={"mean": (0.5, 0.5, 0.5)})}, "teacher_id"),
    ({"teacher": TEACHER.model_copy(update={"img_size": 288})}, "teacher_id"),
    ({"teacher": TEACHER.model_copy(update={"class_names": ("goldfish", "tench", "shark")})}, "teacher_id"),
    ({"source": SOURCE.model_copy(update={"shards": SOURCE.shards[::-1]})}, "source_id"),
    ({"source": SOURCE.model_copy(update={"shards": SOURCE.shards[:1]})}, "source_id"),
    ({"source": SOURCE.model_copy(update={"class_names": None})}, "source_id"),
    ({"topk": 1}, "labelset_id"),
    ({"precision": "float32"}, "labelset_id"),
]


@pytest.mark.parametrize(("change", "moved"), CHANGES)
def test_any_part_changes_the_label_set_s_id_and_no_other_part_s(change, moved):
    plan, other = make_plan(), make_plan(**change)
    names = ("labelset_id", "recipe_id", "teacher_id", "source_id")
    assert {name for name in names if getattr(plan, name) != getattr(other, name)} == {"labelset_id", moved}


def test_where_and_how_the_images_lie_changes_no_id():
    moved = SOURCE.model_copy(update={"location": "/elsewhere", "kind": "folder"})
    assert make_plan(source=moved).labelset_id == make_plan().labelset_id


@pytest.mark.parametrize(
    ("renderer", "recipe_id", "labelset_id"), [(1, "20ad9f5bf9d1", "dbb6c092375e"), (2, "e0b159eacfeb", "f2d4e1650dce")]
)
def test_ids_are_pinned(renderer, recipe_id, labelset_id):
    """A change here orphans every label set that exists."""
    plan = make_plan(recipe=Recipe(renderer=renderer))
    assert short(plan.recipe_id) == recipe_id
    assert short(plan.teacher_id) == "63a13851472c"
    assert short(plan.source_id) == "4cf191f07ea2"
    assert short(plan.labelset_id) == labelset_id


def test_a_set_of_the_old_renderer_says_how_to_continue_it():
    message = r"recipe 20ad9f5bf9d1, this run asks for \w+ \(renderer: 1, not 2\)\. Continue it with --set renderer=1, or use another --out"
    with pytest.raises(LabelSetMismatch, match=message):
        make_plan(recipe=Recipe(renderer=1)).check_same(make_plan(), folder="old")


CANONICAL = [
    # value, its one text
    ({"b": 1, "a": [1.0, 0.08, 1e-05, 1e22]}, '{"a":[1.0,0.08,1e-05,1e+22],"b":1}'),
    ({"ü": 'a"b\\c\n\x01/'}, '{"ü":"a\\"b\\\\c\\n\\u0001/"}'),
    ({"Z": None, "a": True, "é": False}, '{"Z":null,"a":true,"é":false}'),
]


@pytest.mark.parametrize(("value", "text"), CANONICAL)
def test_canonical_json_is_the_one_text_of_a_value(value, text):
    assert canonical_json(value) == text.encode()


def test_one_and_one_point_nought_have_two_ids():
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.0})


@pytest.mark.parametrize("name", ["labelset_id", "recipe_id", "teacher_id", "source_id"])
def test_an_id_that_does_not_follow_from_its_parts_is_refused(tmp_path, name):
    bend(written(tmp_path) / "plan.json", put(name, value="0" * 64))
    with pytest.raises(LabelSetCorrupt) as caught:
        read_plan(tmp_path)
    wanted = getattr(make_plan(), name)
    assert f"{name} is 000000000000, but its parts hash to {short(wanted)}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (put("recipe", "seed", value=1), "recipe_id"),
        (put("teacher", "img_size", value=288), "teacher_id"),
        (put("source", "shards", 1, "keys_sha256", value="0" * 64), "source_id"),
        (put("topk", value=1), "labelset_id"),
        (put("precision", value="float32"), "labelset_id"),
    ],
)
def test_a_part_that_was_changed_without_its_id_is_refused(tmp_path, change, name):
    bend(written(tmp_path) / "plan.json", change)
    with pytest.raises(LabelSetCorrupt, match=f"{name} is .*, but its parts hash to"):
        read_plan(tmp_path)


def test_two_source_shards_of_one_name_are_refused(tmp_path):
    twice = SOURCE.model_copy(update={"shards": (SOURCE.shards[0], SOURCE.shards[0])})
    with pytest.raises(ValueError, match="two source shards have the same name"):
        make_plan(source=twice)


@pytest.mark.parametrize("change", [{"num_classes": 4}, {"class_names": ("a",)}, {"class_names": ()}])
def test_class_names_that_are_not_as_many_as_the_classes_are_refused(change):
    with pytest.raises(ValueError, match=r"\d class names for \d classes"):
        TeacherIdentity(**(TEACHER.model_dump() | change))


# check_same: which part differs, and where.

DIFFERENT = [
    ({"recipe": Recipe(hflip=0.25)}, "was made with recipe {mine}, this run asks for {theirs} (hflip: 0.5, not 0.25). Use the same recipe or another --out"),
    ({"recipe": Recipe(scale=(0.1, 1.0))}, "(scale.0: 0.08, not 0.1). Use the same recipe"),
    ({"recipe": Recipe(aa=None)}, "(aa: rand-m9-mstd0.5-inc1, not None). Use the same recipe"),
    ({"teacher": TEACHER.model_copy(update={"name": "resnet50"})}, "was made with teacher {mine}, this run asks for {theirs} (name: regnety_160.deit_in1k, not resnet50). Use the same teacher"),
    ({"teacher": TEACHER.model_copy(update={"weights_sha256": "8" * 64})}, "(weights_sha256: 777777777777777777777777777777777777777777777777777777777…, not 888"),
    ({"source": SOURCE.model_copy(update={"shards": SOURCE.shards[:1]})}, "was made with source {mine}, this run asks for {theirs} (shards: 2 entries, not 1). Use the same source"),
    ({"source": SOURCE.model_copy(update={"class_names": ("tench", "carp", "shark")})}, "(class_names.1: goldfish, not carp). Use the same source"),
    ({"source": SOURCE.model_copy(update={"class_names": None})}, "(class_names: ['tench', 'goldfish', 'shark'], not None). Use the same source"),
    ({"teacher": EnsembleIdentity(members=(TEACHER, TEACHER))}, "(1 of them, not 2). Use the same teacher"),
    ({"topk": 1}, "was made with --topk 2, this run asks for 1. Use the same or another --out"),
    ({"precision": "float32"}, "was made with --precision float16, this run asks for float32. Use the same or another --out"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), DIFFERENT, ids=[text[-40:] for _, text in DIFFERENT])
def test_another_plan_is_refused_with_the_first_difference(change, text):
    plan, other = make_plan(), make_plan(**change)
    part = next((name for name in ("recipe", "teacher", "source") if name in change), None)
    ids = {who: short(getattr(p, f"{part}_id")) if part else "" for who, p in (("mine", plan), ("theirs", other))}
    with pytest.raises(LabelSetMismatch) as caught:
        plan.check_same(other, folder=Path("shards"))
    assert str(caught.value).startswith("shards was made with ")
    assert text.format(**ids) in str(caught.value)


def test_the_same_plan_elsewhere_is_the_same():
    moved = SOURCE.model_copy(update={"location": "/elsewhere"})
    make_plan().check_same(make_plan(source=moved), folder=Path("shards"))


def test_first_difference_of_equal_values_is_nothing():
    value = {"a": [1, {"b": 2}]}
    assert first_difference(value, copy.deepcopy(value)) == ""


# Probes of a footer, and the environment.


def test_probes_of_a_footer_are_checked_like_those_of_the_manifest(tmp_path):
    probe = make_manifest().probes[0]
    good = probe.model_dump(mode="json")
    assert read_probes([good], tmp_path) == [probe]
    for bad in ({**good, "lam": 2.0}, {**good, "x": 1}, {k: v for k, v in good.items() if k != "row"}, [], None, "x"):
        with pytest.raises(LabelSetCorrupt, match="a probe in its footer"):
            read_probes([bad], tmp_path)


@pytest.mark.parametrize(("renderer", "opencv"), [(1, {"opencv-python-headless"}), (2, set())])
def test_the_environment_names_what_pixels_depend_on(renderer, opencv):
    environment = pixel_environment(renderer=renderer, device="cpu", dtype="float32", compiled=False)
    assert (environment["device"], environment["dtype"]) == ("cpu", "float32")
    assert set(environment) == {"device", "dtype", "numpy", "pillow", "simplejpeg", "timm", "torch"} | opencv


def test_an_entry_of_a_file_takes_little_memory_and_is_still_a_frozen_value():
    entries = [
        {"kind": "labels", "shard": f"train-{number:06}", "view_start": 0, "view_stop": 30, "rows": 30_000}
        | {"bytes": 1_000_000 + number, "sha256": f"{number:064x}"}
        for number in range(5000)
    ]
    text = pretty_json(entries)
    kind = TypeAdapter(tuple[FileEntry, ...])
    tracemalloc.start()
    found = kind.validate_json(text)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / len(found) < 450  # a pydantic model takes 1,300 bytes
    assert [dataclasses.asdict(entry) for entry in found] == entries
    assert set(found) == set(pickle.loads(pickle.dumps(found)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].rows = 1  # pyright: ignore[reportAttributeAccessIssue]
