"""Remote sources and label sets: what is read through the cache is what lies on the disk, or refused by name."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from support.builders import files_of, make_labels, small_recipe, write_tars
from support.label_sets import coloured_png, make_label_set, problems_in, read_everything, seal_again, write_source
from support.training import TINY, assert_same_state, content
from support.web_server import web_server

import cli
from pipeline.errors import LabelSetCorrupt, LabelSetError, LabelSetIncomplete, LabelSetMismatch, SourceError
from pipeline.images.source import Source, open_source
from pipeline.labels.checked_files import CheckedFiles
from pipeline.labels.comparing import check_source, record_of
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import FileEntry
from pipeline.labels.replay import check_replay
from pipeline.storage import remote
from pipeline.storage.cache import Cache
from pipeline.storage.place import RemoteFile
from pipeline.storage.prefetch import Prefetch
from pipeline.views.pairs import count_pairs
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.order import Order
from trainer.stream import BatchRenderer, Catalogue

TARS = "images/train-{0..1}.tar"
FIRST = "set/labels/views-00000-00001/train-0.parquet"
SECOND = "set/labels/views-00000-00001/train-1.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images in tars and Parquet, and the label set of the tars."""
    root = tmp_path_factory.mktemp("made")
    write_source(root / "images")
    make_label_set(root / "images", root / "set")
    (root / "parquet").mkdir()
    for part in range(2):
        images = [{"bytes": coloured_png(10 * part + row), "path": f"p{part}-{row}.png"} for row in range(3)]
        table = pa.table({"image": images, "label": pa.array([0, 1, 2])})
        pq.write_table(table, root / "parquet" / f"part-{part}.parquet")
    return root


@pytest.fixture
def server(made, tmp_path):
    with web_server(Path(shutil.copytree(made, tmp_path / "web"))) as running:
        yield running


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 10**9)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01))


@pytest.fixture
def bucket(made):
    """The same files where folders can be listed, as in an object store."""
    system = fsspec.filesystem("memory")
    for name, data in files_of(made).items():
        system.pipe(f"/bucket/{name}", data)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def everything(source: Source) -> list:
    samples = [(shard.name, shard[row]) for shard in source.shards for row in range(len(shard))]
    return [source.kind, source.class_names, source.source_id, *samples]


# Sources.


@pytest.mark.parametrize("name", [TARS, "images/train-0.tar", "parquet/part-{0..1}.parquet", "parquet/part-1.parquet"])
def test_a_remote_source_is_the_local_one(server, made, cache, name):
    far = open_source(f"{server.url}/{name}", cache=cache)
    assert everything(pickle.loads(pickle.dumps(far))) == everything(open_source(made / name))
    assert far.is_remote
    assert name.startswith("parquet") or max(server.requests.values()) == 1


@pytest.mark.parametrize("name", ["images", "images/", "parquet"])
def test_a_folder_is_listed_where_that_is_possible(bucket, made, cache, name):
    assert everything(open_source(f"{bucket}/{name}", cache=cache)) == everything(open_source(made / name))


def test_opening_tars_downloads_none(server, cache):
    open_source(f"{server.url}/{TARS}", cache=cache)
    assert server.requests == {"images/classes.txt": 1}


def test_opening_parquet_receives_footers_where_the_server_gives_ranges(server, cache, tmp_path):
    (server.folder / "large").mkdir()
    large = server.folder / "large/0.parquet"
    images = pa.array([{"bytes": os.urandom(10**6), "path": f"{row}.png"} for row in range(6)])
    pq.write_table(pa.table({"image": images}), large, row_group_size=3)
    server.ranges = True
    source = open_source(f"{server.url}/large/0.parquet", cache=cache)
    assert server.sent_bytes < 2 * 2**20 < large.stat().st_size
    assert not cache.folder.exists()
    assert everything(source) == everything(open_source(large))


