"""Remote files brought to stay: resumed where they were cut, and given their names when their SHA-256 is right.

What has come of a file stands beside it as `.part-HASH`, named by what it is to become, and is locked while somebody is at
it. A later run asks for the rest only. That the first part was right shows in the hash of the whole, so nothing else of it
is believed; where the hash is wrong the file is fetched once more from its start.
"""

import logging
import os
import threading
from pathlib import Path

from pipeline.errors import RemoteFileCorrupt
from pipeline.repeats import warn_again
from pipeline.storage.atomic import locked, make_folder, publish_partial, refusals_named
from pipeline.storage.remote import Interrupted, Received, receive, retried

log = logging.getLogger("deit_cli.downloads")


class Stopped(Exception):
    """Whoever waited for the file was told to end."""


def download(url: str, path: Path, *, size: int, sha256: str, stop: threading.Event | None = None) -> bool:
    """Bring a remote file here under its final name, create-only.

    Args:
        url: of the file.
        path: its final name.
        size: promised bytes.
        sha256: promised hash.
        stop: when it is set, the download ends.

    Returns:
        True if the file came, False if another process had given the name meanwhile.

    Raises:
        RemoteFileMissing: there is no such file.
        RemoteFileCorrupt: it has not the promised length or hash, from its start on too.
        StorageError: it could not be received or written.
        Stopped: as told.
    """
    stop = stop or threading.Event()
    make_folder(path.parent)
    partial = path.with_name(f".part-{sha256[:32]}")
    with locked(partial):
        if path.exists():  # whoever held the lock before has brought it
            partial.unlink(missing_ok=True)
            return False
        for trusted in (True, False):
            if not trusted:
                os.truncate(partial, 0)
            try:
                received = retried(url, lambda: _continue(url, partial, size, stop), pause=stop.wait)
            except RemoteFileCorrupt:
                if not trusted:
                    raise
                warn_again(
                    log,
                    "downloads that began anew",
                    "%s: what has come does not go on as it began; fetching it from its start",
                    url,
                )
                continue
            if received.sha256 == sha256:
                return publish_partial(partial, path)
            warn_again(
                log,
                "downloads that began anew",
                "%s has SHA-256 %s…, not %s…; fetching it from its start",
                url,
                received.sha256[:12],
                sha256[:12],
            )
        os.truncate(partial, 0)
    raise RemoteFileCorrupt(
        f"{url} has SHA-256 {received.sha256[:12]}…, {sha256[:12]}… is promised: it was changed or replaced"
    )


def _continue(url: str, partial: Path, size: int, stop: threading.Event) -> Received:
    """Receive what is missing of a file behind what is here of it."""

    def check(_: int) -> None:
        if stop.is_set():
            raise Stopped

    with refusals_named(partial), partial.open("r+b") as file:
        here = os.fstat(file.fileno()).st_size
        if here > size:
            file.truncate(0)
            here = 0
        check(here)
        try:
            return receive(url, file, size=size, start=here, check=check)
        except Interrupted:
            check(here)  # whoever ends a process cuts its connections
            raise
