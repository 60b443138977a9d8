"""The kept index of a source: its keys, class labels and places, in an Arrow file that all processes of a machine map.

Reading every header of 1,281 tars takes half a minute, and every command needs their keys. The first one writes them down;
later ones map the file. It says only where to look: an entry is used while length and date of its tar are as they were, and
whatever is read through it is compared with the files (`SourceShard.read_image`), so an index that is old, damaged or false
can only lead to an error.
"""

import contextlib
import functools
import logging
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from pipeline.errors import SourceError, StorageError, UsageError
from pipeline.images.samples import ShardIndex, ShardSummary, SourceShard
from pipeline.machine.progress import Progress, Tick
from pipeline.machine.threads import ProgressCounter, in_threads, usable_cores
from pipeline.repeats import forward_messages, log_forwarded
from pipeline.storage.atomic import locked, make_folder, refusals_named, replace_file, sweep_temporaries
from pipeline.storage.json import canonical_json, load_json

log = logging.getLogger("deit_cli.index")

VERSION = 1  # of the file and of what readers take for a sample: a change of either makes old files useless
LEAST_KEPT = 10_000  # samples; a smaller source is indexed in a fraction of a second
SHARDS_FOR_WORKERS = 32  # source shards to index from which on processes are worth their start
_DAY_S = 86400.0
UNUSED_S = 90 * _DAY_S  # an index that was not used for so long is deleted
SIDECAR_NAME = ".deit-cli-index.arrow"  # hidden, so that it is no part of the source beside which it lies
_TOLD_S = 10.0  # between two messages about a long indexing
_KEY = b"deit-cli-index"
_MOST_FOOTER_BYTES = 256 << 20
_UNUSABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError, RecursionError, StorageError)


class Entry(NamedTuple):
    """One source shard in an index: the number of its record batch, the state of its file, and its summary."""

    batch: int
    state: tuple[int, ...]
    summary: ShardSummary


class Indexed(NamedTuple):
    """A source shard that was indexed just now; `state` is that of its file before."""

    name: str
    state: tuple[int, ...] | None
    summary: ShardSummary
    batch: pa.RecordBatch