@pytest.mark.parametrize("ranges", [True, False])
def test_names_of_classes_are_read_from_all_remote_parquet_files(server, cache, ranges):
    server.ranges = ranges
    (server.folder / "names").mkdir()
    for number, names in enumerate((["dog", "bird"], ["cat", "dog"])):
        images = pa.array([{"bytes": coloured_png(row), "path": f"{number}-{row}.png"} for row in range(2)])
        pq.write_table(pa.table({"image": images, "label": names}), server.folder / f"names/{number}.parquet")
    source = open_source(f"{server.url}/names/{{0..1}}.parquet", cache=cache)
    assert source.class_names == ("bird", "cat", "dog")
    assert [shard.class_labels for shard in source.shards] == [(2, 0), (1, 2)]


@pytest.mark.parametrize("ranges", [True, False])
def test_remote_parquet_that_is_missing_or_damaged_is_named(server, cache, ranges):
    server.ranges = ranges
    with pytest.raises(SourceError, match=rf"{server.url}/parquet/part-7\.parquet: there is no such file \(404\)"):
        open_source(f"{server.url}/parquet/part-7.parquet", cache=cache)
    (server.folder / "parquet/part-0.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(SourceError, match=rf"{server.url}/parquet/part-0\.parquet: damaged, or not Parquet"):
        open_source(f"{server.url}/parquet/part-0.parquet", cache=cache)
    server.always["parquet/part-1.parquet"] = 503
    with pytest.raises(SourceError, match=r"part-1\.parquet: gave up after 3 tries"):
        open_source(f"{server.url}/parquet/part-1.parquet", cache=cache)


@pytest.mark.parametrize("status", [404, 403])
def test_tars_without_class_names_are_read(server, made, cache, status, tmp_path):
    """A store that may not be listed answers 403 for what is not there."""
    server.always["images/classes.txt"] = status
    shutil.copytree(made / "images", tmp_path / "images")
    (tmp_path / "images/classes.txt").unlink()
    far = open_source(f"{server.url}/{TARS}", cache=cache)
    assert everything(far) == everything(open_source(tmp_path / TARS))


def test_a_folder_of_a_web_server_cannot_be_listed(server, cache):
    with pytest.raises(SourceError, match=r"/images: a web server has no list of its files: name them, as in train-\{"):
        open_source(f"{server.url}/images", cache=cache)


def test_single_images_are_not_read_from_afar(cache):
    system = fsspec.filesystem("memory")
    system.pipe("/photos/ant/1.png", coloured_png(1))
    system.pipe("/flat/1.png", coloured_png(1))
    for url in ("memory://photos", "memory://flat"):
        with pytest.raises(
            SourceError, match=f"{url}: no .tar or .parquet file in this folder. .* pack them into tars"
        ):
            open_source(url, cache=cache)
    system.pipe("/flat/a.tar", b"")
    with pytest.raises(SourceError, match=r"holds both images \(1\.png\) and a\.tar"):
        open_source("memory://flat", cache=cache)


def test_a_folder_that_is_not_there_is_named(cache):
    with pytest.raises(SourceError, match="memory://nothing: there is no such file"):
        open_source("memory://nothing", cache=cache)


def test_a_missing_tar_is_named_when_it_is_used(server, cache):
    source = open_source(f"{server.url}/images/train-{{0..2}}.tar", cache=cache)
    with pytest.raises(SourceError, match=rf"{server.url}/images/train-2\.tar: there is no such file \(404\)"):
        source.shards[2].keys  # noqa: B018


def test_a_damaged_tar_is_named_by_its_address(server, cache):
    path = server.folder / "images/train-0.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SourceError, match=rf"{server.url}/images/train-0\.tar: byte .* cut off"):
        open_source(f"{server.url}/images/train-0.tar", cache=cache).shards[0].keys  # noqa: B018


def test_files_to_fetch_ahead_are_named_for_what_is_remote(server, made, cache):
    far, near = open_source(f"{server.url}/{TARS}", cache=cache), open_source(made / "images")
    assert far.remote_files("train-1") == (RemoteFile(f"{server.url}/images/train-1.tar", cache),)
    assert near.remote_files("train-1") == ()
    labels = LabelSet.open(f"{server.url}/set", cache=cache)
    assert [file.url for file in labels.remote_files("train-1", 1)] == [
        f"{server.url}/set/samples/train-1.parquet",
        f"{server.url}/{SECOND}",
    ]
    assert LabelSet.open(made / "set").remote_files("train-1", 1) == ()
    files = [*far.remote_files("train-0"), *labels.remote_files("train-0", 0)]
    with Prefetch(files) as ahead:
        ahead.wait()
    before = dict(server.requests)
    labels.read("train-0", 0), far.shards[0].keys
    assert server.requests == before


def test_a_sample_that_is_not_there_is_an_error_of_ours(made):
    """A shorter copy of a tar, say: its keys are not compared before."""
    with pytest.raises(SourceError, match="source shard train-0 has 5 samples, there is no sample 5 in it"):
        open_source(made / "images").shards[0][5]


def test_a_url_stays_what_it_is_in_the_record(server, cache):
    url = f"{server.url}/{TARS}"
    assert record_of(open_source(url, cache=cache)).location == url


# Label sets.


def entry_of(opened: LabelSet, name: str) -> FileEntry:
    return next(entry for entry in opened.manifest.files if f"set/{entry.path}" == name)


def test_a_remote_label_set_is_the_local_one(server, made, cache):
    far = LabelSet.open(f"{server.url}/set", cache=cache)
    for opened in (far, pickle.loads(pickle.dumps(far))):
        assert list(read_everything(opened)) == list(read_everything(LabelSet.open(made / "set")))
    assert max(server.requests.values()) == 1
    assert problems_in(far) == []
    assert set(server.requests.values()) == {2}  # verify reads what the server has now, not the cache


def test_a_remote_label_set_fits_a_remote_source_without_a_download_of_all(server, cache):
    labels, source = LabelSet.open(f"{server.url}/set", cache=cache), open_source(f"{server.url}/{TARS}", cache=cache)
    check_source(labels, source)
    assert not any(name.endswith(".tar") for name in server.requests)
    assert check_replay(labels, source) == 0


def test_other_remote_shards_are_refused(server, cache):
    labels = LabelSet.open(f"{server.url}/set", cache=cache)
    for name, difference in (
        ("images/train-0.tar", "the copy lacks the shard 'train-1'"),
        ("parquet/part-0.parquet", "the labelled classes have names, those of the copy have no names"),
    ):
        with pytest.raises(LabelSetMismatch, match=rf"is another: {difference}.*Pass the --data"):
            check_source(labels, open_source(f"{server.url}/{name}", cache=cache))


def test_a_label_set_in_a_bucket_is_read(bucket, made, cache):
    opened = LabelSet.open(f"{bucket}/set", cache=cache)
    assert list(read_everything(opened)) == list(read_everything(LabelSet.open(made / "set")))


def test_what_is_no_label_set_is_said(server, cache):
    with pytest.raises(LabelSetError, match=rf"{server.url}/images is not a label set: it has no plan\.json"):
        LabelSet.open(f"{server.url}/images", cache=cache)
    (server.folder / "set/manifest.json").unlink()
    with pytest.raises(LabelSetIncomplete, match=rf"{server.url}/set has no manifest\.json"):
        LabelSet.open(f"{server.url}/set", cache=cache)


def test_plan_and_manifest_are_read_as_they_are_now(server, cache):
    before = LabelSet.open(f"{server.url}/set", cache=cache)
    seal_again(server.folder / "set", lambda manifest: manifest.update(probes=[]))
    assert LabelSet.open(f"{server.url}/set", cache=cache).manifest != before.manifest


@pytest.mark.parametrize("name", ["set/plan.json", "set/manifest.json"])
def test_a_cut_plan_or_manifest_is_refused(server, cache, name):
    server.always[name] = "cut-unannounced"
    with pytest.raises((LabelSetError, remote.StorageError), match=rf"{server.url}/{name}: not valid JSON"):
        LabelSet.open(f"{server.url}/set", cache=cache)


def test_a_manifest_cannot_lead_elsewhere(server, cache):
    for shard in ("../plan", "/etc/passwd", "http://127.0.0.1/x", "a/b"):
        seal_again(server.folder / "set", lambda manifest, shard=shard: manifest["files"][0].update(shard=shard))
        with pytest.raises(LabelSetCorrupt, match=r"manifest\.json: files\.0\.shard: String should match pattern"):
            LabelSet.open(f"{server.url}/set", cache=cache)


@pytest.mark.parametrize("fault", ["flip", 404])
def test_a_label_shard_that_is_not_the_promised_one_is_refused_by_its_address(server, cache, fault):
    server.always[FIRST] = fault
    opened = LabelSet.open(f"{server.url}/set", cache=cache)
    text = r"has SHA-256 .*…, .*… is promised" if fault == "flip" else "there is no such file"
    with pytest.raises(LabelSetCorrupt, match=rf"{server.url}/{FIRST}:? {text}"):
        opened.read("train-0", 0)
    assert len(opened.read("train-1", 0)) == 4
    assert len(problems_in(opened)) == 1


def test_a_label_shard_that_is_replaced_in_the_middle_of_a_run_is_refused(server, cache):
    """Fault 21. What was verified goes on; what must be fetched again is compared with the manifest of the beginning."""
    opened = LabelSet.open(f"{server.url}/set", cache=cache)
    rows = opened.read("train-0", 0)
    shutil.copy(server.folder / SECOND, server.folder / FIRST)
    assert np.array_equal(opened.read("train-0", 0).hard, rows.hard)
    shutil.rmtree(cache.folder)
    with pytest.raises(
        LabelSetCorrupt,
        match=rf"{server.url}/{FIRST} has .* are promised: it was cut, changed or replaced\. Ask the publisher of the set",
    ):
        pickle.loads(pickle.dumps(opened)).read("train-0", 0)
    seal_again(server.folder / "set")
    with pytest.raises(
        LabelSetCorrupt, match=r"the manifest has changed since it was opened: its content_sha256 was \w{12}…, now"
    ):
        pickle.loads(pickle.dumps(opened)).read("train-0", 0)


def test_a_copy_that_this_disk_damages_is_fetched_again(server, cache):
    opened = LabelSet.open(f"{server.url}/set", cache=cache)
    rows = opened.read("train-0", 0)
    copy = cache.fetch(f"{server.url}/{FIRST}", opened.file_of(entry_of(opened, FIRST)).promise)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).read("train-0", 1).row, rows.row)
    assert server.requests[FIRST] == 2


