"""Reading that ends: a server that answers too slowly is asked again, and then given up by name, on every way of reading."""

import email.utils
import io
import logging
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.s3_server import BUCKET, credentials, proxy, s3_server
from support.web_server import DRIBBLE_S, web_server

from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.images.source import open_source
from pipeline.storage import cache as caching
from pipeline.storage import patience, remote, stores
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.patience import Interrupted, Rate, longer_than, retry_after_s, watched
from pipeline.storage.remote import Promise

SIZE = 30_000
BODY = bytes(range(256)) * (SIZE // 256 + 1)
BODY = BODY[:SIZE]
WINDOW_S = 0.4
TOO_SLOW = (
    r"gave up after 2 tries in [0-9]+ s: [0-9]+ B a second arrived in the last 0 s, less than the minimum of 10\.0 kB"
)
NO_ANSWER = "gave up after 2 tries in [0-9]+ s: no complete answer within [01] s"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("a", "b"):
        (tmp_path / "web" / name).write_bytes(BODY)
    with web_server(tmp_path / "web") as running:
        yield running


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 10**8)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01,))
    monkeypatch.setattr(patience, "WINDOW_S", WINDOW_S)
    for module in (remote, stores):
        monkeypatch.setattr(module, "ANSWER_S", WINDOW_S)
    monkeypatch.setattr(remote, "LISTING_S", WINDOW_S)
    monkeypatch.setattr(remote, "WINDOW_S", WINDOW_S)
    monkeypatch.setattr(remote, "RANGE_BYTES", 1 << 10)


def ends_soon(began: float) -> bool:
    """Return whether two tries took a few windows, not the ten minutes of a byte every 20 ms."""
    return time.monotonic() - began < 20 * WINDOW_S


# A server that dribbles.

READS = {
    "whole file": lambda url, path: Cache(path / "cache", 10**8).fetch(url),
    "small file": lambda url, path: remote.read_url(url, max_bytes=10**6),
    "download": lambda url, path: remote.download(url, path / "file", Promise(SIZE, "0" * 64)),
    "copy": lambda url, path: remote.receive_file(url, path / "file"),
}


@pytest.mark.parametrize("fault", ["dribble", "dribble-headers"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_server_that_dribbles_is_asked_again_and_given_up_by_name(server, tmp_path, read, fault):
    server.always["a"] = fault
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"{server.url}/a: {TOO_SLOW}"):
        read(f"{server.url}/a", tmp_path)
    assert ends_soon(began)
    assert server.requests["a"] == 2


def test_a_transfer_that_is_given_up_closes_its_connection(server, cache):
    """Otherwise each try would leave a connection behind, and a thread that waits for it."""
    server.always["a"] = "dribble"
    with pytest.raises(StorageError):
        cache.fetch(f"{server.url}/a")
    until = time.monotonic() + 10
    while any(thread.name == "remote-store" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_slow_server_above_the_minimum_is_left_alone(server, tmp_path, read):
    """A steady 50 kB/s takes longer than the window."""
    assert SIZE / 1000 * DRIBBLE_S > WINDOW_S
    server.always["a"] = "steady"
    try:
        read(f"{server.url}/a", tmp_path)
    except remote.RemoteFileCorrupt:  # the download that promises another hash
        return
    assert server.requests["a"] == 1


def test_the_minimum_can_be_set(server, tmp_path):
    server.always["a"] = "steady"
    with pytest.raises(StorageError, match=r"kB a second arrived .* less than the minimum of 100\.0 MB a second"):
        open_cache(tmp_path / "cache", "1MB", "100MB").fetch(f"{server.url}/a")
    server.always["b"] = "dribble"
    (server.folder / "b").write_bytes(b"x" * 40)
    assert open_cache(tmp_path / "cache", "1MB", "1B").fetch(f"{server.url}/b").read_bytes() == b"x" * 40
    with pytest.raises(UsageError, match="--min-rate must be a size such as 500MB"):
        open_cache(tmp_path / "cache", "1MB", "slow")


def test_a_server_that_recovers_gives_the_file(server, cache, caplog):
    server.faults["a"] = ["dribble"]
    assert cache.fetch(f"{server.url}/a").read_bytes() == BODY
    kinds = {record.repeats: record.getMessage() for record in caplog.records}
    assert (
        "less than the minimum of 10.0 kB a second; trying again in 0.01 s"
        in kinds["interrupted requests that were tried again"]
    )
    assert kinds["files that took more than one try"] == f"{server.url}/a: it took 2 tries and 0 s"


def test_what_arrives_late_from_a_transfer_that_was_given_up_goes_nowhere(server):
    """The second try writes into the same file."""
    server.faults["a"] = ["dribble"]
    file = io.BytesIO()
    assert remote.receive_whole(f"{server.url}/a", file).bytes == SIZE
    time.sleep(5 * DRIBBLE_S)
    assert file.getvalue() == BODY


@pytest.mark.parametrize(("name", "fault"), [("head", "dribble-head"), ("range", "dribble")])
def test_reading_a_footer_alone_ends(server, cache, name, fault):
    table = pa.table({"image": pa.array([{"bytes": b"x" * 3000, "path": "a.png"}] * 4)})
    pq.write_table(table, server.folder / "a.parquet")
    server.ranges, server.always["a.parquet"] = True, fault
    url, began = f"{server.url}/a.parquet", time.monotonic()
    with pytest.raises(StorageError, match=f"{url}: {NO_ANSWER}"):
        remote.read_ranges(url, pq.ParquetFile)
    assert ends_soon(began)
    if name == "range":  # then the whole file is tried, which is no faster
        with pytest.raises(SourceError, match=f"{url}: {TOO_SLOW}"):
            open_source(url, cache=cache)


def test_a_question_about_a_file_ends(server):
    server.ranges, server.always["a"] = True, "dribble-head"
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"{server.url}/a: gave up after 2 tries"):
        remote.info_of(f"{server.url}/a")
    assert ends_soon(began)


@pytest.mark.parametrize("read", [remote.list_url, remote.list_tree])
def test_a_list_ends(monkeypatch, read):
    class Slow:
        def ls(self, *_, **__):
            time.sleep(3)

        find = ls

    monkeypatch.setattr(stores.Store, "file_system", lambda *_: (Slow(), "x"))
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"memory://x: {NO_ANSWER}"):
        read("memory://x")
    assert ends_soon(began)


