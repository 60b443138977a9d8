"""Orders of classes and images of samples, beside the libraries that people compare with: torchvision, timm, webdataset."""

import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key as timm_key
from torchvision.datasets import ImageFolder
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.errors import SourceError
from pipeline.images.class_names import class_numbers, natural_key, ordered_class_names, reordered
from pipeline.images.samples import SourceOptions
from pipeline.images.source import open_source

NAMES = ["10", "9", "007", "class2", "Class10", "class 1", "a1b2", "a1b10", "A01b3", "x", "X1", "b-b", "b", "n01440764"]
ALPHABET = "aB01 29-_é"


@given(st.lists(st.text(ALPHABET, min_size=1, max_size=6), unique=True))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_natural_order_is_that_of_timm_and_the_name_decides_between_equals(names):
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=timm_key)


def folders(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        (root / name / "x.jpg").write_bytes(image(number))
    return root


def numbers(root: Path, order: str) -> dict[str, int | None]:
    source = open_source(root, options=SourceOptions(class_order=order))
    return {
        key.removesuffix("/x"): label for s in source.shards for key, label in zip(s.keys, s.class_labels, strict=True)
    }


def test_text_order_numbers_the_classes_as_torchvision_does(tmp_path):
    assert numbers(folders(tmp_path), "text") == ImageFolder(str(tmp_path)).class_to_idx


def test_natural_order_numbers_the_classes_as_timm_does(tmp_path):
    assert numbers(folders(tmp_path), "natural") == find_images_and_targets(str(tmp_path))[1]


EXTENSIONS = ["jpg", "jpeg", "png", "webp", "seg.png", "cls", "txt", "mask.npy", "JSON"]


@pytest.mark.parametrize("seed", range(20))
def test_the_image_of_a_sample_is_the_first_of_jpg_jpeg_png_webp_as_webdataset_groups_them(tmp_path, seed):
    chance = random.Random(seed)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for number in range(30):
            others = chance.sample(EXTENSIONS, chance.randrange(1, 6))
            for extension in {chance.choice(EXTENSIONS[:4]), *others}:
                data = {"cls": b"%d" % number, "JSON": b"{}"}.get(extension, b"%d.%s" % (number, extension.encode()))
                info = tarfile.TarInfo(f"k{number}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    with open(tmp_path / "t.tar", "rb") as file:
        files = [{"__url__": "t.tar", **member} for member in tar_file_iterator(file)]  # pyright: ignore
    theirs = {sample["__key__"]: sample for sample in group_by_keys(files)}
    (shard,) = open_source(tmp_path / "t.tar").shards
    assert list(shard.keys) == list(theirs)
    for sample in shard:
        sought = next(theirs[sample.key][key] for key in ("jpg", "jpeg", "png", "webp") if key in theirs[sample.key])
        assert sample.image == sought
        assert sample.class_label == (int(theirs[sample.key]["cls"]) if "cls" in theirs[sample.key] else None)


def test_the_orders_of_a_few_names(caplog):
    names = ["10", "9", "1"]
    assert ordered_class_names(names, SourceOptions(class_order="text"), where="x") == ("1", "10", "9")
    assert ordered_class_names(names, SourceOptions(class_order="natural"), where="x") == ("1", "9", "10")
    assert caplog.messages == []
    assert ordered_class_names(names, SourceOptions(), where="data") == ("1", "10", "9")
    assert caplog.messages[0].startswith("data: class 1 is '10'")


def test_a_name_that_stands_twice_tells_no_number():
    assert class_numbers(["crane", "tench", "crane"]) == {"tench": 1}
    with pytest.raises(SourceError, match="two classes have the same name, so --class-order cannot change their order"):
        reordered(["crane", "tench", "crane"], SourceOptions(class_order="text"), where="x")


def test_numbers_follow_their_names_into_another_order():
    names, renumbered = reordered(["dog", "cat", "ant"], SourceOptions(class_order="text"), where="x")
    assert names == ("ant", "cat", "dog")
    assert [names[number] for number in renumbered] == ["dog", "cat", "ant"]
