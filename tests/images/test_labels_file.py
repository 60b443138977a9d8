"""Class labels from a file: each form that people have, for each kind of source, and what is refused by name."""

import logging
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sources import image, write_parquet
from test_source import write_folder, write_tar

from pipeline.errors import SourceError
from pipeline.images.labels_file import LabelledShard
from pipeline.images.source import Source, SourceOptions, open_source

FILES = ["a/1.jpg", "a/2.png", "b/3.jpg"]  # what most cases below label


def write_tars(root: Path, files: list[str]) -> Path:
    root.mkdir()
    members = [(name, image(number)) for number, name in enumerate(files)]
    write_tar(root / "train-0.tar", members[:2])
    write_tar(root / "train-1.tar", members[2:])
    return root


def write_rows(root: Path, files: list[str]) -> Path:
    root.mkdir()
    write_parquet(root / "train.parquet", [(image(number), name) for number, name in enumerate(files)])
    return root


WRITERS = {"folder": write_folder, "tar": write_tars, "parquet": write_rows}


def of_key(source: Source) -> dict[str, int | None]:
    """Return the class label of each key."""
    return {key: label for shard in source.shards for key, label in zip(shard.keys, shard.class_labels, strict=True)}


@dataclass(frozen=True)
class Case:
    """A labels file for FILES, and the labels of a/1, a/2 and b/3."""

    content: str
    labels: tuple[int | None, ...]
    names: tuple[str, ...] | None = None
    name: str = "labels.csv"
    options: tuple[tuple[str, str], ...] = ()


NUMBERS = (2, 0, 1)
NAMES = ("ant", "bee", "cow")
GOOD = {
    "CSV with a header": Case("path,label\na/1.jpg,2\na/2.png,0\nb/3.jpg,1\n", NUMBERS),
    "CSV without a header": Case("a/1.jpg,2\na/2.png,0\nb/3.jpg,1\n", NUMBERS),
    "without a newline at the end": Case("a/1.jpg,2\na/2.png,0\nb/3.jpg,1", NUMBERS),
    "other names of columns": Case("filename,class\na/1.jpg,cow\na/2.png,ant\nb/3.jpg,bee\n", NUMBERS, NAMES),
    "the label first": Case("label,image\n2,a/1.jpg\n0,a/2.png\n1,b/3.jpg\n", NUMBERS),
    "one known name of two": Case("id,breed\na/1,cow\na/2,ant\nb/3,bee\n", NUMBERS, NAMES),
    "more columns": Case("w,h,path,label\n8,8,a/1.jpg,2\n8,8,a/2.png,0\n8,8,b/3.jpg,1\n", NUMBERS),
    "a chosen column": Case(
        "path,label,fine\na/1.jpg,0,2\na/2.png,0,0\nb/3.jpg,0,1\n", NUMBERS, options=(("label_key", "fine"),)
    ),
    "Windows": Case("\ufeffpath,label\r\na/1.jpg,2\r\na/2.png,0\r\nb/3.jpg,1\r\n", NUMBERS),
    "quotes and spaces": Case('path, label\n"a/1.jpg", "cow"\na/2.png, ant\nb/3.jpg,bee\n\n', NUMBERS, NAMES),
    "a comma in a name": Case('a/1.jpg,"c, d"\na/2.png,ant\nb/3.jpg,bee\n', NUMBERS, ("ant", "bee", "c, d")),
    "TSV": Case("path\tlabel\na/1.jpg\t2\na/2.png\t0\nb/3.jpg\t1\n", NUMBERS, name="labels.tsv"),
    "Caffe's val.txt": Case("a/1.jpg 2\na/2.png 0\nb/3.jpg 1\n", NUMBERS, name="val.txt"),
    "JSON lines": Case(
        '{"path": "a/1.jpg", "label": 2}\n{"path": "a/2.png", "label": 0}\n\n{"path": "b/3.jpg", "label": 1}\n',
        NUMBERS,
        name="labels.jsonl",
    ),
    "metadata.jsonl of datasets": Case(
        '{"file_name": "a/1.jpg", "label": "cow", "box": [1]}\n{"file_name": "a/2.png", "label": "ant"}\n'
        '{"file_name": "b/3.jpg", "label": "bee"}\n',
        NUMBERS,
        NAMES,
        name="metadata.jsonl",
    ),
    "Kaggle's LOC_val_solution.csv": Case(
        "ImageId,PredictionString\na/1,n03 1 2 3 4 n03 5 6 7 8 \na/2,n01 1 2 3 4 \nb/3,n02 1 2 3 4 \n",
        NUMBERS,
        ("n01", "n02", "n03"),
    ),
    "paths without extensions": Case("a/1,2\na/2,0\nb/3,1\n", NUMBERS),
    "paths from the folder itself": Case("./a/1.jpg,2\n./a/2.png,0\n./b/3.jpg,1\n", NUMBERS),
    "file names": Case("1.jpg,2\n2.png,0\n3.jpg,1\n", NUMBERS),
    "paths from elsewhere": Case("/data/set/1.jpg,2\n/data/set/2.png,0\n/data/set/3.jpg,1\n", NUMBERS),
    "an image twice, with one label": Case("a/1.jpg,2\na/2.png,0\nb/3.jpg,1\na/1.jpg,2\n", NUMBERS),
    "images that have no class": Case("a/1.jpg,1\na/2.png,\nb/3.jpg,-1\n", (1, None, None)),
    "JSON without a class": Case(
        '{"path": "a/1", "label": 1}\n{"path": "a/2", "label": null}\n{"path": "b/3", "label": -1}\n', (1, None, None)
    ),
    "names in natural order": Case(
        "a/1.jpg,c10\na/2.png,c1\nb/3.jpg,c2\n", NUMBERS, ("c1", "c2", "c10"), options=(("class_order", "natural"),)
    ),
    "names in the order of text": Case(
        "a/1.jpg,c2\na/2.png,c1\nb/3.jpg,c10\n", NUMBERS, ("c1", "c10", "c2"), options=(("class_order", "text"),)
    ),
    "names in the order of a file": Case(
        "a/1.jpg,cow\na/2.png,ant\nb/3.jpg,bee\n", (1, 2, 0), ("bee", "cow", "ant", "elk"), options=(("class_order", "names"),)
    ),
    "numbers with a file of names": Case(
        "a/1.jpg,2\na/2.png,0\nb/3.jpg,1\n", NUMBERS, ("bee", "cow", "ant", "elk"), options=(("class_order", "names"),)
    ),
}  # fmt: skip