def test_a_library_that_delivers_blocks_has_the_time_of_a_block(monkeypatch):
    """gs:// and hf://: a block is one request, of which nothing is seen before its end."""
    monkeypatch.setattr(stores, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(stores.Store, "grain", 20_000)

    class File(io.BytesIO):
        size = 40_000

        def read(self, length=-1):
            time.sleep(pause)
            return super().read(length)

    class Blocks:
        def open(self, *_, **__):
            return File(b"x" * 40_000)

    monkeypatch.setattr(stores.Store, "file_system", lambda *_: (Blocks(), "x"))
    pause = 0.7  # longer than the window, but 29 kB/s
    assert remote.read_url("memory://x", max_bytes=10**6) == b"x" * 40_000
    pause = 5
    with pytest.raises(StorageError, match="0 B a second arrived in the last 2 s, less than the minimum"):
        remote.read_url("memory://x", max_bytes=10**6)


@pytest.mark.slow
def test_a_bucket_that_dribbles_is_given_up_and_a_slow_one_is_not(tmp_path, monkeypatch):
    with s3_server(tmp_path) as store, proxy(store) as server:
        credentials(monkeypatch, server.url)
        url = f"s3://{BUCKET}/file"
        body = BODY * 100
        stores.store_of(url).file_system(url)[0].pipe_file(f"{BUCKET}/file", body)
        file = io.BytesIO()
        assert remote.receive_whole(url, file).bytes == len(body)
        assert file.getvalue() == body
        partial = tmp_path / "partial"
        partial.write_bytes(body[:12_345])
        with partial.open("r+b") as opened:
            assert remote.receive(url, opened, size=len(body), start=12_345).bytes == len(body)
        assert partial.read_bytes() == body
        server.faults["GET file"] = ["dribble", "dribble"]
        began = time.monotonic()
        with pytest.raises(StorageError, match=f"{url}: {TOO_SLOW}"):
            remote.receive_whole(url, io.BytesIO())
        assert ends_soon(began)
        server.faults["GET file"] = ["steady"]
        assert remote.receive_whole(url, io.BytesIO(), min_rate=1000).bytes == len(body)
        server.faults["GET file"] = [(503, {"Retry-After": "1"})]
        began = time.monotonic()
        assert remote.receive_whole(url, io.BytesIO()).bytes == len(body)
        assert time.monotonic() - began > 1


# Retry-After.


def test_the_time_that_a_server_asks_for_is_waited(server, cache, monkeypatch):
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)
    server.faults["a"] = [(503, {"Retry-After": "7"})]
    cache.fetch(f"{server.url}/a")
    server.faults["b"] = [(429, {"Retry-After": email.utils.formatdate(time.time() + 5, usegmt=True)})]
    cache.fetch(f"{server.url}/b")
    assert paused[0] == 7
    assert 3 < paused[1] <= 5