@dataclass(frozen=True)
class KeptIndex:
    """The index of one source in a file, which need not exist yet. Its fields are pickled; each process maps the file itself.

    Attributes:
        path: the file that is read, and written where it lacks something.
        identity: hash of what decides the samples beside the files: options and class names.
        sidecar: a second file that is read but not written by `complete`: the one that `deit-cli index` writes beside the source. It
            may come from another machine, where the files have other dates: only their lengths are compared.
    """

    path: Path
    identity: str
    sidecar: Path

    def load(self, shard: SourceShard[Any]) -> ShardIndex[Any] | None:
        """Return the index of a source shard, or None if it is not there or its file has changed since."""
        for mapped, entry in self._entries(shard):
            batch = mapped.batch(entry.batch, _schema(shard.place_type))
            if batch is not None:
                index = ShardIndex.of_batch(batch, shard.place_type)
                if ShardSummary.of(index) == entry.summary:
                    return index
        return None

    def summary(self, shard: SourceShard[Any]) -> ShardSummary | None:
        """Return the summary of a source shard, or None if it is not there or its file has changed since."""
        return next((entry.summary for _, entry in self._entries(shard)), None)

    def discard(self) -> str:
        """Delete the index because it does not fit its source, and return what the user can do."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        if self.sidecar.is_file():
            return f"Delete {self.sidecar}, or write it anew with deit-cli index, and run the command again"
        return "Run the command again: it indexes the file anew"

    def complete(self, shards: Sequence[SourceShard[Any]], progress: Progress | None = None) -> None:
        """Index the source shards that are missing or have changed; write the file anew if the source is large enough.

        Args:
            shards: all shards of the source.
            progress: receives the number of indexed source shards; None: a message now and then.

        Raises:
            SourceError: a file cannot be read as a source.
        """
        # Source shards that show a part of others, or other labels, have no index of their own.
        shards = [shard for shard in shards if shard.kept == self]
        if not self._missing(shards):
            return
        with self._alone():  # of several ranks that start together, one works and the others wait
            if missing := self._missing(shards):
                self._extend(shards, missing, progress or _Teller())

    def complete_beside(self, shards: Sequence[SourceShard[Any]]) -> None:
        """Do the same in a thread, for a process that goes on meanwhile: it and its loader processes use the file once it is there.

        Until then each of them indexes the source shards that it uses. A file that cannot be read is an error there.
        """

        def work() -> None:
            with contextlib.suppress(SourceError, StorageError):
                self.complete(shards)

        if len(shards) >= SHARDS_FOR_WORKERS:
            Thread(target=work, daemon=True, name="index").start()

    def _missing(self, shards: Sequence[SourceShard[Any]]) -> list[SourceShard[Any]]:
        """Return the source shards without an index, here and in the file."""
        return [shard for shard in shards if not shard.has_index and self.summary(shard) is None]

    def _extend(
        self, shards: Sequence[SourceShard[Any]], missing: Sequence[SourceShard[Any]], progress: Progress
    ) -> None:
        by_name = {shard.name: shard for shard in missing}
        found = index_shards(missing, progress)
        first = list(_until(found, LEAST_KEPT if len(missing) == len(shards) else 0))
        if sum(each.batch.num_rows for each in first) < LEAST_KEPT and len(missing) == len(shards):
            for each in first:  # small enough to stay in memory
                shard = by_name[each.name]
                shard.use_index(ShardIndex.of_batch(each.batch, shard.place_type), each.state)
            return
        try:
            make_folder(self.path.parent)
            _sweep(self.path.parent)
            old = self._old(by_name, _schema(shards[0].place_type))
            replace_file(self.path, lambda file: _write(file, self.identity, chain(first, old, found)))
        except StorageError as error:  # each process then indexes what it uses
            log.debug("%s cannot be written: %s", self.path, error)

    def _old(self, without: Container[str], schema: pa.Schema) -> Iterator[Indexed]:
        """Yield what the present file has of other source shards; whether it is still good is decided where it is used."""
        if (mapped := _mapped(self.path, self.identity)) is None:
            return
        for name, entry in mapped.entries.items():
            if name not in without and (batch := mapped.batch(entry.batch, schema)) is not None:
                yield Indexed(name, entry.state, entry.summary, batch)

    def _entries(self, shard: SourceShard[Any]) -> Iterator[tuple["_Mapped", Entry]]:
        """Yield the entries of a source shard whose file is as it was."""
        state = shard.state
        if state is None:
            return
        for path in (self.path, self.sidecar):
            mapped = _mapped(path, self.identity)
            entry = mapped.entries.get(shard.name) if mapped else None
            if mapped and entry and (entry.state == state or (path == self.sidecar and entry.state[0] == state[0])):
                yield mapped, entry

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the file against other processes that want to write it, where the folder allows it."""
        lock = self.path.with_suffix(".lock")
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(StorageError):
                make_folder(self.path.parent)
                stack.enter_context(locked(lock))
            try:
                yield
            finally:
                if not self.path.exists():
                    with contextlib.suppress(OSError):
                        lock.unlink(missing_ok=True)


class _Mapped:
    """A mapped index file: its entries, and its record batches on demand."""

    def __init__(self, path: Path, identity: str) -> None:
        self._bytes = path.stat().st_size
        _refuse_extension_types(path)
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        about = load_json((self._reader.schema.metadata or {}).get(_KEY, b"{}"), str(path))
        if about != {"version": VERSION, "identity": identity}:
            raise ValueError("an index of something else")
        self.entries: dict[str, Entry] = {}
        for number in range(self._reader.num_record_batches):
            _, more = self._reader.get_batch_with_custom_metadata(number)
            name, entry = _entry(number, load_json(more[_KEY], str(path)))
            self.entries[name] = entry

    def batch(self, number: int, schema: pa.Schema) -> pa.RecordBatch | None:
        """Return a record batch of these columns whose values are sound as such, or None."""
        try:
            batch = self._reader.get_batch(number)
            batch.validate(full=True)  # lengths and offsets, UTF-8
        except _UNUSABLE as error:
            log.debug("a batch of an index cannot be used: %s", error)
            return None
        whole = all(column.null_count == 0 for column in batch.columns if column.type != pa.int32())
        return batch if whole and batch.nbytes <= self._bytes and batch.schema.equals(schema) else None