def options_of(folder: Path, case: Case) -> SourceOptions:
    (folder / "names").write_text("bee\ncow\nant\nelk\n")
    (folder / case.name).write_text(case.content, newline="")
    options: dict[str, Any] = {
        k: str(folder / "names") if (k, v) == ("class_order", "names") else v for k, v in case.options
    }
    return SourceOptions(labels_file=str(folder / case.name), **options)


@pytest.mark.parametrize("name", GOOD)
def test_a_labels_file_gives_each_image_its_class(tmp_path, name):
    case = GOOD[name]
    data = write_tars(tmp_path / "data", FILES)
    source = open_source(data, options=options_of(tmp_path, case))
    assert of_key(source) == dict(zip(("a/1", "a/2", "b/3"), case.labels, strict=True))
    assert source.class_names == case.names


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_source_takes_labels_and_keeps_its_images(tmp_path, kind):
    files = ["1.jpg", "2.png", "3.jpg"]
    data = WRITERS[kind](tmp_path / "data", files)
    (tmp_path / "labels.csv").write_text("1.jpg,cow\n2.png,ant\n3.jpg,bee\n")
    plain = open_source(data)
    source = open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    assert of_key(source) == {"1": 2, "2": 0, "3": 1}
    assert source.class_names == NAMES
    assert [each.name for each in source.shards] == [each.name for each in plain.shards]
    for shard, other in zip(source.shards, plain.shards, strict=True):
        again = pickle.loads(pickle.dumps(shard))
        assert [sample.image for sample in again] == [sample.image for sample in other]
        assert [sample.class_label for sample in again] == list(shard.class_labels)


def test_labels_of_a_file_replace_those_of_the_source(tmp_path):
    data = write_folder(tmp_path / "data", ["x/1.jpg", "y/2.jpg"])
    (tmp_path / "labels.csv").write_text("x/1.jpg,cow\ny/2.jpg,ant\n")
    source = open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    assert of_key(source) == {"x/1": 1, "y/2": 0}
    assert source.class_names == ("ant", "cow")


