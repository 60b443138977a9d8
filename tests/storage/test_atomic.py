"""Files appear whole or not at all, the first writer wins, and JSON is read strictly."""

import errno
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from support.background import PATIENCE_S, in_background

from pipeline.errors import StorageError
from pipeline.storage import atomic as storage
from pipeline.storage import json as strict_json
from pipeline.storage.atomic import publish_file, replace_file, sha256_file, sweep_temporaries
from pipeline.storage.json import parse_json, pretty_json, read_json

ROOT = Path(__file__).parents[2]
WRITERS = 8
BYTES_EACH = 200_000


def writes(content: bytes):
    def write(file: BinaryIO) -> None:
        file.write(content)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Publishing: create-only, whole, and nothing left behind.


def test_a_published_file_is_there_whole_and_alone(tmp_path):
    assert publish_file(tmp_path / "deep/er/a.bin", writes(b"abc")) is True
    assert (tmp_path / "deep/er/a.bin").read_bytes() == b"abc"
    assert names(tmp_path / "deep/er") == ["a.bin"]


def test_publishing_again_keeps_the_first_file(tmp_path):
    publish_file(tmp_path / "a", writes(b"first"))
    assert publish_file(tmp_path / "a", writes(b"second")) is False
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_one_of_eight_threads_wins(tmp_path):
    for race in range(10):
        path, won, ready = tmp_path / f"{race}", [], threading.Barrier(WRITERS, timeout=PATIENCE_S)

        def publish(_: threading.Event, number: int, path=path, won=won, ready=ready) -> None:
            ready.wait()
            won.append((publish_file(path, writes(bytes([number]) * BYTES_EACH)), number))

        with in_background(*(partial(publish, number=number) for number in range(WRITERS))):
            pass
        (winner,) = [number for created, number in won if created]
        assert path.read_bytes() == bytes([winner]) * BYTES_EACH
        assert len(won) == WRITERS
    assert names(tmp_path) == sorted(str(race) for race in range(10))


def _publish_races(folder: Path, number: int, ready, results) -> None:
    for race in range(5):
        ready.wait()
        results.put((race, publish_file(folder / f"{race}", writes(bytes([number]) * BYTES_EACH)), number))


def test_one_of_eight_processes_wins(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, results = context.Barrier(WRITERS), context.Queue()
    processes = [context.Process(target=_publish_races, args=(tmp_path, n, ready, results)) for n in range(WRITERS)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in range(5 * WRITERS)]
    for process in processes:
        process.join()
    for race in range(5):
        (winner,) = [number for found, created, number in answers if created and found == race]
        assert (tmp_path / f"{race}").read_bytes() == bytes([winner]) * BYTES_EACH
    assert names(tmp_path) == ["0", "1", "2", "3", "4"]


def test_readers_see_the_old_file_or_the_new_one_and_never_a_part(tmp_path):
    path, seen = tmp_path / "manifest.json", set()
    contents = [bytes([65 + i]) * BYTES_EACH for i in range(2)]
    replace_file(path, writes(contents[0]))

    def read(ended: threading.Event) -> None:
        while not ended.is_set():
            seen.add(path.read_bytes())

    with in_background(read):
        for i in range(60):
            replace_file(path, writes(contents[i % 2]))
    assert seen <= set(contents)
    assert names(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("put", [publish_file, replace_file])
def test_a_failure_while_writing_leaves_nothing(tmp_path, put):
    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("the writer broke")

    with pytest.raises(RuntimeError, match="the writer broke"):
        put(tmp_path / "a", half)
    assert names(tmp_path) == []


def test_a_failure_while_replacing_keeps_the_old_file(tmp_path):
    def refuse(file: BinaryIO) -> None:
        file.write(b"new")
        raise OSError(errno.EIO, "Input/output error")

    publish_file(tmp_path / "a", writes(b"old"))
    with pytest.raises(StorageError, match=r"a: Input/output error"):
        replace_file(tmp_path / "a", refuse)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_file_and_folder_are_synced_before_the_call_returns(tmp_path, monkeypatch):
    """Power may fail right after: the content is on the disk before the name, and the name before the answer."""
    calls: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(_kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda a, b: (calls.append("link"), link(a, b)))
    publish_file(tmp_path / "a", writes(b"x"))
    assert calls == ["sync file", "link", "sync folder"]


def test_folders_that_had_to_be_made_are_synced_too(tmp_path, monkeypatch):
    """Else the name of a new folder can be lost with all that was committed in it."""
    synced: set[Path] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(Path(f"/proc/self/fd/{fd}").resolve()), fsync(fd)))
    publish_file(tmp_path / "labels/views-00000-00029/a", writes(b"x"))
    assert {tmp_path / "labels/views-00000-00029", tmp_path / "labels", tmp_path} <= synced