def test_no_server_makes_a_run_wait_beyond_the_deadline(monkeypatch):
    clock, paused = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def pause(seconds: float) -> None:
        paused.append(seconds)
        clock[0] += seconds

    def attempt() -> None:
        raise Interrupted("busy", 100.0 if len(paused) < 1 else 1e9)

    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (1.0, 2.0, 4.0, 8.0))
    with pytest.raises(StorageError, match="gave up after 3 tries in 900 s: busy"):
        remote.retried("http://x", attempt, pause=pause)
    assert paused == [100.0, remote.DEADLINE_S - 100.0]


class Answer(Exception):
    def __init__(self, **fields) -> None:
        super().__init__()
        self.__dict__.update(fields)


HEADERS = [
    ({}, 0),
    ({"Retry-After": "120"}, 120),
    ({"retry-after": " 3 "}, 3),
    ({"Retry-After": "-1"}, 0),
    ({"Retry-After": "soon"}, 0),
    ({"Retry-After": "1.5"}, 0),  # not in the standard
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),  # in the past
    # The server's own clock counts, which may be years away from ours.
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 07:27:00 GMT"}, 60),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "yesterday"}, 0),
]


@pytest.mark.parametrize(("headers", "seconds"), HEADERS)
def test_retry_after_is_found_in_the_errors_of_all_libraries(headers, seconds):
    botocore = Answer(response={"ResponseMetadata": {"HTTPHeaders": headers}})
    translated = OSError("s3fs")
    translated.__cause__ = botocore
    for error in (Answer(headers=headers), Answer(response=Answer(headers=headers)), botocore, translated):
        assert retry_after_s(error) == seconds
    assert retry_after_s(ValueError()) == 0


# The parts.


def test_a_rate_is_that_of_the_last_window(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(patience, "WINDOW_S", 60.0)
    rate, said = Rate(1000), {}
    for second in range(1, 200):
        clock[0] += 1
        rate.add(1100 if second <= 100 else 0)  # fast enough, then nothing more
        said[second] = rate.too_slow()
    slow = [second for second, reason in said.items() if reason]
    assert slow == list(range(slow[0], 200))
    assert 100 < slow[0] <= 108
    assert said[199] == "0 B a second arrived in the last 60 s, less than the minimum of 1.0 kB a second"


def test_a_large_block_lengthens_the_window(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(patience, "WINDOW_S", 60.0)
    rate = Rate(10_000, grain=4 << 20)
    for _ in range(5):  # a block every 400 s, 10.5 kB/s
        for _ in range(400):
            clock[0] += 1
            assert rate.too_slow() is None
        rate.add(4 << 20)
    said = []
    for _ in range(422):
        clock[0] += 1
        said.append(rate.too_slow())
    assert said[418] is None
    assert said[421] is not None


def test_what_a_watched_call_does_is_what_its_caller_gets():
    assert watched(lambda: 3, longer_than(10)) == 3
    with pytest.raises(KeyError, match="x"):
        watched(lambda: {}["x"], longer_than(10))
    with pytest.raises(Interrupted, match="no complete answer within 0 s"):
        watched(lambda: time.sleep(0.5), longer_than(0.1))


def test_whoever_waits_long_for_a_file_says_so(server, cache, monkeypatch, caplog):
    monkeypatch.setattr(caching, "LONG_WAIT_S", 0.1)
    server.always["a"] = "slow"
    with caplog.at_level(logging.WARNING):
        cache.fetch(f"{server.url}/a")
        cache.fetch(f"{server.url}/a")  # it is here
        cache.fetch(f"{server.url}/b")
    assert caplog.messages == [f"{server.url}/a: waited 0 s for this file"]
