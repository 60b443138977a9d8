"""`pack` writes every image once, in an order that only seed and keys decide, with the same bytes however often it is run or killed."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.background import wait_until
from support.builders import CLASSES, encoded, files_of, make_labels, photo, shared_data, with_checkout, write_tars
from support.commands import invoke
from support.forks import kill
from support.sources import write_parquet
from support.web_server import web_server

from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.exchange import pack as packing
from pipeline.exchange import pack_rows
from pipeline.exchange.pack import Packed, pack, plan_pack
from pipeline.images.index import SIDECAR_NAME
from pipeline.images.parquet import ParquetShard
from pipeline.images.source import open_source
from pipeline.settings.configs import PackConfig
from pipeline.storage.atomic import locked

COUNT = 47


def config(**settings: Any) -> PackConfig:
    return PackConfig(**({"workers": 0, "samples_per_shard": 10} | settings))


def packed(source: object, out: Path, **settings: Any) -> Packed:
    return pack(str(source), out, config(**settings))


def content(number: int) -> bytes:
    """Return the image of a sample; some are large, some PNG."""
    pixels = photo(number, 24 + number % 3 * 20, 32 + number % 2 * 40)
    return encoded(pixels, "PNG" if number % 5 == 0 else "JPEG")


def name_of(number: int) -> str:
    return f"{CLASSES[number % 3]}/image-{number:03}{'.png' if number % 5 == 0 else '.JPEG'}"


def write_folder(folder: Path, count: int = COUNT) -> Path:
    for number in range(count):
        path = folder / name_of(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))
    return folder


def write_tar_of(path: Path, numbers: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            key, extension = os.path.splitext(name_of(number))
            for name, data in ((key + extension.lower(), content(number)), (f"{key}.cls", b"%d" % (number % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_kind(kind: str, folder: Path) -> Path:
    """Write the same samples as an image folder, as tars in another order, or as Parquet sorted by class."""
    if kind == "folder":
        return write_folder(folder)
    if kind == "tar":
        numbers = random.Random(7).sample(range(COUNT), COUNT)
        write_tar_of(folder / "x-0.tar", numbers[:30])
        write_tar_of(folder / "x-1.tar", numbers[30:])
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        return folder
    folder.mkdir()
    numbers = sorted(range(COUNT), key=lambda number: number % 3)
    rows = [(content(number), name_of(number)) for number in numbers]
    path = folder / "x.parquet"
    return write_parquet(path, rows, [number % 3 for number in numbers], names=list(CLASSES), row_group_size=8)


KINDS = ("folder", "tar", "parquet")


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory) -> Path:
    return write_kind(request.param, tmp_path_factory.mktemp(request.param) / "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("one") / "data")


def read_plainly(out: Path) -> list[list[tuple[str, bytes]]]:
    """Return the members of each tar in order, as `tarfile` reads them."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found.append([(member.name, tar.extractfile(member).read()) for member in tar])  # pyright: ignore[reportOptionalMemberAccess]
    return found


def expected_members(seed: int = 0) -> list[tuple[str, bytes]]:
    """Return the members that all tars together must have: a slow reference."""
    samples = {}
    for number in range(COUNT):
        key, extension = os.path.splitext(name_of(number))
        rank = hashlib.blake2b(key.encode(), digest_size=16, salt=seed.to_bytes(16, "little")).digest()
        extension = {".JPEG": ".jpg"}.get(extension, extension)
        samples[rank] = [(key + extension, content(number)), (f"{key}.cls", str(number % 3).encode())]
    return [member for rank in sorted(samples) for member in samples[rank]]


# --- what is written ---------------------------------------------------------------------------------------------------


