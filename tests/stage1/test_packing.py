"""Self-contained sets: what `--include-images` packs is the source that was labelled, and needs no other."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.builders import encoded, files_of, make_labels, named_files, photo, small_recipe, with_checkout, write_tars
from support.commands import invoke
from support.label_sets import problems_in, seal_again
from support.sources import write_parquet
from support.training import TINY
from support.web_server import web_server

from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetMismatch, SourceError, UsageError
from pipeline.images.decode import decode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_replay
from pipeline.settings.configs import PrecomputeConfig
from pipeline.stage1 import packing as packing_module
from pipeline.stage1.packing import Packing
from pipeline.storage.cache import Cache

NAMES = ("ant", "bee")


def write_folder(root: Path, count: int = 9) -> str:
    """Write class folders with a PNG, a WebP and JPEGs."""
    for number in range(count):
        kind, extension = {0: ("PNG", "png"), 1: ("WEBP", "webp")}.get(number, ("JPEG", "jpeg"))
        path = root / NAMES[number % 2] / f"n{number:03}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(number), kind))
    return str(root)


def write_rows(root: Path, count: int = 9) -> str:
    root.mkdir(parents=True)
    rows = [(encoded(photo(number)), f"deep/er/{number:03}.jpg") for number in range(count)]
    write_parquet(root / "part.parquet", rows, [0, 1, None] * (count // 3), names=NAMES)
    return str(root)


def write_plain(root: Path) -> str:
    """Write images without classes, one of which has a name that needs a PAX header."""
    root.mkdir(parents=True)
    for number, name in enumerate(("a", "é-日本", "x" * 150)):
        (root / f"{name}.jpg").write_bytes(encoded(photo(number)))
    return str(root)


SOURCES = {"folder": write_folder, "tar": write_tars, "parquet": write_rows, "plain": write_plain}


def teacher_classes(kind: str) -> dict:
    """The teacher of `builders` has three classes, which must be those of the source; timm's has any number."""
    return {} if kind in ("tar", "plain") else {"num_classes": 2}


def label(out: Path, data: str, kind: str = "tar", **settings) -> LabelSet:
    from support.builders import small_teacher

    teacher = small_teacher(open_source(data), **teacher_classes(kind))
    return make_labels(out, data, teacher=teacher, **({"views": (0, 2), "views_per_shard": 1} | settings))


def images_of(source) -> list[tuple]:
    return [(shard.name, *vars(sample).values()) for shard in source.shards for sample in shard]


@pytest.mark.parametrize("kind", SOURCES)
def test_packed_images_are_the_source_that_was_labelled(kind, tmp_path):
    data = SOURCES[kind](tmp_path / "data")
    plain, whole = (
        label(tmp_path / "plain", data, kind),
        label(tmp_path / "whole", data, kind, include_images="original"),
    )
    source = open_source(data)
    packed = open_source(tmp_path / "whole" / "images")
    assert images_of(packed) == images_of(whole.open_source()) == images_of(source)
    assert packed.identity() == whole.open_source().identity() == source.identity()
    # Labels, samples and plan are those of a set without images, byte for byte.
    without = {
        name: content for name, content in files_of(tmp_path / "whole").items() if not name.startswith("images/")
    }
    same = {name: content for name, content in files_of(tmp_path / "plain").items()}
    differing = {name for name in without.keys() | same.keys() if without.get(name) != same.get(name)}
    assert differing == {"manifest.json"} | ({"README.md"} & without.keys())
    assert [entry.path for entry in plain.manifest.files if entry.kind == "images"] == []
    listed = {entry.shard: entry for entry in whole.manifest.files if entry.kind == "images"}
    assert {name: (e.rows, e.view_start, e.view_stop) for name, e in listed.items()} == {
        shard.name: (len(shard), 0, 0) for shard in source.shards
    }
    assert problems_in(whole.folder) == []


def test_a_tar_has_the_plain_members_that_webdataset_reads(tmp_path):
    data = write_folder(tmp_path / "data", 3)
    label(tmp_path / "set", data, "folder", include_images="original")
    with tarfile.open(tmp_path / "set/images/images-000000.tar") as tar:
        members = tar.getmembers()
        assert tar.pax_headers == {"comment": "deit-cli images: the original files"}
    assert {m.name for m in members} == {f"{folder}/{name}" for folder, name in (("ant", "n000.png"), ("ant", "n000.cls"), ("bee", "n001.webp"), ("bee", "n001.cls"), ("ant", "n002.jpg"), ("ant", "n002.cls"))}  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, tuple(m.pax_headers)) for m in members} == {(0, 0, 0, "", 0o644, ("comment",))}  # fmt: skip
    assert (tmp_path / "set/images/classes.txt").read_text() == "ant\nbee\n"