@functools.cache
def _schema(place_type: type[Any]) -> pa.Schema:
    """Return the columns of an index."""
    return ShardIndex[Any]((), (), ()).to_batch(place_type).schema


_OPEN: dict[Path, tuple[tuple[int, ...], str, "_Mapped | None"]] = {}


def _mapped(path: Path, identity: str) -> _Mapped | None:
    """Return a mapped index file; None if there is none, or none of this identity. It is mapped anew when it was replaced."""
    try:
        found = path.stat()
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):  # opening a pipe would wait
        _OPEN.pop(path, None)
        return None
    state = (found.st_dev, found.st_ino, found.st_size)  # a replacement has another inode while this one is mapped
    held = _OPEN.get(path)  # another thread may delete it at any time
    if held is None or held[:2] != (state, identity):
        try:
            mapped = _Mapped(path, identity)
        except _UNUSABLE as error:
            log.debug("%s cannot be used: %s", path, error)
            mapped = None
        held = _OPEN[path] = (state, identity, mapped)
        note_use(path, found.st_mtime)
    return held[2]


def note_use(path: Path, last_s: float) -> None:
    """Date a kept file by its last use, to the day: nobody else has a reason to look at it again."""
    if time.time() - last_s > _DAY_S:
        with contextlib.suppress(OSError):  # beside the data it may belong to somebody else
            os.utime(path)


def _entry(number: int, about: Any) -> tuple[str, Entry]:
    """Return name and entry of a batch from its metadata; raise ValueError, TypeError or KeyError for anything else."""
    summary = ShardSummary(**about["summary"])
    integers = (*about["state"], summary.num_samples, summary.num_labelled, summary.max_label or 0)
    if not all(type(value) is int for value in integers) or min(integers) < 0 or type(about["name"]) is not str:
        raise ValueError("values of another type")
    if type(summary.keys_sha256) is not str or not summary.num_samples or len(about["state"]) != 2:
        raise ValueError("values of another type")
    return about["name"], Entry(number, tuple(about["state"]), summary)


def _refuse_extension_types(path: Path) -> None:
    """Raise ValueError if a column has an extension type: a registered one may run code when the schema is read."""
    with path.open("rb") as file:
        file.seek(-10, os.SEEK_END)
        size, magic = struct.unpack("<i6s", file.read(10))
        if magic != b"ARROW1" or not 0 < size <= min(_MOST_FOOTER_BYTES, file.seek(0, os.SEEK_END) - 10):
            raise ValueError("not a whole Arrow file")
        file.seek(-10 - size, os.SEEK_END)
        if b"ARROW:extension" in file.read(size):
            raise ValueError("it has an extension type")


def _write(file: BinaryIO, identity: str, shards: Iterator[Indexed]) -> None:
    """Write an index file: one record batch for each source shard."""
    head = {_KEY: canonical_json({"version": VERSION, "identity": identity})}
    writer = None
    for each in shards:
        if writer is None:
            writer = pa.ipc.new_file(file, each.batch.schema.with_metadata(head))
        if each.state is not None:  # else the file is gone already
            about = {"name": each.name, "state": each.state, "summary": asdict(each.summary)}
            writer.write_batch(each.batch, custom_metadata={_KEY: canonical_json(about)})
    assert writer is not None
    writer.close()


def _until(found: Iterator[Indexed], samples: int) -> Iterator[Indexed]:
    """Yield source shards until they have so many samples together."""
    seen = 0
    while seen < samples and (each := next(found, None)):
        seen += each.batch.num_rows
        yield each


def _sweep(folder: Path) -> None:
    """Delete the indexes in a folder that were not used for long, and what killed processes left."""
    sweep_temporaries(folder)
    with refusals_named(folder):
        for entry in os.scandir(folder):
            if entry.name.endswith((".arrow", ".listing", ".lock")) and time.time() - entry.stat().st_mtime > UNUSED_S:
                os.unlink(entry.path)


