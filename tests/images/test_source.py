"""Image folders, WebDataset tars and image Parquet as sources: what is read, and what is refused by name."""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sources import IMAGE, IMAGE_TYPE, image, labels, write_parquet, write_table
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.errors import SourceError
from pipeline.images import parquet as parquet_source
from pipeline.images import source as sources
from pipeline.images.parquet import RowGroupCache
from pipeline.images.samples import Sample, keys_sha256
from pipeline.images.source import Source, open_source
from pipeline.text import count

BLOCK = 512


def write_folder(root: Path, files: list[str]) -> Path:
    root.mkdir(exist_ok=True)
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    """Write a tar with the standard library, member by member as given."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_webdataset(path: Path, num_samples: int, first: int = 0, mtime: float = 0) -> Path:
    with open(path, "wb") as file, webdataset.TarWriter(file, mtime=mtime) as writer:
        for number in range(first, first + num_samples):
            writer.write({"__key__": f"n{number:04}", "jpg": image(number), "cls": number % 10})
    return path


def numbered(num_rows: int) -> list[tuple[bytes | None, str | None]]:
    return [(b"image %d" % number, f"c/{number:05}.jpg") for number in range(num_rows)]


def contents(source: Source) -> list[Sample]:
    return [shard[position] for shard in source.shards for position in range(len(shard))]


def keys(source: Source) -> list[str]:
    return [key for shard in source.shards for key in shard.keys]


# One small source of each kind.


@pytest.fixture(params=["folder", "tar", "parquet"])
def location(request, tmp_path) -> Path:
    if request.param == "folder":
        return write_folder(tmp_path / "images", ["cat/1.jpg", "cat/2.jpg", "dog/1.png"])
    if request.param == "tar":
        write_webdataset(tmp_path / "train-000000.tar", 3)
        write_webdataset(tmp_path / "train-000001.tar", 2, first=3)
        return tmp_path
    return write_parquet(
        tmp_path / "train.parquet", numbered(30), [0, 1, 2] * 10, names=["a", "b", "c"], row_group_size=7
    )


def test_a_pickled_source_reads_the_same_samples_and_carries_no_index(location):
    source = open_source(location)
    expected, identity = contents(source), source.identity()
    copy = pickle.loads(pickle.dumps(source))
    assert all("index" not in vars(shard) for shard in copy.shards)
    assert contents(copy) == expected
    assert copy.identity() == identity


def test_the_pickle_does_not_grow_with_what_was_read(location):
    source = open_source(location)
    before = len(pickle.dumps(source))
    contents(source)
    assert len(pickle.dumps(source)) == before < 2000


def test_samples_read_backwards_are_the_samples_read_forwards(location):
    forwards = contents(open_source(location))
    shards = open_source(location).shards
    backwards = [shard[position] for shard in reversed(shards) for position in reversed(range(len(shard)))]
    assert backwards[::-1] == forwards


def test_a_copy_elsewhere_has_the_same_id_and_another_label_another_id(tmp_path):
    here = write_folder(tmp_path / "here", ["cat/1.jpg", "dog/1.jpg"])
    there = write_folder(tmp_path / "there", ["cat/1.jpg", "dog/1.jpg"])
    other = write_folder(tmp_path / "other", ["cat/1.jpg", "dog/2.jpg"])
    assert open_source(here).source_id == open_source(there).source_id
    assert open_source(here).source_id != open_source(other).source_id
    assert open_source(here).location != open_source(there).location


def test_identity_holds_names_counts_and_a_hash_of_keys_and_labels(tmp_path):
    source = open_source(write_folder(tmp_path / "images", ["cät/1.jpg", "dog/1.jpg"]))
    # printf '["cät/1",0]\n["dog/1",1]\n' | sha256sum
    expected = "4791bd27afb471538be030afc2fda39146b5f080f104ec4b81a42e06c085f3c7"
    assert source.identity() == {
        "class_names": ["cät", "dog"],
        "shards": [{"name": "images-000000", "num_samples": 2, "keys_sha256": expected}],
    }


def test_describe_is_one_line_with_the_counts(location):
    source = open_source(location)
    assert f"{source.kind}, {count(len(source.shards), 'shard')}, {source.num_samples} samples" in source.describe()
    assert "\n" not in source.describe()


BAD_LOCATIONS = [
    # location, what the error says
    ("pipe://cat/train.tar", "a URL must begin with http://"),
    ("missing", "does not exist. A source is an image folder, a .tar or .parquet file"),
    ("pipe:cat x.tar", "does not exist"),
    ("x\0y", "does not exist"),
    ("x" * 5000, "cannot be read"),
    ("train-{000..002}.tar", "3 of 3 files are missing, the first is train-000.tar"),
    ("train-{000..002.tar", "Unbalanced braces"),
    # would fill the memory before it is looked at
    ("train-{0..999999999999}.tar", "at most 100000 files"),
    ("train-{-99999999..99999999}.tar", "at most 100000 files"),
    ("{0..9999}{0..9999}.tar", "at most 100000 files"),
]


@pytest.mark.parametrize(("location", "message"), BAD_LOCATIONS, ids=range(len(BAD_LOCATIONS)))
def test_a_location_that_cannot_be_opened_is_an_error_that_says_what_can(location, message):
    with pytest.raises(SourceError, match=message):
        open_source(location)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"train.zip: a .zip file is not read as it is"):
        open_source(tmp_path / "train.zip")
    (tmp_path / "train.h5").write_bytes(b"HDF")
    with pytest.raises(SourceError, match=r"cannot tell what these \['.h5'\] files are"):
        open_source(tmp_path / "train.h5")


# Image folders.


def test_a_folder_has_sorted_classes_and_keys_without_extension(tmp_path):
    files = [
        "b/2.JPG",
        "b/1.x.png",
        "B/1.webp",
        "b-b/1.jpeg",
        ".hidden/1.jpg",
        "b/.1.jpg",
        "b/notes.txt",
        "empty/x.txt",
    ]
    source = open_source(write_folder(tmp_path / "images", files))
    assert source.kind == "folder"
    assert source.class_names == ("B", "b", "b-b")  # by code point; a folder without images is no class
    labelled = dict(zip(keys(source), labels(source), strict=True))
    assert labelled == {"B/1": 0, "b-b/1": 2, "b/1.x": 1, "b/2": 1}
    assert Sample("b/2", image(0), 1) in contents(source)


def test_a_folder_without_classes_is_unlabelled(tmp_path):
    source = open_source(write_folder(tmp_path / "images", ["b.jpg", "a.png"]))
    assert (source.class_names, source.num_classes) == (None, None)
    assert (keys(source), labels(source)) == (["a", "b"], [None, None])
    assert source.shards[0][0].image == image(1)


def test_a_folder_is_cut_into_shards_of_equal_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SAMPLES_PER_SHARD", 4)
    files = [f"a/{n}.jpg" for n in range(9)] + ["b/0.jpg", "c/0.jpg", "d/0.jpg", "d/1.jpg", "d/2.jpg"]
    source = open_source(write_folder(tmp_path / "images", files))
    assert [shard.name for shard in source.shards] == [f"images-00000{n}" for n in range(4)]
    assert [len(shard) for shard in source.shards] == [4, 4, 4, 2]
    found = {sample.key: sample.image for sample in contents(source)}
    assert found == {os.path.splitext(name)[0]: image(n) for n, name in enumerate(files)}


def test_neighbours_in_a_folder_are_of_many_classes_and_its_order_is_that_of_a_hash_of_the_keys(tmp_path):
    files = [f"{class_name}/{n}.jpg" for class_name in "abcdefgh" for n in range(32)]
    source = open_source(write_folder(tmp_path / "images", files))
    found = labels(source)
    same = sum(a == b for a, b in itertools.pairwise(found)) / len(found)
    assert same < 0.25  # 1/8 by chance; sorted by name it would be 0.97
    assert keys(source) == sorted(keys(source), key=lambda k: hashlib.blake2b(k.encode(), digest_size=16).digest())


def test_links_to_images_and_to_class_folders_are_followed(tmp_path):
    store = write_folder(tmp_path / "store", ["x.jpg", "c/y.jpg"])
    root = write_folder(tmp_path / "images", ["a/1.jpg"])
    (root / "a" / "2.jpg").symlink_to(store / "x.jpg")
    (root / "c").symlink_to(store / "c")
    source = open_source(root)
    assert sorted(keys(source)) == ["a/1", "a/2", "c/y"]
    assert {sample.key: sample.image for sample in contents(source)}["a/2"] == image(0)


BAD_FOLDERS = [
    # files, what the error says
    ([], "no image in this folder"),
    # datasets lays Parquet out like this: the folder below is the source
    (["data/train.parquet"], "no image in this folder"),
    (["a/1.jpg", "2.jpg"], r"both images \(2.jpg\) and folders \(a\)"),
    (["a/b/1.jpg"], "class/name.jpg, but a/b is a folder"),
    (["a/1.jpg", "a/1.PNG"], "share the key 'a/1'"),
    (["1.jpg", "train.tar"], r"both images \(1.jpg\) and train.tar"),
    (["train.parquet", "train.tar"], "cannot tell what these"),
    (["a/1\n.jpg"], r"control characters, got 'a/1\\n'"),
    (["a/\udcff.jpg"], r"valid UTF-8, got 'a/\\udcff'"),
    (["\udcff/1.txt", "a/1.jpg"], "class name must be valid UTF-8"),
    ([f"{'é' * 100}/1.jpg", "bad\x7f/1.txt"], "class name must not contain control"),
]


@pytest.mark.parametrize(("files", "message"), BAD_FOLDERS, ids=range(len(BAD_FOLDERS)))
def test_an_ambiguous_folder_is_refused(tmp_path, files, message):
    with pytest.raises(SourceError, match=message):
        open_source(write_folder(tmp_path / "images", files))


def test_a_broken_link_is_an_error_and_not_a_missing_sample(tmp_path):
    root = write_folder(tmp_path / "images", ["a/1.jpg"])
    (root / "a" / "2.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(SourceError, match=r"2.jpg: named like an image, but not a file"):
        open_source(root)


def test_an_image_that_disappears_is_named(tmp_path):
    source = open_source(write_folder(tmp_path / "images", ["a/1.jpg"]))
    (tmp_path / "images" / "a" / "1.jpg").unlink()
    with pytest.raises(SourceError, match=r"a/1.jpg: cannot be read: No such file"):
        _ = source.shards[0][0]


# WebDataset tars.


def test_a_tar_of_webdataset_is_read(tmp_path):
    source = open_source(write_webdataset(tmp_path / "train-000000.tar", 12))
    assert (source.kind, source.class_names) == ("tar", None)
    assert [shard.name for shard in source.shards] == ["train-000000"]
    assert contents(source) == [Sample(f"n{n:04}", image(n), n % 10) for n in range(12)]


def test_webdataset_finds_the_same_samples(tmp_path):
    members = [("./x/a.JPG", IMAGE), ("./x/a.cls", b"3"), ("README", b"hi"), ("b.png", image(1)), ("b.txt", b"hi")]
    path = write_tar(tmp_path / "t.tar", members)
    with open(path, "rb") as file:
        files = [{"__url__": "t.tar", **member} for member in tar_file_iterator(file)]  # pyright: ignore
    theirs = list(group_by_keys(files))
    ours = contents(open_source(path))
    # webdataset keeps "./", which only says how the tar was made
    assert [sample.key for sample in ours] == [sample["__key__"].removeprefix("./") for sample in theirs]
    assert [sample.image for sample in ours] == [sample.get("jpg") or sample["png"] for sample in theirs]


LONG = "x" * 150
GOOD_TARS = [
    # members, options, keys, class labels
    ([("a.jpg", IMAGE)], {}, ["a"], [None]),
    ([("a.cls", b" 7\n"), ("a.jpg", IMAGE)], {}, ["a"], [7]),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": 7, "x": NaN}')], {}, ["a"], [7]),
    ([("a.jpg", IMAGE), ("a.json", b'{"cls": 7}'), ("a.cls", b"7")], {}, ["a"], [7]),
    # other JSON is not ours
    ([("a.jpg", IMAGE), ("a.json", b'{"caption": "x"}')], {}, ["a"], [None]),
    ([("a.jpg", IMAGE), ("a.json", b'["label"]')], {}, ["a"], [None]),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": null}')], {}, ["a"], [None]),
    # files without extension, hidden ones (macOS) and fields without an image are not samples
    ([("README", b""), ("._a.jpg", b"mac"), ("info.json", b"{}"), ("a.jpg", IMAGE)], {}, ["a"], [None]),
    # a dot in a folder is not a dot in the key
    ([("v1.5/a.jpg", IMAGE), ("v1.6/a.jpg", IMAGE)], {}, ["v1.5/a", "v1.6/a"], [None, None]),
    # names that do not fit a header, in the three ways to store them
    ([(LONG + ".jpg", IMAGE), ("é.jpg", IMAGE)], {"format": tarfile.PAX_FORMAT}, [LONG, "é"], [None, None]),
    ([(LONG + ".jpg", IMAGE), ("é.jpg", IMAGE)], {"format": tarfile.GNU_FORMAT}, [LONG, "é"], [None, None]),
    ([(f"{LONG[:90]}/{LONG[:90]}.jpg", IMAGE)], {"format": tarfile.USTAR_FORMAT}, [f"{LONG[:90]}/{LONG[:90]}"], [None]),
    # git archive writes a global header with a comment
    ([("a.jpg", IMAGE)], {"format": tarfile.PAX_FORMAT, "pax_headers": {"comment": "1234"}}, ["a"], [None]),
]


@pytest.mark.parametrize(("members", "options", "names", "values"), GOOD_TARS, ids=range(len(GOOD_TARS)))
def test_keys_and_labels_of_a_tar(tmp_path, members, options, names, values):
    source = open_source(write_tar(tmp_path / "t.tar", members, **options))
    assert (keys(source), labels(source)) == (names, values)
    expected = [data for name, data in members if name.lower().endswith(".jpg") and not name.startswith("._")]
    assert [sample.image for sample in contents(source)] == expected


def test_folders_in_a_tar_are_passed_over(tmp_path):
    root = write_folder(tmp_path / "images", ["cat/1.jpg", "dog/1.jpg"])
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(root, ".")
    assert sorted(keys(open_source(tmp_path / "t.tar"))) == ["cat/1", "dog/1"]


BAD_TARS = [
    # members, what the error says
    ([], "no image in this tar"),
    ([("a.txt", b"x")], "no image in this tar"),
    # webdataset takes both for sample "v1"
    (
        [("v1.5_img.jpg", IMAGE)],
        r"byte 0: member 'v1.5_img.jpg' has a dot in its key.*key 'v1' with extension '5_img.jpg'",
    ),
    (
        [("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.cls", b"1")],
        r"byte 3072: member 'a.cls' belongs to key 'a', which ended",
    ),
    ([("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.jpg", IMAGE)], "'a.jpg' belongs to key 'a', which ended earlier"),
    ([("a.jpg", IMAGE), ("a.jpg", IMAGE)], "'a.jpg' stands twice"),
    ([("a.jpg", IMAGE), ("./a.jpg", IMAGE)], "'a.jpg' stands twice"),
    ([("a.cls", b"1"), ("b.jpg", IMAGE)], "byte 0: member 'a.cls' is a label without an image"),
    ([("a.json", b'{"label": 1}'), ("b.jpg", IMAGE)], "'a.json' is a label without an image"),
    ([("a.jpg", IMAGE), ("a.cls", b"-1")], r"'a.cls' must hold one class number, 0 or more, got b'-1'"),
    ([("a.jpg", IMAGE), ("a.cls", b"cat")], "'a.cls' must hold one class number"),
    ([("a.jpg", IMAGE), ("a.cls", b"")], "'a.cls' must hold one class number"),
    ([("a.jpg", IMAGE), ("a.cls", b"1" * 1000)], "'a.cls' must hold one class number"),
    ([("a.jpg", IMAGE), ("a.cls", b"2147483648")], r"class label must be in 0..2147483647, got 2147483648"),
    ([("a.jpg", IMAGE), ("a.cls", b"1"), ("a.json", b'{"label": 2}')], "several class labels: 1, 2"),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": 1, "cls": 2}')], "several class labels: 1, 2"),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": 1, "label": 2}')], "is not JSON: a field stands twice"),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": "cat"}')], "must have an integer label, got 'cat'"),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": true}')], "must have an integer label, got True"),
    ([("a.jpg", IMAGE), ("a.json", b'{"label": -1}')], "class label must be in 0..2147483647, got -1"),
    ([("a.jpg", IMAGE), ("a.json", b"{")], "'a.json' is not JSON"),
    ([("a.jpg", IMAGE), ("a.json", b"[" * 100_000)], "'a.json' is not JSON"),
    ([("../a.jpg", IMAGE)], r"'../a.jpg' has an unsafe name"),
    ([("/a.jpg", IMAGE)], "'/a.jpg' has an unsafe name"),
    ([("x//a.jpg", IMAGE)], "unsafe name"),
    ([("x/../a.jpg", IMAGE)], "unsafe name"),
    ([("a\nb.jpg", IMAGE)], "sample key must not contain control characters"),
    ([("\udcff.jpg", IMAGE)], "sample key must be valid UTF-8"),
    ([("x" * 1025 + ".jpg", IMAGE)], "sample key must have 1 to 1024 bytes, got 1025"),
]


@pytest.mark.parametrize(("members", "message"), BAD_TARS, ids=range(len(BAD_TARS)))
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_a_tar_that_is_not_what_it_seems_is_refused(tmp_path, form, members, message):
    path = write_tar(tmp_path / "t.tar", members, format=form)
    # a PAX header may stand before the member: then the byte is another
    message = message if form == tarfile.GNU_FORMAT else message.replace("byte 3072", r"byte \d+")
    with pytest.raises(SourceError, match=f"t.tar: .*{message}"):
        contents(open_source(path))


BAD_TYPES = [
    # type, how it is called
    (tarfile.SYMTYPE, "symbolic link"),
    (tarfile.LNKTYPE, "hard link"),
    (tarfile.CHRTYPE, "device"),
    (tarfile.FIFOTYPE, "pipe"),
    (tarfile.CONTTYPE, "contiguous file"),
    (tarfile.GNUTYPE_SPARSE, "sparse file"),
    (b"Z", "unknown"),
]


@pytest.mark.parametrize(("kind", "name"), BAD_TYPES, ids=[name for _, name in BAD_TYPES])
def test_only_plain_files_are_read_from_a_tar(tmp_path, kind, name):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "t.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))
    with pytest.raises(SourceError, match=r"byte 0: member 'a.jpg' must be a plain file, got tar type"):
        contents(open_source(tmp_path / "t.tar"))


def raw_member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    return info.tobuf(form) + data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)
MEMBER = raw_member("a.jpg", IMAGE)
DAMAGED_TARS = [
    # bytes, what the error says
    (b"", "byte 0: the file is cut off: it has no end-of-archive marker"),
    (b"x" * 2000, r"byte 0: not a plain USTAR, GNU or PAX tar \(it does not begin with a tar header\)"),
    (b"\x1f\x8b" + bytes(1000), r"compressed with gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd" + bytes(1000), r"compressed with zstd: decompress it first"),
    (MEMBER, "byte 1536: the file is cut off: it has no end-of-archive marker"),
    (MEMBER + bytes(BLOCK), "byte 1536: the file is cut off: one zero block where two end an archive"),
    (MEMBER + bytes(BLOCK + 100), "one zero block where two"),
    (MEMBER + END + bytes(100), "one zero block where two"),
    (MEMBER + b"x" * BLOCK + END, r"byte 1536: damaged tar header. Copy the file again"),
    # cat a.tar b.tar
    (MEMBER + END + MEMBER + END, "byte 2560: data behind the end of the archive"),
    (MEMBER + bytes(BLOCK) + MEMBER + END, "byte 2048: data behind the end"),
    (MEMBER + END + bytes(2 << 20) + b"x" * BLOCK, r"byte 2099712: data behind the end"),
    # a size that runs past the file
    (MEMBER[:BLOCK], f"a member of {len(IMAGE)} bytes ends behind it"),
    # an extended header that nothing follows, or another one follows
    (MEMBER + raw_member("x", b"12 path=abc\n", tarfile.XHDTYPE) + END, "damaged tar header"),
    (raw_member("x", b"12 path=abc\n", tarfile.XHDTYPE) * 2 + MEMBER + END, "must be a plain file, got tar type b'x'"),
    # PAX records that do not fill their header, are not closed, stand twice, or are unknown
    (raw_member("x", b"99 path=abc\n", tarfile.XHDTYPE) + MEMBER + END, "damaged PAX header"),
    (raw_member("x", b"12 path=abcd", tarfile.XHDTYPE) + MEMBER + END, "damaged PAX header"),
    (raw_member("x", b"path=abc\n", tarfile.XHDTYPE) + MEMBER + END, "damaged PAX header"),
    (
        raw_member("x", b"12 path=abc\n" * 2, tarfile.XHDTYPE) + MEMBER + END,
        "repeated, sparse or unknown record 'path'",
    ),
    (raw_member("x", b"12 qath=abc\n", tarfile.XHDTYPE) + MEMBER + END, "unknown record 'qath'"),
    (raw_member("x", b"23 GNU.sparse.size=123\n", tarfile.XHDTYPE) + MEMBER + END, "sparse or unknown record"),
    (raw_member("x", b"11 size=-1\n", tarfile.XHDTYPE) + MEMBER + END, "a size that is not a number: '-1'"),
    (raw_member("x", b"20 size=99999999999\n", tarfile.XHDTYPE) + MEMBER + END, "a member of 99999999999 bytes"),
    (raw_member("x", b"12 path=abc\n", tarfile.XGLTYPE) + MEMBER + END, "global PAX header with a path or size"),
    (raw_member("x", bytes(2 << 20), tarfile.XHDTYPE) + MEMBER + END, "extended header must be at most 1048576 bytes"),
    (raw_member("x", b"a.jpg\0b\0", tarfile.GNUTYPE_LONGNAME, tarfile.GNU_FORMAT) + MEMBER + END, "damaged long name"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED_TARS, ids=range(len(DAMAGED_TARS)))
def test_a_damaged_tar_is_an_error_and_never_a_short_one(tmp_path, data, message):
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(SourceError, match=f"t.tar: {message}" if message.startswith("byte") else message):
        contents(open_source(tmp_path / "t.tar"))


@pytest.mark.parametrize("mtime", [0, 1.5], ids=["one header", "with PAX headers"])
def test_a_tar_cut_at_any_block_or_byte_is_an_error(tmp_path, mtime):
    whole = write_webdataset(tmp_path / "t.tar", 20, mtime=mtime).read_bytes()
    end = len(whole.rstrip(b"\0")) // BLOCK * BLOCK + 3 * BLOCK  # the last data, then two zero blocks
    cuts = list(range(0, end, BLOCK)) + random.Random(0).sample(range(end), 200)
    for cut in cuts:
        (tmp_path / "t.tar").write_bytes(whole[:cut])
        with pytest.raises(SourceError):
            contents(open_source(tmp_path / "t.tar"))
    # From the end marker on only padding is lost, and other writers write none.
    expected = [Sample(f"n{n:04}", image(n), n % 10) for n in range(20)]
    for cut in range(end, len(whole) + 1, BLOCK):
        (tmp_path / "t.tar").write_bytes(whole[:cut])
        assert contents(open_source(tmp_path / "t.tar")) == expected


@pytest.mark.parametrize("mtime", [0, 1.5], ids=["one header", "with PAX headers"])
def test_a_changed_byte_in_a_header_is_an_error_or_changes_nothing(tmp_path, mtime):
    path = write_webdataset(tmp_path / "t.tar", 1, mtime=mtime)
    whole = path.read_bytes()
    expected = contents(open_source(path))
    with tarfile.open(path) as tar:
        starts = [(member.offset, member.offset_data) for member in tar]
    positions = [position for start, data in starts for position in range(start, data)]
    assert len(positions) == 2 * BLOCK * (3 if mtime else 1)
    refused = 0
    with open(path, "r+b") as file:
        for position in positions:
            value = whole[position]
            # digits, spaces and NULs may stand for each other where a number ends
            for changed in {value ^ 1, value ^ 0x80, ord("0"), ord(" "), 0} - {value}:
                os.pwrite(file.fileno(), bytes([changed]), position)
                try:
                    assert contents(open_source(path)) == expected
                except SourceError:
                    refused += 1
            os.pwrite(file.fileno(), bytes([value]), position)
    assert refused > 1000


def test_an_image_whose_tar_was_cut_after_the_index_is_an_error(tmp_path):
    path = write_webdataset(tmp_path / "t.tar", 2)
    shard = open_source(path).shards[0]
    assert len(shard) == 2
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SourceError, match="the file is cut off"):
        _ = shard[0]


@given(st.binary(max_size=2000), st.integers(0, 3))
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_bytes_after_a_sound_member_are_an_error(tmp_path, tail, num_members):
    (tmp_path / "t.tar").write_bytes(MEMBER * num_members + tail)
    with pytest.raises(SourceError):
        contents(open_source(tmp_path / "t.tar"))


@pytest.mark.parametrize("expression", ["train-{000000..000002}.tar", "train-00000{0,1,2}.tar", ""])
def test_several_tars_are_one_source_in_order(tmp_path, expression):
    for shard in (2, 0, 1):
        write_webdataset(tmp_path / f"train-00000{shard}.tar", 3, first=3 * shard)
    source = open_source(f"{tmp_path}/{expression}")
    assert [shard.name for shard in source.shards] == ["train-000000", "train-000001", "train-000002"]
    assert keys(source) == [f"n{n:04}" for n in range(9)]
    assert source.num_samples == 9


def test_class_names_stand_beside_the_tars(tmp_path):
    path = write_webdataset(tmp_path / "t.tar", 10)
    (tmp_path / "classes.txt").write_bytes("\n".join([*"abcdefgh", "crane", "crane\n"]).encode())
    assert open_source(path).class_names == (*"abcdefgh", "crane", "crane")
    (tmp_path / "classes.txt").write_text("a\r\nb\r\nc\r\n")
    source = open_source(path)
    assert source.class_names == ("a", "b", "c")
    with pytest.raises(SourceError, match=r"member 'n0003.cls': class label must be in 0..2 \(3 classes\), got 3"):
        contents(source)


BAD_CLASSES = [
    # classes.txt, what the error says
    (b"", "line 1: class name must have 1 to 1024 bytes, got 0"),
    (b"a\n\nb\n", "line 2: class name must have 1 to 1024 bytes, got 0"),
    (b"\xff\xfea\0", "class names must be valid UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), BAD_CLASSES, ids=range(len(BAD_CLASSES)))
def test_class_names_that_cannot_be_read_are_an_error(tmp_path, text, message):
    write_webdataset(tmp_path / "t.tar", 1)
    (tmp_path / "classes.txt").write_bytes(text)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "t.tar")


def test_tars_of_several_folders_must_agree(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_webdataset(tmp_path / folder / f"{folder}.tar", 1)
        (tmp_path / folder / "classes.txt").write_text(folder)
    with pytest.raises(SourceError, match=r"these differ: .*a/classes.txt, .*b/classes.txt"):
        open_source(f"{tmp_path}/{{a/a,b/b}}.tar")
    (tmp_path / "b" / "b.tar").rename(tmp_path / "b" / "a.tar")
    (tmp_path / "b" / "classes.txt").write_text("a")
    with pytest.raises(SourceError, match="2 files are called 'a': names must be unique"):
        open_source(f"{tmp_path}/{{a,b}}/a.tar")


def test_a_tar_name_must_be_usable_as_a_name(tmp_path):
    write_webdataset(tmp_path / "my train.tar", 1)
    with pytest.raises(SourceError, match=r"a file name may have only A-Z a-z 0-9 . _ -, got 'my train'"):
        open_source(tmp_path)


# Hugging Face image Parquet.


def test_parquet_is_read_with_its_class_names(tmp_path):
    rows = [(image(0), "cat/1.jpg"), (image(1), "dog/1.JPEG"), (image(2), "v1.5"), (image(3), "dog/2.x.png")]
    source = open_source(write_parquet(tmp_path / "train.parquet", rows, [0, 1, None, -1], names=["cat", "dog"]))
    assert (source.kind, source.class_names) == ("parquet", ("cat", "dog"))
    assert [shard.name for shard in source.shards] == ["train.0000"]
    assert keys(source) == ["cat/1", "dog/1", "v1.5", "dog/2.x"]
    assert labels(source) == [0, 1, None, None]
    assert contents(source)[1] == Sample("dog/1", image(1), 1)


def test_parquet_is_cut_at_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_source, "ROWS_PER_SHARD", 20)
    source = open_source(write_parquet(tmp_path / "train.parquet", numbered(75), row_group_size=7))
    # 20 rows need three groups of 7; the last run is one group of 7 and one of 5
    assert [len(shard) for shard in source.shards] == [21, 21, 21, 12]
    assert [shard.name for shard in source.shards] == [f"train.000{n}" for n in range(4)]
    assert [(sample.image, sample.key + ".jpg") for sample in contents(source)] == numbered(75)


NAMELESS = [
    # paths of three images, the first two the same image
    [None, None, None],
    # one missing is enough: the others might be positions
    ["a.jpg", "b.jpg", None],
    ["a.jpg", "b.jpg", "a.jpg"],
    # one key for two images
    ["a.jpg", "b.jpg", "a.png"],
]


@pytest.mark.parametrize("paths", NAMELESS, ids=range(len(NAMELESS)))
def test_images_without_unique_paths_are_named_by_content(tmp_path, paths):
    images = [image(1), image(1), image(2)]
    first, last = (xxhash.xxh3_128_hexdigest(image(n)) for n in (1, 2))
    path = write_parquet(tmp_path / "train.parquet", list(zip(images, paths, strict=True)))
    assert keys(open_source(path)) == [first, f"{first}-1", last]
    # the same images in another order keep their names
    write_parquet(path, list(zip(images[::-1], paths, strict=True)))
    assert keys(open_source(path)) == [last, first, f"{first}-1"]


def test_an_integer_column_with_a_usual_name_is_the_label(tmp_path):
    source = open_source(write_parquet(tmp_path / "train.parquet", numbered(3), [5, 6, 7]))
    assert (source.class_names, labels(source)) == (None, [5, 6, 7])


def test_of_two_class_label_columns_the_usual_name_decides(tmp_path):
    write_table(tmp_path / "t.parquet", {"fine_label": [1], "coarse_label": [0]}, ["fine_label", "coarse_label"])
    assert labels(open_source(tmp_path / "t.parquet")) == [1]


BAD_TABLES = [
    # columns, ClassLabel columns, metadata, what the error says
    ({"image2": pa.array([{"bytes": IMAGE, "path": "a"}], IMAGE_TYPE)}, [], {}, r"found \['image', 'image2'\]"),
    ({"a": [0], "b": [0]}, ["a", "b"], {}, r"several label columns, \['a', 'b'\]"),
    ({"label": [0], "labels": [0]}, [], {}, r"several label columns, \['label', 'labels'\]"),
    ({"label": [2]}, ["label"], {}, r"row group 0, row 0: class label must be in 0..1 \(2 classes\), got 2"),
    ({"label": [-2]}, ["label"], {}, r"must be in 0..1 \(2 classes\), got -2"),
    ({"label": [2**31]}, [], {}, "class label must be in 0..2147483647, got 2147483648"),
    ({}, [], {"huggingface": "{"}, "'huggingface' schema metadata cannot be read"),
    ({}, [], {"huggingface": "[]"}, "'huggingface' schema metadata cannot be read"),
    # a pickle inside would run when the type is registered
    (
        {"x": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))},
        [],
        {},
        "'x' has an extension type",
    ),
]


@pytest.mark.parametrize(("columns", "class_labels", "metadata", "message"), BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_a_table_that_is_ambiguous_or_out_of_range_is_refused(tmp_path, columns, class_labels, metadata, message):
    write_table(tmp_path / "t.parquet", columns, class_labels, **metadata)
    with pytest.raises(SourceError, match=message):
        contents(open_source(tmp_path / "t.parquet"))


def test_an_unregistered_extension_type_inside_a_struct_is_refused(tmp_path):
    inner = pa.field("x", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    schema = pa.schema([("image", IMAGE_TYPE), ("meta", pa.struct([inner]))])
    rows = [{"image": {"bytes": IMAGE, "path": "a.jpg"}, "meta": {"x": b"pickle"}}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="column 'x' has an extension type, which is not read"):
        open_source(tmp_path / "t.parquet")


BAD_ROWS = [
    # rows, what the error says
    ([], "no rows in this file"),
    ([(None, "a.jpg")], "row group 0, row 0: no image bytes"),
    ([(IMAGE, "a.jpg"), (IMAGE, "a.jpg"), (None, None)], "row group 0, row 2: no image bytes"),
    ([(IMAGE, ".jpg"), (IMAGE, "a\nb.jpg")], r"row 1: sample key must not contain control characters"),
    ([(IMAGE, "")], "sample key must have 1 to 1024 bytes, got 0"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_parquet_row_without_image_or_name_is_named(tmp_path, rows, message):
    with pytest.raises(SourceError, match=message):
        contents(open_source(write_parquet(tmp_path / "t.parquet", rows)))


def test_the_files_of_one_source_share_their_class_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", numbered(1), [0], names=["x", "y"])
    write_parquet(tmp_path / "b.parquet", numbered(1), [0], names=["y", "x"])
    with pytest.raises(SourceError, match=r"b.parquet: its class names differ from those of .*a.parquet"):
        open_source(tmp_path)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_parquet_file_gives_a_source_error_or_samples(tmp_path, checksums):
    path = write_parquet(tmp_path / "t.parquet", numbered(100), row_group_size=50, write_page_checksum=checksums)
    whole, expected = path.read_bytes(), contents(open_source(path))
    chance = random.Random(0)
    refused = wrong = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            wrong += contents(open_source(path)) != expected
        except SourceError:
            refused += 1
    assert refused > 20
    if checksums:  # the footer has none: the label set's own hashes cover that
        assert wrong <= 1


def test_a_cut_parquet_file_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", numbered(20))
    whole = path.read_bytes()
    for cut in range(0, len(whole), 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match=r"t.parquet: damaged, or not Parquet"):
            open_source(path)


def test_a_parquet_file_that_was_replaced_by_a_shorter_one_is_an_error(tmp_path):
    source = open_source(write_parquet(tmp_path / "t.parquet", numbered(20)))
    write_parquet(tmp_path / "t.parquet", numbered(19))
    with pytest.raises(SourceError, match="row group 0 has 19 rows, its footer said otherwise"):
        contents(source)


def test_a_row_group_larger_than_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_source, "MAX_ROW_GROUP_BYTES", 10_000)
    # dictionary encoding: the file is small, the rows are not
    path = write_parquet(tmp_path / "t.parquet", [(bytes(1000), f"{n}.jpg") for n in range(40)])
    assert path.stat().st_size < 10_000
    with pytest.raises(SourceError, match="row group 0 holds more than 10000 bytes of images"):
        contents(open_source(path))


def test_the_row_group_cache_forgets_the_least_used_and_keeps_one_of_any_size():
    column = pa.chunked_array([pa.array([b"x" * 100])])
    loads = []

    def get(group: int, times: int = 1) -> None:
        cache.get((Path("t"), group), lambda: loads.append(group) or pa.chunked_array(column.chunks * times))

    cache = RowGroupCache(2 * column.nbytes)
    for group in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1
        get(group)
    assert loads == [0, 1, 2, 1]
    assert cache.num_bytes == 2 * column.nbytes
    get(3, times=5)
    get(3, times=5)
    assert loads == [0, 1, 2, 1, 3]
    assert cache.num_bytes == 5 * column.nbytes


# Real images.


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("DEIT_CLI_DATA")
    if not folder:
        pytest.skip("DEIT_CLI_DATA is not set: no real images here")
    return Path(folder)


def test_cifar_10_is_read(data):
    source = open_source(data / "cifar10" / "train-00000-of-00001.parquet")
    assert (source.num_samples, source.num_classes) == (50_000, 10)
    assert [len(shard) for shard in source.shards] == [5000] * 10
    shard = source.shards[0]
    assert source.class_names is not None
    for position in (0, 999, 1000, 4999):
        sample = shard[position]
        assert sample.image.startswith(b"\xff\xd8\xff")
        assert sample.class_label is not None
        assert sample.key.split("/")[0] == source.class_names[sample.class_label]
    assert shard.keys[0] == "automobile/1690"


def test_the_imagenet_sample_is_read(data):
    source = open_source(data / "imagenet-sample" / "train-000000.tar")
    samples = contents(source)
    assert len(samples) == source.num_samples == 125
    assert len({sample.class_label for sample in samples}) == 125
    assert all(sample.image.startswith(b"\xff\xd8\xff") and sample.key[0] == "n" for sample in samples)


def slow_keys_sha256(keys: list[str], labels: list[int | None]) -> str:
    lines = [
        json.dumps([key, label], ensure_ascii=False, separators=(",", ":"))
        for key, label in zip(keys, labels, strict=True)
    ]
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


@pytest.mark.parametrize("number", [0, 1, 4095, 4096, 4097, 9000])
def test_keys_are_hashed_as_json_lines(number):
    rng = random.Random(number)
    nasty = [
        '"',
        "\\",
        "\n",
        "\r",
        "\t",
        "\0",
        "\x1f",
        "\x7f",
        "\x80",
        "/",
        "ü",
        "\u2028",
        "\ufeff",
        "😀",
        "%s",
        "{}",
        "],[",
        "",
    ]
    keys = ["".join(rng.choices([*nasty, "a", "1"], k=rng.randrange(6))) for _ in range(number)]
    labels = [rng.choice([None, 0, 1, 999, 2**31 - 1]) for _ in keys]
    assert keys_sha256(keys, labels) == keys_sha256(iter(keys), iter(labels)) == slow_keys_sha256(keys, labels)


def test_only_keys_that_are_text_and_as_many_labels_are_hashed():
    with pytest.raises(UnicodeEncodeError):
        keys_sha256(["\ud800"], [0])
    for other in ([], [0, 1]):
        with pytest.raises(ValueError, match="zip"):
            keys_sha256(["a"], other)
