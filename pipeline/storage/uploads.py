"""Remote files written through fsspec: whole or not at all, create-only unless a caller asks to replace.

An object store gives a file its name when the last byte has come, so nothing half-written is ever seen; a new file goes up
on the condition that its name is free, and a manifest on the condition that it is still the one that was read. When a
connection fails nobody knows whether the store has the file, so before anything is sent again its own content is looked for.
"""

import base64
import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import RemoteFileCorrupt, RemoteFileMissing, StorageError
from pipeline.storage.atomic import refusals_named, sha256_file
from pipeline.storage.remote import (
    Interrupted,
    file_system,
    info_of,
    named,
    read_url,
    receive,
    retried,
    status_of,
)
from pipeline.storage.urls import check_url, is_web, url_name

log = logging.getLogger("deit_cli.uploads")

PART_BYTES = 16 << 20  # of one request; a file of up to two goes up in one
PARTS_AT_ONCE = 4
_SWAPS = 100  # writers that came between, one after the other


def put_file(path: Path, url: str, *, sha256: str | None = None, replace: bool = False) -> bool:
    """Upload a local file whole.

    Args:
        path: of the file; it must not change meanwhile.
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
    return _put(_Content(url, path, sha256), replace=replace)


def put_bytes(data: bytes, url: str, *, replace: bool = False) -> bool:
    """Upload bytes whole, as `put_file` does a file."""
    return _put(_Content(url, data), replace=replace)


def update_url(url: str, change: Callable[[bytes | None], bytes], *, max_bytes: int) -> bytes:
    """Replace a small remote file by `change(old)`, so that no other writer's change is lost; return what it holds then.

    The store is asked to replace the very version that was read (S3: `If-Match`, Google: generation, Hub: parent commit). As
    some stores ignore conditions, the file is read again afterwards, and changed once more where the change is not in it.

    Args:
        url: of the file.
        change: is given the old content (None: there is no file) and returns the new. Given what it returned, or what
            another writer's change made of that, it must return the same bytes.
        max_bytes: of the file.

    Raises:
        StorageError: it could not be written, or other writers were quicker every time.
    """
    refuse_web(url)
    for _ in range(_SWAPS):
        version, old = _version(url), _read(url, max_bytes)
        new = change(old)
        if new == old:
            return new
        if (version is None) == (old is None):  # else it came or went between the two
            _swap(_Content(url, new), version)
    raise StorageError(
        f"{url}: others have changed it {_SWAPS} times meanwhile",
        fix="Run the same command again",
    )


def url_info(url: str) -> int | None:
    """Return the length of a remote file as the store says it now, never from a listing; None where there is none.

    Raises:
        StorageError: the store could not be asked, or does not say (a web server may not).
    """
    info = info_of(url)
    if info is None:
        return None
    if not isinstance(info.get("size"), int):
        raise StorageError(f"{url}: its server does not say how long it is")
    return info["size"]


def holds(url: str, path: Path, *, size: int | None = None, sha256: str | None = None) -> bool | None:
    """Return whether a remote file has the bytes of a local one; None where there is none.

    Length and the store's own checksum decide where they can; otherwise the file is read back and its SHA-256 compared.

    Args:
        url: of the remote file.
        path: of the local one.
        size: of the bytes that the local one should have; None: those that it has.
        sha256: likewise.
    """
    content = _Content(url, path, sha256)
    return _holds(content, content.size if size is None else size)


@dataclass(frozen=True)
class _Content:
    """What is to be stored under a URL: bytes, or a local file."""

    url: str
    source: bytes | Path
    known_sha256: str | None = None

    @property
    def data(self) -> bytes:
        if isinstance(self.source, bytes):
            return self.source
        with refusals_named(self.source):
            data = self.source.read_bytes()
        self._check(hashlib.sha256(data).hexdigest())
        return data

    def check_parts(self) -> None:
        """Look at a file that is too large to be held in memory, before it is sent."""
        assert isinstance(self.source, Path)
        if self.known_sha256 is not None:
            self._check(sha256_file(self.source))

    def _check(self, found: str) -> None:
        if self.known_sha256 not in (None, found):
            raise StorageError(
                f"{self.source} has SHA-256 {found[:12]}…, {str(self.known_sha256)[:12]}… is promised: it is damaged, and not sent"
            )

    @cached_property
    def size(self) -> int:
        if isinstance(self.source, bytes):
            return len(self.source)
        with refusals_named(self.source):
            return self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        if self.known_sha256 is not None:
            return self.known_sha256
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256_file(self.source)

    @cached_property
    def md5(self) -> str:
        """MD5, as object stores name what they hold; it finds accidents, not forgers."""
        if isinstance(self.source, bytes):
            return hashlib.md5(self.source, usedforsecurity=False).hexdigest()
        with refusals_named(self.source), self.source.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

    @cached_property
    def parts_md5(self) -> str:
        """S3's name for a file that went up in parts: MD5 over the MD5 of each."""
        assert isinstance(self.source, Path)
        digests = hashlib.md5(usedforsecurity=False)
        with refusals_named(self.source), self.source.open("rb") as file:
            while part := file.read(PART_BYTES):
                digests.update(hashlib.md5(part, usedforsecurity=False).digest())
        return f"{digests.hexdigest()}-{math.ceil(self.size / PART_BYTES)}"

    @property
    def goes_in_parts(self) -> bool:
        return isinstance(self.source, Path) and self.size >= 2 * PART_BYTES


