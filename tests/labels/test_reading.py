"""How a source was read stays with its label set, so that training needs no option; labels from a file need no second file."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.builders import CLASSES, encoded, photo, small_recipe, teacher_of, write_tars, write_unlabelled

import cli
from pipeline.errors import DeitCliError, LabelSetCorrupt, LabelSetMismatch, SourceError, UsageError
from pipeline.images.source import SourceOptions, open_source
from pipeline.labels.comparing import check_source, record_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import ReadingRecord, SourceRecord, parse_plan
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1.precompute import precompute
from pipeline.storage.json import pretty_json

SMALL = "--teacher support.builders:confident_cnn --views 2 --topk 2 -j 0 --device cpu --dtype float32"
SMALL += " --set img_size=16 --set mix_block=8"
TINY = "--model deit-ti --patch-size 8 --embed-dim 32 --depth 1 --num-heads 2 -b 12 -j 0 --device cpu --epochs 1"


def run(command: str, **names: Any) -> str:
    """Run a command in this process and return what it printed; its errors are raised."""
    result = CliRunner().invoke(cli.commands, command.format_map(names).split(), obj={})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def class_labels(folder: Path) -> dict[str, int | None]:
    """Return the class label of each key in the samples tables of a label set."""
    opened = LabelSet.open(folder)
    tables = [opened.samples(shard) for shard in opened.shards]
    return {key: label for table in tables for key, label in zip(table.key, table.class_label, strict=True)}


# --- labels from a file, from one end to the other --------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of images without classes, their classes by name in a file, and a label set of them."""
    folder = tmp_path_factory.mktemp("made")
    write_unlabelled(folder / "images", folder / "numbers.csv")
    rows = "".join(f"img-{number:04}.jpg,{CLASSES[number % 3]}\n" for number in range(23))
    (folder / "labels.csv").write_text(rows)
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")
    run(
        f"precompute --data {{f}}/images --labels-file {{f}}/labels.csv --class-order {{f}}/names.txt --out {{f}}/set {SMALL}",
        f=folder,
    )
    return folder


def test_the_classes_of_the_file_are_in_the_samples_tables_and_in_the_plan(made):
    assert class_labels(made / "set") == {f"img-{number:04}": number % 3 for number in range(23)}
    source = LabelSet.open(made / "set").plan.source
    assert source.class_names == CLASSES
    assert source.reading is None  # neither file is recorded
    assert "reading" not in json.loads((made / "set/plan.json").read_text())["source"]


def test_labels_of_a_file_are_those_of_images_that_have_them(made, tmp_path):
    """The same images in tars with `.cls` members, labelled without any option: the tables have the same columns."""
    run(f"precompute --data {write_tars(tmp_path / 'tars', (23,))} --out {tmp_path}/other {SMALL}")
    assert class_labels(tmp_path / "other") == class_labels(made / "set")


@pytest.mark.slow
def test_training_needs_no_option(made, tmp_path, caplog):
    run(f"train --labels {{f}}/set --output {tmp_path}/run {TINY} --log-interval 1", f=made)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("class_loss" in line for line in lines)
    found = json.loads(
        run(
            f"evaluate --checkpoint {tmp_path}/run/last --data {{f}}/images --labels-file {{f}}/labels.csv"
            " --class-order {f}/names.txt -j 0 --device cpu --json",
            f=made,
        )
    )
    assert found["images"] == 23
    by_number = json.loads(
        run(
            f"evaluate --checkpoint {tmp_path}/run/last --data {{f}}/images --labels-file {{f}}/numbers.csv"
            " -j 0 --device cpu --json",
            f=made,
        )
    )
    assert by_number["scores"] == found["scores"]


@pytest.mark.parametrize("command", ["labels show {f}/set --out {o}/sheet.png", "labels verify {f}/set", "labels verify {f}/set --data {f}/images"])  # fmt: skip
def test_commands_of_a_label_set_need_no_option(made, tmp_path, command):
    run(command, f=made, o=tmp_path)


