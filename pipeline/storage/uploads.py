"""Atomic writing of remote files through fsspec, create-only unless a caller asks to replace.

An object store gives a file its name once the last byte has arrived, so readers never see a partial file; a new file is sent
on the condition that its name is free, and a manifest on the condition that the old one has not changed. When a
connection fails, the store may or may not have the file, so before a retry the code checks if its content is already there.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import RemoteFileCorrupt, RemoteFileMissing, StorageError
from pipeline.storage.patience import Interrupted
from pipeline.storage.remote import NO_PROMISE, Promise, info_of, read_url, receive, retried
from pipeline.storage.stores import Store, Upload, store_of

_SWAPS = 100  # maximum number of attempts when other writers are faster


def put_file(path: Path, url: str, *, sha256: str | None = None, replace: bool = False) -> bool:
    """Upload a complete local file.

    Args:
        path: path of the file; it must not change during the upload.
        url: destination: s3://, gs:// or hf://.
        sha256: promised hash of the file, or None; a file with another hash is not sent.
        replace: replace an existing file atomically instead of keeping it.

    Returns:
        True if `url` now has these bytes, sent by this call or found there; False if it has others, which
        stay.

    Raises:
        RemoteFileRefused: access was denied.
        StorageError: the file could not be written, or is not the promised one; an old file under the name is unchanged.
    """
    return _put(Upload(url, path, sha256), replace=replace)


def put_bytes(data: bytes, url: str, *, replace: bool = False) -> bool:
    """Upload bytes, as `put_file` does for a file."""
    return _put(Upload(url, data), replace=replace)


def update_url(url: str, change: Callable[[bytes | None], bytes], *, max_bytes: int) -> bytes:
    """Replace a small remote file by `change(old)` without losing other writers' changes; return its new content.

    The store is asked to replace only the version that was read (S3: `If-Match`, Google: generation, Hub: parent commit). As
    some stores ignore conditions, the file is read again afterwards, and changed again if it lacks the change.

    Args:
        url: URL of the file.
        change: function from the old content (None: the file does not exist) to the new content. Applied to its own
            result, or to that result after another writer's change, it must return its input.
        max_bytes: maximum size of the file.

    Raises:
        StorageError: the file could not be written, or other writers were faster every time.
    """
    refuse_unwritable(url)
    for _ in range(_SWAPS):
        info = info_of(url)
        version = None if info is None else store_of(url).version(url, info)
        old = read_url(url, max_bytes=max_bytes)
        new = change(old)
        if new == old:
            return new
        if (version is None) == (old is None):  # otherwise the file was created or deleted between the two calls
            _swap(Upload(url, new), version)
    raise StorageError(f"{url}: others have changed it {_SWAPS} times meanwhile", fix="Run the same command again")


def holds(url: str, path: Path, promise: Promise = NO_PROMISE) -> bool | None:
    """Return True if a remote file has the bytes of a local one, None if it does not exist.

    Length and the store's own checksum are compared if possible; otherwise the file is read back and its SHA-256 compared.

    Args:
        url: URL of the remote file.
        path: path of the local file.
        promise: promised length and hash of the local file; its actual ones are used where nothing is promised.
    """
    upload = Upload(url, path, promise.sha256)
    return _holds(upload, upload.size if promise.bytes is None else promise.bytes)


def remove_url(url: str) -> None:
    """Delete a remote file if it exists; it raises the errors of the file system."""
    system, path = store_of(url).file_system(url)
    if system.exists(path):
        system.rm_file(path)


def refuse_unwritable(url: str) -> None:
    """Raise StorageError for a URL whose store cannot be written to."""
    if not store_of(url).takes_files:
        raise StorageError(f"{url}: a web server takes no files; push to a bucket, or to a folder that it serves")


def _put(upload: Upload, *, replace: bool) -> bool:
    refuse_unwritable(upload.url)
    store = store_of(upload.url)
    _ = upload.size  # raises for an unreadable local file before the store is accessed
    tries = 0

    def attempt() -> bool:
        nonlocal tries
        tries += 1
        if tries > 1 and _holds(upload):  # the last upload succeeded, and only its answer was lost
            return True
        try:
            store.send(upload, replace=replace)
        except Exception as error:
            if store.is_taken(error) and not replace:
                return _holds_now(upload)
            raise _write_error(store, upload, error) from error
        _check_arrived(upload)
        return True

    return retried(upload.url, attempt)


def _swap(upload: Upload, version: str | None) -> bool:
    """Write content if the file still has this version (None: does not exist); return True if it is there now."""
    store = store_of(upload.url)

    def attempt() -> bool:
        try:
            store.send(upload, replace=version is not None, version=version)
        except Exception as error:
            if store.is_taken(error):
                return bool(_holds(upload))
            raise _write_error(store, upload, error) from error
        return True

    return retried(upload.url, attempt)


def _write_error(store: Store, upload: Upload, error: Exception) -> Exception:
    found = store.named(upload.url, error, doing="written")
    if isinstance(found, RemoteFileMissing):
        return RemoteFileMissing(
            f"{upload.url}: there is no such bucket or repository", fix="Check the address, or make it first"
        )
    return found


def _holds_now(upload: Upload) -> bool:
    """Return True if the name, which the store reports as taken, has this content."""
    found = _holds(upload)
    if found is None:  # the file was deleted between the two calls, or this store answers late
        raise Interrupted("the name was taken, and then there was no file")
    return found


def _holds(upload: Upload, size: int | None = None) -> bool | None:
    size = upload.size if size is None else size
    info = info_of(upload.url)
    if info is None:
        return None
    if info.get("size") != size:
        return False
    if store_of(upload.url).same_checksum(upload, info):
        return True
    try:
        return _received_sha256(upload, size) == upload.sha256  # a damaged local file has another checksum
    except RemoteFileCorrupt:  # another writer has replaced it since the question
        return False


def _received_sha256(upload: Upload, size: int) -> str:
    with open(os.devnull, "wb") as nowhere:
        return retried(upload.url, lambda: receive(upload.url, nowhere, size=size)).sha256


def _check_arrived(upload: Upload) -> None:
    """Check the length of a file that was just stored, and its checksum if the store gives one."""
    info = info_of(upload.url)
    if info is None or info.get("size") != upload.size or store_of(upload.url).same_checksum(upload, info) is False:
        found = "no file" if info is None else f"{info.get('size')} bytes"
        raise RemoteFileCorrupt(
            f"{upload.url}: {upload.size} bytes were stored, and now there is {found} or another"
            " checksum: another writer replaced it, or the store lost it",
            fix="Find out who writes there, and run the same command again",
        )
