"""The disk cache of remote files, against a real web server that fails as it is told (fault 15)."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.background import in_background, wait_until
from support.web_server import WebServer, web_server

from pipeline.errors import RemoteFileCorrupt, RemoteFileMissing, StorageError, UsageError
from pipeline.storage import atomic as storage
from pipeline.storage import cache as caching
from pipeline.storage import prefetch, remote, stores
from pipeline.storage.cache import Cache, open_cache
from pipeline.storage.place import LocalFile, RemoteFile
from pipeline.storage.prefetch import Prefetch
from pipeline.storage.remote import NO_PROMISE, Promise
from pipeline.text import parse_bytes

SIZE = 100_000
BODIES = {f"{number}.tar": os.urandom(SIZE) for number in range(8)}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "web").mkdir()
    for name, body in BODIES.items():
        (tmp_path / "web" / name).write_bytes(body)
    with web_server(tmp_path / "web") as running:
        yield running


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", 10 * SIZE)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(stores, "STALL_TIMEOUT_S", 0.5)


def sha256(name: str) -> str:
    return hashlib.sha256(BODIES[name]).hexdigest()


def held(cache: Cache) -> set[str]:
    """Return the names of the whole files of a cache, as their URLs end."""
    return {path.name.partition("-")[2] for path in cache.folder.iterdir() if path.suffix == ".tar"}


def stored_bytes(cache: Cache) -> int:
    """Return the bytes of whole and half files, but not of a sidecar on its way."""
    files = [path for path in cache.folder.iterdir() if path.suffix == ".tar" or path.name.startswith(".tmp-")]
    return sum(size for size in (path.stat().st_size for path in files) if size > 1000)


# Sizes.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1B", 1), ("500MB", 500 * 10**6), ("50GB", 50 * 10**9), ("2TB", 2 * 10**12), ("1.5 GB", 1_500_000_000),
        ("64GiB", 64 * 2**30), ("3kb", 3000),
    ],
)  # fmt: skip
def test_a_size_is_read_as_it_is_written(text, number):
    assert parse_bytes(text, what="--cache-size") == number


@pytest.mark.parametrize(
    "text", ["", "50", "GB", "-1GB", "0GB", "1e9B", "fifty GB", "50 G", "1,5GB", "IB", "1IB", "٣GB"]
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(UsageError, match=r"--cache-size must be a size such as 500MB, 50GB or 2TB, got"):
        parse_bytes(text, what="--cache-size")


def test_the_default_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_cache() == Cache(tmp_path / "deit-cli", 100 * 10**9)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_cache(size="1MB") == Cache(Path.home() / ".cache/deit-cli", 10**6)
    assert open_cache(tmp_path / "mine").folder == tmp_path / "mine"


# Fetching.


def test_a_file_is_downloaded_once(server, cache):
    for _ in range(3):
        assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]
    assert pickle.loads(pickle.dumps(cache)).fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]
    assert server.requests == {"0.tar": 1}


def test_a_cache_pickles_small(cache):
    assert len(pickle.dumps(cache)) < 400


def test_an_empty_file_is_a_file(server, cache):
    (server.folder / "empty").write_bytes(b"")
    assert cache.fetch(f"{server.url}/empty", Promise(0)).read_bytes() == b""


def test_what_is_asked_for_in_the_address_stays(server, cache):
    assert cache.fetch(f"{server.url}/0.tar?token=a/b").read_bytes() == BODIES["0.tar"]


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut", "stall", "reset"])
def test_what_may_pass_is_tried_again(server, cache, fault, caplog):
    server.faults["0.tar"] = [fault, fault]
    assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]
    assert server.requests["0.tar"] == 3
    assert "0.tar" in caplog.text
    assert "trying again in 0.01 s" in caplog.text


FINAL = [
    # fault that never ends, what the error says
    (503, "gave up after 4 tries in 0 s: the server answers 503 Service Unavailable"),
    (429, "gave up after 4 tries in 0 s: the server answers 429 Too Many Requests"),
    ("cut", "gave up after 4 tries in 0 s: ClientPayloadError: .*[Nn]ot enough data"),
    ("stall", "gave up after 4 tries in . s: no answer for 0.5 s"),
    ("reset", "gave up after 4 tries in 0 s: "),
]


@pytest.mark.parametrize(("fault", "text"), FINAL, ids=[fault for fault, _ in FINAL])
def test_what_does_not_pass_ends_with_the_reason(server, cache, fault, text):
    server.always["0.tar"] = fault
    with pytest.raises(StorageError, match=rf"/0\.tar: {text}"):
        cache.fetch(f"{server.url}/0.tar")
    assert server.requests["0.tar"] == (8 if fault == "reset" else 4)  # aiohttp itself asks again after a reset
    assert held(cache) == set()


REFUSED = [
    # status, error, what it says
    (404, RemoteFileMissing, r"/0\.tar: there is no such file \(404\)\. Check the address"),
    (410, RemoteFileMissing, r"/0\.tar: there is no such file \(410\)"),
    (403, StorageError, r"/0\.tar: access is refused \(403\)\. Check the address and your credentials"),
    (401, StorageError, r"/0\.tar: access is refused \(401\)"),
    (400, StorageError, r"/0\.tar: cannot be read: the server answers 400"),
]


@pytest.mark.parametrize(("status", "error", "text"), REFUSED, ids=[status for status, *_ in REFUSED])
def test_a_refusal_is_not_asked_for_again(server, cache, status, error, text):
    server.always["0.tar"] = status
    with pytest.raises(error, match=text):
        cache.fetch(f"{server.url}/0.tar")
    assert server.requests["0.tar"] == 1


def test_a_server_that_is_not_there_is_named(cache, tmp_path):
    with web_server(tmp_path) as gone:
        url = gone.url
    with pytest.raises(StorageError, match=f"{url}/0.tar: gave up after 4 tries .*Cannot connect to host"):
        cache.fetch(f"{url}/0.tar")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "pipe://cat", "simplecache::s3://b/x", "ftp://a/b"])
def test_another_scheme_is_refused(cache, url):
    with pytest.raises(StorageError, match="a URL must begin with http://, https://, s3://, gs:// or hf://, got "):
        cache.fetch(url)


def test_a_package_that_is_not_installed_is_named_with_its_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(StorageError, match=r'http:// needs a package .*: pip install "deit-cli\[http\]"'):
        cache.fetch("http://127.0.0.1:1/x.tar")


# Promises.


def test_a_damaged_download_is_repeated_once(server, cache, caplog):
    server.faults["0.tar"] = ["flip"]
    path = cache.fetch(f"{server.url}/0.tar", Promise(SIZE, sha256("0.tar")))
    assert path.read_bytes() == BODIES["0.tar"]
    assert server.requests["0.tar"] == 2
    assert "downloading it once more" in caplog.text


def test_a_file_that_stays_damaged_is_refused_by_name(server, cache):
    server.always["0.tar"] = "flip"
    found = bytearray(BODIES["0.tar"])
    found[SIZE // 2] ^= 1
    text = f"/0.tar has SHA-256 {hashlib.sha256(found).hexdigest()[:12]}…, {sha256('0.tar')[:12]}… is promised"
    with pytest.raises(RemoteFileCorrupt, match=text):
        cache.fetch(f"{server.url}/0.tar", Promise(SIZE, sha256("0.tar")))
    assert server.requests["0.tar"] == 2
    assert held(cache) == set()


@pytest.mark.parametrize("fault", [None, "no-length"])
def test_a_file_of_another_length_is_refused_with_both(server, cache, fault):
    server.always["0.tar"] = fault
    with pytest.raises(RemoteFileCorrupt, match=f"/0.tar has {SIZE} bytes, {SIZE - 1} are promised"):
        cache.fetch(f"{server.url}/0.tar", Promise(SIZE - 1))
    assert held(cache) == set()


def test_a_cut_that_nobody_announced_is_seen_by_the_promised_length(server, cache):
    server.faults["0.tar"] = ["cut-unannounced"]
    assert cache.fetch(f"{server.url}/0.tar", Promise(SIZE)).read_bytes() == BODIES["0.tar"]
    server.always["1.tar"] = "cut-unannounced"
    with pytest.raises(
        StorageError, match=f"gave up after 4 tries .*the answer ended after {SIZE // 2} of {SIZE} bytes"
    ):
        cache.fetch(f"{server.url}/1.tar", Promise(SIZE))


def test_a_file_without_a_length_is_taken_as_it_comes(server, cache):
    server.always["0.tar"] = "no-length"
    assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]


def test_another_promise_is_another_file(server, cache):
    """A set that was made again under the same names must not be read from the old copies."""
    cache.fetch(f"{server.url}/0.tar", Promise(sha256=sha256("0.tar")))
    (server.folder / "0.tar").write_bytes(BODIES["1.tar"])
    again = cache.fetch(f"{server.url}/0.tar", Promise(sha256=sha256("1.tar")))
    assert again.read_bytes() == BODIES["1.tar"]


@pytest.mark.parametrize("damage", [b"", BODIES["0.tar"][:-1], BODIES["0.tar"] + b"\0"])
def test_a_copy_of_another_length_is_fetched_again(server, cache, damage, caplog):
    cache.fetch(f"{server.url}/0.tar").write_bytes(damage)
    assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]
    assert f"has {len(damage)} bytes, {SIZE} were downloaded: fetching it again" in caplog.text


def test_a_copy_without_its_length_is_not_believed(server, cache):
    path = cache.fetch(f"{server.url}/0.tar")
    for content in (None, b"", b"[]", b"{}", b"\xff"):
        sidecar = path.with_name(path.name + ".json")
        sidecar.unlink() if content is None else sidecar.write_bytes(content)
        assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]
    assert server.requests["0.tar"] == 6


# Room.


def test_what_was_used_longest_ago_goes_first(server, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    for age, name in ((50, "0.tar"), (40, "1.tar"), (30, "2.tar")):
        path = cache.fetch(f"{server.url}/{name}")
        os.utime(path, (time.time() - age,) * 2)
    cache.fetch(f"{server.url}/0.tar")
    cache.fetch(f"{server.url}/3.tar")
    assert held(cache) == {"0.tar", "2.tar", "3.tar"}
    cache.fetch(f"{server.url}/4.tar")
    assert held(cache) == {"0.tar", "3.tar", "4.tar"}


def test_the_limit_holds_and_an_evicted_file_is_fetched_again(server, tmp_path):
    cache = Cache(tmp_path / "cache", 2 * SIZE + SIZE // 2)
    for _ in range(2):
        for name, body in BODIES.items():
            assert cache.fetch(f"{server.url}/{name}").read_bytes() == body
            assert stored_bytes(cache) <= cache.max_bytes
    assert min(server.requests.values()) == 2


def test_the_limit_holds_for_files_without_a_length(server, tmp_path):
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    for name in BODIES:
        server.always[name] = "no-length"
        cache.fetch(f"{server.url}/{name}")
        assert stored_bytes(cache) <= cache.max_bytes


@pytest.mark.parametrize("fault", [None, "no-length"])
def test_a_file_that_is_larger_than_the_cache_is_refused(server, tmp_path, fault):
    cache = Cache(tmp_path / "cache", SIZE // 4)
    server.always["0.tar"] = fault
    with pytest.raises(
        StorageError, match=r"/0\.tar has .* kB or more, the whole cache .* has 25\.0 kB\. Raise --cache-size"
    ):
        cache.fetch(f"{server.url}/0.tar")
    assert server.requests["0.tar"] == 1


def test_a_folder_in_the_cache_stays_when_there_is_no_room(server, tmp_path):
    """The indexes of sources are in one; it is old, so it would be the first to go."""
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    (cache.folder / "index").mkdir(parents=True)
    (cache.folder / "index/a.arrow").write_bytes(bytes(3 * SIZE))
    os.utime(cache.folder / "index", (5, 5))
    for name in list(BODIES)[:3]:
        cache.fetch(f"{server.url}/{name}")
    assert len(held(cache)) == 2
    assert (cache.folder / "index/a.arrow").stat().st_size == 3 * SIZE


def test_a_file_that_is_being_downloaded_is_not_evicted(server, tmp_path):
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    stores.STALL_TIMEOUT_S = 20.0
    server.faults["0.tar"] = ["stall"]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.fetch, f"{server.url}/0.tar")
        wait_until(lambda: server.requests["0.tar"] and stored_bytes(cache) >= SIZE, "half of a download")
        for name in ("1.tar", "2.tar", "3.tar"):  # each finds room for one file
            cache.fetch(f"{server.url}/{name}")
            assert stored_bytes(cache) == 2 * SIZE
        assert held(cache) == {"3.tar"}
        server.go.set()
        assert slow.result().read_bytes() == BODIES["0.tar"]
    assert server.requests["0.tar"] == 1


def test_where_downloads_fill_the_cache_the_next_waits_for_them(server, tmp_path):
    cache = Cache(tmp_path / "cache", SIZE)
    stores.STALL_TIMEOUT_S = 20.0
    server.faults["0.tar"] = ["stall"]
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(cache.fetch, f"{server.url}/0.tar")
        wait_until(lambda: server.requests["0.tar"] and stored_bytes(cache) >= SIZE, "half of a download")
        later = pool.submit(cache.fetch, f"{server.url}/1.tar")
        time.sleep(0.3)
        assert not later.done()
        server.go.set()
        assert later.result(20).read_bytes() == BODIES["1.tar"]
        slow.result()


def test_a_copy_that_is_evicted_before_it_is_opened_is_fetched_again(server, cache):
    file, seen = RemoteFile(f"{server.url}/0.tar", cache), []

    def use(path: Path) -> bytes:
        seen.append(path)
        if len(seen) < 3:
            file.discard()
        return path.read_bytes()

    assert file.use(use) == BODIES["0.tar"]
    assert len(seen) == 3

    def never(path: Path) -> bytes:
        raise FileNotFoundError(path)

    with pytest.raises(
        StorageError, match=r"evicted from the cache .* 8 times before it was opened\. Raise --cache-size"
    ):
        file.use(never)


def test_a_local_file_is_used_where_it_is(tmp_path):
    assert LocalFile(tmp_path).use(lambda path: path) == tmp_path


# Many processes.


def fetch_many(start, folder: Path, limit: int, url: str, names: list[str]) -> None:
    cache = Cache(folder, limit)
    start.wait()
    for name in names:
        content = RemoteFile(f"{url}/{name}", cache).use(Path.read_bytes)
        if content != BODIES[name]:
            os._exit(1)


def run_together(server: WebServer, folder: Path, limit: int, orders: list[list[str]]) -> list[int | None]:
    context = multiprocessing.get_context("fork")  # BODIES are random, and of this process
    start = context.Barrier(len(orders))
    processes = [context.Process(target=fetch_many, args=(start, folder, limit, server.url, o)) for o in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.slow
def test_many_processes_download_a_file_once(server, tmp_path):
    server.faults.update({name: ["slow"] for name in BODIES})
    orders = [sorted(BODIES, reverse=turn % 2 > 0) for turn in range(6)]
    assert run_together(server, tmp_path / "cache", 10 * SIZE, orders) == [0] * 6
    assert server.requests == dict.fromkeys(BODIES, 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.slow
def test_many_processes_in_a_cache_that_is_too_small_read_the_right_bytes(server, tmp_path):
    """Files go while others want them: content is right all the same, and the limit holds at every moment."""
    cache, most = Cache(tmp_path / "cache", 3 * SIZE), [0]

    def watch(ended: threading.Event) -> None:
        while not ended.wait(0.002):
            try:
                most.append(stored_bytes(cache))
            except FileNotFoundError:
                continue

    names = sorted(BODIES)
    orders = [names[turn:] + names[:turn] for turn in range(4)]
    with in_background(watch):
        codes = run_together(server, cache.folder, cache.max_bytes, orders)
    assert codes == [0] * 4
    assert SIZE <= max(most) <= cache.max_bytes


def test_a_lock_whose_file_was_evicted_is_no_lock(tmp_path):
    """Whoever waited for it would else work beside the holder of the new one."""
    path, order, go = tmp_path / "x.lock", [], threading.Event()

    def hold(name: str, until: threading.Event | None) -> None:
        with storage.locked(path):
            order.append(name)
            if until:
                until.wait(20)
                order.append(f"{name} ends")

    with ThreadPoolExecutor(2) as pool:
        with storage.locked(path):
            pool.submit(hold, "waited", None)
            time.sleep(0.2)
            path.unlink()
            pool.submit(hold, "new", go)
            wait_until(lambda: order == ["new"], "the second holder")
        time.sleep(0.2)
        go.set()
    assert order == ["new", "new ends", "waited"]


DOWNLOAD = """
import sys
from pathlib import Path
from pipeline.storage.cache import Cache
Cache(Path(sys.argv[1]), 10**6).fetch(sys.argv[2])
"""


def test_a_killed_download_leaves_nothing_that_is_believed(server, cache):
    server.faults["0.tar"] = ["stall"]
    victim = subprocess.Popen([sys.executable, "-c", DOWNLOAD, str(cache.folder), f"{server.url}/0.tar"])
    wait_until(lambda: any(p.stat().st_size for p in cache.folder.glob(".tmp-*")), "a part of a file")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert list(cache.folder.glob(".tmp-*"))
    assert held(cache) == set()
    assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]  # its lock has died with it
    assert not list(cache.folder.glob(".tmp-*"))
    assert server.requests["0.tar"] == 2


# Ahead of use.


def files_of(server: WebServer, cache: Cache, *numbers: int) -> list[RemoteFile]:
    return [RemoteFile(f"{server.url}/{number}.tar", cache) for number in numbers]


def test_files_are_fetched_ahead_of_their_use(server, tmp_path):
    cache = Cache(tmp_path / "cache", 100 * SIZE)
    with Prefetch(files_of(server, cache, *range(8))) as ahead:
        ahead.wait()
        for name, body in BODIES.items():
            assert cache.fetch(f"{server.url}/{name}").read_bytes() == body
    assert server.requests == dict.fromkeys(BODIES, 1)


def test_nothing_to_fetch_is_no_work():
    with Prefetch([]) as ahead:
        ahead.wait()
        assert not any(thread.is_alive() for thread in ahead._threads)


def test_no_more_than_half_of_the_cache_is_fetched_ahead(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "AHEAD_THREADS", 1)
    cache = Cache(tmp_path / "cache", 6 * SIZE)
    with Prefetch(files_of(server, cache, *range(8))):
        wait_until(lambda: len(server.requests) == 4, "four requests")  # three are half, the fourth goes beyond
        time.sleep(0.5)
        assert held(cache) == {"0.tar", "1.tar", "2.tar", "3.tar"}
        cache.fetch(f"{server.url}/0.tar")  # one is used: one more
        wait_until(lambda: "4.tar" in held(cache), "the fifth file")
        time.sleep(0.5)
        assert len(server.requests) == 5


def test_files_are_fetched_ahead_by_their_bytes_not_by_their_number(server, tmp_path):
    """Many tiny files and a few large ones keep the connections equally busy."""
    names = [f"tiny-{number}" for number in range(300)]
    for name in names:
        (server.folder / name).write_bytes(b"tiny")
    cache = Cache(tmp_path / "cache", 10**9)
    with Prefetch(RemoteFile(f"{server.url}/{name}", cache, Promise(4)) for name in names) as ahead:
        ahead.wait()
    assert set(server.requests) == set(names)
    assert len(ahead._ahead) == 300


@pytest.mark.parametrize(
    ("small", "promise", "at_once"),
    [
        (100 * SIZE, Promise(SIZE), 8),  # all small: as many as there are
        (5 * SIZE, Promise(SIZE), 5),
        (SIZE, Promise(SIZE), 4),  # large
        (100 * SIZE, NO_PROMISE, 4),  # nobody knows
    ],
)
def test_small_files_come_more_at_once_than_large_ones(server, cache, monkeypatch, small, promise, at_once):
    monkeypatch.setattr(prefetch, "SMALL_BYTES", small)
    monkeypatch.setattr("support.web_server.LATE_S", 1.0)
    server.always.update(dict.fromkeys(BODIES, "late"))
    large = Cache(cache.folder, 10**9)
    with Prefetch(RemoteFile(f"{server.url}/{number}.tar", large, promise) for number in range(8)):
        wait_until(lambda: len(server.requests) >= at_once, "so many requests")
        time.sleep(0.3)
        assert len(server.requests) == at_once


def test_the_size_of_files_without_a_promise_is_learned(server, cache):
    with Prefetch(files_of(server, cache, 0, 1)) as ahead:
        large = Cache(cache.folder, 10**12)
        assert Prefetch([])._expected(files_of(server, large, 2)[0]) == prefetch.TYPICAL_BYTES
        assert Prefetch([])._expected(files_of(server, cache, 2)[0]) == cache.max_bytes // 8
        ahead.wait()
    assert ahead._expected(files_of(server, cache, 2)[0]) == SIZE
    assert ahead._expected(RemoteFile("http://x", cache, Promise(7))) == 7


def test_a_slow_file_does_not_stop_the_others(server, tmp_path, monkeypatch):
    monkeypatch.setattr("support.web_server.LATE_S", 5.0)
    monkeypatch.setattr(stores, "STALL_TIMEOUT_S", 20.0)
    cache = Cache(tmp_path / "cache", 100 * SIZE)
    server.always["0.tar"] = "late"
    began = time.monotonic()
    with Prefetch(files_of(server, cache, *range(8))):
        wait_until(lambda: len(held(cache)) == 7, "the others")
        for name in sorted(BODIES)[1:]:
            assert cache.fetch(f"{server.url}/{name}").read_bytes() == BODIES[name]
        assert time.monotonic() - began < 4
        assert cache.fetch(f"{server.url}/0.tar").read_bytes() == BODIES["0.tar"]  # whoever needs it waits for it
    assert 5 <= time.monotonic() - began < 9
    assert set(server.requests.values()) == {1}


def test_what_is_in_use_is_not_given_up_for_later_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "AHEAD_THREADS", 1)
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    for number in (5, 6, 7):
        cache.fetch(f"{server.url}/{number}.tar")
    with Prefetch(files_of(server, cache, 0)):
        time.sleep(0.6)
        assert held(cache) == {"5.tar", "6.tar", "7.tar"}
        path = cache.fetch(f"{server.url}/6.tar")
        os.utime(path, (time.time() - 2 * caching.IN_USE_S,) * 2)  # not used for long
        wait_until(lambda: held(cache) == {"0.tar", "5.tar", "7.tar"}, "these three files")


def test_a_file_that_was_fetched_ahead_goes_last(server, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    with Prefetch(files_of(server, cache, 0)) as ahead:
        ahead.wait()
    for number in (1, 2, 3, 4):
        cache.fetch(f"{server.url}/{number}.tar")
    assert "0.tar" in held(cache)
    cache.fetch(f"{server.url}/0.tar")
    assert server.requests["0.tar"] == 1


def test_a_failure_ahead_is_left_to_whoever_opens_the_file(server, cache):
    server.always["0.tar"] = 404
    with Prefetch(files_of(server, cache, 0, 1)) as ahead:
        ahead.wait()
    assert held(cache) == {"1.tar"}
    with pytest.raises(RemoteFileMissing, match="there is no such file"):
        cache.fetch(f"{server.url}/0.tar")


def test_a_closed_prefetch_ends_soon(server, tmp_path):
    cache = Cache(tmp_path / "cache", 2 * SIZE)
    began = time.monotonic()
    with Prefetch(files_of(server, cache, *range(8))) as ahead:
        wait_until(lambda: held(cache), "a whole file")
    assert time.monotonic() - began < 5
    assert not any(thread.is_alive() for thread in ahead._threads)
