"""Imported by the server that forks loaders, and by nothing else: a loader whose parent has stopped ends without a traceback.

A parent that is stopped while its loaders start takes back what they were to read: the names of the semaphores, or the rest of
the message with their work. The parent says why it stopped; a traceback of a loader would follow that on the terminal.
"""

import pickle
import sys
from types import TracebackType

_show = sys.excepthook


def parent_has_stopped(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether an error of a starting process can only mean that its parent no longer waits for it.

    Semaphores lose their names when their creator drops them, so a name that is gone is the parent's doing; so is a message
    that ends early, which no parent sends that lives on.
    """
    frames: list[tuple[str, str]] = []
    while trace is not None:
        code, trace = trace.tb_frame.f_code, trace.tb_next
        frames.append((code.co_filename.rpartition("multiprocessing")[2].strip("/"), code.co_name))
    if isinstance(error, FileNotFoundError):
        return frames[-1:] == [("synchronize.py", "__setstate__")]
    return isinstance(error, (EOFError, pickle.UnpicklingError)) and frames[-1:] == [("spawn.py", "_main")]


def _show_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not parent_has_stopped(error, trace):
        _show(kind, error, trace)


sys.excepthook = _show_others  # multiprocessing calls it for an error of a process that has just been forked