def test_the_same_images_make_the_same_tars(tmp_path):
    data = write_tars(tmp_path / "data", unlabelled=4)
    for name, workers in (("a", 0), ("b", 2)):
        label(tmp_path / name, data, include_images="20", workers=workers)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_moved_set_trains_without_its_source(tmp_path):
    data = write_tars(tmp_path / "data", (24, 16), unlabelled=5)
    label(tmp_path / "set", data, include_images="original")
    shutil.rmtree(data)
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "set", tmp_path / "elsewhere/set")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options += ["--epochs=1", "--batch-size=12", "--workers=0", "--device=cpu"]
    code, said = invoke("train", "--labels", str(moved), "--output", str(tmp_path / "run"), *options)
    assert (code, "4 replay probes" in said or "epoch" in said) == (0, True), said
    assert invoke("labels", "verify", str(moved))[0] == 0
    assert invoke("labels", "show", str(moved), "--out", str(tmp_path / "labels.png"))[0] == 0
    student = ("--checkpoint", str(tmp_path / "run/last"), "--labels", str(moved))
    assert invoke("evaluate", *student, "--workers=0", "--device=cpu")[0] == 0


def test_data_still_goes_before_the_sets_own_images(tmp_path):
    data = write_tars(tmp_path / "data")
    whole = label(tmp_path / "set", data, include_images="original")
    assert whole.open_source(data).location == data
    assert whole.open_source().location == str(tmp_path / "set/images")
    other = write_tars(tmp_path / "other", (13, 9))
    with pytest.raises(LabelSetMismatch, match="Pass the --data that was labelled"):
        check_replay(whole, whole.open_source(other))


def test_a_set_behind_a_url_brings_its_own_images(tmp_path):
    data = write_tars(tmp_path / "data")
    label(tmp_path / "set", data, include_images="original")
    shutil.rmtree(data)
    with web_server(tmp_path) as server:
        far = LabelSet.open(f"{server.url}/set", cache=Cache(tmp_path / "cache", 10**8))
        source = far.open_source()
        assert source.is_remote
        assert check_replay(far, source) == 0.0
        assert problems_in(far) == []
        server.faults["set/images/train-000001.tar"] += ["flip", "flip"]
        again = LabelSet.open(f"{server.url}/set", cache=Cache(tmp_path / "empty", 10**8))
        with pytest.raises(SourceError, match=r"set/images/train-000001\.tar has SHA-256 .* is promised"):
            again.open_source().shard("train-000001")[0]


def test_a_url_is_packed_as_its_copy_is(tmp_path):
    data = write_tars(tmp_path / "data")
    label(tmp_path / "near", data, include_images="original")
    with web_server(tmp_path) as server:
        url = f"{server.url}/data/train-{{000000..000001}}.tar"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            label(tmp_path / "far", url, include_images="original")
    for name in ("train-000000.tar", "train-000001.tar", "classes.txt"):
        assert (tmp_path / "far/images" / name).read_bytes() == (tmp_path / "near/images" / name).read_bytes()


# --- shrunk images ----------------------------------------------------------------------------------------------