def _put(content: _Content, *, replace: bool) -> bool:
    refuse_web(content.url)
    _ = content.size  # a local file that cannot be read is no business of the store's
    tries = 0

    def attempt() -> bool:
        nonlocal tries
        tries += 1
        if tries > 1 and _holds(content):  # the last answer was lost, and only that
            return True
        try:
            _send(content, replace=replace)
        except Exception as error:
            if _is_taken(error) and not replace:
                return _holds_now(content)
            raise _write_error(content, error) from error
        _check_arrived(content)
        return True

    return retried(content.url, attempt)


def _swap(content: _Content, version: str | None) -> bool:
    """Write content if the file is still of this version (None: absent); return whether it is there now."""

    def attempt() -> bool:
        try:
            _send(content, replace=version is not None, version=version)
        except Exception as error:
            if _is_taken(error):
                return bool(_holds(content))
            raise _write_error(content, error) from error
        return True

    return retried(content.url, attempt)


def _send(content: _Content, *, replace: bool, version: str | None = None) -> None:
    """Write once; raises what the file system does."""
    scheme = check_url(content.url)
    system, path = file_system(content.url)
    if scheme == "hf":
        return _commit(system, path, content, replace=replace, version=version)
    mode = "overwrite" if replace else "create"
    if scheme == "gs" and version is not None:
        return _send_generation(system, path, content, version)
    condition = {"IfMatch": version} if scheme == "s3" and version else {}
    if content.goes_in_parts and scheme in ("s3", "gs"):
        content.check_parts()
        some = {"max_concurrency": PARTS_AT_ONCE} if scheme == "s3" else {}
        system.put_file(str(content.source), path, mode=mode, chunksize=PART_BYTES, **some)
    else:
        # In one piece: never an open file, which on an error is closed, and thereby stores what it has so far.
        system.pipe_file(path, content.data, mode=mode, **condition)


def _send_generation(system: Any, path: str, content: _Content, generation: str) -> None:
    """Replace a file of Google's store on condition; gcsfs itself knows only the condition that there is none."""
    bucket, key, _ = system.split_path(path)
    system.call(
        "POST",
        f"{system._location}/upload/storage/v1/b/{{}}/o",
        bucket,
        uploadType="media",
        name=key,
        ifGenerationMatch=generation,
        data=content.data,
        headers={"Content-Type": "application/octet-stream"},
        json_out=True,
    )


