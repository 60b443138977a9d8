"""Runs one command, and ends it when the process that asked for it is gone, even if that was killed by SIGKILL.

    python keeper.py LOCK COMMAND ...

A program by itself, which imports only the standard library and starts in a few milliseconds. Its standard input is a pipe whose
other end only its parent has: the end of that pipe is the end of the parent, on every system. Linux's PR_SET_PDEATHSIG would
not reach the children of the command, such as loader processes and ranks.

LOCK is a file that stays locked until every process of the command is gone, because they inherit it. So a command that is
started again at once waits for the remains of the killed one.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

WAIT_S = 60  # for the processes of a killed command to disappear
BUSY = 75  # EX_TEMPFAIL of sysexits.h


def main(lock: str, command: list[str]) -> int:
    """Run the command; return its exit code, 128 plus the number of the signal that ended it, or BUSY."""
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    if not _locked(held, asked):
        print(f"{lock} is locked: another process still runs this step", file=sys.stderr)
        return BUSY
    if asked:
        return 128 + asked[0]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(held,))
    running.append(process)
    for number in asked:  # a signal that came before the line above
        process.send_signal(number)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _locked(file: int, asked: list[int]) -> bool:
    """Lock a file; return whether that worked within the time, and before a signal."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not asked:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # some network file systems have no locks
            return True
        else:
            return True
    return bool(asked)


def _end_with_parent() -> None:
    """Wait for the end of standard input; then kill every process below this one, and this one."""
    while os.read(0, 1024):
        pass
    for process in _below(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _below(process: int) -> list[int]:
    """Return the processes that a process has started, and those that these have started."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = list(children.get(process, []))
    for each in found:  # grows while it is read
        found += children.get(each, [])
    return found


def _parents() -> list[tuple[int, int]]:
    """Return every process of this machine with its parent."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                pairs.append(
                    (int(path.parent.name), int(path.read_text(errors="replace").rpartition(")")[2].split()[1]))
                )
        return pairs
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