def test_shrunk_images_are_what_teacher_and_student_see(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shapes = {"wide": (40, 60), "tall": (90, 41), "small": (16, 12), "exact": (20, 30)}
    originals = {name: encoded(photo(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    for name, image in originals.items():
        (data / f"{name}.jpg").write_bytes(image)
    whole = label(tmp_path / "set", str(data), "plain", include_images="20")
    packed = {sample.key: sample.image for shard in whole.open_source().shards for sample in shard}
    sizes = {key: Image.open(io.BytesIO(image)).size for key, image in packed.items()}
    assert sizes == {"wide": (30, 20), "tall": (20, 43), "small": (12, 16), "exact": (30, 20)}
    assert {key for key in packed if packed[key] == originals[key]} == {"small", "exact"}
    expected = Image.fromarray(decode(originals["wide"], key="wide")).resize((30, 20), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(expected, int) - decode(packed["wide"], key="wide")).mean() < 4  # of a JPEG
    samples = whole.samples(whole.shards[0])
    assert {
        key: (int(w), int(h)) for key, w, h in zip(samples.key, samples.width, samples.height, strict=True)
    } == sizes
    assert check_replay(whole, whole.open_source()) == 0.0
    assert problems_in(whole.folder) == []
    text = "shorter side at most 20 px: Pillow bicubic, JPEG quality 95 4:2:0"
    assert {environment["images"] for environment in whole.manifest.environments} == {text}
    with pytest.raises(LabelSetMismatch, match="has other bytes than the one that was labelled"):
        check_replay(whole, whole.open_source(str(data)))


@pytest.mark.parametrize("value", ["0", "-1", "4097", "256px", ""])
def test_a_size_that_is_none_is_refused(value, tmp_path):
    with pytest.raises(UsageError, match=r"--include-images takes original .* 1\.\.4096, got"):
        PrecomputeConfig(data="x", out=tmp_path, include_images=value)


def test_the_bare_option_means_the_original_files(tmp_path):
    code, said = invoke(
        "precompute", "--data", str(tmp_path), "--include-images", "--out", str(tmp_path / "set"), "--dry-run"
    )
    assert "include_images: original" in said or "no image in this folder" in said
    assert code == 1, said


# --- what cannot be packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "rule"), [("v1.5.jpg", "no dot"), ("a//b.jpg", "must be relative"), ("../b.jpg", "must be relative")])  # fmt: skip
def test_a_key_that_webdataset_would_change_is_refused_before_anything_is_written(path, rule, tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/part.parquet", [(encoded(photo(0)), path), (encoded(photo(1)), "b.jpg")])
    key = repr(path.removesuffix(".jpg"))
    with pytest.raises(
        SourceError, match=rf"part.0000: sample key {key} cannot name a file in a WebDataset tar: .*{rule}"
    ):
        label(tmp_path / "set", str(tmp_path / "data"), "plain", include_images="original")
    assert not (tmp_path / "set").exists()
    assert label(tmp_path / "set", str(tmp_path / "data"), "plain").has_images is False


@pytest.mark.parametrize("how", ["original", "20"])
def test_a_bad_image_stops_packing_or_is_packed_as_it_is(how, tmp_path):
    data = write_tars(tmp_path / "data", bad=(3, 15))
    with pytest.raises(SourceError, match=r"image 'img-0003': damaged .* --on-bad-image skip"):
        label(tmp_path / "set", data, include_images=how)
    assert sorted(path.name for path in (tmp_path / "set/images").iterdir()) == ["classes.txt"]
    whole = label(tmp_path / "set", data, include_images=how, on_bad_image="skip")
    assert [(s.key, bool(why)) for name in whole.shards for s, why in zip(whole.open_source().shard(name), whole.samples(name).bad, strict=True) if why] == [("img-0003", True), ("img-0015", True)]  # fmt: skip
    bad = open_source(data).shard("train-000000")[3].image
    assert whole.open_source().shard("train-000000")[3].image == bad
    assert problems_in(whole.folder) == []


# --- again, further, and changed --------------------------------------------------------------------------------


def test_more_views_are_of_the_images_in_the_set(tmp_path):
    data = write_tars(tmp_path / "data")
    once = label(tmp_path / "once", data, include_images="20", views=(0, 4))
    label(tmp_path / "set", data, include_images="20", views=(0, 2))
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    label(tmp_path / "set", data, views=(2, 4))  # without the option: it stays self-contained
    shutil.rmtree(data)
    label(tmp_path / "copy", str(tmp_path / "copy/images"), views=(2, 4))  # the set's own images as the source
    names = {entry.path for entry in once.manifest.files}
    for folder in ("set", "copy"):
        found = LabelSet.open(tmp_path / folder)
        assert {entry.path: entry.sha256 for entry in found.manifest.files if entry.kind != "labels"} == {entry.path: entry.sha256 for entry in once.manifest.files if entry.kind != "labels"}  # fmt: skip
        assert {entry.path for entry in found.manifest.files} == names
        assert problems_in(found.folder) == []


def test_images_may_be_added_to_a_set_that_was_labelled_without(tmp_path):
    data = write_tars(tmp_path / "data")
    before = label(tmp_path / "set", data)
    with pytest.raises(LabelSetMismatch, match=r"image 'img-0000' of train-000000 would be packed with other bytes"):
        label(tmp_path / "set", data, include_images="20")
    assert not list((tmp_path / "set/images").glob("*.tar"))
    whole = label(tmp_path / "set", data, include_images="original")
    assert whole.has_images
    assert [e for e in whole.manifest.files if e.kind != "images"] == list(before.manifest.files)
    assert label(tmp_path / "set", data).has_images


def test_a_set_that_was_begun_with_images_is_continued_with_them(tmp_path, monkeypatch):
    data = write_tars(tmp_path / "data")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stage1.precompute.index_samples", stop)
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path / "set", data, include_images="20")
    with pytest.raises(UsageError, match="was begun with images in it: pass --include-images 20 again"):
        label(tmp_path / "set", data)
    with pytest.raises(
        LabelSetMismatch,
        match=r"holds shorter side at most 20 px.*asks for the original files\. Pass --include-images 20",
    ):
        label(tmp_path / "set", data, include_images="original")
    label(tmp_path / "set", data, include_images="20")
    label(tmp_path / "once", data, include_images="20")
    assert named_files(tmp_path / "set") == named_files(tmp_path / "once")


def test_a_tar_that_is_no_packed_one_is_refused(tmp_path):
    data = write_tars(tmp_path / "data")
    label(tmp_path / "set", data, include_images="original")
    shutil.copy(Path(data) / "train-000000.tar", tmp_path / "set/images/train-000000.tar")
    with pytest.raises(LabelSetError, match=r"train-000000\.tar was not written by --include-images"):
        label(tmp_path / "set", data)


def test_a_deleted_tar_is_packed_again_and_a_changed_one_is_refused(tmp_path):
    data = write_tars(tmp_path / "data")
    label(tmp_path / "set", data, include_images="20")
    before = files_of(tmp_path / "set")
    tar = tmp_path / "set/images/train-000001.tar"
    tar.unlink()
    with pytest.raises(LabelSetCorrupt, match=r"train-000001\.tar is missing"):
        LabelSet.open(tmp_path / "set")
    label(tmp_path / "set", data)
    assert files_of(tmp_path / "set") == before
    tar.write_bytes(before["images/train-000001.tar"] + bytes(512))
    with pytest.raises(
        LabelSetCorrupt, match=r"train-000001\.tar was changed after it was sealed: delete it and run again"
    ):
        label(tmp_path / "set", data)


def test_a_tar_that_was_packed_differently_is_not_vouched_for(tmp_path, monkeypatch):
    data = write_tars(tmp_path / "data")
    label(tmp_path / "set", data, include_images="original")
    (tmp_path / "set/images/train-000001.tar").unlink()
    real = packing_module.write_tar
    monkeypatch.setattr(
        packing_module,
        "write_tar",
        lambda file, members, comment: real(file, [*members, ("x.txt", b"")], comment=comment),
    )
    with pytest.raises(LabelSetMismatch, match=r"was packed again, and differs from the sealed file"):
        label(tmp_path / "set", data)


def test_packed_images_of_another_source_are_refused(tmp_path):
    data, other = write_tars(tmp_path / "data"), write_tars(tmp_path / "other", unlabelled=3)
    label(tmp_path / "elsewhere", other, include_images="original")
    (tmp_path / "set/images").mkdir(parents=True)
    label(tmp_path / "begun", data, include_images="original")
    shutil.copy(tmp_path / "begun/plan.json", tmp_path / "set/plan.json")
    shutil.copy(tmp_path / "elsewhere/images/train-000000.tar", tmp_path / "set/images")
    with pytest.raises(LabelSetMismatch, match=r"does not hold the images of source shard 'train-000000'"):
        label(tmp_path / "set", data, include_images="original")


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_in_a_tar_is_found_by_verify_and_refused_when_the_image_is_used(tmp_path):
    whole = label(tmp_path / "set", write_tars(tmp_path / "data"), include_images="original")
    flipped(tmp_path / "set/images/train-000000.tar", 3 * 512 + 100)  # in the first image: header, record, header
    problems = problems_in(tmp_path / "set")
    assert len(problems) == 2
    assert "train-000000.tar has SHA-256" in problems[0]
    assert (
        "other image bytes: 'img-0000' of train-000000. The labels belong to other images than the label set contains"
        in problems[1]
    )
    with pytest.raises(LabelSetMismatch, match="image 'img-0000' of train-000000 has other bytes"):
        check_replay(whole, whole.open_source())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        # an image is another one
        (
            lambda tar: tar.replace(b"\xff\xd9", b"\xff\xd8", 1),
            "2 samples are with other image bytes: 'img-0000' of train-000000",
        ),
        # a sample has another key; the sum of its header, which is all that a header is checked by, stays
        (lambda tar: tar.replace(b"img-0003", b"img-0300"), "1 sample is missing: 'img-0003'"),
    ],
)
def test_verify_looks_into_tars_whose_hashes_were_made_to_fit(change, text, tmp_path):
    label(tmp_path / "set", write_tars(tmp_path / "data"), include_images="original")
    tar = tmp_path / "set/images/train-000001.tar"
    first = tmp_path / "set/images/train-000000.tar"
    for path in (tar, first):
        path.write_bytes(change(path.read_bytes()))
    rehash(tmp_path / "set")
    problems = problems_in(tmp_path / "set")
    assert text in "\n".join(problems)


def rehash(folder: Path, change=lambda manifest: None) -> None:
    def all_of_it(manifest):
        import hashlib

        for entry in manifest["files"]:
            if entry["kind"] == "images":
                content = (folder / f"images/{entry['shard']}.tar").read_bytes()
                entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
        change(manifest)

    seal_again(folder, all_of_it)


def test_a_manifest_lists_the_images_of_every_shard_or_of_none(tmp_path):
    label(tmp_path / "set", write_tars(tmp_path / "data"), include_images="original")
    first = next(e for e in json.loads((tmp_path / "set/manifest.json").read_text())["files"] if e["kind"] == "images")
    rehash(tmp_path / "set", lambda manifest: manifest["files"].remove(next(e for e in manifest["files"] if e["kind"] == "images")))  # fmt: skip
    with pytest.raises(LabelSetCorrupt, match=rf"lacks images file of '{first['shard']}'"):
        LabelSet.open(tmp_path / "set")
    rehash(tmp_path / "set", lambda manifest: manifest.update(files=[e for e in manifest["files"] if e["kind"] != "images"]))  # fmt: skip
    assert LabelSet.open(tmp_path / "set").has_images is False


# --- several writers, and killed ones ---------------------------------------------------------------------------


def test_ranks_pack_what_they_label_and_the_result_is_the_same(tmp_path, monkeypatch):
    data = write_tars(tmp_path / "data", (6, 5, 4))
    label(tmp_path / "once", data, include_images="20")
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = open_source(data)
    from support.builders import small_teacher

    from pipeline.stage1.precompute import precompute

    config = PrecomputeConfig(data=data, out=tmp_path / "set", views=(0, 2), views_per_shard=1, topk=2, workers=0, include_images="20", batch_size=8)  # fmt: skip
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done = precompute(config, small_recipe(), small_teacher(source), source)
    assert done is not None
    assert named_files(tmp_path / "set") == named_files(tmp_path / "once")


COMMAND = """
import os, sys
sys.path.insert(0, os.path.join({root!r}, "tests/stage1"))
from pathlib import Path
from test_packing import label
label(Path({out!r}), {data!r}, include_images="20", views=(0, 1), accuracy_samples=0)
"""


def start(out: Path, data: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    code = COMMAND.format(root=str(root), out=str(out), data=data)
    environment = with_checkout(OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_writers_at_once_are_harmless(tmp_path):
    data = write_tars(tmp_path / "data", (20,) * 6)
    label(tmp_path / "once", data, include_images="20", views=(0, 1), accuracy_samples=0)
    writers = [start(tmp_path / "set", data) for _ in range(2)]
    for writer in writers:
        _, said = writer.communicate(timeout=300)
        assert writer.returncode == 0, said
    assert named_files(tmp_path / "set") == named_files(tmp_path / "once")


@pytest.mark.slow
def test_packing_that_is_killed_again_and_again_comes_to_the_same_set(tmp_path):
    """Fault 1: SIGKILL at moments spread over the packing; no tar is ever half there."""
    data = write_tars(tmp_path / "data", (30,) * 8)
    label(tmp_path / "once", data, include_images="20", views=(0, 1), accuracy_samples=0)
    folder = tmp_path / "set/images"
    for kills in range(1, 5):
        run = start(tmp_path / "set", data)
        began = time.monotonic()
        while len(list(folder.glob("*.tar"))) < 2 * kills - 1 and run.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.0005)
        time.sleep(0.003 * kills)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        for tar in folder.glob("*.tar"):
            assert tar.read_bytes() == (tmp_path / "once/images" / tar.name).read_bytes()
    label(tmp_path / "set", data, include_images="20", views=(0, 1), accuracy_samples=0)
    assert named_files(tmp_path / "set") == named_files(tmp_path / "once")


def test_how_images_are_packed_is_said_in_one_way_each():
    assert Packing(None).changes is None
    assert (
        Packing(256).changes
        == Packing(256).text
        == "shorter side at most 256 px: Pillow bicubic, JPEG quality 95 4:2:0"
    )
    assert [Packing(size).option for size in (None, 256)] == ["--include-images original", "--include-images 256"]
