"""Supported stores: their differences, one class per kind. The common code is in `remote` and `uploads`.

fsspec implements the protocol of each store. The rest, which differs between stores, is here: conditions for creating
or replacing a file, the mark of its current content, its checksum, and the meaning of errors. A new store is one more class.
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
from pipeline.storage.patience import ANSWER_S, Interrupted, longer_than, retry_after_s, watched

CONNECT_TIMEOUT_S = 20.0
STALL_TIMEOUT_S = 60.0  # without receiving a byte
BLOCK_BYTES = 4 << 20  # size of one request to a store whose library delivers a request as a whole
STREAM_BYTES = 1 << 20  # largest part of an answer that is delivered at once where a library passes on what has arrived
PART_BYTES = 16 << 20  # size of one request of an upload; a file of up to two parts is sent in one request
PARTS_AT_ONCE = 4
_MAY_PASS = frozenset({408, 425, 429})  # temporary 4xx errors; 5xx are temporary, too
# S3 error codes with status 400 or 409 if the transfer failed or another writer was writing at the same time.
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


class Sink(Protocol):
    """A file-like object that a store writes a received file to.

    Attributes:
        start: number of bytes already received; the store sends the rest.
        callback: fsspec callback, which gets the announced number of bytes.
    """

    start: int
    callback: Any

    def write(self, data: bytes) -> int:
        """Write the next bytes and return their number."""
        ...


@dataclass(frozen=True)
class Upload:
    """The content to store under a URL: bytes, or a local file.

    Attributes:
        known_sha256: promised hash of the file, or None; a file with another hash is not sent.
    """

    url: str
    source: bytes | Path
    known_sha256: str | None = None

    @property
    def data(self) -> bytes:
        """Return all bytes, read and checked again at each call."""
        if isinstance(self.source, bytes):
            return self.source
        with refusals_named(self.source):
            data = self.source.read_bytes()
        self._check(hashlib.sha256(data).hexdigest())
        return data

    def check_parts(self) -> None:
        """Check the hash of a file that is too large for memory, before it is sent."""
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
        """Return the number of bytes."""
        if isinstance(self.source, bytes):
            return len(self.source)
        with refusals_named(self.source):
            return self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256, hex: the promised one if there is one."""
        if self.known_sha256 is not None:
            return self.known_sha256
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256_file(self.source)

    @cached_property
    def md5(self) -> str:
        """Return the MD5, hex, which object stores use as checksum; it detects accidents, not forgery."""
        if isinstance(self.source, bytes):
            return hashlib.md5(self.source, usedforsecurity=False).hexdigest()
        with refusals_named(self.source), self.source.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

    @cached_property
    def parts_md5(self) -> str:
        """Return S3's ETag of a file uploaded in parts: the MD5 over the MD5 of each part."""
        assert isinstance(self.source, Path)
        digests = hashlib.md5(usedforsecurity=False)
        with refusals_named(self.source), self.source.open("rb") as file:
            while part := file.read(PART_BYTES):
                digests.update(hashlib.md5(part, usedforsecurity=False).digest())
        return f"{digests.hexdigest()}-{math.ceil(self.size / PART_BYTES)}"

    @property
    def goes_in_parts(self) -> bool:
        """Return True if this is a file too large for one request and the store accepts parts."""
        return isinstance(self.source, Path) and self.size >= 2 * PART_BYTES


