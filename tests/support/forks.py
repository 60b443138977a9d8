"""Runs that can be killed: forks of one server that has imported everything, each in a session of its own."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from support.background import wait_until
from support.builders import with_checkout


def serve(runs: dict[str, Callable[..., None]]) -> None:
    """Answer each line of stdin: start a run in a fork, or say with which code one has ended (null: it has not)."""
    torch.set_num_threads(1)  # and no operation before a fork: threads do not come along
    # PR_SET_CHILD_SUBREAPER: orphans become ours. Left as zombies, they would count as living writers.
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
    codes: dict[int, int] = {}
    for line in sys.stdin:
        match json.loads(line):
            case ["start", run, log, arguments]:
                answer = os.fork() or run_and_exit(runs[run], Path(log), arguments)
            case ["code", pid]:
                codes |= reaped()
                answer = codes.get(pid)
            case request:
                raise ValueError(request)
        print(json.dumps(answer), flush=True)


def reaped() -> Iterator[tuple[int, int]]:
    """Yield (pid, exit code) of every child that has ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], os.waitstatus_to_exitcode(ended[1])


def run_and_exit(run: Callable[..., None], log: Path, arguments: dict[str, Any]) -> None:
    os.setsid()
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        run(**arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Server:
    """The test's end of the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, *request: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the server has ended"
        return json.loads(line)


@contextlib.contextmanager
def serving(module: str) -> Iterator[Server]:
    """Start a server of the runs in `RUNS` of a test module; on leaving, its stdin closes, and it ends."""
    folder = Path(str(sys.modules[module].__file__)).parent
    environment = with_checkout(folder, OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", f"import {module}; from support import forks; forks.serve({module}.RUNS)"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Server(process)


class Run:
    """A run in a session of its own; of that, nothing is left after the with block."""

    def __init__(self, server: Server, run: str, log: Path, **arguments: Any) -> None:
        self._server, self._log = server, log
        self.pid: int = server.ask("start", run, str(log), arguments)
        wait_until(self.members, "the run has its session")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        while members := self.members():
            for pid in members:
                kill(pid)
            self._server.ask("code", self.pid)  # reaps

    @property
    def code(self) -> int | None:
        """Exit code of the first process, None as long as it runs."""
        return self._server.ask("code", self.pid)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def members(self) -> list[int]:
        """Return all processes of the session, the ended and not yet reaped included."""
        return [pid for pid, (_, session) in parents_and_sessions().items() if session == self.pid]

    def teachers(self) -> list[int]:
        """Return the teacher processes."""
        children = [pid for pid, (parent, _) in parents_and_sessions().items() if parent == self.pid]
        return [pid for pid in children if not is_helper(pid)]

    def wait_for(self, place: Callable[[], bool]) -> None:
        """Wait until the run has come to a place, or has ended."""
        wait_until(lambda: place() or self.code is not None, f"the run comes to its place; it said: {self.log}")

    def wait_gone(self) -> int:
        """Wait until every process of the session has ended by itself; return the first one's exit code."""
        wait_until(lambda: self.code is not None, f"the run ends; it said: {self.log}")
        wait_until(lambda: self.code is not None and not self.members(), "the run's other processes end")
        code = self.code
        assert code is not None
        return code


def parents_and_sessions() -> dict[int, tuple[int, int]]:
    """Return parent and session of every process."""
    found: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            _, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            found[int(path.parent.name)] = int(parent), int(session)
    return found


def is_helper(pid: int) -> bool:
    """Whether a process is one of multiprocessing's own."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"resource_tracker" in command or b"forkserver" in command


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