@pytest.mark.parametrize("same_length", [True, False])
def test_a_local_label_shard_that_is_replaced_in_the_middle_of_a_run_is_refused(made, tmp_path, same_length):
    """Fault 21, with the very date of the old file too."""
    folder = Path(shutil.copytree(made / "set", tmp_path / "set"))
    opened, path = LabelSet.open(folder), tmp_path / FIRST
    opened.read("train-0", 0)
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if same_length else data[:-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(LabelSetCorrupt, match=f"{FIRST} has {'SHA-256' if same_length else '.* bytes'}"):
            opened.read("train-0", 1)


def test_views_of_one_shard_in_a_row_read_the_file_once(made, monkeypatch):
    opened = LabelSet.open(made / "set")
    checked: list[str] = []
    check = CheckedFiles._check_bytes
    monkeypatch.setattr(
        CheckedFiles,
        "_check_bytes",
        lambda self, entry, file: checked.append(str(entry.path)) or check(self, entry, file),
    )
    for view in (0, 1, 0, 1):
        opened.read("train-0", view)
    assert checked == ["samples/train-0.parquet", "labels/views-00000-00001/train-0.parquet"]
    monkeypatch.setattr("pipeline.labels.checked_files.RECENT_BYTES", 1)
    for shard in ("train-0", "train-1", "train-0", "train-0"):
        opened.read(shard, 0)
    assert checked[2:] == [
        "samples/train-1.parquet",
        "labels/views-00000-00001/train-1.parquet",
        "labels/views-00000-00001/train-0.parquet",
    ]


def test_the_command_line_looks_into_a_remote_set(server, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = CliRunner()
    info = runner.invoke(cli.commands, ["labels", "info", "--json", f"{server.url}/set"], catch_exceptions=False)
    assert json.loads(info.stdout)["views"] == [0, 4]
    verify = ["labels", "verify", f"{server.url}/set", "--data", f"{server.url}/{TARS}"]
    result = runner.invoke(cli.commands, verify, catch_exceptions=False)
    assert "6 files: lengths, hashes, schemas and rows match the manifest" in result.stdout
    assert "every pixel equal" in result.stdout
    assert (tmp_path / "deit-cli").is_dir()


# Training.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    make_labels(root / "set", write_tars(root / "images", (12, 8), unlabelled=5), topk=2)
    return root


def renderer_of(labels: LabelSet, source: Source) -> tuple[BatchRenderer, int]:
    recipe = small_recipe()
    units = tuple(count_pairs(recipe, labels.samples(name).usable) for name in labels.shards)
    order = Order(shard_units=units, unit_size=2, views=labels.views, batch_size=6, repeated_aug=1, window=2, seed=0)
    return BatchRenderer(Catalogue(source, labels), recipe, order), order.steps_per_epoch


def test_an_epoch_from_afar_is_the_epoch_from_here(trained, cache):
    near, steps = renderer_of(LabelSet.open(trained / "set"), open_source(trained / "images"))
    with web_server(trained) as server:
        labels = LabelSet.open(f"{server.url}/set", cache=cache)
        source = open_source(f"{server.url}/images/train-{{000000..000001}}.tar", cache=cache)
        far, _ = renderer_of(labels, source)
        for index in range(steps):
            assert content(far.render_here(index)) == content(near.render_here(index))
    assert steps > 1


def test_another_image_in_a_remote_tar_stops_the_batch(trained, cache, tmp_path):
    """Keys of a remote source are compared when its tar is here: when a batch first uses it."""
    write_tars(tmp_path / "web/images", (8, 12), unlabelled=5)
    with web_server(tmp_path / "web") as server:
        source = open_source(f"{server.url}/images/train-{{000000..000001}}.tar", cache=cache)
        far, steps = renderer_of(LabelSet.open(trained / "set"), source)
        errors: list[Exception] = []
        for index in range(steps):
            try:
                far.render_here(index)
            except (LabelSetMismatch, SourceError) as error:
                errors.append(error)
    texts = " ".join(map(str, errors))
    assert len(errors) == steps
    assert "4 samples are missing: 'img-0008' of train-000000" in texts
    assert re.search("4 samples are new: 'img-0008' of train-000001", texts)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_from_afar_is_the_run_from_here(trained, tmp_path, workers):
    """A cache that holds half of the files, loader processes, and a server that fails now and then."""
    settings = TINY | {"batch_size": 6, "epochs": 2, "warmup_epochs": 0, "lr": 1e-3, "workers": workers}
    train(TrainConfig(labels=str(trained / "set"), data=str(trained / "images"), output=tmp_path / "near", **settings))
    size = sum(path.stat().st_size for path in trained.rglob("*") if path.is_file()) // 2
    with web_server(trained) as server:
        server.faults["images/train-000000.tar"] = [503, "cut"]
        train(
            TrainConfig(
                labels=f"{server.url}/set",
                data=f"{server.url}/images/train-{{000000..000001}}.tar",
                output=tmp_path / "far",
                cache_dir=tmp_path / "cache",
                cache_size=f"{size}B",
                **settings,
            )
        )
    assert_same_state(tmp_path / "near", tmp_path / "far")
    config = json.loads((tmp_path / "far/config.json").read_text())["config"]
    assert (config["labels"], config["cache_dir"]) == (f"{server.url}/set", str(tmp_path / "cache"))


def test_what_is_said_of_the_cache_may_change_in_a_continuation():
    here = TrainConfig(labels="shards", cache_size="1GB")
    assert here.identity() == TrainConfig(labels="s3://b/shards", cache_dir=Path("/tmp/x")).identity()
