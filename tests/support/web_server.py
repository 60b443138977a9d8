"""A real web server on this machine for tests, which fails as it is told."""

import contextlib
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

DRIBBLE_S = 0.02  # time between two sendings of a slow answer
LATE_S = 5.0


class FailingServer(ThreadingHTTPServer):
    """A server on a free port of this machine that fails as it is told; `web_server` and `s3_server` say how.

    Attributes:
        requests: how often each thing was asked for.
        faults: for each thing, what goes wrong with its next answers.
        sent_bytes: of all bodies.
        go: set it to end a stall.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.requests: Counter[str] = Counter()
        self.faults: defaultdict[str, list[Any]] = defaultdict(list)
        self.sent_bytes = 0
        self.go = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no news."""

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Answer for as long as the block runs."""
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.go.set()
            self.shutdown()
            self.server_close()
            thread.join()


class WebServer(FailingServer):
    """Serves the files below a folder.

    Attributes:
        requests: how often each path was asked for.
        faults: for each path, what goes wrong with its next answers, one word or number each: a status such as 503;
            `cut` ends after half of the body, `cut-unannounced` does so without Content-Length; `flip` changes a byte;
            `stall` waits in the middle until `go` is set; `no-length` is a whole answer without Content-Length;
            `reset` closes without any answer; `late` begins to answer after LATE_S; a pair is a status and its headers;
            `dribble` sends a byte of the body every 20 ms, `dribble-headers` of the whole answer (`dribble-head` only to HEAD), and `steady` sends 1,000
            bytes every 20 ms.
        always: the same for all answers.
        ranges: whether parts of files may be asked for.
        sent_bytes: of all bodies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.always: dict[str, Any] = {}
        self.ranges = False


class _Handler(BaseHTTPRequestHandler):
    server: WebServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        with self.server.lock:
            self.server.requests[name] += 1
            queue = self.server.faults[name]
            fault = queue.pop(0) if queue else self.server.always.get(name)
        path = self.server.folder / name
        if fault == "late":
            time.sleep(LATE_S)
        if fault == "reset":
            self.connection.close()
        elif isinstance(fault, tuple):
            self._refuse(*fault)
        elif isinstance(fault, int) or not path.is_file():
            self.send_error(fault or 404)
        elif self.server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            self._send_range(path.read_bytes(), int(asked[1]), int(asked[2]) + 1, fault)
        elif fault in ("dribble", "dribble-headers", "steady"):
            self._dribble(path.read_bytes(), str(fault))
        else:
            self._send(path.read_bytes(), fault)

    def _refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _dribble(self, body: bytes, fault: str) -> None:
        head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        whole = 0 if fault == "dribble-headers" else len(head)
        self.wfile.write(head[:whole])
        self._trickle((head + body)[whole:], 1000 if fault == "steady" else 1)

    def _trickle(self, data: bytes, step: int) -> None:
        with contextlib.suppress(OSError):  # the client has gone away
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                if self.server.go.wait(DRIBBLE_S):
                    break

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if self.server.always.get(self.path.lstrip("/")) == "dribble-head":
            return self._dribble(path.read_bytes(), "dribble-headers")
        if not self.server.ranges or not path.is_file():
            return self.send_error(404 if self.server.ranges else 501)
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        return self.end_headers()

    def _send_range(self, body: bytes, start: int, stop: int, fault: str | None) -> None:
        part = body[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault == "dribble":
            return self._trickle(part, 1)
        self.wfile.write(part)
        self.server.sent_bytes += len(part)

    def _send(self, body: bytes, fault: str | None) -> None:
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        self.server.sent_bytes += len(body)
        self.send_response(200)
        if fault not in ("no-length", "cut-unannounced"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault == "stall":
            self.server.go.wait(30)
        if fault == "slow":
            time.sleep(0.3)
        if fault not in ("cut", "cut-unannounced"):
            self.wfile.write(body[half:])


def web_server(folder: Path) -> contextlib.AbstractContextManager[WebServer]:
    """Run a server for as long as the block runs."""
    return WebServer(folder).running()