def test_every_image_is_written_once_byte_for_byte_in_the_order_of_seed_and_keys(source, tmp_path):
    result = packed(source, tmp_path / "out", seed=3)
    tars = read_plainly(tmp_path / "out")
    assert [member for tar in tars for member in tar] == expected_members(seed=3)
    assert [len(tar) // 2 for tar in tars] == [9, 9, 10, 9, 10]  # 47 in 5
    assert (result.num_samples, result.num_shards, result.written, result.left_out) == (COUNT, 5, 5, 0)
    assert result.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_folder_tars_and_parquet_of_the_same_images_give_the_same_tars(tmp_path):
    made = []
    for kind in KINDS:
        packed(write_kind(kind, tmp_path / kind), tmp_path / f"{kind}-out")
        made.append({name: data for name, data in files_of(tmp_path / f"{kind}-out").items() if name != "pack.json"})
    contents = [{name: tar[1024:] for name, tar in each.items() if name.endswith(".tar")} for each in made]
    assert contents[0] == contents[1] == contents[2]  # behind the comment, which has the id of the source
    assert made[0]["classes.txt"] == made[1]["classes.txt"] == made[2]["classes.txt"] == b"ant\nbee\ncat\n"


def test_a_second_run_elsewhere_writes_identical_bytes_with_any_number_of_processes(source, tmp_path):
    moved = tmp_path / "moved" / source.name
    shutil.copytree(source, moved) if source.is_dir() else (moved.parent.mkdir(), shutil.copy(source, moved))
    packed(source, tmp_path / "a", shorter_side=30)
    packed(moved, tmp_path / "b", shorter_side=30, workers=2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_seed_gives_another_order(folder, tmp_path):
    packed(folder, tmp_path / "a", seed=0)
    packed(folder, tmp_path / "b", seed=1)
    a, b = (
        [name for tar in read_plainly(out) for name, _ in tar if not name.endswith(".cls")]
        for out in (tmp_path / "a", tmp_path / "b")
    )
    assert sorted(a) == sorted(b)
    assert sum(one == other for one, other in zip(a, b, strict=True)) < COUNT / 4


@pytest.mark.parametrize(
    ("per_shard", "sizes"),
    [
        (1000, {47: 1}),  # one tar for a small source
        (47, {47: 1}),
        (46, {23: 1, 24: 1}),  # never 46 and 1
        (10, {9: 3, 10: 2}),
        (1, {1: 47}),
    ],
)
def test_tars_have_even_sizes(folder, tmp_path, per_shard, sizes):
    packed(folder, tmp_path / "out", samples_per_shard=per_shard)
    assert Counter(len(tar) // 2 for tar in read_plainly(tmp_path / "out")) == sizes


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_neighbours_have_all_classes_even_if_the_source_is_sorted_by_class(tmp_path, kind):
    """Mixup and CutMix draw partners among 256 neighbours."""
    labels = [number // 300 for number in range(3000)]
    image = encoded(photo(0, 8, 8))
    if kind == "tar":
        with tarfile.open(tmp_path / "sorted.tar", "w") as tar:
            for number, label in enumerate(labels):
                for name, data in ((f"{number}.jpg", image), (f"{number}.cls", b"%d" % label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = tmp_path / "sorted.tar"
    else:
        rows = [(image, f"{number}.jpg") for number in range(3000)]
        data = write_parquet(tmp_path / "sorted.parquet", rows, labels, row_group_size=100)
    packed(data, tmp_path / "out", samples_per_shard=1000)
    found = [label for shard in open_source(tmp_path / "out").shards for label in shard.class_labels]
    assert Counter(found) == Counter(labels)
    for start in range(0, len(found) - 255, 256):
        counts = Counter(found[start : start + 256])
        assert len(counts) == 10
        assert max(counts.values()) < 51  # of 25.6 on average; 51 would be five standard deviations


def test_larger_images_are_shrunk_with_lanczos_and_smaller_ones_are_copied(source, tmp_path):
    packed(source, tmp_path / "out", shorter_side=30, quality=80)
    found = {name: data for tar in read_plainly(tmp_path / "out") for name, data in tar if not name.endswith(".cls")}
    shrunk = 0
    for number in range(COUNT):
        original, key = content(number), os.path.splitext(name_of(number))[0]
        image = Image.open(io.BytesIO(original)).convert("RGB")
        width, height = image.size
        if min(width, height) <= 30:
            assert found[key + (".png" if number % 5 == 0 else ".jpg")] == original
            continue
        buffer = io.BytesIO()
        size = (30 * width // min(width, height), 30 * height // min(width, height))
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80, subsampling="4:2:0")
        assert found[f"{key}.jpg"] == buffer.getvalue()
        shrunk += 1
    assert 20 < shrunk < COUNT


def test_a_source_without_classes_gets_neither_labels_nor_class_names(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(content(1))
    packed(tmp_path / "flat", tmp_path / "out")
    assert sorted(name for name, _ in read_plainly(tmp_path / "out")[0]) == ["0.jpg", "1.jpg", "2.jpg"]
    assert not (tmp_path / "out/classes.txt").exists()


def test_only_samples_with_a_label_have_one(tmp_path):
    packed(write_tars(tmp_path / "data", unlabelled=4), tmp_path / "out")
    source, other = open_source(tmp_path / "data"), open_source(tmp_path / "out")
    labels = {key: label for shard in source.shards for key, label in zip(shard.keys, shard.class_labels, strict=True)}
    assert {
        key: label for shard in other.shards for key, label in zip(shard.keys, shard.class_labels, strict=True)
    } == labels
    assert None in labels.values()


# --- who reads it ------------------------------------------------------------------------------------------------------


def test_the_hashes_are_those_of_sha256sum(folder, tmp_path):
    packed(folder, tmp_path / "out")
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert listed == set(files_of(tmp_path / "out")) - {"SHA256SUMS", SIDECAR_NAME}
    assert {"classes.txt", "_info.json", "pack.json", "train-000004.tar"} <= listed


READERS = """
import collections, glob, json
from timm.data import create_dataset
from webdataset import WebDataset

tars = sorted(glob.glob("*.tar"))
labels = {sample["__key__"]: int(sample["cls"]) for sample in WebDataset(tars, shardshuffle=False)}
dataset = create_dataset("wds/x", root=".", split="val", is_training=False, batch_size=1)
print(json.dumps([labels, len(dataset), collections.Counter(int(label) for _, label in dataset)]))
"""


def test_we_webdataset_and_timm_read_it(folder, tmp_path):
    packed(folder, tmp_path / "out", prefix="val")
    ours = open_source(tmp_path / "out")
    assert ours.class_names == CLASSES
    labels = {sample.key: sample.class_label for shard in ours.shards for sample in shard}
    done = subprocess.run(
        [sys.executable, "-c", READERS], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs, timms, counts = json.loads(done.stdout)
    assert labels == theirs
    assert len(labels) == timms == COUNT
    assert {int(label): number for label, number in counts.items()} == Counter(labels.values())


@pytest.mark.slow
def test_a_packed_source_is_labelled_and_trained_from(folder, tmp_path):
    from trainer.config import TrainConfig
    from trainer.loop import train

    packed(folder, tmp_path / "out")
    label_set = make_labels(tmp_path / "labels", str(tmp_path / "out"))
    assert len(label_set.shards) == 5
    assert sum(len(label_set.samples(name)) for name in label_set.shards) == COUNT
    tiny: dict[str, Any] = {"model": "deit-ti", "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    settings: dict[str, Any] = {"batch_size": 12, "epochs": 1, "warmup_epochs": 0, "workers": 0, "device": "cpu"}
    train(TrainConfig(labels=tmp_path / "labels", output=tmp_path / "run", **tiny, **settings))
    assert (tmp_path / "run/last").is_dir()


def test_a_source_behind_a_url_gives_the_same_bytes(tmp_path):
    source = write_kind("parquet", tmp_path / "web")
    packed(source, tmp_path / "local")
    with web_server(tmp_path / "web") as server:
        packed(f"{server.url}/x.parquet", tmp_path / "remote", workers=1)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "remote")


def test_a_source_behind_a_url_is_received_once(tmp_path):
    write_kind("tar", tmp_path / "web")
    with web_server(tmp_path / "web") as server:
        packed(f"{server.url}/x-{{0..1}}.tar", tmp_path / "out")
        asked = Counter({name: number for name, number in server.requests.items() if name.endswith(".tar")})
    assert set(asked.values()) == {1}, asked


def test_a_row_group_is_read_once_although_the_order_is_shuffled(tmp_path, monkeypatch):
    source, groups, real = write_kind("parquet", tmp_path / "data"), [], ParquetShard._read_group
    monkeypatch.setattr(ParquetShard, "_read_group", lambda self, *where: groups.append(where) or real(self, *where))
    monkeypatch.setattr("pipeline.images.parquet.CACHE_BYTES", 1)
    packed(source, tmp_path / "out")
    assert groups == [(group, "image.bytes") for group in range(6)]


# --- images that cannot be decoded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shorter", [None, 20])
def test_a_bad_image_stops_the_run_or_is_left_out_or_copied(tmp_path, caplog, shorter):
    source = write_tars(tmp_path / "data", bad=(3, 15))
    with pytest.raises(SourceError, match=r"train-000000: image 'img-0003': .*pass --on-bad-image skip"):
        packed(source, tmp_path / "out", shorter_side=shorter)
    # The same folder continues with `skip`: nothing of a bad image was kept.
    result = packed(source, tmp_path / "out", shorter_side=shorter, on_bad_image="skip")
    assert (result.num_samples, result.left_out) == (21, 2)
    assert (
        "2 of 23 images cannot be decoded and are left out (left-out.jsonl lists them): img-0003, img-0015"
        in caplog.text
    )
    lines = [json.loads(line) for line in (tmp_path / "out/left-out.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["img-0003", "img-0015"]
    assert "damaged or truncated" in lines[0]["reason"]
    names = [name for tar in read_plainly(tmp_path / "out") for name, _ in tar]
    assert len(names) == 42
    assert "img-0003.jpg" not in names
    kept = packed(source, tmp_path / "kept", shorter_side=shorter, on_bad_image="keep")
    assert (kept.num_samples, kept.left_out) == (23, 0)
    bad = next(data for tar in read_plainly(tmp_path / "kept") for name, data in tar if name == "img-0003.jpg")
    assert bad == encoded(photo(3))[: len(encoded(photo(3))) // 2]


def test_fail_refuses_what_an_interrupted_run_with_skip_left_out(tmp_path, monkeypatch):
    source = write_tars(tmp_path / "data", bad=(3,))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(source, tmp_path / "out", on_bad_image="skip")
    with pytest.raises(SourceError, match="image 'img-0003'"):
        packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "out", on_bad_image="skip").left_out == 1


def test_a_source_without_a_good_image_is_refused(tmp_path):
    source = write_tars(tmp_path / "data", (2,), bad=(0, 1))
    with pytest.raises(SourceError, match="no image can be decoded"):
        packed(source, tmp_path / "out", on_bad_image="skip")


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_a_dot_in_a_key_is_refused_or_replaced(tmp_path):
    write_folder(tmp_path / "data", 3)
    (tmp_path / "data/ant/v1.5.jpg").write_bytes(content(1))
    refusal = (
        "images-000000: sample key 'ant/v1.5' cannot name a file in a WebDataset tar: its last part may have no dot, which is"
        " where WebDataset ends a key. Pass --replace-dots, which puts _ for each, or rename the image"
    )
    for call in (packed, lambda source, out: plan_pack(str(source), out, config())):
        with pytest.raises(SourceError) as refused:
            call(tmp_path / "data", tmp_path / "out")
        assert str(refused.value) == refusal
    packed(tmp_path / "data", tmp_path / "dots", replace_dots=True)
    assert "ant/v1_5.jpg" in [name for name, _ in read_plainly(tmp_path / "dots")[0]]


def test_two_keys_that_become_one_are_refused(tmp_path):
    for name in ("a.b", "a_b"):
        (tmp_path / "data/ant").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/ant/{name}.jpg").write_bytes(content(1))
    with pytest.raises(SourceError, match="sample key 'ant/a_b' stands twice"):
        packed(tmp_path / "data", tmp_path / "out", replace_dots=True)


def test_a_key_that_two_source_shards_use_is_refused_or_gets_the_name_of_its_shard(tmp_path):
    for part in ("a", "b"):
        write_tar_of(tmp_path / f"data/{part}.tar", [1, 2])
    with pytest.raises(SourceError) as refused:
        packed(tmp_path / "data", tmp_path / "out")
    assert str(refused.value) in {
        f"sample key 'bee/image-001' stands twice, in source shard {one} and in {other} (2 keys in all). Pass --prefix-keys,"
        " which puts the name of the source shard before each key"
        for one, other in ("ab", "ba")
    } | {
        f"sample key 'cat/image-002' stands twice, in source shard {one} and in {other} (2 keys in all). Pass --prefix-keys,"
        " which puts the name of the source shard before each key"
        for one, other in ("ab", "ba")
    }
    packed(tmp_path / "data", tmp_path / "prefixed", prefix_keys=True)
    names = {name for name, _ in read_plainly(tmp_path / "prefixed")[0] if name.endswith(".jpg")}
    assert names == {f"{part}/{key}.jpg" for part in "ab" for key in ("bee/image-001", "cat/image-002")}


# --- the folder -----------------------------------------------------------------------------------------------------------


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def begun(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Begin to pack, and stop after two tars."""
    real, written = packing.publish_file, []

    def publish(path: Path, made: Any) -> bool:
        if path.suffix == ".tar" and len(written) == 2:
            raise KeyboardInterrupt
        written.extend([path] if path.suffix == ".tar" else [])
        return real(path, made)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish_file", publish)
        with pytest.raises(KeyboardInterrupt):
            packed(source, out, **settings)


def test_nothing_can_be_read_before_everything_is_there(source, tmp_path, monkeypatch):
    """A half of a data set is not trained on by mistake."""
    begun(source, tmp_path / "out", monkeypatch)
    assert os.listdir(tmp_path / "out") == [".pack"]
    with pytest.raises(SourceError, match="no image in this folder"):
        open_source(tmp_path / "out")


def test_an_interrupted_run_is_continued(source, tmp_path, monkeypatch):
    packed(source, tmp_path / "whole")
    begun(source, tmp_path / "out", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(pack_rows, "_usable", lambda *_: pytest.fail("an image was read again"))
        result = packed(source, tmp_path / "out")
    assert (result.written, result.num_shards) == (3, 5)
    assert "2 tars of them there before" in result.line
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_complete_pack_is_left_alone(source, tmp_path):
    packed(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = packed(source, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert result.written == 0
    assert result.line.endswith("it was complete already")


def test_a_tar_that_was_deleted_is_written_again(folder, tmp_path):
    packed(folder, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out/train-000002.tar").unlink()
    assert packed(folder, tmp_path / "out").written == 1
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "with --seed 0, this run asks for 1"),
        ({"samples_per_shard": 9}, "with --samples-per-shard 10, this run asks for 9"),
        ({"shorter_side": 9}, "with --shorter-side left out, this run asks for 9"),
        ({"prefix": "val"}, "with --prefix train, this run asks for val"),
        ({"prefix_keys": True}, "with --prefix-keys off, this run asks for on"),
        ({"on_bad_image": "keep"}, "with --on-bad-image fail or skip, this run asks for keep"),
    ],
)
def test_other_options_are_refused_by_name(folder, tmp_path, monkeypatch, complete, changed, said):
    packed(folder, tmp_path / "out") if complete else begun(folder, tmp_path / "out", monkeypatch)
    before = files_of(tmp_path / "out")
    with pytest.raises(UsageError) as refused:
        packed(folder, tmp_path / "out", **changed)
    verb = "was packed" if complete else "was begun"
    assert str(refused.value) == f"{tmp_path}/out {verb} {said}. Pass the same options again, or choose another folder"
    assert files_of(tmp_path / "out") == before


def test_another_source_is_refused(folder, tmp_path, monkeypatch):
    other = write_folder(tmp_path / "other", COUNT - 1)
    begun(folder, tmp_path / "out", monkeypatch)
    with pytest.raises(UsageError, match=f"was begun from {folder}, this run asks for {other}: choose another folder"):
        packed(other, tmp_path / "out")
    packed(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="was packed from another source: the keys and labels of that one have the id"):
        packed(other, tmp_path / "out")


@pytest.mark.parametrize("shorter", [None, 30])
def test_a_folder_that_got_more_images_meanwhile_is_refused(tmp_path, monkeypatch, shorter):
    source = write_folder(tmp_path / "data")
    begun(source, tmp_path / "out", monkeypatch, shorter_side=shorter)
    (source / "ant/new.jpg").write_bytes(content(1))
    with pytest.raises(SourceError) as refused:
        packed(source, tmp_path / "out", shorter_side=shorter)
    assert str(refused.value) == (
        "source shard images-000000 has other samples than when this pack was begun."
        f" Delete {tmp_path}/out/.pack and run the same command again"
    )
    shutil.rmtree(tmp_path / "out/.pack")
    assert packed(source, tmp_path / "out", shorter_side=shorter).num_samples == COUNT + 1


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_file_that_changes_while_it_is_packed_is_refused(tmp_path, monkeypatch, kind):
    source = write_kind(kind, tmp_path / "data")
    begun(source, tmp_path / "out", monkeypatch)
    for path in source.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    with pytest.raises(
        SourceError, match=r"is not the file that it was when this pack was begun. Delete .*/out/.pack and"
    ):
        packed(source, tmp_path / "out")


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n[2]\n", b"\xff"])
def test_what_an_earlier_run_kept_is_checked(folder, tmp_path, monkeypatch, damage):
    begun(folder, tmp_path / "out", monkeypatch)
    kept = tmp_path / "out/.pack/read/images-000000.jsonl"
    kept.write_bytes(damage)
    with pytest.raises(
        SourceError, match=r"images-000000.jsonl is not the file that was written when this pack was begun"
    ):
        packed(folder, tmp_path / "out")


@pytest.mark.parametrize("shorter", [None, 30])
def test_a_row_of_a_stranger_does_not_name_a_file_elsewhere(folder, tmp_path, monkeypatch, shorter):
    begun(folder, tmp_path / "out", monkeypatch, shorter_side=shorter)
    kept = tmp_path / "out/.pack/read/images-000000.jsonl"
    (tmp_path / "secret").write_bytes(b"secret")
    head, *rows = kept.read_text().splitlines()
    key, label, *_ = json.loads(rows[0])
    rows[0] = json.dumps([key, label, str(tmp_path / "secret"), 0, 6, 0])
    kept.write_text("\n".join([head, *rows]) + "\n")
    with pytest.raises(SourceError, match="secret is not the file that it was when this pack was begun"):
        packed(folder, tmp_path / "out", shorter_side=shorter)


def test_a_pack_json_of_somebody_else_is_refused(folder, tmp_path):
    packed(folder, tmp_path / "out")
    about = json.loads((tmp_path / "out/pack.json").read_text())
    for changed in ([], {}, about | {"num_shards": "5"}):
        (tmp_path / "out/pack.json").write_text(json.dumps(changed))
        with pytest.raises(StorageError, match=r"out/pack.json was not written by deit-cli pack: move it away"):
            packed(folder, tmp_path / "out")


def test_a_folder_with_other_things_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="out is not empty and holds no pack: choose another folder"):
        packed(folder, tmp_path / "out")
    with pytest.raises(UsageError, match=r"notes.txt is a file: choose a folder"):
        packed(folder, tmp_path / "out/notes.txt")
    assert files_of(tmp_path / "out") == {"notes.txt": b"mine"}


def test_a_tar_of_somebody_else_is_not_taken_for_ours(folder, tmp_path, monkeypatch):
    begun(folder, tmp_path / "out", monkeypatch)
    shutil.copy(Path(write_tars(tmp_path / "x")) / "train-000000.tar", tmp_path / "out/train-000004.tar")
    with pytest.raises(StorageError, match=r"train-000004.tar is not a tar of this pack: move it away"):
        packed(folder, tmp_path / "out")


def test_two_processes_do_not_pack_into_one_folder(folder, tmp_path):
    (tmp_path / "out/.pack").mkdir(parents=True)
    with (
        locked(tmp_path / "out/.pack/lock"),
        pytest.raises(UsageError, match=r"another process packs into .*/out: wait for it, or choose another folder"),
    ):
        packed(folder, tmp_path / "out")


# --- the command ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source, tmp_path):
    arguments = ("pack", str(source), str(tmp_path / "out"), "--dry-run", "-j", "0", "--samples-per-shard", "10")
    code, said = invoke(*arguments, "--shorter-side", "64")
    assert code == 0
    assert "47, 9 or 10 in each tar" in said
    assert "5 in " in said
    assert "train-000000.tar to train-000004.tar" in said
    assert "shorter side at most 64 px (Lanczos, JPEG quality 95), shuffled with seed 0" in said
    code, said = invoke(*arguments, "--json")
    assert json.loads(said)["num_shards"] == 5
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(folder, tmp_path):
    code, said = invoke("pack", str(folder), str(tmp_path / "out"), "-j", "0")
    assert code == 0
    assert said.startswith(f"{tmp_path}/out: 47 images in 1 tar, ")
    assert said.endswith(" images/s\n")
    code, said = invoke("pack", str(folder), str(tmp_path / "json"), "-j", "0", "--json")
    assert json.loads(said) | {"seconds": 0} == {
        "folder": f"{tmp_path}/json",
        "num_samples": 47,
        "num_shards": 1,
        "num_bytes": (tmp_path / "json/train-000000.tar").stat().st_size,
        "left_out": 0,
        "written": 1,
        "seconds": 0,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quality": 90}, "--quality is that of the images that --shorter-side shrinks: pass it too"),
        ({"prefix": "../x"}, "--prefix must have 1 to 100 characters"),
        ({"prefix": ".x"}, "begin with a letter, digit or _, got '.x'"),
        ({"samples_per_shard": 0}, "--samples-per-shard must be in 1..1000000, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        config(**settings)


# --- memory -----------------------------------------------------------------------------------------------------------------


def reads(shards: int, samples: int) -> Iterator[pack_rows.Read]:
    for shard in range(shards):
        row = '["%012d",1,"/a/folder/of/some/length/train-000000.tar",123456789,123456,1234567890123456789]\n'
        rows = "".join(row % (shard * samples + number) for number in range(samples)).encode()
        yield pack_rows.Read(f"shard-{shard}", samples, "0" * 64, rows, [])


def test_the_order_takes_less_than_100_bytes_for_each_sample(tmp_path):
    shards, samples = 100, 2000
    with (tmp_path / "rows").open("w+b") as file:
        tracemalloc.start()
        rows = pack_rows.Rows(file, 0)
        for read in reads(shards, samples):
            rows.add(read)
        del read
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        rows.sort()
        after, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    each = np.array([before, highest, after]) / (shards * samples)
    assert each[0] < 24
    assert each[1] < 80
    assert each[2] < 20
    assert len(rows) == shards * samples


# --- killed -----------------------------------------------------------------------------------------------------------------


def run(source: object, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import cli; cli.main()", "pack", str(source), str(out), *options]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, env=with_checkout(OMP_NUM_THREADS="1"), stdout=log, stderr=log, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--on-bad-image", "keep"), ("--shorter-side", "24")])
def test_killed_at_any_moment_the_same_command_completes_identical_bytes(tmp_path, options):
    """Kills follow progress: the first comes when source shards are read, the others when so many tars are there."""
    source = write_folder(tmp_path / "data", 3000)
    options = (*options, "--samples-per-shard", "20", "-j", "2")
    assert run(source, tmp_path / "whole", *options).wait() == 0
    out, rng, killed = tmp_path / "out", random.Random(0), 0
    for goal in (0, 1, 50, 100, 149):
        with run(source, out, *options) as running:

            def there(goal: int = goal, running: subprocess.Popen[bytes] = running) -> bool:
                tars = [*out.glob("*.tar"), *out.glob(".pack/tars/*.tar")]
                come = len(tars) >= goal if goal else any(out.glob(".pack/read/*"))
                return come or running.poll() is not None

            wait_until(there, "the run comes to its place")
            time.sleep(rng.random() * 0.05)
            kill(running.pid)
        killed += running.returncode == -signal.SIGKILL
        assert running.returncode in (0, -signal.SIGKILL), out.with_suffix(".log").read_text()
    assert killed >= 3
    assert run(source, out, *options).wait() == 0, out.with_suffix(".log").read_text()
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_continues(tmp_path):
    source, out = write_folder(tmp_path / "data", 3000), tmp_path / "out"
    options = ("--samples-per-shard", "10", "-j", "1")
    with run(source, out, *options) as running:
        wait_until(lambda: any(out.glob(".pack/tars/*.tar")), "the run writes tars")
        running.send_signal(signal.SIGINT)
    assert running.returncode == 130
    assert out.with_suffix(".log").read_text().splitlines()[-1] == "stopped; the same command continues"
    assert run(source, out, *options).wait() == 0
    assert not (out / ".pack").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10/train-00000-of-00001.parquet", "imagenet-sample"])
def test_real_data_is_packed_twice_with_identical_bytes(tmp_path, name):
    data = shared_data(name)
    settings: dict[str, Any] = {"samples_per_shard": 1000, "workers": 2}
    first, second = (pack(str(data), tmp_path / out, PackConfig(**settings)) for out in ("a", "b"))
    assert first.num_samples == second.num_samples
    assert (tmp_path / "a/SHA256SUMS").read_bytes() == (tmp_path / "b/SHA256SUMS").read_bytes()
    images = {
        hashlib.sha256(sample.image).digest(): sample.class_label
        for shard in open_source(data).shards
        for sample in shard
    }
    again = {
        hashlib.sha256(sample.image).digest(): sample.class_label
        for shard in open_source(tmp_path / "a").shards
        for sample in shard
    }
    assert images == again