def test_names_beside_the_images_number_the_classes_and_one_may_have_no_image(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (data / "classes.txt").write_text("elk\ncow\nbee\nant\n")
    (tmp_path / "labels.csv").write_text("a/1.jpg,cow\na/2.png,ant\nb/3.jpg,bee\n")
    source = open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    assert of_key(source) == {"a/1": 1, "a/2": 3, "b/3": 2}
    assert source.class_names == ("elk", "cow", "bee", "ant")


BAD = {
    "nothing": ("", "labels.csv: no row in this file"),
    "only a header": ("path,label\n", "no row in this file, only the names of its columns"),
    "another label for one image": (
        "a/1.jpg,2\na/2.png,0\nb/3.jpg,1\na/1.jpg,1\n",
        "line 4: 'a/1' has the label '1' here, and '2' in an earlier line",
    ),
    "first no label, then one": ("a/1.jpg,\na/1.jpg,0\n", "line 2: 'a/1' has the label '0' here, and no class in an"),
    "unknown names of columns": (
        "photo,species\na/1.jpg,cat\na/2.png,ant\nb/3.jpg,cat\n",
        "line 1: 'photo' is no image, and 'species' is the label of no other row: these seem to be names of columns",
    ),
    "several columns of labels": (
        "path,class_id,class_name\na/1.jpg,2,cat\na/2.png,0,ant\nb/3.jpg,2,cat\n",
        "line 1: several columns could be the label: class_id, class_name. Choose one, such as --label-key class_id",
    ),
    "images without a row": (
        "a/1.jpg,2\n",
        "labels.csv: 2 of 3 images of .* have no row, the first is 'a/2'; the file has 'a/1'. Add their rows",
    ),
    "numbers and names": (
        "a/1.jpg,2\na/2.png,ant\nb/3.jpg,1\n",
        "line 2: labels must be all numbers or all names: '2' in line 1, 'ant' in line 2",
    ),
    "a fraction": ("a/1.jpg,2.0\n", "line 1: a label must be a class number, 0 or more, or a class name, got '2.0'"),
    "a negative number": ("a/1.jpg,-2\n", "line 1: a label must be a class number, 0 or more, or a class name, got '-2'"),
    "a huge number": ("a/1,9999999999\na/2,0\nb/3,0\n", "line 1: class label must be in 0..2147483647"),
    "columns without names": ("1,a/1.jpg,2\n", "line 1: it must be clear which columns are path and label, got 3: 1, a"),
    "one column": ("a/1.jpg\n", "line 1: it must be clear which columns are path and label, got 1"),
    "a row that is too short": ("path,label\na/1.jpg\n", "line 2: 2 columns must be here, as above, got 1"),
    "an open quote": ('a/1.jpg,"2\n', "not valid CSV"),
    "no path": (",2\n", "line 1: there is no path of an image"),
    "not JSON": ('{"path": "a/1.jpg", "label": 2\n', "line 1: not valid JSON"),
    "a JSON list": ('[{"path": "a/1.jpg"}]', "a JSON list is not read. Write one object a line"),
    "a field twice": ('{"path": "a", "path": "b", "label": 1}', "line 1: not valid JSON: a field stands twice"),
    "JSON without a label": ('{"path": "a/1.jpg", "x": 1}', "line 1: no field is the label, got path, x. Name it label"),
    "a JSON label that is no class": ('{"path": "a", "label": [1]}', "line 1: a label must be a class number or a class"),
    "a JSON truth": ('{"path": "a", "label": true}', "line 1: a label must be a class number or a class name, got True"),
    "a NUL": ("a/1.jpg,2\na\0,2\n", "line 2: a NUL character"),
    "a control character": ("a/1.jpg,a\x1bb\n", "line 1: class name must not contain control characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_labels_file_is_refused_by_line(tmp_path, name):
    content, message = BAD[name]
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))


def test_a_labels_file_that_is_no_file_is_refused(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "latin.csv").write_bytes(b"a/1.jpg,0\na/2.png,\xe9t\xe9\n")
    for name, message in {
        "nothing.csv": "does not exist. A labels file is CSV",
        "data": "class labels must be a plain file",
        "latin.csv": "line 2: class labels must be valid UTF-8. Save it as UTF-8",
    }.items():
        with pytest.raises(SourceError, match=message):
            open_source(data, options=SourceOptions(labels_file=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na/1.jpg,2\n", "line 1: there is no column 'fine' \\(--label-key\\), got path, label"),
        ('{"path": "a/1.jpg", "label": 2}\n', "line 1: no field is the label, got path, label. --label-key fine asks"),
    ],
)
def test_a_column_that_is_asked_for_and_missing_is_refused(tmp_path, content, message):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv"), label_key="fine"))


def test_an_order_of_names_needs_names(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "labels.csv").write_text("a/1.jpg,2\na/2.png,0\nb/3.jpg,1\n")
    options = SourceOptions(labels_file=str(tmp_path / "labels.csv"), class_order="natural")
    with pytest.raises(
        SourceError, match="class numbers have no other order, and --class-order natural is one of names"
    ):
        open_source(data, options=options)


def test_a_class_that_the_file_of_names_lacks_is_refused(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "names").write_text("ant\nbee\n")
    (tmp_path / "labels.csv").write_text("a/1.jpg,cow\na/2.png,ant\nb/3.jpg,bee\n")
    options = SourceOptions(labels_file=str(tmp_path / "labels.csv"), class_order=str(tmp_path / "names"))
    with pytest.raises(SourceError, match=r"names does not name the class 'cow'. --class-order FILE needs one line"):
        open_source(data, options=options)
    (tmp_path / "labels.csv").write_text("a/1.jpg,2\na/2.png,0\nb/3.jpg,1\n")
    with pytest.raises(SourceError, match=r"line 1: class label must be in 0..1 \(2 classes\), got 2"):
        open_source(data, options=options)


def test_a_number_that_is_also_the_name_of_another_class_is_refused(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (data / "classes.txt").write_text("0\n1\n10\n2\n")
    (tmp_path / "labels.csv").write_text("a/1.jpg,0\na/2.png,1\nb/3.jpg,2\n")
    options = SourceOptions(labels_file=str(tmp_path / "labels.csv"))
    with pytest.raises(SourceError, match=r"line 3: '2' is the number of one class and the name of another, number 3"):
        open_source(data, options=options)
    source = open_source(data, options=replace(options, class_order="natural"))
    assert of_key(source) == {"a/1": 0, "a/2": 1, "b/3": 2}
    assert source.class_names == ("0", "1", "2", "10")


def test_rows_without_an_image_are_counted_once(tmp_path, caplog):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "labels.csv").write_text("a/1.jpg,2\na/2.png,0\nz/8.jpg,1\nb/3.jpg,1\nz/9.jpg,7\n")
    with caplog.at_level(logging.WARNING):
        open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    (record,) = caplog.records
    assert record.getMessage().endswith(f"labels.csv: 2 of 5 rows name no image of {data}, the first is 'z/8'")


def test_a_file_name_of_two_images_says_nothing(tmp_path):
    data = write_folder(tmp_path / "data", ["a/1.jpg", "b/1.jpg"])
    (tmp_path / "labels.csv").write_text("a/1.jpg,0\n1.jpg,1\n")
    with pytest.raises(SourceError, match=r"1 of 2 images of .* have no row, the first is 'b/1'"):
        open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))