def test_an_extension_takes_the_classes_of_the_set(made, tmp_path):
    shutil.copytree(made / "set", tmp_path / "set")
    again = "--teacher support.builders:confident_cnn -j 0 --device cpu --dtype float32"
    run(f"labels extend {tmp_path}/set --views 2:3 {again}")
    assert LabelSet.open(tmp_path / "set").views == range(3)
    run(f"labels extend {tmp_path}/set --views 3:4 --data {{f}}/images {again}", f=made)
    assert LabelSet.open(tmp_path / "set").views == range(4)


def test_a_copy_without_classes_is_the_labelled_one_and_one_with_others_is_not(made, tmp_path):
    opened = LabelSet.open(made / "set")
    check_source(opened, opened.open_source())
    check_source(opened, opened.open_source(str(made / "images")))
    (tmp_path / "labels.csv").write_text((made / "numbers.csv").read_text().replace("img-0004.jpg,1", "img-0004.jpg,2"))
    other = opened.open_source(str(made / "images"), options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    with pytest.raises(
        LabelSetMismatch, match=r"1 sample is with another class label: 'img-0004' .*\(class 2, labelled"
    ):
        check_source(opened, other)


def test_a_copy_without_classes_must_have_the_labelled_images(made, tmp_path):
    opened = LabelSet.open(made / "set")
    copy = Path(shutil.copytree(made / "images", tmp_path / "copy"))
    (copy / "img-0003.jpg").rename(copy / "new.jpg")
    with pytest.raises(LabelSetMismatch) as caught:
        check_source(opened, opened.open_source(str(copy)))
    assert "1 sample is missing: 'img-0003' of" in str(caught.value)
    assert "another class label" not in str(caught.value)


# --- how the source was read ------------------------------------------------------------------------------------------


def write_digits(folder: Path, number: int = 12) -> Path:
    """Write an image folder with the classes 0, 1, ...: as text, 10 comes before 2."""
    for each in range(number):
        (folder / str(each)).mkdir(parents=True)
        (folder / str(each) / "a.jpg").write_bytes(encoded(photo(each)))
    return folder


def label_digits(folder: Path, class_order: str | None) -> LabelSet:
    data = write_digits(folder / "data")
    (folder / "backwards").write_text("".join(f"{number}\n" for number in reversed(range(12))))
    source = open_source(data, options=SourceOptions(class_order=class_order))
    teacher = teacher_of("test_resnet", pretrained=False, img_size=16, num_classes=12)
    config = PrecomputeConfig(
        data=str(data), out=str(folder / "set"), views=(0, 1), topk=2, workers=0, class_order=class_order
    )
    made = precompute(config, small_recipe(), teacher, source)
    assert made is not None
    return made


def test_an_order_of_the_classes_is_recorded_and_used_again(tmp_path):
    made = label_digits(tmp_path, "natural")
    assert made.plan.source.class_names == tuple(map(str, range(12)))
    assert json.loads((tmp_path / "set/plan.json").read_text())["source"]["reading"] == {"class_order": "natural"}
    for data in (None, str(tmp_path / "data")):
        source = made.open_source(data)
        assert source.class_names == made.plan.source.class_names
        check_source(made, source)
    with pytest.raises(LabelSetMismatch, match="the classes are in another order: number 2 is '10', labelled as '2'"):
        check_source(made, made.open_source(str(tmp_path / "data"), options=SourceOptions(class_order="text")))


def test_an_order_from_a_file_is_used_again_without_the_file(tmp_path):
    made = label_digits(tmp_path, str(tmp_path / "backwards"))
    (tmp_path / "backwards").unlink()
    assert made.plan.source.reading is None
    source = made.open_source()
    assert source.class_names == tuple(map(str, reversed(range(12))))
    check_source(made, source)


@pytest.mark.parametrize("class_order", [None, "text"])
def test_an_order_that_nobody_chose_is_refused_before_labels_are_made(tmp_path, class_order):
    if class_order is not None:
        assert label_digits(tmp_path, class_order).plan.source.class_names == tuple(sorted(map(str, range(12))))
        return
    with pytest.raises(DeitCliError) as caught:
        label_digits(tmp_path, class_order)
    assert str(caught.value) == (
        f"the order of the classes of {tmp_path}/data is open: as text 0, 1, 10, 11 and 8 more, by numbers 0, 1, 2, 3 and 8"
        " more; and teacher test_resnet has no class names to compare with. Pass the order with which it was trained:"
        " --class-order text (torchvision), --class-order natural (timm), or a file with one class name per line"
    )
    assert not (tmp_path / "set").exists()


READ = SourceOptions(
    image_key="jpg;png",
    label_key="cls.txt",
    image_root="images",
    labels_file=None,
    class_depth=2,
    class_order="natural",
)
RECORDED = [
    # options, what the record says
    (SourceOptions(), None),
    (replace(READ, image_root=None), {"image_key": "jpg;png", "label_key": "cls.txt", "class_depth": 2, "class_order": "natural"}),
    (SourceOptions(image_root="s3://bucket/images"), {"image_root": "s3://bucket/images"}),
    (SourceOptions(labels_file="f.csv", label_key="fine", image_key="png"), {"image_key": "png"}),  # a column of the file
    (SourceOptions(labels_file="f.csv", class_order="names.txt"), None),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), RECORDED)