def _kind(descriptor: int) -> str:
    return "sync folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "sync file"


# Where hard links do not exist.


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links_a_file_is_still_published_create_only(tmp_path, monkeypatch, code):
    def no_links(*_) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)
    assert publish_file(tmp_path / "a", writes(b"first")) is True
    assert publish_file(tmp_path / "a", writes(b"second")) is False
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_another_refusal_of_link_is_an_error(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=r"a: Permission denied\. Choose a folder that can be written"):
        publish_file(tmp_path / "a", writes(b"x"))
    assert names(tmp_path) == []


# Full disks and closed folders, as the system itself refuses them.

FULL_DISK = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from pipeline.errors import StorageError
from pipeline.storage.atomic import publish_file, replace_file
{limit}
folder = Path({folder!r})
for put in (publish_file, replace_file):
    try:
        put(folder / ("new" if put is publish_file else "old"), lambda file: file.write(bytes(3 << 20)))
    except StorageError as error:
        print(error)
"""
LIMIT = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"


def run_python(code: str, *, user: int | None = None) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, user=user, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_over_the_size_limit_is_an_error_and_leaves_nothing(tmp_path):
    publish_file(tmp_path / "old", writes(b"old"))
    first, second = run_python(FULL_DISK.format(root=str(ROOT), limit=LIMIT, folder=str(tmp_path)))
    assert first == f"{tmp_path}/new: File too large"
    assert second == f"{tmp_path}/old: File too large"
    assert (names(tmp_path), (tmp_path / "old").read_bytes()) == (["old"], b"old")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_with_a_way_out_and_leaves_nothing(small_disk):
    publish_file(small_disk / "old", writes(b"old"))
    first, second = run_python(FULL_DISK.format(root=str(ROOT), limit="", folder=str(small_disk)))
    way_out = "No space left on device. Free some space"
    assert (first, second) == (f"{small_disk}/new: {way_out}", f"{small_disk}/old: {way_out}")
    assert (names(small_disk), (small_disk / "old").read_bytes()) == (["old"], b"old")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    code = FULL_DISK.format(root=str(ROOT), limit="", folder="closed").replace("import sys\n", "import sys, os\n")
    code = code.replace("folder = Path", f"os.fchdir({{fd}}); os.setuid({os.getuid() or 65534})\nfolder = Path")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code.format(fd=descriptor)],
            capture_output=True,
            text=True,
            timeout=60,
            pass_fds=(descriptor,),
            check=False,
        )
    finally:
        os.close(descriptor)
    assert done.stderr == ""
    refusal = "Permission denied. Choose a folder that can be written and read"
    assert done.stdout.splitlines() == [f"closed/new: {refusal}", f"closed/old: {refusal}"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EROFS, "Read-only file system. Choose a folder that can be written"),
        (errno.EDQUOT, "Disk quota exceeded. Raise the quota"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_refusals_of_the_system_say_what_to_do(tmp_path, code, text):
    def refuse(_: BinaryIO) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError) as caught:
        publish_file(tmp_path / "a", refuse)
    assert str(caught.value) == f"{tmp_path / 'a'}: {text}"


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        publish_file(tmp_path / "a" / "b", writes(b"x"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"nothing: no such file or folder"):
        sha256_file(tmp_path / "nothing")


# Sweeping: only what dead writers of this host left.


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_sweep_removes_temporaries_of_dead_writers_only(tmp_path):
    host, dead = storage._host(), dead_pid()
    token = "0123456789abcdef"
    kept = [
        f".tmp-{host}-{os.getpid()}-{token}",  # a writer that lives
        f".tmp-{host}-1-{token}",  # init lives, and may belong to somebody else
        f".tmp-other-{host}-{dead}-{token}",  # another host: nobody here knows whether it lives
        f".tmp-{host}-{dead}-{token}x",  # not a name of ours
        f".tmp-{host}-{dead}",
        f"tmp-{host}-{dead}-{token}",
        "train-0.parquet",
    ]
    swept = [f".tmp-{host}-{dead}-{token}", f".tmp-{host}-{dead}-{token[::-1]}"]
    for name in kept + swept:
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / name).write_text("x")
    assert sweep_temporaries(tmp_path) == len(swept)
    assert names(tmp_path / "labels") == sorted(kept)


@pytest.mark.parametrize("kind", ["number beyond any process", "folder"])
def test_sweep_leaves_alone_what_it_cannot_have_written(tmp_path, kind):
    if kind == "folder":
        (tmp_path / f".tmp-{storage._host()}-{dead_pid()}-0123456789abcdef").mkdir()
    else:
        (tmp_path / f".tmp-{storage._host()}-{10**30}-0123456789abcdef").write_text("x")
    assert sweep_temporaries(tmp_path) == 0
    assert len(names(tmp_path)) == 1


def test_a_killed_writer_s_temporary_is_swept(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline.storage.atomic import publish_file
publish_file(Path({str(tmp_path)!r}) / "a", lambda file: (file.write(b"x"), os.kill(os.getpid(), 9)))
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    (left,) = names(tmp_path)
    assert left.startswith(".tmp-")
    assert sweep_temporaries(tmp_path) == 1
    assert names(tmp_path) == []


def test_host_names_of_any_kind_make_temporaries_that_are_recognised(tmp_path, monkeypatch):
    for host in ("gpu-07.cluster.local", "a_b", "Rechner für alle", ""):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        (tmp_path / f".tmp-{storage._host()}-{dead_pid()}-0123456789abcdef").write_text("x")
        assert sweep_temporaries(tmp_path) == 1, host


# Strict JSON.

REFUSED = [
    # bytes, what the error says
    (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    (b'{"b": {"a": 1, "c": 2, "a": 1}}', "the key 'a' stands twice"),
    (b'{"a": NaN}', "NaN is not a JSON number"),
    (b'{"a": Infinity}', "Infinity is not a JSON number"),
    (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    (b'{"a": 1e400}', "1e400 is too large for a number"),
    (b"[-1e999]", "-1e999 is too large for a number"),
    (rb'{"a": "\ud800"}', "surrogates not allowed"),
    (rb'{"\udfff": 1}', "surrogates not allowed"),
    (b"\xef\xbb\xbf{}", "BOM"),
    ('{"a": 1}'.encode("utf-16"), "utf-8"),
    (b'{"a": "\xff"}', "utf-8"),
    (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
    (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    (b"", "Expecting value"),
    (b'{"a": 1', "Expecting"),
    (b'{"a": 1} {}', "Extra data"),
    (b"{'a': 1}", "Expecting property name"),
    (b'{"a": 1,}', "property name|trailing comma"),
    (b'{"a": "\n"}', "control character"),
]


@pytest.mark.parametrize(("data", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_json_that_two_readers_could_read_differently_is_refused(tmp_path, data, reason):
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(StorageError, match="(?i)plan.json: not valid JSON: .*" + reason):
        read_json(tmp_path / "plan.json")


def test_a_json_file_over_the_size_limit_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_bytes(b'{"a": 123}')
    assert read_json(tmp_path / "a.json") == {"a": 123}
    (tmp_path / "a.json").write_bytes(b'{"a": 1234}')
    with pytest.raises(StorageError, match="at most 10 bytes, this one has 11"):
        read_json(tmp_path / "a.json")


def test_pretty_json_has_one_text_and_reads_back():
    value = {"b": [1, 2.5, None, True], "a": {"ü": "\u2028"}}
    again = {"a": {"ü": "\u2028"}, "b": [1, 2.5, None, True]}
    assert pretty_json(value) == pretty_json(again)
    assert parse_json(pretty_json(value)) == value
    assert pretty_json(value).endswith(b"}\n")


def test_pretty_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON compliant"):
        pretty_json({"a": float("nan")})


def test_a_folder_is_no_json_file(tmp_path):
    with pytest.raises(StorageError, match="a plain file must be here, not a folder"):
        read_json(tmp_path)