def test_a_shard_that_changed_after_its_labels_were_read_is_refused(tmp_path):
    data = write_tars(tmp_path / "data", FILES)
    (tmp_path / "labels.csv").write_text("a/1.jpg,2\na/2.png,0\nb/3.jpg,1\n")
    source = open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv")))
    there = pickle.dumps(source.shards[1])
    write_tar(data / "train-1.tar", [("b/4.jpg", image(2))])
    with pytest.raises(SourceError, match="train-1 has other images than when its class labels were read"):
        pickle.loads(there).class_labels  # noqa: B018


def test_a_shard_is_small_when_it_is_sent(tmp_path):
    files = [f"{number:05}.jpg" for number in range(2000)]
    rng = random.Random(0)
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "train.tar", [(name, b"x") for name in files])
    (tmp_path / "labels.csv").write_text("".join(f"{name},{rng.randrange(1000)}\n" for name in files))
    (shard,) = open_source(data, options=SourceOptions(labels_file=str(tmp_path / "labels.csv"))).shards
    assert isinstance(shard, LabelledShard)
    assert len(shard.class_labels) == 2000
    assert len(pickle.dumps(shard)) < 2000 * 2.5  # bytes for each image, of which the label needs 1.25


# --- ImageNet ---------------------------------------------------------------------------------------------------------

