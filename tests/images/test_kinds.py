"""The folders, tars and Parquet files that people have: a row for each kind, and what is read of it.

`docs/data.md` has the same kinds in words. Most come from public issue threads of torchvision, timm, webdataset and datasets, or from
the layouts of well-known data sets.
"""

import gzip
import io
import json
import logging
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sources import IMAGE, IMAGE_TYPE, image, labels

from pipeline.errors import SourceError
from pipeline.images.source import Source, SourceOptions, open_source
from pipeline.text import count

Build = Callable[[Path], str]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 100000000\n"


def folder(*files: str, below: str = "", text: bytes = b"text") -> Build:
    """Return a builder of a folder: images where the name ends like one, empty folders where it ends with a slash."""

    def build(root: Path) -> str:
        for number, name in enumerate(files):
            path = root / name
            if name.endswith("/"):
                path.mkdir(parents=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and not path.name.startswith("._")
            path.write_bytes(image(number) if picture else text)
        return str(root / below)

    return build


def tar(*members: str | tuple[str, bytes], beside: dict[str, str] | None = None, name: str = "t.tar") -> Build:
    """Return a builder of a tar; a member without content is an image."""

    def build(root: Path) -> str:
        with tarfile.open(root / name, "w") as archive:
            for member in members:
                path, data = (member, IMAGE) if isinstance(member, str) else member
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for other, text in (beside or {}).items():
            (root / other).write_text(text)
        return str(root / name)

    return build


def json_of(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def pictures(*names: str | None, data: Sequence[bytes | None] | None = None) -> pa.Array:
    """Return an image column of `datasets`."""
    data = data or [image(number) for number in range(len(names))]
    return pa.array([{"bytes": each, "path": name} for each, name in zip(data, names, strict=True)], IMAGE_TYPE)


def write(path: Path, columns: dict[str, Any], class_names: dict[str, list[str]]) -> None:
    features = {name: {"_type": "ClassLabel", "names": names} for name, names in class_names.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def table(columns: dict[str, Any], **class_names: list[str]) -> Build:
    def build(root: Path) -> str:
        write(root / "t.parquet", columns, class_names)
        return str(root / "t.parquet")

    return build


def tables(*parts: dict[str, Any]) -> Build:
    def build(root: Path) -> str:
        for number, columns in enumerate(parts):
            write(root / f"part-{number}.parquet", columns, {})
        return str(root)

    return build


def also(build: Build, *more: Callable[[Path], object]) -> Build:
    """Return a builder that writes more files after the first."""

    def both(root: Path) -> str:
        location = build(root)
        for other in more:
            other(root)
        return location

    return both


class Kind(NamedTuple):
    """A kind of data.

    Attributes:
        name: what it is.
        build: writes it into a folder, and returns the source; `{root}` in options is that folder.
        options: what the user says.
        keys: key and class label of each sample, in the order of the keys; or the text of the error.
        classes: names of the classes.
        says: part of a message in the log; None: no warning is given.
    """

    name: str
    build: Build
    options: dict[str, Any]
    keys: dict[str, int | None] | str
    classes: tuple[str, ...] | None = None
    says: str | None = None


NUMBERS = [f"{number}/x.jpg" for number in range(12)]
TEXT_ORDER = tuple(sorted(map(str, range(12))))
NATURAL_ORDER = tuple(map(str, range(12)))
CATS_AND_DOGS = ("cat", "dog")


def tars(*names: str, beside: Sequence[str] = ()) -> Build:
    """Return a builder of a folder of tars with one image each, and other files."""

    def build(root: Path) -> str:
        for number, name in enumerate(names):
            tar(f"{number}.jpg", (f"{number}.cls", b"0"), name=name)(root)
        folder(*beside)(root)
        return str(root)

    return build


BESIDE = [
    Kind("tars beside class folders", tars("a.tar", beside=["cat/1.jpg"]), {}, {"0": 0}, None, "only its files such as a.tar are read, not the folders beside them: cat"),
    Kind("tars beside the folder of a system", tars("a.tar", beside=["@eaDir/x"]), {}, {"0": 0}),
    Kind("a tar whose ending is in capitals", tars("a.tar", "b.TAR"), {}, "b.TAR beside a.tar would not be read. Rename it to .tar"),
    Kind("a split and a file without one", tars("train-0.tar", "test-0.tar", "extra.tar"), {}, "holds files of several splits of a data set"),
    Kind("train and eval", tars("train-0.tar", "eval-0.tar"), {}, "holds files of several splits of a data set"),
    Kind("train and eval as folders", folder("train/1.jpg", "eval/1.jpg"), {}, "are splits of a data set"),
    Kind("a broken link to a class", also(folder("cat/1.jpg"), lambda root: (root / "dog").symlink_to("/nowhere/dog")), {}, "dog: a broken link. Remove it"),
    Kind("a byte order mark in class names", tar("1.jpg", ("1.cls", b"cat"), beside={"classes.txt": "\ufeffcat\ndog\n"}), {}, {"1": 0}, CATS_AND_DOGS),
    Kind("labels of one kind, then of another", tar("1.jpg", ("1.cls", b"3"), "2.jpg", ("2.class_id.txt", b"4"), "3.jpg", ("3.txt", b"a cat")), {}, {"1": 3, "2": None, "3": None}, None, "1 image has no class label, although members or fields beside look like one"),
    Kind("labels in one field, then in another", tar("1.jpg", ("1.json", json_of(label=3)), "2.jpg", ("2.json", json_of(class_id=4))), {}, {"1": 3, "2": None}, None, "1 image has no class label"),
    Kind("--class-depth for a tar", tar("1.jpg", ("1.cls", b"0")), {"class_depth": 1}, {"1": 0}, None, "--class-depth: no effect on"),
    Kind("--image-key for a folder", folder("cat/1.jpg"), {"image_key": "jpg", "label_key": "cls"}, {"cat/1": 0}, ("cat",), "--image-key and --label-key: no effect on"),
    Kind("a ClassLabel beside label", table({"image": pictures("1.jpg"), "label": [3], "domain": [0]}, domain=["photo", "art"]), {}, r"several label columns, \['domain', 'label'\]"),
]  # fmt: skip


FOLDERS = [
    # What the class folders are.
    Kind("class folders", folder("cat/1.jpg", "dog/1.jpg"), {}, {"cat/1": 0, "dog/1": 1}, CATS_AND_DOGS),
    Kind("images without class folders", folder("1.jpg", "2.jpg"), {}, {"1": None, "2": None}),
    Kind("macOS zip", folder("cat/1.jpg", "cat/._1.jpg", "__MACOSX/cat/._1.jpg"), {}, {"cat/1": 0}, ("cat",), "passed over folders that hold no images of yours: __MACOSX (1)"),
    Kind("Jupyter beside the classes", folder("cat/1.jpg", ".ipynb_checkpoints/1.jpg"), {}, {"cat/1": 0}, ("cat",), ".ipynb_checkpoints (1)"),
    Kind("Jupyter in a class", folder("cat/1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg"), {}, {"cat/1": 0}, ("cat",), ".ipynb_checkpoints (1)"),
    Kind("Synology in every class", folder("cat/1.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "dog/2.jpg", "dog/@eaDir/x", "#recycle/cat/1.jpg"), {}, {"cat/1": 0, "dog/2": 1}, CATS_AND_DOGS, "#recycle (1) and @eaDir (2)"),
    Kind("root of a disk", folder("cat/1.jpg", "lost+found/", "$RECYCLE.BIN/x", "System Volume Information/x"), {}, {"cat/1": 0}, ("cat",), "$RECYCLE.BIN (1), System Volume Information (1) and lost+found (1)"),
    Kind("files of systems", folder("cat/1.jpg", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store", "cat/.DS_Store", ".git/x.jpg"), {}, {"cat/1": 0}, ("cat",)),
    Kind("readme and lists beside the classes", folder("cat/1.jpg", "README.md", "classes.txt", "labels.csv"), {}, {"cat/1": 0}, ("cat",)),
    Kind("nested classes", folder("animal/cat/1.jpg", "animal/dog/1.jpg", "tool/saw/1.jpg"), {}, "class/name.jpg, but animal/cat is a folder. Pass --class-depth 1 if 'animal' is the class, or --class-depth 2 if 'animal/cat' is"),
    Kind("nested classes, the top is the class", folder("animal/cat/1.jpg", "animal/2.jpg", "tool/saw/1.jpg"), {"class_depth": 1}, {"animal/2": 0, "animal/cat/1": 0, "tool/saw/1": 1}, ("animal", "tool")),
    Kind("nested classes, the path is the class", folder("animal/cat/1.jpg", "animal/dog/x/1.jpg", "tool/cat/1.jpg"), {"class_depth": 2}, {"animal/cat/1": 0, "animal/dog/x/1": 1, "tool/cat/1": 2}, ("animal/cat", "animal/dog", "tool/cat")),
    Kind("an image above the classes", folder("animal/cat/1.jpg", "animal/2.jpg"), {"class_depth": 2}, "animal/2.jpg lies above the class folders of --class-depth 2. Pass a smaller"),
    Kind("a link to a folder above", also(folder("a/1.jpg"), lambda root: (root / "a" / "up").symlink_to(root)), {"class_depth": 1}, "a link to a folder above it"),
    Kind("Tiny ImageNet's training set", folder("n01/images/n01_0.JPEG", "n01/n01_boxes.txt", "n02/images/n02_0.JPEG"), {"class_depth": 1}, {"n01/images/n01_0": 0, "n02/images/n02_0": 1}, ("n01", "n02")),
    Kind("Tiny ImageNet's validation set", folder("images/val_0.JPEG", "val_annotations.txt"), {}, r"its only folder 'images' would be its only class. Pass .*/images, or --class-depth 1"),
    Kind("CUB", folder("images/001.Albatross/1.jpg", "images/002.Auk/1.jpg", "classes.txt"), {}, r"but images/001.Albatross is a folder.* or .*/images for the folder below"),
    Kind("a root of splits", folder("train/cat/1.jpg", "val/cat/1.jpg"), {}, r"its folders train and val are splits of a data set and no classes. Pass .*/train, or --class-depth 1"),
    Kind("a root of splits with annotations", folder("Training/cat/1.jpg", "Test/cat/1.jpg", "meta/x.txt"), {}, r"its folders Test and Training are splits"),
    Kind("a root with train alone", folder("train/cat/1.jpg"), {}, r"its folders train are splits|Pass .*/train"),
    Kind("Kaggle's dogs and cats", folder("train/cat.0.jpg", "test1/1.jpg"), {}, "its folders test1 and train are splits"),
    Kind("COCO", folder("train2017/1.jpg", "val2017/1.jpg", "annotations/x.json"), {}, "its folders train2017 and val2017 are splits"),
    Kind("ImageNet's two folders", folder("ILSVRC2012_img_train/n01/1.JPEG", "ILSVRC2012_img_val/1.JPEG"), {}, "its folders ILSVRC2012_img_train and ILSVRC2012_img_val are splits"),
    Kind("classes with such words", folder("test tube/1.jpg", "training shoe/1.jpg", "bus/1.jpg"), {}, {"bus/1": 0, "test tube/1": 1, "training shoe/1": 2}, ("bus", "test tube", "training shoe")),
    Kind("a depth without class folders", folder("1.jpg"), {"class_depth": 1}, "has no class folders for --class-depth 1"),
    Kind("class folders that are no classes", folder("a/1.jpg", "b/2.jpg"), {"label_key": "none"}, {"a/1": None, "b/2": None}),
    Kind("splits that are classes", folder("train/1.jpg", "test/1.jpg"), {"class_depth": 1}, {"test/1": 0, "train/1": 1}, ("test", "train")),
    Kind("a class that is called train", folder("train/1.jpg", "bus/1.jpg"), {}, {"bus/1": 0, "train/1": 1}, ("bus", "train")),
    Kind("an image beside the classes", folder("cat/1.jpg", "sample.jpg"), {}, r"both images \(sample.jpg\) and folders \(cat\).*Move the images"),
    # Their order.
    Kind("numbers as classes", folder(*NUMBERS), {}, {f"{n}/x": TEXT_ORDER.index(str(n)) for n in range(12)}, TEXT_ORDER, "class 2 is '10': the classes are sorted as text, as torchvision does; sorted by the numbers in their names, as timm does, it would be '2'"),
    Kind("numbers as classes, text order", folder(*NUMBERS), {"class_order": "text"}, {f"{n}/x": TEXT_ORDER.index(str(n)) for n in range(12)}, TEXT_ORDER),
    Kind("numbers as classes, natural order", folder(*NUMBERS), {"class_order": "natural"}, {f"{n}/x": n for n in range(12)}, NATURAL_ORDER),
    Kind("numbers with zeros", folder("00/x.jpg", "01/x.jpg", "10/x.jpg"), {}, {"00/x": 0, "01/x": 1, "10/x": 2}, ("00", "01", "10")),
    Kind("capital letters", folder("Zebra/x.jpg", "apple/x.jpg"), {}, {"Zebra/x": 0, "apple/x": 1}, ("Zebra", "apple"), "class 0 is 'Zebra'"),
    Kind("an order from a file", also(folder("below/dog/x.jpg", "below/cat/x.jpg", below="below"), lambda root: (root / "names.txt").write_text("dog\nbird\ncat\n")), {"class_order": "{root}/names.txt"}, {"cat/x": 2, "dog/x": 0}, ("dog", "bird", "cat")),
    Kind("an order without one of the classes", also(folder("below/dog/x.jpg", "below/cat/x.jpg", below="below"), lambda root: (root / "names.txt").write_text("dog\n")), {"class_order": "{root}/names.txt"}, "names.txt does not name the class 'cat'"),
    Kind("an order with a class twice", also(folder("below/dog/x.jpg", below="below"), lambda root: (root / "names.txt").write_text("dog\ndog\n")), {"class_order": "{root}/names.txt"}, "does not name the class 'dog' once"),
    Kind("an order that does not exist", folder("dog/x.jpg"), {"class_order": "naturally"}, "naturally: does not exist. --class-order takes text, natural, or a file"),
    # Empty classes: torchvision refuses them, timm does not count them.
    Kind("an empty class", folder("cat/1.jpg", "bird/", "dog/1.jpg"), {}, {"cat/1": 0, "dog/1": 1}, CATS_AND_DOGS, "1 class folder without an image: bird. It is no class"),
    Kind("a class of text files", folder("cat/1.jpg", "annotations/1.xml"), {}, {"cat/1": 0}, ("cat",), "without an image: annotations"),
    Kind("an empty class that is named", also(folder("below/cat/1.jpg", "below/bird/", below="below"), lambda root: (root / "names.txt").write_text("bird\ncat\n")), {"class_order": "{root}/names.txt"}, {"cat/1": 1}, ("bird", "cat")),
    # Their files.
    Kind("endings in capitals", folder("a/1.JPEG", "a/2.JPG", "a/3.PNG", "a/4.WebP"), {}, {"a/1": 0, "a/2": 0, "a/3": 0, "a/4": 0}, ("a",)),
    Kind("dots in names", folder("a/v1.5_img.jpg", "a/v1.6_img.jpg"), {}, {"a/v1.5_img": 0, "a/v1.6_img": 0}, ("a",)),
    Kind("TIFF beside JPEG", folder("a/1.jpg", "a/2.tif", "a/3.bmp", "b/4.jpg"), {}, {"a/1": 0, "b/4": 1}, ("a", "b"), "2 pictures are not read, because they are not JPEG, PNG or WebP (.tif, .bmp)"),
    Kind("TIFF alone", folder("a/1.tif", "b/2.TIFF"), {}, r"no image in this folder .*It has 2 pictures \(.tif, .tiff\): convert them"),
    Kind("one image as JPEG and PNG", folder("a/1.jpg", "a/1.png"), {}, "share the key 'a/1'. Rename one"),
    Kind("spaces and Unicode", folder("großer hund/bild 1.jpg", "猫/一.jpg"), {}, {"großer hund/bild 1": 0, "猫/一": 1}, ("großer hund", "猫")),
    Kind("links", also(folder("store/1.jpg", "store/dog/2.jpg", "data/cat/0.jpg", below="data"), lambda root: (root / "data" / "cat" / "1.jpg").symlink_to(root / "store" / "1.jpg"), lambda root: (root / "data" / "dog").symlink_to(root / "store" / "dog")), {}, {"cat/0": 0, "cat/1": 0, "dog/2": 1}, CATS_AND_DOGS),
    Kind("a broken link", also(folder("cat/0.jpg"), lambda root: (root / "cat" / "1.jpg").symlink_to("nowhere.jpg")), {}, "1.jpg: named like an image, but not a file"),
    Kind("a clone of a Hub repository", also(folder("README.md", "data/"), lambda root: write(root / "data" / "train-00000-of-00001.parquet", {"image": pictures("1.jpg")}, {})), {}, r"data holds train-00000-of-00001.parquet: pass .*/data"),
    Kind("a pattern of the shell", folder("x.txt", below="train-*.tar"), {}, r"does not exist. Pass the folder, or a brace expression like train-\{000..127\}.tar"),
    Kind("datasets, saved to disk", folder("data-00000-of-00001.arrow", "dataset_info.json", "state.json"), {}, r"It has .json \(2\), .arrow \(1\).*datasets.load_from_disk"),
    Kind("TFRecords", folder("train-00000-of-01024.tfrecord"), {}, r"no image in this folder .* It has .tfrecord \(1\)"),
    Kind("names without ending", folder("n01/n01_1", "n01/n01_2"), {}, "no image in this folder"),
    Kind("an empty folder", folder("x/"), {}, "no image in this folder"),
    Kind("images and a packed copy", folder("cat/1.jpg", "images.zip"), {}, {"cat/1": 0}, ("cat",), "packed files are not read: images.zip"),
]  # fmt: skip

TARS = [
    # Which member is the image.
    Kind("image and class", tar("a.jpg", ("a.cls", b"7")), {}, {"a": 7}),
    Kind("a mask beside the image", tar("a.jpg", ("a.seg.png", b"mask"), ("a.txt", b"a cat"), ("a.npy", b"array"), "b.jpg"), {}, {"a": None, "b": None}),
    Kind("JPEG and PNG of a sample", tar(("a.png", b"mask"), "a.jpg"), {}, {"a": None}),
    Kind("JPEG and PNG, chosen", tar(("a.jpg", b"small"), "a.png"), {"image_key": "png;jpg"}, {"a": None}),
    Kind("endings in capitals", tar("a.JPEG", ("a.CLS", b"1")), {}, {"a": 1}),
    Kind("an ending of one's own", tar("a.img", ("a.cap", b"a cat")), {}, r"no image in this tar .*it has .img \(1\), .cap \(1\)\). Pass --image-key"),
    Kind("an ending of one's own, chosen", tar("a.img", ("a.cap", b"a cat")), {"image_key": ".img"}, {"a": None}),
    Kind("input.jpg and output.txt", tar("a.input.jpg", ("a.output.txt", b"7")), {}, "'a.input.jpg' has a dot in its key: .* or pass --image-key input.jpg"),
    Kind("input.jpg and output.txt, chosen", tar("a.input.jpg", ("a.output.txt", b"7")), {"image_key": "input.jpg", "label_key": "output.txt"}, {"a": 7}),
    Kind("left and right picture", tar("a.left.png", ("a.right.png", b"right")), {"image_key": "left.png"}, {"a": None}),
    Kind("a dot in the names", tar("v1.5_img.jpg", "v1.6_img.jpg"), {}, "'v1.5_img.jpg' has a dot in its key"),
    Kind("a dot in one of the names", tar("a.jpg", "22.05.png"), {}, "'22.05.png' has a dot in its key"),
    Kind("copies of a download", tar("a.jpg", "a.1.jpg"), {}, "'a.1.jpg' has a dot in its key"),
    Kind("an image that is not of the kind chosen", tar("a.png", "b.jpg"), {"image_key": "png"}, "'b.jpg' is not the image of its sample by --image-key png, .* Pass --image-key png;jpg"),
    Kind("TIFF in a tar", tar("a.jpg", ("b.tif", b"tiff")), {}, {"a": None}, None, "1 picture is not read"),
    Kind("a tar of TIFF", tar(("b.tif", b"tiff")), {}, r"no image in this tar .*\.tif \(1\)\).*TIFF, GIF and the like must be converted"),
    Kind("a tar of tars", tar(("n01440764.tar", b"x"), ("n01443537.tar", b"x")), {}, r"it has .tar \(2\)\). It holds tars: unpack it with  tar -xf"),
    Kind("AppleDouble files", tar("a.jpg", ("._a.jpg", b"mac"), (".DS_Store", b"x")), {}, {"a": None}),
    Kind("sample files that are not together", tar("a.jpg", "b.jpg", ("a.cls", b"1")), {}, "belongs to key 'a', which ended earlier: keep its files together. GNU tar does so with --sort=name"),
    # Which member is the class label.
    Kind("clip_benchmark", tar(("s0.cls", b"3"), "s0.webp", beside={"nshards.txt": "1", "classnames.txt": "x"}), {}, {"s0": 3}),
    Kind(".cls.txt", tar("a.jpg", ("a.cls.txt", b"4\n"), "b.jpg", ("b.cls.txt", b"5")), {}, {"a": 4, "b": 5}),
    Kind(".label", tar("a.jpg", ("a.label", b"4")), {}, {"a": 4}),
    Kind("timm's ImageNet", tar("a.jpg", ("a.cls", b"4"), ("a.json", json_of(filename="n0/x.JPEG", label=4, class_name="tench"))), {}, {"a": 4}),
    Kind("a number and a name", tar("a.jpg", ("a.cls", b"4"), ("a.json", json_of(label="tabby, tabby cat"))), {}, {"a": 4}),
    Kind("two labels that differ", tar("a.jpg", ("a.cls", b"4"), ("a.cls.txt", b"5")), {}, r"several class labels: 4, 5 \(4 in cls, 5 in cls.txt\). Choose one: --label-key cls"),
    Kind("two labels that differ, chosen", tar("a.jpg", ("a.cls", b"4"), ("a.cls.txt", b"5")), {"label_key": "cls.txt"}, {"a": 5}),
    Kind("a member and a field that differ", tar("a.jpg", ("a.cls", b"4"), ("a.json", json_of(cls=5))), {}, r"several class labels: 4, 5 \(4 in cls, 5 in json cls\)"),
    Kind("a member and a field that differ, chosen", tar("a.jpg", ("a.cls", b"4"), ("a.json", json_of(cls=5))), {"label_key": "cls"}, {"a": 4}),
    Kind("a coarse and a fine label", tar("a.jpg", ("a.json", json_of(coarse_label=1, fine_label=5))), {}, "no sample has a class label that can be read, but there are a field 'coarse_label' in 'a.json'; a field 'fine_label'.* --label-key coarse_label, or pass --label-key none"),
    Kind("a coarse and a fine label, chosen", tar("a.jpg", ("a.json", json_of(coarse_label=1, fine_label=5))), {"label_key": "fine_label"}, {"a": 5}),
    Kind("no class labels, on purpose", tar("a.jpg", ("a.json", json_of(coarse_label=1)), ("a.cls", b"x")), {"label_key": "none"}, {"a": None}),
    Kind("a label as a pickle", tar("a.jpg", ("a.target.pth", b"x")), {}, "but there are members '.target.pth', such as 'a.target.pth'"),
    Kind("several classes per image", tar("a.jpg", ("a.cls", b"3 5")), {}, "'a.cls' must hold one class number, 0 or more, got b'3 5'"),
    Kind("a list of classes", tar("a.jpg", ("a.json", json_of(label=[3, 5]))), {}, r"must have an integer label, got \[3, 5\]"),
    Kind("a name without a list of names", tar("a.jpg", ("a.cls", b"tabby cat")), {}, "must hold one class number, 0 or more, got b'tabby cat'. If it is the name of a class, write classes.txt beside the tars, or pass --class-order FILE"),
    Kind("a name, and classes.txt", tar("a.jpg", ("a.cls", b"dog"), "b.jpg", ("b.json", json_of(label="cat")), beside={"classes.txt": "cat\ndog\n"}), {}, {"a": 1, "b": 0}, CATS_AND_DOGS),
    Kind("a name in .txt, and classes.txt", tar("a.jpg", ("a.txt", b"dog"), "b.jpg", ("b.txt", b"cat\n"), beside={"classes.txt": "cat\ndog\n"}), {}, {"a": 1, "b": 0}, CATS_AND_DOGS),
    Kind("a name in .txt, and a README.txt", tar(("README.txt", b"hello"), "a.jpg", ("a.txt", b"dog"), beside={"classes.txt": "cat\ndog\n"}), {}, {"a": 1}, CATS_AND_DOGS),
    Kind("a name, and --class-order", also(tar("a.jpg", ("a.cls", b"n02")), lambda root: (root / "synsets.txt").write_text("n01\nn02\n")), {"class_order": "{root}/synsets.txt"}, {"a": 1}, ("n01", "n02")),
    Kind("a name that no list has", tar("a.jpg", ("a.cls", b"bird"), beside={"classes.txt": "cat\ndog\n"}), {}, "got b'bird', which names none of the 2 classes"),
    Kind("two classes of one name", tar("a.jpg", ("a.cls", b"crane"), beside={"classes.txt": "crane\ncrane\n"}), {}, "got b'crane', which names none of the 2 classes"),
    Kind("names and captions", tar("a.jpg", ("a.txt", b"dog"), "b.jpg", ("b.txt", b"a dog on grass"), beside={"classes.txt": "cat\ndog\n"}), {}, "some '.txt' members of this tar are names of classes, and others are not. Pass --label-key txt"),
    Kind("captions, and classes.txt", tar("a.jpg", ("a.txt", b"a dog on grass"), ("a.cls", b"1"), beside={"classes.txt": "cat\ndog\n"}), {}, {"a": 1}, CATS_AND_DOGS),
    Kind("numbers in .txt", tar("a.jpg", ("a.txt", b"7"), "b.jpg", ("b.txt", b"8")), {}, "no sample has a class label that can be read, but there are members '.txt' that hold only numbers. .*--label-key txt"),
    Kind("numbers in .txt, chosen", tar("a.jpg", ("a.txt", b"7"), "b.jpg", ("b.txt", b"8")), {"label_key": "txt"}, {"a": 7, "b": 8}),
    Kind("img2dataset", tar("a.jpg", ("a.txt", b"a cat"), ("a.json", json_of(caption="a cat", url="x", key="0", status="success", width=3)), beside={"t.parquet.x": "", "t_stats.json": "{}"}), {}, {"a": None}),
    Kind("some samples without label", tar("a.jpg", ("a.cls", b"7"), "b.jpg"), {}, {"a": 7, "b": None}),
    Kind("a hidden test set", tar("a.jpg", ("a.json", json_of(label=None))), {}, {"a": None}),
    Kind("a label that was not found", tar("a.jpg", ("a.cls", b"7")), {"label_key": "class_id"}, "no sample has a member .class_id, or a field 'class_id' in its .json member"),
    Kind("a label in another JSON member", tar("a.jpg", ("a.meta.json", json_of(label=7))), {}, "but there are a field 'label' in 'a.meta.json'"),
    Kind("a label in another JSON member, chosen", tar("a.jpg", ("a.meta.json", json_of(label=7))), {"label_key": "label"}, {"a": 7}),
    Kind("two JSON members that differ", tar("a.jpg", ("a.json", json_of(class_id=1)), ("a.meta.json", json_of(class_id=2))), {"label_key": "class_id"}, r"several class labels: 1, 2 \(1 in json class_id, 2 in meta.json class_id\)"),
    Kind("a number as text in JSON", tar("a.jpg", ("a.json", json_of(label="7"))), {}, {"a": 7}),
    Kind("a text that is number and name", tar("a.jpg", ("a.json", json_of(label="10")), beside={"classes.txt": "\n".join(TEXT_ORDER)}), {}, "holds '10', which is both the number of a class and the name of class 2"),
    Kind("other order than classes.txt", tar("a.jpg", ("a.cls", b"0"), "b.jpg", ("b.txt", b"x"), beside={"classes.txt": "dog\ncat\n"}), {"class_order": "text"}, {"a": 1, "b": None}, CATS_AND_DOGS),
    Kind("class folders in a tar", tar("cat/1.jpg", "dog/2.jpg"), {}, {"cat/1": None, "dog/2": None}),
    Kind("information on the whole tar", tar(("info.json", json_of(classes=["a", "b"], label_type="x")), "a.jpg"), {}, {"a": None}),
    Kind("ImageNet's tars of a class each", lambda root: [tar(f"{name}_1.JPEG", f"{name}_2.JPEG", name=f"{name}.tar")(root) for name in ("n01440764", "n01443537")] and str(root), {}, {"n01440764_1": None, "n01440764_2": None, "n01443537_1": None, "n01443537_2": None}),
    # Packed and unfinished files.
    Kind("a packed tar", also(folder("x/"), lambda root: (root / "train.tar.gz").write_bytes(gzip.compress(b"x"))), {}, r"train.tar.gz: a .tar.gz file is not read as it is. Unpack it:  mkdir \S+/train && tar -xzf \S+/train.tar.gz -C \S+/train  and pass \S+/train. If it is a WebDataset tar:  gunzip \S+/train.tar.gz  and pass"),
    Kind("packed tars", folder("0.tgz", "1.tgz"), {}, r"0.tgz \(1 more in this folder\): a .tgz file is not read as it is. Unpack it:  mkdir"),
    Kind("a packed folder", folder("train set.zip"), {}, "Unpack it:  mkdir '.*/train set' && unzip -q '.*/train set.zip' -d '.*/train set'"),
    Kind("a tar packed with zstd", folder("t.tar.zst"), {}, "tar --zstd -xf .*unzstd"),
    Kind("a packed tar that is called .tar", also(folder("x.txt"), lambda root: (root / "t.tar").write_bytes(gzip.compress(bytes(2000)))), {}, r"compressed with gzip: decompress it first\). gunzip < .*t.tar > unpacked.tar"),
    Kind("a pointer of Git LFS", folder("t.tar", text=POINTER), {}, "a pointer of Git LFS and not the tar itself. Run git lfs pull"),
    Kind("tars of several splits", lambda root: [tar("a.jpg", ("a.cls", b"1"), name=name)(root) for name in ("in1k-train-0000.tar", "in1k-train-0001.tar", "in1k-validation-00.tar")] and str(root), {}, r"several splits of a data set: 2 of 'train' \(in1k-train-0000.tar\) and 1 of 'val' .*Pass one split, such as .*/in1k-train-\{0000..0001\}.tar"),
]  # fmt: skip

ONE, TWO = pictures("1.jpg"), pictures("1.jpg", "2.jpg")
PARQUET = [
    # Which column is the image.
    Kind("datasets", table({"image": TWO, "label": [1, 0]}, label=["cat", "dog"]), {}, {"1": 1, "2": 0}, CATS_AND_DOGS),
    Kind("plain bytes", table({"image": [IMAGE], "label": [3]}), {}, {"*": 3}),
    Kind("plain bytes of jpg and cls", table({"__key__": ["a"], "jpg": [IMAGE], "cls": [3]}), {}, {"*": 3}),
    Kind("a tar that datasets made Parquet", table({"__key__": ["a"], "jpg": ONE, "cls": [3], "json": [{"label": 3}]}), {}, {"1": 3}),
    Kind("bytes of another name", table({"content": [IMAGE], "label": [3]}), {}, r"found \['content'\] among .* Choose one: --image-key content"),
    Kind("bytes of another name, chosen", table({"content": [IMAGE], "label": [3]}), {"image_key": "content"}, {"*": 3}),
    Kind("an image and a mask", table({"image": ONE, "mask": ONE, "label": [3]}), {}, r"found \['image', 'mask'\].* Choose one: --image-key image"),
    Kind("an image and a mask, chosen", table({"image": ONE, "mask": ONE, "label": [3]}), {"image_key": "image"}, {"1": 3}),
    Kind("an image and a hash", table({"image": ONE, "sha256": [b"x" * 32], "label": [3]}), {}, {"1": 3}),
    Kind("pandas, with no path at all", table({"image": [{"bytes": IMAGE, "path": None}], "label": [3]}), {}, {"*": 3}),
    Kind("bytes alone in a struct", table({"image": [{"bytes": IMAGE}], "label": [3]}), {}, {"*": 3}),
    Kind("large binary", table({"image": pa.array([IMAGE], pa.large_binary()), "label": [3]}), {}, {"*": 3}),
    Kind("a list of images", table({"images": pa.array([[{"bytes": IMAGE, "path": "a"}]], pa.list_(IMAGE_TYPE)), "label": [3]}), {}, "Column 'images' has a list of images in each row: write a row for each image"),
    Kind("more in the struct", table({"image": [{"bytes": IMAGE, "path": "1.jpg", "width": 8}], "label": [3]}), {}, {"1": 3}),
    Kind("paths", also(table({"image": pictures("cat/1.jpg", data=[None]), "label": [3]}), lambda root: folder("files/cat/1.jpg")(root)), {"image_root": "{root}/files"}, {"cat/1": 3}),
    Kind("paths of pandas", also(table({"image": [{"bytes": None, "path": "1.jpg"}], "label": [3]}), lambda root: folder("files/1.jpg")(root)), {"image_root": "{root}/files"}, {"1": 3}),
    Kind("paths in a text column", table({"file_name": ["cat/1.jpg"], "label": [3]}), {}, "If a column holds the paths of image files, pass it as --image-key, and their folder as --image-root"),
    Kind("paths in a text column, chosen", also(table({"file_name": ["cat/1.jpg"], "label": [3]}), lambda root: folder("files/cat/1.jpg")(root)), {"image_key": "file_name", "image_root": "{root}/files"}, {"cat/1": 3}),
    Kind("paths without a folder", table({"image": pictures("/home/x/1.jpg", data=[None])}), {}, "no image bytes, and the path '/home/x/1.jpg' is not followed. Pass --image-root DIR"),
    Kind("paths that lead out", also(table({"image": pictures("../secret.jpg", data=[None])}), lambda root: folder("files/x.jpg", "secret.jpg")(root)), {"image_root": "{root}/files"}, "the path '../secret.jpg' leads out of --image-root"),
    Kind("absolute paths", also(table({"image": pictures("/etc/passwd", data=[None])}), lambda root: folder("files/x.jpg")(root)), {"image_root": "{root}/files"}, "'/etc/passwd' leads out of --image-root"),
    Kind("a link that leads out", also(table({"image": pictures("a.jpg", data=[None])}), lambda root: folder("files/x.jpg", "secret.jpg")(root), lambda root: (root / "files" / "a.jpg").symlink_to(root / "secret.jpg")), {"image_root": "{root}/files"}, "leads out of --image-root"),
    Kind("paths of files that are missing", also(table({"image": pictures("gone.jpg", data=[None])}), lambda root: folder("files/x.jpg")(root)), {"image_root": "{root}/files"}, "gone.jpg: cannot be read: No such file"),
    Kind("a folder of images that is not there", table({"image": pictures("a.jpg", data=[None])}), {"image_root": "{root}/files"}, "--image-root must be a local folder"),
    Kind("a column that is not there", table({"image": ONE}), {"image_key": "img"}, "no column 'img' for --image-key among"),
    Kind("a column of numbers as image", table({"image": ONE, "x": [1]}), {"image_key": "x"}, "column 'x' holds int64, and --image-key needs bytes"),
    # Which column is the class label.
    Kind("target", table({"image": ONE, "target": pa.array([3], pa.uint8())}), {}, {"1": 3}),
    Kind("Label in capitals", table({"image": ONE, "Label": [3]}), {}, {"1": 3}),
    Kind("names of classes", table({"image": TWO, "label": ["dog", "cat"]}), {}, {"1": 1, "2": 0}, CATS_AND_DOGS),
    Kind("texts that are no names", table({"image": TWO, "label": ["dog", "x" * 2000]}), {}, "class name of column 'label' must have 1 to 1024 bytes, got 2000"),
    Kind("names of classes as categories", table({"image": TWO, "label": pa.array(["dog", "cat"]).dictionary_encode()}), {}, {"1": 1, "2": 0}, CATS_AND_DOGS),
    Kind("names of classes, one missing", table({"image": TWO, "label": ["dog", None]}), {}, {"1": 0, "2": None}, ("dog",)),
    Kind("names of classes over files", tables({"image": pictures("a.jpg"), "label": ["dog"]}, {"image": pictures("b.jpg"), "label": ["cat"]}), {}, {"a": 1, "b": 0}, CATS_AND_DOGS),
    Kind("names of classes, and --class-order", also(table({"image": TWO, "label": ["dog", "cat"]}), lambda root: (root / "names.txt").write_text("dog\nbird\ncat\n")), {"class_order": "{root}/names.txt"}, {"1": 0, "2": 2}, ("dog", "bird", "cat")),
    Kind("a name that the list has not", also(table({"image": TWO, "label": ["dog", "cat"]}), lambda root: (root / "names.txt").write_text("dog\n")), {"class_order": "{root}/names.txt"}, "'cat' is the name of none or several of the 1 classes"),
    Kind("numbers as text", table({"image": TWO, "label": ["10", "9"]}), {}, {"1": 0, "2": 1}, ("10", "9"), "class 0 is '10'"),
    Kind("a number and its name", table({"image": ONE, "label": [3], "label_name": ["dog"]}), {}, {"1": 3}),
    Kind("two numbers", table({"image": ONE, "label": [3], "target": [4]}), {}, r"several label columns, \['label', 'target'\]. Choose one: --label-key label"),
    Kind("two numbers, chosen", table({"image": ONE, "label": [3], "target": [4]}), {"label_key": "target"}, {"1": 4}),
    Kind("two names", table({"image": ONE, "label": ["a"], "class_name": ["b"]}), {}, r"several label columns, \['label', 'class_name'\]"),
    Kind("CIFAR-100", table({"image": ONE, "fine_label": [1], "coarse_label": [0]}, fine_label=["x", "y"], coarse_label=["z"]), {}, {"1": 1}, ("x", "y")),
    Kind("CIFAR-100, coarse", table({"image": ONE, "fine_label": [1], "coarse_label": [0]}, fine_label=["x", "y"], coarse_label=["z"]), {"label_key": "coarse_label"}, {"1": 0}, ("z",)),
    Kind("yes and no", table({"image": ONE, "label": [True]}), {}, "'label' \\(bool\\)"),
    Kind("numbers with a fraction", table({"image": TWO, "label": [1.0, None]}), {}, "no column holds class labels that can be read .* but there are 'label' \\(double\\). Choose one"),
    Kind("numbers with a fraction, chosen", table({"image": ONE, "label": [1.0]}), {"label_key": "label"}, "column 'label' holds double, and --label-key needs whole numbers or names of classes"),
    Kind("several classes per image", table({"image": ONE, "labels": [[1, 2]]}), {}, "'labels' \\(list<"),
    Kind("several classes per image, unlabelled", table({"image": ONE, "labels": [[1, 2]]}), {"label_key": "none"}, {"1": None}),
    Kind("a column of another name", table({"image": ONE, "my_label": [1]}), {}, "'my_label' \\(int64\\). Choose one, such as --label-key my_label, or pass --label-key none"),
    Kind("a column of another name, chosen", table({"image": ONE, "species": [1]}), {"label_key": "species"}, {"1": 1}),
    Kind("a label column that is not there", table({"image": ONE, "label": [1]}), {"label_key": "cls"}, "no column 'cls' for --label-key among"),
    Kind("captions", table({"image": ONE, "text": ["a dog"]}), {}, {"1": None}),
    Kind("a hidden test set", table({"image": TWO, "label": [-1, -1]}, label=["cat", "dog"]), {}, {"1": None, "2": None}, CATS_AND_DOGS),
    Kind("a hidden test set of pandas", table({"image": ONE, "label": [None]}), {}, {"1": None}),
    Kind("other order than that of the names", table({"image": TWO, "label": [0, 1]}, label=["dog", "cat"]), {"class_order": "text"}, {"1": 1, "2": 0}, CATS_AND_DOGS),
    Kind("a label in some of the files", tables({"image": pictures("a.jpg"), "label": [1]}, {"image": pictures("b.jpg")}), {}, "part-1.parquet: its label column is none, that of .*part-0.parquet is label"),
    Kind("names in some of the files", tables({"image": pictures("a.jpg"), "label": [1]}, {"image": pictures("b.jpg"), "label": ["x"]}), {}, r"its label column is label \(text\), that of .* is label"),
    # Files.
    Kind("files of several splits", lambda root: [write(root / name, {"image": ONE, "label": [0]}, {}) for name in ("test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet")] and str(root), {}, r"1 of 'test' .* and 2 of 'train' .*Pass one split, such as .*/train-\{00000..00001\}-of-00002.parquet"),
    Kind("Spark", also(tables({"image": ONE, "label": [1]}), lambda root: (root / "_SUCCESS").write_text(""), lambda root: (root / "part-0.parquet").rename(root / "part-00000-ab.c000.snappy.parquet")), {}, {"1": 1}),
    Kind("a pointer of Git LFS", folder("t.parquet", text=POINTER), {}, "t.parquet: a pointer of Git LFS and not the file itself. Run git lfs pull"),
    Kind("one path for all rows", table({"image": pictures("x.jpg", "x.jpg"), "label": [1, 1]}), {}, {"*": 1}),
]  # fmt: skip
KINDS = [*FOLDERS, *TARS, *PARQUET, *BESIDE]


def read(source: Source) -> dict[str, int | None]:
    """Return key and label of each sample, in the order of the keys."""
    found = [key for shard in source.shards for key in shard.keys]
    assert len(set(found)) == len(found)
    for shard in source.shards:
        for sample in shard:
            assert sample.image.startswith((b"\xff\xd8\xff", b"\x89PNG", b"RIFF")), sample.key
    return dict(sorted(zip(found, labels(source), strict=True)))


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_kind_of_data_is_read_or_refused_with_the_way_out(tmp_path, caplog, kind: Kind):
    caplog.set_level(logging.INFO)
    location = kind.build(tmp_path)
    options = {
        name: value.format(root=tmp_path) if isinstance(value, str) else value for name, value in kind.options.items()
    }
    if isinstance(kind.keys, str):
        with pytest.raises(SourceError, match=kind.keys):
            read(open_source(location, options=SourceOptions(**options)))
        return
    source = open_source(location, options=SourceOptions(**options))
    found = read(source)
    if list(kind.keys) == ["*"]:  # named by content
        assert set(found.values()) == set(kind.keys.values())
    else:
        assert found == kind.keys
    assert source.class_names == kind.classes
    if kind.says is None:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert kind.says in message
    labelled = sum(label is not None for label in found.values())
    assert f"{count(len(found), 'sample')}, {labelled} with a class label" in source.describe()


def test_every_kind_has_its_own_name():
    for kinds in (FOLDERS, TARS, PARQUET, BESIDE):
        assert len({kind.name for kind in kinds}) == len(kinds)
    assert len(KINDS) > 100


def test_a_line_on_tars_of_a_class_each_says_that_their_names_are_no_classes(tmp_path):
    for name in ("n01440764", "n01443537"):
        tar(f"{name}_1.JPEG", name=f"{name}.tar")(tmp_path)
    assert (
        "0 with a class label (names of tars are no classes: unpack each into a folder of its name)"
        in open_source(tmp_path).describe()
    )


def test_a_line_on_a_tar_with_folders_says_that_they_are_no_classes(tmp_path):
    source = open_source(tar("cat/1.jpg", "dog/2.jpg")(tmp_path))
    assert source.describe().endswith(
        "2 samples, 0 with a class label (folders in a tar are no classes: unpack it for that), no class names"
    )


DRIVES_A_TERMINAL = [
    # what has an escape character in a name
    tar("a.\x1b[2J"),
    tar("a.jpg", ("a.json", json_of(**{"label\x1b[2J": 1}))),
    tar("a.jpg", ("a.label\x1b[2J", b"x")),
    tar("a.\x1b[2J.jpg"),
    table({"image\x1b[2J": ONE, "mask\x1b[2J": ONE}),
    table({"image": ONE, "label\x1b[2J": [1]}),
    table({"image": ONE, "label": [{"a\x1b[2J": 1}]}),
    folder("a\x1b[2J/b\x1b[2J/1.jpg"),
    folder("a/b\x1b[2J/1.jpg"),
    folder("a.\x1b[2J"),
    folder("a\x1b[2J.zip"),
    folder("a/b\x1b[2J.parquet"),
]


@pytest.mark.parametrize("build", DRIVES_A_TERMINAL, ids=range(len(DRIVES_A_TERMINAL)))
def test_a_name_in_the_data_cannot_drive_the_terminal(tmp_path, build: Build):
    with pytest.raises(SourceError) as caught:
        read(open_source(build(tmp_path)))
    assert "\x1b" not in str(caught.value)
    assert "[2j" in str(caught.value).lower()
