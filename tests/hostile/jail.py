"""A process in which a hostile file is used: an exception of ours, or it is a finding.

One server imports everything once, and forks for each use. It is started anew for these tests, so that nothing which other
tests did counts, and with the allocator of the system, because Arrow's own reserves a GiB of addresses at once.
"""

import atexit
import functools
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
MEMORY_BYTES = 1 << 30  # that a file may make us ask for, beyond what the libraries have taken
PATIENCE_S = 60


@dataclass(frozen=True)
class Outcome:
    """What became of a use: the error's type and text, or `fine`; and the MiB that it had in memory at most."""

    error: str
    text: str
    mib: int


def used(use: Callable[[Path], Any], path: Path) -> Outcome:
    """Use a file in a process of its own, and return what became of it."""
    server = _server()
    assert server.stdin
    assert server.stdout
    pickle.dump((use.__name__, path), server.stdin)
    server.stdin.flush()
    return Outcome(*pickle.load(server.stdout))


def listing(folder: Path) -> dict[str, int]:
    """Return every file below a folder with its time of change, links not followed."""
    found = {}
    for root, _, names in os.walk(folder):
        found |= {os.path.join(root, name): os.lstat(os.path.join(root, name)).st_mtime_ns for name in names}
    return found


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "hostile.jail"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    from hostile import uses

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    while True:
        try:
            name, path = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            _use(getattr(uses, name), path, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        answers.write(said or pickle.dumps(("no answer", f"status {status}", 0)))
        answers.flush()


def _use(use: Callable[[Path], Any], path: Path, answer: int) -> None:
    from pipeline.errors import DeitCliError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(path.parent)
    signal.alarm(PATIENCE_S)  # ends this process: no answer is an answer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        use(path)
        error, text = "fine", ""
    except DeitCliError as caught:
        error, text = f"DeitCliError {type(caught).__name__}", str(caught)
    except BaseException as caught:
        error, text = type(caught).__name__, str(caught)
    mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    os.write(answer, pickle.dumps((error, text[:10_000], mib)))
    os._exit(0)


if __name__ == "__main__":
    _serve()