class _Teller:
    """Progress of an indexing as messages: none for a short one."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, tick: Tick) -> None:
        if time.monotonic() - self._told > _TOLD_S:
            self._told = time.monotonic()
            log.info("indexing the source: %d of %d source shards", tick.done, tick.total)


def write_sidecar(source: Any, progress: Progress | None = None) -> Path:
    """Write the index of a local source beside it, and return its path. The same files give the same bytes.

    Args:
        source: the source of tars or Parquet files.
        progress: receives the number of indexed source shards.

    Raises:
        UsageError: the source has no files of this kind, or its class labels come from another file.
        SourceError: a file cannot be read as a source.
        StorageError: the index cannot be written.
    """
    kept = source.kept
    if kept is None:
        raise UsageError(
            f"{source.location} gets no index: it is for local tars and Parquet files with class labels of their own",
            fix="An image folder needs none, because its listing is kept in the cache folder",
        )
    found = index_shards(source.shards, progress or _Teller())
    with contextlib.closing(found):
        undated = (each._replace(state=each.state and (each.state[0], 0)) for each in _in_order(found, source.shards))
        replace_file(kept.sidecar, lambda file: _write(file, kept.identity, undated))
    return kept.sidecar


def _in_order(found: Iterator[Indexed], shards: Sequence[SourceShard[Any]]) -> Iterator[Indexed]:
    """Yield indexed source shards in the order of the source; those that come too soon are held."""
    early: dict[str, Indexed] = {}
    for shard in shards:
        while shard.name not in early:
            each = next(found)
            early[each.name] = each
        yield early.pop(shard.name)


def index_shards(shards: Sequence[SourceShard[Any]], progress: Progress) -> Generator[Indexed, None, None]:
    """Index source shards, many of them in several processes; they come in any order.

    Raises:
        SourceError: a file cannot be read as a source.
    """
    count_one = ProgressCounter("index", len(shards), progress, unit="source shards")
    workers = usable_cores() if len(shards) >= SHARDS_FOR_WORKERS else 1
    with _asked(workers) as ask:
        for _, found in in_threads(shards, ask, workers):
            yield found
            count_one()


def index_shard(shard: SourceShard[Any]) -> Indexed:
    """Index one source shard from its files."""
    state, index = shard.state, shard.build_index()
    return Indexed(shard.name, state, ShardSummary.of(index), index.to_batch(shard.place_type))


@contextlib.contextmanager
def _asked(workers: int) -> Iterator[Callable[[SourceShard[Any]], Indexed]]:
    """Return a function that indexes a source shard: in this process, or in one of several that end with the block.

    The processes are new interpreters that import only what reads a source: neither the caller's main module nor torch.
    """
    if workers == 1:
        yield index_shard
        return
    free: SimpleQueue[_Worker] = SimpleQueue()
    everyone = [_Worker() for _ in range(workers)]
    for worker in everyone:
        free.put(worker)

    def ask(shard: SourceShard[Any]) -> Indexed:
        worker = free.get()
        try:
            return worker.ask(shard)
        finally:
            free.put(worker)

    try:
        yield ask
    finally:
        for worker in everyone:
            worker.end()


class _Worker:
    """A process that indexes source shards, which are sent to it one by one."""

    def __init__(self) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", "-c", "from pipeline.images.index import serve; serve()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
        )

    def ask(self, shard: SourceShard[Any]) -> Indexed:
        """Return the index of a source shard."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            pickle.dump(shard, self._process.stdin)
            self._process.stdin.flush()
            while isinstance(found := pickle.load(self._process.stdout), logging.LogRecord):
                log_forwarded(found)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise SourceError(
                f"a process that indexed {shard.name} ended early (exit {self._process.poll()})",
                fix="Run the command again; if memory is short, close other programs",
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.stdout.close()
        self._process.wait()


def serve() -> None:
    """Index the source shards that arrive on standard input, until it ends: the main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    os.nice(5)  # training may go on beside it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    logging.getLogger("deit_cli").setLevel(logging.INFO)
    forward_messages(lambda record: pickle.dump(record, answers))
    with contextlib.suppress(EOFError):
        while True:
            shard = pickle.load(sys.stdin.buffer)
            try:
                answer: Any = index_shard(shard)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
