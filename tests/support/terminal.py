"""What a program shows on a terminal that a test has made with `pty.openpty`."""

import os


def read_to_end(terminal: int) -> bytes:
    """Return all that is shown until no process has the other end open, and close this one."""
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # what Linux says at the end of a terminal
            break
        if not chunk:
            break
        shown += chunk
    os.close(terminal)
    return shown
