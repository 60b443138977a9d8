"""The stores that a URL may lead to: what each does in its own way, one object per kind. Everything else is in `remote` and `uploads`.

fsspec knows how each store is spoken to. What it leaves to us differs between them: the condition on which a file is created
or replaced, the mark of its present content, its checksum, and what its errors mean. A new store is one more class here.
"""

import base64
import datetime
import hashlib
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from pipeline.errors import DeitCliError, RemoteFileCorrupt, RemoteFileMissing, RemoteFileRefused, StorageError
from pipeline.storage.atomic import refusals_named, sha256_file

CONNECT_TIMEOUT_S = 20.0
STALL_TIMEOUT_S = 60.0  # without a single byte
BLOCK_BYTES = 16 << 20  # of one request to an object store
PART_BYTES = 16 << 20  # of one request of an upload; a file of up to two goes up in one
PARTS_AT_ONCE = 4
_MAY_PASS = frozenset({408, 425, 429})  # of the answers 4xx; 5xx may pass too
# What S3 answers with 400 or 409 where the transfer failed, or another writer was writing just then.
_MAY_PASS_S3 = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "XAmzContentSHA256Mismatch",
    }
)
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})  # of botocore


class Interrupted(Exception):
    """A transfer failed in a way that may pass: worth another try."""


class Sink(Protocol):
    """Where a store writes what it sends.

    Attributes:
        start: number of bytes that are there already; the store sends the rest.
        callback: fsspec's, which is told how many bytes the store announces.
    """

    start: int
    callback: Any

    def write(self, data: bytes) -> int:
        """Take the next bytes."""
        ...