def _commit(system: Any, path: str, content: _Content, *, replace: bool, version: str | None) -> None:
    """One commit to a repository of the Hub, on condition that nobody else has committed since it was looked at."""
    from huggingface_hub import CommitOperationAdd, HfApi

    place, api = system.resolve_path(path), HfApi()
    where = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
    parent = version or api.repo_info(**where).sha
    if not replace and info_of(content.url) is not None:
        raise FileExistsError(content.url)
    source = content.source if isinstance(content.source, bytes) else str(content.source)
    operation = CommitOperationAdd(path_in_repo=place.path_in_repo, path_or_fileobj=source)
    api.create_commit(
        operations=[operation], commit_message=f"Add {url_name(content.url)}", parent_commit=parent, **where
    )


def _is_taken(error: BaseException) -> bool:
    """Return whether a condition did not hold: the name is taken, or the file is of another version."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def _write_error(content: _Content, error: Exception) -> Exception:
    found = named(content.url, error, doing="written")
    if isinstance(found, RemoteFileMissing):
        return RemoteFileMissing(
            f"{content.url}: there is no such bucket or repository",
            fix="Check the address, or make it first",
        )
    return found


def _version(url: str) -> str | None:
    """Return what the store calls the present version of a file, `` where it has no name for it; None where there is none."""
    info = info_of(url)
    if info is None:
        return None
    if check_url(url) == "hf":
        from huggingface_hub import HfApi

        place = file_system(url)[0].resolve_path(url)
        return str(HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha)
    return str(info.get("generation") or info.get("ETag") or "")


def _read(url: str, max_bytes: int) -> bytes | None:
    try:
        return read_url(url, max_bytes=max_bytes)
    except RemoteFileMissing:
        return None


def _holds_now(content: _Content) -> bool:
    """The store says that the name is taken: by this content?"""
    found = _holds(content)
    if found is None:  # it went between the two, or this store answers late
        raise Interrupted("the name was taken, and then there was no file")
    return found


def _holds(content: _Content, size: int | None = None) -> bool | None:
    size = content.size if size is None else size
    info = info_of(content.url)
    if info is None:
        return None
    if info.get("size") != size:
        return False
    same = _same_checksum(content, info)
    return same or _received_sha256(content, size) == content.sha256  # a damaged local file has another checksum


def _same_checksum(content: _Content, info: dict[str, Any]) -> bool | None:
    """Compare with the store's own checksum; None where it has none that can be made here too."""
    if google := info.get("md5Hash"):
        return base64.b64decode(google).hex() == content.md5
    tag = str(info.get("ETag", "")).strip('"')
    # Under some encryptions, and for other sizes of parts, the ETag is something else: then it says nothing.
    if len(tag) == 32 and tag == content.md5:
        return True
    return True if content.goes_in_parts and tag == content.parts_md5 else None


def _received_sha256(content: _Content, size: int) -> str:
    def attempt() -> str:
        with open(os.devnull, "wb") as nowhere:
            return receive(content.url, nowhere, size=size).sha256

    return retried(content.url, attempt)


def _check_arrived(content: _Content) -> None:
    """Compare the length, and the checksum where the store gives one, of what was just stored."""
    info = info_of(content.url)
    if info is None or info.get("size") != content.size or _same_checksum(content, info) is False:
        found = "no file" if info is None else f"{info.get('size')} bytes"
        raise RemoteFileCorrupt(
            f"{content.url}: {content.size} bytes were stored, and now there is {found} or another"
            " checksum: another writer replaced it, or the store lost it",
            fix="Look who writes there, and run the same command again",
        )


def refuse_web(url: str) -> None:
    """Raise StorageError for an address of the web."""
    if is_web(url):
        raise StorageError(f"{url}: a web server takes no files; push to a bucket, or to a folder that it serves")
