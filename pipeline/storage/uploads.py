"""Remote files written through fsspec: whole or not at all, create-only unless a caller asks to replace.

An object store gives a file its name when the last byte has come, so nothing half-written is ever seen; a new file goes up
on the condition that its name is free, and a manifest on the condition that it is still the one that was read. When a
connection fails nobody knows whether the store has the file, so before anything is sent again its own content is looked for.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import RemoteFileCorrupt, RemoteFileMissing, StorageError
from pipeline.storage.remote import NO_PROMISE, Promise, info_of, read_url, receive, retried
from pipeline.storage.stores import Interrupted, Store, Upload, store_of

_SWAPS = 100  # writers that came between, one after the other


def put_file(path: Path, url: str, *, sha256: str | None = None, replace: bool = False) -> bool:
    """Upload a local file whole.

    Args:
        path: path of the file; it must not change meanwhile.
        url: its name there: s3://, gs:// or hf://.
        sha256: promised hash of the file, or None; another file is not sent.
        replace: swap what is there, atomically, instead of leaving it.

    Returns:
        True if `url` now holds these very bytes, whether this call brought them or found them; False if it holds others,
        which stay.

    Raises:
        RemoteFileRefused: there is no access.
        StorageError: it could not be written, or is not the promised one; what stood under the name before still does.
    """
    return _put(Upload(url, path, sha256), replace=replace)


def put_bytes(data: bytes, url: str, *, replace: bool = False) -> bool:
    """Upload bytes whole, as `put_file` does a file."""
    return _put(Upload(url, data), replace=replace)


def update_url(url: str, change: Callable[[bytes | None], bytes], *, max_bytes: int) -> bytes:
    """Replace a small remote file by `change(old)`, so that no other writer's change is lost; return what it holds then.

    The store is asked to replace the very version that was read (S3: `If-Match`, Google: generation, Hub: parent commit). As
    some stores ignore conditions, the file is read again afterwards, and changed once more where the change is not in it.

    Args:
        url: URL of the file.
        change: is given the old content (None: there is no file) and returns the new. Given what it returned, or what
            another writer's change made of that, it must return the same bytes.
        max_bytes: maximum size of the file.

    Raises:
        StorageError: it could not be written, or other writers were quicker every time.
    """
    refuse_unwritable(url)
    for _ in range(_SWAPS):
        version, old = _version(url), _read(url, max_bytes)
        new = change(old)
        if new == old:
            return new
        if (version is None) == (old is None):  # else it came or went between the two
            _swap(Upload(url, new), version)
    raise StorageError(
        f"{url}: others have changed it {_SWAPS} times meanwhile",
        fix="Run the same command again",
    )


def holds(url: str, path: Path, promise: Promise = NO_PROMISE) -> bool | None:
    """Return whether a remote file has the bytes of a local one; None where there is none.

    Length and the store's own checksum decide where they can; otherwise the file is read back and its SHA-256 compared.

    Args:
        url: URL of the remote file.
        path: path of the local file.
        promise: length and hash that the local one should have; where nothing is promised, those that it has count.
    """
    upload = Upload(url, path, promise.sha256)
    return _holds(upload, upload.size if promise.bytes is None else promise.bytes)


def remove_url(url: str) -> None:
    """Delete a remote file, if it is there; raises what the file system does."""
    system, path = store_of(url).file_system(url)
    if system.exists(path):
        system.rm_file(path)


def refuse_unwritable(url: str) -> None:
    """Raise StorageError for a URL whose store takes no files."""
    if not store_of(url).takes_files:
        raise StorageError(f"{url}: a web server takes no files; push to a bucket, or to a folder that it serves")


def _put(upload: Upload, *, replace: bool) -> bool:
    refuse_unwritable(upload.url)
    store = store_of(upload.url)
    _ = upload.size  # raises for a local file that cannot be read, before the store is asked
    tries = 0

    def attempt() -> bool:
        nonlocal tries
        tries += 1
        if tries > 1 and _holds(upload):  # the last answer was lost, and only that
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
    """Write content if the file is still of this version (None: absent); return whether it is there now."""
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


def _version(url: str) -> str | None:
    """Return what the store calls the present version of a file, an empty text where it has no name for it; None where there is no file."""
    info = info_of(url)
    return None if info is None else store_of(url).version(url, info)


def _read(url: str, max_bytes: int) -> bytes | None:
    try:
        return read_url(url, max_bytes=max_bytes)
    except RemoteFileMissing:
        return None


def _holds_now(upload: Upload) -> bool:
    """The store says that the name is taken: by this content?"""
    found = _holds(upload)
    if found is None:  # it went between the two, or this store answers late
        raise Interrupted("the name was taken, and then there was no file")
    return found


def _holds(upload: Upload, size: int | None = None) -> bool | None:
    size = upload.size if size is None else size
    info = info_of(upload.url)
    if info is None:
        return None
    if info.get("size") != size:
        return False
    same = store_of(upload.url).same_checksum(upload, info)
    return same or _received_sha256(upload, size) == upload.sha256  # a damaged local file has another checksum


def _received_sha256(upload: Upload, size: int) -> str:
    def attempt() -> str:
        with open(os.devnull, "wb") as nowhere:
            return receive(upload.url, nowhere, size=size).sha256

    return retried(upload.url, attempt)


def _check_arrived(upload: Upload) -> None:
    """Compare the length, and the checksum where the store gives one, of what was just stored."""
    info = info_of(upload.url)
    if info is None or info.get("size") != upload.size or store_of(upload.url).same_checksum(upload, info) is False:
        found = "no file" if info is None else f"{info.get('size')} bytes"
        raise RemoteFileCorrupt(
            f"{upload.url}: {upload.size} bytes were stored, and now there is {found} or another"
            " checksum: another writer replaced it, or the store lost it",
            fix="Find out who writes there, and run the same command again",
        )