def test_the_record_has_what_a_reader_cannot_know(tmp_path, options, said):
    plain = open_source(write_tars(tmp_path / "data"))
    record = record_of(replace(plain, options=options))
    dumped = record.model_dump(mode="json")
    assert dumped.get("reading") == said
    assert ("reading" in dumped) == (said is not None)
    assert record.id == record_of(plain).id  # it is no part of the identity
    assert SourceRecord.model_validate_json(pretty_json(dumped)) == record


def test_a_relative_root_is_recorded_as_an_absolute_one(tmp_path, monkeypatch):
    source = open_source(write_tars(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    reading = record_of(replace(source, options=SourceOptions(image_root="images"))).reading
    assert reading is not None
    assert reading.image_root == str(tmp_path / "images")


BAD = [
    ("null", None),
    ("nothing", {}),
    ("a null in it", {"image_key": "jpg", "label_key": None}),
    ("a file of names", {"class_order": "/etc/names"}),
    ("no depth", {"class_depth": 0}),
    ("another field", {"labels_file": "/etc/passwd"}),
    ("a control character", {"image_root": "/data\x1b"}),
]


@pytest.mark.parametrize(("name", "reading"), BAD, ids=[name for name, _ in BAD])
def test_a_reading_that_no_writer_makes_is_refused(made, name, reading):
    values = json.loads((made / "set/plan.json").read_text())
    values["source"]["reading"] = {"image_key": "jpg"}
    parse_plan(pretty_json(values), "plan.json")  # it can be read
    values["source"]["reading"] = reading
    with pytest.raises(LabelSetCorrupt, match=r"plan\.json: source"):
        parse_plan(pretty_json(values), "plan.json")


def test_a_root_behind_a_url_is_opened_only_on_request(made):
    opened = LabelSet.open(made / "set")
    reading = ReadingRecord(image_root="http://169.254.169.254")
    source = opened.plan.source.model_copy(update={"reading": reading})
    opened.plan = opened.plan.model_copy(update={"source": source})
    for data in (None, str(made / "images")):
        with pytest.raises(UsageError, match=r"its URLs are opened only on request: pass --data and --image-root"):
            opened.open_source(data)


def test_a_labels_file_that_lacks_an_image_stops_labelling(made, tmp_path):
    (tmp_path / "labels.csv").write_text("img-0000.jpg,0\n")
    with pytest.raises(SourceError, match=r"22 of 23 images of .* have no row, the first is"):
        run(f"precompute --data {{f}}/images --labels-file {tmp_path}/labels.csv --out {tmp_path}/set {SMALL}", f=made)