SYNSETS = [f"n{number:08}" for number in range(1000)]
IDS = sorted(SYNSETS, key=lambda name: name[::-1])  # the synset of ILSVRC id 1, 2, ...: any order but the sorted one
VALIDATION = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 6)]
TRUTH = [490, 361, 171, 822, 1]


def write_truth(folder: Path, values: Sequence[object]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{value}\n" for value in values))
    return str(folder / "ILSVRC2012_validation_ground_truth.txt")


def write_order(folder: Path, form: str) -> None:
    folder.mkdir()
    if form == "meta.mat":
        io = pytest.importorskip("scipy.io")
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
        leaves = [(number, name, "a word", 0) for number, name in enumerate(IDS, start=1)]
        structs = np.array([*leaves, (1001, "n90000000", "an inner node", 7)], dtype=kinds)
        io.savemat(folder / form, {"synsets": structs}, do_compression=True)
    elif form == "map_clsloc.txt":
        (folder / form).write_text("".join(f"{name} {at} a_word\n" for at, name in enumerate(IDS, start=1)))
    else:
        (folder / form).write_text("".join(f"{name}\n" for name in IDS))


@pytest.mark.parametrize("form", ["meta.mat", "map_clsloc.txt", "synsets.txt"])
def test_ilsvrc_ids_become_the_classes_of_torchvision_and_timm(tmp_path, form):
    write_order(tmp_path / "kit", form)
    data = write_folder(tmp_path / "val", VALIDATION)
    (tmp_path / "all").write_text("".join(f"{name}\n" for name in SYNSETS))  # five images have five classes at most
    options = SourceOptions(labels_file=write_truth(tmp_path / "kit", TRUTH), class_order=str(tmp_path / "all"))
    source = open_source(data, options=options)
    assert source.class_names == tuple(SYNSETS)
    expected = {path[:-5]: SYNSETS.index(IDS[number - 1]) for path, number in zip(VALIDATION, TRUTH, strict=True)}
    assert of_key(source) == expected


def test_a_synset_a_line_needs_no_second_file(tmp_path):
    data = write_folder(tmp_path / "val", VALIDATION)
    truth = write_truth(tmp_path / "kit", [IDS[number - 1] for number in TRUTH])
    source = open_source(data, options=SourceOptions(labels_file=truth))
    assert source.class_names == tuple(sorted(IDS[number - 1] for number in TRUTH))


def test_ilsvrc_ids_without_their_synsets_are_refused(tmp_path):
    data = write_folder(tmp_path / "val", VALIDATION)
    with pytest.raises(SourceError, match=r"ILSVRC ids, whose order is not that .* Put meta.mat or map_clsloc.txt"):
        open_source(data, options=SourceOptions(labels_file=write_truth(tmp_path / "kit", TRUTH)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "synsets.txt",
            "".join(f"{name}\n" for name in SYNSETS),
            "the synsets are sorted, which is the order of torch",
        ),
        ("synsets.txt", "n00000001\n" * 1000, "1000 different synsets must be here, got 1"),
        ("map_clsloc.txt", "n02119789 2 kit_fox\n", "line 1: the synset of ILSVRC id 1 must be here"),
        ("meta.mat", "no MATLAB file", "damaged, or not ImageNet's meta.mat"),
    ],
)
def test_a_wrong_order_of_the_ids_is_refused(tmp_path, name, content, message):
    data = write_folder(tmp_path / "val", VALIDATION)
    truth = write_truth(tmp_path / "kit", TRUTH)
    (tmp_path / "kit" / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source(data, options=SourceOptions(labels_file=truth))


@pytest.mark.parametrize("value", [0, 1001, "cat", ""])
def test_a_line_of_the_ground_truth_that_is_no_id_is_refused(tmp_path, value):
    write_order(tmp_path / "kit", "map_clsloc.txt")
    data = write_folder(tmp_path / "val", VALIDATION)
    truth = write_truth(tmp_path / "kit", [490, 361, value, 822, 1])
    with pytest.raises(
        SourceError, match=r"line 3: an ILSVRC id in 1..1000 must be here, one for each of ILSVRC2012_val"
    ):
        open_source(data, options=SourceOptions(labels_file=truth))
