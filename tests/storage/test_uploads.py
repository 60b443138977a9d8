"""Writing to URLs: whole or not at all, create-only, and never twice. The store is a real one, in a process of its own."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.s3_server import BUCKET, S3, client, credentials, proxy

from pipeline.errors import RemoteFileMissing, RemoteFileRefused, StorageError
from pipeline.storage import remote, stores
from pipeline.storage.remote import info_of
from pipeline.storage.stores import S3Store
from pipeline.storage.uploads import holds, put_bytes, put_file, update_url


@pytest.fixture
def between(store, monkeypatch):
    """The proxy that this process reaches the store through."""
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01))
    with proxy(store) as running:
        credentials(monkeypatch, running.url)
        yield running


@pytest.fixture(params=["memory", S3])
def place(request, monkeypatch):
    """An empty folder in a store: one in this process, and a real one."""
    name = f"{request.node.name.replace('[', '-').replace(']', '')}"
    if request.param == "memory":
        return f"memory://{name}"
    request.getfixturevalue("between")
    return f"s3://{BUCKET}/{name}"


def stored(store: str, url: str) -> bytes:
    return client(store).cat_file(url.removeprefix("s3://"))


def test_what_is_put_is_there(place, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"labels")
    assert put_file(tmp_path / "a.parquet", f"{place}/deep/a.parquet")
    assert put_bytes(b"", f"{place}/empty")
    assert remote.read_url(f"{place}/deep/a.parquet", max_bytes=100) == b"labels"
    sizes = [(info_of(f"{place}/{name}") or {}).get("size") for name in ("deep/a.parquet", "empty")]
    assert sizes == [6, 0]
    assert info_of(f"{place}/nothing") is None
    assert info_of(f"{place}/deep") is None  # a folder is no file


def test_a_name_is_given_once(place, tmp_path):
    (tmp_path / "a").write_bytes(b"first")
    assert put_file(tmp_path / "a", f"{place}/a")
    assert put_file(tmp_path / "a", f"{place}/a")  # the same bytes: nothing to complain of
    assert not put_bytes(b"other", f"{place}/a")
    assert not put_bytes(b"longer than it", f"{place}/a")
    assert remote.read_url(f"{place}/a", max_bytes=100) == b"first"
    assert put_bytes(b"other", f"{place}/a", replace=True)
    assert remote.read_url(f"{place}/a", max_bytes=100) == b"other"


def test_holds_compares_content(place, tmp_path):
    (tmp_path / "a").write_bytes(b"first")
    assert holds(f"{place}/a", tmp_path / "a") is None
    for data, same in ((b"first", True), (b"fIrst", False), (b"firs", False)):
        put_bytes(data, f"{place}/a", replace=True)
        assert holds(f"{place}/a", tmp_path / "a") is same


@pytest.mark.slow
@pytest.mark.slow
def test_of_eight_writers_of_one_name_one_wins(between, store):
    url = f"s3://{BUCKET}/race"
    for turn in range(3):
        start = threading.Barrier(8)

        def write(number: int, turn=turn, start=start) -> bool:
            start.wait()
            return put_bytes(bytes([number]) * 1000, f"{url}/{turn}")

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert stored(store, f"{url}/{turn}") == bytes([won.index(True)]) * 1000


def test_no_writer_loses_what_another_added(place):
    """Fault 5: two who seal different views at once."""
    url, start = f"{place}/list.json", threading.Barrier(6)

    def add(number: int) -> None:
        start.wait()
        update_url(url, lambda old: json.dumps(sorted({*json.loads(old or b"[]"), number})).encode(), max_bytes=1000)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    assert json.loads(remote.read_url(url, max_bytes=1000)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["reset", "lost", "cut-request", 503, 500, 429])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.slow
def test_a_failed_upload_is_tried_again(between, store, tmp_path, monkeypatch, fault, large):
    """Faults 15 to 17: refused, cut in the middle, or stored and the answer lost."""
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    data = b"labels" * (2_000_000 if large else 10)
    (tmp_path / "a").write_bytes(data)
    url = f"s3://{BUCKET}/again/{fault}-{large}"
    between.faults[f"PUT {fault}-{large}"] += [fault]
    between.faults[f"POST {fault}-{large}"] += ["lost"] if large else []
    assert put_file(tmp_path / "a", url)
    assert stored(store, url) == data
    assert not between.faults[f"PUT {fault}-{large}"]


@pytest.mark.slow
def test_an_upload_whose_answer_was_lost_is_not_sent_again(between, store, monkeypatch):
    """Fault 17: also where the next try would say that the name is taken."""
    for name, replace in (("new", False), ("swapped", True)):
        between.faults[f"PUT {name}"] += ["lost"]
        assert put_bytes(b"labels", f"s3://{BUCKET}/lost/{name}", replace=replace)
        assert stored(store, f"s3://{BUCKET}/lost/{name}") == b"labels"


@pytest.mark.slow
def test_a_swap_whose_answer_was_lost_is_known_as_done(between, store):
    url, seen = f"s3://{BUCKET}/lost/manifest", []
    put_bytes(b"a", url)
    between.faults["PUT manifest"] += ["lost"]
    update_url(url, lambda old: seen.append(old) or (old if b"b" in old else old + b"b"), max_bytes=10)
    assert stored(store, url) == b"ab"
    assert seen == [b"a", b"ab"]


@pytest.mark.slow
def test_a_store_that_never_answers_is_named(between, tmp_path):
    between.faults["PUT never"] += [503] * 100
    with pytest.raises(
        StorageError, match=rf"s3://{BUCKET}/never: gave up after 3 tries in .*: the server answers 503"
    ):
        put_bytes(b"labels", f"s3://{BUCKET}/never")
    assert info_of(f"s3://{BUCKET}/never") is None


@pytest.mark.slow
def test_a_file_that_cannot_be_read_leaves_nothing(between, tmp_path, monkeypatch):
    """Fault 16: an open remote file would be closed, and so stored as far as it came."""
    with pytest.raises(StorageError, match="nothing: no such file"):
        put_file(tmp_path / "nothing", f"s3://{BUCKET}/cut")
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    path = tmp_path / "shrinks"
    path.write_bytes(b"x" * (11 << 20))
    send = S3Store.send

    def shrink(store, upload, **how):
        path.write_bytes(b"x" * (6 << 20))
        monkeypatch.setattr(S3Store, "send", send)
        send(store, upload, **how)

    monkeypatch.setattr(S3Store, "send", shrink)
    with pytest.raises(StorageError, match="another writer replaced it"):
        put_file(path, f"s3://{BUCKET}/cut")


@pytest.mark.slow
def test_large_files_go_up_in_parts(between, store, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PART_BYTES", 5 << 20)
    (tmp_path / "a").write_bytes(bytes(range(256)) * (11 << 12))
    url = f"s3://{BUCKET}/parts"
    assert put_file(tmp_path / "a", url)
    assert between.requests["PUT parts"] == 3
    before = between.sent_bytes
    assert holds(url, tmp_path / "a") is True
    assert put_file(tmp_path / "a", url)
    assert between.sent_bytes - before < 10_000  # the store's own checksum tells
    (tmp_path / "a").write_bytes(bytes(11 << 20))
    assert not put_file(tmp_path / "a", url)
    assert stored(store, url) == bytes(range(256)) * (11 << 12)


@pytest.mark.slow
def test_what_cannot_be_written_is_named(between, monkeypatch):
    with pytest.raises(RemoteFileMissing, match="s3://no-such-bucket/a: there is no such bucket or repository"):
        put_bytes(b"a", "s3://no-such-bucket/a")
    for url in ("http://127.0.0.1:9/a", "https://host/a"):
        for write in (lambda url=url: put_bytes(b"a", url), lambda url=url: update_url(url, bytes, max_bytes=9)):
            with pytest.raises(
                StorageError, match=f"{url}: a web server takes no files; push to a bucket, or to a folder"
            ):
                write()
    with pytest.raises(StorageError, match="a URL must begin with"):
        put_bytes(b"a", "ftp://host/a")
    credentials(monkeypatch, between.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(RemoteFileRefused, match=rf"s3://{BUCKET}/a: access is refused \(403\)"):
        put_bytes(b"a", f"s3://{BUCKET}/a")