@dataclass(frozen=True)
class Upload:
    """What is to be stored under a URL: bytes, or a local file.

    Attributes:
        known_sha256: promised hash of the file, or None; another file is not sent.
    """

    url: str
    source: bytes | Path
    known_sha256: str | None = None

    @property
    def data(self) -> bytes:
        """All bytes, read and checked anew each time."""
        if isinstance(self.source, bytes):
            return self.source
        with refusals_named(self.source):
            data = self.source.read_bytes()
        self._check(hashlib.sha256(data).hexdigest())
        return data

    def check_parts(self) -> None:
        """Compare the hash of a file that is too large to be held in memory, before it is sent."""
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
        """Number of bytes."""
        if isinstance(self.source, bytes):
            return len(self.source)
        with refusals_named(self.source):
            return self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256, hex: the promised one where there is one."""
        if self.known_sha256 is not None:
            return self.known_sha256
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256_file(self.source)

    @cached_property
    def md5(self) -> str:
        """MD5, hex, as object stores name what they hold; it finds accidents, not forgers."""
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
        """Whether it is a file too large for one request, where the store takes parts."""
        return isinstance(self.source, Path) and self.size >= 2 * PART_BYTES


class Store:
    """A kind of store as fsspec gives it; as it stands, the one in memory that tests use.

    Attributes:
        extra: extra of this package that brings what the store needs.
        takes_files: whether files can be written to it.
        lists_files: whether it can list the files of a folder.
        commits: whether each file that is written is a commit of its own on top of the one before.
    """

    extra = "http"
    takes_files = True
    lists_files = True
    commits = False

    def file_system(self, url: str) -> tuple[Any, str]:
        """Return fsspec's file system for a URL and the path in it; credentials and settings are fsspec's own.

        Raises:
            StorageError: a package is not installed.
        """
        import fsspec  # here, so that local files do without it

        try:
            return fsspec.url_to_fs(url, **self._options(url))
        except ImportError as error:
            raise StorageError(
                f"{url}: {url.partition('://')[0]}:// needs a package that is not installed ({error}): pip install"
                f' "deit-cli[{self.extra}]"'
            ) from error

    def _options(self, url: str) -> dict[str, Any]:
        return {"use_listings_cache": False}  # what a store said a while ago of a folder is nothing to decide by

    def receive(self, url: str, sink: Sink) -> None:
        """Send a file, from `sink.start` on, to a sink; raises what the file system does."""
        system, path = self.file_system(url)
        with system.open(path, "rb", block_size=BLOCK_BYTES) as remote:
            size = getattr(remote, "size", None)
            sink.callback.set_size(None if size is None else size - sink.start)
            remote.seek(sink.start)
            while block := remote.read(BLOCK_BYTES):
                sink.write(block)

    def info(self, url: str) -> dict[str, Any] | None:
        """Return what the store says of a file now, never from a list; None where there is none, or a folder.

        Raises:
            Interrupted: the store did not answer, and may do so if it is asked again.
            StorageError: it cannot be asked.
        """
        try:
            info = self._info(*self.file_system(url))
        except Exception as error:
            found = self.named(url, error)
            if isinstance(found, RemoteFileMissing):
                return None
            raise found from error
        return info if info["type"] == "file" else None

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        return system.info(path)

    def token(self, entry: dict[str, Any]) -> str:
        """Return what changes with the content of a file: the store's own mark of it, and its length."""
        marks = ("ETag", "etag", "md5Hash", "blob_id", "created", "mtime")
        mark = next((entry[name] for name in marks if entry.get(name) is not None), "")
        if isinstance(mark, datetime.datetime):  # so in memory, in lists; asked alone, it is a number
            mark = mark.timestamp()
        return f"{entry['size']} {mark}"

    def version(self, url: str, info: dict[str, Any]) -> str:
        """Return what the store calls the present version of a file, an empty text where it has no name for it."""
        return str(info.get("ETag") or "")

    def send(self, upload: Upload, *, replace: bool, version: str | None = None) -> None:
        """Write a file once; raises what the file system does.

        Args:
            upload: what to write, and where.
            replace: False: only if the name is free.
            version: replace this version only; None: any.
        """
        system, path = self.file_system(upload.url)
        self._send(system, path, upload, mode="overwrite" if replace else "create", version=version)

    def _send(self, system: Any, path: str, upload: Upload, *, mode: str, version: str | None) -> None:
        # In one piece: never an open file, which on an error is closed, and thereby stores what it has so far.
        system.pipe_file(path, upload.data, mode=mode)

    def same_checksum(self, upload: Upload, info: dict[str, Any]) -> bool | None:
        """Compare with the store's own checksum; None where it has none that can be made here too."""
        tag = str(info.get("ETag", "")).strip('"')
        # Under some encryptions, and for other sizes of parts, the ETag is something else: then it says nothing.
        if len(tag) == 32 and tag == upload.md5:
            return True
        return True if upload.goes_in_parts and tag == upload.parts_md5 else None

    def named(self, url: str, error: Exception, *, doing: str = "read") -> Exception:
        """Return the error of ours for what a file system raised: one to stop at, or one that may pass.

        Args:
            url: URL of the file.
            error: what was raised.
            doing: `read` or `written`, for the message.
        """
        if isinstance(error, (DeitCliError, Interrupted)):
            return error
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) and not self._code(error):
            # fsspec's `info` takes every failure for a missing file.
            return self.named(url, error.__cause__, doing=doing)
        if (own := self._named_by_code(url, error)) is not None:
            return own
        status = self.status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            return RemoteFileMissing(f"{url}: there is no such file ({status or 404})", fix="Check the address")
        if isinstance(error, PermissionError) or status in (401, 403):
            return RemoteFileRefused(
                f"{url}: access is refused ({status or 403})", fix="Check the address and your credentials"
            )
        if status == 416:
            return RemoteFileCorrupt(f"{url} is shorter than promised (416): it was cut, changed or replaced")
        if isinstance(error, (ValueError, TypeError, NotImplementedError)) or (
            status is not None and 300 <= status < 500 and status not in _MAY_PASS
        ):
            return StorageError(f"{url}: cannot be {doing}: {self._reason(error)}")
        return Interrupted(self._reason(error))

    def is_taken(self, error: BaseException) -> bool:
        """Return whether a condition did not hold: the name is taken, or the file is of another version."""
        return isinstance(error, FileExistsError) or self.status(error) == 412

    def status(self, error: BaseException | None) -> int | None:
        """Return the HTTP status in an error of aiohttp, gcsfs or huggingface_hub."""
        found = getattr(error, "status", None)  # of aiohttp, whose `code` warns that it is old
        if found is None:
            found = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
        return _http_status(found)

    def _code(self, error: BaseException) -> str:
        """Return the store's own name of an error, or nothing."""
        return ""

    def _named_by_code(self, url: str, error: Exception) -> Exception | None:
        """Return the error of ours for one that the store has a name for, or None."""
        return None

    def _reason(self, error: Exception) -> str:
        status = self.status(error)
        if status is not None:
            about = getattr(error, "message", "") or (str(error.args[-1]) if self._code(error) and error.args else "")
            return f"the server answers {status} {about}".rstrip()
        if isinstance(error, TimeoutError):
            return f"no answer for {STALL_TIMEOUT_S:g} s"
        text = " ".join(str(error).split())[:200]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


class WebStore(Store):
    """A web server: gives single files to anybody, and takes none."""

    takes_files = False
    lists_files = False

    def _options(self, url: str) -> dict[str, Any]:
        import aiohttp  # of the extra `http`
        from fsspec.config import conf

        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        settings = conf.get(url.partition("://")[0], {}).get("client_kwargs", {})
        return {"client_kwargs": {**settings, "timeout": timeout}}

    def receive(self, url: str, sink: Sink) -> None:
        """Send a file to a sink, as it is: not compressed."""
        system, path = self.file_system(url)
        # Without this a server may compress, and the announced length would be that of something else.
        headers = {**getattr(system, "kwargs", {}).get("headers", {}), "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={sink.start}-"} if sink.start else {}
        system.get_file(path, sink, callback=sink.callback, chunk_size=1 << 20, headers=headers)