class Store:
    """A kind of store in fsspec; this base class itself serves fsspec's in-memory store for tests.

    Attributes:
        extra: extra of this package that installs what the store needs.
        takes_files: True if files can be written to it.
        lists_files: True if it can list the files of a folder.
        commits: True if each written file is a commit on top of the previous one.
        grain: bytes that the library of the store delivers at once, so a slow transfer is noticed after the time that as many
            bytes may take; 0: it passes on what has arrived.
    """

    extra = "http"
    takes_files = True
    lists_files = True
    commits = False
    grain = BLOCK_BYTES

    def file_system(self, url: str) -> tuple[Any, str]:
        """Return fsspec's file system for a URL and the path in it; credentials and settings are fsspec's own.

        Raises:
            StorageError: a required package is not installed.
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
        return {"use_listings_cache": False}  # never decide by an old listing of a folder

    def receive(self, url: str, sink: Sink) -> None:
        """Write a file from byte `sink.start` on to a sink; it raises the errors of the file system."""
        system, path = self.file_system(url)
        with system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none") as remote:  # a request for each block
            size = getattr(remote, "size", None)
            sink.callback.set_size(None if size is None else size - sink.start)
            remote.seek(sink.start)
            while block := remote.read(BLOCK_BYTES):
                sink.write(block)

    def info(self, url: str) -> dict[str, Any] | None:
        """Return the store's current information on a file, never cached; None if it does not exist or is a folder.

        Raises:
            Interrupted: the store did not answer, and a retry may succeed.
            StorageError: the store cannot be accessed.
        """
        try:
            info = watched(lambda: self._info(*self.file_system(url)), longer_than(ANSWER_S))
        except Exception as error:
            found = self.named(url, error)
            if isinstance(found, RemoteFileMissing):
                return None
            raise found from error
        return info if info["type"] == "file" else None

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        return system.info(path)

    def token(self, entry: dict[str, Any]) -> str:
        """Return the token of a file, which changes with its content: the store's own mark and the length."""
        marks = ("ETag", "etag", "md5Hash", "blob_id", "created", "mtime")
        mark = next((entry[name] for name in marks if entry.get(name) is not None), "")
        if isinstance(mark, datetime.datetime):  # the in-memory store: a datetime in lists, a number for a single file
            mark = mark.timestamp()
        return f"{entry['size']} {mark}"

    def version(self, url: str, info: dict[str, Any]) -> str:
        """Return the store's name of the current version of a file, an empty text if it has none."""
        return str(info.get("ETag") or "")

    def send(self, upload: Upload, *, replace: bool, version: str | None = None) -> None:
        """Write a file in one attempt; it raises the errors of the file system.

        Args:
            upload: content and URL.
            replace: True to replace a file; False to write only if the name is free.
            version: version that may be replaced; None: any.
        """
        system, path = self.file_system(upload.url)
        self._send(system, path, upload, mode="overwrite" if replace else "create", version=version)

    def _send(self, system: Any, path: str, upload: Upload, *, mode: str, version: str | None) -> None:
        # In one request, never through an open file: that is closed on an error, which stores the bytes written so far.
        system.pipe_file(path, upload.data, mode=mode)

    def same_checksum(self, upload: Upload, info: dict[str, Any]) -> bool | None:
        """Return True if the store's own checksum is the same; None if it has none that can be computed here."""
        tag = str(info.get("ETag", "")).strip('"')
        # With some encryptions, and other part sizes, the ETag is not such a checksum, so a difference proves nothing.
        if len(tag) == 32 and tag == upload.md5:
            return True
        return True if upload.goes_in_parts and tag == upload.parts_md5 else None

    def named(self, url: str, error: Exception, *, doing: str = "read") -> Exception:
        """Return our error for an exception of a file system: a permanent error, or `Interrupted`.

        Args:
            url: URL of the file.
            error: exception of the file system.
            doing: `read` or `written`, for the message.
        """
        if isinstance(error, (DeitCliError, Interrupted)):
            return error
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) and not self._code(error):
            # fsspec's `info` reports every failure as a missing file.
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
        return Interrupted(self._reason(error), retry_after_s(error))

    def is_taken(self, error: BaseException) -> bool:
        """Return True if a condition failed: the name is taken, or the file has another version."""
        return isinstance(error, FileExistsError) or self.status(error) == 412

    def status(self, error: BaseException | None) -> int | None:
        """Return the HTTP status in an error of aiohttp, gcsfs or huggingface_hub."""
        found = getattr(error, "status", None)  # aiohttp's `code` gives a deprecation warning
        if found is None:
            found = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
        return _http_status(found)

    def _code(self, error: BaseException) -> str:
        """Return the store's own code of an error, or an empty text."""
        return ""

    def _named_by_code(self, url: str, error: Exception) -> Exception | None:
        """Return our error for an exception whose code is known, or None."""
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
    """A web server: single files can be read, and nothing can be written."""

    takes_files = False
    lists_files = False
    grain = 0

    def _options(self, url: str) -> dict[str, Any]:
        import aiohttp  # installed by the extra `http`
        from fsspec.config import conf

        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        settings = conf.get(url.partition("://")[0], {}).get("client_kwargs", {})
        return {"client_kwargs": {**settings, "timeout": timeout}}

    def receive(self, url: str, sink: Sink) -> None:
        """Write a file to a sink without compression in transit."""
        system, path = self.file_system(url)
        # Without this a server may compress, and the announced length would be that of the compressed file.
        headers = {**getattr(system, "kwargs", {}).get("headers", {}), "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={sink.start}-"} if sink.start else {}
        system.get_file(path, sink, callback=sink.callback, chunk_size=STREAM_BYTES, headers=headers)


class S3Store(Store):
    """Amazon S3 and compatible stores."""

    extra = "s3"
    grain = 0

    def receive(self, url: str, sink: Sink) -> None:
        """Write a file to a sink in one request, part by part as it arrives; s3fs itself waits for whole blocks."""
        from fsspec.asyn import sync

        system, path = self.file_system(url)
        bucket, key, _ = system.split_path(path)
        rest = {"Range": f"bytes={sink.start}-"} if sink.start else {}
        answer = system.call_s3("get_object", system.req_kw, Bucket=bucket, Key=key, **rest)
        body = answer["Body"]
        try:
            sink.callback.set_size(answer.get("ContentLength"))
            while part := sync(system.loop, body.read, STREAM_BYTES):
                sink.write(part)
        finally:
            system.loop.call_soon_threadsafe(body.close)  # it belongs to the thread of that loop

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
        """Return the HTTP status in an error of botocore or in its translation by s3fs."""
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
        return Interrupted(self._reason(error), retry_after_s(error)) if code in _MAY_PASS_S3 else None


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
        """Replace a file if it has this generation; gcsfs itself only has the condition that the file does not exist."""
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
        """Return True if Google's MD5 is the same; None for a file composed of several, which has none."""
        stored = info.get("md5Hash")
        return base64.b64decode(stored).hex() == upload.md5 if stored else None


class HubStore(Store):
    """Repositories of the Hugging Face Hub, where each written file is a commit."""

    extra = "hub"
    commits = True

    def _info(self, system: Any, path: str) -> dict[str, Any]:
        system.invalidate_cache()
        return system.info(path, refresh=True)

    def version(self, url: str, info: dict[str, Any]) -> str:
        """Return the last commit to the repository."""
        return self._last_commit(self.file_system(url)[0].resolve_path(url))

    def send(self, upload: Upload, *, replace: bool, version: str | None = None) -> None:
        """Commit a file on the condition that there was no other commit since `version`."""
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
    """Return the store of a URL.

    Raises:
        StorageError: the scheme is not supported; unknown schemes could name local files or even commands.
    """
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        *first, last = (f"{known}://" for known in STORES if known != "memory")
        raise StorageError(f"{url}: a URL must begin with {', '.join(first)} or {last}, got {scheme}://")
    return STORES[scheme]


def _http_status(found: object) -> int | None:
    return int(str(found)) if re.fullmatch("[1-5][0-9][0-9]", str(found)) else None