class S3Store(Store):
    """Amazon's S3, and whatever speaks its language."""

    extra = "s3"

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        return system.info(path, refresh=True)

    def _send(self, system: Any, path: str, upload: Upload, *, mode: str, version: str | None) -> None:
        if upload.goes_in_parts:
            upload.check_parts()
            system.put_file(str(upload.source), path, mode=mode, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        else:
            condition = {"IfMatch": version} if version else {}
            system.pipe_file(path, upload.data, mode=mode, **condition)

    def status(self, error: BaseException | None) -> int | None:
        """Return the HTTP status in an error of botocore, or in one that s3fs has translated."""
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return _http_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        found = super().status(error)
        if found is None and isinstance(error, OSError) and self._code(error):
            return self.status(error.__cause__)
        return found

    def _code(self, error: BaseException) -> str:
        for each in (error, error.__cause__):
            response = getattr(each, "response", None)
            if isinstance(response, dict):
                return str(response.get("Error", {}).get("Code", ""))
        return ""

    def _named_by_code(self, url: str, error: Exception) -> Exception | None:
        code = self._code(error)
        if code == "NoSuchBucket":
            return RemoteFileMissing(f"{url}: there is no such bucket", fix="Check the address, or make it first")
        if code == "RequestTimeTooSkewed":
            return RemoteFileRefused(
                f"{url}: access is refused: the clocks of this machine and of the store differ", fix="Set this one"
            )
        if type(error).__name__ in _NO_CREDENTIALS:
            return RemoteFileRefused(f"{url}: no credentials are known for it: {self._reason(error)}")
        return Interrupted(self._reason(error)) if code in _MAY_PASS_S3 else None


class GoogleStore(Store):
    """Google Cloud Storage."""

    extra = "gcs"

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        system.invalidate_cache()
        return system.info(path)

    def version(self, url: str, info: dict[str, Any]) -> str:
        """Return the generation of a file."""
        return str(info.get("generation") or "")

    def _send(self, system: Any, path: str, upload: Upload, *, mode: str, version: str | None) -> None:
        if version is not None:
            self._send_generation(system, path, upload, version)
        elif upload.goes_in_parts:
            upload.check_parts()
            system.put_file(str(upload.source), path, mode=mode, chunksize=PART_BYTES)
        else:
            system.pipe_file(path, upload.data, mode=mode)

    def _send_generation(self, system: Any, path: str, upload: Upload, generation: str) -> None:
        """Replace a file on condition; gcsfs itself can only ask that no such file exists."""
        bucket, key, _ = system.split_path(path)
        system.call(
            "POST",
            f"{system._location}/upload/storage/v1/b/{{}}/o",
            bucket,
            uploadType="media",
            name=key,
            ifGenerationMatch=generation,
            data=upload.data,
            headers={"Content-Type": "application/octet-stream"},
            json_out=True,
        )

    def same_checksum(self, upload: Upload, info: dict[str, Any]) -> bool | None:
        """Compare with the MD5 that Google keeps; a file that was composed of several has none."""
        stored = info.get("md5Hash")
        return base64.b64decode(stored).hex() == upload.md5 if stored else None


class HubStore(Store):
    """Repositories of the Hugging Face Hub, where each file that is written is a commit."""

    extra = "hub"
    commits = True

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        system.invalidate_cache()
        return system.info(path, refresh=True)

    def version(self, url: str, info: dict[str, Any]) -> str:
        """Return the last commit to the repository."""
        return self._last_commit(self.file_system(url)[0].resolve_path(url))

    def send(self, upload: Upload, *, replace: bool, version: str | None = None) -> None:
        """Commit a file, on condition that nobody else has committed since it was looked at."""
        from huggingface_hub import CommitOperationAdd, HfApi

        system, path = self.file_system(upload.url)
        place = system.resolve_path(path)
        parent = version or self._last_commit(place)
        if not replace and self.info(upload.url) is not None:
            raise FileExistsError(upload.url)
        source = upload.source if isinstance(upload.source, bytes) else str(upload.source)
        HfApi().create_commit(
            operations=[CommitOperationAdd(path_in_repo=place.path_in_repo, path_or_fileobj=source)],
            commit_message=f"Add {unquote(upload.url).rstrip('/').rpartition('/')[2]}",
            parent_commit=parent,
            repo_id=place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
        )

    def _last_commit(self, place: Any) -> str:
        from huggingface_hub import HfApi

        return str(HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha)


STORES: dict[str, Store] = {
    "http": WebStore(),
    "https": WebStore(),
    "s3": S3Store(),
    "gs": GoogleStore(),
    "hf": HubStore(),
    "memory": Store(),
}


def store_of(url: str) -> Store:
    """Return the store that a URL leads to.

    Raises:
        StorageError: we do not know its scheme; others may name local files or even commands.
    """
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        *first, last = (f"{known}://" for known in STORES if known != "memory")
        raise StorageError(f"{url}: a URL must begin with {', '.join(first)} or {last}, got {scheme}://")
    return STORES[scheme]


def _http_status(found: object) -> int | None:
    return int(str(found)) if re.fullmatch("[1-5][0-9][0-9]", str(found)) else None
